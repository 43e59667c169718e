"""Mean confidence with which a detector finds the prompt's objects (Zhang et al. 2024, Eq. 13)."""

import re
from collections.abc import Callable
from functools import partial

import torch

from common.rewards.base import (
    BATCH,
    MODEL_FILES,
    PROCESSOR_FILES,
    PromptError,
    Reward,
    RewardError,
    check_options,
    check_weights,
    load_model,
    to_pil,
)
from common.rewards.pixels import tensor_pixels

DETECTOR = "google/owlv2-base-patch16-ensemble"
RELATION = re.compile(r"\s+(?:and|next to|near|on side of|beside)\s+", re.IGNORECASE)
"""The five relations of Zhang et al. 2024, 4.3."""
ARTICLE = re.compile(r"^(?:an?|the)\s+", re.IGNORECASE)


def objects_of(prompt: str) -> list[str]:
    """The objects of a prompt, without articles.

    They are its attribute `objects` if its source gave it one, or else the two sides of a relation
    ("A cat next to a dog."); a prompt without one is one object.
    """
    named = getattr(prompt, "objects", None) or RELATION.split(prompt.strip().rstrip("."))
    return [ARTICLE.sub("", name.strip()).lower() for name in named]


def check(name: str, weights: str | None, options: dict[str, str]) -> None:
    check_options(name, options)
    check_weights(weights, *MODEL_FILES, PROCESSOR_FILES)


def load(
    name: str,
    weights: str | None,
    options: dict[str, str],
    device: str | torch.device,
    differentiable: bool = False,
) -> Reward:
    """In float32, in [0, 1].

    `weights`: a hub id or a folder of a detector that takes any words (OWL-ViT, OWLv2, Grounding
    DINO), of one with fixed classes (DETR, YOLOS, RT-DETR, ...), or of an image classifier with
    several labels a picture (`problem_type` multi_label_classification). The confidence of an
    object is that of the box that has most of it.
    """
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
        raise RewardError(
            f"{weights!r} is no detector of transformers, "
            "nor a classifier of several labels a picture"
        )
    model = load_model(model_class, weights, device)
    processor = (AutoProcessor if any_words else AutoImageProcessor).from_pretrained(weights)
    # COCO's 91 numbers have 80 names; the gaps are called N/A.
    classes = {} if any_words else {label.lower(): i for i, label in config.id2label.items()}
    classes.pop("n/a", None)
    grounding = "grounding" in config.model_type
    phrase = "{}." if grounding else "a photo of a {}"

    def check_prompts(prompts: list[str]) -> None:
        objects = list(dict.fromkeys(o for p in prompts for o in objects_of(p)))
        if any_words:
            most = config.text_config.max_position_embeddings
            most = min(getattr(config, "max_text_len", torch.inf), most)
            for o in objects:
                if (length := len(processor.tokenizer(phrase.format(o)).input_ids)) > most:
                    raise PromptError(
                        f"{weights!r} reads up to {most} tokens, "
                        f"and the object {o!r} takes {length}"
                    )
        elif unknown := [o for o in objects if o not in classes]:
            known = ", ".join(classes)
            raise PromptError(
                f"{weights!r} does not know {', '.join(map(repr, unknown))}; it knows {known}"
            )

    of_pictures = processor.image_processor if any_words else processor

    def exact(images: torch.Tensor) -> dict[str, torch.Tensor]:
        return of_pictures(images=to_pil(images), return_tensors="pt")

    def confidences(pictures: dict[str, torch.Tensor], objects: list[str]) -> torch.Tensor:
        """Of one object in each picture, (B,)."""
        pictures = {key: value.to(device) for key, value in pictures.items()}
        if any_words:
            # OWL's texts are lists of queries, Grounding DINO's a text whose phrases end in a dot.
            text = [phrase.format(o) if grounding else [phrase.format(o)] for o in objects]
            text = processor(text=text, padding=True, return_tensors="pt").to(device)
            return model(**pictures, **text).logits.sigmoid().amax((1, 2))
        logits = model(**pictures).logits
        # DETR and YOLOS have one class more, for "nothing here", and a softmax over them.
        one_more = logits.shape[-1] == config.num_labels + 1
        chances = logits.softmax(-1) if one_more else logits.sigmoid()
        chances = chances if chances.dim() == 2 else chances.amax(1)
        return chances[torch.arange(len(objects)), torch.tensor([classes[o] for o in objects])]

    def mean_confidences(
        images: torch.Tensor, prompts: list[str], inputs: Callable
    ) -> torch.Tensor:
        """Of the objects of each prompt, (B,); `inputs` are those of the model for images."""
        check_prompts(prompts)
        named = [objects_of(prompt) for prompt in prompts]
        rows = [(i, o) for i, names in enumerate(named) for o in names]
        found = []
        for k in range(0, len(rows), BATCH):
            shown, objects = zip(*rows[k : k + BATCH])
            found.append(confidences(inputs(images[list(shown)]), list(objects)))
        parts = torch.cat(found).split([len(names) for names in named])
        return torch.stack([part.mean() for part in parts])

    reward = partial(mean_confidences, inputs=exact)
    # What a processor needs beside transformers (OWLv2: scipy) is asked for at its first use.
    if any_words:
        confidences(exact(torch.zeros(1, 3, 8, 8)), ["cat"])
    if differentiable:
        pixels = tensor_pixels(of_pictures)
        on_tensors = lambda images: {"pixel_values": pixels(images)}
        reward.with_gradient = partial(mean_confidences, inputs=on_tensors)
    reward.check_prompts = check_prompts
    return reward
