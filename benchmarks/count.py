"""What an iteration asks of a machine, counted without running it: work, weights, memory.

python -m benchmarks.count              the tables of docs/performance.md, into results/count.json
python -m benchmarks.throughput --count dpok.py --layout sd-v1-5 --flags="--micro-batch-size 1"

FLOPs and memory are those of fake tensors, of which no number is computed. "Kept" is what lives
from the forward pass to the backward pass, "peak" the most that lives at once, both beside weights
and gradients. Not in them: the allocator's gaps, CUDA's own memory, what a kernel needs while it
runs. Rows of the UNet follow from the algorithms' equations; with guidance a sample has two.
"""

import importlib
import itertools
import json
import weakref
from functools import cache
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)
from transformers import PreTrainedModel

from benchmarks.layouts import (
    LAYOUTS,
    make_image_reward,
    make_text_encoder,
    make_unet,
    make_vae,
    scheduler_config,
)
from benchmarks.run import ROOT
from common.lora import LoRAAttnProcessor, add_lora
from common.rewards.base import BATCH
from common.scheduler import steps_with_noise
from common.stable_diffusion import DTYPES, PIXELS_AT_ONCE, ddim_scheduler
from harness.args import parse_args
from harness.memory import LARGE, even_size
from harness.tasks import read_tasks

GIB, MICRO_BATCH = 1 << 30, 8
# refl.py and draft.py also keep what the backward pass of VAE and reward needs, not counted here.
SCRIPTS = ("dpok.py", "ddpo.py", "rwr.py", "sft_kl.py", "large_scale_ppo.py")
SCRIPTS += ("raft.py", "reward_weighted.py", "refl.py", "draft.py")
# torch knows the work of a GPU's attention only.
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **options: (
        sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *rest, **options: sdpa_backward_flop_count(grad, q, k, v)
    ),
}


class Live(TorchDispatchMode):
    """Bytes of the storages that are made in it and live now, and the most that lived at once."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {id(x.untyped_storage()) for x in tensors((args, kwargs))}
        result = function(*args, **(kwargs or {}))
        for x in tensors(result):
            storage = x.untyped_storage()
            if id(storage) in self.known or id(storage) in before:
                continue  # a view
            self.known.add(id(storage))
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.forget, id(storage), storage.nbytes())
        return result

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def tensors(values) -> list[torch.Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


def cost(call, backward: bool = False) -> dict[str, float]:
    """FLOPs, bytes kept and bytes at the peak of call(), with its backward pass or without."""
    flops = FlopCounterMode(display=False, custom_mapping=ATTENTION)
    with flops, torch.set_grad_enabled(backward), Live() as live:
        output = call()
        kept = live.now
        if backward:
            output.backward(torch.zeros_like(output))
    return {"flops": flops.get_total_flops(), "kept": kept, "peak": live.peak}


def under_autocast(unet: torch.nn.Module, dtype: torch.dtype) -> None:
    """As a GPU has it: norms in float32, where a CPU's are in dtype."""
    for module in unet.modules():
        if isinstance(module, torch.nn.GroupNorm | torch.nn.LayerNorm):
            module.forward = lambda x, norm=module.forward: norm(x.float())
    unet.forward = torch.autocast("cpu", dtype)(unet.forward)


