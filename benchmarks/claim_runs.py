"""What the runs of benchmarks/claims/ and their evaluations came to.

`collect` takes their figures from runs/ into benchmarks/results/claims_figures.json, beside those
of other runs: a claim is judged from what is there, wherever and whenever it was run.
"""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from benchmarks.report import metrics_of
from benchmarks.run import reached_its_end
from benchmarks.zoo_eval import ROOT, weights_digest
from common.lora import FILE_NAME
from evaluation.digests import digest_of, digest_of_model
from evaluation.judge import ZooJudge, load_judge
from zoo import judge as judging

RUNS = ROOT / "runs"
EVALUATIONS = RUNS / "claims-evaluations"
FIGURES = ROOT / "benchmarks/results/claims_figures.json"
REWARD = "image_reward:zoo/image_reward"
SINGLE = {
    "A green colored rabbit": "A green colored cat",
    "A cat and a dog": "A cat and a cup",
    "Four wolves in the park": "Four birds in the park",
    "A dog on the moon": "A lion on the moon",
}
"""DPOK's four prompts, each with the one of its kind that was not trained on."""
GAMMAS = ("0.1", "1", "2", "5")
METHODS = {"ddpo-is": "IS", "ddpo-sf": "SF", "rwr": "RWR", "rwr-sparse": "sparse RWR"}
"""Of claim 9, by the names of their runs."""
REWARDS = {
    "compressibility": "jpeg_compressibility",
    "incompressibility": "jpeg_incompressibility",
    "image-reward": REWARD,
}
TASKS = {
    "preference": REWARD,
    "composition": "object_detection:zoo/detector",
    "portraits": "statistical_parity:zoo/skin_tone",
}
"""Of claims 13 and 14, by the names of their runs."""
STOPS = {"ddpo-image-reward": (45, 90, 135, 180), "ddpo-incompressibility": (45, 90, 135, 180)}
STOPS |= {"dpok-with-kl": (40, 80, 120, 160), "dpok-without-kl": (40, 80, 120, 160)}
"""Iterations after which the runs of claim 11 are judged."""
FEWEST_RIGHT = 8
"""Right pictures below which a set has no distance of its own."""
TRAINED = ("many", "cfg", "queries", "over", "joint")
"""Folders of runs of which the rewards in training are kept."""


def slug(prompt: str) -> str:
    return prompt.lower().replace(" ", "-")


@cache
def stored() -> dict:
    """What was collected, for the zoo's weights of today."""
    found = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    if found.get("weights") != weights_digest():
        found = {part: {} for part in ("evaluations", "right_distances", "training")}
    return found | {"weights": weights_digest()}


def collect() -> None:
    """Add what is in runs/ to the stored figures; a run that was there is replaced."""
    weights = digest_of_model(str(ROOT / "zoo/sd"))
    for file in sorted(EVALUATIONS.glob("*/results.json")):
        results, name = json.loads(file.read_text()), file.parent.name
        if results["models"]["base"]["sha256"] != weights:
            print(f"{name} is left out: it is of other weights of the zoo")
            continue
        try:
            collect_evaluation(name, results)
        except NotHereError as error:
            print(f"{name} is left out: {error}")
    for folder in TRAINED:
        for file in sorted((RUNS / f"claims-{folder}").glob("*/metrics.jsonl")):
            if reached_its_end(file.parent):
                run = f"{folder}/{file.parent.name}"
                stored()["training"][run] = rewards_of(file.parent)
    FIGURES.write_text(json.dumps(stored(), indent=1) + "\n")


def collect_evaluation(name: str, results: dict) -> None:
    """Raises NotHereError where pictures are asked for that are elsewhere."""
    count = results["settings"]["images_per_prompt"]
    found = {
        model: {prompt: kept(of_prompt, count) for prompt, of_prompt in of["prompts"].items()}
        for model, of in results["models"].items()
        if is_of_todays_weights(name, model, of) and has_its_runs_name(name, model, of)
    }
    if name == "over_incompressibility":
        for model, of_prompts in found.items():
            for prompt, pictures in drawn(name, model, [*of_prompts]).items():
                of_prompts[prompt]["empty"] = share_with(None, pictures)
    of_models, distances = stored()["evaluations"], stored()["right_distances"]
    gone = results["models"].keys() - found.keys()
    before = {m: of for m, of in of_models.get(name, {}).items() if m not in gone}
    of_models[name] = before | found
    if name.startswith("single__"):
        # Of all models of claim 2 together. The pictures of some that are stored may not be here:
        # what was found of those stays, as long as none of them has changed.
        compared = {model for model in of_models[name] if in_claim_2(model)}
        if any(m in found and m in before and differ(before[m], found[m]) for m in compared):
            distances.pop(name, None)
        if compared <= {*found} and {*distances.get(name, ())} != compared:
            distances[name] = right_distances(name)


def is_of_todays_weights(name: str, model: str, of: dict) -> bool:
    """Whether a model was judged with the LoRA that is in its folder; true if there is none now."""
    file = of["path"] and RUNS.parent / of["path"] / FILE_NAME
    if not file or not file.exists() or digest_of(file) == of["sha256"]:
        return True
    print(f"{name}/{model} is left out: its run was made again; remove claims-evaluations/{name}")
    return False


def has_its_runs_name(name: str, model: str, of: dict) -> bool:
    """Whether a model is named by its run's folder: that of one run alone, by its stops, is not."""
    if not of["path"]:
        return True
    _, run, *stop = Path(of["path"]).relative_to("runs").parts
    if "__".join([run, *stop]) == model:
        return True
    print(f"{name}/{model} is left out: it has not the name of {run}; judge two runs together")
    return False


