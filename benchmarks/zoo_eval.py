"""Sampling and judging on the zoo for the benchmarks, by plain diffusers."""

import hashlib
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging

from zoo import judge as judging

ROOT = Path(__file__).resolve().parent.parent
NUM_INFERENCE_STEPS, GUIDANCE_SCALE, ETA = 12, 1.5, 1.0
"""How the zoo presets of all scripts sample."""
logging.set_verbosity_error()
logging.disable_progress_bar()


def weights_digest() -> str:
    """SHA-256 over the zoo's weights: results carry it, and a test compares, so that figures are
    those of the files."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "zoo").glob("*/**/*.safetensors")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def load_pipeline(lora: Path | None = None) -> StableDiffusionPipeline:
    """The zoo's pipeline, with a run's LoRA if one is given (that takes peft)."""
    pipeline = StableDiffusionPipeline.from_pretrained(ROOT / "zoo/sd")
    pipeline.set_progress_bar_config(disable=True)
    if lora:
        pipeline.load_lora_weights(lora)
    return pipeline


def pictures(pipeline, prompts: list[str], seed: int) -> torch.Tensor:
    """A picture (3, 64, 64) in [0, 1] for each prompt; picture i is a function of `seed` and i."""
    generators = [torch.Generator().manual_seed(seed * 100_000 + i) for i in range(len(prompts))]
    out = []
    for i in range(0, len(prompts), 32):
        out.append(
            pipeline(
                prompts[i : i + 32],
                num_inference_steps=NUM_INFERENCE_STEPS,
                guidance_scale=GUIDANCE_SCALE,
                eta=ETA,
                generator=generators[i : i + 32],
                output_type="pt",
            ).images
        )
    return torch.cat(out)


def measure(
    pipeline, judge, reward, prompt: str, count: int, seed: int
) -> tuple[dict[str, float], torch.Tensor]:
    """Judge's success, distance to real renders and reward over `count` pictures of a prompt, and
    the pictures."""
    images = pictures(pipeline, [prompt] * count, seed)
    numbers = {
        "success": judging.success(judge, images, [prompt] * count).mean().item(),
        "image_quality": judging.image_quality(judge, pipeline.vae, images),
        "reward": reward(images, [prompt] * count).mean().item(),
    }
    return numbers, images
