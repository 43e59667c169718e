"""Is my LoRA better, and at what price? The base model and fine-tuned ones, compared on the same
prompts and noise.

For every prompt the base and each --lora draw pictures from the same seeds, so that picture i of a
prompt begins with the same noise whoever draws it. Per reward, prompt and model, N pictures each:

    mean, standard error s / sqrt(N)
    gain: mean and standard error of the differences r_i - r_i(base)
    win rate over the base: share of the pairs i with r_i > r_i(base), ties counting half

and what tells a better model from one that has found a hole in its reward: rewards that it was not
trained on, the KL to the pretrained model (DPOK, arXiv:2305.16381, Eq. 7, in nats), the diversity
of a prompt's pictures, and on the zoo what its judge says.

A laptop, two minutes:    python evaluate.py zoo --lora runs/A --lora runs/B
One GPU, SD v1.5:         python evaluate.py --lora runs/A --prompts-file FILE
Eight GPUs:               torchrun --nproc_per_node=8 evaluate.py --lora runs/A --prompts-file FILE

The same command resumes what was stopped. docs/evaluate.md explains every column, and
human_eval.py asks people. The work is in evaluation/.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch.distributed as dist

from evaluation.digests import score_keys
from evaluation.draw import draw_and_score
from evaluation.folder import check_folder, default_folder
from evaluation.models import Model, read_models
from evaluation.places import check_text, writing
from evaluation.report import report
from evaluation.settings import (
    SHARD_SIZE,
    Settings,
    check_rewards,
    check_size,
    check_world_size,
    read_settings,
)
from evaluation.sheet import check_sheet
from harness.args import check_gpus, check_numbers, parse_args
from harness.guard import command


@dataclass
class Args:
    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Hub id or local folder in diffusers format: the base, which the LoRAs were trained on."""
    lora: tuple[Path, ...] = ()
    """What to compare with it: folders of runs, or safetensors files; the flag may be repeated."""
    prompt: str = ""
    """The prompt, unless --prompts-file is given."""
    prompts_file: Path | None = None
    """Text file, one prompt a line; every one of them is drawn."""
    rewards: tuple[str, ...] = ("image_reward", "aesthetic")
    """Rewards, as in docs/rewards.md; those that a run was not trained on tell if it is better."""
    images_per_prompt: int = 30
    """N: pictures of a prompt, for each model."""
    micro_batch_size: int = 8
    """Pictures in one forward pass of a rank: for memory and speed, never changes the result."""
    shard_size: int = SHARD_SIZE
    """About how many pictures all ranks together draw, score and store at once; whole prompts."""
    num_inference_steps: int = 50
    """T: DDIM steps of a picture."""
    guidance_scale: float = 7.5
    """w of classifier-free guidance; 1 or less switches it off."""
    eta: float = 1.0
    """Noise of the DDIM step, as in training: 1 is the DDPM; 0 is deterministic and has no KL."""
    seed: int = 0
    """Seed of the noise; picture i of prompt j is a function of (seed, j, i)."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """What the UNet's forward pass runs in; all else is float32."""
    shown_prompts: int = 8
    """Prompts in comparison.png, the first ones."""
    shown_images: int = 8
    """Pictures of each prompt in comparison.png, its columns."""
    output_dir: Path | None = None
    """Where the results go, and where a stopped evaluation is resumed; by default
    runs/evaluate__TAG__SEED__DIGEST, the digest being of all that the pictures depend on, and of
    the rewards' names."""


PRESETS = {
    "stable-diffusion": Args(),
    "zoo": Args(
        model="zoo/sd",
        prompts_file=Path("prompts/dpok_and_unseen.txt"),
        rewards=("image_reward:zoo/image_reward",),
        micro_batch_size=16,
        num_inference_steps=12,
        guidance_scale=1.5,
    ),
}


def check(args: Args, world_size: int) -> tuple[Settings, list[Model], dict[str, str], Path]:
    """Refuse what cannot work before anything slow is loaded; returns what goes where."""
    check_text(args)
    check_numbers(args, {"seed"})
    check_gpus(args.dtype)
    check_rewards(args.rewards, args.images_per_prompt)
    settings = read_settings(args)
    models = read_models(args)
    check_world_size(settings, world_size)
    shown = min(args.shown_prompts, len(settings.prompts))
    check_sheet(len(models), shown, min(args.shown_images, args.images_per_prompt))
    folder = args.output_dir or default_folder(__file__, args, settings, models)
    check_folder(folder, settings, models)
    check_size(settings, len(models), args.micro_batch_size, folder)
    return settings, models, score_keys(args.rewards), folder


@command
def main():
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args = parse_args(PRESETS, __doc__)
    settings, models, rewards, folder = check(args, world_size)
    draw_and_score(settings, models, rewards, folder, args.micro_batch_size)
    if world_size > 1:
        dist.destroy_process_group()
    if rank == 0:
        with writing(folder):
            shown = args.shown_prompts, args.shown_images
            table = report(settings, models, rewards, folder, *shown)
        print(table)
        print(f"the tables, the figures and the pictures are in {folder}")


if __name__ == "__main__":
    main()
