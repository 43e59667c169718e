"""Rewards: `reward = load_reward(spec, device)`, then `reward(images, prompts)` or `reward(images, prompts, groups)`.

images: float (B, 3, H, W) in [0, 1]; prompts: B strings; the result: float32 (B,), higher is better. A reward of a set
gives the pictures of a group one value; groups: B ints, over all ranks, by default a group for each prompt. Specs:

    image_reward[:WEIGHTS]            ImageReward (Xu et al. 2023)
    aesthetic[:WEIGHTS]               LAION's aesthetic predictor on CLIP (Black et al. 2023, 5.2)
    jpeg_compressibility              minus the size in kB of the picture as a JPEG (Black et al. 2023, 5.1)
    jpeg_incompressibility            that size itself
    clip_score[:WEIGHTS]              cosine of CLIP's embeddings of picture and prompt (Fan et al. 2023, App. C)
    blip_score[:WEIGHTS]              the same of BLIP's
    llava_bertscore[:WEIGHTS]         a VLM describes the picture; BERTScore recall of the prompt (Black et al., 5.3)
    llava_bertscore:http://HOST/v1    the same, the VLM on an OpenAI-compatible server
    object_detection[:WEIGHTS]        mean confidence of the prompt's objects (Zhang et al. 2024, Eq. 13)
    statistical_parity[:WEIGHTS]      minus the distance of a prompt's classes from uniform (Zhang et al., Eq. 12)
    path/to/file.py:function          your own: function(images, prompts) with the shapes above
    0.7*aesthetic+0.3*clip_score      a weighted sum of any of these

WEIGHTS is a hub id or a local folder. Options follow a question mark, as in a URL: llava_bertscore:FOLDER?question=...
docs/rewards.md says which there are, and what each reward needs.
"""

import importlib
import importlib.util
import math
import queue
import re
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import parse_qsl

import torch
import torch.distributed as dist

from common.rewards.base import PromptError, Reward, RewardError, own_group
from common.stop import HUNG

__all__ = ["NAMES", "PromptError", "Reward", "RewardError", "check_spec", "load_reward"]

# The module of each reward; it has check(name, weights, options) and load(name, weights, options, device).
MODULES = {
    "image_reward": "image_reward",
    "aesthetic": "aesthetic",
    "jpeg_compressibility": "jpeg",
    "jpeg_incompressibility": "jpeg",
    "clip_score": "similarity",
    "blip_score": "similarity",
    "llava_bertscore": "llava_bertscore",
    "object_detection": "object_detection",
    "statistical_parity": "statistical_parity",
}
NAMES = tuple(MODULES)
TERM = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*\s*(.+?)\s*", re.DOTALL)
SYNTAX = "a sum is written 0.7*aesthetic+-0.3*clip_score"


def load_reward(
    spec: str, device: str | torch.device = "cpu", prompts: Sequence[str] = (), timeout: float = 0
) -> Reward:
    """The reward that `spec` names (see above), checked on every call: pictures, scores and their sum.

    Raises RewardError, with a message for the user, when there is no such reward, its weights are missing, or it can
    never score one of `prompts`; its calls raise it too, also when a term takes more than `timeout` seconds (0: any
    time is fine). Under torch.distributed a call is collective: a fault on one rank is raised on all.
    """
    check_spec(spec)
    terms = [(weight, term, _load_term(term, device)) for weight, term in parse_sum(spec)]
    for _, _, reward in terms:
        if check_prompts := getattr(reward, "check_prompts", None):
            check_prompts(prompts)

    @torch.no_grad()
    def checked(
        images: torch.Tensor, prompts: list[str], groups: Sequence[int] | None = None
    ) -> torch.Tensor:
        _raise_on_all_ranks(
            _faults_of_images(images, prompts)
        )  # before a term waits for the others
        own_group()
        total, faults = torch.zeros(len(prompts), device=images.device), []
        for weight, term, reward in terms:
            call = partial(reward, images, prompts)
            if getattr(reward, "of_a_set", False):
                call = partial(call, prompts if groups is None else groups)
            try:
                scores = _in_time(call, timeout, term, images.device) if timeout else call()
                total += weight * _checked_scores(term, scores, images, prompts)
            except RewardError as error:  # the other terms still run: they may be collective
                faults.append(str(error))
            except (
                Exception
            ) as error:  # a model's own, out of memory for one: the run must save its state
                faults.append(
                    f"reward {term!r} failed with {type(error).__name__}: {' '.join(str(error).split())[:300]}"
                )
        _raise_on_all_ranks(faults or _faults_of_scores(spec, total, prompts))
        return total

    return checked


