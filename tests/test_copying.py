"""docs/copying.md: the files that it names and the code in it train as the repository does."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_metrics, run_script
from safetensors.torch import load_file

PAGE = (ROOT / "docs/copying.md").read_text()
LORA = "pytorch_lora_weights.safetensors"
FLAGS = ["--num-inference-steps", 3, "--num-iterations", 2, "--samples-per-iteration", 4]
FLAGS += ["--batch-size", 8, "--value-batch-size", 8, "--value-function", "--gradient-steps", 2]
FLAGS += ["--micro-batch-size", 4, "--learning-rate", 1e-3]

# `python dpok.py`, which then tells where its modules are from.
RUN_AND_LIST = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
for module in list(sys.modules.values()):
    if getattr(module, "__file__", None):
        print("module", module.__file__)
"""


def block(language: str, text: str) -> str:
    """The one block of code in the page that has `text` in it."""
    (found,) = (
        code for code in re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL) if text in code
    )
    return found


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A folder with what the page says, and nothing else."""
    folder = tmp_path_factory.mktemp("copy")
    command, env = block("bash", "mkdir"), os.environ | {"MINE": str(folder)}
    subprocess.run(["bash", "-euc", command], cwd=ROOT, env=env, check=True)
    (folder / "harness.py").write_text(block("python", "class Run:"))
    (folder / "reward.py").write_text(block("python", "def redness"))
    return folder


def test_copied_script_trains_as_here(copy, tiny_sd, tmp_path):
    flags = [str(flag) for flag in ("--model", tiny_sd, *FLAGS)]
    env = os.environ | {"PYTHONPATH": ""}
    command = [sys.executable, "-c", RUN_AND_LIST, "dpok.py", *flags]
    copied = subprocess.Popen(
        [*command, "--reward", "reward.py:redness"],
        cwd=copy,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    reward = f"{copy / 'reward.py'}:redness"
    here = run_script("dpok.py", *flags, "--reward", reward, "--output-dir", tmp_path)
    stdout, stderr = copied.communicate(timeout=300)
    assert here.returncode == 0, here.stderr
    assert copied.returncode == 0, stderr

    # It has nothing from the repository.
    printed = stdout.splitlines()
    modules = {Path(line.removeprefix("module ")) for line in printed if line.startswith("module ")}
    assert {copy / "harness.py", copy / "common/stable_diffusion.py"} <= modules
    packages = Path(torch.__file__).parent.parent  # may be in a folder of the repository
    of_the_repository = {path for path in modules if ROOT in path.parents}
    assert not {path for path in of_the_repository if packages not in path.parents}

    # Its LoRA is trained, and that of the repository's own run; so are its metrics.
    lora, expected = load_file(copy / "run" / LORA), load_file(tmp_path / LORA)
    assert any(value.any() for key, value in lora.items() if "lora_B" in key)  # zero at the start
    assert lora.keys() == expected.keys()
    for key, value in lora.items():
        assert torch.equal(value, expected[key]), key
    lines = [ast.literal_eval(line) for line in printed if line.startswith("{")]
    for line, wanted in zip(lines, read_metrics(tmp_path), strict=True):
        differ = {key for key in wanted if line.get(key) != wanted[key]}
        differ -= {"time/sample_s", "time/reward_s", "time/train_s"}
        assert differ <= {"grad_norm", "advantages/std", "updates/skipped"}


def test_a_reward_that_is_carried_along_scores(copy, tmp_path):
    shutil.copytree(copy, tmp_path, dirs_exist_ok=True)
    (carried,) = re.findall(r"To take a reward from here, carry (.*?)\(", PAGE, re.DOTALL)
    for name in re.findall(r"`(\S+)`", carried):
        (shutil.copytree if name.endswith("/") else shutil.copy)(ROOT / name, tmp_path / name)
    code = (
        "import torch; from common.rewards import load_reward; "
        "print(load_reward('jpeg_compressibility', 'cpu')(torch.ones(2, 3, 8, 8), ['a', 'b']))"
    )
    env = os.environ | {"PYTHONPATH": ""}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True)
    assert ran.stdout.startswith(b"tensor([-"), ran.stderr


@pytest.mark.parametrize("script", ["dpok.py", "ddpo.py", "rwr.py", "sft_kl.py"])
def test_stand_in_has_all_that_a_script_imports(script):
    harness = block("python", "class Run:")
    if script in ("rwr.py", "sft_kl.py"):
        harness += "\n" + block("python", "def shard")
    there = {}
    exec(compile(harness, "harness.py", "exec"), there)
    tree = ast.parse((ROOT / script).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    from_harness = [node for node in imports if node.module.startswith("harness")]
    assert {node.module for node in from_harness} == {"harness"}
    assert {alias.name for node in from_harness for alias in node.names} <= there.keys()
    carried = {"common", "common.scheduler", "common.lora", "common.stable_diffusion"}
    assert {node.module for node in imports if node.module.startswith("common")} <= carried
    used = set(re.findall(r"\brun\.(\w+)", (ROOT / script).read_text()))
    assert used - {"device"} <= vars(there["Run"]).keys()
