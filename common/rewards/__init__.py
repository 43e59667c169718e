"""Rewards: `reward = load_reward(spec, device)`, then `reward(images, prompts[, groups])`.

images: float (B, 3, H, W) in [0, 1]; prompts: B strings; the result: float32 (B,), higher is
better. A reward of a set gives the pictures of a group one value; groups: B ints, over all ranks,
by default a group for each prompt. Specs:

    image_reward[:WEIGHTS]            ImageReward (Xu et al. 2023)
    aesthetic[:WEIGHTS]               LAION's aesthetic predictor on CLIP (Black et al. 2023, 5.2)
    jpeg_compressibility              minus the size in kB of the picture as a JPEG
                                      (Black et al. 2023, 5.1)
    jpeg_incompressibility            that size itself
    clip_score[:WEIGHTS]              cosine of CLIP's embeddings of picture and prompt
                                      (Fan et al. 2023, App. C)
    blip_score[:WEIGHTS]              the same of BLIP's
    pick_score[:WEIGHTS]              PickScore: of a CLIP that was trained on preferences, times
                                      about 100 (Kirstain et al. 2023)
    hps_v2[:WEIGHTS]                  Human Preference Score v2: of another one (Wu et al. 2023)
    llava_bertscore[:WEIGHTS]         a VLM describes the picture; BERTScore recall of the prompt
                                      (Black et al., 5.3)
    llava_bertscore:http://HOST/v1    the same, the VLM on an OpenAI-compatible server
    object_detection[:WEIGHTS]        mean confidence of the prompt's objects
                                      (Zhang et al. 2024, Eq. 13)
    statistical_parity[:WEIGHTS]      minus the distance of a prompt's classes from uniform
                                      (Zhang et al., Eq. 12)
    http://HOST:PORT/PATH             your own on a server; https:// too
    path/to/file.py:function          your own: function(images, prompts) with the shapes above
    0.7*aesthetic+0.3*clip_score      a weighted sum of any of these

WEIGHTS is a hub id or a local folder. Options follow a question mark, as in a URL
(llava_bertscore:FOLDER?question=...); docs/rewards.md says which there are, and what each reward
needs.

With load_reward(spec, device, differentiable=True), reward.with_gradient(images, prompts) is a
second path on tensors, through which autograd reaches the images.
"""

import copy
import importlib
import math
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from urllib.parse import parse_qsl

import torch

from common.rewards.base import GradientError, PromptError, Reward, RewardError
from common.rewards.http_client import is_url
from common.users_code import load_users_function, quoted, shortened, users_code, what_was_raised

__all__ = [
    "DIFFERENTIABLE",
    "NAMES",
    "GradientError",
    "PromptError",
    "Reward",
    "RewardError",
    "check_spec",
    "is_url",
    "load_reward",
]

# The module of each reward; it has check(name, weights, options) and
# load(name, weights, options, device), and where the reward is among DIFFERENTIABLE
# load(name, weights, options, device, differentiable).
MODULES = {
    "image_reward": "image_reward",
    "aesthetic": "aesthetic",
    "jpeg_compressibility": "jpeg",
    "jpeg_incompressibility": "jpeg",
    "clip_score": "similarity",
    "blip_score": "similarity",
    "pick_score": "similarity",
    "hps_v2": "hps_v2",
    "llava_bertscore": "llava_bertscore",
    "object_detection": "object_detection",
    "statistical_parity": "statistical_parity",
}
NAMES = tuple(MODULES)
OTHERS = ("http://HOST:PORT/PATH", "path/to/file.py:function")
"""Specs that begin with no name."""
DIFFERENTIABLE = (
    "image_reward",
    "aesthetic",
    "clip_score",
    "blip_score",
    "pick_score",
    "hps_v2",
    "object_detection",
)
TERM = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*(.+)", re.DOTALL)
LONGEST_SPEC = 10_000
"""Characters of a spec; the time that it takes to read one grows with their square."""
SYNTAX = "a sum is written 0.7*aesthetic+-0.3*clip_score"


def _alone(share) -> list:
    return [share]


def _at_once(call: Callable, term: str) -> torch.Tensor:
    return call()


