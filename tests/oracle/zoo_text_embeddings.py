"""What the zoo's text encoder gives under the transformers that is installed; run with transformers 4.

transformers 5 saves CLIP's text weights without the prefix `text_model.`, and transformers 4 then starts from random
weights with a mere warning. The zoo keeps the old names; tests/test_zoo.py compares transformers 5 with what this
script wrote under transformers 4:

    python3 -m venv old && old/bin/pip install torch==2.13.0 "transformers<5"
    old/bin/python tests/oracle/zoo_text_embeddings.py
"""

import json
from pathlib import Path

import torch
import transformers
from transformers import CLIPTextModel, CLIPTokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
PROMPTS = ["A green colored rabbit", "Four wolves in the park."]


@torch.no_grad()
def embeddings() -> dict[str, list]:
    """Token ids and the first numbers of every hidden state, as plain lists."""
    tokenizer = CLIPTokenizer.from_pretrained(ROOT / "zoo/sd/tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(ROOT / "zoo/sd/text_encoder")
    ids = tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    return {"ids": ids.tolist(), "hidden": text_encoder(ids)[0][:, :, :4].flatten().tolist()}


if __name__ == "__main__":
    result = {"transformers": transformers.__version__, **embeddings()}
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result) + "\n")
    print(f"wrote {path.name} with transformers {transformers.__version__}")
