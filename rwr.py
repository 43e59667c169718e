"""RWR: reward-weighted regression, dense and sparse (Black et al. 2023, arXiv:2305.13301, 4.2).

Denoising is taken as one step: the action is x_0, and the model is trained as diffusion models are,
on its own samples, weighted by their reward. Each round:

    sample c ~ p(c) and x_0 ~ p_theta(x_0 | c), 10 240 times, and keep them              (A.6: 10k)
    w_RWR = exp(beta r) / Z, the softmax over the samples of each prompt                 (4.2, A.3)
    w_sparse = 1 where r >= C, a percentile of the rewards of each prompt, else 0   (4.2, A.2, A.3)
    theta <- theta - lr grad E w |eps - eps_theta(x_t, t, c)|^2, 400 times                   (Eq. 1)
    eps_theta is the guided prediction                                                  (Eq. 5, B.1)
    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, t uniform over the training's steps

A laptop, minutes:        python rwr.py zoo
One GPU, SD v1.4, LoRA:   python rwr.py --lora-rank 4
Eight GPUs, sparse:       torchrun --nproc_per_node=8 rwr.py sparse

docs/rwr.md says what the paper does, what the released code does, what this file does, and explains
every metric.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from common.scheduler import ddim_mean_and_std, ddim_step_kl, ddim_step_with_logprob, noised
from common.stable_diffusion import load_stable_diffusion
from harness import (
    GRID,
    ROLLOUT,
    UPDATES,
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
    progress,
    read_prompts,
    require,
    seeded,
    tag_of,
    warn_of_prompts,
)


@dataclass(kw_only=True)
class Args(RunArgs):
    model: str = "CompVis/stable-diffusion-v1-4"
    """Hub id or local folder in diffusers format (App. A)."""
    prompt: str = ""
    """A single prompt, in place of --prompts-file."""
    prompts_file: Path | None = Path("prompts/imagenet_animals.txt")
    """Text file, one prompt a line; every sample draws one at random. 398 animals (6.1)."""
    reward: str = "jpeg_compressibility"
    """Reward, as in docs/rewards.md: a name, name:WEIGHTS, or path/to/file.py:function."""
    num_iterations: int = 10
    """Rounds of sampling and training (released code)."""
    samples_per_iteration: int = 10_240
    """m: samples of a round, all ranks together (A.6; released code)."""
    shard_size: int = 256
    """Samples, all ranks together, that are drawn, scored and written to disk at a time; a stopped
    round is resumed from there."""
    num_inference_steps: int = 50
    """T: DDIM steps of a sample (A.6)."""
    guidance_scale: float = 5.0
    """w of classifier-free guidance (A.6); 1 or less switches it off."""
    eta: float = 1.0
    """Noise of the DDIM step: 1 is the DDPM (ancestral sampling, A.6)."""
    cfg_training: bool = True
    """Train the guided prediction, which is what samples are drawn with (B.1). Off: the conditional
    one alone."""
    weights: Literal["softmax", "sparse"] = "softmax"
    """w_RWR or w_sparse (4.2)."""
    inverse_temperature: float = 0.2
    """beta of w_RWR (A.6)."""
    percentile: float = 0.9
    """Share of the samples that w_sparse leaves out (A.6)."""
    normalise: Literal["per-prompt", "pool"] = "per-prompt"
    """Softmax and percentile over the samples of each prompt (A.3), or all of the round's (A.2)."""
    gradient_steps: int = 400
    """Updates of a round (A.6)."""
    batch_size: int = 128
    """n: samples of an update, all ranks together (A.6)."""
    fresh_optimizer: bool = True
    """Forget AdamW's moments at the start of a round's training (released code)."""
    learning_rate: float | None = None
    """AdamW's learning rate; by default 1e-5 for all weights (A.6), 3e-4 for a LoRA (ddpo.py's)."""
    weight_decay: float = 1e-4
    """AdamW's weight decay (A.6)."""
    max_grad_norm: float = 1.0
    """Gradient norm above which an update is scaled down (A.6)."""
    lora_rank: int = 0
    """Rank of a LoRA on the attention layers; 0 trains all weights (A.6)."""
    monitor_kl: bool = True
    """Measure the KL to the pretrained model, which nothing here learns from; with --lora-rank 0 a
    frozen copy of the UNet is kept for it."""
    save_every: int = 1
    """Rounds between checkpoints, each with a grid of fixed prompts and seeds."""


