"""RWR: reward-weighted regression (Black et al. 2023, arXiv:2305.13301, 4.2, A.2), and its sparse variant.

Denoising is taken as one step: the action is x_0, and the model is trained as diffusion models are, on its own samples,
weighted by their reward. Each round:

    sample c ~ p(c) and x_0 ~ p_theta(x_0 | c), 10 240 times, and keep them                                 (A.6)
    w_RWR = exp(beta r) / Z, the softmax over the samples of each prompt                                    (4.2, A.3)
    w_sparse = 1 where r >= C, a percentile of the rewards of each prompt, else 0                           (4.2, A.2)
    theta <- theta - lr grad E w |eps - eps_theta(x_t, t, c)|^2, 400 times, eps_theta with guidance         (Eq. 1, 5)
    x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) eps, t uniform over all of the training's steps

A laptop, minutes:        python rwr.py zoo
One GPU, SD v1.4:         python rwr.py
Eight GPUs, sparse:       torchrun --nproc_per_node=8 rwr.py sparse

docs/rwr.md says what the paper does, what the released code does, what this file does, and explains every metric.
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
from safetensors.torch import load_file
from tqdm import tqdm

from common.cli import check_args, load_pipeline, load_reward_or_fail, parse_args, warn_of_prompts
from common.lora import load_weights, pretrained, save_weights
from common.rewards import RewardError
from common.run_folder import (
    RunFolder,
    choose_run_dir,
    new_checkpoint,
    save_grid,
    save_shard,
    saving,
)
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
    num_iterations: int = 10
    """Rounds of sampling and training (released code)."""
    samples_per_iteration: int = 10_240
    """m: samples of a round, all ranks together (A.6; released code)."""
    shard_size: int = 256
    """Samples, all ranks together, that are drawn, scored and written to disk at a time; a round goes on from there."""
    micro_batch_size: int = 8
    """Samples in one forward pass of a rank. For memory and speed only: never changes the result."""
    num_inference_steps: int = 50
    """T: DDIM steps of a sample (A.6)."""
    guidance_scale: float = 5.0
    """w of classifier-free guidance (A.6); 1 or less switches it off."""
    eta: float = 1.0
    """Noise of the DDIM step: 1 is the DDPM (ancestral sampling, A.6)."""
    cfg_training: bool = True
    """Train the guided prediction, which is what samples are drawn with (B.1). Off: the conditional one alone."""
    weights: Literal["softmax", "sparse"] = "softmax"
    """w_RWR or w_sparse (4.2)."""
    inverse_temperature: float = 0.2
    """beta of w_RWR (A.6)."""
    percentile: float = 0.9
    """Share of the samples that w_sparse leaves out (A.6)."""
    normalise: Literal["per-prompt", "pool"] = "per-prompt"
    """Softmax and percentile over the samples of each prompt (A.3), or over all of the round's (A.2)."""
    gradient_steps: int = 400
    """Updates of a round (A.6)."""
    batch_size: int = 128
    """n: samples of an update, all ranks together (A.6)."""
    fresh_optimizer: bool = True
    """Forget AdamW's moments at the start of a round's training (released code)."""
    learning_rate: float | None = None
    """AdamW's learning rate; by default 1e-5 for all weights (A.6), 3e-4 for a LoRA (as in ddpo.py)."""
    weight_decay: float = 1e-4
    """AdamW's weight decay (A.6)."""
    max_grad_norm: float = 1.0
    """Gradient norm above which an update is scaled down (A.6)."""
    lora_rank: int = 0
    """Rank of a LoRA on the attention layers; 0 trains all weights (A.6)."""
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
    save_every: int = 1
    """Rounds between checkpoints, each with a grid of fixed prompts and seeds; there is always one at the end."""
    output_dir: Path | None = None
    """Where the run goes; by default runs/rwr__TAG__SEED__TIME."""
    resume: Path | None = None
    """Folder of a run to continue; its arguments are the defaults then."""
    track: bool = False
    """Log to Weights & Biases as well (pip install wandb)."""


