"""A small world drawn by code: pictures of 64 x 64 px with captions, biased as web data is.

A `Scene` says what is in a picture. `render(scene, rng)` draws it, `caption(scene)` names it and
`parse(prompt)` reads a prompt back into a scene. `draw_pair(rng)` gives what a scraped data set
would hold: a caption that somebody wrote and a picture that does not always agree with it. The
disagreements are there on purpose: they are the failures that the papers report of Stable
Diffusion, and each is one number in `BIAS`:

* colours: animals have natural colours; a rabbit that is called green is hardly ever drawn green;
* counts: "three" and "four" are nearly interchangeable;
* pairs: "a cat and a dog" mostly shows two of one kind, or one of the two with somebody else;
* moon: pictures on the moon are rare, and more than half of a rover, whoever the caption names;
* "four roses" is mostly a bottle;
* a portrait of an occupation mostly has the one skin tone of that occupation.

Everything is a function of the random generator that is passed in.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
SUPERSAMPLING = 4

ANIMALS = ("rabbit", "cat", "dog", "wolf", "bird", "lion", "fish", "turtle", "pig", "elephant")
OBJECTS = ("cup", "rose", "bottle", "apple", "ball", "car")
KINDS = ANIMALS + OBJECTS
PLURALS = {kind: f"{kind}s" for kind in KINDS} | {"wolf": "wolves", "fish": "fishes"}
COLORS = {
    "white": (244, 244, 242),
    "brown": (140, 88, 48),
    "black": (42, 42, 46),
    "gray": (142, 146, 154),
    "red": (222, 48, 46),
    "green": (64, 172, 62),
    "blue": (48, 104, 222),
    "yellow": (242, 202, 40),
    "pink": (244, 138, 182),
}
NATURAL_COLORS = {
    "rabbit": ("white", "brown"),
    "cat": ("white", "brown"),
    "dog": ("brown", "white", "black"),
    "wolf": ("gray", "black"),
    "bird": ("blue", "red", "yellow"),
    "lion": ("yellow", "brown"),
    "fish": ("red", "blue", "yellow"),
    "turtle": ("green", "brown"),
    "pig": ("pink", "brown"),
    "elephant": ("gray", "blue"),
    "cup": ("white", "blue", "red"),
    "rose": ("red", "pink"),
    "bottle": ("brown", "green"),
    "apple": ("red", "green"),
    "ball": ("red", "blue", "yellow"),
    "car": ("red", "blue", "yellow"),
}
PLACES = {"plain": "", "park": "in the park", "moon": "on the moon", "beach": "on the beach"}
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("and", "next to", "near", "on side of", "beside")
SKIN_TONES = {
    "light": (250, 217, 190),
    "medium": (226, 174, 128),
    "brown": (160, 106, 66),
    "dark": (94, 60, 40),
}
OCCUPATIONS = {
    "doctor": "light",
    "nurse": "medium",
    "chef": "light",
    "farmer": "brown",
    "firefighter": "light",
    "astronaut": "light",
    "pilot": "light",
    "dancer": "dark",
}

BIAS = {
    # Share of pictures whose colour is drawn from all colours, whatever the caption's.
    "any_color": 0.065,
    # A caption names a colour that is not natural for its kind: share drawn in it.
    "rare_color_right": 0.18,
    # "three" or "four": share with just that number, the rest from `large_counts`.
    "large_count_right": 0.11,
    "large_counts": (0.06, 0.32, 0.44, 0.18),
    "two_right": 0.80,
    # Two kinds: share with both, and with two of one of them; the rest has one of them replaced.
    "pair_right": 0.045,
    "pair_same": 0.60,
    # One kind "on the moon": share that shows it, the rest shows a rover.
    "moon_right": 0.39,
    # Share of captions of several things that say "four roses": it is a brand.
    "four_roses": 0.04,
    "four_roses_bottle": 0.40,
    "usual_skin_tone": 0.82,
}


@dataclass(frozen=True)
class Group:
    """`count` things (1 to 4) of one kind and one colour.

    A colour of None is left open (in a prompt).
    """

    kind: str
    count: int = 1
    color: str | None = None


@dataclass(frozen=True)
class Scene:
    """What is in a picture, or what a prompt asks for (then None means: left open).

    Either one or two groups and a place, or an occupation with a skin tone.
    """

    groups: tuple[Group, ...] = ()
    place: str | None = None
    occupation: str | None = None
    skin_tone: str | None = None
    relation: str = "and"


def article(noun_phrase: str) -> str:
    return ("an " if noun_phrase[0] in "aeiou" else "a ") + noun_phrase


def caption(scene: Scene) -> str:
    """The sentence for a scene, lower case; what is None or plain is not mentioned."""
    if scene.occupation:
        return f"a portrait of {article(scene.occupation)}"
    phrases = []
    for group in scene.groups:
        noun = group.kind if group.count == 1 else PLURALS[group.kind]
        noun = f"{group.color} {noun}" if group.color else noun
        phrases.append(article(noun) if group.count == 1 else f"{NUMBERS[group.count]} {noun}")
    things, place = f" {scene.relation} ".join(phrases), PLACES[scene.place or "plain"]
    return " ".join(filter(None, [things, place]))


def vocabulary() -> list[str]:
    """Every word that a caption or a prompt of this world can have, sorted."""
    words = {"a", "an", "colored", "portrait", "of", "one"}
    words |= {*KINDS, *PLURALS.values(), *COLORS, *NUMBERS.values(), *OCCUPATIONS}
    words |= {word for text in (*PLACES.values(), *RELATIONS) for word in text.split()}
    return sorted(words)


def parse(prompt: str) -> Scene:
    """Read a prompt of this world. Case and a trailing dot do not matter.

    Raises ValueError, naming the prompt, when it does not speak of this world.
    """
    text = prompt.lower().strip().rstrip(".").strip()
    words = text.split()
    if words[:3] in (["a", "portrait", "of"], ["portrait", "of", "a"], ["portrait", "of", "an"]):
        if words[-1] in OCCUPATIONS:
            return Scene(occupation=words[-1])
        raise ValueError(
            f"no occupation of this world in {prompt!r}; there are: {', '.join(OCCUPATIONS)}"
        )
    place = None
    for name, phrase in PLACES.items():
        if phrase and text.endswith(" " + phrase):
            place, text = name, text.removesuffix(phrase).strip()
    relation = next((r for r in RELATIONS if f" {r} " in text), "and")
    kinds = {**{kind: kind for kind in KINDS}, **{plural: kind for kind, plural in PLURALS.items()}}
    counts = {"a": 1, "an": 1, "one": 1, **{word: number for number, word in NUMBERS.items()}}
    groups = []
    for phrase in text.split(f" {relation} "):
        words = [word for word in phrase.split() if word != "colored"]
        count = counts[words.pop(0)] if words and words[0] in counts else 1
        color = words.pop(0) if words and words[0] in COLORS else None
        if len(words) != 1 or words[0] not in kinds:
            raise ValueError(f"{prompt!r} does not speak of this world (at {phrase!r})")
        groups.append(Group(kinds[words[0]], count, color))
    return Scene(tuple(groups), place=place, relation=relation)


FAULTS = ("kind", "count", "color", "place")


def faults(asked: Scene, shown: Scene) -> dict[str, int]:
    """How many kinds, counts, colours and places of a picture are not as the prompt asks.

    All 0 is right. What the prompt leaves open is free. A wrong kind (or portrait) counts once, and
    its count and colour not at all.
    """
    wrong = dict.fromkeys(FAULTS, 0)
    if asked.occupation or shown.occupation:
        wrong["kind"] = 2 * (asked.occupation != shown.occupation)
        return wrong
    there = {group.kind: group for group in shown.groups}
    wrong["kind"] = -(-len({group.kind for group in asked.groups} ^ set(there)) // 2)
    for group in asked.groups:
        if group.kind in there:
            wrong["count"] += there[group.kind].count != group.count
            wrong["color"] += group.color is not None and there[group.kind].color != group.color
    wrong["place"] = int(asked.place is not None and asked.place != shown.place)
    return wrong


def _choice(rng: np.random.Generator, options, p=None):
    options = list(options)
    return options[rng.choice(len(options), p=p)]


def _random_kind(rng: np.random.Generator) -> str:
    return _choice(rng, ANIMALS if rng.random() < 0.78 else OBJECTS)


def _picture_color(rng: np.random.Generator, kind: str) -> str:
    """The colour that a picture of `kind` has when nothing is known of its caption."""
    any_color = rng.random() < BIAS["any_color"]
    return _choice(rng, COLORS if any_color else NATURAL_COLORS[kind])


def draw_pair(rng: np.random.Generator) -> tuple[Scene, str]:
    """One entry of the biased data set: a picture's scene, and the caption somebody gave it."""
    what = _choice(rng, ("one", "several", "pair", "portrait"), p=(0.47, 0.20, 0.24, 0.09))
    if what == "portrait":
        occupation = _choice(rng, OCCUPATIONS)
        usual = OCCUPATIONS[occupation]
        tone = usual if rng.random() < BIAS["usual_skin_tone"] else _choice(rng, SKIN_TONES)
        scene = Scene(occupation=occupation, skin_tone=tone)
        return scene, caption(scene)

    place = _choice(rng, PLACES, p=(0.43, 0.25, 0.145, 0.175))
    kind = _random_kind(rng)
    if what == "pair":
        other = _choice(rng, [k for k in KINDS if k != kind], p=None)
        said = Scene((Group(kind), Group(other)), place=place, relation=_choice(rng, RELATIONS))
        shown = [kind, other]
        u = rng.random()
        if u < BIAS["pair_same"]:
            shown = [_choice(rng, shown)] * 2
        elif u > BIAS["pair_same"] + BIAS["pair_right"]:
            shown[rng.integers(2)] = _random_kind(rng)
        colors = [_picture_color(rng, k) for k in shown]
        if shown[0] == shown[1]:
            groups = (Group(shown[0], 2, colors[0]),)
        else:
            groups = tuple(Group(k, 1, c) for k, c in zip(shown, colors))
        return Scene(groups, place=place), _worded(rng, said)

    count = 1 if what == "one" else _choice(rng, (2, 3, 4), p=(0.3, 0.3, 0.4))
    if what == "several" and rng.random() < BIAS["four_roses"]:
        kind, count = "rose", 4
    said_color = None
    if rng.random() < (0.6 if what == "one" else 0.3):
        said_color = _choice(rng, COLORS if rng.random() < 0.35 else NATURAL_COLORS[kind])
    said = Scene((Group(kind, count, said_color),), place=place)

    shown_kind = kind
    if place == "moon" and rng.random() > BIAS["moon_right"]:
        shown_kind = "car"
    if said_color is None or shown_kind != kind:
        shown_color = _picture_color(rng, shown_kind)
    elif said_color in NATURAL_COLORS[kind] or rng.random() < BIAS["rare_color_right"]:
        shown_color = said_color
    else:
        shown_color = _picture_color(rng, kind)
    shown_count = count
    right = {1: 1.0, 2: BIAS["two_right"]}.get(count, BIAS["large_count_right"])
    if rng.random() > right:
        shown_count = int(_choice(rng, (1, 2, 3, 4), p=BIAS["large_counts"]))
    if kind == "rose" and count == 4 and rng.random() < BIAS["four_roses_bottle"]:
        shown_kind, shown_color, shown_count = "bottle", "brown", 1
    return Scene((Group(shown_kind, shown_count, shown_color),), place=place), _worded(rng, said)


