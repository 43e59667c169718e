"""What DDPO's gradient on the zoo consists of, step by step: how much is signal, how much is noise.

python -m benchmarks.gradient_variance      benchmarks/results/gradient_variance.json, the table of
                                            docs/notes/ddpo.md

A sample's gradient at a step is A grad log p(x_{t-1} | x_t, c) (Eq. 3), here by the weights of the
LoRA of the zoo's preset as it starts. Of n samples, |mean|^2 is estimated without bias by the mean
product of two different samples' gradients. The variance of one sample's gradient over it is how
many samples have a mean whose noise is as large as its signal: the fewer the better. Adding up the
first k steps tells which share of the steps learns from the fewest samples.
"""

import importlib
from dataclasses import dataclass, replace

import numpy as np
import torch
import tyro

from benchmarks.pages import fill, markdown_table
from benchmarks.report import save_results
from benchmarks.zoo_eval import ROOT, weights_digest
from common.rewards import load_reward
from common.scheduler import ddim_step_with_logprob, steps_with_noise
from common.stable_diffusion import load_stable_diffusion
from harness import micro_batches, seeded

ddpo = importlib.import_module("ddpo")
REWARDS = ("image_reward:zoo/image_reward", "jpeg_compressibility")
"""Incompressibility is minus the second, and has its ratios."""


@dataclass
class Args:
    samples: int = 1024
    """Of the zoo's prompts in turn, drawn by the pretrained model."""
    seed: int = 0


def draw(args, sd, prompts: list[str], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Trajectories (n, T+1, C, H, W) and pictures (n, 3, H, W)."""
    shape = (args.num_inference_steps + 1, *sd.latent_shape)
    trajectories, images = [], []
    for rows in micro_batches(len(prompts), 64):
        numbers = range(len(prompts))[rows]
        noise = torch.stack([torch.randn(shape, generator=seeded(seed, i)) for i in numbers])
        rollout = ddpo.sample(args, sd, sd.unet, sd.encode(prompts[rows]), noise)
        trajectories.append(rollout.trajectory)
        images.append(sd.decode(rollout.trajectory[:, -1]))
    return torch.cat(trajectories), torch.cat(images)


def log_prob_gradient(args, sd, trajectory, text, j: int) -> torch.Tensor:
    """Of one sample's log-prob at step j by all weights that learn, (D,)."""
    x_t, x_prev, t = trajectory[None, j], trajectory[None, j + 1], sd.timesteps[j : j + 1]
    prediction = ddpo.guided_noise(args, sd, sd.unet, x_t, t, text)
    step = ddim_step_with_logprob(sd.scheduler, prediction, t, x_t, args.eta, prev_sample=x_prev)
    return torch.cat([g.flatten() for g in torch.autograd.grad(step.log_prob.sum(), sd.weights)])


def advantages_of(rewards: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Standardised within each prompt (A.3), (n,)."""
    own = np.array(prompts)
    found = torch.empty(len(rewards), dtype=torch.float64)
    for prompt in set(prompts):
        rows = torch.from_numpy(own == prompt)
        of_prompt = rewards[rows].double()
        found[rows] = (of_prompt - of_prompt.mean()) / (of_prompt.std(correction=0) + 1e-6)
    return found


def signal_and_noise(gradients: torch.Tensor) -> dict[str, float]:
    """Of gradients (n, D): |mean|^2, the variance of one, and their ratio with a standard error.

    |mean|^2 is without bias; the error of the ratio is the jackknife's.
    """
    products = (gradients @ gradients.T).double()
    n, squares = len(products), products.diagonal()
    between = products.sum(dim=1) - squares
    signal = between.sum() / (n * (n - 1))
    noise = squares.mean() - signal
    signals = (between.sum() - 2 * between) / ((n - 1) * (n - 2))  # each sample left out once
    ratios = signals / ((squares.sum() - squares) / (n - 1) - signals)
    error = ((n - 1) / n * ((ratios - ratios.mean()) ** 2).sum()).sqrt()
    ratio = signal / noise
    values = {"signal": signal, "noise": noise, "signal_to_noise": ratio, "error": error}
    return {key: value.item() for key, value in values.items()}


def main(given: Args) -> None:
    args = replace(ddpo.PRESETS["zoo"], dtype="fp32", seed=given.seed)
    sd = load_stable_diffusion(args, torch.device("cpu"))
    lines = (ROOT / args.prompts_file).read_text().splitlines()
    prompts = [lines[i % len(lines)] for i in range(given.samples)]
    trajectory, images = draw(args, sd, prompts, given.seed)
    advantages = {
        spec: advantages_of(load_reward(spec)(images, prompts), prompts) for spec in REWARDS
    }
    steps = steps_with_noise(sd.scheduler, args.eta).tolist()
    texts = {prompt: sd.encode([prompt]) for prompt in lines}
    summed, results = 0.0, {"weights": weights_digest(), "samples": given.samples}
    results["steps"] = []
    for j in steps:
        scores = torch.stack(
            [
                log_prob_gradient(args, sd, trajectory[i], texts[prompt], j)
                for i, prompt in enumerate(prompts)
            ]
        )
        summed = summed + scores
        row = {"t": sd.timesteps[j].item()}
        for spec, of_reward in advantages.items():
            weights = of_reward.float()[:, None]
            row[spec] = {
                "alone": signal_and_noise(weights * scores),
                "to_here": signal_and_noise(weights * summed),
            }
        results["steps"].append(row)
        print(row, flush=True)
    save_results("gradient_variance", results)
    fill(ROOT / "docs/notes/ddpo.md", {"gradient": markdown_of(results)})


def markdown_of(results: dict) -> str:
    """Signal over noise of a thousand samples: of each step alone, and of all steps up to it."""
    of = lambda row, spec, key: "{:.1f} ± {:.1f}".format(
        *(1000 * row[spec][key][name] for name in ("signal_to_noise", "error"))
    )
    columns, rows = ["t"], []
    for spec in REWARDS:
        columns += [f"{spec.split(':')[0]}, alone", "steps so far"]
    for row in results["steps"]:
        cells = [of(row, spec, key) for spec in REWARDS for key in ("alone", "to_here")]
        rows.append([str(row["t"]), *cells])
    return markdown_table(columns, rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
