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

import hashlib
import io
import os
import sys
import tarfile
import warnings
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from common.users_code import quoted, shortened, what_was_raised
from harness.prompts import (
    LONGEST_LINE,
    Lines,
    SourceError,
    UsersSequence,
    cached_array,
    fault_of_prompt,
    json_object,
    json_prompt,
    read_on_all_ranks,
    taken,
)

PICTURES = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""Those that Pillow itself reads; for others it starts programs, Ghostscript for one."""
LARGEST_PICTURE = 256 << 20
"""Bytes of a picture's file."""
LONGEST_SIDE = 100
"""Times the short one: the whole picture is scaled before it is cropped."""


def open_pairs(source: str, seed: int) -> Sequence[tuple[Image.Image, str]]:
    """The (picture, caption) pairs of `source`, each read when asked for. Raises SourceError."""
    if ".py:" in source:
        return UsersSequence(source, seed, fault_of_pair)
    path = Path(source)
    if os.path.isfile(path / "metadata.jsonl"):
        pairs = ImageFolder(path)
    elif shards := tar_shards(path):
        pairs = TarShards(shards)
    else:
        folder = "folder with metadata.jsonl or *.tar shards"
        raise SourceError(f"{quoted(source)} is no {folder}, and no file.py:function")
    pairs[0]
    return pairs


def tar_shards(path: Path) -> list[Path]:
    """The *.tar files of a folder, or `path` itself when it is one."""
    if os.path.isdir(path):
        return sorted(path.glob("*.tar"))
    return [path] if path.suffix == ".tar" else []


def fault_of_pair(pair) -> str | None:
    """What is wrong with a (picture, caption) of the user's; None where it is as it should be."""
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        return f"{shortened(pair)} is no (picture, caption)"
    if not isinstance(pair[0], Image.Image):
        return f"{shortened(pair[0])} is no picture of PIL"
    return fault_of_prompt(pair[1])


def take_pairs(
    pairs: Sequence, seed: int, position: int, count: int, size: int
) -> tuple[torch.Tensor, list[str]]:
    """Pictures (count, 3, size, size) in [0, 1] and captions, from number `position` of the stream.

    The stream is that of `prompts.take`. Among millions of pictures some are broken: the next that
    can be read stands in, and a warning names the broken one. Collective, as `take` is.
    """

    def read() -> tuple[torch.Tensor, list[str]]:
        tensors, captions = torch.empty(count, 3, size, size), []
        for tensor, n in zip(tensors, range(position, position + count)):
            for other in range(n, n + 100):
                try:
                    [(picture, caption)] = taken(pairs, seed, other, 1)
                    tensor.copy_(to_tensor(picture, size))
                    break
                except SourceError as error:
                    if other == n + 99:
                        raise
                    print(f"warning: {error}", file=sys.stderr)
            captions.append(caption)
        return tensors, captions

    return read_on_all_ranks(read)


