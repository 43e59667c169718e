"""How sft_kl.py's three weightings share out the loss over the timesteps.

python -m benchmarks.sft_weights    writes benchmarks/results/sft_weights.json

A model that predicts eps equally well everywhere has |x_0 - f|^2 proportional to
(1 - abar_t) / abar_t; the share of a tenth of the timesteps is that of weight times this error.
"""

import json

import torch
from diffusers import DDPMScheduler

from benchmarks.zoo_eval import ROOT


def step_weights(alphas: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
    """By --weighting the weights (B,) of |x_0 - f|^2 at steps t >= 1 (B,).

    alphas (1000,) are the schedule's cumulative products; the UNet predicts eps.
    """
    alpha, alpha_prev = alphas[t], alphas[t - 1]
    beta = 1 - alpha / alpha_prev
    variance = (1 - alpha_prev) / (1 - alpha) * beta
    factor = alpha_prev.sqrt() * beta / (1 - alpha)  # of x_0 in the posterior's mean
    return {
        "paper": 1 / (2 * variance),
        "bound": factor**2 / (2 * variance),
        "simple": alpha / (1 - alpha),
    }


def main():
    # Stable Diffusion v1.5's noise schedule; the zoo's is the same.
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    alphas, t = scheduler.alphas_cumprod.double(), torch.arange(1, 1000)
    results = {}
    for weighting, weights in step_weights(alphas, t).items():
        share = weights * (1 - alphas[t]) / alphas[t]
        share = share / share.sum()
        results[weighting] = [round(part.sum().item(), 4) for part in share.tensor_split(10)]
        print(weighting, *(f"{part:.1%}" for part in results[weighting]))
    (ROOT / "benchmarks/results/sft_weights.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
