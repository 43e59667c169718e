"""rwr.py: its weights against scipy and numpy, its loss against the one written out.

And samples that survive a stop.
"""

import sys

import numpy as np
import pytest
import torch
from conftest import read_metrics, run_script
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from scipy.special import softmax
from written_out import merged_unet, record_updates

import rwr

PROMPT = "A cat and a dog"
PROMPTS = [PROMPT, "Four wolves in the park"]
FLAGS = ("--num-inference-steps", 4, "--samples-per-iteration", 12)
FLAGS += ("--shard-size", 6)
FLAGS += ("--reward", "jpeg_incompressibility", "--batch-size", 5)
FLAGS += ("--gradient-steps", 2, "--micro-batch-size", 3)
FLAGS += ("--lora-rank", 4)


@pytest.mark.parametrize("normalise", ["per-prompt", "pool"])
def test_softmax_weights_against_scipy(normalise):
    rng = np.random.default_rng(0)
    rewards, prompts = rng.normal(0, 50, 200), rng.integers(0, 7, 200)
    args = rwr.Args(inverse_temperature=0.2, normalise=normalise)
    ours = rwr.rwr_weights(torch.tensor(rewards), torch.tensor(prompts), args).numpy()
    groups = prompts if normalise == "per-prompt" else np.zeros_like(prompts)
    for group in np.unique(groups):
        of_group = groups == group
        expected = softmax(0.2 * rewards[of_group]) * of_group.sum()
        assert ours[of_group] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("normalise", ["per-prompt", "pool"])
@pytest.mark.parametrize("kind", ["ties", "continuous"])
def test_sparse_weights_keep_what_numpys_percentile_keeps(kind, normalise):
    rng = np.random.default_rng(1)
    rewards = rng.integers(0, 4, 300).astype(float) if kind == "ties" else rng.normal(0, 1, 300)
    prompts = rng.integers(0, 9, 300)
    args = rwr.Args(weights="sparse", percentile=0.9, normalise=normalise)
    ours = rwr.rwr_weights(torch.tensor(rewards), torch.tensor(prompts), args).numpy()
    groups = prompts if normalise == "per-prompt" else np.zeros_like(prompts)
    for group in np.unique(groups):
        of_group = groups == group
        kept = rewards[of_group] >= np.percentile(rewards[of_group], 90)
        assert (ours[of_group] == kept).all() and kept.any()
        assert kind == "ties" or kept.mean() < 0.2


@pytest.mark.parametrize("weights", ["softmax", "sparse"])
def test_gradient_is_that_of_the_loss_written_out(tiny_sd, tmp_path, monkeypatch, weights):
    """The gradient of the second update against autograd in float64 of Eq. 1.

    With the guided prediction (Eq. 5).
    """
    recorded = record_updates(monkeypatch)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = [*FLAGS, "--num-iterations", 1, "--model", tiny_sd, "--seed", 3]
    flags += ["--prompts-file", tmp_path / "prompts.txt", "--normalise", "pool"]
    flags += ["--weights", weights, "--inverse-temperature", 9]
    flags += ["--percentile", 0.4, "--guidance-scale", 3]
    flags += ["--max-grad-norm", 1e9, "--output-dir", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["rwr.py", *map(str, flags)])
    rwr.main()
    shards = [load_file(tmp_path / f"run/pool/000/{first:06d}.safetensors") for first in (0, 6)]
    x0, reward = (torch.cat([shard[key] for shard in shards]) for key in ("x0", "reward"))
    w = 12 * softmax(9 * reward.double().numpy())
    if weights == "sparse":
        w = (reward.double().numpy() >= np.percentile(reward.double().numpy(), 40)).astype(float)
    assert len(set(w.round(3).tolist())) > 1

    # Sample i has drawn its prompt before its noise.
    drawn = [torch.randint(2, (1,), generator=rwr.seeded(3, 0, 0, i)) for i in range(12)]
    generator, order = rwr.seeded(3, 1, 0), []
    kept = torch.tensor(np.flatnonzero(w))
    for _ in range(2):
        while len(order) < 5:
            order += kept[torch.randperm(len(kept), generator=generator)].tolist()
        batch, order = order[:5], order[5:]
        t = torch.randint(1000, (5,), generator=generator)
        noise = torch.randn(5, 4, 8, 8, generator=generator).double()
    alphas = StableDiffusionPipeline.from_pretrained(tiny_sd).scheduler.alphas_cumprod.double()
    alpha = alphas[t].view(-1, 1, 1, 1)
    prompts = [PROMPTS[drawn[i]] for i in batch]
    assert len(set(prompts)) == 2
    leaves, guided, _ = merged_unet(tiny_sd, [weight for weight, _ in recorded[1]], 3.0, prompts)
    error = noise - guided(alpha.sqrt() * x0[batch].double() + (1 - alpha).sqrt() * noise, t)
    loss = (torch.tensor(w)[batch] * (error**2).flatten(1).mean(1)).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])
    ours = torch.cat([g.flatten() for _, g in recorded[1]]).double()
    assert (ours - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("fresh", [True, False])
def test_a_round_begins_with_a_fresh_optimizer(tiny_sd, tmp_path, monkeypatch, fresh):
    flags = [*FLAGS, "--num-iterations", 2, "--model", tiny_sd, "--output-dir", tmp_path / "run"]
    flags += ["--prompt", PROMPT, "--fresh-optimizer" if fresh else "--no-fresh-optimizer"]
    monkeypatch.setattr(sys, "argv", ["rwr.py", *map(str, flags)])
    rwr.main()
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)
    steps = {of["step"].item() for of in state["kept"]["optimizer"]["state"].values()}
    assert steps == {2 if fresh else 4}


def test_round_goes_on_with_the_samples_that_are_there(tiny_sd, tmp_path, monkeypatch):
    """A round whose second shard could not be scored ends, resumed, as an undisturbed one.

    Nothing is drawn twice.
    """
    fault = tmp_path / "fault"
    (tmp_path / "mine.py").write_text(
        "import pathlib\n"
        "calls = []\n"
        "def f(images, prompts):\n"
        "    calls.append(1)\n"
        f"    if len(calls) == 2 and pathlib.Path({str(fault)!r}).exists():\n"
        "        raise OSError('the disk is gone')\n"
        "    return images.mean((1, 2, 3))\n"
    )
    flags = [*FLAGS, "--reward", f"{tmp_path}/mine.py:f", "--num-iterations", 2, "--model", tiny_sd]
    monkeypatch.setattr(
        sys, "argv", ["rwr.py", *map(str, flags), "--output-dir", f"{tmp_path}/whole"]
    )
    rwr.main()
    fault.touch()
    result = run_script("rwr.py", *flags, "--output-dir", tmp_path / "parts")
    assert result.returncode == 1 and "the disk is gone" in result.stderr
    assert "Traceback" not in result.stderr
    fault.unlink()
    first = tmp_path / "parts/pool/000/000000.safetensors"
    written = first.stat().st_mtime_ns
    named_again = ["--reward", f"{tmp_path}/mine.py:f"]
    monkeypatch.setattr(sys, "argv", ["rwr.py", "--resume", f"{tmp_path}/parts", *named_again])
    rwr.main()
    assert first.stat().st_mtime_ns == written
    whole = load_file(tmp_path / "whole/pytorch_lora_weights.safetensors")
    parts = load_file(tmp_path / "parts/pytorch_lora_weights.safetensors")
    assert all(whole[key].equal(parts[key]) for key in whole)
    assert len(read_metrics(tmp_path / "parts")) == 2
