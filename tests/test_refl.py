"""refl.py: its gradient against autograd in float64 and finite differences, and where it has none.

And what a run leaves, and which rewards it refuses.
"""

import json
import sys

import pytest
import torch
from conftest import ROOT, read_metrics, run_here, run_script
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from written_out import merged_unet, record_rollouts, record_updates

import refl
from common.stable_diffusion import load_stable_diffusion
from harness import score_with_gradients, scores_of

PROMPT, T, W = "A cat and a dog", 4, 3.0
PROMPTS = [PROMPT, "Four wolves in the park"]
REWARD = """
def f(images, prompts):
    left, right = images.chunk(2, dim=3)
    return 2 + 20 * (left - right).square().mean((1, 2, 3)) - {offset}
"""
OFFSET = 0.8
"""Puts the rewards of some pictures above 2, and of others below."""


@pytest.fixture
def small(tiny_sd, tmp_path):
    """Flags of one iteration of seven samples in four steps, without the pre-training loss."""
    (tmp_path / "mine.py").write_text(REWARD.format(offset=OFFSET))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = ["--model", tiny_sd, "--reward", f"{tmp_path}/mine.py:f", "--seed", 3]
    flags += ["--prompts-file", tmp_path / "prompts.txt"]
    flags += ["--num-iterations", 1, "--num-inference-steps", T, "--samples-per-iteration", 7]
    flags += ["--most-steps-left", 3, "--guidance-scale", W, "--micro-batch-size", 3]
    flags += ["--pretrain-beta", 0, "--lora-rank", 4, "--max-grad-norm", 1e9]
    return [*flags, "--learning-rate", 1e-3, "--output-dir", tmp_path / "run"]


def written_out(model, leaves, guided, x_t, steps):
    """phi(r) and r, (B,), in float64: one step, its predicted x_0, the VAE, the reward."""
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    scheduler = DDIMScheduler.from_pretrained(model, subfolder="scheduler")
    scheduler.set_timesteps(T)
    t, x_t = scheduler.timesteps[steps], x_t.double()
    a = scheduler.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
    x_0 = (x_t - (1 - a).sqrt() * guided(x_t, t)) / a.sqrt()
    decoded = pipeline.vae.double().decode(x_0 / pipeline.vae.config.scaling_factor).sample
    left, right = (decoded / 2 + 0.5).clamp(0, 1).chunk(2, dim=3)
    r = 2 + 20 * (left - right).square().mean((1, 2, 3)) - OFFSET
    return torch.where(r < 2, 2 - r, torch.zeros_like(r)), r


@pytest.mark.parametrize("cfg_training", [True, False])
def test_gradient_is_that_of_the_loss_written_out(
    tiny_sd, tmp_path, monkeypatch, small, cfg_training
):
    """Against autograd in float64, each sample at its own step; above 2 there is no gradient."""
    rollouts, recorded = record_rollouts(monkeypatch, refl), record_updates(monkeypatch)
    flags = [*small, "--reward-weight", 0.3]
    flags += [] if cfg_training else ["--no-cfg-training"]
    run_here(monkeypatch, "refl.py", *flags)
    monkeypatch.undo()
    # Before them there is a grid of eight.
    trajectory = torch.cat([r.trajectory for r in rollouts])[8 : 8 + 7]
    assert len(recorded) == 1
    steps, prompts = [], []
    for i in range(7):
        generator = refl.seeded(3, 0, 0, i)
        prompts.append(PROMPTS[torch.randint(2, (1,), generator=generator)])
        torch.randn(T + 1, 4, 8, 8, generator=generator)
        steps.append(T - torch.randint(1, 4, (1,), generator=generator))
    steps = torch.cat(steps)
    assert len(set(steps.tolist())) > 1 and len(set(prompts)) == 2
    leaves, guided, _ = merged_unet(
        tiny_sd, [w for w, _ in recorded[0]], W if cfg_training else 1.0, prompts
    )
    x_t = trajectory[torch.arange(7), steps]
    phi, r = written_out(tiny_sd, leaves, guided, x_t, steps)
    assert 0 < (r >= 2).sum() < 7
    loss = 0.3 * phi.mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])
    ours = torch.cat([g.flatten() for _, g in recorded[0]]).double()
    assert (ours - expected).norm() < 1e-3 * expected.norm() > 0
    (line,) = read_metrics(tmp_path / "run")
    assert line["loss/reward"] == pytest.approx(loss.item(), rel=1e-4)
    assert line["reward/mean"] == pytest.approx(r.mean().item(), rel=1e-4)
    assert line["reward/above_ceiling"] == pytest.approx((r >= 2).double().mean().item())
    assert "loss/pretrain" not in line


