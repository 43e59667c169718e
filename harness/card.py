"""What a run says of itself at its end: a line or two for the terminal, and a model card."""

import re
import shlex
from dataclasses import fields
from pathlib import Path

from huggingface_hub import ModelCardData

from common.lora import FILE_NAME
from harness.args import RunArgs
from harness.checkpoint import write_text
from harness.export import EXPORTED, export_lora, prompt_of, rewards_of, shared_path
from harness.project import call_of, can_call

LICENSES = {
    "CompVis/stable-diffusion-v1-4": "creativeml-openrail-m",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-2-1": "openrail++",
    "stabilityai/stable-diffusion-2-1-base": "openrail++",
    "stabilityai/stable-diffusion-2": "openrail++",
    "stabilityai/stable-diffusion-2-base": "openrail++",
}
"""Of the base models that the papers use; of another the card has none, for its owner to add."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LARGE_FILE = 1 << 16
"""Bytes: every prompt of a larger file would be far too many to evaluate."""
EVALUATION = "evaluation.md"
"""A table in the run's folder, which the card takes up."""


def describe_run(run: Path, args: dict, script: Path | None, history: list[dict]) -> None:
    """Write EXPORTED, where there is a LoRA, and the model card, README.md, into a run's folder.

    `script` is where the run's script is, None where that is not known.

    Raises OSError, ValueError, and SafetensorError for a LoRA that is none.
    """
    export_lora(run, args, script and script.stem)
    write_text(run / "README.md", model_card(run, args, script, history))


def figures(history: list[dict]) -> str:
    """Reward of the first and the last iteration, KL, queries, minutes, lost updates: one line."""
    first, last, count = history[0], history[-1], len(history)
    seconds = sum(v for line in history for k, v in line.items() if k.startswith("time/"))
    skipped = sum(line.get("updates/skipped", 0) for line in history)
    parts = []
    if {"reward/mean"} <= set(first) & set(last):
        parts.append(f"reward {first['reward/mean']:.3g} -> {last['reward/mean']:.3g}")
    if "kl/pretrained" in last:
        parts.append(f"KL to the pretrained model {last['kl/pretrained']:.3g} nats")
    parts.append("1 iteration" if count == 1 else f"{count} iterations")
    if "samples" in last:
        parts.append(f"{last['samples']:.0f} reward queries")
    parts.append(f"{seconds / 60:.1f} minutes")
    if skipped:
        parts.append(f"updates without a finite gradient, which were skipped: {skipped:.0f}")
    return ", ".join(parts)


def grids(run: Path) -> list[Path]:
    """The first and the last grid of samples, where there are two."""
    found = sorted((run / "samples").glob("[0-9]*.png"))
    return [found[0], found[-1]] if len(found) > 1 else found


def summary(run: Path, args: dict, history: list[dict]) -> str:
    """For the terminal, at the end of a run: what came of it, where it is, and what to do next."""
    lines = [f"weights, metrics and pictures are in {run}"]
    if history:
        lines.insert(0, figures(history))
        lines.append(f"before and after, with the same noise: {' '.join(map(str, grids(run)))}")
        lines.append(f"how to load it in diffusers and other tools: {run / 'README.md'}")
        if can_call("evaluate"):
            command = evaluation_of(run, args)
            lines.append(f"compare it with the base model: {shlex.join(command)}")
    return "\n".join(lines)


def evaluation_of(run: Path, args: dict) -> list[str]:
    """The words that judge a run as it samples, on its prompts, by its reward and others.

    A run of several tasks has prompts of their own for each: it is judged by the others alone.
    """
    command, others = call_of("evaluate"), ["image_reward", "aesthetic"]
    if args["model"] == "zoo/sd":
        command, others = [*command, "zoo"], ["image_reward:zoo/image_reward"]
    else:
        command += ["--model", args["model"]]
    command += ["--lora", str(run)]
    file = args.get("prompts_file")
    if file and Path(file).is_file() and Path(file).stat().st_size > LARGE_FILE:
        command += ["--prompts-file", "SOME_OF_ITS_PROMPTS.txt"]
    elif file:
        command += ["--prompts-file", str(file)]
    elif prompt := prompt_of(args):
        command += ["--prompt", prompt]
    for name in ("num_inference_steps", "guidance_scale", "eta"):
        if name in args:
            command += [f"--{name.replace('_', '-')}", str(args[name])]
    own = [args["reward"]] if "reward" in args else []
    return [*command, "--rewards", *dict.fromkeys([*own, *others])]


