"""DPOK: policy gradient with a KL penalty for text-to-image diffusion (Fan et al. 2023).

arXiv:2305.16381. Denoising is a Markov decision process (Eq. 4): the state is (z, x_t), the action
x_{t-1}, the policy one DDIM step p_theta(x_{t-1} | x_t, z), the reward r(x_0, z) comes at the end.
Algorithm 1, each iteration:

    sample z ~ p(z) and x_{0:T} ~ p_theta(x_{0:T} | z), m times                           (Alg. 1)
    V(x_t, z) <- argmin E (r(x_0, z) - V(x_t, z))^2                                       (Eq. 24)
    theta <- theta - lr grad E sum_t [ -alpha (r - V) clip(ratio_t, 1 - eps, 1 + eps)     (Eq. 26)
                             + beta KL(p_theta(x_{t-1}|x_t,z) || p_pre(x_{t-1}|x_t,z)) ]  (Eq. 7-9)
    ratio_t = p_theta(x_{t-1} | x_t, z) / p_old(x_{t-1} | x_t, z)                         (Eq. 25)

A laptop, five minutes:   python dpok.py zoo --prompt "A green colored rabbit"
One GPU, SD v1.5:         python dpok.py --prompt "A green colored rabbit"
Eight GPUs:               torchrun --nproc_per_node=8 dpok.py --prompt "A green colored rabbit"
Many prompts:             torchrun --nproc_per_node=8 dpok.py multi-prompt
                              --prompts-file prompts/dpok.txt

docs/dpok.md says what the paper does, what the released code does, what this file does, and
explains every metric.
"""

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F

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
    VALUE,
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
    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Hub id or local folder in diffusers format."""
    prompt: str = "A green colored rabbit"
    """The prompt, unless --prompts-file is given (5.2)."""
    prompts_file: Path | None = None
    """Text file, one prompt a line; every sample draws one of them at random (5.5)."""
    reward: str = "image_reward"
    """Reward, as in docs/rewards.md: a name, name:WEIGHTS, or path/to/file.py:function."""
    num_iterations: int = 2000
    """Rollouts; with 10 samples each this gives the 20 000 online samples of App. B."""
    samples_per_iteration: int = 10
    """m: samples of an iteration, all ranks together (App. B)."""
    num_inference_steps: int = 50
    """T: DDIM steps of a sample (released code)."""
    guidance_scale: float = 7.5
    """w of classifier-free guidance, part of the policy (section 3); 7.5 is the released code's; 1
    or less switches it off."""
    eta: float = 1.0
    """Noise of the DDIM step: 1 is the DDPM (released code)."""
    alpha: float = 10.0
    """Weight of the reward (Eq. 8; App. B)."""
    beta: float = 0.01
    """Weight of the KL to the pretrained model (Eq. 8; App. B)."""
    kl: Literal["exact", "released"] = "released"
    """"exact": Eq. 7, |mu - mu_pre|^2 / (2 sigma_t^2). "released": |eps - eps_pre|^2, as in the
    authors' code."""
    clip_range: float = 1e-4
    """eps of Eq. 26 (App. B)."""
    gradient_steps: int = 5
    """Policy updates an iteration (App. B)."""
    batch_size: int = 32
    """n: transitions of a policy update, all ranks together (App. B)."""
    replay_rollouts: int = 2
    """Transitions are drawn from that many last rollouts; 1 is on-policy (the released buffer holds
    two)."""
    rewarded_share: float = 1.0
    """Share of a sample's steps, the noisiest first, that learn from the reward; 1 is Eq. 9. The KL
    is of all steps."""
    value_function: bool = False
    """Subtract a learned V(x_t, z) from the reward (A.5)."""
    value_learning_rate: float = 1e-4
    """AdamW's learning rate for the value function (E.3)."""
    value_batch_size: int = 256
    """Transitions of each of the 5 backward passes of a value update, all ranks together (E.3; 5 is
    the released code's)."""
    reward_filter: bool = False
    """Set negative rewards to 0 before they are learned from (an option of the released code)."""
    learning_rate: float = 1e-5
    """AdamW's learning rate (App. B)."""
    cooldown_share: float = 0.0
    """Share of the run, its end, over which the learning rate falls to 0 in a straight line. A run
    that is resumed with more iterations has cooled down once before."""
    weight_decay: float = 0.0
    """AdamW's weight decay (released code)."""
    max_grad_norm: float = 0.1
    """Gradient norm above which a policy update is scaled down (App. B)."""
    lora_rank: int = 4
    """Rank of the LoRA on the attention layers (released code); 0 trains all weights."""


