"""The folder of an evaluation: what it is of, and its samples, shard by shard."""

import hashlib
import json
import os
import zipfile
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import NotRequired, TypedDict, get_type_hints

import numpy as np

from evaluation.models import BASE, NAME, Model
from evaluation.places import check_place, write_whole
from evaluation.settings import Settings
from harness.args import fail
from harness.folder import run_name
from harness.project import portable
from harness.prompts import tag_of
from harness.stored import StoredError, is_text, read_stored

StoredSettings = TypedDict("StoredSettings", get_type_hints(Settings))


class Description(TypedDict):
    """What evaluation.json holds."""

    settings: StoredSettings
    pretrained: NotRequired[str]
    """Digest of all that --model draws with; earlier versions did not write it."""
    models: dict[str, str]
    """Digests of the weights, by the model's name."""


def describe(settings: Settings, models: list[Model]) -> Description:
    """The settings and the digests of an evaluation of `models`, of which the first is the base."""
    return {
        "settings": portable(asdict(settings)),
        "pretrained": models[0].digest,
        "models": {model.name: model.digest for model in models},
    }


def read_description(folder: Path) -> Description | None:
    """`describe` of the evaluation in `folder`, with all models that were ever in it, or None.

    Raises StoredError where it is not as it was written.
    """
    file = folder / "evaluation.json"
    if not os.path.lexists(file):
        return None
    remedy = "put a copy back, or evaluate anew in another folder"
    there = read_stored(file, Description, remedy)
    numbers = {key: value for key, value in there["settings"].items() if type(value) is int}
    prompts = there["settings"]["prompts"]
    faults = [
        f"{key} {str(value)[:20]}"
        for key, value in numbers.items()
        if key != "seed" and not 0 < value < 1 << 63
    ]
    faults += [f"the model {name[:50]!a}" for name in there["models"] if not NAME.fullmatch(name)]
    faults += [f"the prompt {prompt[:50]!a}" for prompt in prompts if not is_text(prompt)]
    if not prompts or len(set(prompts)) < len(prompts):
        faults.append("no prompts, or one twice")
    if faults:
        raise StoredError(f"{file} is not as it was written (it has {faults[0]}); {remedy}")
    return there


def write_description(
    folder: Path, settings: Settings, models: list[Model], drawn: list[Model]
) -> None:
    """Make the folder, or add the models `drawn` to those that are in it already."""
    there, new = read_description(folder), describe(settings, models)
    names = {model.name: model.digest for model in drawn}
    new["models"] = (there["models"] if there else {}) | names
    write_whole(folder / "evaluation.json", json.dumps(new, indent=2) + "\n")


def default_folder(script: str, args, settings: Settings, models: list[Model]) -> Path:
    """runs/<script>__TAG__SEED__DIGEST, the digest of all that the pictures depend on.

    The rewards' specs are in it too, and not what is behind them: where that has changed, the same
    pictures are scored anew.

    `args` has prompt, prompts_file, seed and rewards.
    """
    name = run_name(script, tag_of(args), args.seed).rpartition("__")[0]  # without the time
    everything = json.dumps([describe(settings, models), sorted(portable(args.rewards))]).encode()
    return Path("runs") / f"{name}__{hashlib.sha256(everything).hexdigest()[:8]}"


def check_folder(folder: Path, settings: Settings, models: list[Model]) -> None:
    """Refuse a folder of something else, or of pictures that these settings would not draw.

    More models than are in it may be added, and more rewards.
    """
    check_place("--output-dir", folder)
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
        names = [key if key == "prompts" else f"--{key.replace('_', '-')}" for key in differ]
        fail(
            f"--output-dir {folder} holds an evaluation with other {', '.join(names)}; "
            "choose another folder or the same settings"
        )
    if there.get("pretrained", new["pretrained"]) != new["pretrained"]:
        fail(
            f"--model: --output-dir {folder} has pictures of other weights named "
            f"{settings.model}; choose another folder"
        )
    for name, digest in new["models"].items():
        if there["models"].get(name, digest) != digest:
            flag = "--model" if name == BASE else "--lora"
            fail(
                f"{flag}: --output-dir {folder} has pictures of other weights named {name}; "
                "choose another folder"
            )


def shard_file(folder: Path, model: str, shard: int) -> Path:
    """Where the samples of a shard are; `model` is its name."""
    return folder / "samples" / model / f"{shard:05d}.npz"


def read_shard(folder: Path, model: str, shard: int, pictures: int) -> dict[str, np.ndarray]:
    """Samples of whole prompts, prompt after prompt; {} when they have not been drawn.

    "images" uint8 (n, H, W, 3), "kl" (n,) in nats, and a reward's scores (n,) under its
    `score_keys`; n is `pictures`. Raises StoredError where it is not as it was written.
    """
    file = shard_file(folder, model, shard)
    if not os.path.lexists(file):
        return {}
    try:
        stored = read_arrays(file)
        images = stored.get("images")
        if images is None or images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError("it has no pictures")
        if len(images) != pictures or images.shape[3] != 3 or images.size == 0:
            raise ValueError(f"its pictures have the shape {images.shape}")
        for key, values in stored.items():
            if key == "images":
                continue
            if values.dtype.kind != "f" or values.shape != (pictures,):
                raise ValueError(f"{key} has the shape {values.shape} of {values.dtype}")
            if not np.isfinite(values).all():
                raise ValueError(f"{key} is not finite")
    except Exception as error:  # a damaged archive raises many kinds
        fault = (" ".join(str(error).split()) or type(error).__name__)[:200]
        remedy = "delete it, and the command of evaluate.py that drew it draws it again"
        raise StoredError(f"{file} is not as it was written ({fault}); {remedy}") from None
    return stored


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz as `write_whole` writes it; raises many kinds where it is damaged.

    What the archive only claims to hold takes no memory: nothing is compressed, and no array is
    larger than the file.
    """
    if not path.is_file():
        raise ValueError("it is no file")
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("it is compressed")
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                if version != (1, 0):
                    raise ValueError("its arrays have another format")
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            if dtype.hasobject or prod(shape) * dtype.itemsize > path.stat().st_size:
                raise ValueError(f"{entry.filename} has the shape {shape} of {dtype}")
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def write_shard(folder: Path, model: str, shard: int, samples: dict[str, np.ndarray]) -> None:
    """What `read_shard` gives."""
    write_whole(shard_file(folder, model, shard), samples)
