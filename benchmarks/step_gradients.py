"""How loudly each denoising step speaks in the policy gradient: |d mu / d prediction| / sigma_t,
squared, as shares.

The gradient of log p(x_{t-1} | x_t) with respect to what the UNet predicts is
(z / sigma_t) d mu / d prediction with z standard normal, so these are the steps' shares of the
gradient's variance as far as the sampler alone decides.

python -m benchmarks.step_gradients        writes benchmarks/results/step_gradients.json
"""

import json

import torch
from diffusers import DDIMScheduler

from benchmarks.zoo_eval import NUM_INFERENCE_STEPS, ROOT
from common.scheduler import ddim_step_with_logprob

SD_V1 = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
SD_V1 |= {"set_alpha_to_one": False, "clip_sample": False}


def shares(scheduler: DDIMScheduler, num_inference_steps: int) -> dict[int, dict[str, float]]:
    """For each timestep with noise: sigma_t, |d mu / d prediction| / sigma_t, and its share of the
    sum of squares."""
    scheduler.set_timesteps(num_inference_steps)
    prediction = torch.zeros(1, 1, 1, 1, requires_grad=True)
    rows = {}
    for t in scheduler.timesteps:
        step = ddim_step_with_logprob(
            scheduler, prediction, t[None], torch.ones(1, 1, 1, 1), 1.0, noise=prediction
        )
        if step.std.item() > 0:
            slope = torch.autograd.grad(step.mean.sum(), prediction)[0].abs().item()
            rows[int(t)] = {"sigma": step.std.item(), "slope_over_sigma": slope / step.std.item()}
    total = sum(row["slope_over_sigma"] ** 2 for row in rows.values())
    return {t: row | {"share": row["slope_over_sigma"] ** 2 / total} for t, row in rows.items()}


def main():
    zoo = DDIMScheduler.from_pretrained(ROOT / "zoo/sd/scheduler")
    results = {
        "SD v1.5": shares(DDIMScheduler(**SD_V1), 50),  # as the papers
        "zoo": shares(zoo, NUM_INFERENCE_STEPS),
    }
    (ROOT / "benchmarks/results/step_gradients.json").write_text(
        json.dumps(results, indent=2) + "\n"
    )
    for name, rows in results.items():
        print(f"\n{name}\n| t | sigma_t | slope / sigma_t | share |\n|---|---|---|---|")
        for t, row in rows.items():
            print(
                f"| {t} | {row['sigma']:.3f} | {row['slope_over_sigma']:.2f} | {row['share']:.1%} |"
            )


if __name__ == "__main__":
    main()
