"""Counts of an iteration against what it does, and the commands that measure it."""

import gc
import importlib
import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from scripts import SCRIPTS

from benchmarks import count, gpu, performance, scaling, throughput
from benchmarks.layouts import make_pipeline
from common.stable_diffusion import make_trainable
from harness.args import parse_args

LIGHT = "--micro-batch-size 4 --lora-rank 4 --num-inference-steps 3 --num-iterations 2"
OF_ONE_TASK = f"{LIGHT} --reward jpeg_compressibility --samples-per-iteration 4"
PAIRS = "--pretrain-data zoo/pairs.py:biased --pretrain-batch-size 8"
SCORED = "--reward image_reward:zoo/image_reward"  # has a gradient
# 4 samples of 3 steps, guided, so 2 rows for each: 24 rows to sample. All steps have noise.
# What an iteration trains on, and asks of the pretrained model, is worked out beside the flags.
CASES = {
    # Two updates on 12 transitions, which are all there are; the KL of each of them, once.
    "dpok.py": ("--batch-size 12 --gradient-steps 2 --replay-rollouts 1", 24, 2 * 12, 2 * 2 * 12),
    # All 4 x 3 transitions, in one update; the KL of one step of each sample.
    "ddpo.py": ("--gradient-steps 1 --min-count 2", 24, 2 * 4, 2 * 4 * 3),
    # Three updates on 8 samples; the KL of one step of each that is drawn.
    "rwr.py": ("--shard-size 4 --gradient-steps 3 --batch-size 8", 24, 2 * 4, 2 * 3 * 8),
    # Two updates on 8 samples, with the pretrained prediction of each; the KL of each that is seen.
    "sft_kl.py": (
        "--dataset-size 4 --shard-size 4 --gradient-steps 2 --batch-size 8 --gamma 9",
        24,
        2 * 2 * 8 + 2 * 4,
        2 * 2 * 8,
    ),
    # Two timesteps of 4 samples, and 8 pairs without guidance; the KL of one step of each sample.
    "large_scale_ppo.py": (
        f"--training-timesteps 2 {PAIRS}",
        24,
        2 * 4,
        2 * 4 * 2 + 8,
    ),
    # Three updates on two samples and 8 pairs; the KL of one step of each sample.
    "raft.py": (
        f"--images-per-prompt 2 --acceptance 0.5 --gradient-steps 3 {PAIRS}",
        24,
        2 * 4,
        3 * (2 * 2 + 8),
    ),
    # Three updates on 4 samples of the original model and 8 pairs; the model's own 2, with a KL.
    "reward_weighted.py": (
        f"--images-per-prompt 2 --watched-prompts 1 --gradient-steps 3 {PAIRS}",
        24 + 2 * 2 * 3,
        2 * 2,
        3 * (2 * 4 + 8),
    ),
    # A step of 4 samples, without and with gradient, and 8 pairs; the KL of one step of each.
    "refl.py": (f"--most-steps-left 2 {PAIRS} {SCORED}", 24 + 2 * 4, 2 * 4, 2 * 4 + 8),
    # The last step of 4 samples with gradient, and twice anew, without and with.
    "draft.py": (f"--truncate 1 --num-noise 2 {SCORED}", 24 + 2 * 2 * 4, 2 * 4, 3 * 2 * 4),
}


