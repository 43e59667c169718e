"""The DDIM step against diffusers' own, its log-probability and KL against torch.distributions."""

import pytest
import torch
from diffusers import DDIMScheduler
from torch.distributions import Normal, kl_divergence

from common.scheduler import (
    ddim_step_kl,
    ddim_step_with_logprob,
    noised,
    predict_x0_and_noise,
)

SD1 = {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}
CONFIGS = {
    "sd1": SD1 | {"prediction_type": "epsilon"},
    "sd2": SD1 | {"prediction_type": "v_prediction"},
    "sd2-base": SD1 | {"prediction_type": "epsilon"},
    "sample": SD1 | {"prediction_type": "sample"},
    "offset-0": SD1 | {"steps_offset": 0},
    "alpha-to-one": SD1 | {"set_alpha_to_one": True},
    "clipped": SD1 | {"clip_sample": True},
    "trailing": SD1 | {"timestep_spacing": "trailing", "prediction_type": "v_prediction"},
}


def make_scheduler(name: str, steps: int = 50) -> DDIMScheduler:
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **CONFIGS[name]
    )
    scheduler.set_timesteps(steps)
    return scheduler


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_step_equals_diffusers(name, eta):
    scheduler = make_scheduler(name)
    generator = torch.Generator().manual_seed(1)
    for t in scheduler.timesteps:
        sample, output, noise = torch.randn(3, 2, 4, 8, 8, generator=generator)
        expected = scheduler.step(output, t, sample, eta=eta, variance_noise=noise).prev_sample
        zeros = torch.zeros_like(noise)
        mean = scheduler.step(output, t, sample, eta=eta, variance_noise=zeros).prev_sample
        step = ddim_step_with_logprob(scheduler, output, t, sample, eta, noise=noise)
        torch.testing.assert_close(step.prev_sample, expected, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(step.mean, mean, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_predicted_x0_equals_diffusers(name):
    """And with the predicted noise it makes x_t, each sample at its own step."""
    scheduler = make_scheduler(name)
    sample, output = torch.randn(2, 50, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    x0, noise = predict_x0_and_noise(scheduler, output, scheduler.timesteps, sample)
    for i, t in enumerate(scheduler.timesteps):
        expected = scheduler.step(output[i], t, sample[i]).pred_original_sample
        torch.testing.assert_close(x0[i], expected, atol=1e-5, rtol=1e-5)
    if name != "clipped":
        x_t = scheduler.add_noise(x0, noise, scheduler.timesteps)
        torch.testing.assert_close(x_t, sample, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("steps", [1, 7, 50])
def test_log_prob_and_kl_equal_torch_distributions(name, steps):
    scheduler = make_scheduler(name, steps)
    generator = torch.Generator().manual_seed(2)
    for t in scheduler.timesteps:
        sample, output, noise, other = torch.randn(4, 2, 4, 8, 8, generator=generator)
        step = ddim_step_with_logprob(scheduler, output, t, sample, 1.0, noise=noise)
        assert torch.isfinite(step.log_prob).all()
        if (step.std == 0).any():
            assert (step.log_prob == 0).all()
            continue
        std = step.std.view(-1, 1, 1, 1).double()
        normal = Normal(step.mean.double(), std)
        expected = normal.log_prob(step.prev_sample.double()).flatten(1).mean(1)
        torch.testing.assert_close(step.log_prob.double(), expected, atol=1e-6, rtol=1e-6)
        # A mean that is off by a step of sigma, as a policy's is; far apart, the KL's own size sets
        # the tolerance.
        other_mean = step.mean + step.std.view(-1, 1, 1, 1) * other
        expected = kl_divergence(normal, Normal(other_mean.double(), std)).flatten(1).mean(1)
        found = ddim_step_kl(step.mean, other_mean, step.std)
        torch.testing.assert_close(found.double(), expected, atol=1e-6, rtol=1e-5)


def test_batch_of_mixed_timesteps_equals_one_by_one():
    scheduler = make_scheduler("sd2")
    timesteps = scheduler.timesteps[[0, 10, 30, 49]]
    sample, output, noise = torch.randn(3, 4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    batch = ddim_step_with_logprob(scheduler, output, timesteps, sample, noise=noise)
    for i, t in enumerate(timesteps):
        one = ddim_step_with_logprob(
            scheduler,
            output[i : i + 1],
            int(t),
            sample[i : i + 1],
            prev_sample=batch.prev_sample[i : i + 1],
        )
        for a, b in zip(one, batch):
            torch.testing.assert_close(a, b[i : i + 1], atol=1e-6, rtol=1e-6)


def test_stored_step_has_the_log_prob_it_was_drawn_with():
    scheduler = make_scheduler("sd1")
    for t in scheduler.timesteps:
        generator = torch.Generator().manual_seed(int(t))
        sample, output, noise = torch.randn(3, 2, 4, 8, 8, generator=generator)
        drawn = ddim_step_with_logprob(scheduler, output, t, sample, noise=noise)
        again = ddim_step_with_logprob(scheduler, output, t, sample, prev_sample=drawn.prev_sample)
        assert torch.equal(drawn.log_prob, again.log_prob)


def test_deterministic_step_has_zero_log_prob_and_finite_gradient():
    scheduler = make_scheduler("offset-0")
    output = torch.randn(2, 4, 8, 8, requires_grad=True)
    t, sample = scheduler.timesteps[-1], torch.randn(2, 4, 8, 8)
    step = ddim_step_with_logprob(scheduler, output, t, sample, noise=output)
    assert (step.std == 0).all() and (step.log_prob == 0).all()
    kl = ddim_step_kl(step.mean, torch.zeros_like(step.mean), step.std)
    (step.log_prob.sum() + kl.sum()).backward()
    assert torch.isfinite(output.grad).all()


def test_half_precision_output_gives_float32_log_prob():
    scheduler = make_scheduler("sd1")
    sample, output, noise = torch.randn(3, 2, 4, 8, 8)
    step = ddim_step_with_logprob(scheduler, output.half(), 501, sample, noise=noise)
    assert all(value.dtype == torch.float32 for value in step)


def test_wrong_use_is_refused():
    scheduler = make_scheduler("sd1")
    x = torch.randn(1, 4, 8, 8)
    with pytest.raises(ValueError, match="either"):
        ddim_step_with_logprob(scheduler, x, 1, x)
    with pytest.raises(ValueError, match="either"):
        ddim_step_with_logprob(scheduler, x, 1, x, noise=x, prev_sample=x)
    scheduler.register_to_config(thresholding=True)
    with pytest.raises(ValueError, match="thresholding"):
        ddim_step_with_logprob(scheduler, x, 1, x, noise=x)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_target_is_what_a_right_model_predicts(prediction_type):
    """With the target as the model's output diffusers' own scheduler finds x_0 back."""
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    scheduler.set_timesteps(1000)
    x0, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    for t in (1, 500, 999):
        x_t, target = noised(scheduler, x0, noise, torch.full((3,), t))
        assert torch.allclose(scheduler.step(target, t, x_t).pred_original_sample, x0, atol=2e-3)
