"""Composition prompts (Zhang et al. 2024, 4.3): two objects of App. H and one of five relations.

    --tasks "object_detection prompts/composition.py:train 128x16"

The two objects are different. The 532 objects are in prompts/objects.txt, with their article where
they have one. The seed of the run chooses 450 of them for training, which gives 450 x 449 x 5 =
1 010 250 prompts, made when they are asked for; the other 82 are held out for
`prompts/composition.py:held_out`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

RELATIONS = ("and", "next to", "near", "on side of", "beside")
TRAINING = 450


class Composition(Sequence):
    """Every prompt of two different `objects` in every order."""

    def __init__(self, objects: list[str]):
        self.objects = objects

    def __len__(self) -> int:
        return len(self.objects) * (len(self.objects) - 1) * len(RELATIONS)

    def __getitem__(self, n: int) -> str:
        n, relation = divmod(range(len(self))[n], len(RELATIONS))
        first, second = divmod(n, len(self.objects) - 1)
        second += second >= first  # the objects without the first
        return f"{self.objects[first]} {RELATIONS[relation]} {self.objects[second]}"


def split(seed: int) -> tuple[list[str], list[str]]:
    """The 450 objects for training and the 82 that are held out."""
    objects = Path(__file__).with_name("objects.txt").read_text().splitlines()
    order = np.random.default_rng(seed).permutation(len(objects))
    return [objects[i] for i in order[:TRAINING]], [objects[i] for i in order[TRAINING:]]


def train(seed: int) -> Composition:
    return Composition(split(seed)[0])


def held_out(seed: int) -> Composition:
    return Composition(split(seed)[1])
