"""Make a run ready to be passed on: a LoRA for ComfyUI and AUTOMATIC1111, and a model card.

python -m evaluation.export runs/RUN
python -m evaluation.export runs/RUN --evaluation runs/evaluate__...     its table into the card
python -m evaluation.export runs/RUN --push-to-hub OWNER/NAME

A run writes both files itself; this is for older runs, and for what is known later.
"""

import re
import sys
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

import tyro
from safetensors import SafetensorError, safe_open

from common.lora import FILE_NAME
from evaluation.models import read_run_args
from evaluation.places import write_whole
from harness.args import RunArgs, fail, read_words
from harness.card import EVALUATION, describe_run
from harness.export import EXPORTED, shared_reward
from harness.folder import read_metrics
from harness.guard import command
from harness.hub import check_push, push_or_end
from harness.project import PROJECT
from harness.stored import read_stored, read_text

IN_ALL = "## In all\n", "## Prompt by prompt"
"""What stands around the table of all prompts in an evaluation's table.md."""
FLAG = re.compile(r"^    (\w+): .* = ", re.MULTILINE)
"""Of a script's Args, in its text."""


REWARD = re.compile(r"`([^`]+)`")
"""In the head of such a table."""


@dataclass
class Args:
    run: tyro.conf.Positional[Path]
    """Folder of a run, with args.json, metrics.jsonl and weights."""
    evaluation: Path | None = None
    """Folder of an evaluation by evaluate.py, whose table the card takes up."""
    push_to_hub: str | None = None
    """Repository of the Hugging Face Hub to upload it to, OWNER/NAME."""


def shared_column(reward: re.Match) -> str:
    """The head of a reward's column, as `shared_reward` has it."""
    spec = reward[1].replace("\\|", "|")  # a table has escaped it
    return f"`{shared_reward(spec)}`"


def script_of(run: Path, stored: dict) -> Path | None:
    """Where a run's script is, by its exported LoRA, its folder's name or its arguments, `stored`.

    None where no script takes half of them.
    """
    scripts = {
        path.stem: path
        for path in PROJECT.glob("*.py")
        if "class Args(RunArgs)" in path.read_text()
    }
    names = [run.absolute().name.partition("__")[0]]
    with suppress(OSError, SafetensorError), safe_open(run / EXPORTED, "pt") as file:
        names.insert(0, (file.metadata() or {}).get("script"))
    for name in names:
        if name in scripts:
            return scripts[name]

    def likeness(script: Path) -> float:
        taken = FLAG.findall(script.read_text()) + [field.name for field in fields(RunArgs)]
        return len({*taken} & {*stored}) / len({*taken} | {*stored})

    best = max(scripts.values(), key=likeness)
    return best if likeness(best) > 0.5 else None


@command
def main() -> None:
    args = read_words(Args, sys.argv[1:], __doc__)
    check_push(args.push_to_hub)
    run = args.run
    if not {"model", "seed", "lora_rank"} <= set(read_run_args(run)):
        fail(f"{run} has no args.json of a run in it; give the folder of a run")
    if not ((run / FILE_NAME).is_file() or (run / "unet").is_dir()):
        fail(f"{run} has no weights in it: the run ended before it had learned; resume it first")
    stored = read_stored(run / "args.json", dict[str, object], "give the folder of a run")
    metrics = run / "metrics.jsonl"
    count = len(read_text(metrics, "give the folder of a run").splitlines())
    if args.evaluation:
        table = read_text(args.evaluation / "table.md", "give the folder of a finished evaluation")
        in_all = table.partition(IN_ALL[0])[2].partition(IN_ALL[1])[0]
        write_whole(run / EVALUATION, REWARD.sub(shared_column, in_all))
    if args.push_to_hub:
        stored["push_to_hub"] = args.push_to_hub  # the card says from where to load it
    try:
        history = read_metrics(metrics, count)
        describe_run(run, stored, script_of(run, stored), history)
    except (OSError, SafetensorError, ValueError) as error:
        fail(f"{run} cannot be exported ({str(error)[:200]}); is it the folder of a run?")
    written = [run / name for name in ("README.md", EXPORTED) if (run / name).exists()]
    print(f"written: {' and '.join(map(str, written))}")
    if args.push_to_hub:
        push_or_end(run, args.push_to_hub)


if __name__ == "__main__":
    main()
