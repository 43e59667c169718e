"""Table 5 of Zhang et al. 2024 on the zoo: three single-task runs and the joint one.

And App. G, without the pre-training loss. Held-out prompts, several seeds.

python -m benchmarks.large_scale_ppo run       trains; a finished run is kept
python -m benchmarks.large_scale_ppo report    judges: benchmarks/results/large_scale_ppo.json,
                                               curves and tables
"""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

from benchmarks.zoo_eval import ROOT, load_pipeline, pictures, weights_digest
from common.lora import FILE_NAME as LORA
from common.rewards import load_reward
from large_scale_ppo import ZOO, ZOO_TASKS
from zoo import judge as judging

TASKS = dict(zip(("preference", "composition", "portraits"), ZOO_TASKS))
COLUMNS = {
    "preference": "ImageReward ↑",
    "composition": "detection score ↑",
    "portraits": "statistical parity ↓",
}
PRETRAIN = "preference without the pre-training loss"
EXPERIMENTS = {name: ["--tasks", task] for name, task in TASKS.items()}
EXPERIMENTS |= {"joint": ["--tasks", *ZOO_TASKS]}
EXPERIMENTS |= {PRETRAIN: ["--tasks", TASKS["preference"], "--pretrain-beta", "0"]}
AT_EQUAL_REWARD = ("preference", PRETRAIN)
"""Runs whose weights are kept on the way."""


@dataclass
class Args:
    what: tyro.conf.Positional[Literal["run", "report"]]
    """Train, or judge what was trained."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    runs: Path = Path("runs/benchmark-large-scale-ppo")
    """Where the runs are."""
    jobs: int = 1
    """Runs side by side, the cores shared out among them."""
    num_iterations: int = ZOO.num_iterations
    """Iterations of a run: for each task of the joint run as many as for a single one."""
    parts: int = 5
    """Points on the way at which weights are kept."""
    count: int = 128
    """Pictures for each figure."""


def folder_of(args: Args, name: str, seed: int) -> Path:
    return args.runs / f"{name.replace(' ', '-')}__{seed}"


def stops_of(args: Args, name: str) -> list[int]:
    """Iterations after which weights are kept.

    A run without the pre-training loss ends after three fifths of them: it is compared with the
    other at a reward that both reach, and has no row in Table 5.
    """
    parts = args.parts if name in AT_EQUAL_REWARD else 1
    stops = [args.num_iterations * part // parts for part in range(1, parts + 1)]
    return [stop for stop in stops if name != PRETRAIN or stop <= 0.6 * args.num_iterations]


def run(args: Args):
    def train(name: str, seed: int):
        folder = folder_of(args, name, seed)
        env = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.jobs))}
        for stop in stops_of(args, name):
            kept = folder / f"after_{stop}"
            if (kept / LORA).exists():
                continue
            words = ["zoo", *EXPERIMENTS[name], "--seed", str(seed), "--output-dir", str(folder)]
            if (folder / "checkpoint").exists():
                words = ["--resume", str(folder)]
            command = [sys.executable, "large_scale_ppo.py", *words, "--num-iterations", str(stop)]
            subprocess.run(command, cwd=ROOT, check=True, env=env)
            kept.mkdir(exist_ok=True)
            shutil.copy(folder / LORA, kept)

    tasks = [(name, seed) for seed in args.seeds for name in EXPERIMENTS]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda task: train(*task), tasks))


def minutes(folder: Path) -> float:
    """Of a run, by its median iteration: other work on the machine, or a pause, counts less."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    times = [[line[key] for key in line if key.startswith("time/")] for line in lines]
    return float(np.median([sum(line) for line in times]) * len(times) / 60)


