"""DDPO: denoising diffusion policy optimization (Black et al. 2023, arXiv:2305.13301).

Denoising is a Markov decision process (4.3): the state is (c, t, x_t), the action x_{t-1}, the policy one step
p_theta(x_{t-1} | c, t, x_t), the reward r(x_0, c) comes at the end. Each iteration:

    sample c ~ p(c) and x_{T:0} ~ p_theta, 256 times                                                        (A.1)
    A <- (r - mean of c's rewards) / std of c's rewards, clipped to +-10                                    (A.3)
    SF: theta <- theta + lr grad E sum_t A log p_theta(x_{t-1} | c, t, x_t), once                           (Eq. 3)
    IS: theta <- theta + lr grad E sum_t min(A ratio_t, A clip(ratio_t, 1 - eps, 1 + eps)), 4 times         (Eq. 4, A.1)
        ratio_t = p_theta(x_{t-1} | c, t, x_t) / p_old(x_{t-1} | c, t, x_t)

A laptop, minutes:        python ddpo.py zoo
One GPU, SD v1.4:         python ddpo.py compressibility
Eight GPUs:               torchrun --nproc_per_node=8 ddpo.py aesthetic
The score function:       torchrun --nproc_per_node=8 ddpo.py aesthetic --estimator sf

docs/ddpo.md says what the paper does, what the released code does, what this file does, and explains every metric.
"""

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import DDIMScheduler
from tqdm import tqdm

from common.cli import check_args, load_pipeline, load_reward_or_fail, parse_args, warn_of_prompts
from common.lora import load_weights, pretrained, save_weights
from common.rewards import RewardError
from common.run_folder import RunFolder, choose_run_dir, new_checkpoint, save_grid
from common.scheduler import ddim_step_kl, ddim_step_with_logprob
from common.stable_diffusion import PromptEncoder, make_trainable
from common.stop import (
    catch_signals,
    end_early,
    end_run,
    gradient_metrics,
    join_ranks,
    too_many_skipped,
)


@dataclass
class Args:
    model: str = "CompVis/stable-diffusion-v1-4"
    """Hub id or local folder in diffusers format (App. A)."""
    prompt: str = ""
    """A single prompt, in place of --prompts-file."""
    prompts_file: Path | None = Path("prompts/imagenet_animals.txt")
    """Text file, one prompt a line; every sample draws one of them at random. 398 animals (5.1)."""
    reward: str = "jpeg_compressibility"
    """Reward, as in docs/rewards.md: a name, name:WEIGHTS, or path/to/file.py:function."""
    num_iterations: int = 200
    """Rollouts; with 256 samples each this gives the 50 000 reward queries of Fig. 4."""
    samples_per_iteration: int = 256
    """m: samples of an iteration, all ranks together (A.1)."""
    micro_batch_size: int = 8
    """Samples or transitions in one forward pass of a rank. For memory and speed only: never changes the result."""
    num_inference_steps: int = 50
    """T: DDIM steps of a sample (A.6)."""
    guidance_scale: float = 5.0
    """w of classifier-free guidance, which is part of the policy (B.1); 1 or less switches it off."""
    eta: float = 1.0
    """Noise of the DDIM step: 1 is the DDPM (ancestral sampling, A.6); 0 would be deterministic, without log-prob."""
    cfg_training: bool = True
    """Train the guided prediction, which is the policy that sampled (B.1). Off: the conditional one alone."""
    estimator: Literal["is", "sf"] = "is"
    """"is": Eq. 4 with PPO's clipped surrogate, --gradient-steps updates. "sf": Eq. 3, one update on all samples."""
    clip_range: float = 1e-4
    """eps of the clipped surrogate (A.1)."""
    gradient_steps: int = 4
    """Updates of an iteration with "is", each on an equal share of its samples (A.1)."""
    rewarded_share: float = 1.0
    """Share of a sample's steps, the noisiest first, that learn from the reward; 1 is Eq. 3 and 4."""
    timestep_fraction: float = 1.0
    """Share of those steps that is learned from, drawn at random for each sample; 1 is Eq. 3 and 4."""
    normalise: Literal["per-prompt", "per-batch"] = "per-prompt"
    """Mean and standard deviation for the advantages: of the prompt's last rewards (A.3) or of the iteration's."""
    buffer_size: int = 32
    """Rewards of a prompt that are remembered (released code)."""
    min_count: int = 16
    """With fewer rewards of a prompt than this, mean and std of the iteration stand in (released code)."""
    advantage_clip: float = 10.0
    """Advantages are clipped to plus and minus this (released code)."""
    learning_rate: float | None = None
    """AdamW's learning rate; by default 1e-5 for all weights (A.6), 3e-4 for a LoRA (released PyTorch code)."""
    weight_decay: float = 1e-4
    """AdamW's weight decay (A.6)."""
    max_grad_norm: float = 1.0
    """Gradient norm above which an update is scaled down (A.6)."""
    lora_rank: int = 0
    """Rank of a LoRA on the attention layers (4 in the released PyTorch code); 0 trains all weights (A.6)."""
    monitor_kl: bool = True
    """Measure the KL to the pretrained model, which nothing here learns from; with --lora-rank 0 a frozen copy of the
    UNet is kept for it."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time, the same result."""
    seed: int = 0
    """Seed of everything."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """What the UNet's forward pass runs in; all else is float32."""
    compile: bool = False
    """torch.compile the UNet."""
    reward_timeout: float = 0.0
    """Seconds after which a call of the reward counts as hung, which stops the run; 0 waits for ever."""
    max_skipped_updates: int = 10
    """Updates in a row without a finite gradient, each of which is skipped, after which the run stops."""
    save_every: int = 50
    """Iterations between checkpoints, each with a grid of fixed prompts and seeds; there is always one at the end."""
    output_dir: Path | None = None
    """Where the run goes; by default runs/ddpo__TAG__SEED__TIME."""
    resume: Path | None = None
    """Folder of a run to continue; its arguments are the defaults then."""
    track: bool = False
    """Log to Weights & Biases as well (pip install wandb)."""


