"""Names and places that a command is given, and files that are there whole or not at all."""

import io
import json
import math
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from harness.args import fail
from harness.checkpoint import sync
from harness.ranks import everybodys
from harness.stop import end_run
from harness.stored import is_text

LONGEST_NAME, LONGEST_PATH = 255, 4096
"""Bytes of a file's name and of a whole path, on the usual file systems."""


def check_text(args) -> None:
    """Refuse flags whose text cannot be written into our files, and paths that can name no file."""
    for name, value in vars(args).items():
        flag = name if name == "answers" else "--" + name.replace("_", "-")
        for item in value if isinstance(value, tuple) else (value,):
            if not isinstance(item, str | Path):
                continue
            if not is_text(str(item)):
                fail(f"{flag} {ascii(str(item))[:200]} is no text in UTF-8; give another")
            if isinstance(item, Path) or name == "model":
                parts = [len(part.encode()) for part in Path(item).parts]
                if max(parts, default=0) > LONGEST_NAME or sum(parts) > LONGEST_PATH:
                    fail(f"{flag} {str(item)[:100]}... is too long for a name; give a shorter one")


def check_place(flag: str, path: Path, is_folder: bool = True) -> None:
    """Refuse a folder, or a file, that cannot be written, before there is anything to write.

    For rank 0, which writes: another machine may not see the place.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        return
    if os.path.lexists(path) and os.path.isdir(path) != is_folder:
        kind = "a folder" if is_folder else "a file to write"
        fail(f"{flag} {path} is there and is not {kind}; choose another")
    if not is_folder and os.path.exists(path) and not os.path.isfile(path):
        fail(f"{flag} {path} is there and is not a file to write; choose another")
    existing = path.absolute() if is_folder else path.absolute().parent
    while not os.path.lexists(existing):
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):  # a right that root has may not be enough
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        fail(f"{flag} {path} cannot be written ({reason}: {existing}); choose another")


@contextmanager
def writing(place: Path, remedy: str = "make room, and the same command resumes"):
    """For what rank 0 writes. Where it fails all ranks end in one line, exit code 1. Collective."""
    faults = []
    try:
        yield
    except OSError as error:
        faults = [error.strerror or str(error)]
    for fault in [fault for share in everybodys(faults) for fault in share][:1]:
        end_run(f"{place} cannot be written ({fault}); {remedy}")


def write_whole(path: Path, content: str | bytes | dict[str, np.ndarray]) -> None:
    """Text, bytes, or arrays as .npz: under another name until it is all there.

    Makes the folder. Raises OSError, and leaves what was there before.
    """
    if isinstance(content, dict):
        file = io.BytesIO()  # zipfile would hide why a disk has refused
        np.savez(file, **content)
        content = file.getvalue()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name[:200] + ".partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        sync(partial)
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def to_json(tree) -> str:
    """JSON that every reader takes: null stands for a figure that is not finite."""

    def finite(value):
        if isinstance(value, dict):
            return {key: finite(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [finite(item) for item in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(tree), indent=2, allow_nan=False) + "\n"