@cache
def unet_costs(layout: str, dtype: str, lora_rank: int, checkpointing: bool, rows: int) -> dict:
    """Parameters, those that are trained, and the costs of a prediction and of a training pass.

    Of a batch of so many rows. As common.stable_diffusion.make_trainable: with a LoRA the frozen
    weights are in dtype, without one they are float32 and the pass is under autocast.
    """
    with FakeTensorMode():
        torch.set_default_dtype(DTYPES[dtype] if lora_rank else torch.float32)
        unet = make_unet(layout)
        torch.set_default_dtype(torch.float32)
        own = sum(p.numel() for p in unet.parameters())
        weights = list(unet.parameters())
        if lora_rank:
            # A fake module cannot be moved; this one is float32 and on the CPU already.
            with patch.object(LoRAAttnProcessor, "to", lambda processor, *args: processor):
                weights = add_lora(unet, lora_rank)
        elif dtype != "fp32":
            under_autocast(unet, DTYPES[dtype])
        if checkpointing:
            unet.enable_gradient_checkpointing()
        for weight in weights:  # so that they are no part of the peak
            weight.grad = torch.zeros_like(weight)
        c, side = unet.config.in_channels, unet.config.sample_size
        length = LAYOUTS[layout]["text_encoder"]["max_position_embeddings"]
        shapes = (rows, c, side, side), (rows, length, unet.config.cross_attention_dim)
        latents, text = (torch.zeros(s, dtype=unet.conv_in.weight.dtype) for s in shapes)
        t = torch.zeros(rows, dtype=torch.long)
        predict = lambda: unet(latents, t, text, return_dict=False)[0]
        return {
            "parameters": own,
            "trained": sum(p.numel() for p in weights),
            "predict": cost(predict),
            "train": cost(predict, backward=True),
        }


@cache
def other_costs(layout: str, pictures: int, scored: int) -> dict[str, dict]:
    """Parameters and costs of text encoder (a prompt), VAE decoder and ImageReward, float32."""
    unet, vae = (SimpleNamespace(**LAYOUTS[layout][part]) for part in ("unet", "vae"))
    # Drawing initial weights asks for numbers.
    with FakeTensorMode(), patch.object(PreTrainedModel, "init_weights", lambda model: None):
        text_encoder, vae = make_text_encoder(layout), make_vae(layout)
        reward = make_image_reward(layout).eval()
        ids = torch.zeros(1, text_encoder.config.max_position_embeddings, dtype=torch.long)
        latents = torch.zeros(pictures, 4, unet.sample_size, unet.sample_size)
        size, length = reward.config["vision"]["image_size"], reward.config["max_length"]
        pixels, words = torch.zeros(scored, 3, size, size), torch.ones(scored, length).long()
        calls = {
            "text_encoder": (text_encoder, lambda: text_encoder(ids).last_hidden_state),
            "vae": (vae, lambda: vae.decode(latents).sample),
            "image_reward": (reward, lambda: reward(pixels, words, words)),
        }
        return {
            name: {"parameters": sum(p.numel() for p in module.parameters())} | cost(call)
            for name, (module, call) in calls.items()
        }


