"""Pictures, their KL and their scores, of all models, shard by shard, on any number of ranks."""

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from common.rewards import RewardError
from common.stable_diffusion import load_pipeline
from evaluation.folder import read_shard, shard_file, write_description, write_shard
from evaluation.models import Model, check_finite, digest_of_lora, finetuned
from evaluation.places import writing
from evaluation.sampler import PictureError, Sampler
from evaluation.settings import Settings, shards_of
from harness.args import check_steps, fail
from harness.project import portable
from harness.prompts import warn_of_prompts
from harness.rewards import everybodys, load_reward_or_fail
from harness.stop import end_run, join_ranks
from harness.stored import StoredError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def draw_and_score(
    settings: Settings,
    models: list[Model],
    rewards: dict[str, str],
    folder: Path,
    micro_batch_size: int,
    drawn: int = 0,
) -> None:
    """Samples of models into `folder`, with scores by the rewards; what is there stays.

    `models` are the base and others, of which the last `drawn` are drawn, 0 being all. `rewards`
    are `score_keys` by spec: scores of what a reward was before it changed are not its scores.
    `micro_batch_size` pictures are in one forward pass of a rank. Collective under torchrun, where
    rank 0 alone reads and writes. Weights or rewards that cannot be loaded end the command.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # torch's own default rounds the factors of a GPU's convolutions.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    pipeline = load_pipeline(settings.model)
    check_steps(settings.num_inference_steps, pipeline.scheduler.config, settings.model)
    base = pipeline.unet.to(device, DTYPES[settings.dtype], memory_format=torch.channels_last)
    base.eval().requires_grad_(False)
    for model in models:
        load_unet(base, model, settings.model)  # refused now, before anything slow
    loaded = {
        spec: load_reward_or_fail(spec, device, settings.prompts, "--rewards") for spec in rewards
    }
    if world_size > 1:
        join_ranks(device)
    sampler = Sampler(pipeline, settings, device)
    warn_of_prompts(pipeline, settings.prompts)
    drawn = models[-drawn:]
    with writing(folder, "choose another --output-dir, or make room"):
        if rank == 0:
            write_description(folder, settings, models, drawn)
    rewards, changed = from_rank_0(rewards), set()  # another machine may have other files

    shards, N = shards_of(settings), settings.images_per_prompt
    total = len(drawn) * len(settings.prompts) * N
    progress = tqdm(total=total, disable=rank > 0, desc="evaluate", unit="picture")
    for model in drawn:
        unet = load_unet(base, model, settings.model)
        if any(everybodys(digest_of_lora(model.path) != model.digest if model.path else False)):
            end_run(
                f"--lora {model.path} has changed since it was read; what is whole stays in "
                f"{folder}; evaluate it, when its run has ended, into another --output-dir"
            )
        for number, shard in enumerate(shards):
            pictures = [(j, i) for j in shard.tolist() for i in range(N)]
            # The other ranks may not see the folder.
            there = (folder, model.name, number)
            stored = from_rank_0(read_shard(*there, len(pictures)) if rank == 0 else None)
            before = len(stored)
            start, stop = np.linspace(0, len(pictures), world_size + 1).astype(int)[rank : rank + 2]
            own = pictures[start:stop]
            if "images" in stored:
                progress.update(len(pictures))
                check_stored(stored, shard_file(*there), sampler)
            else:
                try:
                    stored |= draw(sampler, unet, own, micro_batch_size, progress)
                except PictureError as error:
                    remedy = "try --dtype fp32 or a lower --guidance-scale, or leave it out"
                    end_run(f"{model.name}: {error}; {remedy}; what is whole stays in {folder}")
            # Scores are of the pictures as they are stored, so that a reward may be added later.
            images = torch.from_numpy(stored["images"][start:stop]).to(device)
            images = images.permute(0, 3, 1, 2).float() / 255
            prompts = [settings.prompts[j] for j, _ in own]
            for spec, reward in loaded.items():
                if rewards[spec] in stored:
                    continue
                before_it = any(key.startswith(f"{portable(spec)} sha256:") for key in stored)
                if before_it and spec not in changed:
                    changed.add(spec)
                    if rank == 0:
                        text = f"warning: {spec} has changed; the pictures are scored anew"
                        tqdm.write(text, file=sys.stderr)
                try:
                    stored[rewards[spec]] = gathered(reward(images, prompts).cpu().numpy())
                except RewardError as error:
                    end_run(f"{error}; the evaluation so far is in {folder}")
            with writing(folder):
                if rank == 0 and len(stored) > before:
                    write_shard(*there, stored)
    progress.close()


def check_stored(stored: dict[str, np.ndarray], file: Path, sampler: Sampler) -> None:
    """Raises StoredError where stored pictures are of another size than those that are drawn."""
    shape = stored["images"].shape[1:]
    if shape != sampler.shape:
        remedy = "delete it, and the same command draws it again"
        raise StoredError(f"{file} has pictures of {shape}, not {sampler.shape}; {remedy}")


def load_unet(base: torch.nn.Module, model: Model, pretrained: str) -> torch.nn.Module:
    """The model's UNet; one that is none of `pretrained`'s, whose UNet is `base`, is refused."""
    if model.path is None:
        try:
            check_finite(base)
        except ValueError as error:
            fail(f"--model {pretrained}: {error}; give another model, or --dtype fp32")
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
    """A shard's "images" and, where there is one, "kl"; this rank draws `own`. Collective.

    Raises PictureError on every rank, where one of them has drawn what is no picture.
    """
    images, kl, faults = [], [], []
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    for k in range(0, len(own), micro_batch_size):
        rows = own[k : k + micro_batch_size]
        try:
            drawn, distance = sampler.draw(unet, rows)
        except PictureError as error:
            faults.append(str(error))
            break
        images.append(drawn)
        if distance is not None:
            kl.append(distance)
        progress.update(min(len(rows) * world_size, progress.total - progress.n))
    for fault in [fault for share in everybodys(faults) for fault in share]:
        raise PictureError(fault)
    drawn = {"images": gathered(np.concatenate(images))}
    return drawn | ({"kl": gathered(np.concatenate(kl))} if kl else {})


def gathered(share: np.ndarray) -> np.ndarray:
    """What all ranks have of a shard, in its order. Collective."""
    return np.concatenate(everybodys(share))


def from_rank_0(value):
    """Rank 0's value on every rank. Collective."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]
