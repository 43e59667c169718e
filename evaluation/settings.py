"""What the pictures of an evaluation depend on, and what is refused before anything slow begins."""

from dataclasses import dataclass, fields

import numpy as np

from common.rewards import RewardError, check_spec
from harness.args import check_model, fail
from harness.prompts import read_prompts

SHARD_SIZE = 64
"""Pictures that are drawn, scored and then stored at once, unless a command has a flag for it."""


@dataclass
class Settings:
    """What pictures depend on, besides the models' weights; the fields are flags of evaluate.py."""

    prompts: list[str]
    """P prompts, all different."""
    model: str
    """The pretrained model."""
    images_per_prompt: int
    """N."""
    shard_size: int
    """About how many pictures are in a file; whole prompts."""
    num_inference_steps: int
    """T."""
    guidance_scale: float
    """w of classifier-free guidance; 1 or less switches it off."""
    eta: float
    """Noise of the DDIM step; 0 is deterministic and has no KL."""
    seed: int
    """Of the noise."""
    dtype: str
    """Of the UNet's forward pass: "fp32", "fp16" or "bf16"."""


def read_settings(args, **others) -> Settings:
    """Those of a command's flags, with `others` for what the command has no flag for.

    Besides the fields, `args` has prompt and prompts_file. A model or prompts that are not to be
    had end the command.
    """
    check_model(args.model)
    prompts = list(dict.fromkeys(read_prompts(args)))
    values = vars(args) | others | {"prompts": prompts}
    return Settings(**{field.name: values[field.name] for field in fields(Settings)})


def check_rewards(specs: tuple[str, ...], images_per_prompt: int) -> None:
    """Refuse a reward that is none, and one of sets for a set of one."""
    for spec in specs:
        try:
            check_spec(spec)
        except RewardError as error:
            fail(f"--rewards: {error}")
        if "statistical_parity" in spec and images_per_prompt < 2:
            fail(
                f"--images-per-prompt is {images_per_prompt}, "
                f"and {spec} needs several pictures of a prompt"
            )


def check_world_size(settings: Settings, world_size: int) -> None:
    """Refuse more ranks than a shard has pictures: a rank must have a share of each."""
    fewest = min(map(len, shards_of(settings))) * settings.images_per_prompt
    if fewest < world_size:
        fail(
            f"--images-per-prompt: {fewest} pictures are less than the {world_size} processes; "
            "raise it"
        )


def shards_of(settings: Settings) -> list[np.ndarray]:
    """Indices of the prompts, shard after shard: the same however many ranks there are."""
    count = len(settings.prompts)
    shards = max(1, count * settings.images_per_prompt // settings.shard_size)
    return np.array_split(np.arange(count), min(shards, count))
