"""Models with the shape of real ones and random weights, made on the spot.

A layout is the name of a shape: "zoo" is the embedded model's; "tiny" is SD v1.5's, shrunk, for
tests and golden runs, and "tiny-v2" that of SD v2 for 768 px. "tiny-loop" has two of the four
resolutions, for tests of the algorithms, to which the depth of the model is all the same.
`--model random/LAYOUT` has a meaning in the benchmarks alone, which put `in_place_of` where a
script loads its model.
"""

import json
from collections.abc import Callable
from functools import cache

import torch
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.run import ROOT
from common.rewards.image_reward import IMAGE_REWARD_CONFIG, ImageReward

logging.set_verbosity_error()
# The architecture of stable-diffusion-v1-5/unet/config.json.
SD_V1_5 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
# That of stable-diffusion-2-base.
SD_V2 = SD_V1_5 | {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SD_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
}
SD_TEXT = {"vocab_size": 49408, "max_position_embeddings": 77}
SD_SCHEDULE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
TINY = {
    "unet": {
        "sample_size": 8,
        "block_out_channels": (8, 16, 16, 16),
        "layers_per_block": 2,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    },
    "vae": {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (4, 8, 8, 8),
        "norm_num_groups": 4,
        "sample_size": 64,
    },
    "text_encoder": {
        "vocab_size": 719,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
    },
}
LAYOUTS = {
    "sd-v1-5": {
        "unet": SD_V1_5,
        "vae": SD_VAE,
        "text_encoder": SD_TEXT
        | {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
        },
    },
    "sd-v2": {
        "unet": SD_V2,
        "vae": SD_VAE,
        "text_encoder": SD_TEXT
        | {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
        },
    },
    "tiny": TINY,
    "tiny-loop": TINY
    | {
        "unet": TINY["unet"]
        | {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
        },
    },
    "tiny-v2": {
        "unet": TINY["unet"]
        | {
            "sample_size": 12,
            "block_out_channels": (8, 16, 32, 32),
            "attention_head_dim": (1, 2, 4, 4),
            "use_linear_projection": True,
        },
        "vae": TINY["vae"] | {"sample_size": 96},
        "text_encoder": TINY["text_encoder"]
        | {
            "intermediate_size": 128,
            "num_hidden_layers": 23,
            "num_attention_heads": 4,
            "projection_dim": 16,
            "hidden_act": "gelu",
        },
        "tokenizer": {"pad_token": "!"},
    },
    "zoo": {
        part: json.loads((ROOT / "zoo/sd" / part / "config.json").read_text())
        for part in ("unet", "vae", "text_encoder")
    },
}


def make_tokenizer(layout: str) -> CLIPTokenizer:
    """The zoo's, for texts as long as this layout's encoder takes, padded as this layout's are."""
    settings = {"model_max_length": LAYOUTS[layout]["text_encoder"]["max_position_embeddings"]}
    settings |= LAYOUTS[layout].get("tokenizer", {})
    return CLIPTokenizer.from_pretrained(ROOT / "zoo/sd/tokenizer", **settings)


def make_text_encoder(layout: str) -> CLIPTextModel:
    tokenizer = make_tokenizer(layout)
    names = [f"{name}_token_id" for name in ("bos", "eos", "pad")]
    special = {name: getattr(tokenizer, name) for name in names}
    return CLIPTextModel(CLIPTextConfig(**LAYOUTS[layout]["text_encoder"] | special))


def make_unet(layout: str) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config(LAYOUTS[layout]["unet"])


def make_vae(layout: str) -> AutoencoderKL:
    return AutoencoderKL.from_config(LAYOUTS[layout]["vae"])


def make_image_reward(layout: str) -> ImageReward:
    """The published one's shape; beside the small layouts that of the zoo's."""
    if layout == "zoo" or layout.startswith("tiny"):
        return ImageReward(json.loads((ROOT / "zoo/image_reward/config.json").read_text()))
    return ImageReward(IMAGE_REWARD_CONFIG)


@cache
def random_image_reward(layout: str, device: torch.device) -> ImageReward:
    """One for all runs in a process."""
    with device:
        return make_image_reward(layout).eval().requires_grad_(False)


def scheduler_config(layout: str) -> dict:
    """Of the noise schedule, as a pipeline has it."""
    if layout == "zoo":
        return json.loads((ROOT / "zoo/sd/scheduler/scheduler_config.json").read_text())
    return dict(PNDMScheduler(**SD_SCHEDULE).config)


def make_pipeline(layout: str, device: str | torch.device = "cpu") -> StableDiffusionPipeline:
    """A whole pipeline of random weights, drawn on `device`, where that is fast."""
    torch.manual_seed(0)
    with torch.device(device):
        text_encoder, unet, vae = (
            make(layout) for make in (make_text_encoder, make_unet, make_vae)
        )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=make_tokenizer(layout),
        unet=unet,
        scheduler=PNDMScheduler.from_config(scheduler_config(layout)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def in_place_of(load: Callable, device: str | torch.device) -> Callable:
    """`common.stable_diffusion.load_pipeline`, where random/LAYOUT names a layout."""

    def load_or_make(model: str) -> StableDiffusionPipeline:
        where, _, layout = model.partition("/")
        return make_pipeline(layout, device) if where == "random" else load(model)

    return load_or_make
