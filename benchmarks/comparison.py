"""The tables and pictures of docs/comparison.md: five ways of learning from a reward, on the zoo.

python -m benchmarks.run benchmarks/commands/comparison.sh --jobs 2
python -m benchmarks.run benchmarks/commands/comparison_any_reward.sh --jobs 2
python -m benchmarks.run benchmarks/commands/comparison_evaluate.sh
python -m benchmarks.comparison     benchmarks/results/comparison.json, the tables, the pictures

As Tables 1 to 4 and Figures 3, 4 and 27 of Zhang et al. 2024 (arXiv:2401.12244) have them. Figures
are of pictures that evaluate.py has drawn for prompts that no run has seen.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.pages import fill, markdown_table
from benchmarks.report import metrics_of, minutes_of, save_curves, save_results
from benchmarks.zoo_eval import ROOT, load_pipeline, pictures, weights_digest
from zoo import world

RUNS = ROOT / "runs/benchmark-comparison"
METHODS = {
    "large_scale_ppo": "PPO",
    "refl": "ReFL",
    "draft": "DRaFT-LV",
    "raft": "RAFT",
    "reward_weighted": "reward-weighted",
}
ANY_REWARD = ("large_scale_ppo", "raft", "reward_weighted")
"""The scripts that need no gradient of the reward."""
TABLES = {
    "equal_time": ("preference", METHODS),
    "equal_queries": ("preference", METHODS),
    "longer": ("preference", ("raft",)),
    "composition": ("composition", ANY_REWARD),
    "portraits": ("portraits", ANY_REWARD),
}
"""By the name of the evaluation's folder: what the runs were trained for, and their scripts."""
COLUMNS = {
    "image_reward:zoo/image_reward": "ImageReward ↑",
    "benchmarks/zoo_rewards.py:colours": "colour is right ↑",
    "object_detection:zoo/detector": "detection score ↑",
    "statistical_parity:zoo/skin_tone": "statistical parity ↓",
    "success": "success ↑",
    "image_quality": "distance to real renders ↓",
    "diversity_judge": "diversity ↑",
    "kl": "KL to the base, nats",
}


@dataclass
class Args:
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    tables: tuple[str, ...] = tuple(TABLES)
    """Those to make; the others stay as they are in the results."""


def numbers_of(model: dict) -> dict[str, float]:
    """The columns of a model in an evaluation's results.json."""
    of_all = model["all"]
    found = {spec: reward["mean"] for spec, reward in of_all["rewards"].items()}
    if of_all.get("success"):
        found["success"] = of_all["success"]["mean"]
    found |= {key: of_all[key] for key in ("image_quality", "diversity_judge")}
    found["kl"] = of_all["kl"]["mean"]
    return found


def table_of(name: str, seeds: Sequence[int]) -> dict:
    """Of the base and of each script the columns, seed by seed, minutes and reward queries."""
    task, scripts = TABLES[name]
    evaluated = json.loads((RUNS / f"evaluations/{name}/results.json").read_text())
    models = evaluated["models"]
    result = {"settings": evaluated["settings"], "base": numbers_of(models["base"])}
    for script in scripts:
        runs = [folder_of(name, task, script, seed) for seed in seeds]
        result[script] = {
            "runs": [numbers_of(models[run.name]) for run in runs],
            "minutes": [minutes_of(run) for run in runs],
            "queries": [queries_of(script, run) for run in runs],
        }
    return result


def folder_of(name: str, task: str, script: str, seed: int) -> Path:
    """Where a run's weights and metrics are, as they were at equal time or queries."""
    return RUNS / name / f"{script}__{task}__{seed}"


def queries_of(script: str, run: Path) -> int:
    """How many pictures the reward has scored for learning."""
    args = json.loads((run / "args.json").read_text())
    samples = metrics_of(run)[-1]["samples"]
    return samples * (1 + args["num_noise"]) if script == "draft" else samples


def markdown_of(name: str, table: dict) -> str:
    _, scripts = TABLES[name]
    keys = [key for key in COLUMNS if key in table["base"]]
    sign = {key: -1 if "parity" in key else 1 for key in keys}
    last = ("reward queries", "minutes", "any reward")
    rows = [["base", *(f"{sign[key] * table['base'][key]:.2f}" for key in keys), "", "", ""]]
    for script in scripts:
        row, cells = table[script], [METHODS[script]]
        for key in keys:
            values = sign[key] * np.array([numbers[key] for numbers in row["runs"]])
            spread = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.2f}{spread}")
        cells += [f"{np.mean(row['queries']):.0f}", f"{np.median(row['minutes']):.1f}"]
        rows.append([*cells, "yes" if script in ANY_REWARD else "no"])
    return markdown_table(["", *(COLUMNS[key] for key in keys), *last], rows)


def plot_curves(seeds: Sequence[int]) -> Figure:
    """Training reward over minutes and over reward queries, as Figure 27."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    by_minutes, by_queries = figure.subplots(1, 2, sharey=True)
    for number, (script, label) in enumerate(METHODS.items()):
        runs = [folder_of("equal_time", "preference", script, seed) for seed in seeds]
        minutes = np.median([minutes_of(run) for run in runs])
        for seed, run in zip(seeds, runs):
            rewards = np.array([line["reward/mean"] for line in metrics_of(run)])
            done = np.arange(1, len(rewards) + 1) / len(rewards)
            style = {"color": f"C{number}", "alpha": 0.7, "label": label if seed == 0 else None}
            by_minutes.plot(minutes * done, smooth(rewards), **style)
            by_queries.plot(queries_of(script, run) * done, smooth(rewards), **style)
    by_minutes.set(xlabel="minutes of training", ylabel="training reward (mean of five)")
    by_queries.set(xlabel="reward queries")
    by_minutes.legend(fontsize=8)
    return figure


def smooth(values: np.ndarray, width: int = 5) -> np.ndarray:
    """The mean of each value and those before it, `width` in all."""
    return np.array([values[max(0, i + 1 - width) : i + 1].mean() for i in range(len(values))])


def save_pictures(prompts: list[str]) -> None:
    """A row a model, of the first seed: the same noise and prompts; ReFL early and late."""
    of_time = {script: folder_of("equal_time", "preference", script, 0) for script in METHODS}
    early = folder_of("equal_queries", "preference", "refl", 0)
    rows = [None, of_time["large_scale_ppo"], of_time["draft"], early, of_time["refl"]]
    rows += [of_time["raft"], of_time["reward_weighted"]]
    drawn = torch.cat([pictures(load_pipeline(folder), prompts, seed=11) for folder in rows])
    array = (drawn * 255).round().byte().permute(0, 2, 3, 1).numpy()
    grid = world.to_grid(array, len(prompts))
    grid = grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST)
    grid.save(ROOT / "docs/images/comparison.png")


def main(args: Args) -> None:
    path = ROOT / "benchmarks/results/comparison.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    if results.get("weights") != weights_digest():
        results = {"weights": weights_digest()}
    for name in args.tables:
        results[name] = table_of(name, args.seeds)
    save_results("comparison", results)
    tables = {name: markdown_of(name, results[name]) for name in args.tables}
    fill(ROOT / "docs/comparison.md", tables)
    for name, table in tables.items():
        print(f"{name}\n{table}")
    if "equal_time" in args.tables:
        save_curves("comparison", plot_curves(args.seeds))
        save_pictures((ROOT / "prompts/zoo_preference_held_out.txt").read_text().splitlines())


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
