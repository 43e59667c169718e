"""Which pictures do people prefer? A page of blind pairs, and the tally of its answers.

`build` writes one HTML file with everything in it: pairs of pictures of the same prompt and the same noise, from two
models, in hidden and shuffled order, with the three questions of Zhang et al. 2024 (arXiv:2401.12244, App. C.2).
Send the page, and keep key.json, which alone knows whose picture is where. `tally` takes it and the answers that the
page saves, and gives for each question how often the second model is preferred, with Wilson's interval:

    k of n decided answers, p = k / n:  (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

Base and a run:          python human_eval.py build zoo --lora runs/A --output-dir study
Two runs:                python human_eval.py build zoo --lora runs/A --lora runs/B --output-dir study
What is drawn already:   python human_eval.py build --evaluation runs/evaluate__… --models base A --output-dir study
Answers:                 python human_eval.py tally study/answers/*.json --key study/key.json

docs/evaluate.md says how to ask, and how answers count.
"""

import base64
import hashlib
import io
import json
import os
import secrets
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import Literal

import numpy as np
import torch.distributed as dist
import tyro
from PIL import Image

import evaluate
from common.cli import check_numbers, fail, parse_args


@dataclass
class BuildArgs:
    evaluation: Path | None = None
    """Output folder of evaluate.py whose pictures to take; without it they are drawn, as --model, --lora ... say."""
    models: tuple[str, ...] = ()
    """The two to compare, of those in --evaluation, as its tables name them; the tally says how the second fares."""
    images_per_prompt: int = 4
    """Pairs of each prompt; of an evaluation the first ones."""
    shuffle_seed: int | None = None
    """Of the order of pairs and sides; by default drawn at random, so that no rater can guess it. key.json has it."""
    model: str = evaluate.Args.model
    """Hub id or local folder in diffusers format: the base."""
    lora: tuple[Path, ...] = ()
    """One run (or safetensors file) to compare with the base, or two to compare with each other."""
    prompt: str = ""
    """The prompt, unless --prompts-file is given."""
    prompts_file: Path | None = None
    """Text file, one prompt a line."""
    micro_batch_size: int = evaluate.Args.micro_batch_size
    """Pictures in one forward pass of a rank. For memory and speed only: never changes the result."""
    num_inference_steps: int = evaluate.Args.num_inference_steps
    """T: DDIM steps of a picture."""
    guidance_scale: float = evaluate.Args.guidance_scale
    """w of classifier-free guidance; 1 or less switches it off."""
    eta: float = evaluate.Args.eta
    """Noise of the DDIM step, as in training."""
    seed: int = 0
    """Seed of the noise; picture i of prompt j is a function of (seed, j, i)."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """What the UNet's forward pass runs in. On CPU fp32 alone."""
    output_dir: Path | None = None
    """Where human_eval.html and key.json go; by default runs/human_eval__TIME."""


@dataclass
class TallyArgs:
    answers: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Files that the page has saved, one a rater."""
    key: Path | None = None
    """key.json of the page; by default looked for beside the answers, and one folder up."""
    output: Path | None = None
    """JSON file for the figures, besides the tables on the screen."""


ZOO = replace(BuildArgs(), **{key: getattr(evaluate.ZOO, key) for key in ("model", "prompts_file", "micro_batch_size")})
ZOO = replace(ZOO, **{key: getattr(evaluate.ZOO, key) for key in ("num_inference_steps", "guidance_scale")})
PRESETS = {"stable-diffusion": BuildArgs(), "zoo": ZOO}
QUESTIONS = {
    "fidelity": "Which picture is drawn better: true to the shape of things, without flaws?",
    "relevance": "Which picture shows better what the text says?",
    "overall": "All in all, which picture would you rather be given for this text?",
}
ANSWERS = {"left": "Left", "right": "Right", "similar": "Similar, or not sure", "not_loaded": "Did not load"}


def build(args: BuildArgs) -> None:
    """Write human_eval.html, the page, and key.json, whose sides are which."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check_numbers(args, {"seed", "shuffle_seed"})
    output_dir = args.output_dir or Path("runs") / f"human_eval__{time.strftime('%Y%m%d-%H%M%S')}"
    if (output_dir / "key.json").exists():
        fail(f"--output-dir {output_dir} holds a page and its key; choose another folder, or answers lose their key")
    if args.evaluation is None:
        folder, names = draw(args, output_dir, world_size)
    else:
        folder, names = args.evaluation, chosen_models(args)
    if rank == 0:
        pairs, pictures = shuffled_pairs(args, folder, names)
        study = hashlib.sha256(json.dumps(pairs).encode())
        for picture in pictures:
            study.update(picture.tobytes())
        key = {"study": study.hexdigest()[:16], "models": names, **pairs}
        output_dir.mkdir(parents=True, exist_ok=True)
        # In the order in which they are shown, and nothing beside the pixels.
        sides = [[as_data_uri(picture) for picture in pictures[2 * i : 2 * i + 2]] for i in range(len(pairs["pairs"]))]
        shown = [{"prompt": pair["prompt"], "left": a, "right": b} for pair, (a, b) in zip(pairs["pairs"], sides)]
        page = {"study": key["study"], "questions": QUESTIONS, "answers": ANSWERS, "pairs": shown}
        # "<" would end the script's element, or begin a comment, where a prompt has it.
        text = PAGE.read_text(encoding="utf-8").replace("STUDY", json.dumps(page).replace("<", "\\u003c"))
        evaluate.write_whole(output_dir / "human_eval.html", text)
        evaluate.write_whole(output_dir / "key.json", json.dumps(key, indent=2) + "\n")
        print(f"send {output_dir / 'human_eval.html'}: {len(shown)} pairs of {names[0]} and {names[1]}")
        print(f"keep {output_dir / 'key.json'}: without it nobody knows whose picture is where")
    if dist.is_initialized():
        dist.destroy_process_group()


