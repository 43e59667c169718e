"""Rewards on a server: what is sent and read, faults, and runs with examples/reward_server.py."""

import base64
import contextlib
import importlib.util
import io
import json
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from conftest import ROOT, read_metrics, run_script
from PIL import Image
from test_layout import imported
from tiny_models import pictures

from common.rewards import RewardError, load_reward
from evaluation.digests import score_keys
from evaluation.models import Model, was_trained_on
from harness.rewards import load_reward_or_fail

PROMPTS = ["a cat", "a dog", "two", "ein Mädchen", "the \U0001f408", ""]


def red(images: torch.Tensor) -> torch.Tensor:
    """The example's score of pictures of 8 bits."""
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))


class Server(BaseHTTPRequestHandler):
    """Scores by length of the prompt; `faults` are what the next requests meet."""

    faults, asked, times = [], [], []
    parallel, most_parallel, lock = 0, 0, threading.Lock()

    def do_POST(self):
        cls, body = type(self), json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with cls.lock:
            fault = cls.faults.pop(0) if cls.faults else None
            cls.asked.append((self.path, dict(self.headers), body))
            cls.times.append(time.monotonic())
            cls.parallel += 1
            cls.most_parallel = max(cls.most_parallel, cls.parallel)
        time.sleep(0.05 * len(body["images"]))
        with cls.lock:  # before the answer, upon which the client may send its next request
            cls.parallel -= 1
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            if fault == "hang":
                time.sleep(3)
            elif fault == "no HTTP":
                self.wfile.write(b"ready\r\n")
            elif isinstance(fault, int):
                self.answer(fault, {"error": "no"})
            elif fault is not None:
                self.answer(200, fault)
            else:
                self.answer(200, {"scores": [len(prompt) for prompt in body["prompts"]]})

    def answer(self, status: int, body):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def serving(handler):
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.delenv("REWARD_API_KEY", raising=False)
    Server.faults, Server.asked, Server.times, Server.most_parallel = [], [], [], 0
    with serving(Server) as url:
        yield url


@pytest.fixture
def example(monkeypatch):
    """The module and the URL of the example, in this process."""
    monkeypatch.delenv("REWARD_API_KEY", raising=False)
    place = importlib.util.spec_from_file_location("example", ROOT / "examples/reward_server.py")
    module = importlib.util.module_from_spec(place)
    place.loader.exec_module(module)
    module.Handler.log_message = lambda *args: None
    with serving(module.Handler) as url:
        yield module, url


def test_scores_are_those_of_the_examples_server(example):
    _, url = example
    images = (pictures(6, 40, 24) * 255).round() / 255
    scores = load_reward(f"{url}?batch_size=4")(images, PROMPTS)
    assert scores.dtype == torch.float32 and scores.std() > 1e-2
    torch.testing.assert_close(scores, red(images), rtol=0, atol=1e-5)
    total = load_reward(f"0.5*{url}?batch_size=1&timeout=5+-2*{url}+1e-1*jpeg_compressibility")
    expected = -1.5 * red(images) + 0.1 * load_reward("jpeg_compressibility")(images, PROMPTS)
    torch.testing.assert_close(total(images, PROMPTS), expected, rtol=0, atol=1e-4)


def test_what_is_sent(server):
    """Pictures of 8 bits as PNG; first a request without any, which tells if there is a server."""
    images = pictures(6, 24, 40)
    reward = load_reward(f"{server}?batch_size=4&concurrency=1")
    assert [body for _, _, body in Server.asked] == [{"images": [], "prompts": []}]
    assert reward(images, PROMPTS).tolist() == [len(prompt) for prompt in PROMPTS]
    bodies = [body for _, _, body in Server.asked[1:]]
    assert [body["prompts"] for body in bodies] == [PROMPTS[:4], PROMPTS[4:]]
    files = [io.BytesIO(base64.b64decode(text)) for body in bodies for text in body["images"]]
    for file, image in zip(files, images):
        picture = Image.open(file)
        assert picture.format == "PNG" and picture.mode == "RGB"
        expected = np.rint(image.permute(1, 2, 0).numpy() * 255)
        assert np.array_equal(np.asarray(picture), expected)
    for path, headers, _ in Server.asked:
        assert path == "/score" and headers["Content-Type"] == "application/json"
        assert "Authorization" not in headers


def test_requests_are_sent_in_parallel_and_order_is_kept(server):
    prompts = ["a" * i for i in range(12)]
    scores = load_reward(f"{server}?batch_size=1&concurrency=3")(pictures(12, 8, 8), prompts)
    assert scores.tolist() == list(range(12)) and 2 <= Server.most_parallel <= 3


