"""What pictures and scores were made of, as digests: the same name with other content is another.

A hub id stands for itself: what is behind it is not looked at.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from common.rewards import is_users_function, parse_spec, parse_sum
from harness.args import fail
from harness.checkpoint import sha256
from harness.project import portable

PIPELINE = ("model_index.json", "unet", "vae", "text_encoder", "tokenizer", "scheduler")
"""What diffusers loads of a model's folder; beside it may lie the same in other formats."""


def digest_of(place: Path) -> str:
    """SHA-256 of a file; of a folder, that of the names and contents of all files in it."""
    if os.path.isfile(place):
        return sha256(place)
    names = [path.relative_to(place) for path in sorted(place.rglob("*")) if os.path.isfile(path)]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    lines = [f"{sha256(place / name)}  {name.as_posix()}\n" for name in names]
    return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()


def digest_of_all(places: list[Path]) -> str:
    """One digest of several files and folders."""
    return hashlib.sha256("\n".join(map(digest_of, places)).encode()).hexdigest()


def digest_of_model(model: str) -> str:
    """Of a folder in diffusers format, all that draws pictures; empty for a hub id."""
    if not os.path.isdir(model):
        return ""
    places = [Path(model) / part for part in PIPELINE]
    return or_fail("--model", model, [place for place in places if place.exists()])


def score_keys(specs: tuple[str, ...]) -> dict[str, str]:
    """By reward the name under which its scores are stored: its spec and a digest of its files.

    Of path/to/file.py:function that is the file, of others a local folder of weights; terms of a
    sum count too.
    """
    keys = {}
    for spec in specs:
        places = list(local_files(spec))
        digest = or_fail("--rewards", spec, places)[:16] if places else ""
        keys[spec] = f"{portable(spec)} sha256:{digest}" if digest else spec
    return keys


def local_files(spec: str) -> Iterator[Path]:
    """The files and folders of this machine that the scores of a reward come from."""
    for _, term in parse_sum(spec):
        if is_users_function(term):
            yield Path(term.rpartition(":")[0])
            continue
        _, weights, options = parse_spec(term)
        for value in (weights, *options.values()):
            if value and os.path.isdir(value):
                yield Path(value)


def or_fail(flag: str, name, places: list[Path]) -> str:
    """`digest_of_all`; what cannot be read ends the command."""
    try:
        return digest_of_all(places)
    except OSError as error:
        fail(f"{flag} {name} cannot be read ({error.strerror}: {error.filename}); check it")
