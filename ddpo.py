"""DDPO: denoising diffusion policy optimization (Black et al. 2023, arXiv:2305.13301).

Denoising is a Markov decision process (4.3): the state is (c, t, x_t), the action x_{t-1}, the
policy one step p_theta(x_{t-1} | c, t, x_t), the reward r(x_0, c) comes at the end. Each iteration:

    sample c ~ p(c) and x_{T:0} ~ p_theta, 256 times                                          (A.1)
    A <- (r - mean of c's rewards) / std of c's rewards                                       (A.3)
    SF: theta <- theta + lr grad E sum_t A log p_theta(x_{t-1} | c, t, x_t), once            (Eq. 3)
    IS: theta <- theta + lr grad E sum_t min(A ratio_t, A clip(ratio_t, 1 - eps, 1 + eps)),  (Eq. 4)
        ratio_t = p_theta(x_{t-1} | c, t, x_t) / p_old(x_{t-1} | c, t, x_t), 4 times          (A.1)

A laptop, minutes:        python ddpo.py zoo
One GPU, SD v1.4, LoRA:   python ddpo.py compressibility --lora-rank 4
Eight GPUs, all weights:  torchrun --nproc_per_node=8 ddpo.py aesthetic
The score function:       torchrun --nproc_per_node=8 ddpo.py aesthetic --estimator sf

docs/ddpo.md says what the paper does, what the released code does, what this file does, and
explains every metric.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from common.scheduler import (
    ddim_mean_and_std,
    ddim_step_kl,
    ddim_step_with_logprob,
    steps_with_noise,
)
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
    read_prompts,
    require,
    rollout_storage,
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
    num_iterations: int = 200
    """Rollouts; with 256 samples each this gives the 50 000 reward queries of A.5."""
    samples_per_iteration: int = 256
    """m: samples of an iteration, all ranks together (A.1)."""
    num_inference_steps: int = 50
    """T: DDIM steps of a sample (A.6)."""
    guidance_scale: float = 5.0
    """w of classifier-free guidance, part of the policy (B.1); 1 or less switches it off."""
    eta: float = 1.0
    """Noise of the DDIM step: 1 is the DDPM (ancestral sampling, A.6)."""
    cfg_training: bool = True
    """Train the guided prediction, which is the policy that sampled (B.1). Off: the conditional one
    alone."""
    estimator: Literal["is", "sf"] = "is"
    """"is": Eq. 4 with PPO's clipped surrogate, --gradient-steps updates. "sf": Eq. 3, one update
    on all samples."""
    clip_range: float = 1e-4
    """eps of the clipped surrogate (A.1)."""
    gradient_steps: int = 4
    """Updates of an iteration with "is", each on an equal share of its samples (A.1)."""
    rewarded_share: float = 1.0
    """Share of a sample's steps, the noisiest first, that learn from the reward; 1: Eq. 3, 4."""
    timestep_fraction: float = 1.0
    """Share of those steps that is learned from, drawn at random for each sample; 1 is Eq. 3, 4."""
    normalise: Literal["per-prompt", "per-batch"] = "per-prompt"
    """Mean and standard deviation for the advantages: of the prompt's last rewards (A.3) or of the
    iteration's."""
    buffer_size: int = 32
    """Rewards of a prompt that are remembered (released code)."""
    min_count: int = 16
    """With fewer rewards of a prompt than this, the iteration's stand in (released code)."""
    advantage_clip: float = 10.0
    """Advantages are clipped to plus and minus this (released code)."""
    learning_rate: float | None = None
    """AdamW's learning rate; by default 1e-5 for all weights (A.6), 3e-4 for a LoRA (released
    PyTorch code)."""
    weight_decay: float = 1e-4
    """AdamW's weight decay (A.6)."""
    max_grad_norm: float = 1.0
    """Gradient norm above which an update is scaled down (A.6)."""
    lora_rank: int = 0
    """Rank of a LoRA on the attention layers (4 in the released PyTorch code); 0 trains all weights
    (A.6)."""
    monitor_kl: bool = True
    """Measure the KL to the pretrained model, which nothing here learns from; with --lora-rank 0 a
    frozen copy of the UNet is kept for it."""


PRESETS = {
    "compressibility": Args(),
    "incompressibility": Args(reward="jpeg_incompressibility"),
    "aesthetic": Args(  # 5.2, 6.1, A.7
        reward="aesthetic",
        prompts_file=Path("prompts/animals.txt"),
    ),
    "alignment": Args(  # 5.3, 6.2
        reward="llava_bertscore",
        prompts_file=Path("prompts/animals_activities.txt"),
    ),
    "zoo": Args(
        model="zoo/sd",
        prompts_file=Path("prompts/zoo.txt"),
        reward="image_reward:zoo/image_reward",
        num_iterations=60,
        samples_per_iteration=32,
        micro_batch_size=64,
        num_inference_steps=12,
        guidance_scale=1.5,
        # A latent of 1024 numbers instead of 16384: the mean over them scatters four times as
        # much.
        clip_range=1e-3,
        gradient_steps=2,
        rewarded_share=0.33,
        min_count=8,
        learning_rate=2e-3,
        lora_rank=4,
    ),
}
PRESETS["zoo-compressibility"] = replace(
    PRESETS["zoo"],
    reward="jpeg_compressibility",
    gradient_steps=4,
    rewarded_share=0.5,
    learning_rate=2.5e-3,
)