def load_reward(
    spec: str,
    device: str | torch.device = "cpu",
    prompts: Sequence[str] = (),
    gather: Callable = _alone,
    limit: Callable = _at_once,
    differentiable: bool = False,
) -> Reward:
    """The reward that `spec` names (see above), checked on every call: pictures, scores, their sum.

    Raises RewardError, with a message for the user, when there is no such reward, its weights are
    missing, or it can never score one of `prompts`; its calls raise it too. On several ranks, each
    with pictures of its own, `gather(share)` gives the shares of all of them, and a fault of one is
    raised on all. `limit(call, term)` is call(), or raises RewardError when it takes too long.

    reward.start(images, prompts) lets what needs no GPU, a JPEG or a server's answer, be computed
    while the caller goes on; the next call, with all images that were started, takes it up.

    With `differentiable` it has a second path, with_gradient(images, prompts), checked in the same
    way: its float32 scores (B,) have the graph to the images, with frozen models in float32. A
    reward without a gradient is then refused with GradientError.
    """
    check_spec(spec, differentiable)
    loaded = [(w, term, _load_term(term, device, differentiable)) for w, term in parse_sum(spec)]
    for _, _, reward in loaded:
        if check_prompts := getattr(reward, "check_prompts", None):
            check_prompts(prompts)
    first = [(w, term, Ahead(r) if hasattr(r, "in_thread") else r) for w, term, r in loaded]
    total = torch.no_grad()(_checked(spec, first, gather, limit))
    total.start = partial(_start, [r for _, _, r in first if isinstance(r, Ahead)])
    if differentiable:
        second = [(w, term, reward.with_gradient) for w, term, reward in loaded]
        total.with_gradient = torch.enable_grad()(_checked(spec, second, gather, limit))
    return total


def _checked(
    spec: str, terms: list[tuple[float, str, Reward]], gather: Callable, limit: Callable
) -> Reward:
    """The sum of terms (weight, spec, reward); pictures, scores and sum are checked."""

    def checked(
        images: torch.Tensor, prompts: list[str], groups: Sequence[int] | None = None
    ) -> torch.Tensor:
        groups = list(prompts if groups is None else groups)
        faults, found, of_sets = _faults_of_images(images, prompts), {}, {}
        for number, (_, term, reward) in enumerate(terms):
            if faults:
                break
            try:
                scores = limit(partial(reward, images, prompts), term)
                if hasattr(reward, "of_groups"):
                    of_sets[number] = scores
                else:
                    found[number] = _checked_scores(term, scores, images, prompts)
            except RewardError as error:
                faults = [str(error)]
            except Exception as error:  # a model's own, out of memory for one
                faults = [f"reward {quoted(term)} failed with {what_was_raised(error)}"]
        shares = gather((faults, groups, of_sets))
        _raise_first([fault for share_faults, _, _ in shares for fault in share_faults])

        total = torch.zeros(len(prompts), device=images.device)
        for number, (weight, term, reward) in enumerate(terms):
            if number in of_sets:
                parts = [part for _, _, sets in shares for part in sets[number]]
                values = reward.of_groups(parts, [g for _, share, _ in shares for g in share])
                scores = torch.tensor([values[group] for group in groups])
                found[number] = _checked_scores(term, scores, images, prompts)
            total += weight * found[number]
        if len(terms) > 1:  # finite terms may have a sum that is not
            faults = gather(_faults_of_scores(spec, total, prompts))
            _raise_first([fault for share in faults for fault in share])
        return total

    return checked


class Ahead:
    """A reward whose pictures can be scored in a thread, a batch at a time, before it is called."""

    def __init__(self, reward: Reward):
        self.reward, self.started = reward, []

    def start(self, images: torch.Tensor, prompts: list[str]) -> None:
        """Score (B, 3, H, W) after what was started before."""
        before = self.started[-1] if self.started else None
        scores = Future()

        @torch.no_grad()  # a thread has the modes of none other
        def score():
            if before is not None:
                wait([before])
            if images.is_cuda:  # nor has it the caller's device
                torch.cuda.set_device(images.device)
            try:
                scores.set_result(self.reward(images, prompts))
            except BaseException as error:  # raised where the scores are asked for
                scores.set_exception(error)

        self.started.append(scores)
        threading.Thread(target=score, daemon=True).start()

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        """(B,) of the pictures that were started, or of these when none were."""
        started, self.started = self.started, []
        if not started:
            return self.reward(images, prompts)
        return torch.cat([scores.result() for scores in started])


