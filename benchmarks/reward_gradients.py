"""How far the differentiable path of the rewards is from the path through PIL, and what it costs.

On held-out pictures of the zoo's world, through its VAE; on them rounded to 8 bits, where only the
rounding after the resize is left; and on noise, the worst case. The models are the zoo's own and
tiny ones of the real architectures with random weights (tests/tiny_models.py).

python -m benchmarks.reward_gradients      writes benchmarks/results/reward_gradients.json
"""

import json
import tempfile
import time
from functools import partial
from pathlib import Path

import PIL
import torch
import transformers
from PIL import Image

from benchmarks.rewards import tiny_specs
from benchmarks.zoo import held_out
from benchmarks.zoo_eval import ROOT, load_pipeline, weights_digest
from common.rewards import DIFFERENTIABLE, load_reward
from common.rewards.base import to_pil
from common.rewards.pixels import pil_resize, resized, tensor_pixels
from zoo import world

SIZES = ((64, 64), (224, 224), (256, 192), (512, 512))
COUNT = 16
OBJECTS = ["a cat and a dog", "a cup", "a dog", "a cup near a cat"] * (COUNT // 4)
"""What the detectors are asked for; the other rewards are given the pictures' captions."""
PROCESSORS = ("CLIP", "Blip", "ViT", "OwlViT", "Owlv2", "Detr", "RTDetr")


def pictures(decoded: torch.Tensor, height: int, width: int) -> dict[str, torch.Tensor]:
    """(COUNT, 3, height, width) of each kind."""
    shape, generator = (height, width), torch.Generator().manual_seed(0)
    renders = torch.nn.functional.interpolate(decoded, shape, mode="bicubic", antialias=True)
    renders = renders.clamp(0, 1)
    noise = torch.rand(renders.shape, generator=generator)
    return {"renders": renders, "renders of 8 bits": (renders * 255).round() / 255, "noise": noise}


def gap(found: torch.Tensor, expected: torch.Tensor, unit: float = 1.0) -> dict[str, float]:
    difference = (found - expected).abs() / unit
    return {"largest": difference.max().item(), "mean": difference.mean().item()}


def pixel_gaps(decoded: torch.Tensor) -> dict[str, dict]:
    """Gaps to the pixels of transformers' processors at their own sizes, in steps of 8 bits."""
    found = {}
    for name in PROCESSORS:
        processor = getattr(transformers, f"{name}ImageProcessor")(do_normalize=False)
        on_tensors = tensor_pixels(processor)
        for size in SIZES:
            for kind, images in pictures(decoded[:1], *size).items():
                exact = processor(images=to_pil(images), return_tensors="pt").pixel_values
                key = f"{name}, {size[0]} x {size[1]}, {kind}"
                found[key] = gap(on_tensors(images), exact, 1 / 255)
    return found


def clamping_gaps(decoded: torch.Tensor, side: int = 224) -> dict[str, dict]:
    """The same of a bicubic resize with no clamp, with one at its end, and as it is.

    With the share of pixels that a clamp cuts off from the gradient.
    """
    matrix_of = partial(pil_resize, int(Image.Resampling.BICUBIC))
    size = {"height": side, "width": side}
    processor = transformers.BlipImageProcessor(size=size, do_normalize=False)
    found = {}
    for shape in SIZES:
        down, across = (torch.from_numpy(matrix_of(n, side)) for n in shape)
        for kind, images in pictures(decoded, *shape).items():
            exact = processor(images=to_pil(images), return_tensors="pt").pixel_values
            free, ours = down @ images @ across.T, resized(images, side, side, matrix_of)
            found[f"{shape[0]} x {shape[1]}, {kind}"] = {
                "no clamp": gap(free, exact, 1 / 255),
                "one clamp": gap(free.clamp(0, 1), exact, 1 / 255),
                "a clamp a pass": gap(ours, exact, 1 / 255),
                "clamped": ((free < 0) | (free > 1)).float().mean().item(),
            }
    return found


def score_gaps(spec: str, decoded: torch.Tensor, prompts: list[str]) -> dict[str, dict]:
    """Gaps of scores, with the standard deviation of the scores of the COUNT pictures."""
    reward, found = load_reward(spec, differentiable=True), {}
    for size in SIZES:
        for kind, images in pictures(decoded, *size).items():
            scores = reward(images, prompts)
            with torch.no_grad():
                others = reward.with_gradient(images, prompts)
            key = f"{size[0]} x {size[1]}, {kind}"
            found[key] = {**gap(others, scores), "std": scores.std().item()}
    return found


def seconds_of_a_picture(spec: str, images: torch.Tensor, prompts: list[str]) -> dict[str, float]:
    """CPU time on one thread: through PIL, and on tensors with the backward pass."""
    torch.set_num_threads(1)
    reward = load_reward(spec, differentiable=True)

    def backward():
        leaf = images.clone().requires_grad_()
        reward.with_gradient(leaf, prompts).sum().backward()

    found = {}
    for name, call in (
        ("through PIL", lambda: reward(images, prompts)),
        ("with gradient", backward),
    ):
        call()
        start = time.process_time()
        for _ in range(5):
            call()
        found[name] = (time.process_time() - start) / 5 / len(images)
    return found


def main():
    decoded, scenes = held_out(load_pipeline().vae, COUNT)
    captions = [world.caption(scene) for scene in scenes]
    with tempfile.TemporaryDirectory() as folder:
        tiny = {k: v for k, v in tiny_specs(Path(folder)).items() if k.startswith(DIFFERENTIABLE)}
        zoo = ("image_reward:zoo/image_reward", "object_detection:zoo/detector")
        specs = {spec: spec for spec in zoo} | {f"{name} (tiny)": v for name, v in tiny.items()}
        scores = {}
        for name, spec in specs.items():
            prompts = OBJECTS if name.startswith("object_detection") else captions
            scores[name] = score_gaps(spec, decoded, prompts)
            print(name, json.dumps(scores[name], indent=2), flush=True)
    seconds = {
        f"{spec}, 512 x 512": seconds_of_a_picture(
            spec, pictures(decoded, 512, 512)["renders"], prompts
        )
        for spec, prompts in zip(zoo, (captions, OBJECTS))
    }
    results = {"weights": weights_digest(), "torch": torch.__version__, "pictures": COUNT}
    results |= {"pillow": PIL.__version__, "transformers": transformers.__version__}
    results |= {"scores": scores, "pixels": pixel_gaps(decoded)}
    results |= {"clamping": clamping_gaps(decoded), "cpu_seconds_of_a_picture": seconds}
    path = ROOT / "benchmarks/results/reward_gradients.json"
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
