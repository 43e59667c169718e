import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DIFFUSERS_VERBOSITY"] = "error"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: threads cost more than they save

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hostile import Case, ends_in_one_line

from benchmarks.layouts import make_pipeline

ROOT = Path(__file__).resolve().parent.parent


SHARING = {
    "default run": (
        "test_default_run_leaves_what_it_promises",
        "test_weights_of_a_run_load_in_plain_diffusers",
    ),
    "runs on ranks": ("test_ranks_do_not_change_the_result",),
    "short run": ("test_checkpoint_cut_in_half", "test_formats_of_checkpoints"),
}
"""Tests that share a fixture, in the files whose tests are shared out among the processes."""


def group_of(nodeid: str) -> str:
    """Tests of one group run in one process: those of a file, but where a file takes minutes."""
    file, _, test = nodeid.partition("::")
    name, _, parameters = test.partition("[")
    if Path(file).name == "test_killed.py":
        return f"{file} {parameters}"  # an undisturbed run of each script
    if Path(file).name not in ("test_scripts.py", "test_faults.py"):
        return file
    for fixture, tests in SHARING.items():
        if name in tests:
            return f"{fixture} {parameters}" if fixture == "default run" else fixture
    return nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return ByGroup(config, log)


def plain_environment() -> dict[str, str]:
    """Of a process that has no more than a plain install."""
    return os.environ | {"PYTHONPATH": str(ROOT / "tests/plain")}


def run_script(*args, ranks: int = 1, timeout: int = 600) -> subprocess.CompletedProcess:
    """Run a script as a user would, in the project's root; under torchrun for several ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return subprocess.run(
        [*launcher, *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=plain_environment(),
    )


ONE_AFTER_THE_OTHER = """
import importlib, json, os, sys
sys.path.insert(0, os.getcwd())
for number, (script, *words) in enumerate(json.load(open(sys.argv[1]))):
    sys.argv = [script, *words]
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(number)  # each has a store of its own
    importlib.import_module(script.removesuffix(".py")).main()
"""


def run_together(commands: list, ranks: int, folder: Path) -> None:
    """Run commands one after the other in the same `ranks` processes, which import but once.

    A command is a list of a script and its flags.
    """
    words = [[*map(str, command)] for command in commands]
    (folder / "commands.json").write_text(json.dumps(words))
    (folder / "together.py").write_text(ONE_AFTER_THE_OTHER)
    files = folder / "together.py", folder / "commands.json"
    result = run_script(*files, ranks=ranks, timeout=1200)
    assert result.returncode == 0, result.stderr


def read_metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def saved_layout(layout: str, tmp_path_factory):
    folder = tmp_path_factory.mktemp(layout)
    make_pipeline(layout).save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> Path:
    """For what holds for a model of any depth: the loop of a script."""
    yield from saved_layout("tiny-loop", tmp_path_factory)


@pytest.fixture(scope="session")
def shrunk_sd(tmp_path_factory) -> Path:
    """For what depends on SD v1.5's layers: the names of the weights, what other tools load."""
    yield from saved_layout("tiny", tmp_path_factory)


def run_here(monkeypatch, script: str, *flags) -> None:
    """The script's main in this process, which saves the seconds of the imports."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    importlib.import_module(script.removesuffix(".py")).main()


def write_smooth_reward(folder: Path) -> str:
    """A smooth reward, where the size of a JPEG jumps with the last bit of a pixel.

    Its spread is far above rounding, which it is not for the brightness of whole pictures: their
    advantages would be rounding in their fourth digit.
    """
    (folder / "mine.py").write_text(
        "def f(images, prompts):\n"
        "    left, right = images[:, 0].double().chunk(2, dim=2)\n"
        "    return 1 + 10 * (left - right).mean((1, 2))\n"
    )
    return f"{folder}/mine.py:f"


@pytest.fixture
def smooth(tmp_path):
    return write_smooth_reward(tmp_path)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Holds a case of a script to its line; presets are found from any folder."""
    monkeypatch.chdir(tmp_path)

    def refuse(script: str, case: Case):
        main = importlib.import_module(script.removesuffix(".py")).main
        ends_in_one_line(case, main, script, tmp_path, monkeypatch, capsys)

    return refuse
