"""A reward on a server: pictures and prompts go out as JSON, and their scores come back.

docs/rewards.md has the protocol, and examples/reward_server.py is a server.
"""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from PIL import Image

from common.rewards.base import Reward, RewardError, check_options, to_pil
from common.rewards.http_client import (
    SERVER_NUMBERS,
    ask_server,
    base64_png,
    bearer_token,
    check_url,
    whole_numbers,
)
from common.users_code import shortened

NUMBERS = SERVER_NUMBERS | {"concurrency": (1, 4, 256), "batch_size": (1, 16, 1024)}
"""Options: least, default and most; timeout in seconds, batch_size in pictures of a request."""
KEY = "REWARD_API_KEY"


def ask_scores(
    url: str, timeout: float, retries: int, pictures: list[Image.Image], prompts: list[str]
) -> list[float]:
    """A server's scores of these pictures, one for each; raises RewardError where it has none.

    The key, if the server wants one, is read from REWARD_API_KEY.
    """
    body = {"images": [base64_png(picture) for picture in pictures], "prompts": list(prompts)}
    answer = ask_server("the reward server", url, body, timeout, retries, bearer_token(KEY))
    scores = answer.get("scores") if isinstance(answer, dict) else None
    # true is an int to Python.
    numbers = isinstance(scores, list) and all(type(score) in (int, float) for score in scores)
    if not numbers or len(scores) != len(pictures):
        expected = f'{{"scores": [{len(pictures)} numbers]}}'
        what = f"should answer {expected}, and answered {shortened(answer)}"
        raise RewardError(f"the reward server {shortened(url)} {what}")
    return scores


def check(name: str, weights: str | None, options: dict[str, str]) -> None:
    check_options("a reward server", options, tuple(NUMBERS))
    whole_numbers("a reward server", options, NUMBERS)
    check_url(weights, "http://HOST:PORT/PATH")


def load(
    name: str, weights: str | None, options: dict[str, str], device: str | torch.device
) -> Reward:
    """In whatever range the server has. `weights`: its URL.

    Raises RewardError when the server does not answer to a request without pictures.
    """
    numbers = whole_numbers("a reward server", options, NUMBERS)
    ask = partial(ask_scores, weights, numbers["timeout"], numbers["retries"])
    ask([], [])

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        pictures, size = to_pil(images), numbers["batch_size"]
        parts = [slice(i, i + size) for i in range(0, len(pictures), size)]
        with ThreadPoolExecutor(numbers["concurrency"]) as threads:
            found = threads.map(lambda part: ask(pictures[part], prompts[part]), parts)
            scores = [float(score) for scores in found for score in scores]
        return torch.tensor(scores, dtype=torch.float64).float()

    reward.in_thread = True
    return reward
