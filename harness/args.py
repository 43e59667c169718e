"""The command line: flags that every script has, presets, and what is refused before slow work."""

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from common.rewards import GradientError, RewardError, check_spec
from common.stable_diffusion import check_layout
from harness.hub import check_push
from harness.project import found, of_project, program
from harness.resume import check_same, resume_after_restart, stored_args
from harness.stop import Ended, fail, require

LARGEST = 10**9


@dataclass(kw_only=True)
class RunArgs:
    seed: int = 0
    """Seed of everything."""
    dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """What the UNet's forward pass runs in; all else is float32. "auto": fp16 on a GPU, fp32 on a
    CPU."""
    allow_tf32: bool = True
    """Let a GPU round the factors of float32 matrix products to TF32's 10 bits: several times
    faster."""
    compile: bool = False
    """torch.compile the UNet."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Samples or transitions in one forward pass of a rank. For memory and speed only: never
    changes the result. "auto": as many as fit into the GPU's memory; 8 on a CPU."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time, the same result."""
    reward_timeout: float = 0.0
    """Seconds after which a call of the reward counts as hung, which stops the run; 0 waits."""
    max_skipped_updates: int = 10
    """Updates in a row without a finite gradient, each skipped, after which the run stops."""
    save_every: int = 50
    """Iterations between checkpoints, each with a grid of fixed prompts and seeds; there is always
    one at the end."""
    validation_prompts: Path | None = None
    """Text file, one prompt a line, that nothing learns from: pictures of them, too, with every
    checkpoint."""
    output_dir: Path | None = None
    """Where the run goes; by default runs/SCRIPT__TAG__SEED__TIME."""
    resume: Path | None = None
    """Folder of a run to resume; its arguments are the defaults then."""
    track: bool = False
    """Log to Weights & Biases as well, metrics, pictures and histograms (pip install wandb)."""
    push_to_hub: str | None = None
    """Repository of the Hugging Face Hub, OWNER/NAME, to which the finished run goes: weights,
    model card, metrics and pictures."""


MAY_CHANGE = {field.name for field in fields(RunArgs)} - {"seed", "dtype"} | {"num_iterations"}
"""Flags that a run which is resumed may have otherwise."""


def parse_args(
    presets: dict,
    description: str,
    check: Callable | None = None,
    words: Sequence[str] | None = None,
):
    """Arguments of a script: `script.py [PRESET] [--flag value ...]`.

    With no word it is the first preset. With --resume RUN_DIR the arguments of that run are the
    defaults, and those that must agree with it are held to. A flag of several values may be given
    several times, with one or more of them each. `check(args)` refuses what the script cannot do.
    `words` are the command line's.
    """
    words = split_values(sys.argv[1:] if words is None else words, ("--resume", "--output-dir"))
    if words and not words[0].startswith("-") and words[0] not in presets:
        fail(f"there is no preset {words[0]!r}; there are: {', '.join(presets)}")
    preset = words.pop(0) if words and words[0] in presets else next(iter(presets))
    default = of_project(presets[preset])
    words = resume_after_restart(words)
    flags = {word.split("=")[0].replace("_", "-") for word in words}
    if "--resume" in words[:-1]:
        folder = Path(words[words.index("--resume") + 1])
        default = stored_args(folder, default, MAY_CHANGE, flags)
    several = [f.name.replace("_", "-") for f in fields(default) if "tuple" in str(f.type)]
    words = join_repeated(words, [f"--{name}" for name in several])
    args = found(read_words(type(default), words, description, tuple(presets), default=default))
    if {"--prompt", "--prompts-file"} <= flags:
        fail("--prompt and --prompts-file are both given; choose one")
    if "--prompt" in flags:
        args = replace(args, prompts_file=None)
    if isinstance(args, RunArgs):
        if args.resume:
            if args.dtype == "auto":
                args = replace(args, dtype=default.dtype)
            args = check_same(args, default, MAY_CHANGE)
            if "--output-dir" in flags and args.output_dir.resolve() != args.resume.resolve():
                remedy = "leave --output-dir out, or copy the folder and resume the copy"
                fail(f"--resume {args.resume} goes on in its own folder; {remedy}")
            args = replace(args, output_dir=args.resume)
        if args.dtype == "auto":
            args = replace(args, dtype="fp16" if torch.cuda.is_available() else "fp32")
        check_run(args)
    if check is not None:
        check(args)
    return args


