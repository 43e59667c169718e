"""dpok.py: its gradient against Eq. 9 written out.

And its estimator against a closed form, and its paper's settings.
"""

import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch.distributions import kl_divergence
from written_out import policies, record_updates

import dpok
from common.scheduler import ddim_step_with_logprob
from common.stable_diffusion import PromptEncoder, ddim_scheduler

TINY = ("--num-inference-steps", "4", "--samples-per-iteration", "10")
TINY += ("--reward", "jpeg_incompressibility", "--seed", "3")
PROMPTS = ["A cat and a dog", "Four wolves in the park"]


@pytest.mark.parametrize(
    "kl, rewarded_share, eta",
    [("exact", 1.0, 1.0), ("released", 1.0, 1.0), ("exact", 0.5, 1.0), ("exact", 1.0, 0.6)],
)
def test_gradient_is_that_of_eq_9_written_out(
    tiny_sd, tmp_path, monkeypatch, kl, rewarded_share, eta
):
    """The gradients that the script hands to its optimizers, against autograd of Eq. 9 and 24.

    At the third update of the second iteration, where neither the ratios are 1 nor the KL is 0, on
    transitions of two rollouts and two prompts; in float64, with torch.distributions and LoRA
    merged into the weights.
    """
    alpha, beta, clip, w, n, T = 300.0, 30.0 if kl == "exact" else 150.0, 5e-4, 3.0, 12, 4
    recorded = record_updates(monkeypatch)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = f"--num-iterations 2 --gradient-steps 3 --batch-size {n} --micro-batch-size 5 "
    flags += f"--prompts-file {tmp_path / 'prompts.txt'} --value-batch-size 15 "
    flags += f"--learning-rate 3e-3 --alpha {alpha} --beta {beta} --clip-range {clip} --kl {kl} "
    flags += f"--guidance-scale {w} --max-grad-norm 1e9 --rewarded-share {rewarded_share} "
    flags += f"--eta {eta} "
    flags += f"--value-function --output-dir {tmp_path / 'run'} --model {tiny_sd}"
    monkeypatch.setattr(sys, "argv", ["dpok.py", *flags.split(), *TINY])
    dpok.main()
    weights_and_gradients = recorded[-1]

    replay = torch.load(tmp_path / "run/checkpoint/replay-00000.pt", weights_only=True)
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)

    def transitions(count, *key):
        drawn = torch.randperm(2 * 10 * T, generator=dpok.seeded(3, *key))[:count]
        s, i, j = drawn // (10 * T), drawn // T % 10, drawn % T
        assert len(s.unique()) == 2, "both rollouts should occur"
        # Sample i of iteration s has drawn its prompt before its noise.
        chosen = [
            torch.randint(2, (), generator=dpok.seeded(3, 0, *place))
            for place in zip(s.tolist(), i.tolist())
        ]
        assert len({*map(int, chosen)}) == 2, "both prompts should occur"
        return s, i, j, [PROMPTS[k] for k in chosen]

    s, i, j, prompts = transitions(n, 1, 1, 2)
    x_t, x_prev = replay["trajectory"][s, i, j], replay["trajectory"][s, i, j + 1].double()
    weights = [weight for weight, _ in weights_and_gradients]
    leaves, policy, pre, eps, eps_pre = policies(tiny_sd, weights, T, w, prompts, x_t, j, eta)
    encode = PromptEncoder(StableDiffusionPipeline.from_pretrained(tiny_sd), "cpu")
    value_function = dpok.ValueFunction(4 * 8 * 8 + 32, T)
    value_function.load_state_dict(state["kept"]["value_function"])
    # It began at the mean of the first rewards, and has since made two steps of AdamW with a
    # learning rate of 1e-4.
    assert abs(value_function.out.bias.item() - replay["reward"][0].mean().item()) < 3e-4
    with torch.no_grad():
        value = value_function(x_t.float(), j, encode(prompts)[1]).double()
    advantages = replay["reward"][s, i].double() - value
    log_prob = policy.log_prob(x_prev).flatten(1).mean(1)
    ratio = (log_prob - replay["log_prob"][s, i, j].double()).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    penalty = kl_divergence(policy, pre) if kl == "exact" else (eps - eps_pre) ** 2
    policy_loss = (-alpha * advantages * clipped * (j < rewarded_share * T)).mean()
    kl_loss = beta * penalty.flatten(1).mean(1).mean()
    losses = (policy_loss, kl_loss)
    parts = [torch.autograd.grad(loss, leaves, retain_graph=True) for loss in losses]
    of_policy, of_kl = (torch.cat([gradient.flatten() for gradient in part]) for part in parts)

    outside = (ratio != clipped).sum()
    assert 0 < outside < n, "the case should have ratios inside and outside of the band"
    ours = torch.cat([gradient.flatten() for _, gradient in weights_and_gradients]).double()
    expected = of_policy + of_kl
    assert 0.1 < (share := of_policy.norm() / of_kl.norm()) < 10, (
        f"{share}: both terms of Eq. 9 should matter in this case"
    )
    assert (ours - expected).norm() < 1e-4 * expected.norm()

    # Eq. 24, the value function's update of the same iteration: a mean over five batches.
    of_value = recorded[-4]
    value_function.load_state_dict(
        dict(zip(value_function.state_dict(), (weight for weight, _ in of_value)))
    )
    value_function.double()
    errors = []
    for batch in range(5):
        s, i, j, prompts = transitions(15, 2, 1, batch)
        x_t, pooled = replay["trajectory"][s, i, j].double(), encode(prompts)[1].double()
        errors.append((replay["reward"][s, i] - value_function(x_t, j, pooled)) ** 2)
    gradients = torch.autograd.grad(torch.cat(errors).mean(), [*value_function.parameters()])
    expected = torch.cat([gradient.flatten() for gradient in gradients])
    ours = torch.cat([gradient.flatten() for _, gradient in of_value]).double()
    assert (ours - expected).norm() < 1e-4 * expected.norm()


