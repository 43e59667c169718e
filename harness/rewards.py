"""A reward as a run calls it: on all ranks together, in limited time, losing nothing when it fails."""

from collections.abc import Sequence

import torch

from common.rewards import PromptError, RewardError, load_reward
from harness.args import fail
from harness.run import Run


def load_run_reward(run: Run, args, spec: str, prompts: Sequence[str], flag: str = "--reward"):
    """score(images, prompts[, groups]) of the reward `spec`, float32 (B,) on the images' device.

    A reward that is not to be had, or cannot score one of `prompts`, is refused in one line; one
    that fails later, on any rank, ends the run with all that is done saved.
    """
    try:
        reward = load_reward(spec, run.device, prompts, args.reward_timeout)
    except PromptError as error:
        remedy = "change --prompt or --prompts-file"
        if flag != "--reward":
            remedy = f"change the prompts in {flag}"
        fail(f"{flag} {spec} cannot score these prompts: {error}; {remedy}")
    except RewardError as error:
        fail(f"{flag} {spec}: {error}")
    except Exception as error:  # the hub's client, the loaders, a user's file: of many kinds
        what = f"{type(error).__name__}: {str(error)[:300]}"
        fail(f"{flag} {spec} cannot be loaded ({what}); check the name, the folder and the network")

    def score(images: torch.Tensor, prompts: list[str], groups=None) -> torch.Tensor:
        try:
            return reward(images, prompts, groups)
        except RewardError as error:
            run._end(str(error))

    return score
