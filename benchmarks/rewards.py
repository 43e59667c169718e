"""What the rewards cost: parameters at real size; speed and memory on this machine.

Speed and memory are those of the zoo's own, of JPEG, and of tiny models of the real architectures
with random weights (tests/tiny_models.py), made on the spot.

python -m benchmarks.rewards        writes benchmarks/results/rewards.json
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

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

sys.path.append(str(ROOT / "tests"))
from tiny_models import make_bert, make_blip, make_clip, make_detectors, make_hps, make_llava

TEXT_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
}
VISION_L = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
}
TEXT_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
}
VISION_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 16,
    "num_hidden_layers": 32,
    "patch_size": 14,
}
# Sizes of the default weights, from their published configurations.
REAL = {
    "image_reward": lambda: ImageReward(IMAGE_REWARD_CONFIG),
    "clip_score, aesthetic, statistical_parity: CLIP ViT-L/14": lambda: CLIPModel(
        CLIPConfig(
            text_config=TEXT_L,
            vision_config=VISION_L | {"patch_size": 14},
            projection_dim=768,
        )
    ),
    "pick_score, hps_v2: CLIP ViT-H/14": lambda: CLIPModel(
        CLIPConfig(text_config=TEXT_H, vision_config=VISION_H, projection_dim=1024)
    ),
    "blip_score: BLIP ITM large": lambda: BlipForImageTextRetrieval(
        BlipConfig(
            text_config={"encoder_hidden_size": 1024},
            vision_config=VISION_L | {"image_size": 384},
        )
    ),
    "object_detection: OWLv2 base": lambda: Owlv2ForObjectDetection(
        Owlv2Config(vision_config={"image_size": 960, "patch_size": 16})
    ),
    "llava_bertscore: LLaVA 1.5 7B": lambda: LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config={
                **VISION_L,
                "model_type": "clip_vision_model",
                "image_size": 336,
                "patch_size": 14,
            },
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
"""Specs, and the side of the pictures that they are given."""
PICTURES, TIMES = 64, 5


def tiny_specs(folder: Path) -> dict[str, str]:
    """A spec for each reward with a model, on tiny models that are made in `folder`."""
    for name in ("clip", "blip", "hps", "bert", "llava", "detectors"):
        (folder / name).mkdir()
    clip, blip = make_clip(folder / "clip"), make_blip(folder / "blip")
    llava, bert = make_llava(folder / "llava"), make_bert(folder / "bert")
    detectors = make_detectors(folder / "detectors")
    specs = {f"object_detection, {k}": f"object_detection:{v}" for k, v in detectors.items()}
    return specs | {
        "aesthetic": f"aesthetic:{clip}",
        "clip_score": f"clip_score:{clip}",
        "blip_score": f"blip_score:{blip}",
        "pick_score": f"pick_score:{clip}",
        "hps_v2": f"hps_v2:{make_hps(folder / 'hps')}",
        "llava_bertscore": f"llava_bertscore:{llava}?scorer={bert}&layer=2&max_new_tokens=16",
        "statistical_parity": f"statistical_parity:{clip}?labels=a red cat,a green dog",
    }


def resident_mb(key: str) -> float:
    """Memory of this process: VmRSS now, VmHWM at its peak.

    (The peak of getrusage begins with the parent's memory.)
    """
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) / 1000


def measure(spec: str, size: int) -> dict[str, float]:
    """Speed and memory with PICTURES pictures on one thread.

    How many a second of CPU time, which other processes do not take part in, and the process's
    memory before the reward is loaded and at its peak.
    """
    torch.set_num_threads(1)
    images = torch.rand(PICTURES, 3, size, size, generator=torch.Generator().manual_seed(0))
    prompts = ["a cat"] * PICTURES
    before = resident_mb("VmRSS")
    reward = load_reward(spec)
    reward(images, prompts)
    start = time.process_time()
    for _ in range(TIMES):
        reward(images, prompts)
    seconds = time.process_time() - start
    return {
        "pictures_per_cpu_second": TIMES * PICTURES / seconds,
        "mb_before": before,
        "mb_peak": resident_mb("VmHWM"),
    }


def measure_alone(spec: str, size: int) -> dict[str, float]:
    """`measure` in a process of its own, so that a peak is that of one reward."""
    command = [sys.executable, "-m", "benchmarks.rewards", spec, str(size)]
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def main():
    if sys.argv[1:]:
        print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
        return
    results = {"cores": os.cpu_count(), "torch": torch.__version__}
    results |= {"parameters": {}, "measured": {}, "tiny": {}}
    for name, make in REAL.items():
        with torch.device("meta"):
            results["parameters"][name] = sum(p.numel() for p in make().parameters())
    for spec, size in SPEEDS.items():
        results["measured"][f"{spec}, {size} px"] = measure_alone(spec, size)
    with tempfile.TemporaryDirectory() as folder:
        for name, spec in tiny_specs(Path(folder)).items():
            results["tiny"][f"{name}, 64 px"] = measure_alone(spec, 64)
    (ROOT / "benchmarks/results/rewards.json").write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