def test_cooldown_is_a_straight_line_to_0(tiny_sd, tmp_path, monkeypatch):
    """Of four iterations the last two have the learning rates 1 and 1/2.

    The first of them is where the line begins.
    """
    rates, step = [], torch.optim.AdamW.step
    recorded_step = lambda self: rates.append(self.param_groups[0]["lr"]) or step(self)
    monkeypatch.setattr(torch.optim.AdamW, "step", recorded_step)
    flags = "--num-iterations 4 --cooldown-share 0.5 --learning-rate 1e-3 --gradient-steps 1 "
    flags += f"--output-dir {tmp_path / 'run'} --model {tiny_sd}"
    monkeypatch.setattr(sys, "argv", ["dpok.py", *flags.split(), *TINY])
    dpok.main()
    assert rates == [1e-3, 1e-3, 1e-3, 5e-4]


def test_score_function_estimator_is_unbiased():
    """E[r sum_t grad log p] (Eq. 6) against the closed form of a one-dimensional Gaussian chain.

    eps = theta x_t; x_{t-1} = c x_t + sigma z, so that Var <- c^2 Var + sigma^2; r = x_0^2.
    """
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False
    )
    scheduler.register_to_config(steps_offset=1, clip_sample=False)
    scheduler.set_timesteps(5)
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    variance = torch.ones((), dtype=torch.float64)
    for t in scheduler.timesteps:
        a = scheduler.alphas_cumprod.double()[t]
        a_prev = scheduler.alphas_cumprod.double()[max(int(t) - 200, 0)]
        sigma2 = (1 - a_prev) / (1 - a) * (1 - a / a_prev)
        of_x0 = a_prev.sqrt() * (1 - (1 - a).sqrt() * theta) / a.sqrt()
        c = of_x0 + (1 - a_prev - sigma2).sqrt() * theta
        variance = c**2 * variance + sigma2
    exact = torch.autograd.grad(variance, theta)[0].item()

    estimates = []
    for batch in range(64):
        generator = torch.Generator().manual_seed(batch)
        theta = torch.tensor(0.3, requires_grad=True)
        x, score = torch.randn(4000, 1, 1, 1, generator=generator), 0.0
        for t in scheduler.timesteps:
            step = partial(ddim_step_with_logprob, scheduler, theta * x, t, x)
            with torch.no_grad():
                x_prev = step(noise=torch.randn(x.shape, generator=generator)).prev_sample
            score = score + step(prev_sample=x_prev).log_prob
            x = x_prev
        estimates.append(torch.autograd.grad((x.flatten() ** 2 * score).mean(), theta)[0].item())
    error = np.std(estimates, ddof=1) / np.sqrt(len(estimates))
    assert error < 0.1 * abs(exact)
    assert abs(np.mean(estimates) - exact) < 3 * error


def test_default_is_the_setting_of_the_paper():
    args = dpok.Args()
    assert (args.alpha, args.beta, args.learning_rate, args.lora_rank) == (10.0, 0.01, 1e-5, 4)
    assert (args.samples_per_iteration, args.gradient_steps) == (10, 5)
    assert (args.batch_size, args.clip_range) == (32, 1e-4)


def test_predictions_are_marked_when_they_are_there(monkeypatch):
    """A fault in the middle leaves no transition marked that lacks its prediction."""
    args = dpok.Args(samples_per_iteration=3, num_inference_steps=4, replay_rollouts=2)
    scheduler = ddim_scheduler({"num_train_timesteps": 1000}, 4)
    sd = SimpleNamespace(
        scheduler=scheduler,
        timesteps=scheduler.timesteps,
        device=torch.device("cpu"),
        latent_shape=(1, 2, 2),
        batch_size=2,
        encode=lambda texts: torch.zeros(len(texts), 1, 1),
        pretrained=lambda: nullcontext("pretrained"),
    )
    calls = []

    def one_then_no_memory(args, sd, unet, x_t, t, text):
        calls.append(unet)
        if len(calls) > 1:
            raise torch.OutOfMemoryError
        return torch.ones_like(x_t)

    monkeypatch.setattr(dpok, "guided_noise", one_then_no_memory)
    replay = dpok.Replay(args, sd, range(3))
    _, transitions = replay.draw(6, 2, torch.Generator().manual_seed(0))
    with pytest.raises(torch.OutOfMemoryError):
        replay.predict_pretrained(args, sd, ["a"], transitions)
    state = replay.state_dict()
    assert calls == ["pretrained"] * 2 and state["has_pre_noise"].sum() == 2
    assert state["has_pre_noise"].equal(state["pre_noise"].flatten(3).any(3))
