"""What a command line is told: faults, help, prompts, the end of a run."""

import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

import ddpo
import dpok
import large_scale_ppo
from common.lora import FILE_NAME, lora_rank
from harness.args import parse_args
from harness.card import LARGE_FILE, evaluation_of, figures, model_card
from harness.checkpoint import write_tensors
from harness.export import description, shared_reward
from harness.metrics import Metrics
from harness.resume import check_iterations, check_same, same_argument

MODULES = {"dpok.py": dpok, "ddpo.py": ddpo, "large_scale_ppo.py": large_scale_ppo}


def said_of(script: str, words: list[str], monkeypatch, capsys) -> str:
    """The line on stderr of a command line that is refused."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *words])
    with pytest.raises(SystemExit) as end:
        parse_args(MODULES[script].PRESETS, "A script.")
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    return line


@pytest.mark.parametrize(
    "script, words, fault",
    [
        ("dpok.py", "--seed abc", "--seed is 'abc'; it takes a whole number"),
        ("dpok.py", "--seed 1.5", "--seed is '1.5'; it takes a whole number"),
        ("dpok.py", "--learning-rate x", "--learning-rate is 'x'; it takes a number"),
        (
            "dpok.py",
            "--micro-batch-size x",
            "--micro-batch-size is 'x'; it takes a whole number or auto",
        ),
        ("dpok.py", "--dtpye fp32", "Unrecognized options: --dtpye, fp32; did you mean --dtype?"),
        ("dpok.py", "--seed 1 zoo", "Unrecognized options: zoo; a preset is the first word"),
        ("dpok.py", "--prompt", "Missing value for argument '--prompt'"),
        ("large_scale_ppo.py", "--learning-rate x", "--learning-rate is 'x'; it takes a number"),
    ],
)
def test_word_that_cannot_be_read(script, words, fault, monkeypatch, capsys):
    line = said_of(script, words.split(), monkeypatch, capsys)
    assert line == f"{script}: error: {fault} ({script} --help shows what there is)\n"


def test_choice_that_is_none(monkeypatch, capsys):
    line = said_of("dpok.py", ["--dtype", "fp8"], monkeypatch, capsys)
    assert "fp8" in line and "--dtype" in line and "'bf16'" in line


@pytest.mark.parametrize("script", MODULES)
def test_help_names_the_presets_and_keeps_lines(script, monkeypatch, capsys):
    module = MODULES[script]
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        parse_args(module.PRESETS, module.__doc__)
    shown = capsys.readouterr().out
    assert end.value.code == 0 and f"usage: {script} [PRESET]" in shown
    assert f"PRESET is one of: {', '.join(module.PRESETS)}." in shown
    examples = [line for line in module.__doc__.splitlines() if line.startswith("A laptop")]
    assert examples and all(f"  {line}\n" in shown for line in examples)


def test_help_into_a_program_that_reads_no_further():
    command = f"{shlex.quote(sys.executable)} dpok.py --help | head -n 1"
    result = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.startswith("usage: dpok.py") and result.stderr == ""


def test_prompts_of_a_file_hide_the_prompt_of_the_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    state = {"unet.x.attn2.to_k.lora_A.weight": torch.zeros(4, 768)}
    for words in (["zoo", "--prompts-file", "prompts/dpok.txt"], ["multi-prompt"]):
        args = vars(parse_args(dpok.PRESETS, "", words=words))
        card = model_card(tmp_path, args, ROOT / "dpok.py", [])
        assert args["prompt"] and args["prompt"] not in card and "dpok.txt" in card
        assert description("run", args, "dpok", state)["prompt"] == "dpok.txt"
        assert args["prompt"] not in evaluation_of(tmp_path, args)
    args = vars(parse_args(ddpo.PRESETS, "", words=["zoo", "--prompt", "A cat"]))
    assert "instance_prompt: A cat" in model_card(tmp_path, args, ROOT / "ddpo.py", [])
    assert description("run", args, "ddpo", state)["prompt"] == "A cat"


def test_fewer_iterations_than_are_done(capsys):
    args = replace(dpok.PRESETS["zoo"], num_iterations=2)
    with pytest.raises(SystemExit) as end:
        check_iterations(args, 3)
    assert end.value.code == 2 and "--num-iterations is 2" in capsys.readouterr().err
    check_iterations(args, 2)
    assert "all 2 iterations are done" in capsys.readouterr().err
    check_iterations(args, 1)
    assert capsys.readouterr().err == ""


def test_file_of_code_by_another_name_is_the_same(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text("def f(images, prompts): ...\n")
    (tmp_path / "other.py").write_text("def f(images, prompts): ...\n")
    monkeypatch.chdir(tmp_path)
    there = f"{tmp_path}/mine.py:f"
    assert same_argument("mine.py:f", there) and same_argument(there, "./mine.py:f")
    assert not same_argument("mine.py:g", there) and not same_argument("other.py:f", there)
    tasks = (f'{there} "p 1.txt" 2x2', "jpeg_compressibility p.txt")
    assert same_argument(('mine.py:f "p 1.txt" 2x2', "jpeg_compressibility p.txt"), tasks)
    assert same_argument("0.5*mine.py:f+aesthetic", f"0.5*{there}+aesthetic")
    assert same_argument(f"1*mine.py:f+2*{there}", f"1*{there}+2*{there}")
    run = replace(dpok.PRESETS["zoo"], reward=there)
    # What is stored stays as it was, so that the run can be resumed from elsewhere.
    assert check_same(replace(run, reward="mine.py:f"), run, set()).reward == there
    with pytest.raises(SystemExit):
        check_same(replace(run, reward="mine.py:g"), run, set())
    assert "--reward" in capsys.readouterr().err


def test_skipped_updates_are_told():
    metrics = Metrics(torch.device("cpu"))
    metrics.norms["grad_norm"] += [float("inf"), float("nan")]
    line = metrics.line({"samples": 4})
    assert line["updates/skipped"] == 2 and "grad_norm" not in line
    assert "1 iteration, 4 reward queries" in figures([line])
    assert "updates without a finite gradient, which were skipped: 2" in figures([line])
    metrics.norms["grad_norm"] += [3.0, 1.0]
    assert metrics.line({})["grad_norm"] == 2
    assert "skipped" not in figures([line | {"updates/skipped": 0}] * 2)


def test_evaluation_that_a_run_proposes_is_of_its_own_settings(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    args = vars(replace(ddpo.PRESETS["zoo"], guidance_scale=5.0))
    command = shlex.join(evaluation_of(tmp_path, args))
    assert "evaluate.py zoo --lora" in command and "--prompts-file prompts/zoo.txt" in command
    assert "--num-inference-steps 12 --guidance-scale 5.0 --eta 1.0" in command
    assert command.endswith("--rewards image_reward:zoo/image_reward")
    command = evaluation_of(tmp_path, args | {"reward": "jpeg_compressibility"})
    assert command[-3:] == ["--rewards", "jpeg_compressibility", "image_reward:zoo/image_reward"]
    command = evaluation_of(tmp_path, vars(large_scale_ppo.PRESETS["zoo"]))
    assert command[-2:] == ["--rewards", "image_reward:zoo/image_reward"]
    command = evaluation_of(tmp_path, args | {"model": "me/model", "reward": "aesthetic"})
    assert command[-3:] == ["--rewards", "aesthetic", "image_reward"]
    (tmp_path / "many.txt").write_text("A cat\n" * LARGE_FILE)
    command = evaluation_of(tmp_path, args | {"prompts_file": tmp_path / "many.txt"})
    assert str(tmp_path / "many.txt") not in command and "--prompts-file" in command


def test_function_of_a_reward_is_named():
    assert shared_reward("/home/me/mine.py:redness") == "mine.py:redness"


def test_files_of_weights_are_readable_as_others(tmp_path):
    write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)})
    (tmp_path / "b").touch()
    modes = {(tmp_path / name).stat().st_mode for name in ("a.safetensors", "b")}
    assert len(modes) == 1


def test_file_for_other_tools_is_told_from_a_lora(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"lora_unet_x.lora_down.weight": torch.zeros(4, 4)})
    with pytest.raises(ValueError, match=f"for other tools; diffusers reads {FILE_NAME}"):
        lora_rank(tmp_path / "x.safetensors")


WAITS = """
import sys, time
from harness.stop import catch_signals
received = catch_signals(lambda: {begun})
print("ready", flush=True)
while not received:
    time.sleep(0.02)
print("asked", flush=True)
time.sleep(20)
"""


@pytest.mark.parametrize("begun", [False, True])
def test_ctrl_c_is_answered(begun):
    """Nothing that has begun: at once. Else it is said, and a second one ends the process."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS.format(begun=begun)],
        cwd=ROOT,
        env=os.environ | {"RANK": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    if begun:
        assert process.stdout.readline() == "asked\n"
        time.sleep(1.2)  # within a second it is the same Ctrl-C
        process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert ("stopping where nothing is lost" in stderr) == begun
    assert ("interrupted" in stderr) != begun
