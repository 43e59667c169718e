"""What a model sees of a picture, on tensors: with gradients, and as PIL would have made it.

A resize by PIL is linear and separable, so that two matrices do it: PIL's own, as its resize of an
identity. (On a GPU the gradient of torch's interpolate differs from call to call, and theirs does
not.) Left out is what has no gradient: PIL rounds to 8 bits before the resize and after each pass.
"""

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import torch
from PIL import Image

from common.rewards.base import GradientError, to_pil

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LARGEST_GAP = 2
"""Steps of 8 bits by which a pixel may differ from PIL's; 1.1 was measured (docs/rewards.md)."""


@lru_cache(maxsize=64)
def pil_resize(resample: int, n: int, m: int) -> np.ndarray:
    """The matrix (m, n) of PIL's resize of n pixels to m."""
    identity = Image.fromarray(np.eye(n, dtype=np.float32))
    return np.array(identity.resize((n, m), resample))


@lru_cache(maxsize=64)
def owlv2_resize(n: int, m: int) -> np.ndarray:
    """The same of OWLv2's processor, which is scipy's: a Gaussian before it makes less, linear."""
    from scipy import ndimage

    sigma = max(0.0, (n / m - 1) / 2)
    blurred = ndimage.gaussian_filter(np.eye(n, dtype=np.float32), (sigma, 0), mode="mirror")
    return ndimage.zoom(blurred, (m / n, 1), order=1, mode="mirror", grid_mode=True)


def resized(
    images: torch.Tensor,
    height: int,
    width: int,
    matrix_of: Callable[[int, int], np.ndarray],
    clamped: bool = True,
) -> torch.Tensor:
    """Float images (..., H, W) in [0, 1] at another size, in [0, 1].

    Bicubic weights overshoot at edges, by up to an eighth in each pass. As in PIL, each pass is
    clamped: what is clamped passes no gradient, and would not change PIL's picture either. Torch's
    own resize of float images is not `clamped`.
    """
    H, W = images.shape[-2:]
    down, across = (
        torch.from_numpy(matrix_of(n, m)).to(images) for n, m in ((H, height), (W, width))
    )
    if not clamped:
        return down @ images @ across.T
    if H - height > max(0, 2 * (W - width)):  # the passes' order in Pillow 13
        return ((down @ images).clamp(0, 1) @ across.T).clamp(0, 1)
    return (down @ (images @ across.T).clamp(0, 1)).clamp(0, 1)


def normalised(images: torch.Tensor, mean, std) -> torch.Tensor:
    """Images (..., 3, H, W) with the mean and standard deviation of each channel taken out."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (mean, std))
    return (images - mean) / std


def tensor_pixels(processor) -> Callable[[torch.Tensor], torch.Tensor]:
    """pixels(images): images (B, 3, H, W) as an image processor of transformers prepares them.

    Raises GradientError where it does something else than a resize, a crop and a normalisation.
    """
    owlv2 = "Owlv2" in type(processor).__name__  # pads to a square, and does not resize by PIL
    matrix_of = owlv2_resize if owlv2 else partial(pil_resize, int(processor.resample))
    if owlv2:  # black, and gray in transformers 4
        wide = processor(images=Image.new("RGB", (16, 8)), do_normalize=False, return_tensors="pt")
        gray = wide.pixel_values[0, 0, -1, -1].item()
    crops = bool(getattr(processor, "do_center_crop", False))

    @lru_cache(maxsize=64)
    def resized_shape(height: int, width: int) -> tuple[int, int]:
        """The processor's own answer: there are many rules."""
        off = {name: False for name in ("do_center_crop", "do_pad") if hasattr(processor, name)}
        blank = Image.new("RGB", (width, height))
        return processor(images=blank, return_tensors="pt", **off).pixel_values.shape[-2:]

    def pixels(images: torch.Tensor) -> torch.Tensor:
        images = images.float().clamp(0, 1)
        if owlv2:
            height, width = images.shape[-2:]
            side = max(height, width)
            padding = (0, side - width, 0, side - height)
            images = torch.nn.functional.pad(images, padding, value=gray)
        height, width = resized_shape(*images.shape[-2:])
        images = resized(images, height, width, matrix_of)
        if crops:
            size = processor.crop_size
            top, left = (height - size["height"]) // 2, (width - size["width"]) // 2
            images = images[..., top : top + size["height"], left : left + size["width"]]
        if not processor.do_normalize:
            return images
        return normalised(images, processor.image_mean, processor.image_std)

    generator = torch.Generator().manual_seed(0)
    for height, width in ((40, 56), (110, 150)):
        images = torch.randint(0, 256, (1, 3, height, width), generator=generator) / 255
        ours = pixels(images)
        theirs = processor(images=to_pil(images), return_tensors="pt").pixel_values
        step = 1 / 255 / (min(processor.image_std) if processor.do_normalize else 1)
        if ours.shape != theirs.shape or (ours - theirs).abs().max() > LARGEST_GAP * step:
            name = type(processor).__name__
            what = f"what {name} does to a picture is not known on tensors"
            raise GradientError(f"{what}; name other weights")
    return pixels
