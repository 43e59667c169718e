"""What the zoo's judge says, where the pretrained model is the zoo's."""

from pathlib import Path

import numpy as np
import torch

from common.stable_diffusion import load_pipeline
from zoo import judge as judging


class ZooJudge:
    """What the zoo's judge says of a prompt's pictures, which are (N, 3, H, W) in [0, 1]."""

    def __init__(self, network: torch.nn.Module, vae: torch.nn.Module):
        self.network, self.vae = network, vae

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(N, D); they hear what is in the picture."""
        return self.network(images)[1]

    def success(self, images: torch.Tensor, prompt: str) -> np.ndarray:
        """(1, N): 1 where all is found that the prompt asks for, else 0; NaN where unreadable."""
        try:
            return judging.success(self.network, images, [prompt] * len(images)).numpy()[None]
        except ValueError:
            return np.full((1, len(images)), np.nan)

    def renders(self, images: torch.Tensor, first: int) -> torch.Tensor:
        """Features of real renders of what is seen, `first` the number of the first picture."""
        return judging.features_of_renders(self.network, self.vae, images, first=first)

    def image_quality(self, images: torch.Tensor) -> float | None:
        """Distance to real renders (docs/zoo.md), lower is better; None for N = 1."""
        return self.distance(self.features(images), self.renders(images, first=0))

    def distance(self, shown: torch.Tensor, real: torch.Tensor) -> float | None:
        """The same, of the features of the pictures and of the renders."""
        return judging.distance(shown, real) if len(shown) > 1 else None


def load_judge(model: str) -> ZooJudge | None:
    """The judge that lies beside the zoo's model; None for another model."""
    folder = Path(model).resolve().parent / "judge"
    if not (folder / "model.safetensors").is_file():
        return None
    vae = load_pipeline(model).vae.eval().requires_grad_(False)
    return ZooJudge(judging.load_judge(folder), vae)