def draw(args: BuildArgs, output_dir: Path, world_size: int) -> tuple[Path, list[str]]:
    """Pictures as evaluate.py draws them, into `output_dir`/pictures: that folder, and the two models' names."""
    if args.models:
        fail("--models chooses from --evaluation, which is missing; name runs with --lora")
    if not 1 <= len(args.lora) <= 2:
        fail(f"--lora names {len(args.lora)} runs; name one to compare with the base, or two, or give --evaluation")
    same = {key: value for key, value in vars(args).items() if key in evaluate.Args.__dataclass_fields__}
    same |= {"rewards": (), "output_dir": output_dir / "pictures"}
    prompts, models, folder = evaluate.prepare(evaluate.Args(**same), world_size)
    models = models[-2:]
    evaluate.draw_and_score(evaluate.Args(**same), prompts, models, folder)
    return folder, [model.name for model in models]


def chosen_models(args: BuildArgs) -> list[str]:
    """Two models of --evaluation that have all their pictures."""
    if args.lora:
        fail("--lora and --evaluation are both given; choose models of the evaluation with --models")
    there = evaluate.read_description(args.evaluation)
    if there is None:
        fail(f"--evaluation {args.evaluation} is no output folder of evaluate.py (it has no evaluation.json)")
    names = list(args.models or there["models"])
    if len(set(names)) != 2 or len(names) != 2 or not {*names} <= there["models"].keys():
        fail(f"--models: name two of {', '.join(there['models'])}")
    most = there["settings"]["images_per_prompt"]
    if args.images_per_prompt > most:
        fail(f"--images-per-prompt is {args.images_per_prompt}, and --evaluation {args.evaluation} has {most}")
    for name in names:
        for number in range(len(shards_of(there))):
            if not evaluate.shard_file(args.evaluation, name, number).exists():
                fail(f"--evaluation {args.evaluation} lacks pictures of {name}; run the command of evaluate.py again")
    return names


def shards_of(there: dict) -> list[np.ndarray]:
    """Of an evaluation's description: indices of prompts, shard after shard."""
    settings = there["settings"]
    return evaluate.shards_of(len(settings["prompts"]), settings["images_per_prompt"], settings["shard_size"])


def shuffled_pairs(args: BuildArgs, folder: Path, names: list[str]) -> tuple[dict, list[np.ndarray]]:
    """The pairs in the order of the page, {"shuffle_seed", "pairs": [{"prompt", "image", "left", "right"}]} with the
    models' names, and their pictures, the left before the right one, uint8 (H, W, 3)."""
    there, found = evaluate.read_description(folder), []
    settings = there["settings"]
    for number, shard in enumerate(shards_of(there)):
        both = [evaluate.read_shard(folder, name, number)["images"] for name in names]
        both = [images.reshape(len(shard), settings["images_per_prompt"], *images.shape[1:]) for images in both]
        for row, j in enumerate(shard):
            for i in range(args.images_per_prompt):
                found.append((settings["prompts"][j], i, [images[row, i] for images in both]))
    seed = secrets.randbits(64) if args.shuffle_seed is None else args.shuffle_seed
    rng = np.random.default_rng(seed)
    pairs, pictures = [], []
    # Each model is on the left in half of the pairs.
    for n, swapped in zip(rng.permutation(len(found)), rng.permutation(np.arange(len(found)) % 2)):
        prompt, image, both = found[n]
        left, right = (1, 0) if swapped else (0, 1)
        pairs.append({"prompt": prompt, "image": image, "left": names[left], "right": names[right]})
        pictures += [both[left], both[right]]
    return {"shuffle_seed": seed, "pairs": pairs}, pictures


