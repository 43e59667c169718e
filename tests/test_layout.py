"""Who imports whom, and that what is written twice for that reason says the same."""

import ast
import importlib

import pytest
import torch
from conftest import ROOT
from diffusers import DDPMScheduler

import sft_kl
from benchmarks import sft_weights, zoo_eval

SCRIPTS = {"dpok", "ddpo", "rwr", "sft_kl", "large_scale_ppo"}
COMMANDS = {"evaluate", "human_eval"}


def imported(source: str) -> set[str]:
    """The first parts of the names of all modules that a file imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def test_imported_finds_every_way_to_import():
    source = (
        "import a.b as c, d\ndef f():\n    from e import g\nfrom . import h\nfrom i.j import k\n"
    )
    assert imported(source) == {"a", "d", "e", "i"}


FILES = sorted([*ROOT.glob("evaluation/*.py"), *ROOT.glob("benchmarks/*.py")])
FILES += [ROOT / f"{command}.py" for command in sorted(COMMANDS)]


@pytest.mark.parametrize("path", [file.relative_to(ROOT).as_posix() for file in FILES])
def test_evaluation_and_benchmarks_import_no_script(path):
    assert not imported((ROOT / path).read_text()) & (SCRIPTS | COMMANDS)


@pytest.mark.parametrize("module", sorted(SCRIPTS | COMMANDS))
def test_all_zoo_presets_sample_as_the_benchmarks_do(module):
    preset = importlib.import_module(module).PRESETS["zoo"]
    found = preset.num_inference_steps, preset.guidance_scale, preset.eta
    assert found == (zoo_eval.NUM_INFERENCE_STEPS, zoo_eval.GUIDANCE_SCALE, zoo_eval.ETA)


def test_weights_of_the_benchmark_are_those_of_sft_kl():
    scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    t = torch.arange(1, 1000)
    for weighting, found in sft_weights.step_weights(scheduler.alphas_cumprod.double(), t).items():
        expected = sft_kl.step_weights(scheduler, t, weighting)
        torch.testing.assert_close(found.float(), expected, rtol=1e-6, atol=0)
