"""reward_weighted.py: its weights, its loss against the one written out, and who draws for it."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import read_metrics, run_here, run_script
from diffusers import DDPMScheduler
from PIL import Image
from written_out import merged_unet, record_rollouts, record_updates

import reward_weighted
from common.stable_diffusion import load_stable_diffusion

PROMPT = "A cat and a dog"


@pytest.mark.parametrize("kind", ["continuous", "ties", "large"])
def test_weights_are_min_max_over_all_samples_so_far(kind):
    rng = np.random.default_rng(0)
    rewards = {
        "continuous": rng.normal(size=(4, 30)),
        "ties": rng.integers(0, 3, (4, 30)).astype(float),
        "large": rng.normal(1e6, 1, (4, 30)),
    }[kind].astype(np.float32)
    extremes = torch.tensor([np.inf, -np.inf], dtype=torch.float64)
    for n, of_iteration in enumerate(rewards, start=1):
        ours = reward_weighted.min_max_weights(torch.from_numpy(of_iteration), extremes).numpy()
        seen = rewards[:n].astype(np.float64)
        expected = (of_iteration.astype(np.float64) - seen.min()) / (seen.max() - seen.min())
        assert ours == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert ours.min() >= 0 and ours.max() <= 1
    assert extremes.tolist() == [rewards.min(), rewards.max()]


def test_equal_rewards_have_no_weight():
    extremes = torch.tensor([np.inf, -np.inf], dtype=torch.float64)
    assert (reward_weighted.min_max_weights(torch.full((7,), 0.1), extremes) == 0).all()
    one_more = reward_weighted.min_max_weights(torch.tensor([0.1, 0.3]), extremes)
    assert one_more.tolist() == [0, 1]


@pytest.fixture
def small(tiny_sd, tmp_path):
    """Flags of a run: five samples of one prompt in four steps, and two to watch."""
    (tmp_path / "pairs.py").write_text(
        "from PIL import Image\n"
        "def f(seed):\n"
        "    return [(Image.new('RGB', (64, 64), color), color) for color in ('red', 'blue')]\n"
    )
    flags = ["--model", tiny_sd, "--prompt", PROMPT, "--reward", "jpeg_incompressibility"]
    flags += ["--seed", 3]
    flags += ["--samples-per-iteration", 5, "--images-per-prompt", 5]
    flags += ["--num-iterations", 2, "--num-inference-steps", 4, "--gradient-steps", 2]
    flags += ["--guidance-scale", 3, "--micro-batch-size", 3, "--learning-rate", 1e-3]
    flags += ["--pretrain-data", f"{tmp_path}/pairs.py:f", "--pretrain-batch-size", 4]
    return [*flags, "--lora-rank", 4, "--max-grad-norm", 1e9]


def gradient(update):
    return torch.cat([g.flatten() for _, g in update]).double()


@pytest.mark.parametrize(
    "prediction_type, guided", [("epsilon", True), ("epsilon", False), ("v_prediction", True)]
)
def test_gradient_is_that_of_the_loss_written_out(
    tiny_sd, tmp_path, monkeypatch, small, prediction_type, guided
):
    """The last update of the second iteration against autograd in float64.

    Its samples are those of the original model, though the LoRA has been moved, and its weights are
    between the extremes of both iterations.
    """
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    config = model / "scheduler/scheduler_config.json"
    changed = json.loads(config.read_text()) | {"prediction_type": prediction_type}
    config.write_text(json.dumps(changed))
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    rollouts, rewards = record_rollouts(monkeypatch, reward_weighted), []
    weigh = reward_weighted.min_max_weights
    record = lambda r, extremes: rewards.append(r) or weigh(r, extremes)
    monkeypatch.setattr(reward_weighted, "min_max_weights", record)
    recorded = record_updates(monkeypatch)
    flags = [*small, "--model", model, "--pretrain-beta", 0]
    flags += [] if guided else ["--no-cfg-training"]
    run_here(monkeypatch, "reward_weighted.py", *flags, "--output-dir", tmp_path / "run")
    monkeypatch.undo()
    assert len(recorded) == 4 and recorded[3][1][0].abs().max() > 0, "lora_B has been moved"

    # Samples: the grid's 8, then in each iteration 5 of the original and 5 of the model.
    drawn = torch.cat([rollout.trajectory[:, -1] for rollout in rollouts])
    x0 = drawn[18:23].double()
    args = reward_weighted.Args(
        model=str(model), num_inference_steps=4, guidance_scale=3.0, lora_rank=4, dtype="fp32"
    )
    original = load_stable_diffusion(args, torch.device("cpu"))
    generators = [reward_weighted.seeded(3, 0, 1, i) for i in range(5)]
    noise = torch.stack([torch.randn(5, 4, 8, 8, generator=g) for g in generators])
    text = original.encode([PROMPT] * 5)
    expected = reward_weighted.sample(args, original, original.unet, text, noise).trajectory[:, -1]
    torch.testing.assert_close(x0.float(), expected, rtol=1e-4, atol=1e-4)

    both = torch.cat(rewards).double()
    w = (rewards[1].double() - both.min()) / (both.max() - both.min())
    assert len(w.unique()) > 2
    generators = [reward_weighted.seeded(3, 1, 1, 1, i) for i in range(5)]
    t = torch.cat([torch.randint(1000, (1,), generator=g) for g in generators])
    eps = torch.stack([torch.randn(4, 8, 8, generator=g) for g in generators]).double()
    x_t = scheduler.add_noise(x0, eps, t)
    target = eps if prediction_type == "epsilon" else scheduler.get_velocity(x0, eps, t)
    scale = 3.0 if guided else 1.0
    leaves, predicted, _ = merged_unet(
        model, [weight for weight, _ in recorded[3]], scale, [PROMPT]
    )
    loss = (w * ((predicted(x_t, t) - target) ** 2).flatten(1).mean(1)).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])
    assert (gradient(recorded[3]) - expected).norm() < 1e-3 * expected.norm() > 0
    line = read_metrics(tmp_path / "run")[1]
    assert line["reward/original"] == pytest.approx(rewards[1].double().mean().item())
    assert line["weights/mean"] == pytest.approx(w.mean().item())
    assert "loss/pretrain" not in line


def test_pretraining_loss_is_added_with_its_weight(tmp_path, monkeypatch, small):
    """In the same update: the gradient is linear in beta, and that of real pictures is in it."""
    gradients = []
    for beta in (0, 0.5, 1.0):
        with monkeypatch.context() as patch:
            recorded = record_updates(patch)
            flags = [*small, "--pretrain-beta", beta, "--gradient-steps", 1]
            flags += ["--num-iterations", 1, "--output-dir", tmp_path / str(beta)]
            run_here(patch, "reward_weighted.py", *flags)
        assert len(recorded) == 1
        gradients.append(gradient(recorded[0]))
    without, once, twice = gradients
    assert (once - without).norm() > 1e-2 * without.norm()
    difference = (twice - without) - 2 * (once - without)
    assert difference.norm() < 1e-4 * (twice - without).norm()


def test_all_weights_learn_from_samples_of_the_frozen_copy(tmp_path, monkeypatch, small):
    """With --lora-rank 0: whatever the rate, the samples of the original are the same."""
    rewards = {}
    for rate in (1e-12, 1e-3):
        flags = [*small, "--lora-rank", 0, "--learning-rate", rate, "--pretrain-beta", 0]
        run_here(monkeypatch, "reward_weighted.py", *flags, "--output-dir", tmp_path / str(rate))
        lines = read_metrics(tmp_path / str(rate))
        rewards[rate] = [
            [line[key] for line in lines] for key in ("reward/original", "reward/mean")
        ]
    assert rewards[1e-12][0] == rewards[1e-3][0]
    assert rewards[1e-12][1] != rewards[1e-3][1]


def test_parity_of_groups_on_two_ranks(tmp_path):
    """A reward of a set, in a process of its own as a user starts it; what the run leaves."""
    flags = ["zoo", "--reward", "statistical_parity:zoo/skin_tone"]
    flags += ["--prompts-file", "prompts/zoo_portraits.txt", "--num-inference-steps", 3]
    flags += ["--samples-per-iteration", 15, "--images-per-prompt", 5, "--watched-prompts", 1]
    flags += ["--gradient-steps", 2, "--pretrain-batch-size", 4]
    flags += ["--num-iterations", 2, "--output-dir", tmp_path / "run"]
    result = run_script("reward_weighted.py", *flags, ranks=2)
    assert result.returncode == 0, result.stderr
    lines = read_metrics(tmp_path / "run")
    assert [line["samples"] for line in lines] == [15, 30]
    for line in lines:
        assert line["reward/std"] == pytest.approx(0, abs=1e-6) and line["reward/original"] < 0
        assert 0 <= line["weights/mean"] <= 1
        assert {"loss/weighted", "loss/pretrain", "grad_norm", "kl/pretrained"} <= set(line)
    kept = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)["kept"]
    least, greatest = kept["extremes"].tolist()
    assert -1 <= least <= greatest <= 0
    assert Image.open(tmp_path / "run/samples/000002.png").size == (8 * 64, 64)
    assert (tmp_path / "run/pytorch_lora_weights.safetensors").exists()
