"""Time and memory of an iteration of ddpo.py on the zoo against samples, steps and ranks.

python -m benchmarks.scaling        ten minutes on two idle cores; writes results/scaling.json

All calls of the UNet have one shape, 8 samples, so that only their number changes. Time is the
median of the iterations after the first, sampling, reward and training together; memory the largest
resident set of a process. Samples and steps are linear when time = a + b n leaves no point off by
more than 10 %: an iteration has a fixed part. Ranks, of one thread each, have the same samples each
(time should stay) or the same samples in all (time should fall by as much as there are ranks).
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
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
    flags: str = ""
    """More flags for the script."""
    output: Path = ROOT / "benchmarks/results/scaling.json"


def measure(args: Args, samples: int, steps: int, ranks: int) -> dict[str, float]:
    """A run of its own, each rank with one thread."""
    flags = f"zoo --samples-per-iteration {samples} --num-inference-steps {steps} --min-count 2 "
    flags += f"--micro-batch-size {MICRO_BATCH} --num-iterations {args.iterations + 1} {args.flags}"
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    with tempfile.TemporaryDirectory() as folder:
        words = [ROOT / "ddpo.py", *flags.split(), "--output-dir", f"{folder}/run"]
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        process = subprocess.Popen([*command, *words], cwd=ROOT, env=env)
        # Of the process, and of those that it has waited for.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"ddpo.py failed with {flags}")
        lines = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()
    parts = ("sample", "reward", "train")
    seconds = [sum(json.loads(line)[f"time/{part}_s"] for part in parts) for line in lines[1:]]
    return {
        "s": median(seconds),
        "lowest_s": min(seconds),
        "highest_s": max(seconds),
        "memory_mib": usage.ru_maxrss / 1024,
    }


def line_through(numbers: list[int], values: list[float]) -> dict[str, float]:
    """a + b n with the least squares of relative residuals, and the largest of these."""
    n, y = np.array(numbers, dtype=float), np.array(values)
    (a, b), *_ = np.linalg.lstsq(np.stack([1 / y, n / y], axis=1), np.ones_like(y), rcond=None)
    return {"a": a, "b": b, "largest_residual": float(np.abs((a + b * n) / y - 1).max())}


def main(args: Args) -> None:
    series = {
        "samples": (args.samples, lambda n: (n, STEPS, 1)),
        "steps": (args.steps, lambda n: (MICRO_BATCH, n, 1)),
        "ranks, samples a rank": (args.ranks, lambda n: (SAMPLES * n, STEPS, n)),
        "ranks, samples in all": (args.ranks, lambda n: (SAMPLES, STEPS, n)),
    }
    measured = {}
    for name, (numbers, settings) in series.items():
        points = []
        for n in numbers:
            if settings(n) not in measured:
                measured[settings(n)] = measure(args, *settings(n))
            points.append({"n": n} | measured[settings(n)])
            print(f"{name}, {n}: {points[-1]['s']:.2f} s", flush=True)
        result = {"points": points}
        if not name.startswith("ranks") and len(numbers) > 1:
            for key in ("s", "memory_mib"):
                result[f"line_of_{key}"] = line_through(numbers, [point[key] for point in points])
        add_result(args.output, name, result)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
