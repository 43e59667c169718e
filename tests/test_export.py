"""The LoRA's file for ComfyUI and AUTOMATIC1111, read as ComfyUI and diffusers read it."""

import importlib
import json
import sys
from dataclasses import fields

import pytest
import torch
from conftest import ROOT, run_script
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scripts import SCRIPTS

from common.lora import FILE_NAME, add_lora, load_lora, lora_state_dict
from evaluation.export import main, script_of
from harness.export import EXPORTED, description, exported_names, shared_path, shared_reward

# The attention layers of SD 1.5 and 2.1, whose unet/config.json differ in the last three.
SD = {"sample_size": 64, "block_out_channels": (320, 640, 1280, 1280), "layers_per_block": 2}
SD_1_5 = SD | {"cross_attention_dim": 768, "attention_head_dim": 8}
SD_2_1 = SD | {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
LAYERS = [f"attn{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")]


def comfyui_map() -> dict[str, str]:
    """Names that ComfyUI looks up in a LoRA's file, and the layers of SD 1.x and 2.x they are of.

    The attention layers of what `model_lora_keys_unet` in its comfy/lora.py makes of
    `unet_to_diffusers` in comfy/utils.py: two blocks a level on the way down, three on the way up.
    """
    places = {("mid_block", 0): "middle_block.1"}
    for level in range(3):
        for i in range(2):
            places[f"down_blocks.{level}", i] = f"input_blocks.{1 + 3 * level + i}.1"
        for i in range(3):
            places[f"up_blocks.{level + 1}", i] = f"output_blocks.{3 * (level + 1) + i}.1"
    names = {}
    for (block, i), place in places.items():
        for layer in LAYERS:
            name = f"{block}.attentions.{i}.transformer_blocks.0.{layer}"
            of_model = f"diffusion_model.{place}.transformer_blocks.0.{layer}.weight"
            names["lora_unet_" + name.replace(".", "_")] = of_model
    return names


def comfyui_updates(file: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], set[str]]:
    """What ComfyUI adds to each layer's weight at strength 1, and the keys that it reports.

    As `load` and `calculate_weight` in its comfy/weight_adapter/lora.py.
    """
    updates, loaded = {}, set()
    for name, layer in comfyui_map().items():
        up, down, alpha = (f"{name}.{k}" for k in ("lora_up.weight", "lora_down.weight", "alpha"))
        if up in file:
            scale = file[alpha].item() / file[down].shape[0]
            updates[layer] = scale * torch.mm(file[up], file[down])
            loaded |= {up, down, alpha}
    return updates, set(file) - loaded


