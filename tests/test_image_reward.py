"""ImageReward against scores of its own package, and what else `load_reward` can load."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import recipe
from PIL import Image
from safetensors.torch import save_file

from common.rewards import RewardError, load_reward
from common.rewards.image_reward import ImageReward

ORACLE = Path(__file__).parent / "oracle/image_reward_scores.json"
ORACLE = json.loads(ORACLE.read_text(encoding="utf-8"))
PROMPTS = ["a cat", "a dog on the moon", "two cats", ""]


def to_tensor(*pictures: Image.Image) -> torch.Tensor:
    array = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255


def write_tokenizer(folder: Path, vocabulary: list[str]) -> None:
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    config = '{"tokenizer_class": "BertTokenizer", "do_lower_case": true}'
    (folder / "tokenizer_config.json").write_text(config)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """The published architecture at its full size, from a file as it is published."""
    folder = tmp_path_factory.mktemp("image-reward")
    write_tokenizer(folder, recipe.vocabulary())
    torch.save(recipe.published_state(), folder / "ImageReward.pt")
    reward = load_reward(f"image_reward:{folder}")
    shutil.rmtree(folder)  # 1.8 GB
    return reward


def case_pictures(cases: list[dict]) -> torch.Tensor:
    keys = ("width", "height", "seed")
    return to_tensor(*(recipe.picture(*(case[key] for key in keys)) for case in cases))


def test_recipe_draws_what_the_oracle_drew():
    """When this fails, the parity below fails too, and says nothing: make the scores again."""
    assert recipe.fingerprint() == pytest.approx(ORACLE["fingerprint"], abs=1e-3)
    keys = ("width", "height", "seed", "prompt")
    assert [tuple(case[key] for key in keys) for case in ORACLE["cases"]] == recipe.CASES


def test_scores_equal_the_packages(full_size):
    expected = [case["score"] for case in ORACLE["cases"]]
    scores = [full_size(case_pictures([case]), [case["prompt"]]).item() for case in ORACLE["cases"]]
    print("largest difference from the package:", np.abs(np.subtract(scores, expected)).max())
    assert scores == pytest.approx(expected, abs=1e-5)


def test_a_batch_scores_as_its_pictures_alone(full_size):
    by_size = {}
    for case in ORACLE["cases"]:
        by_size.setdefault((case["width"], case["height"]), []).append(case)
    batches = [cases for cases in by_size.values() if len(cases) > 1]
    assert batches
    for cases in batches:
        scores = full_size(case_pictures(cases), [case["prompt"] for case in cases])
        assert scores.tolist() == pytest.approx([case["score"] for case in cases], abs=1e-5)


TINY_CONFIG = {
    "vision": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "layer_norm_eps": 1e-6,
    },
    "text": {
        "vocab_size": 0,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "encoder_hidden_size": 32,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 12,
    },
    "mlp": [32, 16, 8, 4, 1],
    "max_length": 12,
    "score_mean": 0.5,
    "score_std": 2.0,
}


@pytest.fixture
def tiny_folder(tmp_path) -> Path:
    """A reward of one's own, as zoo.pretrain saves one."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary += ["a", "cat", "cats", "dog", "on", "the", "moon", "two"]
    config = TINY_CONFIG | {"text": TINY_CONFIG["text"] | {"vocab_size": len(vocabulary)}}
    folder = tmp_path / "tiny-reward"
    folder.mkdir()
    write_tokenizer(folder, vocabulary)
    (folder / "config.json").write_text(json.dumps(config))
    model = ImageReward(config)
    # As small as they are initialised, the weights would give every picture the same score.
    state = {}
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        noise = torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
        state[name] = noise if value.ndim > 1 else value
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.fixture
def images() -> torch.Tensor:
    return to_tensor(*(recipe.picture(48, 40, seed) for seed in range(4)))


