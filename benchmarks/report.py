"""The figures of the docs, from runs that benchmarks/run.py has made.

python -m benchmarks.report ddpo     benchmarks/results/ddpo.json, docs/images/ddpo_curves.png,
                                     and the table that docs/ddpo.md shows

Every experiment has its results file of that name. Pictures are sampled by plain diffusers from the
weights that a run left, with noise that training did not use.
"""

import itertools
import json
import re
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from diffusers import UNet2DConditionModel
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import ttest_1samp

from benchmarks.run import (
    folder_of,
    is_finished,
    read_commands,
    read_wall_time,
    values_of,
    with_seed,
)
from benchmarks.zoo_eval import ROOT, load_pipeline, measure, pictures, weights_digest
from common.lora import FILE_NAME
from common.rewards import load_reward
from evaluation.digests import digest_of
from zoo import judge as judging
from zoo import world

ZOO_REWARD = "image_reward:zoo/image_reward"


# What the experiments share


def commands_of(name: str) -> list[str]:
    """The commands of benchmarks/commands/NAME.sh; DDPO's are those of claim 9."""
    if name == "ddpo":
        paragraphs = read_commands(ROOT / "benchmarks/claims/queries.sh")
        paragraphs = [paragraph for paragraph in paragraphs if "python ddpo.py " in paragraph[0]]
    else:
        paragraphs = read_commands(ROOT / f"benchmarks/commands/{name}.sh")
    return [command for paragraph in paragraphs for command in paragraph]


def finished(command: str, seeds: tuple[int, ...]) -> list[str]:
    """The command for each seed; one that is not finished ends the report."""
    commands = list(dict.fromkeys(with_seed(command, seed) for seed in seeds))
    for each in commands:
        if not is_finished(each):
            raise SystemExit(f"not finished; run it, or give --seeds that are: {each}")
    return commands


def metrics_of(folder: Path) -> list[dict]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def minutes_of(folder: Path) -> float:
    """Of a run's iterations, with the median one's time for each.

    So other work on the machine, or a pause, counts less.
    """
    times = [[line[key] for key in line if key.startswith("time/")] for line in metrics_of(folder)]
    return float(np.median([sum(line) for line in times]) * len(times) / 60)


def plot_reward(axis, folder: Path, **style) -> None:
    """A run's reward over the number of reward queries."""
    lines = metrics_of(folder)
    queries, rewards = ([line[key] for line in lines] for key in ("samples", "reward/mean"))
    axis.plot(queries, rewards, **style)
    axis.set(xlabel="reward queries", ylabel="reward/mean")


def save_results(name: str, results: dict) -> None:
    path = ROOT / f"benchmarks/results/{name}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")


def save_curves(name: str, figure: Figure) -> None:
    figure.savefig(ROOT / f"docs/images/{name}_curves.png", dpi=100)


# docs/dpok.md and its notes


def dpok(name: str, seeds: tuple[int, ...], count: int) -> None:
    """Success, reward and looks of single prompts, before and after; pictures and curves."""
    judge, reward = judging.load_judge(), load_reward(ZOO_REWARD)
    base, rows = load_pipeline(), []
    commands = dpok_commands(name)
    results = {"weights": weights_digest(), "samples_per_prompt": count}
    results |= {"flags": flags_of(commands[0]), "prompts": {}}
    runs = [finished(command, seeds) for command in commands]
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    axes = figure.subplots(1, len(commands), squeeze=False)[0]
    for command, runs_of_prompt, axis in zip(commands, runs, axes):
        prompt = values_of(command)["--prompt"]
        before, images = measure(base, judge, reward, prompt, count, seed=7)
        rows.append(images[:8])
        right = right_pictures(judge, images, prompt)
        before["image_quality_right"] = judging.image_quality(judge, base.vae, right)
        result = results["prompts"][prompt] = {"base": before, "runs": []}
        for number, each in enumerate(runs_of_prompt):
            tuned = load_pipeline(folder_of(each))
            after, images = measure(tuned, judge, reward, prompt, count, seed=7)
            if number == 0:
                rows.append(images[:8])
            # Right pictures alone, equally many before and after: else it matters how well the
            # wrong ones are drawn.
            right_after = right_pictures(judge, images, prompt)[: len(right)]
            after["seed"] = int(values_of(each)["--seed"])
            after["image_quality_right"] = judging.image_quality(judge, base.vae, right_after)
            result["runs"].append(dpok_numbers(each, before, after))
            plot_reward(axis, folder_of(each), label=f"seed {after['seed']}")
        keys = ("success", "image_quality", "image_quality_right")
        keys += ("reward", "reward_gain", "quality_ratio")
        values = {key: [numbers[key] for numbers in result["runs"]] for key in keys}
        result["median"] = {key: float(np.median(values[key])) for key in keys}
        axis.set_title(prompt)
        axis.legend()
    save_results(name, results)
    save_curves(name, figure)
    save_before_after(name, rows)
    print_dpok(results)


