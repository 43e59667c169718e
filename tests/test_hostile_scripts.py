"""The table of what is refused, or ends a run: numbers, damaged runs, places, code, rewards."""

import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
import time
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_metrics
from hostile import Case, ends_in_one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from scripts import SCRIPTS, TABLE
from short_runs import COMMON, SHORT, finish, iteration_of, start

from common.rewards import parse_sum
from harness import Run, guard, parse_args, project, resume, stop
from harness.args import check_sampler
from harness.checkpoint import CheckpointError, lock, new_checkpoint, sha256
from harness.folder import made_anew
from harness.resume import code_files
from harness.stop import Ended

LORA = "pytorch_lora_weights.safetensors"
OTHER_FLAG = {"shard_size", "samples_per_iteration", "dataset_size", "gradient_steps", "min_count"}
"""Flags that are held against one another: the line may name the other."""


def numbers_of(script: str) -> list[Case]:
    """For each flag that is a number: too large, not finite, negative, no number at all."""
    args = importlib.import_module(script.removesuffix(".py")).PRESETS["zoo"]
    cases = []
    for field in fields(args):
        flag, kind = "--" + field.name.replace("_", "-"), str(field.type)
        values = []
        if "int" in kind and "tuple" not in kind:
            values = ["-1", "1" + "0" * 19, "1" + "0" * 30, "1e12", "1.5", "nan"]
        elif "float" in kind:
            values = ["-1", "1e308", "nan", "-inf", "many"]
        for value in values:
            words = "" if field.name in OTHER_FLAG else flag
            command = ["zoo", f"{flag}={value}", "--output-dir", "{tmp}/out"]
            cases.append(Case(f"{script} {flag}={value}", command, words))
    return cases


NUMBERS = [(script, case) for script in SCRIPTS for case in numbers_of(script)]
LARGE = {
    "dpok.py": ["--replay-rollouts 1000000000", "--samples-per-iteration 900000000"],
    "ddpo.py": ["--buffer-size 1000000000", "--samples-per-iteration 900000000"],
    "rwr.py": [
        "--samples-per-iteration 900000000 --shard-size 9",
        "--samples-per-iteration 900000000 --shard-size 900000000",
        "--batch-size 900000000",
    ],
    "sft_kl.py": [
        "--dataset-size 900000000 --shard-size 9",
        "--dataset-size 900000000 --shard-size 900000000",
        "--batch-size 900000000",
        "--samples-per-iteration 900000000",
    ],
    "raft.py": [
        "--samples-per-iteration 900000000",
        "--pretrain-batch-size 900000000",
    ],
    "reward_weighted.py": [
        "--samples-per-iteration 900000000",
        "--pretrain-batch-size 900000000",
    ],
    "large_scale_ppo.py": [
        "--pretrain-batch-size 900000000",
        "--tasks jpeg_compressibility\0prompts/zoo.txt\0900000x900000",
    ],
    "refl.py": ["--samples-per-iteration 900000000", "--pretrain-batch-size 900000000"],
    "draft.py": ["--samples-per-iteration 900000000"],
}
LARGE = {
    script: [*flags, "--num-inference-steps 1", "--num-inference-steps 1001", "--eta 1e-300"]
    + ["--lora-rank 1000000000"]
    for script, flags in LARGE.items()
}
LARGE_CASES = [
    (
        script,
        Case(
            f"{script} {flags}",
            ["zoo", *(word.replace("\0", " ") for word in flags.split()), "--output-dir=out"],
            flags.split()[0],
        ),
    )
    for script, several in LARGE.items()
    for flags in several
]


@pytest.mark.parametrize("script, case", NUMBERS + LARGE_CASES, ids=str)
def test_number_that_cannot_be(script, case, refused):
    refused(script, case)


def seal(run: Path) -> None:
    """Write files.json anew, so that only what is in the files can tell that they are wrong."""
    folder = run / "checkpoint"
    index = json.loads((folder / "files.json").read_text())
    index["sha256"] = {
        path.relative_to(folder).as_posix(): sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "files.json"
    }
    (folder / "files.json").write_text(json.dumps(index))


def text(name: str, content: str | bytes, tmp: Path) -> None:
    data = content if isinstance(content, bytes) else content.encode()
    (tmp / "run" / name).write_bytes(data)
    if name.startswith("checkpoint/") and not name.endswith("files.json"):
        seal(tmp / "run")


def changed(name: str, change, tmp: Path) -> None:
    """A JSON file after change(its content), which returns the new one or works in place."""
    path = tmp / "run" / name
    content = json.loads(path.read_text())
    after = change(content)
    text(name, json.dumps(content if after is None else after), tmp)


def without_key(key: str):
    def change(content):
        del content[key]

    return change


def state(change, tmp: Path) -> None:
    path = tmp / "run/checkpoint/state.pt"
    content = torch.load(path, weights_only=True)
    after = change(content)
    torch.save(content if after is None else after, path)
    seal(tmp / "run")


def lora(change, tmp: Path) -> None:
    path = tmp / "run/checkpoint" / LORA
    content = {key: value.clone() for key, value in load_file(path).items()}  # it maps the file
    after = change(content)
    save_file(content if after is None else after, path)
    seal(tmp / "run")


