"""An iteration of a script against the bare UNet calls in it, in one process.

python -m benchmarks.throughput dpok.py ddpo.py large_scale_ppo.py          the zoo's preset
python -m benchmarks.throughput dpok.py --layout sd-v1-5 --dtype fp16       SD v1.5's shape
python -m benchmarks.throughput --count dpok.py --layout sd-v1-5            run nothing, count

The script's own main() runs, with hooks from outside. After every iteration the UNet calls that it
made are repeated bare, in the same order: the same UNet with its LoRA, the same shapes and dtype,
with a backward pass where the iteration has one. Bare is that alone, without text encoder, VAE,
reward, log-probs, optimizer and metrics. The pretrained model's predictions are among the calls:
the losses of dpok.py and sft_kl.py need them, elsewhere they are a metric, which --no-monitor-kl
leaves out. So are rows that fill a micro-batch up; "rows_demanded" has what the equations ask.

An iteration is compared with the bare calls before and after it, so that a drift of the machine
cancels. The first iteration warms up. Results are added to benchmarks/results/throughput.json.
"""

import gc
import importlib
import json
import os
import resource
import shlex
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple
from unittest.mock import patch

import torch
import tyro
from diffusers import UNet2DConditionModel

from benchmarks import count
from benchmarks.layouts import LAYOUTS, in_place_of
from benchmarks.run import ROOT, add_result
from common import stable_diffusion
from common.stable_diffusion import DTYPES, StableDiffusion
from harness import Run

# An iteration of random weights has few samples and steps: a GPU is paid by the second.
SHORT = "--num-inference-steps 5 --lora-rank 4 --micro-batch-size 8"
REWARD = "benchmarks/random_image_reward.py:score"
OF_ONE_REWARD = (
    f"{SHORT} --samples-per-iteration 16 --prompts-file prompts/zoo.txt --reward {REWARD}"
)
PRETRAINING = "--pretrain-data zoo/pairs.py:biased --pretrain-batch-size 16"
FLAGS = {
    "dpok.py": f"{OF_ONE_REWARD} --batch-size 16 --gradient-steps 3",
    "ddpo.py": f"{OF_ONE_REWARD} --gradient-steps 2 --timestep-fraction 0.6 --min-count 2",
    "rwr.py": f"{OF_ONE_REWARD} --shard-size 16 --batch-size 16 --gradient-steps 3",
    "sft_kl.py": f"{OF_ONE_REWARD} --dataset-size 16 --shard-size 16 --batch-size 16 "
    "--gradient-steps 3 --gamma 9",
    "large_scale_ppo.py": f"{SHORT} --tasks '{REWARD} prompts/zoo_preference.txt 4x4' "
    f"--training-timesteps 3 {PRETRAINING}",
    "raft.py": f"{OF_ONE_REWARD} --images-per-prompt 4 --acceptance 0.25 {PRETRAINING}",
    "reward_weighted.py": f"{OF_ONE_REWARD} --images-per-prompt 4 --watched-prompts 1 "
    f"{PRETRAINING}",
    "refl.py": f"{OF_ONE_REWARD} --most-steps-left 3 {PRETRAINING}",
    "draft.py": f"{OF_ONE_REWARD} --num-noise 1",
}


@dataclass
class Args:
    scripts: tyro.conf.Positional[tuple[str, ...]]
    """Scripts, one after the other."""
    layout: Literal[tuple(LAYOUTS)] = "zoo"
    """The zoo with its preset, or random weights of a shape with few samples and steps."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """As the scripts' --dtype."""
    compile: bool = False
    """As the scripts' --compile."""
    flags: str = ""
    """More flags for the scripts, in one word: --flags="--eta 1"."""
    repeats: int = 5
    """Iterations that are measured."""
    count: bool = False
    """Run nothing: print what is counted (benchmarks/count.py)."""
    output: Path = ROOT / "benchmarks/results/throughput.json"


class Call(NamedTuple):
    """Of a UNet."""

    network: torch.nn.Module
    latents: torch.Size
    text: torch.Size
    dtype: torch.dtype
    trained: bool

    @property
    def cost(self) -> int:
        """About, in predictions of one row: a backward pass takes twice as long as a forward."""
        return self.latents[0] * (3 if self.trained else 1)


