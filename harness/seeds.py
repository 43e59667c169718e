"""Random numbers that are a function of their place alone: the same on any number of ranks."""

import numpy as np
import torch

# The second number of a key, after --seed: what the numbers are for. No script has two of the 2s.
ROLLOUT = 0
"""(seed, ROLLOUT, iteration, i): prompt and noise of sample i."""
UPDATES = 1
"""(seed, UPDATES, iteration, ...): what the updates of the iteration learn from."""
VALUE = PRETRAINING = PROGRESS = 2
"""(seed, ..., iteration, i): value function, pairs of pictures and captions, samples to look at."""
GRID = 3
"""(seed, GRID, i): noise of picture i in the grids of samples."""


def seeded(*key: int) -> torch.Generator:
    """A CPU generator that is a function of `key` alone.

    A key and the same with zeros at its end give the same numbers: keep keys of one use as long.
    torch takes the low 32 bits of the seed: of n keys about n^2 / 2^33 pairs have the same numbers.
    """
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))
