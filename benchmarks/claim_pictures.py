"""A picture or a curve for each claim of docs/claims.md, drawn by benchmarks/verdicts.py."""

import itertools
from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure

from benchmarks.claim_runs import (
    GAMMAS,
    METHODS,
    REWARDS,
    SINGLE,
    STOPS,
    TASKS,
    drawn,
    evaluated,
    figure,
    mean_figure,
    slug,
    training_rewards,
)
from benchmarks.comparison import smooth
from zoo import world

INCHES = 0.64
"""Of a picture of 64 pixels, at 100 dots an inch."""
QUERIES = 1920
"""Of a run of claim 9."""
AXES = {"reward": "image reward", "distance": "distance to real renders"}
DPOK_AND_SFT = {"base": "base", "SFT": "sft", "SFT, KL-O": "sft-kl-o", "DPOK": "dpok"}
WITH_KL_OR_NOT = {"base": "base", "without the KL": "dpok-without-kl", "DPOK": "dpok"}
WITH_VALUE_OR_NOT = {"with the value function": "dpok", "without": "dpok-without-value"}


def strips(rows: dict[str, list[np.ndarray]], titles: Sequence[str]) -> Figure:
    """Pictures uint8 (n, H, W, 3) in a row for each model and a block for each prompt.

    `rows` has by the model's label a block for each title.
    """
    blocks = next(iter(rows.values()))
    width, height = sum(map(len, blocks)) * INCHES + 1.2, len(rows) * INCHES + 0.4
    found = Figure(figsize=(width, height), layout="constrained")
    axes = found.subplots(len(rows), len(titles), squeeze=False)
    for (label, blocks), line in zip(rows.items(), axes):
        for axis, block in zip(line, blocks):
            axis.imshow(world.to_grid(block, len(block)))
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=9)
    return found


def methods_by_pictures(seeds: Sequence[int], count: int = 4) -> Figure:
    """The four prompts: of each method the first pictures of one seed's run."""
    rows = {}
    for label, method in DPOK_AND_SFT.items():
        runs = {prompt: f"{method}__{slug(prompt)}__{seeds[0]}" for prompt in SINGLE}
        rows[label] = [
            drawn(f"single__{slug(prompt)}", "base" if method == "base" else run)[prompt][:count]
            for prompt, run in runs.items()
        ]
    return strips(rows, [*SINGLE])


def quality_against_reward(methods: dict[str, str], seeds: Sequence[int]) -> Figure:
    """The four prompts: each run, by the labels of their methods."""
    found = Figure(figsize=(13, 3.2), layout="constrained")
    for axis, prompt in zip(found.subplots(1, len(SINGLE)), SINGLE):
        name = f"single__{slug(prompt)}"
        for label, method in methods.items():
            models = ["base"]
            if method != "base":
                models = [f"{method}__{slug(prompt)}__{seed}" for seed in seeds]
            points = [[figure(name, m, key, prompt) for m in models] for key in AXES]
            axis.plot(*points, "o", label=label)
        axis.set(xlabel=AXES["reward"], title=prompt)
    found.axes[0].set_ylabel(AXES["distance"])
    found.axes[0].legend()
    return found


def against_gamma(seeds: Sequence[int]) -> Figure:
    prompt = "A green colored rabbit"
    found = Figure(figsize=(9, 3.2), layout="constrained")
    for axis, key in zip(found.subplots(1, 2), AXES):
        for label in ("KL-O", "KL-D"):
            values = np.array(
                [
                    [figure("gamma", f"{label.lower()}-{g}__{s}", key, prompt) for s in seeds]
                    for g in GAMMAS
                ]
            )
            error = values.std(axis=1, ddof=1) / len(seeds) ** 0.5
            axis.errorbar(GAMMAS, values.mean(axis=1), error, fmt="o-", capsize=3, label=label)
        axis.axhline(figure("gamma", "base", key, prompt), color="gray", ls=":", label="base")
        axis.set(xlabel="gamma", ylabel=AXES[key])
    found.axes[0].legend()
    return found


def four_roses(seeds: Sequence[int]) -> Figure:
    models = {"base": "base"} | {f"DPOK, seed {seed}": f"dpok__{seed}" for seed in seeds}
    prompt = "Four roses"
    rows = {label: [drawn("roses", model)[prompt][:16]] for label, model in models.items()}
    return strips(rows, [prompt])


def value_function_curves(seeds: Sequence[int]) -> Figure:
    found = Figure(figsize=(6, 3.2), layout="constrained")
    axis = found.subplots()
    for color, (label, method) in enumerate(WITH_VALUE_OR_NOT.items()):
        for seed in seeds:
            rewards = smooth(training_rewards(f"many/{method}__{seed}"))
            style = {"color": f"C{color}", "alpha": 0.7}
            axis.plot(rewards, label=label if seed == seeds[0] else None, **style)
    axis.set(xlabel="iterations of 24 samples", ylabel="training reward (mean of five)")
    axis.legend()
    return found


