"""Cosine of a picture's and its prompt's embedding: CLIP score, BLIP score and PickScore.

The first two as in Fan et al. 2023, Table 2 and App. C; PickScore (Kirstain et al. 2023) is a CLIP
trained on what people chose, and multiplies the cosine by the scale that it has learned.
"""

import torch

from common.rewards.base import (
    MODEL_FILES,
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    Reward,
    check_options,
    check_weights,
    load_model,
    reward_of_pixels,
    to_pil,
)
from common.rewards.pixels import tensor_pixels

DEFAULTS = {
    "clip_score": "openai/clip-vit-large-patch14",
    "blip_score": "Salesforce/blip-itm-large-coco",
    "pick_score": "yuvalkirstain/PickScore_v1",
}
PROCESSORS = {"yuvalkirstain/PickScore_v1": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}
"""Where the processor of weights is that of other weights, as in PickScore's own code."""


def check(name: str, weights: str | None, options: dict[str, str]) -> None:
    check_options(name, options)
    check_weights(weights, *MODEL_FILES, PROCESSOR_FILES, TOKENIZER_FILES)


def load(
    name: str,
    weights: str | None,
    options: dict[str, str],
    device: str | torch.device,
    differentiable: bool = False,
) -> Reward:
    """In float32, in [-1, 1]; PickScore is that times its scale, about 100.

    `weights`: a hub id or a folder of a CLIPModel, or of a BlipForImageTextRetrieval.
    """
    from transformers import AutoProcessor, BlipForImageTextRetrieval, CLIPModel

    weights = weights or DEFAULTS[name]
    processor = AutoProcessor.from_pretrained(PROCESSORS.get(weights, weights))
    model_class = BlipForImageTextRetrieval if name == "blip_score" else CLIPModel
    model = load_model(model_class, weights, device)

    of_pictures = processor.image_processor

    def exact(images: torch.Tensor) -> torch.Tensor:
        return of_pictures(images=to_pil(images), return_tensors="pt").pixel_values

    def score(pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        inputs = processor(text=list(prompts), padding=True, truncation=True, return_tensors="pt")
        inputs = {**inputs.to(device), "pixel_values": pixels.to(device)}
        if name == "blip_score":
            return model(**inputs, use_itm_head=False).itm_score.diagonal()
        out = model(**inputs)
        cosine = (out.image_embeds * out.text_embeds).sum(-1)
        return model.logit_scale.exp() * cosine if name == "pick_score" else cosine

    return reward_of_pixels(score, exact, tensor_pixels(of_pictures) if differentiable else None)
