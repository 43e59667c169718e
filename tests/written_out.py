"""The policy of the scripts, written out again.

In float64, with LoRA merged into the weights and with torch.distributions.
"""

from functools import partial

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch.distributions import Normal

from common.stable_diffusion import PromptEncoder


def record_updates(monkeypatch) -> list:
    """Every AdamW step from now on leaves its (weight, gradient) pairs in the list."""
    recorded = []
    adamw_step = torch.optim.AdamW.step

    def step(optimizer, *args, **kwargs):
        parameters = optimizer.param_groups[0]["params"]
        recorded.append([(p.detach().clone(), p.grad.clone()) for p in parameters])
        return adamw_step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    return recorded


def record_rollouts(monkeypatch, script) -> list:
    """Every rollout of the module `script` from now on is in the list, those for pictures too."""
    recorded, sample = [], script.sample
    recorded_sample = lambda *a: recorded.append(sample(*a)) or recorded[-1]
    monkeypatch.setattr(script, "sample", recorded_sample)
    return recorded


def merged_unet(model, weights: list[torch.Tensor], w: float, prompts: list[str]):
    """With LoRA `weights` (A and B in turn): the weights as leaves, and two guided outputs.

    They are f(x_t, t, rows) with the LoRA and without; `prompts` are those of all rows, or one.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    encode = PromptEncoder(pipeline, "cpu")
    text, no_text = (encode(texts)[0] for texts in (prompts, [""]))
    unet = pipeline.unet.double()
    frozen = dict(unet.named_parameters())
    leaves = [weight.double().requires_grad_() for weight in weights]
    merged, pairs = {}, iter(zip(leaves[::2], leaves[1::2]))
    for name in unet.attn_processors:
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            key = f"{name.removesuffix('.processor')}.{projection}.weight"
            a, b = next(pairs)
            merged[key] = frozen[key].detach() + b @ a

    def guided(weights, x_t, t, rows=slice(None)):
        def run(embedding):
            of_rows = embedding if len(embedding) == 1 else embedding[rows]
            inputs = (x_t, t, of_rows.double().expand(len(x_t), -1, -1))
            return torch.func.functional_call(unet, weights, inputs).sample

        return w * run(text) + (1 - w) * run(no_text)

    return leaves, partial(guided, frozen | merged), partial(guided, frozen)


def policies(
    model,
    weights: list[torch.Tensor],
    num_steps: int,
    w: float,
    prompts: list[str],
    x_t: torch.Tensor,
    steps,
    eta: float = 1.0,
):
    """With LoRA `weights` the steps from x_t (n, C, H, W), step `steps` (n,) of `num_steps` each.

    Returns the weights as leaves, the policy and the pretrained one as Normal, and the guided noise
    of both.
    """
    scheduler = DDIMScheduler.from_pretrained(model, subfolder="scheduler")
    scheduler.set_timesteps(num_steps)
    t, x_t = scheduler.timesteps[steps], x_t.double()
    leaves, guided, guided_pre = merged_unet(model, weights, w, prompts)
    eps, eps_pre = guided(x_t, t), guided_pre(x_t, t).detach()
    alphas = scheduler.alphas_cumprod.double()
    prev_t = t - 1000 // num_steps
    a_t = alphas[t].view(-1, 1, 1, 1)
    a_prev = torch.where(prev_t >= 0, alphas[prev_t.clamp(min=0)], alphas[0]).view(-1, 1, 1, 1)
    sigma = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)).sqrt()

    def step(e):
        x_0 = (x_t - (1 - a_t).sqrt() * e) / a_t.sqrt()
        return Normal(a_prev.sqrt() * x_0 + (1 - a_prev - sigma**2).sqrt() * e, sigma)

    return leaves, step(eps), step(eps_pre), eps, eps_pre
