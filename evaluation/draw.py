"""Pictures, their KL and their scores, of all models, shard by shard, on any number of ranks."""

import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from common.rewards import RewardError
from common.stable_diffusion import load_pipeline
from evaluation.folder import read_shard, write_description, write_shard
from evaluation.models import Model, finetuned
from evaluation.sampler import Sampler
from evaluation.settings import Settings, shards_of
from harness.args import fail
from harness.prompts import warn_of_prompts
from harness.rewards import load_reward_or_fail
from harness.stop import end_run, join_ranks

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def draw_and_score(
    settings: Settings,
    models: list[Model],
    specs: tuple[str, ...],
    folder: Path,
    micro_batch_size: int,
) -> None:
    """Samples of all models into `folder`, with scores by the rewards `specs`; what is there stays.

    `micro_batch_size` pictures are in one forward pass of a rank. Collective under torchrun, where
    rank 0 alone reads and writes. Weights or rewards that cannot be loaded end the command.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = load_pipeline(settings.model)
    base = pipeline.unet.to(device, DTYPES[settings.dtype], memory_format=torch.channels_last)
    base.eval().requires_grad_(False)
    for model in models:
        load_unet(base, model, settings.model)  # refused now, before anything slow
    rewards = {
        spec: load_reward_or_fail(spec, device, settings.prompts, "--rewards") for spec in specs
    }
    if world_size > 1:
        join_ranks(device)
    sampler = Sampler(pipeline, settings, device)
    warn_of_prompts(pipeline, settings.prompts)
    if rank == 0:
        write_description(folder, settings, models)

    shards, N = shards_of(settings), settings.images_per_prompt
    total = len(models) * len(settings.prompts) * N
    progress = tqdm(total=total, disable=rank > 0, desc="evaluate", unit="picture")
    for model in models:
        unet = load_unet(base, model, settings.model)
        for number, shard in enumerate(shards):
            # The other ranks may not see the folder.
            stored = from_rank_0(read_shard(folder, model.name, number) if rank == 0 else None)
            before = len(stored)
            pictures = [(j, i) for j in shard.tolist() for i in range(N)]
            start, stop = np.linspace(0, len(pictures), world_size + 1).astype(int)[rank : rank + 2]
            own = pictures[start:stop]
            if "images" in stored:
                progress.update(len(pictures))
            else:
                stored |= draw(sampler, unet, own, micro_batch_size, progress)
            # Scores are of the pictures as they are stored, so that a reward may be added later.
            images = torch.from_numpy(stored["images"][start:stop]).to(device)
            images = images.permute(0, 3, 1, 2).float() / 255
            prompts = [settings.prompts[j] for j, _ in own]
            for spec, reward in rewards.items():
                if spec in stored:
                    continue
                try:
                    stored[spec] = gathered(reward(images, prompts).cpu().numpy())
                except RewardError as error:
                    end_run(f"{error}; the evaluation so far is in {folder}")
            if rank == 0 and len(stored) > before:
                write_shard(folder, model.name, number, stored)
    progress.close()


def load_unet(base: torch.nn.Module, model: Model, pretrained: str) -> torch.nn.Module:
    """The model's UNet; one that is none of `pretrained`'s, whose UNet is `base`, is refused."""
    if model.path is None:
        return base
    try:
        return finetuned(base, model.path)
    except Exception as error:  # ValueError, and what diffusers raises for a folder it cannot read
        fail(f"--lora {model.path}: {str(error)[:300]}; give a run on --model {pretrained}")


def draw(
    sampler: Sampler,
    unet: torch.nn.Module,
    own: list[tuple[int, int]],
    micro_batch_size: int,
    progress: tqdm,
) -> dict[str, np.ndarray]:
    """A shard's "images" and, where there is one, "kl"; this rank draws `own`. Collective."""
    images, kl = [], []
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    for k in range(0, len(own), micro_batch_size):
        rows = own[k : k + micro_batch_size]
        drawn, distance = sampler.draw(unet, rows)
        images.append(drawn)
        if distance is not None:
            kl.append(distance)
        progress.update(min(len(rows) * world_size, progress.total - progress.n))
    drawn = {"images": gathered(np.concatenate(images))}
    return drawn | ({"kl": gathered(np.concatenate(kl))} if kl else {})


def gathered(share: np.ndarray) -> np.ndarray:
    """What all ranks have of a shard, in its order. Collective."""
    shares = [share]
    if dist.is_initialized():
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, share)
    return np.concatenate(shares)


def from_rank_0(value):
    """Rank 0's value on every rank. Collective."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]