def differ(one: dict[str, dict], other: dict[str, dict]) -> bool:
    """Whether a model's figures do, by more than another machine's rounding."""
    numbers = [
        [value for of in figures.values() for value in (of["success"], of["distance"])]
        + [of["rewards"][spec]["mean"] for of in figures.values() for spec in sorted(of["rewards"])]
        for figures in (one, other)
    ]
    return len(numbers[0]) != len(numbers[1]) or not np.allclose(*numbers, rtol=1e-3)


def kept(of_prompt: dict, count: int) -> dict:
    """Of the figures of a model's `count` pictures of a prompt."""
    of_rewards = {
        # The reward of a set, which parity is, has no deviation.
        spec: {"mean": of["mean"], "std": (of["standard_error"] or 0) * count**0.5}
        for spec, of in of_prompt["rewards"].items()
    }
    success = of_prompt["success"] and of_prompt["success"]["mean"]  # None where it cannot judge
    return {
        "rewards": of_rewards,
        "success": success,
        "distance": of_prompt["image_quality"],
        "kl": of_prompt["kl"]["mean"],
    }


def rewards_of(folder: Path) -> list[float]:
    """The mean reward of each iteration of a run."""
    return [line["reward/mean"] for line in metrics_of(folder)]


def evaluated(name: str) -> dict[str, dict]:
    """The models of an evaluation, by the names of their runs' folders, each by prompt."""
    return stored()["evaluations"][name]


def figure(name: str, model: str, key: str, prompt: str) -> float:
    """Of a model's pictures of a prompt: success, kl, distance to real renders, "empty" shares.

    Else key is a reward; "reward" stands for image reward.
    """
    of_prompt = evaluated(name)[model][prompt]
    if key in of_prompt:
        return of_prompt[key]
    return of_prompt["rewards"][REWARD if key == "reward" else key]["mean"]


def mean_figure(name: str, model: str, key: str) -> float:
    """The mean of a figure over the prompts of an evaluation."""
    return float(np.mean([figure(name, model, key, prompt) for prompt in evaluated(name)["base"]]))


def in_standard_deviations(name: str, model: str, spec: str) -> np.ndarray:
    """Reward by prompt, in standard deviations of the base's pictures of one prompt."""
    stds = [of["rewards"][spec]["std"] for of in evaluated(name)["base"].values()]
    means = [of["rewards"][spec]["mean"] for of in evaluated(name)[model].values()]
    return np.array(means) / np.mean(np.square(stds)) ** 0.5


class NotHereError(Exception):
    """Pictures that were drawn elsewhere, of which the figures alone are stored."""


def drawn(name: str, model: str, prompts: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """A model's pictures in an evaluation, uint8 (n, H, W, 3), by prompt. Raises NotHereError.

    `prompts` are the evaluation's; those that are stored unless they are given.
    """
    shards = sorted((EVALUATIONS / name / "samples" / model).glob("*.npz"))
    if not shards:
        raise NotHereError(f"the pictures of {name}/{model} are not here")
    images = np.concatenate([np.load(shard)["images"] for shard in shards])
    prompts = prompts or [*evaluated(name)[model]]
    return dict(zip(prompts, np.split(images, len(prompts))))


@cache
def judge() -> ZooJudge:
    return load_judge(str(ROOT / "zoo/sd"))


def as_floats(pictures: np.ndarray) -> torch.Tensor:
    """(n, 3, H, W) in [0, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


def share_with(thing: str | None, pictures: np.ndarray) -> float:
    """Of pictures the share in which the judge sees the thing; None is for no thing at all.

    In a portrait there is no thing; the judge sees portraits in noise, too.
    """
    scenes = judging.read(judge().network, as_floats(pictures))
    kinds = [{group.kind for group in scene.groups} or {None} for scene in scenes]
    return float(np.mean([thing in seen for seen in kinds]))


def in_claim_2(model: str) -> bool:
    """Whether it compares this model's right pictures with others'."""
    return model.partition("__")[0] in ("base", "dpok", "sft")


def right_distances(name: str) -> dict[str, float | None]:
    """By model the distance of right pictures alone, equally many of each: the fewest that one has.

    Of an evaluation of one prompt and the models of claim 2; None where one of them has less than
    `FEWEST_RIGHT`.
    """
    right = {}
    for model in filter(in_claim_2, evaluated(name)):
        ((prompt, pictures),) = drawn(name, model).items()
        images = as_floats(pictures)
        right[model] = images[torch.from_numpy(judge().success(images, prompt)[0]) > 0]
    fewest = min(map(len, right.values()))
    if fewest < FEWEST_RIGHT:
        return dict.fromkeys(right)
    return {model: judge().image_quality(images[:fewest]) for model, images in right.items()}


def training_rewards(run: str) -> np.ndarray:
    """The mean reward of each iteration of runs/claims-RUN."""
    return np.array(stored()["training"][run])


def core_hours() -> dict[str, float]:
    """Of each run and evaluation that is here: its time on the cores it had."""
    return {
        f"{file.parent.parent.name}/{file.parent.name}": hours_of(file)
        for file in sorted(RUNS.glob("claims-*/*/wall_time.json"))
    }


def hours_of(file: Path) -> float:
    """Seconds of all its commands, times the cores that each had, in hours."""
    wall_time = json.loads(file.read_text())
    cores = max(1, wall_time["cores"] // wall_time["jobs_side_by_side"])
    return wall_time["seconds"] * cores / 3600
