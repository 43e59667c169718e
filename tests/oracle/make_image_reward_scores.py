"""Scores of the package `image-reward` 1.5 itself, for test_image_reward.py to compare with.

The package does not run on today's libraries, so it has an environment of its own:

    python3.11 -m venv oracle-env
    oracle-env/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    oracle-env/bin/pip install transformers==4.27.4 "huggingface_hub<0.26" "numpy<2" pillow==13.0.0
    oracle-env/bin/pip install --no-deps image-reward==1.5 timm==0.6.13 \\
        fairscale==0.4.13 torchvision==0.28.0
    oracle-env/bin/python tests/oracle/make_image_reward_scores.py

Model, tokenizer, preprocessing and `score` are the package's own, at full size; weights, vocabulary
and pictures are made by recipe.py. What is put in the package's way here is only what the score
never touches: OpenAI's `clip` (in no package registry; for its CLIP score), the fine-tuning script
ReFL (wants diffusers and more), and the compiled operators of torchvision (its PyPI build does not
match a CPU build of torch; for detection).
"""

import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import recipe
import torch

for name in ("clip", "ImageReward.ReFL"):
    sys.modules[name] = ModuleType(name)
operators = torch.library.Library("torchvision", "DEF")
operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from transformers import BertTokenizer  # noqa: E402

with tempfile.TemporaryDirectory() as folder:
    (Path(folder) / "vocab.txt").write_text("\n".join(recipe.vocabulary()) + "\n")
    (Path(folder) / "med_config.json").write_text(json.dumps(recipe.MED_CONFIG))
    from_pretrained = BertTokenizer.from_pretrained

    def from_recipe(name: str) -> BertTokenizer:
        assert name == "bert-base-uncased"
        return from_pretrained(folder)

    BertTokenizer.from_pretrained = from_recipe
    from ImageReward.ImageReward import ImageReward

    model = ImageReward(med_config=f"{folder}/med_config.json", device="cpu")

model.load_state_dict(recipe.published_state(), strict=True)
model.eval()
cases = []
with torch.no_grad():
    for width, height, seed, prompt in recipe.CASES:
        case = {"width": width, "height": height, "seed": seed, "prompt": prompt}
        cases.append(case | {"score": model.score(prompt, recipe.picture(width, height, seed))})
        print(cases[-1])
packages = ("image-reward", "torch", "transformers", "tokenizers")
packages += ("torchvision", "timm", "pillow", "numpy")
versions = {"python": platform.python_version()}
versions |= {package: version(package) for package in packages}
result = {
    "versions": versions,
    "fingerprint": recipe.fingerprint(),
    "cases": cases,
}
path = Path(__file__).with_name("image_reward_scores.json")
path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
