"""Short runs of every script on the zoo, in processes that can be killed, for tests/faults."""

import subprocess
import sys
from pathlib import Path

import torch
from conftest import ROOT, plain_environment, read_metrics
from safetensors.torch import load_file
from scripts import TABLE, reward_flags

COMMON = ("zoo", "--num-inference-steps", 3, "--num-iterations", 3)
COMMON += ("--save-every", 1, "--micro-batch-size", 4)
# Less than the preset's 2e-3: AdamW's first step is large for the smallest gradient too, which
# ranks round differently.
COMMON += ("--learning-rate", 1e-4)
SHORT = {
    name: (*script.short.split(), *reward_flags(name, "image_reward:zoo/image_reward", "2x2"))
    for name, script in TABLE.items()
}
FINAL = "pytorch_lora_weights.safetensors"


def start(
    script: str, *flags, ranks: int = 1, restarts: int = 0, stderr=subprocess.PIPE
) -> subprocess.Popen:
    """The script as a user would start it, in a process group of its own."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        launcher += [f"--max-restarts={restarts}"]
    return subprocess.Popen(
        [*launcher, script, *map(str, flags)],
        cwd=ROOT,
        env=plain_environment(),
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, timeout: float = 300) -> str:
    """Wait for it to end well; what it said on stderr."""
    _, stderr = process.communicate(timeout=timeout)
    assert process.returncode == 0, stderr
    return stderr


def iteration_of(run: Path) -> int:
    """That of its checkpoint; 0 where there is none, as between two renames."""
    try:
        return torch.load(run / "checkpoint/state.pt", weights_only=True)["iteration"]
    except FileNotFoundError:
        return 0


def workers_of(process: subprocess.Popen) -> list[int]:
    """Processes that torchrun has started."""
    found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True)
    return [int(pid) for pid in found.stdout.split()]


def steady_metrics(run_dir: Path) -> list[dict]:
    """metrics.jsonl without what the clock has written."""
    lines = read_metrics(run_dir)
    return [
        {key: value for key, value in line.items() if not key.startswith("time/")} for line in lines
    ]


def assert_same_run(a: Path, b: Path) -> None:
    """The same metrics and the same LoRA, bit by bit."""
    assert steady_metrics(a) == steady_metrics(b)
    first, second = load_file(a / FINAL), load_file(b / FINAL)
    assert first.keys() == second.keys() and all(first[key].equal(second[key]) for key in first)
