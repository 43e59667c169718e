"""LoRA on a UNet's attention layers, as an attention processor.

No peft, nothing wrapped.
"""

import copy
import os
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
FILE_NAME = "pytorch_lora_weights.safetensors"


class LoRALinear(torch.nn.Module):
    """The low-rank update x -> B A x (Hu et al. 2021), its weights float32; zero at the start."""

    def __init__(self, in_features: int, out_features: int, rank: int):
        super().__init__()
        self.lora_A = torch.nn.Linear(in_features, rank, bias=False)
        self.lora_B = torch.nn.Linear(rank, out_features, bias=False)
        torch.nn.init.normal_(self.lora_A.weight, std=1 / rank)
        torch.nn.init.zeros_(self.lora_B.weight)


def project(x: torch.Tensor, *pairs: tuple[torch.nn.Linear, LoRALinear]) -> list[torch.Tensor]:
    """W x + B A x (B, N, out) for each pair of a frozen layer and its LoRA; x is (B, N, in).

    The pairs share one matrix product with all their A. The products are in x's precision, with
    sums in float32: for the backward pass x is kept as it is, without a float32 copy.
    """
    down = torch.cat([lora.lora_A.weight for _, lora in pairs]).to(x.dtype)
    low_rank = F.linear(x, down).flatten(0, 1).chunk(len(pairs), dim=1)
    outputs = []
    for (layer, lora), h in zip(pairs, low_rank):
        output = layer(x)
        up = lora.lora_B.weight.to(x.dtype).t()
        outputs.append(torch.addmm(output.flatten(0, 1), h, up).view_as(output))
    return outputs


class LoRAAttnProcessor(torch.nn.Module):
    """diffusers' AttnProcessor2_0 for transformer blocks, with a LoRA on its four projections."""

    def __init__(self, attn, rank: int):
        super().__init__()
        self.to_q, self.to_k, self.to_v, self.to_out = (
            LoRALinear(layer.in_features, layer.out_features, rank)
            for layer in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])
        )

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **kwargs
    ):
        of_query = (attn.to_q, self.to_q)
        of_context = (attn.to_k, self.to_k), (attn.to_v, self.to_v)
        if encoder_hidden_states is None:
            query, key, value = project(hidden_states, of_query, *of_context)
        else:
            if attn.norm_cross:
                encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
            (query,) = project(hidden_states, of_query)
            key, value = project(encoder_hidden_states, *of_context)
        query, key, value = (
            x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value)
        )
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, key.shape[2], len(key))
            attention_mask = attention_mask.view(len(key), attn.heads, -1, attention_mask.shape[-1])
        # The scale is diffusers' own; a model may set it to something else than 1 / sqrt(head_dim).
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=attn.scale
        )
        (out,) = project(out.transpose(1, 2).flatten(2), (attn.to_out[0], self.to_out))
        return attn.to_out[1](out)


def add_lora(unet: torch.nn.Module, rank: int) -> list[torch.nn.Parameter]:
    """Freeze `unet`, set a LoRAAttnProcessor on every attention layer, return what to train."""
    unet.requires_grad_(False)
    processors = {}
    for name in unet.attn_processors:
        attn = unet.get_submodule(name.removesuffix(".processor"))
        processors[name] = LoRAAttnProcessor(attn, rank).to(attn.to_q.weight.device, torch.float32)
    # set_attn_processor empties the dict that it is given.
    unet.set_attn_processor(dict(processors))
    return [parameter for processor in processors.values() for parameter in processor.parameters()]


def sharing_weights(unet: torch.nn.Module) -> torch.nn.Module:
    """A module of its own with the very weights of `unet`, which take no memory a second time.

    Made before `add_lora`, it stays the pretrained model.
    """
    shared = {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())}
    return copy.deepcopy(unet, shared)