def test_gradient_is_that_of_finite_differences(tiny_sd, monkeypatch):
    """Through the UNet, the step, the VAE and the reward, for one weight, in float64."""
    args = refl.Args(model=str(tiny_sd), num_inference_steps=T, dtype="fp32", guidance_scale=1.0)
    sd = load_stable_diffusion(args, torch.device("cpu"), keep_pretrained=False)
    for network in (sd.unet, sd.vae):
        network.double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # what the step rounds to
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(3, *sd.latent_shape, generator=generator, dtype=torch.float64)
    steps, text = torch.tensor([1, 2, 3]), sd.encode([PROMPT] * 3).double()
    weight = sd.unet.conv_out.weight

    def loss():
        images = refl.predicted_picture(args, sd, x_t, steps, text)
        left, right = images.chunk(2, dim=3)
        return refl.reward_loss(args, 20 * (left - right).square().mean((1, 2, 3))).sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    place, h = (0, 0, 1, 1), 1e-5
    values = []
    with torch.no_grad():
        for change in (h, -2 * h):
            weight[place] += change
            values.append(loss().item())
    assert gradient[place].item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-4)
    assert gradient[place] != 0


def test_no_gradient_where_the_reward_is_high_enough():
    r = torch.tensor([-1.0, 1.9, 2.0, 2.1, 50.0], requires_grad=True)
    loss = refl.reward_loss(refl.Args(), r)
    (gradient,) = torch.autograd.grad(loss.sum(), r)
    assert gradient.tolist() == pytest.approx([-1e-3, -1e-3, 0, 0, 0])
    assert loss[2:].tolist() == [0, 0, 0] and loss[0].item() == pytest.approx(3e-3)


def test_scores_have_the_rewards_gradient_whatever_is_scored_at_once():
    def reward(images, prompts):
        sizes.append(len(images))
        return torch.stack([len(p) * x.pow(3).sum() for p, x in zip(prompts, images)])

    reward.with_gradient = reward
    sizes, prompts = [], ["a", "bb", "ccc", "dddd", "eeeee"]
    images = torch.rand(5, 3, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    direct = reward(images, prompts)
    weights = torch.tensor([1.0, -2.0, 0.0, 3.0, 1.0])
    (expected,) = torch.autograd.grad((weights * direct).sum(), images)
    for size in (1, 2, 5, 64):
        sizes.clear()
        scores, gradients = score_with_gradients(reward, images, prompts, size)
        assert sum(sizes) == 5 and max(sizes) <= size and not scores.requires_grad
        joined = scores_of(images, scores, gradients)
        (found,) = torch.autograd.grad((weights * joined).sum(), images)
        torch.testing.assert_close(joined, direct)
        torch.testing.assert_close(found, expected)


def test_a_run_learns_and_leaves_what_it_promises(tmp_path):
    """A process on the zoo: two updates an iteration, and a LoRA."""
    flags = ["--num-iterations", 3, "--samples-per-iteration", 6, "--pretrain-batch-size", 4]
    flags += ["--num-inference-steps", 4, "--output-dir", tmp_path / "run"]
    result = run_script("refl.py", "zoo", *flags)
    assert result.returncode == 0, result.stderr
    lines = read_metrics(tmp_path / "run")
    names = "loss/reward loss/pretrain grad_norm grad_norm/pretrain reward/mean reward/std "
    names += "reward/above_ceiling kl/pretrained time/sample_s time/reward_s time/train_s "
    assert all(set(f"{names}time/pretrain_s".split()) <= set(line) for line in lines)
    assert all(line["grad_norm"] > 0 and line["grad_norm/pretrain"] > 0 for line in lines)
    assert [line["samples"] for line in lines] == [6, 12, 18]
    assert lines[2]["kl/pretrained"] > 0
    lora = load_file(tmp_path / "run/pytorch_lora_weights.safetensors")
    assert any(value.abs().max() > 0 for key, value in lora.items() if "lora_B" in key)
    assert json.loads((tmp_path / "run/args.json").read_text())["reward_weight"] == 0.1


@pytest.mark.parametrize(
    "reward",
    [
        "jpeg_compressibility",
        "llava_bertscore:http://localhost:1/v1",
        "http://localhost:1/score",
    ],
)
def test_a_reward_without_gradient_is_refused_in_one_line(reward, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["refl.py", "zoo", "--reward", reward])
    with pytest.raises(SystemExit) as end:
        refl.main()
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    assert "has no gradient" in line and "ddpo.py" in line and reward in line


def test_presets_are_those_of_the_papers():
    args = refl.PRESETS["paper"]
    assert (args.learning_rate, args.lora_rank, args.weight_decay) == (None, 0, 1e-2)
    assert (args.samples_per_iteration, args.pretrain_batch_size) == (12 * 128, 12 * 128)
    assert (args.num_inference_steps, args.guidance_scale) == (40, 7)
    assert (args.fewest_steps_left, args.most_steps_left) == (1, 10)
    assert (args.reward_weight, args.reward_ceiling) == (1e-3, 2)
