"""The comparison that docs/evaluate.md shows, and how long it takes.

The base model, a DPOK LoRA and an SFT LoRA, on four prompts of the paper and four unseen ones.
Trains nothing: the runs are those of other benchmarks.

python -m benchmarks.evaluate --dpok RUN --sft RUN   benchmarks/results/evaluate.json,
                                                     docs/images/evaluate.png, tables

The time that the project promises is that of 8 pictures a prompt on two idle cores (the default);
for the docs' table take more, under a name of its own: --images-per-prompt 32 --name evaluate_32
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.zoo_eval import ROOT, weights_digest


@dataclass
class Args:
    dpok: Path
    """Folder of a run of dpok.py on the zoo."""
    sft: Path
    """Folder of a run of sft_kl.py on the zoo."""
    images_per_prompt: int = 8
    """Pictures of each prompt, for each model."""
    rewards: tuple[str, ...] = ("image_reward:zoo/image_reward", "jpeg_compressibility")
    """The reward that both were trained on, and one that neither was."""
    name: str = "evaluate"
    """Of the results."""


def main():
    args = tyro.cli(Args, description=__doc__)
    work = ROOT / "runs" / f"benchmark-{args.name}"
    shutil.rmtree(work, ignore_errors=True)  # else what was drawn before would not be timed
    work.mkdir(parents=True)
    for name, run in (("DPOK", args.dpok), ("SFT", args.sft)):
        (work / name).symlink_to(run.resolve())  # the table's names
    place = work.relative_to(ROOT)  # the results have the paths in them
    command = ["evaluate.py", "zoo", "--lora", place / "DPOK", "--lora", place / "SFT"]
    command += ["--rewards", *args.rewards]
    command += ["--images-per-prompt", args.images_per_prompt, "--output-dir", place / "evaluation"]
    start, load = time.time(), os.getloadavg()[0]
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True)
    results = {
        "weights": weights_digest(),
        "runs": [args.dpok.name, args.sft.name],
        "seconds": time.time() - start,
        "cores": os.cpu_count(),
        "load_before": load,
    }
    results |= json.loads((work / "evaluation/results.json").read_text())
    (ROOT / f"benchmarks/results/{args.name}.json").write_text(json.dumps(results, indent=2) + "\n")
    shutil.copy(work / "evaluation/comparison.png", ROOT / f"docs/images/{args.name}.png")
    print((work / "evaluation/table.md").read_text())
    print(f"{results['seconds']:.0f} seconds on {results['cores']} cores, load before {load:.1f}")


if __name__ == "__main__":
    main()