def lora_state_dict(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The LoRA's weights under the names that diffusers' `load_lora_weights` takes."""
    state = {}
    for name, processor in unet.attn_processors.items():
        for projection in PROJECTIONS:
            lora = getattr(processor, projection.removesuffix(".0"))
            prefix = f"unet.{name.removesuffix('.processor')}.{projection}"
            state[f"{prefix}.lora_A.weight"] = lora.lora_A.weight.detach().cpu().contiguous()
            state[f"{prefix}.lora_B.weight"] = lora.lora_B.weight.detach().cpu().contiguous()
    return state


def save_lora(unet: torch.nn.Module, folder: str | Path) -> None:
    """Write `folder`/pytorch_lora_weights.safetensors, for `pipe.load_lora_weights(folder)`."""
    path = Path(folder) / FILE_NAME
    partial = path.with_suffix(".partial")
    save_file(lora_state_dict(unet), partial, metadata={"format": "pt"})
    as_others(partial)
    partial.replace(path)  # whole, or not there


def as_others(path: Path) -> None:
    """Give a file the permissions of new files: safetensors makes its own for the owner alone."""
    umask = os.umask(0o022)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def lora_file(path: str | Path) -> Path:
    """The safetensors file itself, or that of a folder."""
    return Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)


def lora_rank(path: str | Path) -> int:
    """The rank of the LoRA in a folder or file.

    Raises ValueError when there is no LoRA, or none of one rank.
    """
    try:
        state = load_file(lora_file(path))
    except (OSError, SafetensorError) as error:
        reason = str(error)[:100]
        raise ValueError(f"{lora_file(path)} cannot be read as safetensors ({reason})") from None
    ranks = {value.shape[0] for key, value in state.items() if key.endswith("lora_A.weight")}
    if any(key.startswith("lora_unet_") for key in state):
        raise ValueError(f"{lora_file(path)} is for other tools; diffusers reads {FILE_NAME}")
    if len(ranks) != 1:
        fault = "holds no LoRA of one rank under the names that diffusers gives it"
        raise ValueError(f"{lora_file(path)} {fault}")
    return ranks.pop()


def save_weights(unet: torch.nn.Module, folder: str | Path) -> None:
    """Write what is trained into `folder`.

    With a LoRA its file, without one the UNet in diffusers' format as unet/, which takes the place
    of the one before when it is whole.
    """
    if has_lora(unet):
        save_lora(unet, folder)
        return
    place, partial = Path(folder) / "unet", Path(folder) / "unet.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    unet.save_pretrained(partial)
    for file in partial.iterdir():
        as_others(file)
    shutil.rmtree(place, ignore_errors=True)
    partial.rename(place)


def load_weights(unet: torch.nn.Module, folder: str | Path) -> None:
    """Read what `save_weights` wrote, into a UNet of the same kind.

    Raises ValueError when it is of another model.
    """
    if has_lora(unet):
        load_lora(unet, folder)
        return
    saved, own = type(unet).from_pretrained(Path(folder) / "unet").state_dict(), unet.state_dict()
    if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in own.items()}:
        raise ValueError(f"the UNet in {folder} is of another model")
    unet.load_state_dict(saved)


def has_lora(unet: torch.nn.Module) -> bool:
    return any(isinstance(p, LoRAAttnProcessor) for p in unet.attn_processors.values())


def load_lora(unet: torch.nn.Module, path: str | Path) -> None:
    """Read what `save_lora` wrote, a folder or the file.

    `add_lora` must have been called on the UNet with the same rank. Raises ValueError when the file
    does not belong to this UNet or rank.
    """
    state = load_file(lora_file(path))
    own = lora_state_dict(unet)
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
        raise ValueError(f"the LoRA in {path} is of another model or rank")
    for name, processor in unet.attn_processors.items():
        for projection in PROJECTIONS:
            lora = getattr(processor, projection.removesuffix(".0"))
            prefix = f"unet.{name.removesuffix('.processor')}.{projection}"
            lora.lora_A.weight.data.copy_(state[f"{prefix}.lora_A.weight"])
            lora.lora_B.weight.data.copy_(state[f"{prefix}.lora_B.weight"])