def whole_files(name: str) -> dict[str, str | bytes]:
    """What a JSON file may have become as a whole."""
    return {
        "empty": "",
        "a list": "[]",
        "null": "null",
        "a number": "7",
        "an empty object": "{}",
        "cut": '{"seed": 0, "dty',
        "not UTF-8": b'{"seed": "\xff\xfe"}',
        "nested": "[" * 100_000,
        "a number of 5000 digits": '{"seed": ' + "9" * 5000 + "}",
        "NaN": '{"seed": NaN}',
        "zeros": b"\0" * 1000,
    }


OTHER_TYPES = {"str": 5, "int": "5", "float": "much", "bool": 1, "Path": 7, "tuple": {"a": 1}}


def of_another_type(field) -> object:
    return next((wrong for kind, wrong in OTHER_TYPES.items() if kind in str(field.type)), [1])


def damaged_runs() -> list[Case]:
    resume, cases = ["--resume", "{tmp}/run", "--num-iterations", "5"], []

    def add(name, before, *words):
        cases.append(Case(name, resume, ("--resume", *words), before=before))

    for name in ("args.json", "checkpoint/args.json", "checkpoint/files.json"):
        for what, content in whole_files(name).items():
            add(f"{name}: {what}", partial(text, name, content), name)
        add(f"{name} is gone", lambda tmp, name=name: (tmp / "run" / name).unlink())
    default = importlib.import_module("dpok").PRESETS["zoo"]
    for field in fields(default):
        key, wrong = field.name, of_another_type(field)
        add(
            f"args.json without {key}",
            partial(changed, "args.json", without_key(key)),
            key,
        )
        add(
            f"args.json: {key} of another type",
            partial(changed, "args.json", lambda c, k=key, w=wrong: c.update({k: w})),
            key,
        )
    for key, value in {
        "num_inference_steps": 4,
        "samples_per_iteration": 6,
        "replay_rollouts": 1,
        "learning_rate": 1.0,
        "lora_rank": 8,
        "seed": 1,
        "prompt": "a cat",
        "reward": "jpeg_compressibility",
        "model": "nowhere",
    }.items():
        edit = partial(changed, "args.json", lambda c, k=key, v=value: c.update({k: v}))
        add(f"args.json: {key} was edited", edit, key, "edited")
    add("a run of another script", partial(changed, "args.json", lambda c: c.update(tasks=[])))
    for version, word in ((3, "earlier"), (99, "later"), ("4", "files.json"), (None, "files.json")):
        edit = partial(changed, "checkpoint/files.json", lambda c, v=version: c.update(format=v))
        add(f"format {version!r}", edit, word)
    for digests in ({}, [], {"state.pt": 5}, {"../../x": "0"}):
        edit = partial(changed, "checkpoint/files.json", lambda c, d=digests: c.update(sha256=d))
        add(f"digests {digests}", edit, "files.json" if digests in ([], {"state.pt": 5}) else "")

    for what, content in {
        "empty": b"",
        "text": b"hello",
        "a pickle that runs code": b"cos\nsystem\n(S'touch pwned'\ntR.",
        "half a zip": b"PK\x03\x04" + b"\0" * 50,
    }.items():
        add(f"state.pt: {what}", partial(text, "checkpoint/state.pt", content), "state.pt")
        replay = partial(text, "checkpoint/replay-00000.pt", content)
        add(f"replay: {what}", replay, "replay")
    for key in ("iteration", "unit", "metrics", "scaler", "fixed", "kept"):
        add(
            f"state.pt without {key}",
            partial(state, without_key(key)),
            "state.pt",
        )
    for key, value in {
        "iteration": "soon",
        "unit": None,
        "metrics": [1],
        "kept": 3,
        "fixed": "x",
    }.items():
        add(
            f"state.pt: {key} is {value!r}",
            partial(state, lambda s, k=key, v=value: s.update({k: v})),
        )
    add("iteration -3", partial(state, lambda s: s.update(iteration=-3)), "state.pt")
    add("a list as state", partial(state, lambda s: [1, 2]), "state.pt")
    add("a tensor as state", partial(state, lambda s: torch.zeros(3)), "state.pt")
    add("no optimizer", partial(state, lambda s: without_key("optimizer")(s["kept"])), "optimizer")
    add("no value function", partial(state, lambda s: without_key("value_function")(s["kept"])))
    add(
        "an optimizer of nothing",
        partial(state, lambda s: s["kept"].update(optimizer={})),
        "optimizer",
    )
    add(
        "a value function of a word", partial(state, lambda s: s["kept"].update(value_function="x"))
    )

    def other_width(s):
        s["kept"]["value_function"] = {k: v[:1] for k, v in s["kept"]["value_function"].items()}

    add("a value function of another width", partial(state, other_width), "value_function")
    for what, content in {
        "empty": b"",
        "cut": b"\x10\0\0\0\0\0\0\0{",
        "a header too large": b"\xff" * 8 + b"{}",
        "a header that is no JSON": b"\x04\0\0\0\0\0\0\0abcd",
    }.items():
        add(f"LoRA: {what}", partial(text, f"checkpoint/{LORA}", content), "model")
    add(
        "LoRA: other shapes",
        partial(lora, lambda s: {k: v[:1].clone() for k, v in s.items()}),
        "model",
    )
    add("LoRA: other keys", partial(lora, lambda s: {f"x.{k}": v for k, v in s.items()}), "model")
    add("LoRA: a key too many", partial(lora, lambda s: s.update(more=torch.zeros(1))), "model")
    add("LoRA: a key missing", partial(lora, lambda s: dict(list(s.items())[1:])), "model")
    add("LoRA: no key at all", partial(lora, lambda s: {}), "model")

    def without(name, tmp):
        (tmp / "run/checkpoint" / name).unlink()
        seal(tmp / "run")

    for name in ("replay-00000.pt", LORA, "state.pt"):
        add(f"{name} is gone", partial(without, name))
        gone = lambda tmp, name=name: (tmp / "run/checkpoint" / name).unlink()
        add(f"{name} is gone, and its digest is there", gone, "checkpoint")

    def replay(change, tmp):
        path = tmp / "run/checkpoint/replay-00000.pt"
        content = torch.load(path, weights_only=True)
        after = change(content)
        torch.save(content if after is None else after, path)
        seal(tmp / "run")

    add(
        "replay of fewer samples",
        partial(replay, lambda r: {k: v[:, :1] for k, v in r.items()}),
        "replay",
    )
    add("replay without rewards", partial(replay, without_key("reward")), "replay")
    add("replay of words", partial(replay, lambda r: dict.fromkeys(r, "x")), "replay")
    add("replay is a list", partial(replay, lambda r: [1]), "replay")
    lines = {
        "garbage": "garbage\nmore\nlines\n",
        "lists": "[]\n[]\n[]\n",
        "words": '{"iteration": "one"}\n' * 3,
        "cut": '{"iteration": 0}\n{"iter',
        "empty": "",
        "not UTF-8": b"\xff\xff\xff",
        "nested": ("[" * 100_000 + "\n") * 3,
        "long numbers": ('{"iteration": ' + "9" * 5000 + "}\n") * 3,
    }
    for what, content in lines.items():
        cases.append(
            Case(
                f"metrics.jsonl: {what}",
                resume,
                "metrics.jsonl",
                before=partial(text, "metrics.jsonl", content),
            )
        )
    gone = lambda tmp: shutil.rmtree(tmp / "run/checkpoint")
    add("no checkpoint", gone, "no checkpoint")
    add("a file for a checkpoint", lambda tmp: [gone(tmp), text("checkpoint", "x", tmp)])
    add(
        "state.pt is a folder",
        lambda tmp: [without("state.pt", tmp), (tmp / "run/checkpoint/state.pt").mkdir()],
    )
    return cases


