"""The figures and curves of docs/dpok.md: dpok.py on the zoo, four prompts of the paper, several seeds.

python -m benchmarks.dpok run       trains, one run after the other; a finished run is kept
python -m benchmarks.dpok report    judges them: benchmarks/results/dpok.json, docs/images/dpok_*.png, a table
"""

import itertools
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image

from benchmarks.zoo_eval import ROOT, load_pipeline, measure, weights_digest
from common.rewards import load_reward
from zoo import judge as judging
from zoo import world

PROMPTS = ("A green colored rabbit", "A cat and a dog", "Four wolves in the park", "A dog on the moon")


@dataclass
class Args:
    what: tyro.conf.Positional[Literal["run", "report"]]
    """Train, or judge what was trained."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    prompts: tuple[str, ...] = PROMPTS
    """Prompts, one run each."""
    runs: Path = Path("runs/benchmark-dpok")
    """Where the runs are."""
    jobs: int = 1
    """Runs side by side, the cores shared out among them; more are done in an hour, but each takes longer."""
    count: int = 128
    """Pictures for each figure."""


def run_dir(args: Args, prompt: str, seed: int) -> Path:
    return args.runs / f"{prompt.lower().replace(' ', '-')}__{seed}"


def run(args: Args):
    def train(seed: int, prompt: str):
        folder = run_dir(args, prompt, seed)
        if (folder / "wall_time.json").exists():
            return
        command = ["dpok.py", "zoo", "--prompt", prompt, "--seed", str(seed), "--output-dir", str(folder)]
        env = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.jobs))}
        start = time.time()
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, env=env)
        wall_time = {"seconds": time.time() - start, "jobs_side_by_side": args.jobs, "cores": os.cpu_count()}
        (folder / "wall_time.json").write_text(json.dumps(wall_time))

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda key: train(*key), itertools.product(args.seeds, args.prompts)))


def report(args: Args):
    from matplotlib.figure import Figure

    judge, reward = judging.load_judge(ROOT / "zoo/judge"), load_reward(f"image_reward:{ROOT / 'zoo/image_reward'}")
    base, results, rows = load_pipeline(), {"weights": weights_digest(), "samples_per_prompt": args.count}, []
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    axes = figure.subplots(1, len(args.prompts), squeeze=False)[0]
    for prompt, axis in zip(args.prompts, axes):
        before, images = measure(base, judge, reward, prompt, args.count, seed=7)
        rows.append(images[:8])
        result = results.setdefault("prompts", {})[prompt] = {"base": before, "runs": []}
        for seed in args.seeds:
            folder = run_dir(args, prompt, seed)
            if not (folder / "wall_time.json").exists():
                continue
            numbers, images = measure(load_pipeline(folder), judge, reward, prompt, args.count, seed=7)
            lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            if seed == args.seeds[0]:
                rows.append(images[:8])
            numbers |= {
                "seed": seed,
                "reward_gain": numbers["reward"] - before["reward"],
                "quality_ratio": numbers["image_quality"] / before["image_quality"],
                "wall_time": json.loads((folder / "wall_time.json").read_text()),
                "training_reward": [line["reward/mean"] for line in lines],
                "first_max_deviation": lines[0]["ratio/first_max_deviation"],
            }
            result["runs"].append(numbers)
            axis.plot(
                [line["samples"] for line in lines], [line["reward/mean"] for line in lines], label=f"seed {seed}"
            )
        keys = ("success", "image_quality", "reward", "reward_gain", "quality_ratio")
        result["median"] = {key: float(np.median([numbers[key] for numbers in result["runs"]])) for key in keys}
        axis.set(title=prompt, xlabel="reward queries", ylabel="reward/mean")
        axis.legend()
    (ROOT / "benchmarks/results/dpok.json").write_text(json.dumps(results, indent=2) + "\n")
    figure.savefig(ROOT / "docs/images/dpok_curves.png", dpi=100)
    array = (torch.cat(rows) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    grid = world.to_grid(array, 8)
    grid = grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST)
    grid.save(ROOT / "docs/images/dpok_before_after.png")
    print("| prompt | seeds | success | reward | distance to real renders |\n|---|---|---|---|---|")
    for prompt, result in results["prompts"].items():
        b, m = result["base"], result["median"]
        print(
            f"| {prompt} | {len(result['runs'])} | {b['success']:.0%} → {m['success']:.0%} "
            f"| {b['reward']:+.2f} → {m['reward']:+.2f} "
            f"| {b['image_quality']:.1f} → {m['image_quality']:.1f} (x{m['quality_ratio']:.2f}) |"
        )


if __name__ == "__main__":
    arguments = tyro.cli(Args, description=__doc__)
    {"run": run, "report": report}[arguments.what](arguments)
