"""The second path of a reward, on tensors: it agrees with the first, and its gradient is right."""

import re
import shutil
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_image_reward import to_tensor
from test_rewards import users
from tiny_models import make_blip, make_clip, make_detectors, make_hps, pictures

from common.rewards import (
    DIFFERENTIABLE,
    NAMES,
    GradientError,
    RewardError,
    check_spec,
    load_reward,
)
from common.rewards.base import PROCESSOR_FILES, to_pil
from common.rewards.pixels import LARGEST_GAP, owlv2_resize, pil_resize, resized, tensor_pixels
from harness import check_reward
from harness.rewards import load_reward_or_fail

PROMPTS = ["a cat and a dog", "a cup", "a dog", "a cup near a cat"]
SIZES = ((24, 24), (40, 56), (32, 32), (130, 90))  # the models' inputs are 32 or 64
MODELS = ["image_reward", "aesthetic", "clip_score", "blip_score", "pick_score", "hps_v2"]
MODELS += ["multi-label", "detr", "owlv2"]
CUT = ["rt-detr", "grounding-dino"]
"""Detectors whose own code stops the gradient at the boxes that they begin with."""


@pytest.fixture(scope="module")
def specs(tmp_path_factory):
    folders = make_detectors(tmp_path_factory.mktemp("detectors"))
    clip, blip = make_clip(tmp_path_factory.mktemp("clip")), tmp_path_factory.mktemp("blip")
    return {name: f"object_detection:{folder}" for name, folder in folders.items()} | {
        "image_reward": f"image_reward:{ROOT / 'zoo/image_reward'}",
        "aesthetic": f"aesthetic:{clip}",
        "clip_score": f"clip_score:{clip}",
        "blip_score": f"blip_score:{make_blip(blip)}",
        "pick_score": f"pick_score:{clip}",
        "hps_v2": f"hps_v2:{make_hps(tmp_path_factory.mktemp('hps'))}",
    }


@pytest.fixture(scope="module")
def rewards(specs):
    return {name: load_reward(spec, differentiable=True) for name, spec in specs.items()}


