"""What trackers are told: TensorBoard, and Weights & Biases, of which a module stands in here."""

import io
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, read_metrics, run_script
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FLAGS = ("zoo", "--num-iterations", 2, "--samples-per-iteration", 4, "--save-every", 1)
FLAGS += ("--num-inference-steps", 2)
VALIDATION = [f"a {color} cat" for color in ("white", "brown", "black", "gray", "red", "green")]
VALIDATION += [f"a {color} dog" for color in ("white", "brown", "black", "gray")]
WANDB = """
import json, os
import numpy as np

def note(what, value):
    with open(os.environ["NOTES"], "a") as file:
        file.write(json.dumps([what, value]) + "\\n")

def init(project, name, config):
    note("init", {"project": project, "seed": config["seed"]})

class Image:
    def __init__(self, pixels):
        self.shape = np.asarray(pixels).shape

class Histogram:
    def __init__(self, values):
        self.mean = float(np.mean(values))

def log(values, step, commit=True):
    plain = {k: v if isinstance(v, (int, float)) else vars(v) for k, v in values.items()}
    note("log", {"step": step, "commit": commit, "values": plain})
"""


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run of draft.py with both trackers and validation prompts; its folder, and the notes."""
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "validation.txt").write_text("\n".join(VALIDATION))
    (folder / "modules/wandb").mkdir(parents=True)
    (folder / "modules/wandb/__init__.py").write_text(WANDB)
    env = os.environ | {"PYTHONPATH": str(folder / "modules"), "NOTES": str(folder / "notes")}
    flags = ("--validation-prompts", folder / "validation.txt", "--track")
    command = ["draft.py", *FLAGS, *flags, "--output-dir", folder / "run"]
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder / "run", [json.loads(line) for line in (folder / "notes").open()]


def test_tensorboard_has_metrics_histograms_and_grids(tracked):
    run, _ = tracked
    events = EventAccumulator(str(run), {"images": 0, "histograms": 0, "scalars": 0})
    events.Reload()
    lines = read_metrics(run)
    means = [event.value for event in events.Scalars("reward/mean")]
    assert means == pytest.approx([line["reward/mean"] for line in lines], rel=1e-6)
    histograms = events.Histograms("reward")
    assert [event.step for event in histograms] == [0, 1]
    for event, line in zip(histograms, lines):
        value = event.histogram_value
        assert value.num == 4
        assert value.sum / 4 == pytest.approx(line["reward/mean"], rel=1e-5)
        spread = (value.sum_squares / 4 - line["reward/mean"] ** 2) ** 0.5
        assert spread == pytest.approx(line["reward/std"], rel=1e-3)
    for place in ("samples", "samples/validation"):
        shown = events.Images(place)
        assert [event.step for event in shown] == [0, 1, 2]
        for event in shown:
            grid = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
            assert np.array_equal(
                grid, np.asarray(Image.open(run / f"{place}/{event.step:06}.png"))
            )


def test_validation_prompts_are_drawn_eight_in_a_row(tracked):
    run, _ = tracked
    grids = [np.asarray(Image.open(run / f"samples/validation/00000{k}.png")) for k in (0, 1, 2)]
    assert grids[0].shape == (2 * 64, 8 * 64, 3)
    assert (grids[0][64:, 2 * 64 :] == 255).all(), "ten pictures, and white"
    assert (grids[0] != grids[2]).any() and np.abs(grids[0].astype(int) - grids[2]).mean() < 10
    own = np.asarray(Image.open(run / "samples/000000.png"))
    assert own.shape == (64, 8 * 64, 3) and (own != grids[0][:64]).any()


def test_weights_and_biases_has_metrics_histograms_and_grids(tracked):
    run, notes = tracked
    assert notes[0] == ["init", {"project": "clean-diffusion-rl", "seed": 0}]
    logged = [value for what, value in notes if what == "log"]
    steps = [value["step"] for value in logged]
    assert steps == sorted(steps), "W&B drops what is logged for a step before the last"
    for line in read_metrics(run):
        of_step = [value for value in logged if value["step"] == line["iteration"]]
        metrics = next(value["values"] for value in of_step if value["commit"])
        assert metrics["reward/mean"] == line["reward/mean"]
        assert metrics["reward"]["mean"] == pytest.approx(line["reward/mean"], rel=1e-6)
        grids = [value["values"] for value in of_step if not value["commit"]]
        assert {key for grid in grids for key in grid} == {"samples", "samples/validation"}
        assert {"samples": {"shape": [64, 512, 3]}} in grids


def test_validation_prompts_change_nothing_that_is_learned(tracked, tmp_path):
    run, _ = tracked
    done = run_script("draft.py", *FLAGS, "--output-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    name = "pytorch_lora_weights.safetensors"
    assert (run / name).read_bytes() == (tmp_path / "run" / name).read_bytes()


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "--validation-prompts: {!r} is not there"),
        ("", "--validation-prompts: {} has no"),
        ("a cat\n" * 65, "--validation-prompts has 65 prompts"),
    ],
)
def test_validation_prompts_that_cannot_be_drawn_are_refused(content, said, tmp_path):
    file = tmp_path / "validation.txt"
    if content is not None:
        file.write_text(content)
    done = run_script("ddpo.py", *FLAGS, "--validation-prompts", file)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert said.format(str(file)) in done.stderr
