"""The table of models that are no text-to-image Stable Diffusion 1.x or 2.x: one line names what.

They are folders with their configuration alone: what loads weights finds none, and ends otherwise.
"""

import json
import os
import shutil
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import run_script
from hostile import Case
from test_hostile_scripts import LARGE

WORKS = "works with Stable Diffusion 1.x and 2.x"
SD = "StableDiffusionPipeline"
UNET = {"_class_name": "UNet2DConditionModel", "in_channels": 4, "out_channels": 4}


def folder_of(files: dict[str, object], tmp: Path) -> None:
    """The folder {tmp}/there with these files, bytes or JSON."""
    for name, content in files.items():
        path = tmp / "there" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


def model_of(pipeline, unet=None) -> dict[str, object]:
    files = {"model_index.json": {"_class_name": pipeline, "vae": ["diffusers", "AutoencoderKL"]}}
    return files | ({} if unet is None else {"unet/config.json": unet})


SDXL = model_of("StableDiffusionXLPipeline", UNET | {"sample_size": 128})
PIPELINES = {
    "SDXL": SDXL,
    "SD3": model_of("StableDiffusion3Pipeline"),
    "FLUX": model_of("FluxPipeline"),
    "PixArt": model_of("PixArtAlphaPipeline"),
    "inpainting": model_of("StableDiffusionInpaintPipeline", UNET | {"in_channels": 9}),
    "text to video": model_of("TextToVideoSDPipeline", {"_class_name": "UNet3DConditionModel"}),
    "a pipeline of its own": model_of(["my_pipeline", "MyPipeline"]),
    "half of Stable Diffusion's name": model_of("StableDiffusion"),
}
OTHERS = {
    "the UNet of inpainting": (model_of(SD, UNET | {"in_channels": 9}), "9 channels"),
    "the UNet of depth": (model_of(SD, UNET | {"in_channels": 5}), "5 channels"),
    "a LoRA of diffusers": ({"pytorch_lora_weights.safetensors": b"x"}, "is a LoRA"),
    "a LoRA of peft": ({"adapter_config.json": {}, "adapter_model.safetensors": b"x"}, "is a LoRA"),
    "a folder of checkpoints": ({"v1-5-pruned.safetensors": b"x"}, "model_index.json"),
    "an index without a name": ({"model_index.json": {}}, "without a name"),
}
MODELS = {
    name: (files, str(files["model_index.json"]["_class_name"]))
    for name, files in PIPELINES.items()
} | OTHERS
COMMANDS = {
    "dpok.py": "zoo --model",
    "evaluate.py": "zoo --model",
    "human_eval.py": "build zoo --lora zoo/sd --model",
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("script", COMMANDS)
def test_model_of_another_kind(script, name, refused):
    files, named = MODELS[name]
    command = f"{COMMANDS[script]} {{tmp}}/there --output-dir {{tmp}}/out"
    refused(script, Case(name, command, ("--model", named, WORKS), 2, partial(folder_of, files)))


@pytest.mark.parametrize("script", COMMANDS)
def test_single_file_is_no_model(script, refused):
    """The line says how a folder is made of it."""
    command = f"{COMMANDS[script]} {{tmp}}/there/a.safetensors --output-dir {{tmp}}/out"
    words = ("--model", "is a file", "from_single_file", WORKS)
    refused(script, Case("", command, words, 2, partial(folder_of, {"a.safetensors": b"x"})))


UNREADABLE = {
    "no UNet": {},
    "a UNet that is no JSON": {"unet/config.json": b"{"},
    "a UNet that is a list": {"unet/config.json": [1]},
    "an index that is no UTF-8": {"model_index.json": b"\xff"},
    "an index that is a number": {"model_index.json": 3},
}


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json"])
def test_configuration_that_is_a_fifo(name, refused):
    """Nobody writes into it: reading it would never end."""

    def before(tmp: Path) -> None:
        folder_of(model_of(SD, UNET), tmp)
        (tmp / "there" / name).unlink()
        os.mkfifo(tmp / "there" / name)

    refused("dpok.py", Case(name, "zoo --model {tmp}/there", ("--model", name), 2, before))


@pytest.mark.parametrize("name", UNREADABLE)
def test_configuration_that_cannot_be_read(name, refused):
    files = model_of(SD) | UNREADABLE[name]
    words = ("--model", "cannot be loaded")
    refused("dpok.py", Case(name, "zoo --model {tmp}/there", words, 2, partial(folder_of, files)))


def test_weights_of_half_precision_alone(refused, tiny_sd):
    """As *.fp16.safetensors, a variant that nothing asks for."""

    def before(tmp: Path) -> None:
        shutil.copytree(tiny_sd, tmp / "there")
        for file in (tmp / "there").rglob("*.safetensors"):
            file.rename(file.with_suffix(".fp16.safetensors"))

    command = "zoo --model {tmp}/there --output-dir {tmp}/out"
    refused("dpok.py", Case("", command, ("--model", "cannot be loaded"), 2, before))


NOT_OF_MEMORY = ("--num-inference-steps", "--eta", "--lora-rank", "--buffer-size")
OF_MEMORY = [
    (script, flags)
    for script, several in LARGE.items()
    for flags in several
    if not flags.startswith(NOT_OF_MEMORY)
]


@pytest.mark.parametrize("script, flags", OF_MEMORY)
def test_every_script_names_the_model_before_what_memory_lacks(script, flags, refused):
    words = [word.replace("\0", " ") for word in flags.split()]
    command = ["zoo", *words, "--model", "{tmp}/there", "--output-dir", "{tmp}/out"]
    named = ("--model", "StableDiffusionXLPipeline", WORKS)
    refused(script, Case(flags, command, named, 2, partial(folder_of, SDXL)))


class Hub(BaseHTTPRequestHandler):
    """A hub with server.files by path; it notes in server.asked which files it was asked for."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        if "/resolve/" in self.path:
            self.server.asked.append(self.path)
        body = self.server.files.get(self.path)
        self.send_response(404 if body is None else 200)
        if body is None:
            self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("ETag", '"1"')
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        return body

    def do_GET(self):
        self.wfile.write(self.do_HEAD() or b"")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """With SDXL, its weights too, and a LoRA; the hub's cache is empty."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    index = json.dumps(SDXL["model_index.json"]).encode()
    files = {"model_index.json": index, "unet/diffusion_pytorch_model.safetensors": b"weights"}
    server.files = {f"/some/sdxl/resolve/main/{name}": body for name, body in files.items()}
    server.files["/some/lora/resolve/main/pytorch_lora_weights.safetensors"] = b"weights"
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    yield server
    server.shutdown()


def line_of(script: str, model: str, output: Path) -> str:
    """What the command says of a model, in one line, with exit code 2 and before it has begun."""
    words = [*COMMANDS[script].split(), model, "--output-dir", output]
    result = run_script(script, *words)
    assert result.returncode == 2 and not output.exists(), result.stderr
    (line,) = result.stderr.splitlines()
    return line


def test_model_of_the_hub_is_refused_by_its_index_alone(hub, tmp_path, monkeypatch):
    """And from the cache, where there is no network."""
    line = line_of("dpok.py", "some/sdxl", tmp_path / "out")
    assert "--model: 'some/sdxl' is a StableDiffusionXLPipeline" in line and WORKS in line
    assert set(hub.asked) == {"/some/sdxl/resolve/main/model_index.json"}
    hub.asked.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert line_of("evaluate.py", "some/sdxl", tmp_path / "out") == line.replace("dpok", "evaluate")
    assert not hub.asked


def test_lora_of_the_hub_is_no_model(hub, tmp_path):
    line = line_of("human_eval.py", "some/lora", tmp_path / "out")
    assert "--model: 'some/lora' has no model_index.json" in line and WORKS in line
    assert set(hub.asked) == {"/some/lora/resolve/main/model_index.json"}
