"""Write a run's LoRA once more, in a file that ComfyUI and AUTOMATIC1111 load.

python -m evaluation.export runs/RUN

A run writes that file itself, RUN/comfyui_a1111_lora.safetensors; this is for runs that were made
before runs did so. Copy it to models/loras of ComfyUI or to models/Lora of AUTOMATIC1111.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from safetensors import SafetensorError

from common.lora import FILE_NAME
from evaluation.models import read_run_args
from harness.args import fail, read_words
from harness.export import export_lora
from harness.guard import command


@dataclass
class Args:
    run: tyro.conf.Positional[Path]
    """Folder of a run, with args.json and pytorch_lora_weights.safetensors."""


@command
def main() -> None:
    run = read_words(Args, sys.argv[1:], __doc__).run
    args = read_run_args(run)
    if not {"model", "seed"} <= set(args):
        fail(f"{run} has no args.json of a run in it; give the folder of a run")
    script, mark, _ = run.absolute().name.partition("__")
    try:
        written = export_lora(run, args, script if mark else None)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        fail(f"{run / FILE_NAME} cannot be exported ({str(error)[:200]}); is it of such a run?")
    if written is None:
        fail(f"{run} has no {FILE_NAME} in it: runs with --lora-rank 0 leave unet/ alone")
    print(written)


if __name__ == "__main__":
    main()
