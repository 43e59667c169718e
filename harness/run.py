"""What a long job needs around an algorithm: ranks, a folder, checkpoints, signals, metrics."""

import math
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from harness import guard, resume
from harness.checkpoint import (
    CheckpointError,
    new_checkpoint,
    read_part,
    read_shard,
    read_shares,
    restoring,
    saving,
    sha256,
    write_tensors,
    write_text,
)
from harness.folder import RunFolder, choose_run_dir
from harness.metrics import Metrics, all_finite, none_finite, warn_where_above
from harness.prompts import read_validation_prompts
from harness.ranks import on_all_ranks, sum_gradients
from harness.stop import catch_signals, end_alone, end_early, end_run, join_ranks


class Run:
    """One run of a script, on this rank and together with the others; every rank makes one.

    `tag` is for the name of its folder; `fixed` names what must be the same when it is resumed.
    """

    def __init__(self, args, script: str, tag: str = "", fixed: dict | None = None):
        self._validation = read_validation_prompts(args)  # before a fault finds half a run
        guard.runs.append(self)
        self._args, self._script, self._tag = args, script, tag
        self._rank = int(os.environ.get("RANK", 0))
        self._world_size = int(os.environ.get("WORLD_SIZE", 1))
        self._folder = self._grid = self._state = self._index = None
        self._signals = catch_signals(lambda: self._begun)
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
        if self._world_size > 1:
            join_ranks(self.device)
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=args.dtype == "fp16")
        # Its first call makes the scale, and a rank may have nothing to scale in its first update.
        self._scaler.scale(torch.zeros(1, device=self.device))
        self._kept, self._shares, self._trained = {}, {}, {}
        self._fixed, self._contents = fixed or {}, resume.contents_of_files(args)
        self._iteration, self._unit = 0, 0
        self._last_norms = defaultdict(lambda: deque(maxlen=args.max_skipped_updates))
        self._metrics = self._before_unit = Metrics(self.device)
        if args.resume:
            self._restore()

    # Ranks

    def share(self, n: int) -> range:
        """Which of n samples are this rank's; shares may be uneven, and empty."""
        bounds = np.linspace(0, n, self._world_size + 1).astype(int).tolist()
        return range(bounds[self._rank], bounds[self._rank + 1])

    def gather(self, values: torch.Tensor, n: int) -> torch.Tensor:
        """(n, ...) of all ranks, from this rank's share of n samples, (len(share(n)), ...)."""
        own = self.share(n)
        padding = [0, 0] * (values.dim() - 1) + [own.start, n - own.stop]
        return self._all_sum(F.pad(values, padding))

    # Checkpoints

    def keep(self, **things) -> None:
        """Save these with every checkpoint; when a run is resumed they are restored at once.

        A tensor, anything with state_dict and load_state_dict, or with save(folder) and
        load(folder): what the latter write is the run's result, and goes into its folder as well.
        """
        for name, thing in things.items():
            self._kept[name] = thing
            if self._state is None:
                continue
            with restoring(self._args.resume, name):
                if hasattr(thing, "load"):
                    thing.load(self._args.resume / "checkpoint")
                elif isinstance(thing, torch.Tensor):
                    thing.copy_(self._state["kept"][name])
                else:
                    thing.load_state_dict(self._state["kept"][name])

    def keep_shares(self, n: int, **things) -> None:
        """The same for tensors of which each rank has its share of n samples, in dimension 1.

        A run that is resumed with another number of ranks shares them out anew.
        """
        own = self.share(n)
        for name, thing in things.items():
            self._shares[name] = thing
            if self._state is None:
                continue
            with restoring(self._args.resume, name):
                state = read_shares(self._args.resume, name, n, own)
                thing.load_state_dict(state)

    def shard(self, path: str | Path, n: int, make: Callable, about: str | None = None) -> dict:
        """The tensors of n samples in a file, its path relative to the run's folder.

        If it is not there they are what make() gives for this rank's share of them, gathered, and
        written; beside them a dataset.json with the text `about` that tells what they depend on.

        A signal ends the run here: what is written will not be made again.
        """
        self._open()
        path = self._folder.path / path
        if self._any(self._rank == 0 and path.exists()):
            return on_all_ranks(lambda: read_shard(path, n), CheckpointError)
        if self._any(bool(self._signals)):
            self._save()
            end_early(self._folder.path, self._signals)
        self._folder.hold_dataset(path.parent, about)
        tensors = {key: self.gather(value, n).cpu() for key, value in make().items()}
        with saving(self._folder.path):
            if self._rank == 0:
                write_tensors(path, tensors)
        return tensors

    def iterations(self, *units, grid: Callable | None = None) -> Iterator:
        """Numbers of iterations; with `units`, (iteration, unit) for each of them in turn.

        It resumes, saves, and stops where a signal asks for it. A resumed run repeats no unit that
        is done. `grid(indices=...)` draws pictures (n, 3, H, W) in [0, 1] at n indices, of fixed
        prompts and noise; with `prompts=...` of those instead of its own.
        """
        self._open()
        self._grid, self._state = grid, None  # all that is kept has been restored
        self._folder.release_dataset()
        if (self._iteration, self._unit) == (0, 0):
            self._save_grid(0)
        numbers = range(self._iteration, self._args.num_iterations)
        progress = tqdm(numbers, disable=self._rank > 0, desc=Path(self._script).stem)
        for iteration in progress:
            for number in range(self._unit, max(1, len(units))):
                self._unit, self._before_unit = number, self._metrics.copy()
                yield (iteration, units[number]) if units else iteration
            self._iteration, self._unit = iteration + 1, 0
            progress.set_postfix(self._folder.shown())
            self._save_or_stop()
        if self._world_size > 1:
            dist.destroy_process_group()
        if self._rank == 0:
            self._folder.finish()

    # Updates

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of this rank's part of a loss, which is the sum over all ranks."""
        self._scaler.scale(loss).backward()

    def step(self, optimizer, max_grad_norm: float = math.inf, metric: str = "grad_norm") -> None:
        """An update with the gradients of all ranks, clipped to a norm, and skipped if not finite.

        `metric` names the mean of the norms before clipping in the iteration's line.
        """
        parameters = self._trained[id(optimizer)] = optimizer.param_groups[0]["params"]
        sum_gradients(parameters)
        self._scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
        if math.isfinite(norm):
            self._scaler.step(optimizer)
        self._scaler.update()
        optimizer.zero_grad(set_to_none=True)
        self._metrics.norms[metric].append(norm)
        self._last_norms[metric].append(norm)

    # Metrics

    def timer(self, name: str):
        """A block whose time is summed over the iteration: the metric time/<name>_s."""
        return self._metrics.timer(name)

    def add(self, name: str, value, reduce: str = "sum") -> None:
        """Add to a metric: the "sum" over all calls and ranks, or the "max" of values from 0 on.

        "same" is for what is the same on every rank, a number or values (n,). "X/square" beside
        "X/mean" becomes "X/std".
        """
        self._metrics.add(name, value, reduce)

    def log(self, metrics: dict, warn_above: dict[str, float] | None = None) -> None:
        """Write the iteration's line: `metrics`, what was added, gradient norms and times.

        Metrics are numbers, or values (n,), of which the line has X/mean and X/std, and the
        trackers a histogram. In the first iteration one above its limit in `warn_above` is worth a
        warning.
        """
        line = {"iteration": self._iteration, **self._metrics.line(metrics)}
        self._folder.log(line, self._metrics.distributions())
        if self._iteration == 0 and self._rank == 0:
            warn_where_above(line, warn_above or {}, self._args)
        self._metrics = self._before_unit = Metrics(self.device)

    # Behind the scenes

    def _all_sum(self, values: torch.Tensor) -> torch.Tensor:
        if self._world_size > 1:
            dist.all_reduce(values)
        return values

    def _any(self, here: bool) -> bool:
        return self._all_sum(torch.tensor(float(here), device=self.device)).item() > 0

    @property
    def _begun(self) -> bool:
        return self._folder is not None

    def _restore(self) -> None:
        """Where the run is, and the metrics of an iteration some of whose units are done."""
        with restoring(self._args.resume, "state.pt"):
            folder = self._args.resume / "checkpoint"
            self._index, self._state = sha256(folder / "files.json"), read_part(folder / "state.pt")
            self._iteration, self._unit = resume.place_in(self._state)
            self._scaler.load_state_dict(self._state["scaler"])
            self._metrics.load_state_dict(self._state["metrics"])
        resume.check_fixed(self._state["fixed"], self._fixed)
        resume.check_iterations(self._args, self._iteration)

    def _open(self) -> None:
        """Take the run's folder; a new run has a checkpoint from the start."""
        if self._begun:
            return
        path = choose_run_dir(self._script, self._tag, self._args)
        self._folder = RunFolder(path, self._args, self._rank, self._iteration, self._index)
        if self._state is None:
            self._save()

    def _save(self) -> None:
        """A checkpoint: each rank its shares, rank 0 the rest."""
        metrics = self._before_unit.state_dict()  # an unfinished unit will be made again
        with new_checkpoint(self._folder.path) as folder:
            for name, thing in self._shares.items():
                torch.save(thing.state_dict(), folder / f"{name}-{self._rank:05d}.pt")
            if self._rank > 0:
                return
            write_text(folder / "args.json", resume.checkpoint_form(self._args, self._contents))
            kept = {}
            for name, thing in self._kept.items():
                if hasattr(thing, "save"):
                    thing.save(folder)
                    if (self._iteration, self._unit) != (0, 0):  # trained, and so a result
                        thing.save(self._folder.path)
                else:
                    kept[name] = thing if isinstance(thing, torch.Tensor) else thing.state_dict()
            self._folder.describe(self._script)
            state = {"iteration": self._iteration, "unit": self._unit, "metrics": metrics}
            state |= {"scaler": self._scaler.state_dict(), "fixed": self._fixed, "kept": kept}
            torch.save(state, folder / "state.pt")

    def _save_grid(self, iteration: int) -> None:
        if self._rank == 0 and self._grid is not None:
            self._folder.save_grids(self._grid, self._validation, iteration)

    def _save_or_stop(self) -> None:
        """After an iteration: save where it is due, stop where a signal or its gradients ask."""
        if not all_finite(self._trained):
            self._end("an update has left weights that are not finite")
        args, asked = self._args, self._any(bool(self._signals))
        no_gradient = any(map(none_finite, self._last_norms.values()))
        due = self._iteration % args.save_every == 0 or self._iteration == args.num_iterations
        if due or asked or no_gradient:
            self._save_grid(self._iteration)
            if self._rank == 0:
                self._folder.save_learning_curve()
            self._save()
        if asked or no_gradient:
            end_early(self._folder.path, self._signals if asked else None)

    def _end(self, fault: str, alone: bool = False) -> None:
        """Save what is done, where the other ranks are here too, and end in one line."""
        self._open()
        path, place = self._folder.path, f"iteration {self._iteration}: {fault}"
        last = f"its last checkpoint is whole: --resume {path}"
        if alone:
            end_alone(f"{place}; {last}")
        if not all_finite(self._trained):
            end_run(f"{place}; lower --learning-rate or use --dtype fp32; {last}")
        self._save()
        end_run(f"{place}; the run so far is in {path}; --resume it when this is mended")
