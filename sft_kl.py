"""SFT with KL regularisation (Fan et al. 2023, arXiv:2305.16381, 4.2): KL-D, KL-O, or none.

The model learns from M samples that the pretrained one has drawn once, weighted by their reward (Algorithm 2):

    D = {x_0 ~ p_pre(x_0 | z), z ~ p(z)}, M samples, without those of r + gamma <= 0                    (Lemma 4.3, B)
    KL-D: theta <- theta - lr grad E (r + gamma) |x_0 - f_theta(x_t, t, z)|^2 / (2 sigma_t^2)           (Eq. 11, 13)
    KL-O: theta <- theta - lr grad E (r |x_0 - f_theta|^2 + gamma |f_pre - f_theta|^2) / (2 sigma_t^2)  (Eq. 12)
    x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) eps, t uniform over the training's steps but the first

f predicts x_0. An iteration is --gradient-steps updates and then a few samples of the model, to see the reward.

A laptop, minutes:        python sft_kl.py zoo --prompt "A green colored rabbit"
One GPU, SD v1.5:         python sft_kl.py --prompt "A green colored rabbit"
Eight GPUs, KL-D:         torchrun --nproc_per_node=8 sft_kl.py kl-d --prompt "A green colored rabbit"

docs/sft_kl.md says what the paper does, what this file does and why, and explains every metric.
"""

import json
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

