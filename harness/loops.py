"""Pieces of a loop: micro-batches, and a bar of what is done."""

import os

from tqdm import tqdm


def micro_batches(n: int, size: int, first: int = 0) -> list[slice]:
    """Slices of at most `size` of n things, number `first` and on; none of them is empty."""
    starts = range(first, first + n, size)
    return [slice(start, min(start + size, first + n)) for start in starts]


def progress(items, what: str) -> tqdm:
    """A bar for what an iteration goes through, of the first rank."""
    rank = int(os.environ.get("RANK", 0))
    return tqdm(items, desc=what, leave=False, disable=rank > 0)
