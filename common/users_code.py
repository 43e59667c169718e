"""What comes from a user: code that an argument names, and text that an error quotes."""

import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from common import UserError

LONGEST_QUOTE = 200


def shortened(value, length: int = LONGEST_QUOTE) -> str:
    """`value` as an error quotes it: on one line, printable, of at most `length` characters."""
    text = value if isinstance(value, str) else repr(value)
    # A character may become ten of them, as \U0001f408 does: no more is looked at than can matter.
    text = "".join(c if c.isprintable() else " " for c in text[: length + 1])
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def quoted(value: str) -> str:
    """The same between quotation marks, as `repr` writes them."""
    return repr(shortened(value))


def message_of(error: BaseException, length: int = LONGEST_QUOTE) -> str:
    """The message of an exception, of whatever the user's code makes it."""
    try:
        return shortened(str(error), length)
    except BaseException:  # its __str__ is the user's as well
        return "an error without a message"


def what_was_raised(error: BaseException) -> str:
    """Kind and message of an exception."""
    return f"{shortened(type(error).__name__, 80)}: {message_of(error)}"


@contextmanager
def users_code(kind: type[UserError], what: str) -> Iterator[None]:
    """A block that runs a user's code: it ends well, or with an error of this kind.

    sys.exit(0) is no success there, and Ctrl-C raises nothing in a run, so that all that can be
    raised is a fault. What the code leaves changed of torch is put back: the modes of autograd, the
    default dtype and the default device, on which all that the run computes depends.
    """
    dtype, device, gradients = (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
    )
    try:
        # Inside, because leaving inference_mode puts back the mode that was there before it.
        with torch.inference_mode(torch.is_inference_mode_enabled()):
            torch.set_grad_enabled(gradients)
            yield
    except BaseException as error:
        if type(error) is kind:
            raise kind(message_of(error, 800)) from error
        frames = traceback.extract_tb(error.__traceback__)
        frame = [frame for frame in frames if not frame.filename.startswith("<frozen")][-1]
        place = shortened(f"{frame.filename}:{frame.lineno}")
        raise kind(f"{what} failed with {what_was_raised(error)} ({place})") from error
    finally:
        torch.set_grad_enabled(gradients)
        torch.set_default_dtype(dtype)
        if torch.get_default_device() != device:
            torch.set_default_device(device if device.type != "cpu" else None)


def load_users_function(spec: str, kind: type[UserError], what: str) -> Callable:
    """The function of "path/to/file.py:function"; raises an error of this kind.

    `what` is what the function is for, e.g. "reward".
    """
    path, _, name = spec.rpartition(":")
    if not os.path.isfile(path):  # a named pipe would never end
        raise kind(f"there is no file {quoted(path)} ({what} {quoted(spec)})")
    module_name = re.sub(r"\W", "_", f"{what} {Path(path).resolve()}")
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_name] = module  # where dataclasses and pickle look for it
    try:
        with users_code(kind, f"the file of {what} {quoted(spec)}"):
            module_spec.loader.exec_module(module)
            function = getattr(module, name, None)
            if not callable(function):
                raise kind(f"{quoted(path)} has no function {quoted(name)} ({what} {quoted(spec)})")
            return function
    except kind:
        sys.modules.pop(module_name, None)
        raise
