"""What training SD v1.5's UNet at 512 px keeps in memory, counted without running it.

python -m benchmarks.memory    writes benchmarks/results/memory.json and prints a table

With fake tensors no number is computed. Counted are the parameters, and the storages that autograd
keeps for the backward pass of one guided prediction (a batch of two), each once, without
the parameters. Not in it: the allocator's own overhead, and what a kernel needs while it runs.
"""

import itertools
import json
from types import SimpleNamespace
from unittest.mock import patch

import torch
from diffusers import UNet2DConditionModel
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.zoo_eval import ROOT
from common.lora import LoRAAttnProcessor, add_lora
from common.stable_diffusion import DTYPES

# The architecture of stable-diffusion-v1-5/unet/config.json.
SD_V1_5 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
GIB = 1 << 30


def kept(lora_rank: int, dtype: str, gradient_checkpointing: bool, batch: int = 1) -> dict:
    """Parameters, and bytes that the backward pass of `batch` guided predictions needs."""
    with FakeTensorMode():
        # As common.stable_diffusion.make_trainable: with a LoRA the frozen weights are in dtype.
        torch.set_default_dtype(DTYPES[dtype] if lora_rank else torch.float32)
        unet = UNet2DConditionModel(**SD_V1_5)
        torch.set_default_dtype(torch.float32)
        weights = list(unet.parameters())
        if lora_rank:
            # A fake module cannot be moved; this one is float32 and on the CPU already.
            with patch.object(LoRAAttnProcessor, "to", lambda processor, *args: processor):
                weights = add_lora(unet, lora_rank)
        if not lora_rank and dtype != "fp32":
            unet.forward = torch.autocast("cpu", DTYPES[dtype])(unet.forward)
        if gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        parameters = {id(p.untyped_storage()) for p in unet.parameters()}
        storages = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if id(storage) not in parameters:
                storages[id(storage)] = storage  # held, so that no id is given twice
            return tensor

        of_unet = unet.conv_in.weight.dtype
        shape = SimpleNamespace(latents=(2 * batch, 4, 64, 64), text=(2 * batch, 77, 768))
        latents, text = (torch.zeros(s, dtype=of_unet) for s in (shape.latents, shape.text))
        t = torch.zeros(2 * batch, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            unet(latents, t, text, return_dict=False)
        return {
            "parameters": sum(p.numel() for p in unet.parameters()),
            "trained": sum(p.numel() for p in weights),
            "kept_gib": sum(storage.nbytes() for storage in storages.values()) / GIB,
        }


def main():
    results = {}
    print("| trained | dtype | checkpointing | parameters trained | kept for a transition, GiB |")
    print("|---|---|---|---|---|")
    for rank, dtype, checkpointing in itertools.product((4, 0), ("fp32", "bf16"), (False, True)):
        name = f"{'LoRA of rank 4' if rank else 'all weights'}, {dtype}"
        numbers = kept(rank, dtype, checkpointing)
        results[f"{name}{', checkpointing' if checkpointing else ''}"] = numbers
        trained = f"{numbers['trained'] / 1e6:.1f} M"
        flag = "yes" if checkpointing else "no"
        print(f"| {name.replace(', ', ' | ')} | {flag} | {trained} | {numbers['kept_gib']:.2f} |")
    path = ROOT / "benchmarks/results/memory.json"
    path.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
