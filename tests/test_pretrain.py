"""zoo.pretrain: every stage run as a user would, very short, and a stopped stage that continues."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from diffusers import StableDiffusionPipeline

from common.rewards import load_reward
from zoo import judge as judging
from zoo import pretrain


def test_makes_everything_from_nothing(tmp_path):
    flags = {
        "--num-pictures": 128,
        "--num-unbiased": 256,
        "--standardise-samples": 32,
        "--output-dir": tmp_path / "zoo",
        "--build-dir": tmp_path,
    }
    stages = ["vae", "vae-whole", "text", "unet", "judge"]
    stages += ["reward-vision", "reward-words", "reward", "classifier"]
    flags |= {f"--{stage}-steps": 2 for stage in stages}
    command = [sys.executable, "-m", "zoo.pretrain"]
    command += [str(word) for pair in flags.items() for word in pair]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert all(f"stage {stage}:" in result.stdout for stage in pretrain.STAGES)
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "zoo/sd")
    images = pipeline(["a cat", "a dog."], num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 64, 64)
    config = json.loads((tmp_path / "zoo/image_reward/config.json").read_text())
    reward = load_reward(f"image_reward:{tmp_path / 'zoo/image_reward'}", "cpu")
    assert reward(images, ["a cat", "a dog."]).shape == (2,) and config["score_std"] > 0
    reward = load_reward(f"object_detection:{tmp_path / 'zoo/detector'}")
    assert reward(images, ["a cat"] * 2).shape == (2,)
    reward = load_reward(f"statistical_parity:{tmp_path / 'zoo/skin_tone'}")
    assert reward(images, ["a portrait"] * 2).shape == (2,)
    assert len(judging.read(judging.load_judge(tmp_path / "zoo/judge"), images)) == 2


def test_stopped_stage_continues_as_if_undisturbed(tmp_path):
    args = pretrain.Args(build_dir=tmp_path, device="cpu")

    def train(name, stop_at=None):
        torch.manual_seed(0)
        module = torch.nn.Linear(3, 1)

        def loss_fn(step, generator):
            if step == stop_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 3, generator=generator)
            return (module(x)[:, 0] - x.sum(1)).square().mean(), {}

        pretrain.fit(args, name, {"module": module}, loss_fn, steps=240, lr=5e-2, ema=0.9)
        return module.weight

    with pytest.raises(KeyboardInterrupt):
        train("stopped", stop_at=150)
    assert torch.equal(train("stopped"), train("whole"))
    assert (train("whole") - 1).abs().max() < 0.1
