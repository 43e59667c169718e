"""A reward of the zoo for figures alone: nothing is trained on it.

--rewards benchmarks/zoo_rewards.py:colours
"""

import torch

from zoo import world

FROM_BACKGROUND = 0.2
"""Distance in RGB from the background above which a pixel is drawn."""
COLORS = torch.tensor([*world.COLORS.values(), (0, 0, 0)]) / 255
"""The world's colours, and that of outlines."""


def colours(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Share of what is drawn that has the colour which the prompt names, (B,) in [0, 1].

    Of images (B, 3, H, W) with one thing before a plain background, pixel by pixel: a pixel has the
    nearest of the world's colours. Outlines, eyes and what is not coloured are drawn too, so that a
    render of the right colour has about a half.
    """
    names = list(world.COLORS)
    wanted = [names.index(world.parse(prompt).groups[0].color) for prompt in prompts]
    return torch.stack([share(image, color) for image, color in zip(images, wanted)])


def share(image: torch.Tensor, color: int) -> torch.Tensor:
    """Of the pixels that differ from the border's median, those whose nearest colour is `color`."""
    border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], dim=1)
    pixels = image.flatten(1).T
    drawn = pixels[(pixels - border.median(dim=1).values).norm(dim=1) > FROM_BACKGROUND]
    if len(drawn) == 0:
        return image.new_tensor(0.0)
    nearest = torch.cdist(drawn, COLORS.to(drawn)).argmin(dim=1)
    return (nearest == color).float().mean()
