"""The comparison with ddpo-pytorch, as far as it goes without that one: counts, loops, tables."""

import io
import json
import subprocess
import sys
from collections import Counter
from functools import partial

import pytest
import tqdm
from conftest import ROOT

from benchmarks import side_by_side, side_by_side_driver
from ddpo import PRESETS


def test_settings_are_those_of_the_preset():
    preset = PRESETS["zoo"]
    assert preset.samples_per_iteration == side_by_side.SAMPLES
    assert preset.num_inference_steps == side_by_side.STEPS
    assert preset.guidance_scale == side_by_side.GUIDANCE
    assert preset.gradient_steps == side_by_side.UPDATES
    assert preset.lora_rank == 4  # that of diffusers' LoRAAttnProcessor, which the peer takes


@pytest.mark.parametrize("batches", side_by_side.Args.batches)
def test_peer_has_the_same_counts_at_every_batch(batches, tmp_path):
    words = dict(word.split("=") for word in side_by_side.words_of_peer(*batches, tmp_path, 1))
    config = {name.removeprefix("--config."): value for name, value in words.items()}
    sampled = int(config["sample.batch_size"]) * int(config["sample.num_batches_per_epoch"])
    of_update = int(config["train.batch_size"]) * int(config["train.gradient_accumulation_steps"])
    assert sampled == 32
    assert sampled / of_update == (2 if batches[1] <= 16 else 1)
    # As train.py computes it.
    assert int(int(config["sample.num_steps"]) * float(config["train.timestep_fraction"])) == 11


def test_loops_of_the_peer_are_recorded(monkeypatch):
    monkeypatch.setattr(tqdm, "tqdm", tqdm.tqdm)
    now, counts = [0.0], Counter(updates=5)
    monkeypatch.setattr(side_by_side_driver.time, "perf_counter", lambda: now[0])
    rows = side_by_side_driver.record_loops(counts)

    def loop(description, seconds):
        for _ in partial(tqdm.tqdm, file=io.StringIO())(range(2), desc=description):
            now[0] += seconds

    for epoch in range(2):
        loop(f"Epoch {epoch}: sampling", 1)
        loop("Timestep", 0.5)
        loop("Waiting for rewards", 0.25)
        counts.update(updates=2)
        loop(f"Epoch {epoch}.0: training", 3)
        now[0] += 100
    row = {"sample_s": 2, "reward_s": 0.5, "train_s": 6, "rest_s": 1, "updates": 2}
    assert rows == [row, row]


def test_counts_of_ours(tmp_path):
    """3 steps of 2 samples, 2 of them with noise, guided, in 2 updates; no grid in the counts."""
    flags = "zoo --samples-per-iteration 2 --micro-batch-size 4 --num-inference-steps 3"
    flags += " --rewarded-share 1 --num-iterations 3 --no-monitor-kl --reward jpeg_compressibility"
    result = tmp_path / "result.json"
    driver = [sys.executable, ROOT / "benchmarks/side_by_side_driver.py", "ours", "run", result]
    words = [*flags.split(), "--output-dir", tmp_path / "run"]
    subprocess.run([*driver, *words], cwd=ROOT, check=True)
    iterations = json.loads(result.read_text())["iterations"]
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(iterations) == len(lines) - 1 == 2
    for found, line in zip(iterations, lines[1:]):
        assert found.pop("sample_s") == line["time/sample_s"]
        assert found.pop("train_s") == line["time/train_s"]
        assert found.pop("reward_s") == line["time/reward_s"]
        sampling = {"sample_calls": 3, "sample_latents": 12}
        assert found == sampling | {"train_calls": 2, "train_latents": 8, "updates": 2}


def row(sample_s, train_s, **counts):
    return {"sample_s": sample_s, "train_s": train_s} | side_by_side.COUNTS | counts


RUNS = {
    "ddpo.py": [row(1, 2, sample_latents=832)],
    "ddpo.py --no-monitor-kl": [row(1, 1), row(9, 5), row(1, 2)],
    "peer, batches 8 and 8": [row(1, 5)],
    "peer, batches 16 and 16": [row(2, 3)],
    "peer, batches 32 and 32": [row(1, 1, updates=1)],
}


def test_summary_has_medians_and_the_best_batch_of_equal_counts():
    table = side_by_side.summary(RUNS)
    ours = table["ddpo.py --no-monitor-kl"]
    assert ours["s"] == {"median": 3, "lowest": 2, "highest": 14}
    assert [table[name]["same_counts"] for name in RUNS] == [False, True, True, True, False]
    assert side_by_side.best_of_peer(table) == "peer, batches 16 and 16"


def test_counts_that_change_or_are_too_few_are_refused():
    changing = {"peer, batches 8 and 8": [row(1, 1), row(1, 1, updates=1)]}
    with pytest.raises(SystemExit, match="other counts"):
        side_by_side.summary(RUNS | changing)
    fewer = {"ddpo.py --no-monitor-kl": [row(1, 1, train_latents=703)]}
    with pytest.raises(SystemExit, match="does less"):
        side_by_side.summary(RUNS | fewer)
