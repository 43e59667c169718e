"""A run's LoRA under the names that ComfyUI and AUTOMATIC1111 read."""

import shlex
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file

from common.lora import FILE_NAME
from common.rewards import is_url, is_users_function, parse_spec, parse_sum
from harness.checkpoint import write_tensors

EXPORTED = "comfyui_a1111_lora.safetensors"
BASES = {768: "sd_v1", 1024: "sd_v2"}
"""Of the width of a text encoder's hidden states, Stable Diffusion's versions that have it."""
PARTS = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


def exported_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """unet.X.to_q.lora_A.weight becomes lora_unet_X_to_q.lora_down.weight, in X _ for every dot.

    Of diffusers' LoRA `state`. Each layer also has alpha, the rank: those tools apply
    strength * alpha / rank * B A, which is the update that was trained.
    """
    exported = {}
    for name, weight in state.items():
        layer, part = name.rsplit(".", 2)[0], ".".join(name.rsplit(".", 2)[1:])
        short = "lora_" + layer.replace(".", "_")
        exported[f"{short}.{PARTS[part]}"] = weight
        if part == "lora_A.weight":
            exported[f"{short}.alpha"] = torch.tensor(float(len(weight)))
    return exported


def shared_path(model: str) -> str:
    """A hub id or a folder of the zoo as it is, of other folders no more than the name."""
    path = Path(model)
    is_of_zoo = path.parts[:1] == ("zoo",) and ".." not in path.parts
    is_folder = path.is_absolute() or ".." in path.parts or path.exists()
    return path.name if is_folder and not is_of_zoo else model


def rewards_of(args: dict) -> list[str]:
    """`shared_reward` of what a run was trained on, of all its tasks."""
    rewards = [args["reward"]] if "reward" in args else []
    rewards += [shlex.split(task)[0] for task in args.get("tasks", ())]
    return [shared_reward(reward) for reward in rewards]


def shared_reward(spec: str) -> str:
    """A reward without what is private: its options, servers and folders outside the project."""

    def name_of(term: str) -> str:
        if is_url(term):
            return "reward server"
        name, weights, _ = parse_spec(term)
        if is_users_function(term):
            path, _, function = term.rpartition(":")
            return f"{Path(path).name}:{function}"
        shown = weights and not is_url(weights) and shared_path(weights) == weights
        return f"{name}:{weights}" if shown else name

    names = [(weight, name_of(term)) for weight, term in parse_sum(spec)]
    if len(names) == 1:
        return names[0][1]
    return " + ".join(f"{weight:g}*{name}" for weight, name in names)


def prompt_of(args: dict) -> str:
    """The prompt of a run; empty where there are several, those of a file or of tasks."""
    return "" if args.get("prompts_file") else args.get("prompt", "")


def description(name: str, args: dict, script: str | None, state: dict[str, torch.Tensor]) -> dict:
    """What the file says of itself: texts, of which ss_... are those that the tools show.

    Raises ValueError for what is no LoRA of a Stable Diffusion.
    """
    of_text = [w.shape for key, w in state.items() if key.endswith("attn2.to_k.lora_A.weight")]
    if not of_text:
        raise ValueError("it has no LoRA of an attention to text")
    rank, width = of_text[0]
    file = args.get("prompts_file")
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    texts = {
        "base_model": shared_path(args["model"]),
        "script": script,
        "reward": ", ".join(rewards_of(args)),
        "prompt": Path(file).name if file else prompt_of(args) or None,
        "seed": args["seed"],
        "rank": rank,
        "libraries": libraries,
        "ss_output_name": name,
        "ss_base_model_version": BASES.get(width),
        "ss_v2": BASES.get(width) == "sd_v2",  # what AUTOMATIC1111 tells the versions by
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": float(rank),
    }
    return {"format": "pt"} | {key: str(text) for key, text in texts.items() if text is not None}


def export_lora(run: Path, args: dict, script: str | None) -> Path | None:
    """Write EXPORTED into a run's folder, of the LoRA that is there; None where there is none.

    `args` are the run's arguments: model and seed, and what it has of reward, tasks, prompt and
    prompts_file. Raises OSError, ValueError, and SafetensorError for a file that is none.
    """
    if not (run / FILE_NAME).exists():
        return None
    state = load_file(run / FILE_NAME)
    about = description(run.absolute().name, args, script, state)
    write_tensors(run / EXPORTED, exported_names(state), about)
    return run / EXPORTED
