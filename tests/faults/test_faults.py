"""Faults of a reward, a disk, a rank, a gradient: one clear line, and the work is saved.

And what goes on regardless.
"""

import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_metrics, run_here
from scripts import SCRIPTS, TABLE, reward_flags
from short_runs import (
    COMMON,
    SHORT,
    assert_same_run,
    finish,
    iteration_of,
    start,
    workers_of,
)

from harness.checkpoint import CHECKPOINT_FORMAT, CheckpointError, check_checkpoint, new_checkpoint


def ends_in_one_line(process, code: int, *mentioned: str) -> None:
    """On stderr, beside progress bars and warnings, is one line with "error:".

    It has all of `mentioned`.
    """
    _, stderr = process.communicate(timeout=120)
    torchruns_own_report = 'Traceback (most recent call last):\n  File "<frozen runpy>"'
    stderr = stderr.partition(torchruns_own_report)[0]
    lines = [line for line in stderr.replace("\r", "\n").splitlines() if "error:" in line]
    assert process.returncode == code and "Traceback" not in stderr, stderr
    assert len(lines) == 1 and all(word in lines[0] for word in mentioned), stderr


def wait_for(condition, process) -> None:
    while not condition():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)


REWARD = """
import pathlib, time
calls = []
def score(images):
    calls.append(1)
    return 10 * (images[:, 0].double().mean((1, 2)) - images[:, 1].double().mean((1, 2)))
def raises(images, prompts):
    if {fault}.exists() and len(calls) == {call}:
        raise OSError("the scorer is gone")
    return score(images)
def hangs(images, prompts):
    if {fault}.exists() and len(calls) == {call}:
        time.sleep(600)
    return score(images)
def nan(images, prompts):
    return score(images) * (float("nan") if {fault}.exists() and len(calls) == {call} + 1 else 1)
def waits(images, prompts):
    while {fault}.exists() and len(calls) == {call}:
        {waiting}.touch()
        time.sleep(0.05)
    return score(images)
"""


def with_reward(script: str, folder: Path, kind: str, call: int) -> list:
    """Flags of a short run whose reward does `kind` in call number `call`, while fault exists.

    fault is a file in `folder`.
    """
    code = REWARD.replace("{call}", str(call))
    for name in ("fault", "waiting"):
        code = code.replace(f"{{{name}}}", f"pathlib.Path({str(folder / name)!r})")
    (folder / "mine.py").write_text(f"{code}f = {kind}\n")  # one name, which metrics may have
    (folder / "fault").touch()
    spec = f"{folder}/mine.py:f"
    return [*COMMON, *TABLE[script].short.split(), *reward_flags(script, spec, "2x2")]


def resume(script: str, folder: Path) -> list:
    """Flags that go on with the run of `with_reward` in folder/run: its code is named again."""
    return ["--resume", folder / "run", *reward_flags(script, f"{folder}/mine.py:f", "2x2")]