PRESETS = {
    "single-prompt": Args(),
    "multi-prompt": Args(  # E.3; the prompts that 5.5 takes from MS-CoCo are not listed
        prompts_file=Path("prompts/dpok.txt"),
        samples_per_iteration=45,
        num_iterations=1112,
        beta=0.001,
        value_function=True,
    ),
    "zoo": Args(
        model="zoo/sd",
        reward="image_reward:zoo/image_reward",
        num_iterations=80,
        samples_per_iteration=24,
        micro_batch_size=48,
        num_inference_steps=12,
        guidance_scale=1.5,
        beta=0.1,
        kl="exact",
        # A latent of 1024 numbers instead of 16384: the mean over them scatters four times as
        # much.
        clip_range=1e-3,
        gradient_steps=2,
        batch_size=96,
        replay_rollouts=1,
        rewarded_share=0.5,
        value_function=True,
        value_learning_rate=1e-3,
        learning_rate=2e-3,
        cooldown_share=0.4,
    ),
}


def check(args: Args) -> None:
    """What cannot work, refused before anything is loaded."""
    share = args.rewarded_share
    require(0 < share <= 1, f"--rewarded-share is {share}; it must be above 0 and at most 1")
    require(
        args.cooldown_share <= 1, f"--cooldown-share is {args.cooldown_share}; it can be at most 1"
    )
    check_share("--samples-per-iteration", args.samples_per_iteration)
    check_sampler(args)
    m, T = args.samples_per_iteration, args.num_inference_steps
    kept = m * args.replay_rollouts * (2 * T + 1)
    check_memory("--samples-per-iteration with --replay-rollouts", args.model, kept, pictures=m)
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


VALUE_BATCHES = 5
"""Batches of a value update (released code)."""


class ValueFunction(torch.nn.Module):
    """V(x_t, z) (A.5): three layers of 256, each scaled by a learned embedding of the step.

    forward(latents (B, C, H, W), steps (B,) with 0 the noisiest, pooled (B, D)) gives (B,). Layers
    and scales are those of the released code.
    """

    def __init__(self, in_features: int, num_steps: int, width: int = 256):
        super().__init__()
        sizes = (in_features, width, width)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(n, width) for n in sizes)
        self.scales = torch.nn.ModuleList(torch.nn.Embedding(num_steps, width) for _ in sizes)
        for scale in self.scales:
            torch.nn.init.uniform_(scale.weight)
        self.out = torch.nn.Linear(width, 1)

    def forward(self, latents, steps, pooled):
        x = torch.cat([latents.flatten(1), pooled], dim=1)
        for layer, scale in zip(self.layers, self.scales):
            x = F.relu(scale(steps) * layer(x))
        return self.out(x)[:, 0]


class Replay:
    """The last S rollouts of this rank's n samples, the one of this iteration included.

    trajectory (S, n, T+1, C, H, W), x_T to x_0; log_prob (S, n, T); reward (S, n); prompt (S, n),
    its index; pre_noise (S, n, T, C, H, W), what the pretrained UNet predicts, where has_pre_noise
    (S, n, T) says that it is known.
    """

    STORED = ("trajectory", "log_prob", "reward", "pre_noise")

    def __init__(self, args, sd, own: range):
        self.own, self.m = own, args.samples_per_iteration
        self.noisy_steps = steps_with_noise(sd.scheduler, args.eta).cpu()
        slots, n, T = args.replay_rollouts, len(own), args.num_inference_steps
        shapes = (slots, n, T + 1, *sd.latent_shape), (slots, n, T, *sd.latent_shape)
        self.trajectory, self.pre_noise = rollout_storage(sd.device, *shapes)
        self.log_prob, self.reward = rollout_storage(sd.device, (slots, n, T), (slots, n))
        # On the CPU: Python decides by these what to do next, and must not wait for the GPU.
        self.prompt = torch.zeros(slots, n, dtype=torch.long)
        self.has_pre_noise = torch.zeros(slots, n, T, dtype=torch.bool)

    def draw(self, count: int, slots: int, generator):
        """`count` transitions of all ranks' replays: how many there were, and this rank's (3, n).

        A step without noise has no log-prob and is never drawn.
        """
        shape = (slots, self.m, len(self.noisy_steps))
        drawn = torch.randperm(math.prod(shape), generator=generator)[:count]
        s, i, j = torch.unravel_index(drawn, shape)
        mine = (i >= self.own.start) & (i < self.own.stop)
        transitions = torch.stack([s, i - self.own.start, self.noisy_steps[j]])
        return len(drawn), transitions[:, mine]

    def prompts_of(self, prompts, transitions) -> list[str]:
        """The prompt of each of the transitions (3, n)."""
        s, i, _ = transitions
        return [prompts[k] for k in self.prompt[s, i].tolist()]

    def predict_pretrained(self, args, sd, prompts, transitions) -> None:
        """Keep the pretrained model's predictions for the transitions (3, n) that lack them."""
        known = self.has_pre_noise[tuple(transitions)]
        lacking = transitions[:, ~known].unique(dim=1)  # two updates may have drawn the same one
        texts, t_all = self.prompts_of(prompts, lacking), sd.timesteps[lacking[2].to(sd.device)]
        for rows in micro_batches(len(texts), sd.batch_size):
            s, i, j = lacking[:, rows]
            x_t, text = self.trajectory[s, i, j], sd.encode(texts[rows])
            with sd.pretrained() as unet:
                self.pre_noise[s, i, j] = guided_noise(args, sd, unet, x_t, t_all[rows], text)
            self.has_pre_noise[s, i, j] = True

    def state_dict(self) -> dict[str, torch.Tensor]:
        stored = {key: getattr(self, key).values for key in self.STORED}
        return stored | {"prompt": self.prompt, "has_pre_noise": self.has_pre_noise}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        for key, values in self.state_dict().items():
            values.copy_(state[key])