from common.cli import (
    check_args,
    dataset_description,
    load_pipeline,
    load_reward_or_fail,
    parse_args,
    warn_of_prompts,
)
from common.lora import load_weights, pretrained, save_weights
from common.rewards import RewardError
from common.run_folder import (
    RunFolder,
    choose_run_dir,
    new_checkpoint,
    save_grid,
    save_shard,
    saving,
    write_text,
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
    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Hub id or local folder in diffusers format."""
    prompt: str = "A green colored rabbit"
    """The prompt, unless --prompts-file is given (5.1)."""
    prompts_file: Path | None = None
    """Text file, one prompt a line; every sample draws one of them at random."""
    reward: str = "image_reward"
    """Reward, as in docs/rewards.md: a name, name:WEIGHTS, or path/to/file.py:function."""
    dataset: Path | None = None
    """Folder of the pretrained model's samples: those that are there are used, those that lack are drawn into it. By
    default a folder in the run's."""
    dataset_size: int = 20_000
    """M: samples of the pretrained model (App. B)."""
    shard_size: int = 200
    """Samples, all ranks together, that are drawn, scored and written to disk at a time."""
    num_iterations: int = 80
    """Iterations; with 100 updates each this gives the 8000 of App. B."""
    samples_per_iteration: int = 16
    """m: samples of the model after an iteration, all ranks together, to see its reward. Nothing learns from them."""
    micro_batch_size: int = 8
    """Samples in one forward pass of a rank. For memory and speed only: never changes the result."""
    num_inference_steps: int = 50
    """T: DDIM steps of a sample."""
    guidance_scale: float = 7.5
    """w of classifier-free guidance, which is part of the policy (section 3); 1 or less switches it off."""
    eta: float = 1.0
    """Noise of the DDIM step: 1 is the DDPM."""
    cfg_training: bool = True
    """Train the guided prediction, which is what samples are drawn with. Off: the conditional one alone."""
    regularization: Literal["kl-o", "kl-d", "none"] = "kl-o"
    """"kl-o": Eq. 12. "kl-d": Eq. 13. "none": the reward alone, gamma is 0 (Eq. 10)."""
    gamma: float = 2.0
    """Weight of the regularisation (App. B)."""
    weighting: Literal["paper", "bound", "simple"] = "paper"
    """Of |x_0 - f|^2. "paper": 1 / (2 sigma_t^2), Eq. 13. "bound": the means' factor as well, as Eq. 11 and 12 have it.
    "simple": that of the usual loss, the squared error of what the UNet predicts (docs/sft_kl.md)."""
    filter: Literal["drop", "floor"] = "drop"
    """Of samples with r + gamma <= 0 (App. B). "drop": no part in the loss. "floor": r is set to -gamma, which is the
    same but for KL-O, whose loss is then linear in f and has no minimum (docs/sft_kl.md)."""
    gradient_steps: int = 100
    """Updates of an iteration."""
    batch_size: int = 128
    """n: samples of an update, all ranks together (App. B)."""
    learning_rate: float = 2e-5
    """AdamW's learning rate (App. B)."""
    weight_decay: float = 0.01
    """AdamW's weight decay (its default, App. B)."""
    max_grad_norm: float = 1.0
    """Gradient norm above which an update is scaled down (the paper does not say)."""
    lora_rank: int = 4
    """Rank of the LoRA on the attention layers (as in dpok.py); 0 trains all weights of the UNet."""
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
    save_every: int = 5
    """Iterations between checkpoints, each with a grid of fixed prompts and seeds; there is always one at the end."""
    output_dir: Path | None = None
    """Where the run goes; by default runs/sft_kl__TAG__SEED__TIME."""
    resume: Path | None = None
    """Folder of a run to continue; its arguments are the defaults then."""
    track: bool = False
    """Log to Weights & Biases as well (pip install wandb)."""


KL_O = Args()
KL_D = replace(Args(), regularization="kl-d")
NO_KL = replace(Args(), regularization="none")
ZOO = replace(
    Args(), model="zoo/sd", reward="image_reward:zoo/image_reward", num_inference_steps=12
)
ZOO = replace(
    ZOO, guidance_scale=1.5, dataset_size=512, shard_size=64, micro_batch_size=64, batch_size=32
)
ZOO = replace(
    ZOO, num_iterations=5, gradient_steps=24, samples_per_iteration=32, learning_rate=1e-3
)
ZOO = replace(ZOO, weighting="simple", gamma=0.5)
PRESETS = {"kl-o": KL_O, "kl-d": KL_D, "no-kl": NO_KL, "zoo": ZOO}


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


def to_x0(scheduler, output: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """f(x_t, t): the prediction of x_0 (B, C, H, W) in what the UNet says."""
    alpha = scheduler.alphas_cumprod.to(x_t.device)[t].view(-1, 1, 1, 1)
    if scheduler.config.prediction_type == "v_prediction":
        return alpha.sqrt() * x_t - (1 - alpha).sqrt() * output
    return (
        output
        if scheduler.config.prediction_type == "sample"
        else (x_t - (1 - alpha).sqrt() * output) / alpha.sqrt()
    )


def step_weights(scheduler, t: torch.Tensor, weighting: str) -> torch.Tensor:
    """The weight (B,) of |x_0 - f|^2 at the training's steps t >= 1 (B,), sigma_t^2 the posterior's variance.

    "paper": 1 / (2 sigma_t^2) (Eq. 13). "bound": with the square of x_0's factor in mu_tilde (Lemma 4.3), so that it is
    |mu_tilde - mu|^2 / (2 sigma_t^2) (Eq. 11). "simple": the squared error of the UNet's own output, eps or v.
    """
    alphas = scheduler.alphas_cumprod.double()
    alpha, alpha_prev = alphas[t], alphas[t - 1]
    beta = 1 - alpha / alpha_prev
    variance = (1 - alpha_prev) / (1 - alpha) * beta
    if weighting == "paper":
        return (1 / (2 * variance)).float()
    if weighting == "bound":
        return (alpha_prev * beta**2 / (1 - alpha) ** 2 / (2 * variance)).float()
    simple = {
        "epsilon": alpha / (1 - alpha),
        "v_prediction": 1 / (1 - alpha),
        "sample": torch.ones_like(alpha),
    }
    return simple[scheduler.config.prediction_type].float()


def sft_loss(args: Args, reward, x0, f, f_pre) -> torch.Tensor:
    """Eq. 13 (KL-D) or its counterpart of Eq. 12 (KL-O) without the weight of the step, (B,); Eq. 10 with "none".

    reward (B,); x0, f and f_pre (B, C, H, W). Like the log-probability it is the mean over the latent's dimensions.
    """
    gamma = 0.0 if args.regularization == "none" else args.gamma
    kept = reward + gamma > 0  # as Lemma 4.3 needs (App. B)
    reward = reward.clamp(min=-gamma)
    error = ((x0 - f) ** 2).flatten(1).mean(1)
    if args.regularization != "kl-o":
        return (reward + gamma) * error
    loss = reward * error + gamma * ((f_pre - f) ** 2).flatten(1).mean(1)
    return loss * kept if args.filter == "drop" else loss


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
    # What training evaluates; without CFG training that is not what samples are drawn with.
    train_args = args if args.cfg_training else replace(args, guidance_scale=1.0)
    # The samples of a shard and of an iteration are shared out among the ranks; shares may be uneven.
    shares = {
        n: np.linspace(0, n, world_size + 1).astype(int)[rank : rank + 2]
        for n in (args.shard_size, m)
    }

    def gathered(values: torch.Tensor, n: int) -> torch.Tensor:
        """n samples' values (n, ...) of all ranks, from those of this rank's samples."""
        start, stop = shares[n]
        return all_sum(F.pad(values, [0, 0] * (values.dim() - 1) + [start, n - stop])).cpu()

    def embed(numbers: torch.Tensor) -> torch.Tensor:
        """Hidden states (B, L, D) of the prompts with these numbers."""
        return encode([prompts[i] for i in numbers])[0]

    def draw(network: torch.nn.Module, n: int, *key: int):
        """This rank's share of n samples of a UNet: prompts (n,), trajectories (n, T+1, C, H, W), steps (n,) of T."""
        generators = [seeded(args.seed, *key, i) for i in range(*shares[n])]
        chosen = torch.cat([torch.randint(len(prompts), (1,), generator=g) for g in generators]).to(
            device
        )
        noise = torch.stack([torch.randn(T + 1, *latent_shape, generator=g) for g in generators])
        batches = torch.arange(len(generators)).split(args.micro_batch_size)
        drawn = [
            sample(args, network, scheduler, embed(chosen[b]), no_text, noise[b].to(device))[0]
            for b in batches
        ]
        steps = torch.cat([torch.randint(T, (1,), generator=g) for g in generators])
        return chosen, torch.cat(drawn), steps.to(device)

    def score(chosen: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
        """Rewards (n,) of this rank's samples."""
        images = torch.cat([decode(vae, batch) for batch in x0.split(args.micro_batch_size)])
        try:
            return reward_function(images, [prompts[i] for i in chosen])
        except RewardError as error:
            save_checkpoint(iteration)
            end_run(f"{error}; the run so far is in {run_dir}")

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

    # The updates of an iteration whose samples have no reward yet: when that fails they are not made again.
    iteration, updates = first_iteration, {"loss": 0.0, "grad_norms": []}
    if args.resume:
        load_weights(unet, run_dir / "checkpoint")
        updates = state.get("updates", updates)

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
                torch.save(state | {"updates": updates}, folder / "state.pt")

    if not args.resume:
        if rank == 0:
            save_sample_grid(0)
        save_checkpoint(0)  # so that a run can go on from any moment

    # The data set: M samples of the pretrained model and their rewards, shard by shard (Algorithm 2).
    dataset, shards = args.dataset or run_dir / "dataset", []
    for first in tqdm(
        range(0, args.dataset_size, args.shard_size), disable=rank > 0, desc="data set"
    ):
        path = dataset / f"{first:06d}.safetensors"
        if all_sum(torch.tensor(float(rank == 0 and path.exists()), device=device)) > 0:
            shards.append(load_file(path))
            continue
        if (
            all_sum(torch.tensor(float(len(signals)), device=device)) > 0
        ):  # the shards so far are on disk
            end_early(run_dir, signals)
        with pretrained(pretrained_unet):
            chosen, trajectory, _ = draw(pretrained_unet, args.shard_size, 0, first)
        shard = {
            "x0": trajectory[:, -1],
            "prompt": chosen,
            "reward": score(chosen, trajectory[:, -1]),
        }
        shards.append({key: gathered(value, args.shard_size) for key, value in shard.items()})
        with saving(run_dir):
            if rank == 0:
                write_text(dataset / "dataset.json", json.dumps(dataset_description(args, prompts)))
                save_shard(path, shards[-1])
    data = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}
    gamma = 0.0 if args.regularization == "none" else args.gamma
    if (data["reward"] + gamma <= 0).all():
        end_run(
            f"no sample has r + gamma above 0 (the best r is {data['reward'].max():.3f}); raise --gamma"
        )

    progress = tqdm(
        range(first_iteration, args.num_iterations), disable=rank > 0, desc=Path(__file__).stem
    )
    for iteration in progress:
        # Updates, on n samples of the data set each (Algorithm 2).
        clock = time.perf_counter()
        loss_sum = torch.tensor(updates["loss"] * (rank == 0), dtype=torch.float64, device=device)
        grad_norms = updates["grad_norms"]
        start, stop = np.linspace(0, args.batch_size, world_size + 1).astype(int)[rank : rank + 2]
        for update in range(len(grad_norms), args.gradient_steps):
            generator = seeded(args.seed, 1, iteration, update)
            batch = torch.randint(len(data["x0"]), (args.batch_size,), generator=generator)
            t = torch.randint(
                1, scheduler.config.num_train_timesteps, (args.batch_size,), generator=generator
            )
            noise = torch.randn(args.batch_size, *latent_shape, generator=generator)
            weight = step_weights(scheduler, t, args.weighting)
            for rows in torch.arange(start, stop).split(args.micro_batch_size):
                x0, z = data["x0"][batch[rows]].to(device), embed(data["prompt"][batch[rows]])
                steps = t[rows].to(device)
                x_t = scheduler.add_noise(x0, noise[rows].to(device), steps)
                f = to_x0(
                    scheduler, guided_noise(train_args, unet, x_t, steps, z, no_text), x_t, steps
                )
                f_pre = None
                if args.regularization == "kl-o":
                    with torch.no_grad(), pretrained(pretrained_unet):
                        output = guided_noise(train_args, pretrained_unet, x_t, steps, z, no_text)
                        f_pre = to_x0(scheduler, output, x_t, steps)
                loss = sft_loss(args, data["reward"][batch[rows]].to(device), x0, f, f_pre)
                loss = (weight[rows].to(device) * loss).sum() / args.batch_size  # Eq. 12, 13
                scaler.scale(loss).backward()
                loss_sum += loss.detach().double() / args.gradient_steps
            grad_norms.append(step_optimizer(optimizer, args.max_grad_norm))
        updates = {"loss": all_sum(loss_sum).item(), "grad_norms": grad_norms}
        time_train, clock = time.perf_counter() - clock, time.perf_counter()

        # What the model draws now. Its KL to the pretrained one (Eq. 7) is taken on one step of each sample.
        chosen, trajectory, j = draw(unet, m, 2, iteration)
        x_t = trajectory[torch.arange(len(chosen), device=device), j]
        steps, z = scheduler.timesteps.to(device)[j], embed(chosen)
        kl = torch.zeros(len(chosen), device=device)
        for rows in torch.arange(len(chosen)).split(args.micro_batch_size):
            x = {
                "timestep": steps[rows],
                "sample": x_t[rows],
                "eta": args.eta,
                "prev_sample": x_t[rows],
            }
            with torch.no_grad():
                noise = guided_noise(args, unet, x_t[rows], steps[rows], z[rows], no_text)
                with pretrained(pretrained_unet):
                    pre_noise = guided_noise(
                        args, pretrained_unet, x_t[rows], steps[rows], z[rows], no_text
                    )
            step, pre = (
                ddim_step_with_logprob(scheduler, output, **x) for output in (noise, pre_noise)
            )
            kl[rows] = ddim_step_kl(step.mean, pre.mean, step.std)
        kl = gathered(kl, m)
        time_sample, clock = time.perf_counter() - clock, time.perf_counter()
        rewards = gathered(score(chosen, trajectory[:, -1]), m)
        updates = {"loss": 0.0, "grad_norms": []}

        metrics = {
            "iteration": iteration,
            "samples": args.dataset_size + (iteration + 1) * m,
            "reward/mean": rewards.mean().item(),
            "reward/std": rewards.std(correction=0).item(),
            "reward/dataset": data["reward"].mean().item(),
            "reward/below_floor": (data["reward"] + gamma <= 0).float().mean().item(),
            "kl/pretrained": kl.mean().item() * int(np.prod(latent_shape)) * T,
            "loss/sft": loss_sum.item(),
            **gradient_metrics(grad_norms),
            "time/sample_s": time_sample,
            "time/reward_s": time.perf_counter() - clock,
            "time/train_s": time_train,
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
