"""ddpo.py and kvablack/ddpo-pytorch on the zoo: seconds of an iteration, one after the other.

python -m benchmarks.side_by_side --peer ddpo-pytorch --peer-python peer-env/bin/python

docs/notes/side_by_side.md says how to make the peer's clone and environment, what is set, what is
the same on both sides and what differs. It runs on the CPU and needs no network. In every repeat
each contender runs once, in a process of its own, every other time in the opposite order. A
process makes one iteration more than it is measured in, the first, which also warms up. The figures
are in benchmarks/results/side_by_side.json, written anew after every repeat.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro

from benchmarks.run import ROOT

SAMPLES, STEPS, GUIDANCE, UPDATES = 32, 12, 1.5, 2
# The zoo's last step has no noise and takes no part in training; the peer's, at other timesteps,
# has some. It is given as many steps to train on.
TRAINED_STEPS = STEPS - 1
OURS = {
    "ddpo.py": [],  # the preset, which also measures the KL to the pretrained model
    "ddpo.py --no-monitor-kl": ["--no-monitor-kl"],
}
# The contender that does no more than the peer.
LIKE_FOR_LIKE = "ddpo.py --no-monitor-kl"
# Of an iteration. Guidance doubles the latents.
COUNTS = {
    "sample_latents": 2 * SAMPLES * STEPS,
    "train_latents": 2 * SAMPLES * TRAINED_STEPS,
    "updates": UPDATES,
}


@dataclass
class Args:
    peer: Path
    """Clone of ddpo-pytorch, nothing in it changed."""
    peer_python: Path
    """Python of its environment."""
    repeats: int = 5
    """Times that every contender runs."""
    iterations: int = 1
    """Measured iterations of each run."""
    batches: tuple[tuple[int, int], ...] = ((1, 1), (8, 8), (16, 16), (32, 8), (32, 16), (32, 32))
    """Sampling and training batch of the peer, pairs; 1 and 1 are its defaults. It refuses a
    training batch that does not divide the other."""
    output: Path = ROOT / "benchmarks/results/side_by_side.json"


def words_of_ours(flags: list[str], folder: Path, iterations: int) -> list[str]:
    """Command line of ddpo.py; SAMPLES, STEPS, GUIDANCE and UPDATES are those of its preset."""
    words = ["zoo", "--rewarded-share", "1", "--reward", "jpeg_compressibility", *flags]
    return [*words, "--num-iterations", str(iterations), "--output-dir", str(folder)]


def words_of_peer(sample_batch: int, train_batch: int, folder: Path, iterations: int) -> list[str]:
    """Command line of scripts/train.py: SAMPLES samples and UPDATES updates an iteration.

    What is not named here is as in its config/base.py, so the LoRA of rank 4 and the JPEG reward. A
    training batch above SAMPLES / UPDATES makes fewer updates.
    """
    config = {
        "pretrained.model": ROOT / "zoo/sd",
        "mixed_precision": "no",
        "prompt_fn": "zoo",
        "num_epochs": iterations,
        "logdir": folder,
        "sample.num_steps": STEPS,
        "sample.guidance_scale": GUIDANCE,
        "sample.batch_size": sample_batch,
        "sample.num_batches_per_epoch": SAMPLES // sample_batch,
        "train.batch_size": train_batch,
        "train.gradient_accumulation_steps": max(1, SAMPLES // UPDATES // train_batch),
        "train.timestep_fraction": TRAINED_STEPS / STEPS,
    }
    return [f"--config.{name}={value}" for name, value in config.items()]


def drive(side: str, task: str, result: Path, words: list[str], args: Args) -> None:
    """Run the driver for one side; where it fails, end with what it said last."""
    python, folder = (args.peer_python, args.peer) if side == "peer" else (sys.executable, ROOT)
    driver = ROOT / "benchmarks/side_by_side_driver.py"
    command = [Path(python).absolute(), driver, side, task, result, *words]
    offline = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    offline |= {"WANDB_MODE": "disabled", "WANDB_ERROR_REPORTING": "false"}
    offline |= {"TMPDIR": str(result.parent)}  # where wandb leaves folders behind
    done = subprocess.run(
        command, cwd=folder, env=os.environ | offline, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")


def busy_seconds() -> tuple[float, float, float]:
    """Seconds of the clock, and those of all cores that all processes and that ended children took.

    Where there is no /proc/stat, as outside Linux, all processes count as none.
    """
    stat, children = Path("/proc/stat"), resource.getrusage(resource.RUSAGE_CHILDREN)
    ticks = [*map(int, stat.read_text().split()[1:9])] if stat.exists() else [0] * 8
    busy = sum(ticks) - ticks[3] - ticks[4]  # idle, and waiting for a disk
    busy /= os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), busy, children.ru_utime + children.ru_stime


def compare_outputs(folder: Path, args: Args) -> dict[str, float]:
    """Largest difference of what the zoo's parts give on either side, for the same input."""
    found = []
    for side in ("ours", "peer"):
        drive(side, "outputs", folder / f"{side}.pt", [str(ROOT / "zoo/sd")], args)
        found.append(torch.load(folder / f"{side}.pt"))
    ours, peer = found
    differences = {name: (ours[name] - peer[name]).abs().max().item() for name in ours}
    if max(differences.values()) > 1e-3:
        raise SystemExit(f"the zoo is another model in the peer's environment: {differences}")
    return differences


