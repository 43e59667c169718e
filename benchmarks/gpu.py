"""All that is measured on a GPU, in one command of under ten minutes.

python -m benchmarks.gpu              writes benchmarks/results/gpu.json after every part
python -m benchmarks.gpu --tiny       the same way on a CPU, with tiny networks, for the test; with
                                      bf16 in place of fp16, for which a CPU has no fast kernels

All scripts run at SD v1.5's shape with random weights (benchmarks/throughput.py) in fp16, one of
them in bf16 and fp32, compiled and with all weights, and one finds its micro-batch. A prediction
with a graph is compared with one without, by attention kernel. NCCL runs with one rank. dpok.py
trains the zoo in fp16, whose updates and scaler are seen there. Each part is a process of its own
with a limit of seconds: what a part breaks, the others do not notice, and what no longer fits is
left out with a line that says so.
"""

import multiprocessing
import os
import socket
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
import torch._dynamo
import torch.distributed as dist
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import throughput
from benchmarks.count import SCRIPTS
from benchmarks.layouts import make_pipeline
from benchmarks.run import ROOT, add_result
from common.stable_diffusion import DTYPES, make_trainable
from harness import Run
from harness.stop import join_ranks

RABBIT = ["zoo", "--prompt", "A green colored rabbit", "--micro-batch-size", "auto"]
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
ATTENTION = {
    "all": [SDPBackend.CUDNN_ATTENTION, *FUSED, SDPBackend.MATH],
    "all but cuDNN": [*FUSED, SDPBackend.MATH],
    "not fused": [SDPBackend.MATH],
}
"""Kernels that torch may choose from."""
KEPT = ("iteration", "reward/mean", "kl/pretrained", "grad_norm", "updates/skipped")
KEPT += ("ratio/first_max_deviation", "time/sample_s", "time/reward_s", "time/train_s")


@dataclass
class Args:
    seconds: float = 560
    """Of all parts together."""
    tiny: bool = False
    """Tiny networks, one script and no limit for a part, for the test; nothing is compiled."""
    parts: tuple[str, ...] = ()
    """Of PARTS; all when none is named."""
    output: Path = ROOT / "benchmarks/results/gpu.json"


def scripts(
    dtype: str,
    args: Args,
    seconds: float,
    compile: bool = False,
    names: tuple[str, ...] = SCRIPTS,
    flags: str = "",
) -> None:
    """Scripts in a precision: ratio to the bare calls, and peak of memory beside the count."""
    began, longest = time.perf_counter(), 0.0
    settings = {"dtype": dtype, "compile": compile, "output": args.output, "flags": flags}
    settings |= {"layout": "sd-v1-5", "repeats": 2}
    if args.tiny:
        settings |= {"layout": "tiny", "repeats": 1}
        settings["flags"] += " --num-inference-steps 3 --micro-batch-size 16"
        torch._dynamo.config.disable = True
    for script in names[:1] if args.tiny else names:
        began_script = time.perf_counter()
        left = seconds - (began_script - began)
        if left < longest:
            print(f"{script}, {dtype}, is left out: {left:.0f} s are left, it takes {longest:.0f}")
            continue
        try:
            throughput.main(throughput.Args((script,), **settings))
        except SystemExit as end:
            print(f"{script}, {dtype}, has ended with {end.code}", flush=True)
        longest = max(longest, time.perf_counter() - began_script)


def zoo(dtype: str, args: Args, seconds: float) -> None:
    """20 iterations of dpok.py, as README's job: does the reward rise, does the scaler settle?"""
    iterations = 1 if args.tiny else 20
    began = time.perf_counter()
    words = [*RABBIT, "--dtype", dtype, "--num-iterations", str(iterations)]
    if args.tiny:
        words += ["--samples-per-iteration", "4", "--batch-size", "8"]
    lines = throughput.run_main("dpok.py", words)
    result = {"s": time.perf_counter() - began, "lines": [kept(line) for line in lines]}
    add_result(args.output, f"zoo, {dtype}", result)


