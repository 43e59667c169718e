"""The layouts of Stable Diffusion 1.x and 2.x, shrunk: loader, policy and LoRA against diffusers.

Each model is made on the spot as its repository on the hub is: shapes, tokenizer's padding,
scheduler's configuration as it stands there, entries of the index, format of the weights.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import read_metrics, run_script
from diffusers import DDIMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import Attention
from PIL import Image
from safetensors.torch import load_file

import dpok
from benchmarks.layouts import make_pipeline
from common.lora import FILE_NAME, LoRAAttnProcessor
from common.stable_diffusion import load_pipeline, load_stable_diffusion
from evaluation.sampler import NOISE, Sampler, seeded
from evaluation.settings import Settings

SCHEDULE = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
PNDM = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0"} | SCHEDULE
PNDM_V2 = PNDM | {"_diffusers_version": "0.8.0", "prediction_type": "epsilon"}
DDIM_V = PNDM_V2 | {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
CHECKER = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
    "requires_safety_checker": True,
}
EXTRACTOR_ALONE = {
    "safety_checker": [None, None],
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "requires_safety_checker": False,
}


class Repository(NamedTuple):
    """What a repository of the hub has, and how its shrunk model differs from a layout."""

    layout: str
    scheduler: dict
    index: dict
    unet: dict
    pickled: bool = False
    """Its weights are *.bin files alone."""


REPOSITORIES = {
    "1.4": Repository("tiny", PNDM, CHECKER, {}, pickled=True),
    "1.5": Repository("tiny", PNDM, CHECKER, {}),
    "2-base": Repository("tiny-v2", PNDM_V2, EXTRACTOR_ALONE, {"sample_size": 8}),
    "2.1-base": Repository(
        "tiny-v2", PNDM_V2, EXTRACTOR_ALONE, {"sample_size": 8, "upcast_attention": True}
    ),
    "2": Repository("tiny-v2", DDIM_V, EXTRACTOR_ALONE, {}),
    "2.1": Repository("tiny-v2", DDIM_V, EXTRACTOR_ALONE, {"upcast_attention": True}),
    "2.1 with PNDM": Repository(
        "tiny-v2", DDIM_V | {"_class_name": "PNDMScheduler"}, {}, {"upcast_attention": True}
    ),
}


def edit(path: Path, changes: dict) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def make_model(name: str, folder: Path) -> Path:
    repository = REPOSITORIES[name]
    make_pipeline(repository.layout).save_pretrained(folder)
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(repository.scheduler))
    scheduler = ["diffusers", repository.scheduler["_class_name"]]
    edit(folder / "model_index.json", repository.index | {"scheduler": scheduler})
    edit(folder / "unet/config.json", repository.unet)
    if repository.pickled:
        for file in list(folder.rglob("*.safetensors")):
            stem = file.stem if file.stem.startswith("diffusion") else "pytorch_model"
            torch.save(load_file(file), file.with_name(f"{stem}.bin"))
            file.unlink()
    if repository.index is CHECKER:  # a GB, which nothing here needs: reading it would fail
        (folder / "safety_checker").mkdir()
        (folder / "safety_checker/model.safetensors").write_text("no weights")
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """models(name): the folder of a repository's shrunk model, made when it is first asked for."""
    made = {}

    def model(name: str) -> Path:
        if name not in made:
            made[name] = make_model(name, tmp_path_factory.mktemp("models") / "model")
        return made[name]

    return model


PROMPTS = ["a cat", "two dogs next to a green rabbit"]
CPU = torch.device("cpu")


def arguments(model: Path, **others) -> dpok.Args:
    return dpok.Args(model=str(model), dtype="fp32", **{"num_inference_steps": 6} | others)


def plain_pipeline(model: Path) -> StableDiffusionPipeline:
    """diffusers' own, with its own DDIM of the model's schedule."""
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipeline = StableDiffusionPipeline.from_pretrained(model, **parts)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def plain_pictures(pipeline, args: dpok.Args, prompts: list[str], generators) -> torch.Tensor:
    names = ("num_inference_steps", "guidance_scale", "eta")
    settings = {name: getattr(args, name) for name in names} | {"output_type": "pt"}
    return pipeline(prompts, generator=list(generators), **settings).images


def of_seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def own_pictures(sd, args: dpok.Args, prompts: list[str], generators) -> torch.Tensor:
    """Of the policy; diffusers' pipeline draws the same noise: x_T, then that of every step."""
    shape = (args.num_inference_steps + 1, *sd.latent_shape)
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators])
    return sd.decode(dpok.sample(args, sd, sd.unet, sd.encode(prompts), noise).trajectory[:, -1])


@pytest.mark.parametrize("name", REPOSITORIES)
def test_pictures_are_those_of_plain_diffusers(name, models):
    """With text encoder, guidance, every step of the chain and VAE, without noise and with it."""
    model = models(name)
    sd, pipeline = load_stable_diffusion(arguments(model), CPU), plain_pipeline(model)
    assert sd.image_size == (96 if "v_prediction" in REPOSITORIES[name].scheduler.values() else 64)
    drawn = []
    for eta in (0.0, 1.0):
        args = arguments(model, eta=eta)
        found = own_pictures(sd, args, PROMPTS, of_seeds(2))
        expected = plain_pictures(pipeline, args, PROMPTS, of_seeds(2))
        assert found.shape == (2, 3, sd.image_size, sd.image_size)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)  # it is 1e-5
        drawn += [*found]
    apart = [(a - b).abs().mean() for i, a in enumerate(drawn) for b in drawn[:i]]
    assert min(apart) > 0.02  # seeds and noise are seen: it is not one picture