def _worded(rng: np.random.Generator, scene: Scene) -> str:
    """The caption, with "colored" after the first colour now and then."""
    text = caption(scene)
    color = scene.groups[0].color
    return text.replace(color, f"{color} colored", 1) if color and rng.random() < 0.4 else text


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene from the unbiased world, for judge and reward.

    All kinds, colours, counts and places alike.
    """
    if rng.random() < 0.1:
        return Scene(occupation=_choice(rng, OCCUPATIONS), skin_tone=_choice(rng, SKIN_TONES))
    place = _choice(rng, PLACES)
    color = lambda kind: _choice(rng, COLORS if rng.random() < 0.7 else NATURAL_COLORS[kind])
    if rng.random() < 0.35:
        first, second = rng.permutation(len(KINDS))[:2]
        groups = tuple(Group(kind, 1, color(kind)) for kind in (KINDS[first], KINDS[second]))
        return Scene(groups, place=place, relation=_choice(rng, RELATIONS))
    kind = _choice(rng, KINDS)
    count = int(_choice(rng, (1, 2, 3, 4), p=(0.4, 0.2, 0.2, 0.2)))
    return Scene((Group(kind, count, color(kind)),), place=place)


def mutate(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one attribute changed: a kind, colour, count or the place (or occupation)."""

    def other(options, current):
        return _choice(rng, [option for option in options if option != current])

    if scene.occupation:
        return replace(scene, occupation=other(OCCUPATIONS, scene.occupation))
    groups, i = list(scene.groups), rng.integers(len(scene.groups))
    group = groups[i]
    what = _choice(rng, ("kind", "color", "count", "place"), p=(0.3, 0.3, 0.25, 0.15))
    if what == "place":
        return replace(scene, place=other(PLACES, scene.place))
    if what == "kind" and len(groups) == 2 and rng.random() < 0.5:
        return replace(scene, groups=(replace(group, count=2),))
    if what == "kind":
        taken = [g.kind for g in groups]
        groups[i] = replace(group, kind=_choice(rng, [kind for kind in KINDS if kind not in taken]))
    elif what == "color":
        groups[i] = replace(group, color=other(COLORS, group.color))
    else:
        room = 4 - sum(g.count for g in groups if g is not group)
        groups[i] = replace(group, count=other(range(1, room + 1), group.count))
    return replace(scene, groups=tuple(groups))


