"""Make the zoo from nothing: tokenizer, VAE, text encoder and UNet, judge, rewards.

    python -m zoo.pretrain                      # everything, into the folders of zoo/
    python -m zoo.pretrain --stages vae unet    # some of it
    python -m zoo.pretrain --device cuda

Stages that train keep a checkpoint in --build-dir and continue from it; a finished one is skipped
until its checkpoint is deleted, as are the data. What lies between, tokenizer, latents and pictures
that were passed through the model, is made again. Data and batches are functions of --seed, so a
run that is stopped and continued sees what an undisturbed one sees.
"""

import copy
import json
import math
import multiprocessing
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import (
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from common.lora import add_lora
from common.rewards import load_reward
from common.rewards.image_reward import ImageReward
from common.rewards.pixels import CLIP_MEAN, CLIP_STD
from zoo import judge as judging
from zoo import world

Stage = Literal[
    "tokenizer",
    "data",
    "vae",
    "latents",
    "unet",
    "passed",
    "redrawn",
    "drifted",
    "judge",
    "image_reward",
    "standardise",
    "detector",
    "skin_tone",
]
STAGES: tuple[Stage, ...] = Stage.__args__
MAX_LENGTH = 24
"""Tokens of a prompt, start and end included."""
UNET_BATCH = 32
NUM_INFERENCE_STEPS, GUIDANCE_SCALE = 12, 1.5
"""How the zoo's base model is sampled when it is measured, and by the scripts' zoo presets."""


@dataclass
class Args:
    stages: tuple[Stage, ...] = STAGES
    """What to make, in this order."""
    output_dir: Path = Path("zoo")
    """Where the folders sd, judge, image_reward, detector and skin_tone go."""
    build_dir: Path = Path("zoo/build")
    """Where rendered data and checkpoints are kept."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Torch device."""
    seed: int = 0
    """Seed of data, initial weights and batches."""
    num_pictures: int = 96_000
    """Size of the biased data set that the diffusion model is trained on."""
    num_unbiased: int = 32_000
    """Pictures of the unbiased world, for VAE, judge and reward."""
    vae_steps: int = 3600
    """Optimizer steps of the VAE, on 32 crops of 32 px each."""
    vae_whole_steps: int = 3000
    """Optimizer steps of the VAE after that, on 16 whole pictures each."""
    text_steps: int = 500
    """Optimizer steps of the text encoder's pre-training, on 256 captions each."""
    unet_steps: int = 12_000
    """Optimizer steps of text encoder and UNet together, on 32 pictures each."""
    judge_steps: int = 4000
    """Optimizer steps of the judge, on 64 pictures each."""
    reward_vision_steps: int = 4000
    """Optimizer steps of the reward's vision encoder on what is in a picture, 64 pictures each."""
    reward_words_steps: int = 1000
    """Optimizer steps of the reward's text encoder on words for things, on 128 pictures each."""
    reward_steps: int = 5000
    """Optimizer steps of the whole reward, on 16 prompts with 4 pictures each."""
    classifier_steps: int = 3000
    """Optimizer steps of detector and skin-tone classifier, on 64 pictures each."""
    standardise_samples: int = 512
    """Samples of the base model over which the reward's mean is 0 and its standard deviation 1."""


def _render_one(task: tuple[int, int, bool]) -> tuple[np.ndarray, world.Scene, str, np.ndarray]:
    seed, index, biased = task
    if biased:
        rng = np.random.default_rng([seed, index])
        scene, text = world.draw_pair(rng)
    else:
        scene = world.draw_family(np.random.default_rng([seed, index // 4]))[index % 4]
        rng = np.random.default_rng([seed, index, 1])
        text = world.caption(scene)
    where = judging.kind_map(world.layout(scene, copy.deepcopy(rng)))
    return world.render(scene, rng), scene, text, where


def make_data(args: Args):
    """The biased data set, and the unbiased one: families of four scenes (world.draw_family)."""
    for name, biased, count in (
        ("biased", True, args.num_pictures),
        ("unbiased", False, args.num_unbiased),
    ):
        if (args.build_dir / f"{name}.npz").exists():
            continue
        tasks = [(args.seed * 1000 + (1 if biased else 2), i, biased) for i in range(count)]
        with multiprocessing.get_context("fork").Pool() as pool:
            results = pool.imap(_render_one, tasks, chunksize=256)
            results = list(tqdm(results, total=count, desc=f"render {name}"))
        images, scenes, captions, where = zip(*results)
        targets = judging.targets(scenes)
        labels = {key: value.numpy().astype(np.int16) for key, value in targets.items()}
        np.save(args.build_dir / f"{name}.npy", np.stack(images))
        np.savez(args.build_dir / f"{name}.npz", captions=captions, where=np.stack(where), **labels)


def to_tensor(images: np.ndarray, device: str) -> torch.Tensor:
    """uint8 (N, H, W, 3) to float32 (N, 3, H, W) in [0, 1]."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).contiguous().float() / 255


def fit(
    args: Args,
    name: str,
    modules: dict[str, torch.nn.Module],
    loss_fn,
    steps: int,
    lr: float,
    ema: float = 0.0,
):
    """AdamW with a warm-up and cosine decay.

    Checkpoints, resumes, and leaves the (averaged) weights in `modules`. loss_fn(step, generator)
    returns a scalar loss and a dict of numbers to show.
    """
    path = args.build_dir / f"{name}.pt"
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01)
    average = [p.detach().clone() for p in parameters]
    start, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, map_location=args.device, weights_only=True)
        for key, module in modules.items():
            module.load_state_dict(state["modules"][key])
        optimizer.load_state_dict(state["optimizer"])
        average, start, spent = state["average"], state["step"], state["seconds"]

    def save(step):
        state = {
            "modules": {key: module.state_dict() for key, module in modules.items()},
            "optimizer": optimizer.state_dict(),
            "average": average,
            "step": step,
            "seconds": spent,
        }
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    progress = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5)
    clock = time.time()
    for step in progress:
        warm_up = min(1.0, (step + 1) / 100)
        decay = 0.51 + 0.49 * math.cos(math.pi * (step / steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * warm_up * decay
        generator = torch.Generator(args.device).manual_seed(args.seed * 10**6 + step)
        loss, shown = loss_fn(step, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        kept = min(ema, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - kept)
        if step % 25 == 0:
            shown = {key: f"{value:.3f}" for key, value in shown.items()}
            progress.set_postfix({"loss": f"{loss.item():.4f}", **shown})
        if step % 100 == 99 or step == steps - 1:
            spent, clock = spent + time.time() - clock, time.time()
            save(step + 1)
    for p, a in zip(parameters, average):
        p.data.copy_(a)
    print(f"{name}: {steps} steps in {spent / 60:.1f} minutes")


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=world.SIZE,
        mid_block_add_attention=False,
    )


def train_vae(args: Args):
    """A VAE with f = 4, trained on crops and then on whole pictures.

    Random crops of 32 px first: they cost a third of whole pictures, and small animals keep their
    colours. Then whole pictures, whose statistics in the group norms are not those of crops: large
    areas lose their tints.

    The weight of the KL leaves the latents 2.5 nats a number, where a twentieth of it leaves 5.5
    for equal pictures: so much less for the diffusion model to predict, and a decoder that forgives
    it small errors.
    """
    images = np.load(args.build_dir / "unbiased.npy")
    torch.manual_seed(args.seed)
    vae = make_vae().to(args.device, memory_format=torch.channels_last)

    def reconstruction_loss(pictures, generator):
        x = to_tensor(pictures, args.device).contiguous(memory_format=torch.channels_last) * 2 - 1
        mean, logvar = vae.quant_conv(vae.encoder(x)).chunk(2, dim=1)
        logvar = logvar.clamp(-30, 20)
        noise = torch.randn(mean.shape, generator=generator, device=args.device)
        y = vae.decoder(vae.post_quant_conv(mean + torch.exp(0.5 * logvar) * noise))
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        l1 = (y - x).abs().mean()
        return l1 + F.mse_loss(y, x) + 2e-3 * kl, {"l1": l1.item(), "kl": kl.item()}

    def crops_loss(step, generator):
        rng = np.random.default_rng([args.seed, step])
        # Most crops lie where the things are.
        corners = rng.integers((0, 0), (33, 33), (32, 2))
        corners[:24, 0] = rng.integers(6, 30, 24)
        rows = rng.choice(len(images), 32)
        crops = [images[i, y : y + 32, x : x + 32] for i, (y, x) in zip(rows, corners)]
        return reconstruction_loss(np.stack(crops), generator)

    def whole_loss(step, generator):
        rows = np.random.default_rng([args.seed, step, 7]).choice(len(images), 16)
        return reconstruction_loss(images[rows], generator)

    fit(args, "vae_crops", {"vae": vae}, crops_loss, args.vae_steps, lr=2e-3, ema=0.99)
    fit(args, "vae", {"vae": vae}, whole_loss, args.vae_whole_steps, lr=1e-3, ema=0.995)
    vae = vae.to(memory_format=torch.contiguous_format).eval()
    images = np.load(args.build_dir / "biased.npy", mmap_mode="r")[:512]
    with torch.no_grad():
        latents = vae.encode(to_tensor(images, args.device) * 2 - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.save_pretrained(args.output_dir / "sd" / "vae")


def make_tokenizer(args: Args) -> CLIPTokenizer:
    """CLIP's own byte-level BPE, with merges that make every word of the world one token."""
    folder = args.output_dir / "sd" / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [*bytes_to_unicode().values()]
    tokens += [token + "</w>" for token in tokens]
    merges: list[tuple[str, str]] = []
    for word in world.vocabulary():
        # Merge by the rules so far, then add rules until the word is one token. A later rule has a
        # lower priority, so it cannot split a word that was complete before.
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pairs = list(zip(pieces, pieces[1:]))
            known = [merges.index(pair) for pair in pairs if pair in merges]
            if not known:
                merges.append(pairs[0])
                tokens.append("".join(pairs[0]))
            at = pairs.index(merges[min(known)] if known else pairs[0])
            pieces[at : at + 2] = ["".join(pairs[at])]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    numbers = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(numbers, ensure_ascii=False))
    rules = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(rules) + "\n")
    special = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2))
    config = {
        **special,
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": MAX_LENGTH,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return CLIPTokenizer.from_pretrained(folder)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    return tokenizer(
        texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def load_vae(args: Args) -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(args.output_dir / "sd" / "vae").eval().requires_grad_(False)
    return vae.to(args.device, memory_format=torch.channels_last)


def decoded(vae: AutoencoderKL, latents: torch.Tensor) -> np.ndarray:
    """Pictures (B, 64, 64, 3) uint8 of unscaled latents."""
    images = (vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def make_latents(args: Args):
    """Encode the biased data set once.

    What is kept is the mean of the VAE's posterior, scaled as Stable Diffusion scales it.
    """
    vae = load_vae(args)
    images = np.load(args.build_dir / "biased.npy", mmap_mode="r")[: args.num_pictures]
    latents = []
    with torch.no_grad():
        for i in tqdm(range(0, len(images), 64), desc="encode"):
            x = to_tensor(images[i : i + 64], args.device)
            x = x.contiguous(memory_format=torch.channels_last)
            mean = vae.encode(x * 2 - 1).latent_dist.mean
            latents.append((mean * vae.config.scaling_factor).half().cpu())
    np.save(args.build_dir / "latents.npy", torch.cat(latents).numpy())


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=96,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def make_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=world.SIZE // 4,
        block_out_channels=(32, 96, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def pretrain_text_encoder(
    args: Args, text_encoder: CLIPTextModel, captions: list[str], tokens: torch.Tensor
):
    """Stable Diffusion has CLIP's pre-training: here the last token learns what a caption asks."""
    truth = judging.targets([world.parse(caption) for caption in captions])
    heads = judging.attribute_heads(text_encoder.config.hidden_size).to(args.device)

    def loss_fn(step, generator):
        rows = np.random.default_rng([args.seed, step, 6]).choice(len(tokens), 256)
        hidden = text_encoder(tokens[rows].to(args.device))[0][:, -1]
        named = {name: value[rows].to(args.device) for name, value in truth.items()}
        return judging.attribute_loss(judging.attribute_logits(heads, hidden), named), {}

    trained = {"text": text_encoder, "heads": heads}
    fit(args, "text_encoder", trained, loss_fn, args.text_steps, lr=1e-3)


def train_unet(args: Args):
    """Text encoder and UNet together, 10 % of the captions dropped for classifier-free guidance.

    The target is v, as in Stable Diffusion 2: layout and colour are settled where noise prevails,
    and there the error of a predicted noise is small while that of the picture it implies is large.
    """
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        # With Stable Diffusion's own spacing the last step but one has a tiny sigma: its log-prob
        # has a gradient some twenty times that of the steps that settle what is drawn, and drowns
        # them. Here the last step has none.
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    tokenizer = make_tokenizer(args)
    torch.manual_seed(args.seed)
    text_encoder = make_text_encoder(tokenizer).to(args.device)
    unet = make_unet().to(args.device, memory_format=torch.channels_last)
    latents = torch.from_numpy(np.load(args.build_dir / "latents.npy"))
    captions = np.load(args.build_dir / "biased.npz")["captions"][: len(latents)].tolist()
    # A trailing dot must not matter, so a quarter of the captions has one.
    texts = [caption + "." if i % 4 == 0 else caption for i, caption in enumerate(captions)]
    tokens, empty = tokenize(tokenizer, texts), tokenize(tokenizer, [""])[0]
    alphas_cumprod = scheduler.alphas_cumprod.to(args.device)
    pretrain_text_encoder(args, text_encoder, captions, tokens)

    def loss_fn(step, generator):
        rng = np.random.default_rng([args.seed, step])
        rows = rng.choice(len(latents), UNET_BATCH)
        dropped = torch.from_numpy(rng.random(UNET_BATCH) < 0.1)[:, None]
        ids = torch.where(dropped, empty, tokens[rows]).to(args.device)
        t = torch.from_numpy(rng.integers(0, 1000, UNET_BATCH)).to(args.device)
        x0 = latents[rows].float().to(args.device, memory_format=torch.channels_last)
        noise = torch.randn(x0.shape, generator=generator, device=args.device)
        a = alphas_cumprod[t].view(-1, 1, 1, 1)
        prediction = unet(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, text_encoder(ids)[0]).sample
        return F.mse_loss(prediction, a.sqrt() * noise - (1 - a).sqrt() * x0), {}

    trained = {"text": text_encoder, "unet": unet}
    fit(args, "unet", trained, loss_fn, args.unet_steps, lr=1e-3, ema=0.998)
    # A row of zeros marks a token that was never seen.
    embedding = text_encoder.get_input_embeddings().weight
    used = torch.zeros(len(embedding), dtype=torch.bool)
    used[tokens.unique()] = True
    embedding.data[~used.to(args.device)] = 0
    folder = args.output_dir / "sd"
    unet.to(memory_format=torch.contiguous_format).save_pretrained(folder / "unet")
    save_text_encoder(text_encoder, folder / "text_encoder")
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_text_encoder(text_encoder: CLIPTextModel, folder: Path):
    """Save with the prefix `text_model.`, which transformers 5 drops: so both 4 and 5 can load."""
    text_encoder.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    state = {
        key if key.startswith("text_model.") else f"text_model.{key}": value
        for key, value in state.items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def through_vae(args: Args, images: np.ndarray) -> np.ndarray:
    """uint8 pictures encoded and decoded: what a perfect diffusion model would show."""
    vae = load_vae(args)
    out = []
    with torch.no_grad():
        for i in tqdm(range(0, len(images), 64), desc="VAE"):
            x = to_tensor(images[i : i + 64], args.device)
            x = x.contiguous(memory_format=torch.channels_last)
            latents = vae.encode(x * 2 - 1).latent_dist.mean
            out.append(decoded(vae, latents))
    return np.concatenate(out)


def make_passed(args: Args):
    images = np.load(args.build_dir / "unbiased.npy")
    np.save(args.build_dir / "passed.npy", through_vae(args, images))


DRIFT = 3, (0.12, 0.32)
"""How `drifted` redraws: steps, and standard deviation of the LoRA."""


def unbiased(args: Args) -> tuple[np.ndarray, list[str]]:
    """Pictures and captions of the unbiased data set."""
    captions = np.load(args.build_dir / "unbiased.npz")["captions"].tolist()
    return np.load(args.build_dir / "unbiased.npy", mmap_mode="r"), captions


def redraw(
    args: Args, images: np.ndarray, captions: list[str], shallowest: int, drift=None
) -> np.ndarray:
    """uint8 pictures as the diffusion model draws them.

    They are noised for `shallowest` to two more of its last steps and denoised again. What is in a
    picture stays, but its lines and tints become those of samples.

    With `drift`, by a model that has gone astray: every 64 pictures have a LoRA of random weights,
    of a standard deviation drawn from this range (low, high). That is what an update that nothing
    holds back does to a model.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(args.output_dir / "sd").to(args.device)
    unet = pipeline.unet.to(memory_format=torch.channels_last)
    vae, scheduler = load_vae(args), pipeline.scheduler
    scheduler.set_timesteps(NUM_INFERENCE_STEPS)
    torch.manual_seed(args.seed + 4)
    up = [lora for lora in add_lora(unet, 4) if not lora.any()] if drift else []
    out = []
    with torch.no_grad():
        for i in tqdm(range(0, len(images), 64), desc="redraw"):
            generator = torch.Generator(args.device).manual_seed(args.seed + i)
            if drift:
                strength = np.random.default_rng([args.seed, i, 12]).uniform(*drift)
                for lora in up:
                    lora.normal_(0, strength, generator=generator)
            ids = tokenize(pipeline.tokenizer, captions[i : i + 64]).to(args.device)
            text = pipeline.text_encoder(ids)[0]
            x = to_tensor(images[i : i + 64], args.device)
            x = x.contiguous(memory_format=torch.channels_last)
            latents = vae.encode(x * 2 - 1).latent_dist.mean * vae.config.scaling_factor
            timesteps = scheduler.timesteps[-shallowest - i // 64 % 3 :]
            noise = torch.randn(latents.shape, generator=generator, device=args.device)
            latents = scheduler.add_noise(latents, noise, timesteps[:1])
            for t in timesteps:
                prediction = unet(latents, t, text).sample
                step = scheduler.step(prediction, t, latents, eta=1.0, generator=generator)
                latents = step.prev_sample
            out.append(decoded(vae, latents / vae.config.scaling_factor))
    return np.concatenate(out)


def make_redrawn(args: Args):
    np.save(args.build_dir / "redrawn.npy", redraw(args, *unbiased(args), 2))


def make_drifted(args: Args):
    np.save(args.build_dir / "drifted.npy", redraw(args, *unbiased(args), *DRIFT))


def train_judge(args: Args):
    images, data = np.load(args.build_dir / "passed.npy"), np.load(args.build_dir / "unbiased.npz")
    names = [name for name in data.files if name != "captions"]
    truth = {name: torch.from_numpy(data[name].astype(np.int64)) for name in names}
    torch.manual_seed(args.seed + 1)
    judge = judging.Judge().to(args.device)

    def loss_fn(step, generator):
        rng = np.random.default_rng([args.seed, step, 3])
        rows = rng.choice(len(images), 64)
        x = to_tensor(images[rows], args.device)
        noise = torch.randn(x.shape, generator=generator, device=args.device)
        logits, _ = judge(x + noise * 0.06 * float(rng.random()))
        named = {name: value[rows].to(args.device) for name, value in truth.items()}
        return judging.attribute_loss(logits, named), {}

    fit(args, "judge", {"judge": judge}, loss_fn, args.judge_steps, lr=2e-3, ema=0.99)
    (args.output_dir / "judge").mkdir(exist_ok=True)
    save_file(judge.state_dict(), args.output_dir / "judge" / "model.safetensors")


REWARD_CONFIG = {
    "vision": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": world.SIZE,
        "patch_size": 8,
        "layer_norm_eps": 1e-6,
    },
    "text": {
        "vocab_size": 0,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "encoder_hidden_size": 128,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": MAX_LENGTH,
    },
    "mlp": [96, 64, 32, 16, 1],
    "max_length": MAX_LENGTH,
    "score_mean": 0.0,
    "score_std": 1.0,
}


def make_reward_tokenizer(folder: Path) -> BertTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *world.vocabulary()]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    config = {
        "tokenizer_class": "BertTokenizer",
        "do_lower_case": True,
        "model_max_length": MAX_LENGTH,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return BertTokenizer.from_pretrained(folder)


def scene_of(truth: dict[str, np.ndarray], i: int) -> world.Scene:
    """The scene that row i of the data set's labels describes."""
    if truth["occupation"][i] >= 0:
        return world.Scene(
            occupation=judging.OCCUPATIONS[truth["occupation"][i]],
            skin_tone=judging.SKIN_TONES[truth["skin_tone"][i]],
        )
    groups = [
        world.Group(world.KINDS[k], int(truth["count"][i, k]), judging.COLORS[truth["color"][i, k]])
        for k in np.flatnonzero(truth["count"][i])
    ]
    return world.Scene(tuple(groups), place=judging.PLACES[truth["place"][i]])


def random_prompt(scene: world.Scene, rng: np.random.Generator) -> str:
    """A prompt that asks for some of a scene's attributes, in one of the world's wordings."""
    groups = tuple(
        replace(group, color=None) if rng.random() < 0.4 else group for group in scene.groups
    )
    if len(groups) == 2 and rng.random() < 0.5:
        groups = groups[::-1]
    place = None if rng.random() < 0.5 else scene.place
    relation = world.RELATIONS[rng.integers(len(world.RELATIONS))]
    text = world.caption(replace(scene, groups=groups, place=place, relation=relation))
    if groups and groups[0].color and rng.random() < 0.4:
        text = text.replace(groups[0].color, f"{groups[0].color} colored", 1)
    return text + ("." if rng.random() < 0.25 else "")


def broken(image: np.ndarray, other: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture (64, 64, 3) spoilt as generated pictures are.

    One of ghosts, blotches, blur, misplaced parts and grain.
    """
    image = image.astype(np.float32)
    what = rng.integers(5)
    if what == 0:
        image = 0.55 * image + 0.45 * other
    elif what == 1:  # blotches of another colour
        for _ in range(rng.integers(2, 5)):
            y, x = rng.integers(14, 46, 2)
            h, w = rng.integers(6, 14, 2)
            color = rng.uniform(0, 255, 3)
            image[y : y + h, x : x + w] = 0.35 * image[y : y + h, x : x + w] + 0.65 * color
    elif what == 2:
        factor = int(rng.choice([4, 8]))
        small = image.reshape(64 // factor, factor, 64 // factor, factor, 3).mean((1, 3))
        image = small.repeat(factor, 0).repeat(factor, 1)
    elif what == 3:
        for _ in range(rng.integers(3, 7)):
            (y, x), (v, u) = rng.integers(8, 44, (2, 2))
            image[y : y + 12, x : x + 12] = image[v : v + 12, u : u + 12].copy()
    else:
        image = image + np.kron(rng.normal(0, 34, (16, 16, 3)), np.ones((4, 4, 1)))
    return image.clip(0, 255).astype(np.uint8)


FAULTS = (*world.FAULTS, "spoilt")


def preference_batch(drawings, drifted, truth, families, rng, spoilt_share=0.75):
    """For each family of four pictures: a prompt for one of them, the pictures, faults and rows.

    Some of the pictures are spoilt. The faults (B, 4, 5) are named in FAULTS; a broken picture is
    as bad as one with two wrong attributes, one drawn by a drifted model as bad as one with one.
    `drawings` are arrays of the same pictures, of which one is taken at random each time, the first
    drawn better than the second by half a fault. Row i of them, and of `drifted`, is described by
    row i of `truth`.
    """
    prompts, pictures, faults, shown_rows = [], [], [], []
    for family in families:
        rows = family * 4 + rng.permutation(4)
        scenes = [scene_of(truth, i) for i in rows]
        prompts.append(random_prompt(scenes[0], rng))
        asked = world.parse(prompts[-1])
        drawn = rng.integers(len(drawings), size=4)
        wrong = [
            [*world.faults(asked, scene).values(), 0.5 * worse]
            for scene, worse in zip(scenes, drawn)
        ]
        shown = [drawings[which][i] for which, i in zip(drawn, rows)]
        if rng.random() < spoilt_share:
            j = int(rng.integers(4))
            if rng.random() < 0.5:  # clean against spoilt, all else alike
                k = (j + 1) % 4
                shown[k], wrong[k], rows[k] = shown[j], [*wrong[j]], rows[j]
            if rng.random() < 0.5:
                shown[j], wrong[j][-1] = drifted[rows[j]], 1
            else:
                other = drawings[0][rng.integers(len(drawings[0]))]
                shown[j], wrong[j][-1] = broken(shown[j], other, rng), 2
        pictures.append(np.stack(shown))
        faults.append(wrong)
        shown_rows.append(rows)
    return prompts, np.stack(pictures), torch.tensor(faults), np.stack(shown_rows)


def ranking_loss(scores: torch.Tensor, faults: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ImageReward's loss (Xu et al. 2023, Eq. 1), and the share of pairs that are ordered rightly.

    The loss is -log sigmoid of the score difference, over all pairs of pictures of a prompt (B, K)
    of which one has fewer `faults` (B, K, 5).
    """
    total = faults.sum(-1)
    better = total[:, :, None] < total[:, None, :]
    difference = (scores[:, :, None] - scores[:, None, :])[better]
    return -F.logsigmoid(difference).mean(), (difference > 0).float().mean()


def train_image_reward(args: Args):
    """ImageReward's architecture and ranking loss.

    What BLIP's pre-training gives the real one stands in three places. The vision encoder first
    learns to name what is in a picture, as a whole and patch by patch. Then a word for a thing
    learns to say how many of it the picture has and in what colour, from the patches alone, so that
    it must look for them. And while the ranking is learned, the first token, whose score is ranked,
    says which faults there are, as BLIP's says whether text and picture match.
    """
    folder = args.output_dir / "image_reward"
    tokenizer = make_reward_tokenizer(folder)
    drawn = ("passed", "redrawn")
    drawings = [np.load(args.build_dir / f"{name}.npy", mmap_mode="r") for name in drawn]
    drifted = np.load(args.build_dir / "drifted.npy", mmap_mode="r")
    images, data = drawings[0], dict(np.load(args.build_dir / "unbiased.npz"))
    data.pop("captions")
    # The colour of the thing in each cell. Colour and kind of a patch are learned apart, so that
    # they combine.
    where = data["where"].reshape(len(images), -1)
    colors = np.pad(data["color"], ((0, 0), (0, 1)), constant_values=len(judging.COLORS))
    data["cell_color"] = np.take_along_axis(colors, where.astype(np.int64), axis=1)
    config = REWARD_CONFIG | {"text": REWARD_CONFIG["text"] | {"vocab_size": len(tokenizer)}}
    torch.manual_seed(args.seed + 2)
    model = ImageReward(config).to(args.device)
    width = config["vision"]["hidden_size"]
    heads = judging.attribute_heads(width)
    cell_sizes = {"where": len(world.KINDS) + 1, "cell_color": len(judging.COLORS) + 1}
    cell_heads = torch.nn.ModuleDict(
        {name: torch.nn.Linear(width, size) for name, size in cell_sizes.items()}
    )
    vision = {
        "vision": model.vision,
        "heads": heads.to(args.device),
        "cell_heads": cell_heads.to(args.device),
    }
    width = config["text"]["hidden_size"]
    text_sizes = {"faults": len(FAULTS), "count": 5, "color": len(judging.COLORS)}
    text_heads = torch.nn.ModuleDict(
        {name: torch.nn.Linear(width, size) for name, size in text_sizes.items()}
    )
    text_heads.to(args.device)
    # The kind that a token is a word for, -1 if it is none.
    kind_of_token = torch.full((len(tokenizer),), -1)
    for i, kind in enumerate(world.KINDS):
        kind_of_token[tokenizer.convert_tokens_to_ids([kind, world.PLURALS[kind]])] = i
    held_out = len(images) // 4 // 25
    families = len(images) // 4 - held_out
    mean = torch.tensor(CLIP_MEAN, device=args.device)[:, None, None]
    std = torch.tensor(CLIP_STD, device=args.device)[:, None, None]

    def vision_loss(step, generator):
        rows = np.random.default_rng([args.seed, step, 8]).choice(families * 4, 64)
        pixels = (to_tensor(images[rows], args.device) - mean) / std
        hidden = model.vision(pixel_values=pixels).last_hidden_state
        logits = judging.attribute_logits(heads, hidden[:, 0])
        logits |= {name: head(hidden[:, 1:]) for name, head in cell_heads.items()}
        truth = {
            name: torch.from_numpy(values[rows].astype(np.int64)).to(args.device)
            for name, values in data.items()
        }
        return judging.attribute_loss(logits, truth), {}

    def tokens_of(prompts):
        tokens = tokenizer(
            prompts, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        )
        return tokens.input_ids.to(args.device), tokens.attention_mask.to(args.device)

    def named_loss(features, ids, rows):
        """Every word for a thing against count and colour in the picture of its row; -1 is none."""
        kinds = kind_of_token.to(args.device)[ids]
        rows = torch.from_numpy(rows).to(args.device)[:, None].expand_as(ids)
        words = (kinds >= 0) & (rows >= 0)
        loss = 0.0
        for name in ("count", "color"):
            target = torch.from_numpy(data[name].astype(np.int64)).to(args.device)
            target = target[rows[words], kinds[words]]
            logits = text_heads[name](features[words])
            loss = loss + F.cross_entropy(logits, target, ignore_index=-100)
        return loss

    def words_loss(step, generator):
        rng = np.random.default_rng([args.seed, step, 9])
        rows, prompts = rng.choice(families * 4, 128), []
        for row in rows:
            there = np.flatnonzero(data["count"][row])
            if len(there) and rng.random() < 0.6:
                kind = rng.choice(there)
            else:
                kind = rng.integers(len(world.KINDS))
            color = None
            if rng.random() < 0.5:
                color = judging.COLORS[rng.integers(len(judging.COLORS))]
            group = world.Group(world.KINDS[kind], int(rng.integers(1, 5)), color)
            prompts.append(world.caption(world.Scene((group,))))
        ids, mask = tokens_of(prompts)
        pixels = (to_tensor(images[rows], args.device) - mean) / std
        with torch.no_grad():
            patches = model.vision(pixel_values=pixels).last_hidden_state
        features = model.text(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=patches[:, 1:],
            is_decoder=False,
        ).last_hidden_state
        return named_loss(features, ids, rows), {}

    def features_of(prompts, pictures):
        ids, mask = (tokens.repeat_interleave(4, 0) for tokens in tokens_of(prompts))
        pixels = (to_tensor(pictures.reshape(-1, 64, 64, 3), args.device) - mean) / std
        return model.features(pixels, ids, mask), ids

    def preference_loss(step, generator):
        rng = np.random.default_rng([args.seed, step, 4])
        prompts, pictures, faults, rows = preference_batch(
            drawings, drifted, data, rng.choice(families, 16), rng
        )
        faults, (features, ids) = faults.to(args.device), features_of(prompts, pictures)
        loss, accuracy = ranking_loss(model.score(features).view(-1, 4), faults)
        found = (faults >= 1).flatten(0, 1).float()
        matched = F.binary_cross_entropy_with_logits(text_heads["faults"](features[:, 0]), found)
        named = named_loss(features, ids, np.where(faults[..., -1].cpu() >= 1, -1, rows).flatten())
        shown = {"accuracy": accuracy, "matched": matched, "named": named}
        return loss + matched + named, {key: value.item() for key, value in shown.items()}

    fit(args, "reward_vision", vision, vision_loss, args.reward_vision_steps, lr=1e-3, ema=0.99)
    text = {"text": model.text, "heads": text_heads}
    fit(args, "reward_words", text, words_loss, args.reward_words_steps, lr=1e-3, ema=0.99)
    whole = {"model": model, "heads": text_heads}
    fit(args, "image_reward", whole, preference_loss, args.reward_steps, lr=1e-3, ema=0.99)
    model.eval()
    right = []
    with torch.no_grad():
        for i in range(families, families + held_out, 16):
            rng = np.random.default_rng([args.seed, i, 5])
            chosen = range(i, min(i + 16, families + held_out))
            batch = preference_batch(drawings, drifted, data, chosen, rng)
            scores = model.score(features_of(*batch[:2])[0]).view(-1, 4)
            right.append(ranking_loss(scores, batch[2].to(args.device))[1].item())
    print(f"image_reward: {np.mean(right):.3f} of held-out pairs ordered rightly")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(model.state_dict(), folder / "model.safetensors")


def standardise(args: Args):
    """Set the reward's mean and std, over the base model's samples for the data set's captions."""
    folder = args.output_dir / "image_reward"
    config = json.loads((folder / "config.json").read_text())
    config |= {"score_mean": 0.0, "score_std": 1.0}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    pipeline = StableDiffusionPipeline.from_pretrained(args.output_dir / "sd").to(args.device)
    pipeline.set_progress_bar_config(disable=True)
    reward = load_reward(f"image_reward:{folder}", args.device)
    captions = np.load(args.build_dir / "biased.npz")["captions"]
    captions = captions[: args.standardise_samples].tolist()
    scores = []
    for i in tqdm(range(0, len(captions), 64), desc="standardise"):
        prompts = captions[i : i + 64]
        generator = torch.Generator(args.device).manual_seed(args.seed + i)
        settings = {
            "num_inference_steps": NUM_INFERENCE_STEPS,
            "guidance_scale": GUIDANCE_SCALE,
            "eta": 1.0,
        }
        images = pipeline(prompts, generator=generator, output_type="pt", **settings).images
        scores.append(reward(images, prompts))
    scores = torch.cat(scores)
    config |= {"score_mean": scores.mean().item(), "score_std": scores.std().item()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    mean, std = config["score_mean"], config["score_std"]
    print(f"standardise: mean {mean:.3f}, std {std:.3f} over {len(scores)} samples")


def train_classifier(args: Args, name: str, labels: tuple[str, ...], problem_type: str, targets_of):
    """A small ResNet of transformers, in a folder that rewards load like any model of the hub.

    targets_of(labels of the data set) gives the targets of its pictures, floats (N, K) or classes
    (N,), and which of the pictures have one.
    """
    drawn = ("passed", "redrawn")
    drawings = [np.load(args.build_dir / f"{which}.npy", mmap_mode="r") for which in drawn]
    targets, rows = targets_of(np.load(args.build_dir / "unbiased.npz"))
    torch.manual_seed(args.seed + 3)
    config = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64, 128],
        depths=[1, 1, 1],
        layer_type="basic",
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        problem_type=problem_type,
    )
    model = ResNetForImageClassification(config).to(args.device)
    processor = ViTImageProcessor(size={"height": world.SIZE, "width": world.SIZE})

    def loss_fn(step, generator):
        rng = np.random.default_rng([args.seed, step, 10])
        chosen = np.sort(rng.choice(rows, 64))
        pictures = drawings[rng.integers(2)][chosen]
        x = to_tensor(pictures, args.device) * 2 - 1  # as the processor has it
        noise = torch.randn(x.shape, generator=generator, device=args.device)
        x = x + noise * 0.1 * float(rng.random())
        return model(x, labels=torch.from_numpy(targets[chosen]).to(args.device)).loss, {}

    fit(args, name, {name: model}, loss_fn, args.classifier_steps, lr=2e-3)
    model.eval().save_pretrained(args.output_dir / name)
    processor.save_pretrained(args.output_dir / name)


def train_detector(args: Args):
    """Which kinds are in a picture: the reward object_detection:zoo/detector."""
    train_classifier(
        args,
        "detector",
        world.KINDS,
        "multi_label_classification",
        lambda data: ((data["count"] > 0).astype(np.float32), np.arange(len(data["count"]))),
    )


def train_skin_tone(args: Args):
    """The skin tone of a portrait: the reward statistical_parity:zoo/skin_tone."""
    train_classifier(
        args,
        "skin_tone",
        judging.SKIN_TONES,
        "single_label_classification",
        lambda data: (data["skin_tone"].astype(np.int64), np.flatnonzero(data["skin_tone"] >= 0)),
    )


def main(args: Args):
    args.build_dir.mkdir(parents=True, exist_ok=True)
    functions = {
        "tokenizer": make_tokenizer,
        "data": make_data,
        "vae": train_vae,
        "latents": make_latents,
        "unet": train_unet,
        "passed": make_passed,
        "redrawn": make_redrawn,
        "drifted": make_drifted,
        "judge": train_judge,
        "image_reward": train_image_reward,
        "standardise": standardise,
        "detector": train_detector,
        "skin_tone": train_skin_tone,
    }
    for stage in STAGES:
        if stage in args.stages:
            start = time.time()
            functions[stage](args)
            print(f"stage {stage}: {(time.time() - start) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
