"""The model card that a run leaves, and its way to the hub, of which a small server stands in."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, run_script
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from scripts import SCRIPTS

from evaluation.export import main
from harness.card import model_card, named, settings
from harness.export import EXPORTED
from harness.hub import FILES

COMMIT = "0" * 40
ARGS = {"model": "zoo/sd", "seed": 0, "lora_rank": 4, "reward": "image_reward:zoo/image_reward"}


PAPERS = {
    "dpok.py": "2305.16381",
    "ddpo.py": "2305.13301",
    "rwr.py": "2305.13301",
    "sft_kl.py": "2305.16381",
    "large_scale_ppo.py": "2401.12244",
    "refl.py": "2304.05977",
    "draft.py": "2309.17400",
    "raft.py": "2304.06767",
    "reward_weighted.py": "2302.12192",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_card_names_the_paper_of_the_algorithm(script):
    assert f"https://arxiv.org/abs/{PAPERS[script]})" in named(ROOT / script)


class Hub(BaseHTTPRequestHandler):
    """What of the hub's API an upload uses; it keeps the files of a commit in server.files."""

    def log_message(self, *_):
        pass

    def home(self) -> str:
        return f"http://{self.headers['Host']}/me/rabbit"

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer({"id": "me/rabbit", "sha": COMMIT, "siblings": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.authorised.add(self.headers.get("Authorization"))
        if self.path.endswith("/repos/create"):
            self.server.repos.append(json.loads(body))
            self.answer({"url": self.home(), "name": "me/rabbit"})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]
            self.answer({"files": modes})
        elif self.path.endswith("/validate-yaml"):
            self.server.validated.append(json.loads(body)["content"])
            self.answer({"errors": [], "warnings": []})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    value = line["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{self.home()}/commit/{COMMIT}"
            self.answer({"commitUrl": url, "commitOid": COMMIT, "commitMessage": ""})


@pytest.fixture
def hub(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.repos, server.validated, server.authorised = {}, [], [], set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    yield server
    server.shutdown()


def test_a_run_goes_to_the_hub(hub, tmp_path):
    """What is uploaded is in the run's folder, and of it what others can use and no more."""
    run = tmp_path / "run"
    flags = ["--prompt", "a rabbit", "--num-iterations", 1, "--samples-per-iteration", 4]
    flags += ["--push-to-hub", "me/rabbit", "--output-dir", run]
    result = run_script("dpok.py", "zoo", *flags)
    assert result.returncode == 0, result.stderr
    assert "/me/rabbit" in result.stdout.splitlines()[-1]
    assert hub.repos[0]["name"] == "rabbit" and hub.authorised == {"Bearer hf_of_the_test"}
    weights = {"pytorch_lora_weights.safetensors", EXPORTED}
    pictures = {"learning_curve.png", "samples/000000.png", "samples/000001.png"}
    assert set(hub.files) == weights | pictures | {"README.md", "metrics.jsonl"}
    for name, content in hub.files.items():
        assert content == (run / name).read_bytes()
    text = hub.files["README.md"].decode()
    assert str(tmp_path) not in text and 'load_lora_weights("me/rabbit"' in text
    assert "models/loras/run.safetensors" in text and "<lora:run:1>" in text
    card = ModelCard(hub.validated[0])
    assert card.content == hub.files["README.md"].decode()
    assert card.data.library_name == "diffusers" and card.data.instance_prompt == "a rabbit"


def test_what_a_run_learns_from_is_not_pushed():
    """The hub's patterns cross folders: rwr.py has a pool of samples, sft_kl.py a data set."""
    files = ["pool/000/000000.safetensors", "dataset/000000.safetensors", "dataset/dataset.json"]
    files += ["checkpoint/unet/model.safetensors", "checkpoint/state.pt", "args.json"]
    files += ["checkpoint/pytorch_lora_weights.safetensors"]
    pushed = ["pytorch_lora_weights.safetensors", EXPORTED, "unet/model.safetensors", "README.md"]
    assert [*filter_repo_objects(files + pushed, allow_patterns=[*FILES])] == pushed


def test_settings_show_no_folder_of_this_machine():
    places = {"prompts_file": "/home/me/p.txt", "dataset": "/home/me/d", "pretrain_data": None}
    shown = settings(ARGS | places)
    assert shown["--prompts-file"] == "p.txt" and shown["--dataset"] == "d"
    assert "--pretrain-data" not in shown
    shown = settings(ARGS | {"pretrain_data": "/home/me/clients"})
    assert shown["--pretrain-data"] == "clients"


def export(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "evaluation.export", *words]
    return subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)


@pytest.fixture
def finished(tmp_path):
    """A folder with what the card is made of."""
    run = tmp_path / "ddpo__animals__0__20260101"
    (run / "unet").mkdir(parents=True)
    args = ARGS | {"lora_rank": 0, "prompts_file": "/home/me/animals.txt", "output_dir": str(run)}
    (run / "args.json").write_text(json.dumps(args))
    line = {"iteration": 0, "samples": 8, "reward/mean": -0.5, "time/sample_s": 60.0}
    later = line | {"iteration": 1, "samples": 16, "reward/mean": 0.25}
    (run / "metrics.jsonl").write_text(f"{json.dumps(line)}\n{json.dumps(later)}\n")
    return run


def test_without_the_hub_nothing_is_lost(finished, monkeypatch):
    """No network: one line that says how to do it later. No token: refused at once."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    result = export(finished, "--push-to-hub", "me/rabbit")
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1, result.stderr
    assert f" -m evaluation.export {finished} --push-to-hub me/rabbit" in result.stderr
    assert (finished / "README.md").exists()


def test_a_run_without_weights_is_not_exported(finished):
    (finished / "unet").rmdir()
    result = export(finished)
    assert result.returncode == 2 and "no weights in it" in result.stderr
    assert not (finished / "README.md").exists()


@pytest.mark.parametrize("token, repo", [(None, "me/rabbit"), ("hf_x", "me/rab/bit")])
def test_what_cannot_be_pushed_is_refused(finished, token, repo, monkeypatch, capsys):
    monkeypatch.setattr("harness.hub.get_token", lambda: token)
    monkeypatch.setattr(sys, "argv", ["export.py", str(finished), "--push-to-hub", repo])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
    assert not (finished / "README.md").exists()


def test_card_of_an_older_run_and_its_evaluation(finished, tmp_path, monkeypatch):
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    table = "| model | `image_reward:zoo/image_reward` (held out) |\n|---|---|\n| base | 0.1 |\n"
    table += "| model | `https://me:word@host/score?timeout=5` (trained on) |\n"
    text = f"# About\n\n## In all\n\n{table}\n## Prompt by prompt\n\nmore\n"
    (evaluation / "table.md").write_text(text)
    monkeypatch.setattr(sys, "argv", ["export.py", str(finished), "--evaluation", str(evaluation)])
    main()
    text = (finished / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.library_name == "diffusers" and "ddpo" in card.data.tags
    assert "lora" not in card.data.tags and "base_model" not in card.data.to_dict()
    assert "arXiv:2305.13301" in text and "reward -0.5 -> 0.25" in text and "2.0 minutes" in text
    shown = table.replace("https://me:word@host/score?timeout=5", "reward server")
    assert shown in text and "more" not in text and "/home/me" not in text
    assert "| `--prompts-file` | animals.txt |" in text and EXPORTED not in text


def test_card_of_a_base_from_the_hub(tmp_path):
    model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    about = ModelCard(model_card(tmp_path, ARGS | {"model": model}, None, [])).data
    assert about.base_model == model and about.license == "creativeml-openrail-m"
    assert about.base_model_relation == "adapter" and "lora" in about.tags
