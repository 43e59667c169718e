import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DIFFUSERS_VERBOSITY"] = "error"
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each process
    os.environ["OMP_NUM_THREADS"] = "1"

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(config, items):
    """For --dist loadgroup: tests that share a fixture run in one process, those of test_scripts.py in any."""
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        group = item.path.stem
        if "undisturbed" in item.fixturenames:
            group = f"undisturbed run of {item.callspec.params['undisturbed']}"
        if group == "test_scripts":
            if "default_run" not in item.fixturenames:
                continue
            group = f"default run of {item.callspec.params['default_run']}"
        item.add_marker(pytest.mark.xdist_group(group))


def run_script(*args, ranks: int = 1, timeout: int = 300) -> subprocess.CompletedProcess:
    """Run a script as a user would, in the project's root; under torchrun when `ranks` is more than 1."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={ranks}",
        ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}  # tiny models: threads cost more than they save
    return subprocess.run(
        [*launcher, *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=env,
    )


def read_metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory) -> Path:
    """A randomly initialised pipeline with the classes and the scheduler's configuration of SD v1.5, shrunk."""
    from diffusers import (
        AutoencoderKL,
        PNDMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-sd")
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "zoo/sd/tokenizer")
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=2,
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 8, 8, 8),
        norm_num_groups=4,
        sample_size=64,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    yield folder
    shutil.rmtree(folder)
