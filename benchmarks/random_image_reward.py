"""ImageReward's network with random weights: `--reward benchmarks/random_image_reward.py:score`.

It costs what the published one costs, and says nothing. The variable LAYOUT chooses another shape.
"""

import os
from functools import partial

import torch
from transformers import AutoTokenizer

from benchmarks.layouts import random_image_reward
from benchmarks.run import ROOT
from common.rewards.base import reward_of_pixels
from common.rewards.image_reward import image_reward_pixels, image_reward_tensor_pixels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOKENIZER = AutoTokenizer.from_pretrained(ROOT / "zoo/image_reward")
# Made with the file, as a published one is loaded: before the run looks what memory is left.
MODEL = random_image_reward(os.environ.get("LAYOUT", "sd-v1-5"), DEVICE)


def of_pixels(pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    tokens = TOKENIZER(list(prompts), max_length=MODEL.config["max_length"], **options).to(DEVICE)
    return MODEL(pixels.to(DEVICE), tokens.input_ids, tokens.attention_mask)


size = MODEL.config["vision"]["image_size"]
REWARD = reward_of_pixels(
    of_pixels,
    partial(image_reward_pixels, size=size),
    partial(image_reward_tensor_pixels, size=size),
)


def score(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Of images (B, 3, H, W) in [0, 1], float32 (B,); with gradients where the images have them."""
    return (REWARD.with_gradient if images.requires_grad else REWARD)(images, prompts)
