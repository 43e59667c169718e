"""Which pictures do people prefer? A page of blind pairs, and the tally of its answers.

`build` writes one HTML file with everything in it: pairs of the same prompt and the same noise,
from two models, in hidden and shuffled order. What is paired, and asked, is that of a paper:

    --questions pictures    single pictures: fidelity, relevance, overall preference
                            (Zhang et al. 2024, arXiv:2401.12244, App. C)
    --questions sets        sets of four: alignment and quality (DPOK, arXiv:2305.16381, 5.2)
    --questions skin_tone   sets of six portraits: diversity of skin tone (Zhang et al., App. D.2)

Send the page, and keep key.json, which alone knows whose picture is where. `tally` takes it and
the answers that the page saves, and gives for each question how often the second model is
preferred, with Wilson's interval:

    k of n decided answers, p = k / n
    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

Base and a run:  python human_eval.py build zoo --lora runs/A --output-dir study
Two runs:        python human_eval.py build zoo --lora runs/A --lora runs/B --output-dir study
Sets of four:    python human_eval.py build zoo --lora runs/A --lora runs/B --questions sets
Portraits:       python human_eval.py build zoo --lora runs/A --questions skin_tone
                     --prompts-file prompts/zoo_portraits_held_out.txt
Drawn already:   python human_eval.py build --evaluation runs/evaluate__… --models base A
Answers:         python human_eval.py tally study/answers/*.json --key study/key.json

docs/evaluate.md says how to ask, and how answers count. The work is in evaluation/.
"""

import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch.distributed as dist
import tyro

from evaluation.draw import draw_and_score
from evaluation.folder import check_folder
from evaluation.models import read_models
from evaluation.page import KEY_NAME, PAGE_NAME, QUESTIONNAIRES, write_page
from evaluation.pairs import choose_models, shuffled_pairs
from evaluation.places import check_place, check_text, to_json, write_whole, writing
from evaluation.settings import SHARD_SIZE, check_size, check_world_size, read_settings
from evaluation.tally import check_output, key_of, tables, tally
from harness.args import check_gpus, check_numbers, parse_args, read_words
from harness.guard import command
from harness.project import program
from harness.stop import fail


@dataclass
class BuildArgs:
    evaluation: Path | None = None
    """Output folder of evaluate.py whose pictures to take; without it --lora ... are drawn."""
    models: tuple[str, ...] = ()
    """The two of --evaluation to compare, as its tables name them; the tally is of the second."""
    questions: Literal["pictures", "sets", "skin_tone"] = "pictures"
    """What is paired and asked: single pictures, as App. C of Zhang et al. 2024; sets, as section
    5.2 of DPOK; sets of portraits, as App. D.2 of Zhang et al."""
    set_size: int | None = None
    """Pictures of a set, on each side of a pair; by default the papers' 4 (sets) and 6
    (skin_tone)."""
    images_per_prompt: int | None = None
    """Pictures of each prompt and model, in one pair each or in whole sets; of an evaluation the
    first ones. By default 4 single pictures, and the papers' 40 (sets) and 6 (skin_tone)."""
    shuffle_seed: int | None = None
    """Of the order of pairs and sides; by default random, so that no rater can guess it."""
    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Hub id or local folder in diffusers format: the base."""
    lora: tuple[Path, ...] = ()
    """One run (or safetensors file) to compare with the base, or two to compare with each other."""
    prompt: str = ""
    """The prompt, unless --prompts-file is given."""
    prompts_file: Path | None = None
    """Text file, one prompt a line."""
    micro_batch_size: int = 8
    """Pictures in one forward pass of a rank: for memory and speed, never changes the result."""
    num_inference_steps: int = 50
    """T: DDIM steps of a picture."""
    guidance_scale: float = 7.5
    """w of classifier-free guidance; 1 or less switches it off."""
    eta: float = 1.0
    """Noise of the DDIM step, as in training."""
    seed: int = 0
    """Seed of the noise; picture i of prompt j is a function of (seed, j, i)."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """What the UNet's forward pass runs in."""
    output_dir: Path | None = None
    """Where human_eval.html and key.json go; by default runs/human_eval__TIME."""


