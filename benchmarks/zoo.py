"""What the zoo is worth: judge, reward and base model, as numbers and as a grid.

python -m benchmarks.zoo        writes benchmarks/results/zoo.json and docs/images/zoo_base.png
"""

import json

import numpy as np
import torch
from transformers import AutoImageProcessor, AutoModelForImageClassification

from benchmarks.zoo_eval import ROOT, load_pipeline, measure, pictures, weights_digest
from common.rewards import load_reward
from common.rewards.base import to_pil
from zoo import judge as judging
from zoo import world
from zoo.pretrain import DRIFT, Args, preference_batch, ranking_loss, redraw, to_tensor

RARE = (
    "A green colored rabbit",
    "A cat and a dog",
    "Four wolves in the park",
    "A dog on the moon",
    "A green colored cat",
    "A cat and a cup",
    "Four birds in the park",
    "A lion on the moon",
    "Four roses",
)
COMMON = (
    "a white rabbit",
    "a cat in the park",
    "a brown dog",
    "a red fish",
    "an elephant on the beach",
    "a pink pig",
)
GRID = (*RARE[:4], "Four roses", *COMMON, "a turtle", "a wolf", "two birds", "a lion in the park")
GRID += ("a portrait of a chef",)
HELD_OUT_SEED = 987_654


@torch.no_grad()
def held_out(vae, count: int):
    """Renders, through the VAE, of families of the unbiased world; and their scenes.

    Training never saw them.
    """
    scenes, renders = [], []
    for i in range(count // 4):
        scenes += world.draw_family(np.random.default_rng([HELD_OUT_SEED, i]))
    for i, scene in enumerate(scenes):
        renders.append(world.render(scene, np.random.default_rng([HELD_OUT_SEED, i, 1])))
    decoded = []
    for batch in torch.from_numpy(np.stack(renders)).split(64):
        x = to_tensor(batch.numpy(), "cpu") * 2 - 1
        decoded.append((vae.decode(vae.encode(x).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1))
    return torch.cat(decoded), scenes


def main(count: int = 256):
    pipeline, judge = load_pipeline(), judging.load_judge(ROOT / "zoo/judge")
    reward = load_reward(f"image_reward:{ROOT / 'zoo/image_reward'}")
    results = {"weights": weights_digest(), "samples_per_prompt": count}

    images, scenes = held_out(pipeline.vae, 1600)
    logits, truth, right = judge(images)[0], judging.targets(scenes), {}
    for name, values in truth.items():
        right[name] = (logits[name].argmax(-1) == values)[values >= 0].float().mean().item()
    # The hardest reading of "count": all kinds of a picture at once.
    counted = (logits["count"].argmax(-1) == truth["count"]).all(1)
    right["all counts of a picture"] = counted.float().mean().item()
    prompts = [world.caption(scene) for scene in scenes]
    right["everything in a picture"] = judging.success(judge, images, prompts).mean().item()
    results["judge_accuracy"] = right

    array = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    labels = {name: value.numpy() for name, value in truth.items()}
    drifted = redraw(Args(device="cpu", output_dir=ROOT / "zoo"), array, prompts, *DRIFT)
    families, rng = range(len(array) // 4), np.random.default_rng(0)
    prompts, shown, faults, _ = preference_batch([array], drifted, labels, families, rng)
    scores = [reward(to_tensor(four, "cpu"), [prompt] * 4) for prompt, four in zip(prompts, shown)]
    results["reward_pairs_ordered_rightly"] = ranking_loss(torch.stack(scores), faults)[1].item()

    # Confidence in each kind that is in a picture, and in one that is not.
    detector = load_reward(f"object_detection:{ROOT / 'zoo/detector'}")
    present = torch.nonzero(truth["count"])
    none, generator = (truth["count"] == 0).float(), torch.Generator().manual_seed(0)
    absent = torch.multinomial(none, 1, generator=generator)[:, 0]
    confidence = detector(images[present[:, 0]], [f"a {world.KINDS[k]}" for k in present[:, 1]])
    results["detector_confidence"] = {"present": confidence.mean().item()}
    confidence = detector(images, [f"a {world.KINDS[k]}" for k in absent])
    results["detector_confidence"]["absent"] = confidence.mean().item()
    rows = torch.nonzero(truth["skin_tone"] >= 0)[:, 0]
    processor = AutoImageProcessor.from_pretrained(ROOT / "zoo/skin_tone")
    classifier = AutoModelForImageClassification.from_pretrained(ROOT / "zoo/skin_tone").eval()
    inputs = processor(images=to_pil(images[rows]), return_tensors="pt")
    tones = classifier(**inputs).logits.argmax(-1)
    results["skin_tone_accuracy"] = (tones == truth["skin_tone"][rows]).float().mean().item()

    for name, group in (("rare", RARE), ("common", COMMON)):
        results[name] = {}
        for prompt in group:
            results[name][prompt] = measure(pipeline, judge, reward, prompt, count, seed=1)[0]
            print(prompt, results[name][prompt], flush=True)
    (ROOT / "benchmarks/results/zoo.json").write_text(json.dumps(results, indent=2) + "\n")

    images = pictures(pipeline, [prompt for prompt in GRID for _ in range(4)], seed=2)
    array = (images * 255).round().byte().permute(0, 2, 3, 1).numpy()
    world.to_grid(array, 16).save(ROOT / "docs/images/zoo_base.png")
    print("\n| prompt | success | distance to real renders | reward |\n|---|---|---|---|")
    for prompt, r in (results["rare"] | results["common"]).items():
        print(f"| {prompt} | {r['success']:.0%} | {r['image_quality']:.1f} | {r['reward']:+.2f} |")
    print("\n| judge, held-out renders | right |\n|---|---|")
    for name, share in right.items():
        print(f"| {name} | {share:.1%} |")
    confidence, accuracy = results["detector_confidence"], results["skin_tone_accuracy"]
    print("\ndetector:", confidence, "skin tone:", accuracy)
    ordered = results["reward_pairs_ordered_rightly"]
    print(f"\nreward: {ordered:.1%} of held-out pairs ordered rightly")


if __name__ == "__main__":
    main()
