"""Files that are there whole or not at all, whenever the process ends; a checkpoint made of them.

Every rank enters the blocks of this module together: where one of them fails to write, all end in
one line.
"""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from harness.stop import end_run

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CHECKPOINT_FORMAT = 3
"""3: state.pt has what `Run.keep` was given, under its names. Earlier ones are refused."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be resumed; the message is one line for the user."""


def lock(run_dir: Path):
    """An open file that no other process has locked, so that two never write one run.

    Raises OSError where another has.
    """
    file = (run_dir / ".lock").open("w")
    if fcntl is None:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError("another process is still writing it; end that first") from None
    except OSError:  # a file system without locks
        pass
    return file


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
        faults = [str(error)]
    if dist.is_initialized():
        everybodys = [None] * dist.get_world_size()
        dist.all_gather_object(everybodys, faults)
        faults = [fault for faults in everybodys for fault in faults]
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


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
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
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            partial.mkdir(parents=True)
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
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
            sync(run_dir)
            shutil.rmtree(old, ignore_errors=True)


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
    """Raises CheckpointError where `run_dir` has no checkpoint, a damaged one or another format's.

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
    damaged = "is damaged or missing; put a copy back, or start the run anew"
    try:
        index = json.loads((folder / "files.json").read_text())
        version, digests = int(index["format"]), dict(index["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'files.json'} {damaged}") from error
    if version > CHECKPOINT_FORMAT:
        raise CheckpointError(f"its checkpoint has format {version}, of a later version; update")
    if version < CHECKPOINT_FORMAT:
        raise CheckpointError(earlier)
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file() or sha256(path) != digest:
            raise CheckpointError(f"{path} {damaged}")
