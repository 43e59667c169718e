"""What hostile inputs must come to: one line, its exit code, and nothing else.

A case is a name, a command line, and what is done to the folder before; `ends_in_one_line` runs it
in this process, as a user would from a folder of their own. Cases that need a server, a full disk
or several ranks run in processes of their own (`slow`).
"""

import contextlib
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS = 20
GROWTH = 1 << 30
"""Bytes that a case may add to the memory of the process, at any moment of it."""


@dataclass(frozen=True)
class Case:
    name: str
    command: str | Sequence[str]
    """Words after the script's name, a string split at blanks; {tmp} is the case's own folder."""
    words: str | tuple[str, ...]
    """What the line must have: the flag or file, and a word of the remedy."""
    code: int = 2
    before: Callable[[Path], None] | None = None
    """What is made, or damaged, in the folder {tmp} before the command."""

    def __str__(self) -> str:
        return self.name


def most_memory(anew: bool = False) -> int:
    """Bytes that this process had at most; `anew`: what it has now, from which it counts on."""
    if anew:
        with contextlib.suppress(OSError):  # without the right to it, it counts from the start
            Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise LookupError("VmHWM")


def contents(folder: Path) -> dict[str, str]:
    """A digest of every file in a folder, without those that only Python itself writes."""
    digests = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digests[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests


def ends_in_one_line(case: Case, main: Callable, script: str, tmp: Path, monkeypatch, capsys):
    """Runs the case, and holds it to its code, one line of its words, time, memory and files.

    Nothing that was in the folder changes, and nothing new appears outside its output folder,
    {tmp}/out.
    """
    if case.before:
        case.before(tmp)
    command = case.command.split() if isinstance(case.command, str) else case.command
    words = [word.replace("{tmp}", str(tmp)) for word in command]
    before = contents(tmp)
    monkeypatch.setattr(sys, "argv", [script, *words])
    capsys.readouterr()
    memory, began, code = most_memory(anew=True), time.monotonic(), 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    seconds = time.monotonic() - began
    grown = most_memory() - memory
    stderr = capsys.readouterr().err
    lines = [line for line in stderr.replace("\r", "\n").splitlines() if "error:" in line]
    assert code == case.code and "Traceback" not in stderr, stderr[-2000:]
    assert len(lines) == 1 and len(lines[0]) < 1000, stderr[-2000:]
    expected = (case.words,) if isinstance(case.words, str) else case.words
    assert all(word in lines[0] for word in expected), lines[0]
    assert seconds < SECONDS and grown < GROWTH, (seconds, grown)
    after = contents(tmp)
    assert {key: after.get(key) for key in before} == before, "what was there is as it was"
    new = [name for name in after.keys() - before.keys() if not name.startswith("out/")]
    assert not new, "nothing outside the output folder"
