"""The figures of an evaluation, from its stored samples, and the files that show them."""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from evaluation.folder import describe, read_shard
from evaluation.judge import ZooJudge, load_judge
from evaluation.models import Model, was_trained_on
from evaluation.places import to_json, write_whole
from evaluation.settings import Settings, shards_of
from evaluation.sheet import comparison
from evaluation.statistics import compare, diversity, mean_and_error
from evaluation.tables import markdown_table
from harness.project import portable


class Measured(NamedTuple):
    """What is known of a model's samples, P prompts with N pictures each."""

    scores: dict[str, np.ndarray]
    """Figures of each picture, (P, N): by a reward's spec, "kl" in nats, "success" on the zoo."""
    of_prompts: list[dict[str, float | None]]
    """Figures of each prompt's pictures together."""
    of_all: dict[str, float | None]
    """Figures of all pictures together; for the others that of_prompts has, the mean stands."""
    shown: list[np.ndarray]
    """Pictures for the sheet, prompt after prompt, uint8 (columns, H, W, 3)."""


def report(
    settings: Settings,
    models: list[Model],
    rewards: dict[str, str],
    folder: Path,
    shown_prompts: int,
    shown_images: int,
) -> str:
    """Write results.json, table.md and comparison.png; returns the table of all prompts together.

    Of the samples in `folder`, which must be complete for the models and for `rewards`,
    `score_keys` by spec; the first model is the base. The sheet has the first `shown_prompts`
    prompts with `shown_images` pictures each. For rank 0.
    """
    judge, base, results, shown = load_judge(settings.model), {}, {}, {}
    specs = tuple(rewards)
    for model in models:
        measured = measure(settings, model, rewards, folder, judge, shown_prompts, shown_images)
        results[model.name] = {
            "path": str(model.path) if model.path else None,
            "sha256": model.digest or None,
            "trained_on": trained_on(model, specs),
            **figures(settings, measured, base, specs),
        }
        shown |= {(model.name, j): images for j, images in enumerate(measured.shown)}
        if model.path is None:
            base = measured.scores

    everything = describe(settings, models)["settings"] | {"rewards": specs}
    everything = {"settings": everything, "models": results}
    write_whole(folder / "results.json", to_json(portable(everything)))
    sheet, file = comparison(shown, settings.prompts, list(results)), io.BytesIO()
    sheet.save(file, "PNG")
    write_whole(folder / "comparison.png", file.getvalue())
    in_all = [(None, name, found["all"]) for name, found in results.items()]
    in_all = markdown_table(in_all, specs, models)
    by_prompt = [
        (prompt, name, found["prompts"][prompt])
        for prompt in settings.prompts
        for name, found in results.items()
    ]
    by_prompt = markdown_table(by_prompt, specs, models)
    text = f"{head(settings)}\n## In all\n\n{in_all}\n## Prompt by prompt\n\n{by_prompt}"
    write_whole(folder / "table.md", portable(text))
    return portable(in_all)


def measure(
    settings: Settings,
    model: Model,
    rewards: dict[str, str],
    folder: Path,
    judge: ZooJudge | None,
    shown_prompts: int,
    shown_images: int,
) -> Measured:
    """Read a model's samples, and measure the pictures."""
    scores, of_prompts, features, shown = {}, [], [], []
    stored_as = {"kl": "kl"} | rewards
    for number, shard in enumerate(shards_of(settings)):
        pictures = len(shard) * settings.images_per_prompt
        stored = read_shard(folder, model.name, number, pictures)
        for key, name in stored_as.items():
            if name in stored:
                scores.setdefault(key, []).append(stored[name].reshape(len(shard), -1))
        for j, images in zip(shard.tolist(), np.split(stored["images"], len(shard))):
            floats = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
            of_prompts.append({"diversity": diversity(floats.flatten(1))})
            if judge:
                own = judge.features(floats)
                first = settings.images_per_prompt * len(features)
                features.append((own, judge.renders(floats, first)))
                of_prompts[-1]["diversity_judge"] = diversity(own)
                of_prompts[-1]["image_quality"] = judge.distance(*features[-1])
                success = judge.success(floats, settings.prompts[j])
                scores.setdefault("success", []).append(success)
            if j < shown_prompts:
                shown.append(images[:shown_images])
    scores = {key: np.concatenate(parts) for key, parts in scores.items()}
    of_all = {}
    if judge:
        of_all["image_quality"] = judge.distance(*map(torch.cat, zip(*features)))
    return Measured(scores, of_prompts, of_all, shown)


def figures(
    settings: Settings,
    measured: Measured,
    base: dict[str, np.ndarray],
    specs: tuple[str, ...],
) -> dict:
    """A model's part of results.json: "all" prompts together, and each of the "prompts".

    `base` has the scores of the base, {} for the base itself.
    """

    def of_rows(rows: slice) -> dict:
        own = {key: values[rows] for key, values in measured.scores.items()}
        other = {key: values[rows] for key, values in base.items()}
        rewards = {
            spec: compare(own[spec], other.get(spec), of_a_set="statistical_parity" in spec)
            for spec in specs
        }
        kl = None if settings.eta == 0 else 0.0, None
        if "kl" in own:
            kl = mean_and_error(own["kl"])
        found = {"rewards": rewards, "kl": dict(zip(("mean", "standard_error"), kl))}
        if "success" in own:
            known = ~np.isnan(own["success"]).any(axis=1)  # prompts that the judge can read
            pair = [of["success"][known] if of else None for of in (own, other)]
            found["success"] = compare(*pair) if known.any() else None
        return found

    in_all = of_rows(slice(None))
    for key in measured.of_prompts[0]:
        known = [of[key] for of in measured.of_prompts if of[key] is not None]
        in_all[key] = float(np.mean(known)) if known else None
    by_prompt = {
        prompt: of_rows(slice(j, j + 1)) | measured.of_prompts[j]
        for j, prompt in enumerate(settings.prompts)
    }
    return {"all": in_all | measured.of_all, "prompts": by_prompt}


def trained_on(model: Model, specs: tuple[str, ...]) -> dict[str, bool | None] | None:
    """By reward whether the model was trained on it, None if not known; None for the base."""
    return {spec: was_trained_on(model, spec) for spec in specs} if model.path else None


def head(settings: Settings) -> str:
    """The title of table.md, and what its figures are of."""
    prompts, N, T = len(settings.prompts), settings.images_per_prompt, settings.num_inference_steps
    return (
        f"# {settings.model} and what was made of it\n\n"
        f"{prompts} prompts with {N} pictures each, {T} steps, "
        f"guidance {settings.guidance_scale:g}, eta {settings.eta:g}, seed {settings.seed}; "
        "± is a standard error. docs/evaluate.md explains the columns.\n"
    )