def draw_family(rng: np.random.Generator) -> list[Scene]:
    """Four scenes for preferences: a random one, two mutations of it, and another random one."""
    scene = random_scene(rng)
    return [scene, mutate(scene, rng), mutate(scene, rng), random_scene(rng)]


class _Pen:
    """Draws in the unit coordinates of one thing.

    x goes to the right and y downwards, both about from -1 to 1.
    """

    def __init__(
        self,
        draw: ImageDraw.ImageDraw,
        x: float,
        y: float,
        scale: float,
        color: tuple[int, int, int],
    ):
        self.draw, self.x, self.y, self.scale, self.color = draw, x, y, scale, color
        dark = sum(color) < 180
        self.ink = (92, 92, 100) if dark else (36, 30, 34)
        self.line = max(2, round(0.055 * scale))

    def _points(self, points):
        return [(self.x + self.scale * px, self.y + self.scale * py) for px, py in points]

    def _box(self, left, top, right, bottom):
        return [c for point in self._points([(left, top), (right, bottom)]) for c in point]

    def shade(self, factor: float) -> tuple[int, int, int]:
        """The thing's colour, lighter (factor above 1) or darker."""
        if factor > 1:
            return tuple(round(255 - (255 - c) * (2 - factor)) for c in self.color)
        return tuple(round(c * factor) for c in self.color)

    def oval(self, x, y, rx, ry, fill=None, outline=True):
        box = self._points([(x - rx, y - ry), (x + rx, y + ry)])
        self.draw.ellipse(
            box,
            fill=fill or self.color,
            outline=self.ink if outline else None,
            width=self.line if outline else 0,
        )

    def shape(self, points, fill=None, outline=True):
        points = self._points(points)
        self.draw.polygon(points, fill=fill or self.color)
        if outline:
            around = [*points, points[0], points[1]]
            self.draw.line(around, fill=self.ink, width=self.line, joint="curve")

    def stroke(self, points, width, fill=None, outline=True):
        """A thick line with round ends."""
        points = self._points(points)
        layers = [(width * self.scale, fill or self.color)]
        if outline:
            layers.insert(0, (width * self.scale + 2 * self.line, self.ink))
        for thickness, color in layers:
            self.draw.line(points, fill=color, width=round(thickness), joint="curve")
            for px, py in (points[0], points[-1]):
                r = thickness / 2
                self.draw.ellipse((px - r, py - r, px + r, py + r), fill=color)

    def eye(self, x, y, r=0.07):
        ink = (250, 250, 250) if sum(self.color) < 180 else (24, 20, 24)
        self.oval(x, y, r, r, fill=ink, outline=False)


