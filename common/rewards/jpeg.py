"""The size of a picture as a JPEG (Black et al. 2023, 5.1 and A.4)."""

import io
from concurrent.futures import ThreadPoolExecutor

import torch
from PIL import Image

from common.rewards.base import Reward, RewardError, check_options, to_pil


def jpeg_kilobytes(images: torch.Tensor) -> torch.Tensor:
    """Size as a JPEG of quality 95, in kB of 1000 bytes, (B,).

    Pillow lets the threads run in parallel.
    """

    def size(image: Image.Image) -> float:
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=95)
        return buffer.tell() / 1000

    with ThreadPoolExecutor() as threads:
        return torch.tensor(list(threads.map(size, to_pil(images))), dtype=torch.float32)


def check(name: str, weights: str | None, options: dict[str, str]) -> None:
    check_options(name, options)
    if weights:
        raise RewardError(f"{name} takes no weights")


def load(
    name: str, weights: str | None, options: dict[str, str], device: str | torch.device
) -> Reward:
    sign = -1.0 if name == "jpeg_compressibility" else 1.0

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return sign * jpeg_kilobytes(images)

    reward.in_thread = True
    return reward
