"""PickScore and HPS v2 on tiny models, against transformers and against open_clip written out."""

import html
import shutil

import pytest
import torch
from tiny_models import ROOT, make_clip, make_hps, open_clip_shapes, pictures
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer

from common.rewards import RewardError, check_spec, load_reward
from common.rewards.hps_v2 import FILES, config_of, convert_open_clip, hps_pixels

PROMPTS = ["a cat", "a dog and a cup", "the red bottle in the park", "two"]
SIZES = [(32, 32), (24, 24), (40, 56), (130, 90), (32, 20)]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)


def of_8_bits(count: int, height: int, width: int) -> torch.Tensor:
    return (pictures(count, height, width, seed=3) * 255).round() / 255


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def hps_folder(tmp_path_factory):
    return make_hps(tmp_path_factory.mktemp("hps"))


def test_pick_score_is_clips_own_logit(clip_folder):
    """Of a picture and a prompt, as its released code has it: the scale is not taken out."""
    images, model = of_8_bits(4, 40, 56), CLIPModel.from_pretrained(clip_folder)
    scores = load_reward(f"pick_score:{clip_folder}")(images, PROMPTS)
    processor = CLIPProcessor.from_pretrained(clip_folder)
    for picture, prompt, score in zip(images, PROMPTS, scores):
        array = (picture * 255).round().byte().permute(1, 2, 0).numpy()
        inputs = processor(images=array, text=prompt, return_tensors="pt")
        expected = model(**inputs).logits_per_image.item()
        assert score.item() == pytest.approx(expected, abs=1e-5)
    cosines = load_reward(f"clip_score:{clip_folder}")(images, PROMPTS)
    scale = model.logit_scale.exp().item()
    assert scale > 5 and scores.std() > 1e-2
    torch.testing.assert_close(scores, scale * cosines, rtol=0, atol=1e-5)


def prepared(images: torch.Tensor, size: int = 32) -> torch.Tensor:
    """The released code's preprocessing on torch's own resize: pictures are placed one by one."""
    squares = torch.zeros(len(images), 3, size, size)
    height, width = images.shape[-2:]
    new = round(height * (size / max(height, width))), round(width * (size / max(height, width)))
    small = F.interpolate(images, new, mode="bicubic", align_corners=False, antialias=True)
    top, left = (size - new[0]) // 2, (size - new[1]) // 2
    squares[..., top : top + new[0], left : left + new[1]] = small
    return (squares - MEAN) / STD


def transformer(state: dict, begin: str, x: torch.Tensor, mask=None) -> torch.Tensor:
    """open_clip's residual blocks, by its names, on torch's own attention of 16 heads."""
    width, layer = x.shape[-1], 0
    while f"{begin}transformer.resblocks.{layer}.ln_1.weight" in state:
        block = f"{begin}transformer.resblocks.{layer}."
        own = {key.removeprefix(block): w for key, w in state.items() if key.startswith(block)}
        attention = torch.nn.MultiheadAttention(width, 16, batch_first=True)
        names = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        attention.load_state_dict({name: own[f"attn.{name}"] for name in names})
        y = F.layer_norm(x, (width,), own["ln_1.weight"], own["ln_1.bias"])
        x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = F.layer_norm(x, (width,), own["ln_2.weight"], own["ln_2.bias"])
        y = F.gelu(F.linear(y, own["mlp.c_fc.weight"], own["mlp.c_fc.bias"]))
        x = x + F.linear(y, own["mlp.c_proj.weight"], own["mlp.c_proj.bias"])
        layer += 1
    assert layer == 2
    return x


