"""ddpo.py: its gradients against Eq. 3 and 4 written out.

And its estimator against a closed form, and its advantages.
"""

import itertools
import sys
from collections import defaultdict, deque
from functools import partial

import numpy as np
import pytest
import torch
from conftest import ROOT, read_metrics, run_here
from diffusers import DDIMScheduler
from written_out import policies, record_rollouts, record_updates

import ddpo
from common.scheduler import ddim_step_with_logprob

PROMPTS = ["A cat and a dog", "Four wolves in the park"]


def run_recorded(tiny_sd, tmp_path, monkeypatch, *flags):
    """One iteration in this process.

    The (weight, gradient) pairs of each update, the rollout and the advantages.
    """
    advantages, per_prompt_advantages = [], ddpo.per_prompt_advantages
    recorded_advantages = lambda *a: advantages.append(per_prompt_advantages(*a)) or advantages[-1]
    monkeypatch.setattr(ddpo, "per_prompt_advantages", recorded_advantages)
    recorded, rollouts = record_updates(monkeypatch), record_rollouts(monkeypatch, ddpo)
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["--model", tiny_sd, "--prompts-file", tmp_path / "prompts.txt", "--seed", 3]
    words += ["--reward", "jpeg_incompressibility", "--num-inference-steps", 4]
    words += ["--samples-per-iteration", 10, "--num-iterations", 1]
    words += ["--micro-batch-size", 10, "--guidance-scale", 3]
    words += ["--max-grad-norm", 1e9, "--lora-rank", 4, "--output-dir", tmp_path / "run", *flags]
    monkeypatch.setattr(sys, "argv", ["ddpo.py", *map(str, words)])
    ddpo.main()
    monkeypatch.undo()
    # Grids of pictures have eight.
    ((trajectory, log_prob, _),) = [r for r in rollouts if len(r.trajectory) == 10]
    (advantages,) = advantages
    return recorded, trajectory, log_prob, advantages


def gradient(update):
    return torch.cat([g.flatten() for _, g in update]).double()


@pytest.mark.parametrize(
    "estimator, share, fraction, eta",
    [
        ("is", 1.0, 1.0, 1.0),
        ("is", 1.0, 0.5, 1.0),
        ("sf", 1.0, 1.0, 1.0),
        ("sf", 0.5, 0.5, 1.0),
        ("is", 1.0, 1.0, 0.6),
    ],
)
def test_gradient_is_that_of_the_paper_written_out(
    tiny_sd, tmp_path, monkeypatch, estimator, share, fraction, eta
):
    """The gradient handed to the optimizer against autograd in float64.

    Of Eq. 3, and of PPO's surrogate (Schulman et al. 2017, Eq. 7): with "is" at the second update,
    when the ratios are not 1.
    """
    clip, T, m, updates = 3e-4, 4, 10, 2 if estimator == "is" else 1
    flags = ["--estimator", estimator, "--rewarded-share", share, "--timestep-fraction", fraction]
    flags += ["--clip-range", clip, "--learning-rate", 3e-3, "--gradient-steps", 2]
    flags += ["--eta", eta]
    run = run_recorded(tiny_sd, tmp_path, monkeypatch, *flags)
    recorded, trajectory, log_prob, advantages = run
    assert len(recorded) == updates

    # Sample i has drawn its prompt before its noise.
    chosen = [torch.randint(2, (1,), generator=ddpo.seeded(3, 0, 0, i)).item() for i in range(m)]
    assert len(set(chosen)) == 2
    generator = ddpo.seeded(3, 1, 0)
    learned = round(share * T)
    chosen_steps = torch.rand(m, learned, generator=generator).argsort(1)
    chosen_steps = chosen_steps[:, : round(fraction * learned)]
    samples = torch.randperm(m, generator=generator)
    samples = samples[m // 2 :] if estimator == "is" else samples
    pairs = [(i, j) for i in samples.tolist() for j in chosen_steps[i].tolist()]
    i, j = torch.tensor(pairs).T
    weights = [weight for weight, _ in recorded[-1]]
    prompts = [PROMPTS[chosen[k]] for k in i.tolist()]
    leaves, policy, *_ = policies(tiny_sd, weights, T, 3.0, prompts, trajectory[i, j], j, eta)
    log_p = policy.log_prob(trajectory[i, j + 1].double()).flatten(1).mean(1)
    A = advantages[i]
    if estimator == "sf":
        objective = A * log_p
    else:
        ratio = (log_p - log_prob[i, j].double()).exp()
        objective = torch.minimum(A * ratio, A * torch.clamp(ratio, 1 - clip, 1 + clip))
        outside = ((ratio > 1 + clip) & (A > 0)) | ((ratio < 1 - clip) & (A < 0))
        back = ((ratio > 1 + clip) & (A < 0)) | ((ratio < 1 - clip) & (A > 0))
        every_case = outside.any() and back.any() and not (outside | back).all()
        assert every_case, "all of PPO's cases should occur"
        of_outside = torch.autograd.grad(objective[outside].sum(), leaves, retain_graph=True)
        assert all((g == 0).all() for g in of_outside)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(-objective.mean(), leaves)])
    assert (gradient(recorded[-1]) - expected).norm() < 1e-4 * expected.norm()