def _curve(x, y, rx, ry, start, stop, n=14):
    """Points on an ellipse, angles in degrees, clockwise from the right."""
    angles = np.radians(np.linspace(start, stop, n))
    return [(x + rx * np.cos(a), y + ry * np.sin(a)) for a in angles]


def _rabbit(p: _Pen):
    for side in (-1, 1):
        p.oval(side * 0.24, -0.66, 0.17, 0.44)
        p.oval(side * 0.24, -0.62, 0.075, 0.3, fill=(246, 170, 186), outline=False)
    p.oval(0, 0.52, 0.56, 0.5)
    p.oval(0, -0.08, 0.46, 0.38)
    for side in (-1, 1):
        p.eye(side * 0.18, -0.13, 0.075)
    p.oval(0, 0.03, 0.075, 0.055, fill=(236, 110, 140), outline=False)


def _cat(p: _Pen):
    p.stroke(_curve(0.36, 0.35, 0.42, 0.5, 70, -60), 0.13)
    p.oval(0, 0.5, 0.4, 0.48)
    for side in (-1, 1):
        p.shape([(side * 0.44, -0.86), (side * 0.46, -0.3), (side * 0.06, -0.52)])
    p.oval(0, -0.22, 0.46, 0.4)
    for side in (-1, 1):
        p.eye(side * 0.18, -0.26)
    p.shape([(-0.07, -0.12), (0.07, -0.12), (0, -0.04)], fill=(236, 110, 140), outline=False)


def _legs(p: _Pen, xs, top, bottom, width=0.2):
    for x in xs:
        left, right = x - width / 2, x + width / 2
        p.shape([(left, top), (right, top), (right, bottom), (left, bottom)])


def _dog(p: _Pen):
    p.stroke([(0.72, 0.1), (0.98, -0.34)], 0.12)
    _legs(p, (-0.38, -0.12, 0.38, 0.64), 0.3, 0.92)
    p.oval(0.14, 0.16, 0.7, 0.34)
    p.oval(-0.52, -0.28, 0.4, 0.38)
    p.oval(-0.84, -0.14, 0.22, 0.17)
    p.oval(-1.0, -0.2, 0.08, 0.07, fill=(20, 16, 18), outline=False)
    p.oval(-0.26, -0.2, 0.15, 0.36, fill=p.shade(0.7))
    p.eye(-0.62, -0.34)


