"""The models that are compared: the pretrained one and those that were made of it."""

import copy
import hashlib
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from common.lora import FILE_NAME, add_lora, load_lora, lora_rank
from common.rewards import parse_sum
from harness.args import fail

BASE = "base"
"""The pretrained model's name among the models."""


class Model(NamedTuple):
    """One of the models to compare."""

    name: str
    path: Path | None
    """What --lora says; None is the base."""
    digest: str
    """Of its weights; empty for a base from the hub."""
    trained_on: list[str] | None
    """The rewards that it was trained on, by its run's args.json; None where that is not known."""


def weights_of(path: Path) -> Path:
    """The LoRA's safetensors file, or the folder of the UNet that --lora-rank 0 has left."""
    if path.is_file():
        return path
    if not path.is_dir():
        fail(f"--lora {path}: there is no such file or folder; give the folder of a run")
    for place in (path / FILE_NAME, path / "unet"):
        if place.is_file() or (place / "config.json").is_file():
            return place
    fail(
        f"--lora {path} has neither {FILE_NAME} nor unet/ in it; "
        "give the folder of a run that has saved its weights"
    )


def read_models(args) -> list[Model]:
    """The base and what `args.lora` has, each with a name for files and tables.

    `args` also has the flags model, num_inference_steps, guidance_scale and eta; a run that was
    trained with others is warned of.
    """
    places = [weights_of(path) for path in args.lora]
    for i, place in enumerate(places):
        if place.resolve() in [other.resolve() for other in places[:i]]:
            fail(f"--lora {args.lora[i]} is given twice; name each model once")
    local = Path(args.model) / "unet"
    models = [Model(BASE, None, digest_of(local) if local.is_dir() else "", [])]
    for name, path, place in zip(names_of(places), args.lora, places):
        run = read_run_args(place.parent) if place.name in (FILE_NAME, "unet") else {}
        specs = [shlex.split(task)[0] for task in run.get("tasks", [])]
        specs += [run["reward"]] if "reward" in run else []
        models.append(Model(name, path, digest_of(place), specs or None))
        keys = ("model", "num_inference_steps", "guidance_scale", "eta")
        keys = [key for key in keys if key in run]
        differ = [f"--{k.replace('_', '-')} {run[k]}" for k in keys if run[k] != getattr(args, k)]
        if differ and int(os.environ.get("RANK", 0)) == 0:
            flags = ", ".join(differ)
            warning = f"warning: {name} was trained with {flags}, and is evaluated otherwise"
            print(warning, file=sys.stderr)
    return models


def names_of(places: list[Path]) -> list[str]:
    """As much of each path's end as it takes to tell them apart, and from the base."""
    parts = [Path(os.path.abspath(place)).parts for place in places]  # a link keeps its own name
    parts = [whole[:-1] if whole[-1] in (FILE_NAME, "unet") else whole for whole in parts]
    for length in range(1, 100):
        ends = ["__".join(whole[-length:]).removesuffix(".safetensors") for whole in parts]
        names = [re.sub(r"[^\w.=+-]+", "-", end) for end in ends]
        if len({BASE, *names}) == len(names) + 1:
            break
    return names


def digest_of(place: Path) -> str:
    """SHA-256 of a file of weights, or of those of a folder."""
    digest = hashlib.sha256()
    for file in [place] if place.is_file() else sorted(place.glob("*.safetensors")):
        with open(file, "rb") as opened:
            while block := opened.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def read_run_args(folder: Path) -> dict:
    """args.json of a run, {} where there is none; a checkpoint's is in the folder above."""
    folders = [folder, folder.parent] if folder.name == "checkpoint" else [folder]
    for file in [place / "args.json" for place in folders]:
        if file.is_file():
            try:
                run = json.loads(file.read_text())
            except ValueError:
                return {}
            return run if isinstance(run, dict) else {}
    return {}


def reward_terms(spec: str) -> set[str]:
    """The rewards that a sum is made of, local paths absolute, so that two spellings compare."""

    def absolute(part: str) -> str:
        return str(Path(part).resolve()) if "/" in part and Path(part).exists() else part

    terms = [term.partition("?") for _, term in parse_sum(spec)]
    return {
        ":".join(map(absolute, source.split(":"))) + mark + options
        for source, mark, options in terms
    }


def was_trained_on(model: Model, spec: str) -> bool | None:
    """Whether the reward, or a term of it, was trained on; None where that is not known."""
    if model.trained_on is None:
        return None
    return any(reward_terms(spec) & reward_terms(trained) for trained in model.trained_on)


def finetuned(base: torch.nn.Module, path: Path) -> torch.nn.Module:
    """The UNet that a run has made of `base`: with its LoRA, on shared weights, or saved whole.

    Raises ValueError when it is of another model.
    """
    place = weights_of(path)
    if place.is_dir():
        unet = type(base).from_pretrained(place)
        unet = unet.to(base.device, base.dtype, memory_format=torch.channels_last)
        own, needed = (
            {key: value.shape for key, value in network.state_dict().items()}
            for network in (unet, base)
        )
        if own != needed:
            raise ValueError("the UNet in it is of another model")
        return unet.eval().requires_grad_(False)
    # The modules are copied, not their weights.
    unet = copy.deepcopy(base, {id(weight): weight for weight in base.parameters()})
    add_lora(unet, lora_rank(place))
    load_lora(unet, place)
    return unet.eval().requires_grad_(False)
