"""SFT with KL regularisation (Fan et al. 2023, arXiv:2305.16381, 4.2): KL-D, KL-O, or none.

The model learns from M samples that the pretrained one has drawn once, weighted by their reward
(Algorithm 2):

    D = {x_0 ~ p_pre(x_0 | z), z ~ p(z)}, M samples; r <- max(r, -gamma)         (Lemma 4.3, App. B)
    theta <- theta - lr grad E loss / (2 sigma_t^2), with
    KL-D: loss = (r + gamma) |x_0 - f_theta(x_t, t, z)|^2                              (Eq. 11, 13)
    KL-O: loss = r |x_0 - f_theta|^2 + gamma |f_pre - f_theta|^2                           (Eq. 12)
    x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, t uniform over 2, ..., 1000

f predicts x_0. An iteration is --gradient-steps updates, and then a few samples of the model to see
the reward.

A laptop, minutes:        python sft_kl.py zoo --prompt "A green colored rabbit"
One GPU, SD v1.5:         python sft_kl.py --prompt "A green colored rabbit"
Eight GPUs, KL-D:         torchrun --nproc_per_node=8 sft_kl.py kl-d
                              --prompt "A green colored rabbit"

docs/sft_kl.md says what the paper does, what this file does and why, and explains every metric.
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from common import UserError
from common.scheduler import (
    ddim_mean_and_std,
    ddim_step_kl,
    ddim_step_with_logprob,
    predict_x0_and_noise,
)
from common.stable_diffusion import load_stable_diffusion
from harness import (
    GRID,
    PROGRESS,
    ROLLOUT,
    UPDATES,
    Run,
    RunArgs,
    check_folder,
    check_memory,
    check_reward,
    check_sampler,
    check_share,
    command,
    digests_of_code,
    even_size,
    fail,
    fit_micro_batches,
    load_run_reward,
    micro_batches,
    parse_args,
    progress,
    read_prompts,
    read_stored,
    require,
    seeded,
    tag_of,
    warn_of_prompts,
)


@dataclass(kw_only=True)
class Args(RunArgs):
    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Hub id or local folder in diffusers format."""
    prompt: str = "A green colored rabbit"
    """The prompt, unless --prompts-file is given (5.2)."""
    prompts_file: Path | None = None
    """Text file, one prompt a line; every sample draws one of them at random."""
    reward: str = "image_reward"
    """Reward, as in docs/rewards.md: a name, name:WEIGHTS, or path/to/file.py:function."""
    dataset: Path | None = None
    """Folder of the pretrained model's samples: those that are there are used, those that lack are
    drawn into it. By default a folder in the run's."""
    dataset_size: int = 20_000
    """M: samples of the pretrained model (App. B)."""
    shard_size: int = 200
    """Samples, all ranks together, that are drawn, scored and written to disk at a time (not in the
    paper)."""
    num_iterations: int = 80
    """Iterations; with 100 updates each this gives the 8000 of App. B."""
    samples_per_iteration: int = 16
    """m: samples of the model after an iteration, all ranks together, to see its reward. Nothing
    learns from them (not in the paper)."""
    num_inference_steps: int = 50
    """T: DDIM steps of a sample (as in dpok.py)."""
    guidance_scale: float = 7.5
    """w of classifier-free guidance, part of the policy (section 3; 7.5 as in dpok.py); 1 or less
    switches it off."""
    eta: float = 1.0
    """Noise of the DDIM step: 1 is the DDPM (as in dpok.py)."""
    cfg_training: bool = True
    """Train the guided prediction, which samples are drawn with. Off: the conditional one alone."""
    regularization: Literal["kl-o", "kl-d", "none"] = "kl-o"
    """"kl-o": Eq. 12. "kl-d": Eq. 13. "none": the reward alone, gamma is 0 (Eq. 10)."""
    gamma: float = 2.0
    """Weight of the regularisation (App. B)."""
    weighting: Literal["paper", "bound", "simple"] = "paper"
    """Weight of a step's |x_0 - f|^2. "paper": 1 / (2 sigma_t^2), Eq. 13. "bound": that times the
    square of x_0's factor in the posterior's mean, as in Eq. 11 and 12. "simple": that of the usual
    loss, the squared error of what the UNet predicts (docs/sft_kl.md)."""
    filter: Literal["floor", "drop"] = "floor"
    """What becomes of samples with r + gamma < 0 (App. B). "floor": the sum is set to 0, as we read
    the paper; with KL-O their loss is then linear in f and has no minimum. "drop": they take no
    part in the loss. The two differ for KL-O alone (docs/sft_kl.md)."""
    gradient_steps: int = 100
    """Updates of an iteration; the paper has no iterations."""
    batch_size: int = 128
    """n: samples of an update, all ranks together (App. B)."""
    learning_rate: float = 2e-5
    """AdamW's learning rate (App. B)."""
    weight_decay: float = 0.01
    """AdamW's weight decay (its default, App. B)."""
    max_grad_norm: float = 1.0
    """Gradient norm above which an update is scaled down (the paper does not say)."""
    lora_rank: int = 4
    """Rank of the LoRA on the attention layers (as in dpok.py); 0 trains all weights."""
    save_every: int = 5
    """Iterations between checkpoints, each with a grid of fixed prompts and seeds."""


