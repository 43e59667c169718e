"""Seconds that an iteration's noise takes: a generator a sample, and one for all.

python -m benchmarks.noise    writes benchmarks/results/noise.json

ddpo.py's default on SD v1.5: 256 samples, each x_T and the noise of 50 steps, (51, 4, 64, 64). On
the CPU, from where it goes to a GPU. A generator a sample makes a sample the same however samples
are cut into micro-batches and ranks.
"""

import json
import statistics
import time

import torch

from benchmarks.run import ROOT
from harness import seeded

SAMPLES, SHAPE, REPEATS = 256, (51, 4, 64, 64), 5


def a_generator_a_sample() -> None:
    for i in range(SAMPLES):
        torch.randn(SHAPE, generator=seeded(0, 0, 0, i))


def one_generator() -> None:
    generator = seeded(0, 0, 0)
    for _ in range(0, SAMPLES, 8):  # a micro-batch at a time, as it need not be there at once
        torch.randn((8, *SHAPE), generator=generator)


def generators_alone() -> None:
    for i in range(SAMPLES):
        seeded(0, 0, 0, i)


def seconds(call) -> float:
    """The median of REPEATS calls."""
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def main():
    calls = (a_generator_a_sample, one_generator, generators_alone)
    results = {call.__name__: seconds(call) for call in calls}
    path = ROOT / "benchmarks/results/noise.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(results)


if __name__ == "__main__":
    main()
