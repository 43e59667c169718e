"""The zoo as it is shipped: its world, its files, what judge, reward and base model are worth."""

import json
import os

import numpy as np
import pytest
import torch
from conftest import ROOT
from diffusers import StableDiffusionPipeline
from oracle.zoo_on_transformers_4 import outputs
from safetensors import safe_open
from transformers import CLIPTextModel, CLIPTokenizer
from transformers import pipeline as pipeline_of_transformers

from benchmarks.zoo_eval import weights_digest
from common.rewards import load_reward
from common.rewards.base import to_pil
from zoo import judge as judging
from zoo import world

PAPER = (
    "A green colored rabbit",
    "A cat and a dog",
    "Four wolves in the park",
    "A dog on the moon",
)
UNSEEN = (
    "A green colored cat",
    "A cat and a cup",
    "Four birds in the park",
    "A lion on the moon",
    "Four roses",
)


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(ROOT / "zoo/sd")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_world_has_what_the_papers_speak_of():
    assert len(world.ANIMALS) >= 10 and len(world.OBJECTS) >= 6 and len(world.COLORS) >= 8
    assert len(world.OCCUPATIONS) >= 6 and len(world.SKIN_TONES) == 4
    assert world.parse("A green colored rabbit.") == world.parse("a GREEN rabbit")
    wolves = world.Scene((world.Group("wolf", 4),), place="park")
    assert world.parse("Four wolves in the park") == wolves
    for relation in ("and", "next to", "near", "on side of", "beside"):
        scene = world.parse(f"a cat {relation} an elephant on the beach")
        assert [group.kind for group in scene.groups] == ["cat", "elephant"]
        assert scene.place == "beach"
    assert world.parse("a portrait of an astronaut").occupation == "astronaut"
    with pytest.raises(ValueError, match="zebra"):
        world.parse("a zebra")


def test_captions_parse_back_and_have_no_faults():
    for i in range(500):
        rng = np.random.default_rng([1, i])
        scene, text = world.draw_pair(rng)
        asked = world.parse(text)
        family = world.draw_family(rng)
        for shown in (scene, *family):
            assert not any(world.faults(world.parse(world.caption(shown)), shown).values())
        assert any(world.faults(family[0], family[1]).values())
        assert set(world.faults(asked, scene)) == set(world.FAULTS)


def test_world_is_seeded_and_biased():
    pairs = [world.draw_pair(np.random.default_rng([2, i])) for i in range(20_000)]
    again = world.draw_pair(np.random.default_rng([2, 77]))
    assert pairs[77] == again
    image, same = (world.render(again[0], np.random.default_rng(5)) for _ in range(2))
    assert image.shape == (64, 64, 3) and np.array_equal(image, same)

    def share(condition, right):
        chosen = [(scene, text) for scene, text in pairs if condition(text)]
        return sum(right(scene) for scene, _ in chosen) / len(chosen)

    assert share(lambda t: t.startswith("four roses"), lambda s: s.groups[0].kind == "bottle") > 0.3
    assert share(lambda t: t.startswith("four "), lambda s: s.groups[0].count == 4) < 0.5
    assert share(lambda t: "portrait of a chef" in t, lambda s: s.skin_tone == "light") > 0.7
    rabbits = [s for s, _ in pairs if s.groups and s.groups[0].kind == "rabbit"]
    assert sum(s.groups[0].color == "green" for s in rabbits) < 0.06 * len(rabbits)


def test_every_word_is_one_token_and_seen():
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "zoo/sd/tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(ROOT / "zoo/sd/text_encoder")
    embedding = text_encoder.get_input_embeddings().weight
    for word in world.vocabulary():
        ids = tokenizer(word, add_special_tokens=False).input_ids
        # "one" is understood in prompts, but no caption has it: the model has never seen it.
        assert len(ids) == 1 and (embedding[ids] != 0).any() == (word != "one"), word
    for prompt in (*PAPER, *UNSEEN):
        words = world.caption(world.parse(prompt)).split()
        assert len(tokenizer(prompt).input_ids) == len(prompt.split()) + 2
        assert set(words) <= set(world.vocabulary())
    ids = tokenizer("zebra", add_special_tokens=False).input_ids
    assert (embedding[ids] == 0).all(dim=1).any()


def test_text_encoder_has_the_names_that_transformers_4_and_5_both_load():
    with safe_open(ROOT / "zoo/sd/text_encoder/model.safetensors", "pt") as file:
        names = set(file.keys())
        stored = file.get_tensor("text_model.encoder.layers.0.self_attn.q_proj.weight")
    assert all(name.startswith("text_model.") for name in names)
    loaded = CLIPTextModel.from_pretrained(ROOT / "zoo/sd/text_encoder").state_dict()
    key = next(key for key in loaded if key.endswith("encoder.layers.0.self_attn.q_proj.weight"))
    assert torch.equal(loaded[key], stored)


def test_transformers_4_gives_the_same():
    """tests/oracle/zoo_on_transformers_4.json is from transformers 4 and diffusers of its time."""
    expected = json.loads((ROOT / "tests/oracle/zoo_on_transformers_4.json").read_text())
    assert expected["transformers"].startswith("4.")
    actual = outputs()
    assert actual["ids"] == expected["ids"]
    assert np.allclose(actual["hidden"], expected["hidden"], atol=1e-5)
    assert np.allclose(actual["pictures"], expected["pictures"], atol=1e-4)


