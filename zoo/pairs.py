"""The zoo's own pre-training data as pairs for large_scale_ppo.py.

--pretrain-data zoo/pairs.py:biased
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from zoo import world


class Pairs(Sequence):
    """As many as zoo/sd was trained on, each drawn when it is asked for.

    Pair i is a function of seed and i.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def __len__(self) -> int:
        return 96_000

    def __getitem__(self, i: int) -> tuple[Image.Image, str]:
        rng = np.random.default_rng([self.seed, range(len(self))[i]])
        scene, caption = world.draw_pair(rng)
        return Image.fromarray(world.render(scene, rng)), caption


def biased(seed: int) -> Pairs:
    """Captions and pictures that disagree as those do that the base model learned from."""
    return Pairs(seed)