def read_words(
    args_class,
    words: Sequence[str],
    description: str,
    presets: Sequence[str] = (),
    **options,
):
    """tyro.cli with its options, whose error is one line; `presets` are named in the help."""
    options = {"prog": program()} | options
    if presets:
        options["prog"] = f"{program()} [PRESET]"
        first = "Without one it is the first." if len(presets) > 1 else ""
        # Lines that are indented stay lines.
        description = re.sub(r"(?m)^(?=[A-Z][^\n:]*:  )", "  ", description)
        description = f"{description}\n\nPRESET is one of: {', '.join(presets)}. {first}"
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(args_class, args=words, description=description, **options)
    except SystemExit as end:
        if end.code:
            fail(f"{refusal(said.getvalue(), presets)} ({program()} --help shows what there is)")
        raise Ended(0) from None  # after --help
    except BrokenPipeError:  # the help goes to a program that has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise Ended(0) from None


def refusal(box: str, presets: Sequence[str]) -> str:
    """Why tyro refuses a command line, from the box that it shows: title, fault, hints and help."""
    # Lines of the box are dashes where stderr takes no others.
    plain = re.sub(r"\x1b\[[\d;]*m|[\u2501-\u257f]", "", box).replace("\u2500", "-")
    _, *parts = re.split("-{10,}", plain)
    if not parts:  # some day tyro may show no box
        return " ".join(plain.split())
    fault = " ".join(parts[0].partition("Got errors:")[0].split())
    hints = parts[1:]
    if unread := re.match(r"Error parsing (--[\w-]+): .*?(['\"].*['\"])\]?\.?$", fault):
        flag, value = unread.groups()
        kind = re.search(rf"{flag} (\S+)", " ".join(hints))
        kind = kind[1].replace("{None}|", "") if kind else "something else"
        kind = kind.replace("INT", "a whole number").replace("FLOAT", "a number")
        kind = kind.replace("|", " or ").strip("{}").replace("{", "")
        return f"{flag} is {value}; it takes {kind}"
    if unknown := re.match(r"Unrecognized options: (.*)", fault):
        if any(word in presets for word in unknown[1].split(", ")):
            return f"{fault}; a preset is the first word"
        meant = re.findall(r" (--[\w-]+)", " ".join(h for h in hints if "you meant" in h))
        return f"{fault}; did you mean {' or '.join(dict.fromkeys(meant))}?" if meant else fault
    return fault.removesuffix(" Expected 1 values.").rstrip(".")


def split_values(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The command line with `--flag=value`, or `--fl_ag value`, as `--fl-ag value`."""
    split = []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") in flags:
            split += [flag.replace("_", "-"), *([value] if equals else [])]
        else:
            split.append(word)
    return split


def join_repeated(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """`--lora A --lora B` as `--lora A B` for each of `flags`, of which tyro takes the last."""
    rest, given, place = [], {}, None
    for word in words:
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if flag in flags:
            place = given.setdefault(flag, [])
            place += [value] if equals else []
        elif place is None or word.startswith("--"):
            place = None
            rest.append(word)
        else:
            place.append(word)
    return rest + [word for flag, values in given.items() for word in (flag, *values)]


def check_run(args: RunArgs) -> None:
    """Refuse what no script can do: numbers, precision, folder."""
    check_numbers(args, {"seed", "lora_rank", "num_noise"})
    check_gpus(args.dtype)
    installed = any((Path(folder) / "wandb").is_dir() for folder in sys.path)
    if args.track and not installed:
        fail("--track needs Weights & Biases: pip install wandb; TensorBoard is always written")
    check_push(args.push_to_hub)
    folder = args.output_dir or Path("runs")
    check_folder("--output-dir", folder)
    if args.output_dir and not args.resume:
        if any((folder / name).exists() for name in ("checkpoint", "checkpoint.old")):
            fail(f"--output-dir {folder} holds another run; choose another, or --resume {folder}")
        if not only_begun(folder):
            fail(f"--output-dir {folder} holds other files; choose another, or an empty one")


def only_begun(folder: Path) -> bool:
    """Whether a folder has nothing but what a run leaves that ends before its first checkpoint."""
    for path in folder.rglob("*") if folder.exists() else ():
        name = path.name.removesuffix(".partial")
        if name in ("metrics.jsonl", ".lock") and path.stat().st_size > 0:
            return False
        known = name in ("metrics.jsonl", ".lock", "samples", "args.json")
        known = known or name.startswith("events.out.tfevents")
        if not known and "checkpoint.partial" not in path.relative_to(folder).parts:
            return False
    return True


def check_numbers(args, may_be_0: set[str]) -> None:
    """Refuse integers under 1 (those of `may_be_0` under 0), and other numbers under 0.

    No number but a seed has a use beyond LARGEST.
    """
    for name, value in asdict(args).items():
        flag, least = "--" + name.replace("_", "-"), 0 if name in may_be_0 else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            fail(f"{flag} is {value}; it must be {least} or more")
        if isinstance(value, float) and not (np.isfinite(value) and value >= 0):
            fail(f"{flag} is {value}; it must be a number of 0 or more")
        if name in ("learning_rate", "max_grad_norm") and value == 0:
            remedy = "1e9 clips nothing" if name == "max_grad_norm" else "give more"
            fail(f"{flag} is 0, with which nothing learns; {remedy}")
        if isinstance(value, int | float) and value > LARGEST and "seed" not in name:
            fail(f"{flag} is {value:.3g}; it can be at most {LARGEST:.0e}")
    if args.seed >= 1 << 63:
        fail(f"--seed is {args.seed}; it must be less than 2**63")


def check_gpus(dtype: str) -> None:
    """Refuse what this machine's GPUs cannot do; a CPU can do all."""
    rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if gpus and rank >= gpus:
        fail(f"--nproc_per_node of torchrun is more than the {gpus} GPUs of this machine; lower it")
    if dtype != "bf16" or not torch.cuda.is_available():
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        fail("--dtype bf16 is not supported by this GPU; use --dtype fp32 or fp16")


def check_folder(flag: str, folder: Path) -> None:
    """Refuse a folder that cannot be made, or written into."""
    places = (folder.absolute(), *folder.absolute().parents)
    try:
        str(folder).encode()
        existing = next(path for path in places if path.exists())
        too_long = any(len(os.fsencode(part)) > 255 for part in folder.parts)
        possible = existing.is_dir() and os.access(existing, os.W_OK) and not too_long
    except (OSError, ValueError):  # a name that is too long or not text
        possible = False
    require(possible, f"{flag} {str(folder)[:200]!r} cannot be written; choose another")


def check_model(model: str) -> None:
    """Refuse a file or folder that is no Stable Diffusion; what a hub id is, loading it tells."""
    if os.path.exists(model):
        check_layout(model)
    elif not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model):
        remedy = "give a folder in diffusers format or a hub id"
        fail(f"--model: there is no folder {model!r}; {remedy}")


