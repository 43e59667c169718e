"""The pairs of a human evaluation: the same prompt and the same noise, drawn by two models.

A side of a pair is a picture, or a set of them.
"""

import os
import secrets
from pathlib import Path

import numpy as np

from evaluation.folder import read_description, read_shard, shard_file
from evaluation.settings import Settings, memory_size, shards_of
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
            f"and --evaluation {folder} has {settings.images_per_prompt}; give fewer"
        )
    for name in chosen:
        for number in range(len(shards_of(settings))):
            if not os.path.lexists(shard_file(folder, name, number)):
                fail(
                    f"--evaluation {folder} lacks pictures of {name}; "
                    "run the command of evaluate.py again"
                )
    return chosen


def read_pictures(folder: Path, name: str, number: int, pictures: int) -> np.ndarray:
    """A shard's pictures; one that is not there ends the command."""
    stored = read_shard(folder, name, number, pictures)
    if not stored:
        fail(f"{folder} lacks pictures of {name}; run the command of evaluate.py again")
    return stored["images"]


def check_page(args, settings: Settings, size: int) -> None:
    """Refuse a page that memory cannot hold; `size` is the bytes of a picture.

    They are there as pixels and in the page, which is text, a few times over.
    """
    needed = 2 * len(settings.prompts) * args.images_per_prompt * size * 6
    if needed > memory_size():
        sizes = f"{needed / 1e9:.3g} GB of memory, of this machine's {memory_size() / 1e9:.3g} GB"
        fail(f"--images-per-prompt: the page would take {sizes}; lower it, or make several pages")


def shuffled_pairs(args, folder: Path, names: list[str]) -> tuple[dict, list[np.ndarray]]:
    """The pairs in the order of the page, and their sets of pictures, left before right.

    A set is uint8 (`args.set_size`, H, W, 3), consecutive pictures of a prompt; of the evaluation
    in `folder` the first `args.images_per_prompt` of each prompt are taken, which is a multiple.
    `args.shuffle_seed` None draws a seed. The pairs are {"questions", "set_size", "shuffle_seed",
    "pairs": [{"prompt", "image", "left", "right"}]}, with the number of the set's first picture,
    and the models' `names` on the two sides.
    """
    settings = Settings(**read_description(folder)["settings"])
    found = []
    for number, shard in enumerate(shards_of(settings)):
        pictures = len(shard) * settings.images_per_prompt
        both = [read_pictures(folder, name, number, pictures) for name in names]
        if both[0].shape != both[1].shape:
            fail(f"{folder}: pictures of {' and '.join(names)} differ in size; evaluate both anew")
        check_page(args, settings, both[0][0].size)
        both = [np.split(images, len(shard)) for images in both]
        for row, j in enumerate(shard):
            for i in range(0, args.images_per_prompt, args.set_size):
                sets = [images[row][i : i + args.set_size] for images in both]
                found.append((settings.prompts[j], i, sets))
    seed = secrets.randbits(64) if args.shuffle_seed is None else args.shuffle_seed
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(found))
    # Each model is on the left in half of the pairs.
    swapped = rng.permutation(np.arange(len(found)) % 2)
    pairs, shown = [], []
    for n, swap in zip(order, swapped):
        prompt, image, sets = found[n]
        left, right = (1, 0) if swap else (0, 1)
        pairs.append({"prompt": prompt, "image": image, "left": names[left], "right": names[right]})
        shown += [sets[left], sets[right]]
    asked = {"questions": args.questions, "set_size": args.set_size}
    return asked | {"shuffle_seed": seed, "pairs": pairs}, shown