KINDS = {"raises": "the scorer is gone", "hangs": "no answer in 3 s", "nan": "returned nan"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_reward_that_fails_or_hangs(script, tmp_path, monkeypatch):
    """What was done is saved though no checkpoint is due.

    With a reward that is well the run ends as if undisturbed.
    """
    # The last call of the third iteration.
    call = TABLE[script].calls_at_first + 3 * TABLE[script].calls - 1
    for kind in KINDS if script == "ddpo.py" else ("raises", "hangs"):
        folder = tmp_path / kind
        folder.mkdir()
        preset, *flags = with_reward(script, folder, kind, call)
        flags = [preset, "--reward-timeout", 3, *flags]
        flags[flags.index("--save-every") + 1] = 50
        process = start(script, *flags, "--output-dir", folder / "run")
        ends_in_one_line(process, 1, KINDS[kind], str(folder / "run"))
        assert iteration_of(folder / "run") == 2
        (folder / "fault").unlink()
        run_here(monkeypatch, script, *resume(script, folder))
    run_here(monkeypatch, script, *flags, "--output-dir", tmp_path / "whole")
    for run in tmp_path.glob("*/run"):
        assert_same_run(tmp_path / "whole", run)


def test_reward_of_a_later_task_that_fails(tmp_path, monkeypatch):
    """The iteration's first task has been learned from already: it is not learned from again."""
    flags = with_reward("large_scale_ppo.py", tmp_path, "raises", 1)
    flags = [*flags[:-1], "image_reward:zoo/image_reward prompts/zoo.txt 2x2", flags[-1]]
    process = start("large_scale_ppo.py", *flags, "--output-dir", tmp_path / "run")
    ends_in_one_line(process, 1, "the scorer is gone")
    assert iteration_of(tmp_path / "run") == 1
    (tmp_path / "fault").unlink()
    named_again = flags[flags.index("--tasks") :]
    run_here(monkeypatch, "large_scale_ppo.py", "--resume", tmp_path / "run", *named_again)
    run_here(monkeypatch, "large_scale_ppo.py", *flags, "--output-dir", tmp_path / "whole")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize(
    "script, ranks",
    [("dpok.py", 1), ("dpok.py", 2), ("rwr.py", 1), ("sft_kl.py", 1), ("large_scale_ppo.py", 1)],
)
def test_disk_that_is_full(script, ranks, tmp_path, monkeypatch):
    """From the second iteration on no file can grow over 2 kB.

    The checkpoint stays whole, and the run goes on later.
    """
    call = TABLE[script].calls_at_first + TABLE[script].calls
    flags = with_reward(script, tmp_path, "waits", call)
    process = start(script, *flags, "--output-dir", tmp_path / "run", ranks=ranks)
    wait_for((tmp_path / "waiting").exists, process)
    for pid in workers_of(process) if ranks > 1 else [process.pid]:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (2000, 2000))
    (tmp_path / "fault").unlink()
    ends_in_one_line(process, 1, "cannot be written", "--resume")
    assert iteration_of(tmp_path / "run") == 1
    assert not (tmp_path / "run/checkpoint.partial").exists(), "it fills the disk"
    run_here(monkeypatch, script, *resume(script, tmp_path))
    assert len(read_metrics(tmp_path / "run")) == 3


def test_two_processes_never_write_one_run(tmp_path):
    """The second one is refused in a line; the first goes on."""
    flags = with_reward("dpok.py", tmp_path, "waits", 1)
    process = start("dpok.py", *flags, "--output-dir", tmp_path / "run")
    wait_for((tmp_path / "waiting").exists, process)
    second = start("dpok.py", *resume("dpok.py", tmp_path))
    ends_in_one_line(second, 2, "another process is still writing")
    (tmp_path / "fault").unlink()
    finish(process)
    assert len(read_metrics(tmp_path / "run")) == 3


def test_rank_that_dies(tmp_path):
    """torchrun ends the other rank within a minute.

    With --max-restarts it starts both again, and they go on.
    """
    flags = (*COMMON, *SHORT["dpok.py"], "--output-dir")
    finish(start("dpok.py", *flags, tmp_path / "whole", ranks=2))
    for restarts in (0, 1):
        run = tmp_path / f"restarts-{restarts}"
        process = start("dpok.py", *flags, run, ranks=2, restarts=restarts)
        wait_for(lambda: iteration_of(run) >= 1, process)
        os.kill(workers_of(process)[1], signal.SIGKILL)
        began = time.time()
        if restarts:
            finish(process)
            assert_same_run(tmp_path / "whole", run)
        else:
            process.communicate(timeout=60)
            assert process.returncode != 0 and time.time() - began < 60


def test_grid_that_cannot_be_written(tmp_path):
    """A warning; the run goes on."""
    process = start("dpok.py", *COMMON, *SHORT["dpok.py"], "--output-dir", tmp_path / "run")
    wait_for((tmp_path / "run/samples").exists, process)
    (tmp_path / "run/samples/000002.png").mkdir()
    (tmp_path / "run/learning_curve.png").mkdir()
    stderr = finish(process)
    assert "warning" in stderr and "000002.png" in stderr and "learning_curve.png" in stderr
    assert len(read_metrics(tmp_path / "run")) == 3
    assert (tmp_path / "run/samples/000003.png").is_file()


