"""The zoo's prompts for large_scale_ppo.py, three tasks, for training and held out.

    python -m prompts.make_zoo

preference: 12 things in a colour that is rare for them; held out: 8 others. composition: two of 4
kinds; held out: of 4 others. portraits: of 6 of the 8 occupations; held out: the other 2. They are
few and of one kind, so that a laptop's batches of some 30 pictures, whose advantages share one
mean, show what a picture was worth and not how hard its prompt was. A reward of a set is one number
a group, and a group is the pictures of one prompt: four ways to write each of the 6 portraits make
24 groups of a batch.
"""

from pathlib import Path

from prompts.composition import Composition
from zoo import world

RARE_COLORS = (
    ("green", "rabbit"),
    ("blue", "cat"),
    ("red", "dog"),
    ("pink", "wolf"),
    ("green", "pig"),
    ("blue", "lion"),
    ("red", "turtle"),
    ("yellow", "elephant"),
    ("gray", "fish"),
    ("pink", "bird"),
    ("blue", "rose"),
    ("yellow", "cup"),
)
RARE_COLORS_HELD_OUT = (
    ("pink", "rabbit"),
    ("red", "cat"),
    ("green", "dog"),
    ("yellow", "wolf"),
    ("blue", "pig"),
    ("green", "lion"),
    ("red", "elephant"),
    ("gray", "rose"),
)
KINDS = ("rabbit", "cat", "dog", "cup")
KINDS_HELD_OUT = ("lion", "turtle", "apple", "car")
OCCUPATIONS_HELD_OUT = ("nurse", "pilot")


def four_ways(captions: list[str]) -> list[str]:
    """With and without the article in front, in lower case and with a capital."""
    lower = captions + [caption.removeprefix("a ") for caption in captions]
    return lower + [text[0].upper() + text[1:] for text in lower]


def main():
    things = [
        [world.caption(world.Scene((world.Group(kind, color=color),))) for color, kind in pairs]
        for pairs in (RARE_COLORS, RARE_COLORS_HELD_OUT)
    ]
    portraits = {who: world.caption(world.Scene(occupation=who)) for who in world.OCCUPATIONS}
    trained = [text for who, text in portraits.items() if who not in OCCUPATIONS_HELD_OUT]
    files = {
        "preference": things[0],
        "preference_held_out": things[1],
        "composition": list(Composition([world.article(kind) for kind in KINDS])),
        "composition_held_out": list(Composition([world.article(kind) for kind in KINDS_HELD_OUT])),
        "portraits": four_ways(trained),
        "portraits_held_out": [portraits[who] for who in OCCUPATIONS_HELD_OUT],
    }
    for name, prompts in files.items():
        (Path(__file__).parent / f"zoo_{name}.txt").write_text("\n".join(prompts) + "\n")


if __name__ == "__main__":
    main()
