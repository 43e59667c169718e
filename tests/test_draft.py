"""draft.py: its gradient against autograd in float64 and finite differences, and LV's variance.

And what a run leaves, and which rewards it refuses.
"""

import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, read_metrics, run_here, run_script
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from written_out import merged_unet, record_rollouts, record_updates

import draft
from common.stable_diffusion import ddim_scheduler, load_stable_diffusion

PROMPT, T, W, M = "A cat and a dog", 4, 3.0, 5
PROMPTS = [PROMPT, "Four wolves in the park"]
REWARD = """
import torch
def f(images, prompts):
    left, right = images.chunk(2, dim=3)
    of_prompts = torch.tensor([len(prompt) for prompt in prompts])
    return of_prompts * (left - right).square().mean((1, 2, 3))
"""


def reward_of(images, prompt):
    left, right = images.chunk(2, dim=3)
    return len(prompt) * (left - right).square().mean((1, 2, 3))


@pytest.fixture
def small(tiny_sd, tmp_path):
    """Flags of one iteration of five samples in four steps."""
    (tmp_path / "mine.py").write_text(REWARD)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = ["--model", tiny_sd, "--reward", f"{tmp_path}/mine.py:f", "--seed", 3]
    flags += ["--prompts-file", tmp_path / "prompts.txt"]
    flags += ["--num-iterations", 1, "--num-inference-steps", T, "--samples-per-iteration", M]
    flags += ["--guidance-scale", W, "--micro-batch-size", 3, "--max-grad-norm", 1e9]
    return [*flags, "--lora-rank", 4, "--learning-rate", 1e-3, "--output-dir", tmp_path / "run"]


def last_steps_written_out(model, guided, x, noise, first):
    """x_0 of a sample x (1, C, H, W) from step `first` on, in float64, with the noise of each."""
    scheduler = DDIMScheduler.from_pretrained(model, subfolder="scheduler")
    scheduler.set_timesteps(T)
    alphas, x = scheduler.alphas_cumprod.double(), x.double()
    for j in range(first, T):
        t = scheduler.timesteps[j]
        a, a_prev = alphas[t], alphas[max(t - 1000 // T, 0)]
        sigma = ((1 - a_prev) / (1 - a) * (1 - a / a_prev)).sqrt()
        eps = guided(x, t[None])
        x_0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        direction = (1 - a_prev - sigma**2).clamp(min=0).sqrt()
        x = a_prev.sqrt() * x_0 + direction * eps + sigma * noise[j].double()
    return x


@pytest.mark.parametrize(
    "flags",
    [
        "--truncate 1 --num-noise 2",
        "--truncate 3 --num-noise 0",
        "--truncate 4 --num-noise 0 --random-truncate",
    ],
)
def test_gradient_is_that_of_the_reward_written_out(tiny_sd, tmp_path, monkeypatch, small, flags):
    """Against autograd in float64 through guidance, the last steps and the VAE."""
    rollouts, recorded = record_rollouts(monkeypatch, draft), record_updates(monkeypatch)
    run_here(monkeypatch, "draft.py", *small, *flags.split())
    monkeypatch.undo()
    # Before them there is a grid of eight.
    trajectory = torch.cat([r.trajectory for r in rollouts])[8 : 8 + M]
    K, n = int(flags.split()[1]), int(flags.split()[3])
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    vae, factor = pipeline.vae.double(), pipeline.vae.config.scaling_factor
    a = pipeline.scheduler.alphas_cumprod.double()[1]  # of the last step
    (update,) = recorded
    # Sample i has drawn its prompt before its noise.
    first_drawn = [torch.randint(2, (1,), generator=draft.seeded(3, 0, 0, i)) for i in range(M)]
    prompts = [PROMPTS[k] for k in first_drawn]
    assert len(set(prompts)) == 2
    leaves, guided_rows, _ = merged_unet(tiny_sd, [w for w, _ in update], W, prompts)

    total, drawn_K, own = 0.0, [], []
    for i in range(M):
        guided = partial(guided_rows, rows=slice(i, i + 1))
        generator = draft.seeded(3, 0, 0, i)
        torch.randint(2, (1,), generator=generator)
        noise = torch.randn(T + 1 + 2 * n, 4, 8, 8, generator=generator)
        torch.randint(T, (1,), generator=generator)
        if "random" in flags:
            drawn_K.append(torch.randint(1, K + 1, (1,), generator=generator).item())
        first = T - (drawn_K[i] if drawn_K else K)
        x_0 = [
            last_steps_written_out(tiny_sd, guided, trajectory[i : i + 1, first], noise[1:], first)
        ]
        assert torch.allclose(x_0[0].float(), trajectory[i : i + 1, -1], atol=1e-4)
        for k in range(n):
            eps, step_noise = noise[T + 1 + 2 * k].double(), noise[T + 2 + 2 * k]
            x_1 = a.sqrt() * trajectory[i : i + 1, -1].double() + (1 - a).sqrt() * eps
            x_0.append(last_steps_written_out(tiny_sd, guided, x_1, [step_noise] * T, T - 1))
        decoded = vae.decode(torch.cat(x_0) / factor).sample
        r = reward_of((decoded / 2 + 0.5).clamp(0, 1), prompts[i])
        own.append(r[0].item())
        total = total + r.mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(-total / M, leaves)])
    ours = torch.cat([g.flatten() for _, g in update]).double()
    assert (ours - expected).norm() < 1e-3 * expected.norm() > 0
    (line,) = read_metrics(tmp_path / "run")
    assert line["loss/reward"] == pytest.approx(-total.item() / M, rel=1e-4)
    assert line["reward/mean"] == pytest.approx(sum(own) / M, rel=1e-4)
    if drawn_K:
        assert len(set(drawn_K)) > 1 and line["truncate/mean"] == sum(drawn_K) / M
    else:
        assert "truncate/mean" not in line