class Probe:
    """Hooks around a script's main(): its UNet calls, the times of its parts, bare calls between.

    `iterations` are those after the first; `bare` are (cost, seconds) after the first and after
    each of them.
    """

    def __init__(self):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.iterations, self.bare, self.args = [], [], None
        self.calls, self.spans, self.began = [], [], None

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextmanager
    def span(self, name: str):
        """Time of a block, on a GPU by events, which wait for nothing."""
        marks = []
        for end in (False, True):
            if self.device.type == "cuda":
                marks.append(torch.cuda.Event(enable_timing=True))
                marks[-1].record()
            else:
                marks.append(time.perf_counter())
            if not end:
                yield
        self.spans.append((name, *marks))

    def seconds_of_spans(self) -> dict[str, float]:
        seconds = defaultdict(float)
        for name, begin, end in self.spans:
            on_gpu = self.device.type == "cuda"
            seconds[name] += begin.elapsed_time(end) / 1000 if on_gpu else end - begin
        return seconds

    @contextmanager
    def installed(self):
        call, decode, timer, log = (
            torch.nn.Module.__call__,
            StableDiffusion.decode,
            Run.timer,
            Run.log,
        )

        def recorded_call(network, latents, t, text, **options):
            output = call(network, latents, t, text, **options)
            trained = output[0].requires_grad
            self.calls.append(Call(network, latents.shape, text.shape, latents.dtype, trained))
            return output

        def timed_decode(sd, latents):
            with self.span("decode"):
                return decode(sd, latents)

        @contextmanager
        def timed(run, name):
            if self.began is None:  # what comes before the first block is no part of an iteration
                self.calls.clear()
                self.began = self.now()
            with timer(run, name), self.span(name):
                yield

        def log_and_repeat(run, metrics, **options):
            log(run, metrics, **options)
            self.end_iteration(run)

        with ExitStack() as stack:
            for owner, name, hook in (
                (UNet2DConditionModel, "__call__", recorded_call),
                (StableDiffusion, "decode", timed_decode),
                (Run, "timer", timed),
                (Run, "log", log_and_repeat),
            ):
                stack.enter_context(patch.object(owner, name, hook, create=True))
            load = in_place_of(stable_diffusion.load_pipeline, self.device)
            stack.enter_context(patch.object(stable_diffusion, "load_pipeline", load))
            yield

    def end_iteration(self, run: Run) -> None:
        """Note what it took, and repeat its calls."""
        whole, calls, first = self.now() - self.began, list(self.calls), not self.bare
        if not first:
            self.iterations.append(
                {"s": whole, "calls": calls, "peak_gib": self.peak()}
                | {"parts": self.seconds_of_spans()}
            )
        self.args = run._args
        self.bare.append((sum(call.cost for call in calls), self.repeat(calls)))
        self.calls.clear()
        self.spans.clear()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.began = self.now()

    def peak(self) -> float:
        """GiB: on a GPU of the iteration, on a CPU of the process so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / count.GIB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / count.GIB

    def repeat(self, calls: list[Call]) -> float:
        """Seconds of the bare calls."""
        inputs = {call[1:4]: None for call in calls}
        for latents, text, dtype in inputs:
            draw = partial(torch.randn, device=self.device, dtype=dtype)
            t = torch.full((latents[0],), 500, device=self.device)
            inputs[latents, text, dtype] = draw(latents), t, draw(text)
        forward, began = torch.nn.Module.__call__, self.now()
        for call in calls:
            latents, t, text = inputs[call[1:4]]
            with torch.set_grad_enabled(call.trained):
                output = forward(call.network, latents, t, text, return_dict=False)[0]
            if call.trained:
                output.backward(torch.ones_like(output))
        seconds = self.now() - began
        for network in {call.network for call in calls}:
            for weight in network.parameters():
                weight.grad = None
        return seconds

    def ratios(self) -> list[float]:
        """Of each iteration to its bare calls, by those before and after it."""
        found = []
        for iteration, before, after in zip(self.iterations, self.bare, self.bare[1:]):
            # In dpok.py one iteration may have a few calls more than the next.
            bare = (before[1] * after[0] / before[0] + after[1]) / 2
            found.append(iteration["s"] / bare)
        return found


def run_main(script: str, words: list[str]) -> list[dict]:
    """The script's main(), and the lines of its metrics."""
    module = importlib.import_module(script.removesuffix(".py"))
    with tempfile.TemporaryDirectory() as folder, patch.object(sys, "argv", [script, *words]):
        sys.argv += ["--output-dir", f"{folder}/run", "--save-every", "1000000"]
        module.main()
        lines = (Path(folder) / "run/metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]


def matmul_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The rate of a large product of matrices: the best of five tries."""
    size, seconds = 8192 if device.type == "cuda" else 1024, []
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        c = a @ b
        c[0, 0].item()
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds) / 1e12


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "lowest": min(values), "highest": max(values)}


def words_for(script: str, args: Args) -> list[str]:
    """The command line of a script."""
    words = ["zoo"]
    if args.layout != "zoo":
        words = [*shlex.split(FLAGS[script]), "--model", f"random/{args.layout}"]
    words += ["--dtype", args.dtype, *(["--compile"] if args.compile else [])]
    return [*words, *shlex.split(args.flags)]


def measure(script: str, args: Args) -> dict:
    """A result: the ratio, seconds of the parts, rates, memory, and what was called."""
    probe, words = Probe(), words_for(script, args)
    gc.collect()  # networks of the script before
    os.environ["LAYOUT"] = args.layout
    with probe.installed():
        lines = run_main(script, [*words, "--num-iterations", str(args.repeats + 1)])
    parts = defaultdict(list)
    for iteration in probe.iterations:
        seconds = iteration.pop("parts")
        sampling, decoding = seconds["sample"], seconds["decode"]
        training = seconds["train"] + seconds["pretrain"]
        parts["sampling_s"].append(sampling - decoding)
        parts["decoding_s"].append(decoding)
        parts["reward_s"].append(seconds["reward"])
        parts["training_s"].append(training)
        parts["rest_s"].append(iteration["s"] - sampling - seconds["reward"] - training)
    calls = [call for iteration in probe.iterations for call in iteration["calls"]]
    per, g = 1 / len(probe.iterations), 2 if probe.args.guidance_scale > 1 else 1
    rows = {"sampled": 0, "trained": 0}
    for call in calls:
        rows["trained" if call.trained else "sampled"] += call.latents[0] * per
    demanded = count.demands(script, probe.args, args.layout)
    unet = count.unet_costs(args.layout, args.dtype, probe.args.lora_rank, False, g)
    flops = rows["sampled"] * unet["predict"]["flops"] + rows["trained"] * unet["train"]["flops"]
    bare = median(seconds for _, seconds in probe.bare)
    whole = median(iteration["s"] for iteration in probe.iterations)
    peak = matmul_tflops(probe.device, DTYPES[args.dtype])
    off_by = [line.get("ratio/first_max_deviation", 0) for line in lines]
    return {
        "device": device_name(),
        "torch": torch.__version__,
        "flags": shlex.join(words),
        "ratio": spread(probe.ratios()),
        "iteration_s": spread([iteration["s"] for iteration in probe.iterations]),
        "bare_s": spread([seconds for _, seconds in probe.bare[1:]]),
        "parts": {name: spread(values) for name, values in parts.items()},
        "images_a_second": demanded["samples"] / whole,
        "transitions_a_second": demanded["train"] / g / whole,
        "rows": rows,
        "rows_demanded": demanded,
        "peak_gib": max(iteration["peak_gib"] for iteration in probe.iterations),
        "counted": count.memory(
            probe.args, args.layout, demanded["pictures"], demanded["stored_latents"]
        ),
        "matmul_tflops": peak,
        "share_of_matmul": flops / g / bare / 1e12 / peak,
        "updates_skipped": sum(line["updates/skipped"] for line in lines),
        "first_ratio_off_by": max(off_by),
        "first_ratio_off_by_iteration": off_by,
        "kl": [line["kl/pretrained"] for line in lines if "kl/pretrained" in line],
    }


def main(args: Args) -> None:
    for script in args.scripts:
        if args.count:
            print(json.dumps(count.count(script, args.layout, words_for(script, args)), indent=2))
            continue
        result = measure(script, args)
        name = f"{script} {args.layout} {args.dtype}{' compile' if args.compile else ''}"
        words = [name, *([args.flags] if args.flags else []), result["device"]]
        add_result(args.output, ", ".join(words), result)
        ratio = result["ratio"]
        of = f"{ratio['median']:.3f} ({ratio['lowest']:.3f} to {ratio['highest']:.3f})"
        print(f"{name}: {of} times the bare calls", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