def kept(line: dict) -> dict:
    return {name: line[name] for name in KEPT if name in line}


def nccl(dtype: str, args: Args, seconds: float) -> None:
    """Two iterations of dpok.py in which a single rank sums and gathers as one of several does.

    In the environment that torchrun gives to a rank.
    """
    make = Run.__init__
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}

    def join_and_make(run, *words, **options):
        join_ranks(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        make(run, *words, **options)

    def all_sum(run, values):
        dist.all_reduce(values)
        return values

    words = [*RABBIT, "--samples-per-iteration", "4", "--batch-size", "8"]
    words += ["--num-iterations", "2", "--dtype", dtype]
    with patch.multiple(Run, __init__=join_and_make, _all_sum=all_sum):
        lines = throughput.run_main("dpok.py", words)
    result = {"backend": dist.get_backend(), "lines": [kept(line) for line in lines]}
    add_result(args.output, "one rank", result)
    dist.destroy_process_group()


def rounding(dtype: str, args: Args, seconds: float) -> None:
    """Largest change of a prediction of 16 rows, by attention kernel.

    With a graph against without; and of each row against the same row at another place.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unet = make_pipeline("tiny" if args.tiny else "sd-v1-5", device).unet
    make_trainable(unet, device, dtype, lora_rank=4)
    side, width = unet.config.sample_size, unet.config.cross_attention_dim
    draw = partial(torch.randn, device=device, dtype=DTYPES[dtype])
    latents, text = draw(16, 4, side, side), draw(16, 77, width)
    t = torch.full((16,), 500, device=device)
    predict = lambda order: unet(latents[order], t, text[order], return_dict=False)[0].float()
    forwards, result = torch.arange(16), {}
    for name, kernels in ATTENTION.items():
        with sdpa_kernel(kernels):
            with torch.no_grad():
                sampled, elsewhere = predict(forwards), predict(forwards.flip(0)).flip(0)
            trained = predict(forwards).detach()
        result[name] = {
            "with a graph": (trained - sampled).abs().max().item(),
            "at another place": (elsewhere - sampled).abs().max().item(),
        }
    add_result(args.output, f"rounding, {dtype}", result | {"std": sampled.std().item()})


ONE = partial(scripts, names=("ddpo.py",))
AUTO = partial(scripts, names=("dpok.py",), flags="--micro-batch-size auto")
ALL_WEIGHTS = partial(scripts, names=("ddpo.py",), flags="--lora-rank 0")
PARTS = {
    "fp16": (scripts, "fp16", 250),
    "rounding": (rounding, "fp16", 40),
    "auto": (AUTO, "fp16", 60),
    "all weights": (ALL_WEIGHTS, "fp16", 60),
    "bf16": (ONE, "bf16", 60),
    "fp32": (ONE, "fp32", 80),
    "compile": (partial(ONE, compile=True), "fp16", 180),
    "nccl": (nccl, "fp16", 50),
    "zoo": (zoo, "fp16", 80),
}
"""With the precision, and the seconds that each may take."""


def main(args: Args) -> None:
    # A forked process has nothing to import, and cannot use a GPU if this one has looked for it.
    context = multiprocessing.get_context("fork" if args.tiny else "spawn")
    began = time.perf_counter()
    for name in args.parts or PARTS:
        part, dtype, limit = PARTS[name]
        dtype = "bf16" if args.tiny and dtype == "fp16" else dtype
        left = args.seconds - (time.perf_counter() - began)
        limit = left if args.tiny else min(limit, left)
        if limit < 20:
            print(f"{name} is left out: {limit:.0f} s are left", flush=True)
            continue
        began_part = time.perf_counter()
        child = context.Process(target=part, args=(dtype, args, limit))
        child.start()
        child.join(limit)
        end = "failed" if child.exitcode else "done"
        if child.exitcode is None:
            end = "ended, as it took too long"
            child.kill()
            child.join()
        seconds = time.perf_counter() - began_part
        add_result(args.output, f"part {name}", {"end": end, "s": seconds})
        print(f"{name}: {end}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
