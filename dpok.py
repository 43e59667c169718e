"""DPOK: policy gradient with a KL penalty for text-to-image diffusion (Fan et al. 2023, arXiv:2305.16381).

Denoising is a Markov decision process (Eq. 4): the state is (z, x_t), the action x_{t-1}, the policy one DDIM step
p_theta(x_{t-1} | x_t, z), the reward r(x_0, z) comes at the end. Algorithm 1, each iteration:

    sample z ~ p(z) and x_{0:T} ~ p_theta(x_{0:T} | z), m times                                       (Alg. 1)
    V(x_t, z) <- argmin E (r(x_0, z) - V(x_t, z))^2                                                   (Eq. 24)
    theta <- theta - lr grad E sum_t [ -alpha (r - V) clip(ratio_t, 1 - eps, 1 + eps)                 (Eq. 26)
                                      + beta KL(p_theta(x_{t-1}|x_t,z) || p_pre(x_{t-1}|x_t,z)) ]     (Eq. 7, 8, 9)
    ratio_t = p_theta(x_{t-1} | x_t, z) / p_old(x_{t-1} | x_t, z)                                     (Eq. 25)

A laptop, five minutes:   python dpok.py zoo --prompt "A green colored rabbit"
One GPU, SD v1.5:         python dpok.py --prompt "A green colored rabbit"
Eight GPUs:               torchrun --nproc_per_node=8 dpok.py --prompt "A green colored rabbit"
Many prompts:             torchrun --nproc_per_node=8 dpok.py multi-prompt --prompts-file prompts/dpok.txt

docs/dpok.md says what the paper does, what the released code does, what this file does, and explains every metric.
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
    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Hub id or local folder in diffusers format."""
    prompt: str = "A green colored rabbit"
    """The prompt, unless --prompts-file is given (5.1)."""
    prompts_file: Path | None = None
    """Text file, one prompt a line; every sample draws one of them at random (5.5)."""
    reward: str = "image_reward"
    """Reward, as in docs/rewards.md: a name, name:WEIGHTS, or path/to/file.py:function."""
    num_iterations: int = 2000
    """Rollouts; with 10 samples each this gives the 20 000 online samples of App. B."""
    samples_per_iteration: int = 10
    """m: samples of an iteration, all ranks together (App. B)."""
    micro_batch_size: int = 8
    """Samples or transitions in one forward pass of a rank. For memory and speed only: never changes the result."""
    num_inference_steps: int = 50
    """T: DDIM steps of a sample."""
    guidance_scale: float = 7.5
    """w of classifier-free guidance, which is part of the policy (section 3); 1 or less switches it off."""
    eta: float = 1.0
    """Noise of the DDIM step: 1 is the DDPM; 0 would be deterministic and have no log-probability."""
    alpha: float = 10.0
    """Weight of the reward (Eq. 8; App. B)."""
    beta: float = 0.01
    """Weight of the KL to the pretrained model (Eq. 8; App. B)."""
    kl: Literal["exact", "released"] = "released"
    """"exact": Eq. 7, |mu - mu_pre|^2 / (2 sigma_t^2). "released": |eps - eps_pre|^2, as in the authors' code."""
    clip_range: float = 1e-4
    """eps of Eq. 26 (App. B)."""
    gradient_steps: int = 5
    """Policy updates an iteration (App. B)."""
    batch_size: int = 32
    """n: transitions of a policy update, all ranks together (App. B)."""
    replay_rollouts: int = 2
    """Transitions are drawn from that many last rollouts; 1 is on-policy (the released buffer holds two)."""
    rewarded_share: float = 1.0
    """Share of a sample's steps, the noisiest first, that learn from the reward; 1 is Eq. 9. The KL is of all steps."""
    value_function: bool = False
    """Subtract a learned V(x_t, z) from the reward (A.5)."""
    value_learning_rate: float = 1e-4
    """AdamW's learning rate for the value function (E.3)."""
    value_batch_size: int = 256
    """Transitions of each of the 5 backward passes of a value update, all ranks together (E.3; released code)."""
    reward_filter: bool = False
    """Set negative rewards to 0 before they are learned from (an option of the released code)."""
    learning_rate: float = 1e-5
    """AdamW's learning rate (App. B)."""
    cooldown_share: float = 0.0
    """Share of the run, its end, over which the learning rate falls to 0 in a straight line."""
    weight_decay: float = 0.0
    """AdamW's weight decay (released code)."""
    max_grad_norm: float = 0.1
    """Gradient norm above which a policy update is scaled down (App. B)."""
    lora_rank: int = 4
    """Rank of the LoRA on the attention layers (released code); 0 trains all weights of the UNet."""
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
    """Where the run goes; by default runs/dpok__TAG__SEED__TIME."""
    resume: Path | None = None
    """Folder of a run to continue; its arguments are the defaults then."""
    track: bool = False
    """Log to Weights & Biases as well (pip install wandb)."""


