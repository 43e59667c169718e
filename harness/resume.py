"""Arguments of a run that is resumed: those it had, and no code of its folder unasked."""

import json
import os
import re
import shlex
import sys
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TypedDict, get_type_hints

from common import UserError
from common.rewards import RewardError, parse_sum
from harness.checkpoint import PUT_BACK, check_checkpoint, sha256
from harness.project import BEGINS, PROJECT, of_project, place, portable
from harness.stop import fail
from harness.stored import checked, read_stored


class Kept(TypedDict):
    """args.json of a checkpoint: the arguments, and a digest of each file that they name."""

    arguments: dict[str, object]
    contents: dict[str, str]


def stored_form(args) -> str:
    """The text of a run's args.json."""
    return json.dumps(portable(asdict(args)), indent=2, default=str) + "\n"


def checkpoint_form(args, contents: dict[str, str]) -> str:
    """The text of a checkpoint's args.json."""
    kept = {"arguments": portable(asdict(args)), "contents": contents}
    return json.dumps(kept, indent=2, default=str) + "\n"


def code_files(value) -> set[Path]:
    """The files of Python code that an argument names, as path/to/file.py:function.

    However rewards and tasks are read, it is among them: whole or in quoted words, alone or in a
    weighted sum.
    """
    found = set()
    for text in value if isinstance(value, tuple) else [value]:
        if not isinstance(text, str):
            continue
        words = [text]
        with suppress(ValueError):  # a quote that is not closed
            words += shlex.split(text)
        for word in words:
            terms = [word]
            with suppress(RewardError):
                terms += [term for _, term in parse_sum(word)]
            found |= {Path(term.rpartition(":")[0]) for term in terms if ".py" in term}
    return {path for path in found if path.is_file()}


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def contents_of_files(args) -> dict[str, str]:
    """Digests of the files that arguments name: prompts by their flag, and code by its place."""
    contents = {}
    for name, value in vars(args).items():
        if isinstance(value, Path) and value.is_file():
            contents[flag_of(name)] = sha256(value)
        contents |= digests_of_code(value)
    return contents


def digests_of_code(value) -> dict[str, str]:
    """Of the files of Python code that an argument names, by their place."""
    return {place(path): sha256(path) for path in sorted(code_files(value))}


def resume_after_restart(words: list[str]) -> list[str]:
    """With --resume where torchrun --max-restarts starts the command anew after a rank has died."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if not restarted or "--output-dir" not in words[:-1] or "--resume" in words:
        return words
    folder = words[words.index("--output-dir") + 1]
    saved = any((Path(folder) / name).exists() for name in ("checkpoint", "checkpoint.old"))
    return [*words, "--resume", folder] if saved else words


def stored_args(folder: Path, default, may_change: set[str], flags: set[str]):
    """Arguments of the run in `folder`, of the same class as `default`.

    `flags` are those of the command line. Files of code that the run names are run again only if
    their flag is among them, or if they are part of this project and unchanged; servers are asked,
    which get a key of the user's, and repositories pushed to, only if it is.
    """
    try:
        check_checkpoint(folder)
        stored = read_stored(folder / "args.json", dict, PUT_BACK)
        kept = read_stored(folder / "checkpoint" / "args.json", Kept, PUT_BACK)
        args = of_project(typed(stored, default, folder / "args.json"))
        saved = typed(kept["arguments"], default, folder / "checkpoint" / "args.json")
        saved = of_project(saved)
    except (UserError, OSError) as error:
        fail(f"--resume {str(folder)[:200]}: {error}")
    given = vars(args)
    for name, value in vars(saved).items():
        if given[name] != value and name not in may_change:
            fault = f"{name} of its args.json was edited; it was {value}"
            fail(f"--resume {folder}: {fault}: put it back, or start a run of its own")
        flag = flag_of(name)
        if flag in kept["contents"]:
            check_unchanged(folder, flag, value, kept["contents"][flag])
        if flag in flags:
            continue
        for path in code_files(value):
            check_code(folder, flag, value, path, kept["contents"])
        asks_a_server = flag in ("--reward", "--tasks") and "://" in str(value)
        if asks_a_server or (flag == "--push-to-hub" and given[name]):
            fail(f"--resume {folder}: it has {flag} {given[name]}; give that again if you trust it")
    return args


def typed(stored: dict, default, path: Path):
    """`default` with stored values, whose types are those of its fields; raises UserError."""
    if stored.keys() - vars(default).keys():
        raise UserError("it is a run of another script; resume it with that one")
    hints, values = get_type_hints(type(default)), {}
    for field in fields(default):
        if field.name not in stored:
            raise UserError(f"{path} has no {field.name!r}; {PUT_BACK}")
        value, hint = stored[field.name], hints[field.name]
        if isinstance(value, str) and "Path" in str(hint):
            value = Path(value)
        if isinstance(value, list):
            value = tuple(value)
        hint = type(None) if isinstance(value, bool) and "bool" not in str(hint) else hint
        values[field.name] = checked(value, hint, f"{field.name!r} of {path}", PUT_BACK)
    return replace(default, **values)


def place_in(state: dict) -> tuple[int, int]:
    """Iteration and unit at which a checkpoint's state goes on; a damaged one raises something."""
    iteration, unit = int(state["iteration"]), int(state["unit"])
    if iteration < 0 or unit < 0:
        raise ValueError(f"iteration {iteration}, unit {unit}")
    for key in ("fixed", "kept"):
        if not isinstance(state[key], dict):
            raise ValueError(f"{key} is a {type(state[key]).__name__}")
    return iteration, unit


