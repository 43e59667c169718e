"""The folder of an evaluation: what it is of, and its samples, shard by shard."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from evaluation.models import Model
from evaluation.settings import Settings
from harness.args import fail
from harness.folder import run_name
from harness.prompts import tag_of


def describe(settings: Settings, models: list[Model]) -> dict:
    """What evaluation.json holds: the settings, and a digest of the weights by the model's name."""
    return {
        "settings": asdict(settings),
        "models": {model.name: model.digest for model in models},
    }


def read_description(folder: Path) -> dict | None:
    """`describe` of the evaluation in `folder`, with all models that were ever in it, or None."""
    file = folder / "evaluation.json"
    return json.loads(file.read_text()) if file.exists() else None


def write_description(folder: Path, settings: Settings, models: list[Model]) -> None:
    """Make the folder, or add the models to those that are in it already."""
    folder.mkdir(parents=True, exist_ok=True)
    there, new = read_description(folder), describe(settings, models)
    new["models"] = (there["models"] if there else {}) | new["models"]
    write_whole(folder / "evaluation.json", json.dumps(new, indent=2) + "\n")


def default_folder(script: str, args, settings: Settings, models: list[Model]) -> Path:
    """runs/<script>__TAG__SEED__DIGEST, the digest of all that the figures depend on.

    `args` has prompt, prompts_file, seed and rewards.
    """
    name = run_name(script, tag_of(args), args.seed).rpartition("__")[0]  # without the time
    everything = json.dumps([describe(settings, models), sorted(args.rewards)]).encode()
    return Path("runs") / f"{name}__{hashlib.sha256(everything).hexdigest()[:8]}"


def check_folder(folder: Path, settings: Settings, models: list[Model]) -> None:
    """Refuse a folder of something else, or of pictures that these settings would not draw.

    More models than are in it may be added, and more rewards.
    """
    there, new = read_description(folder), describe(settings, models)
    if there is None:
        if folder.is_dir() and any(folder.iterdir()):
            fail(
                f"--output-dir {folder} holds something else than an evaluation; "
                "choose another folder"
            )
        return
    differ = [key for key, value in new["settings"].items() if there["settings"].get(key) != value]
    if differ:
        names = ["prompts-file" if key == "prompts" else key.replace("_", "-") for key in differ]
        fail(
            f"--output-dir {folder} holds an evaluation with other "
            f"{', '.join(f'--{name}' for name in names)}; "
            "choose another folder or the same settings"
        )
    for name, digest in new["models"].items():
        if there["models"].get(name, digest) != digest:
            fail(
                f"--lora: --output-dir {folder} has pictures of other weights named {name}; "
                "choose another folder"
            )


def shard_file(folder: Path, model: str, shard: int) -> Path:
    """Where the samples of a shard are; `model` is its name."""
    return folder / "samples" / model / f"{shard:05d}.npz"


def read_shard(folder: Path, model: str, shard: int) -> dict[str, np.ndarray]:
    """Samples of whole prompts, prompt after prompt; {} when they have not been drawn.

    "images" uint8 (n, H, W, 3), "kl" (n,) in nats, and a reward's scores (n,) under its spec.
    """
    file = shard_file(folder, model, shard)
    if not file.exists():
        return {}
    with np.load(file) as stored:
        return dict(stored)


def write_shard(folder: Path, model: str, shard: int, samples: dict[str, np.ndarray]) -> None:
    """What `read_shard` gives."""
    file = shard_file(folder, model, shard)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, samples)


def write_whole(path: Path, content: str | dict[str, np.ndarray]) -> None:
    """Text, or arrays as .npz: under another name until it is all there."""
    partial = path.with_name(path.name + ".partial")
    if isinstance(content, str):
        partial.write_text(content)
    else:
        with open(partial, "wb") as file:
            np.savez(file, **content)
    partial.replace(path)
