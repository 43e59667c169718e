"""What a script does before its algorithm: read the command line, refuse what cannot work, load the model."""

import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import NamedTuple, NoReturn

import diffusers
import numpy as np
import torch
import transformers
import tyro
from diffusers import StableDiffusionPipeline

from common.pairs import open_pairs
from common.prompts import Lines, SourceError, open_prompts
from common.rewards import PromptError, Reward, RewardError, check_spec, load_reward
from common.run_folder import CheckpointError, check_checkpoint

MAY_CHANGE_ON_RESUME = {
    "num_iterations",
    "micro_batch_size",
    "save_every",
    "output_dir",
    "resume",
    "track",
    "compile",
}
MAY_CHANGE_ON_RESUME |= {"gradient_checkpointing", "reward_timeout", "max_skipped_updates"}


class Task(NamedTuple):
    """One of large_scale_ppo.py's --tasks."""

    name: str
    """Of its metrics: the reward's, with a number where two tasks have the same."""
    reward: str
    """Its spec."""
    prompts: Sequence[str]
    num_prompts: int
    """P: prompts an iteration, all ranks together."""
    num_images: int
    """G: images of each."""


def fail(message: str) -> NoReturn:
    """One line on stderr, of a node's first rank, and exit code 2: what is wrong with the command, and the remedy."""
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"{Path(sys.argv[0]).name}: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(presets: dict, description: str, words: Sequence[str] | None = None):
    """Arguments of a script: `script.py [PRESET] [--flag value ...]`; with no word the first preset.

    With --resume RUN_DIR the arguments of that run are the defaults, and those that must agree with it are held to. A
    flag of several values may be given several times, with one or more of them each. `words` are the command line's.
    """
    words = split_values(sys.argv[1:] if words is None else words, ("--resume", "--output-dir"))
    if words and not words[0].startswith("-") and words[0] not in presets:
        fail(f"there is no preset {words[0]!r}; there are: {', '.join(presets)}")
    default = presets[words.pop(0) if words and words[0] in presets else next(iter(presets))]
    if (
        int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        and "--output-dir" in words[:-1]
        and "--resume" not in words
    ):
        # torchrun --max-restarts has started the command again after a rank has died.
        folder = words[words.index("--output-dir") + 1]
        if any((Path(folder) / name).exists() for name in ("checkpoint", "checkpoint.old")):
            words += ["--resume", folder]
    if "--resume" in words[:-1]:
        folder = Path(words[words.index("--resume") + 1])
        try:
            check_checkpoint(folder)
            stored = json.loads((folder / "args.json").read_text())
        except (CheckpointError, OSError, ValueError) as error:
            fail(f"--resume {folder}: {error}")
        if stored.keys() - vars(default).keys():
            fail(
                f"--resume {folder} is a run of another script; go on with the one that has begun it"
            )
        paths = [f.name for f in fields(default) if "Path" in str(f.type)]
        stored = {
            key: Path(value) if key in paths and value else value for key, value in stored.items()
        }
        stored = {
            key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()
        }
        default = replace(default, **stored)
    words = join_repeated(
        words, [f"--{f.name.replace('_', '-')}" for f in fields(default) if "tuple" in str(f.type)]
    )
    args = tyro.cli(type(default), default=default, args=words, description=description)
    flags = {word.split("=")[0].replace("_", "-") for word in words}
    if {"--prompt", "--prompts-file"} <= flags:
        fail("--prompt and --prompts-file are both given; choose one")
    if "--prompt" in flags:
        args = replace(args, prompts_file=None)
    if asdict(args).get("resume"):
        differ = {
            name: stored for name, stored in vars(default).items() if vars(args)[name] != stored
        }
        differ = [
            f"--{k.replace('_', '-')} (there {v})"
            for k, v in differ.items()
            if k not in MAY_CHANGE_ON_RESUME
        ]
        if differ:
            fail(f"--resume {args.resume}: the run has other {', '.join(differ)}; leave them out")
        args = replace(args, output_dir=args.resume)
    return args


