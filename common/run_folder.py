"""What a run leaves behind: metrics as JSON lines and TensorBoard events, pictures, whole checkpoints."""

import gc
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from common.stop import end_run

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CHECKPOINT_FORMAT = 2
"""2: files.json lists the other files. 1: without it."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be gone on from; the message is one line for the user."""


def run_name(script: str, args) -> str:
    """<script>__<tag>__<seed>__<time>, the tag from the prompt, the prompts' file or the tasks' rewards."""
    if "tasks" in asdict(args):
        text = " ".join(task.split()[0].partition(":")[0] for task in args.tasks)
    else:
        text = args.prompts_file.stem if args.prompts_file else args.prompt
    tag = re.sub(r"[^a-z0-9]+", "-", text.lower())[:40].strip("-") or "prompt"
    return f"{Path(script).stem}__{tag}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"


def choose_run_dir(script: str, args) -> Path:
    """--output-dir, or a folder in runs/, the same on all ranks (its name has the time in it)."""
    chosen = [args.output_dir or Path("runs") / run_name(script, args)]
    if dist.is_initialized():
        dist.broadcast_object_list(chosen)
    return chosen[0]


class RunFolder:
    """Writes a run's files; every rank makes one and calls `log`, and rank 0 writes.

    On resume the lines of iterations from `first_iteration` on are dropped.
    """

    def __init__(self, path: Path, args, first_iteration: int = 0):
        self.path, self.args, self.wandb, metrics = path, args, None, path / "metrics.jsonl"
        self.rank, self.history = int(os.environ.get("RANK", 0)), []
        with saving(path):
            if self.rank == 0:
                (path / "samples").mkdir(parents=True, exist_ok=True)
                self.lock = lock(path)
                for text in metrics.read_text().splitlines() if first_iteration else []:
                    if (
                        len(self.history) < first_iteration
                    ):  # what comes after them may have been cut in the middle
                        self.history.append(json.loads(text))
                write_text(metrics, "".join(json.dumps(line) + "\n" for line in self.history))
                write_text(
                    path / "args.json", json.dumps(asdict(args), indent=2, default=str) + "\n"
                )
                threading.excepthook = warn_of_threads
                self.writer = SummaryWriter(path, purge_step=first_iteration)
        if args.track and self.rank == 0:
            import wandb

            self.wandb = wandb
            wandb.init(project="clean-diffusion-rl", name=path.name, config=asdict(args))

    def log(self, metrics: dict[str, float], progress) -> None:
        """Append one iteration's numbers everywhere; the main ones beside the bar `progress`, of tqdm."""
        self.history.append(metrics)
        with saving(self.path):
            if self.rank == 0:
                with open(self.path / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(metrics) + "\n")
        if self.rank > 0:
            return
        deviation, clip_range = (
            metrics.get("ratio/first_max_deviation", 0),
            getattr(self.args, "clip_range", 0),
        )
        if metrics["iteration"] == 0 and deviation > clip_range:
            off = f"{deviation:.1e}, more than --clip-range {clip_range}"
            print(
                f"warning: before the first update a ratio is off 1 by {off}; try --dtype fp32",
                file=sys.stderr,
            )
        with warning_if_not_written(Path(self.writer.log_dir)):
            for key, value in metrics.items():
                self.writer.add_scalar(key, value, metrics["iteration"])
            self.writer.flush()
        shown = {"reward": "reward/mean", "kl": "kl/pretrained"}
        progress.set_postfix(
            {name: f"{metrics[key]:.3f}" for name, key in shown.items() if key in metrics}
        )
        if self.wandb:
            self.wandb.log(metrics, step=metrics["iteration"])

    def save_learning_curve(self) -> None:
        """learning_curve.png: reward (mean and std) and KL to the pretrained model against reward queries."""
        from matplotlib.figure import Figure

        samples, mean, std = (
            [line[key] for line in self.history] for key in ("samples", "reward/mean", "reward/std")
        )
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.plot(samples, mean)
        left.fill_between(
            samples,
            [a - b for a, b in zip(mean, std)],
            [a + b for a, b in zip(mean, std)],
            alpha=0.2,
        )
        left.set(xlabel="reward queries", ylabel="reward (mean, std)")
        if "kl/pretrained" in self.history[0]:
            right.plot(
                samples, [line["kl/pretrained"] for line in self.history], color="tab:orange"
            )
        right.set(xlabel="reward queries", ylabel="KL to the pretrained model (nats)")
        with warning_if_not_written(self.path / "learning_curve.png") as path:
            figure.savefig(path, dpi=110)
        del figure, left, right
        gc.collect()  # a figure is a knot of references, which Python may leave for hours: 3 MB with every checkpoint