@pytest.mark.parametrize("K", [1, 2])
def test_gradient_is_that_of_finite_differences(tiny_sd, monkeypatch, K):
    """Through the UNet, K steps, the VAE and the reward, for one weight, in float64."""
    args = draft.Args(model=str(tiny_sd), num_inference_steps=T, lora_rank=0, dtype="fp32")
    sd = load_stable_diffusion(args, torch.device("cpu"), keep_pretrained=False)
    for network in (sd.unet, sd.vae):
        network.double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # what the step rounds to
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    x, noise = draw(2, *sd.latent_shape), draw(2, K, *sd.latent_shape)
    text, weight = sd.encode([PROMPT] * 2).double(), sd.unet.conv_out.weight

    def total():
        x_0 = draft.last_steps(args, sd, x, text, noise, torch.tensor([K, K]))
        return reward_of(sd.decode_with_gradient(x_0), PROMPT).sum()

    (gradient,) = torch.autograd.grad(total(), weight)
    place, h, values = (0, 0, 1, 1), 1e-5, []
    with torch.no_grad():
        for change in (h, -2 * h):
            weight[place] += change
            values.append(total().item())
    assert gradient[place] != 0
    assert gradient[place].item() == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-4)


def test_lv_has_the_mean_of_draft_1_and_less_variance(monkeypatch):
    """For a perfect model, of data that are the constant c: x_0 noised again is distributed as x_1.

    It predicts c + theta x^2, with a theta = 0 for each sample. The gradient of r = -(x_0 - 2)^2 is
    2 (2 - c) x_1^2, where x_1 ~ N(sqrt(a) c, 1 - a).
    """
    N, n, c = 20_000, 3, 0.7
    args = replace(draft.PRESETS["zoo"], num_noise=n)
    noisy = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    noisy |= {"timestep_spacing": "trailing"}  # as the zoo: the last step is far from x_0
    config = DDIMScheduler(**noisy, prediction_type="sample", clip_sample=False).config
    scheduler = ddim_scheduler(config, args.num_inference_steps)
    sd = SimpleNamespace(scheduler=scheduler, timesteps=scheduler.timesteps, unet=None)
    theta = torch.zeros(N, 1, 1, 1, requires_grad=True)
    monkeypatch.setattr(draft, "guided_noise", lambda a, sd, u, x, t, text: c + theta * x**2)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(N, args.num_inference_steps + 1 + 2 * n, 1, 1, 1, generator=generator)
    text, K = torch.zeros(N, 1, 1), torch.ones(N)
    trajectory = draft.sample(args, sd, None, text, noise[:, : args.num_inference_steps + 1])[0]
    starts, step_noise = draft.starts_of(args, sd, trajectory, noise)
    assert torch.allclose(trajectory[:, -1], torch.full_like(trajectory[:, -1], c), atol=1e-4)
    gradients = []
    for k in range(1 + n):
        x_0 = draft.last_steps(args, sd, starts[:, k], text, step_noise[:, k], K)
        gradients += torch.autograd.grad(-((x_0 - 2) ** 2).sum(), theta)
    gradients = torch.stack(gradients, dim=1).flatten(1).double()
    alpha = scheduler.alphas_cumprod[scheduler.timesteps[-1]].item()
    expected = 2 * (2 - c) * (alpha * c**2 + 1 - alpha)
    first, lv = gradients[:, 0], gradients.mean(1)
    for estimate in (first, lv):
        assert abs(estimate.mean() - expected) < 4 * estimate.std() / N**0.5
    assert (lv.var() / first.var()).item() == pytest.approx(1 / (1 + n), rel=0.1)


def test_a_run_leaves_what_it_promises(tmp_path):
    """A process on the zoo, DRaFT-LV, and a LoRA."""
    flags = ["--num-iterations", 2, "--samples-per-iteration", 6, "--num-inference-steps", 4]
    result = run_script("draft.py", "zoo", *flags, "--output-dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    lines = read_metrics(tmp_path / "run")
    names = "loss/reward grad_norm reward/mean reward/std kl/pretrained time/sample_s "
    assert all(set(f"{names}time/reward_s time/train_s".split()) <= set(line) for line in lines)
    assert all(line["grad_norm"] > 0 for line in lines)
    assert [line["samples"] for line in lines] == [6, 12]
    lora = load_file(tmp_path / "run/pytorch_lora_weights.safetensors")
    assert any(value.abs().max() > 0 for key, value in lora.items() if "lora_B" in key)


def test_plain_ddim_has_no_noise_and_no_kl(tiny_sd, tmp_path, monkeypatch, small):
    run_here(monkeypatch, "draft.py", *small, "--eta", 0, "--no-monitor-kl")
    (line,) = read_metrics(tmp_path / "run")
    assert line["grad_norm"] > 0 and "kl/pretrained" not in line


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
    monkeypatch.setattr(sys, "argv", ["draft.py", "zoo", "--reward", reward])
    with pytest.raises(SystemExit) as end:
        draft.main()
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    assert "has no gradient" in line and "ddpo.py" in line and reward in line


def test_presets_are_those_of_the_papers():
    args = draft.PRESETS["paper"]
    assert (args.learning_rate, args.lora_rank, args.samples_per_iteration) == (None, 32, 3 * 128)
    assert (args.truncate, args.num_noise, args.random_truncate) == (1, 2, False)
    assert (args.num_inference_steps, args.guidance_scale) == (50, 7)
    args = draft.PRESETS["alignprop"]
    assert (args.truncate, args.random_truncate, args.num_noise) == (50, True, 0)
    assert (args.num_iterations, args.samples_per_iteration) == (7 * 2, 128)