def report(args: Args):
    from matplotlib.figure import Figure

    judge = judging.load_judge()
    rewards = {name: load_reward(task.split()[0]) for name, task in TASKS.items()}
    held_out = {name: ROOT / f"prompts/zoo_{name}_held_out.txt" for name in TASKS}
    held_out = {name: path.read_text().splitlines() for name, path in held_out.items()}

    def scores(pipeline, names=tuple(TASKS)) -> dict[str, float]:
        """The columns of Table 5 on held-out prompts, and image quality.

        Parity is over all pictures of a prompt.
        """
        numbers = {}
        for name in names:
            asked = [held_out[name][i % len(held_out[name])] for i in range(args.count)]
            images = pictures(pipeline, asked, seed=9)
            numbers[name] = rewards[name](images, asked).mean().item()
            if name == "preference":
                numbers["distance"] = judging.image_quality(judge, pipeline.vae, images)
                numbers["success"] = judging.success(judge, images, asked).mean().item()
        return numbers

    def scores_of(folder: Path, names=tuple(TASKS), lora: bool = True) -> dict[str, float]:
        """Those of a run's weights, which stay beside them."""
        path = folder / f"scores_{args.count}.json"
        if not path.exists():
            folder.mkdir(exist_ok=True)
            path.write_text(json.dumps(scores(load_pipeline(folder if lora else None), names)))
        return json.loads(path.read_text())

    base = scores_of(args.runs / "base", lora=False)
    results = {
        "weights": weights_digest(),
        "pictures": args.count,
        "num_iterations": args.num_iterations,
    }
    results |= {"base": base, "runs": {}, "on_the_way": {}, "minutes": {}}
    for name in EXPERIMENTS:
        folders = [folder_of(args, name, seed) for seed in args.seeds]
        stops = [f"after_{stop}" for stop in stops_of(args, name)]
        if not all((folder / stops[-1] / LORA).exists() for folder in folders):
            print(f"left out, not all trained: {name}", file=sys.stderr)
            continue
        if name != PRETRAIN:
            results["runs"][name] = [scores_of(folder) for folder in folders]
        results["minutes"][name] = [minutes(folder) for folder in folders]
        if name in AT_EQUAL_REWARD:
            results["on_the_way"][name] = [
                [scores_of(folder / stop, ("preference",)) for stop in stops] for folder in folders
            ]

    def gain(run: str, task: str) -> float:
        return np.mean([numbers[task] for numbers in results["runs"][run]]) - base[task]

    # The paper's claim: the joint run has at least 80 % of the gain of the run for that task alone.
    shares = {name: float(gain("joint", name) / gain(name, name)) for name in TASKS}
    results["joint_share_of_gain"] = shares
    if PRETRAIN in results["on_the_way"]:
        results["at_equal_reward"] = at_equal_reward(base, results["on_the_way"])
    path = ROOT / "benchmarks/results/large_scale_ppo.json"
    path.write_text(json.dumps(results, indent=2) + "\n")

    sign = {"preference": 1, "composition": 1, "portraits": -1}
    columns = " | ".join(COLUMNS.values())
    print(f"| trained for | {columns} | distance to real renders ↓ | minutes |")
    print("|---|---|---|---|---|---|")
    rows = {"base": [base]} | results["runs"]
    for name, seeds in rows.items():
        cells = [np.array([numbers[task] for numbers in seeds]) * sign[task] for task in TASKS]
        if len(seeds) > 1:
            cells = [f"{cell.mean():.3f} ± {cell.std():.3f}" for cell in cells]
        else:
            cells = [f"{cell[0]:.3f}" for cell in cells]
        distance = np.mean([numbers["distance"] for numbers in seeds])
        took = f"{np.mean(results['minutes'][name]):.1f}" if name != "base" else ""
        print(f"| {name} | {' | '.join(cells)} | {distance:.2f} | {took} |")
    print("\njoint, share of each single run's gain:", results["joint_share_of_gain"])
    print("distance to real renders at equal reward:", results.get("at_equal_reward"))

    figure = Figure(figsize=(13, 3.2), layout="constrained")
    *axes, right = figure.subplots(1, 4)
    for axis, (name, task) in zip(axes, TASKS.items()):
        key = f"reward/{task.split(':')[0]}/mean"
        for run_name, color in ((name, "C0"), ("joint", "black")):
            for i, seed in enumerate(args.seeds):
                lines = (folder_of(args, run_name, seed) / "metrics.jsonl").read_text().splitlines()
                values = [json.loads(line)[key] for line in lines]
                smooth = np.convolve(values, np.ones(5) / 5, "valid")
                label = run_name if i == 0 else None
                axis.plot(np.arange(len(smooth)) + 3, smooth, color=color, alpha=0.6, label=label)
        axis.set(xlabel="iterations (mean of five)", ylabel="training reward")
        axis.set_title(key.split("/")[1])
        axis.legend(fontsize=7)
    for name, color in zip(AT_EQUAL_REWARD, ("C0", "C3")):
        for i, way in enumerate(results["on_the_way"].get(name, [])):
            points = [base, *way]
            x, y = ([numbers[key] for numbers in points] for key in ("preference", "distance"))
            label = name if i == 0 else None
            right.plot(x, y, "o-", color=color, alpha=0.6, markersize=3, label=label)
    right.set(xlabel="ImageReward, held-out prompts", ylabel="distance to real renders")
    right.legend(fontsize=7)
    figure.savefig(ROOT / "docs/images/large_scale_ppo_curves.png", dpi=100)


def at_equal_reward(base: dict, on_the_way: dict) -> dict:
    """Distance to real renders with and without the pre-training loss, at equal reward.

    Seed by seed, each is interpolated where it first has the highest reward that both reach.
    """
    found = {"reward": [], **{name: [] for name in AT_EQUAL_REWARD}}
    for ways in zip(*(on_the_way[name] for name in AT_EQUAL_REWARD)):
        curves = []
        for way in ways:
            reward = np.array([numbers["preference"] for numbers in [base, *way]])
            distance = np.array([numbers["distance"] for numbers in [base, *way]])
            reward, first = np.unique(np.maximum.accumulate(reward), return_index=True)
            curves.append((reward, distance[first]))
        level = min(reward[-1] for reward, _ in curves)
        found["reward"].append(float(level))
        for name, (reward, distance) in zip(AT_EQUAL_REWARD, curves):
            found[name].append(float(np.interp(level, reward, distance)))
    return found


if __name__ == "__main__":
    arguments = tyro.cli(Args, description=__doc__)
    {"run": run, "report": report}[arguments.what](arguments)