PRESETS = {
    "kl-o": Args(),
    "kl-d": Args(regularization="kl-d"),
    "no-kl": Args(regularization="none"),
    "zoo": Args(
        model="zoo/sd",
        reward="image_reward:zoo/image_reward",
        dataset_size=512,
        shard_size=64,
        num_iterations=5,
        samples_per_iteration=32,
        micro_batch_size=64,
        num_inference_steps=12,
        guidance_scale=1.5,
        gamma=0.5,
        weighting="simple",
        gradient_steps=24,
        batch_size=32,
        learning_rate=1e-3,
    ),
}


def check(args: Args) -> None:
    """What cannot work, refused before anything is loaded."""
    size, shard = args.dataset_size, args.shard_size
    require(size % shard == 0, f"--shard-size is {shard}; it must divide --dataset-size, {size}")
    for name in ("shard_size", "batch_size", "samples_per_iteration"):
        check_share("--" + name.replace("_", "-"), getattr(args, name))
    check_sampler(args)
    check_memory("--dataset-size", args.model, size)
    check_memory("--batch-size", args.model, 2 * args.batch_size)
    for flag, n in (
        ("--shard-size", shard),
        ("--samples-per-iteration", args.samples_per_iteration),
    ):
        check_memory(flag, args.model, n, pictures=n)
    check_reward(args.reward)
    if args.dataset:
        check_folder("--dataset", args.dataset)


def about_dataset(args, prompts) -> dict:
    """What the samples of a data set depend on: the file dataset.json beside them."""
    keys = ("model", "reward", "shard_size", "num_inference_steps", "guidance_scale", "eta", "seed")
    about = {"prompts_file": prompts} | {key: getattr(args, key) for key in keys}
    return about | {"reward_code": digests_of_code(args.reward)}


def check_dataset(args, prompts) -> None:
    """Refuse a --dataset that was drawn with other settings."""
    if args.dataset is None:
        return
    if not (args.dataset / "dataset.json").exists():
        # What a data set leaves that ended before its first shard.
        begun = {".lock", "dataset.json.partial"}
        others = args.dataset.is_dir() and {path.name for path in args.dataset.iterdir()} - begun
        require(not others, f"--dataset {args.dataset} holds other files; choose an empty folder")
        return
    wanted = about_dataset(args, prompts)
    there = read_stored(args.dataset / "dataset.json", dict, "choose another --dataset")
    there = {"reward_code": wanted["reward_code"]} | there  # a file may lack this key
    differ = [key.removesuffix("_code") for key in wanted if there.get(key) != wanted[key]]
    differ = [
        "prompts" if key == "prompts_file" else f"--{key.replace('_', '-')}"
        for key in dict.fromkeys(differ)
    ]
    if differ:
        remedy = "choose another folder or the same settings"
        fail(f"--dataset {args.dataset} was drawn with other {', '.join(differ)}; {remedy}")


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