@dataclass
class TallyArgs:
    answers: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Files that the page has saved, one a rater."""
    key: Path | None = None
    """key.json of the page; by default looked for beside the answers, and one folder up."""
    output: Path | None = None
    """JSON file for the figures, besides the tables on the screen."""


PRESETS = {
    "stable-diffusion": BuildArgs(),
    "zoo": BuildArgs(
        model="zoo/sd",
        prompts_file=Path("prompts/dpok_and_unseen.txt"),
        micro_batch_size=16,
        num_inference_steps=12,
        guidance_scale=1.5,
    ),
}


def with_sizes(args: BuildArgs) -> BuildArgs:
    """With --set-size and --images-per-prompt as --questions has them, where they are not given."""
    asked = QUESTIONNAIRES[args.questions]
    return replace(
        args,
        set_size=asked.set_size if args.set_size is None else args.set_size,
        images_per_prompt=(
            asked.images_per_prompt if args.images_per_prompt is None else args.images_per_prompt
        ),
    )


def check(args: BuildArgs, output_dir: Path) -> None:
    """Refuse what build cannot do, but for what `draw` and `choose_models` refuse."""
    check_text(args)
    check_numbers(args, {"seed", "shuffle_seed"})
    check_place("--output-dir", output_dir)
    if args.questions == "pictures" and args.set_size != 1:
        fail(
            f"--set-size is {args.set_size}, and --questions pictures asks about single pictures; "
            "choose --questions sets, or leave --set-size out"
        )
    if args.images_per_prompt % args.set_size:
        fail(
            f"--images-per-prompt: {args.images_per_prompt} pictures are no whole sets of "
            f"{args.set_size}; give a multiple of --set-size"
        )
    if (output_dir / KEY_NAME).exists():
        fail(
            f"--output-dir {output_dir} holds a page and its key; "
            "choose another folder, or answers lose their key"
        )
    if args.evaluation and args.lora:
        fail(
            "--lora and --evaluation are both given; choose models of the evaluation with --models"
        )
    if not args.evaluation and args.models:
        fail("--models chooses from --evaluation, which is missing; name runs with --lora")
    if not args.evaluation and not 1 <= len(args.lora) <= 2:
        fail(
            f"--lora names {len(args.lora)} runs; "
            "name one to compare with the base, or two, or give --evaluation"
        )


def draw(args: BuildArgs, folder: Path) -> list[str]:
    """Pictures of two models as evaluate.py draws them, into `folder`; returns their names."""
    check_gpus(args.dtype)
    settings = read_settings(args, shard_size=SHARD_SIZE)
    models = read_models(args)
    check_world_size(settings, int(os.environ.get("WORLD_SIZE", 1)))
    check_folder(folder, settings, models)
    check_size(settings, 2, args.micro_batch_size, folder)
    draw_and_score(settings, models, {}, folder, args.micro_batch_size, drawn=2)
    return [model.name for model in models[-2:]]


def build(args: BuildArgs) -> None:
    """Write the page, and the key, whose sides are which."""
    name = f"human_eval__{time.strftime('%Y%m%d-%H%M%S')}"
    output_dir = args.output_dir or Path("runs") / name
    args = with_sizes(args)
    check(args, output_dir)
    if args.evaluation:
        folder = args.evaluation
        names = choose_models(folder, args.models, args.images_per_prompt)
    else:
        folder = output_dir / "pictures"
        names = draw(args, folder)
    if dist.is_initialized():
        dist.destroy_process_group()
    if int(os.environ.get("RANK", 0)) == 0:
        pairs, sets = shuffled_pairs(args, folder, names)
        with writing(output_dir, "choose another --output-dir, or make room"):
            write_page(output_dir, names, pairs, sets)
        count = len(pairs["pairs"])
        of_sets = f"sets of {args.set_size} pictures, " if args.set_size > 1 else ""
        what = f"{count} pairs of {of_sets}{names[0]} and {names[1]}"
        print(f"send {output_dir / PAGE_NAME}: {what}")
        print(f"keep {output_dir / KEY_NAME}: without it nobody knows whose picture is where")


@command
def main():
    what, *words = sys.argv[1:] or ["--help"]
    if what == "build":
        build(parse_args(PRESETS, __doc__, words=words))
    elif what == "tally":
        args = read_words(TallyArgs, words, __doc__, prog=f"{program()} tally")
        check_text(args)
        key = key_of(args.answers, args.key)
        check_output(args.output, (*args.answers, key))
        results = tally(args.answers, key)
        print(tables(results))
        if args.output:
            with writing(args.output, "choose another --output, or make room"):
                write_whole(args.output, to_json(results))
    elif what in ("-h", "--help"):
        print(f"{__doc__}\nbuild --help and tally --help explain every flag.")
    else:
        fail(f"{what!r} is neither build nor tally; begin with one of them")


if __name__ == "__main__":
    main()
