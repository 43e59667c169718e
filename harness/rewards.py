"""A reward as a run calls it: on all ranks together, in limited time; a failure loses nothing."""

import math
import queue
import threading
from collections.abc import Callable, Sequence

import torch

from common.rewards import PromptError, Reward, RewardError, load_reward
from common.users_code import quoted
from harness.ranks import everybodys
from harness.run import Run
from harness.stop import HUNG, fail


def load_run_reward(
    run: Run,
    args,
    spec: str,
    prompts: Sequence[str],
    flag: str = "--reward",
    differentiable: bool = False,
) -> Reward:
    """score(images, prompts[, groups]) of the reward `spec`, float32 (B,) on the images' device.

    A reward that is not to be had, or cannot score one of `prompts`, is refused in one line; one
    that fails later, on any rank, raises RewardError on all of them (harness/guard.py). With
    `differentiable`, score.with_gradient(images, prompts) keeps the graph to the images.
    """
    timeout = args.reward_timeout
    return load_reward_or_fail(spec, run.device, prompts, flag, timeout, differentiable)


def score_with_gradients(
    reward: Reward, images: torch.Tensor, prompts: Sequence[str], size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores (B,) of images (B, 3, H, W), and of each its gradient in its own image, (B, 3, H, W).

    `reward` has with_gradient. About `size` images are in its graph at a time. Collective: ranks,
    whose B and `size` may differ, call the reward equally often.
    """
    lengths, sizes = zip(*everybodys((len(images), size)))
    calls = math.ceil(min(lengths) / min(sizes))
    parts = torch.arange(len(images)).tensor_split(calls)
    scores, gradients = [], []
    for start, stop in [(part[0].item(), part[-1].item() + 1) for part in parts]:
        some = images[start:stop].detach().requires_grad_()
        score = reward.with_gradient(some, prompts[start:stop])
        gradients += torch.autograd.grad(score.sum(), some)
        scores.append(score.detach())
    return torch.cat(scores), torch.cat(gradients)


def scores_of(images: torch.Tensor, scores: torch.Tensor, gradients: torch.Tensor) -> torch.Tensor:
    """`scores` (B,) with a graph to `images`, in which their `gradients` were taken.

    So the graphs of a reward's model and of a UNet need not be in memory together.
    """
    return scores + ((images - images.detach()) * gradients).flatten(1).sum(1)


def load_reward_or_fail(
    spec: str,
    device: torch.device,
    prompts: Sequence[str],
    flag: str,
    timeout: float = 0,
    differentiable: bool = False,
) -> Reward:
    """`common.rewards.load_reward` for all ranks; what cannot be loaded is refused in one line.

    A call that takes more than `timeout` seconds is a fault, on every rank; 0 waits for ever.
    """
    limit = {"limit": within(timeout, device)} if timeout else {}
    try:
        return load_reward(
            spec, device, prompts, everybodys, differentiable=differentiable, **limit
        )
    except PromptError as error:
        remedy = "change --prompt or --prompts-file"
        if flag == "--tasks":
            remedy = "change the prompts of the task"
        fail(f"{flag} {quoted(spec)} cannot score these prompts: {error}; {remedy}")
    except RewardError as error:
        fail(f"{flag} {quoted(spec)}: {error}")
    except Exception as error:  # the hub's client, the loaders, a user's file: of many kinds
        what = f"{type(error).__name__}: {str(error)[:300]}"
        remedy = "check the name, the folder and the network"
        fail(f"{flag} {quoted(spec)} cannot be loaded ({what}); {remedy}")


def within(timeout: float, device: torch.device) -> Callable:
    """limit(call, term): call() in a thread, or RewardError after `timeout` seconds.

    What hangs goes on in that thread, which the end of the run does not wait for.
    """

    def limit(call: Callable, term: str) -> torch.Tensor:
        answer = queue.Queue()

        # The caller's mode does not hold in another thread, nor does its device.
        @torch.set_grad_enabled(torch.is_grad_enabled())
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
            fault = f"reward {term!r} gave no answer in {timeout:g} s (--reward-timeout)"
            raise RewardError(fault) from None
        if error:
            raise error
        return scores

    return limit
