"""What a run leaves behind: arguments, metrics as JSON lines and TensorBoard events, pictures."""

import gc
import itertools
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from harness.card import describe_run, summary
from harness.checkpoint import (
    PUT_BACK,
    CheckpointError,
    hold_dataset,
    lock,
    saving,
    sha256,
    write_text,
)
from harness.hub import push_or_end
from harness.project import portable
from harness.ranks import on_all_ranks
from harness.resume import stored_form
from harness.stored import LARGEST, StoredError, checked, parse_json, read_text

LONGEST_LINE = 10_000
"""Bytes of a line of metrics.jsonl; ours have some hundreds."""
IN_A_ROW = 8
"""Pictures of a grid's row, and of the grid of a run's own prompts."""


def run_name(script: str, tag: str, seed: int) -> str:
    """<script>__<tag>__<seed>__<time>, of the tag only letters and digits."""
    tag = re.sub(r"[^a-z0-9]+", "-", tag.lower())[:40].strip("-") or "prompt"
    return f"{Path(script).stem}__{tag}__{seed}__{time.strftime('%Y%m%d-%H%M%S')}"


def choose_run_dir(script: str, tag: str, args) -> Path:
    """--output-dir, or a folder of its own in runs/, the same on all ranks."""
    chosen = [args.output_dir]
    if args.output_dir is None and int(os.environ.get("RANK", 0)) == 0:
        chosen = [made_anew(Path("runs") / run_name(script, tag, args.seed))]
    if dist.is_initialized():
        dist.broadcast_object_list(chosen)
    return chosen[0]


def made_anew(path: Path) -> Path:
    """The folder, made by this process; with a number at its end if another was first."""
    for number in itertools.count(1):
        folder = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue


def read_metrics(path: Path, count: int) -> list[dict]:
    """The first `count` lines of metrics.jsonl; what follows may be cut off. Raises StoredError."""
    most = max(LARGEST, LONGEST_LINE * count)
    lines = read_text(path, PUT_BACK, most).splitlines()[:count] if count else []
    if len(lines) < count:
        raise StoredError(f"{path} has {len(lines)} lines, and the checkpoint {count}; {PUT_BACK}")
    history = []
    for number, line in enumerate(lines, start=1):
        what = f"line {number} of {path}"
        try:
            numbers = parse_json(line, finite=False)
            history.append(checked(numbers, dict[str, float], what, PUT_BACK))
        except ValueError as error:
            raise StoredError(f"{what}: {error}; {PUT_BACK}") from None
    return history


