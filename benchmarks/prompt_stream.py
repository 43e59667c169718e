"""A prompt file of 1.5 million lines.

First indexing, start-up afterwards, memory, every prompt once over kills.

python -m benchmarks.prompt_stream        writes benchmarks/results/prompt_stream.json
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from array import array
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Args:
    lines: int = 1_500_000
    """Prompts in the file."""
    prompts_per_iteration: int = 2048
    """Prompts that all ranks together take at once."""


def memory() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def start(source: str, rank: int, ranks: int, first: int, last: int, count: int) -> dict:
    """What a rank does: open the source and take its share of iterations `first` to `last`.

    The prompts' numbers are saved beside the source.
    """
    from harness.prompts import open_prompts, take

    before, clock, cpu = memory(), time.perf_counter(), time.process_time()
    prompts = open_prompts(source, 0)
    take(prompts, 0, 0, 1)
    figures = {"start_s": time.perf_counter() - clock, "start_cpu_s": time.process_time() - cpu}
    seen = array("i")
    for iteration in range(first, last):
        position = iteration * count
        end = min(count, len(prompts) - position)  # the last iteration of the epoch stops with it
        begin, stop = np.linspace(0, end, ranks + 1).astype(int)[rank : rank + 2]
        taken = take(prompts, 0, position + begin, stop - begin)
        seen.extend(int(prompt.split()[0]) for prompt in taken)
    figures["memory_mb"] = memory() - before
    np.save(f"{source}.{ranks}.{first}.{rank}.npy", np.frombuffer(seen, dtype=np.int32))
    return figures


def processes(source: str, ranks: int, first: int, last: int, count: int, env: dict) -> list[dict]:
    """`start` on every rank at once, in processes of their own."""
    command = [sys.executable, "-m", "benchmarks.prompt_stream", "rank", source]
    command = [[*command, *map(str, (rank, ranks, first, last, count))] for rank in range(ranks)]
    options = {"cwd": ROOT, "env": env, "stdout": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(words, **options) for words in command]
    return [json.loads(child.communicate()[0]) for child in children]


def main(args: Args):
    with tempfile.TemporaryDirectory() as folder:
        source, env = f"{folder}/prompts.txt", os.environ | {"XDG_CACHE_HOME": f"{folder}/cache"}
        with open(source, "w") as file:
            style = "castle in the style of a painter, highly detailed, 8 k"
            file.writelines(f"{i} {style}\n" for i in range(args.lines))
        iterations = -(-args.lines // args.prompts_per_iteration)
        results = {
            "lines": args.lines,
            "file_mb": Path(source).stat().st_size / 1e6,
            "cores": os.cpu_count(),
        }
        count = args.prompts_per_iteration
        results["first_start"] = processes(source, 1, 0, 1, count, env)[0]
        results["ranks"] = {}
        for ranks in (1, 2, 3, 4):
            # The run ends in the middle of the epoch, and another goes on from its position.
            half = iterations // 2
            parts = processes(source, ranks, 0, half, count, env)
            parts += processes(source, ranks, half, iterations, count, env)
            seen = [
                np.load(f"{source}.{ranks}.{first}.{rank}.npy")
                for first in (0, half)
                for rank in range(ranks)
            ]
            times = np.bincount(np.concatenate(seen), minlength=args.lines)
            results["ranks"][ranks] = {
                "lost": int((times == 0).sum()),
                "seen_twice": int((times > 1).sum()),
                "start_s": max(part["start_s"] for part in parts),
                "start_cpu_s": max(part["start_cpu_s"] for part in parts),
                "memory_mb_a_rank": max(part["memory_mb"] for part in parts),
            }
    text = json.dumps(results, indent=2)
    (ROOT / "benchmarks/results/prompt_stream.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        print(json.dumps(start(sys.argv[2], *map(int, sys.argv[3:]))))
    else:
        main(tyro.cli(Args, description=__doc__))
