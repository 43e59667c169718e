"""Time and memory of an iteration of ddpo.py on the zoo against samples, steps and ranks.

python -m benchmarks.scaling        twenty minutes on two idle cores; writes results/scaling.json

All calls of the UNet have one shape, 8 samples, so that only their number changes. Time is the
median of the iterations after the first, sampling, reward and training together; memory the largest
resident set of a process. The settings take turns, --repeats times, so that a machine whose speed
drifts slows all of them. Samples and steps are linear when time = a + b n leaves no point off by
more than 10 %: an iteration has a fixed part. Ranks, of one thread each, have the same samples each
(time should stay) or the same samples in all (time should fall by as much as there are ranks). Runs
of one rank side by side, which have nothing to do with each other, show what the machine itself
takes for a second busy core.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import tyro

from benchmarks.run import ROOT, add_result

MICRO_BATCH, SAMPLES, STEPS = 8, 32, 12


@dataclass
class Args:
    samples: tuple[int, ...] = (8, 16, 32, 64, 128)
    steps: tuple[int, ...] = (10, 20, 30, 40, 50)
    """With 8 samples."""
    ranks: tuple[int, ...] = (1, 2)
    iterations: int = 3
    """Measured of each run, after one that is not."""
    repeats: int = 3
    flags: str = ""
    """More flags for the script."""
    output: Path = ROOT / "benchmarks/results/scaling.json"


@dataclass(frozen=True)
class Setting:
    samples: int
    steps: int
    ranks: int = 1
    runs: int = 1
    """Side by side."""


def measure(args: Args, setting: Setting) -> tuple[list[float], float]:
    """Seconds of each iteration, MiB of the largest process. Each rank has one thread."""
    flags = f"zoo --samples-per-iteration {setting.samples} --min-count 2 --rewarded-share 0.5 "
    flags += f"--num-inference-steps {setting.steps} --micro-batch-size {MICRO_BATCH} "
    flags += f"--num-iterations {args.iterations + 1} {args.flags}"
    command = [sys.executable]
    if setting.ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc_per_node={setting.ranks}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    parts = ("sample", "reward", "train")
    seconds, memory = [], []
    with tempfile.TemporaryDirectory() as folder:
        command += [ROOT / "ddpo.py", *flags.split(), "--output-dir"]
        folders = [f"{folder}/run{run}" for run in range(setting.runs)]
        processes = [subprocess.Popen([*command, run], cwd=ROOT, env=env) for run in folders]
        for process, run in zip(processes, folders, strict=True):
            # Of the process, and of those that it has waited for.
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"ddpo.py failed with {flags}")
            memory.append(usage.ru_maxrss / 1024)
            lines = (Path(run) / "metrics.jsonl").read_text().splitlines()[1:]
            metrics = [json.loads(line) for line in lines]
            seconds += [sum(line[f"time/{part}_s"] for part in parts) for line in metrics]
    return seconds, max(memory)


def line_through(numbers: list[int], values: list[float]) -> dict[str, float]:
    """a + b n with the least squares of relative residuals, and the largest of these."""
    n, y = np.array(numbers, dtype=float), np.array(values)
    (a, b), *_ = np.linalg.lstsq(np.stack([1 / y, n / y], axis=1), np.ones_like(y), rcond=None)
    return {"a": a, "b": b, "largest_residual": float(np.abs((a + b * n) / y - 1).max())}


def main(args: Args) -> None:
    one_rank = Setting(SAMPLES, STEPS)
    series = {
        "samples": {n: Setting(n, STEPS) for n in args.samples},
        "steps": {n: Setting(MICRO_BATCH, n) for n in args.steps},
        "ranks, samples a rank": {n: Setting(SAMPLES * n, STEPS, n) for n in args.ranks},
        "ranks, samples in all": {n: Setting(SAMPLES, STEPS, n) for n in args.ranks},
        "runs side by side": {n: replace(one_rank, runs=n) for n in args.ranks},
    }
    settings = dict.fromkeys(setting for points in series.values() for setting in points.values())
    seconds = {setting: [] for setting in settings}
    memory = {setting: [] for setting in settings}
    for repeat in range(args.repeats):
        for setting in settings:
            times, mib = measure(args, setting)
            seconds[setting] += times
            memory[setting].append(mib)
            print(f"repeat {repeat}, {setting}: {median(times):.2f} s", flush=True)
    for name, numbers in series.items():
        points = [
            {
                "n": n,
                "s": median(seconds[setting]),
                "lowest_s": min(seconds[setting]),
                "highest_s": max(seconds[setting]),
                "memory_mib": median(memory[setting]),
            }
            for n, setting in numbers.items()
        ]
        result = {"points": points}
        if name in ("samples", "steps") and len(points) > 1:
            for key in ("s", "memory_mib"):
                values = [point[key] for point in points]
                result[f"line_of_{key}"] = line_through(list(numbers), values)
        add_result(args.output, name, result)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
