"""raft.py: whom it accepts, and the loss of those against the one written out."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import read_metrics, run_here, run_script
from diffusers import DDPMScheduler
from PIL import Image
from written_out import merged_unet, record_rollouts, record_updates

import raft

PROMPT = "A cat and a dog"
PROMPTS = [PROMPT, "Four wolves in the park"]


@pytest.mark.parametrize("ranking", ["global", "local"])
@pytest.mark.parametrize("kind", ["ties", "continuous", "all equal"])
def test_accepted_are_the_first_of_the_best(kind, ranking):
    """Against numpy's sort by reward, and by number where rewards are equal."""
    rng = np.random.default_rng(0)
    rewards = {
        "ties": rng.integers(0, 4, 60).astype(np.float32),
        "continuous": rng.normal(size=60).astype(np.float32),
        "all equal": np.full(60, 0.1, np.float32),
    }[kind]
    args = raft.Args(images_per_prompt=10, acceptance=0.2, ranking=ranking)
    ours = raft.accepted_samples(args, torch.from_numpy(rewards)).tolist()
    groups = [np.arange(60)] if ranking == "global" else np.arange(60).reshape(6, 10)
    expected = []
    for group in groups:
        best_first = np.lexsort((group, -rewards[group]))
        expected += group[best_first[: len(group) // 5]].tolist()
    assert ours == sorted(expected) and len(ours) == 12


@pytest.mark.parametrize("acceptance, k", [(1e-6, 1), (1 / 24, 171), (0.5, 2052), (1, 4104)])
def test_how_many_are_accepted(acceptance, k):
    args = raft.Args(acceptance=acceptance)
    accepted = raft.accepted_samples(args, torch.arange(4104.0))
    assert accepted.tolist() == list(range(4104 - k, 4104))


@pytest.fixture
def small(tiny_sd, tmp_path):
    """Flags of a run: twelve samples of one prompt in four steps, of which five are accepted."""
    (tmp_path / "pairs.py").write_text(
        "from PIL import Image\n"
        "def f(seed):\n"
        "    return [(Image.new('RGB', (64, 64), color), color) for color in ('red', 'blue')]\n"
    )
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = ["--model", tiny_sd, "--reward", "jpeg_incompressibility", "--seed", 3]
    flags += ["--prompts-file", tmp_path / "prompts.txt"]
    flags += ["--samples-per-iteration", 12, "--images-per-prompt", 6, "--acceptance", 0.4]
    flags += ["--num-iterations", 1, "--num-inference-steps", 4, "--gradient-steps", 2]
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
    """The gradient of the second update against autograd in float64, with diffusers' add_noise."""
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    config = model / "scheduler/scheduler_config.json"
    changed = json.loads(config.read_text()) | {"prediction_type": prediction_type}
    config.write_text(json.dumps(changed))
    scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    rollouts, accepted = record_rollouts(monkeypatch, raft), []
    choose = raft.accepted_samples

    def record(args, rewards):
        accepted.append((rewards, choose(args, rewards)))
        return accepted[-1][1]

    monkeypatch.setattr(raft, "accepted_samples", record)
    recorded = record_updates(monkeypatch)
    flags = [*small, "--model", model, "--pretrain-beta", 0, "--no-monitor-kl"]
    flags += [] if guided else ["--no-cfg-training"]
    run_here(monkeypatch, "raft.py", *flags, "--output-dir", tmp_path / "run")
    monkeypatch.undo()

    rewards, numbers = accepted[-1]  # check() asks how many they are, too
    assert len(numbers) == 5 and len(rewards.unique()) > 5
    assert rewards[numbers].min() >= np.sort(rewards.numpy())[-5]
    # The grid of samples, of eight, is drawn before and after.
    drawn = torch.cat([rollout.trajectory[:, -1] for rollout in rollouts])
    x0 = drawn[8:20][numbers].double()
    generator = raft.seeded(3, 1, 0, 1)
    t = torch.randint(1000, (5,), generator=generator)
    eps = torch.randn(5, 4, 8, 8, generator=generator).double()
    x_t = scheduler.add_noise(x0, eps, t)
    target = eps if prediction_type == "epsilon" else scheduler.get_velocity(x0, eps, t)
    w = 3.0 if guided else 1.0
    order = np.random.default_rng([3, 0]).permutation(np.arange(2, dtype=np.int32))
    prompts = [PROMPTS[order[i // 6]] for i in numbers]
    assert len(set(prompts)) == 2
    leaves, predicted, _ = merged_unet(model, [weight for weight, _ in recorded[1]], w, prompts)
    loss = ((predicted(x_t, t) - target) ** 2).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])
    assert (gradient(recorded[1]) - expected).norm() < 1e-3 * expected.norm() > 0
    line = read_metrics(tmp_path / "run")[0]
    assert line["reward/accepted"] == pytest.approx(rewards[numbers].mean().item())
    assert "loss/pretrain" not in line and line["accepted/prompts"] == 1


def test_pretraining_loss_is_added_with_its_weight(tmp_path, monkeypatch, small):
    """In the same update: the gradient is linear in beta, and that of real pictures is in it."""
    gradients = []
    for beta in (0, 0.3, 0.6):
        with monkeypatch.context() as patch:
            recorded = record_updates(patch)
            flags = [*small, "--pretrain-beta", beta, "--gradient-steps", 1, "--no-monitor-kl"]
            run_here(patch, "raft.py", *flags, "--output-dir", tmp_path / str(beta))
        assert len(recorded) == 1
        gradients.append(gradient(recorded[0]))
    without, once, twice = gradients
    assert (once - without).norm() > 1e-2 * without.norm()
    difference = (twice - without) - 2 * (once - without)
    assert difference.norm() < 1e-4 * (twice - without).norm()


def test_parity_of_groups_on_two_ranks(tmp_path):
    """A reward of a set, in a process of its own as a user starts it.

    The pictures of a prompt, on whatever ranks, share their reward: those of the best are accepted.
    """
    flags = ["zoo", "--reward", "statistical_parity:zoo/skin_tone"]
    flags += ["--prompts-file", "prompts/zoo_portraits.txt", "--num-inference-steps", 3]
    flags += ["--samples-per-iteration", 15, "--images-per-prompt", 5, "--acceptance", 1 / 3]
    flags += ["--ranking", "global", "--gradient-steps", 2, "--pretrain-batch-size", 4]
    flags += ["--num-iterations", 2, "--output-dir", tmp_path / "run"]
    result = run_script("raft.py", *flags, ranks=2)
    assert result.returncode == 0, result.stderr
    lines = read_metrics(tmp_path / "run")
    assert [line["samples"] for line in lines] == [15, 30]
    for line in lines:
        assert line["accepted/prompts"] == pytest.approx(1 / 3)
        assert line["reward/mean"] - 1e-6 <= line["reward/accepted"] <= 0
        assert {"loss/raft", "loss/pretrain", "grad_norm", "kl/pretrained"} <= set(line)
    assert Image.open(tmp_path / "run/samples/000002.png").size == (8 * 64, 64)
    assert (tmp_path / "run/pytorch_lora_weights.safetensors").exists()
