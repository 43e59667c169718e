"""Short runs whose results a change of the code must leave as they are, bit for bit.

python -m benchmarks.golden record FOLDER    runs all of them and keeps metrics and digests there
python -m benchmarks.golden compare FOLDER   runs them anew and names every difference

All scripts on the zoo and on a tiny model of SD v1.5's layout, on one and on two processes, whole
and resumed after one of two iterations. On one machine one process gives the same bits; metrics,
sums in float64, are held to 1e-12, and those of two processes to 1e-5. Name scripts to run theirs
alone. A metric that is new is no difference.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from benchmarks.layouts import make_pipeline
from benchmarks.zoo_eval import ROOT

SHORT = "--num-inference-steps 4 --micro-batch-size 3 --lora-rank 4 --learning-rate 1e-3"
OF_ONE_TASK = "--samples-per-iteration 7 --prompts-file prompts/zoo.txt"
OF_PROMPTS = "--samples-per-iteration 8 --images-per-prompt 4 --prompts-file prompts/zoo.txt"
PRETRAINING = "--pretrain-data zoo/pairs.py:biased --pretrain-batch-size 5"
OF_SHARDS = "--samples-per-iteration 8 --shard-size 4 --batch-size 5 --prompts-file prompts/zoo.txt"
FLAGS = {
    "dpok": f"{OF_ONE_TASK} --batch-size 9 --value-function --value-batch-size 9 --kl exact "
    "--gradient-steps 2 --replay-rollouts 2 --rewarded-share 0.5 --cooldown-share 0.5",
    "ddpo": f"{OF_ONE_TASK} --min-count 2 --gradient-steps 2 --timestep-fraction 0.75",
    "rwr": f"{OF_SHARDS} --gradient-steps 3 --inverse-temperature 2",
    "sft_kl": f"{OF_SHARDS} --dataset-size 8 --gradient-steps 3 --gamma 9",
    "raft": f"{OF_PROMPTS} {PRETRAINING} --acceptance 0.4 --gradient-steps 2",
    "reward_weighted": f"{OF_PROMPTS} {PRETRAINING} --watched-prompts 1 --gradient-steps 2",
    "refl": f"{OF_ONE_TASK} {PRETRAINING} --most-steps-left 3",
    "draft": f"{OF_ONE_TASK} --num-noise 1",
    "large_scale_ppo": f"{PRETRAINING} --training-timesteps 2 --tasks",
}
WITH_GRADIENT = ("refl", "draft")
TASKS = ["REWARD prompts/zoo_preference.txt 2x3", "jpeg_compressibility prompts/zoo.txt 3x2"]


@dataclass
class Args:
    what: tyro.conf.Positional[Literal["record", "compare"]]
    """Keep the results, or compare with them."""
    folder: tyro.conf.Positional[Path]
    """Where they are kept."""
    scripts: tyro.conf.Positional[tuple[str, ...]] = tuple(FLAGS)
    """Scripts to run."""


def run(script: str, model: str, ranks: int, resumed: bool, folder: Path) -> dict:
    """Metrics without times, and the digest of the LoRA, of one run."""
    words = f"{SHORT} {FLAGS[script]}".split()
    words += ["--model", model, "--guidance-scale", "2", "--output-dir", str(folder)]
    reward = "image_reward:zoo/image_reward"
    if model != "zoo/sd" and script not in WITH_GRADIENT:
        reward = "jpeg_incompressibility"
    if script == "large_scale_ppo":
        at = words.index("--tasks") + 1
        words[at:at] = [task.replace("REWARD", reward) for task in TASKS]
    else:
        words += ["--reward", reward]
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    parts = [[*words, "--num-iterations", "2"]]
    if resumed:
        parts = [[*words, "--num-iterations", "1"]]
        parts += [["--resume", str(folder), "--num-iterations", "2"]]
    for part in parts:
        command = [*launcher, f"{script}.py", *part]
        subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    weights = (folder / "pytorch_lora_weights.safetensors").read_bytes()
    return {"metrics": metrics, "lora": hashlib.sha256(weights).hexdigest()}


def differences(before: dict, after: dict, exact: bool) -> list[str]:
    """Names of what differs between two results of `run`."""
    found = []
    for number, (old, new) in enumerate(zip(before["metrics"], after["metrics"], strict=True)):
        for key, value in old.items():
            rel_tol, abs_tol = (1e-12, 1e-15) if exact else (1e-5, 1e-6)
            same = key in new and math.isclose(new[key], value, rel_tol=rel_tol, abs_tol=abs_tol)
            if not same:
                found.append(f"{key} of iteration {number}: {value} before, {new.get(key)} now")
    if exact and before["lora"] != after["lora"]:
        found.append("the LoRA")
    return found


def main(args: Args) -> int:
    args.folder.mkdir(parents=True, exist_ok=True)
    worst = 0
    with tempfile.TemporaryDirectory() as work:
        tiny = args.folder / "tiny-sd"
        if not tiny.exists():
            make_pipeline("tiny").save_pretrained(tiny)
        cases = [("zoo/sd", 1, False), ("zoo/sd", 1, True), (str(tiny), 1, False)]
        cases += [("zoo/sd", 2, False), (str(tiny), 2, True)]
        for script in args.scripts:
            for model, ranks, resumed in cases:
                name = f"{script}__{Path(model).name}__{ranks}" + ("__resumed" if resumed else "")
                result = run(script, model, ranks, resumed, Path(work) / name)
                file = args.folder / f"{name}.json"
                if args.what == "record":
                    file.write_text(json.dumps(result, indent=2) + "\n")
                    print(f"kept: {name}", flush=True)
                    continue
                found = differences(json.loads(file.read_text()), result, exact=ranks == 1)
                print(f"{'DIFFERS' if found else 'equal'}: {name}", *found[:5], sep="\n    ")
                sys.stdout.flush()
                worst = max(worst, bool(found))
    return worst


if __name__ == "__main__":
    raise SystemExit(main(tyro.cli(Args, description=__doc__)))
