"""Where the project's own files are, and how its commands are called, from whatever folder."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
INSTALLED = not (PROJECT / "pyproject.toml").exists()
"""Whether pip has put the project beside other packages, and its commands on the PATH."""
OWN = re.compile(r"(?<![\w./-])(zoo|prompts)/[\w./-]*")
NO_PATHS, PLACES = {"prompt"}, {"output_dir", "resume"}
"""Arguments that name no file, and those that name a folder of the user's."""


def of_project(args):
    """The arguments of a preset or a run: under zoo/ and prompts/ comes what the project has."""
    return replaced(args, lambda path: PROJECT / path)


def found(args):
    """The arguments of a command line: a file of this folder comes before one of the project."""
    return replaced(args, lambda path: (Path() if path.exists() else PROJECT).absolute() / path)


def replaced(args, absolute: Callable[[Path], Path]):
    """The arguments with absolute paths in place of those under zoo/ and prompts/ of the project.

    So they mean the same in every folder. What the project does not have stays as it is.
    """
    if Path.cwd() == PROJECT:
        return args

    def of_match(match: re.Match) -> str:
        path = Path(match[0])
        return str(absolute(path)) if (PROJECT / path).exists() else match[0]

    def of_value(value):
        if isinstance(value, tuple):
            return tuple(map(of_value, value))
        if not isinstance(value, str | Path):
            return value
        return type(value)(OWN.sub(of_match, str(value)))

    named = {name: value for name, value in vars(args).items() if name not in NO_PATHS | PLACES}
    return replace(args, **{name: of_value(value) for name, value in named.items()})


def place(path: Path) -> str:
    """The name of a file, wherever the project lies."""
    path = path.resolve()
    return str(path.relative_to(PROJECT) if path.is_relative_to(PROJECT) else path)


def call_of(command: str) -> list[str]:
    """The words that call a command, such as "dpok", from the current folder."""
    if INSTALLED:
        return [command]
    script = f"{command}.py"
    return ["python", script if Path.cwd() == PROJECT else str(PROJECT / script)]


def call_of_export() -> list[str]:
    """The words that call evaluation/export.py."""
    return ["export_run"] if INSTALLED else ["python", "-m", "evaluation.export"]