def save_grid(images: torch.Tensor, path: Path) -> None:
    """Pictures (B, 3, H, W) in [0, 1], side by side. Where that cannot be written, a warning: no run ends for it."""
    pictures = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    with warning_if_not_written(path):
        Image.fromarray(np.concatenate(pictures, axis=1)).save(path)


@contextmanager
def warning_if_not_written(path: Path):
    """An OSError within it becomes a line on stderr."""
    try:
        yield path
    except OSError as error:
        print(f"warning: {path} cannot be written ({error.strerror or error})", file=sys.stderr)


def warn_of_threads(args) -> None:
    """For threading.excepthook: one line where TensorBoard's thread cannot write; `log` goes on without it."""
    if (
        isinstance(args.exc_value, OSError)
        and args.thread
        and "tensorboard" in type(args.thread).__module__
    ):
        print(f"warning: no more TensorBoard events ({args.exc_value.strerror})", file=sys.stderr)
    else:
        threading.__excepthook__(args)


def lock(run_dir: Path):
    """An open file that no other process has locked, so that two never write one run; OSError where one has."""
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
    """For what ranks write. All enter it; where one of them fails to write, all end in one line, with exit code 1."""
    faults = []
    try:
        yield
    except (OSError, SafetensorError) as error:
        faults = [str(error)]
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStream" not in str(
            error
        ):  # torch.save's, of a full disk
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
            remedy = f"its last checkpoint is whole: make room, then go on with --resume {run_dir}"
        end_run(f"{run_dir} cannot be written ({reason}); {remedy}")


def write_text(path: Path, text: str) -> None:
    """Write a file that is there whole or not at all, whenever the process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    sync(partial)
    partial.replace(path)


def save_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    sync(partial)
    partial.replace(path)


@contextmanager
def new_checkpoint(run_dir: Path):
    """A folder for the files of a checkpoint, those of all ranks, each of which calls this.

    At its end the folder takes the place of `run_dir`/checkpoint, which stays until all files are whole and on disk.
    """
    rank, folder, partial = (
        int(os.environ.get("RANK", 0)),
        run_dir / "checkpoint",
        run_dir / "checkpoint.partial",
    )
    with saving(run_dir):
        if rank == 0:
            shutil.rmtree(
                partial, ignore_errors=True
            )  # of a process that was killed, perhaps with more ranks
            partial.mkdir(parents=True)
    with saving(run_dir):
        yield partial
    with saving(run_dir):
        if rank == 0:
            files = {
                path.relative_to(partial).as_posix(): path
                for path in sorted(partial.rglob("*"))
                if path.is_file()
            }
            digests = {name: sha256(path) for name, path in files.items()}
            index = partial / "files.json"
            index.write_text(
                json.dumps({"format": CHECKPOINT_FORMAT, "sha256": digests}, indent=2) + "\n"
            )
            metrics = [
                path for path in (run_dir / "metrics.jsonl",) if path.exists()
            ]  # which must not be behind
            for path in (*files.values(), index, partial, *metrics):
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
    """Raises CheckpointError where `run_dir` has no checkpoint, or one that is damaged or of a later version.

    A process that was killed between the two renames of `new_checkpoint` has left the old one beside; it is put back.
    """
    folder = run_dir / "checkpoint"
    if not folder.exists() and folder.with_suffix(".old").exists():
        with suppress(FileNotFoundError):  # another rank was first
            folder.with_suffix(".old").rename(folder)
    if not (folder / "state.pt").is_file():
        raise CheckpointError(
            "there is no checkpoint in it; name the folder of a run that has saved one"
        )
    damaged = "is damaged or missing; put a copy back, or start the run anew"
    if not (folder / "files.json").exists():
        try:
            torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # of many kinds
            raise CheckpointError(f"{folder / 'state.pt'} {damaged}") from error
        return
    try:
        index = json.loads((folder / "files.json").read_text())
        version, digests = index["format"], index["sha256"].items()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'files.json'} {damaged}") from error
    if version > CHECKPOINT_FORMAT:
        raise CheckpointError(
            f"its checkpoint has format {version}, of a later version; update this project"
        )
    for name, digest in digests:
        path = folder / name
        if not path.is_file() or sha256(path) != digest:
            raise CheckpointError(f"{path} {damaged}")