def as_data_uri(picture: np.ndarray) -> str:
    """A PNG of the pixels alone, uint8 (H, W, 3)."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


PAGE = Path(__file__).parent / "evaluation" / "page.html"


def wilson_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for a share of which k of n were seen (Wilson 1927); (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), k / n
    middle, half = p + z**2 / (2 * n), z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = ((middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    return (0.0 if k == 0 else low), (1.0 if k == n else high)  # exactly, where rounding would leave 1e-17


def read_json(path: Path, flag: str) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        fail(f"{flag} {path}: {error.strerror}; give a file that there is")
    except ValueError:
        content = None
    if not isinstance(content, dict):
        fail(f"{flag} {path} is not a JSON object; give the file as it was saved")
    return content


def read_key(args: TallyArgs) -> dict:
    """The key of the page."""
    folder = args.answers[0].parent
    places = [args.key] if args.key else [folder / "key.json", folder.parent / "key.json"]
    path = next((place for place in places if place.exists()), None) or args.key
    if path is None:
        fail("--key is missing, and there is no key.json beside the answers; name the one that build has written")
    key = read_json(path, "--key")
    if not {"study", "models", "pairs"} <= key.keys():
        fail(f"--key {path} is no key; name the key.json that build has written")
    return key


def read_answers(path: Path, key: dict) -> dict:
    """A rater's file, checked against the key."""
    content = read_json(path, "answers")
    if not {"study", "session", "answers"} <= content.keys() or not isinstance(content["answers"], dict):
        fail(f"answers {path} is no file of answers; name only files that the page has saved")
    if content["study"] != key["study"]:
        fail(f"answers {path} are of another page than the key's; give the key.json that was written with that page")
    for pair, given in content["answers"].items():
        known = pair.isdigit() and int(pair) < len(key["pairs"]) and isinstance(given, dict)
        if not known or not given.keys() <= QUESTIONS.keys() or not {*map(str, given.values())} <= ANSWERS.keys():
            fail(f"answers {path}: pair {pair} is not as the page saves it; give the file as it was saved")
    return content


def verdicts(key: dict, given: dict, question: str) -> list[int | str | None]:
    """A rater's answers to one question, pair after pair: which of the two models is preferred (0 or 1), "similar",
    "not_loaded", or None where there is no answer."""
    out = []
    for n, pair in enumerate(key["pairs"]):
        value = given.get(str(n), {}).get(question)
        out.append(key["models"].index(pair[value]) if value in ("left", "right") else value)
    return out


def rates(found: list[int | str | None], models: list[str]) -> dict:
    """Counts, and the share of the second model among the answers that prefer one, with its 95 % interval."""
    k, n = found.count(1), found.count(0) + found.count(1)
    return {
        "preferred": {name: found.count(which) for which, name in enumerate(models)},
        "similar": found.count("similar"),
        "not_loaded": found.count("not_loaded"),
        "not_answered": found.count(None),
        "preference": k / n if n else None,
        "interval": list(wilson_interval(k, n)),
    }


def majority(votes: list[int | str | None]) -> int | str | None:
    """What several raters say of one pair: the model that more of them prefer; else similar, if any has seen both."""
    if votes.count(0) != votes.count(1):
        return int(votes.count(1) > votes.count(0))
    return next((answer for answer in ("similar", "not_loaded") if answer in votes), "similar" if 0 in votes else None)


def tally(args: TallyArgs) -> None:
    """Print a table of the answers, and one of the raters' majorities if there are several."""
    if not args.answers:
        fail("there are no answers; name the files that the page has saved, e.g. answers/*.json")
    key = read_key(args)
    files = {}
    for path in args.answers:
        content = read_answers(path, key)
        if content["session"] in files:
            fail(f"answers {path} and {files[content['session']][0]} are one rater's; give the later one alone")
        files[content["session"]] = path, content["answers"]
    models, results = key["models"], {"raters": len(files), "pairs": len(key["pairs"]), "answers": {}, "majority": {}}
    for question in QUESTIONS:
        by_rater = [verdicts(key, given, question) for _, given in files.values()]
        results["answers"][question] = rates([verdict for found in by_rater for verdict in found], models)
        results["majority"][question] = rates([majority(list(votes)) for votes in zip(*by_rater)], models)
    print(f"{len(files)} raters, {len(key['pairs'])} pairs of {models[0]} and {models[1]}\n")
    print(table("answer", results["answers"], models))
    if len(files) > 1:
        print(table("pair, by majority", results["majority"], models))
    if args.output:
        evaluate.write_whole(args.output, json.dumps(results | {"models": models}, indent=2) + "\n")


def table(of: str, results: dict[str, dict], models: list[str]) -> str:
    """Markdown, a line a question."""
    names = [name.replace("|", "\\|") for name in models]
    lines = [f"| each {of} | {names[0]} | {names[1]} | similar | did not load | not answered | {names[1]} preferred |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for question, found in results.items():
        counts = [*found["preferred"].values(), *(found[k] for k in ("similar", "not_loaded", "not_answered"))]
        low, high = found["interval"]
        rate = "–" if found["preference"] is None else f"{found['preference']:.0%} ({low:.0%} to {high:.0%})"
        lines.append(f"| {question} | {' | '.join(map(str, counts))} | {rate} |")
    return "\n".join(lines) + "\n"


def main():
    what, *words = sys.argv[1:] or ["--help"]
    if what == "build":
        build(parse_args(PRESETS, __doc__, words))
    elif what == "tally":
        tally(tyro.cli(TallyArgs, args=words, description=__doc__, prog="human_eval.py tally"))
    elif what in ("-h", "--help"):
        print(f"{__doc__}\nbuild --help and tally --help explain every flag.")
    else:
        fail(f"{what!r} is neither build nor tally; begin with one of them")


if __name__ == "__main__":
    main()