def test_kl_to_the_pretrained_model_is_torchs(tiny_sd, tmp_path, monkeypatch):
    """DPOK, Eq. 7: that of a step of each sample, times the steps; the sample has drawn which."""
    T, recorded, rollouts = 2, record_updates(monkeypatch), record_rollouts(monkeypatch, ddpo)
    flags = ["--model", tiny_sd, "--prompt", PROMPTS[0], "--reward", "jpeg_incompressibility"]
    flags += ["--num-inference-steps", T, "--samples-per-iteration", 2, "--num-iterations", 2]
    flags += ["--estimator", "sf", "--learning-rate", 3e-3, "--guidance-scale", 3]
    flags += ["--min-count", 1, "--lora-rank", 4, "--output-dir", tmp_path / "run"]
    run_here(monkeypatch, "ddpo.py", *flags)
    of_grid = 4  # eight pictures, before and after
    assert len(rollouts) == of_grid + 2 + of_grid
    first, second = (rollout.trajectory for rollout in rollouts[of_grid : of_grid + 2])
    weights = [weight for weight, _ in recorded[1]]
    kl = torch.empty(2, T)
    for j in range(T):
        at = torch.full((2,), j)
        x_t = second[:, j]
        _, policy, pre, *_ = policies(tiny_sd, weights, T, 3.0, [PROMPTS[0]], x_t, at)
        kl[:, j] = torch.distributions.kl_divergence(policy, pre).flatten(1).sum(1)
    could_be = [T * (kl[0, j] + kl[1, k]).item() / 2 for j in range(T) for k in range(T)]
    before, after = (line["kl/pretrained"] for line in read_metrics(tmp_path / "run"))
    assert not first.equal(second) and before == 0
    assert min(could_be) > 1e-3 and any(after == pytest.approx(x, rel=1e-3) for x in could_be)


def test_importance_sampling_at_ratio_1_is_the_score_function(tiny_sd, tmp_path, monkeypatch):
    flags = ["--estimator", "is", "--gradient-steps", 1]
    one = run_recorded(tiny_sd, tmp_path / "is", monkeypatch, *flags)[0][0]
    other = run_recorded(tiny_sd, tmp_path / "sf", monkeypatch, "--estimator", "sf")[0][0]
    assert gradient(other).norm() > 0
    assert (gradient(one) - gradient(other)).norm() < 1e-6 * gradient(other).norm()


