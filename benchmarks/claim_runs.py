"""Where the runs of benchmarks/claims/ and their evaluations are, and what they came to."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import metrics_of
from benchmarks.zoo_eval import ROOT
from evaluation.judge import load_judge
from zoo import judge as judging

RUNS = ROOT / "runs"
EVALUATIONS = RUNS / "claims-evaluations"
REWARD = "image_reward:zoo/image_reward"
SINGLE = {
    "A green colored rabbit": "A green colored cat",
    "A cat and a dog": "A cat and a cup",
    "Four wolves in the park": "Four birds in the park",
    "A dog on the moon": "A lion on the moon",
}
"""DPOK's four prompts, each with the one of its kind that was not trained on."""
GAMMAS = ("0.1", "1", "2", "5")
FEWEST_RIGHT = 8
"""Right pictures below which a set has no distance of its own."""


def slug(prompt: str) -> str:
    return prompt.lower().replace(" ", "-")


@cache
def evaluated(name: str) -> dict:
    """The models of an evaluation, by the names of their runs' folders."""
    return json.loads((EVALUATIONS / name / "results.json").read_text())["models"]


def figure(name: str, model: str, key: str, prompt: str) -> float:
    """Reward, success or distance to real renders of a model's pictures of a prompt."""
    of_prompt = evaluated(name)[model]["prompts"][prompt]
    if key == "distance":
        return of_prompt["image_quality"]
    if key == "success":
        return of_prompt["success"]["mean"]
    return of_prompt["rewards"][REWARD]["mean"]


def drawn(name: str, model: str) -> dict[str, np.ndarray]:
    """A model's pictures in an evaluation, uint8 (n, H, W, 3), by prompt."""
    shards = sorted((EVALUATIONS / name / "samples" / model).glob("*.npz"))
    images = np.concatenate([np.load(shard)["images"] for shard in shards])
    prompts = evaluated(name)[model]["prompts"]
    return dict(zip(prompts, np.split(images, len(prompts))))


def share_with(thing: str, name: str, model: str, prompt: str) -> float:
    """Of a model's pictures of a prompt, the share in which the judge sees the thing."""
    images = torch.from_numpy(drawn(name, model)[prompt]).permute(0, 3, 1, 2).float() / 255
    scenes = judging.read(load_judge(str(ROOT / "zoo/sd")).network, images)
    return float(np.mean([any(group.kind == thing for group in of.groups) for of in scenes]))


@cache
def right_distances(name: str) -> dict[str, float] | None:
    """By model the distance of right pictures alone, equally many of each: the fewest that one has.

    Of an evaluation of one prompt; None where a model has less than `FEWEST_RIGHT`.
    """
    judge, right = load_judge(str(ROOT / "zoo/sd")), {}
    for model in evaluated(name):
        ((prompt, stored),) = drawn(name, model).items()
        images = torch.from_numpy(stored).permute(0, 3, 1, 2).float() / 255
        right[model] = images[torch.from_numpy(judge.success(images, prompt)[0]) > 0]
    fewest = min(map(len, right.values()))
    if fewest < FEWEST_RIGHT:
        return None
    return {model: judge.image_quality(images[:fewest]) for model, images in right.items()}


def training_rewards(run: str) -> np.ndarray:
    """The mean reward of each iteration of runs/claims-RUN."""
    return np.array([line["reward/mean"] for line in metrics_of(RUNS / f"claims-{run}")])


def core_hours() -> dict[str, float]:
    """Of each folder of runs and evaluations that is here: their time on the cores they had."""
    return {folder.name: hours_of(folder) for folder in sorted(RUNS.glob("claims-*"))}


def hours_of(folder: Path) -> float:
    """Seconds of all finished commands, times the cores of each, in hours."""
    total = 0.0
    for file in folder.glob("*/wall_time.json"):
        wall_time = json.loads(file.read_text())
        cores = max(1, wall_time["cores"] // wall_time["jobs_side_by_side"])
        total += wall_time["seconds"] * cores / 3600
    return total
