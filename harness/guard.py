"""What the main() of every command runs in: nothing ends in silence, and nothing in a traceback."""

import functools
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from common import UserError
from common.stable_diffusion import ModelError, OtherModelError
from harness.project import call_of
from harness.stop import Ended, end_alone, fail, one_line

FLAG, VARIABLE = "--traceback", "CLEAN_DIFFUSION_TRACEBACK"
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")

runs = []
"""The Run of this process, which the guard asks to save what there is."""


def command(main: Callable) -> Callable:
    """`main` of a command, in which every fault becomes one line on stderr.

    Exit code 2 where nothing was begun, else 1, and what there is is saved. With the flag
    --traceback, or the environment variable CLEAN_DIFFUSION_TRACEBACK=1, the traceback comes first.
    """

    @functools.wraps(main)
    def guarded():
        show_traceback = FLAG in sys.argv or os.environ.get(VARIABLE) == "1"
        sys.argv = [word for word in sys.argv if word != FLAG]
        try:
            main()
        except Ended:
            raise
        except BaseException as error:  # a reward may raise anything, and no end is to be silent
            if show_traceback:
                traceback.print_exc()
            end(error)
        finally:
            for run in runs:
                if run._begun:
                    run._folder.close()
            runs.clear()

    return guarded


def end(error: BaseException) -> NoReturn:
    """End the command with the line of `error`; a run that has begun saves what there is."""
    line, alone = described(error), False
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        alone = not isinstance(error, UserError)  # which are raised on all ranks together
    if isinstance(error, KeyboardInterrupt) and not runs:  # a run has handlers of its own
        print("interrupted", file=sys.stderr)
        raise Ended(130)
    if runs and runs[0]._begun:
        try:
            runs[0]._end(line, alone)
        except Ended:
            raise
        except BaseException as another:
            end_alone(f"{line}; and it could not be saved: {described(another)}")
    if alone:
        end_alone(line)
    fail(line)


def described(error: BaseException) -> str:
    """Fault and remedy, in one line."""
    if isinstance(error, OtherModelError):
        return f"--model: {error}"
    if isinstance(error, ModelError):
        name = Path(sys.argv[0]).stem
        words = [*call_of(name), *(["build"] if name == "human_eval" else []), "zoo"]
        remedy = f"check the name and the network, or try the embedded model: {shlex.join(words)}"
        if "'zoo/sd'" in str(error):
            remedy = "copy the folder zoo of this project to where you run it"
        return f"--model {error}; {remedy}"
    if isinstance(error, UserError):
        return str(error)
    what = one_line(f"{type(error).__name__}: {error}", 300)
    if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
        remedy = "lower --micro-batch-size, or the number of samples"
        return f"there is not enough memory ({what}); {remedy}"
    if isinstance(error, SystemExit | KeyboardInterrupt | GeneratorExit):
        return f"something ended the command from within ({what}); {FLAG} shows where"
    place = traceback.extract_tb(error.__traceback__)[-1]
    if Path(place.filename).name == "distributed_c10d.py":
        return "another process has ended, or cannot be reached; its own line says why"
    where = f"{Path(place.filename).name}:{place.lineno}"
    return (
        f"{what} ({where}); {FLAG} shows all of it; please report a fault of this project with it"
    )
