"""The figures and curves of docs/dpok.md: dpok.py on the zoo, four prompts of the paper.

Several seeds.

python -m benchmarks.dpok run       trains, one run after the other; a finished run is kept
python -m benchmarks.dpok report    judges them: benchmarks/results/dpok.json,
                                    docs/images/dpok_*.png, a table
python -m benchmarks.dpok base      how well the base model draws what is right:
                                    benchmarks/results/dpok_base.json

What a setting is worth, two prompts and one seed, under a name of its own; then report with the
same --name, ...:

python -m benchmarks.dpok run --name dpok_all_steps --flags "--rewarded-share 1" --seeds 0 \\
    --prompts "Four wolves in the park" "A dog on the moon"
"""

import itertools
import json
import os
import shlex
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

PROMPTS = (
    "A green colored rabbit",
    "A cat and a dog",
    "Four wolves in the park",
    "A dog on the moon",
)


@dataclass
class Args:
    what: tyro.conf.Positional[Literal["run", "report", "base"]]
    """Train, judge what was trained, or judge the base model alone."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    prompts: tuple[str, ...] = PROMPTS
    """Prompts, one run each."""
    name: str = "dpok"
    """Of the results; the runs are in runs/benchmark-NAME."""
    flags: str = ""
    """More flags of dpok.py, for every run."""
    jobs: int = 1
    """Runs side by side, the cores shared out among them.

    More are done in an hour, but each takes longer.
    """
    count: int = 512
    """Pictures for each figure."""


def run_dir(args: Args, prompt: str, seed: int) -> Path:
    return Path("runs") / f"benchmark-{args.name}" / f"{prompt.lower().replace(' ', '-')}__{seed}"


def run(args: Args):
    def train(seed: int, prompt: str):
        folder = run_dir(args, prompt, seed)
        if (folder / "wall_time.json").exists():
            return
        command = ["dpok.py", "zoo", "--prompt", prompt]
        command += ["--seed", str(seed), "--output-dir", str(folder), *shlex.split(args.flags)]
        env = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.jobs))}
        start = time.time()
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, env=env)
        wall_time = {
            "seconds": time.time() - start,
            "jobs_side_by_side": args.jobs,
            "cores": os.cpu_count(),
        }
        (folder / "wall_time.json").write_text(json.dumps(wall_time))

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda key: train(*key), itertools.product(args.seeds, args.prompts)))


def report(args: Args):
    from matplotlib.figure import Figure

    judge = judging.load_judge(ROOT / "zoo/judge")
    reward = load_reward(f"image_reward:{ROOT / 'zoo/image_reward'}")
    base, rows = load_pipeline(), []
    results = {"weights": weights_digest(), "samples_per_prompt": args.count, "flags": args.flags}
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    axes = figure.subplots(1, len(args.prompts), squeeze=False)[0]
    for prompt, axis in zip(args.prompts, axes):
        before, images = measure(base, judge, reward, prompt, args.count, seed=7)
        # Right pictures alone, equally many before and after: else it matters how well the wrong
        # ones are drawn.
        right = images[judging.success(judge, images, [prompt] * args.count) > 0]
        before["image_quality_right"] = judging.image_quality(judge, base.vae, right)
        rows.append(images[:8])
        result = results.setdefault("prompts", {})[prompt] = {"base": before, "runs": []}
        for seed in args.seeds:
            folder = run_dir(args, prompt, seed)
            if not (folder / "wall_time.json").exists():
                continue
            tuned = load_pipeline(folder)
            numbers, images = measure(tuned, judge, reward, prompt, args.count, seed=7)
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            lines = [json.loads(line) for line in lines]
            if seed == args.seeds[0]:
                rows.append(images[:8])
            right_after = images[judging.success(judge, images, [prompt] * args.count) > 0]
            right_after = right_after[: len(right)]
            numbers |= {
                "seed": seed,
                "image_quality_right": judging.image_quality(judge, base.vae, right_after),
                "reward_gain": numbers["reward"] - before["reward"],
                "quality_ratio": numbers["image_quality"] / before["image_quality"],
                "wall_time": json.loads((folder / "wall_time.json").read_text()),
                "training_reward": [line["reward/mean"] for line in lines],
                "first_max_deviation": lines[0]["ratio/first_max_deviation"],
            }
            result["runs"].append(numbers)
            axis.plot(
                [line["samples"] for line in lines],
                [line["reward/mean"] for line in lines],
                label=f"seed {seed}",
            )
        keys = ("success", "image_quality", "image_quality_right")
        keys += ("reward", "reward_gain", "quality_ratio")
        values = {key: [numbers[key] for numbers in result["runs"]] for key in keys}
        result["median"] = {key: float(np.median(values[key])) for key in keys}
        axis.set(title=prompt, xlabel="reward queries", ylabel="reward/mean")
        axis.legend()
    (ROOT / f"benchmarks/results/{args.name}.json").write_text(json.dumps(results, indent=2) + "\n")
    figure.savefig(ROOT / f"docs/images/{args.name}_curves.png", dpi=100)
    array = (torch.cat(rows) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    grid = world.to_grid(array, 8)
    grid = grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST)
    grid.save(ROOT / f"docs/images/{args.name}_before_after.png")
    print("| prompt | seeds | success | reward | distance to real renders | of right pictures |")
    print("|---|---|---|---|---|---|")
    for prompt, result in results["prompts"].items():
        b, m = result["base"], result["median"]
        print(
            f"| {prompt} | {len(result['runs'])} | {b['success']:.0%} → {m['success']:.0%} "
            f"| {b['reward']:+.2f} → {m['reward']:+.2f} "
            f"| {b['image_quality']:.1f} → {m['image_quality']:.1f} (x{m['quality_ratio']:.2f}) "
            f"| {b['image_quality_right']:.1f} → {m['image_quality_right']:.1f} |"
        )


def report_base(args: Args):
    """Distance of the base model's right pictures, and of as many at random.

    The distance of fewer pictures is larger.
    """
    judge = judging.load_judge(ROOT / "zoo/judge")
    reward = load_reward(f"image_reward:{ROOT / 'zoo/image_reward'}")
    base, rng = load_pipeline(), np.random.default_rng(0)
    results = {"weights": weights_digest(), "pictures": args.count}
    for prompt in args.prompts:
        _, images = measure(base, judge, reward, prompt, args.count, seed=7)
        right = judging.success(judge, images, [prompt] * args.count) > 0
        total = int(right.sum())
        subsets = [torch.from_numpy(rng.permutation(args.count)[:total]) for _ in range(8)]
        results[prompt] = {
            "right_pictures": total,
            "distance": judging.image_quality(judge, base.vae, images),
            "distance_right": judging.image_quality(judge, base.vae, images[right]),
            "distance_as_many_at_random": [
                judging.image_quality(judge, base.vae, images[some]) for some in subsets
            ],
        }
        numbers = [results[prompt][key] for key in ("distance", "distance_right")]
        print(prompt, *numbers, np.mean(results[prompt]["distance_as_many_at_random"]), flush=True)
    path = ROOT / f"benchmarks/results/{args.name}_base.json"
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    arguments = tyro.cli(Args, description=__doc__)
    {"run": run, "report": report, "base": report_base}[arguments.what](arguments)