def check(args: Args) -> None:
    """What cannot work, refused before anything is loaded."""
    for name in ("rewarded_share", "timestep_fraction"):
        share, flag = getattr(args, name), "--" + name.replace("_", "-")
        require(0 < share <= 1, f"{flag} is {share}; it must be more than 0 and at most 1")
    steps, m = args.gradient_steps, args.samples_per_iteration
    fits = steps <= m or args.estimator == "sf"
    require(fits, f"--gradient-steps is {steps}; it can be at most --samples-per-iteration, {m}")
    require(args.advantage_clip > 0, "--advantage-clip is 0, with which nothing learns; give more")
    one = "one sample has no advantage over its batch; give --samples-per-iteration 2 or more"
    require(m > 1 or args.normalise == "per-prompt", f"--normalise per-batch: {one}")
    count, size = args.min_count, args.buffer_size
    require(size <= 100_000, f"--buffer-size is {size}; it can be at most 100000")
    require(count <= size, f"--min-count is {count}; it can be at most --buffer-size, {size}")
    check_share("--samples-per-iteration", m)
    check_sampler(args)
    kept = m * (args.num_inference_steps + 1)
    check_memory("--samples-per-iteration", args.model, kept, pictures=m)
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


def per_prompt_advantages(history, prompt_ids, rewards, min_count: int):
    """(r - mean) / std over the last rewards of each prompt (A.3), float64 (m,).

    history (number of prompts, buffer size) float64, nan where there is no reward yet, is updated
    in place with rewards (m,), which take part; prompt_ids (m,) int64 are their rows. For a prompt
    with fewer than `min_count` rewards it is the mean and std of `rewards`.
    """
    rewards = rewards.double()
    for prompt, reward in zip(prompt_ids, rewards):
        history[prompt] = torch.cat([history[prompt, 1:], reward[None]])
    past = history[prompt_ids]
    mean = past.nanmean(1)
    enough = (~past.isnan()).sum(1) >= min_count
    std = ((past - mean[:, None]) ** 2).nanmean(1).sqrt()
    mean = torch.where(enough, mean, rewards.mean())
    std = torch.where(enough, std, rewards.std(correction=0))
    return (rewards - mean) / (std + 1e-6)


def per_batch_advantages(rewards):
    """(r - mean) / std over the iteration, float64 (m,)."""
    advantages = rewards.double() - rewards.double().mean()
    return advantages / (advantages.std(correction=0) + 1e-6)


def choose_steps(args, noisy_steps, generator):
    """The steps that each sample learns from, (m, K): a random subset of those that are rewarded.

    A step with sigma_t = 0 has no log-probability and takes no part.
    """
    rewarded = noisy_steps[noisy_steps < args.rewarded_share * args.num_inference_steps]
    K = max(1, round(args.timestep_fraction * len(rewarded)))
    order = torch.rand(args.samples_per_iteration, len(rewarded), generator=generator).argsort(1)
    return rewarded[order[:, :K]]


def monitor(run, ratio, clipped, loss, count, num_updates, update) -> None:
    """The metrics of a micro-batch of one of `num_updates` updates on `count` transitions."""
    run.add("ratio/clip_fraction", (ratio != clipped).double().sum() / count / num_updates)
    run.add("loss/policy", loss.double() / num_updates)
    if update == 0:
        run.add("ratio/first_max_deviation", (ratio - 1).abs().max(), "max")


