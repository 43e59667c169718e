"""How an evaluation draws a picture: a guided DDIM chain, its KL to the pretrained model, a VAE."""

import numpy as np
import torch
from diffusers import DDIMScheduler

from common import UserError
from common.scheduler import ddim_step_kl, ddim_step_with_logprob
from evaluation.settings import Settings

NOISE = 4
"""The second number in the key of a picture's noise; training has others."""


class PictureError(UserError):
    """A picture that is no picture; the message names its prompt."""


class Sampler:
    """Draws the pictures of an evaluation with a pretrained pipeline, or another UNet in its place.

    The pipeline's UNet must be on `device` and in the evaluation's dtype; the rest is moved there.
    """

    def __init__(self, pipeline, settings: Settings, device: torch.device):
        self.pipeline, self.settings, self.device = pipeline, settings, device
        self.vae = pipeline.vae.to(device, memory_format=torch.channels_last).eval()
        self.vae.requires_grad_(False)
        pipeline.text_encoder.to(device).eval().requires_grad_(False)
        self.no_text = encode_prompts(pipeline, [""], device)
        # DDIMScheduler would clip latents to [-1, 1] where a model's configuration has no say.
        config = pipeline.scheduler.config
        clip_sample = config.get("clip_sample", False)
        self.scheduler = DDIMScheduler.from_config(config, clip_sample=clip_sample)
        self.scheduler.set_timesteps(settings.num_inference_steps)
        side = pipeline.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.shape = (side, side, 3)

    def draw(
        self, unet: torch.nn.Module, pictures: list[tuple[int, int]]
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Pictures (prompt j, number i), uint8 (B, H, W, 3), and their KL in nats, (B,).

        The KL is None where there is none: of the pretrained UNet itself, and with eta 0. Raises
        PictureError where one is not finite, which 8 bits would not show.
        """
        settings, pretrained = self.settings, self.pipeline.unet
        config = pretrained.config
        side = config.sample_size
        shape = (settings.num_inference_steps + 1, config.in_channels, side, side)
        # The same noise for every model, whatever the batch and the number of ranks.
        generators = [seeded(settings.seed, NOISE, j, i) for j, i in pictures]
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)
        prompts = [settings.prompts[j] for j, _ in pictures]
        text = encode_prompts(self.pipeline, prompts, self.device)
        condition = (self.scheduler, text, self.no_text, noise)
        trajectory, stds = sample(settings, unet, *condition)
        decoded = decode(self.vae, trajectory[:, -1])
        for values in (trajectory[:, -1], decoded):
            check_finite(values, prompts, "picture")
        images = (decoded * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        if unet is pretrained or settings.eta == 0:
            return images, None
        kl = kl_to_pretrained(settings, pretrained, *condition, trajectory, stds)
        check_finite(kl, prompts, "KL")
        return images, kl.cpu().numpy()


def check_finite(values: torch.Tensor, prompts: list[str], what: str) -> None:
    """Raises PictureError with the first prompt whose row of `values` is NaN or infinite."""
    finite = (
        values.isfinite().flatten(start_dim=1) if values.dim() > 1 else values.isfinite()[:, None]
    )
    if not finite.all():
        prompt = prompts[finite.all(1).tolist().index(False)]
        raise PictureError(f"the {what} of the prompt {prompt[:100]!r} is not finite")


def seeded(*key: int) -> torch.Generator:
    """A CPU generator that is a function of `key` alone."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


@torch.no_grad()
def encode_prompts(pipeline, prompts: list[str], device) -> torch.Tensor:
    """Hidden states (B, L, D) of the text encoder, float32."""
    ids = pipeline.tokenizer(
        prompts,
        padding="max_length",
        max_length=pipeline.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    return pipeline.text_encoder(ids.to(device)).last_hidden_state.float()


def guided_noise(settings, unet, latents, timesteps, text, no_text) -> torch.Tensor:
    """w eps(x_t, t, z) + (1 - w) eps(x_t, t), float32; w is settings.guidance_scale.

    latents (B, C, H, W), timesteps (B,), text (B, L, D) and no_text (1, L, D), that of the empty
    prompt, which is not asked where w is 1 or less.
    """
    w, dtype = settings.guidance_scale, unet.conv_in.weight.dtype
    if w <= 1:
        return unet(latents.to(dtype), timesteps, text.to(dtype), return_dict=False)[0].float()
    text = torch.cat([no_text.expand_as(text), text]).to(dtype)
    latents = torch.cat([latents, latents]).to(dtype)
    noise = unet(latents, timesteps.repeat(2), text, return_dict=False)[0]
    without_text, with_text = noise.float().chunk(2)
    return without_text + w * (with_text - without_text)


@torch.no_grad()
def sample(
    settings, unet, scheduler, text, no_text, noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Denoise: trajectories (B, T+1, C, H, W) from x_T to x_0, and sigma_t (T,).

    noise (B, T+1, C, H, W), standard normal: x_T first, then that of every step. Of `settings` it
    takes guidance_scale and eta.
    """
    trajectory, stds = [noise[:, 0] * scheduler.init_noise_sigma], []
    for j, t in enumerate(scheduler.timesteps.to(noise.device)):
        x_t, timesteps = trajectory[-1], t.expand(len(noise))
        eps = guided_noise(settings, unet, x_t, timesteps, text, no_text)
        step = ddim_step_with_logprob(
            scheduler, eps, timesteps, x_t, settings.eta, noise=noise[:, j + 1]
        )
        trajectory.append(step.prev_sample)
        stds.append(step.std[0])
    return torch.stack(trajectory, dim=1), torch.stack(stds)


@torch.no_grad()
def kl_to_pretrained(
    settings, unet, scheduler, text, no_text, noise, trajectory, stds
) -> torch.Tensor:
    """KL of sampled chains to the pretrained model's in nats, (B,): DPOK (arXiv:2305.16381), Eq. 7.

    It is the sum over the chain's steps of the exact KL. unet is the pretrained one; text
    (B, L, D), noise and trajectory (B, T+1, C, H, W) and stds (T,) are what `sample` took and gave.
    """
    total = torch.zeros(len(trajectory), device=trajectory.device)
    for j, t in enumerate(scheduler.timesteps.to(trajectory.device)):
        timesteps, x_t, x_prev = t.expand(len(trajectory)), trajectory[:, j], trajectory[:, j + 1]
        eps = guided_noise(settings, unet, x_t, timesteps, text, no_text)
        pretrained = ddim_step_with_logprob(
            scheduler, eps, timesteps, x_t, settings.eta, prev_sample=x_prev
        )
        # Of the model that has drawn x_prev: no need to run it again.
        mean = x_prev - stds[j] * noise[:, j + 1]
        total += ddim_step_kl(mean, pretrained.mean, pretrained.std) * x_t[0].numel()
    return total


@torch.no_grad()
def decode(vae, latents: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [0, 1] of latents x_0."""
    return (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
