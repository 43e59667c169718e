"""Files that an earlier command has written, and that anyone may have damaged or edited since."""

import json
import math
from pathlib import Path

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from common import UserError

LARGEST = 1 << 26
"""Bytes of a stored file that are read; none of ours is near it."""


class StoredError(UserError):
    """A stored file that is not as it was written; the message names file, fault and remedy."""


def is_text(value: str) -> bool:
    """Whether it can be written as UTF-8, and be a file's name: no half characters, no null."""
    return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def parse_json(text: str, finite: bool = True):
    """What a JSON text says; raises ValueError for whatever is wrong with it.

    Its numbers must be finite, unless told otherwise, its nesting no deeper than Python's stack.
    """

    def number(digits: str) -> float:
        if finite and not math.isfinite(float(digits)):
            raise ValueError(f"it has the number {digits[:20]}")
        return float(digits)

    try:
        return json.loads(text, parse_constant=number, parse_float=number)
    except RecursionError:
        raise ValueError("its JSON is nested too deep") from None


def read_text(path: Path, remedy: str, most: int = LARGEST) -> str:
    """A text file of ours, of at most so many bytes; raises StoredError."""
    try:
        if not path.is_file():
            raise ValueError("is not a file" if path.exists() else "is not there")
        if path.stat().st_size > most:
            raise ValueError(f"has more than {most >> 20} MB")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise StoredError(f"{path} is not text in UTF-8; {remedy}") from None
    except OSError as error:
        raise StoredError(f"{path} cannot be read ({error.strerror}); {remedy}") from None
    except ValueError as error:
        raise StoredError(f"{path} {error}; {remedy}") from None


def checked(value, hint, what: str, remedy: str):
    """`value`, which is what the type `hint` says, down to every item; raises StoredError."""
    try:
        strategy = CollectionCheckStrategy.ALL_ITEMS
        return check_type(value, hint, collection_check_strategy=strategy)
    except TypeCheckError as error:
        fault = " ".join(str(error).split())[:200]
        raise StoredError(f"{what} is not as it was written ({fault}); {remedy}") from None


def read_stored(path: Path, hint, remedy: str):
    """The JSON of a stored file, of the type `hint`; raises StoredError with the remedy.

    A TypedDict says which keys an object must have.
    """
    text = read_text(path, remedy)
    try:
        value = parse_json(text)
    except ValueError as error:
        raise StoredError(
            f"{path} is no JSON as we write it ({str(error)[:200]}); {remedy}"
        ) from None
    return checked(value, hint, str(path), remedy)