@pytest.mark.parametrize("config", [SD_1_5, SD_2_1], ids=["SD 1.5", "SD 2.1"])
def test_comfyui_loads_every_key(config):
    """Of the real layouts, without their weights."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
        add_lora(unet, 4)
    for processor in unet.attn_processors.values():
        processor.to_empty(device="cpu")
    weights = lora_state_dict(unet)
    updates, not_loaded = comfyui_updates(exported_names(weights))
    assert not not_loaded and len(updates) == len(comfyui_map()) == 128
    # As it was, under diffusers' names alone, nothing is loaded.
    assert comfyui_updates(weights) == ({}, set(weights))


@pytest.fixture
def state(shrunk_sd):
    unet = UNet2DConditionModel.from_pretrained(shrunk_sd / "unet")
    generator = torch.Generator().manual_seed(0)
    for weight in add_lora(unet, 3):
        weight.data.normal_(std=0.1, generator=generator)
    return lora_state_dict(unet)


def test_comfyui_applies_the_update_that_was_trained(shrunk_sd, state, tmp_path):
    """The UNet with the weights that ComfyUI makes predicts what the UNet with the LoRA does."""
    updates, not_loaded = comfyui_updates(exported_names(state))
    assert not not_loaded
    plain, trained = (UNet2DConditionModel.from_pretrained(shrunk_sd / "unet") for _ in range(2))
    own_names = {layer: name for name, layer in comfyui_map().items()}
    layers = {
        "lora_unet_" + name.replace(".", "_"): module for name, module in plain.named_modules()
    }
    for layer, update in updates.items():
        layers[own_names[layer]].weight.data += update
    add_lora(trained, 3)
    save_file(state, tmp_path / FILE_NAME)
    load_lora(trained, tmp_path)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([10, 700]), torch.randn(2, 24, 32)
    with torch.no_grad():
        ours, theirs = (unet(x, t, text).sample for unet in (trained, plain))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


def test_diffusers_names_and_reads_it_alike(state, tmp_path):
    exported = exported_names(state)
    assert set(convert_state_dict_to_kohya(state)) == set(exported)
    save_file(exported, tmp_path / EXPORTED)
    read, alphas = StableDiffusionPipeline.lora_state_dict(tmp_path / EXPORTED)
    assert set(alphas.values()) == {3.0}
    parts = {".lora_A.weight": "_lora.down.weight", ".lora_B.weight": "_lora.up.weight"}
    for name, weight in state.items():
        for part, theirs in parts.items():
            name = name.replace(".to_out.0", ".to_out").replace(part, theirs)
        assert read.pop(name.replace(".to_", ".processor.to_")).equal(weight)
    assert not read


def test_a_run_leaves_it_and_says_what_it_is(shrunk_sd, tmp_path, monkeypatch, capsys):
    """A run writes it; the command writes the same of a run that has none."""
    run = tmp_path / "dpok__rabbit__0__20260101"
    reward = "2*jpeg_compressibility + 1*jpeg_incompressibility"
    flags = ["--prompt", "a rabbit", "--reward", reward, "--num-iterations", 1]
    flags += ["--num-inference-steps", 3, "--samples-per-iteration", 4, "--output-dir", run]
    result = run_script("dpok.py", "--model", shrunk_sd, *flags)
    assert result.returncode == 0, result.stderr
    about = contents(run)
    assert about["base_model"] == shrunk_sd.name  # of a folder no more than its name
    assert about["script"] == "dpok" and about["prompt"] == "a rabbit" and about["seed"] == "0"
    assert about["reward"] == "2*jpeg_compressibility + 1*jpeg_incompressibility"
    assert about["rank"] == about["ss_network_dim"] == "4" and about["ss_output_name"] == run.name
    assert f"torch {torch.__version__}".split("+")[0] in about["libraries"]
    (run / EXPORTED).unlink()
    code, said = export(monkeypatch, capsys, run)
    assert code == 0 and str(run) in said
    assert contents(run) == about
    renamed = run.rename(tmp_path / "renamed")
    assert export(monkeypatch, capsys, renamed)[0] == 0
    assert contents(renamed) == about | {"ss_output_name": "renamed"}, "the script is known"
    (renamed / EXPORTED).unlink()
    assert export(monkeypatch, capsys, renamed)[0] == 0
    assert contents(renamed) == about | {"ss_output_name": "renamed"}, "by its arguments"


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_script_is_known_by_its_arguments(script, tmp_path):
    module = importlib.import_module(script.removesuffix(".py"))
    stored = {field.name: None for field in fields(module.Args)}
    assert script_of(tmp_path / "renamed", stored) == ROOT / script
    stored.pop("lora_rank")
    assert script_of(tmp_path / "renamed", stored | {"since_removed": 1}) == ROOT / script
    assert script_of(tmp_path / "renamed", {"model": "zoo/sd", "seed": 0}) is None


@pytest.mark.parametrize("width, base, v2", [(768, "sd_v1", "False"), (1024, "sd_v2", "True")])
def test_automatic1111_tells_the_versions(width, base, v2):
    """SD 2 by ss_v2 == "True"; else a file that has metadata is taken for SD 1."""
    state = {"unet.down_blocks.0.attn2.to_k.lora_A.weight": torch.zeros(4, width)}
    about = description("run", {"model": "zoo/sd", "seed": 0}, None, state)
    assert about["ss_v2"] == v2 and about["ss_base_model_version"] == base


def contents(run) -> dict[str, str]:
    """What the file in a run's folder says of itself; its tensors are those of the run's LoRA."""
    exported, read = exported_names(load_file(run / FILE_NAME)), load_file(run / EXPORTED)
    assert set(read) == set(exported) and all(read[k].equal(v) for k, v in exported.items())
    with safe_open(run / EXPORTED, "pt") as file:
        return file.metadata()


def export(monkeypatch, capsys, run) -> tuple[int, str]:
    """Exit code and output of python -m evaluation.export RUN."""
    monkeypatch.setattr(sys, "argv", ["export.py", str(run)])
    capsys.readouterr()
    try:
        main()
    except SystemExit as end:
        return end.code, capsys.readouterr().err
    return 0, capsys.readouterr().out


def test_export_refuses_what_it_cannot_read(tmp_path, monkeypatch, capsys):
    args = {"model": "zoo/sd", "seed": 0, "prompt": "a cat", "reward": "jpeg_compressibility"}
    cases = {"no args.json": None, "no LoRA": None, "no safetensors": b"no", "another": b""}
    for name, content in cases.items():
        run = tmp_path / name
        run.mkdir()
        if name != "no args.json":
            (run / "args.json").write_text(json.dumps(args))
        if content is not None:
            (run / FILE_NAME).write_bytes(content)
        if name == "another":
            save_file({"some.weight": torch.zeros(1)}, run / FILE_NAME)
        code, line = export(monkeypatch, capsys, run)
        assert code == 2 and str(run) in line and len(line.splitlines()) == 1, line
        assert not (run / EXPORTED).exists()


@pytest.mark.parametrize(
    "spec, shared",
    [
        ("image_reward:/home/me/weights", "image_reward"),
        ("image_reward:../weights", "image_reward"),
        ("pick_score:someone/weights?batch_size=2", "pick_score:someone/weights"),
        ("llava_bertscore:http://me:word@host:80/v1?model=x", "llava_bertscore"),
        ("/home/me/mine.py:score", "mine.py:score"),
        ("https://my-machine:8000/score?timeout=5", "reward server"),
        (
            "0.5*image_reward:zoo/image_reward + 2*/home/me/mine.py:score",
            "0.5*image_reward:zoo/image_reward + 2*mine.py:score",
        ),
    ],
)
def test_nothing_private_is_in_it(spec, shared):
    assert shared_reward(spec) == shared


def test_a_folder_is_shown_by_its_name(tmp_path, monkeypatch):
    """Of this project's zoo and of the hub the whole name, of other folders the last part."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clients/acme").mkdir(parents=True)
    for model, shown in (
        ("clients/acme", "acme"),
        ("../clients/acme", "acme"),
        ("/home/me/acme", "acme"),
        ("someone/model", "someone/model"),
        ("zoo/sd", "zoo/sd"),
    ):
        assert shared_path(model) == shown
    assert shared_reward("pick_score:clients/acme") == "pick_score"