def demands(script: str, args, layout: str) -> dict[str, float]:
    """Rows of the UNet that an iteration's equations demand, and what a GPU holds of its rollout:
    latents in all, and pictures at a time.

    sample: the policy's own predictions, without gradient; reference: the pretrained model's, for a
    KL; train: with gradient; once: those of a data set that is drawn before the first. In dpok.py
    transitions are drawn at random, and a reference is predicted once for each: its number
    is the mean over all draws.
    """
    scheduler = ddim_scheduler(scheduler_config(layout), args.num_inference_steps)
    noisy, T = steps_with_noise(scheduler, args.eta), args.num_inference_steps
    g = 2 if args.guidance_scale > 1 else 1
    g_train = g if getattr(args, "cfg_training", True) else 1
    if script == "large_scale_ppo.py":
        sizes = [task.num_prompts * task.num_images for task in read_tasks(args)]
        m, pictures, stored = sum(sizes), max(sizes), max(sizes) * (T + 1)
        rewarded = (noisy < args.rewarded_share * T).sum().item()
        train = g * m * min(args.training_timesteps, rewarded)
    else:
        m = pictures = args.samples_per_iteration
        stored = 0  # their x_0 are on disk and in the host's memory
    monitored = g * m if getattr(args, "monitor_kl", True) else 0
    rows = {"samples": m, "sample": g * m * T, "reference": monitored, "once": 0}
    if script == "dpok.py":
        of_rollout, R = m * len(noisy), args.replay_rollouts
        drawn = min(args.batch_size, R * of_rollout)
        # A transition may be drawn in any update of the R iterations that it is kept for.
        never = (1 - drawn / (R * of_rollout)) ** (args.gradient_steps * R)
        train = g * args.gradient_steps * drawn
        rows["reference"] = g * of_rollout * (1 - never)
        stored = m * R * (2 * T + 1)
    elif script == "ddpo.py":
        rewarded = (noisy < args.rewarded_share * T).sum().item()
        train = g_train * m * max(1, round(args.timestep_fraction * rewarded))
        stored = m * (T + 1)
    elif script in ("rwr.py", "sft_kl.py"):
        train = g_train * args.gradient_steps * args.batch_size
        pictures = args.shard_size
    elif script == "raft.py":
        group = args.images_per_prompt if args.ranking == "local" else m
        accepted = m // group * max(1, round(args.acceptance * group))
        train = g_train * args.gradient_steps * accepted
    elif script == "reward_weighted.py":
        watched = min(m, args.watched_prompts * args.images_per_prompt)
        rows |= {"sample": g * (m + watched) * T, "reference": g * watched}
        train = g_train * args.gradient_steps * m
    elif script == "refl.py":
        rows["sample"] += g_train * m  # the step is taken without gradient first, for the reward
        train = g_train * m
    elif script == "draft.py":
        rows["sample"] += g * m * args.num_noise  # as there
        train = g * m * (args.truncate + args.num_noise)
    if script == "sft_kl.py":
        rows["once"] = g * args.dataset_size * T
        rows["reference"] += train if args.regularization == "kl-o" else 0
    if getattr(args, "pretrain_beta", 0):
        # In large_scale_ppo.py and refl.py it has one update of its own.
        updates = args.gradient_steps if script in ("raft.py", "reward_weighted.py") else 1
        train += args.pretrain_batch_size * updates
    return rows | {"train": train, "stored_latents": stored, "pictures": pictures}