def of_picture(state: dict, pixels: torch.Tensor) -> torch.Tensor:
    patches = F.conv2d(pixels, state["visual.conv1.weight"], stride=8).flatten(2).mT
    first = state["visual.class_embedding"].expand(len(pixels), 1, -1)
    x = torch.cat([first, patches], 1) + state["visual.positional_embedding"]
    x = F.layer_norm(x, x.shape[-1:], state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    x = transformer(state, "visual.", x)[:, 0]
    x = F.layer_norm(x, x.shape[-1:], state["visual.ln_post.weight"], state["visual.ln_post.bias"])
    return F.normalize(x @ state["visual.proj"], dim=-1)


def of_text(state: dict, ids: torch.Tensor) -> torch.Tensor:
    """The text ends at its highest token; what follows are zeros, which no mask hides."""
    length = ids.shape[1]
    x = F.embedding(ids, state["token_embedding.weight"]) + state["positional_embedding"]
    mask = torch.full((length, length), -torch.inf).triu(1)
    x = transformer(state, "", x, mask)
    x = F.layer_norm(x, x.shape[-1:], state["ln_final.weight"], state["ln_final.bias"])
    x = x[torch.arange(len(x)), ids.argmax(-1)] @ state["text_projection"]
    return F.normalize(x, dim=-1)


def token_ids(texts: list[str], length: int = 24) -> torch.Tensor:
    """Begin, text and end, filled up with zeros; of a long text the last token becomes the end."""
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "zoo/sd/tokenizer")
    ids = torch.zeros(len(texts), length, dtype=torch.long)
    for row, text in zip(ids, texts):
        words = tokenizer(text, add_special_tokens=False).input_ids
        own = [tokenizer.bos_token_id, *words, tokenizer.eos_token_id][:length]
        own[-1] = tokenizer.eos_token_id
        row[: len(own)] = torch.tensor(own)
    return ids


@torch.no_grad()
def open_clip_scores(folder, images, texts, file="HPS_v2_compressed.pt") -> torch.Tensor:
    state = torch.load(folder / file, weights_only=True)["state_dict"]
    return (of_picture(state, prepared(images)) * of_text(state, token_ids(texts))).sum(-1)


@pytest.mark.parametrize("size", SIZES)
def test_hps_equals_open_clip_written_out(hps_folder, size):
    images = of_8_bits(4, *size)
    scores = load_reward(f"hps_v2:{hps_folder}")(images, PROMPTS)
    expected = open_clip_scores(hps_folder, images, PROMPTS)
    assert scores.dtype == torch.float32 and expected.std() > 1e-2
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prompt", ["", "a cat " * 30, "a cat &amp; a dog", "A  CAT\n"])
def test_hps_reads_texts_as_open_clip_does(hps_folder, prompt):
    """Nothing, more than fits, characters as HTML has them, and blanks."""
    images, text = of_8_bits(1, 32, 32), html.unescape(prompt).lower().strip()
    score = load_reward(f"hps_v2:{hps_folder}")(images, [prompt])
    expected = open_clip_scores(hps_folder, images, [" ".join(text.split())])
    torch.testing.assert_close(score, expected, rtol=0, atol=1e-5)


def test_hps_equals_transformers_own_clip(hps_folder, tmp_path):
    """Converted weights that were saved as a CLIPModel, in a folder of transformers' format."""
    images = of_8_bits(4, 40, 56)
    state = torch.load(hps_folder / "HPS_v2_compressed.pt", weights_only=True)["state_dict"]
    folder = tmp_path / "transformers"
    make_clip(folder)
    config = CLIPModel.from_pretrained(folder).config
    for of, width in ((config.text_config, 32), (config.vision_config, 48)):
        of.hidden_size, of.intermediate_size = width, 4 * width
        of.num_attention_heads, of.hidden_act = 16, "gelu"
    model = CLIPModel(config)
    model.load_state_dict(convert_open_clip(state), strict=True)
    model.save_pretrained(folder)
    scores = load_reward(f"hps_v2:{folder}")(images, PROMPTS)
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "zoo/sd/tokenizer")
    with torch.no_grad():
        tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
        logits = model(**tokens, pixel_values=prepared(images)).logits_per_image
    expected = logits.diagonal() / model.logit_scale.exp()
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    theirs = load_reward(f"hps_v2:{hps_folder}")(images, PROMPTS)
    torch.testing.assert_close(scores, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [*SIZES, (512, 512), (300, 700)])