def dpok_commands(name: str) -> list[str]:
    """Those whose runs are in runs/benchmark-NAME, one for each prompt."""
    commands = [*commands_of("dpok"), *commands_of("dpok_notes")]
    return [command for command in commands if f"runs/benchmark-{name}/" in command]


def flags_of(command: str) -> str:
    """The command's flags but for prompt, seed and folder."""
    values = values_of(command)
    others = values.keys() - {"--prompt", "--seed", "--output-dir"}
    return shlex.join(word for key in values if key in others for word in (key, values[key]))


def right_pictures(judge, images: torch.Tensor, prompt: str) -> torch.Tensor:
    """Those that have everything that the prompt asks for."""
    return images[judging.success(judge, images, [prompt] * len(images)) > 0]


def dpok_numbers(command: str, before: dict, after: dict) -> dict:
    """What is kept of a run: its figures, their difference to the base's, and its training."""
    folder = folder_of(command)
    lines, wall_time = metrics_of(folder), read_wall_time(folder)
    return after | {
        "reward_gain": after["reward"] - before["reward"],
        "quality_ratio": after["image_quality"] / before["image_quality"],
        "wall_time": {key: wall_time[key] for key in ("seconds", "jobs_side_by_side", "cores")},
        "training_reward": [line["reward/mean"] for line in lines],
        "first_max_deviation": lines[0]["ratio/first_max_deviation"],
    }


def save_before_after(name: str, rows: list[torch.Tensor]) -> None:
    """Rows of pictures with the same noise, of the base and of the first seed."""
    array = (torch.cat(rows) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    grid = world.to_grid(array, 8)
    grid = grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST)
    grid.save(ROOT / f"docs/images/{name}_before_after.png")


def print_dpok(results: dict) -> None:
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


def dpok_base(name: str, seeds: tuple[int, ...], count: int) -> None:
    """Distance of the base model's right pictures, and of as many at random; it has no runs.

    The distance of fewer pictures is larger.
    """
    judge, reward = judging.load_judge(), load_reward(ZOO_REWARD)
    base, rng = load_pipeline(), np.random.default_rng(0)
    results = {"weights": weights_digest(), "pictures": count}
    for prompt in [values_of(command)["--prompt"] for command in commands_of("dpok")]:
        _, images = measure(base, judge, reward, prompt, count, seed=7)
        right = right_pictures(judge, images, prompt)
        subsets = [torch.from_numpy(rng.permutation(count)[: len(right)]) for _ in range(8)]
        results[prompt] = {
            "right_pictures": len(right),
            "distance": judging.image_quality(judge, base.vae, images),
            "distance_right": judging.image_quality(judge, base.vae, right),
            "distance_as_many_at_random": [
                judging.image_quality(judge, base.vae, images[some]) for some in subsets
            ],
        }
        numbers = [results[prompt][key] for key in ("distance", "distance_right")]
        print(prompt, *numbers, np.mean(results[prompt]["distance_as_many_at_random"]), flush=True)
    save_results(name, results)


# docs/ddpo.md, docs/rwr.md, docs/sft_kl.md


