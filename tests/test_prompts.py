"""harness/prompts.py and prompts/: every prompt once an epoch, whatever the file.

And formats, faults, the paper's lists.
"""

import gzip
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pyarrow
import pytest
from conftest import ROOT
from pyarrow import parquet

from common.rewards.object_detection import objects_of
from harness import prompts
from harness.prompts import SourceError, open_prompts, order, take
from prompts import composition, make_zoo
from zoo import world


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "clean-diffusion-rl"


def write(path, text: str | bytes):
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return str(path)


def test_every_prompt_once_an_epoch(tmp_path):
    lines = [f"prompt {i}" for i in range(1000)]
    source = open_prompts(write(tmp_path / "p.txt", "\n".join(lines)), 0)
    stream = [prompt for k in range(0, 3000, 7) for prompt in take(source, 5, k, min(7, 3000 - k))]
    epochs = [stream[:1000], stream[1000:2000], stream[2000:]]
    assert all(Counter(epoch) == Counter(lines) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != lines
    assert take(source, 5, 990, 20) == stream[990:1010], "over the end of an epoch"
    assert take(source, 6, 0, 1000) != epochs[0] and take(source, 5, 0, 1000) == epochs[0]


def test_order_is_shuffled_evenly():
    """Each item is at each place equally often, over seeds and epochs.

    Chi-square of 6 items at 6 places.
    """
    counts = np.zeros((6, 6))
    for seed in range(40):
        for epoch in range(30):
            counts[np.arange(6), order(6, seed, epoch)] += 1
    chi_square = ((counts - 200) ** 2 / 200).sum()
    assert chi_square < 60, "25 degrees of freedom: less than 60 in all but 1 of 10000"


FORMATS = {
    "plain": ("p.txt", "a cat\nein Dackel für zwei\n"),
    "windows": ("p.txt", "a cat\r\nein Dackel für zwei\r\n"),
    "mark, blank lines, no end": ("p.txt", "\ufeffa cat\n\n  \t\n  ein Dackel für zwei  "),
    "gz": ("p.txt.gz", gzip.compress("a cat\nein Dackel für zwei\n".encode())),
    "jsonl": (
        "p.jsonl",
        '{"prompt": "a cat"}\n\n{"prompt": "ein Dackel f\\u00fcr zwei", "id": 3}\n',
    ),
    "jsonl, other keys": ("p.jsonl", '{"text": "a cat"}\n{"caption": " ein Dackel für zwei"}\n'),
    "jsonl, named key": ("p.jsonl#q", '{"q": "a cat", "text": "x"}\n{"q": "ein Dackel für zwei"}'),
    "jsonl.gz": (
        "p.jsonl.gz",
        gzip.compress('{"text": "a cat"}\n{"text": "ein Dackel für zwei"}\n'.encode()),
    ),
    "function": (
        "p.py:f",
        "def f(seed):\n    return ['a cat', 'ein Dackel für zwei'][: 2 + seed * 0]\n",
    ),
}


@pytest.mark.parametrize("always_cached", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name, always_cached, tmp_path, monkeypatch):
    file, text = FORMATS[name]
    write(tmp_path / file.partition("#")[0].partition(":")[0], text)
    monkeypatch.setattr(prompts, "CACHED_FROM", 0 if always_cached else 1 << 20)
    for _ in range(2):  # the second time from the cache
        source = open_prompts(str(tmp_path / file), 0)
        assert list(source) == ["a cat", "ein Dackel für zwei"] and len(source) == 2


WRONG = {
    "no file": ("nowhere.txt", None, "nowhere.txt"),
    "empty": ("p.txt", "\n \n", "no prompts"),
    "bad bytes": ("p.txt", b"a cat\n\na \xff dog\n", "line 3"),
    "null byte": ("p.txt", b"a cat\n\na \0 dog\n", "line 3"),
    "UTF-16": ("p.txt", "a cat\n".encode("utf-16"), "line 1"),
    "null byte in JSON": (
        "p.jsonl",
        '{"prompt": "a cat"}\n{"prompt": "a \\u0000 dog"}\n',
        "line 2",
    ),
    "half a character in JSON": ("p.jsonl", '{"prompt": "a \\ud83d"}\n', "line 1"),
    "not JSON": ("p.jsonl", '{"prompt": "a cat"}\nprompt\n', "line 2"),
    "no object": ("p.jsonl", '["a cat"]\n', "line 1"),
    "no key": ("p.jsonl", '{"prompt": "a cat"}\n{"words": "a dog"}\n', "line 2"),
    "named key missing": ("p.jsonl#q", '{"prompt": "a cat"}\n', "'q'"),
    "not text": ("p.jsonl", '{"prompt": 3}\n', "line 1"),
    "objects": ("p.jsonl", '{"prompt": "a cat", "objects": "cat"}\n', "objects"),
    "key of a text file": ("p.txt#q", "a cat\n", "#KEY"),
    "half a gz": ("p.txt.gz", gzip.compress(os.urandom(1000))[:500], "gzip"),
    "function missing": ("p.py:g", "def f(seed): return ['a cat']\n", "'g'"),
    "function fails": ("p.py:f", "def f(seed): return 1 / 0\n", "ZeroDivisionError"),
    "function returns nothing": ("p.py:f", "def f(seed): return []\n", "nothing"),
    "function returns numbers": ("p.py:f", "def f(seed): return [1, 2]\n", "prompts"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_sources_are_named(name, tmp_path, own_cache):
    file, text, mentioned = WRONG[name]
    if text is not None:
        write(tmp_path / file.partition("#")[0].partition(":")[0], text)
    with pytest.raises(SourceError) as error:
        open_prompts(str(tmp_path / file), 0)
    assert mentioned in str(error.value) and "\n" not in str(error.value)
    left = list(own_cache.iterdir()) if own_cache.exists() else []
    assert not left, "nothing half made may stay in the cache"


def test_any_text_is_a_prompt(tmp_path):
    """Right to left, with marks that change the direction, in other scripts, emoji, very long."""
    texts = [
        "قطة زرقاء",
        "\u202eretni\u202c winter",
        "青い猫",
        "\U0001f408 on the \U0001f319",
        "a cat " * 2000 + "x",
    ]
    assert list(open_prompts(write(tmp_path / "p.txt", "\n".join(texts)), 0)) == texts


def test_parquet_without_pyarrow_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(SourceError, match="pip install pyarrow"):
        open_prompts(write(tmp_path / "p.parquet", "PAR1"), 0)


def test_parquet(tmp_path):
    table = pyarrow.table({"id": [1, 2, 3, 4], "caption": ["a cat", None, "two\nlines", ""]})
    parquet.write_table(table, tmp_path / "p.parquet")
    for source in ("p.parquet", "p.parquet#caption"):
        assert list(open_prompts(str(tmp_path / source), 0)) == ["a cat", "two\nlines"]
    with pytest.raises(SourceError, match="id, caption"):
        open_prompts(str(tmp_path / "p.parquet#words"), 0)


def test_the_docs_make_a_text_file_of_diffusiondb(tmp_path):
    """Each prompt once, in a line, by the command of docs/prompts.md."""
    page = (ROOT / "docs/prompts.md").read_text()
    (code,) = re.findall(r'python -c "\n(.*?)"\n```', page, re.DOTALL)
    (tmp_path / "prompts").mkdir()
    table = pyarrow.table({"prompt": ["a cat", None, "two\n lines", "", "a cat"], "seed": [1] * 5})
    parquet.write_table(table, tmp_path / "prompts/diffusiondb.parquet")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "prompts/diffusiondb.txt").read_text() == "a cat\ntwo lines\n"


def test_objects_reach_the_reward(tmp_path):
    record = {"prompt": "salt and pepper, a cup", "objects": ["salt", "a cup"]}
    source = write(tmp_path / "p.jsonl", json.dumps(record))
    assert objects_of(open_prompts(source, 0)[0]) == ["salt", "cup"]


def test_a_changed_file_is_read_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "CACHED_FROM", 0)
    source = write(tmp_path / "p.txt", "a cat\na dog\n")
    assert list(open_prompts(source, 0)) == ["a cat", "a dog"]
    write(tmp_path / "p.txt", "a red cat\na dog\na pig\n")
    assert list(open_prompts(source, 0)) == ["a red cat", "a dog", "a pig"]


CHILD = """
import sys
from harness import prompts
prompts.CACHED_FROM = 0
lines = list(prompts.open_prompts(sys.argv[1], 0))
assert lines == [f"prompt {i}" for i in range(20_000)], len(lines)
"""


def test_several_processes_index_a_file_at_once(tmp_path, own_cache):
    with gzip.open(tmp_path / "p.txt.gz", "wt") as file:
        file.writelines(f"prompt {i}\n" for i in range(20_000))
    command = [sys.executable, "-c", CHILD, str(tmp_path / "p.txt.gz")]
    children = [subprocess.Popen(command, cwd=ROOT) for _ in range(4)]
    assert [child.wait(300) for child in children] == [0] * 4
    assert len(list(own_cache.iterdir())) == 2, "the text and its map, and no temporary files"


def test_a_long_file_starts_quickly(tmp_path, monkeypatch):
    """150 000 lines here; benchmarks/prompt_stream.py has 1.5 million."""
    lines = [f"prompt number {i} of very many\n" for i in range(150_000)]
    source = write(tmp_path / "p.txt", "".join(lines))
    open_prompts(source, 0)
    monkeypatch.setattr(prompts.Lines, "index", lambda self: pytest.fail("read again"))
    clock = time.perf_counter()
    again = open_prompts(source, 0)
    assert len(set(take(again, 0, 149_000, 2000))) > 1900 and time.perf_counter() - clock < 2


def test_lists_are_those_of_the_paper():
    objects = (ROOT / "prompts/objects.txt").read_text().splitlines()
    occupations = (ROOT / "prompts/occupations.txt").read_text().splitlines()
    assert len(objects) == len(set(objects)) == 532
    assert len(occupations) == len(set(occupations)) == 100
    assert (objects[0], objects[265], objects[-1]) == ("an accordion", "a mailbox", "a zucchini")
    assert {"an suv", "a utility pole", "french fries", "rice", "a rifle, gun"} <= {*objects}
    assert occupations[0] == "a portrait of an accountant"
    assert occupations[-1] == "a portrait of a web designer"
    for line in occupations:
        article, name = line.removeprefix("a portrait of ").split(" ", 1)
        assert article == ("an" if name[0] in "aeiou" else "a"), line


def test_composition_prompts():
    train, held_out = composition.split(3)
    assert len(train) == 450 and len(held_out) == 82 and not {*train} & {*held_out}
    assert composition.split(4)[0] != train
    prompts = composition.train(3)
    assert len(prompts) == 450 * 449 * 5
    objects = ["a cat", "an owl", "rice"]
    small = list(composition.Composition(objects))
    pairs = [(a, b) for a in objects for b in objects if a != b]
    expected = {f"{a} {relation} {b}" for a, b in pairs for relation in world.RELATIONS}
    assert len(small) == len(set(small)) == 30 and set(small) == expected
    for prompt in (prompts[0], prompts[-1], *take(prompts, 0, 0, 200)):
        first, second = objects_of(prompt)
        assert first != second and first in " ".join(train) and second in " ".join(train)
    with pytest.raises(IndexError):
        prompts[len(prompts)]


def test_files_of_the_zoo_are_those_of_the_generator(tmp_path, monkeypatch):
    monkeypatch.setattr(make_zoo, "__file__", str(tmp_path / "make_zoo.py"))
    make_zoo.main()
    for path in tmp_path.iterdir():
        text = path.read_text()
        assert text == (ROOT / "prompts" / path.name).read_text(), path.name
        assert all(world.parse(line) for line in text.splitlines())
    for name in ("preference", "composition", "portraits"):
        seen = {*(tmp_path / f"zoo_{name}.txt").read_text().splitlines()}
        unseen = {*(tmp_path / f"zoo_{name}_held_out.txt").read_text().splitlines()}
        assert seen and unseen and not seen & unseen