def _in_time(call: Callable, timeout: float, term: str, device: torch.device) -> torch.Tensor:
    """`call()`, or RewardError after `timeout` seconds; what hangs does so in a thread of its own."""
    answer = queue.Queue()

    @torch.no_grad()  # that of the caller does not hold in another thread, nor does its device
    def ask():
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            answer.put((call(), None))
        except BaseException as error:
            answer.put((None, error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        scores, error = answer.get(timeout=timeout)
    except queue.Empty:
        thread.name = HUNG
        raise RewardError(
            f"reward {term!r} gave no answer in {timeout:g} s (--reward-timeout)"
        ) from None
    if error:
        raise error
    return scores


def _raise_on_all_ranks(faults: list[str]) -> None:
    """RewardError with the first fault that any rank has."""
    if dist.is_initialized():
        everybodys = [None] * dist.get_world_size()
        dist.all_gather_object(everybodys, faults)
        faults = [fault for faults in everybodys for fault in faults]
    if faults:
        raise RewardError(faults[0])


def _faults_of_images(images: torch.Tensor, prompts: list[str]) -> list[str]:
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        return [
            f"a reward's pictures must be a float tensor with values in [0, 1], and these are {kind}"
        ]
    if images.dim() != 4 or images.shape[:2] != (len(prompts), 3):
        shape = tuple(images.shape)
        return [
            f"a reward's pictures must have the shape ({len(prompts)}, 3, H, W) of its prompts, and have {shape}"
        ]
    if not images.isfinite().all():
        prompt = prompts[images.isfinite().flatten(1).all(1).tolist().index(False)]
        return [
            f"the picture of the prompt {prompt!r} is not finite; lower the learning rate or use --dtype fp32"
        ]
    return []


def _faults_of_scores(term: str, scores: torch.Tensor, prompts: list[str]) -> list[str]:
    faulty = [
        (score, prompt)
        for score, prompt in zip(scores.tolist(), prompts)
        if not math.isfinite(score)
    ]
    return [
        f"reward {term!r} returned {score} for the prompt {prompt!r}"
        for score, prompt in faulty[:1]
    ]


def _checked_scores(
    term: str, scores: torch.Tensor, images: torch.Tensor, prompts: list[str]
) -> torch.Tensor:
    try:
        scores = torch.as_tensor(scores)
    except (TypeError, ValueError, RuntimeError):  # None, words
        kind = type(scores).__name__
        fault = (
            f"reward {term!r} returned a {kind}; it must return a tensor of one number a picture"
        )
        raise RewardError(fault) from None
    if scores.shape != (len(prompts),):
        raise RewardError(
            f"reward {term!r} returned shape {tuple(scores.shape)} for {len(prompts)} images"
        )
    scores = scores.to(device=images.device, dtype=torch.float32)
    for fault in _faults_of_scores(term, scores, prompts):
        raise RewardError(fault)
    return scores


def parse_sum(spec: str) -> list[tuple[float, str]]:
    """Weights and specs of the terms of a weighted sum; [(1, spec)] of a spec that is none. Raises RewardError."""
    if not TERM.fullmatch(spec):
        return [(1.0, spec)]
    terms = []
    for term in re.split(r"\+(?=\s*[+-]?(?:\d|\.\d)[\d.eE+-]*\s*\*)", spec):
        found = TERM.fullmatch(term)
        if not found or not math.isfinite(float(found[1])):
            raise RewardError(
                f"there is no finite weight and reward in {term!r} (reward {spec!r}); {SYNTAX}"
            )
        terms.append((float(found[1]), found[2]))
    return terms


def parse_spec(spec: str) -> tuple[str, str | None, dict[str, str]]:
    """Name, weights or None, and options of one term."""
    rest, _, query = spec.partition("?")
    name, _, weights = rest.partition(":")
    return name, weights or None, dict(parse_qsl(query, keep_blank_values=True))


def is_users_function(spec: str) -> bool:
    return spec.rpartition(":")[0].endswith(".py") or spec.endswith(".py")


def check_spec(spec: str) -> None:
    """What can be checked of a spec without loading anything; raises RewardError with a message for the user."""
    for _, term in parse_sum(spec):
        if is_users_function(term):
            path, _, function = term.rpartition(":")
            if not function or term.endswith(".py"):
                raise RewardError(
                    f"reward {term!r} names no function; write {term.rstrip(':')}:FUNCTION"
                )
            if not Path(path).is_file():
                raise RewardError(f"there is no file {path!r} (reward {term!r})")
            continue
        name, weights, options = parse_spec(term)
        if name not in NAMES:
            hint = f"; {SYNTAX}" if re.search(r"[*+]", name) else ""
            names = ", ".join((*NAMES, "path/to/file.py:function"))
            raise RewardError(f"there is no reward {name!r}; there are: {names}{hint}")
        try:
            importlib.import_module(f"common.rewards.{MODULES[name]}").check(name, weights, options)
        except RewardError as error:
            raise RewardError(f"{error} (reward {term!r})") from None


def _load_term(term: str, device: str | torch.device) -> Reward:
    if is_users_function(term):
        return _users_function(term)
    name, weights, options = parse_spec(term)
    try:
        return importlib.import_module(f"common.rewards.{MODULES[name]}").load(
            name, weights, options, device
        )
    except ImportError as error:  # some of transformers' processors need more: OWLv2's scipy
        raise RewardError(
            f"reward {term!r} needs another package: {' '.join(str(error).split())}"
        ) from None


def _users_function(spec: str) -> Callable:
    path, _, name = spec.rpartition(":")
    module_spec = importlib.util.spec_from_file_location(
        re.sub(r"\W", "_", f"reward {Path(path).resolve()}"), path
    )
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module.__name__] = module  # where dataclasses and pickle look for it
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise RewardError(f"{path!r} has no function {name!r} (reward {spec!r})")
    function = getattr(module, name)

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        try:
            return function(images, prompts)
        except (
            Exception
        ) as error:  # the run must save its state, and the other ranks must hear of it
            place = traceback.extract_tb(error.__traceback__)[-1]
            what = " ".join(
                f"{type(error).__name__}: {error} ({place.filename}:{place.lineno})".split()
            )
            raise RewardError(f"reward {spec!r} failed with {what}") from error

    return reward