PRESETS = {
    "rwr": Args(),
    "sparse": Args(weights="sparse"),
    "zoo": Args(
        model="zoo/sd",
        prompts_file=Path("prompts/zoo.txt"),
        reward="image_reward:zoo/image_reward",
        num_iterations=5,
        samples_per_iteration=192,
        shard_size=64,
        micro_batch_size=64,
        num_inference_steps=12,
        guidance_scale=1.5,
        # Rewards of unit variance, where JPEGs of 512 px vary by tens of kB.
        inverse_temperature=2.0,
        gradient_steps=40,
        batch_size=32,
        learning_rate=2e-3,
        lora_rank=4,
    ),
}


def check(args: Args) -> None:
    """What cannot work, refused before anything is loaded."""
    require(args.percentile <= 1, f"--percentile is {args.percentile}; it can be at most 1")
    m, shard = args.samples_per_iteration, args.shard_size
    require(m % shard == 0, f"--shard-size is {shard}; it must divide --samples-per-iteration, {m}")
    check_share("--shard-size", args.shard_size)
    check_share("--batch-size", args.batch_size)
    check_sampler(args)
    check_memory("--samples-per-iteration", args.model, m)
    check_memory("--shard-size", args.model, shard, pictures=shard)
    check_memory("--batch-size", args.model, 2 * args.batch_size)
    check_reward(args.reward)


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


def rwr_weights(rewards, prompts, args):
    """w_RWR or w_sparse (4.2) of a round's samples, float64 (m,), over args.normalise's groups.

    rewards (m,), prompts (m,) int64. Z makes the mean weight of a group 1, so that the size of the
    loss depends neither on the number of samples nor on that of prompts. A reward equal to the
    percentile is kept.
    """
    rewards, weights = rewards.double(), torch.zeros(len(rewards), dtype=torch.float64)
    groups = prompts if args.normalise == "per-prompt" else torch.zeros_like(prompts)
    for group in groups.unique():
        r = rewards[groups == group]
        if args.weights == "softmax":
            weights[groups == group] = len(r) * torch.softmax(args.inverse_temperature * r, dim=0)
        else:
            weights[groups == group] = (r >= r.quantile(args.percentile)).double()
    return weights


def batches_of(kept, batch_size: int, generator):
    """Endless batches of samples: permutations of those that are kept, one after the other."""
    order = torch.zeros(0, dtype=torch.long)
    while True:
        while len(order) < batch_size:
            order = torch.cat([order, kept[torch.randperm(len(kept), generator=generator)]])
        yield order[:batch_size]
        order = order[batch_size:]


