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
"""Bytes: a larger rollout is kept in the host's memory."""


def even_size(n: int, most: int) -> int:
    """Rows of a micro-batch when n rows are cut into as few as can be, of at most `most`."""
    return math.ceil(n / math.ceil(n / most))


class Stored:
    """Values of a rollout, float32, zero at first: on `device`, or in pinned memory of the host.

    stored[index] is on `device`, wherever the values are kept. Tensors in an index are on the CPU,
    so that nothing waits for the GPU to read them. A copy to the host may still be under way when
    Python goes on; it is done when a timer ends, which waits for the GPU.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device, on_host: bool):
        place = {"pin_memory": True} if on_host else {"device": device}
        self.values, self.device, self.on_host = torch.zeros(shape, **place), device, on_host

    def __getitem__(self, index):
        if self.on_host:
            gathered = self.values[index].contiguous().pin_memory()
            return gathered.to(self.device, non_blocking=True)
        return self.values[self._there(index)]

    def __setitem__(self, index, values: torch.Tensor) -> None:
        parts = index if isinstance(index, tuple) else (index,)
        if self.on_host and any(isinstance(part, torch.Tensor) for part in parts):
            self.values[index] = values.to("cpu")  # no view of a tensor's places: this one waits
        elif self.on_host:
            self.values[index].copy_(values, non_blocking=True)
        else:
            self.values[self._there(index)] = values

    def _there(self, index):
        if not isinstance(index, tuple):
            return index
        to_device = lambda part: part.to(self.device, non_blocking=True)
        return tuple(to_device(p) if isinstance(p, torch.Tensor) else p for p in index)


def rollout_storage(device: torch.device, *shapes: tuple[int, ...]) -> list[Stored]:
    """`Stored` of these shapes, all on the GPU, or all on its host where they are large."""
    on_host = device.type == "cuda" and 4 * sum(map(math.prod, shapes)) > LARGE
    return [Stored(shape, device, on_host) for shape in shapes]


def fit_micro_batches(args, sd, guided_noise: Callable):
    """`args` with a number where --micro-batch-size is "auto": the most rows that this GPU can do.

    Each rank tries out one training pass of `guided_noise`, the script's, in ever larger batches;
    the rank with least room decides. On a CPU, which may swap, it is 8. Called when all else is on
    the GPU but AdamW's state, which is counted in.
    """
    if args.micro_batch_size != "auto":
        return args
    if sd.device.type != "cuda":
        return replace(args, micro_batch_size=ON_CPU)
    everybodys(None)  # NCCL takes its memory at the first exchange
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


def out_of_memory(error: RuntimeError) -> bool:
    """Whether the GPU had no room, in whichever library it was noticed."""
    libraries = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError) or any(x in str(error) for x in libraries)


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
        # An update takes as much as the gradients: for the copy that ranks add up, then for AdamW.
        workspace = [torch.empty_like(p) for p in sd.weights]
        del moments, workspace
        fits = torch.cuda.max_memory_reserved(sd.device) <= room
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        fits = False
    for weight in sd.weights:
        weight.grad = None
    torch.cuda.empty_cache()
    return fits