def front_matter(args: dict, script: Path | None) -> str:
    """The card's YAML, in the hub's format."""
    model, lora = args["model"], args["lora_rank"] > 0
    tags = ["text-to-image", "stable-diffusion", "reinforcement-learning"]
    tags += [script.stem] if script else []
    on_hub = HUB_ID.fullmatch(model) and not Path(model).exists()
    data = ModelCardData(
        base_model=model if on_hub else None,
        base_model_relation=("adapter" if lora else "finetune") if on_hub else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license=LICENSES.get(model),
        tags=[*tags, "lora"] if lora else tags,
        instance_prompt=prompt_of(args) or None,
    )
    return data.to_yaml()


def settings(args: dict) -> dict[str, str]:
    """The algorithm's flags with what they were, of paths no more than the last name."""
    of_harness = {f.name for f in fields(RunArgs)} - {"seed", "dtype"}
    given = {name: value for name, value in args.items() if value not in (None, "")}
    shown = {name: str(value) for name, value in given.items() if name not in of_harness}
    if not prompt_of(args):
        shown.pop("prompt", None)
    shown["model"] = shared_path(args["model"])
    for name in {"prompts_file", "dataset", "pretrain_data"} & set(shown):
        shown[name] = Path(args[name]).name
    for name in {"reward", "tasks"} & set(args):
        shown[name] = ", ".join(rewards_of(args))
    return {f"--{name.replace('_', '-')}": value for name, value in shown.items()}


def loading(name: str, args: dict) -> str:
    """How to draw with the weights of the run of that name, in three tools for a LoRA."""
    base, place = shared_path(args["model"]), args.get("push_to_hub") or "REPO_OR_FOLDER"
    if args["lora_rank"] == 0:
        return f"""```python
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained("{place}", subfolder="unet")
pipe = StableDiffusionPipeline.from_pretrained("{base}", unet=unet)
```"""
    return f"""diffusers (with peft installed):

```python
from diffusers import StableDiffusionPipeline

pipe = StableDiffusionPipeline.from_pretrained("{base}")
pipe.load_lora_weights("{place}", weight_name="{FILE_NAME}")
```

ComfyUI: copy `{EXPORTED}` to `models/loras/{name}.safetensors` and put a *Load LoRA* node, strength
1, behind the checkpoint.

AUTOMATIC1111: copy `{EXPORTED}` to `models/Lora/{name}.safetensors` and write
`<lora:{name}:1>` into the prompt."""


def model_card(run: Path, args: dict, script: Path | None, history: list[dict]) -> str:
    """README.md of a run's folder: its front matter, what was trained, and what came of it.

    `args` are the run's arguments, `history` the lines of its metrics.
    """
    rank = args["lora_rank"]
    what = f"A LoRA of rank {rank} for" if rank else "All weights of the UNet of"
    rewards = " and ".join(f"`{reward}`" for reward in rewards_of(args))
    lines = [
        f"---\n{front_matter(args, script)}\n---",
        f"# {run.absolute().name}",
        f"{what} `{shared_path(args['model'])}`, trained by {named(script)} to raise {rewards}.",
    ]
    if history:
        lines += [f"Result: {figures(history)}.", "![Learning curve](learning_curve.png)"]
    pictures = grids(run)
    if len(pictures) > 1:
        lines += ["Before and after, the same prompts and noise:"]
        lines += [f"![samples](samples/{picture.name})" for picture in pictures]
    validation = sorted((run / "samples/validation").glob("[0-9]*.png"))
    if validation:
        lines += ["Other prompts, at the end:"]
        lines += [f"![validation](samples/validation/{validation[-1].name})"]
    if (run / EVALUATION).exists():
        lines += ["## Evaluation", (run / EVALUATION).read_text().strip()]
    rows = [f"| `{flag}` | {cell(value)} |" for flag, value in settings(args).items()]
    lines += ["## How to use it", loading(run.absolute().name, args)]
    lines += ["## Settings", "\n".join(["| flag | value |", "|---|---|", *rows])]
    return "\n\n".join(lines) + "\n"


def named(script: Path | None) -> str:
    """The script and its paper, as the card names them."""
    if script is None:
        return "Clean Diffusion RL"
    paper = re.search(r"arXiv:(\d{4}\.\d{5})", script.read_text())
    source = f" ([arXiv:{paper[1]}](https://arxiv.org/abs/{paper[1]}))" if paper else ""
    return f"`{script.name}` of Clean Diffusion RL{source}"


def cell(text: str) -> str:
    """A text in a table's cell."""
    return " ".join(text.split()).replace("|", "\\|") or "–"
