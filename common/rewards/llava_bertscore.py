"""A VLM describes the picture; the reward is BERTScore's recall of the prompt in its words.

This is the reward of DDPO 5.3.
"""

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
    load_model,
    to_pil,
)
from common.rewards.http_client import (
    SERVER_NUMBERS,
    ask_server,
    base64_png,
    bearer_token,
    check_url,
    is_url,
    whole_numbers,
)
from common.users_code import shortened

VLM = "llava-hf/llava-1.5-7b-hf"
SCORER, LAYER = "microsoft/deberta-xlarge-mnli", 40
"""What `bert-score` recommends, and the layer that it takes of it."""
TEXTS = {"question": "What is happening in this image?", "scorer": SCORER, "model": ""}
NUMBERS = {"layer": (0, LAYER, 1000), "max_new_tokens": (1, 64, 100_000)} | SERVER_NUMBERS
"""Options: least, default and most; those of SERVER_NUMBERS and `model` are for a server."""


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


def ask_vlm(url: str, body: dict | None, timeout: float, retries: int):
    """`ask_server` with OPENAI_API_KEY, or a key that servers take which want none."""
    key = bearer_token("OPENAI_API_KEY") or "none"
    return ask_server("the VLM server", url, body, timeout, retries, key)


def describe_on_server(url: str, options: dict[str, str | int]):
    """A function from pictures to descriptions, by an OpenAI-compatible server (vLLM, SGLang)."""
    timeout, retries = options["timeout"], options["retries"]
    # With a named model too: is there a server?
    models = ask_vlm(f"{url}/models", None, timeout, retries)
    try:
        name = options["model"] or models["data"][0]["id"]
        if not isinstance(name, str):
            raise TypeError("a name is text")
    except (KeyError, IndexError, TypeError):
        fault = f"the VLM server {shortened(url)} lists no model: {shortened(models, 100)}"
        raise RewardError(f"{fault}; name one with ?model=") from None

    def describe_one(picture: Image.Image) -> str:
        image = f"data:image/png;base64,{base64_png(picture)}"
        content = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": options["question"]},
        ]
        body = {"model": name, "messages": [{"role": "user", "content": content}]}
        body |= {"max_tokens": options["max_new_tokens"], "temperature": 0}
        answer = ask_vlm(f"{url}/chat/completions", body, timeout, retries)
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
        with ThreadPoolExecutor(options["concurrency"]) as threads:
            return list(threads.map(describe_one, pictures))

    return describe


def read_options(options: dict[str, str]) -> dict[str, str | int]:
    """All options, numbers as such; RewardError for one that is not known or makes no sense."""
    check_options("llava_bertscore", options, (*TEXTS, *NUMBERS))
    numbers = whole_numbers("llava_bertscore", options, NUMBERS)
    return TEXTS | options | numbers


def check(name: str, weights: str | None, options: dict[str, str]) -> None:
    check_weights(read_options(options)["scorer"], *MODEL_FILES, TOKENIZER_FILES, owner=False)
    if is_url(weights):
        check_url(weights, "http://HOST:PORT/v1")
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