def test_score_function_is_unbiased():
    """Eq. 3 with a baseline, on x_{t-1} ~ N(theta x_t pushed through the scheduler).

    Against the exact gradient of E x_0^2 = Var(x_0) for three thetas, one a step, so that a step
    left out or weighted wrongly shows.
    """
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    scheduler.set_timesteps(3)
    start = torch.tensor([0.4, -0.2, 0.1], dtype=torch.float64)
    theta = start.clone().requires_grad_()
    variance, alphas = torch.ones((), dtype=torch.float64), scheduler.alphas_cumprod.double()
    for k, t in enumerate(scheduler.timesteps.tolist()):
        a, a_prev = alphas[t], alphas[t - 333] if t >= 333 else torch.ones((), dtype=torch.float64)
        sigma2 = (1 - a_prev) / (1 - a) * (1 - a / a_prev)
        of_x0 = a_prev.sqrt() * (1 - (1 - a).sqrt() * theta[k]) / a.sqrt()
        c = of_x0 + (1 - a_prev - sigma2).sqrt() * theta[k]
        variance = c**2 * variance + sigma2
    # The last step has no noise: its theta acts through x_0 = c x_1 alone and has no score; see the
    # two others.
    exact = torch.autograd.grad(variance, theta)[0][:2]

    estimates = []
    for batch in range(200):
        generator = torch.Generator().manual_seed(batch)
        theta = start.float().requires_grad_()
        x, score = torch.randn(20_000, 1, 1, 1, generator=generator), 0.0
        for k, t in enumerate(scheduler.timesteps):
            step = partial(ddim_step_with_logprob, scheduler, theta[k] * x, t, x)
            with torch.no_grad():
                x_prev = step(noise=torch.randn(x.shape, generator=generator)).prev_sample
            score = score + step(prev_sample=x_prev).log_prob
            x = x_prev
        reward = x.flatten() ** 2
        objective = ((reward - variance.item()) * score).mean()
        estimates.append(torch.autograd.grad(objective, theta)[0][:2])
    estimates = torch.stack(estimates).double()
    error = estimates.std(0) / len(estimates) ** 0.5
    assert (error < 0.1 * exact.abs()).all(), (error, exact)
    assert ((estimates.mean(0) - exact).abs() < 3 * error).all(), (estimates.mean(0), exact, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize("num_prompts", [1, 5])
def test_per_prompt_advantages_against_a_plain_tracker(num_prompts, dtype):
    """Integers, one prompt, prompts that are never or seldom seen, a buffer that overflows."""
    rng = np.random.default_rng(0)
    history = torch.full((num_prompts + 1, 7), float("nan"), dtype=torch.float64)
    tracker = defaultdict(lambda: deque(maxlen=7))
    seen_few = seen_many = 0
    chances = np.array([1.0] if num_prompts == 1 else [0.5, 0.3, 0.1, 0.07, 0.03])
    for _ in range(6):
        prompts = rng.choice(num_prompts, 12, p=chances)
        rewards = rng.integers(-20, 20, 12)
        given = torch.tensor(prompts), torch.tensor(rewards, dtype=dtype)
        ours = ddpo.per_prompt_advantages(history, *given, 4)
        for prompt, reward in zip(prompts, rewards):
            tracker[prompt].append(float(reward))
        for advantage, prompt, reward in zip(ours.tolist(), prompts, rewards):
            known = tracker[prompt] if len(tracker[prompt]) >= 4 else rewards
            seen_few, seen_many = seen_few + (known is rewards), seen_many + (known is not rewards)
            expected = (reward - np.mean(known)) / (np.std(known) + 1e-6)
            assert advantage == pytest.approx(expected, abs=1e-9)
        assert ours.dtype == torch.float64
    assert history[num_prompts].isnan().all() and seen_many and (seen_few or num_prompts == 1)


def test_equal_rewards_give_no_advantage():
    history = torch.full((2, 4), float("nan"), dtype=torch.float64)
    ours = ddpo.per_prompt_advantages(history, torch.tensor([0, 0, 1, 1]), torch.full((4,), 0.1), 2)
    assert (ours.abs() < 1e-2).all()


def test_prompt_files_are_those_of_the_paper():
    animals, activities, imagenet = (
        (ROOT / f"prompts/{name}.txt").read_text().splitlines()
        for name in ("animals", "animals_activities", "imagenet_animals")
    )
    assert len(animals) == len(set(animals)) == 45 and len(imagenet) == 398
    assert (imagenet[0], imagenet[207], imagenet[397]) == ("tench", "golden retriever", "puffer")
    expected = itertools.product(animals, ("riding a bike", "playing chess", "washing dishes"))
    assert activities == [
        f"{'an' if animal == 'ant' else 'a'} {animal} {doing}" for animal, doing in expected
    ]
