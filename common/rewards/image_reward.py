"""ImageReward (Xu et al. 2023, arXiv:2304.05977), native on transformers.

It has the same weights and the same scores as the package.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.rewards.base import (
    TOKENIZER_FILES,
    Reward,
    RewardError,
    check_options,
    check_weights,
    reward_of_pixels,
    to_pil,
)
from common.rewards.pixels import CLIP_MEAN, CLIP_STD, normalised, pil_resize, resized

# The published model is BLIP's image encoder, BLIP's text encoder with cross-attention to the
# image, and an MLP on the first text token. These are its sizes; a folder with its own config.json
# has others.
IMAGE_REWARD_CONFIG = {
    "vision": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
    },
    "text": {
        "vocab_size": 30524,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "encoder_hidden_size": 1024,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 512,
    },
    "mlp": [1024, 128, 64, 16, 1],
    "max_length": 35,
    "score_mean": 0.16717362830052426,
    "score_std": 1.0333394966054072,
}


class ImageReward(torch.nn.Module):
    """ImageReward on transformers' own BLIP.

    It has the same weights and the same scores as the package `image-reward` 1.5.
    forward(pixel_values (B, 3, S, S), input_ids (B, L), attention_mask (B, L)) gives the
    standardised scores (B,).
    """

    def __init__(self, config: dict):
        super().__init__()
        from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        self.config = config
        vision_config = BlipVisionConfig(
            **config["vision"], hidden_act="gelu", attn_implementation="eager"
        )
        # is_decoder here gives the layers their cross-attention; is_decoder=False in the call keeps
        # them from being causal.
        text_config = BlipTextConfig(
            **config["text"],
            is_decoder=True,
            hidden_act="gelu",
            use_cache=False,
            attn_implementation="eager",
        )
        self.vision = BlipVisionModel(vision_config)
        self.text = BlipTextModel(text_config, add_pooling_layer=False)
        widths = [config["text"]["hidden_size"], *config["mlp"]]
        layers = []
        for i, (width, next_width) in enumerate(zip(widths, widths[1:])):
            layers.append(torch.nn.Linear(width, next_width))
            if i < 3:
                layers.append(torch.nn.Dropout(0.2 if i < 2 else 0.1))
        self.mlp = torch.nn.Sequential(*layers)

    def features(self, pixel_values, input_ids, attention_mask):
        """The text's tokens, having attended to the picture, (B, L, D)."""
        embeds = self.vision(pixel_values=pixel_values).last_hidden_state
        return self.text(
            input_ids=input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=embeds,
            encoder_attention_mask=embeds.new_ones(embeds.shape[:2], dtype=torch.long),
            is_decoder=False,
        ).last_hidden_state

    def score(self, features):
        mean, std = self.config["score_mean"], self.config["score_std"]
        return (self.mlp(features[:, 0])[:, 0] - mean) / std

    def forward(self, pixel_values, input_ids, attention_mask):
        return self.score(self.features(pixel_values, input_ids, attention_mask))


def resize_and_crop(height: int, width: int, size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The package's geometry: short side to `size`, then the centre.

    (height, width) of the resized picture, and (top, left) of the square of `size` in it.
    """
    short = min(height, width)
    shape = int(size * height / short), int(size * width / short)
    return shape, tuple(round((n - size) / 2.0) for n in shape)


def image_reward_pixels(images: torch.Tensor, size: int) -> torch.Tensor:
    """The package's preprocessing, through PIL: bicubic, CLIP's mean and std."""
    (height, width), (top, left) = resize_and_crop(*images.shape[-2:], size)
    pixels = []
    for image in to_pil(images):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + size, top + size))
        pixels.append(np.asarray(image, dtype=np.float32))
    pixels = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) / 255
    return normalised(pixels, CLIP_MEAN, CLIP_STD)


def image_reward_tensor_pixels(images: torch.Tensor, size: int) -> torch.Tensor:
    """The same on tensors, with gradients."""
    (height, width), (top, left) = resize_and_crop(*images.shape[-2:], size)
    bicubic = partial(pil_resize, int(Image.Resampling.BICUBIC))
    pixels = resized(images.float().clamp(0, 1), height, width, bicubic)
    return normalised(pixels[..., top : top + size, left : left + size], CLIP_MEAN, CLIP_STD)


def convert_image_reward_keys(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the weights of the published ImageReward.pt to those of `ImageReward` above."""
    renamed = {
        "blip.visual_encoder.cls_token": "vision.embeddings.class_embedding",
        "blip.visual_encoder.pos_embed": "vision.embeddings.position_embedding",
        "blip.visual_encoder.patch_embed.proj.": "vision.embeddings.patch_embedding.",
        "blip.visual_encoder.norm.": "vision.post_layernorm.",
        "blip.visual_encoder.blocks.": "vision.encoder.layers.",
        ".norm1.": ".layer_norm1.",
        ".norm2.": ".layer_norm2.",
        ".attn.qkv.": ".self_attn.qkv.",
        ".attn.proj.": ".self_attn.projection.",
        "blip.text_encoder.": "text.",
        "mlp.layers.": "mlp.",
    }
    converted = {}
    for key, value in state.items():
        if key.startswith(("blip.vision_proj", "blip.text_proj")) or key.endswith("position_ids"):
            continue
        for old, new in renamed.items():
            key = key.replace(old, new)
        converted[key] = value
    return converted


def check(name: str, weights: str | None, options: dict[str, str]) -> None:
    check_options(name, options)
    check_weights(weights, ("ImageReward.pt", "model.safetensors"))
    if weights and Path(weights).is_dir():
        if not (Path(weights) / "ImageReward.pt").is_file():
            check_weights(weights, ("config.json",))
        # Without these files transformers can make a tokenizer of five tokens, and says nothing.
        check_weights(weights, TOKENIZER_FILES)


def load(
    name: str,
    weights: str | None,
    options: dict[str, str],
    device: str | torch.device,
    differentiable: bool = False,
) -> Reward:
    """In float32.

    `weights`: None is the published checkpoint; a hub id or a folder has ImageReward.pt, or
    config.json and model.safetensors, with the tokenizer's files beside it.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    if weights is None:
        checkpoint = Path(hf_hub_download("THUDM/ImageReward", "ImageReward.pt"))
        tokenizer = AutoTokenizer.from_pretrained("bert-base-uncased")
    else:
        folder = Path(weights) if Path(weights).is_dir() else Path(snapshot_download(weights))
        checkpoint = folder / "ImageReward.pt"
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if checkpoint.is_file():
        config = IMAGE_REWARD_CONFIG
        if tokenizer.cls_token_id != 101 or len(tokenizer) != 30522:
            raise RewardError(f"the tokenizer beside {checkpoint} is not bert-base-uncased")
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        state = convert_image_reward_keys(state)
    else:
        config = json.loads((folder / "config.json").read_text())
        state = load_file(folder / "model.safetensors")
    model = ImageReward(config)
    model.load_state_dict(state, strict=True)
    model.eval().requires_grad_(False).to(device)

    size = config["vision"]["image_size"]

    def score(pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        tokens = tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=config["max_length"],
            return_tensors="pt",
        ).to(device)
        return model(pixels.to(device), tokens.input_ids, tokens.attention_mask)

    return reward_of_pixels(
        score,
        partial(image_reward_pixels, size=size),
        partial(image_reward_tensor_pixels, size=size) if differentiable else None,
    )
