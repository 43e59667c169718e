"""The denoising step as a policy: a DDIM step with its log-probability, and the KL of two steps.

And the forward process, for losses that denoise a sample again.
"""

import math
from typing import NamedTuple

import torch
from diffusers import DDIMScheduler


class DDIMStep(NamedTuple):
    """A step x_t -> x_{t-1} of a batch; all float32."""

    prev_sample: torch.Tensor
    """x_{t-1}, (B, C, H, W): the action."""
    log_prob: torch.Tensor
    """log p(x_{t-1} | x_t), (B,), as the mean over C, H, W; 0 where std is 0."""
    mean: torch.Tensor
    """(B, C, H, W)."""
    std: torch.Tensor
    """sigma_t, (B,); 0 means that the step is deterministic and has no log-probability."""


def ddim_step_with_logprob(
    scheduler: DDIMScheduler,
    model_output: torch.Tensor,
    timestep: torch.Tensor | int,
    sample: torch.Tensor,
    eta: float = 1.0,
    *,
    prev_sample: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
) -> DDIMStep:
    """One DDIM step (Song et al. 2020, Eq. 12 and 16) as a Gaussian policy (DPOK Eq. 4, DDPO 4.3).

    model_output and sample are (B, C, H, W); timestep is an int or (B,), each sample at its own.
    The prediction type, the betas and `num_inference_steps` are the scheduler's, on which
    `set_timesteps` must have been called. Give either `noise` (B, C, H, W), standard normal, to
    draw x_{t-1} = mean + std * noise, or `prev_sample` to have a stored x_{t-1} evaluated.

    The log-probability is the mean over the latent's dimensions, not the sum: the published clip
    ranges (1e-4) are for ratios of this form. Everything is computed in float32, and `prev_sample`
    is returned as its log-probability was taken: do not round it before it is stored.

    Raises ValueError for a configuration whose step is not a Gaussian of this form (thresholding),
    or when neither or both of `noise` and `prev_sample` are given.
    """
    if (noise is None) == (prev_sample is None):
        raise ValueError("give either noise or prev_sample")
    if scheduler.config.thresholding:
        raise ValueError(
            "dynamic thresholding is not supported: "
            "set thresholding=False in the scheduler's config"
        )
    mean, std = ddim_mean_and_std(scheduler, model_output, timestep, sample, eta)
    wide_std = std.view(-1, *[1] * (sample.dim() - 1))
    if prev_sample is None:
        prev_sample = mean + wide_std * noise.float()
    # Where std is 0 a 1 stands in, so that neither value nor gradient is NaN; the result is then
    # masked.
    safe_std = torch.where(wide_std > 0, wide_std, torch.ones_like(wide_std))
    z = (prev_sample.float() - mean) / safe_std
    log_prob = -(z**2) / 2 - safe_std.log() - 0.5 * math.log(2 * math.pi)
    log_prob = torch.where(std > 0, log_prob.flatten(1).mean(1), torch.zeros_like(std))
    return DDIMStep(prev_sample.float(), log_prob, mean, std)


