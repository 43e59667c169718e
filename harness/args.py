"""The command line: flags that every script has, presets, and what is refused before slow work."""

import functools
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import tyro

from common import UserError
from common.rewards import RewardError, check_spec
from common.stable_diffusion import ModelError
from harness.checkpoint import CheckpointError, check_checkpoint


@dataclass(kw_only=True)
class RunArgs:
    seed: int = 0
    """Seed of everything."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """What the UNet's forward pass runs in; all else is float32."""
    compile: bool = False
    """torch.compile the UNet."""
    micro_batch_size: int = 8
    """Samples or transitions in one forward pass of a rank. For memory and speed only: never
    changes the result."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, more time, the same result."""
    reward_timeout: float = 0.0
    """Seconds after which a call of the reward counts as hung, which stops the run; 0 waits."""
    max_skipped_updates: int = 10
    """Updates in a row without a finite gradient, each skipped, after which the run stops."""
    save_every: int = 50
    """Iterations between checkpoints, each with a grid of fixed prompts and seeds; there is always
    one at the end."""
    output_dir: Path | None = None
    """Where the run goes; by default runs/SCRIPT__TAG__SEED__TIME."""
    resume: Path | None = None
    """Folder of a run to resume; its arguments are the defaults then."""
    track: bool = False
    """Log to Weights & Biases as well (pip install wandb)."""


MAY_CHANGE_ON_RESUME = {field.name for field in fields(RunArgs)} - {"seed", "dtype"}
MAY_CHANGE_ON_RESUME |= {"num_iterations"}


def fail(message: str) -> NoReturn:
    """One line on stderr, of a node's first rank, and exit code 2: the fault and the remedy."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        script, line = Path(sys.argv[0]).name, " ".join(message.split())
        print(f"{script}: error: {line}", file=sys.stderr)
    if dist.is_initialized():
        dist.destroy_process_group()  # else gloo's threads may outlive the interpreter
    raise SystemExit(2)


def require(condition: bool, message: str) -> None:
    """`fail` with the message, unless the condition holds."""
    if not condition:
        fail(message)


def command(main: Callable) -> Callable:
    """`main` of a script, in which what the user can mend becomes one line and exit code 2."""

    @functools.wraps(main)
    def guarded():
        try:
            main()
        except ModelError as error:
            remedy = f"the embedded model: python {Path(sys.argv[0]).name} zoo"
            fail(f"--model {error}; check the name and the network, or try {remedy}")
        except UserError as error:
            fail(str(error))

    return guarded


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
    default = presets[preset]
    words = resume_after_restart(words)
    if "--resume" in words[:-1]:
        default = stored_args(Path(words[words.index("--resume") + 1]), default)
    several = [f.name.replace("_", "-") for f in fields(default) if "tuple" in str(f.type)]
    words = join_repeated(words, [f"--{name}" for name in several])
    args = tyro.cli(type(default), default=default, args=words, description=description)
    flags = {word.split("=")[0].replace("_", "-") for word in words}
    if {"--prompt", "--prompts-file"} <= flags:
        fail("--prompt and --prompts-file are both given; choose one")
    if "--prompt" in flags:
        args = replace(args, prompts_file=None)
    if isinstance(args, RunArgs):
        if args.resume:
            args = resumed(args, default)
        check_run(args)
    if check is not None:
        check(args)
    return args


def resume_after_restart(words: list[str]) -> list[str]:
    """With --resume where torchrun --max-restarts starts the command anew after a rank has died."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if not restarted or "--output-dir" not in words[:-1] or "--resume" in words:
        return words
    folder = words[words.index("--output-dir") + 1]
    saved = any((Path(folder) / name).exists() for name in ("checkpoint", "checkpoint.old"))
    return [*words, "--resume", folder] if saved else words


def stored_args(folder: Path, default):
    """Arguments of the run in `folder`, of the same class as `default`."""
    try:
        check_checkpoint(folder)
        stored = json.loads((folder / "args.json").read_text())
    except (CheckpointError, OSError, ValueError) as error:
        fail(f"--resume {folder}: {error}")
    if stored.keys() - vars(default).keys():
        fail(f"--resume {folder} is a run of another script; resume it with that one")
    for field in fields(default):
        value = stored.get(field.name)
        if value and "Path" in str(field.type):
            stored[field.name] = Path(value)
        elif isinstance(value, list):
            stored[field.name] = tuple(value)
    return replace(default, **stored)


