"""harness/pairs.py: picture folders, tar shards and functions give the same pairs.

And broken pictures, and cropping.
"""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from harness.pairs import open_pairs, take_pairs, to_tensor
from harness.prompts import SourceError
from zoo import world


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def png(i: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (12, 8), (10 * i, 0, 255)).save(data, "PNG")
    return data.getvalue()


def write_folder(folder, count=5):
    (folder / "sub").mkdir(parents=True)
    lines = []
    for i in range(count):
        (folder / f"sub/{i}.png").write_bytes(png(i))
        pair = {"file_name": f"sub/{i}.png", ("text", "caption")[i % 2]: f"caption {i}"}
        lines.append(json.dumps(pair))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def add(tar, name: str, data: bytes):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_shards(folder):
    """Five pairs in two shards, as img2dataset writes them.

    Beside them what does not belong to a pair.
    """
    folder.mkdir()
    for shard, members in (("00000", (0, 1, 2)), ("00001", (3, 4))):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in members:
                if i % 2:
                    record = {"caption": f"caption {i}", "nsfw": None}
                    add(tar, f"{i:09}.json", json.dumps(record).encode())
                    add(tar, f"{i:09}.png", png(i))
                else:
                    add(tar, f"{i:09}.png", png(i))
                    add(tar, f"{i:09}.txt", f"caption {i}\n".encode())
                    add(tar, f"{i:09}.json", b"{}")
            add(tar, "lonely.jpg", png(9))
            add(tar, "lonelier.txt", b"a caption without a picture")
    return str(folder)


def write_function(folder):
    folder.mkdir()
    (folder / "mine.py").write_text(
        "from PIL import Image\n"
        "def picture(i):\n"
        "    return Image.new('RGB', (12, 8), (10 * i, 0, 255))\n"
        "def f(seed):\n"
        "    return [(picture(i), f'caption {i}') for i in range(5)]\n"
    )
    return f"{folder}/mine.py:f"


@pytest.mark.parametrize("write", [write_folder, write_shards, write_function])
def test_sources(write, tmp_path):
    source = write(tmp_path / "data")
    for _ in range(2):  # the second time from the cache
        pairs = open_pairs(source, 0)
        assert len(pairs) == 5
        expected = [((10 * i, 0, 255), f"caption {i}") for i in range(5)]
        assert [(picture.getpixel((3, 3)), caption) for picture, caption in pairs] == expected
    pictures, captions = take_pairs(pairs, 1, 3, 7, 8)
    assert pictures.shape == (7, 3, 8, 8)
    assert sorted(captions[2:]) == [f"caption {i}" for i in range(5)]
    for picture, caption in zip(pictures, captions):
        assert (picture[0] * 255).round().unique().tolist() == [10 * int(caption[-1])]
    if write is write_shards:
        assert len(open_pairs(source + "/00001.tar", 0)) == 2


def test_a_photo_is_turned_upright(tmp_path):
    """A camera that lay on its side says so in the file: 6 is a quarter turn clockwise."""
    exif = Image.Exif()
    exif[274] = 6
    picture = Image.new("RGB", (20, 10), "black")
    picture.paste("white", (0, 0, 10, 10))
    picture.save(tmp_path / "a.jpg", exif=exif)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "a cat"}')
    upright, _ = open_pairs(tmp_path.as_posix(), 0)[0]
    assert upright.size == (10, 20)
    assert upright.getpixel((5, 3))[0] > 200 and upright.getpixel((5, 16))[0] < 50


def test_broken_picture_is_replaced_by_the_next(tmp_path, capsys):
    source = write_folder(tmp_path / "data")
    whole, captions = take_pairs(open_pairs(source, 0), 0, 0, 5, 8)
    broken = int(captions[2][-1])
    (tmp_path / f"data/sub/{broken}.png").write_bytes(png(broken)[:40])
    assert broken != 0, "the first is read at the start, so that a wrong folder is refused"
    pictures, replaced = take_pairs(open_pairs(source, 0), 0, 0, 5, 8)
    assert replaced == captions[:2] + [captions[3]] + captions[3:] and pictures[2].equal(whole[3])
    assert f"{broken}.png" in capsys.readouterr().err


WRONG = {
    "no folder": (lambda f: None, "metadata.jsonl"),
    "empty folder": (lambda f: f.mkdir(), "metadata.jsonl"),
    "no file_name": (lambda f: write_lines(f, '{"text": "a cat"}'), "file_name"),
    "no caption": (lambda f: write_lines(f, '{"file_name": "a.png"}'), "line 1"),
    "no picture": (lambda f: write_lines(f, '{"file_name": "a.png", "text": "a cat"}'), "a.png"),
    "no tar": (lambda f: write_lines(f, "words", "a.tar"), "tar"),
    "tar without pairs": (lambda f: empty_tar(f), "no pairs"),
}


def write_lines(folder, text, name="metadata.jsonl"):
    folder.mkdir()
    (folder / name).write_text(text)


def empty_tar(folder):
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        add(tar, "a.jpg", b"")


@pytest.mark.parametrize("name", WRONG)
def test_wrong_sources_are_named(name, tmp_path):
    make, mentioned = WRONG[name]
    make(tmp_path / "data")
    with pytest.raises(SourceError) as error:
        open_pairs(str(tmp_path / "data"), 0)
    assert mentioned in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("width, height", [(8, 8), (16, 8), (8, 20), (4, 6), (33, 17)])
def test_middle_of_a_picture(width, height):
    """Red grows to the right and green downwards: the crop's middle is the picture's."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    picture = Image.fromarray(np.stack([x, y, 0 * x], axis=-1).round().astype(np.uint8))
    tensor = to_tensor(picture, 8)
    assert tensor.shape == (3, 8, 8) and tensor.dtype == torch.float32
    assert 0 <= tensor.min() <= tensor.max() <= 1
    assert tensor[0].mean().item() == pytest.approx(0.5, abs=0.04)
    assert tensor[1].mean().item() == pytest.approx(0.5, abs=0.04)
    if (width, height) == (8, 8):
        assert (tensor[0] * 255).round().byte().numpy().tolist() == x.round().astype(int).tolist()


def test_the_zoo_is_its_own_data(monkeypatch):
    monkeypatch.chdir(ROOT)
    pairs, other = open_pairs("zoo/pairs.py:biased", 0), open_pairs("zoo/pairs.py:biased", 1)
    assert len(pairs) == 96_000
    captions = [pairs[i][1] for i in range(40)]
    assert captions == [pairs[i][1] for i in range(40)] != [other[i][1] for i in range(40)]
    assert all(world.parse(caption) for caption in captions) and pairs[7][0].size == (64, 64)