def ddim_mean_and_std(
    scheduler: DDIMScheduler,
    model_output: torch.Tensor,
    timestep: torch.Tensor | int,
    sample: torch.Tensor,
    eta: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean (B, C, H, W) and sigma_t (B,) of x_{t-1} given x_t, float32 (Song et al., Eq. 12, 16).

    The arguments are those of `ddim_step_with_logprob`.
    """
    model_output, sample = model_output.float(), sample.float()
    alphas_cumprod = scheduler.alphas_cumprod.to(sample.device)
    t = torch.as_tensor(timestep, device=sample.device).long().expand(len(sample))
    prev_t = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    alpha_prod = alphas_cumprod[t]
    alpha_prod_prev = torch.where(
        prev_t >= 0,
        alphas_cumprod[prev_t.clamp(min=0)],
        scheduler.final_alpha_cumprod.to(sample.device),
    )
    # sigma_t, Eq. 16: eta = 1 is the DDPM, eta = 0 the deterministic DDIM.
    variance = (1 - alpha_prod_prev) / (1 - alpha_prod) * (1 - alpha_prod / alpha_prod_prev)
    std = eta * variance.clamp(min=0).sqrt()

    pred_original_sample, pred_epsilon = predict_x0_and_noise(scheduler, model_output, t, sample)
    wide = [-1, *[1] * (sample.dim() - 1)]
    a_prev, s = alpha_prod_prev.view(wide), std.view(wide)
    # Eq. 12: the mean is the predicted x_0, and the direction that points to x_t.
    mean = (
        a_prev.sqrt() * pred_original_sample
        + (1 - a_prev - s**2).clamp(min=0).sqrt() * pred_epsilon
    )
    return mean, std


def predict_x0_and_noise(
    scheduler: DDIMScheduler,
    model_output: torch.Tensor,
    timestep: torch.Tensor | int,
    sample: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The x_0 and the epsilon (B, C, H, W) that a model's output says of x_t, float32.

    model_output and sample, x_t, are (B, C, H, W); timestep is an int or (B,). The scheduler tells
    whether the output is epsilon, v or x_0 (Song et al. 2020, Eq. 9; Salimans & Ho 2022, App. D).
    """
    model_output, sample = model_output.float(), sample.float()
    t = torch.as_tensor(timestep, device=sample.device).long().expand(len(sample))
    a = scheduler.alphas_cumprod.to(sample.device)[t].view(-1, *[1] * (sample.dim() - 1))
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        x_0 = (sample - (1 - a).sqrt() * model_output) / a.sqrt()
        epsilon = model_output
    elif prediction_type == "v_prediction":
        x_0 = a.sqrt() * sample - (1 - a).sqrt() * model_output
        epsilon = a.sqrt() * model_output + (1 - a).sqrt() * sample
    elif prediction_type == "sample":
        x_0 = model_output
        epsilon = (sample - a.sqrt() * model_output) / (1 - a).sqrt()
    else:
        raise ValueError(f"prediction type {prediction_type!r} is not supported")
    if scheduler.config.clip_sample:
        limit = scheduler.config.clip_sample_range
        x_0 = x_0.clamp(-limit, limit)
    return x_0, epsilon


def steps_with_noise(scheduler: DDIMScheduler, eta: float) -> torch.Tensor:
    """Indices (K,), int64, 0 the noisiest, of the sampler's steps with sigma_t above 0.

    The others have no log-prob.
    """
    zeros = torch.zeros(len(scheduler.timesteps), 1, 1, 1)
    step = ddim_step_with_logprob(scheduler, zeros, scheduler.timesteps, zeros, eta, noise=zeros)
    return torch.nonzero(step.std > 0)[:, 0]


def ddim_step_kl(mean: torch.Tensor, other_mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, std^2 I) || N(other_mean, std^2 I)), (B,): a term of DPOK Eq. 7.

    It is exact for steps that share sigma_t. Like the log-probability it is the mean over the
    latent's dimensions, so that the two terms of DPOK Eq. 8 keep their proportion; multiply by
    C * H * W for nats. Means are (B, C, H, W), std is (B,); the KL is 0 where std is 0.
    """
    squared = ((mean - other_mean) ** 2).flatten(1).mean(1)
    safe_std = torch.where(std > 0, std, torch.ones_like(std))
    return torch.where(std > 0, squared / (2 * safe_std**2), torch.zeros_like(std))


def noised(
    scheduler: DDIMScheduler, x_0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t of the forward process, and what the model is to predict from it: eps, or v, or x_0.

    x_0 and noise, the eps, are (B, C, H, W) as both results are; t (B,) is of the training's steps.
    """
    x_t = scheduler.add_noise(x_0, noise, t)
    if scheduler.config.prediction_type == "v_prediction":
        return x_t, scheduler.get_velocity(x_0, noise, t)
    return x_t, x_0 if scheduler.config.prediction_type == "sample" else noise
