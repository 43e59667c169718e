"""A VLM describes the picture; the reward is BERTScore's recall of the prompt in its words.

This is the reward of DDPO 5.3.
"""

import base64
import contextlib
import io
import json
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent import futures
from http.client import HTTPException
from urllib.parse import urlsplit

import torch
from PIL import Image

from common.rewards.base import (
    MODEL_FILES,
    PROCESSOR_FILES,
    TOKENIZER_FILES,
    Reward,
    RewardError,
    batched,
    check_options,
    check_weights,
    load_model,
    to_pil,
)
from common.users_code import quoted, shortened

VLM = "llava-hf/llava-1.5-7b-hf"
SCORER, LAYER = "microsoft/deberta-xlarge-mnli", 40
"""What `bert-score` recommends, and the layer that it takes of it."""
TEXTS = {"question": "What is happening in this image?", "scorer": SCORER, "model": ""}
NUMBERS = {
    "layer": (0, LAYER, 1000),
    "max_new_tokens": (1, 64, 100_000),
    "timeout": (1, 60, 86_400),
    "retries": (0, 5, 100),
    "concurrency": (1, 8, 256),
}
"""Options: least, default and most; the last three and `model` are for a server, timeout in s."""
LONGEST_ANSWER = 1 << 20
"""Bytes; a description has hundreds, and a list of models some thousands."""


class BERTScore:
    """BERTScore (Zhang et al. 2020) without idf weights and rescaling, as `bert-score` has it.

    `layer` is the one whose hidden states are compared, 0 being the embeddings.
    """

    def __init__(self, weights: str, layer: int, device: str | torch.device):
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(weights)
        model = load_model(AutoModel, weights, device, unused="pooler")  # roberta-large has none
        if not 0 <= layer <= model.config.num_hidden_layers:
            layers = model.config.num_hidden_layers
            raise RewardError(f"{weights!r} has {layers} layers, and layer={layer} is asked for")
        self.model, self.layer, self.device = model, layer, device

    def embed(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalised hidden states (B, L, D); which tokens are there, and which count, (B, L)."""
        length = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings - 2)
        tokens = self.tokenizer(
            [text.strip() for text in texts],
            padding=True,
            truncation=True,
            max_length=length,
            return_tensors="pt",
        ).to(self.device)
        hidden = self.model(**tokens, output_hidden_states=True).hidden_states[self.layer]
        hidden = torch.nn.functional.normalize(hidden, dim=-1)
        there = tokens.attention_mask.bool()
        ends = [self.tokenizer.cls_token_id, self.tokenizer.sep_token_id]
        ends = torch.tensor(ends, device=self.device)
        return hidden, there, there & ~torch.isin(tokens.input_ids, ends)

    def recall(self, candidates: list[str], references: list[str]) -> torch.Tensor:
        """Mean over a reference's tokens of the best cosine with a token of its candidate.

        (B,), float32. The tokens at the two ends do not count, but can be matched, so that an empty
        candidate has a score; an empty reference scores 0.
        """
        references, _, counted = self.embed(references)
        candidates, there, _ = self.embed(candidates)
        cosines = (references @ candidates.transpose(1, 2)).masked_fill(~there[:, None], -torch.inf)
        return (cosines.amax(2) * counted).sum(1) / counted.sum(1).clamp(min=1)


def describe_here(weights: str, question: str, max_new_tokens: int, device: str | torch.device):
    """A function from pictures to descriptions, by a VLM in this process.

    It is greedy; on a GPU in the precision of its files, elsewhere in float32.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(weights)
    processor.tokenizer.padding_side = "left"
    dtype = "auto" if torch.device(device).type == "cuda" else torch.float32
    model = load_model(AutoModelForImageTextToText, weights, device, dtype)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)

    def describe(pictures: list[Image.Image]) -> list[str]:
        inputs = processor(
            images=pictures, text=[text] * len(pictures), padding=True, return_tensors="pt"
        ).to(device, model.dtype)
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        tokens = tokens[:, inputs.input_ids.shape[1] :]
        return processor.batch_decode(tokens, skip_special_tokens=True)

    return describe


