"""Cosine of a picture's and its prompt's embedding: CLIP score and BLIP score.

As in Fan et al. 2023, Table 2 and App. C.
"""

import torch

from common.rewards.base import (
    MODEL_FILES,
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    Reward,
    batched,
    check_options,
    check_weights,
    load_model,
    to_pil,
)

DEFAULTS = {
    "clip_score": "openai/clip-vit-large-patch14",
    "blip_score": "Salesforce/blip-itm-large-coco",
}


def check(name: str, weights: str | None, options: dict[str, str]) -> None:
    check_options(name, options)
    check_weights(weights, *MODEL_FILES, PROCESSOR_FILES, TOKENIZER_FILES)


def load(
    name: str, weights: str | None, options: dict[str, str], device: str | torch.device
) -> Reward:
    """In float32, in [-1, 1].

    `weights`: a hub id or a folder of a CLIPModel, or of a BlipForImageTextRetrieval.
    """
    from transformers import AutoProcessor, BlipForImageTextRetrieval, CLIPModel

    weights = weights or DEFAULTS[name]
    processor = AutoProcessor.from_pretrained(weights)
    model_class = CLIPModel if name == "clip_score" else BlipForImageTextRetrieval
    model = load_model(model_class, weights, device)

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        inputs = processor(
            images=to_pil(images),
            text=list(prompts),
            padding=True,
            truncation=True,
            return_tensors="pt",
        ).to(device)
        if name == "clip_score":
            out = model(**inputs)
            return (out.image_embeds * out.text_embeds).sum(-1)
        return model(**inputs, use_itm_head=False).itm_score.diagonal()

    return batched(reward)
