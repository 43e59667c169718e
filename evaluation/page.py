"""The page of a human evaluation, one HTML file with its pictures inside, and its key."""

import base64
import hashlib
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.places import write_whole

PAGE = Path(__file__).with_name("page.html")
PAGE_NAME, KEY_NAME = "human_eval.html", "key.json"
QUESTIONS = {
    "fidelity": "Which picture is drawn better: true to the shape of things, without flaws?",
    "relevance": "Which picture shows better what the text says?",
    "overall": "All in all, which picture would you rather be given for this text?",
}
"""Those of Zhang et al. 2024 (arXiv:2401.12244), App. C.2, in other words."""
ANSWERS = {
    "left": "Left",
    "right": "Right",
    "similar": "Similar, or not sure",
    "not_loaded": "Did not load",
}


def write_page(folder: Path, names: list[str], pairs: dict, pictures: list[np.ndarray]) -> None:
    """The page, and the key, which alone says whose picture is where, into `folder`.

    `pairs` and `pictures` are those of `shuffled_pairs`, of the two models `names`.
    """
    study = hashlib.sha256(json.dumps(pairs).encode())
    for picture in pictures:
        study.update(picture.tobytes())
    key = {"study": study.hexdigest()[:16], "models": names, **pairs}
    # In the order in which they are shown, and nothing beside the pixels.
    sides = [as_data_uri(picture) for picture in pictures]
    shown = [
        {"prompt": pair["prompt"], "left": left, "right": right}
        for pair, left, right in zip(pairs["pairs"], sides[::2], sides[1::2])
    ]
    page = {"study": key["study"], "questions": QUESTIONS, "answers": ANSWERS, "pairs": shown}
    # "<" would end the script's element, or begin a comment, where a prompt has it.
    content = json.dumps(page).replace("<", "\\u003c")
    write_whole(folder / PAGE_NAME, PAGE.read_text(encoding="utf-8").replace("STUDY", content))
    # Last: where there is a key, all is there, and it is not overwritten.
    write_whole(folder / KEY_NAME, json.dumps(key, indent=2) + "\n")


def as_data_uri(picture: np.ndarray) -> str:
    """A PNG of the pixels alone, uint8 (H, W, 3)."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