@command
def main():
    args = parse_args(PRESETS, __doc__, check)
    prompts = read_prompts(args)
    run = Run(args, __file__, tag_of(args))
    sd = load_stable_diffusion(args, run.device, keep_pretrained=args.monitor_kl)
    reward_function = load_run_reward(run, args, args.reward, prompts)
    warn_of_prompts(sd.encoder, prompts)
    m, T = args.samples_per_iteration, args.num_inference_steps
    own = run.share(m)  # this rank's samples, a range

    learning_rate = args.learning_rate
    if learning_rate is None:
        learning_rate = 3e-4 if args.lora_rank else 1e-5
    optimizer = torch.optim.AdamW(sd.weights, learning_rate, weight_decay=args.weight_decay)
    # The last rewards of each prompt, the same on all ranks.
    history = torch.full((len(prompts), args.buffer_size), float("nan"), dtype=torch.float64)
    gradient_steps = args.gradient_steps if args.estimator == "is" else 1
    noisy_steps = steps_with_noise(sd.scheduler, args.eta).cpu()
    shapes = (len(own), T + 1, *sd.latent_shape), (len(own), T)
    trajectory, log_prob = rollout_storage(run.device, *shapes)
    args = fit_micro_batches(args, sd, guided_noise)
    sd.batch_size = even_size(len(own), args.micro_batch_size)
    # Without CFG training the policy that learns is not the one that sampled (B.1, Fig. 8).
    train_args = args if args.cfg_training else replace(args, guidance_scale=1.0)
    run.keep(model=sd, optimizer=optimizer, history=history)

    for iteration in run.iterations(grid=partial(draw_grid, args, sd, prompts=prompts)):
        # Rollout: m samples of the current policy (A.1). Sample i has its own generator.
        with run.timer("sample"):
            generators = [seeded(args.seed, ROLLOUT, iteration, i) for i in own]
            chosen = torch.cat([torch.randint(len(prompts), (1,), generator=g) for g in generators])
            noise = [torch.randn(T + 1, *sd.latent_shape, generator=g) for g in generators]
            kl_steps = torch.cat([torch.randint(T, (1,), generator=g) for g in generators])
            kl_steps = kl_steps.to(run.device)
            own_prompts = [prompts[i] for i in chosen.tolist()]
            images = []
            for rows in micro_batches(len(own), sd.batch_size):
                drawn = torch.stack(noise[rows]).to(run.device)
                text = sd.encode(own_prompts[rows])
                rollout = sample(args, sd, sd.unet, text, drawn)
                trajectory[rows], log_prob[rows] = rollout.trajectory, rollout.log_prob
                images.append(sd.decode(rollout.trajectory[:, -1]))
                reward_function.start(images[-1], own_prompts[rows])
                if args.monitor_kl:
                    kl = kl_to_pretrained(args, sd, text, rollout, kl_steps[rows])
                    run.add("kl/pretrained", kl.double().sum() / m * sd.latent_size * T)

        # Reward r(x_0, c), and the advantages of all samples on all ranks (A.3).
        with run.timer("reward"):
            rewards = run.gather(reward_function(torch.cat(images), own_prompts), m).cpu()
            if args.normalise == "per-prompt":
                prompt_ids = run.gather(chosen.to(run.device), m).cpu()
                advantages = per_prompt_advantages(history, prompt_ids, rewards, args.min_count)
            else:
                advantages = per_batch_advantages(rewards)
            advantages = advantages.clamp(-args.advantage_clip, args.advantage_clip)
            own_advantages = advantages[own.start : own.stop].float()

        # Updates, each on an equal share of the samples and the steps chosen for them (Eq. 3, 4).
        with run.timer("train"):
            generator = seeded(args.seed, UPDATES, iteration)
            steps = choose_steps(args, noisy_steps, generator)
            minibatches = torch.randperm(m, generator=generator).tensor_split(gradient_steps)
            for update, minibatch in enumerate(minibatches):
                count = len(minibatch) * steps.shape[1]
                # The transitions of this rank's samples: step j of sample i.
                mine = minibatch[(minibatch >= own.start) & (minibatch < own.stop)]
                i_all = (mine - own.start).repeat_interleave(steps.shape[1])
                j_all = steps[mine].flatten()
                t_all = sd.timesteps[j_all.to(run.device)]
                A_all = own_advantages[i_all].to(run.device)
                transition_prompts = [own_prompts[i] for i in i_all.tolist()]
                for rows in micro_batches(len(transition_prompts), sd.batch_size):
                    i, j = i_all[rows], j_all[rows]
                    t, A, text = t_all[rows], A_all[rows], sd.encode(transition_prompts[rows])
                    x_t, x_prev = trajectory[i, j], trajectory[i, j + 1]
                    prediction = guided_noise(train_args, sd, sd.unet, x_t, t, text)
                    step = ddim_step_with_logprob(
                        sd.scheduler, prediction, t, x_t, args.eta, prev_sample=x_prev
                    )
                    ratio = torch.exp(step.log_prob - log_prob[i, j])  # Eq. 4
                    clipped = ratio.clamp(1 - args.clip_range, 1 + args.clip_range)
                    if args.estimator == "sf":
                        objective = A * step.log_prob  # Eq. 3
                    else:
                        objective = torch.minimum(A * ratio, A * clipped)  # Eq. 4 (A.1)
                    # The mean over transitions, where Eq. 3 and 4 sum over a sample's steps.
                    loss = -objective.sum() / count
                    run.backward(loss)
                    monitor(run, ratio, clipped, loss, count, gradient_steps, update)
                run.step(optimizer, args.max_grad_norm)
        line = {"samples": (iteration + 1) * m, "reward": rewards, "advantages": advantages}
        # Without CFG training another policy sampled, and no ratio is 1.
        limits = {"ratio/first_max_deviation": args.clip_range} if args.cfg_training else {}
        run.log(line, warn_above=limits)


if __name__ == "__main__":
    main()