def within(seconds: float, call: Callable, close: Callable):
    """What `call()` returns, or a TimeoutError; close() then ends what it waits for.

    A socket's own time-out begins anew with every byte that comes.
    """
    future = futures.Future()

    def run() -> None:
        try:
            future.set_result(call())
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return future.result(seconds)
    except futures.TimeoutError:  # before Python 3.11 no OSError
        close()
        raise TimeoutError(f"no whole answer within {seconds} s") from None


class NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like any other fault: the key is for the named server alone."""

    def redirect_request(self, *of_the_request):
        return None


def noting(handler: type, sockets: list, deadline: float) -> type:
    """`handler` of urllib, which adds each connection's socket to `sockets`."""

    class Noting(handler):
        def do_open(self, http_class, request, **options):
            class Connection(http_class):
                def connect(self):
                    super().connect()
                    sockets.append(self.sock)
                    if time.monotonic() > deadline:  # whoever closes them may have been here before
                        self.close()
                        raise TimeoutError

            return super().do_open(Connection, request, **options)

    return Noting


def fetch(request: urllib.request.Request, seconds: float) -> tuple[int, str, bytes]:
    """Status, reason and body of an answer, up to a byte more than LONGEST_ANSWER.

    At the deadline the connection is closed, so that nothing goes on reading.
    """
    sockets, deadline = [], time.monotonic() + seconds
    schemes = (urllib.request.HTTPHandler, urllib.request.HTTPSHandler)
    handlers = [noting(handler, sockets, deadline) for handler in schemes]
    opener = urllib.request.build_opener(NoRedirects, *handlers)

    def call() -> tuple[int, str, bytes]:
        try:
            with opener.open(request, timeout=seconds) as response:
                return response.status, response.reason, response.read(LONGEST_ANSWER + 1)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.reason, error.read(LONGEST_ANSWER + 1)

    def close() -> None:
        for connection in sockets:
            with contextlib.suppress(OSError):  # closed already
                connection.shutdown(socket.SHUT_RDWR)

    return within(seconds, call, close)


def api_key() -> str:
    """OPENAI_API_KEY, which a server may want; raises RewardError for one that cannot be sent."""
    key = os.environ.get("OPENAI_API_KEY", "none").strip()
    if not (key.isascii() and key.isprintable()):  # http.client's own error would quote it
        raise RewardError("OPENAI_API_KEY has characters that no header can have; set it anew")
    return key


def ask_server(url: str, body: dict | None, timeout: float, retries: int):
    """The JSON that an OpenAI-compatible server answers.

    Tried again, ever later, after faults that may pass; raises RewardError when it stays down. The
    key, if the server wants one, is read from OPENAI_API_KEY.
    """
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {api_key()}"}
    data = None if body is None else json.dumps(body).encode()
    for attempt in range(retries + 1):
        try:
            status, reason, answer = fetch(urllib.request.Request(url, data, headers), timeout)
            if status < 300 and len(answer) > LONGEST_ANSWER:
                fault = f"an answer of more than {LONGEST_ANSWER} bytes"
                break
            if status < 300:
                return json.loads(answer)
            fault = (
                f"HTTP {status} {shortened(reason)}: {shortened(answer.decode(errors='replace'))}"
            )
            if 300 <= status < 400:
                fault += "; a redirect is not followed: name the server where it is"
            if status < 500 and status not in (408, 409, 425, 429):
                break
        # No connection or a time-out, half an answer, not JSON or nested too deep.
        except (OSError, HTTPException, ValueError, RecursionError) as error:
            fault = shortened(str(error)) or type(error).__name__
        if attempt < retries:
            time.sleep(min(0.5 * 2**attempt, 30))
    where = f"the VLM server {shortened(url)}"
    raise RewardError(f"{where} failed {attempt + 1} times, at last with: {fault}")


