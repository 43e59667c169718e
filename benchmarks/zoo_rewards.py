"""Rewards of the zoo for figures alone: nothing is trained on them.

--rewards benchmarks/zoo_rewards.py:kinds
"""

from functools import cache

import torch

from common.rewards import load_reward
from zoo import world


@cache
def detector():
    return load_reward("object_detection:zoo/detector")


def kinds(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """The detector's mean confidence in the kinds that each prompt names, whatever their colour."""
    named = [[group.kind for group in world.parse(prompt).groups] for prompt in prompts]
    return detector()(images, [" and ".join(of_prompt) for of_prompt in named])
