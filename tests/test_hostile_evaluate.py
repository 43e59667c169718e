"""What evaluate.py and human_eval.py do with damaged files, wrong numbers and places: one line.

And what was wrong in silence: names, weights and scores that are not those that were asked for.
"""

import json
import os
import resource
import shutil
import sys
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import Case, ends_in_one_line
from safetensors.torch import load_file, save_file
from test_evaluate import make_lora

import evaluate
import human_eval
from common.lora import FILE_NAME
from evaluation.digests import score_keys
from evaluation.models import names_of, read_models
from evaluation.places import to_json
from evaluation.settings import Settings
from evaluation.statistics import compare

PROMPTS = ["A cat and a dog", "A green colored rabbit"]
FLAGS = "--model ./model --prompts-file prompts.txt --rewards mine.py:red --images-per-prompt 2 "
FLAGS += "--shard-size 2 --num-inference-steps 2 --guidance-scale 1 --output-dir out"
DRAW = "build --model ./model --prompt cat --lora run --images-per-prompt 1 "
DRAW += "--num-inference-steps 2 --guidance-scale 1"
BUILD = "build --evaluation out --images-per-prompt 1 --output-dir page"
TALLY = "tally study/a.json"
SHARD = "out/samples/run/00000.npz"


@pytest.fixture(scope="module")
def prepared(tiny_sd, tmp_path_factory):
    """A model, a run, an evaluation of it, a page with its key, and a rater's answers."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "model").symlink_to(tiny_sd)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "mine.py").write_text("def red(images, prompts): return images[:, 0].mean((1, 2))\n")
    make_lora(tiny_sd, folder / "run", 2, 0.3, "jpeg_compressibility")
    make_lora(tiny_sd, folder / "other", 3, 0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run(patch, evaluate.main, "evaluate.py", f"{FLAGS} --lora run")
        words = "--images-per-prompt 2 --output-dir study --shuffle-seed 1"
        run(patch, human_eval.main, "human_eval.py", f"build --evaluation out {words}")
    key = json.loads((folder / "study/key.json").read_text())
    answers = {"0": {"overall": "left", "fidelity": "similar"}, "1": {"overall": "not_loaded"}}
    saved = {"study": key["study"], "rater": "", "session": "1f", "answers": answers}
    (folder / "study/a.json").write_text(json.dumps(saved))
    return folder


def run(patch, main: Callable, script: str, words: str) -> None:
    patch.setattr(sys, "argv", [script, *words.split()])
    main()


@pytest.fixture
def place(prepared, tmp_path, monkeypatch):
    """A copy of `prepared`, in which the command runs, on a machine of 16 GB and a small disk."""
    monkeypatch.setattr("evaluation.settings.memory_size", lambda: 16e9)
    monkeypatch.setattr("evaluation.settings.disk_size", lambda folder: 100e9)
    shutil.copytree(prepared, tmp_path / "case", symlinks=True)
    monkeypatch.chdir(tmp_path / "case")
    return tmp_path / "case"


@contextmanager
def room_again():
    """A disk that gets full within it has room after it, for pytest's own files too."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def full_disk(tmp: Path, size: int) -> None:
    """No file of this process gets larger than `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def put(tmp: Path, file: str, content: bytes | str) -> None:
    path = tmp / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def folder_at(tmp: Path, file: str) -> None:
    (tmp / file).unlink(missing_ok=True)
    (tmp / file).mkdir()


def fifo_at(tmp: Path, file: str) -> None:
    (tmp / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp / file).unlink(missing_ok=True)
    os.mkfifo(tmp / file)


def zeros_at(tmp: Path, file: str) -> None:
    (tmp / file).unlink(missing_ok=True)
    (tmp / file).symlink_to("/dev/zero")


def cut(tmp: Path, file: str) -> None:
    put(tmp, file, (tmp / file).read_bytes()[:-20])


def large(tmp: Path, file: str) -> None:
    os.truncate(tmp / file, (1 << 26) + 1)


DAMAGES = {
    "empty": partial(put, content=""),
    "cut": cut,
    "not UTF-8": partial(put, content=b'{"a": "\xff\xfe"}'),
    "null byte": partial(put, content=b"\0" * 100),
    "a list": partial(put, content="[1, 2]"),
    "null": partial(put, content="null"),
    "a number": partial(put, content="3"),
    "nested": partial(put, content="[" * 100_000 + "]" * 100_000),
    "nested objects": partial(put, content='{"settings": ' * 100_000),
    "5000 digits": partial(put, content=f'{{"study": {"9" * 5000}}}'),
    "NaN": partial(put, content='{"reward": NaN, "study": NaN}'),
    "infinite": partial(put, content='{"reward": 1e999, "study": -Infinity}'),
    "folder": folder_at,
    "FIFO": fifo_at,
    "device": zeros_at,
}
"""Of any file with an object in JSON."""


def edited(tmp: Path, file: str, change: Callable[[dict], None]) -> None:
    content = json.loads((tmp / file).read_text())
    change(content)
    put(tmp, file, json.dumps(content))


def without(*keys: str | int) -> Callable[[dict], None]:
    def change(tree):
        for key in keys[:-1]:
            tree = tree[key]
        del tree[keys[-1]]

    return change


def with_value(value, *keys: str | int) -> Callable[[dict], None]:
    def change(tree):
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return change


def edits(name: str, file: str, command: str, changes: dict) -> list[Case]:
    """A case for each of `changes` to a file, all of which must name it."""
    return [
        Case(
            f"{name}: {what}",
            command,
            (Path(file).name, "; "),
            before=partial(edited, file=file, change=change),
        )
        for what, change in changes.items()
    ]


def damages(name: str, file: str, command: str) -> list[Case]:
    return [
        Case(f"{name}: {what}", command, (Path(file).name, "; "), before=partial(damage, file=file))
        for what, damage in DAMAGES.items()
    ]


SETTINGS = [*Settings.__annotations__]
WRONG_SETTINGS = {
    "prompts": ["a cat", {}, [], [1], ["a cat", "a cat"], ["\ud800"], ["a\0b"]],
    "model": [3, None],
    "images_per_prompt": ["2", 0, -1, 1 << 70, 2.5],
    "shard_size": [0, [4], 10**400],
    "num_inference_steps": [None, 0],
    "guidance_scale": ["high"],
    "eta": [[1.0]],
    "seed": ["0"],
    "dtype": [32],
}
DESCRIPTIONS = {f"without {key}": without("settings", key) for key in SETTINGS}
DESCRIPTIONS |= {
    f"{key} {str(value)[:10]!a} {number}": with_value(value, "settings", key)
    for key, values in WRONG_SETTINGS.items()
    for number, value in enumerate(values)
}
DESCRIPTIONS |= {
    "without settings": without("settings"),
    "without models": without("models"),
    "a setting more": with_value(1, "settings", "hidden"),
    "models as a list": with_value(["base", "run"], "models"),
    "a digest that is a number": with_value(3, "models", "run"),
    "a name that is a path": with_value("", "models", "../../etc"),
    "a name with a blank": with_value("", "models", "a b"),
    "a name with half a character": with_value("", "models", "\udcff"),
    "an empty name": with_value("", "models", ""),
}
KEYS = {f"without {key}": without(key) for key in ("study", "models", "shuffle_seed", "pairs")}
KEYS |= {f"pair without {key}": without("pairs", 0, key) for key in ("prompt", "image", "left")}
KEYS |= {
    "study a number": with_value(3, "study"),
    "models an object": with_value({"base": 1, "run": 2}, "models"),
    "one model": with_value(["base"], "models"),
    "three models": with_value(["base", "run", "x"], "models"),
    "a model twice": with_value(["run", "run"], "models"),
    "models of half characters": with_value(["\ud800", "run"], "models"),
    "pairs an object": with_value({}, "pairs"),
    "a pair that is null": with_value(None, "pairs", 0),
    "a side of another model": with_value("x", "pairs", 0, "left"),
    "both sides alike": lambda key: key["pairs"][0].update(left="base", right="base"),
    "a side that is a list": with_value(["base"], "pairs", 0, "left"),
    "a seed that is text": with_value("1", "shuffle_seed"),
    "questions of nobody": with_value("beauty", "questions"),
    "questions as a list": with_value(["sets"], "questions"),
    "sets of nothing": with_value(0, "set_size"),
    "a set size of 5000 digits": with_value(-(10**4000), "set_size"),
    "a set size that is text": with_value("4", "set_size"),
}
ANSWERS = {f"without {key}": without(key) for key in ("study", "session", "answers")}
ANSWERS |= {
    "session a list": with_value(["1f"], "session"),
    "study a number": with_value(3, "study"),
    "rater null": with_value(None, "rater"),
    "answers a list": with_value([], "answers"),
    "a pair that is a list": with_value(["left"], "answers", "0"),
    "a pair that is text": with_value("left", "answers", "0"),
    "an answer that is a number": with_value(1, "answers", "0", "overall"),
    "an answer that is a list": with_value([1], "answers", "0", "overall"),
    "an answer that is none": with_value("middle", "answers", "0", "overall"),
    "a question that is none": with_value("left", "answers", "0", "beauty"),
    "a question of another page": with_value("left", "answers", "0", "alignment"),
    "a pair that is not there": with_value({}, "answers", "17"),
    "a pair with a sign": with_value({}, "answers", "-1"),
    "a pair with a zero before": with_value({}, "answers", "00"),
    "a pair of 5000 digits": with_value({}, "answers", "9" * 5000),
    "a pair of odd digits": with_value({}, "answers", "\u00b2"),
    "a pair of half a character": with_value({}, "answers", "\ud800"),
    "something more": with_value(1, "more"),
}
RUNS = {
    "steps as text": with_value("3", "num_inference_steps"),
    "guidance as text": with_value("2", "guidance_scale"),
    "eta null": with_value(None, "eta"),
    "model a number": with_value(3, "model"),
    "reward a list": with_value(["aesthetic"], "reward"),
    "reward null": with_value(None, "reward"),
    "reward of an infinite weight": with_value("1e999*aesthetic", "reward"),
    "tasks as text": with_value("aesthetic prompts.txt", "tasks"),
    "a task that is a number": with_value([3], "tasks"),
    "a task without a reward": with_value([""], "tasks"),
    "a task with half a quote": with_value(["'aesthetic"], "tasks"),
}


def stored(tmp: Path, file: str = SHARD, **changes) -> None:
    """Other arrays in a shard; None takes one away."""
    arrays = dict(np.load(tmp / file)) | changes
    arrays = {key: value for key, value in arrays.items() if value is not None}
    np.savez(tmp / file, **arrays)


def score(tmp: Path, values) -> None:
    [key] = {*np.load(tmp / SHARD)} - {"images", "kl"}
    stored(tmp, **{key: values})


def compressed(tmp: Path) -> None:
    np.savez_compressed(tmp / SHARD, images=np.zeros((2, 4096, 4096, 3), np.uint8))


def claims(tmp: Path) -> None:
    """An array that says that it has a terabyte."""
    with zipfile.ZipFile(tmp / SHARD, "w") as archive, archive.open("images.npy", "w") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (2, 1 << 19, 1 << 20, 3)}
        np.lib.format.write_array_header_1_0(file, header)


def member(tmp: Path, content: bytes) -> None:
    with zipfile.ZipFile(tmp / SHARD, "w") as archive:
        archive.writestr("images.npy", content)


def middle(tmp: Path, at: float) -> None:
    """A few bytes are others."""
    content = bytearray((tmp / SHARD).read_bytes())
    place = int(at * len(content))
    content[place : place + 8] = b"\xff" * 8
    put(tmp, SHARD, bytes(content))


images = np.zeros((2, 64, 64, 3), np.uint8)
SHARDS = {
    "empty": partial(put, file=SHARD, content=""),
    "cut": partial(cut, file=SHARD),
    "no archive": partial(put, file=SHARD, content=b"PK\3\4" + b"x" * 300),
    "a bare array": lambda tmp: (
        np.save(tmp / SHARD.replace(".npz", ".npy"), images)
        or (tmp / SHARD.replace(".npz", ".npy")).replace(tmp / SHARD)
    ),
    "a pickle": partial(put, file=SHARD, content=b"\x80\x04}\x94."),
    "objects": partial(stored, images=np.array([{}, {}])),
    "a pickle in the archive": partial(member, content=b"\x80\x04}\x94."),
    "an empty array": partial(member, content=b""),
    "an array of another format": partial(member, content=b"\x93NUMPY\x09\x00" + b" " * 99),
    "a header that is no header": partial(member, content=b"\x93NUMPY\x01\x00\x04\x00{{{{"),
    "a negative shape": partial(
        member,
        content=b"\x93NUMPY\x01\x00\x46\x00{'descr': '|u1', 'fortran_order': False, "
        b"'shape': (-2, 64, 64, 3)}     ",
    ),
    "more claimed than there is": claims,
    "compressed": compressed,
    "no pictures": partial(stored, images=None),
    "floats": partial(stored, images=images.astype(np.float32)),
    "grey": partial(stored, images=images[..., :1]),
    "flat": partial(stored, images=images.reshape(2, -1)),
    "one picture": partial(stored, images=images[:1]),
    "pictures without pixels": partial(stored, images=images[:, :0]),
    "a KL of other shape": partial(stored, kl=np.zeros((2, 2), np.float32)),
    "a KL that is NaN": partial(stored, kl=np.array([0, np.nan], np.float32)),
    "a KL as text": partial(stored, kl=np.array(["1", "2"])),
    "a score of integers": partial(score, values=np.array([1, 2])),
    "scores too many": partial(score, values=np.zeros(3, np.float32)),
    "an infinite score": partial(score, values=np.array([0, np.inf], np.float32)),
    "complex scores": partial(score, values=np.zeros(2, np.complex64)),
    "folder": partial(folder_at, file=SHARD),
    "FIFO": partial(fifo_at, file=SHARD),
    "device": partial(zeros_at, file=SHARD),
    "changed at the begin": partial(middle, at=0),
    "changed in the middle": partial(middle, at=0.5),
    "changed at the end": partial(middle, at=0.999),
}


def lora(tmp: Path, change: Callable[[dict], dict], file: str = f"other/{FILE_NAME}") -> None:
    save_file(change(load_file(tmp / file)), tmp / file)


def with_first(state: dict, value: float) -> dict:
    key = sorted(state)[0]
    state[key].flatten()[0] = value
    return state


def whole_unet(tmp: Path, change: Callable[[dict], None] | None = None, weight: float = 0) -> None:
    """other/unet as --lora-rank 0 leaves it, with a config or a weight that is another."""
    (tmp / f"other/{FILE_NAME}").unlink()
    shutil.copytree(tmp / "model/unet", tmp / "other/unet")
    if change:
        edited(tmp, "other/unet/config.json", change)
    if weight:
        file = "other/unet/diffusion_pytorch_model.safetensors"
        lora(tmp, partial(with_first, value=weight), file)


def header(tmp: Path, size: int, text: str = "{}") -> None:
    put(tmp, f"other/{FILE_NAME}", size.to_bytes(8, "little") + text.encode())


def other_model(tmp: Path, change: Callable[[Path], None]) -> None:
    """./model as a folder of its own, changed."""
    real = (tmp / "model").resolve()
    (tmp / "model").unlink()
    shutil.copytree(real, tmp / "model")
    change(tmp / "model")


def whole(model: Path, part: str, key: str, value: float = float("nan")) -> None:
    """One weight of a part of the model is another."""
    file = model / part / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state[key][0] = value
    save_file(state, file, metadata={"format": "pt"})


LORAS = {
    "NaN": partial(lora, change=partial(with_first, value=float("nan"))),
    "infinite": partial(lora, change=partial(with_first, value=float("inf"))),
    "too large for float32": partial(
        lora, change=lambda state: with_first({k: v.double() for k, v in state.items()}, 1e300)
    ),
    "empty": partial(put, file=f"other/{FILE_NAME}", content=""),
    "cut": partial(cut, file=f"other/{FILE_NAME}"),
    "header too large": partial(header, size=1 << 60),
    "header of 200 MB": partial(header, size=200 << 20),
    "header without tensors": partial(header, size=2),
    "header that is no JSON": partial(header, size=2, text="[["),
    "a key too many": partial(lora, change=lambda state: state | {"x": torch.zeros(1)}),
    "a key missing": partial(lora, change=lambda state: dict(list(state.items())[1:])),
    "other shapes": partial(
        lora, change=lambda state: {key: value[:, :-1].clone() for key, value in state.items()}
    ),
    "no LoRA": partial(lora, change=lambda state: {"x": torch.zeros(1)}),
    "FIFO": partial(fifo_at, file=f"other/{FILE_NAME}"),
    "device": partial(zeros_at, file=f"other/{FILE_NAME}"),
    "folder": partial(folder_at, file=f"other/{FILE_NAME}"),
    "UNet with NaN": partial(whole_unet, weight=float("nan")),
    "UNet of another width": partial(
        whole_unet, change=with_value([1 << 20] * 4, "block_out_channels")
    ),
    "UNet of more layers": partial(whole_unet, change=with_value(10**9, "layers_per_block")),
    "UNet of other blocks": partial(whole_unet, change=with_value(["os.system"], "up_block_types")),
}
LONG = "x" * 300
DEEP = "/".join(["y" * 200] * 30)
NUMBERS = {
    "images-per-prompt": ["1000000000000", "0", "-1", str(1 << 70), "100000000"],
    "shard-size": ["0", "-3"],
    "num-inference-steps": ["1001", "1000000000000", "0"],
    "seed": [str(1 << 64), "-1"],
    "eta": ["1.5", "1e-300", "1e-5", "-1", "nan", "inf"],
    "guidance-scale": ["nan", "inf", "-1"],
    "micro-batch-size": ["0", "-1"],
    "shown-prompts": ["0", "-1"],
    "shown-images": ["0"],
}


def evaluates(name: str, more: str, words, before=None, code: int = 2) -> Case:
    return Case(name, f"{FLAGS} {more}", words, code, before)


CASES = [
    *damages("evaluation.json", "out/evaluation.json", f"{FLAGS} --lora run"),
    *damages("evaluation.json for a page", "out/evaluation.json", BUILD),
    *edits("evaluation.json", "out/evaluation.json", f"{FLAGS} --lora run", DESCRIPTIONS),
    *edits("evaluation.json for a page", "out/evaluation.json", BUILD, DESCRIPTIONS),
    *damages("args.json", "run/args.json", f"{FLAGS} --lora run"),
    *edits("args.json", "run/args.json", f"{FLAGS} --lora run", RUNS),
    *damages("key.json", "study/key.json", TALLY),
    *edits("key.json", "study/key.json", TALLY, KEYS),
    *damages("answers", "study/a.json", TALLY),
    *edits("answers", "study/a.json", TALLY, ANSWERS),
    *(
        Case(f"samples for a page: {name}", BUILD, ("00000.npz", "delete it"), before=damage)
        for name, damage in SHARDS.items()
    ),
    *(
        evaluates(f"samples: {name}", "--lora run", ("00000.npz", "delete it"), SHARDS[name])
        for name in ("empty", "objects", "one picture", "an infinite score")
    ),
    evaluates(
        "samples: of another size",
        "--lora run",
        ("00000.npz", "delete it"),
        partial(stored, images=images[:, :32, :32]),
    ),
    Case(
        "samples for a page: of two sizes",
        BUILD,
        ("size", "anew"),
        before=partial(stored, images=images[:, :32, :32]),
    ),
    Case(
        "samples for a page: one is not there",
        BUILD,
        ("--evaluation", "run the command"),
        before=lambda tmp: (tmp / SHARD).unlink(),
    ),
    *(
        evaluates(f"LoRA: {name}", "--output-dir out/new --lora other", ("--lora", "; "), damage)
        for name, damage in LORAS.items()
    ),
    *(
        evaluates(f"--{flag} {value}", f"--output-dir out/new --{flag} {value}", f"--{flag}")
        for flag, values in NUMBERS.items()
        for value in values
    ),
    evaluates(
        "--shard-size of all",
        "--output-dir out/new --images-per-prompt 1000 --shard-size 1000000000 "
        "--prompts-file many.txt",
        ("--shard-size", "lower"),
        lambda tmp: put(tmp, "many.txt", "\n".join(map(str, range(100_000)))),
    ),
    evaluates(
        "--micro-batch-size of memory",
        "--output-dir out/new --images-per-prompt 50000 --micro-batch-size 100000000 "
        "--shard-size 1 --num-inference-steps 1000",
        ("--micro-batch-size", "lower"),
    ),
    evaluates(
        "more pictures than the disk",
        "--output-dir out/new --images-per-prompt 100000 --shard-size 100 --prompts-file many.txt",
        ("--images-per-prompt", "disk"),
        lambda tmp: put(tmp, "many.txt", "\n".join(map(str, range(1000)))),
    ),
    evaluates(
        "a sheet too wide",
        "--output-dir out/new --images-per-prompt 20000 --shown-images 20000",
        "--shown-images",
    ),
    evaluates(
        "a sheet too high",
        "--output-dir out/new --prompts-file many.txt --shown-prompts 100000",
        "--shown-prompts",
        lambda tmp: put(tmp, "many.txt", "\n".join(map(str, range(10000)))),
    ),
    *(
        Case(f"build {flag} {value}", f"{DRAW} --output-dir page --{flag} {value}", f"--{flag}")
        for flag, value in (
            ("images-per-prompt", "1000000000000"),
            ("num-inference-steps", "1001"),
            ("seed", str(1 << 64)),
            ("eta", "1e-300"),
            ("shuffle-seed", "-1"),
            ("set-size", "0"),
            ("set-size", "1000000000000"),
            ("micro-batch-size", "0"),
        )
    ),
    evaluates("the same LoRA twice", "--lora run --lora run", ("--lora run", "once")),
    evaluates("the same LoRA with a slash", "--lora run --lora run/", ("--lora run", "once")),
    evaluates(
        "the same LoRA as its file", f"--lora run --lora run/{FILE_NAME}", ("--lora", "once")
    ),
    evaluates(
        "the same LoRA by a link",
        "--lora run --lora link",
        ("--lora link", "--lora run", "once"),
        lambda tmp: (tmp / "link").symlink_to("run"),
    ),
    evaluates(
        "the same LoRA from elsewhere",
        "--lora run --lora out/../run",
        ("--lora", "once"),
    ),
    evaluates("LoRA: a device", "--lora /dev/zero", "--lora /dev/zero"),
    evaluates("LoRA: a FIFO", "--lora fifo", "--lora fifo", partial(fifo_at, file="fifo")),
    evaluates("LoRA: a name too long", f"--lora {LONG}", "--lora"),
    evaluates("LoRA: a path too long", f"--lora {DEEP}", "--lora"),
    evaluates("LoRA: a null byte", "--lora a\0b", "--lora"),
    evaluates("LoRA: not UTF-8", "--lora a\udcff", "--lora"),
    evaluates("LoRA: under a file", "--lora prompts.txt/run", "--lora"),
    evaluates("model: a name too long", f"--model ./{LONG}", "--model"),
    evaluates("model: a null byte", "--model a\0b/c", "--model"),
    evaluates("reward: a null byte", "--rewards a\0b.py:red", "--rewards"),
    evaluates("reward: not UTF-8", "--rewards \udcff.py:red", "--rewards"),
    evaluates("reward: a name too long", f"--rewards {LONG}.py:red", "--rewards"),
    evaluates("reward: a device", "--rewards /dev/zero.py:red", "--rewards"),
    evaluates("reward: weights too long", f"--rewards image_reward:{LONG}", "--rewards"),
    *(
        Case(
            f"prompt: {name}",
            FLAGS.replace("--prompts-file prompts.txt", f"--prompt {prompt}"),
            "--prompt",
        )
        for name, prompt in (("half a character", "a\udcff"), ("a null byte", "a\0b"))
    ),
    evaluates("output: a file", "--output-dir prompts.txt", "--output-dir"),
    evaluates("output: under a file", "--output-dir prompts.txt/a/b", "--output-dir"),
    evaluates("output: a name too long", f"--output-dir {LONG}", "--output-dir"),
    evaluates("output: a deep name too long", f"--output-dir a/b/{LONG}/c", "--output-dir"),
    evaluates("output: a path too long", f"--output-dir {DEEP}", "--output-dir"),
    evaluates("output: not UTF-8", "--output-dir a\udcff", "--output-dir"),
    evaluates("output: a null byte", "--output-dir a\0b", "--output-dir"),
    evaluates("output: a device", "--output-dir /dev/null", "--output-dir"),
    evaluates("output: no folder can be made", "--output-dir /proc/a/b", "--output-dir"),
    evaluates("output: read-only", "--output-dir /sys/a", "--output-dir"),
    evaluates(
        "output: a link to nowhere",
        "--output-dir link",
        "--output-dir",
        lambda tmp: (tmp / "link").symlink_to("nowhere"),
    ),
    evaluates("output: a FIFO", "--output-dir fifo", "--output-dir", partial(fifo_at, file="fifo")),
    evaluates("output: something else", "--output-dir run", "--output-dir"),
    *(
        Case(f"build {name}", f"{BUILD} --output-dir {output}", "--output-dir")
        for name, output in (
            ("output: a file", "prompts.txt"),
            ("output: under a file", "prompts.txt/a"),
            ("output: a name too long", LONG),
            ("output: not UTF-8", "a\udcff"),
            ("output: a null byte", "a\0b"),
            ("output: a device", "/dev/full"),
            ("output: read-only", "/sys/a"),
            ("output: a page", "study"),
        )
    ),
    *(
        Case(f"tally {name}", f"{TALLY} --output {output}", "--output")
        for name, output in (
            ("output: a folder", "out"),
            ("output: under a file", "prompts.txt/a"),
            ("output: a name too long", LONG),
            ("output: not UTF-8", "a\udcff"),
            ("output: a null byte", "a\0b"),
            ("output: a device", "/dev/full"),
            ("output: read-only", "/sys/a"),
            ("output: the answers", "study/a.json"),
            ("output: the answers by another name", "./run/../study/a.json"),
        )
    ),
    Case(
        "tally output: the key",
        f"{TALLY} --key study/key.json --output study/key.json",
        ("--output", "overwrite"),
    ),
    Case("tally: a key for answers", "tally study/key.json", ("key.json", "answers")),
    Case("tally: answers for a key", f"{TALLY} --key study/a.json", ("a.json", "--key")),
    Case("tally: key and answers swapped", "tally study/key.json --key study/a.json", "--key"),
    Case("tally: no answers", "tally", "answers"),
    Case("tally: answers not there", "tally nowhere.json --key study/key.json", "nowhere.json"),
    Case("tally: key not there", f"{TALLY} --key nowhere.json", ("nowhere.json", "--key")),
    Case("tally: a folder", "tally study --key study/key.json", "study"),
    Case("tally: a device", "tally /dev/zero --key study/key.json", "/dev/zero"),
    Case("tally: a device for a key", f"{TALLY} --key /dev/zero", "/dev/zero"),
    Case("tally: a name too long", f"tally {LONG} --key study/key.json", "answers"),
    Case("tally: a key too long", f"{TALLY} --key {LONG}", "--key"),
    Case("tally: a null byte", "tally a\0b --key study/key.json", "answers"),
    Case("tally: a key not UTF-8", f"{TALLY} --key \udcff", "--key"),
    Case("tally: pictures for answers", f"tally {SHARD} --key study/key.json", "00000.npz"),
    Case("tally: twice the same", f"{TALLY} study/a.json", "one rater"),
    Case("tally: answers of 64 MB", TALLY, "a.json", before=partial(large, file="study/a.json")),
    Case("build: an evaluation that is a file", f"{BUILD} --evaluation run", "--evaluation"),
    Case("build: an evaluation not there", f"{BUILD} --evaluation nowhere", "--evaluation"),
    Case("build: an evaluation too long", f"{BUILD} --evaluation {LONG}", "--evaluation"),
    Case("build: a null byte", f"{BUILD} --evaluation a\0b", "--evaluation"),
    Case("build: a model of half characters", f"{BUILD} --models base \udcff", "--models"),
    Case("build: the same model twice", f"{DRAW} --output-dir page --lora run/", "once"),
    evaluates(
        "disk full at once",
        "--output-dir out/new",
        ("out/new", "room"),
        partial(full_disk, size=9),
        1,
    ),
    evaluates(
        "disk full at the first pictures",
        "--output-dir out/new",
        ("out/new", "room", "resumes"),
        partial(full_disk, size=2000),
        1,
    ),
    Case(
        "disk full at the page",
        f"{BUILD} --output-dir out/page",
        ("out/page", "room"),
        1,
        partial(full_disk, size=2000),
    ),
    Case(
        "disk full at the tally",
        f"{TALLY} --output out/tally.json",
        ("out/tally.json", "room"),
        1,
        partial(full_disk, size=200),
    ),
    Case(
        "model: no pictures come of it",
        f"{FLAGS} --output-dir out/new",
        ("base", "not finite", "--guidance-scale"),
        1,
        partial(other_model, change=lambda model: whole(model, "vae", "decoder.conv_out.bias")),
    ),
    Case(
        "model: weights that are not finite",
        f"{FLAGS} --output-dir out/new",
        ("--model", "not finite"),
        2,
        partial(other_model, change=lambda model: whole(model, "unet", "conv_out.bias")),
    ),
    evaluates(
        "model: another VAE under the same path",
        "--lora run",
        ("--model", "other weights", "another folder"),
        partial(other_model, change=lambda model: whole(model, "vae", "decoder.conv_in.bias", 0.1)),
    ),
    evaluates(
        "model: another schedule under the same path",
        "--lora run",
        ("--model", "other weights", "another folder"),
        partial(
            other_model,
            change=partial(
                edited, file="scheduler/scheduler_config.json", change=with_value(0.013, "beta_end")
            ),
        ),
    ),
    evaluates(
        "LoRA trained again under the same path",
        "--lora run",
        ("--lora", "other weights named run", "another folder"),
        partial(lora, change=partial(with_first, value=0.5), file=f"run/{FILE_NAME}"),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_hostile_input_ends_in_one_line(case, place, monkeypatch, capsys):
    of_people = case.command.startswith(("build", "tally"))
    script, main = (
        ("human_eval.py", human_eval.main) if of_people else ("evaluate.py", evaluate.main)
    )
    with room_again():
        ends_in_one_line(case, main, script, place, monkeypatch, capsys)


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())["models"]


@pytest.mark.parametrize("spec", ["mine.py:red", "2*mine.py:red+1*jpeg_compressibility"])
def test_scores_of_an_edited_reward_are_not_reused(spec, place, monkeypatch, capsys):
    """The pictures stay, and are scored anew, which a line says; back again nothing is."""
    words = f"{FLAGS} --lora run".replace("mine.py:red", spec)
    run(monkeypatch, evaluate.main, "evaluate.py", words)
    before, drawn = results(place / "out"), dict(np.load(place / SHARD))
    (place / "mine.py").write_text("def red(images, prompts): return 7 + images.mean((1, 2, 3))\n")
    capsys.readouterr()
    run(monkeypatch, evaluate.main, "evaluate.py", words)
    assert f"warning: {spec} has changed" in capsys.readouterr().err
    after, now = results(place / "out"), dict(np.load(place / SHARD))
    for name in ("base", "run"):
        means = [found[name]["all"]["rewards"][spec]["mean"] for found in (before, after)]
        assert means[1] > means[0] + 6
    assert all(np.array_equal(now[key], drawn[key]) for key in drawn)
    (place / "mine.py").write_text("def red(images, prompts): return images[:, 0].mean((1, 2))\n")
    capsys.readouterr()
    run(monkeypatch, evaluate.main, "evaluate.py", words)
    assert "has changed" not in capsys.readouterr().err and results(place / "out") == before


def test_a_lora_that_is_saved_again_meanwhile_is_not_drawn(place, monkeypatch, capsys):
    """Its pictures would lie under the digest of what was there before."""
    file = place / "run/pytorch_lora_weights.safetensors"
    again = file.read_bytes()[:-1] + b"\x01"
    monkeypatch.setattr("evaluation.draw.warn_of_prompts", lambda *_: file.write_bytes(again))
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, evaluate.main, "evaluate.py", f"{FLAGS}-again --lora run")
    assert end.value.code == 1 and "--lora run has changed" in capsys.readouterr().err
    assert [path.name for path in (place / "out-again/samples").iterdir()] == ["base"]


def test_scores_are_keyed_by_the_files_of_a_folder_of_weights(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/model.safetensors").write_bytes(b"one")
    specs = (f"image_reward:{tmp_path}/weights", f"1*aesthetic:{tmp_path}/weights+2*clip_score")
    before = score_keys(specs)
    assert score_keys(specs) == before and set(before) == set(specs)
    (tmp_path / "weights/config.json").write_text("{}")
    after = score_keys(specs)
    assert all(after[spec] != before[spec] for spec in specs)
    assert score_keys(("image_reward", "a/b")) == {"image_reward": "image_reward", "a/b": "a/b"}


NAMES = {
    "a file beside a folder": ["A", "A.safetensors"],
    "letters that a name lacks": ["a b", "a-b"],
    "the same of three": ["a b", "a?b", "a*b"],
    "case": ["Run", "run"],
    "the base's name": ["base", "BASE"],
    "no name at all": [".safetensors", "..safetensors", "...safetensors"],
    "half characters": ["\udcff", "\udcfe"],
    "too long": ["x" * 250, "x" * 251],
    "long in other alphabets": ["\u4e00" * 80, "\u4e00" * 81],
}


@pytest.mark.parametrize("name", NAMES)
def test_each_model_has_its_own_name(name, tmp_path):
    """Which is a folder's name, and the same whatever the order."""
    for part in NAMES[name]:
        place = tmp_path / part
        if not part.endswith(".safetensors"):
            place.mkdir()
            place = place / FILE_NAME
        save_file({"x": torch.zeros(1)}, place)
    paths = [tmp_path / part for part in NAMES[name]]
    names = [model.name for model in read_models(evaluate.Args(lora=tuple(paths)))]
    assert len({found.casefold() for found in names}) == len(paths) + 1 and names[0] == "base"
    for found in names:
        (tmp_path / "samples" / found).mkdir(parents=True)
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {*names}
    assert names_of(paths[::-1]) == names_of(paths)[::-1]