def _start(rewards: list[Ahead], images: torch.Tensor, prompts: list[str]) -> None:
    for reward in rewards:
        reward.start(images, prompts)


def _raise_first(faults: list[str]) -> None:
    if faults:
        raise RewardError(faults[0])


def _faults_of_images(images: torch.Tensor, prompts: list[str]) -> list[str]:
    if not isinstance(images, torch.Tensor) or not images.is_floating_point():
        kind = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        rule = "must be a float tensor with values in [0, 1]"
        return [f"a reward's pictures {rule}, and these are {kind}"]
    if images.dim() != 4 or images.shape[:2] != (len(prompts), 3):
        rule = f"must have the shape ({len(prompts)}, 3, H, W) of its prompts"
        return [f"a reward's pictures {rule}, and have {tuple(images.shape)}"]
    if not images.isfinite().all():
        prompt = prompts[images.isfinite().flatten(1).all(1).tolist().index(False)]
        remedy = "lower the learning rate or use --dtype fp32"
        return [f"the picture of the prompt {quoted(prompt)} is not finite; {remedy}"]
    return []


def _faults_of_scores(term: str, scores: torch.Tensor, prompts: list[str]) -> list[str]:
    for score, prompt in zip(scores.tolist(), prompts):
        if not math.isfinite(score):
            what = f"reward {quoted(term)} returned {score}"
            return [f"{what} for the prompt {quoted(prompt)}"]
    return []


def _as_tensor(term: str, scores) -> torch.Tensor:
    try:
        scores = torch.as_tensor(scores)
    except (TypeError, ValueError, RuntimeError):  # None, words
        kind, rule = (
            shortened(type(scores).__name__, 80),
            "it must return a tensor of one number a picture",
        )
        raise RewardError(f"reward {quoted(term)} returned a {kind}; {rule}") from None
    if scores.layout != torch.strided or scores.is_complex():
        kind, rule = f"{scores.layout} tensor of {scores.dtype}", "it must be dense and real"
        raise RewardError(f"reward {quoted(term)} returned a {kind}; {rule}")
    return scores


def _checked_scores(
    term: str, scores: torch.Tensor, images: torch.Tensor, prompts: list[str]
) -> torch.Tensor:
    scores = _as_tensor(term, scores)
    if scores.shape != (len(prompts),):
        returned = f"reward {quoted(term)} returned shape {tuple(scores.shape)}"
        raise RewardError(f"{returned} for {len(prompts)} images; it must be ({len(prompts)},)")
    scores = scores.to(device=images.device, dtype=torch.float32)
    for fault in _faults_of_scores(term, scores, prompts):
        raise RewardError(fault)
    return scores


def parse_sum(spec: str) -> list[tuple[float, str]]:
    """Weights and specs of the terms of a weighted sum; [(1, spec)] of a spec that is no sum.

    Raises RewardError.
    """
    if len(spec) > LONGEST_SPEC:
        raise RewardError(f"reward {quoted(spec)} has more than {LONGEST_SPEC} characters")
    if not TERM.fullmatch(spec):
        return [(1.0, spec)]
    terms = []
    for term in re.split(r"\+(?=\s*[+-]?(?:\d|\.\d)[\d.eE+-]*\s*\*)", spec):
        found = TERM.fullmatch(term)
        if not found or not found[2].strip() or not math.isfinite(float(found[1])):
            fault = f"there is no finite weight and reward in {quoted(term)}"
            raise RewardError(f"{fault} (reward {quoted(spec)}); {SYNTAX}")
        terms.append((float(found[1]), found[2].strip()))
    return terms