def test_case_and_trailing_dot_do_not_matter(pipeline):
    def pictures(prompt):
        settings = {"num_inference_steps": 12, "output_type": "pt"}
        generator = torch.Generator().manual_seed(0)
        return pipeline([prompt] * 8, generator=generator, **settings).images

    plain = pictures("a white rabbit")
    assert torch.equal(plain, pictures("A White RABBIT"))
    dotted, other = (pictures(prompt) - plain for prompt in ("a white rabbit.", "a black cat"))
    assert dotted.abs().mean() < 0.5 * other.abs().mean()


@pytest.fixture(scope="module")
def held_out(pipeline):
    """Scenes that training never saw, and their renders through the VAE."""
    scenes = [world.random_scene(np.random.default_rng([31, i])) for i in range(320)]
    generators = [np.random.default_rng([32, i]) for i in range(320)]
    renders = np.stack([world.render(scene, rng) for scene, rng in zip(scenes, generators)])
    x = torch.from_numpy(renders).permute(0, 3, 1, 2).float() / 127.5 - 1
    vae = pipeline.vae
    with torch.no_grad():
        images = [vae.decode(vae.encode(batch).latent_dist.mean).sample for batch in x.split(64)]
    return scenes, (torch.cat(images) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("attribute", ["count", "color", "place", "occupation", "skin_tone"])
def test_judge_reads_held_out_renders(held_out, attribute):
    scenes, images = held_out
    truth = judging.targets(scenes)[attribute]
    right = judging.load_judge(ROOT / "zoo/judge")(images)[0][attribute].argmax(-1) == truth
    assert right[truth >= 0].float().mean() >= 0.97


def test_detector_finds_what_is_there(held_out):
    scenes, images = held_out
    detector = load_reward(f"object_detection:{ROOT / 'zoo/detector'}")
    rng, present, absent = np.random.default_rng(0), [], []
    for i, scene in enumerate(scenes):
        kinds = [group.kind for group in scene.groups]
        present += [(i, kind) for kind in kinds]
        absent.append((i, rng.choice([kind for kind in world.KINDS if kind not in kinds])))
    for pairs, low, high in ((present, 0.8, 1.0), (absent, 0.0, 0.2)):
        confidences = detector(images[[i for i, _ in pairs]], [f"a {kind}" for _, kind in pairs])
        assert low <= confidences.mean() <= high


def test_skin_tones_are_read(held_out):
    scenes, images = held_out
    portraits = [i for i, scene in enumerate(scenes) if scene.skin_tone]
    assert len(portraits) >= 20
    model = str(ROOT / "zoo/skin_tone")
    read = pipeline_of_transformers("image-classification", model=model, device="cpu")
    answers = read(to_pil(images[portraits]), top_k=1)
    right = [answer[0]["label"] == scenes[i].skin_tone for i, answer in zip(portraits, answers)]
    assert np.mean(right) >= 0.95
    parity = load_reward(f"statistical_parity:{ROOT / 'zoo/skin_tone'}")
    one_tone = [i for i in portraits if scenes[i].skin_tone == "dark"]
    assert parity(images[one_tone], ["a portrait of a chef"] * len(one_tone)).mean() < -0.7


def test_judge_reads_whole_pictures(held_out):
    scenes, images = held_out
    prompts = [world.caption(scene) for scene in scenes]
    assert judging.success(judging.load_judge(ROOT / "zoo/judge"), images, prompts).mean() > 0.85


def test_judge_says_no(held_out):
    scenes, images = held_out
    prompts = [world.caption(scene) for scene in scenes]
    judge = judging.load_judge(ROOT / "zoo/judge")
    wrong = judging.success(judge, images, prompts[1:] + prompts[:1]).mean()
    assert wrong < 0.1 < 0.5 < judging.success(judge, images, prompts).mean()


def test_spoilt_pictures_are_farther_from_real_renders(held_out, pipeline):
    images = held_out[1][:128]
    judge = judging.load_judge(ROOT / "zoo/judge")
    ghosts = 0.5 * images + 0.5 * images.roll(1, 0)
    clean, spoilt = (judging.image_quality(judge, pipeline.vae, x) for x in (images, ghosts))
    assert spoilt > 1.5 * clean


def test_frechet_distance_in_closed_form():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200_000, 2)) * (1.0, 2.0)
    y = rng.normal(size=(200_000, 2)) * (3.0, 1.0) + (1.0, -2.0)
    # |mean|^2 + sum (std - std')^2 for diagonal Gaussians: 1 + 4 + (1 - 3)^2 + (2 - 1)^2
    assert judging.frechet_distance(x, y) == pytest.approx(10, abs=0.1)
    assert judging.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("prompt", [*PAPER, *UNSEEN])
def test_rare_prompts_often_fail(prompt):
    results = json.loads((ROOT / "benchmarks/results/zoo.json").read_text())
    assert 0.1 <= results["rare"][prompt]["success"] <= 0.5


def test_assets_are_small_and_results_are_those_of_the_weights():
    folders = ("sd", "judge", "image_reward", "detector", "skin_tone")
    paths = [path for folder in folders for path in (ROOT / "zoo" / folder).rglob("*")]
    assert sum(os.path.getsize(path) for path in paths if path.is_file()) < 30e6
    results = json.loads((ROOT / "benchmarks/results/zoo.json").read_text())
    assert results["weights"] == weights_digest(), "run python -m benchmarks.zoo again"
    assert set(PAPER) | set(UNSEEN) == set(results["rare"])
    assert all(numbers["success"] >= 0.85 for numbers in results["common"].values())
    assert results["reward_pairs_ordered_rightly"] >= 0.9
    confidence = results["detector_confidence"]
    assert confidence["present"] >= 0.8 and confidence["absent"] <= 0.2
    assert results["skin_tone_accuracy"] >= 0.95