def resumed(args, default):
    """`args` with the run's own folder; what must agree with the run is held to."""
    differ = []
    for name, stored in vars(default).items():
        if vars(args)[name] != stored and name not in MAY_CHANGE_ON_RESUME:
            differ.append(f"--{name.replace('_', '-')} (there {stored})")
    if differ:
        fail(f"--resume {args.resume}: the run has other {', '.join(differ)}; leave them out")
    return replace(args, output_dir=args.resume)


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
    check_numbers(args, {"seed", "lora_rank"})
    check_dtype(args.dtype)
    installed = any((Path(folder) / "wandb").is_dir() for folder in sys.path)
    if args.track and not installed:
        fail("--track needs Weights & Biases: pip install wandb; TensorBoard is always written")
    if args.output_dir and not args.resume:
        folder = args.output_dir
        if any((folder / name).exists() for name in ("checkpoint", "checkpoint.old")):
            fail(f"--output-dir {folder} holds another run; choose another, or --resume {folder}")
        check_folder("--output-dir", folder)


def check_numbers(args, may_be_0: set[str]) -> None:
    """Refuse integers under 1 (those of `may_be_0` under 0), other numbers negative or infinite."""
    for name, value in asdict(args).items():
        flag, least = "--" + name.replace("_", "-"), 0 if name in may_be_0 else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            fail(f"{flag} is {value}; it must be {least} or more")
        if isinstance(value, float) and not (np.isfinite(value) and value >= 0):
            fail(f"{flag} is {value}; it must be a number of 0 or more")
    if args.seed >= 1 << 63:
        fail(f"--seed is {args.seed}; it must be less than 2**63")


def check_dtype(dtype: str) -> None:
    """Refuse what this GPU cannot do; a CPU can do all."""
    if dtype != "bf16" or not torch.cuda.is_available():
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        fail("--dtype bf16 is not supported by this GPU; use --dtype fp32 or fp16")


def check_folder(flag: str, folder: Path) -> None:
    """Refuse a folder that cannot be made, or written into."""
    places = (folder.absolute(), *folder.absolute().parents)
    existing = next(path for path in places if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        fail(f"{flag} {folder} cannot be written; choose another")


def check_model(model: str) -> None:
    """Refuse a folder that is not in diffusers format; whether a hub id exists is known later."""
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model)
    if not is_hub_id and not Path(model).is_dir():
        remedy = "give a folder in diffusers format or a hub id"
        fail(f"--model: there is no folder {model!r}; {remedy}")
    if Path(model).is_dir() and not (Path(model) / "model_index.json").is_file():
        fail(f"--model: {model!r} has no model_index.json; give a folder in diffusers format")


def check_sampler(args) -> None:
    """Refuse a model, a number of steps or an eta that no policy can have."""
    require(args.eta > 0, "--eta is 0, and a deterministic step has no log-probability; use 1")
    require(args.eta <= 1, f"--eta is {args.eta}; it can be at most 1")
    check_model(args.model)
    try:
        path = Path(args.model) / "scheduler" / "scheduler_config.json"
        trained = json.loads(path.read_text()).get("num_train_timesteps", 1000)
    except (OSError, ValueError):  # a hub id; or a fault that loading it will name
        return
    if args.num_inference_steps > trained:
        asked = f"--num-inference-steps is {args.num_inference_steps}"
        fail(f"{asked}; {args.model} was trained with {trained}: take fewer")


def check_reward(spec: str, flag: str = "--reward") -> None:
    """Refuse what can be told of a reward before it is loaded."""
    try:
        check_spec(spec)
    except RewardError as error:
        fail(f"{flag}: {error}")


def check_share(flag: str, n: int) -> None:
    """Refuse fewer samples than there are ranks, each of which needs one."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    require(n >= world_size, f"{flag} {n} is less than the {world_size} processes; raise it")