def split_values(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The command line with `--flag=value`, or `--fl_ag value`, as `--fl-ag value` for each of `flags`."""
    split = []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag.replace("_", "-") in flags:
            split += [flag.replace("_", "-"), value] if equals else [flag.replace("_", "-")]
        else:
            split.append(word)
    return split


def join_repeated(words: Sequence[str], flags: Sequence[str]) -> list[str]:
    """The command line with `--lora A --lora B` as `--lora A B` for each of `flags`, of which tyro takes the last."""
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


def check_numbers(args, may_be_0: set[str]) -> None:
    """Refuse integers under 1, those of `may_be_0` under 0, and other numbers that are negative or not finite."""
    for name, value in asdict(args).items():
        flag, least = "--" + name.replace("_", "-"), 0 if name in may_be_0 else 1
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            fail(f"{flag} is {value}; it must be {least} or more")
        if isinstance(value, float) and not (np.isfinite(value) and value >= 0):
            fail(f"{flag} is {value}; it must be a number of 0 or more")


def check_dtype(dtype: str) -> None:
    """Refuse what this GPU cannot do; a CPU can do all."""
    if (
        dtype == "bf16"
        and torch.cuda.is_available()
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        fail("--dtype bf16 is not supported by this GPU; use --dtype fp32 or fp16")


def check_folder(flag: str, folder: Path) -> None:
    """Refuse a folder that cannot be made, or written into."""
    existing = next(
        path for path in (folder.absolute(), *folder.absolute().parents) if path.exists()
    )
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        fail(f"{flag} {folder} cannot be written; choose another")


def check_model(model: str) -> None:
    """Refuse a folder that is none in diffusers format; whether there is a hub id is known when it is loaded."""
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model)
    if not is_hub_id and not Path(model).is_dir():
        fail(
            f"--model: there is no folder {model!r}; give a folder in diffusers format or a hub id"
        )
    if Path(model).is_dir() and not (Path(model) / "model_index.json").is_file():
        fail(f"--model: {model!r} has no model_index.json; give a folder in diffusers format")


def check_steps(num_inference_steps: int, model: str) -> None:
    """Refuse more steps than the model was trained with, where the model is a local folder."""
    try:
        config = json.loads((Path(model) / "scheduler" / "scheduler_config.json").read_text())
    except (OSError, ValueError):  # a hub id; or a fault that loading it will name
        return
    trained = config.get("num_train_timesteps", 1000)
    if num_inference_steps > trained:
        fail(
            f"--num-inference-steps is {num_inference_steps}; {model} was trained with {trained}: take fewer"
        )


def check_args(args, world_size: int) -> list[str] | list[Task]:
    """Refuse what cannot work before anything slow is loaded; returns the prompts, or the tasks of a script that has
    them."""
    has_tasks = "tasks" in asdict(args)
    check_numbers(args, {"seed", "lora_rank"})
    if args.seed >= 1 << 63:
        fail(f"--seed is {args.seed}; it must be less than 2**63")
    for name in {"rewarded_share", "timestep_fraction"} & asdict(args).keys():
        if not 0 < getattr(args, name) <= 1:
            fail(
                f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be more than 0 and at most 1"
            )
    for name in {"cooldown_share", "caption_dropout", "percentile", "eta"} & asdict(args).keys():
        if getattr(args, name) > 1:
            fail(f"--{name.replace('_', '-')} is {getattr(args, name)}; it can be at most 1")
    if "timestep_fraction" in asdict(args) and args.gradient_steps > args.samples_per_iteration:
        fail(
            f"--gradient-steps is {args.gradient_steps}; it can be at most --samples-per-iteration"
        )
    if "shard_size" in asdict(args):
        whole = "dataset_size" if "dataset_size" in asdict(args) else "samples_per_iteration"
        if getattr(args, whole) % args.shard_size:
            flag = f"--{whole.replace('_', '-')}"
            fail(
                f"--shard-size is {args.shard_size}; it must divide {flag}, which is {getattr(args, whole)}"
            )
        for flag, value in (("--shard-size", args.shard_size), ("--batch-size", args.batch_size)):
            if value < world_size:
                fail(f"{flag} {value} is less than the {world_size} processes; raise it")
    if "min_count" in asdict(args) and args.min_count > args.buffer_size:
        fail(
            f"--min-count is {args.min_count}; it can be at most --buffer-size, {args.buffer_size}"
        )
    if has_tasks and args.training_timesteps > args.num_inference_steps:
        fail(
            f"--training-timesteps is {args.training_timesteps}; it can be at most --num-inference-steps"
        )
    if has_tasks and args.pretrain_batch_size < world_size:
        fail(
            f"--pretrain-batch-size {args.pretrain_batch_size} is less than the {world_size} processes; raise it"
        )
    if not has_tasks and args.samples_per_iteration < world_size:
        fail(
            f"--samples-per-iteration {args.samples_per_iteration} is less than the {world_size} processes; raise it"
        )
    if args.eta == 0:
        fail("--eta is 0, and a deterministic step has no log-probability to learn from; use 1")
    check_dtype(args.dtype)
    if args.track and not any((Path(folder) / "wandb").is_dir() for folder in sys.path):
        fail(
            "--track needs Weights & Biases: pip install wandb, or leave it out (TensorBoard is always written)"
        )
    try:
        if not has_tasks:
            check_spec(args.reward)
    except RewardError as error:
        fail(f"--reward: {error}")
    if args.output_dir and not args.resume:
        if any((args.output_dir / name).exists() for name in ("checkpoint", "checkpoint.old")):
            fail(
                f"--output-dir {args.output_dir} holds another run; choose another, or use --resume {args.output_dir}"
            )
        check_folder("--output-dir", args.output_dir)
    check_model(args.model)
    check_steps(args.num_inference_steps, args.model)
    if asdict(args).get("dataset"):
        check_folder("--dataset", args.dataset)
    if has_tasks:
        return read_tasks(args, world_size)
    prompts = read_prompts(args)
    if asdict(args).get("dataset") and (description := args.dataset / "dataset.json").exists():
        there, asked = json.loads(description.read_text()), dataset_description(args, prompts)
        if differ := ", ".join(
            f"--{key.replace('_', '-')}" for key in asked if there.get(key) != asked[key]
        ):
            fail(
                f"--dataset {args.dataset} was drawn with other {differ}; choose another folder or the same settings"
            )
    return prompts


def read_prompts(args) -> list[str]:
    """Of --prompts-file, one a line, or --prompt alone."""
    if args.prompts_file is None:
        if not args.prompt.strip():
            fail("--prompt is empty; give a prompt")
        return [args.prompt]
    try:
        return list(Lines(args.prompts_file, str))
    except SourceError as error:
        fail(f"--prompts-file: {error}")
    except OSError as error:
        fail(
            f"--prompts-file {args.prompts_file}: {error.strerror}; give a text file, one prompt a line"
        )


def read_tasks(args, world_size: int) -> list[Task]:
    """Of --tasks, each "REWARD PROMPTS [PxG]", fields with blanks in quotes."""
    tasks = []
    for text in args.tasks:
        try:
            reward, source, *size = shlex.split(text)
            P, G = (
                map(int, size[0].split("x"))
                if size
                else (args.prompts_per_task, args.images_per_prompt)
            )
        except (ValueError, IndexError):
            size = None
        if size is None or len(size) > 1 or P < 1 or G < 1:
            fail(
                f'--tasks: {text!r} is not "REWARD PROMPTS [PxG]", e.g. "image_reward prompts/zoo.txt 8x4"'
            )
        try:
            check_spec(reward)
            prompts = open_prompts(source, args.seed)
        except (
            RewardError,
            SourceError,
            OSError,
        ) as error:  # OSError: no right to read, or to write the cache
            fail(f"--tasks {text!r}: {error}")
        if world_size > P * G:
            fail(
                f"--tasks {text!r}: {P}x{G} images are less than the {world_size} processes; take more"
            )
        if G == 1 and "statistical_parity" in reward:
            fail(
                f"--tasks {text!r}: statistical parity needs several images of a prompt; raise G of PxG"
            )
        name = re.split(r"[:?]", reward.rpartition(":")[2] if ".py:" in reward else reward)[0]
        same = sum(task.name.partition("-")[0] == name for task in tasks)
        tasks.append(Task(f"{name}-{same + 1}" if same else name, reward, prompts, P, G))
    if not tasks:
        fail('--tasks is empty; give at least one, e.g. "image_reward prompts/zoo.txt 8x4"')
    return tasks


def open_pairs_or_fail(source: str | None, seed: int) -> Sequence:
    """The pairs of --pretrain-data; a source that is not to be had ends the run."""
    if source is None:
        fail(
            "--pretrain-data is missing: a folder of pictures with metadata.jsonl, or of .tar shards "
            "(docs/large_scale_ppo.md); --pretrain-beta 0 trains without"
        )
    try:
        return open_pairs(source, seed)
    except (SourceError, OSError) as error:
        fail(f"--pretrain-data: {error}")


def dataset_description(args, prompts: list[str]) -> dict:
    """What the samples in --dataset depend on, as the file dataset.json beside them has it."""
    keys = ("model", "reward", "shard_size", "num_inference_steps", "guidance_scale", "eta", "seed")
    return {"prompts_file": prompts} | {key: getattr(args, key) for key in keys}


def load_pipeline(model: str) -> StableDiffusionPipeline:
    """The pretrained Stable Diffusion, float32, without safety checker; a model that is not to be had ends the run."""
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        return StableDiffusionPipeline.from_pretrained(
            model, safety_checker=None, requires_safety_checker=False
        )
    except Exception as error:  # the hub's client and the loaders raise many kinds
        where = "loaded" if Path(model).is_dir() else "had from the hub, nor is it a folder"
        fail(
            f"--model {model!r} cannot be {where} ({str(error)[:100]} ...); check the name and the network, "
            f"or try the embedded model: python {Path(sys.argv[0]).name} zoo"
        )


def load_reward_or_fail(
    spec: str, device: torch.device, prompts: list[str], flag: str = "--reward", timeout: float = 0
) -> Reward:
    """The reward that `spec` names, which must be able to score `prompts`; one that is not to be had ends the run."""
    try:
        return load_reward(spec, device, prompts, timeout)
    except PromptError as error:
        remedy = (
            "change the prompts of the task"
            if flag == "--tasks"
            else "change --prompt or --prompts-file"
        )
        fail(f"{flag} {spec} cannot score these prompts: {error}; {remedy}")
    except RewardError as error:
        fail(f"{flag} {spec}: {error}")
    except (
        Exception
    ) as error:  # the hub's client, the loaders and the user's own file raise many kinds
        what = f"{type(error).__name__}: {str(error)[:300]}"
        fail(f"{flag} {spec} cannot be loaded ({what}); check the name, the folder and the network")


def warn_of_prompts(pipeline: StableDiffusionPipeline, prompts: list[str]) -> None:
    """A line for what the text encoder never sees: words of which a token is embedded as zeros, ends that are cut."""
    if int(os.environ.get("RANK", 0)) > 0:
        return
    prompts = prompts[:1000]  # of a long list its beginning: a minute for a warning is too much
    tokenizer, length = pipeline.tokenizer, pipeline.tokenizer.model_max_length
    unseen = (pipeline.text_encoder.get_input_embeddings().weight == 0).all(dim=1).cpu()
    words = dict.fromkeys(word for prompt in prompts for word in re.findall(r"\w+", prompt))
    unknown = [
        word for word in words if unseen[tokenizer(word, add_special_tokens=False).input_ids].any()
    ]
    if unknown:
        print(
            f"warning: the model does not know these words: {', '.join(unknown)}", file=sys.stderr
        )
    lost = [tokenizer.decode(tokenizer(prompt).input_ids[length - 1 : -1]) for prompt in prompts]
    if any(lost):
        example = next(filter(None, lost))
        example = example if len(example) < 200 else f"{example[:200]}..."
        count = (
            f"{sum(map(bool, lost))} of the prompts end" if len(prompts) > 1 else "the prompt ends"
        )
        print(
            f"warning: {count} after {length} tokens for the model; this is lost: {example!r}",
            file=sys.stderr,
        )