@pytest.fixture(scope="session")
def short_run(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("hostile") / "run"
    flags = (*COMMON, *SHORT["dpok.py"], "--num-iterations", 3)
    finish(start("dpok.py", *flags, "--output-dir", run))
    return run


@pytest.mark.parametrize("case", damaged_runs(), ids=str)
def test_run_that_is_damaged(case, short_run, tmp_path, refused):
    """Refused, whatever it is; the rest of the run stays as it was."""
    shutil.copytree(short_run, tmp_path / "run")
    refused("dpok.py", case)
    assert not (tmp_path / "pwned").exists()


def folder_with(name: str, content: str, tmp: Path) -> None:
    (tmp / "there").mkdir()
    (tmp / "there" / name).write_text(content)


PLACES = [
    Case(
        "a file", "zoo --output-dir {tmp}/a", "--output-dir", before=lambda tmp: (tmp / "a").touch()
    ),
    Case(
        "in a file",
        "zoo --output-dir {tmp}/a/b",
        "--output-dir",
        before=lambda tmp: (tmp / "a").touch(),
    ),
    Case("a device", "zoo --output-dir /dev/null", "--output-dir"),
    Case("a name too long", f"zoo --output-dir {'x' * 300}", "--output-dir"),
    Case("a path too long", f"zoo --output-dir {'/'.join(['x' * 200] * 30)}", "--output-dir"),
    Case("not UTF-8", ["zoo", "--output-dir", "{tmp}/\udcff\udcfe"], "--output-dir"),
    Case("of the system", "zoo --output-dir /proc/x", "--output-dir", code=1),
    Case(
        "a foreign file",
        "zoo --output-dir {tmp}/there",
        "other files",
        before=partial(folder_with, "thesis.tex", "x"),
    ),
    Case(
        "metrics of a run",
        "zoo --output-dir {tmp}/there",
        "other files",
        before=partial(folder_with, "metrics.jsonl", "{}"),
    ),
    Case(
        "a LoRA",
        "zoo --output-dir {tmp}/there",
        "other files",
        before=partial(folder_with, LORA, "x"),
    ),
    Case("runs is a file", "zoo", "runs", before=lambda tmp: (tmp / "runs").touch()),
    Case("resume a file", "--resume {tmp}/a", "--resume", before=lambda tmp: (tmp / "a").touch()),
    Case("resume nothing", "--resume {tmp}/a", "--resume"),
    Case("resume a device", "--resume /dev/zero", "--resume"),
    Case("resume a long name", f"--resume {'x' * 300}", "--resume"),
    Case("resume without a value", "--resume", "--resume"),
    Case("no such flag", "zoo --nonsense 3", "--nonsense"),
    Case("no such preset", "nonsense", "nonsense"),
    Case("a word too many", "zoo more words", "more"),
    Case("a value that is none of the choices", "zoo --dtype fp8", "fp8"),
    Case("an empty model", ["zoo", "--model", ""], "--model"),
    Case("a model with a line break", ["zoo", "--model", "a\nb"], "--model"),
    Case(
        "a model that is a file",
        "zoo --model {tmp}/a",
        "--model",
        before=lambda tmp: (tmp / "a").touch(),
    ),
    Case(
        "a model of nothing",
        "zoo --model {tmp}/there",
        "--model",
        before=partial(folder_with, "x", ""),
    ),
    Case(
        "a model whose index is no JSON",
        "zoo --model {tmp}/there",
        "--model",
        before=partial(folder_with, "model_index.json", "{"),
    ),
    Case(
        "a model whose index is a list",
        "zoo --model {tmp}/there",
        "--model",
        before=partial(folder_with, "model_index.json", "[]"),
    ),
    Case(
        "a model whose index is empty",
        "zoo --model {tmp}/there",
        "--model",
        before=partial(folder_with, "model_index.json", "{}"),
    ),
    Case(
        "a model whose index names another class",
        "zoo --model {tmp}/there",
        "--model",
        before=partial(folder_with, "model_index.json", '{"_class_name": "os.system"}'),
    ),
]


DATASETS = [
    Case(
        f"dataset.json: {what}",
        "zoo --dataset {tmp}/run",
        "dataset.json" if what not in ("an empty object",) else "--dataset",
        before=lambda tmp, content=content: [
            (tmp / "run").mkdir(),
            text("dataset.json", content, tmp),
        ],
    )
    for what, content in whole_files("dataset.json").items()
]


@pytest.mark.parametrize("case", DATASETS, ids=str)
def test_data_set_that_is_damaged(case, refused):
    refused("sft_kl.py", case)


@pytest.mark.parametrize("damage", ["cut", "of other samples", "empty", "of scalars"])
def test_shard_that_is_damaged(damage, tmp_path, monkeypatch, capsys):
    """The line names it, and that it may be deleted: then it is drawn again."""
    sft_kl, flags = importlib.import_module("sft_kl"), ["zoo", "--num-inference-steps", 2]
    flags += [*TABLE["sft_kl.py"].smallest.split(), "--num-iterations", 1, "--dataset-size", 2]
    flags += ["--dataset", tmp_path / "data"]
    monkeypatch.setattr(sys, "argv", ["sft_kl.py", *map(str, flags), "--output-dir", "run"])
    monkeypatch.chdir(tmp_path)
    sft_kl.main()
    shard = tmp_path / "data/000000.safetensors"
    tensors = {key: value.clone() for key, value in load_file(shard).items()}  # it maps the file
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "empty":
        shard.write_bytes(b"")
    elif damage == "of scalars":
        save_file({key: value.float().mean() for key, value in tensors.items()}, shard)
    else:
        save_file({key: value[:1].clone() for key, value in tensors.items()}, shard)
    monkeypatch.setattr(sys, "argv", ["sft_kl.py", *map(str, flags), "--output-dir", "again"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        sft_kl.main()
    stderr = capsys.readouterr().err
    assert end.value.code == 1 and "000000.safetensors" in stderr and "delete it" in stderr
    shard.unlink()
    monkeypatch.setattr(sys, "argv", ["sft_kl.py", "--resume", "again"])
    sft_kl.main()
    assert load_file(shard)["x0"].equal(tensors["x0"])


@pytest.mark.parametrize("case", PLACES, ids=str)
def test_place_that_cannot_be(case, refused):
    refused("dpok.py", case)


def test_run_that_was_killed_before_its_first_checkpoint(tmp_path, monkeypatch, capsys):
    """The same command begins it again in its folder."""
    run = tmp_path / "run"

    def killed(self):
        (run / "checkpoint.partial").mkdir()
        (run / "checkpoint.partial" / LORA).write_text("half")
        (run / "metrics.jsonl.partial").write_text("")
        raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(Run, "_save", killed)
        code, stderr = here(patched, capsys, *SMALL, "--output-dir", run)
        assert code != 0 and "killed" in stderr
    assert (run / "args.json").exists() and not (run / LORA).exists()
    code, stderr = here(monkeypatch, capsys, *SMALL, "--output-dir", run)
    assert code == 0 and len(read_metrics(run)) == 1, stderr


def test_resume_and_another_folder(short_run, tmp_path, refused):
    """--resume A --output-dir B neither overwrites A nor forgets B."""
    shutil.copytree(short_run, tmp_path / "run")
    refused("dpok.py", Case("", "--resume {tmp}/run --output-dir {tmp}/out", "--output-dir"))
    assert not (tmp_path / "out").exists()


def here(monkeypatch, capsys, *words) -> tuple[int, str]:
    """dpok.py in this process: its exit code, and what it said on stderr."""
    monkeypatch.setattr(sys, "argv", ["dpok.py", *map(str, words)])
    capsys.readouterr()
    code = 0
    try:
        importlib.import_module("dpok").main()
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().err


SMALL = ["zoo", "--num-inference-steps", 2, "--samples-per-iteration", 2, "--batch-size", 2]
SMALL += ["--gradient-steps", 1, "--value-batch-size", 2, "--num-iterations", 1]


def test_presets_belong_to_the_project(tmp_path, monkeypatch, capsys):
    """From any folder, with another zoo/ in it too; and so does a run that is resumed there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "zoo/sd").mkdir(parents=True)
    code, stderr = here(monkeypatch, capsys, *SMALL, "--output-dir", "run")
    assert code == 0, stderr
    code, stderr = here(monkeypatch, capsys, "--resume", "run", "--num-iterations", 2)
    assert code == 0 and len(read_metrics(tmp_path / "run")) == 2, stderr


def test_own_files_come_before_the_projects(tmp_path, monkeypatch, capsys):
    """And mean the same where the run is resumed, in a folder with other files of their names."""
    begun, resumed = tmp_path / "begun", tmp_path / "resumed"
    for folder, prompt in ((begun, "a cat\n"), (resumed, "a dog\n")):
        (folder / "prompts").mkdir(parents=True)
        (folder / "prompts/zoo.txt").write_text(prompt)
    monkeypatch.chdir(begun)
    flags = ["--prompts-file", "prompts/zoo.txt", "--output-dir", "run"]
    code, stderr = here(monkeypatch, capsys, *SMALL, *flags)
    assert code == 0, stderr
    stored = json.loads((begun / "run/args.json").read_text())
    assert stored["prompts_file"] == str(begun / "prompts/zoo.txt")
    assert stored["model"] == "zoo/sd", "the project's, wherever it lies"
    monkeypatch.chdir(resumed)
    code, stderr = here(monkeypatch, capsys, "--resume", begun / "run", "--num-iterations", 2)
    assert code == 0 and len(read_metrics(begun / "run")) == 2, stderr


def test_a_run_of_the_projects_folder_resumes_elsewhere(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    flags = ["--prompts-file", "prompts/zoo.txt", "--output-dir", tmp_path / "run"]
    code, stderr = here(monkeypatch, capsys, *SMALL, *flags)
    assert code == 0, stderr
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/zoo.txt").write_text("a cat\n")
    monkeypatch.chdir(tmp_path)
    code, stderr = here(monkeypatch, capsys, "--resume", "run", "--num-iterations", 2)
    assert code == 0 and len(read_metrics(tmp_path / "run")) == 2, stderr
    # And back again, by the first command.
    monkeypatch.chdir(ROOT)
    flags = [*SMALL[:-1], 3, *flags, "--resume", tmp_path / "run"]
    code, stderr = here(monkeypatch, capsys, *flags)
    assert code == 0 and len(read_metrics(tmp_path / "run")) == 3, stderr
    stored = json.loads((tmp_path / "run/args.json").read_text())
    assert stored["model"] == "zoo/sd" and stored["prompts_file"] == "prompts/zoo.txt"


REWARD = """
import pathlib
pathlib.Path(__file__).with_name("imported").touch()
def f(images, prompts):
    return images.mean((1, 2, 3))
"""


def test_stored_code_is_run_when_it_is_named_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARD)
    flags = ["--reward", f"{tmp_path}/mine.py:f"]
    code, stderr = here(monkeypatch, capsys, *SMALL, *flags, "--output-dir", "run")
    assert code == 0, stderr
    (tmp_path / "imported").unlink()
    resume = ["--resume", "run", "--num-iterations", 2]
    code, stderr = here(monkeypatch, capsys, *resume)
    assert code == 2 and "--reward" in stderr and "mine.py" in stderr
    assert not (tmp_path / "imported").exists()
    code, stderr = here(monkeypatch, capsys, *resume, *flags)
    assert code == 0 and len(read_metrics(tmp_path / "run")) == 2, stderr


@pytest.mark.parametrize(
    "flag, value",
    [
        ("reward", "http://localhost:1/score"),
        ("reward", "1*llava_bertscore:http://localhost:1/v1+1*jpeg_compressibility"),
        ("push_to_hub", "someone/else"),
    ],
)
def test_stored_servers_and_repositories_are_named_again(
    flag, value, tmp_path, monkeypatch, capsys
):
    """A server would get the user's key, a repository be pushed to with the user's token."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    code, stderr = here(monkeypatch, capsys, *SMALL, "--output-dir", "run")
    assert code == 0, stderr
    index = json.loads((tmp_path / "run/checkpoint/files.json").read_text())
    # The address alone may be edited in the run's own file: it decides no result.
    for name in ("args.json",) if flag == "push_to_hub" else ("args.json", "checkpoint/args.json"):
        file = tmp_path / "run" / name
        stored = json.loads(file.read_text())
        stored.get("arguments", stored)[flag] = value
        file.write_text(json.dumps(stored))
    index["sha256"]["args.json"] = sha256(tmp_path / "run/checkpoint/args.json")
    (tmp_path / "run/checkpoint/files.json").write_text(json.dumps(index))
    code, stderr = here(monkeypatch, capsys, "--resume", "run", "--num-iterations", 2)
    name = f"--{flag.replace('_', '-')}"
    assert code == 2 and f"{name} {value}; give that again" in stderr
    flags = [name, "jpeg_compressibility" if flag == "reward" else "me/mine"]
    monkeypatch.setattr("harness.folder.push_or_end", lambda run, repo: None)
    resume = ["--resume", "run", "--num-iterations", 2, *flags]
    code, stderr = here(monkeypatch, capsys, *resume)
    if flag == "reward":  # another one than the run has
        assert code == 2 and "other --reward" in stderr
    else:
        assert code == 0, stderr


def test_auto_is_the_precision_that_the_run_has(tmp_path, monkeypatch, capsys):
    """So that a command with --dtype auto can be started again, with --resume."""
    run = tmp_path / "run"
    code, stderr = here(monkeypatch, capsys, *SMALL, "--dtype", "bf16", "--output-dir", run)
    assert code == 0, stderr
    resume = ["--resume", run, "--num-iterations", 2, "--dtype", "auto"]
    code, stderr = here(monkeypatch, capsys, *resume)
    assert code == 0 and len(read_metrics(run)) == 2, stderr
    assert json.loads((run / "args.json").read_text())["dtype"] == "bf16"


def test_the_noisiest_step_is_one_of_training(tmp_path, capsys):
    """Stable Diffusion's scheduler has an offset of 1: of 1000 steps the first is at 1000."""
    shutil.copytree(ROOT / "zoo/sd", tmp_path / "sd")
    file = tmp_path / "sd/scheduler/scheduler_config.json"
    offset = {"timestep_spacing": "leading", "steps_offset": 1}
    file.write_text(json.dumps(json.loads(file.read_text()) | offset))
    args = importlib.import_module("dpok").Args(model=str(tmp_path / "sd"))
    check_sampler(replace(args, num_inference_steps=999))
    with pytest.raises(SystemExit):
        check_sampler(replace(args, num_inference_steps=1000))
    assert "--num-inference-steps is 1000" in capsys.readouterr().err


def test_a_run_that_goes_on_meanwhile_is_not_mixed(tmp_path, monkeypatch, capsys):
    """Another process saves while this one, which has read where the run was, loads its models."""
    code, stderr = here(monkeypatch, capsys, *SMALL, "--output-dir", tmp_path / "run")
    assert code == 0, stderr
    dpok, index = importlib.import_module("dpok"), tmp_path / "run/checkpoint/files.json"
    load = dpok.load_stable_diffusion

    def load_meanwhile(*given):
        index.write_text(index.read_text() + "\n")
        return load(*given)

    monkeypatch.setattr(dpok, "load_stable_diffusion", load_meanwhile)
    resume = ["--resume", tmp_path / "run", "--num-iterations", 2]
    code, stderr = here(monkeypatch, capsys, *resume)
    assert code == 2 and "has gone on meanwhile" in stderr
    monkeypatch.undo()
    code, stderr = here(monkeypatch, capsys, *resume)
    assert code == 0 and len(read_metrics(tmp_path / "run")) == 2, stderr


def test_a_rank_that_fails_alone_says_so(monkeypatch, capsys):
    """The first rank of a node says it at once; another, if torchrun has not ended it by then."""
    monkeypatch.setattr(stop, "ALONE_AFTER", 0.1)
    before = signal.getsignal(signal.SIGTERM)
    for rank, expected in ((0, "error: no room"), (3, "error: rank 3: no room")):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, str(rank))
        monkeypatch.setenv("WORLD_SIZE", "4")
        with pytest.raises(SystemExit):
            stop.fail("no room")
        assert expected in capsys.readouterr().err
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "spec",
    [
        "a.py:f",
        "0.5*a.py:f+0.5*clip_score",
        "1*aesthetic+1*b/a.py:f",
        "evil+zoo/a.py:f",
        "a.py",
        "./b/../a.py:f",
    ],
)
@pytest.mark.parametrize("task", ["{} x.txt 2x2", "'{}' x.txt", "x {}", "{}"])
def test_code_is_found_in_every_argument(spec, task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (".", "b", "evil+zoo"):
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "a.py").touch()
    text = task.format(spec)
    [run] = [t.rpartition(":")[0] or t for _, t in parse_sum(spec) if ".py" in t]
    for value in (text, ("image_reward x.txt", text)):
        if spec != "a.py":  # it names no function, and is refused by itself
            assert Path(run) in code_files(value)


def test_code_in_half_a_quote_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.py").touch()
    assert code_files(('a.p"y":f x.txt 2x2',)) == {Path("a.py")}
    assert code_files(("a.py:f 'x.txt",)) == {Path("a.py")}


def test_code_of_the_project_is_run_while_it_is_unchanged(tmp_path, monkeypatch):
    """Outside the run's folder and what lies beside it, where it could have come with the run."""
    for module in (resume, project):
        monkeypatch.setattr(module, "PROJECT", tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("rewards/mine.py", "runs/a/mine.py", "runs/b/mine.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(REWARD)
    run, ours = tmp_path / "runs/a", tmp_path / "rewards/mine.py"
    contents = {f"runs/{name}/mine.py": sha256(ours) for name in "ab"}
    contents["rewards/mine.py"] = sha256(ours)
    resume.check_code(run, "--reward", "x", Path("rewards/mine.py"), contents)
    for theirs in ("runs/a/mine.py", "runs/b/mine.py"):
        with pytest.raises(SystemExit):
            resume.check_code(run, "--reward", "x", Path(theirs), contents)
    (tmp_path / "link.py").symlink_to(run / "mine.py")
    with pytest.raises(SystemExit):
        resume.check_code(run, "--reward", "x", Path("link.py"), contents)
    ours.write_text("# edited")
    with pytest.raises(SystemExit):
        resume.check_code(run, "--reward", "x", Path("rewards/mine.py"), contents)


@pytest.mark.parametrize("edit", ["a dog\na cat\n", "a cat\n", "a cat\na dog\na cow\n", None])
def test_prompts_that_were_edited(edit, tmp_path, monkeypatch, capsys):
    """Between a stop and its resumption: of the same length, a shorter or longer file, or none."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    flags = [*SMALL, "--prompts-file", prompts, "--output-dir", tmp_path / "run"]
    code, stderr = here(monkeypatch, capsys, *flags)
    assert code == 0, stderr
    prompts.unlink() if edit is None else prompts.write_text(edit)
    code, stderr = here(monkeypatch, capsys, "--resume", tmp_path / "run", "--num-iterations", 2)
    assert code == 2 and "--prompts-file" in stderr and "Traceback" not in stderr


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch, capsys):
    """In the third iteration, of which no checkpoint is due: the last one stays as it was."""
    calls = []

    def spoils(self, optimizer, *args, step=Run.step, **kwargs):
        step(self, optimizer, *args, **kwargs)
        calls.append(1)
        if len(calls) == 5:  # the value function's is one of two in an iteration
            optimizer.param_groups[0]["params"][0].data.fill_(float("inf"))

    monkeypatch.setattr(Run, "step", spoils)
    flags = [*SMALL, "--num-iterations", 3, "--save-every", 1, "--output-dir", tmp_path / "run"]
    code, stderr = here(monkeypatch, capsys, *flags)
    assert code == 1 and "--learning-rate" in stderr and "Traceback" not in stderr
    for folder in ("run", "run/checkpoint"):
        state = load_file(tmp_path / folder / LORA)
        assert all(value.isfinite().all() for value in state.values())
    assert iteration_of(tmp_path / "run") == 2


ENDS = {
    "sys.exit(0)": "SystemExit",
    "sys.exit()": "SystemExit",
    "sys.exit('bye')": "SystemExit",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "raise GeneratorExit": "GeneratorExit",
    "raise MemoryError": "MemoryError",
    "raise RecursionError": "RecursionError",
    "raise BaseException('x')": "BaseException",
    "raise StopIteration": "StopIteration",
    "assert False": "AssertionError",
    "1 / 0": "ZeroDivisionError",
    "return None": "",
    "return 'words'": "",
    "return images": "",
    "return images.mean((1, 2, 3))[:1]": "",
    "return images.mean((1, 2, 3)) / 0": "",
    "return images.mean((1, 2, 3)) * float('nan')": "",
    "return [None] * len(prompts)": "",
    "return images.mean((1, 2, 3)).to(torch.complex64) * 1j": "",
    "return {}": "",
}


@pytest.mark.parametrize("code", ENDS)
def test_reward_that_does_more_than_return(code, tmp_path, monkeypatch, capsys):
    """In the second iteration: the first one is saved, and the run has failed."""
    lines = ["import sys, torch", "calls = []", "def f(images, prompts):", "    calls.append(1)"]
    lines += [f"    if len(calls) == 2: {code}", "    return images.mean((1, 2, 3))"]
    (tmp_path / "mine.py").write_text("\n".join(lines))
    flags = [*SMALL, "--num-iterations", 3, "--reward", f"{tmp_path}/mine.py:f"]
    ended, stderr = here(monkeypatch, capsys, *flags, "--output-dir", tmp_path / "run")
    errors = [line for line in stderr.replace("\r", "\n").splitlines() if "error:" in line]
    assert ended == 1 and len(errors) == 1 and "Traceback" not in stderr, stderr
    assert ENDS[code] in errors[0] and "mine.py" in errors[0]
    assert iteration_of(tmp_path / "run") == 1 == len(read_metrics(tmp_path / "run"))


@pytest.mark.parametrize("code", [code for code in ENDS if "return" not in code])
def test_reward_that_does_more_than_be_imported(code, tmp_path, refused):
    (tmp_path / "mine.py").write_text(f"import sys\n{code}\ndef f(images, prompts): pass\n")
    command = ["zoo", "--reward", "{tmp}/mine.py:f", "--output-dir", "{tmp}/out"]
    refused("dpok.py", Case(code, command, ("--reward", ENDS[code])))


def failing(error: BaseException):
    @guard.command
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, words",
    [
        (RuntimeError("a fault of ours\nin two lines"), ("RuntimeError", "report", "--traceback")),
        (RuntimeError("x" * 100_000), ("RuntimeError", "report")),
        (torch.OutOfMemoryError("CUDA out of memory"), ("--micro-batch-size",)),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), ("--micro-batch-size",)),
        (MemoryError(), ("--micro-batch-size",)),
        (OSError(28, "No space left on device"), ("No space left",)),
        (SystemExit(0), ("from within",)),
        (SystemExit(3), ("from within",)),
        (GeneratorExit(), ("from within",)),
        (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates"), ("UnicodeEncodeError",)),
    ],
    ids=str,
)
def test_fault_of_ours(error, words, tmp_path, monkeypatch, capsys):
    case = Case("", "", words)
    ends_in_one_line(case, failing(error), "dpok.py", tmp_path, monkeypatch, capsys)


def test_traceback_is_shown_where_it_is_asked_for(monkeypatch, capsys):
    for words, variable in ((["--traceback"], "0"), ([], "1")):
        monkeypatch.setattr(sys, "argv", ["dpok.py", *words])
        monkeypatch.setenv("CLEAN_DIFFUSION_TRACEBACK", variable)
        with pytest.raises(SystemExit):
            failing(ValueError("seen"))()
        stderr = capsys.readouterr().err
        assert "Traceback" in stderr and "raise error" in stderr and "error: ValueError" in stderr


def test_fault_after_the_first_iteration_saves_what_there_is(tmp_path, monkeypatch, capsys):
    """A fault of ours between two iterations: exit code 1, and nothing is lost."""
    calls = []

    def breaks(self, metrics, warn_above=None, log=Run.log):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("a fault")
        log(self, metrics, warn_above)

    monkeypatch.setattr(Run, "log", breaks)
    flags = [*SMALL, "--num-iterations", 5, "--output-dir", tmp_path / "run"]
    code, stderr = here(monkeypatch, capsys, *flags)
    assert code == 1 and "RuntimeError: a fault" in stderr and "Traceback" not in stderr
    assert iteration_of(tmp_path / "run") == 2


def test_fault_of_the_save_itself(tmp_path, monkeypatch, capsys):
    """Of two faults both are told, and the checkpoint stays."""

    def breaks(self, metrics, warn_above=None):
        monkeypatch.setattr(Run, "_save", breaks)
        raise RuntimeError("a fault")

    monkeypatch.setattr(Run, "log", breaks)
    monkeypatch.setattr(Run, "_save", Run._save)
    code, stderr = here(monkeypatch, capsys, *SMALL, "--output-dir", tmp_path / "run")
    assert code == 1 and "RuntimeError: a fault" in stderr and "not be saved" in stderr
    assert "Traceback" not in stderr and iteration_of(tmp_path / "run") == 0


def test_ctrl_c_before_a_run_has_begun(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dpok.py"])
    with pytest.raises(SystemExit) as end:
        failing(KeyboardInterrupt())()
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_message_of_a_rank_without_others(monkeypatch, capsys):
    """LOCAL_RANK=1 alone, as a shell may have it, takes no message away."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    code, stderr = here(monkeypatch, capsys, "nonsense")
    assert code == 2 and "nonsense" in stderr


def test_lock_ends_with_its_process(tmp_path):
    """A worker that a reward has forked does not keep it."""
    file, worker = lock(tmp_path), os.fork()
    if worker == 0:
        time.sleep(60)
        os._exit(0)
    try:
        with pytest.raises(CheckpointError, match="another process"):
            lock(tmp_path)
        time.sleep(0.2)
        file.close()
        lock(tmp_path).close()
    finally:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def test_checkpoint_that_is_a_link(tmp_path):
    """Saved again and again; what it links to stays."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint").symlink_to(elsewhere)
    for number in range(3):
        with new_checkpoint(tmp_path / "run") as folder:
            (folder / "state.pt").write_text(str(number))
    assert (tmp_path / "run/checkpoint/state.pt").read_text() == "2"
    assert (elsewhere / "mine").read_text() == "x"


def test_two_runs_of_one_second_have_folders_of_their_own(tmp_path):
    names = {made_anew(tmp_path / "runs/a__b__0__20260101-000000").name for _ in range(3)}
    assert len(names) == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = [field.name for field in fields(importlib.import_module("dpok").Args)]


@pytest.fixture(scope="session")
def fuzzed_run(short_run, tmp_path_factory) -> Path:
    return Path(shutil.copytree(short_run, tmp_path_factory.mktemp("fuzzed") / "run"))


def resumes_or_is_refused(run: Path, name: str, content: bytes) -> None:
    """Reads the arguments of a run, one file of which has this content."""
    path = run / name
    before = path.read_bytes()
    try:
        path.write_bytes(content)
        if name == "checkpoint/args.json":
            seal(run)
        with contextlib.suppress(Ended):
            parse_args(importlib.import_module("dpok").PRESETS, "", words=["--resume", str(run)])
    finally:
        path.write_bytes(before)
        seal(run)


QUICK = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@QUICK
@given(
    name=st.sampled_from(["args.json", "checkpoint/args.json"]),
    key=st.sampled_from(FIELDS) | st.text(max_size=9),
    value=JSON,
)
def test_any_value_of_an_argument(fuzzed_run, name, key, value):
    stored = json.loads((fuzzed_run / name).read_text())
    stored.get("arguments", stored)[key] = value
    resumes_or_is_refused(fuzzed_run, name, json.dumps(stored).encode())


@QUICK
@given(
    name=st.sampled_from(["args.json", "checkpoint/args.json", "checkpoint/files.json"]),
    tree=JSON,
    start=st.integers(0, 400),
    noise=st.binary(max_size=9),
)
def test_any_content_of_a_stored_file(fuzzed_run, name, tree, start, noise):
    resumes_or_is_refused(fuzzed_run, name, json.dumps(tree).encode())
    content = (fuzzed_run / name).read_bytes()
    resumes_or_is_refused(fuzzed_run, name, content[:start] + noise + content[start + 3 :])


@QUICK
@given(
    words=st.lists(st.sampled_from([*FIELDS, "zoo", "5", "x", "1e400", "--"]), max_size=6),
    text=st.text(),
)
def test_any_words(words, text):
    """Of a command line: arguments, or one line."""
    words = [f"--{word.replace('_', '-')}" if word in FIELDS else word for word in words]
    with contextlib.suppress(Ended):
        parse_args(importlib.import_module("dpok").PRESETS, "", words=[*words, text])
