"""Killed at any moment, a run that is resumed ends as one that was not."""

import os
import signal
import time

import numpy as np
import pytest
import torch
from conftest import read_metrics
from safetensors.torch import load_file
from scripts import KILLED
from short_runs import (
    COMMON,
    FINAL,
    SHORT,
    assert_same_run,
    finish,
    iteration_of,
    start,
    steady_metrics,
    workers_of,
)


@pytest.fixture(scope="module", params=KILLED)
def undisturbed(request, tmp_path_factory):
    """Script, flags, folder of a run that nobody disturbs, and its seconds after all is loaded."""
    folder, flags = tmp_path_factory.mktemp("undisturbed") / "run", (*COMMON, *SHORT[request.param])
    finish(start(request.param, *flags, "--output-dir", folder))
    return request.param, flags, folder, time.time() - (folder / ".lock").stat().st_mtime


def has_begun(run, since: float) -> bool:
    """Whether a process has taken the run since then."""
    return (run / ".lock").exists() and (run / ".lock").stat().st_mtime > since - 0.1


def test_killed_many_times(undisturbed, tmp_path):
    """SIGKILL at 10 moments (dpok.py) or 5, drawn at random, most of them after all is loaded.

    Each time a new process goes on. Some are in the middle, or there are more.
    """
    script, flags, whole, seconds = undisturbed
    rng, killed_in, number = np.random.default_rng(0), [], 0
    kills, most = (10 if script == "dpok.py" else 5), 15
    while True:
        run = tmp_path / str(number)
        saved = any((run / name).exists() for name in ("checkpoint", "checkpoint.old"))
        began = time.time()
        process = start(script, *(("--resume", run) if saved else (*flags, "--output-dir", run)))
        in_the_middle = {1, 2} & set(killed_in)
        goes_on = len(killed_in) < (kills if in_the_middle else most)
        if goes_on:
            wait = rng.random() < 0.9
            while wait and process.poll() is None and not has_begun(run, began):
                time.sleep(0.02)
            time.sleep(rng.uniform(0.1, 0.7) * seconds)
        if goes_on and process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            killed_in.append(iteration_of(run))
            continue
        finish(process)
        assert_same_run(whole, run)
        if not goes_on:
            break
        number += 1
    assert in_the_middle and len(killed_in) >= kills


def test_stopped_by_a_signal(undisturbed, tmp_path):
    """SIGTERM: the iteration is finished and saved, exit code 0.

    Resumed, the run ends as an undisturbed one.
    """
    script, flags, whole, _ = undisturbed
    process = start(script, *flags, "--output-dir", tmp_path / "run")
    metrics = tmp_path / "run/metrics.jsonl"
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    stderr = finish(process)
    assert "stopped, and saved; resume it with --resume" in stderr and "Traceback" not in stderr
    saved = iteration_of(tmp_path / "run")
    assert 1 <= saved == len(read_metrics(tmp_path / "run")) < 3
    finish(start(script, "--resume", tmp_path / "run"))
    assert_same_run(whole, tmp_path / "run")


def test_two_ranks_go_on_as_one(undisturbed, tmp_path):
    """Two ranks are killed in the second iteration; one goes on.

    It ends as one that nobody disturbed: 99.9 % of the weights to 1e-6.
    """
    script, flags, whole, _ = undisturbed
    process = start(script, *flags, "--output-dir", tmp_path / "run", ranks=2)
    while iteration_of(tmp_path / "run") < 1:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    # torchrun first: it would end the workers gently.
    for pid in (process.pid, *workers_of(process)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert 1 <= iteration_of(tmp_path / "run") < 3
    finish(start(script, "--resume", tmp_path / "run"))
    one, two = load_file(whole / FINAL), load_file(tmp_path / "run" / FINAL)
    differences = torch.cat([(one[key] - two[key]).abs().flatten() for key in one])
    # AdamW's first step is lr * g / (|g| + 1e-8). The rest are weights whose g was of that size:
    # ranks round it to a different 1e-9, and the step, up to a learning rate of 1e-4, differs as
    # much. rwr.py begins anew each time.
    assert (differences < 1e-6).float().mean() > 0.999 and differences.max() < 5e-4
    for a, b in zip(steady_metrics(whole), steady_metrics(tmp_path / "run"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)


def test_second_sigint_leaves_at_once(tmp_path):
    """In the middle of a reward that takes a minute."""
    (tmp_path / "mine.py").write_text(
        "import time\n"
        "def f(images, prompts):\n"
        f"    open({str(tmp_path / 'called')!r}, 'w')\n"
        "    time.sleep(60)\n"
    )
    flags = [*COMMON, *SHORT["dpok.py"], "--reward", f"{tmp_path}/mine.py:f"]
    process = start("dpok.py", *flags, "--output-dir", tmp_path / "run")
    while not (tmp_path / "called").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    for _ in range(2):  # as under torchrun, where the terminal's and torchrun's come together
        process.send_signal(signal.SIGINT)
    time.sleep(2)
    assert process.poll() is None, "the first one waits for the iteration"
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == 130
    assert iteration_of(tmp_path / "run") == 0
