"""A VLM describes the picture, and the reward is BERTScore's recall of the prompt in the description (DDPO 5.3)."""

import base64
import io
import json
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

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
    to_pil,
)

VLM = "llava-hf/llava-1.5-7b-hf"
    load_model,
SCORER, LAYER = "microsoft/deberta-xlarge-mnli", 40
"""What `bert-score` recommends, and the layer that it takes of it."""
TEXTS = {"question": "What is happening in this image?", "scorer": SCORER, "model": ""}
NUMBERS = {"layer": LAYER, "max_new_tokens": 64, "timeout": 60, "retries": 5, "concurrency": 8}
"""Options and their defaults; the last three and `model` are for a server, timeout in seconds."""


class BERTScore:
    """BERTScore (Zhang et al. 2020) without idf weights and without rescaling, as `bert-score` computes it.

    `layer` is the one whose hidden states are compared, 0 being the embeddings.
    """

    def __init__(self, weights: str, layer: int, device: str | torch.device):
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(weights)
        model = load_model(AutoModel, weights, device, unused="pooler")  # roberta-large has none
        if not 0 <= layer <= model.config.num_hidden_layers:
            raise RewardError(
                f"{weights!r} has {model.config.num_hidden_layers} layers, and layer={layer} is asked for"
            )
        self.model, self.layer, self.device = model, layer, device

    def embed(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalised hidden states (B, L, D); which tokens are there, and which of them count, bool (B, L)."""
        length = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings - 2)
        tokens = self.tokenizer(
            [text.strip() for text in texts], padding=True, truncation=True, max_length=length, return_tensors="pt"
        ).to(self.device)
        hidden = self.model(**tokens, output_hidden_states=True).hidden_states[self.layer]
        there = tokens.attention_mask.bool()
        ends = torch.tensor([self.tokenizer.cls_token_id, self.tokenizer.sep_token_id], device=self.device)
        return torch.nn.functional.normalize(hidden, dim=-1), there, there & ~torch.isin(tokens.input_ids, ends)

    def recall(self, candidates: list[str], references: list[str]) -> torch.Tensor:
        """Mean over a reference's tokens of the best cosine with a token of its candidate, (B,) float32.

        The tokens at the two ends do not count, but can be matched, so that an empty candidate has a score; an empty
        reference scores 0.
        """
        references, _, counted = self.embed(references)
        candidates, there, _ = self.embed(candidates)
        cosines = (references @ candidates.transpose(1, 2)).masked_fill(~there[:, None], -torch.inf)
        return (cosines.amax(2) * counted).sum(1) / counted.sum(1).clamp(min=1)


def describe_here(weights: str, question: str, max_new_tokens: int, device: str | torch.device):
    """A function from pictures to descriptions, by a VLM in this process; greedy, in the precision of its files."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(weights)
    processor.tokenizer.padding_side = "left"
    dtype = "auto" if torch.device(device).type == "cuda" else torch.float32
    model = load_model(AutoModelForImageTextToText, weights, device, dtype)
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    text = processor.apply_chat_template([message], add_generation_prompt=True)

    def describe(pictures: list[Image.Image]) -> list[str]:
        inputs = processor(images=pictures, text=[text] * len(pictures), padding=True, return_tensors="pt").to(
            device, model.dtype
        )
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return processor.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)

    return describe


def ask_server(url: str, body: dict | None, timeout: float, retries: int) -> dict:
    """The JSON that an OpenAI-compatible server answers; tried again, ever later, after faults that may pass.

    Raises RewardError when it stays down. The key, if the server wants one, is read from OPENAI_API_KEY.
    """
    headers = {
        "Content-Type": "application/json",
        "Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}",
    }
    data = None if body is None else json.dumps(body).encode()
    for attempt in range(retries + 1):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            fault = f"HTTP {error.code} {error.reason}"
            if error.code < 500 and error.code not in (408, 409, 425, 429):
                break
        except (OSError, ValueError) as error:  # no connection, time-out, or an answer that is not JSON
            fault = str(error) or type(error).__name__
        if attempt < retries:
            time.sleep(min(0.5 * 2**attempt, 30))
    raise RewardError(f"the VLM server {url} failed {attempt + 1} times, at last with: {fault}")


def describe_on_server(url: str, options: dict[str, str | int]):
    """A function from pictures to descriptions, by an OpenAI-compatible vision server (vLLM, SGLang)."""
    timeout, retries = options["timeout"], options["retries"]
    name = options["model"] or ask_server(f"{url}/models", None, timeout, retries)["data"][0]["id"]

    def describe_one(picture: Image.Image) -> str:
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG")
        image = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": options["question"]}]
        body = {"model": name, "messages": [{"role": "user", "content": content}]}
        body |= {"max_tokens": options["max_new_tokens"], "temperature": 0}
        answer = ask_server(f"{url}/chat/completions", body, timeout, retries)
        try:
            return answer["choices"][0]["message"]["content"] or ""
        except (KeyError, IndexError, TypeError):
            raise RewardError(f"the VLM server {url} answered without a message: {str(answer)[:100]}") from None

    def describe(pictures: list[Image.Image]) -> list[str]:
        with ThreadPoolExecutor(options["concurrency"]) as threads:
            return list(threads.map(describe_one, pictures))

    return describe


def read_options(options: dict[str, str]) -> dict[str, str | int]:
    """All options, numbers as such; raises RewardError for one that is not known or makes no sense."""
    check_options("llava_bertscore", options, (*TEXTS, *NUMBERS))
    numbers = {}
    for option, default in NUMBERS.items():
        text = options.get(option, str(default))
        if not text.isdigit() or (int(text) == 0 and option not in ("retries", "layer")):
            raise RewardError(f"{option}={text} of llava_bertscore must be a whole number of 1 or more")
        numbers[option] = int(text)
    return TEXTS | options | numbers


def is_url(weights: str | None) -> bool:
    return weights is not None and weights.startswith(("http://", "https://"))


def check(name: str, weights: str | None, options: dict[str, str]) -> None:
    check_weights(read_options(options)["scorer"], *MODEL_FILES, TOKENIZER_FILES)
    if not is_url(weights):
        check_weights(weights, *MODEL_FILES, PROCESSOR_FILES, TOKENIZER_FILES)


def load(name: str, weights: str | None, options: dict[str, str], device: str | torch.device) -> Reward:
    """In about [0, 1]. `weights`: a hub id or a folder of a VLM, or the URL of a server up to /v1."""
    options = read_options(options)
    if is_url(weights):
        describe = describe_on_server(weights.rstrip("/"), options)
    else:
        describe = describe_here(weights or VLM, options["question"], options["max_new_tokens"], device)
    scorer = BERTScore(options["scorer"], options["layer"], device)

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return scorer.recall(describe(to_pil(images)), list(prompts))

    return batched(reward)
