"""Stable Diffusion as the scripts train it: its text encoder, and the UNet with what is trained and what is kept."""

import copy
from functools import lru_cache

import torch
from diffusers import StableDiffusionPipeline

from common.lora import add_lora

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class PromptEncoder:
    """encode(prompts) gives hidden states (B, L, D) and pooled features (B, D) of the text encoder, float32.

    Prompts are encoded one by one, so that the result is a function of the prompt alone, whatever was asked before. The
    last `kept` stay in memory: a file of prompts may be of any length.
    """

    def __init__(self, pipeline: StableDiffusionPipeline, device: torch.device, kept: int = 1024):
        self.tokenizer, self.text_encoder, self.device = (
            pipeline.tokenizer,
            pipeline.text_encoder,
            device,
        )
        self.text_encoder.to(device).eval().requires_grad_(False)
        self.encode_one = lru_cache(maxsize=kept)(self.encode_one)

    def __call__(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        hidden, pooled = zip(*(self.encode_one(str(prompt)) for prompt in prompts))
        return torch.cat(hidden), torch.cat(pooled)

    @torch.no_grad()
    def encode_one(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        length = self.tokenizer.model_max_length
        ids = self.tokenizer(
            prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        out = self.text_encoder(ids.input_ids.to(self.device))
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
    """Put `unet` on `device`; the weights to train, and the pretrained model to call within `common.lora.pretrained`.

    With a LoRA the UNet is in `dtype` and frozen, the LoRA float32, and the pretrained model is the same UNet. With
    `lora_rank` 0 all weights are trained and stay float32; then the forward pass alone is in `dtype`, under autocast,
    and the pretrained model is a frozen copy, or None without `keep_pretrained`.
    """
    unet.to(
        device, DTYPES[dtype] if lora_rank else torch.float32, memory_format=torch.channels_last
    ).eval()
    reference = unet
    if lora_rank:
        weights = add_lora(unet, lora_rank)
    else:
        reference = copy.deepcopy(unet).requires_grad_(False) if keep_pretrained else None
        weights = list(unet.parameters())
        if dtype != "fp32":
            for network in filter(None, (unet, reference)):
                network.forward = torch.autocast(device.type, DTYPES[dtype])(network.forward)
    if gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if compile:
        for network in {id(network): network for network in (unet, reference) if network}.values():
            network.compile()
    return weights, reference
