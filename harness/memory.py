"""What fits into a device's memory: rows of a micro-batch, and what is kept of a rollout."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch

from harness.ranks import everybodys
from harness.stop import fail

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
ON_CPU = 8
MARGIN = 0.9
"""Share of a GPU's memory that a trial may take: the allocator's gaps come to it later."""
LARGE = 1 << 30
"""Bytes of a rollout above which a GPU's memory is for other things."""


def even_size(n: int, most: int) -> int:
    """Rows of a micro-batch when n rows are cut into as few as can be, of at most `most`."""
    return math.ceil(n / math.ceil(n / most))


def rollout_storage(device: torch.device, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Zeros of these shapes, float32, on `device`; all in pinned memory of the host if large."""
    on_host = device.type == "cuda" and 4 * sum(map(math.prod, shapes)) > LARGE
    place = {"pin_memory": True} if on_host else {"device": device}
    return [torch.zeros(shape, **place) for shape in shapes]


def fit_micro_batches(args, sd, guided_noise: Callable):
    """`args` with a number where --micro-batch-size is "auto": the most rows that this GPU can do.

    Each rank tries out one training pass of `guided_noise`, the script's, in ever larger batches;
    the rank with least room decides. On a CPU, which may swap, it is 8.
    """
    if args.micro_batch_size != "auto":
        return args
    if sd.device.type != "cuda":
        return replace(args, micro_batch_size=ON_CPU)
    with torch.compiler.set_stance("force_eager"):  # compiled it takes less, and long for each size
        own = largest(SIZES, lambda rows: has_room(args, sd, guided_noise, rows))
    size = min(everybodys(own))
    if size == 0:
        remedy = "--gradient-checkpointing, --dtype fp16 or a LoRA (--lora-rank 4) takes less"
        fail(f"--micro-batch-size: one row does not fit into this GPU's memory; {remedy}")
    return replace(args, micro_batch_size=size)


def largest(sizes: tuple[int, ...], fits: Callable[[int], bool]) -> int:
    """The last of ascending sizes before the first that does not fit; 0 when none does."""
    found = 0
    for size in sizes:
        if not fits(size):
            break
        found = size
    return found


def has_room(args, sd, guided_noise: Callable, rows: int) -> bool:
    """Whether a training pass of so many rows fits beside what is on the GPU, and AdamW's state."""
    free, _ = torch.cuda.mem_get_info(sd.device)
    room = MARGIN * (free + torch.cuda.memory_reserved(sd.device))
    torch.cuda.reset_peak_memory_stats(sd.device)
    latents = torch.zeros(rows, *sd.latent_shape, device=sd.device)
    timesteps = sd.timesteps[:1].expand(rows)
    text = sd.no_text.expand(rows, -1, -1)
    try:
        moments = [torch.empty_like(p) for p in sd.weights for _ in range(2)]
        with sd.pretrained() as unet:
            if unet is not None:
                guided_noise(args, sd, unet, latents, timesteps, text)
        guided_noise(args, sd, sd.unet, latents, timesteps, text).square().mean().backward()
        sd.decode(latents)
        del moments
        fits = torch.cuda.max_memory_reserved(sd.device) <= room
    except torch.OutOfMemoryError:
        fits = False
    for weight in sd.weights:
        weight.grad = None
    torch.cuda.empty_cache()
    return fits
