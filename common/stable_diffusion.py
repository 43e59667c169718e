"""Stable Diffusion as the scripts train it: the networks around the denoising step."""

import copy
import json
import os
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, StableDiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch.utils.checkpoint import checkpoint

from common import UserError
from common.lora import FILE_NAME, add_lora, load_weights, save_weights, sharing_weights

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PIXELS_AT_ONCE = 2 * 512 * 512
"""Of pictures in one pass of the VAE, of which one of 512 px takes a GB."""


class ModelError(UserError):
    """A model that is not to be had, or not this one; the message is one line for the user."""


class OtherModelError(ModelError):
    """What is no Stable Diffusion of these layouts; the message says what works instead."""


class StableDiffusion:
    """The UNet to train with all that it needs, on one device.

    unet: trained in `weights`, a list of parameters; scheduler: DDIM with its steps set; timesteps
    (T,), the noisiest first; latent_shape (C, H, W) with latent_size numbers; text_size, that of a
    pooled prompt; no_text (1, L, D), the embedding of the empty prompt; batch_size: rows to which
    `pad` fills a batch up, None for none.
    """

    batch_size: int | None = None

    def __init__(self, pipeline: StableDiffusionPipeline, args, device, keep_pretrained: bool):
        self.unet, self.device = pipeline.unet, device
        self.vae = pipeline.vae.to(device, memory_format=torch.channels_last).eval()
        self.vae.requires_grad_(False)
        self.encoder = PromptEncoder(pipeline, device)
        self.no_text = self.encode([""])
        self.scheduler = ddim_scheduler(pipeline.scheduler.config, args.num_inference_steps, device)
        self.timesteps = self.scheduler.timesteps.to(device)
        side = self.unet.config.sample_size
        self.latent_shape = (self.unet.config.in_channels, side, side)
        self.latent_size = self.unet.config.in_channels * side * side
        self.image_size = side * 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.pictures_at_once = max(1, PIXELS_AT_ONCE // self.image_size**2)
        self.text_size = self.pooled([""]).shape[1]
        self.gradient_checkpointing = args.gradient_checkpointing
        torch.manual_seed(args.seed)
        self.weights, self.pretrained_unet = make_trainable(
            self.unet,
            device,
            args.dtype,
            args.lora_rank,
            compile=args.compile,
            gradient_checkpointing=args.gradient_checkpointing,
            keep_pretrained=keep_pretrained,
        )

    def encode(self, prompts: list[str]) -> torch.Tensor:
        """Hidden states (B, L, D) of the text encoder."""
        return self.encoder(prompts)[0]

    def pooled(self, prompts: list[str]) -> torch.Tensor:
        """Pooled features (B, D) of the text encoder."""
        return self.encoder(prompts)[1]

    def pad(self, rows: torch.Tensor) -> torch.Tensor:
        """(B, ...) filled up to batch_size rows with copies of the last one.

        A kernel is chosen by the shape of its batch: with one shape for all calls of the UNet, a
        rollout and its training compute the same numbers, and nothing is compiled twice.
        """
        lacking = max(0, (self.batch_size or 0) - len(rows))
        return torch.cat([rows, rows[-1:].expand(lacking, *rows.shape[1:])]) if lacking else rows

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of latents x_0, a few at a time."""
        return self.decode_with_gradient(latents)

    def decode_with_gradient(self, latents: torch.Tensor) -> torch.Tensor:
        """The same, with the graph to the latents; a value that is clamped passes no gradient.

        With gradient checkpointing the activations of a few pictures are in memory at a time.
        """
        few = (latents / self.vae.config.scaling_factor).split(self.pictures_at_once)
        decode = lambda some: self.vae.decode(some).sample
        if self.gradient_checkpointing and latents.requires_grad:
            decode = partial(checkpoint, decode, use_reentrant=False, preserve_rng_state=False)
        pictures = torch.cat([decode(some) for some in few])
        return (pictures / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def latents(self, pictures: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """x_0 (B, C, H, W) of pictures in [0, 1], a few at a time.

        noise (B, C, H, W), standard normal, draws from the VAE's posterior.
        """
        few = (pictures * 2 - 1).split(self.pictures_at_once)
        posteriors = [self.vae.encode(some).latent_dist for some in few]
        mean, std = (torch.cat([getattr(p, key) for p in posteriors]) for key in ("mean", "std"))
        return (mean + std * noise) * self.vae.config.scaling_factor

    @contextmanager
    def pretrained(self):
        """A block without gradients, with the pretrained UNet: `with sd.pretrained() as unet:`."""
        with torch.no_grad():
            yield self.pretrained_unet

    def save(self, folder: str | Path) -> None:
        """The LoRA's file, or with all weights trained the UNet as unet/, both for diffusers."""
        save_weights(self.unet, folder)

    def load(self, folder: str | Path) -> None:
        """What `save` wrote. Raises ModelError when it is of another model."""
        try:
            load_weights(self.unet, folder)
        except ValueError as error:
            raise ModelError(str(error)) from None


def load_stable_diffusion(args, device, keep_pretrained: bool = True) -> StableDiffusion:
    """The model that args.model names, a hub id or a folder in diffusers format, ready to train.

    Of `args` it takes model, num_inference_steps, dtype, lora_rank, compile, gradient_checkpointing
    and seed. `keep_pretrained` is for lora_rank 0, where the pretrained UNet is a copy. Raises
    ModelError.
    """
    return StableDiffusion(load_pipeline(args.model), args, device, keep_pretrained)


def load_pipeline(model: str) -> StableDiffusionPipeline:
    """The pretrained pipeline, float32, without safety checker. Raises ModelError."""
    check_layout(model)
    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    without = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    with loading(model):
        return StableDiffusionPipeline.from_pretrained(model, **without)


def check_layout(model: str) -> None:
    """Refuse what is no text-to-image Stable Diffusion 1.x or 2.x, before its weights are loaded.

    `model` is a hub id, of which two small files are downloaded, or a folder. Raises
    OtherModelError, and ModelError where these files are not to be had.
    """
    works = "this works with Stable Diffusion 1.x and 2.x, a hub id or a folder in diffusers format"
    if os.path.isfile(model):
        convert = "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        raise OtherModelError(f"{model!r} is a file; {works}: {convert} makes one of a checkpoint")

    def config(name: str) -> dict:
        path = Path(model, name) if os.path.isdir(model) else Path(hf_hub_download(model, name))
        if not path.is_file():
            raise FileNotFoundError(f"it has no file {name}")
        return dict(json.loads(path.read_text(encoding="utf-8")))

    with loading(model):
        try:
            index = config("model_index.json")
        except LocalEntryNotFoundError:  # the hub cannot be asked
            raise
        except (FileNotFoundError, EntryNotFoundError):
            loras = (FILE_NAME, "adapter_model.safetensors")
            is_lora = any(os.path.isfile(os.path.join(model, name)) for name in loras)
            fault = "is a LoRA, which is no whole model" if is_lora else "has no model_index.json"
            raise OtherModelError(f"{model!r} {fault}; {works}") from None
        kind = str(index.get("_class_name", "pipeline without a name"))[:100]
        if kind != StableDiffusionPipeline.__name__:
            raise OtherModelError(f"{model!r} is a {kind}; {works}")
        unet = config("unet/config.json")
        takes, gives = (unet.get(f"{way}_channels", 4) for way in ("in", "out"))
        if takes != gives:  # it is for inpainting, depth or editing
            fault = f"has a UNet that takes {takes} channels and gives {gives}"
            raise OtherModelError(f"{model!r} {fault}; {works}")


@contextmanager
def loading(model: str):
    """A block whose faults, of many kinds, are each a ModelError."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        where = "loaded" if os.path.isdir(model) else "had from the hub, nor is it a folder"
        raise ModelError(f"{model!r} cannot be {where} ({str(error)[:100]} ...)") from error


def ddim_scheduler(config, num_inference_steps: int, device="cpu") -> DDIMScheduler:
    """DDIM with a model's noise schedule, its steps set; `device` has the tables of a step."""
    # DDIMScheduler would clip latents to [-1, 1] where the configuration does not speak of it.
    clip_sample = config.get("clip_sample", False)
    scheduler = DDIMScheduler.from_config(config, clip_sample=clip_sample)
    scheduler.set_timesteps(num_inference_steps)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(device)
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.to(device)
    return scheduler


class PromptEncoder:
    """encoder(prompts) gives hidden states (B, L, D) and pooled features (B, D), float32.

    Prompts are encoded one by one, so that the result is a function of the prompt alone, whatever
    was asked before. The last `kept` stay in memory: a file of prompts may be of any length.
    """

    def __init__(self, pipeline: StableDiffusionPipeline, device, kept: int = 1024):
        self.tokenizer, self.text_encoder = pipeline.tokenizer, pipeline.text_encoder
        self.device = device
        self.text_encoder.to(device).eval().requires_grad_(False)
        self.encode_one = lru_cache(maxsize=kept)(self.encode_one)

    def __call__(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, pooled = zip(*(self.encode_one(str(prompt)) for prompt in prompts))
        return torch.cat(hidden), torch.cat(pooled)

    @torch.no_grad()
    def encode_one(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        length = self.tokenizer.model_max_length
        options = {"padding": "max_length", "max_length": length, "truncation": True}
        ids = self.tokenizer(prompt, return_tensors="pt", **options).input_ids
        out = self.text_encoder(ids.to(self.device))
        return out.last_hidden_state.float(), out.pooler_output.float()


def make_trainable(
    unet: torch.nn.Module,
    device: torch.device,
    dtype: str,
    lora_rank: int,
    *,
    compile: bool = False,
    gradient_checkpointing: bool = False,
    keep_pretrained: bool = True,
) -> tuple[list[torch.nn.Parameter], torch.nn.Module | None]:
    """Put `unet` on `device`; the weights to train, and the pretrained UNet (or None).

    With a LoRA the UNet is in `dtype` and frozen, the LoRA float32, and the pretrained UNet shares
    the frozen weights. With `lora_rank` 0 all weights are trained and stay float32; then the
    forward pass alone is in `dtype`, under autocast, and the pretrained UNet is a frozen copy, or
    None without `keep_pretrained`.
    """
    frozen_dtype = DTYPES[dtype] if lora_rank else torch.float32
    unet.to(device, frozen_dtype, memory_format=torch.channels_last).eval()
    reference = None
    if lora_rank:
        reference = sharing_weights(unet)
        weights = add_lora(unet, lora_rank)
    else:
        weights = list(unet.parameters())
        if keep_pretrained:
            reference = copy.deepcopy(unet).requires_grad_(False)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    for network in (unet, reference):
        if network is None:
            continue
        if not lora_rank and dtype != "fp32":
            network.forward = torch.autocast(device.type, DTYPES[dtype])(network.forward)
        if compile:
            network.compile()
    return weights, reference
