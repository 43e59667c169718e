"""The package that pip makes of the project, and its commands, tried from another folder."""

import configparser
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from scripts import SCRIPTS
from short_runs import read_metrics

pytestmark = pytest.mark.xdist_group("install")
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "build", "tests", "__pycache__", ".*")
FLAGS = ["--num-inference-steps", "2", "--samples-per-iteration", "2", "--batch-size", "2"]
FLAGS += ["--gradient-steps", "1", "--value-batch-size", "2", "--num-iterations", "1"]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which pip has installed the project, without what it depends on."""
    folder = tmp_path_factory.mktemp("install") / "with a blank"
    folder.mkdir()
    shutil.copytree(ROOT, folder / "copy", ignore=LEFT_OUT)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    pip += ["--no-index", "--target", folder / "site", folder / "copy"]
    subprocess.run(pip, check=True, capture_output=True, timeout=300)
    return folder / "site"


def called(site: Path, cwd: Path, *words: str | Path) -> subprocess.CompletedProcess:
    """A command of the package, in a folder that has nothing of the project."""
    env = os.environ | {"PYTHONPATH": str(site)}
    command = [site / "bin" / words[0], *map(str, words[1:])]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_there_is_a_command_for_every_script(site):
    entries = configparser.ConfigParser()
    entries.read(next(site.glob("*.dist-info")) / "entry_points.txt")
    scripts = {name.removesuffix(".py") for name in SCRIPTS}
    commands = dict(entries["console_scripts"])
    assert set(commands) == scripts | {"evaluate", "human_eval", "export_run"}
    assert set(commands.values()) == {"clean_diffusion_rl.installed:main"}
    assert {path.name for path in (site / "bin").iterdir()} == set(commands)


def test_the_package_has_what_the_commands_need(site):
    inside = site / "clean_diffusion_rl"
    named = ["common", "harness", "evaluation", "zoo"]
    files = [path for folder in named for path in (ROOT / folder).rglob("*") if path.is_file()]
    files += [*ROOT.glob("*.py"), *ROOT.glob("prompts/*.txt"), ROOT / "prompts/composition.py"]
    for path in files:
        name = path.relative_to(ROOT)
        if "__pycache__" not in name.parts and "build" not in name.parts:
            assert (inside / name).read_bytes() == path.read_bytes(), name
    top = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    assert top == {"bin", "clean_diffusion_rl"}, "no name is taken but the package's"


def test_commands_train_evaluate_and_export_in_any_folder(site, tmp_path):
    """With prompts of the project, and files of this folder before them."""
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/mine.txt").write_text("a green rabbit\n")
    done = called(site, tmp_path, "dpok", "zoo", *FLAGS, "--prompts-file", "prompts/zoo.txt")
    assert done.returncode == 0, done.stderr
    [run] = (tmp_path / "runs").iterdir()
    assert len(read_metrics(run)) == 1
    next_command = done.stdout.rpartition("compare it with the base model: ")[2].split()
    assert next_command[:4] == ["evaluate", "zoo", "--lora", f"runs/{run.name}"]
    flags = ["--prompts-file", "prompts/mine.txt", "--images-per-prompt", "2"]
    flags += ["--num-inference-steps", "2", "--output-dir", "evaluation"]
    done = called(site, tmp_path, *next_command[:4], *flags)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "evaluation/table.md").read_text()
    assert "a green rabbit" in table and "`image_reward:zoo/image_reward` (trained on)" in table
    assert "warning" not in done.stderr or "was trained with --model" not in done.stderr
    (run / "README.md").unlink()
    done = called(site, tmp_path, "export_run", f"runs/{run.name}", "--evaluation", "evaluation")
    assert done.returncode == 0, done.stderr
    card = (run / "README.md").read_text()
    assert "dpok.py" in card and "| `--model` | zoo/sd |" in card and str(site) not in card


def test_tasks_have_the_files_of_the_package(site, tmp_path):
    flags = ["--num-inference-steps", "2", "--training-timesteps", "1", "--num-iterations", "1"]
    flags += ["--pretrain-batch-size", "2", "--output-dir", "run"]
    tasks = ["image_reward:zoo/image_reward prompts/zoo.txt 1x2"]
    done = called(site, tmp_path, "large_scale_ppo", "zoo", *flags, "--tasks", *tasks)
    assert done.returncode == 0, done.stderr
    stored = (tmp_path / "run/args.json").read_text()
    assert json.dumps(tasks[0]) in stored and '"zoo/pairs.py:biased"' in stored


def test_a_fault_names_the_command_that_was_called(site, tmp_path):
    done = called(site, tmp_path, "dpok", "--model", "nobody/nothing", "--prompt", "a dog")
    assert done.returncode == 2 and ": dpok zoo" in done.stderr, done.stderr
    for command in ("dpok", "export_run"):
        done = called(site, tmp_path, command, "--no-such-flag")
        assert done.returncode == 2 and f"({command} --help shows" in done.stderr, done.stderr