RWR = Args()
SPARSE = replace(Args(), weights="sparse")
ZOO = replace(
    Args(),
    lora_rank=4,
    model="zoo/sd",
    reward="image_reward:zoo/image_reward",
    prompts_file=Path("prompts/zoo.txt"),
)
ZOO = replace(
    ZOO, num_inference_steps=12, guidance_scale=1.5, samples_per_iteration=192, shard_size=64
)
ZOO = replace(
    ZOO, micro_batch_size=64, num_iterations=5, gradient_steps=40, batch_size=32, learning_rate=2e-3
)
ZOO = replace(
    ZOO, inverse_temperature=2.0
)  # rewards of unit variance, where JPEGs of 512 px vary by tens of kB
PRESETS = {"rwr": RWR, "sparse": SPARSE, "zoo": ZOO}


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


def rwr_weights(rewards: torch.Tensor, prompts: torch.Tensor, args: Args) -> torch.Tensor:
    """w_RWR or w_sparse (4.2) of the samples of a round, float64 (m,), over the groups that args.normalise says.

    rewards (m,), prompts (m,) int64. Z makes the mean weight of a group 1, so that the size of the loss depends neither
    on the number of samples nor on that of prompts. A reward equal to the percentile is kept.
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


def noised(
    scheduler, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """x_t of the forward process, and what the model is to predict from it: eps, or v, or x_0 (B, C, H, W)."""
    x_t = scheduler.add_noise(x0, noise, t)
    if scheduler.config.prediction_type == "v_prediction":
        return x_t, scheduler.get_velocity(x0, noise, t)
    return x_t, x0 if scheduler.config.prediction_type == "sample" else noise


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
    # The model as training evaluates it; without CFG training that is not the one that samples (B.1, Fig. 8).
    train_args = args if args.cfg_training else replace(args, guidance_scale=1.0)
    # A shard's samples are shared out among the ranks.
    start, stop = np.linspace(0, args.shard_size, world_size + 1).astype(int)[rank : rank + 2]

    def gathered(values: torch.Tensor) -> torch.Tensor:
        """A shard's values (n, ...) of all ranks, from those of this rank's samples."""
        padding = [0, 0] * (values.dim() - 1) + [start, args.shard_size - stop]
        return all_sum(F.pad(values, padding)).cpu()

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

    def save_checkpoint(iteration: int):
        """Rank 0 saves all there is; the old checkpoint stays until the new one is whole."""
        with new_checkpoint(run_dir) as folder:
            if rank == 0:
                save_weights(unet, run_dir)
                save_weights(unet, folder)
                state = {
                    "iteration": iteration,
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                }
                torch.save(state, folder / "state.pt")

    if not args.resume:
        if rank == 0:
            save_sample_grid(0)
        save_checkpoint(0)  # so that a run can go on from any moment
    progress = tqdm(
        range(first_iteration, args.num_iterations), disable=rank > 0, desc=Path(__file__).stem
    )
    for iteration in progress:
        # Samples of the round, shard by shard. Sample i draws its prompt and its noise from its own seed.
        shards, time_sample, time_reward = [], 0.0, 0.0
        for first in tqdm(
            range(0, m, args.shard_size), disable=rank > 0, desc="samples", leave=False
        ):
            path = run_dir / "pool" / f"{iteration:03d}" / f"{first:06d}.safetensors"
            if all_sum(torch.tensor(float(rank == 0 and path.exists()), device=device)) > 0:
                shards.append(load_file(path))
                continue
            if (
                all_sum(torch.tensor(float(len(signals)), device=device)) > 0
            ):  # the shards so far are on disk
                save_checkpoint(iteration)
                end_early(run_dir, signals)
            clock = time.perf_counter()
            generators = [seeded(args.seed, 0, iteration, first + i) for i in range(start, stop)]
            chosen = torch.cat(
                [torch.randint(len(prompts), (1,), generator=g) for g in generators]
            ).to(device)
            noise = torch.stack(
                [torch.randn(T + 1, *latent_shape, generator=g) for g in generators]
            )
            steps = torch.cat([torch.randint(T, (1,), generator=g) for g in generators]).to(device)
            x0, images, kl = [], [], []
            for rows in torch.arange(stop - start).split(args.micro_batch_size):
                c, _ = encode([prompts[i] for i in chosen[rows]])
                trajectory, _, _ = sample(args, unet, scheduler, c, no_text, noise[rows].to(device))
                x0.append(trajectory[:, -1])
                images.append(decode(vae, x0[-1]))
                # KL to the pretrained model (DPOK Eq. 7), on one step of each sample.
                i, j = torch.arange(len(rows), device=device), steps[rows]
                t = scheduler.timesteps.to(device)[j]
                x = {
                    "timestep": t,
                    "sample": trajectory[i, j],
                    "eta": args.eta,
                    "prev_sample": trajectory[i, j + 1],
                }
                if not args.monitor_kl:
                    kl.append(torch.zeros(len(rows), device=device))
                    continue
                with torch.no_grad():
                    output = guided_noise(args, unet, x["sample"], t, c, no_text)
                    with pretrained(pretrained_unet):
                        pre_output = guided_noise(args, pretrained_unet, x["sample"], t, c, no_text)
                step, pre = (
                    ddim_step_with_logprob(scheduler, o, **x) for o in (output, pre_output)
                )
                kl.append(ddim_step_kl(step.mean, pre.mean, step.std))
            x0, images, kl = torch.cat(x0), torch.cat(images), torch.cat(kl)
            time_sample, clock = time_sample + time.perf_counter() - clock, time.perf_counter()
            try:
                rewards = reward_function(images, [prompts[i] for i in chosen])
            except RewardError as error:
                save_checkpoint(iteration)
                end_run(f"iteration {iteration}: {error}; the run so far is in {run_dir}")
            shard = {"x0": x0, "prompt": chosen, "reward": rewards, "kl": kl}
            shards.append({key: gathered(value) for key, value in shard.items()})
            time_reward += time.perf_counter() - clock
            with saving(run_dir):
                if rank == 0:
                    save_shard(path, shards[-1])
        pool = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}
        x0, chosen, rewards = pool["x0"], pool["prompt"], pool["reward"]
        clock = time.perf_counter()

        # Training on them, weighted (4.2): permutations of the samples that have a weight, cut into batches.
        w = rwr_weights(rewards, chosen, args)
        kept = torch.nonzero(w > 0)[:, 0]
        if args.fresh_optimizer:
            optimizer.state.clear()
        generator, order = seeded(args.seed, 1, iteration), torch.zeros(0, dtype=torch.long)
        loss_sum, grad_norms = torch.zeros((), dtype=torch.float64, device=device), []
        for _ in tqdm(range(args.gradient_steps), disable=rank > 0, desc="updates", leave=False):
            while len(order) < args.batch_size:
                order = torch.cat([order, kept[torch.randperm(len(kept), generator=generator)]])
            batch, order = order[: args.batch_size], order[args.batch_size :]
            t = torch.randint(
                scheduler.config.num_train_timesteps, (args.batch_size,), generator=generator
            )
            noise = torch.randn(args.batch_size, *latent_shape, generator=generator)
            x_t, target = noised(scheduler, x0[batch], noise, t)
            first, last = np.linspace(0, args.batch_size, world_size + 1).astype(int)[
                rank : rank + 2
            ]
            for rows in torch.arange(first, last).split(args.micro_batch_size):
                c, _ = encode([prompts[i] for i in chosen[batch[rows]]])
                output = guided_noise(
                    train_args, unet, x_t[rows].to(device), t[rows].to(device), c, no_text
                )
                error = ((output - target[rows].to(device)) ** 2).flatten(1).mean(1)  # Eq. 1, 5
                loss = (w[batch[rows]].to(device, torch.float32) * error).sum() / args.batch_size
                scaler.scale(loss).backward()
                loss_sum += loss.detach().double() / args.gradient_steps
            grad_norms.append(step_optimizer(optimizer, args.max_grad_norm))

        metrics = {
            "iteration": iteration,
            "samples": (iteration + 1) * m,
            "reward/mean": rewards.mean().item(),
            "reward/std": rewards.std(correction=0).item(),
            **(
                {"kl/pretrained": pool["kl"].mean().item() * int(np.prod(latent_shape)) * T}
                if args.monitor_kl
                else {}
            ),
            "weights/kept": len(kept) / m,
            "weights/effective": (w.sum() ** 2 / (w**2).sum() / m).item(),
            "loss/rwr": all_sum(loss_sum).item(),
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