def learning(name: str, seeds: tuple[int, ...], count: int) -> None:
    """Does it learn? The judged reward before and after, seed by seed, and a curve of each run."""
    runs = {curve_and_panel(command): finished(command, seeds) for command in commands_of(name)}
    curves = list(dict.fromkeys(curve for curve, _ in runs))
    panels = list(dict.fromkeys(panel for _, panel in runs))
    figure = Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
    axes = dict(zip(panels, figure.subplots(1, len(panels), squeeze=False)[0]))
    colors = dict(zip(curves, ("tab:blue", "tab:orange", "tab:green", "tab:red")))
    base, base_rewards = load_pipeline(), {}
    results = {"weights": weights_digest(), "pictures": count, "runs": {}}
    print("| | reward | base | fine-tuned, each seed | gain | p | minutes |")
    print("|---|---|---|---|---|---|---|")
    for curve, panel in itertools.product(curves, panels):
        commands = runs[curve, panel]
        reward = load_reward(values_of(commands[0]).get("--reward", ZOO_REWARD))
        prompts = prompts_of(commands[0])
        asked = [prompts[i % len(prompts)] for i in range(count)]
        if panel not in base_rewards:
            base_rewards[panel] = reward(pictures(base, asked, seed=5), asked).mean().item()
        before, after, minutes = base_rewards[panel], [], []
        for number, folder in enumerate(map(folder_of, commands)):
            images = pictures(load_pipeline(folder), asked, seed=5)
            after.append(reward(images, asked).mean().item())
            minutes.append(minutes_of(folder))
            style = {"color": colors[curve], "alpha": 0.7, "label": None if number else curve}
            plot_reward(axes[panel], folder, **style)
        gains = np.array(after) - before
        # One-sided: the mean gain over seeds is above 0.
        p = ttest_1samp(gains, 0, alternative="greater").pvalue.item()
        numbers = {"base": before, "after": after, "p": p, "minutes": minutes}
        results["runs"][f"{curve}, {panel}"] = numbers
        values = ", ".join(f"{value:+.2f}" for value in after)
        mean = f"{gains.mean():+.2f} | {p:.4f} | {np.mean(minutes):.1f}"
        print(f"| {curve} | {panel} | {before:+.2f} | {values} | {mean} |", flush=True)
    for panel, axis in axes.items():
        axis.axhline(base_rewards[panel], color="gray", linestyle=":", label="base")
        axis.set_title(panel)
        axis.legend()
    save_results(name, results)
    save_curves(name, figure)


def ddpo(name: str, seeds: tuple[int, ...], count: int) -> None:
    """`learning`, and a picture of what the first seed's runs draw at their end."""
    learning(name, seeds, count)
    ddpo_pictures(seeds[0])


def ddpo_pictures(seed: int) -> None:
    """The base's grid and below it the last one of each run, of the same prompts and noise."""
    rows = []
    for command in commands_of("ddpo"):
        samples = folder_of(with_seed(command, seed)) / "samples"
        first, *_, last = sorted(samples.glob("[0-9]*.png"))
        rows += [last] if rows else [first, last]
    picture = Image.fromarray(np.concatenate([np.asarray(Image.open(row)) for row in rows]))
    picture = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
    picture.save(ROOT / "docs/images/ddpo_before_after.png")


def curve_and_panel(command: str) -> tuple[str, str]:
    """Of the figure: the form of the algorithm, and the reward or the prompt that it learns."""
    values = values_of(command)
    form = next(values[f] for f in ("--estimator", "--weights", "--regularization") if f in values)
    if "--filter" in values:
        form += f", {values['--filter']}"
    return form, values.get("--reward") or values["--prompt"]


def prompts_of(command: str) -> list[str]:
    """What a run is asked for: its prompt, or all of those of the presets."""
    values = values_of(command)
    if "--prompt" in values:
        return [values["--prompt"]]
    return (ROOT / "prompts/zoo.txt").read_text().splitlines()


# docs/large_scale_ppo.md