def check_iterations(args, done: int) -> None:
    """Refuse fewer iterations than a run has done; say it where none is left to do."""
    if args.num_iterations < done:
        fail(f"--num-iterations is {args.num_iterations}, and the run has done {done}; give more")
    if args.num_iterations == done and int(os.environ.get("RANK", 0)) == 0:
        remedy = "give a larger --num-iterations to go on"
        print(f"all {done} iterations are done; {remedy}", file=sys.stderr)


def check_fixed(before: dict, fixed: dict) -> None:
    """Refuse a run in which what must stay the same is not what it was."""
    for name, value in fixed.items():
        if before.get(name) != value:
            fail(f"--resume: {name} were {before.get(name)} and are {value}; put them back")


def check_unchanged(folder: Path, flag: str, path: Path | None, digest: str) -> None:
    """Refuse a file of prompts that is another one than at the run's start."""
    if path is None or not path.is_file() or sha256(path) != digest:
        fail(f"--resume {folder}: {flag} {path} has changed since the run began; put it back")


def check_code(folder: Path, flag: str, value, path: Path, contents: dict[str, str]) -> None:
    """Refuse to run a stored file of code, `path`, that nobody has named on this command line.

    Unless it belongs to this project, lies neither in the run's folder nor beside it, where it may
    have come with the run, and is what it was when the run began.
    """
    run_dir = folder.resolve()
    beside = run_dir if run_dir.parent in (PROJECT, *PROJECT.parents) else run_dir.parent
    file = path.resolve()
    ours = file.is_relative_to(PROJECT) and not file.is_relative_to(beside)
    if not ours or contents.get(place(path)) != sha256(path):
        fault = f"the run would run the code of {path}"
        words = shlex.join([flag, *(value if isinstance(value, tuple) else [str(value)])])
        fail(f"--resume {folder}: {fault}; if you trust it, give it again: {words}")


def same_argument(value, other) -> bool:
    """Whether two values say the same, files of code by other names for one path included."""

    def resolved(text):
        if isinstance(text, tuple):
            return tuple(map(resolved, text))
        for path in code_files(text):
            name = rf"{BEGINS}(\./)*{re.escape(str(path))}"
            text = re.sub(name, str(path.resolve()).replace("\\", r"\\"), text)
        return text

    return resolved(portable(value)) == resolved(portable(other))


def check_same(args, default, may_change: set[str]):
    """The arguments as the run has them; refuses those that must agree with it, and do not."""
    differ, kept = [], {}
    for name, stored in vars(default).items():
        if name in may_change:
            continue
        if not same_argument(vars(args)[name], stored):
            differ.append(f"{flag_of(name)} (there {stored})")
        kept[name] = stored
    if differ:
        remedy = "give them as they are there, or leave them out"
        fail(f"--resume {args.resume}: the run has other {', '.join(differ)}; {remedy}")
    return replace(args, **kept)