def noise(count: int, height: int, width: int) -> torch.Tensor:
    """The worst case of a resize, of 8 bits exactly."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator) / 255


@pytest.mark.parametrize("resample", ["BICUBIC", "BILINEAR", "LANCZOS"])
@pytest.mark.parametrize("old", [(64, 64), (100, 37), (7, 300)])
@pytest.mark.parametrize("new", [(64, 64), (32, 32), (91, 120)])
def test_resize_is_pils_but_for_the_rounding(resample, old, new):
    """Black and white as well, where the weights overshoot."""
    resample = Image.Resampling[resample]
    for images in (noise(2, *old), noise(2, *old).round()):
        theirs = to_tensor(*(image.resize(new[::-1], resample) for image in to_pil(images)))
        ours = resized(images, *new, partial(pil_resize, resample))
        assert (ours - theirs).abs().max() * 255 < LARGEST_GAP


@pytest.mark.parametrize("name", ["CLIP", "Blip", "ViT", "Detr", "RTDetr", "OwlViT", "Owlv2"])
@pytest.mark.parametrize("size", [(64, 64), (300, 200), (513, 700)])
def test_pixels_are_those_of_transformers_processors_at_their_own_sizes(name, size):
    import transformers

    processor = getattr(transformers, f"{name}ImageProcessor")()
    images = noise(1, *size)
    theirs = processor(images=to_pil(images), return_tensors="pt").pixel_values
    step = 1 / 255 / (min(processor.image_std) if processor.do_normalize else 1)
    assert (tensor_pixels(processor)(images) - theirs).abs().max() < 1.2 * step


def test_owlv2_makes_large_pictures_smaller_as_scipy_does():
    from transformers import Owlv2ImageProcessor

    processor = Owlv2ImageProcessor(size={"height": 48, "width": 48})
    images = noise(1, 200, 300)
    theirs = processor(images=to_pil(images), return_tensors="pt").pixel_values
    torch.testing.assert_close(tensor_pixels(processor)(images), theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(owlv2_resize(9, 9)), torch.eye(9))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_both_paths_agree(rewards, name, size):
    """On pictures of 8 bits, whose rounding to 8 bits is none."""
    images, reward = (pictures(4, *size, seed=3) * 255).round() / 255, rewards[name]
    first, second = reward(images, PROMPTS), reward.with_gradient(images, PROMPTS)
    assert second.dtype == torch.float32 and second.shape == (4,) and first.std() > 1e-3
    gap = (first - second).abs().max()
    assert gap < 0.02 * first.std(), f"{gap} of {first.std()}"


@pytest.mark.parametrize("name", CUT)
def test_both_paths_agree_where_pixels_are_equal(rewards, name):
    """These detectors choose boxes by rank, so that scores jump with the smallest rounding."""
    images = (pictures(4, 64, 64) * 255).round() / 255  # no resize
    first, second = rewards[name](images, PROMPTS), rewards[name].with_gradient(images, PROMPTS)
    torch.testing.assert_close(first, second, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [*MODELS, *CUT])
def test_gradient_reaches_the_pictures_and_no_weights(rewards, name):
    images = pictures(4).requires_grad_()
    scores = rewards[name].with_gradient(images, PROMPTS)
    nodes, leaves, seen = [scores.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            leaves.add(getattr(node, "variable", None))
            nodes += [after for after, _ in node.next_functions]
    assert leaves == {None, images}
    scores.sum().backward()
    assert images.grad.isfinite().all()
    assert (images.grad.flatten(1).abs().amax(1) > 1e-6).all()  # of each picture


@pytest.mark.parametrize("size", [(24, 24), (40, 56)])
@pytest.mark.parametrize("name", MODELS)
def test_gradient_equals_finite_differences(rewards, name, size):
    """Of the whole path in float32: along the gradient, and in its largest pixel."""
    images = (pictures(1, *size, seed=1) * 0.6 + 0.2).requires_grad_()
    f = lambda x: rewards[name].with_gradient(x, PROMPTS[:1])[0].item()
    rewards[name].with_gradient(images, PROMPTS[:1]).backward()
    gradient, images = images.grad, images.detach()
    largest = torch.zeros_like(images)
    largest.view(-1)[gradient.abs().argmax()] = 1
    for direction in (gradient / gradient.norm(), largest):
        slope = (gradient * direction).sum().item()
        errors = []
        # Too large a step meets the function's bends, and too small a one the rounding of float32.
        for step in (0.1, 0.03, 0.01, 0.003, 0.001):
            difference = f(images + step * direction) - f(images - step * direction)
            errors.append(abs(difference / (2 * step) / slope - 1))
        assert min(errors) < 0.02, errors


@pytest.mark.parametrize("name", MODELS)
def test_a_step_along_the_gradient_raises_the_score_through_pil(rewards, name):
    images, reward = (pictures(4, 40, 56, seed=3) * 0.6 + 0.2).requires_grad_(), rewards[name]
    (gradient,) = torch.autograd.grad(reward.with_gradient(images, PROMPTS).sum(), images)
    step = 0.01 * gradient / gradient.abs().amax((1, 2, 3), keepdim=True)
    gained, expected = reward(images + step, PROMPTS) - reward(images, PROMPTS), gradient * step
    gained = gained / expected.sum((1, 2, 3))
    assert (gained > 0.3).all(), gained


def test_gradient_of_resize_and_crop():
    from transformers import CLIPImageProcessor

    resize = lambda x: resized(x, 9, 7, partial(pil_resize, Image.Resampling.BICUBIC))
    images = (pictures(1, 12, 10, seed=1) * 0.6 + 0.2).double().requires_grad_()
    assert torch.autograd.gradcheck(resize, images)
    processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    images = pictures(1, 8, 24).requires_grad_()  # only cropped
    (gradient,) = torch.autograd.grad(tensor_pixels(processor)(images).sum(), images)
    expected = torch.zeros_like(images)
    expected[..., 8:16] = 1 / torch.tensor(processor.image_std)[:, None, None]
    torch.testing.assert_close(gradient, expected)


def test_what_is_outside_of_0_and_1_scores_as_black_and_white(rewards):
    """Like the first path; it passes no gradient."""
    images = (pictures(4, 32, 32) * 1.4 - 0.2).requires_grad_()
    inside = (images > 0) & (images < 1)
    assert 0.1 < inside.float().mean() < 0.9
    for name in ("image_reward", "clip_score"):
        scores = rewards[name].with_gradient(images, PROMPTS)
        clamped = rewards[name].with_gradient(images.detach().clamp(0, 1), PROMPTS)
        assert torch.equal(scores, clamped) and not clamped.requires_grad
        (gradient,) = torch.autograd.grad(scores.sum(), images)
        assert not gradient[~inside].any() and gradient[inside].any()


def test_modes_and_dtypes_of_the_caller(rewards):
    """Half precision comes from a decoder; a caller without gradients gets a graph all the same."""
    reward, images = rewards["image_reward"], pictures(4).half().requires_grad_()
    with torch.no_grad():
        scores = reward.with_gradient(images, PROMPTS)
    assert scores.dtype == torch.float32 and scores.requires_grad
    scores.sum().backward()
    assert images.grad.dtype == torch.float16 and images.grad.any()
    assert not reward(images, PROMPTS).requires_grad


def test_many_pictures_score_as_each_alone(rewards):
    images, prompts = pictures(34, 24, 24).requires_grad_(), [PROMPTS[i % 4] for i in range(34)]
    for name in ("clip_score", "multi-label"):
        with_gradient = rewards[name].with_gradient
        scores = with_gradient(images, prompts)
        alone = torch.cat([with_gradient(images[i : i + 1], prompts[i : i + 1]) for i in range(34)])
        torch.testing.assert_close(scores, alone, rtol=0, atol=1e-5)
        (gradient,) = torch.autograd.grad(scores[33], images)
        assert gradient[33].any() and not gradient[:33].any()


def test_sum_of_terms(specs, rewards, tmp_path):
    path = users(tmp_path, "def f(images, prompts): return images[:, 0].mean((1, 2))\n")
    spec = f"0.5*{specs['image_reward']}+-2*{specs['clip_score']}+3*{path}:f"
    images = pictures(4).requires_grad_()
    (found,) = torch.autograd.grad(
        load_reward(spec, differentiable=True).with_gradient(images, PROMPTS).sum(), images
    )
    expected = torch.zeros_like(images)
    expected[:, 0] = 3 / 40**2
    for weight, name in ((0.5, "image_reward"), (-2, "clip_score")):
        scores = rewards[name].with_gradient(images, PROMPTS)
        expected += weight * torch.autograd.grad(scores.sum(), images)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_reward_says_whether_it_can_be_differentiated(specs):
    assert not hasattr(load_reward(specs["image_reward"]), "with_gradient")
    for name in DIFFERENTIABLE:
        check_spec(name, differentiable=True)
    check_spec(f"0.5*image_reward+0.5*{__file__}:f", differentiable=True)


WITHOUT_GRADIENT = [name for name in NAMES if name not in DIFFERENTIABLE]
WITHOUT_GRADIENT += ["http://localhost:1/score"]


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
@pytest.mark.parametrize("spec", ["{}", "0.5*image_reward+-0.1*{}"])
def test_a_reward_without_gradient_is_refused_before_anything_is_loaded(name, spec):
    check_spec(spec.format(name))
    for refused in (check_spec, load_reward):
        with pytest.raises(GradientError, match=rf"^reward '{name}' has no gradient; .*\.py:") as e:
            refused(spec.format(name), differentiable=True)
        assert "\n" not in str(e.value)


def test_a_script_says_what_to_do_without_gradient(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["a_script.py"])
    remedy = "another_script.py needs none"
    check_reward("image_reward", without_gradient=remedy)
    for server in ("llava_bertscore:http://localhost:1/v1", "https://localhost:1/score"):
        check_reward(server)
        with pytest.raises(SystemExit) as end:
            check_reward(server, without_gradient=remedy)
        line = capsys.readouterr().err
        assert end.value.code == 2 and line.count("\n") == 1
        assert f"--reward: reward '{server}' has no gradient" in line
        assert line.endswith(f"{remedy}\n")


def test_a_processor_that_does_something_else_is_refused(specs, tmp_path):
    """Its crop is larger than what it has resized, around which it puts black."""
    folder = shutil.copytree(specs["clip_score"].partition(":")[2], tmp_path / "clip")
    (path,) = (p for p in map(folder.joinpath, PROCESSOR_FILES) if p.is_file())
    text = path.read_text()
    path.write_text(re.sub(r'"shortest_edge": 32', '"shortest_edge": 24', text))
    assert path.read_text() != text
    spec, images = f"clip_score:{folder}", pictures(4)
    assert load_reward(spec)(images, PROMPTS).isfinite().all()
    message = r"reward 'clip_score:.*' has no gradient: .*CLIPImageProcessor.* not known on tensors"
    with pytest.raises(GradientError, match=message):
        load_reward(f"0.5*{specs['image_reward']}+0.5*{spec}", differentiable=True)


USERS = """
import torch
weight = torch.ones(3, requires_grad=True)
def good(images, prompts):
    images.mul_(2)  # its own
    return images.square().mean((1, 2, 3))