def test_it_is_asked_in_a_thread(server):
    """start returns at once, and the call takes its scores up, in the order of the starts."""
    reward, images = load_reward(f"{server}?batch_size=3"), pictures(6, 8, 8)
    began = time.monotonic()
    reward.start(images[:3], PROMPTS[:3])
    reward.start(images[3:], PROMPTS[3:])
    assert time.monotonic() - began < 0.1, "an answer takes 0.15 s"
    assert reward(images, PROMPTS).tolist() == [len(prompt) for prompt in PROMPTS]
    assert len(Server.asked) == 3
    Server.faults = [400]
    reward.start(images, PROMPTS)
    with pytest.raises(RewardError, match="HTTP 400"):
        reward(images, PROMPTS)


def test_the_key(server, example, monkeypatch):
    monkeypatch.setenv("REWARD_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_API_KEY", "of-another-server")
    load_reward(server)(pictures(1), ["a cat"])
    assert [h["Authorization"] for _, h, _ in Server.asked] == ["Bearer secret"] * 2
    _, url = example
    assert load_reward(url)(pictures(1), ["a cat"]).shape == (1,)
    monkeypatch.setattr("common.rewards.reward_server.KEY", "OTHER_KEY")
    for key in ("other-secret", ""):
        monkeypatch.setenv("OTHER_KEY", key)
        with pytest.raises(RewardError, match=r"failed 1 times.*HTTP 401.*REWARD_API_KEY") as error:
            load_reward(url)
        assert "secret" not in str(error.value)
    monkeypatch.setenv("OTHER_KEY", "a\r\nb")
    with pytest.raises(RewardError, match="OTHER_KEY has characters that no header can have"):
        load_reward(url)


def test_passing_faults_are_tried_again(server):
    reward = load_reward(f"{server}?timeout=1&batch_size=1&concurrency=6")
    Server.faults = [503, "hang", "no HTTP", 429, b"<html>", 500]
    assert reward(pictures(6, 8, 8), PROMPTS).tolist() == [len(prompt) for prompt in PROMPTS]
    assert len(Server.asked) == 1 + 6 + 6


def test_a_server_is_asked_a_bounded_number_of_times_ever_later(server):
    reward = load_reward(f"{server}?timeout=1&retries=2")
    Server.faults, Server.times = [503] * 9, []
    with pytest.raises(RewardError, match=r"reward server http.* failed 3 times.*HTTP 503"):
        reward(pictures(1), ["a cat"])
    waits = np.diff(Server.times)
    assert len(waits) == 2 and (waits > [0.45, 0.9]).all()


