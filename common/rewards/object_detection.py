"""Mean confidence with which a detector finds the objects that the prompt names (Zhang et al. 2024, Eq. 13)."""

import re

import torch

from common.rewards.base import (
    BATCH,
    MODEL_FILES,
    PROCESSOR_FILES,
    Reward,
    RewardError,
    check_options,
    check_weights,
    to_pil,
)

DETECTOR = "google/owlv2-base-patch16-ensemble"
RELATION = re.compile(r"\s+(?:and|next to|near|on side of|beside)\s+", re.IGNORECASE)
"""The five relations of Zhang et al. 2024, 4.3."""


def objects_of(prompt: str) -> list[str]:
    """The objects of a prompt, without articles: its attribute `objects` if its source gave it one, or else the two
    sides of a relation ("A cat next to a dog."); a prompt without one is one object."""
    named = getattr(prompt, "objects", None) or RELATION.split(prompt.strip().rstrip("."))
    return [re.sub(r"^(?:an?|the)\s+", "", name.strip(), flags=re.IGNORECASE).lower() for name in named]


def check(name: str, weights: str | None, options: dict[str, str]) -> None:
    check_options(name, options)
    check_weights(weights, *MODEL_FILES, PROCESSOR_FILES)


def load(name: str, weights: str | None, options: dict[str, str], device: str | torch.device) -> Reward:
    """In float32, in [0, 1]. `weights`: a hub id or a folder of a detector that takes any words (OWL-ViT, OWLv2,
    Grounding DINO), of one with fixed classes (DETR, YOLOS, RT-DETR, ...), or of an image classifier with several
    labels a picture (`problem_type` multi_label_classification). The confidence of an object is that of the box that
    has most of it."""
    from transformers import (
        MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
        MODEL_FOR_OBJECT_DETECTION_MAPPING,
        MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING,
        AutoConfig,
        AutoImageProcessor,
        AutoProcessor,
    )

    weights = weights or DETECTOR
    config = AutoConfig.from_pretrained(weights)
    any_words = type(config) in MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING
    if any_words:
        model_class = MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING[type(config)]
    elif type(config) in MODEL_FOR_OBJECT_DETECTION_MAPPING:
        model_class = MODEL_FOR_OBJECT_DETECTION_MAPPING[type(config)]
    elif config.problem_type == "multi_label_classification":
        model_class = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[type(config)]
    else:
        raise RewardError(f"{weights!r} is no detector of transformers, nor a classifier of several labels a picture")
    model = model_class.from_pretrained(weights, dtype=torch.float32).eval().requires_grad_(False).to(device)
    processor = (AutoProcessor if any_words else AutoImageProcessor).from_pretrained(weights)
    classes = {} if any_words else {label.lower(): i for i, label in config.id2label.items()}

    def check_prompts(prompts: list[str]) -> None:
        if unknown := [o for o in dict.fromkeys(o for p in prompts for o in objects_of(p)) if o not in classes]:
            known = ", ".join(classes)
            raise RewardError(f"{weights!r} does not know {', '.join(map(repr, unknown))}; it knows {known}")

    def confidences(pictures, objects: list[str]) -> torch.Tensor:
        """Of one object in each picture, (B,)."""
        if any_words:
            # OWL's texts are lists of queries, Grounding DINO's a text whose phrases end in a dot.
            grounding = "grounding" in config.model_type
            text = [f"{o}." for o in objects] if grounding else [[f"a photo of a {o}"] for o in objects]
            inputs = processor(images=pictures, text=text, padding=True, return_tensors="pt").to(device)
            return model(**inputs).logits.sigmoid().amax((1, 2))
        logits = model(**processor(images=pictures, return_tensors="pt").to(device)).logits
        # DETR and YOLOS have one class more, for "nothing here", and a softmax over them.
        chances = logits.softmax(-1) if logits.shape[-1] == len(classes) + 1 else logits.sigmoid()
        chances = chances if chances.dim() == 2 else chances.amax(1)
        return chances[torch.arange(len(objects)), torch.tensor([classes[o] for o in objects])]

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        pictures, named = to_pil(images), [objects_of(prompt) for prompt in prompts]
        if not any_words:
            check_prompts(prompts)
        rows = [(i, o) for i, names in enumerate(named) for o in names]
        found = [
            confidences([pictures[i] for i, _ in rows[k : k + BATCH]], [o for _, o in rows[k : k + BATCH]])
            for k in range(0, len(rows), BATCH)
        ]
        return torch.stack([part.mean() for part in torch.cat(found).split([len(names) for names in named])])

    if not any_words:
        reward.check_prompts = check_prompts
    return reward