MULTI_PROMPT = replace(
    Args(), samples_per_iteration=45, num_iterations=1112, beta=0.001, value_function=True
)  # E.3
ZOO = replace(
    Args(),
    model="zoo/sd",
    reward="image_reward:zoo/image_reward",
    num_inference_steps=12,
    gradient_steps=2,
)
ZOO = replace(
    ZOO, guidance_scale=1.5, num_iterations=80, samples_per_iteration=24, micro_batch_size=48
)
ZOO = replace(
    ZOO,
    kl="exact",
    beta=0.1,
    rewarded_share=0.5,
    replay_rollouts=1,
    batch_size=96,
    value_function=True,
)
# A latent of 1024 numbers instead of 16384: the mean over them leaves ratios about 16 times farther from 1.
ZOO = replace(
    ZOO, clip_range=1e-3, learning_rate=2e-3, cooldown_share=0.4, value_learning_rate=1e-3
)
PRESETS = {"single-prompt": Args(), "multi-prompt": MULTI_PROMPT, "zoo": ZOO}


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


class ValueFunction(torch.nn.Module):
    """V(x_t, z) (A.5): three layers of 256, each scaled by a learned embedding of the step, as in the released code.

    forward(latents (B, C, H, W), steps (B,) with 0 the noisiest, pooled (B, D)) gives (B,).
    """

    def __init__(self, in_features: int, num_steps: int, width: int = 256):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(n, width) for n in (in_features, width, width)
        )
        self.scales = torch.nn.ModuleList(torch.nn.Embedding(num_steps, width) for _ in self.layers)
        for scale in self.scales:
            torch.nn.init.uniform_(scale.weight)
        self.out = torch.nn.Linear(width, 1)

    def forward(
        self, latents: torch.Tensor, steps: torch.Tensor, pooled: torch.Tensor
    ) -> torch.Tensor:
        x = torch.cat([latents.flatten(1), pooled], dim=1)
        for layer, scale in zip(self.layers, self.scales):
            x = F.relu(scale(steps) * layer(x))
        return self.out(x)[:, 0]


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
    weights, pretrained_unet = make_trainable(unet, device, args.dtype, args.lora_rank, **options)
    optimizer = torch.optim.AdamW(weights, args.learning_rate, weight_decay=args.weight_decay)
    m = args.samples_per_iteration
    _, pooled_empty = encode([""])
    # Sample i of an iteration belongs to one rank; shares may be uneven.
    start, stop = np.linspace(0, m, world_size + 1).astype(int)[rank : rank + 2]
    own = range(start, stop)
    value_function = ValueFunction(int(np.prod(latent_shape)) + pooled_empty.shape[1], T).to(device)
    value_optimizer = torch.optim.AdamW(value_function.parameters(), lr=args.value_learning_rate)
    # The last rollouts of this rank's samples: slot, sample, step. pre_noise is computed when it is first needed.
    slots = (args.replay_rollouts, len(own))
    replay = {
        "trajectory": torch.zeros(*slots, T + 1, *latent_shape),
        "log_prob": torch.zeros(*slots, T),
        "reward": torch.zeros(*slots),
        "prompt": torch.zeros(*slots, dtype=torch.long),
        "pre_noise": torch.zeros(*slots, T, *latent_shape),
        "has_pre_noise": torch.zeros(*slots, T, dtype=torch.bool),
    }
    replay = {key: value.to(device) for key, value in replay.items()}

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
        value_function.load_state_dict(state["value_function"])
        value_optimizer.load_state_dict(state["value_optimizer"])
        shares = sorted((run_dir / "checkpoint").glob("replay-*.pt"))
        shares = [torch.load(share, map_location=device, weights_only=True) for share in shares]
        replay = {
            key: torch.cat([share[key] for share in shares], dim=1)[:, start:stop].clone()
            for key in replay
        }

    def save_checkpoint(iteration: int):
        """Each rank its share of the replay, rank 0 the rest; the old checkpoint stays until the new one is whole."""
        with new_checkpoint(run_dir) as folder:
            torch.save(replay, folder / f"replay-{rank:05d}.pt")
            if rank == 0:
                save_weights(unet, run_dir)
                save_weights(unet, folder)
                state = {"iteration": iteration, "optimizer": optimizer.state_dict()}
                state |= {
                    "scaler": scaler.state_dict(),
                    "value_function": value_function.state_dict(),
                }
                torch.save(
                    state | {"value_optimizer": value_optimizer.state_dict()}, folder / "state.pt"
                )

    if not args.resume:
        if rank == 0:
            save_sample_grid(0)
        save_checkpoint(0)  # so that a run can go on from any moment
    progress = tqdm(
        range(first_iteration, args.num_iterations), disable=rank > 0, desc=Path(__file__).stem
    )
    for iteration in progress:
        # Rollout: m samples of the current policy (Alg. 1). Sample i draws its prompt and its noise from its own seed.
        clock = time.perf_counter()
        slot = iteration % args.replay_rollouts
        generators = [seeded(args.seed, 0, iteration, i) for i in own]
        chosen = torch.cat([torch.randint(len(prompts), (1,), generator=g) for g in generators]).to(
            device
        )
        noise = torch.stack(
            [torch.randn(T + 1, *latent_shape, generator=g) for g in generators]
        ).to(device)
        for rows in torch.arange(len(own)).split(args.micro_batch_size):
            text, _ = encode([prompts[i] for i in chosen[rows]])
            trajectory, log_prob, stds = sample(args, unet, scheduler, text, no_text, noise[rows])
            replay["trajectory"][slot, rows], replay["log_prob"][slot, rows] = trajectory, log_prob
        replay["prompt"][slot], replay["has_pre_noise"][slot] = chosen, False
        images = torch.cat(
            [
                decode(vae, x0)
                for x0 in replay["trajectory"][slot, :, -1].split(args.micro_batch_size)
            ]
        )
        time_sample, clock = time.perf_counter() - clock, time.perf_counter()
        try:
            rewards = reward_function(images, [prompts[i] for i in chosen])
        except RewardError as error:
            save_checkpoint(iteration)
            end_run(f"iteration {iteration}: {error}; the run so far is in {run_dir}")
        replay["reward"][slot] = rewards.clamp(min=0) if args.reward_filter else rewards
        all_rewards = all_sum(F.pad(rewards, (start, m - stop)))
        if (
            iteration == 0
        ):  # a baseline from the first update on, when the value function has learned nothing yet
            torch.nn.init.constant_(
                value_function.out.bias, all_sum(replay["reward"][slot].double().sum()).item() / m
            )
        time_reward, clock = time.perf_counter() - clock, time.perf_counter()

        # A step with sigma_t = 0 has no log-probability and is never drawn.
        steps_with_noise = torch.nonzero(stds > 0)[:, 0].cpu()
        num_slots, grad_norms = min(iteration + 1, args.replay_rollouts), []

        def draw_transitions(count: int, *key: int):
            """`count` transitions of the whole replay, the same on all ranks: slot, sample and step of this rank's."""
            shape = (num_slots, m, len(steps_with_noise))
            drawn = torch.randperm(int(np.prod(shape)), generator=seeded(args.seed, *key))[:count]
            slots, samples, steps = torch.unravel_index(drawn, shape)
            mine = (samples >= start) & (samples < stop)
            return len(drawn), torch.stack([slots, samples - start, steps_with_noise[steps]])[
                :, mine
            ].to(device)

        # Value function: one update on 5 x value_batch_size transitions (Eq. 24).
        sums, first_deviation = torch.zeros(8, dtype=torch.float64, device=device).split([7, 1])
        if args.value_function:
            for batch in range(5):
                count, (s, i, j) = draw_transitions(args.value_batch_size, 2, iteration, batch)
                if s.numel() == 0:  # all are other ranks'
                    continue
                _, pooled = encode([prompts[k] for k in replay["prompt"][s, i]])
                value = value_function(replay["trajectory"][s, i, j], j, pooled)
                loss = ((replay["reward"][s, i] - value) ** 2).sum() / count / 5  # Eq. 24
                scaler.scale(loss).backward()
                sums[6] += loss.detach()
            step_optimizer(value_optimizer, float("inf"))

        # Policy: gradient_steps updates on batch_size transitions each (Eq. 9, 26).
        left = 1 - iteration / args.num_iterations
        optimizer.param_groups[0]["lr"] = args.learning_rate * min(
            1.0, left / max(args.cooldown_share, 1e-9)
        )
        for update in range(args.gradient_steps):
            count, transitions = draw_transitions(args.batch_size, 1, iteration, update)
            for s, i, j in (
                transitions.split(args.micro_batch_size, dim=1) if transitions.numel() else ()
            ):
                timesteps = scheduler.timesteps.to(device)[j]
                x_t, x_prev = replay["trajectory"][s, i, j], replay["trajectory"][s, i, j + 1]
                z, pooled = encode([prompts[k] for k in replay["prompt"][s, i]])
                new = ~replay["has_pre_noise"][s, i, j]
                if new.any():
                    with torch.no_grad(), pretrained(pretrained_unet):
                        pre_noise = guided_noise(
                            args, pretrained_unet, x_t[new], timesteps[new], z[new], no_text
                        )
                    replay["pre_noise"][s[new], i[new], j[new]] = pre_noise
                    replay["has_pre_noise"][s[new], i[new], j[new]] = True
                pre_noise = replay["pre_noise"][s, i, j]
                noise = guided_noise(args, unet, x_t, timesteps, z, no_text)
                step = ddim_step_with_logprob(
                    scheduler, noise, timesteps, x_t, args.eta, prev_sample=x_prev
                )
                pre = ddim_step_with_logprob(
                    scheduler, pre_noise, timesteps, x_t, args.eta, prev_sample=x_prev
                )

                advantages = replay["reward"][s, i]
                if args.value_function:
                    advantages = advantages - value_function(x_t, j, pooled).detach()  # Eq. 22
                ratio = torch.exp(step.log_prob - replay["log_prob"][s, i, j])  # Eq. 25
                clipped = ratio.clamp(1 - args.clip_range, 1 + args.clip_range)
                policy_loss = (
                    -args.alpha * advantages * clipped * (j < args.rewarded_share * T)
                )  # Eq. 26
                kl = ddim_step_kl(step.mean, pre.mean, step.std)  # Eq. 7
                penalty = (
                    kl if args.kl == "exact" else ((noise - pre_noise) ** 2).flatten(1).mean(1)
                )
                loss = (policy_loss + args.beta * penalty).sum() / count  # Eq. 9
                scaler.scale(loss).backward()

                with torch.no_grad():
                    if update == 0 and (s == slot).any():
                        first_deviation = torch.maximum(
                            first_deviation, (ratio - 1).abs()[s == slot].max()
                        )
                    terms = [
                        policy_loss,
                        penalty,
                        kl,
                        (ratio != clipped).float(),
                        advantages,
                        advantages.double() ** 2,
                    ]
                    sums[:6] += (
                        torch.stack([term.double().sum() for term in terms])
                        / count
                        / args.gradient_steps
                    )
            grad_norms.append(step_optimizer(optimizer, args.max_grad_norm))

        sums = all_sum(sums).tolist()
        if world_size > 1:
            dist.all_reduce(first_deviation, op=dist.ReduceOp.MAX)
        metrics = {
            "iteration": iteration,
            "samples": (iteration + 1) * m,
            "reward/mean": all_rewards.mean().item(),
            "reward/std": all_rewards.std(correction=0).item(),
            "kl/pretrained": sums[2] * int(np.prod(latent_shape)) * len(steps_with_noise),
            "ratio/first_max_deviation": first_deviation.item(),
            "ratio/clip_fraction": sums[3],
            "loss/policy": sums[0],
            "loss/kl": args.beta * sums[1],
            "loss/value": sums[6],
            "advantages/mean": sums[4],
            "advantages/std": max(sums[5] - sums[4] ** 2, 0.0) ** 0.5,
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