def test_hps_pixels_are_those_of_torchs_resize(size):
    """On noise, in black and white too, where a bicubic resize overshoots: it is not cut off."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (2, 3, *size), generator=generator) / 255
    for images in (noise, noise.round()):
        torch.testing.assert_close(hps_pixels(images, 32), prepared(images), rtol=0, atol=1e-5)
    if size == (24, 24):
        shown = prepared(noise.round()) * STD + MEAN
        assert shown.min() < -0.05 and shown.max() > 1.05


@pytest.mark.parametrize("size", SIZES)
def test_both_paths_of_hps_are_one_on_pictures_of_8_bits(hps_folder, size):
    reward = load_reward(f"hps_v2:{hps_folder}", differentiable=True)
    images = of_8_bits(4, *size)
    gap = (reward.with_gradient(images, PROMPTS) - reward(images, PROMPTS)).abs().max()
    assert gap < 1e-6


def test_the_version_names_the_file(tmp_path):
    folder, images = make_hps(tmp_path), of_8_bits(3, 32, 32)
    make_hps(tmp_path, "HPS_v2.1_compressed.pt", seed=7)
    assert set(FILES.values()) <= {file.name for file in tmp_path.iterdir()}
    for version, file in FILES.items():
        scores = load_reward(f"hps_v2:{folder}?version={version}")(images, PROMPTS[:3])
        expected = open_clip_scores(folder, images, PROMPTS[:3], file)
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    default = load_reward(f"hps_v2:{folder}")(images, PROMPTS[:3])
    assert not torch.allclose(default, scores, atol=1e-3)
    with pytest.raises(RewardError, match=r"version=3 of hps_v2 is none; there are: 2.0, 2.1"):
        check_spec("hps_v2?version=3")
    (folder / "HPS_v2.1_compressed.pt").unlink()
    with pytest.raises(RewardError, match=r"holds no HPS_v2.1_compressed.pt or model.safetensors"):
        check_spec(f"hps_v2:{folder}?version=2.1")


def test_weights_that_do_not_fit_are_refused(hps_folder, tmp_path):
    """One is missing, one is of another model, the tokenizer is another."""
    file = "HPS_v2_compressed.pt"
    whole = torch.load(hps_folder / file, weights_only=True)["state_dict"]
    ln_pre, proj = "visual.ln_pre.bias", "visual.proj"
    for name, change, message in (
        ("bias", lambda state: state.pop(ln_pre), "at vision_model.pre_layrnorm.bias"),
        ("proj", lambda state: state.pop(proj), "lacks the weight 'visual_projection.weight'"),
        ("more", lambda state: state.update(head=torch.ones(1)), "at head"),
    ):
        folder, state = shutil.copytree(hps_folder, tmp_path / name), dict(whole)
        change(state)
        torch.save({"state_dict": state}, folder / file)
        with pytest.raises(RewardError, match=message) as error:
            load_reward(f"hps_v2:{folder}")
        assert "\n" not in str(error.value)
    folder = shutil.copytree(hps_folder, tmp_path / "tokenizer")
    whole["token_embedding.weight"] = whole["token_embedding.weight"][:-1]
    torch.save({"state_dict": whole}, folder / file)
    with pytest.raises(RewardError, match="719 tokens, and the model has 718"):
        load_reward(f"hps_v2:{folder}")


class RunsWhenLoaded:
    def __reduce__(self):
        return (open, ("it-ran", "w"))


def test_a_file_of_weights_runs_nothing(hps_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(hps_folder, tmp_path / "hps")
    torch.save({"state_dict": {"logit_scale": RunsWhenLoaded()}}, folder / "HPS_v2_compressed.pt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        load_reward(f"hps_v2:{folder}")
    assert not (tmp_path / "it-ran").exists()


def test_names_and_shapes_of_the_published_size():
    """ViT-H/14 as open_clip names it, without its numbers, is transformers' CLIPModel."""
    sizes = open_clip_shapes(49408, 77, (1024, 24), (1280, 32), patches=256, patch=14, dim=1024)
    with torch.device("meta"):
        state = convert_open_clip({name: torch.empty(shape) for name, shape in sizes.items()})
        model = CLIPModel(CLIPConfig(**config_of(state, 49407)))
    expected = {name: weight.shape for name, weight in model.state_dict().items()}
    assert {name: weight.shape for name, weight in state.items()} == expected
    assert model.config.vision_config.image_size == 224
    assert sum(weight.numel() for weight in state.values()) == 986_109_441
