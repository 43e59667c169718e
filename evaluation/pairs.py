"""The pairs of a human evaluation: the same prompt and the same noise, drawn by two models."""

import secrets
from pathlib import Path

import numpy as np

from evaluation.folder import read_description, read_shard, shard_file
from evaluation.settings import Settings, shards_of
from harness.args import fail


def choose_models(folder: Path, names: tuple[str, ...], images_per_prompt: int) -> list[str]:
    """Two models of the evaluation in `folder`, by default its only two, with all their pictures.

    What is not to be had ends the command.
    """
    there = read_description(folder)
    if there is None:
        fail(
            f"--evaluation {folder} is no output folder of evaluate.py (it has no evaluation.json)"
        )
    chosen = list(names or there["models"])
    if len(set(chosen)) != 2 or len(chosen) != 2 or not {*chosen} <= there["models"].keys():
        fail(f"--models: name two of {', '.join(there['models'])}")
    settings = Settings(**there["settings"])
    if images_per_prompt > settings.images_per_prompt:
        fail(
            f"--images-per-prompt is {images_per_prompt}, "
            f"and --evaluation {folder} has {settings.images_per_prompt}"
        )
    for name in chosen:
        for number in range(len(shards_of(settings))):
            if not shard_file(folder, name, number).exists():
                fail(
                    f"--evaluation {folder} lacks pictures of {name}; "
                    "run the command of evaluate.py again"
                )
    return chosen


def shuffled_pairs(args, folder: Path, names: list[str]) -> tuple[dict, list[np.ndarray]]:
    """The pairs in the order of the page, and their pictures, uint8 (H, W, 3), left before right.

    Of the evaluation in `folder` the first `args.images_per_prompt` pictures of each prompt;
    `args.shuffle_seed` None draws a seed. The pairs are {"shuffle_seed", "pairs": [{"prompt",
    "image", "left", "right"}]}, with the models' `names` on the two sides.
    """
    settings = Settings(**read_description(folder)["settings"])
    found = []
    for number, shard in enumerate(shards_of(settings)):
        both = [read_shard(folder, name, number)["images"] for name in names]
        both = [np.split(images, len(shard)) for images in both]
        for row, j in enumerate(shard):
            for i in range(args.images_per_prompt):
                found.append((settings.prompts[j], i, [images[row][i] for images in both]))
    seed = secrets.randbits(64) if args.shuffle_seed is None else args.shuffle_seed
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(found))
    # Each model is on the left in half of the pairs.
    swapped = rng.permutation(np.arange(len(found)) % 2)
    pairs, pictures = [], []
    for n, swap in zip(order, swapped):
        prompt, image, both = found[n]
        left, right = (1, 0) if swap else (0, 1)
        pairs.append({"prompt": prompt, "image": image, "left": names[left], "right": names[right]})
        pictures += [both[left], both[right]]
    return {"shuffle_seed": seed, "pairs": pairs}, pictures