def test_both_models_of_one_name_are_drawn(place, monkeypatch):
    """A.safetensors is another model than the folder A: each has its own pictures."""
    shutil.copy(place / "other" / FILE_NAME, place / "run.safetensors")
    words = f"{FLAGS} --output-dir out/two --lora run --lora run.safetensors"
    run(monkeypatch, evaluate.main, "evaluate.py", words)
    assert list(results(place / "out/two")) == ["base", "run", "run.safetensors"]
    pictures = [
        np.load(place / "out/two/samples" / name / "00000.npz")["images"]
        for name in ("run", "run.safetensors")
    ]
    assert not np.array_equal(*pictures)


def test_results_have_no_bare_nan():
    scores = np.full((2, 2), 3e38, np.float32)
    found = compare(scores, -scores)
    assert found["gain"] == pytest.approx(6e38, rel=1e-6)
    tree = {"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (-float("inf"), None, "NaN")}}
    expected = {"a": None, "b": [1.5, None], "c": {"d": [None, None, "NaN"]}}
    assert json.loads(to_json(tree)) == expected


def test_a_full_disk_loses_nothing(place, monkeypatch, capsys):
    """With room the same command resumes: what was drawn is as it was."""
    before = {path: path.read_bytes() for path in (place / "out/samples").rglob("*.npz")}
    words = f"{FLAGS} --lora run --lora other"
    with room_again(), pytest.raises(SystemExit) as end:
        full_disk(place, 2000)
        run(monkeypatch, evaluate.main, "evaluate.py", words)
    assert end.value.code == 1 and "same command resumes" in capsys.readouterr().err
    assert not [*place.rglob("*.partial")]
    run(monkeypatch, evaluate.main, "evaluate.py", words)
    assert list(results(place / "out")) == ["base", "run", "other"]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_the_tally_goes_into_a_new_folder(place, monkeypatch):
    run(monkeypatch, human_eval.main, "human_eval.py", f"{TALLY} --output new/folder/tally.json")
    assert json.loads((place / "new/folder/tally.json").read_text())["raters"] == 1
