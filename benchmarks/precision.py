"""What half precision does to the log-probs and ratios of SD v1.5's UNet.

python -m benchmarks.precision              writes results/precision.json and prints a table
python -m benchmarks.precision --side 64    latents of 512 px, in place of 128

Random weights of the real shape, a LoRA of rank 4, guidance 7.5, and two of 50 steps. In each
precision the policy draws x_{t-1} by the same noise. Its log-prob is then compared with float32's,
and so is the log of the ratio once the LoRA has moved: a clip range of 1e-4 is for such ratios. On
a CPU, where float16 takes half an hour at 512 px, as no kernel there is made for it.
"""

import json
from types import SimpleNamespace

import torch
import tyro
from diffusers import UNet2DConditionModel

from benchmarks.layouts import SD_SCHEDULE, SD_V1_5
from benchmarks.zoo_eval import ROOT
from common.lora import add_lora
from common.scheduler import ddim_step_with_logprob
from common.stable_diffusion import DTYPES, ddim_scheduler

STEPS = (25, 48)
"""Of 50: the middle one, and the last but one, whose gradient is by far the largest."""
MOVE = 1e-3
"""Standard deviation of the LoRA's B after an update: the largest ratio is off by some 1e-3."""


def networks(dtype: str):
    """The same random UNet in a precision, and the LoRA's B, which are zero."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**SD_V1_5).to(DTYPES[dtype]).eval()
    weights = add_lora(unet, 4)
    return unet, weights[1::2]


@torch.no_grad()
def guided(unet, latents, t, text, w: float = 7.5) -> torch.Tensor:
    """The guided prediction (1, C, H, W), float32."""
    dtype = unet.conv_in.weight.dtype
    noise = unet(latents.repeat(2, 1, 1, 1).to(dtype), t, text.to(dtype), return_dict=False)[0]
    without_text, with_text = noise.float().chunk(2)
    return without_text + w * (with_text - without_text)


def measure(dtype: str, side: int) -> list[dict]:
    """Of each step: log-prob of what is drawn, and log of the ratio after the LoRA has moved."""
    scheduler = ddim_scheduler({"num_train_timesteps": 1000} | SD_SCHEDULE, 50)
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    text = draw(2, 77, 768)
    shape = (1, 4, side, side)
    inputs = [SimpleNamespace(j=j, x=draw(*shape), noise=draw(*shape)) for j in STEPS]
    unet, lora_B = networks(dtype)
    for step in inputs:
        step.t = scheduler.timesteps[step.j]
        output = guided(unet, step.x, step.t, text)
        step.old = ddim_step_with_logprob(scheduler, output, step.t, step.x, noise=step.noise)
    for weight in lora_B:
        weight.data = MOVE * draw(*weight.shape)
    lines = []
    for step in inputs:
        output = guided(unet, step.x, step.t, text)
        drawn = step.old.prev_sample
        new = ddim_step_with_logprob(scheduler, output, step.t, step.x, prev_sample=drawn)
        lines.append(
            {
                "t": step.t.item(),
                "mean": step.old.mean,
                "std": step.old.std.item(),
                "log_ratio": (new.log_prob - step.old.log_prob).item(),
            }
        )
    return lines


def main(side: int = 16) -> None:
    """Measure all precisions, on latents (1, 4, side, side)."""
    found = {dtype: measure(dtype, side) for dtype in ("fp32", "bf16", "fp16")}
    results = []
    print("| t | dtype | error of the mean, in sigma_t | log of the ratio | its error |")
    print("|---|---|---|---|---|")
    for k in range(len(STEPS)):
        exact = found["fp32"][k]
        for dtype in found:
            line = found[dtype][k]
            off = (line["mean"] - exact["mean"]).pow(2).mean().sqrt().item() / exact["std"]
            error = abs(line["log_ratio"] - exact["log_ratio"])
            results.append({"t": line["t"], "dtype": dtype, "mean_error_in_sigma": off})
            results[-1] |= {"log_ratio": line["log_ratio"], "log_ratio_error": error}
            print(f"| {line['t']} | {dtype} | {off:.1e} | {line['log_ratio']:.2e} | {error:.1e} |")
    path = ROOT / "benchmarks/results/precision.json"
    path.write_text(json.dumps({"side": side, "lines": results}, indent=2) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
