"""Weights, vocabulary and pictures of the ImageReward parity test, the same wherever they are made.

The oracle (make_image_reward_scores.py, in an old environment) and the test (test_image_reward.py,
in today's) each make them anew instead of sharing a file of 1.8 GB. So this needs nothing but
torch, numpy and Pillow.
"""

import math
import zlib
from itertools import product
from string import ascii_lowercase, digits, punctuation

import numpy as np
import torch
from PIL import Image

SPECIAL_TOKENS = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
VOCABULARY_SIZE = 30522

# BLIP's med_config.json, as it is published with ImageReward.
MED_CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "add_type_embeddings": False,
    "vocab_size": 30524,
    "encoder_width": 768,
    "add_cross_attention": True,
}

PAINTING = "a painting of an ocean with clouds and birds, day time, low depth field effect"
# (width, height, seed) of the picture, and the prompt. A picture comes back with another prompt and
# a prompt with another picture, so that scores are seen to depend on both. The sizes need
# shrinking, enlarging or neither, and a crop at the sides (with half a pixel to round) or at top
# and bottom; one prompt is longer than the 35 tokens that are read, one is empty, one has capitals,
# accents and punctuation.
CASES = [
    (512, 512, 1, PAINTING),
    (331, 225, 2, "a green rabbit"),
    (331, 225, 3, "four roses, " * 12 + "in a vase"),
    (200, 333, 4, "A Café on the MOON: 2 chairs & 3 tables (no people), by Émile"),
    (224, 224, 5, "a green rabbit"),
    (64, 64, 6, ""),
    (64, 64, 6, PAINTING),
]


def linear(name: str, out: int, *fan_in: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, *fan_in), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters in the published ImageReward.pt."""
    vision, text = 1024, 768
    names = {
        "blip.visual_encoder.cls_token": (1, 1, vision),
        "blip.visual_encoder.pos_embed": (1, 197, vision),
    }
    names |= linear("blip.visual_encoder.patch_embed.proj", vision, 3, 16, 16)
    for i in range(24):
        block = f"blip.visual_encoder.blocks.{i}"
        names |= norm(f"{block}.norm1", vision) | norm(f"{block}.norm2", vision)
        names |= linear(f"{block}.attn.qkv", 3 * vision, vision)
        names |= linear(f"{block}.attn.proj", vision, vision)
        names |= linear(f"{block}.mlp.fc1", 4 * vision, vision)
        names |= linear(f"{block}.mlp.fc2", vision, 4 * vision)
    names |= norm("blip.visual_encoder.norm", vision)
    embeddings = "blip.text_encoder.embeddings"
    names |= {f"{embeddings}.word_embeddings.weight": (VOCABULARY_SIZE + 2, text)}
    names |= {f"{embeddings}.position_embeddings.weight": (512, text)}
    names |= norm(f"{embeddings}.LayerNorm", text)
    for i in range(12):
        layer = f"blip.text_encoder.encoder.layer.{i}"
        for attention, keys in (("attention", text), ("crossattention", vision)):
            names |= linear(f"{layer}.{attention}.self.query", text, text)
            names |= linear(f"{layer}.{attention}.self.key", text, keys)
            names |= linear(f"{layer}.{attention}.self.value", text, keys)
            names |= linear(f"{layer}.{attention}.output.dense", text, text)
            names |= norm(f"{layer}.{attention}.output.LayerNorm", text)
        names |= linear(f"{layer}.intermediate.dense", 4 * text, text)
        names |= linear(f"{layer}.output.dense", text, 4 * text)
        names |= norm(f"{layer}.output.LayerNorm", text)
    names |= linear("blip.vision_proj", 256, vision) | linear("blip.text_proj", 256, text)
    widths = [text, 1024, 128, 64, 16, 1]
    for index, width, out in zip((0, 2, 4, 6, 7), widths, widths[1:]):
        names |= linear(f"mlp.layers.{index}", out, width)
    return names


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """One parameter: a function of its name alone.

    It is scaled so that what goes in with variance 1 comes out so.
    """
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    if "norm" in name.lower():
        noise *= 0.1
        return noise + 1 if name.endswith("weight") else noise
    # Embeddings as small as BERT's and ViT's own, so that the epsilon of the norms behind them
    # shows in the score.
    if name.endswith(("cls_token", "pos_embed", "embeddings.weight")):
        return noise.mul_(0.02)
    # The package's own initialisation makes the score nearly constant. Larger queries let attention
    # choose, and larger self-attention beside smaller cross-attention lets the prompt count beside
    # the picture.
    gains = {
        ".patch_embed.": 0.05,
        ".qkv.": 2.0,
        ".attention.self.": 2.0,
        ".attention.output.": 2.0,
        ".crossattention.output.": 0.5,
    }
    gain = math.prod(value for part, value in gains.items() if part in name)
    return noise.mul_(gain * 0.1 if name.endswith("bias") else gain / math.prod(shape[1:]) ** 0.5)


def published_state() -> dict[str, torch.Tensor]:
    """A random ImageReward.pt: every key of the published one."""
    state = {name: weight(name, shape) for name, shape in shapes().items()}
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(512)[None]
    return state


def vocabulary() -> list[str]:
    """As many entries as bert-base-uncased has, with its special tokens in their places.

    The rest are letter groups: every word is cut into pieces of up to three letters, so prompts
    reach all parts of the embedding table.
    """
    special = {index: token for token, index in SPECIAL_TOKENS.items()}
    entries = [special.get(i, f"[unused{i}]") for i in range(104)]
    groups = [*ascii_lowercase, *map("".join, product(ascii_lowercase, repeat=2))]
    entries += [*digits, *punctuation, *groups, *(f"##{group}" for group in [*digits, *groups])]
    triples = list(map("".join, product(ascii_lowercase, repeat=3)))
    return (entries + triples + [f"##{triple}" for triple in triples])[:VOCABULARY_SIZE]


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Coloured waves and noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.full((height, width, 3), 127.0)
    for channel in range(3):
        for _ in range(4):
            fx, fy = rng.uniform(-6, 6, 2)
            phase, amplitude = rng.uniform(0, 2 * np.pi), rng.uniform(15, 45)
            waves = 2 * np.pi * (fx * x / width + fy * y / height) + phase
            pixels[..., channel] += amplitude * np.sin(waves)
    pixels += rng.normal(0, 12, pixels.shape)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def fingerprint() -> dict[str, float]:
    """Tells, when scores differ, whether torch and numpy still draw the same numbers."""
    weights = weight("mlp.layers.0.weight", shapes()["mlp.layers.0.weight"])
    pixels = np.asarray(picture(*CASES[0][:3]), dtype=np.float64)
    ramp = np.sin(np.arange(pixels.size))
    return {
        "weights": float(weights.double().flatten().numpy() @ ramp[: weights.numel()]),
        "pixels": float(pixels.flatten() @ ramp),
    }
