"""How sft_kl.py's three weightings share out the loss over the timesteps.

python -m benchmarks.sft_weights    writes benchmarks/results/sft_weights.json

A model that predicts eps equally well everywhere has |x_0 - f|^2 proportional to (1 - abar_t) / abar_t; the share of
a tenth of the timesteps is that of weight times this error.
"""

import json

import torch
from diffusers import DDPMScheduler

from benchmarks.zoo_eval import ROOT
from sft_kl import step_weights


def main():
    # Stable Diffusion v1.5's noise schedule; the zoo's is the same.
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    t = torch.arange(1, 1000)
    alpha = scheduler.alphas_cumprod[t].double()
    results = {}
    for weighting in ("paper", "bound", "simple"):
        share = step_weights(scheduler, t, weighting).double() * (1 - alpha) / alpha
        share = share / share.sum()
        results[weighting] = [round(part.sum().item(), 4) for part in share.tensor_split(10)]
        print(weighting, *(f"{part:.1%}" for part in results[weighting]))
    (ROOT / "benchmarks/results/sft_weights.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