TASKS = {
    "preference": ZOO_REWARD,
    "composition": "object_detection:zoo/detector",
    "portraits": "statistical_parity:zoo/skin_tone",
}
COLUMNS = {
    "preference": "ImageReward ↑",
    "composition": "detection score ↑",
    "portraits": "statistical parity ↓",
}
PRETRAIN = "preference without the pre-training loss"
AT_EQUAL_REWARD = ("preference", PRETRAIN)
"""Runs whose weights are kept on the way."""
LARGE_SCALE_RUNS = ROOT / "runs/benchmark-large-scale-ppo"


def large_scale_ppo(name: str, seeds: tuple[int, ...], count: int) -> None:
    """Table 5 of Zhang et al. 2024, and App. G at equal reward, on held-out prompts."""
    folders, stops = {}, {}
    for run in (*TASKS, "joint", PRETRAIN):
        commands = [each for each in commands_of(name) if f"/{run.replace(' ', '-')}__" in each]
        *_, last = [finished(command, seeds) for command in commands]
        folders[run] = [folder_of(command) for command in last]
        stops[run] = re.findall(r"mkdir -p (after_\d+)", " ".join(commands))
    scores_of = HeldOutScores(count)
    base = scores_of(LARGE_SCALE_RUNS / "base", lora=False)
    arguments = json.loads((folders["joint"][0] / "args.json").read_text())
    results = {"weights": weights_digest(), "pictures": count}
    results |= {"num_iterations": arguments["num_iterations"], "base": base}
    results["runs"] = {run: [*map(scores_of, folders[run])] for run in folders if run != PRETRAIN}
    results["on_the_way"] = {
        run: [[scores_of(folder / stop, ("preference",)) for stop in stops[run]] for folder in each]
        for run, each in folders.items()
        if run in AT_EQUAL_REWARD
    }
    results["minutes"] = {run: [*map(minutes_of, each)] for run, each in folders.items()}

    def gain(run: str, task: str) -> float:
        return np.mean([numbers[task] for numbers in results["runs"][run]]) - base[task]

    # The paper's claim: the joint run has at least 80 % of the gain of the run for that task alone.
    shares = {task: float(gain("joint", task) / gain(task, task)) for task in TASKS}
    results["joint_share_of_gain"] = shares
    results["at_equal_reward"] = distance_at_equal_reward(base, results["on_the_way"])
    save_results(name, results)
    print_large_scale_ppo(results)
    save_curves(name, plot_large_scale_ppo(results, folders))


def large_scale_ppo_share(name: str, seeds: tuple[int, ...], count: int) -> None:
    """Of the preset's first steps and of all, from the same number of samples: reward on the way.

    That of all steps is in large_scale_ppo's results.
    """
    *_, last = [finished(command, seeds) for command in commands_of(name)]
    scores_of, stops = HeldOutScores(count), ("after_20", "after_40")
    own = [[scores_of(folder_of(c) / stop, ("preference",)) for stop in stops] for c in last]
    path = ROOT / "benchmarks/results/large_scale_ppo.json"
    of_all = json.loads(path.read_text())["on_the_way"]["preference"]
    results = {"weights": weights_digest(), "pictures": count, "stops": stops}
    results["first steps"] = own
    results["all steps"] = [of_all[seed][: len(stops)] for seed in seeds]
    save_results(name, results)
    for label in ("all steps", "first steps"):
        for i, stop in enumerate(stops):
            for key in ("preference", "success", "distance"):
                values = ", ".join(f"{run[i][key]:.2f}" for run in results[label])
                print(f"{label}, {stop}, {key}: {values}")


