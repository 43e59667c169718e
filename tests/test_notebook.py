"""docs/first_steps.ipynb: executed as it stands, and what it is committed with."""

import base64
import io
import json
import re
import shutil

import nbformat
import numpy as np
import pytest
from conftest import ROOT, read_metrics
from PIL import Image

from benchmarks.notebook import NOTEBOOK, executed

ITERATIONS, PICTURES = 8, 24


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A copy of the repository in which it was executed, and the notebook with its new outputs."""
    work = tmp_path_factory.mktemp("first_steps") / "repository"
    others = shutil.ignore_patterns(".*", "runs", "build", "__pycache__", "*.egg-info")
    shutil.copytree(ROOT, work, ignore=others)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(work.parent / "ipython"))
        patch.setenv("JUPYTER_RUNTIME_DIR", str(work.parent / "jupyter"))
        yield work, executed(work / "docs" / NOTEBOOK.name)
    shutil.rmtree(work)


def outputs(notebook) -> list:
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [output for cell in code for output in cell.outputs]


def pictures(notebook) -> list[Image.Image]:
    found = [output.data for output in outputs(notebook) if "data" in output]
    encoded = [data["image/png"] for data in found if "image/png" in data]
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in encoded]


def texts(notebook) -> str:
    """What its cells have printed."""
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def test_it_trains_evaluates_and_loads_the_lora(done):
    work, notebook = done
    [run] = [path for path in (work / "runs").iterdir() if not path.name.endswith("evaluation")]
    metrics = read_metrics(run)
    assert len(metrics) == ITERATIONS
    rewards = [line["reward/mean"] for line in metrics]
    assert np.mean(rewards[-2:]) > np.mean(rewards[:2]) + 0.2
    for name in ("pytorch_lora_weights.safetensors", "learning_curve.png", "README.md"):
        assert (run / name).is_file()
    printed = f"{metrics[-1]['samples']:4} reward queries: reward {rewards[-1]:+.2f}"
    assert printed in texts(notebook)

    found = json.loads((work / f"runs/{run.name}__evaluation/results.json").read_text())["models"]
    base, trained = (found[name]["all"] for name in ("base", run.name))
    gain = trained["rewards"]["image_reward:zoo/image_reward"]
    assert gain["gain"] > 2 * gain["gain_standard_error"] > 0
    assert trained["success"]["mean"] > base["success"]["mean"]
    stored = np.load(next((work / f"runs/{run.name}__evaluation/samples/base").glob("*.npz")))
    assert len(stored["images"]) == PICTURES

    before, after, curve, comparison, loaded = pictures(notebook)
    assert before.size == after.size == loaded.size == (8 * 64, 64)
    assert np.any(np.asarray(before) != np.asarray(after))
    assert np.array_equal(curve, Image.open(run / "learning_curve.png"))
    assert comparison.height > 2 * 64


def test_it_is_committed_with_what_it_puts_out(done):
    """Of one execution from the first cell to the last, and nothing of the machine that made it."""
    committed = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(committed)
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert {output.output_type for output in outputs(committed)} <= {
        "stream",
        "display_data",
        "execute_result",
    }
    sizes = [[picture.size for picture in pictures(found)] for found in (done[1], committed)]
    assert sizes[0] == sizes[1]
    assert NOTEBOOK.stat().st_size < 1.5e6
    printed = texts(committed)
    assert "warning" not in printed.lower() and "\x1b" not in printed
    assert not re.findall(r"(?:^|[\s\"'(=])(?:/[\w.-]+){2,}", printed), "absolute paths"


def test_its_links_lead_somewhere():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    assert links
    for link in links:
        page, _, anchor = link.partition("#")
        titles = re.findall(r"^#+ (.+)$", (NOTEBOOK.parent / page).read_text(), re.MULTILINE)
        names = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not anchor or anchor in names, link
    assert "docs/first_steps.ipynb" in (ROOT / "README.md").read_text()
