"""The models that are compared: the pretrained one and those that were made of it."""

import copy
import hashlib
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple, TypedDict

import torch

from common.lora import FILE_NAME, add_lora, load_lora, lora_rank
from common.rewards import RewardError, parse_sum
from evaluation.digests import digest_of, digest_of_model
from harness.args import fail
from harness.project import portable
from harness.stored import StoredError, checked, read_stored

BASE = "base"
"""The pretrained model's name among the models."""
NAME = re.compile(r"[\w=+-][\w.=+-]{0,199}")
"""What a model's name is, which is that of a folder too."""
LONGEST = 200
"""Bytes of a model's name."""


class StoredRun(TypedDict, total=False):
    """What is read of a run's args.json."""

    reward: str
    tasks: list[str]
    prompt: str
    prompts_file: str | None
    seed: int
    lora_rank: int
    model: str
    num_inference_steps: int
    guidance_scale: float
    eta: float


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
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        fail(f"--lora {path}: there is no such file or folder; give the folder of a run")
    for place in (path / FILE_NAME, path / "unet"):
        if os.path.isfile(place) or os.path.isfile(place / "config.json"):
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
        for j, other in enumerate(places[:i]):
            if place.samefile(other):
                fail(
                    f"--lora {args.lora[i]} is given twice: its weights are those of "
                    f"--lora {args.lora[j]}; name each model once"
                )
    models = [Model(BASE, None, digest_of_model(args.model), [])]
    for name, path, place in zip(names_of(places), args.lora, places):
        run = read_run_args(place.parent) if place.name in (FILE_NAME, "unet") else {}
        models.append(Model(name, path, digest_of_lora(path), rewards_of(run) or None))
        keys = ("model", "num_inference_steps", "guidance_scale", "eta")
        keys = [key for key in keys if key in run]
        differ = [k for k in keys if portable(run[k]) != portable(getattr(args, k))]
        differ = [f"--{k.replace('_', '-')} {run[k]}" for k in differ]
        if differ and int(os.environ.get("RANK", 0)) == 0:
            flags = ", ".join(differ)
            warning = f"warning: {name} was trained with {flags}, and is evaluated otherwise"
            print(warning, file=sys.stderr)
    return models


def names_of(places: list[Path]) -> list[str]:
    """As much of each path's end as it takes to tell them apart, and from the base.

    Where the letters that a folder's name may have do not tell them apart, a digest of the path
    does. Names that differ only in case are one name to some file systems.
    """
    parts = [Path(os.path.abspath(place)).parts for place in places]  # a link keeps its own name
    parts = [whole[:-1] if whole[-1] in (FILE_NAME, "unet") else whole for whole in parts]
    longest = max(map(len, parts), default=1)

    def ends(length: int, ending: str) -> list[str]:
        joined = ["__".join(whole[-length:]).removesuffix(ending) for whole in parts]
        return [re.sub(r"[^\w.=+-]+", "-", end).lstrip(".") or "model" for end in joined]

    for ending in (".safetensors", ""):
        for length in range(1, longest + 1):
            names = ends(length, ending)
            apart = len({name.casefold() for name in (BASE, *names)}) == len(names) + 1
            if apart and all(len(name.encode()) <= LONGEST for name in names):
                return names
    digests = [hashlib.sha256(os.fsencode(os.path.abspath(place))).hexdigest() for place in places]
    short = ends(1, ".safetensors")
    return [f"{name[:40]}__{digest[:8]}" for name, digest in zip(short, digests)]


def digest_of_lora(path: Path) -> str:
    """`digest_of` the weights of --lora `path`; what cannot be read ends the command."""
    try:
        return digest_of(weights_of(path))
    except OSError as error:
        fail(f"--lora {path} cannot be read ({error.strerror}: {error.filename}); check it")


def read_run_args(folder: Path) -> StoredRun:
    """Of a run's args.json, {} where there is none; a checkpoint's is in the folder above.

    Raises StoredError.
    """
    folders = [folder, folder.parent] if folder.name == "checkpoint" else [folder]
    for file in [place / "args.json" for place in folders]:
        if os.path.lexists(file):
            remedy = "mend it, or give --lora the safetensors file in another folder"
            everything = read_stored(file, dict[str, object], remedy)
            known = {key: everything[key] for key in StoredRun.__annotations__ if key in everything}
            run = checked(known, StoredRun, str(file), remedy)
            try:
                for spec in rewards_of(run):
                    parse_sum(spec)
            except (RewardError, ValueError) as error:
                raise StoredError(f"{file}: {str(error)[:200]}; {remedy}") from None
            return run
    return {}


def rewards_of(run: StoredRun) -> list[str]:
    """The specs that a run was trained on. Raises ValueError for a task that has none."""
    specs = [run["reward"]] if "reward" in run else []
    for task in run.get("tasks", []):
        words = shlex.split(task)
        if not words:
            raise ValueError("it has a task without a reward")
        specs.append(words[0])
    return specs


def reward_terms(spec: str) -> set[str]:
    """The rewards that a sum is made of, with one spelling of a local path, to compare."""

    def spelled(part: str) -> str:
        there = "/" in part and os.path.exists(part)
        return portable(os.path.realpath(part) if there else part)

    terms = [term.partition("?") for _, term in parse_sum(spec)]
    return {
        ":".join(map(spelled, source.split(":"))) + mark + options
        for source, mark, options in terms
    }


def was_trained_on(model: Model, spec: str) -> bool | None:
    """Whether the reward, or a term of it, was trained on; None where that is not known."""
    if model.trained_on is None:
        return None
    return any(reward_terms(spec) & reward_terms(trained) for trained in model.trained_on)


def check_finite(network: torch.nn.Module) -> None:
    """Raises ValueError where weights are NaN or infinite: pictures would be black, and score."""
    for name, weight in network.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"its weights are not finite ({name}); its training has diverged")


def check_config(base: torch.nn.Module, place: Path) -> None:
    """Raises ValueError where the UNet in `place` is none of the base's kind, before it is made."""

    def comparable(config) -> dict:
        return json.loads(json.dumps({key: config[key] for key in config if key[0] != "_"}))

    own, needed = comparable(type(base).load_config(place)), comparable(base.config)
    for key in own.keys() & needed.keys() - {"sample_size"}:
        if own[key] != needed[key]:
            raise ValueError(f"the UNet in it is of another model ({key})")


def finetuned(base: torch.nn.Module, path: Path) -> torch.nn.Module:
    """The UNet that a run has made of `base`: with its LoRA, on shared weights, or saved whole.

    Raises ValueError when it is of another model, or its weights are not finite.
    """
    place = weights_of(path)
    if place.is_dir():
        check_config(base, place)
        unet = type(base).from_pretrained(place)
        unet = unet.to(base.device, base.dtype, memory_format=torch.channels_last)
        own, needed = (
            {key: value.shape for key, value in network.state_dict().items()}
            for network in (unet, base)
        )
        if own != needed:
            raise ValueError("the UNet in it is of another model")
    else:
        # The modules are copied, not their weights.
        unet = copy.deepcopy(base, {id(weight): weight for weight in base.parameters()})
        add_lora(unet, lora_rank(place))
        load_lora(unet, place)
    check_finite(unet)
    return unet.eval().requires_grad_(False)
