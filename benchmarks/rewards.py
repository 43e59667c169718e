"""What the rewards cost: parameters at real size, and pictures a second of the zoo's own and of JPEG, on this machine.

python -m benchmarks.rewards        writes benchmarks/results/rewards.json
"""

import json
import os
import time

import torch
from transformers import (
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    DebertaConfig,
    DebertaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Owlv2Config,
    Owlv2ForObjectDetection,
)

from benchmarks.zoo_eval import ROOT
from common.rewards import load_reward
from common.rewards.image_reward import IMAGE_REWARD_CONFIG, ImageReward

TEXT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
VISION_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
# Sizes of the default weights, from their published configurations.
REAL = {
    "image_reward": lambda: ImageReward(IMAGE_REWARD_CONFIG),
    "clip_score, aesthetic, statistical_parity: CLIP ViT-L/14": lambda: CLIPModel(
        CLIPConfig(text_config=TEXT_L, vision_config=VISION_L | {"patch_size": 14}, projection_dim=768)
    ),
    "blip_score: BLIP ITM large": lambda: BlipForImageTextRetrieval(
        BlipConfig(text_config={"encoder_hidden_size": 1024}, vision_config=VISION_L | {"image_size": 384})
    ),
    "object_detection: OWLv2 base": lambda: Owlv2ForObjectDetection(
        Owlv2Config(vision_config={"image_size": 960, "patch_size": 16})
    ),
    "llava_bertscore: LLaVA 1.5 7B": lambda: LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=VISION_L | {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14},
            text_config={"model_type": "llama", "vocab_size": 32064},
        )
    ),
    "llava_bertscore: DeBERTa xlarge": lambda: DebertaModel(
        DebertaConfig(
            vocab_size=50265,
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=48,
            num_attention_heads=16,
            relative_attention=True,
            pos_att_type=["c2p", "p2c"],
            max_relative_positions=-1,
            position_biased_input=False,
            type_vocab_size=0,
        )
    ),
}
SPEEDS = {
    "image_reward:zoo/image_reward": 64,
    "object_detection:zoo/detector": 64,
    "statistical_parity:zoo/skin_tone": 64,
    "jpeg_compressibility": 512,
}


def main():
    results = {"cores": os.cpu_count(), "torch": torch.__version__, "parameters": {}, "pictures_per_second": {}}
    for name, make in REAL.items():
        with torch.device("meta"):
            results["parameters"][name] = sum(parameter.numel() for parameter in make().parameters())
    for spec, size in SPEEDS.items():
        name, _, folder = spec.partition(":")
        reward = load_reward(f"{name}:{ROOT / folder}" if folder else name)
        images, prompts = torch.rand(64, 3, size, size, generator=torch.Generator().manual_seed(0)), ["a cat"] * 64
        reward(images[:2], prompts[:2])
        start = time.perf_counter()
        for _ in range(5):
            reward(images, prompts)
        results["pictures_per_second"][f"{spec}, {size} px"] = 5 * 64 / (time.perf_counter() - start)
    (ROOT / "benchmarks/results/rewards.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
