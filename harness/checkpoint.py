"""Files that are there whole or not at all, whenever the process ends; a checkpoint made of them.

Every rank enters the blocks of this module together: where one of them fails to write, all end in
one line.
"""

import hashlib
import json
import os
import shutil
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypedDict

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common import UserError
from common.lora import as_others
from harness.ranks import everybodys
from harness.stop import Ended, end_run
from harness.stored import StoredError, checked, read_stored

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CHECKPOINT_FORMAT = 5
"""5: state.pt has what `Run.keep` was given, under its names, and args.json the arguments.

Earlier ones are refused.
"""
PUT_BACK = "put a copy back, or start the run anew"


CHECKPOINT_FILES = ("state.pt", "args.json")


class Index(TypedDict):
    """files.json: the format, and a digest of every other file."""

    format: int
    sha256: dict[str, str]


class CheckpointError(UserError):
    """A checkpoint that cannot be resumed; the message is one line for the user."""


def lock(run_dir: Path):
    """An open file that no other process has locked, so that two never write one folder.

    Raises CheckpointError where another has. A process that is forked from this one closes it: else
    the lock would live as long as a reward's worker.
    """
    file = (run_dir / ".lock").open("w")
    if fcntl is None:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fault = f"another process is still writing {run_dir}; wait for it, or end it"
        raise CheckpointError(fault) from None
    except OSError:  # a file system without locks
        pass
    alive = weakref.ref(file)
    os.register_at_fork(after_in_child=lambda: alive() and alive().close())
    return file


def hold_dataset(folder: Path, about: str, own: bool = False):
    """`lock` of a data set that several runs may share; `about` tells what it depends on.

    None where the folder is the run's `own`, which is locked already.

    Raises CheckpointError where another run is drawing it, or has begun another one meanwhile, and
    where it cannot be written. A description with fewer keys is compared by those that it has.
    """
    description, wanted = folder / "dataset.json", json.loads(about)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = None if own else lock(folder)
        remedy = "choose another folder"
        there = read_stored(description, dict, remedy) if description.exists() else {}
        if any(wanted.get(key) != value for key, value in there.items()):
            raise CheckpointError(f"{folder} is a data set of other settings; {remedy}")
        write_text(description, about)
    except StoredError as error:
        raise CheckpointError(str(error)) from None
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written ({error}); make room") from None
    return held


@contextmanager
def saving(run_dir: Path):
    """For what ranks write. Where one of them fails, all end in one line, with exit code 1."""
    faults = []
    try:
        yield
    except (OSError, SafetensorError) as error:
        faults = [str(error)]
    except RuntimeError as error:
        of_torch_save = ("inline_container", "PytorchStream")
        full_disk = any(word in str(error) for word in of_torch_save)
        if not full_disk:
            raise
        faults = ["the disk is full, or a file larger than a limit"]
    faults = [fault for of_rank in everybodys(faults) for fault in of_rank]
    if faults:
        reason = " ".join(faults[0].split())[:200]
        remedy = "make room, or choose another --output-dir"
        if (run_dir / "checkpoint").exists():
            remedy = f"its last checkpoint is whole: make room, then --resume {run_dir}"
        end_run(f"{run_dir} cannot be written ({reason}); {remedy}")