def detached(images, prompts):
    return images.detach().mean((1, 2, 3))
def of_its_own_weights(images, prompts):
    return torch.from_numpy(images.detach().numpy()).mean((2, 3)) @ weight
def without_grad(images, prompts):
    with torch.no_grad():
        return images.mean((1, 2, 3))
def forgets_the_mode(images, prompts):
    scores = images.mean((1, 2, 3))
    torch.set_grad_enabled(False)
    return scores
def numbers(images, prompts):
    return [1.0] * len(prompts)
def infinite(images, prompts):
    return images.mean((1, 2, 3)) / 0
def one(images, prompts):
    return images.mean()
def fails(images, prompts):
    return 1 / 0
"""
FAULTS = dict.fromkeys(
    ("detached", "of_its_own_weights", "without_grad", "numbers"), "no gradient;"
)
FAULTS |= {"infinite": "returned inf", "one": r"shape \(\)", "fails": "ZeroDivisionError"}


@pytest.mark.parametrize("name", ["good", "forgets_the_mode"])
def test_gradient_of_a_users_function(tmp_path, name):
    reward = load_reward(f"{users(tmp_path, USERS)}:{name}", differentiable=True)
    images = pictures(4).requires_grad_()
    before = images.detach().clone()
    scores = reward.with_gradient(images, PROMPTS)
    scores.sum().backward()
    n = images[0].numel()
    expected = 8 * before / n if name == "good" else torch.full_like(before, 1 / n)
    torch.testing.assert_close(images.grad, expected)
    assert torch.equal(images.detach(), before) and torch.is_grad_enabled()
    torch.testing.assert_close(reward(images, PROMPTS), scores.detach())


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_a_users_function(tmp_path, name):
    reward = load_reward(f"{users(tmp_path, USERS)}:{name}", differentiable=True)
    with pytest.raises(RewardError, match=f"mine.py:{name}' .*{FAULTS[name]}") as error:
        reward.with_gradient(pictures(4).requires_grad_(), PROMPTS)
    assert "\n" not in str(error.value)


def test_pictures_are_checked_and_faults_of_other_ranks_raised(specs, tmp_path):
    spec, elsewhere = specs["image_reward"], []
    gather = lambda share: [share, (elsewhere, [], {}) if isinstance(share, tuple) else []]
    with_gradient = load_reward(spec, gather=gather, differentiable=True).with_gradient
    images = pictures(4).requires_grad_()
    assert with_gradient(images, PROMPTS).requires_grad
    with pytest.raises(RewardError, match="'a cup' is not finite"):
        with_gradient(images.where(torch.arange(4).view(4, 1, 1, 1) != 1, torch.nan), PROMPTS)
    with pytest.raises(RewardError, match=r"must have the shape \(4, 3, H, W\)"):
        with_gradient(images[:2], PROMPTS)
    elsewhere.append("a fault of another rank")
    with pytest.raises(RewardError, match="a fault of another rank"):
        with_gradient(images, PROMPTS)


def test_a_bounded_time_keeps_the_graph(specs, tmp_path):
    path = users(tmp_path, "def f(images, prompts): return images.mean((1, 2, 3))\n")
    device, spec = torch.device("cpu"), f"1*{specs['image_reward']}+1*{path}:f"
    limited = load_reward_or_fail(spec, device, PROMPTS, "--reward", 60, differentiable=True)
    free = load_reward(spec, differentiable=True)
    images = pictures(4).requires_grad_()
    gradients = []
    for reward in (limited, free):
        scores = reward.with_gradient(images, PROMPTS)
        gradients.append(torch.autograd.grad(scores.sum(), images)[0])
        assert not reward(images, PROMPTS).requires_grad
    assert torch.equal(*gradients) and gradients[0].any()