@pytest.mark.parametrize("how_often", ["once", "always", "always, but for the value function"])
def test_gradient_that_is_not_finite(how_often, tmp_path):
    """Once: its updates are skipped and counted, and the weights stay finite.

    Always: the run stops, with them, even if the value function learns.
    """
    bad = 1e17 if "value" in how_often else 3e38  # its square is finite, and is not
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "calls = []\n"
        "def f(images, prompts):\n"
        "    calls.append(1)\n"
        f"    bad = len(calls) == 2 or {how_often != 'once'}\n"
        f"    return torch.full((len(prompts),), {bad}) if bad else images.mean((1, 2, 3))\n"
    )
    flags = [*COMMON, *SHORT["dpok.py"], "--replay-rollouts", 1]
    flags += ["--reward", f"{tmp_path}/mine.py:f"]
    flags += ["--max-skipped-updates", 4, "--output-dir", tmp_path / "run"]
    flags += ["--num-iterations", 4, "--value-function"]
    if "value" in how_often:
        flags += ["--alpha", 1e9]
    process = start("dpok.py", *flags)
    if how_often != "once":
        ends_in_one_line(process, 1, "no finite gradient", str(tmp_path / "run"))
        # Two updates of the policy an iteration; the first of all may just be finite.
        skipped = [line["updates/skipped"] for line in read_metrics(tmp_path / "run")]
        assert skipped[-2:] == [2, 2]
        assert iteration_of(tmp_path / "run") == len(skipped) < 4
    else:
        finish(process)
        lines = read_metrics(tmp_path / "run")
        assert [line["updates/skipped"] for line in lines] == [0, 2, 0, 0]
        assert lines[3]["grad_norm"] > 0
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)
    tensors = [*state["kept"]["value_function"].values()]
    tensors += [t for s in state["kept"]["optimizer"]["state"].values() for t in s.values()]
    assert all(torch.as_tensor(tensor).isfinite().all() for tensor in tensors)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("short") / "run"
    finish(start("dpok.py", *COMMON, *SHORT["dpok.py"], "--output-dir", run))
    return run


@pytest.mark.parametrize(
    "name", ["state.pt", "pytorch_lora_weights.safetensors", "replay-00000.pt"]
)
def test_checkpoint_cut_in_half(short_run, name):
    """Refused in one line that names the file, before a model is loaded."""
    path = short_run / "checkpoint" / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    began = time.time()
    try:
        process = start("dpok.py", "--resume", short_run, "--num-iterations", 4)
        ends_in_one_line(process, 2, "--resume", name)
        assert time.time() - began < 30
    finally:
        path.write_bytes(content)
    check_checkpoint(short_run)


def test_formats_of_checkpoints(short_run, tmp_path):
    """One of the future or of the past, with or without an index, is refused in one line."""
    index = short_run / "checkpoint/files.json"
    content = index.read_text()
    try:
        for change, words in ((1, "later version"), (-1, "earlier version")):
            format_of = json.loads(content) | {"format": CHECKPOINT_FORMAT + change}
            index.write_text(json.dumps(format_of))
            with pytest.raises(CheckpointError, match=words):
                check_checkpoint(short_run)
        index.unlink()
        resumed = start("dpok.py", "--resume", short_run, "--num-iterations", 4)
        ends_in_one_line(resumed, 2, "--resume", "earlier version")
    finally:
        index.write_text(content)
    check_checkpoint(short_run)


def saves(run: Path, left: int) -> int:
    """A save in a process of its own, which ends before operation number `left` on files.

    Its exit code: 9, or 0 where it came to the end of the save.
    """

    def counted(function):
        def call(*args, **kwargs):
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(9)
            return function(*args, **kwargs)

        return call

    pid = os.fork()
    if pid > 0:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        places = [(Path, name) for name in ("mkdir", "rename", "write_text", "write_bytes")]
        for where, name in [*places, (os, "fsync"), (shutil, "rmtree")]:
            setattr(where, name, counted(getattr(where, name)))
        save(run, b"after")
        os._exit(0)
    finally:
        os._exit(1)