def predict_x0(args, sd, unet, x_t, t, text):
    """f_theta(x_t, t, z) of a UNet, (B, C, H, W)."""
    prediction = guided_noise(args, sd, unet, x_t, t, text)
    x_0, _ = predict_x0_and_noise(sd.scheduler, prediction, t, x_t)
    return x_0


def pretrained_x0(args, sd, x_t, t, text):
    """f_pre(x_t, t, z), (B, C, H, W), where the loss asks for it: KL-O alone does."""
    if args.regularization != "kl-o":
        return None
    with sd.pretrained() as unet:
        return predict_x0(args, sd, unet, x_t, t, text)


def step_weights(scheduler, t, weighting: str):
    """The weight (B,) of |x_0 - f|^2 at t (B,), counted from 0: t >= 1 is the paper's t > 1.

    sigma_t^2 is the posterior's variance. "paper": 1 / (2 sigma_t^2) (Eq. 13). "bound": with the
    square of x_0's factor in mu_tilde (Lemma 4.3), so that it is |mu_tilde - mu|^2 / (2 sigma_t^2)
    (Eq. 11). "simple": the squared error of the UNet's own output, eps or v.
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


def shift(args) -> float:
    """gamma, which KL-D and KL-O add to the reward."""
    return 0.0 if args.regularization == "none" else args.gamma


def sft_loss(args, reward, x_0, f, f_pre):
    """Eq. 13 (KL-D), its counterpart of Eq. 12 (KL-O), or Eq. 10 ("none"), (B,).

    Without the weight of the step. reward (B,); x_0, f and f_pre (B, C, H, W). Like the log-prob it
    is the mean over the latent's dimensions.
    """
    gamma = shift(args)
    kept = reward + gamma > 0
    reward = reward.clamp(min=-gamma)  # as Lemma 4.3 needs (App. B)
    error = ((x_0 - f) ** 2).flatten(1).mean(1)
    if args.regularization != "kl-o":
        return (reward + gamma) * error
    loss = reward * error + gamma * ((f_pre - f) ** 2).flatten(1).mean(1)
    if args.filter == "drop":
        loss = loss * kept
    return loss


@command
def main():
    args = parse_args(PRESETS, __doc__, check)
    prompts = read_prompts(args)
    check_dataset(args, prompts)
    run = Run(args, __file__, tag_of(args))
    sd = load_stable_diffusion(args, run.device)
    reward_function = load_run_reward(run, args, args.reward, prompts)
    warn_of_prompts(sd.encoder, prompts)
    m, n, T = args.samples_per_iteration, args.batch_size, args.num_inference_steps

    optimizer = torch.optim.AdamW(sd.weights, args.learning_rate, weight_decay=args.weight_decay)
    # Without CFG training the model that learns is not the one that samples.
    train_args = args if args.cfg_training else replace(args, guidance_scale=1.0)
    own = run.share(n)
    args = fit_micro_batches(args, sd, guided_noise)
    run.keep(model=sd, optimizer=optimizer)
    sd.batch_size = even_size(len(own), args.micro_batch_size)

    def draw(unet, count, *key, monitor=False):
        """This rank's share of `count` samples: x_0, prompts, KL to the pretrained, pictures."""
        generators = [seeded(args.seed, *key, i) for i in run.share(count)]
        chosen = torch.cat([torch.randint(len(prompts), (1,), generator=g) for g in generators])
        noise = [torch.randn(T + 1, *sd.latent_shape, generator=g) for g in generators]
        kl_steps = torch.cat([torch.randint(T, (1,), generator=g) for g in generators])
        kl_steps = kl_steps.to(run.device)
        own_prompts = [prompts[i] for i in chosen.tolist()]
        sd.batch_size = even_size(len(chosen), args.micro_batch_size)
        x_0, kl, images = [], [], []
        for rows in micro_batches(len(chosen), sd.batch_size):
            text = sd.encode(own_prompts[rows])
            rollout = sample(args, sd, unet, text, torch.stack(noise[rows]).to(run.device))
            x_0.append(rollout.trajectory[:, -1])
            images.append(sd.decode(x_0[-1]))
            reward_function.start(images[-1], own_prompts[rows])
            if monitor:
                kl.append(kl_to_pretrained(args, sd, text, rollout, kl_steps[rows]))
        return torch.cat(x_0), chosen, torch.cat(kl) if kl else None, torch.cat(images)

    def draw_shard(first):
        """This rank's share of a shard of the data set: x_0, prompts and rewards."""
        with sd.pretrained() as unet:
            x_0, chosen, _, images = draw(unet, args.shard_size, ROLLOUT, first)
        rewards = reward_function(images, [prompts[i] for i in chosen.tolist()])
        return {"x0": x_0, "prompt": chosen.to(run.device), "reward": rewards}

    # The data set: M samples of the pretrained model and their rewards (Algorithm 2).
    shards, about = [], json.dumps(about_dataset(args, prompts))
    folder = args.dataset.absolute() if args.dataset else Path("dataset")
    for first in progress(range(0, args.dataset_size, args.shard_size), "data set"):
        path = folder / f"{first:06d}.safetensors"
        shards.append(run.shard(path, args.shard_size, partial(draw_shard, first), about))
    data = {key: torch.cat([shard[key] for shard in shards]) for key in shards[0]}
    below_floor = (data["reward"] + shift(args) <= 0).float().mean().item()
    if below_floor == 1:
        best = data["reward"].max().item()
        remedy = f"start anew with --gamma above {-best:.3f}"
        if args.regularization == "none":
            remedy += " and --regularization kl-o or kl-d"
        place = args.dataset or "the run's folder dataset/"
        fault = f"no sample has r + gamma above 0 (the best r is {best:.3f})"
        raise UserError(f"{fault}; {remedy}, and --dataset {place}")

    grid = partial(draw_grid, args, sd, prompts=prompts)
    for iteration, unit in run.iterations("updates", "samples", grid=grid):
        # Updates, on n samples of the data set each (Algorithm 2).
        if unit == "updates":
            with run.timer("train"):
                sd.batch_size = even_size(len(own), args.micro_batch_size)
                for update in range(args.gradient_steps):
                    generator = seeded(args.seed, UPDATES, iteration, update)
                    batch = torch.randint(len(data["x0"]), (n,), generator=generator)
                    num_steps = sd.scheduler.config.num_train_timesteps
                    # The paper's t > 1: here steps are counted from 0.
                    t = torch.randint(1, num_steps, (n,), generator=generator)
                    noise = torch.randn(n, *sd.latent_shape, generator=generator)
                    mine = batch[own.start : own.stop]
                    batch_prompts = [prompts[i] for i in data["prompt"][mine].tolist()]
                    x_0, reward = (data[key][mine].to(run.device) for key in ("x0", "reward"))
                    noise, t = (x[own.start : own.stop].to(run.device) for x in (noise, t))
                    x_t = sd.scheduler.add_noise(x_0, noise, t)
                    weight = step_weights(sd.scheduler, t, args.weighting)
                    for rows in micro_batches(len(own), sd.batch_size):
                        inputs = x_t[rows], t[rows], sd.encode(batch_prompts[rows])
                        f_pre = pretrained_x0(train_args, sd, *inputs)
                        f = predict_x0(train_args, sd, sd.unet, *inputs)
                        loss = sft_loss(args, reward[rows], x_0[rows], f, f_pre)
                        loss = (weight[rows] * loss).sum() / n  # Eq. 12, 13
                        run.backward(loss)
                        run.add("loss/sft", loss.double() / args.gradient_steps)
                    run.step(optimizer, args.max_grad_norm)

        # What the model draws now, and its KL to the pretrained one (Eq. 7).
        if unit == "samples":
            with run.timer("sample"):
                _, chosen, kl, images = draw(sd.unet, m, PROGRESS, iteration, monitor=True)
            with run.timer("reward"):
                rewards = reward_function(images, [prompts[i] for i in chosen.tolist()])
            line = {"samples": args.dataset_size + (iteration + 1) * m}
            line |= {"reward": run.gather(rewards, m)}
            line |= {"reward/dataset": data["reward"].mean().item()}
            line |= {"reward/below_floor": below_floor}
            line |= {"kl/pretrained": run.gather(kl, m).mean().item() * sd.latent_size * T}
            run.log(line)


if __name__ == "__main__":
    main()
