"""Does it learn? ddpo.py, rwr.py and sft_kl.py on the zoo, several seeds.

The figures and curves of their docs pages.

python -m benchmarks.learning run ddpo       trains; a finished run is kept
python -m benchmarks.learning report ddpo    judges: benchmarks/results/ddpo.json,
                                             docs/images/ddpo_curves.png, a table
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
import tyro

from benchmarks.zoo_eval import ROOT, load_pipeline, pictures, weights_digest
from common.rewards import load_reward

REWARDS = ("jpeg_compressibility", "jpeg_incompressibility", "image_reward:zoo/image_reward")
PROMPTS = tuple((ROOT / "prompts/dpok.txt").read_text().splitlines())


@dataclass
class Args:
    what: tyro.conf.Positional[Literal["run", "report"]]
    """Train, or judge what was trained."""
    script: tyro.conf.Positional[Literal["ddpo", "rwr", "sft_kl"]]
    """Which script."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    runs: Path = Path("runs/benchmark-learning")
    """Where the runs are."""
    jobs: int = 1
    """Runs side by side, the cores shared out among them."""
    count: int = 256
    """Pictures for each figure."""


def experiments(script: str) -> dict[tuple[str, str], tuple[str, list[str], list[str]]]:
    """(curve, panel) of the figure: reward, prompts to judge on, and flags of the run."""
    if script == "sft_kl":
        forms = {name: ["--regularization", name] for name in ("kl-o", "kl-d", "none")}
        forms["kl-o, floor"] = ["--regularization", "kl-o", "--filter", "floor"]
        return {
            (name, prompt): (REWARDS[2], [prompt], [*forms[name], "--prompt", prompt])
            for name, prompt in itertools.product(forms, PROMPTS)
        }
    flag, values = "--weights", ("softmax", "sparse")
    if script == "ddpo":
        flag, values = "--estimator", ("is", "sf")
    prompts = (ROOT / "prompts/zoo.txt").read_text().splitlines()

    def flags(value: str, reward: str) -> list[str]:
        more = []
        if script == "ddpo" and reward.startswith("jpeg"):  # which larger steps do not break
            more = ["--learning-rate", "5e-3" if value == "is" else "8e-3"]
            more += ["--num-iterations", "30", "--gradient-steps", "4"]
        elif value == "sf":  # half as many updates
            more = ["--learning-rate", "5e-3"]
        elif value == "softmax" and reward == "jpeg_compressibility":
            # A standard deviation of 0.4 kB, not of 1.
            more = ["--inverse-temperature", "12"]
        elif value == "softmax" and reward == "jpeg_incompressibility":  # 12 and 2e-3 move nothing
            more = ["--inverse-temperature", "30", "--learning-rate", "5e-3"]
        return [flag, value, "--reward", reward, *more]

    return {
        (value, reward): (reward, prompts, flags(value, reward))
        for value, reward in itertools.product(values, REWARDS)
    }


def slug(*words) -> str:
    dashes = str.maketrans(" /:", "---")
    return "__".join(str(word).lower().translate(dashes) for word in words)


def run(args: Args):
    def train(seed: int, key: tuple[str, str], flags: list[str]):
        folder = args.runs / slug(args.script, *key, seed)
        if (folder / "wall_time.json").exists():
            return
        command = [f"{args.script}.py", "zoo", *flags]
        command += ["--seed", str(seed), "--output-dir", str(folder)]
        if args.script == "sft_kl":  # the same samples for all three
            command += ["--dataset", str(args.runs / slug("data", key[1], seed))]
        env = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.jobs))}
        start = time.time()
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, env=env)
        wall_time = {
            "seconds": time.time() - start,
            "jobs_side_by_side": args.jobs,
            "cores": os.cpu_count(),
        }
        (folder / "wall_time.json").write_text(json.dumps(wall_time))

    found = experiments(args.script).items()
    tasks = [(seed, key, flags) for key, (_, _, flags) in found for seed in args.seeds]
    # Runs that share a data set must not draw it at the same time: one prompt's after the other.
    tasks.sort(key=lambda task: (task[0], task[1][0]))
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda task: train(*task), tasks))


def minutes_of(lines: list[dict]) -> float:
    """Of a run's iterations, with the median one's time for each.

    So a pause of the machine does not count.
    """
    keys = ("time/sample_s", "time/reward_s", "time/train_s")
    seconds = [sum(line[key] for key in keys) for line in lines]
    return float(np.median(seconds)) * len(lines) / 60


def report(args: Args):
    from matplotlib.figure import Figure
    from scipy.stats import ttest_1samp

    table = experiments(args.script)
    panels = list(dict.fromkeys(panel for _, panel in table))
    figure = Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
    axes = dict(zip(panels, figure.subplots(1, len(panels), squeeze=False)[0]))
    curves = dict.fromkeys(curve for curve, _ in table)
    colors = dict(zip(curves, ("tab:blue", "tab:orange", "tab:green", "tab:red")))
    base, base_rewards = load_pipeline(), {}
    results = {"weights": weights_digest(), "pictures": args.count, "runs": {}}
    print("| | reward | base | fine-tuned, each seed | gain | p | minutes |")
    print("|---|---|---|---|---|---|---|")
    for (curve, panel), (spec, prompts, _) in table.items():
        reward = load_reward(spec)
        asked = [prompts[i % len(prompts)] for i in range(args.count)]
        if panel not in base_rewards:
            base_rewards[panel] = reward(pictures(base, asked, seed=5), asked).mean().item()
        before, after, minutes = base_rewards[panel], [], []
        for seed in args.seeds:
            folder = args.runs / slug(args.script, curve, panel, seed)
            images = pictures(load_pipeline(folder), asked, seed=5)
            after.append(reward(images, asked).mean().item())
            lines = (folder / "metrics.jsonl").read_text().splitlines()
            lines = [json.loads(line) for line in lines]
            minutes.append(minutes_of(lines))
            axes[panel].plot(
                [line["samples"] for line in lines],
                [line["reward/mean"] for line in lines],
                color=colors[curve],
                alpha=0.7,
                label=curve if seed == args.seeds[0] else None,
            )
        gains = np.array(after) - before
        # One-sided: the mean gain over seeds is above 0.
        p = ttest_1samp(gains, 0, alternative="greater").pvalue.item()
        results["runs"][f"{curve}, {panel}"] = {
            "base": before,
            "after": after,
            "p": p,
            "minutes": minutes,
        }
        each = ", ".join(f"{value:+.2f}" for value in after)
        mean = f"{gains.mean():+.2f} | {p:.4f} | {np.mean(minutes):.1f}"
        print(f"| {curve} | {panel} | {before:+.2f} | {each} | {mean} |", flush=True)
    for panel, axis in axes.items():
        axis.axhline(base_rewards[panel], color="gray", linestyle=":", label="base")
        axis.set(title=panel, xlabel="reward queries", ylabel="reward/mean")
        axis.legend()
    path = ROOT / f"benchmarks/results/{args.script}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    figure.savefig(ROOT / f"docs/images/{args.script}_curves.png", dpi=100)


if __name__ == "__main__":
    arguments = tyro.cli(Args, description=__doc__)
    {"run": run, "report": report}[arguments.what](arguments)