class HeldOutScores:
    """The columns of Table 5 on held-out prompts, and image quality.

    They stay beside the weights, for as long as those and the zoo's are the same. Parity is over
    all pictures of a prompt.
    """

    def __init__(self, count: int):
        self.count, self.judge = count, judging.load_judge()
        self.rewards = {task: load_reward(spec) for task, spec in TASKS.items()}
        files = {task: ROOT / f"prompts/zoo_{task}_held_out.txt" for task in TASKS}
        self.prompts = {task: file.read_text().splitlines() for task, file in files.items()}

    def __call__(self, folder: Path, tasks=tuple(TASKS), lora: bool = True) -> dict[str, float]:
        """Those of the LoRA in a folder, or of the base model."""
        path = folder / f"scores_{self.count}.json"
        of = {"zoo": weights_digest(), "lora": digest_of(folder / FILE_NAME) if lora else None}
        stored = json.loads(path.read_text()) if path.exists() else {}
        if stored.get("of") != of:
            folder.mkdir(exist_ok=True)
            scores = self.measure(load_pipeline(folder if lora else None), tasks)
            stored = {"of": of, "scores": scores}
            path.write_text(json.dumps(stored))
        return stored["scores"]

    def measure(self, pipeline, tasks) -> dict[str, float]:
        numbers = {}
        for task in tasks:
            prompts = self.prompts[task]
            asked = [prompts[i % len(prompts)] for i in range(self.count)]
            images = pictures(pipeline, asked, seed=9)
            numbers[task] = self.rewards[task](images, asked).mean().item()
            if task == "preference":
                numbers["distance"] = judging.image_quality(self.judge, pipeline.vae, images)
                numbers["success"] = judging.success(self.judge, images, asked).mean().item()
        return numbers


def at_equal_reward(ways: Sequence[Sequence[Sequence[float]]]) -> tuple[float, list[float]]:
    """The highest reward that all runs reach, and a figure of each where it first has that.

    A way has a run's rewards and the figure's values, from the base on; it is interpolated.
    """
    curves = []
    for reward, values in ways:
        reward, first = np.unique(np.maximum.accumulate(reward), return_index=True)
        curves.append((reward, np.array(values)[first]))
    level = float(min(reward[-1] for reward, _ in curves))
    return level, [float(np.interp(level, reward, values)) for reward, values in curves]


def distance_at_equal_reward(base: dict, on_the_way: dict) -> dict:
    """Distance to real renders with and without the pre-training loss, seed by seed."""
    found = {"reward": [], **{name: [] for name in AT_EQUAL_REWARD}}
    for runs in zip(*(on_the_way[name] for name in AT_EQUAL_REWARD)):
        ways = [
            [[numbers[key] for numbers in [base, *run]] for key in ("preference", "distance")]
            for run in runs
        ]
        level, distances = at_equal_reward(ways)
        found["reward"].append(level)
        for name, distance in zip(AT_EQUAL_REWARD, distances):
            found[name].append(distance)
    return found


def print_large_scale_ppo(results: dict) -> None:
    sign = {"preference": 1, "composition": 1, "portraits": -1}
    columns = " | ".join(COLUMNS.values())
    print(f"| trained for | {columns} | distance to real renders ↓ | minutes |")
    print("|---|---|---|---|---|---|")
    rows = {"base": [results["base"]]} | results["runs"]
    for name, seeds in rows.items():
        cells = [np.array([numbers[task] for numbers in seeds]) * sign[task] for task in TASKS]
        if len(seeds) > 1:
            cells = [f"{cell.mean():.3f} ± {cell.std(ddof=1):.3f}" for cell in cells]
        else:
            cells = [f"{cell[0]:.3f}" for cell in cells]
        distance = np.mean([numbers["distance"] for numbers in seeds])
        took = f"{np.mean(results['minutes'][name]):.1f}" if name != "base" else ""
        print(f"| {name} | {' | '.join(cells)} | {distance:.2f} | {took} |")
    print("\njoint, share of each single run's gain:", results["joint_share_of_gain"])
    print("distance to real renders at equal reward:", results["at_equal_reward"])


def plot_large_scale_ppo(results: dict, folders: dict[str, list[Path]]) -> Figure:
    """Training reward of each task, alone and jointly; distance to real renders over reward."""
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    *axes, right = figure.subplots(1, 4)
    for axis, (task, spec) in zip(axes, TASKS.items()):
        reward = spec.split(":")[0]
        for run, color in ((task, "C0"), ("joint", "black")):
            for i, folder in enumerate(folders[run]):
                values = [line[f"reward/{reward}/mean"] for line in metrics_of(folder)]
                smooth = np.convolve(values, np.ones(5) / 5, "valid")
                label = None if i else run
                axis.plot(np.arange(len(smooth)) + 3, smooth, color=color, alpha=0.6, label=label)
        axis.set(xlabel="iterations (mean of five)", ylabel="training reward", title=reward)
        axis.legend(fontsize=7)
    for run, color in zip(AT_EQUAL_REWARD, ("C0", "C3")):
        for i, way in enumerate(results["on_the_way"][run]):
            points = [results["base"], *way]
            x, y = ([numbers[key] for numbers in points] for key in ("preference", "distance"))
            label = None if i else run
            right.plot(x, y, "o-", color=color, alpha=0.6, markersize=3, label=label)
    right.set(xlabel="ImageReward, held-out prompts", ylabel="distance to real renders")
    right.legend(fontsize=7)
    return figure


