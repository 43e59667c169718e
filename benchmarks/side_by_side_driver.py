"""One side of benchmarks/side_by_side.py, in the environment of that side; it starts this file.

    cd FOLDER; PYTHON side_by_side_driver.py (ours|peer) run RESULT.json [FLAG ...]
    cd FOLDER; PYTHON side_by_side_driver.py (ours|peer) outputs RESULT.pt MODEL

FOLDER is this repository or a clone of ddpo-pytorch. `run` runs ddpo.py or scripts/train.py as it
stands in FOLDER, with the flags, and writes seconds and counts of each iteration but the first.
`outputs` writes what the parts of a model give for fixed input. What is put in from outside is all
here, and needs nothing but what both environments have.
"""

import json
import random
import runpy
import sys
import time
from collections import Counter
from functools import partial, wraps
from importlib.metadata import version
from pathlib import Path

PROMPTS_FILE = Path(__file__).resolve().parent.parent / "prompts/zoo.txt"
PACKAGES = {"ours": ("torch", "diffusers", "transformers", "numpy")}
PACKAGES["peer"] = (*PACKAGES["ours"], "accelerate")
# What ends the description of each of the peer's loops, and the name of its time here.
LOOPS = {"sampling": "sample_s", "rewards": "reward_s", "training": "train_s"}


def count_calls() -> Counter:
    """Counts from here on: the UNet's calls and the latents in them, without and with gradients
    (that is in sampling and in training), and the optimizer's updates."""
    import torch
    from diffusers import UNet2DConditionModel
    from torch.optim.optimizer import register_optimizer_step_post_hook

    counts, forward = Counter(), UNet2DConditionModel.forward

    @wraps(forward)
    def counted(self, sample, *args, **kwargs):
        name = "train" if torch.is_grad_enabled() else "sample"
        counts.update({f"{name}_calls": 1, f"{name}_latents": len(sample)})
        return forward(self, sample, *args, **kwargs)

    UNet2DConditionModel.forward = counted
    register_optimizer_step_post_hook(lambda *_: counts.update(updates=1))
    return counts


def run_ours(words: list[str]) -> list[dict]:
    """Times are those of metrics.jsonl, counts from the end of one iteration to that of the next.

    The first iteration is left out: the grid of samples stands before it.
    """
    from harness import Run

    counts, at_log, log = count_calls(), [], Run.log

    @wraps(log)
    def log_and_count(*args, **kwargs):
        at_log.append(counts.copy())
        return log(*args, **kwargs)

    Run.log = log_and_count
    run_script("ddpo.py", words)
    folder = Path(words[words.index("--output-dir") + 1])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = [{name: line[f"time/{name}"] for name in LOOPS.values()} for line in lines]
    return [time | (now - before) for time, before, now in zip(times[1:], at_log, at_log[1:])]


def run_peer(words: list[str]) -> list[dict]:
    """Times are those of its loops; "rest_s" is what lies between them."""
    import ddpo_pytorch.prompts

    prompts = PROMPTS_FILE.read_text().splitlines()
    ddpo_pytorch.prompts.zoo = lambda: (random.choice(prompts), {})
    rows = record_loops(count_calls())
    run_script("scripts/train.py", words)
    return rows[1:]


def record_loops(counts: Counter) -> list[dict]:
    """A list that gets a row for every iteration: seconds of the loops of LOOPS, and counts.

    train.py takes its progress bars from tqdm.tqdm, and names its loops by them.
    """
    import tqdm

    rows = []

    class Recorded(tqdm.tqdm):
        def __iter__(self):
            began = time.perf_counter()
            name = LOOPS.get(self.desc.rpartition(" ")[2])
            if name == "sample_s":
                rows.append({"began": began, "before": counts.copy()})
            yield from super().__iter__()
            ended = time.perf_counter()
            if name:
                rows[-1][name] = ended - began
            if name == "train_s":
                rows[-1] |= counts - rows[-1].pop("before")
                whole = ended - rows[-1].pop("began")
                rows[-1]["rest_s"] = whole - sum(rows[-1][loop] for loop in LOOPS.values())

    tqdm.tqdm = Recorded
    return rows


def run_script(path: str, words: list[str]) -> None:
    """Run a script as python does, and come back where it ends without an error."""
    sys.argv = [path, *words]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise


def outputs(model: str) -> dict:
    """Tokens, text, predictions and pictures of a model, for fixed prompts, latents and steps."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(model)
    prompts, timesteps = PROMPTS_FILE.read_text().splitlines(), torch.arange(0, 1000, 100)
    size, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    shape = (len(prompts), channels, size, size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    length = pipeline.tokenizer.model_max_length
    options = {"padding": "max_length", "max_length": length, "truncation": True}
    tokens = pipeline.tokenizer(prompts, return_tensors="pt", **options).input_ids
    with torch.no_grad():
        text = pipeline.text_encoder(tokens)[0]
        prediction = pipeline.unet(latents, timesteps, text).sample
        pictures = pipeline.vae.decode(latents).sample
    return {"tokens": tokens, "text": text, "prediction": prediction, "pictures": pictures}


def main():
    side, task, result, *words = sys.argv[1:]
    # In place of this file's folder, whose names are not for what is run here.
    sys.path[0] = str(Path.cwd())
    import torch

    if side == "peer":
        import diffusers.models.vae as vae

        # diffusers 0.17 has no mid_block_add_attention in a VAE's configuration; the zoo's is off.
        vae.UNetMidBlock2D = partial(vae.UNetMidBlock2D, add_attention=False)
    if task == "outputs":
        torch.save(outputs(*words), result)
        return
    found = {
        "iterations": {"ours": run_ours, "peer": run_peer}[side](words),
        "threads": torch.get_num_threads(),
        "versions": {package: version(package) for package in PACKAGES[side]},
    }
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
