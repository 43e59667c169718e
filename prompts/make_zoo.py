"""The zoo's prompts for large_scale_ppo.py, three tasks, for training and held out: python -m prompts.make_zoo

preference: 120 and 40 different scenes of one kind. composition: of 12 of the 16 kinds; held out: of the other 4 alone.
portraits: of 6 of the 8 occupations; held out: the other 2.
"""

from pathlib import Path

import numpy as np

from prompts.composition import Composition
from zoo import world

KINDS_HELD_OUT = ("lion", "turtle", "apple", "car")
OCCUPATIONS_HELD_OUT = ("nurse", "pilot")


def scenes(count: int) -> list[str]:
    """Different captions of one kind with a colour, a number or a place, most with two of them."""
    rng, found = np.random.default_rng(0), {}
    while len(found) < count:
        color = str(rng.choice(list(world.COLORS))) if rng.random() < 0.6 else None
        number = int(rng.choice((1, 1, 2, 3, 4)))
        group = world.Group(str(rng.choice(world.KINDS)), number, color)
        found[world.caption(world.Scene((group,), place=str(rng.choice(list(world.PLACES)))))] = None
    return list(found)


def main():
    preference = scenes(160)
    seen = [world.article(kind) for kind in world.KINDS if kind not in KINDS_HELD_OUT]
    portraits = {who: world.caption(world.Scene(occupation=who)) for who in world.OCCUPATIONS}
    files = {
        "preference": preference[:120],
        "preference_held_out": preference[120:],
        "composition": list(Composition(seen)),
        "composition_held_out": list(Composition([world.article(kind) for kind in KINDS_HELD_OUT])),
        "portraits": [text for who, text in portraits.items() if who not in OCCUPATIONS_HELD_OUT],
        "portraits_held_out": [portraits[who] for who in OCCUPATIONS_HELD_OUT],
    }
    for name, prompts in files.items():
        (Path(__file__).parent / f"zoo_{name}.txt").write_text("\n".join(prompts) + "\n")


if __name__ == "__main__":
    main()