# docs/evaluate.md


def evaluate(name: str, seeds: tuple[int, ...], count: int) -> None:
    """What evaluate.py wrote, with the time it took; one run of each algorithm, without seeds."""
    work = ROOT / "runs" / f"benchmark-{name}"
    command = next(each for each in commands_of("evaluate") if f"{work.name}/" in each)
    (command,) = finished(command, (0,))
    wall_time = read_wall_time(folder_of(command))
    results = {
        "weights": weights_digest(),
        "runs": [(work / model).resolve().name for model in ("DPOK", "SFT")],
        **{key: wall_time[key] for key in ("seconds", "cores", "load_before")},
        **json.loads((work / "evaluation/results.json").read_text()),
    }
    save_results(name, results)
    shutil.copy(work / "evaluation/comparison.png", ROOT / f"docs/images/{name}.png")
    print((work / "evaluation/table.md").read_text())
    load = results["load_before"]
    print(f"{results['seconds']:.0f} seconds on {results['cores']} cores, load before {load:.1f}")


# docs/runs.md


def all_weights(name: str, seeds: tuple[int, ...], count: int) -> None:
    """The judged reward of the UNets that runs with --lora-rank 0 left, and of the base."""
    reward, results = load_reward(ZOO_REWARD), {"weights": weights_digest(), "pictures": count}
    results["runs"] = {}
    for command in commands_of(name):
        (command,) = finished(command, seeds[:1])
        folder = folder_of(command)
        prompts = prompts_of(command)
        if "--tasks" in values_of(command):
            prompts = (ROOT / "prompts/zoo_preference.txt").read_text().splitlines()
        asked, pipeline = [prompts[i % len(prompts)] for i in range(count)], load_pipeline()
        before = reward(pictures(pipeline, asked, seed=5), asked).mean().item()
        pipeline.unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
        after = reward(pictures(pipeline, asked, seed=5), asked).mean().item()
        last = metrics_of(folder)[-1]
        numbers = {"base": before, "after": after, "iterations": last["iteration"] + 1}
        results["runs"][folder.name] = numbers | {"kl": last["kl/pretrained"]}
        print(folder.name, results["runs"][folder.name], flush=True)
    save_results(name, results)


REPORTS = {
    "all_weights": (all_weights, 128),
    "dpok": (dpok, 256),
    "dpok_20": (dpok, 256),
    "dpok_30": (dpok, 256),
    "dpok_40": (dpok, 256),
    "dpok_40_pair_moon": (dpok, 256),
    "dpok_40_wolves": (dpok, 256),
    "dpok_bf16": (dpok, 256),
    "dpok_beta": (dpok, 256),
    "dpok_base": (dpok_base, 256),
    "ddpo": (ddpo, 256),
    "rwr": (learning, 256),
    "sft_kl": (learning, 128),
    "large_scale_ppo": (large_scale_ppo, 128),
    "large_scale_ppo_share": (large_scale_ppo_share, 128),
    "evaluate": (evaluate, 8),
    "evaluate_32": (evaluate, 32),
}
"""What makes each results file, and from how many pictures each of its published figures is."""


@dataclass
class Args:
    name: tyro.conf.Positional[Literal[tuple(REPORTS)]]
    """Of the results."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    count: int | None = None
    """Pictures for each figure; by default as many as the docs have."""


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    report, pictures_of_docs = REPORTS[args.name]
    report(args.name, args.seeds, args.count or pictures_of_docs)