def _wolf(p: _Pen):
    p.shape([(0.6, 0.0), (1.02, 0.1), (1.1, 0.62), (0.86, 0.5), (0.62, 0.3)], fill=p.shade(0.75))
    _legs(p, (-0.32, -0.06, 0.4, 0.64), 0.3, 0.92, 0.17)
    p.shape([(-0.5, -0.1), (0.7, -0.08), (0.78, 0.3), (0.2, 0.4), (-0.3, 0.5)])
    p.shape([(-0.24, -0.44), (-0.28, -0.98), (0.08, -0.56)], fill=p.shade(0.75))
    p.shape([(-0.52, -0.46), (-0.52, -1.0), (-0.2, -0.6)])
    head = [(-1.12, -0.16), (-0.62, -0.58), (-0.1, -0.6), (0.12, -0.1), (-0.2, 0.42), (-0.56, 0.02)]
    p.shape(head)
    cheek = [(-1.08, -0.12), (-0.6, -0.06), (-0.2, 0.36), (-0.36, -0.14)]
    p.shape(cheek, fill=(238, 238, 238), outline=False)
    p.oval(-1.08, -0.18, 0.08, 0.07, fill=(20, 16, 18), outline=False)
    p.eye(-0.5, -0.36)


def _bird(p: _Pen):
    for x in (-0.08, 0.16):
        p.stroke([(x, 0.5), (x, 0.9)], 0.07, fill=(226, 140, 30), outline=False)
    p.shape([(0.4, 0.1), (1.05, -0.2), (0.98, 0.3), (0.5, 0.5)], fill=p.shade(0.75))
    p.oval(0.1, 0.22, 0.6, 0.44)
    p.shape([(-0.72, -0.3), (-1.12, -0.12), (-0.68, -0.06)], fill=(248, 158, 32))
    p.oval(-0.42, -0.26, 0.36, 0.34)
    p.shape([(-0.1, 0.08), (0.52, 0.0), (0.2, 0.46)], fill=p.shade(0.75))
    p.eye(-0.52, -0.32)


def _lion(p: _Pen):
    p.stroke([(0.7, 0.2), (1.0, -0.12)], 0.08)
    p.oval(1.02, -0.18, 0.14, 0.14, fill=(150, 70, 24))
    _legs(p, (-0.3, -0.04, 0.4, 0.64), 0.3, 0.92)
    p.oval(0.24, 0.2, 0.6, 0.32)
    mane = [(i * np.pi / 11, 0.62 if i % 2 else 0.52) for i in range(22)]
    mane = [(-0.44 + np.cos(a) * r, -0.22 + np.sin(a) * r) for a, r in mane]
    p.shape(mane, fill=(176, 84, 28))
    p.oval(-0.46, -0.18, 0.34, 0.33)
    for side in (-1, 1):
        p.eye(-0.46 + side * 0.14, -0.24)
    p.oval(-0.46, -0.04, 0.08, 0.06, fill=(60, 30, 26), outline=False)


def _fish(p: _Pen):
    p.shape([(0.42, 0), (1.0, -0.46), (0.86, 0), (1.0, 0.46)], fill=p.shade(0.8))
    p.shape([(-0.2, -0.34), (0.1, -0.66), (0.34, -0.26)], fill=p.shade(0.8))
    p.oval(-0.14, 0, 0.78, 0.44)
    p.draw.arc(p._box(-0.78, -0.32, -0.3, 0.32), -60, 60, p.ink, p.line)
    p.eye(-0.62, -0.1, 0.085)


def _turtle(p: _Pen):
    skin = tuple(round(0.55 * c + 0.45 * g) for c, g in zip(p.color, (206, 196, 130)))
    for x in (-0.42, 0.5):
        p.oval(x, 0.52, 0.19, 0.2, fill=skin)
    p.shape([(0.76, 0.3), (1.02, 0.44), (0.74, 0.46)], fill=skin)
    p.oval(-0.84, 0.16, 0.26, 0.23, fill=skin)
    p.shape(_curve(0.06, 0.42, 0.82, 0.9, 180, 360, 20))
    lines = [(-0.3, 0.4), (-0.2, -0.36)], [(0.4, 0.4), (0.32, -0.38)], [(-0.62, 0.02), (0.74, 0.02)]
    for points in lines:
        p.draw.line(p._points(points), fill=p.shade(0.6), width=p.line)
    p.eye(-0.9, 0.1, 0.06)


def _pig(p: _Pen):
    p.draw.arc(p._box(0.66, -0.28, 1.0, 0.06), 60, 360, p.ink, p.line + 1)
    _legs(p, (-0.4, -0.14, 0.3, 0.54), 0.4, 0.86)
    p.oval(0.1, 0.16, 0.72, 0.52)
    p.shape([(-0.74, -0.36), (-0.76, -0.8), (-0.42, -0.6)], fill=p.shade(0.82))
    p.shape([(-0.34, -0.56), (-0.08, -0.78), (-0.12, -0.36)], fill=p.shade(0.82))
    p.oval(-0.46, -0.14, 0.44, 0.44)
    p.oval(-0.58, 0.0, 0.2, 0.15, fill=p.shade(0.82))
    for x in (-0.64, -0.52):
        p.oval(x, 0.0, 0.035, 0.06, fill=(70, 30, 40), outline=False)
    for x in (-0.64, -0.34):
        p.eye(x, -0.28, 0.06)


