"""Is my LoRA better, and at what price? The base model and fine-tuned ones, compared on the same prompts and noise.

For every prompt the base and each --lora draw pictures from the same seeds, so that picture i of a prompt begins with
the same noise whoever draws it. Per reward, prompt and model, N pictures each:

    mean, standard error s / sqrt(N);  gain: mean and standard error of the differences r_i - r_i(base)
    win rate over the base: share of the pairs i with r_i > r_i(base), ties counting half

and what tells a better model from one that has found a hole in its reward: rewards that it was not trained on, the KL
to the pretrained model (DPOK, arXiv:2305.16381, Eq. 7, in nats), the diversity of a prompt's pictures, and on the zoo
what its judge says.

A laptop, two minutes:    python evaluate.py zoo --lora runs/A --lora runs/B
One GPU, SD v1.5:         python evaluate.py --lora runs/A --prompts-file FILE --rewards image_reward aesthetic
Eight GPUs:               torchrun --nproc_per_node=8 evaluate.py --lora runs/A --prompts-file FILE

The same command goes on where it was stopped. docs/evaluate.md explains every column, and human_eval.py asks people.
"""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from diffusers import DDIMScheduler
from tqdm import tqdm

from common.cli import (
    check_dtype,
    check_model,
    check_numbers,
    fail,
    load_pipeline,
    load_reward_or_fail,
    parse_args,
    read_prompts,
    warn_of_prompts,
)
from common.rewards import RewardError, check_spec
from common.run_folder import run_name
from common.scheduler import ddim_step_kl, ddim_step_with_logprob
from common.stop import end_run, join_ranks
from dpok import decode, encode_prompts, guided_noise, sample, seeded
from evaluation.models import BASE, Model, finetuned, read_models, was_trained_on
from evaluation.sheet import comparison
from evaluation.statistics import compare, diversity, mean_and_error


@dataclass
class Args:
    model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    """Hub id or local folder in diffusers format: the base, which the LoRAs were trained on."""
    lora: tuple[Path, ...] = ()
    """What to compare with it: folders of runs, or safetensors files of LoRAs; the flag may be repeated."""
    prompt: str = ""
    """The prompt, unless --prompts-file is given."""
    prompts_file: Path | None = None
    """Text file, one prompt a line; every one of them is drawn."""
    rewards: tuple[str, ...] = ("image_reward", "aesthetic")
    """Rewards, each as in docs/rewards.md; those that a run was not trained on tell whether it has got better."""
    images_per_prompt: int = 30
    """N: pictures of a prompt, for each model."""
    micro_batch_size: int = 8
    """Pictures in one forward pass of a rank. For memory and speed only: never changes the result."""
    shard_size: int = 64
    """About how many pictures are drawn, scored and then stored at once, all ranks together; whole prompts."""
    num_inference_steps: int = 50
    """T: DDIM steps of a picture."""
    guidance_scale: float = 7.5
    """w of classifier-free guidance; 1 or less switches it off."""
    eta: float = 1.0
    """Noise of the DDIM step, as in training: 1 is the DDPM; 0 is deterministic and has no KL."""
    seed: int = 0
    """Seed of the noise; picture i of prompt j is a function of (seed, j, i)."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """What the UNet's forward pass runs in; all else is float32. On CPU fp32 alone."""
    shown_prompts: int = 8
    """Prompts in comparison.png, the first ones."""
    shown_images: int = 8
    """Pictures of each prompt in comparison.png, its columns."""
    output_dir: Path | None = None
    """Where the results go, and where a stopped evaluation goes on; by default runs/evaluate__TAG__SEED__DIGEST, the
    digest being of all that the figures depend on."""


ZOO = replace(Args(), model="zoo/sd", prompts_file=Path("prompts/dpok_and_unseen.txt"))
ZOO = replace(ZOO, rewards=("image_reward:zoo/image_reward",), num_inference_steps=12, guidance_scale=1.5)
ZOO = replace(ZOO, micro_batch_size=16)
PRESETS = {"stable-diffusion": Args(), "zoo": ZOO}