def test_tiny_folder(tiny_folder, images):
    reward = load_reward(f"image_reward:{tiny_folder}")
    scores = reward(images, PROMPTS)
    assert scores.shape == (4,) and scores.dtype == torch.float32 and not scores.requires_grad
    alone = torch.cat([reward(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(scores, alone, rtol=0, atol=1e-5)
    other_prompts = reward(images, PROMPTS[1:] + PROMPTS[:1])
    other_images = reward(images.flip(0), PROMPTS)
    assert (scores - other_prompts).abs().min() > 1e-3
    assert (scores - other_images).abs().min() > 1e-3
    torch.testing.assert_close(reward(images, PROMPTS), scores, rtol=0, atol=0)


def test_score_is_standardised_by_the_config(tiny_folder, images):
    scores = load_reward(f"image_reward:{tiny_folder}")(images, PROMPTS)
    config = json.loads((tiny_folder / "config.json").read_text())
    config |= {"score_mean": 0.0, "score_std": 1.0}
    (tiny_folder / "config.json").write_text(json.dumps(config))
    raw = load_reward(f"image_reward:{tiny_folder}")(images, PROMPTS)
    torch.testing.assert_close(scores, (raw - 0.5) / 2.0)


def test_prompts_are_cut_at_the_models_length(tiny_folder, images):
    reward = load_reward(f"image_reward:{tiny_folder}")
    long = "a cat on the moon two cats dog cat cat"  # 10 tokens and the two at its ends
    cut, different = reward(images[:1], [f"{long} dog"]), reward(images[:1], ["dog " + long])
    torch.testing.assert_close(cut, reward(images[:1], [long]), rtol=0, atol=0)
    assert (cut - different).abs().item() > 1e-4


def test_other_tokenizer_beside_the_published_weights(tiny_folder):
    """Its ids would be looked up in the wrong rows of the embedding, without an error."""
    torch.save({}, tiny_folder / "ImageReward.pt")
    message = r"tokenizer beside .*tiny-reward.* is not bert-base-uncased"
    with pytest.raises(RewardError, match=message):
        load_reward(f"image_reward:{tiny_folder}")


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "vocab.txt"])
def test_incomplete_folder(tiny_folder, missing):
    (tiny_folder / missing).unlink()
    with pytest.raises(RewardError, match="tiny-reward"):
        load_reward(f"image_reward:{tiny_folder}")


def test_missing_folder(tmp_path):
    with pytest.raises(RewardError, match=r"no folder .*nowhere"):
        load_reward(f"image_reward:{tmp_path / 'nowhere'}")


def kilobytes(picture: Image.Image) -> float:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=95)
    return len(file.getvalue()) / 1000


def test_jpeg_size():
    pictures = [recipe.picture(64, 48, seed) for seed in range(5)]
    black, white = Image.new("RGB", (64, 48)), Image.new("RGB", (64, 48), "white")
    # Plain ones are much smaller: their places are seen.
    pictures = [pictures[0], black, *pictures[1:], white]
    expected = torch.tensor([kilobytes(picture) for picture in pictures])
    assert expected[1] < expected[0] / 2 and expected[-1] < expected[0] / 2
    images, prompts = to_tensor(*pictures), [""] * len(pictures)
    size = load_reward("jpeg_incompressibility")(images, prompts)
    torch.testing.assert_close(size, expected, rtol=0, atol=0)
    assert size.dtype == torch.float32
    assert torch.equal(load_reward("jpeg_compressibility")(images, prompts), -size)


def test_jpeg_size_of_pictures_a_decoder_overshoots(images):
    """Values a little outside of [0, 1] are 0 and 1, not wrapped around."""
    images = images.round()
    overshot = images * 1.2 - 0.1
    assert overshot.min() < 0 and overshot.max() > 1
    reward = load_reward("jpeg_incompressibility")
    assert torch.equal(reward(overshot, PROMPTS), reward(images, PROMPTS))


USERS_FILE = """
import torch

def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3)) + torch.tensor([len(prompt) for prompt in prompts])

def plain_list(images, prompts):
    return [float(len(prompt)) for prompt in prompts]

def not_a_number(images, prompts):
    return torch.tensor([float("nan") if prompt == "two cats" else 1.0 for prompt in prompts])

def too_large(images, prompts):
    return torch.full((len(prompts),), 1e60, dtype=torch.float64)

def one_for_all(images, prompts):
    return images.mean()

def a_column(images, prompts):
    return torch.zeros(len(prompts), 1)

NUMBER = 3
"""


@pytest.fixture
def users_file(tmp_path) -> Path:
    path = tmp_path / "my_rewards.py"
    path.write_text(USERS_FILE)
    return path


def test_users_function(users_file, images):
    lengths = torch.tensor([float(len(prompt)) for prompt in PROMPTS])
    scores = load_reward(f"{users_file}:brightness")(images.requires_grad_(), PROMPTS)
    torch.testing.assert_close(scores, images.detach().mean(dim=(1, 2, 3)) + lengths)
    assert not scores.requires_grad
    assert torch.equal(load_reward(f"{users_file}:plain_list")(images, PROMPTS), lengths)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("not_a_number", "returned nan for the prompt 'two cats'"),
        ("too_large", "returned inf for the prompt 'a cat'"),
        ("one_for_all", r"returned shape \(\) for 4 images"),
        ("a_column", r"returned shape \(4, 1\) for 4 images"),
    ],
)
def test_users_function_that_returns_something_else(users_file, images, function, message):
    with pytest.raises(RewardError, match=f"my_rewards.py:{function}.*{message}"):
        load_reward(f"{users_file}:{function}")(images, PROMPTS)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{file}", "names no function"),
        ("{file}:", "names no function"),
        ("{file}:brightnes", "has no function 'brightnes'"),
        ("{file}:NUMBER", "has no function 'NUMBER'"),
        ("elsewhere.py:brightness", "no file 'elsewhere.py'"),
        ("beauty", "no reward 'beauty'"),
        ("jpeg_compressibility:folder", "takes no weights"),
    ],
)
def test_no_such_reward(users_file, spec, message):
    with pytest.raises(RewardError, match=message):
        load_reward(spec.format(file=users_file))
