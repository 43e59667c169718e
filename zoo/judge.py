"""The zoo's ground truth: a classifier of pictures, and a distance to real renders.

The classifier reads a picture back into a `world.Scene`. For evaluation alone: no policy is trained
against it. Rewards are other networks, which learn from the same labels and from more pictures of
the same scenes, so that they may share blind spots.
"""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from zoo import world

PLACES = (*world.PLACES, "portrait")
OCCUPATIONS = tuple(world.OCCUPATIONS)
SKIN_TONES = tuple(world.SKIN_TONES)
COLORS = tuple(world.COLORS)
FEATURES = 64


class Judge(torch.nn.Module):
    """Convolutional classifier of what is in pictures (B, 3, 64, 64) in [0, 1].

    A map says which kind is in which cell of 8 px; the count and the colour of a kind are read off
    it, so that all kinds share what is learned.
    """

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in (32, 64, 128):
            layers += [torch.nn.Conv2d(channels, width, 3, stride=2, padding=1)]
            layers += [torch.nn.GroupNorm(8, width), torch.nn.ReLU()]
            layers += [torch.nn.Conv2d(width, width, 3, padding=1)]
            layers += [torch.nn.GroupNorm(8, width), torch.nn.ReLU()]
            channels = width
        self.body = torch.nn.Sequential(*layers)
        self.context = torch.nn.Conv2d(channels, channels, 5, padding=2)
        self.where_map = torch.nn.Conv2d(channels, len(world.KINDS) + 1, 1)
        self.color_map = torch.nn.Conv2d(channels, len(COLORS), 1)
        self.count = torch.nn.Sequential(
            torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 5)
        )
        self.hidden = torch.nn.Linear(channels * 16, 2 * FEATURES)
        self.features = torch.nn.Linear(2 * FEATURES, FEATURES)
        sizes = {
            "count": 5 * len(world.KINDS),
            "place": len(PLACES),
            "occupation": len(OCCUPATIONS),
            "skin_tone": len(SKIN_TONES),
        }
        self.heads = torch.nn.ModuleDict(
            {name: torch.nn.Linear(3 * FEATURES, size) for name, size in sizes.items()}
        )

    def forward(self, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Logits by attribute, and features (B, 64).

        "count" (B, 16, 5) and "color" (B, 16, 9) are by kind, "where" (B, 64, 17) by cell.
        """
        grid = self.body(images * 2 - 1)
        grid = grid + F.relu(self.context(grid))
        hidden = F.relu(self.hidden(F.avg_pool2d(grid, 2).flatten(1)))
        features = self.features(hidden)
        hidden = torch.cat([hidden, F.relu(features)], dim=1)
        logits = {name: head(hidden) for name, head in self.heads.items()}
        where = self.where_map(grid).flatten(2)
        shares = where.softmax(1)[:, :-1]
        logits["count"] = logits["count"].unflatten(1, (len(world.KINDS), 5)) + self.count(shares)
        colors = self.color_map(grid).flatten(2).transpose(1, 2)
        logits["color"] = where[:, :-1].softmax(-1) @ colors
        return logits | {"where": where.transpose(1, 2)}, features


def attribute_heads(width: int) -> torch.nn.ModuleDict:
    """A linear head for each attribute, on hidden features of `width`."""
    kinds = len(world.KINDS)
    sizes = {
        "count": kinds * 5,
        "color": kinds * len(COLORS),
        "place": len(PLACES),
        "occupation": len(OCCUPATIONS),
        "skin_tone": len(SKIN_TONES),
    }
    return torch.nn.ModuleDict({name: torch.nn.Linear(width, size) for name, size in sizes.items()})


def attribute_logits(heads: torch.nn.ModuleDict, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits by attribute; "count" (B, 16, 5) and "color" (B, 16, 9) by kind."""
    logits = {name: head(hidden) for name, head in heads.items()}
    logits["count"] = logits["count"].unflatten(1, (len(world.KINDS), 5))
    logits["color"] = logits["color"].unflatten(1, (len(world.KINDS), len(COLORS)))
    return logits


def attribute_loss(logits: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum of the cross-entropies of the attributes in `truth`, without those that do not apply.

    What does not apply is -100.
    """
    loss = 0.0
    for name, values in truth.items():
        flat = logits[name].reshape(-1, logits[name].shape[-1])
        if (values >= 0).any():
            weight = {"count": len(world.KINDS), "where": 4}.get(name, 1)
            loss = loss + weight * F.cross_entropy(flat, values.flatten(), ignore_index=-100)
    return loss


def targets(scenes: list[world.Scene]) -> dict[str, torch.Tensor]:
    """Class indices for the heads; -100 where an attribute does not apply or is left open.

    No place is the plain one.
    """
    out = {
        "count": torch.zeros(len(scenes), len(world.KINDS), dtype=torch.long),
        "color": torch.full((len(scenes), len(world.KINDS)), -100),
        "place": torch.zeros(len(scenes), dtype=torch.long),
        "occupation": torch.full((len(scenes),), -100),
        "skin_tone": torch.full((len(scenes),), -100),
    }
    for i, scene in enumerate(scenes):
        out["place"][i] = PLACES.index("portrait" if scene.occupation else scene.place or "plain")
        if scene.occupation:
            out["occupation"][i] = OCCUPATIONS.index(scene.occupation)
            if scene.skin_tone:
                out["skin_tone"][i] = SKIN_TONES.index(scene.skin_tone)
        for group in scene.groups:
            out["count"][i, world.KINDS.index(group.kind)] = group.count
            if group.color:
                out["color"][i, world.KINDS.index(group.kind)] = COLORS.index(group.color)
    return out


def kind_map(placed: list[tuple[world.Group, float, float, float]]) -> np.ndarray:
    """Which kind is where, of a `world.layout`.

    Class indices (8, 8), of cells of 8 px; len(KINDS) where there is none.
    """
    centers = np.arange(4, world.SIZE, 8)
    where = np.full((8, 8), len(world.KINDS), np.int16)
    nearest = np.full((8, 8), np.inf)
    for group, x, y, scale in placed:
        distance = np.hypot(centers[None] - x, centers[:, None] - y) / scale
        here = (distance < 0.75) & (distance < nearest)
        where[here], nearest[here] = world.KINDS.index(group.kind), distance[here]
    return where


def load_judge(folder: str | Path = "zoo/judge", device: str = "cpu") -> Judge:
    judge = Judge()
    judge.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    return judge.eval().requires_grad_(False).to(device)


@torch.no_grad()
def read(judge: Judge, images: torch.Tensor) -> list[world.Scene]:
    """What the judge sees in pictures (B, 3, 64, 64) in [0, 1]; every attribute is filled in."""
    best = {name: logits.argmax(-1).cpu() for name, logits in judge(images)[0].items()}
    scenes = []
    for i in range(len(images)):
        place = PLACES[best["place"][i]]
        if place == "portrait":
            occupation = OCCUPATIONS[best["occupation"][i]]
            skin_tone = SKIN_TONES[best["skin_tone"][i]]
            scenes.append(world.Scene(occupation=occupation, skin_tone=skin_tone))
            continue
        groups = tuple(
            world.Group(kind, int(best["count"][i, k]), COLORS[best["color"][i, k]])
            for k, kind in enumerate(world.KINDS)
            if best["count"][i, k] > 0
        )
        scenes.append(world.Scene(groups, place=place))
    return scenes


def success(judge: Judge, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """1.0 where a picture has every attribute that its prompt asks for, else 0.0; (B,)."""
    pairs = zip(prompts, read(judge, images))
    wrong = [world.faults(world.parse(prompt), scene) for prompt, scene in pairs]
    return torch.tensor([float(not any(faults.values())) for faults in wrong])


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Squared Frechet distance between the Gaussians fitted to two sets of features (N, D).

    As Heusel et al. 2017 have it.
    """
    mean_a, cov_a = a.mean(0), np.cov(a, rowvar=False)
    mean_b, cov_b = b.mean(0), np.cov(b, rowvar=False)
    # tr (cov_a cov_b)^(1/2) is the sum of the roots of the product's eigenvalues, which are real
    # and not negative.
    roots = np.sqrt(np.clip(np.linalg.eigvals(cov_a @ cov_b).real, 0, None))
    apart = ((mean_a - mean_b) ** 2).sum()
    return float(apart + np.trace(cov_a) + np.trace(cov_b) - 2 * roots.sum())


@torch.no_grad()
def features_of_renders(
    judge: Judge, vae, images: torch.Tensor, seed: int = 0, copies: int = 4, first: int = 0
) -> torch.Tensor:
    """Features (copies * B, D) of real renders of what the judge sees in pictures.

    Every picture (B, 3, 64, 64) in [0, 1] is read by the judge, its scene rendered `copies` times
    and passed through the VAE. `first` is the number of the first picture: with it the parts of a
    set have the renders of the whole.
    """
    renders = []
    for i, scene in enumerate(read(judge, images), start=first):
        things = Counter()
        groups = []
        # The judge may see more in a broken picture than the world can draw.
        for group in scene.groups:
            count = min(group.count, 4 - sum(things.values()))
            things[group.kind] += count
            if count:
                groups.append(replace(group, count=count))
        scene = replace(scene, groups=tuple(groups))
        for copy in range(copies):
            renders.append(world.render(scene, np.random.default_rng([seed, i, copy])))
    real = torch.from_numpy(np.stack(renders)).permute(0, 3, 1, 2).float().to(images.device) / 255
    features = []
    for batch in real.split(64):
        latents = vae.encode(batch * 2 - 1).latent_dist.mean
        features.append(judge((vae.decode(latents).sample / 2 + 0.5).clamp(0, 1))[1])
    return torch.cat(features)


@torch.no_grad()
def image_quality(judge: Judge, vae, images: torch.Tensor, seed: int = 0, copies: int = 4) -> float:
    """Distance of pictures to real renders of what the judge sees in them; lower is better.

    What is asked for does not enter, only whether the pictures (B, 3, 64, 64) in [0, 1] look as the
    world's do.
    """
    return distance(judge(images)[1], features_of_renders(judge, vae, images, seed, copies))


def distance(shown: torch.Tensor, real: torch.Tensor) -> float:
    """`frechet_distance` of two sets of features (N, D)."""
    return frechet_distance(shown.double().cpu().numpy(), real.double().cpu().numpy())