COMPRESSIBILITY = Args()
INCOMPRESSIBILITY = replace(Args(), reward="jpeg_incompressibility")
AESTHETIC = replace(
    Args(), reward="aesthetic", prompts_file=Path("prompts/animals.txt")
)  # 5.2, A.7
ALIGNMENT = replace(
    Args(), reward="llava_bertscore", prompts_file=Path("prompts/animals_activities.txt")
)  # 5.3
ZOO = replace(
    Args(),
    lora_rank=4,
    model="zoo/sd",
    reward="image_reward:zoo/image_reward",
    prompts_file=Path("prompts/zoo.txt"),
)
ZOO = replace(
    ZOO, num_inference_steps=12, guidance_scale=1.5, samples_per_iteration=32, micro_batch_size=64
)
ZOO = replace(
    ZOO, num_iterations=60, rewarded_share=0.5, min_count=8, gradient_steps=2, learning_rate=2e-3
)
# A latent of 1024 numbers instead of 16384: the mean over them leaves ratios about 16 times farther from 1.
ZOO = replace(ZOO, clip_range=1e-3)
PRESETS = {
    "compressibility": COMPRESSIBILITY,
    "incompressibility": INCOMPRESSIBILITY,
    "aesthetic": AESTHETIC,
}
PRESETS |= {"alignment": ALIGNMENT, "zoo": ZOO}


# --- same in every script: model
def seeded(*key: int) -> torch.Generator:
    """A CPU generator that is a function of `key` alone, so that nothing depends on the number of ranks."""
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    )


def guided_noise(args: Args, unet, latents, timesteps, text, no_text) -> torch.Tensor:
    """w eps(x_t, t, z) + (1 - w) eps(x_t, t), float32; both in one forward pass, as the policy is their combination.

    latents (B, C, H, W), timesteps (B,), text (B, L, D) and no_text (1, L, D), the embedding of the empty prompt.
    """
    w, dtype = args.guidance_scale, unet.conv_in.weight.dtype
    if w <= 1:
        return unet(latents.to(dtype), timesteps, text.to(dtype), return_dict=False)[0].float()
    text = torch.cat([no_text.expand_as(text), text]).to(dtype)
    noise = unet(
        torch.cat([latents, latents]).to(dtype), timesteps.repeat(2), text, return_dict=False
    )[0]
    noise_without_text, noise_with_text = noise.float().chunk(2)
    return noise_without_text + w * (noise_with_text - noise_without_text)


@torch.no_grad()
def sample(args: Args, unet, scheduler, text, no_text, noise):
    """Denoise: trajectories (B, T+1, C, H, W) from x_T to x_0, log-probs (B, T) and sigma_t (T,).

    noise (B, T+1, C, H, W), standard normal: x_T first, then that of every step.
    """
    trajectory, log_probs, stds = [noise[:, 0] * scheduler.init_noise_sigma], [], []
    for j, t in enumerate(scheduler.timesteps.to(noise.device)):
        x_t, timesteps = trajectory[-1], t.expand(len(noise))
        model_output = guided_noise(args, unet, x_t, timesteps, text, no_text)
        step = ddim_step_with_logprob(
            scheduler, model_output, timesteps, x_t, args.eta, noise=noise[:, j + 1]
        )
        trajectory.append(step.prev_sample)
        log_probs.append(step.log_prob)
        stds.append(step.std[0])
    return torch.stack(trajectory, dim=1), torch.stack(log_probs, dim=1), torch.stack(stds)