class RunFolder:
    """Writes a run's files; every rank makes one and calls `log`, and rank 0 writes.

    On resume the lines of iterations from `first_iteration` on are dropped; `index` is the digest
    of the checkpoint's files.json as it was read.
    """

    def __init__(
        self, path: Path, args, rank: int, first_iteration: int = 0, index: str | None = None
    ):
        self.path, self.args, self.rank, self.history, self.wandb = path, args, rank, [], None
        self.dataset_lock, metrics = None, path / "metrics.jsonl"
        with saving(path):
            if rank == 0:
                (path / "samples").mkdir(parents=True, exist_ok=True)
                (path / ".lock").touch()
        on_all_ranks(partial(self.hold, index), CheckpointError)
        first = first_iteration if rank == 0 else 0
        self.history = on_all_ranks(lambda: read_metrics(metrics, first), StoredError)
        with saving(path):
            if rank == 0:
                write_text(metrics, "".join(json.dumps(line) + "\n" for line in self.history))
                write_text(path / "args.json", stored_form(args))
                threading.excepthook = warn_of_threads
                self.writer = SummaryWriter(path, purge_step=first_iteration)
        if args.track and rank == 0:
            import wandb

            self.wandb = wandb
            wandb.init(project="clean-diffusion-rl", name=path.name, config=portable(asdict(args)))

    def hold(self, index: str | None) -> None:
        """Lock the run, which must be where the checkpoint of `index` left it."""
        if self.rank == 0:
            self.lock = lock(self.path)
        if index and sha256(self.path / "checkpoint" / "files.json") != index:
            raise CheckpointError(f"{self.path} has gone on meanwhile; resume it again")

    def hold_dataset(self, folder: Path, about: str | None) -> None:
        """Let no other run draw into the folder, until `release_dataset`.

        Without `about` the folder is the run's alone.
        """

        def hold():
            if self.rank == 0 and about is not None and self.dataset_lock is None:
                own = folder.resolve() == self.path.resolve()
                self.dataset_lock = hold_dataset(folder, about, own)

        on_all_ranks(hold, CheckpointError)

    def release_dataset(self) -> None:
        """Let others draw into what `hold_dataset` holds, if anything."""
        if self.dataset_lock:
            self.dataset_lock.close()

    def close(self) -> None:
        """Let go of the lock and of the events' file; whoever still has the run keeps neither."""
        self.release_dataset()
        if self.rank == 0:
            self.lock.close()
            with suppress(OSError):  # of a full disk, which has been told
                self.writer.close()

    def log(self, metrics: dict[str, float], values: dict[str, torch.Tensor]) -> None:
        """Append one iteration's numbers everywhere; the trackers get histograms of `values`.

        Values from 1e20 on, which TensorBoard's histograms have no bin for, are left out of them.
        """
        self.history.append(metrics)
        with saving(self.path):
            if self.rank == 0:
                with open(self.path / "metrics.jsonl", "a") as file:
                    file.write(json.dumps(metrics) + "\n")
        if self.rank > 0:
            return
        values = {key: value[value.abs() < 1e20] for key, value in values.items()}
        values = {key: value for key, value in values.items() if len(value)}
        with warning_if_not_written(Path(self.writer.log_dir)):
            for key, value in metrics.items():
                self.writer.add_scalar(key, value, metrics["iteration"])
            for key, value in values.items():
                self.writer.add_histogram(key, value, metrics["iteration"])
            self.writer.flush()
        if self.wandb:
            histograms = {key: self.wandb.Histogram(value.numpy()) for key, value in values.items()}
            self.wandb.log(metrics | histograms, step=metrics["iteration"])

    def save_grids(self, draw: Callable, validation: list[str], iteration: int) -> None:
        """Pictures of a run's own prompts, and one of each of the `validation` prompts."""
        self.save_grid("samples", draw(indices=range(IN_A_ROW)), iteration)
        if validation:
            pictures = draw(indices=range(len(validation)), prompts=validation)
            self.save_grid("samples/validation", pictures, iteration)

    def save_grid(self, place: str, images: torch.Tensor, iteration: int) -> None:
        """Pictures (B, 3, H, W) in [0, 1], eight in a row: PLACE/NNNNNN.png, and in the trackers.

        For rank 0. No run ends because it cannot be written.
        """
        rows = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().split(IN_A_ROW)
        rows = [torch.cat([*row], dim=1) for row in rows]
        width = rows[0].shape[1]
        white = [row.new_full((len(row), width - row.shape[1], 3), 255) for row in rows]
        grid = torch.cat([torch.cat(parts, dim=1) for parts in zip(rows, white)]).numpy()
        with warning_if_not_written(self.path / place / f"{iteration:06d}.png") as path:
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(grid).save(path)
        with warning_if_not_written(Path(self.writer.log_dir)):
            self.writer.add_image(place, grid, iteration, dataformats="HWC")
            self.writer.flush()
        if self.wandb:
            # The iteration's metrics, which come later, or earlier, are under the same step.
            self.wandb.log({place: self.wandb.Image(grid)}, step=iteration, commit=False)

    def shown(self) -> dict[str, str]:
        """What the progress bar shows of the last iteration."""
        names = {"reward": "reward/mean", "kl": "kl/pretrained"}
        line = self.history[-1]
        return {name: f"{line[key]:.3f}" for name, key in names.items() if key in line}

    def save_learning_curve(self) -> None:
        """learning_curve.png: reward (mean, std) and KL against reward queries, as far as known."""
        from matplotlib.figure import Figure

        gc.freeze()  # the search below is for the figure alone
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        samples, mean, std = map(self.column, ("samples", "reward/mean", "reward/std"))
        left.plot(samples, mean)
        left.fill_between(samples, mean - std, mean + std, alpha=0.2)
        left.set(xlabel="reward queries", ylabel="reward (mean, std)")
        right.plot(samples, self.column("kl/pretrained"), color="tab:orange")
        right.set(xlabel="reward queries", ylabel="KL to the pretrained model (nats)")
        with warning_if_not_written(self.path / "learning_curve.png") as path:
            figure.savefig(path, dpi=110)
        del figure, left, right
        gc.collect()  # a figure is a knot of references: 3 MB with every checkpoint
        gc.unfreeze()

    def describe(self, script: str) -> None:
        """The LoRA for other tools and the model card, README.md; for rank 0."""
        if self.history:
            describe_run(self.path, portable(vars(self.args)), Path(script), self.history)

    def finish(self) -> None:
        """The end of a run: what came of it, where it is, and what to do next; to the hub with it.

        For rank 0.
        """
        print(summary(self.path, portable(vars(self.args)), self.history), flush=True)
        if self.args.push_to_hub:
            push_or_end(self.path, self.args.push_to_hub)

    def column(self, key: str) -> np.ndarray:
        """A metric over the iterations; nan where it is not measured."""
        return np.array([line.get(key, float("nan")) for line in self.history])


@contextmanager
def warning_if_not_written(path: Path):
    """An OSError within it becomes a line on stderr."""
    try:
        yield path
    except OSError as error:
        reason = error.strerror or error
        print(f"warning: {path} cannot be written ({reason})", file=sys.stderr)


def warn_of_threads(args) -> None:
    """For threading.excepthook: a line where TensorBoard's thread cannot write."""
    of_tensorboard = args.thread and "tensorboard" in type(args.thread).__module__
    if isinstance(args.exc_value, OSError) and of_tensorboard:
        print(f"warning: no more TensorBoard events ({args.exc_value.strerror})", file=sys.stderr)
    else:
        threading.__excepthook__(args)