WRONG = {
    "a list": [1.0],
    "no scores": {"error": "no memory"},
    "scores that are null": {"scores": None},
    "scores by name": {"scores": {"0": 1.0}},
    "too few": {"scores": []},
    "too many": {"scores": [1.0, 2.0]},
    "a word": {"scores": ["1.0"]},
    "true": {"scores": [True]},
    "a null": {"scores": [None]},
    "a list of lists": {"scores": [[1.0]]},
    "2 MB": {"scores": [1.0], "more": "x" * (2 << 20)},
    "NaN": b'{"scores": [NaN]}',
    "infinite": b'{"scores": [1e999]}',
    "too large for float32": b'{"scores": [1e300]}',
    "too large for any": b'{"scores": [1' + b"0" * 400 + b"]}",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_answers_are_one_line(server, name):
    reward = load_reward(server)
    Server.faults, Server.asked = [WRONG[name]], []
    with pytest.raises(RewardError) as error:
        reward(pictures(1), ["a cat"])
    message = str(error.value)
    assert len(Server.asked) == 1, "it would answer the same again"
    assert server in message and "\n" not in message and len(message) < 1000


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_neither_pictures_nor_key_follow_a_redirect(server, status, monkeypatch):
    monkeypatch.setenv("REWARD_API_KEY", "secret")

    class Moved(Server):
        def answer(self, status, body):
            self.send_response(status)
            self.send_header("Location", server)
            self.send_header("Content-Length", "0")
            self.end_headers()

    Moved.asked, Moved.faults = [], [status]
    with serving(Moved) as url, pytest.raises(RewardError, match=f"HTTP {status}.*redirect"):
        load_reward(url)
    assert len(Moved.asked) == 1 and not Server.asked


@pytest.mark.parametrize("fault", ["dead", 404, "another protocol"])
def test_a_server_that_fails_at_the_start_is_one_line(server, fault, monkeypatch, capsys):
    Server.faults = [fault if fault == 404 else {"data": []}]
    if fault == "dead":
        with socket.create_server(("127.0.0.1", 0)) as free:
            server = f"http://127.0.0.1:{free.getsockname()[1]}/score"
    monkeypatch.setattr(sys, "argv", ["ddpo.py"])
    with pytest.raises(SystemExit) as end:
        load_reward_or_fail(f"{server}?retries=1", torch.device("cpu"), ["a cat"], "--reward")
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    assert line.startswith("ddpo.py: error: --reward") and f"the reward server {server}" in line
    assert ("failed 2 times" in line) == (fault == "dead")


def test_the_example_needs_pillow_alone():
    names = imported((ROOT / "examples/reward_server.py").read_text())
    assert names - sys.stdlib_module_names == {"PIL"}


def test_what_the_example_refuses(example):
    module, url = example
    host, port = re.search(r"//(.*):(\d+)/", url).groups()

    def status_of(body: bytes, length: int | str | None = None) -> int:
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            length = len(body) if length is None else length
            head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
            connection.sendall(head.encode() + body)
            return int(connection.makefile("rb").readline().split()[1])

    assert status_of(b'{"images": [], "prompts": []}') == 200
    no_picture = base64.b64encode(b"no picture").decode()
    for body in ("", "{", "[]", "{}", '{"images": 3}', '{"images": ["=="], "prompts": []}'):
        assert status_of(body.encode()) == 400, body
    assert status_of(json.dumps({"images": [no_picture], "prompts": ["a"]}).encode()) == 400
    assert status_of(json.dumps({"images": [], "prompts": ["a"]}).encode()) == 400
    assert status_of(b'{"images": ' + b"[" * 100_000) == 400
    vast = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(vast, "PNG")
    vast = base64.b64encode(vast.getvalue()).decode()
    assert status_of(json.dumps({"images": [vast], "prompts": ["a"]}).encode()) == 400
    assert status_of(b"", module.LARGEST_BODY + 1) == 413
    assert status_of(b"", "abc") == status_of(b"", -1) == 400


@pytest.fixture(scope="module")
def process():
    """The URL of the example, run as a user runs it."""
    command = [sys.executable, "examples/reward_server.py", "--port", "0"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        yield server.stdout.readline().strip()
        server.kill()


def test_a_run_with_a_server(process, tmp_path):
    flags = ["--reward", process, "--num-iterations", 2, "--samples-per-iteration", 4]
    flags += ["--num-inference-steps", 3, "--min-count", 2, "--gradient-steps", 1]
    result = run_script("ddpo.py", "zoo", *flags, "--output-dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    lines = read_metrics(tmp_path / "run")
    assert len(lines) == 2 and all(-1 < line["reward/mean"] < 1 for line in lines)
    assert json.loads((tmp_path / "run/args.json").read_text())["reward"] == process


def test_a_run_without_its_server_ends_before_it_begins(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}/score?retries=0"
    flags = ["--reward", url, "--output-dir", tmp_path / "run"]
    result = run_script("ddpo.py", "zoo", *flags)
    errors = [line for line in result.stderr.splitlines() if "error" in line]
    assert result.returncode == 2 and len(errors) == 1, result.stderr
    assert "--reward" in errors[0] and url.partition("?")[0] in errors[0]
    assert not list(tmp_path.glob("run/*.safetensors"))


def test_an_evaluation_with_a_server(process, tiny_sd, tmp_path):
    """Scores are stored under the URL, and those that are there are not asked for again."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\n")
    spec = f"2*{process}?timeout=9+1*jpeg_compressibility"
    flags = ["--model", tiny_sd, "--prompts-file", prompts, "--rewards", process, spec]
    flags += ["--images-per-prompt", 2, "--num-inference-steps", 2, "--output-dir", tmp_path / "o"]
    result = run_script("evaluate.py", *flags)
    assert result.returncode == 0, result.stderr
    (file,) = (tmp_path / "o/samples/base").glob("*.npz")
    shard = np.load(file)
    images = torch.from_numpy(shard["images"]).permute(0, 3, 1, 2).float() / 255
    assert shard[process] == pytest.approx(red(images).numpy(), abs=1e-5)
    results = json.loads((tmp_path / "o/results.json").read_text())
    assert process in json.dumps(results)


def test_an_evaluation_knows_what_a_run_was_trained_on():
    url = "http://127.0.0.1:8000/score"
    assert score_keys((url,)) == {url: url}
    model = Model("a run", None, "", [f"0.5*{url}?timeout=9+1*aesthetic"])
    assert was_trained_on(model, f"{url}?timeout=9") and not was_trained_on(model, f"{url}/other")
