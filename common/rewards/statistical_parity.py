"""Minus the distance of a group's classes from the uniform distribution.

The reward of Zhang et al. 2024, Eq. 12.

A reward of a set: all pictures of a group, on whatever rank they are, get the same value (3.2). The
value depends on the group's size as well: with n pictures drawn from K equal classes the mean of
its square is (1 - 1/K) / n.
"""

from collections.abc import Callable, Sequence

import torch

from common.rewards.base import (
    BATCH,
    MODEL_FILES,
    PROCESSOR_FILES,
    RewardError,
    check_options,
    check_weights,
    load_model,
    to_pil,
)

CLIP = "openai/clip-vit-large-patch14"
SKIN_TONES = "a photo of a person with dark skin,a photo of a person with brown skin"
SKIN_TONES += ",a photo of a person with medium skin,a photo of a person with light skin"
"""Labels for CLIP; the paper's classifier of four skin tones is not public."""


def statistical_parity(classes: list[int], num_classes: int) -> float:
    """|histogram of classes - uniform|_2 (Eq. 12): 0 is uniform, sqrt(1 - 1/K) a single class."""
    histogram = torch.bincount(torch.tensor(classes), minlength=num_classes).double() / len(classes)
    return (histogram - 1 / num_classes).norm().item()


def check(name: str, weights: str | None, options: dict[str, str]) -> None:
    check_options(name, options, ("labels",))
    labels = [label.strip() for label in options.get("labels", SKIN_TONES).split(",")]
    if len(labels) < 2 or len(set(labels)) < len(labels) or "" in labels:
        raise RewardError(
            f"{name} needs at least two labels, all of them different, with commas between them"
        )
    check_weights(weights, *MODEL_FILES, PROCESSOR_FILES)


def load(
    name: str, weights: str | None, options: dict[str, str], device: str | torch.device
) -> Callable:
    """In float32, in [-sqrt(1 - 1/K), 0]. What is returned classifies; its `of_groups` has rewards.

    `weights`: a hub id or a folder of an image classifier, or of a CLIP model whose classes are the
    texts of the option `labels`, with commas between them.
    """
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModelForImageClassification,
        AutoProcessor,
        CLIPModel,
    )

    weights = weights or CLIP
    config = AutoConfig.from_pretrained(weights)
    # A CLIP with a classification head has no text encoder.
    has_head = "CLIPForImageClassification" in (config.architectures or ())
    is_clip = config.model_type == "clip" and not has_head
    if "labels" in options and not is_clip:
        raise RewardError(f"labels are for CLIP; {weights!r} is a classifier with its own")
    labels = options.get("labels", SKIN_TONES).split(",")
    model_class, processor_class = AutoModelForImageClassification, AutoImageProcessor
    if is_clip:
        model_class, processor_class = CLIPModel, AutoProcessor
    model = load_model(model_class, weights, device)
    processor = processor_class.from_pretrained(weights)
    num_classes = len(labels) if is_clip else model.config.num_labels

    def classify(images: torch.Tensor) -> list[int]:
        texts = {"text": labels, "padding": True, "truncation": True} if is_clip else {}
        inputs = processor(images=to_pil(images), return_tensors="pt", **texts).to(device)
        out = model(**inputs)
        return (out.logits_per_image if is_clip else out.logits).argmax(-1).tolist()

    def classes_of(images: torch.Tensor, prompts: list[str]) -> list[int]:
        """Class of each picture; `of_groups` turns those of all ranks into rewards."""
        return [c for batch in images.split(BATCH) for c in classify(batch)]

    def of_groups(classes: list[int], groups: Sequence) -> dict[object, float]:
        """Values of groups, from the classes of all pictures of all ranks and their groups."""
        members = {}
        for group, c in zip(groups, classes):
            members.setdefault(group, []).append(c)
        for group, of_group in members.items():
            if len(of_group) == 1:
                name = repr(group) if isinstance(group, str) else f"group {group}"
                fault = f"statistical parity needs several pictures of a prompt, and {name} has one"
                remedy = "draw more of each in an iteration, or take fewer prompts"
                raise RewardError(f"{fault}; {remedy}")
        return {group: -statistical_parity(c, num_classes) for group, c in members.items()}

    classes_of.of_groups = of_groups
    return classes_of
