"""Where the project's own files are, and how its commands are called, from whatever folder."""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
BEGINS = r"(?<![\w./-])"
"""No letter of a path is before it."""
OWN = re.compile(BEGINS + r"(zoo|prompts)/[\w./-]*")
NOT_READ = {"prompt", "output_dir", "resume", "push_to_hub"}
"""Arguments that name nothing that is read from a folder of this name."""

called_as: str | None = None
"""The name of a command that pip has installed, where one is running (installed.py)."""


def of_project(args):
    """The arguments of a preset or a run: under zoo/ and prompts/ comes what the project has."""
    return args if Path.cwd() == PROJECT else replaced(args, lambda path: PROJECT / path)


def found(args):
    """The arguments of a command line: a file of this folder comes before one of the project."""

    def absolute(path: Path) -> Path:
        return Path.cwd() / path if os.path.exists(path) else PROJECT / path

    return args if Path.cwd() == PROJECT else replaced(args, absolute)


def replaced(args, absolute: Callable[[Path], Path]):
    """The arguments with absolute paths in place of those under zoo/ and prompts/ of the project.

    So they mean the same in every folder. What the project does not have stays as it is.
    """

    def of_value(value, quote: Callable[[str], str]):
        if isinstance(value, tuple):
            return tuple(of_value(part, quote) for part in value)
        if not isinstance(value, str | Path):
            return value
        if os.path.exists(value) and not OWN.fullmatch(str(value)):  # such as "zoo/sd copy"
            return value
        return type(value)(OWN.sub(lambda match: of_match(match[0], quote), str(value)))

    def of_match(path: str, quote: Callable[[str], str]) -> str:
        return quote(str(absolute(Path(path)))) if os.path.exists(PROJECT / path) else path

    read = {name: value for name, value in vars(args).items() if name not in NOT_READ}
    # A task is a text of words between blanks, as a shell has them.
    quoting = {name: shlex.quote if name == "tasks" else str for name in read}
    return replace(args, **{name: of_value(read[name], quoting[name]) for name in read})


def portable(value):
    """Arguments, settings or a text in which the project's files are zoo/... and prompts/... alone.

    So they are stored, compared and shown, wherever the project lies. `value` may be a path, a
    text, or a dict, tuple or list of them.
    """
    if isinstance(value, dict):
        return {portable(key): portable(of_key) for key, of_key in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(portable, value))
    if not isinstance(value, str | Path):
        return value
    text = str(value)
    for start in (shlex.quote(f"{PROJECT}/"), f"{PROJECT}/"):  # as in a task, and bare
        end = "'" if start.endswith("'") else ""
        pattern = rf"{BEGINS}{re.escape(start.removesuffix(end))}((?:zoo|prompts)/[\w./-]*){end}"
        text = re.sub(pattern, r"\1", text)
    return type(value)(text)


def place(path: Path) -> str:
    """The name of a file, wherever the project lies."""
    path = path.resolve()
    return str(path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path)


def program() -> str:
    """What the running command is called, for its help: "dpok.py", or "dpok" of pip's."""
    return called_as or Path(sys.argv[0]).name


def call_of(command: str) -> list[str]:
    """The words that call a command, such as "dpok", from the current folder."""
    if called_as:
        return [command]
    script = f"{command}.py"
    return [python(), script if Path.cwd() == PROJECT else str(PROJECT / script)]


def can_call(command: str) -> bool:
    """Whether the command is there; a copy of some files of this project may lack it."""
    return bool(called_as) or (PROJECT / f"{command}.py").is_file()


def call_of_export() -> list[str]:
    """The words that call evaluation/export.py from the current folder."""
    if called_as:
        return ["export_run"]
    words = [python(), "-m", "evaluation.export"]
    return words if Path.cwd() == PROJECT else ["env", f"PYTHONPATH={PROJECT}", *words]


def python() -> str:
    """This Python, as short as it can be called from the current folder."""
    running = Path(sys.executable)
    if shutil.which("python") == sys.executable:
        return "python"
    return str(running.relative_to(Path.cwd()) if running.is_relative_to(Path.cwd()) else running)