@pytest.mark.parametrize("name, side, size", [("1.5", 64, 512), ("2.1", 96, 768)])
def test_pictures_of_the_real_size(name, side, size, models, tmp_path):
    """Of as many latents as the real UNet has; its weights do not depend on their number."""
    model = shutil.copytree(models(name), tmp_path / "model")
    edit(model / "unet/config.json", {"sample_size": side})
    args = arguments(model, num_inference_steps=2, guidance_scale=1.0)
    sd = load_stable_diffusion(args, CPU)
    assert (sd.image_size, sd.latent_shape) == (size, (4, side, side))
    found = own_pictures(sd, args, PROMPTS[:1], of_seeds(1))
    expected = plain_pictures(plain_pipeline(model), args, PROMPTS[:1], of_seeds(1))
    assert found.shape == (1, 3, size, size)
    # On a CPU the norms of so many pixels are 4e-4 less exact in the memory format of our VAE.
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["1.5", "2.1"])
def test_pictures_of_an_evaluation_are_those_of_plain_diffusers(name, models):
    args = arguments(models(name))
    values = {field: getattr(args, field, None) for field in Settings.__dataclass_fields__}
    settings = Settings(**values | {"prompts": PROMPTS, "seed": 3})
    sampler = Sampler(load_pipeline(args.model), settings, CPU)
    found, _ = sampler.draw(sampler.pipeline.unet, [(0, 0), (1, 5)])
    generators = [seeded(3, NOISE, 0, 0), seeded(3, NOISE, 1, 5)]
    expected = plain_pictures(plain_pipeline(args.model), args, PROMPTS, generators)
    found = torch.from_numpy(found).permute(0, 3, 1, 2).float()
    torch.testing.assert_close(found, expected * 255, atol=0.51, rtol=0)  # 8 bits round by 0.5


@torch.no_grad()
def noise_of(unet, side: int, text: torch.Tensor) -> torch.Tensor:
    """A UNet's prediction from latents of two steps."""
    x_t = torch.randn(2, 4, side, side, generator=torch.Generator().manual_seed(0))
    return unet(x_t, torch.tensor([901, 101]), text).sample


@pytest.mark.parametrize("name", ["1.4", "1.5", "2.1-base", "2.1"])
def test_lora_is_on_all_attention_layers_and_diffusers_loads_it(name, models, tmp_path):
    pytest.importorskip("peft")
    sd = load_stable_diffusion(arguments(models(name)), CPU)
    layers = {name: m for name, m in sd.unet.named_modules() if isinstance(m, Attention)}
    assert len(layers) == 32  # of 16 transformer blocks, as the real UNets have
    assert all(isinstance(layer.processor, LoRAAttnProcessor) for layer in layers.values())

    text = sd.encode(PROMPTS)
    before = noise_of(sd.unet, sd.latent_shape[1], text)
    generator = torch.Generator().manual_seed(0)
    for weight in sd.weights:
        weight.data = torch.randn(weight.shape, generator=generator) * 0.2
    sd.save(tmp_path)
    found = noise_of(sd.unet, sd.latent_shape[1], text)
    pipeline = plain_pipeline(models(name))
    text, _ = pipeline.encode_prompt(PROMPTS, CPU, 1, do_classifier_free_guidance=False)
    pipeline.load_lora_weights(tmp_path)
    assert (found - before).abs().max() > 0.05
    expected = noise_of(pipeline.unet, sd.latent_shape[1], text)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)

    projections = ("to_q", "to_k", "to_v", "to_out.0")
    names = {
        f"unet.{layer}.{p}.lora_{x}.weight" for layer in layers for p in projections for x in "AB"
    }
    assert load_file(tmp_path / FILE_NAME).keys() == names


def test_run_on_v_prediction_leaves_a_lora_for_diffusers(models, tmp_path):
    """One iteration of dpok.py; its LoRA draws in plain diffusers what it draws in the policy."""
    pytest.importorskip("peft")
    flags = ["--model", models("2.1"), "--reward", "jpeg_compressibility"]
    flags += ["--num-iterations", 1, "--samples-per-iteration", 4, "--num-inference-steps", 4]
    flags += ["--batch-size", 8, "--gradient-steps", 2, "--learning-rate", 1e-2]
    result = run_script("dpok.py", *flags, "--output-dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    (line,) = read_metrics(tmp_path / "run")
    assert line["ratio/first_max_deviation"] < 1e-6
    assert line["grad_norm"] > 0 and line["kl/pretrained"] > 0
    heights = {Image.open(file).height for file in (tmp_path / "run/samples").glob("*.png")}
    assert heights == {96}

    args = arguments(models("2.1"))
    sd, pipeline = load_stable_diffusion(args, CPU), plain_pipeline(models("2.1"))
    before = own_pictures(sd, args, PROMPTS, of_seeds(2))
    sd.load(tmp_path / "run")
    pipeline.load_lora_weights(tmp_path / "run")
    found = own_pictures(sd, args, PROMPTS, of_seeds(2))
    expected = plain_pictures(pipeline, args, PROMPTS, of_seeds(2))
    assert (found - before).abs().max() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