@torch.no_grad()
def kl_to_pretrained(args: Args, unet, scheduler, text, no_text, noise, trajectory, stds) -> torch.Tensor:
    """KL of a sampled chain to the pretrained model's in nats, (B,): the sum over its steps of the exact KL (Eq. 7).

    unet is the pretrained one; text (B, L, D), noise and trajectory (B, T+1, C, H, W) and stds (T,) are what `sample`
    took and gave.
    """
    total = torch.zeros(len(trajectory), device=trajectory.device)
    for j, t in enumerate(scheduler.timesteps.to(trajectory.device)):
        timesteps, x_t, x_prev = t.expand(len(trajectory)), trajectory[:, j], trajectory[:, j + 1]
        pre_noise = guided_noise(args, unet, x_t, timesteps, text, no_text)
        pre = ddim_step_with_logprob(scheduler, pre_noise, timesteps, x_t, args.eta, prev_sample=x_prev)
        mean = x_prev - stds[j] * noise[:, j + 1]  # of the model that has drawn x_prev: no need to run it again
        total += ddim_step_kl(mean, pre.mean, pre.std) * x_t[0].numel()
    return total


def prepare(args: Args, world_size: int) -> tuple[list[str], list[Model], Path]:
    """Refuse what cannot work before anything slow is loaded; returns the prompts, the models and the output folder."""
    check_numbers(args, {"seed"})
    check_dtype(args.dtype)
    for spec in args.rewards:
        try:
            check_spec(spec)
        except RewardError as error:
            fail(f"--rewards: {error}")
        if "statistical_parity" in spec and args.images_per_prompt < 2:
            fail(f"--images-per-prompt is {args.images_per_prompt}, and {spec} needs several pictures of a prompt")
    check_model(args.model)
    prompts, models = list(dict.fromkeys(read_prompts(args))), read_models(args)
    fewest = (
        min(len(shard) for shard in shards_of(len(prompts), args.images_per_prompt, args.shard_size))
        * args.images_per_prompt
    )
    if fewest < world_size:
        fail(f"--images-per-prompt: {fewest} pictures are less than the {world_size} processes; raise it")

    new, folder = describe(args, prompts, models), args.output_dir
    if folder is None:
        name = run_name(__file__, args).rpartition("__")[0]
        everything = json.dumps([new, sorted(args.rewards)]).encode()
        folder = Path("runs") / f"{name}__{hashlib.sha256(everything).hexdigest()[:8]}"
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "evaluation.json").exists():
        fail(f"--output-dir {folder} holds something else than an evaluation; choose another folder")
    there = read_description(folder)
    differ = [key for key in new["settings"] if there and there["settings"].get(key) != new["settings"][key]]
    if differ:
        flags = ", ".join("--prompts-file" if key == "prompts" else f"--{key.replace('_', '-')}" for key in differ)
        fail(
            f"--output-dir {folder} holds an evaluation with other {flags}; choose another folder or the same settings"
        )
    for name, digest in new["models"].items():
        if there and there["models"].get(name, digest) != digest:
            fail(f"--lora: --output-dir {folder} has pictures of other weights named {name}; choose another folder")
    return prompts, models, folder


def describe(args: Args, prompts: list[str], models: list[Model]) -> dict:
    """What stored pictures depend on; an evaluation may go on with more rewards and more models, no other changes."""
    keys = ("model", "images_per_prompt", "shard_size", "num_inference_steps", "guidance_scale", "eta", "seed", "dtype")
    settings = {"prompts": prompts} | {key: getattr(args, key) for key in keys}
    return {"settings": settings, "models": {model.name: model.digest for model in models}}


def read_description(folder: Path) -> dict | None:
    """`describe` of the evaluation in `folder`, with all models that were ever in it; None where there is none."""
    file = folder / "evaluation.json"
    return json.loads(file.read_text()) if file.exists() else None


def write_whole(path: Path, content: str | dict[str, np.ndarray]) -> None:
    """Text, or arrays as .npz: under another name until it is all there."""
    partial = path.with_name(path.name + ".partial")
    if isinstance(content, str):
        partial.write_text(content)
    else:
        with open(partial, "wb") as file:
            np.savez(file, **content)
    partial.replace(path)