def check_memory(flag: str, model: str, latents: int, pictures: int = 0) -> None:
    """Refuse what memory cannot hold: so many latents and pictures at once, of all ranks together.

    Against the memory of this machine, for each of the ranks.
    """
    size = 4 * 64 * 64
    try:
        config = json.loads((Path(model) / "unet" / "config.json").read_text())
        size = int(config["in_channels"]) * int(config["sample_size"]) ** 2
    except (OSError, ValueError, KeyError, TypeError):  # a hub id; or a fault that loading it names
        pass
    latents += 48 * pictures  # 3 x 8 x 8 numbers of a picture for each 4 of its latent
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * world_size / 1e9
    needed = 4 * size * latents / 1e9
    what = f"{needed:.3g} GB of latents and pictures, and there are {there:.3g} GB"
    require(needed < there, f"{flag} asks for {what}; lower it")


def check_sampler(args, needs_noise: bool = True) -> None:
    """Refuse a model, a number of steps or an eta that no policy can have.

    A script that takes no log-probability, and no KL, can do without noise.
    """
    require(args.eta <= 1, f"--eta is {args.eta}; it can be at most 1")
    why = "with less noise log-probability and KL of a step are rounding alone"
    noisy = args.eta >= 0.01 or (args.eta == 0 and not needs_noise)
    require(noisy, f"--eta is {args.eta}; it must be 0.01 or more, as {why}")
    T, rank = args.num_inference_steps, args.lora_rank
    require(T > 1, f"--num-inference-steps is {T}; one step has nothing to learn: take 2 or more")
    require(rank <= 1024, f"--lora-rank is {rank}; it can be at most 1024")
    check_model(args.model)
    try:
        path = Path(args.model) / "scheduler" / "scheduler_config.json"
        scheduler = json.loads(path.read_text())
    except (OSError, ValueError):  # a hub id; or a fault that loading it will name
        return
    check_steps(T, scheduler, args.model)


def check_steps(num_inference_steps: int, scheduler: Mapping, model: str) -> None:
    """Refuse steps of which the noisiest is beyond those of training, by a scheduler's settings."""
    T, trained, last = num_inference_steps, scheduler.get("num_train_timesteps", 1000), 0
    if scheduler.get("timestep_spacing", "leading") == "leading":
        last = (T - 1) * (trained // T) + scheduler.get("steps_offset", 0)
    if trained < T or last >= trained:
        fail(
            f"--num-inference-steps is {T}; {model} was trained with {trained}, and the noisiest "
            "step would be beyond them: take fewer"
        )


def check_reward(spec: str, flag: str = "--reward", without_gradient: str | None = None) -> None:
    """Refuse what can be told of a reward before it is loaded.

    A script that needs the reward's gradient says what to do `without_gradient`.
    """
    try:
        check_spec(spec, differentiable=without_gradient is not None)
    except GradientError as error:
        fail(f"{flag}: {error}; {without_gradient}")
    except RewardError as error:
        fail(f"{flag}: {error}")


def check_share(flag: str, n: int) -> None:
    """Refuse fewer samples than there are ranks, each of which needs one."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    require(n >= world_size, f"{flag} {n} is less than the {world_size} processes; raise it")