@command
def main():
    args = parse_args(PRESETS, __doc__, check)
    prompts = read_prompts(args)
    run = Run(args, __file__, tag_of(args))
    sd = load_stable_diffusion(args, run.device, keep_pretrained=args.monitor_kl)
    reward_function = load_run_reward(run, args, args.reward, prompts)
    warn_of_prompts(sd.encoder, prompts)
    m, n, T = args.samples_per_iteration, args.batch_size, args.num_inference_steps

    learning_rate = args.learning_rate
    if learning_rate is None:
        learning_rate = 3e-4 if args.lora_rank else 1e-5
    optimizer = torch.optim.AdamW(sd.weights, learning_rate, weight_decay=args.weight_decay)
    # Without CFG training the model that learns is not the one that samples (B.1, Fig. 8).
    train_args = args if args.cfg_training else replace(args, guidance_scale=1.0)
    own = run.share(n)
    args = fit_micro_batches(args, sd, guided_noise)
    run.keep(model=sd, optimizer=optimizer)
    sd.batch_size = even_size(len(own), args.micro_batch_size)

    def draw_shard(iteration, first):
        """This rank's share of a shard: x_0, prompts, rewards, and KL to the pretrained model."""
        with run.timer("sample"):
            indices = [first + i for i in run.share(args.shard_size)]
            generators = [seeded(args.seed, ROLLOUT, iteration, i) for i in indices]
            chosen = torch.cat([torch.randint(len(prompts), (1,), generator=g) for g in generators])
            noise = [torch.randn(T + 1, *sd.latent_shape, generator=g) for g in generators]
            kl_steps = torch.cat([torch.randint(T, (1,), generator=g) for g in generators])
            kl_steps = kl_steps.to(run.device)
            own_prompts = [prompts[i] for i in chosen.tolist()]
            sd.batch_size = even_size(len(indices), args.micro_batch_size)
            x_0, images, kl = [], [], torch.zeros(len(indices), device=run.device)
            for rows in micro_batches(len(indices), sd.batch_size):
                drawn = torch.stack(noise[rows]).to(run.device)
                text = sd.encode(own_prompts[rows])
                rollout = sample(args, sd, sd.unet, text, drawn)
                x_0.append(rollout.trajectory[:, -1])
                images.append(sd.decode(x_0[-1]))
                reward_function.start(images[-1], own_prompts[rows])
                if args.monitor_kl:
                    kl[rows] = kl_to_pretrained(args, sd, text, rollout, kl_steps[rows])
        with run.timer("reward"):
            rewards = reward_function(torch.cat(images), own_prompts)
        chosen = chosen.to(run.device)
        return {"x0": torch.cat(x_0), "prompt": chosen, "reward": rewards, "kl": kl}

    for iteration in run.iterations(grid=partial(draw_grid, args, sd, prompts=prompts)):
        # m samples of the current model and their rewards, shard by shard (A.6).
        shards = []
        for first in progress(range(0, m, args.shard_size), "samples"):
            path = f"pool/{iteration:03d}/{first:06d}.safetensors"
            make = partial(draw_shard, iteration, first)
            shards.append(run.shard(path, args.shard_size, make))
        pool = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}
        chosen, rewards = pool["prompt"], pool["reward"]

        # Training on them, weighted (4.2).
        with run.timer("train"):
            sd.batch_size = even_size(len(own), args.micro_batch_size)
            weights = rwr_weights(rewards, chosen, args)
            kept = torch.nonzero(weights > 0)[:, 0]
            if args.fresh_optimizer:
                optimizer.state.clear()
            # One generator: what an update draws follows what the one before has drawn.
            generator = seeded(args.seed, UPDATES, iteration)
            batches = batches_of(kept, n, generator)
            for _ in progress(range(args.gradient_steps), "updates"):
                batch = next(batches)
                num_steps = sd.scheduler.config.num_train_timesteps
                t = torch.randint(num_steps, (n,), generator=generator)
                noise = torch.randn(n, *sd.latent_shape, generator=generator)
                mine = batch[own.start : own.stop]
                batch_prompts = [prompts[i] for i in chosen[mine].tolist()]
                weight = weights[mine].float().to(run.device)
                x_0 = pool["x0"][mine].to(run.device)
                noise, t = (x[own.start : own.stop].to(run.device) for x in (noise, t))
                x_t, target = noised(sd.scheduler, x_0, noise, t)
                for rows in micro_batches(len(own), sd.batch_size):
                    text = sd.encode(batch_prompts[rows])
                    prediction = guided_noise(train_args, sd, sd.unet, x_t[rows], t[rows], text)
                    error = ((prediction - target[rows]) ** 2).flatten(1).mean(1)
                    loss = (weight[rows] * error).sum() / n  # Eq. 1, weighted (4.2)
                    run.backward(loss)
                    run.add("loss/rwr", loss.double() / args.gradient_steps)
                run.step(optimizer, args.max_grad_norm)

        line = {"time/sample_s": 0.0, "time/reward_s": 0.0}  # where all shards were on disk
        line |= {"samples": (iteration + 1) * m, "reward": rewards}
        line |= {"weights/kept": len(kept) / m}
        line |= {"weights/effective": (weights.sum() ** 2 / (weights**2).sum() / m).item()}
        if args.monitor_kl:
            line |= {"kl/pretrained": pool["kl"].mean().item() * sd.latent_size * T}
        run.log(line)


if __name__ == "__main__":
    main()