def to_tensor(picture: Image.Image, size: int) -> torch.Tensor:
    """The middle of a picture as float (3, size, size) in [0, 1].

    The short side is scaled to `size` (bicubic), then the long one cropped. Raises SourceError for
    a picture that has no middle of this kind.
    """
    if not 0 < max(picture.size) <= LONGEST_SIDE * min(picture.size):
        width, height = picture.size
        fault = f"a picture of {width} x {height} has sides that differ too much"
        raise SourceError(f"{fault}; leave it out of the data")
    try:
        picture = picture.convert("RGB")
    except (OSError, ValueError) as error:  # a user's own may be of any mode
        raise SourceError(f"a picture is no RGB ({shortened(str(error))})") from None
    scale = size / min(picture.size)
    if scale != 1:
        width, height = (max(size, round(side * scale)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = ((side - size) // 2 for side in picture.size)
    picture = picture.crop((left, top, left + size, top + size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def opened(data: io.BytesIO | Path, name: str) -> Image.Image:
    """The picture in a file; raises SourceError, whatever is wrong with it."""
    fault_of = lambda what: f"the picture {shortened(name)} cannot be read ({what})"
    try:
        if isinstance(data, Path) and not os.path.isfile(data):
            raise ValueError("it is not a regular file")
        if isinstance(data, Path) and data.stat().st_size > LARGEST_PICTURE:
            raise ValueError(f"it has more than {LARGEST_PICTURE >> 20} MB")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(data, formats=FORMATS)
            picture.load()
        return ImageOps.exif_transpose(picture)
    except Exception as error:  # decoders meet damage with nearly any kind
        what = fault_of(what_was_raised(error))
        raise SourceError(f"{what}; leave it out of the data") from None


class ImageFolder(Sequence):
    def __init__(self, folder: Path):
        self.folder, self.lines = folder, Lines(folder / "metadata.jsonl", self.parse)

    @staticmethod
    def parse(text: str) -> tuple[str, str]:
        name = json_object(text).get("file_name")
        if not isinstance(name, str) or not name:
            raise ValueError('there is no "file_name"')
        leaves = os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir
        if leaves or fault_of_prompt(name):
            fault = f'the "file_name" {quoted(name)} is no path inside the folder'
            raise ValueError(f"{fault}; put the picture there")
        return name, json_prompt(text, "")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, i: int) -> tuple[Image.Image, str]:
        name, caption = self.lines[i]
        return opened(self.folder / name, str(self.folder / name)), caption

    def digest(self) -> str:
        return self.lines.digest()


class Headers:
    """A tar file of which only headers are read: tarfile takes each header's word for its size."""

    def __init__(self, file):
        self.seek, self.tell, self.file = file.seek, file.tell, file

    def read(self, size: int) -> bytes:
        if not 0 <= size <= LONGEST_LINE:
            raise ValueError(f"a header of {size} bytes")
        return self.file.read(size)


class TarShards(Sequence):
    """Pairs in tar files, found by where they lie in their shard.

    That is five numbers a pair: offset and size of picture and caption, and whether the caption is
    JSON. A shard's headers are read once and their map is kept in the cache folder. A remote or
    compressed shard has to be copied or unpacked first.
    """

    def __init__(self, shards: list[Path]):
        self.shards, self.maps = shards, []
        for shard in shards:
            if not os.path.isfile(shard):  # a named pipe would never end
                raise SourceError(f"there is no regular file {quoted(str(shard))}; leave it out")
            self.maps.append(cached_array(shard, "pairs", lambda: self.index(shard)))
        self.ends = np.cumsum([len(where) for where in self.maps])

    @staticmethod
    def index(shard: Path) -> np.ndarray:
        found, picture, caption = array("q"), {}, {}
        size = shard.stat().st_size
        try:
            if size % tarfile.BLOCKSIZE:
                raise ValueError("its end is cut off")
            with open(shard, "rb") as data, tarfile.open(fileobj=Headers(data), mode="r:") as file:
                for member in file:
                    file.members.clear()  # tarfile remembers all of them
                    if member.size < 0:  # it would go back to members that it has read
                        raise ValueError(f"{quoted(member.name)} has {member.size} bytes")
                    if not member.isreg() or member.sparse is not None:
                        continue
                    if member.offset_data + member.size > size:
                        raise ValueError(f"{quoted(member.name)} is cut short")
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
                # tarfile takes a damaged header for the end, which is zeros.
                data.seek(file.offset)
                if data.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise ValueError(f"the header at byte {file.offset} is damaged")
        except Exception as error:  # tarfile meets damage with many kinds
            fault = f"{shortened(str(shard))} is no plain tar file ({what_was_raised(error)})"
            raise SourceError(f"{fault}; unpack it, or copy it again") from None
        if not found:
            rule = "a shard has NAME.jpg and NAME.txt, one after the other"
            raise SourceError(f"{shortened(str(shard))} holds no pairs: {rule}")
        return np.array(found, dtype=np.int64).reshape(-1, 5)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, i: int) -> tuple[Image.Image, str]:
        shard = int(np.searchsorted(self.ends, i, side="right"))
        where = self.maps[shard][i - self.ends[shard] + len(self.maps[shard])]
        name = f"{i} of {self.shards[shard]}"
        try:
            if where[1] > LARGEST_PICTURE or where[3] > LONGEST_LINE:
                raise ValueError(f"it has a picture of {where[1]} and a text of {where[3]} bytes")
            with open(self.shards[shard], "rb") as file:
                file.seek(where[0])
                picture = file.read(where[1])
                file.seek(where[2])
                caption = file.read(where[3]).decode("utf-8").strip()
            caption = json_prompt(caption, "") if where[4] else caption
            if fault := fault_of_prompt(caption):
                raise ValueError(fault)
        except (OSError, ValueError) as error:
            raise SourceError(f"pair {shortened(name)}: {shortened(str(error))}") from None
        return opened(io.BytesIO(picture), name), caption

    def digest(self) -> str:
        digest = hashlib.sha256()
        for shard, where in zip(self.shards, self.maps):
            digest.update(f"{shard.name!r} {shard.stat().st_size} ".encode())
            digest.update(np.ascontiguousarray(where))
        return f"sha256 {digest.hexdigest()}"


def open_pretrain_data(source: str | None, seed: int) -> Sequence:
    """The pairs of --pretrain-data. Raises SourceError."""
    if source is None:
        what = "a folder of pictures with metadata.jsonl, or of .tar shards"
        remedy = "--pretrain-beta 0 trains without (docs/prompts.md)"
        raise SourceError(f"--pretrain-data is missing: {what}; {remedy}")
    try:
        return open_pairs(source, seed)
    except (SourceError, OSError) as error:
        raise SourceError(f"--pretrain-data: {error}") from None
