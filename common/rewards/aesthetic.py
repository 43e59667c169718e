"""LAION's aesthetic predictor on CLIP's normalised embedding (Black et al. 2023, 5.2).

The paper calls it a linear model; the released file is an MLP of linear layers.
"""

from pathlib import Path

import torch

from common.rewards.base import (
    MODEL_FILES,
    PROCESSOR_FILES,
    Reward,
    check_options,
    check_weights,
    load_model,
    reward_of_pixels,
    to_pil,
)
from common.rewards.pixels import tensor_pixels

CLIP = "openai/clip-vit-large-patch14"
PREDICTOR = ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
"""The hub's copy of LAION's sac+logos+ava1-l14-linearMSE.pth."""
FILES = ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth")


def predictor(state: dict[str, torch.Tensor]) -> torch.nn.Sequential:
    """The MLP of LAION's file, whose keys are layers.{0,2,4,6,7}.

    They are linear maps, with dropout between the first four.
    """
    weights = {key: value for key, value in state.items() if key.endswith("weight")}
    linear = {int(key.split(".")[1]): value.shape for key, value in weights.items()}
    layers = []
    for i in range(max(linear) + 1):
        if i in linear:
            layers.append(torch.nn.Linear(linear[i][1], linear[i][0]))
        else:
            layers.append(torch.nn.Dropout(0.2 if i < 4 else 0.1))
    mlp = torch.nn.Sequential(*layers)
    mlp.load_state_dict({key.removeprefix("layers."): value for key, value in state.items()})
    return mlp


def check(name: str, weights: str | None, options: dict[str, str]) -> None:
    check_options(name, options)
    check_weights(weights, *MODEL_FILES, PROCESSOR_FILES, FILES)


def load(
    name: str,
    weights: str | None,
    options: dict[str, str],
    device: str | torch.device,
    differentiable: bool = False,
) -> Reward:
    """In float32; about 1 to 10.

    `weights`: a hub id or a folder with a CLIP model and the predictor's file beside it; None is
    CLIP ViT-L/14 with LAION's predictor.
    """
    from huggingface_hub import hf_hub_download
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    clip = load_model(CLIPVisionModelWithProjection, weights or CLIP, device)
    processor = CLIPImageProcessor.from_pretrained(weights or CLIP)
    if weights and Path(weights).is_dir():
        path = next(path for file in FILES if (path := Path(weights) / file).is_file())
    else:
        path = hf_hub_download(*((weights, FILES[0]) if weights else PREDICTOR))
    mlp = predictor(torch.load(path, map_location="cpu", weights_only=True))
    mlp.float().eval().requires_grad_(False).to(device)

    def exact(images: torch.Tensor) -> torch.Tensor:
        return processor(images=to_pil(images), return_tensors="pt").pixel_values

    def score(pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        embeds = clip(pixels.to(device)).image_embeds
        return mlp(torch.nn.functional.normalize(embeds, dim=-1))[:, 0]

    return reward_of_pixels(score, exact, tensor_pixels(processor) if differentiable else None)
