import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DIFFUSERS_VERBOSITY"] = "error"
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each process
    os.environ["OMP_NUM_THREADS"] = "1"

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


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(config, items):
    """For --dist loadgroup: tests that share a fixture run in one process.

    Those of test_scripts.py and test_faults.py run in any.
    """
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        group = item.path.stem
        if "undisturbed" in item.fixturenames:
            group = f"undisturbed run of {item.callspec.params['undisturbed']}"
        if group == "test_scripts":
            if "default_run" not in item.fixturenames:
                continue
            group = f"default run of {item.callspec.params['default_run']}"
        if group == "test_faults" and "short_run" not in item.fixturenames:
            continue
        item.add_marker(pytest.mark.xdist_group(group))


def run_script(*args, ranks: int = 1, timeout: int = 300) -> subprocess.CompletedProcess:
    """Run a script as a user would, in the project's root; under torchrun for several ranks."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # tiny models: threads cost more than they save
    return subprocess.run(
        [*launcher, *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=env,
    )


def read_metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-sd")
    make_pipeline("tiny").save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)


def run_here(monkeypatch, script: str, *flags) -> None:
    """The script's main in this process, which saves the seconds of the imports."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
    importlib.import_module(script.removesuffix(".py")).main()


@pytest.fixture
def smooth(tmp_path):
    """A smooth reward, where the size of a JPEG jumps with the last bit of a pixel.

    Its spread is far above rounding, which it is not for the brightness of whole pictures: their
    advantages would be rounding in their fourth digit.
    """
    (tmp_path / "mine.py").write_text(
        "def f(images, prompts):\n"
        "    left, right = images[:, 0].double().chunk(2, dim=2)\n"
        "    return 1 + 10 * (left - right).mean((1, 2))\n"
    )
    return f"{tmp_path}/mine.py:f"


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Holds a case of a script to its line; presets are found from any folder."""
    monkeypatch.chdir(tmp_path)

    def refuse(script: str, case: Case):
        main = importlib.import_module(script.removesuffix(".py")).main
        ends_in_one_line(case, main, script, tmp_path, monkeypatch, capsys)

    return refuse
