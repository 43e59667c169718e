"""What the pictures of an evaluation depend on, and what is refused before anything slow begins."""

import json
import os
import shutil
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from common.rewards import RewardError, check_spec
from harness.args import check_model, fail
from harness.prompts import read_prompts

SHARD_SIZE = 64
"""Pictures that are drawn, scored and then stored at once, unless a command has a flag for it."""
LEAST_ETA = 1e-3
"""With less noise in a step the KL, which is over its square, is that of rounding."""
COPIES = 10
"""Bytes of memory for each byte of a shard's pictures: as uint8 and float32, here and there."""


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
    if args.eta > 1 or 0 < args.eta < LEAST_ETA:
        fail(f"--eta is {args.eta}; it must be 0, or from {LEAST_ETA} to 1")
    scheduler = Path(args.model) / "scheduler/scheduler_config.json"
    trained = stored_number(scheduler, "num_train_timesteps")
    if trained is not None and args.num_inference_steps > trained:
        fail(
            f"--num-inference-steps is {args.num_inference_steps}, and --model {args.model} was "
            f"trained with {trained}; take fewer"
        )
    prompts = list(dict.fromkeys(read_prompts(args)))
    values = vars(args) | others | {"prompts": prompts}
    return Settings(**{field.name: values[field.name] for field in fields(Settings)})


def stored_number(path: Path, key: str) -> int | None:
    """A positive integer in a model's configuration; None where loading the model will tell."""
    try:
        value = json.loads(path.read_text())[key] if path.is_file() else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return value if type(value) is int and value > 0 else None


def check_size(settings: Settings, models: int, micro_batch_size: int, folder: Path) -> None:
    """Refuse what this machine's memory, or the disk of `folder`, could never hold.

    The pictures of a hub's model are taken for those of SD v1.5.
    """
    size = stored_number(Path(settings.model) / "unet/config.json", "sample_size") or 64
    picture, N = (8 * size) ** 2 * 3, settings.images_per_prompt
    memory = memory_size()
    shard = max(map(len, shards_of(settings))) * N
    rows = min(micro_batch_size, shard)
    noise = rows * (settings.num_inference_steps + 1) * 4 * size**2 * 4 * 2
    disk = disk_size(folder) if int(os.environ.get("RANK", 0)) == 0 else float("inf")
    total = models * len(settings.prompts) * N * picture
    of_shard = "--images-per-prompt" if N * picture * COPIES > memory else "--shard-size"
    for flag, needed, there, what in (
        (of_shard, shard * picture * COPIES, memory, "memory, of this machine's"),
        ("--micro-batch-size", noise, memory, "memory, of this machine's"),
        ("--images-per-prompt", total, disk, "disk, of"),
    ):
        if needed > there:
            sizes = f"{needed / 1e9:.3g} GB of {what} {there / 1e9:.3g} GB"
            fail(f"{flag}: the pictures would take {sizes}; lower it")


def disk_size(folder: Path) -> int:
    """Bytes of the disk that a folder is on, or would be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).total


def memory_size() -> float:
    """Bytes that this process could have at most; infinite where the system does not tell."""
    try:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return min(size, int(limit)) if limit.isdigit() else size
    except (AttributeError, ValueError):  # Windows
        return float("inf")
    except OSError:
        return size


def check_rewards(specs: tuple[str, ...], images_per_prompt: int) -> None:
    """Refuse a reward that is none, and one of sets for a set of one."""
    for spec in specs:
        try:
            check_spec(spec)
        except (RewardError, OSError) as error:  # OSError: a name too long
            fail(f"--rewards: {str(error)[:500]}")
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