def parse_spec(spec: str) -> tuple[str, str | None, dict[str, str]]:
    """Name, weights or None, and options of one term; of a URL its scheme, and all before the "?".

    Raises RewardError.
    """
    rest, _, query = spec.partition("?")
    name, _, weights = rest.partition(":")
    if is_url(spec):
        weights = rest
    given = parse_qsl(query, keep_blank_values=True)
    options = dict(given)
    if len(options) < len(given):
        raise RewardError(f"reward {quoted(spec)} has an option twice; leave one out")
    return name, weights or None, options


def is_users_function(spec: str) -> bool:
    return not is_url(spec) and (spec.rpartition(":")[0].endswith(".py") or spec.endswith(".py"))


def module_of(term: str):
    """What checks and loads the reward of a term that is no user's function."""
    name = "reward_server" if is_url(term) else MODULES[parse_spec(term)[0]]
    return importlib.import_module(f"common.rewards.{name}")


def check_spec(spec: str, differentiable: bool = False) -> None:
    """What can be checked of a spec without loading anything.

    Raises RewardError with a message for the user; with `differentiable` a GradientError for a
    reward that has no gradient. Of a user's function only a call can tell.
    """
    for _, term in parse_sum(spec):
        if is_users_function(term):
            path, _, function = term.rpartition(":")
            if not function or term.endswith(".py"):
                remedy = f"write {shortened(term.rstrip(':'))}:FUNCTION"
                raise RewardError(f"reward {quoted(term)} names no function; {remedy}")
            if not os.path.isfile(path):
                raise RewardError(f"there is no file {quoted(path)} (reward {quoted(term)})")
            continue
        name, weights, options = parse_spec(term)
        if name not in NAMES and not is_url(term):
            hint = f"; {SYNTAX}" if re.search(r"[*+]", name) else ""
            names = ", ".join((*NAMES, *OTHERS))
            raise RewardError(f"there is no reward {quoted(name)}; there are: {names}{hint}")
        if differentiable and name not in DIFFERENTIABLE:
            names = ", ".join((*DIFFERENTIABLE, "path/to/file.py:function"))
            raise GradientError(f"reward {quoted(term)} has no gradient; these have: {names}")
        try:
            module_of(term).check(name, weights, options)
        except RewardError as error:
            raise RewardError(f"{error} (reward {quoted(term)})") from None


def _load_term(term: str, device: str | torch.device, differentiable: bool) -> Reward:
    if is_users_function(term):
        return _users_function(term)
    name, weights, options = parse_spec(term)
    try:
        asked = {"differentiable": True} if differentiable else {}
        return module_of(term).load(name, weights, options, device, **asked)
    except GradientError as error:
        raise GradientError(f"reward {quoted(term)} has no gradient: {error}") from None
    except ImportError as error:  # some of transformers' processors need more: OWLv2's scipy
        what = f"reward {quoted(term)} needs another package"
        raise RewardError(f"{what}: {shortened(str(error), 300)}") from None


def _users_function(spec: str) -> Callable:
    function = load_users_function(spec, RewardError, "reward")

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        # The run must save its state and the other ranks must hear of a fault, whatever it is. With
        # copies of its own the function can change or keep what it is given.
        what = f"reward {quoted(spec)}"
        with users_code(RewardError, what):
            scores = function(images.clone(), copy.deepcopy(list(prompts)))
        # A block of its own: the function may have left another default device.
        with users_code(RewardError, what):
            return _as_tensor(spec, scores).as_subclass(torch.Tensor).clone()

    def with_gradient(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        shown = images.clone()
        scores = reward(shown, prompts)
        if images.requires_grad and not _in_graph(shown.grad_fn, scores.grad_fn):
            remedy = "compute it from the images in torch, without .detach() and torch.no_grad()"
            raise RewardError(f"reward {quoted(spec)} returns no gradient; {remedy}")
        return scores

    reward.with_gradient = with_gradient
    return reward


def _in_graph(node, of) -> bool:
    """Whether backward from the node `of` of an autograd graph comes to `node`.

    Scores of a user's model whose weights are not frozen have a graph that may end in them.
    """
    seen, nodes = set(), [of]
    while nodes:
        if (found := nodes.pop()) is node:
            return True
        if found is not None and found not in seen:
            seen.add(found)
            nodes += [after for after, _ in found.next_functions]
    return False
