"""Human Preference Score v2 and v2.1 (Wu et al. 2023, arXiv:2306.09341), native on transformers.

A CLIP ViT-H/14 trained on what people preferred; the score is the cosine of its embeddings of
picture and prompt. The published files have open_clip's names, which are translated here.
"""

import html
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from common.rewards.base import (
    TOKENIZER_FILES,
    Reward,
    RewardError,
    check_options,
    check_weights,
    load_model,
    reward_of_pixels,
)
from common.rewards.pixels import CLIP_MEAN, CLIP_STD, normalised, pil_resize, resized
from common.users_code import quoted

PUBLISHED = "xswu/HPSv2"
TOKENIZER = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
"""The same words and merges as open_clip's."""
FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
HEADS = 16
"""Of both transformers of ViT-H/14: all else of its sizes is in the shapes of its weights."""


def convert_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of an open_clip CLIP under the names of transformers' CLIPModel.

    Those of query, key and value are one tensor there and three here; a projection is multiplied
    from the right there.
    """
    renamed = {
        "visual.transformer.resblocks.": "vision_model.encoder.layers.",
        "transformer.resblocks.": "text_model.encoder.layers.",
        ".ln_1.": ".layer_norm1.",
        ".ln_2.": ".layer_norm2.",
        ".attn.out_proj.": ".self_attn.out_proj.",
        ".mlp.c_fc.": ".mlp.fc1.",
        ".mlp.c_proj.": ".mlp.fc2.",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.": "vision_model.embeddings.patch_embedding.",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre.": "vision_model.pre_layrnorm.",
        "visual.ln_post.": "vision_model.post_layernorm.",
        "visual.proj": "visual_projection.weight",
        "token_embedding.": "text_model.embeddings.token_embedding.",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.": "text_model.final_layer_norm.",
        "text_projection": "text_projection.weight",
    }
    converted = {}
    for key, value in state.items():
        for old, new in renamed.items():
            key = key.replace(old, new)
        layer, in_proj, kind = key.partition(".attn.in_proj_")
        if in_proj:
            for part, third in zip("qkv", value.chunk(3)):
                converted[f"{layer}.self_attn.{part}_proj.{kind}"] = third
        else:
            converted[key] = value.T if "_projection." in key else value
    return converted


def config_of(state: dict[str, torch.Tensor], eos_token_id: int) -> dict:
    """The CLIPConfig of converted weights, as a dictionary: sizes are read off their shapes."""
    towers = {}
    for side in ("text", "vision"):
        layers = {key.split(".")[3] for key in state if key.startswith(f"{side}_model.encoder.")}
        fc1 = state[f"{side}_model.encoder.layers.0.mlp.fc1.weight"]
        towers[side] = {
            "hidden_size": fc1.shape[1],
            "intermediate_size": fc1.shape[0],
            "num_hidden_layers": len(layers),
            "num_attention_heads": HEADS,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
        }
    width = state["visual_projection.weight"].shape[0]
    patch = state["vision_model.embeddings.patch_embedding.weight"].shape[-1]
    positions = len(state["vision_model.embeddings.position_embedding.weight"])
    image = {"patch_size": patch, "image_size": round((positions - 1) ** 0.5) * patch}
    text = {
        "vocab_size": len(state["text_model.embeddings.token_embedding.weight"]),
        "max_position_embeddings": len(state["text_model.embeddings.position_embedding.weight"]),
        "eos_token_id": eos_token_id,
    }
    return {
        "text_config": towers["text"] | text | {"projection_dim": width},
        "vision_config": towers["vision"] | image | {"projection_dim": width},
        "projection_dim": width,
    }


def open_clip_model(path: Path, eos_token_id: int, device: str | torch.device):
    """A CLIPModel with the weights of a published file, frozen and in float32 on `device`.

    The file is read as tensors alone: nothing in it is run. Raises RewardError where they are not
    those of an open_clip ViT.
    """
    from transformers import CLIPConfig, CLIPModel

    state = torch.load(path, map_location="cpu", weights_only=True)
    state = convert_open_clip(state.get("state_dict", state))
    try:
        config = CLIPConfig(**config_of(state, eos_token_id))
    except KeyError as missing:
        raise RewardError(f"{quoted(str(path))} lacks the weight {missing}") from None
    model = CLIPModel(config)
    found = model.load_state_dict(state, strict=False)
    if faulty := [*found.missing_keys, *found.unexpected_keys]:
        raise RewardError(f"{quoted(str(path))} does not fit a CLIPModel at {faulty[0]}")
    return model.eval().requires_grad_(False).to(device)


def hps_pixels(images: torch.Tensor, size: int) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1] as the released code prepares them, (B, 3, size, size).

    The whole picture, its long side `size`, in a black square. The resize is torch's bicubic one of
    float images, with antialiasing: it rounds nothing and may leave [0, 1]. It has a gradient.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    height, width = round(height * scale), round(width * scale)
    bicubic = partial(pil_resize, int(Image.Resampling.BICUBIC))
    images = resized(images.float().clamp(0, 1), height, width, bicubic, clamped=False)
    down, across = size - height, size - width
    padding = (across // 2, across - across // 2, down // 2, down - down // 2)
    return normalised(torch.nn.functional.pad(images, padding), CLIP_MEAN, CLIP_STD)


def check(name: str, weights: str | None, options: dict[str, str]) -> None:
    check_options(name, options, ("version",))
    if (version := options.get("version", "2.0")) not in FILES:
        raise RewardError(f"version={version} of {name} is none; there are: {', '.join(FILES)}")
    check_weights(weights, (FILES[version], "model.safetensors"))
    if weights and Path(weights).is_dir():
        if not (Path(weights) / FILES[version]).is_file():
            check_weights(weights, ("config.json",))
        check_weights(weights, TOKENIZER_FILES)


def load(
    name: str,
    weights: str | None,
    options: dict[str, str],
    device: str | torch.device,
    differentiable: bool = False,
) -> Reward:
    """In float32, in [-1, 1].

    `weights`: None is the published checkpoint of the option `version`; a hub id or a folder has
    that file, or config.json and model.safetensors of a CLIPModel, with the tokenizer's files
    beside it.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from transformers import AutoTokenizer, CLIPModel

    file = FILES[options.get("version", "2.0")]
    if weights is None or weights == PUBLISHED:
        checkpoint = Path(hf_hub_download(PUBLISHED, file))
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    else:
        folder = Path(weights) if Path(weights).is_dir() else Path(snapshot_download(weights))
        checkpoint = folder / file
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if checkpoint.is_file():
        model = open_clip_model(checkpoint, tokenizer.eos_token_id, device)
    else:
        model = load_model(CLIPModel, str(folder), device)
    of_text = model.config.text_config
    if len(tokenizer) != of_text.vocab_size:
        what = f"{len(tokenizer)} tokens, and the model has {of_text.vocab_size}"
        raise RewardError(f"the tokenizer of {name} has {what}; put the model's own beside it")

    def score(pixels: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        # As open_clip cleans a text, but for what the package ftfy would mend.
        texts = [html.unescape(html.unescape(prompt)) for prompt in prompts]
        tokens = tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=of_text.max_position_embeddings,
            return_tensors="pt",
        ).to(device)
        out = model(**tokens, pixel_values=pixels.to(device))
        return (out.image_embeds * out.text_embeds).sum(-1)

    pixels = partial(hps_pixels, size=model.config.vision_config.image_size)

    def of_8_bits(images: torch.Tensor) -> torch.Tensor:
        return pixels((images.float().clamp(0, 1) * 255).round() / 255)

    return reward_of_pixels(score, of_8_bits, pixels if differentiable else None)
