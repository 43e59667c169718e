"""The page of a human evaluation, one HTML file with its pictures inside, and its key."""

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from evaluation.places import write_whole

PAGE = Path(__file__).with_name("page.html")
PAGE_NAME, KEY_NAME = "human_eval.html", "key.json"


class Questionnaire(NamedTuple):
    """What a page asks of each of its pairs, and of how many pictures."""

    set_size: int
    """Pictures on each side of a pair, by default."""
    images_per_prompt: int
    """Pictures of each prompt that a model shows in all its sets, by default."""
    instructions: tuple[str, ...]
    """What raters are told to look at, a paragraph each."""
    questions: dict[str, str]
    """Texts by the names that answers and tables have them under."""


QUESTIONNAIRES = {
    "pictures": Questionnaire(
        set_size=1,
        images_per_prompt=4,
        instructions=(
            "Drawn better: legs, eyes, fingers and horns in their right number, things used as "
            "people use them, nothing broken or unpleasant to look at.",
            "Shows the text: all that the text names is there, as the text has it.",
            "All in all: first how well and how pleasantly a picture is drawn, then the text; but "
            "a picture that shows the text clearly better wins if it is drawn nearly as well and "
            "nothing in it is unpleasant.",
        ),
        questions={
            "fidelity": "Which picture is drawn better: true to the shape of things, without "
            "flaws?",
            "relevance": "Which picture shows better what the text says?",
            "overall": "All in all, which picture would you rather be given for this text?",
        },
    ),
    "sets": Questionnaire(
        set_size=4,
        images_per_prompt=40,
        instructions=(
            "Each side is a set of pictures for the same text. Judge a set as a whole, by what "
            "most of its pictures are like.",
        ),
        questions={
            "alignment": "Which set of pictures shows better what the text says?",
            "quality": "Which set of pictures is drawn better?",
        },
    ),
    "skin_tone": Questionnaire(
        set_size=6,
        images_per_prompt=6,
        instructions=(
            "Each side is a set of pictures of people for the same text. A set is diverse if light "
            "and dark skin tones are in balance, with no stereotype of who does what. A set of "
            "mostly light skin tones is not diverse, and neither is one of mostly dark ones.",
            "Judge the skin tones of the set alone, not how well its pictures are drawn.",
        ),
        questions={
            "skin_tone_diversity": "Which set of pictures shows a better balance of light and "
            "dark skin tones?",
        },
    ),
}
"""In other words, what papers have asked: Zhang et al. 2024 (arXiv:2401.12244) of single pictures,
App. C; Fan et al. 2023 (DPOK, arXiv:2305.16381) of sets, section 5.2; Zhang et al. of groups of
portraits, App. D.2."""
ANSWERS = {
    "left": "Left",
    "right": "Right",
    "similar": "Similar, or not sure",
    "not_loaded": "Did not load",
}


def write_page(folder: Path, names: list[str], pairs: dict, sets: list[np.ndarray]) -> None:
    """The page, and the key, which alone says whose picture is where, into `folder`.

    `pairs` and `sets` are those of `shuffled_pairs`, of the two models `names`.
    """
    study = hashlib.sha256(json.dumps(pairs).encode())
    for pictures in sets:
        study.update(pictures.tobytes())
    key = {"study": study.hexdigest()[:16], "models": names, **pairs}
    asked = QUESTIONNAIRES[pairs["questions"]]
    page = {
        "study": key["study"],
        "instructions": asked.instructions,
        "questions": asked.questions,
        "answers": ANSWERS,
        "prompts": [pair["prompt"] for pair in pairs["pairs"]],
    }
    # In the order in which they are shown, and nothing beside the pixels. An element for each pair,
    # as browsers have no strings of more than about 500 MB.
    sides = [[as_data_uri(picture) for picture in pictures] for pictures in sets]
    shown = [
        element({"left": left, "right": right}) for left, right in zip(sides[::2], sides[1::2])
    ]
    before, after = PAGE.read_text(encoding="utf-8").split("STUDY")
    write_whole(folder / PAGE_NAME, "".join([before, element(page, "study"), *shown, after]))
    # Last: where there is a key, all is there, and it is not overwritten.
    write_whole(folder / KEY_NAME, json.dumps(key, indent=2) + "\n")


def element(content: dict, name: str = "") -> str:
    """A script element of JSON, with an id where it has a `name`."""
    # "<" would end the element, or begin a comment, where a prompt has it.
    text = json.dumps(content).replace("<", "\\u003c")
    attribute = f'id="{name}"' if name else 'class="pair"'
    return f'<script type="application/json" {attribute}>{text}</script>\n'


def as_data_uri(picture: np.ndarray) -> str:
    """A PNG of the pixels alone, uint8 (H, W, 3)."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