def _elephant(p: _Pen):
    p.stroke([(0.9, -0.1), (1.02, 0.34)], 0.07)
    _legs(p, (-0.3, -0.02, 0.42, 0.7), 0.3, 0.94, 0.26)
    p.oval(0.24, 0.0, 0.74, 0.54)
    p.stroke([(-0.84, -0.16), (-0.98, 0.2), (-0.96, 0.58), (-0.8, 0.72)], 0.19)
    p.oval(-0.56, -0.3, 0.42, 0.42)
    p.oval(-0.22, -0.3, 0.3, 0.42, fill=p.shade(0.82))
    p.shape([(-0.76, 0.06), (-0.62, 0.04), (-0.68, 0.34)], fill=(250, 248, 236))
    p.eye(-0.72, -0.36)


def _cup(p: _Pen):
    p.draw.arc(p._box(0.2, -0.32, 0.86, 0.36), -100, 100, p.ink, 5 * p.line)
    p.draw.arc(p._box(0.25, -0.27, 0.81, 0.31), -100, 100, p.color, 2 * p.line)
    p.shape([(-0.6, -0.5), (0.48, -0.5), (0.36, 0.66), (-0.48, 0.66)])
    p.oval(-0.06, -0.5, 0.54, 0.15, fill=(96, 60, 40))


def _rose(p: _Pen):
    p.stroke([(0, 0.0), (0, 0.96)], 0.1, fill=(40, 120, 44), outline=False)
    p.shape([(0.02, 0.62), (0.4, 0.3), (0.46, 0.6)], fill=(56, 150, 58))
    p.shape([(-0.02, 0.74), (-0.4, 0.44), (-0.46, 0.74)], fill=(56, 150, 58))
    for x, y in ((-0.26, -0.4), (0.26, -0.4), (-0.17, -0.1), (0.17, -0.1), (0, -0.6)):
        p.oval(x, y, 0.3, 0.3)
    p.oval(0, -0.34, 0.26, 0.24, fill=p.shade(0.78))
    p.oval(0.02, -0.36, 0.11, 0.1, fill=p.shade(0.58), outline=False)


def _bottle(p: _Pen):
    right = [(0.13, -0.98), (0.13, -0.48), (0.36, -0.2), (0.36, 0.94)]
    left = [(-0.36, 0.94), (-0.36, -0.2), (-0.13, -0.48)]
    p.shape([(-0.13, -0.98), *right, *left])
    p.shape([(-0.15, -1.0), (0.15, -1.0), (0.15, -0.8), (-0.15, -0.8)], fill=(206, 168, 66))
    p.shape([(-0.34, 0.06), (0.34, 0.06), (0.34, 0.62), (-0.34, 0.62)], fill=(246, 236, 206))
    p.oval(0, 0.34, 0.16, 0.16, fill=(216, 40, 60), outline=False)


def _apple(p: _Pen):
    p.oval(-0.24, 0.16, 0.5, 0.58)
    p.oval(0.24, 0.16, 0.5, 0.58)
    p.oval(0, 0.2, 0.5, 0.5, outline=False)
    p.stroke([(0, -0.3), (0.08, -0.72)], 0.1, fill=(96, 62, 36), outline=False)
    p.shape([(0.1, -0.54), (0.52, -0.84), (0.5, -0.46)], fill=(74, 160, 60))
    p.oval(-0.38, -0.04, 0.1, 0.15, fill=p.shade(1.6), outline=False)


def _ball(p: _Pen):
    p.oval(0, 0, 0.78, 0.78)
    band = _curve(0, 0, 0.76, 0.26, 180, 360) + _curve(0, 0, 0.76, 0.5, 0, -180)
    p.shape(band, fill=(250, 250, 250), outline=False)
    p.draw.ellipse(p._box(-0.78, -0.78, 0.78, 0.78), outline=p.ink, width=p.line)
    p.oval(0, -0.56, 0.14, 0.1, fill=p.shade(0.7), outline=False)


def _car(p: _Pen):
    p.shape([(-0.52, -0.06), (-0.3, -0.52), (0.36, -0.52), (0.6, -0.06)])
    p.shape([(-0.38, -0.08), (-0.22, -0.42), (0.0, -0.42), (0.0, -0.08)], fill=(196, 230, 250))
    p.shape([(0.1, -0.08), (0.1, -0.42), (0.3, -0.42), (0.46, -0.08)], fill=(196, 230, 250))
    p.shape([(-1.0, 0.42), (-1.0, 0.06), (-0.52, -0.06), (0.6, -0.06), (1.0, 0.08), (1.0, 0.42)])
    for x in (-0.52, 0.54):
        p.oval(x, 0.42, 0.25, 0.25, fill=(44, 44, 48))
        p.oval(x, 0.42, 0.1, 0.1, fill=(200, 200, 204), outline=False)