def write_text(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    sync(partial)
    partial.replace(path)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], about: dict | None = None) -> None:
    """Write a safetensors file, with the texts `about`, that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, about)
    as_others(partial)
    sync(partial)
    partial.replace(path)


@contextmanager
def new_checkpoint(run_dir: Path):
    """A folder for the files of a checkpoint, those of all ranks, each of which calls this.

    At its end the folder takes the place of `run_dir`/checkpoint, which stays until all files are
    whole and on disk.
    """
    rank = int(os.environ.get("RANK", 0))
    folder, partial = run_dir / "checkpoint", run_dir / "checkpoint.partial"
    with saving(run_dir):
        if rank == 0:
            remove(partial)  # of a process that was killed
            partial.mkdir(parents=True)
    try:
        with saving(run_dir):
            yield partial
        with saving(run_dir):
            if rank == 0:
                paths = [path for path in sorted(partial.rglob("*")) if path.is_file()]
                digests = {path.relative_to(partial).as_posix(): sha256(path) for path in paths}
                index = partial / "files.json"
                description = {"format": CHECKPOINT_FORMAT, "sha256": digests}
                index.write_text(json.dumps(description, indent=2) + "\n")
                metrics = run_dir / "metrics.jsonl"  # which must not be behind the checkpoint
                for path in (*paths, index, partial, *([metrics] if metrics.exists() else [])):
                    sync(path)
                old = folder.with_suffix(".old")
                remove(old)
                if folder.exists():
                    folder.rename(old)
                partial.rename(folder)
                sync(run_dir)
                remove(old)
    except Ended:  # a disk that is full is not to stay so
        if rank == 0:
            remove(partial)
        raise


def remove(folder: Path) -> None:
    """A folder with all in it, or a link to one, whose contents stay."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def restoring(run_dir: Path, name: str):
    """Whatever goes wrong when part of a checkpoint is read is told in one line."""
    try:
        yield
    except Exception as error:  # the readers of tensors and everything that is restored have many
        what = f"{type(error).__name__}: {str(error)[:200]}"
        fault = f"--resume {run_dir}: {name} of its checkpoint does not fit ({what})"
        raise CheckpointError(f"{fault}; {PUT_BACK}") from error


def read_part(path: Path) -> dict:
    """What torch.save has written, as data alone: nothing in it is run.

    On the CPU: a GPU may not have room for all of it, and AdamW, whose counts of steps stay where
    they are read to, would wait for the GPU at every update to tell them.
    """
    return torch.load(path, map_location="cpu", weights_only=True)


def read_shares(run_dir: Path, name: str, n: int, own: range) -> dict[str, torch.Tensor]:
    """This rank's share, of n in dimension 1, of tensors whose shares some ranks have written."""
    paths = sorted((run_dir / "checkpoint").glob(f"{name}-*.pt"))
    parts = [read_part(path) for path in paths]
    whole = {key: torch.cat([part[key] for part in parts], dim=1) for key in parts[0]}
    if any(value.shape[1] != n for value in whole.values()):
        raise ValueError(f"it is not of {n} samples")
    return {key: value[:, own.start : own.stop] for key, value in whole.items()}


def read_shard(path: Path, n: int) -> dict[str, torch.Tensor]:
    """The tensors of n samples that `write_tensors` wrote; raises CheckpointError."""
    remedy = "delete it, and its samples are drawn again"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        fault = f"{path} cannot be read as safetensors ({str(error)[:100]})"
        raise CheckpointError(f"{fault}; {remedy}") from None
    sizes = {len(values) if values.dim() else 0 for values in tensors.values()}
    if sizes != {n}:
        raise CheckpointError(f"{path} does not hold {n} samples; {remedy}")
    return tensors


def sha256(path: Path) -> str:
    """Of a file, a piece at a time: a checkpoint may be larger than memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def check_checkpoint(run_dir: Path) -> None:
    """Raises UserError where `run_dir` has no checkpoint, a damaged one or another format's.

    A process that was killed between the two renames of `new_checkpoint` has left the old one
    beside; it is put back.
    """
    folder = run_dir / "checkpoint"
    if not folder.exists() and folder.with_suffix(".old").exists():
        with suppress(FileNotFoundError):  # another rank was first
            folder.with_suffix(".old").rename(folder)
    if not (folder / "state.pt").is_file():
        remedy = "name the folder of a run that saved one"
        raise CheckpointError(f"there is no checkpoint in it; {remedy}")
    earlier = "its checkpoint is of an earlier version of this project; resume it with that one"
    if not (folder / "files.json").exists():
        raise CheckpointError(earlier)
    index = read_stored(folder / "files.json", dict, PUT_BACK)
    version = index.get("format")
    if isinstance(version, int) and version > CHECKPOINT_FORMAT:
        raise CheckpointError(f"its checkpoint has format {version}, of a later version; update")
    if isinstance(version, int) and version < CHECKPOINT_FORMAT:
        raise CheckpointError(earlier)
    index = checked(index, Index, str(folder / "files.json"), PUT_BACK)
    for name in {*index["sha256"], *CHECKPOINT_FILES}:
        path = folder / name
        if (
            name not in index["sha256"]
            or not path.is_file()
            or sha256(path) != index["sha256"][name]
        ):
            raise CheckpointError(f"{path} is damaged or missing; {PUT_BACK}")