def save(run: Path, content: bytes) -> None:
    with new_checkpoint(run) as folder:
        for name in CONTENTS:
            (folder / name).write_bytes(content)


CONTENTS = ("state.pt", "args.json", "weights")


def test_there_is_always_a_whole_checkpoint(tmp_path):
    """The process ends before the first, the second, ... operation of a save on files.

    The old checkpoint or the new one is whole.
    """
    seen, operations, code = set(), 0, 9
    while code == 9:
        run = tmp_path / str(operations)
        save(run, b"before")
        code = saves(run, operations)
        check_checkpoint(run)
        contents = {(run / "checkpoint" / name).read_bytes() for name in CONTENTS}
        assert len(contents) == 1, "files of two checkpoints"
        seen |= contents
        operations += 1
    assert code == 0 and operations > 9 and seen == {b"before", b"after"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_memory_and_files_do_not_grow(script, tiny_sd, tmp_path):
    """100 iterations of the smallest setting: memory and open files after the first 20.

    Under 1 % more memory, and as many open files.
    """
    flags = [*TABLE[script].smallest.split(), "--model", tiny_sd]
    flags += reward_flags(script, "jpeg_compressibility", "1x2")
    flags += ["--num-inference-steps", 2, "--num-iterations", 100]
    flags += ["--output-dir", tmp_path / "run"]
    # A file, as nobody empties a pipe while the run goes on, and bars of 100 iterations would fill
    # it.
    with (tmp_path / "stderr").open("w") as stderr:
        process = start(script, *flags, "--save-every", 20, stderr=stderr)
    metrics, seen = tmp_path / "run/metrics.jsonl", {}
    while process.poll() is None:
        done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        try:
            status = (f"/proc/{process.pid}/status", f"/proc/{process.pid}/fd")
            lines = Path(status[0]).read_text().splitlines()
            resident = next(line for line in lines if line.startswith("VmRSS"))
            seen[done] = int(resident.split()[1]), len(os.listdir(status[1]))
        except (FileNotFoundError, StopIteration, ProcessLookupError):
            break
        time.sleep(0.02)
    assert process.wait() == 0, (tmp_path / "stderr").read_text()
    early = [value for done, value in seen.items() if 20 < done <= 40]
    late = [value for done, value in seen.items() if 80 < done < 100]
    assert len(early) > 5 and len(late) > 5
    memory = [sorted(value for value, _ in part)[len(part) // 2] for part in (early, late)]
    files = [sorted(value for _, value in part)[len(part) // 2] for part in (early, late)]
    assert memory[1] < 1.01 * memory[0] and files[0] == files[1], (memory, files)


ALONE = """
import os, sys
sys.path.insert(0, {root!r})
import dpok
from harness import Run
def breaks(self, n, *args, share=Run.gather, **kwargs):
    if os.environ["RANK"] == "1" and self._iteration == 2:
        raise RuntimeError("a fault of one rank")
    return share(self, n, *args, **kwargs)
Run.gather = breaks
dpok.main()
"""


def test_fault_of_one_rank_alone(tmp_path):
    """The others wait for it in a collective: it says so and ends, and torchrun ends them."""
    (tmp_path / "alone.py").write_text(ALONE.format(root=str(ROOT)))
    flags = (*COMMON, *SHORT["dpok.py"], "--output-dir", tmp_path / "run")
    began = time.time()
    process = start(str(tmp_path / "alone.py"), *flags, ranks=2)
    _, stderr = process.communicate(timeout=120)
    lines = [line for line in stderr.replace("\r", "\n").splitlines() if "a fault of" in line]
    assert process.returncode != 0 and time.time() - began < 100
    assert len(lines) == 1 and "error: rank 1: iteration 2" in lines[0], stderr
    assert "--resume" in lines[0] and iteration_of(tmp_path / "run") == 2