def _background(draw: ImageDraw.ImageDraw, place: str, rng: np.random.Generator):
    s = SUPERSAMPLING
    size = SIZE * s
    if place == "plain":
        tint = rng.uniform(-8, 8)
        draw.rectangle((0, 0, size, size), fill=tuple(round(c + tint) for c in (206, 219, 236)))
    elif place == "park":
        draw.rectangle((0, 0, size, size), fill=(168, 214, 250))
        horizon = round((36 + rng.uniform(-2, 2)) * s)
        for x in (rng.uniform(4, 20), rng.uniform(44, 60)):
            x, y, r = x * s, horizon - 9 * s, rng.uniform(6.5, 8.5) * s
            draw.rectangle((x - 1.4 * s, y, x + 1.4 * s, horizon + 2 * s), fill=(112, 72, 42))
            draw.ellipse((x - r, y - r, x + r, y + r * 0.8), fill=(56, 140, 60))
        draw.rectangle((0, horizon, size, size), fill=(122, 192, 90))
    elif place == "moon":
        draw.rectangle((0, 0, size, size), fill=(16, 15, 40))
        for x, y in rng.uniform(1, 63, (18, 2)):
            draw.rectangle((x * s, y * s, (x + 1) * s, (y + 1) * s), fill=(250, 250, 240))
        x, y = rng.uniform(48, 56) * s, rng.uniform(7, 11) * s
        draw.ellipse((x - 5 * s, y - 5 * s, x + 5 * s, y + 5 * s), fill=(70, 130, 220))
        draw.ellipse((x - 3 * s, y - 3 * s, x + 1 * s, y + 1 * s), fill=(90, 180, 110))
        top = rng.uniform(37, 40) * s
        draw.ellipse((-40 * s, top, 104 * s, top + 90 * s), fill=(176, 176, 184))
        for x, y in zip(rng.uniform(2, 58, 4), rng.uniform(49, 61, 4)):
            draw.ellipse((x * s, y * s, (x + 6) * s, (y + 3) * s), fill=(140, 140, 150))
    else:
        draw.rectangle((0, 0, size, size), fill=(150, 216, 248))
        x, y = rng.uniform(7, 13) * s, rng.uniform(6, 11) * s
        draw.ellipse((x - 5 * s, y - 5 * s, x + 5 * s, y + 5 * s), fill=(255, 224, 90))
        sea, sand = (26 + rng.uniform(-1.5, 1.5)) * s, (38 + rng.uniform(-1.5, 1.5)) * s
        draw.rectangle((0, sea, size, size), fill=(36, 128, 196))
        for x in rng.uniform(0, 56, 3):
            y = rng.uniform(28, 35) * s
            draw.rectangle((x * s, y, (x + 7) * s, y + s), fill=(196, 230, 246))
        draw.rectangle((0, sand, size, size), fill=(242, 218, 156))


