"""What the rewards share."""

import os
import re
from collections.abc import Callable

import torch
from PIL import Image

from common import UserError
from common.users_code import quoted

Reward = Callable[[torch.Tensor, list[str]], torch.Tensor]
BATCH = 32
"""Pictures that a reward's model sees at once."""


class RewardError(UserError):
    """A reward that cannot be had as it was asked for; the message is one line for the user."""


class PromptError(RewardError):
    """A prompt that the reward can never score."""


class GradientError(RewardError):
    """A reward without the gradient that is asked for; another script may do without."""


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """Float (B, 3, H, W) in [0, 1], rounded to 8 bits, as RGB pictures."""
    images = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]


def check_options(name: str, options: dict[str, str], known: tuple[str, ...] = ()) -> None:
    """Raises RewardError for an option that is not known."""
    for option in options:
        if option not in known:
            there_are = f"there are: {', '.join(known)}" if known else "there are none"
            raise RewardError(f"{name} has no option {quoted(option)}; {there_are}")


def check_weights(weights: str | None, *files: tuple[str, ...], owner: bool = True) -> None:
    """`weights` must be a hub id, or a folder with one file of each of `files`; raises RewardError.

    Without `owner` a hub id may lack its owner, as those of the oldest models do (roberta-large).
    """
    hub_id = r"[\w-][\w.-]*/[\w.-]+" if owner else r"([\w-][\w.-]*/)?[\w-][\w.-]*"
    if weights is None or (not os.path.isdir(weights) and re.fullmatch(hub_id, weights)):
        return
    if not os.path.isdir(weights):
        raise RewardError(f"there is no folder {quoted(weights)}")
    for names in files:
        if not any(os.path.isfile(os.path.join(weights, name)) for name in names):
            raise RewardError(f"the folder {quoted(weights)} holds no {' or '.join(names)}")


MODEL_FILES = (
    ("config.json",),
    ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
)
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "spm.model")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def load_model(
    model_class,
    weights: str,
    device: str | torch.device,
    dtype=torch.float32,
    unused: str = "(none)",
):
    """`model_class` of transformers for inference on `device`, from the hub id or folder `weights`.

    Raises RewardError where the files lack weights, which transformers would draw at random with
    only a warning. Those whose names begin with `unused` may be missing.
    """
    model, found = model_class.from_pretrained(weights, dtype=dtype, output_loading_info=True)
    if missing := sorted(key for key in found["missing_keys"] if not key.startswith(unused)):
        count = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        name = type(model).__name__
        raise RewardError(
            f"{weights!r} lacks {missing[0]}{count} of a {name}; name the weights of such a model"
        )
    return model.eval().requires_grad_(False).to(device)


def batched(reward: Reward) -> Reward:
    """`reward`, a few pictures at a time: a picture's score does not depend on the others."""

    def in_batches(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        starts = range(0, len(images), BATCH)
        return torch.cat([reward(images[i : i + BATCH], prompts[i : i + BATCH]) for i in starts])

    return in_batches


def reward_of_pixels(score: Callable, exact: Callable, on_tensors: Callable | None) -> Reward:
    """score(pixels, prompts) of the pixels that `exact` makes of images, through PIL.

    With `on_tensors`, which makes them with gradients, it has a second path `with_gradient`.
    """
    reward = batched(lambda images, prompts: score(exact(images), prompts))
    if on_tensors:
        of_tensors = batched(lambda images, prompts: score(on_tensors(images), prompts))
        reward.with_gradient = of_tensors
    return reward