def describe_on_server(url: str, options: dict[str, str | int]):
    """A function from pictures to descriptions, by an OpenAI-compatible server (vLLM, SGLang)."""
    timeout, retries = options["timeout"], options["retries"]
    # With a named model too: is there a server?
    models = ask_server(f"{url}/models", None, timeout, retries)
    try:
        name = options["model"] or models["data"][0]["id"]
        if not isinstance(name, str):
            raise TypeError("a name is text")
    except (KeyError, IndexError, TypeError):
        fault = f"the VLM server {shortened(url)} lists no model: {shortened(models, 100)}"
        raise RewardError(f"{fault}; name one with ?model=") from None

    def describe_one(picture: Image.Image) -> str:
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        image = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": options["question"]},
        ]
        body = {"model": name, "messages": [{"role": "user", "content": content}]}
        body |= {"max_tokens": options["max_new_tokens"], "temperature": 0}
        answer = ask_server(f"{url}/chat/completions", body, timeout, retries)
        try:
            said = answer["choices"][0]["message"]["content"]
            if isinstance(said, list):
                return " ".join(part["text"] for part in said)
            if not isinstance(said, str | None):
                raise TypeError("a description is text")
            return said or ""
        except (KeyError, IndexError, TypeError):
            fault = f"the VLM server {shortened(url)} answered without a text: {shortened(answer)}"
            raise RewardError(fault) from None

    def describe(pictures: list[Image.Image]) -> list[str]:
        with futures.ThreadPoolExecutor(options["concurrency"]) as threads:
            return list(threads.map(describe_one, pictures))

    return describe


def read_options(options: dict[str, str]) -> dict[str, str | int]:
    """All options, numbers as such; RewardError for one that is not known or makes no sense."""
    check_options("llava_bertscore", options, (*TEXTS, *NUMBERS))
    numbers = {}
    for option, (least, default, most) in NUMBERS.items():
        text = options.get(option, str(default))
        if not re.fullmatch(r"[0-9]{1,9}", text) or not least <= int(text) <= most:
            what = f"{option}={shortened(text)} of llava_bertscore"
            raise RewardError(
                f"{what} must be a whole number of {least} or more, and at most {most}"
            )
        numbers[option] = int(text)
    return TEXTS | options | numbers


def is_url(weights: str | None) -> bool:
    return weights is not None and weights.startswith(("http://", "https://"))


def check_url(url: str) -> None:
    """Raises RewardError for one that no request can be sent to."""
    try:
        parts = urlsplit(url)
        ok = parts.hostname and parts.port != 0 and "@" not in parts.netloc and not parts.fragment
        ok = ok and url.isascii() and url.isprintable() and " " not in url
    except ValueError:  # a port that is no number, a bracket that is not closed
        ok = False
    if not ok:
        raise RewardError(f"{quoted(url)} is no URL of a server; write http://HOST:PORT/v1")


def check(name: str, weights: str | None, options: dict[str, str]) -> None:
    check_weights(read_options(options)["scorer"], *MODEL_FILES, TOKENIZER_FILES, owner=False)
    if is_url(weights):
        check_url(weights)
    else:
        check_weights(weights, *MODEL_FILES, PROCESSOR_FILES, TOKENIZER_FILES)


def load(
    name: str, weights: str | None, options: dict[str, str], device: str | torch.device
) -> Reward:
    """In about [0, 1]. `weights`: a hub id or a folder of a VLM, or a server's URL up to /v1."""
    options = read_options(options)
    if is_url(weights):
        describe = describe_on_server(weights.rstrip("/"), options)
    else:
        length = options["max_new_tokens"]
        describe = describe_here(weights or VLM, options["question"], length, device)
    scorer = BERTScore(options["scorer"], options["layer"], device)

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return scorer.recall(describe(to_pil(images)), list(prompts))

    scored = batched(reward)
    if is_url(weights):
        scored.in_thread = True
    return scored