def shards_of(num_prompts: int, images_per_prompt: int, shard_size: int) -> list[np.ndarray]:
    """Indices of the prompts, in runs of about shard_size pictures: the same however many ranks there are."""
    count = max(1, num_prompts * images_per_prompt // shard_size)
    return np.array_split(np.arange(num_prompts), min(count, num_prompts))


def shard_file(folder: Path, model: str, shard: int) -> Path:
    return folder / "samples" / model / f"{shard:05d}.npz"


def read_shard(folder: Path, model: str, shard: int) -> dict[str, np.ndarray]:
    """Pictures of whole prompts, prompt after prompt: "images" uint8 (n, H, W, 3), "kl" (n,) in nats, and a reward's
    scores (n,) under its spec. {} when they have not been drawn."""
    file = shard_file(folder, model, shard)
    if not file.exists():
        return {}
    with np.load(file) as stored:
        return dict(stored)


def draw_and_score(args: Args, prompts: list[str], models: list[Model], folder: Path) -> None:
    """Pictures, KL and scores of all models into `folder`/samples, shard by shard; what is there already stays.

    Collective under torchrun, where rank 0 alone reads and writes.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
    pipeline = load_pipeline(args.model)
    base = pipeline.unet.to(device, dtype, memory_format=torch.channels_last).eval().requires_grad_(False)

    def unet_of(model: Model) -> torch.nn.Module:
        try:
            return finetuned(base, model.path) if model.path else base
        except Exception as error:  # ValueError, and what diffusers raises for a folder that it cannot read
            fail(f"--lora {model.path}: {str(error)[:300]}; give a run on --model {args.model}")

    for model in models:
        unet_of(model)  # before anything slow
    rewards = {spec: load_reward_or_fail(spec, device, prompts, "--rewards") for spec in args.rewards}
    if world_size > 1:
        join_ranks(device)
    vae = pipeline.vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    pipeline.text_encoder.to(device).eval().requires_grad_(False)
    no_text, _ = encode_prompts(pipeline, [""], device)
    warn_of_prompts(pipeline, prompts)
    # DDIMScheduler would clip latents to [-1, 1] where a model's configuration does not speak of it.
    config = pipeline.scheduler.config
    scheduler = DDIMScheduler.from_config(config, clip_sample=config.get("clip_sample", False))
    scheduler.set_timesteps(args.num_inference_steps)
    latent_shape = (base.config.in_channels, base.config.sample_size, base.config.sample_size)

    def gathered(share):
        """What all ranks have of a shard, in its order."""
        shares = [share]
        if world_size > 1:
            shares = [None] * world_size
            dist.all_gather_object(shares, share)
        return np.concatenate(shares)

    N = args.images_per_prompt
    shards = shards_of(len(prompts), N, args.shard_size)
    total = len(models) * len(prompts) * N
    if rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        there, new = read_description(folder), describe(args, prompts, models)
        new["models"] = (there["models"] if there else {}) | new["models"]
        write_whole(folder / "evaluation.json", json.dumps(new, indent=2) + "\n")
    progress = tqdm(total=total, disable=rank > 0, desc=Path(__file__).stem, unit="picture")
    for model in models:
        unet = unet_of(model)
        for number, shard in enumerate(shards):
            stored = [read_shard(folder, model.name, number) if rank == 0 else None]
            if world_size > 1:
                dist.broadcast_object_list(stored)  # the other ranks may not see the folder
            stored, before = stored[0], len(stored[0])
            pictures = [(j, i) for j in shard.tolist() for i in range(N)]
            start, stop = np.linspace(0, len(pictures), world_size + 1).astype(int)[rank : rank + 2]
            own = pictures[start:stop]
            asked = [prompts[j] for j, _ in own]
            if "images" not in stored:
                images, kl = [], []
                for k in range(0, len(own), args.micro_batch_size):
                    rows = own[k : k + args.micro_batch_size]
                    # 4: apart from the noise of training. The same for every model.
                    generators = [seeded(args.seed, 4, j, i) for j, i in rows]
                    shape = (args.num_inference_steps + 1, *latent_shape)
                    noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
                    text, _ = encode_prompts(pipeline, [prompts[j] for j, _ in rows], device)
                    trajectory, _, stds = sample(args, unet, scheduler, text, no_text, noise)
                    drawn = (decode(vae, trajectory[:, -1]) * 255).round().byte()
                    images.append(drawn.permute(0, 2, 3, 1).cpu().numpy())
                    if model.path and args.eta > 0:
                        of_chain = (args, base, scheduler, text, no_text, noise, trajectory, stds)
                        kl.append(kl_to_pretrained(*of_chain).cpu().numpy())
                    progress.update(min(len(rows) * world_size, total - progress.n))
                stored["images"] = gathered(np.concatenate(images))
                if kl:
                    stored["kl"] = gathered(np.concatenate(kl))
            else:
                progress.update(len(pictures))
            # Scores are of the pictures as they are stored, so that a reward may be added later.
            floats = torch.from_numpy(stored["images"][start:stop]).to(device).permute(0, 3, 1, 2).float() / 255
            for spec, reward in rewards.items():
                if spec not in stored:
                    try:
                        stored[spec] = gathered(reward(floats, asked).cpu().numpy())
                    except RewardError as error:
                        end_run(f"{error}; the evaluation so far is in {folder}")
            if rank == 0 and len(stored) > before:
                shard_file(folder, model.name, number).parent.mkdir(parents=True, exist_ok=True)
                write_whole(shard_file(folder, model.name, number), stored)
    progress.close()


def report(args: Args, prompts: list[str], models: list[Model], folder: Path) -> str:
    """Write results.json, table.md and comparison.png from the samples in `folder`; returns the table of all prompts
    together. For rank 0."""
    N, specs = args.images_per_prompt, args.rewards
    shards = shards_of(len(prompts), N, args.shard_size)
    judge, results, values, shown = load_zoo_judge(args.model), {}, {}, {}
    for model in models:
        scores, of_prompts, drawn = {}, [], []
        for number, shard in enumerate(shards):
            stored = read_shard(folder, model.name, number)
            for key in stored.keys() & {"kl", *specs}:
                scores.setdefault(key, []).append(stored[key].reshape(len(shard), N))
            for j, images in zip(shard.tolist(), np.split(stored["images"], len(shard))):
                floats = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
                of_prompts.append({"diversity": diversity(floats.flatten(1))})
                if judge:
                    of_prompts[-1] |= {"diversity_judge": diversity(judge[0](floats)[1])}
                    of_prompts[-1] |= {"image_quality": image_quality(*judge, floats)}
                    scores.setdefault("success", []).append(success(judge[0], floats, prompts[j]))
                    drawn.append(floats)
                if j < args.shown_prompts:
                    shown[model.name, j] = images[: args.shown_images]
        own = values[model.name] = {key: np.concatenate(parts) for key, parts in scores.items()}
        base = values[BASE] if model.path else {}

        def figures_of(rows: slice) -> dict:
            figures = {"rewards": {}}
            for spec in specs:
                of_a_set = "statistical_parity" in spec
                figures["rewards"][spec] = compare(own[spec][rows], base[spec][rows] if base else None, of_a_set)
            kl = mean_and_error(own["kl"][rows]) if "kl" in own else (None if args.eta == 0 else 0.0, None)
            figures["kl"] = dict(zip(("mean", "standard_error"), kl))
            if judge:
                known = ~np.isnan(own["success"][rows]).any(axis=1)  # prompts that the judge can read
                pair = [of["success"][rows][known] if of else None for of in (own, base)]
                figures["success"] = compare(*pair) if known.any() else None
            return figures

        in_all = figures_of(slice(None))
        for key in of_prompts[0]:
            known = [figures[key] for figures in of_prompts if figures[key] is not None]
            in_all[key] = float(np.mean(known)) if known else None
        if judge:  # of all pictures together
            in_all["image_quality"] = image_quality(*judge, torch.cat(drawn))
        results[model.name] = {
            "path": str(model.path) if model.path else None,
            "sha256": model.digest or None,
            "trained_on": {spec: was_trained_on(model, spec) for spec in specs} if model.path else None,
            "all": in_all,
            "prompts": {prompt: figures_of(slice(j, j + 1)) | of_prompts[j] for j, prompt in enumerate(prompts)},
        }

    settings = describe(args, prompts, models)["settings"] | {"rewards": specs}
    write_whole(folder / "results.json", json.dumps({"settings": settings, "models": results}, indent=2) + "\n")
    comparison(shown, prompts, [model.name for model in models]).save(folder / "comparison.png")
    in_all = markdown_table([(None, name, result["all"]) for name, result in results.items()], specs, models)
    lines = [(prompt, name, result["prompts"][prompt]) for prompt in prompts for name, result in results.items()]
    head = f"{len(prompts)} prompts with {N} pictures each, {args.num_inference_steps} steps, "
    head += f"guidance {args.guidance_scale:g}, eta {args.eta:g}, seed {args.seed}; ± is a standard error"
    head = f"# {args.model} and what was made of it\n\n{head}. docs/evaluate.md explains the columns.\n"
    text = f"{head}\n## In all\n\n{in_all}\n## Prompt by prompt\n\n{markdown_table(lines, specs, models)}"
    write_whole(folder / "table.md", text)
    return in_all


def load_zoo_judge(model: str) -> tuple[torch.nn.Module, torch.nn.Module] | None:
    """The judge that lies beside the zoo's model, and the model's VAE; None for another model."""
    folder = Path(model).resolve().parent / "judge"
    if not (folder / "model.safetensors").is_file():
        return None
    from zoo.judge import load_judge

    return load_judge(folder), load_pipeline(model).vae.eval().requires_grad_(False)


def success(judge: torch.nn.Module, images: torch.Tensor, prompt: str) -> np.ndarray:
    """Of a prompt's pictures (N, 3, H, W) in [0, 1], (1, N): 1 where the judge finds all that the prompt asks for, else
    0; NaN where it cannot read the prompt."""
    from zoo import judge as judging

    try:
        return judging.success(judge, images, [prompt] * len(images)).numpy()[None]
    except ValueError:
        return np.full((1, len(images)), np.nan)


def image_quality(judge: torch.nn.Module, vae: torch.nn.Module, images: torch.Tensor) -> float | None:
    """Distance of pictures (N, 3, H, W) to real renders (docs/zoo.md), lower is better; None for N = 1."""
    from zoo import judge as judging

    return judging.image_quality(judge, vae, images) if len(images) > 1 else None


def markdown_table(rows: list[tuple[str | None, str, dict]], specs: tuple[str, ...], models: list[Model]) -> str:
    """Of (prompt or None, model's name, figures): a line each."""

    def cell(figure: dict | float | None, key: str = "mean", sign: str = "") -> str:
        if not isinstance(figure, dict):
            figure = {key: figure}
        error = figure.get({"mean": "standard_error"}.get(key, f"{key}_standard_error"))
        value = figure.get(key)
        return "–" if value is None else f"{value:{sign}.3f}" + ("" if error is None else f" ± {error:.3f}")

    header = ["prompt"] * (rows[0][0] is not None) + ["model"]
    for spec in specs:
        header += [f"`{spec}`{who_was_trained_on(spec, models)}", "gain", "wins"]
    signs = {"kl": "KL, nats", "diversity": "diversity", "diversity_judge": "diversity, judge"}
    signs |= {"success": "success", "image_quality": "distance to renders"}
    signs = {key: title for key, title in signs.items() if key in rows[0][2]}
    lines = [[*header, *signs.values()]]
    for prompt, name, figures in rows:
        line = [name] if prompt is None else [prompt, name]
        for spec in specs:
            figure = figures["rewards"][spec]
            wins = figure.get("win_rate")
            line += [cell(figure, sign="+"), cell(figure, "gain", "+"), "–" if wins is None else f"{wins:.0%}"]
        line += [cell(figures[key]) for key in signs]
        lines.append(line)
    lines = [[str(part).replace("|", "\\|") for part in line] for line in lines]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def who_was_trained_on(spec: str, models: list[Model]) -> str:
    """What the head of a reward's column says: " (held out)", " (trained on)", or which models were."""
    trained = {model.name: was_trained_on(model, spec) for model in models if model.path}
    words = {True: "trained on", False: "held out", None: "not known if trained on"}
    if len(set(trained.values())) < 2:
        return "".join(f" ({words[was]})" for was in set(trained.values()))
    return f" ({', '.join(f'{name}: {words[was]}' for name, was in trained.items())})"


def main():
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args = parse_args(PRESETS, __doc__)
    prompts, models, folder = prepare(args, world_size)
    draw_and_score(args, prompts, models, folder)
    if rank == 0:
        print(report(args, prompts, models, folder))
        print(f"the tables, the figures and the pictures are in {folder}")
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
