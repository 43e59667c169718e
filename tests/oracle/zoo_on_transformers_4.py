"""What the zoo's text encoder and its whole pipeline give under the libraries that are installed.

transformers 5 saves CLIP's text weights without the prefix `text_model.`, and transformers 4 then
starts from random weights with a mere warning. The zoo keeps the old names; tests/test_zoo.py
compares the current libraries with what this script wrote under transformers 4:

    python3 -m venv old && old/bin/pip install torch==2.13.0 "transformers<5" "diffusers<0.36"
    old/bin/python tests/oracle/zoo_on_transformers_4.py
"""

import json
from pathlib import Path

import torch
import transformers
from diffusers import StableDiffusionPipeline

ROOT = Path(__file__).resolve().parent.parent.parent
PROMPTS = ["A green colored rabbit", "Four wolves in the park."]


@torch.no_grad()
def outputs() -> dict[str, list]:
    """Token ids, the first numbers of every hidden state, two pictures at 8 x 8 px; as lists."""
    pipeline = StableDiffusionPipeline.from_pretrained(ROOT / "zoo/sd")
    pipeline.set_progress_bar_config(disable=True)
    ids = pipeline.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    settings = {"num_inference_steps": 6, "eta": 1.0, "output_type": "pt"}
    images = pipeline(PROMPTS, generator=generators, **settings).images
    return {
        "ids": ids.tolist(),
        "hidden": pipeline.text_encoder(ids)[0][:, :, :4].flatten().tolist(),
        "pictures": torch.nn.functional.avg_pool2d(images, 8).flatten().tolist(),
    }


if __name__ == "__main__":
    result = {"transformers": transformers.__version__, **outputs()}
    path = Path(__file__).with_suffix(".json")
    path.write_text(json.dumps(result) + "\n")
    print(f"wrote {path.name} with transformers {transformers.__version__}")