def rewards_by_queries(seeds: Sequence[int]) -> Figure:
    found = Figure(figsize=(13, 3.6), layout="constrained")
    for axis, (reward, spec) in zip(found.subplots(1, len(REWARDS)), REWARDS.items()):
        for color, (method, label) in enumerate(METHODS.items()):
            for seed in seeds:
                rewards = training_rewards(f"queries/{method}__{reward}__{seed}")
                # A round of RWR has six times the samples of an iteration of DDPO.
                curve = smooth(rewards) if method.startswith("ddpo") else rewards
                queries = np.linspace(0, QUERIES, len(curve), endpoint=False)
                label_of = label if seed == seeds[0] else None
                axis.plot(queries, curve, color=f"C{color}", alpha=0.7, label=label_of)
        axis.set(xlabel="samples before", title=spec)
    found.axes[0].set_ylabel("reward in training")
    found.axes[0].legend()
    return found


def guidance_curves(seeds: Sequence[int]) -> Figure:
    found = Figure(figsize=(6, 3.2), layout="constrained")
    axis = found.subplots()
    for color, method in enumerate(("with", "without")):
        for seed in seeds:
            label = f"{method} guidance in training" if seed == seeds[0] else None
            rewards = training_rewards(f"cfg/{method}__{seed}")
            axis.plot(rewards, "o-", color=f"C{color}", alpha=0.7, label=label)
    axis.set(xlabel="after round", ylabel="reward of 192 samples", xticks=range(len(rewards)))
    axis.legend()
    return found


def many_prompts(seeds: Sequence[int]) -> Figure:
    prompts = [*evaluated("many")["base"]]
    models = {"base": "base", "DPOK": f"dpok__{seeds[0]}"}
    rows = {
        label: [np.concatenate([drawn("many", model)[prompt][:2] for prompt in prompts])]
        for label, model in models.items()
    }
    return strips(rows, ["two pictures of each prompt of prompts/zoo.txt"])


def unseen_prompts(seeds: Sequence[int], count: int = 4) -> Figure:
    rows = {"base": [], "trained on its kind": [], "trained on many": []}
    for prompt, unseen in SINGLE.items():
        name = f"unseen__{slug(prompt)}"
        kind = f"dpok__{slug(prompt)}__{seeds[0]}"
        rows["base"].append(drawn(name, "base")[unseen][:count])
        rows["trained on its kind"].append(drawn(name, kind)[unseen][:count])
        many = drawn("many_unseen", f"dpok__{seeds[0]}")
        rows["trained on many"].append(many[unseen][:count])
    return strips(rows, [*SINGLE.values()])


def judged_on_the_way(seeds: Sequence[int]) -> Figure:
    """Claim 11: from the base on, each run at its stops."""
    found = Figure(figsize=(10, 3.6), layout="constrained")
    panels = {
        "over": ("reward", "success", ("ddpo-image-reward", "dpok-with-kl", "dpok-without-kl")),
        "over_incompressibility": (
            REWARDS["incompressibility"],
            "empty",
            ("ddpo-incompressibility",),
        ),
    }
    for axis, (name, (reward, key, runs)) in zip(found.subplots(1, len(panels)), panels.items()):
        for color, (run, seed) in enumerate(itertools.product(runs, seeds)):
            models = ["base", *(f"{run}__{seed}__after_{stop}" for stop in STOPS[run])]
            points = [[mean_figure(name, m, of) for m in models] for of in (reward, key)]
            label = run if seed == seeds[0] else None
            axis.plot(*points, "o-", color=f"C{color // len(seeds)}", alpha=0.7, label=label)
        axis.set(xlabel=reward, ylabel={"empty": "share without a thing"}.get(key, key))
        axis.legend()
    return found


def by_task(names: dict[str, dict[str, tuple[str, str]]], seeds: Sequence[int]) -> Figure:
    """For each task the gains of runs over the base, a point a seed.

    `names` has by task, for each label, the evaluation and the run.
    """
    found = Figure(figsize=(4 * len(names), 3.2), layout="constrained")
    for axis, (task, points) in zip(found.subplots(1, len(names)), names.items()):
        for place, (name, run) in enumerate(points.values()):
            base = mean_figure(name, "base", TASKS[task])
            of_seeds = [mean_figure(name, f"{run}__{seed}", TASKS[task]) for seed in seeds]
            axis.plot([place] * len(seeds), np.array(of_seeds) - base, "o")
        axis.axhline(0, color="gray", ls=":")
        axis.set(xlim=(-0.5, len(points) - 0.5), title=task)
        axis.set_xticks(range(len(points)), points)
    found.axes[0].set_ylabel("gain over the base")
    return found


def single_and_joint(seeds: Sequence[int]) -> Figure:
    of = lambda task, run: (f"joint_{task}", run)
    return by_task({t: {f"for {r}": of(t, r) for r in (*TASKS, "joint")} for t in TASKS}, seeds)


def held_out_and_trained(seeds: Sequence[int]) -> Figure:
    labels = {"trained on": "trained", "held out": "joint"}
    names = {
        task: {label: (f"{folder}_{task}", task) for label, folder in labels.items()}
        for task in ("composition", "portraits")
    }
    return by_task(names, seeds)


PICTURES = {
    "1": methods_by_pictures,
    "2": partial(quality_against_reward, DPOK_AND_SFT),
    "3": partial(quality_against_reward, WITH_KL_OR_NOT),
    "4": against_gamma,
    "5": four_roses,
    "6": value_function_curves,
    "7": many_prompts,
    "8": unseen_prompts,
    "9": rewards_by_queries,
    "10": guidance_curves,
    "11": judged_on_the_way,
    "13": single_and_joint,
    "14": held_out_and_trained,
}
"""By the number of the claim."""