def monitor(
    run, args, count, to_nats, ratio, clipped, advantages, policy_loss, penalty, kl
) -> None:
    """The metrics of a micro-batch of one of `gradient_steps` updates on `count` transitions.

    `to_nats` turns the mean KL into nats of a whole chain.
    """

    def mean(values):
        return values.double().sum() / count / args.gradient_steps

    run.add("loss/policy", mean(policy_loss))
    run.add("loss/kl", args.beta * mean(penalty))
    run.add("ratio/clip_fraction", mean(ratio != clipped))
    run.add("advantages/mean", mean(advantages))
    run.add("advantages/square", mean(advantages.double() ** 2))
    run.add("kl/pretrained", mean(kl) * to_nats)


def cooled_learning_rate(args, iteration: int) -> float:
    """The learning rate; over the last --cooldown-share of the run it falls in a straight line."""
    left = 1 - iteration / args.num_iterations
    if left >= args.cooldown_share:
        return args.learning_rate
    return args.learning_rate * (left / args.cooldown_share)


@command
def main():
    args = parse_args(PRESETS, __doc__, check)
    prompts = read_prompts(args)
    run = Run(args, __file__, tag_of(args))
    sd = load_stable_diffusion(args, run.device)
    warn_of_prompts(sd.encoder, prompts)
    m, T = args.samples_per_iteration, args.num_inference_steps
    own = run.share(m)  # this rank's samples, a range

    optimizer = torch.optim.AdamW(sd.weights, args.learning_rate, weight_decay=args.weight_decay)
    value_function = ValueFunction(sd.latent_size + sd.text_size, T).to(run.device)
    value_optimizer = torch.optim.AdamW(value_function.parameters(), args.value_learning_rate)
    reward_function = load_run_reward(run, args, args.reward, prompts)
    replay = Replay(args, sd, own)
    to_nats = sd.latent_size * len(replay.noisy_steps)  # the KL is a mean over both
    args = fit_micro_batches(args, sd, guided_noise)
    sd.batch_size = even_size(len(own), args.micro_batch_size)
    run.keep(model=sd, optimizer=optimizer)
    run.keep(value_function=value_function, value_optimizer=value_optimizer)
    run.keep_shares(m, replay=replay)

    for iteration in run.iterations(grid=partial(draw_grid, args, sd, prompts=prompts)):
        # Rollout: m samples of the current policy (Alg. 1). Sample i has its own generator.
        slot = iteration % args.replay_rollouts  # the oldest rollout's, which this one replaces
        slots = min(iteration + 1, args.replay_rollouts)  # those that are filled
        with run.timer("sample"):
            generators = [seeded(args.seed, ROLLOUT, iteration, i) for i in own]
            chosen = [torch.randint(len(prompts), (), generator=g).item() for g in generators]
            noise = [torch.randn(T + 1, *sd.latent_shape, generator=g) for g in generators]
            own_prompts = [prompts[i] for i in chosen]
            images = []
            for rows in micro_batches(len(own), sd.batch_size):
                drawn = torch.stack(noise[rows]).to(run.device)
                rollout = sample(args, sd, sd.unet, sd.encode(own_prompts[rows]), drawn)
                replay.trajectory[slot, rows] = rollout.trajectory
                replay.log_prob[slot, rows] = rollout.log_prob
                images.append(sd.decode(rollout.trajectory[:, -1]))
                reward_function.start(images[-1], own_prompts[rows])
            replay.prompt[slot] = torch.tensor(chosen)
            replay.has_pre_noise[slot] = False

        # Reward r(x_0, z).
        with run.timer("reward"):
            rewards = reward_function(torch.cat(images), own_prompts)
            replay.reward[slot] = rewards.clamp(min=0) if args.reward_filter else rewards
            if iteration == 0:  # else all advantages have one sign until V has learned the mean
                mean = run.gather(replay.reward[slot], m).double().sum().item() / m
                torch.nn.init.constant_(value_function.out.bias, mean)

        # Value function: one update (Eq. 24).
        with run.timer("train"):
            if args.value_function:
                for batch in range(VALUE_BATCHES):
                    generator = seeded(args.seed, VALUE, iteration, batch)
                    count, transitions = replay.draw(args.value_batch_size, slots, generator)
                    transition_prompts = replay.prompts_of(prompts, transitions)
                    if not transition_prompts:  # all of them are other ranks'
                        continue
                    s, i, j = transitions
                    x_t, pooled = replay.trajectory[s, i, j], sd.pooled(transition_prompts)
                    value = value_function(x_t, j.to(run.device), pooled)
                    squared_error = (replay.reward[s, i] - value) ** 2
                    value_loss = squared_error.sum() / count / VALUE_BATCHES  # Eq. 24
                    run.backward(value_loss)
                    run.add("loss/value", value_loss)
                run.step(value_optimizer, metric="grad_norm/value")

            # Policy: gradient_steps updates on batch_size transitions each (Eq. 9, 26).
            optimizer.param_groups[0]["lr"] = cooled_learning_rate(args, iteration)
            generators = [
                seeded(args.seed, UPDATES, iteration, k) for k in range(args.gradient_steps)
            ]
            batches = [replay.draw(args.batch_size, slots, generator) for generator in generators]
            all_drawn = torch.cat([transitions for _, transitions in batches], dim=1)
            replay.predict_pretrained(args, sd, prompts, all_drawn)
            for update, (count, transitions) in enumerate(batches):
                transition_prompts = replay.prompts_of(prompts, transitions)
                steps = transitions[2].to(run.device)
                is_newest = (transitions[0] == slot).to(run.device)
                for rows in micro_batches(len(transition_prompts), sd.batch_size):
                    s, i, j = transitions[:, rows]
                    t, text = sd.timesteps[steps[rows]], sd.encode(transition_prompts[rows])
                    x_t, x_prev = replay.trajectory[s, i, j], replay.trajectory[s, i, j + 1]
                    pre_prediction = replay.pre_noise[s, i, j]
                    prediction = guided_noise(args, sd, sd.unet, x_t, t, text)
                    step = ddim_step_with_logprob(
                        sd.scheduler, prediction, t, x_t, args.eta, prev_sample=x_prev
                    )
                    pre_mean, _ = ddim_mean_and_std(sd.scheduler, pre_prediction, t, x_t, args.eta)

                    advantages = replay.reward[s, i]
                    if args.value_function:
                        value = value_function(
                            x_t, steps[rows], sd.pooled(transition_prompts[rows])
                        )
                        advantages = advantages - value.detach()  # Eq. 22
                    ratio = torch.exp(step.log_prob - replay.log_prob[s, i, j])  # Eq. 25
                    clipped = ratio.clamp(1 - args.clip_range, 1 + args.clip_range)
                    rewarded = steps[rows] < args.rewarded_share * T
                    policy_loss = -args.alpha * advantages * clipped * rewarded  # Eq. 26
                    kl = ddim_step_kl(step.mean, pre_mean, step.std)  # Eq. 7
                    penalty = kl
                    if args.kl == "released":
                        penalty = ((prediction - pre_prediction) ** 2).flatten(1).mean(1)
                    # The mean over transitions, where Eq. 9 sums over a sample's steps.
                    loss = (policy_loss + args.beta * penalty).sum() / count
                    run.backward(loss)

                    terms = (ratio, clipped, advantages, policy_loss, penalty, kl)
                    monitor(run, args, count, to_nats, *terms)
                    if update == 0:
                        newest = (ratio - 1).abs() * is_newest[rows]
                        run.add("ratio/first_max_deviation", newest.max(), "max")
                run.step(optimizer, args.max_grad_norm)
        line = {"samples": (iteration + 1) * m, "reward": run.gather(rewards, m)}
        run.log(line, warn_above={"ratio/first_max_deviation": args.clip_range})


if __name__ == "__main__":
    main()