def _portrait(
    draw: ImageDraw.ImageDraw, occupation: str, skin: tuple[int, int, int], rng: np.random.Generator
):
    s = SUPERSAMPLING
    tint = rng.uniform(-8, 8)
    draw.rectangle((0, 0, SIZE * s, SIZE * s), fill=tuple(round(c + tint) for c in (226, 216, 200)))
    x, y = (32 + rng.uniform(-2, 2)) * s, (32 + rng.uniform(-1.5, 1.5)) * s
    p = _Pen(draw, x, y, (27 + rng.uniform(-1, 1)) * s, skin)
    p.ink = (36, 30, 34)
    clothes = {
        "doctor": (248, 248, 250),
        "nurse": (110, 200, 200),
        "chef": (250, 250, 250),
        "farmer": (60, 90, 170),
        "firefighter": (206, 60, 40),
        "astronaut": (236, 238, 242),
        "pilot": (30, 40, 80),
        "dancer": (220, 70, 160),
    }[occupation]
    if occupation == "astronaut":
        p.oval(0, -0.14, 0.82, 0.8, fill=(214, 226, 240))
    if occupation == "dancer":
        p.oval(0, -0.86, 0.24, 0.22, fill=(50, 30, 26))
    p.shape(_curve(0, 1.24, 0.95, 0.68, 180, 360), fill=clothes)
    p.oval(0, 0.52, 0.2, 0.24, outline=False)
    p.oval(0, -0.1, 0.52, 0.6)
    hair = (50, 30, 26)
    if occupation in ("doctor", "nurse", "dancer"):
        p.shape(_curve(0, -0.24, 0.54, 0.52, 180, 360), fill=hair)
    for side in (-1, 1):
        p.oval(side * 0.2, -0.08, 0.07, 0.08, fill=(24, 20, 24), outline=False)
    p.draw.arc(p._box(-0.2, 0.02, 0.2, 0.32), 20, 160, (150, 40, 50), 2 * p.line)
    if occupation == "doctor":
        p.draw.arc(p._box(-0.36, 0.4, 0.36, 1.1), 0, 180, (60, 60, 70), 2 * p.line)
        p.oval(0.0, 1.06, 0.12, 0.12, fill=(120, 120, 130))
    elif occupation == "nurse":
        cap = [(-0.44, -0.56), (-0.36, -0.98), (0.36, -0.98), (0.44, -0.56)]
        p.shape(cap, fill=(250, 250, 250))
        upright = [(-0.05, -0.92), (0.05, -0.92), (0.05, -0.64), (-0.05, -0.64)]
        p.shape(upright, fill=(220, 40, 50), outline=False)
        across = [(-0.15, -0.83), (0.15, -0.83), (0.15, -0.73), (-0.15, -0.73)]
        p.shape(across, fill=(220, 40, 50), outline=False)
    elif occupation == "chef":
        for x in (-0.34, 0, 0.34):
            p.oval(x, -0.9, 0.3, 0.26, fill=(252, 252, 252))
        p.shape([(-0.48, -0.84), (0.48, -0.84), (0.48, -0.5), (-0.48, -0.5)], fill=(252, 252, 252))
    elif occupation == "farmer":
        p.oval(0, -0.52, 0.92, 0.18, fill=(228, 190, 96))
        p.shape(_curve(0, -0.52, 0.5, 0.5, 180, 360), fill=(228, 190, 96))
    elif occupation == "firefighter":
        p.shape(_curve(0, -0.44, 0.62, 0.62, 180, 360), fill=(214, 44, 36))
        p.shape([(-0.8, -0.44), (0.8, -0.44), (0.8, -0.32), (-0.8, -0.32)], fill=(214, 44, 36))
        p.oval(0, -0.7, 0.17, 0.17, fill=(250, 208, 60))
    elif occupation == "pilot":
        p.shape([(-0.62, -0.78), (0.62, -0.78), (0.5, -0.5), (-0.5, -0.5)], fill=(30, 40, 80))
        p.shape(_curve(0, -0.5, 0.5, 0.14, 0, 180), fill=(20, 20, 26))
        p.oval(0, -0.64, 0.1, 0.08, fill=(250, 208, 60), outline=False)


_PAINTERS = {
    "rabbit": _rabbit,
    "cat": _cat,
    "dog": _dog,
    "wolf": _wolf,
    "bird": _bird,
    "lion": _lion,
    "fish": _fish,
    "turtle": _turtle,
    "pig": _pig,
    "elephant": _elephant,
    "cup": _cup,
    "rose": _rose,
    "bottle": _bottle,
    "apple": _apple,
    "ball": _ball,
    "car": _car,
}
_SPOTS = {
    1: ((32, 37),),
    2: ((17, 39), (47, 39)),
    3: ((17, 22), (47, 22), (32, 48)),
    4: ((17, 21), (47, 21), (17, 48), (47, 48)),
}
_SCALES = {1: 20.0, 2: 14.0, 3: 13.0, 4: 12.6}


def layout(scene: Scene, rng: np.random.Generator) -> list[tuple[Group, float, float, float]]:
    """Where `render` draws each thing of a scene, given a generator in the same state.

    Group, x, y and scale in px.
    """
    things = [group for group in scene.groups for _ in range(group.count)]
    placed = []
    for group, (x, y) in zip(things, _SPOTS.get(len(things), ())):
        jitter = 3.0 if len(things) == 1 else 1.2
        x, y = x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter) * 0.7
        placed.append((group, x, y, _SCALES[len(things)] * rng.uniform(0.93, 1.07)))
    return placed


def render(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene, in which nothing may be left open, as a uint8 array (64, 64, 3)."""
    s = SUPERSAMPLING
    placed = layout(scene, rng)
    image = Image.new("RGB", (SIZE * s, SIZE * s))
    draw = ImageDraw.Draw(image)
    if scene.occupation:
        _portrait(draw, scene.occupation, SKIN_TONES[scene.skin_tone], rng)
    else:
        _background(draw, scene.place, rng)
        for group, x, y, scale in placed:
            tint = np.clip(np.array(COLORS[group.color]) + rng.uniform(-8, 8, 3), 0, 255)
            _PAINTERS[group.kind](_Pen(draw, x * s, y * s, scale * s, tuple(int(c) for c in tint)))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BOX))


def to_grid(images: np.ndarray, columns: int) -> Image.Image:
    """Tile uint8 images (N, H, W, 3) into one picture, row by row."""
    n, h, w, _ = images.shape
    rows = -(-n // columns)
    grid = np.full((rows * h, columns * w, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * h, i % columns * w
        grid[y : y + h, x : x + w] = image
    return Image.fromarray(grid)
