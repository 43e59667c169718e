"""Pictures with captions for the pre-training loss; their order depends on seed and epoch alone.

path/to/folder            a folder with metadata.jsonl, a line {"file_name": "0001.jpg",
                          "text": "..."} for each picture (the imagefolder convention of the
                          library datasets; the caption under text, caption or prompt)
path/to/folder            a folder of WebDataset shards, *.tar, with NAME.jpg (.jpeg, .png,
                          .webp) and NAME.txt (or NAME.json) one after the other
path/to/shard.tar         one of them
path/to/file.py:function  your own: function(seed) returns a sequence of (picture, caption), the
                          picture as PIL has it
"""

import io
import sys
import tarfile
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from harness.prompts import (
    Lines,
    SourceError,
    cached,
    json_object,
    json_prompt,
    replacing,
    take,
    users_sequence,
)

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


def open_pairs(source: str, seed: int) -> Sequence[tuple[Image.Image, str]]:
    """The (picture, caption) pairs of `source`, each read when asked for. Raises SourceError."""
    if ".py:" in source:
        return users_sequence(source, seed)
    path = Path(source)
    if (path / "metadata.jsonl").is_file():
        pairs = ImageFolder(path)
    elif shards := tar_shards(path):
        pairs = TarShards(shards)
    else:
        folder = "folder with metadata.jsonl or *.tar shards"
        raise SourceError(f"{source!r} is no {folder}, and no file.py:function")
    pairs[0]
    return pairs


def tar_shards(path: Path) -> list[Path]:
    """The *.tar files of a folder, or `path` itself when it is one."""
    if path.is_dir():
        return sorted(path.glob("*.tar"))
    return [path] if path.suffix == ".tar" else []


def take_pairs(
    pairs: Sequence, seed: int, position: int, count: int, size: int
) -> tuple[torch.Tensor, list[str]]:
    """Pictures (count, 3, size, size) in [0, 1] and captions, from number `position` of the stream.

    The stream is that of `prompts.take`. Among millions of pictures some are broken: the next that
    can be read stands in, and a warning names the broken one.
    """
    pictures, captions = [], []
    for n in range(position, position + count):
        for other in range(n, n + 100):
            try:
                [(picture, caption)] = take(pairs, seed, other, 1)
                break
            except SourceError as error:
                if other == n + 99:
                    raise
                print(f"warning: {error}", file=sys.stderr)
        pictures.append(to_tensor(picture, size))
        captions.append(caption)
    return torch.stack(pictures), captions


def to_tensor(picture: Image.Image, size: int) -> torch.Tensor:
    """The middle of a picture as float (3, size, size) in [0, 1].

    The short side is scaled to `size` (bicubic), then the long one cropped.
    """
    picture = picture.convert("RGB")
    scale = size / min(picture.size)
    if scale != 1:
        width, height = (max(size, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in picture.size)
    picture = picture.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def opened(data, name: str) -> Image.Image:
    try:
        picture = Image.open(data)
        picture.load()
        return picture
    except OSError as error:  # PIL's own errors among them
        fault = f"the picture {name} cannot be read ({error})"
        raise SourceError(f"{fault}; leave it out of the data") from None


class ImageFolder(Sequence):
    def __init__(self, folder: Path):
        self.folder, self.lines = folder, Lines(folder / "metadata.jsonl", self.parse)

    @staticmethod
    def parse(text: str) -> tuple[str, str]:
        file_name = json_object(text).get("file_name")
        if not isinstance(file_name, str):
            raise ValueError('there is no "file_name"')
        return file_name, json_prompt(text, "")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> tuple[Image.Image, str]:
        file_name, caption = self.lines[i]
        return opened(self.folder / file_name, self.folder / file_name), caption


class TarShards(Sequence):
    """Pairs in tar files, found by where they lie in their shard.

    That is five numbers a pair: offset and size of picture and caption, and whether the caption is
    JSON. A shard's headers are read once and their map is kept in the cache folder. A remote or
    compressed shard has to be copied or unpacked first.
    """

    def __init__(self, shards: list[Path]):
        self.shards, self.maps = shards, []
        for shard in shards:
            kept = cached(shard, "pairs")
            if not kept.exists():
                with replacing(kept) as file:
                    np.save(file, self.index(shard))
            self.maps.append(np.load(kept, mmap_mode="r"))
        self.ends = np.cumsum([len(where) for where in self.maps])

    @staticmethod
    def index(shard: Path) -> np.ndarray:
        found, picture, caption = array("q"), {}, {}
        try:
            with tarfile.open(shard, "r:") as file:
                for member in file:
                    folder, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")  # WebDataset's key ends at the first dot
                    key, suffix = f"{folder}/{stem}", f".{suffix.lower()}"
                    here = (member.offset_data, member.size)
                    if suffix in PICTURES:
                        picture = {key: here}
                    elif suffix == ".txt" or (suffix == ".json" and key not in caption):
                        caption = {key: (*here, suffix == ".json")}
                    if key in picture and key in caption:
                        found.extend((*picture.pop(key), *caption.pop(key)))
                    file.members.clear()  # tarfile remembers all of them
        except tarfile.TarError as error:
            raise SourceError(f"{shard} is no plain tar file ({error})") from None
        if not found:
            rule = "a shard has NAME.jpg and NAME.txt, one after the other"
            raise SourceError(f"{shard} holds no pairs: {rule}")
        return np.array(found, dtype=np.int64).reshape(-1, 5)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> tuple[Image.Image, str]:
        shard = int(np.searchsorted(self.ends, i, side="right"))
        where = self.maps[shard][i - self.ends[shard] + len(self.maps[shard])]
        with open(self.shards[shard], "rb") as file:
            file.seek(where[0])
            picture = file.read(where[1])
            file.seek(where[2])
            caption = file.read(where[3])
        name = f"{i} of {self.shards[shard]}"
        try:
            caption = caption.decode("utf-8").strip()
            picture, is_json = opened(io.BytesIO(picture), name), where[4]
            return picture, json_prompt(caption, "") if is_json else caption
        except ValueError as error:
            raise SourceError(f"pair {name}: {error}") from None


def open_pretrain_data(source: str | None, seed: int) -> Sequence:
    """The pairs of --pretrain-data. Raises SourceError."""
    if source is None:
        what = "a folder of pictures with metadata.jsonl, or of .tar shards"
        remedy = "--pretrain-beta 0 trains without (docs/large_scale_ppo.md)"
        raise SourceError(f"--pretrain-data is missing: {what}; {remedy}")
    try:
        return open_pairs(source, seed)
    except (SourceError, OSError) as error:
        raise SourceError(f"--pretrain-data: {error}") from None