@torch.no_grad()
def decode(vae, latents: torch.Tensor) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [0, 1] of latents x_0."""
    return (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)


# ---


def per_prompt_advantages(
    history: torch.Tensor, prompts: torch.Tensor, rewards: torch.Tensor, min_count: int
):
    """(r - mean) / std over the last rewards of each prompt (A.3), float64 (m,); these rewards are among them.

    history (number of prompts, buffer size) float64, nan where there is no reward yet, is updated in place. prompts
    (m,) int64, rewards (m,). For a prompt with fewer than `min_count` rewards it is the mean and std of `rewards`.
    """
    rewards = rewards.double()
    for prompt, reward in zip(prompts, rewards):
        history[prompt] = torch.cat([history[prompt, 1:], reward[None]])
    past = history[prompts]
    mean, enough = past.nanmean(1), (~past.isnan()).sum(1) >= min_count
    std = ((past - mean[:, None]) ** 2).nanmean(1).sqrt()
    mean, std = (
        torch.where(enough, mean, rewards.mean()),
        torch.where(enough, std, rewards.std(correction=0)),
    )
    return (rewards - mean) / (std + 1e-6)


def main():
    # --- same in every script: setup
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args, signals = parse_args(PRESETS, __doc__), catch_signals()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # ---

    prompts = check_args(args, world_size)
    pipeline = load_pipeline(args.model)
    reward_function = load_reward_or_fail(args.reward, device, prompts, timeout=args.reward_timeout)

    # --- same in every script: networks
    if world_size > 1:
        join_ranks(device)
    unet, vae = (
        pipeline.unet,
        pipeline.vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False),
    )
    encode = PromptEncoder(pipeline, device)
    no_text, _ = encode([""])
    torch.manual_seed(args.seed)
    scaler, norms = (
        torch.amp.GradScaler(device.type, enabled=args.dtype == "fp16"),
        [],
    )  # gradient norms of all updates
    scaler.scale(
        torch.zeros(1, device=device)
    )  # its first call makes the scale: a rank may have nothing to scale
    # DDIMScheduler would clip latents to [-1, 1] where a model's configuration does not speak of it.
    config = pipeline.scheduler.config
    scheduler = DDIMScheduler.from_config(config, clip_sample=config.get("clip_sample", False))
    scheduler.set_timesteps(args.num_inference_steps)
    latent_shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    T = args.num_inference_steps

    def all_sum(values: torch.Tensor) -> torch.Tensor:
        if world_size > 1:
            dist.all_reduce(values)
        return values

    def step_optimizer(optimizer, max_grad_norm: float) -> float:
        """Sum the gradients of all ranks in one flat all-reduce, clip, update if the norm, returned, is finite."""
        parameters = optimizer.param_groups[0]["params"]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = all_sum(torch.cat([g.flatten() for g in gradients]))
        for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = g.view_as(p)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        if norm.isfinite():
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        norms.append(norm.item())
        return norms[-1]

    # ---

    warn_of_prompts(pipeline, prompts)
    options = {"compile": args.compile, "gradient_checkpointing": args.gradient_checkpointing}
    weights, pretrained_unet = make_trainable(
        unet, device, args.dtype, args.lora_rank, **options, keep_pretrained=args.monitor_kl
    )
    learning_rate = args.learning_rate
    if learning_rate is None:
        learning_rate = 3e-4 if args.lora_rank else 1e-5
    optimizer = torch.optim.AdamW(weights, learning_rate, weight_decay=args.weight_decay)
    m = args.samples_per_iteration
    # Sample i of an iteration belongs to one rank; shares may be uneven.
    start, stop = np.linspace(0, m, world_size + 1).astype(int)[rank : rank + 2]
    own = range(start, stop)
    # The policy as training evaluates it; without CFG training that is not the one that sampled (B.1, Fig. 8).
    train_args = args if args.cfg_training else replace(args, guidance_scale=1.0)
    # The last rewards of each prompt, the same on all ranks.
    history = torch.full((len(prompts), args.buffer_size), float("nan"), dtype=torch.float64)
    gradient_steps = args.gradient_steps if args.estimator == "is" else 1

    # --- same in every script: run folder
    run_dir = choose_run_dir(__file__, args)
    first_iteration = 0
    if args.resume:
        state = torch.load(
            run_dir / "checkpoint" / "state.pt", map_location=device, weights_only=True
        )
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        first_iteration = state["iteration"]
    run = RunFolder(run_dir, args, first_iteration)

    def save_sample_grid(iteration: int):
        """Eight pictures of fixed prompts and seeds, so that the grids of a run compare."""
        images = []
        for rows in torch.arange(8).split(args.micro_batch_size):
            generators = [seeded(args.seed, 3, i) for i in rows.tolist()]
            noise = torch.stack(
                [torch.randn(T + 1, *latent_shape, generator=g) for g in generators]
            )
            text, _ = encode([prompts[i % len(prompts)] for i in rows])
            x0 = sample(args, unet, scheduler, text, no_text, noise.to(device))[0][:, -1]
            images.append(decode(vae, x0))
        save_grid(torch.cat(images), run_dir / "samples" / f"{iteration:06d}.png")

    # ---

    if args.resume:
        load_weights(unet, run_dir / "checkpoint")
        history = state["history"].cpu()

    def save_checkpoint(iteration: int):
        """Rank 0 saves all there is; the old checkpoint stays until the new one is whole."""
        with new_checkpoint(run_dir) as folder:
            if rank == 0:
                save_weights(unet, run_dir)
                save_weights(unet, folder)
                state = {"iteration": iteration, "optimizer": optimizer.state_dict()}
                torch.save(
                    state | {"scaler": scaler.state_dict(), "history": history}, folder / "state.pt"
                )

    if not args.resume:
        if rank == 0:
            save_sample_grid(0)
        save_checkpoint(0)  # so that a run can go on from any moment
    progress = tqdm(
        range(first_iteration, args.num_iterations), disable=rank > 0, desc=Path(__file__).stem
    )
    for iteration in progress:
        # Rollout: m samples of the current policy. Sample i draws its prompt and its noise from its own seed.
        clock = time.perf_counter()
        generators = [seeded(args.seed, 0, iteration, i) for i in own]
        chosen = torch.cat([torch.randint(len(prompts), (1,), generator=g) for g in generators]).to(
            device
        )
        noise = torch.stack([torch.randn(T + 1, *latent_shape, generator=g) for g in generators])
        kl_steps = torch.cat([torch.randint(T, (1,), generator=g) for g in generators]).to(device)
        trajectory, log_prob, images, kl = [], [], [], []
        for rows in torch.arange(len(own)).split(args.micro_batch_size):
            c, _ = encode([prompts[i] for i in chosen[rows]])
            x, log_p, stds = sample(args, unet, scheduler, c, no_text, noise[rows].to(device))
            trajectory.append(x)
            log_prob.append(log_p)
            images.append(decode(vae, x[:, -1]))
            # KL to the pretrained model (DPOK Eq. 7), on one step of each sample.
            i, j = torch.arange(len(rows), device=device), kl_steps[rows]
            at = {
                "timestep": scheduler.timesteps.to(device)[j],
                "sample": x[i, j],
                "prev_sample": x[i, j + 1],
            }
            if not args.monitor_kl:
                continue
            with torch.no_grad():
                output = guided_noise(args, unet, at["sample"], at["timestep"], c, no_text)
                with pretrained(pretrained_unet):
                    pre_output = guided_noise(
                        args, pretrained_unet, at["sample"], at["timestep"], c, no_text
                    )
            step, pre = (
                ddim_step_with_logprob(scheduler, o, eta=args.eta, **at)
                for o in (output, pre_output)
            )
            kl.append(ddim_step_kl(step.mean, pre.mean, step.std))
        trajectory, log_prob, images = (
            torch.cat(parts) for parts in (trajectory, log_prob, images)
        )
        kl = torch.cat(kl) if kl else torch.zeros(0, device=device)
        time_sample, clock = time.perf_counter() - clock, time.perf_counter()
        try:
            rewards = reward_function(images, [prompts[i] for i in chosen])
        except RewardError as error:
            save_checkpoint(iteration)
            end_run(f"iteration {iteration}: {error}; the run so far is in {run_dir}")
        all_rewards = all_sum(F.pad(rewards, (start, m - stop))).cpu()
        all_prompts = all_sum(F.pad(chosen, (start, m - stop))).cpu()
        kl = all_sum(kl.double().sum()).item() / m
        time_reward, clock = time.perf_counter() - clock, time.perf_counter()

        # Advantages, of all samples on all ranks (A.3).
        if args.normalise == "per-prompt":
            advantages = per_prompt_advantages(history, all_prompts, all_rewards, args.min_count)
        else:
            advantages = all_rewards.double() - all_rewards.double().mean()
            advantages = advantages / (advantages.std(correction=0) + 1e-6)
        advantages = advantages.clamp(-args.advantage_clip, args.advantage_clip)
        A = advantages.float().to(device)

        # A step with sigma_t = 0 has no log-probability and takes no part. Each sample learns from a random subset.
        learned = torch.nonzero((stds.cpu() > 0) & (torch.arange(T) < args.rewarded_share * T))[
            :, 0
        ]
        K = max(1, round(args.timestep_fraction * len(learned)))
        generator = seeded(args.seed, 1, iteration)
        steps = learned[torch.rand(m, len(learned), generator=generator).argsort(1)[:, :K]]
        sums, first_deviation = torch.zeros(3, dtype=torch.float64, device=device).split([2, 1])
        grad_norms = []
        for update, samples in enumerate(
            torch.randperm(m, generator=generator).tensor_split(gradient_steps)
        ):
            count = len(samples) * K
            samples = samples[(samples >= start) & (samples < stop)]
            transitions = torch.stack([samples.repeat_interleave(K), steps[samples].flatten()]).to(
                device
            )
            for i, j in (
                transitions.split(args.micro_batch_size, dim=1) if transitions.numel() else ()
            ):
                timesteps = scheduler.timesteps.to(device)[j]
                x_t, x_prev = trajectory[i - start, j], trajectory[i - start, j + 1]
                c, _ = encode([prompts[k] for k in chosen[i - start]])
                noise = guided_noise(train_args, unet, x_t, timesteps, c, no_text)
                step = ddim_step_with_logprob(
                    scheduler, noise, timesteps, x_t, args.eta, prev_sample=x_prev
                )
                ratio = torch.exp(step.log_prob - log_prob[i - start, j])  # Eq. 4
                clipped = ratio.clamp(1 - args.clip_range, 1 + args.clip_range)
                if args.estimator == "sf":
                    objective = A[i] * step.log_prob  # Eq. 3
                else:
                    objective = torch.minimum(
                        A[i] * ratio, A[i] * clipped
                    )  # Eq. 4 with PPO's clipping (A.1)
                loss = -objective.sum() / count
                scaler.scale(loss).backward()

                with torch.no_grad():
                    if update == 0:
                        first_deviation = torch.maximum(first_deviation, (ratio - 1).abs().max())
                    sums[0] += (ratio != clipped).double().sum() / count / gradient_steps
                    sums[1] += loss.double() / gradient_steps
            grad_norms.append(step_optimizer(optimizer, args.max_grad_norm))

        sums = all_sum(sums).tolist()
        if world_size > 1:
            dist.all_reduce(first_deviation, op=dist.ReduceOp.MAX)
        metrics = {
            "iteration": iteration,
            "samples": (iteration + 1) * m,
            "reward/mean": all_rewards.mean().item(),
            "reward/std": all_rewards.std(correction=0).item(),
            **({"kl/pretrained": kl * int(np.prod(latent_shape)) * T} if args.monitor_kl else {}),
            "ratio/first_max_deviation": first_deviation.item(),
            "ratio/clip_fraction": sums[0],
            "loss/policy": sums[1],
            "advantages/mean": advantages.mean().item(),
            "advantages/std": advantages.std(correction=0).item(),
            **gradient_metrics(grad_norms),
            "time/sample_s": time_sample,
            "time/reward_s": time_reward,
            "time/train_s": time.perf_counter() - clock,
        }

        # --- same in every script: log
        run.log(metrics, progress)
        asked_to_stop = all_sum(torch.tensor(float(len(signals)), device=device)).item() > 0
        stopping = asked_to_stop or too_many_skipped(norms, args.max_skipped_updates)
        if (
            (iteration + 1) % args.save_every == 0
            or iteration + 1 == args.num_iterations
            or stopping
        ):
            if rank == 0:
                save_sample_grid(iteration + 1)
                run.save_learning_curve()
            save_checkpoint(iteration + 1)
        if stopping:
            end_early(run_dir, signals if asked_to_stop else None)
        # ---

    if rank == 0:
        print(
            f"the {'LoRA' if args.lora_rank else 'UNet'}, its metrics and pictures are in {run_dir}"
        )
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