def summary(runs: dict[str, list[dict]]) -> dict[str, dict]:
    """Of each contender: counts, and medians with the lowest and the highest, in seconds.

    "s" is sampling and training together, "rest_s" what the peer does between its loops, and
    "cores_of_others" how many cores other processes kept busy. "same_counts" is whether an
    iteration has COUNTS: ours may have more latents, for the KL and where it fills a batch up.
    """
    table = {}
    for name, rows in runs.items():
        rows = [row | {"s": row["sample_s"] + row["train_s"]} for row in rows]
        counts = {k: n for k, n in rows[0].items() if k in COUNTS or k.endswith("_calls")}
        if any(row | counts != row for row in rows):
            raise SystemExit(f"{name} has other counts in one iteration than in another")
        table[name] = counts | {"same_counts": counts | COUNTS == counts, "measured": len(rows)}
        for key in ("s", "sample_s", "train_s", "reward_s", "rest_s", "cores_of_others"):
            values = [row[key] for row in rows if key in row]
            if values:
                spread = {"median": median(values), "lowest": min(values), "highest": max(values)}
                table[name][key] = spread
    if any(table[LIKE_FOR_LIKE][name] < count for name, count in COUNTS.items()):
        raise SystemExit(f"the zoo's preset of ddpo.py does less than {COUNTS}")
    return table


def best_of_peer(table: dict[str, dict]) -> str | None:
    """The peer's fastest contender among those with the same counts."""
    names = [name for name in table if name not in OURS and table[name]["same_counts"]]
    return min(names, key=lambda name: table[name]["s"]["median"], default=None)


def main(args: Args) -> None:
    # So that subprocess ends the driver too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))
    git = ["git", "-C", args.peer]
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()
    if subprocess.check_output([*git, "status", "--porcelain", "--untracked-files=no"]):
        raise SystemExit(f"{args.peer} is not as it was released; git stash what is changed there")
    contenders = {name: ("ours", flags) for name, flags in OURS.items()}
    contenders |= {f"peer, batches {s} and {t}": ("peer", (s, t)) for s, t in args.batches}
    runs, about = {name: [] for name in contenders}, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        same_outputs = compare_outputs(folder, args)
        print(f"largest differences of outputs: {same_outputs}", flush=True)
        for repeat in range(args.repeats):
            order = list(contenders) if repeat % 2 == 0 else list(reversed(contenders))
            for name in order:
                side, how = contenders[name]
                run_folder = Path(tempfile.mkdtemp(dir=folder))
                if side == "ours":
                    words = words_of_ours(how, run_folder, args.iterations + 1)
                else:
                    words = words_of_peer(*how, run_folder, args.iterations + 1)
                before, result = busy_seconds(), folder / "result.json"
                drive(side, "run", result, words, args)
                clock, busy, own = (b - a for a, b in zip(before, busy_seconds()))
                others = round(max(0.0, busy - own) / clock, 2)
                found = json.loads(result.read_text())
                about[side] = {key: found[key] for key in ("versions", "threads")}
                runs[name] += [row | {"cores_of_others": others} for row in found["iterations"]]
                seconds = [row["sample_s"] + row["train_s"] for row in found["iterations"]]
                print(f"{repeat}: {name}: {seconds} s, cores of others {others}", flush=True)
            table = summary(runs)
            results = {
                "cores": os.cpu_count(),
                "peer_commit": commit,
                **about,
                "largest_difference_of_outputs": same_outputs,
                "best_of_peer": best_of_peer(table),
                "contenders": table,
                "iterations": runs,
            }
            args.output.write_text(json.dumps(results, indent=2) + "\n")
    print_table(table)


def print_table(table: dict[str, dict]) -> None:
    """For the docs: medians, the spread of the whole, and what one iteration has of everything."""
    print("| | s | lowest to highest | sampling | training | UNet calls | latents | updates |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in table.items():
        s, sampling, training = row["s"], row["sample_s"], row["train_s"]
        cells = [name, f"{s['median']:.1f}", f"{s['lowest']:.1f} to {s['highest']:.1f}"]
        cells += [f"{sampling['median']:.1f}", f"{training['median']:.1f}"]
        cells += [f"{row['sample_calls']} + {row['train_calls']}"]
        cells += [f"{row['sample_latents']} + {row['train_latents']}", str(row["updates"])]
        print(f"| {' | '.join(cells)} |")
    best = best_of_peer(table)
    if best:
        ratio = table[best]["s"]["median"] / table[LIKE_FOR_LIKE]["s"]["median"]
        print(f"\nbest of the peer with the same counts: {best}, {ratio:.2f} times as long")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