def memory(args, layout: str, pictures: int, stored_latents: int) -> dict[str, float]:
    """GiB on a GPU: what stays there, and what each part of an iteration needs beside it.

    VAE, text encoder and ImageReward stay on the GPU all the time, in float32. `pictures` are those
    of the largest rollout.
    """
    N = MICRO_BATCH if args.micro_batch_size == "auto" else args.micro_batch_size
    N, g = even_size(pictures, N), 2 if args.guidance_scale > 1 else 1
    unet = unet_costs(layout, args.dtype, args.lora_rank, args.gradient_checkpointing, g * N)
    side = LAYOUTS[layout]["unet"]["sample_size"]
    image = side * 2 ** (len(LAYOUTS[layout]["vae"]["block_out_channels"]) - 1)
    others = other_costs(layout, min(N, max(1, PIXELS_AT_ONCE // image**2)), min(BATCH, pictures))
    in_dtype = DTYPES[args.dtype].itemsize if args.lora_rank else 4
    copy = 4 * unet["parameters"] if not args.lora_rank else 0
    rollout = 4 * 4 * side**2 * stored_latents
    stays = {
        "unet": in_dtype * unet["parameters"],
        "lora": 4 * unet["trained"] if args.lora_rank else 0,
        "gradients": 4 * unet["trained"],
        "adamw": 8 * unet["trained"],
        "pretrained_copy": copy if getattr(args, "monitor_kl", True) else 0,
        "rollout": rollout if rollout <= LARGE else 0,  # else in the host's memory
        "pictures": 4 * 3 * image**2 * pictures,
    } | {name: 4 * others[name]["parameters"] for name in others}
    while_it_runs = {
        "sampling": unet["predict"]["peak"],
        "decoding": others["vae"]["peak"],
        "reward": others["image_reward"]["peak"],
        "training": unet["train"]["peak"],
    }
    peak = sum(stays.values()) + max(while_it_runs.values())
    sizes = stays | while_it_runs | {"kept_for_backward": unet["train"]["kept"], "peak": peak}
    return {"micro_batch": N} | {f"{name}_gib": size / GIB for name, size in sizes.items()}


def count(script: str, layout: str, words: list[str]) -> dict:
    """An iteration of a script with these words of its command line, on a model of this shape."""
    module = importlib.import_module(script.removesuffix(".py"))
    words = [*words, "--model", "zoo/sd" if layout == "zoo" else f"random/{layout}"]
    args = parse_args(module.PRESETS, module.__doc__, module.check, words)
    rows = demands(script, args, layout)
    g = 2 if args.guidance_scale > 1 else 1
    unet = unet_costs(layout, args.dtype, args.lora_rank, args.gradient_checkpointing, g)
    others = other_costs(layout, 1, 1)
    predicted = (rows["sample"] + rows["reference"]) * unet["predict"]["flops"] / g
    trained = rows["train"] * unet["train"]["flops"] / g
    a_picture = others["vae"]["flops"] + others["image_reward"]["flops"]
    drawn_once = rows["once"] / g / args.num_inference_steps
    once = rows["once"] * unet["predict"]["flops"] / g + drawn_once * a_picture
    return {
        "script": script,
        "layout": layout,
        "dtype": args.dtype,
        "lora_rank": args.lora_rank,
        "iterations": args.num_iterations,
        "parameters": unet["parameters"],
        "trained": unet["trained"],
        "rows": rows,
        "tflop": (predicted + trained + rows["samples"] * a_picture) / 1e12,
        "tflop_once": once / 1e12,
        "memory": memory(args, layout, rows["pictures"], rows["stored_latents"]),
    }


def transition(layout: str, dtype: str, rank: int, checkpointing: bool, batch: int = 1) -> dict:
    """Of the backward pass of `batch` guided predictions: a batch of 2 rows for each."""
    unet = unet_costs(layout, dtype, rank, checkpointing, 2 * batch)
    return {
        "layout": layout,
        "dtype": dtype,
        "lora_rank": rank,
        "checkpointing": checkpointing,
        "micro_batch": batch,
        "parameters": unet["parameters"],
        "trained": unet["trained"],
        "forward_tflop_a_row": unet["predict"]["flops"] / 2 / batch / 1e12,
        "training_tflop_a_row": unet["train"]["flops"] / 2 / batch / 1e12,
        "kept_gib": unet["train"]["kept"] / GIB,
    }


TRANSITIONS = [
    *(("sd-v1-5", *case) for case in itertools.product(("fp16", "fp32"), (4, 0), (False, True))),
    ("sd-v2", "fp16", 4, False),
    ("sd-v2", "fp16", 0, False),
    ("zoo", "fp32", 4, False),
    ("sd-v1-5", "fp16", 4, False, MICRO_BATCH),
]
"""The cases of `transition` that the page has."""


def iteration_cases() -> dict[str, tuple[str, str, list[str]]]:
    """The cases of `count` that the page has, by their names."""
    cases, lora = {}, ["--dtype", "fp16", "--lora-rank", "4"]
    for script, layout in itertools.product(SCRIPTS, ("sd-v1-5", "zoo")):
        words = ["zoo"] if layout == "zoo" else lora
        if script == "large_scale_ppo.py" and layout != "zoo":
            words = [*words, "--tasks", "image_reward prompts/zoo_preference.txt 128x16"]
        cases[f"{script} {layout}"] = script, layout, words
    for script, trained, rank in (("dpok.py", "LoRA", "4"), ("ddpo.py", "all weights", "0")):
        words = ["--dtype", "fp16", "--micro-batch-size", "1", "--lora-rank", rank]
        for more, name in (([], ""), (["--gradient-checkpointing"], ", checkpointing")):
            key = f"{script} sd-v1-5, {trained}, a sample at a time{name}"
            cases[key] = script, "sd-v1-5", [*words, *more]
    return cases


def main():
    results = {
        "transitions": [transition(*case) for case in TRANSITIONS],
        "iterations": {name: count(*case) for name, case in iteration_cases().items()},
    }
    path = ROOT / "benchmarks/results/count.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