def words_of(script: str) -> list[str]:
    flags = CASES[script][0].split()
    if script == "large_scale_ppo.py":
        return [*LIGHT.split(), *flags, "--tasks", "jpeg_compressibility prompts/zoo.txt 2x2"]
    return [*OF_ONE_TASK.split(), *flags, "--prompts-file", "prompts/zoo.txt"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_rows_of_the_unet_are_those_of_the_equations(script, monkeypatch):
    """In every recorded iteration: counted by hand, by count.py, and as called."""
    monkeypatch.chdir(ROOT)
    _, sampled, reference, trained = CASES[script]
    words = [*words_of(script), "--model", "random/tiny"]
    probe = throughput.Probe()
    with probe.installed():
        lines = throughput.run_main(script, words)
    assert len(probe.bare) == len(lines) == 2
    (iteration,) = probe.iterations
    rows = {True: 0, False: 0}
    for call in iteration["calls"]:
        rows[call.trained] += call.latents[0]
    assert rows == {True: trained, False: sampled + reference}
    module = importlib.import_module(script.removesuffix(".py"))
    args = parse_args(module.PRESETS, module.__doc__, module.check, words)
    found = count.demands(script, args, "tiny")
    assert found["samples"] == 4 and found["sample"] == sampled
    assert found["train"] == trained and found["reference"] == pytest.approx(reference)
    assert all(ratio > 0 for ratio in probe.ratios())


def test_rows_of_the_presets():
    """The papers' numbers, with 2 rows for each guided prediction."""
    expected = {
        # 10 samples of 50 steps; 5 updates on 32 transitions; 500 stay for 2 iterations, so 2 x 5
        # draws of 32 out of 1000 leave 0.968^10 of them without a reference.
        "dpok.py": (2 * 10 * 50, 2 * 500 * (1 - 0.968**10), 2 * 5 * 32),
        "ddpo.py": (2 * 256 * 50, 2 * 256, 2 * 256 * 50),
        "rwr.py": (2 * 10_240 * 50, 2 * 10_240, 2 * 400 * 128),
        "sft_kl.py": (2 * 16 * 50, 2 * 100 * 128 + 2 * 16, 2 * 100 * 128),
    }
    for script, rows in expected.items():
        preset = next(iter(importlib.import_module(script.removesuffix(".py")).PRESETS.values()))
        found = count.demands(script, preset, "sd-v1-5")
        assert [found[key] for key in ("sample", "reference", "train")] == pytest.approx(rows)


@pytest.mark.parametrize("rank, checkpointing", [(4, False), (0, True)])
def test_counts_are_those_of_real_tensors(rank, checkpointing):
    """What autograd saves in a real pass of the tiny UNet, each storage once, without weights."""
    unet = make_pipeline("tiny").unet
    own = sum(p.numel() for p in unet.parameters())
    device = torch.device("cpu")
    weights, _ = make_trainable(
        unet, device, "fp32", rank, gradient_checkpointing=checkpointing, keep_pretrained=False
    )
    known = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    storages = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return x

    latents, text = torch.randn(4, 4, 8, 8), torch.randn(4, 24, 32)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = unet(latents, torch.full((4,), 500), text, return_dict=False)[0]
    real = sum(storage.nbytes() for storage in storages.values())
    found = count.unet_costs("tiny", "fp32", rank, checkpointing, 4)
    assert found["parameters"] == own
    assert found["trained"] == sum(p.numel() for p in weights)
    assert found["train"]["kept"] == pytest.approx(real, rel=0.05)
    assert found["train"]["peak"] >= found["train"]["kept"] > found["predict"]["kept"]
    assert found["train"]["flops"] > 1.9 * found["predict"]["flops"]
    del output


def test_flops_are_those_of_the_layers():
    """A convolution, a product and an attention by hand."""
    convolution = torch.nn.Conv2d(3, 5, 3, padding=1)
    picture, x = torch.randn(2, 3, 8, 8), torch.randn(2, 1, 16, 4)
    attention = torch.nn.functional.scaled_dot_product_attention
    assert count.cost(lambda: convolution(picture))["flops"] == 2 * 2 * 5 * 8 * 8 * 3 * 9
    assert count.cost(lambda: x @ x.mT)["flops"] == 2 * 2 * 16 * 16 * 4
    assert count.cost(lambda: attention(x, x, x))["flops"] == 2 * (2 * 2 * 16 * 16 * 4)


def test_live_bytes():
    gc.collect()
    with count.Live() as live:
        a = torch.ones(256)
        b = a + 1
        view = b.view(16, 16)
        assert (live.now, live.peak) == (2048, 2048)
        del a
        assert live.now == 1024
        c = view.t() * 2
        assert (live.now, live.peak) == (2048, 2048)
        del b, view, c
    assert live.now == 0


def run_module(name: str, *words, seconds: int = 300) -> str:
    command = [sys.executable, "-m", name, *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_throughput_adds_its_results(tmp_path):
    output = tmp_path / "throughput.json"
    output.write_text('{"before": 1}')
    flags = "--num-inference-steps 3 --reward jpeg_compressibility"
    words = ["ddpo.py", "--layout", "tiny", "--repeats", 1, f"--flags={flags}", "--output", output]
    said = run_module("benchmarks.throughput", *words)
    assert "times the bare calls" in said
    results = json.loads(output.read_text())
    assert results.pop("before") == 1
    ((name, result),) = results.items()
    assert name.startswith(f"ddpo.py tiny fp32, {flags}, ")
    parts = sum(part["median"] for part in result["parts"].values())
    assert parts == pytest.approx(result["iteration_s"]["median"], rel=0.5)
    assert 0 < result["ratio"]["lowest"] <= result["ratio"]["median"] <= result["ratio"]["highest"]
    assert result["rows"] == {"sampled": 2 * 16 * 4, "trained": 2 * 16 * 2}
    assert result["first_ratio_off_by_iteration"] == [result["first_ratio_off_by"]] * 2 == [0, 0]
    assert len(result["kl"]) == 2 and result["kl"][1] > result["kl"][0]


def test_gpu_on_a_cpu(tmp_path, monkeypatch, capfd):
    """From here, as the processes that it forks have no torch to import then."""
    monkeypatch.chdir(ROOT)
    output, parts = tmp_path / "gpu.json", ("compile", "nccl", "zoo", "rounding")
    gpu.main(gpu.Args(tiny=True, parts=parts, output=output, seconds=3000))
    results, said = json.loads(output.read_text()), capfd.readouterr()
    ends = {name: results[f"part {name}"]["end"] for name in parts}
    assert set(ends.values()) == {"done"}, said
    assert sum("ratio" in result for result in results.values()) == 1, said
    assert results["one rank"]["backend"] == "gloo"
    assert len(results["one rank"]["lines"]) == 2
    assert results["zoo, bf16"]["lines"][0]["updates/skipped"] >= 0
    rounding = results["rounding, bf16"]
    assert rounding.pop("std") > 0
    assert [*rounding] == [*gpu.ATTENTION]
    for changes in rounding.values():
        assert changes == {"with a graph": 0, "at another place": 0}


def test_what_does_not_fit_is_left_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "PARTS", {"one": (None, "fp32", 30), "two": (None, "fp32", 30)})
    gpu.main(gpu.Args(seconds=10, output=tmp_path / "gpu.json"))
    assert capsys.readouterr().out.count("is left out: ") == 2


def test_line_through_points():
    line = scaling.line_through([1, 2, 4], [3.0, 5.0, 9.0])
    assert (line["a"], line["b"]) == pytest.approx((1, 2))
    assert line["largest_residual"] < 1e-9
    assert scaling.line_through([1, 2, 4], [1.0, 4.0, 16.0])["largest_residual"] > 0.1


@pytest.mark.parametrize("table", performance.TABLES, ids=lambda table: table.__name__)
def test_page_has_the_tables_of_the_results(table):
    page = (ROOT / "docs/performance.md").read_text()
    assert f"<!-- {table.__name__} -->\n{performance.printed(table)}<!-- end -->" in page


def test_committed_counts_are_those_of_the_code():
    """All cases, and the zoo's anew: a preset that changes wants new tables."""
    results = performance.results("count")
    cases = count.iteration_cases()
    assert [*results["iterations"]] == [*cases]
    assert len(results["transitions"]) == len(count.TRANSITIONS)
    for name, case in cases.items():
        if case[1] == "zoo":
            found, stored = count.count(*case), results["iterations"][name]
            assert found["tflop"] == pytest.approx(stored["tflop"], rel=1e-3), name
            for key in ("rows", "iterations", "trained"):
                assert found[key] == stored[key], name


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_is_measured_and_counted_at_full_size(script):
    args = throughput.Args((script,), layout="sd-v1-5")
    module = importlib.import_module(script.removesuffix(".py"))
    parsed = parse_args(
        module.PRESETS, module.__doc__, module.check, throughput.words_for(script, args)
    )
    rewards = [parsed.reward] if hasattr(parsed, "reward") else parsed.tasks
    assert all(reward.startswith(throughput.REWARD) for reward in rewards)
    assert any(name.startswith(f"{script} sd-v1-5") for name in count.iteration_cases())
    assert script in gpu.SCRIPTS


def test_norms_are_float32_under_autocast():
    """As on a GPU: their inputs are kept for backward in float32."""
    network = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.GroupNorm(2, 4))
    seen = []
    network[1].register_forward_hook(lambda norm, args, output: seen.append(output.dtype))
    count.under_autocast(network, torch.bfloat16)
    network(torch.randn(1, 4, 8, 8))
    assert seen == [torch.float32]


def test_random_reward_has_a_gradient(monkeypatch):
    """For refl.py and draft.py, at the score that the others get."""
    monkeypatch.setenv("LAYOUT", "tiny")
    score = importlib.import_module("benchmarks.random_image_reward").score
    images, prompts = torch.rand(2, 3, 64, 64), ["a cat", "a dog"]
    scores = score(images, prompts)
    leaves = images.clone().requires_grad_()
    with_gradient = score(leaves, prompts)
    assert torch.allclose(scores, with_gradient, atol=1e-3) and not scores.requires_grad
    with_gradient.sum().backward()
    assert leaves.grad.norm() > 0
