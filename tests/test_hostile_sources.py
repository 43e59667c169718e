"""Rewards, prompts, pairs and servers that are damaged, endless or hostile: one line, and no more.

What a script refuses before it loads a model is run through its main(); a reward's function, a
server and a single item are called by themselves.
"""

import contextlib
import functools
import gc
import gzip
import io
import json
import os
import socket
import socketserver
import stat
import struct
import sys
import tarfile
import threading
import time
import zlib

import hypothesis
import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from hostile import GROWTH, SECONDS, Case, ends_in_one_line, most_memory
from hypothesis import strategies as some
from PIL import Image
from test_pairs import png, write_folder, write_shards
from test_prompts import write

import dpok
import large_scale_ppo
from common.rewards import RewardError, check_spec, load_reward, parse_sum
from common.rewards.base import PromptError
from common.rewards.llava_bertscore import ask_vlm, describe_on_server, read_options
from common.users_code import shortened
from harness.pairs import ImageFolder, TarShards, open_pairs, take_pairs, to_tensor
from harness.prompts import SourceError, cache_folder, identity, json_prompt, open_prompts, take
from harness.prompts import read_prompts as prompts_of
from harness.tasks import read_tasks


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(ROOT)


@pytest.fixture
def refused(monkeypatch):
    """No script gets as far as a run."""
    for script in (dpok, large_scale_ppo):
        monkeypatch.setattr(script, "Run", lambda *args, **more: pytest.fail("it is not refused"))


@pytest.fixture
def case_folder(tmp_path):
    (tmp_path / "case").mkdir()
    return tmp_path / "case"


@contextlib.contextmanager
def bounded():
    """A block that takes no longer, and no more memory, than a case may."""
    memory, began = most_memory(anew=True), time.monotonic()
    yield
    grown = most_memory() - memory
    assert time.monotonic() - began < SECONDS and grown < GROWTH


def is_one_line(error: Exception, *words: str) -> None:
    message = str(error)
    assert len(message) < 1000 and "\n" not in message and message.isprintable(), message[:2000]
    assert all(word in message for word in words), message


def cached_bytes() -> int:
    folder = cache_folder()
    return sum(file.stat().st_size for file in folder.iterdir()) if folder.exists() else 0


# --- Specs of rewards

URL = "llava_bertscore:http://localhost:1/v1"
SPECS = {
    "no such reward": ("beauty", "no reward 'beauty'"),
    "nothing": ("", "no reward ''"),
    "a blank": (" ", "no reward"),
    "another case": ("Aesthetic", "no reward 'Aesthetic'"),
    "a blank before": (" aesthetic", "no reward"),
    "a new line": ("aesthetic\nclip_score", "no reward"),
    "an escape": ("\x1b[31mred\x1b[0m", "no reward"),
    "half a character": ("\udcff", "no reward"),
    "a path up": ("../../etc/passwd", "no reward"),
    "a module of the standard library": ("os", "no reward 'os'"),
    "a colon alone": (":", "no reward ''"),
    "a question mark alone": ("?", "no reward ''"),
    "a word of 100 000": ("a" * 100_000, "more than 10000 characters"),
    "blanks of 100 000 in a sum": ("1*a" + " " * 100_000 + "b", "more than 10000 characters"),
    "terms of 100 000": ("1*aesthetic" + "+1*aesthetic" * 10_000, "more than 10000 characters"),
    "pluses of 9 000": ("1*" + "+" * 9_000, "no reward"),
    "pluses and digits": ("1*a" + "+1" * 4_500, "no reward"),
    "blanks of 9 000": ("1*a" + " " * 9_000 + "b", "no reward"),
    "a sum without weights": ("aesthetic+clip_score", "0.7*aesthetic+-0.3*clip_score"),
    "a weight without a reward": ("0.5*aesthetic+0.5*", "no finite weight"),
    "a reward that is blank": ("1*  ", "no finite weight"),
    "two stars": ("1**aesthetic", "no reward '*aesthetic'"),
    "two pluses": ("1*aesthetic++", "no reward 'aesthetic++'"),
    "infinite weight": ("1e999*aesthetic", "no finite weight"),
    "a weight of 1000 digits": ("9" * 1000 + "*aesthetic", "no finite weight"),
    "a weight that is no number": ("nan*aesthetic", "no reward"),
    "a weight in hexadecimal": ("0x1p3*aesthetic", "no reward"),
    "digits of another script": ("٣*beauty", "no reward"),
    "the second is wrong": ("0.5*jpeg_compressibility+0.5*beauty", "no reward 'beauty'"),
    "a sum in a sum": ("1*2*aesthetic", "no reward '2*aesthetic'"),
    "weights that are no folder": ("aesthetic:./nowhere", "no folder './nowhere'"),
    "weights with a blank": ("clip_score:a b/c", "no folder"),
    "weights that are a file": ("clip_score:./README.md", "no folder './README.md'"),
    "weights that are /dev/zero": ("clip_score:/dev/zero", "no folder '/dev/zero'"),
    "weights of another kind": ("clip_score:docs", "holds no config.json"),
    "weights with a name too long": ("image_reward:./" + "a" * 5000, "no folder"),
    "weights of half a character": ("image_reward:\udcff", "no folder"),
    "weights as a URL": ("image_reward:http://localhost/x", "no folder"),
    "weights where there are none": ("jpeg_compressibility:x", "takes no weights"),
    "an option that is not known": ("aesthetic?x=1", "no option 'x'"),
    "an option of 5000 letters": ("aesthetic?" + "x" * 5000, "no option"),
    "an option without a name": ("aesthetic?=1", "no option ''"),
    "an option in bytes": ("aesthetic?%ff%00=%0a", "no option"),
    "an option twice": (URL + "?retries=1&retries=2", "an option twice"),
    "9000 options": ("aesthetic?" + "&".join(f"{i}=" for i in range(1000)), "no option"),
    "a number that is none": (URL + "?timeout=soon", "timeout=soon"),
    "a number of nothing": (URL + "?timeout=", "timeout="),
    "a number below": (URL + "?timeout=0", "timeout=0"),
    "a negative number": (URL + "?retries=-1", "0 or more"),
    "half a number": (URL + "?concurrency=1.5", "concurrency=1.5"),
    "a number of 5000 digits": (URL + "?layer=" + "9" * 5000, "at most 1000"),
    "a year of time-out": (URL + "?timeout=31536000", "at most 86400"),
    "a million threads": (URL + "?concurrency=1000000", "at most 256"),
    "digits that are no digits": (URL + "?layer=²", "whole number"),
    "one label": ("statistical_parity?labels=one", "at least two labels"),
    "labels without words": ("statistical_parity?labels=a,,b", "at least two labels"),
    "labels that are equal": ("statistical_parity?labels=a, a", "all of them different"),
    "a scorer that is no folder": (URL + "?scorer=./nowhere", "no folder './nowhere'"),
    "a URL without a host": ("llava_bertscore:http://", "http://HOST:PORT/v1"),
    "a URL without slashes": ("llava_bertscore:http:localhost", "no folder"),
    "a port that is no number": ("llava_bertscore:http://localhost:p/v1", "no URL"),
    "a port too large": ("llava_bertscore:http://localhost:65536/v1", "no URL"),
    "port 0": ("llava_bertscore:http://localhost:0/v1", "no URL"),
    "a bracket that is open": ("llava_bertscore:http://[::1/v1", "no URL"),
    "a blank in a URL": ("llava_bertscore:http://local host/v1", "no URL"),
    "a line in a URL": ("llava_bertscore:http://h/v1\r\nHost: x", "no URL"),
    "a URL with a key": ("llava_bertscore:http://me:secret@localhost/v1", "no URL"),
    "a URL with a fragment": ("llava_bertscore:http://localhost/v1#x", "no URL"),
    "a URL in another script": ("llava_bertscore:http://köln/v1", "no URL"),
    "a file's URL": ("llava_bertscore:file:///etc/passwd", "no folder"),
    "a server without a host": ("http://", "no URL"),
    "a server of a blank": ("http:// ", "no URL"),
    "a server with a key": ("https://me:secret@localhost/score", "no URL"),
    "a server in lines": ("http://h/score\r\nHost: x", "no URL"),
    "a server in capitals": ("HTTP://localhost/score", "no reward 'HTTP'"),
    "a server's option": ("http://localhost:1/score?key=secret", "no option 'key'"),
    "a server's number": ("http://localhost:1/score?batch_size=-1", "batch_size=-1"),
    "a server of half a character": ("http://\udcff/", "no URL"),
    "a file without a function": ("mine.py", "write mine.py:FUNCTION"),
    "a function without a name": ("mine.py:", "write mine.py:FUNCTION"),
    "a file that is not there": ("nowhere.py:f", "no file 'nowhere.py'"),
    "a file with a name too long": ("a" * 5000 + ".py:f", "no file"),
    "a file of half a character": ("\udcff.py:f", "no file"),
    "a folder as a file": ("{tmp}/folder.py:f", "no file"),
    "a pipe as a file": ("{tmp}/pipe.py:f", "no file"),
    "/dev/zero as a file": ("{tmp}/zero.py:f", "no file"),
    "a socket as a file": ("{tmp}/socket.py:f", "no file"),
}


def strange_files(folder, suffix: str) -> None:
    (folder / f"folder{suffix}").mkdir()
    os.mkfifo(folder / f"pipe{suffix}")
    (folder / f"zero{suffix}").symlink_to("/dev/zero")
    os.mknod(folder / f"socket{suffix}", stat.S_IFSOCK | 0o600)
    (folder / f"circle{suffix}").symlink_to(f"circle{suffix}")


REWARD_CASES = [
    Case(
        name,
        ("zoo", "--reward", spec, "--output-dir", "{tmp}/out"),
        words if name == "a function without a name" else ("--reward", words),
        before=lambda tmp: strange_files(tmp, ".py"),
    )
    for name, (spec, words) in SPECS.items()
]


@pytest.mark.parametrize("case", REWARD_CASES, ids=str)
def test_specs_of_rewards(refused, case, case_folder, monkeypatch, capsys):
    ends_in_one_line(case, dpok.main, "dpok.py", case_folder, monkeypatch, capsys)


# --- Tasks

TASKS = {
    "nothing": "",
    "blanks": "   ",
    "a reward alone": "jpeg_compressibility",
    "four fields": "jpeg_compressibility prompts/zoo.txt 2x2 2x2",
    "a quote that is open": "jpeg_compressibility 'prompts/zoo.txt",
    "a backslash at the end": "jpeg_compressibility prompts/zoo.txt\\",
    "one number": "jpeg_compressibility prompts/zoo.txt 8",
    "three numbers": "jpeg_compressibility prompts/zoo.txt 8x4x2",
    "no numbers": "jpeg_compressibility prompts/zoo.txt x",
    "words": "jpeg_compressibility prompts/zoo.txt axb",
    "halves": "jpeg_compressibility prompts/zoo.txt 1.5x2",
    "none of them": "jpeg_compressibility prompts/zoo.txt 0x4",
    "negative": "jpeg_compressibility prompts/zoo.txt -2x-2",
    "5000 digits": "jpeg_compressibility prompts/zoo.txt 1x" + "9" * 5000,
    "1e30": "jpeg_compressibility prompts/zoo.txt 1e30x2",
    "a million millions": "jpeg_compressibility prompts/zoo.txt 1000000x1000000",
    "30 digits": "jpeg_compressibility prompts/zoo.txt " + "9" * 30 + "x1",
    "a reward that is not": "beauty prompts/zoo.txt 2x2",
    "prompts that are not": "jpeg_compressibility nowhere.txt 2x2",
    "a group of one": "statistical_parity:zoo/skin_tone prompts/zoo.txt 8x1",
    "100 000 letters": "jpeg_compressibility " + "a" * 100_000 + " 2x2",
    "half a character": "jpeg_compressibility \udcff 2x2",
    "an escape": "jpeg_compressibility \x1b[2J 2x2",
}


@pytest.mark.parametrize("name", TASKS)
def test_tasks(refused, name, case_folder, monkeypatch, capsys):
    command = ("zoo", "--tasks", TASKS[name], "--output-dir", "{tmp}/out")
    case = Case(name, command, "--tasks")
    main = large_scale_ppo.main
    ends_in_one_line(case, main, "large_scale_ppo.py", case_folder, monkeypatch, capsys)


# --- Files of prompts


@functools.cache
def bomb() -> bytes:
    """160 MB of lines."""
    return gzip.compress((b"x" * 1000 + b"\n") * 160_000, 1)


@functools.cache
def bomb_of_a_line() -> bytes:
    return gzip.compress(b"x" * (200 << 20), 1)


DEEP = "[" * 100_000 + "]" * 100_000
PACKED = gzip.compress(os.urandom(3000))
PROMPT_FILES = {
    # name: (file, its content or what makes it, words)
    "not there": ("p.txt", None, "is not there"),
    "a folder": ("folder.txt", strange_files, "is not a regular file"),
    "a pipe": ("pipe.txt", strange_files, "is not a regular file"),
    "/dev/zero": ("zero.txt", strange_files, "is not a regular file"),
    "a socket": ("socket.txt", strange_files, "is not a regular file"),
    "a link to itself": ("circle.txt", strange_files, "is not a regular file"),
    "a pipe as .gz": ("pipe.txt.gz", strange_files, "is not a regular file"),
    "/dev/zero as .gz": ("zero.txt.gz", strange_files, "is not a regular file"),
    "/dev/zero as .parquet": ("zero.parquet", strange_files, "is not a regular file"),
    "a pipe as .jsonl": ("pipe.jsonl", strange_files, "is not a regular file"),
    "a name too long": ("a" * 300 + ".txt", None, "is not there"),
    "a null byte as a name": ("a\udcff.txt", None, "is not there"),
    "empty": ("p.txt", "", "no prompts"),
    "blank lines": ("p.txt", "\n \r\n\t\n", "no prompts"),
    "a mark alone": ("p.txt", "\ufeff\n", "no prompts"),
    "bytes": ("p.txt", b"a cat\n\na \xff dog\n", "line 3"),
    "UTF-16": ("p.txt", "a cat\n".encode("utf-16"), "line 1"),
    "Latin-1": ("p.txt", "a\nein Mädchen\n".encode("latin-1"), "line 2"),
    "a null byte": ("p.txt", b"a cat\na \0 dog\n", "line 2"),
    "half a character": ("p.txt", b"a cat\n\xed\xa0\xbd\n", "line 2"),
    "too long a way to write a letter": ("p.txt", b"\xc0\xaf\n", "line 1"),
    "a picture": ("p.txt", png(1), "line 1"),
    "10 MB in a line": ("p.txt", "a cat\n\n" + "long " * 2_000_000, "line 3"),
    "a line above 1 MB": ("p.txt", "a" * ((1 << 20) + 1), "line 1"),
    "a key of a text": ("p.txt#q", "a cat\n", "#KEY"),
    "not JSON": ("p.jsonl", '{"prompt": "a cat"}\nprompt\n', "line 2"),
    "half an object": ("p.jsonl", '{"prompt": "a', "line 1"),
    "a JSON list": ("p.jsonl", '["a cat"]', "not a JSON object"),
    "a JSON null": ("p.jsonl", "null", "not a JSON object"),
    "a JSON number of 5000 digits": ("p.jsonl", '{"prompt": ' + "9" * 5000 + "}", "line 1"),
    "nested too deep": ("p.jsonl", '{"prompt": "a", "x": ' + DEEP + "}", "nested too deep"),
    "objects nested too deep": ("p.jsonl", '{"a":' * 100_000, "line 1"),
    "NaN as a prompt": ("p.jsonl", '{"prompt": NaN}', "no text"),
    "null as a prompt": ("p.jsonl", '{"prompt": null}', "no text"),
    "a list as a prompt": ("p.jsonl", '{"prompt": ["a"]}', "no text"),
    "a blank prompt": ("p.jsonl", '{"prompt": "  "}', "no text"),
    "a null byte in JSON": ("p.jsonl", '{"prompt": "a\\u0000b"}', "null byte"),
    "half a character in JSON": ("p.jsonl", '{"prompt": "\\ud83d"}', "half a character"),
    "half of the other": ("p.jsonl", '{"prompt": "\\udc00\\ud800"}', "half a character"),
    "no key": ("p.jsonl", '{"words": "a"}', "'prompt'"),
    "a key that is not there": ("p.jsonl#q", '{"prompt": "a"}', "'q'"),
    "a key of 5000 letters": ("p.jsonl#" + "q" * 5000, '{"prompt": "a"}', "no text under"),
    "objects that are a word": ("p.jsonl", '{"prompt": "a", "objects": "cat"}', "objects"),
    "objects that are numbers": ("p.jsonl", '{"prompt": "a", "objects": [1]}', "objects"),
    "objects of half a character": ("p.jsonl", '{"prompt": "a", "objects": ["\\ud800"]}', "objec"),
    "not gzip": ("p.txt.gz", "a cat\n", "pack it again"),
    "nothing as gzip": ("p.txt.gz", "", "no prompts"),
    "half a gzip": ("p.txt.gz", PACKED[:1000], "pack it again"),
    "gzip with damage": ("p.txt.gz", PACKED[:50] + b"\0" * 50 + PACKED[100:], "cannot be unpacked"),
    "gzip with another sum": ("p.txt.gz", gzip.compress(b"a\n")[:-8] + b"\0" * 8, "pack it again"),
    "gzip and a rest": ("p.txt.gz", gzip.compress(b"a cat\n") + b"rest", "pack it again"),
    "gzip in gzip": ("p.txt.gz", gzip.compress(PACKED), "line 1"),
    "gzip of bytes": ("p.txt.gz", gzip.compress(b"a\n\xff\n"), "line 2"),
    "a gzip bomb": ("p.txt.gz", lambda tmp, name: write(tmp / name, bomb()), "unpacks to more"),
    "a gzip bomb of one line": (
        "p.jsonl.gz",
        lambda tmp, name: write(tmp / name, bomb_of_a_line()),
        "line 1 is longer",
    ),
    "parquet that is none": ("p.parquet", "PAR1 and no more", "cannot be read"),
    "parquet that is empty": ("p.parquet", "", "cannot be read"),
    "parquet cut": ("p.parquet", b"PAR1" + b"\xff" * 8 + b"PAR1", "cannot be read"),
}


def made(folder, name: str, content) -> None:
    name = name.partition("#")[0]
    if content is strange_files:
        strange_files(folder, name[name.index(".") :])
    elif callable(content):
        content(folder, name)
    elif content is not None:
        write(folder / name, content)


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_files_of_prompts(refused, name, case_folder, monkeypatch, capsys):
    file, content, words = PROMPT_FILES[name]
    case = Case(
        name,
        ("zoo", "--tasks", f"jpeg_compressibility {{tmp}}/{file} 2x2", "--output-dir", "{tmp}/out"),
        ("--tasks", words),
        before=lambda tmp: made(tmp, file, content),
    )
    main = large_scale_ppo.main
    ends_in_one_line(case, main, "large_scale_ppo.py", case_folder, monkeypatch, capsys)
    assert cached_bytes() < 1000, "nothing half made, nor what was refused, is kept"


# --prompts-file and --prompt: read in one place for all scripts with --reward.
OF_PROMPTS_FILE = ["not there", "a folder", "a pipe", "/dev/zero", "empty", "bytes"]
OF_PROMPTS_FILE += ["a null byte", "half a character", "10 MB in a line", "a name too long"]


@pytest.mark.parametrize("name", OF_PROMPTS_FILE)
def test_prompts_file(refused, name, case_folder, monkeypatch, capsys):
    file, content, words = PROMPT_FILES[name]
    flags = ("--reward", "jpeg_compressibility", "--prompts-file", f"{{tmp}}/{file}")
    case = Case(
        name,
        ("zoo", *flags, "--output-dir", "{tmp}/out"),
        ("--prompts-file", words),
        before=lambda tmp: made(tmp, file, content),
    )
    ends_in_one_line(case, dpok.main, "dpok.py", case_folder, monkeypatch, capsys)


@pytest.mark.parametrize("prompt", ["", " \t", "a \udcff cat", "\ud83d", "a\0b"])
def test_prompt(refused, prompt, case_folder, monkeypatch, capsys):
    flags = ("--reward", "jpeg_compressibility", "--prompt", prompt, "--output-dir", "{tmp}/out")
    case = Case("prompt", ("zoo", *flags), "--prompt")
    ends_in_one_line(case, dpok.main, "dpok.py", case_folder, monkeypatch, capsys)


# --- Pairs


def metadata(*lines: str):
    def make(folder):
        (folder / "data").mkdir()
        (folder / "data/a.png").write_bytes(png(1))
        (folder / "data/metadata.jsonl").write_text("\n".join(lines))

    return make


def named(file_name: str):
    return metadata(json.dumps({"file_name": file_name, "text": "a cat"}))


def picture(content):
    """A folder of one pair, the picture's file as it is given."""

    def make(folder):
        named("it.png")(folder)
        made(folder / "data", "it.png", content)

    return make


def png_of_size(width: int, height: int) -> bytes:
    """The head of a PNG that promises this."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, part in ((b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")):
        chunk = kind + part
        data += struct.pack(">I", len(part)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return data


def header(name: str, size: int, kind: bytes = b"0", **fields) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf(tarfile.GNU_FORMAT)


def with_size(name: str, field: bytes, kind: bytes = b"0") -> bytes:
    """A header whose size is written so, its sum being right."""
    head = bytearray(header(name, 0, kind))
    head[124:136] = field.ljust(12, b"\0")
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def member(name: str, data: bytes, kind: bytes = b"0") -> bytes:
    return header(name, len(data), kind) + data + b"\0" * (-len(data) % 512)


END = b"\0" * 1024
PAIR = member("a.png", png(1)) + member("a.txt", b"a cat")
NEGATIVE = struct.pack(">Q", (1 << 64) - 2048).rjust(12, b"\xff")
HUGE = b"\x80" + (1 << 62).to_bytes(11, "big")
SHARDS = {
    "empty": (b"", "no plain tar"),
    "words": ("words\n" * 200, "no plain tar"),
    "zeros": (END, "holds no pairs"),
    "packed": (gzip.compress(PAIR + END), "no plain tar"),
    "packed to full blocks": (gzip.compress(PAIR + END).ljust(1024, b"\0"), "no plain tar"),
    "half a header": (PAIR[:100], "no plain tar"),
    "cut in a header": (PAIR + PAIR[:100], "no plain tar"),
    "cut in a picture": (member("a.png", b"x" * 5000)[:2048], "cut short"),
    "cut in the second": (PAIR + member("b.png", b"x" * 5000)[:2048], "cut short"),
    "a wrong sum": (b"x" + PAIR[1:] + END, "no plain tar"),
    "a wrong sum in the second": (PAIR + b"x" + PAIR[1:] + END, "no plain tar"),
    "a size of 8 GB": (header("a.png", 8**11 - 1) + END, "cut short"),
    "a size of 2**62": (with_size("a.png", HUGE) + END, "no plain tar"),
    "a negative size": (PAIR + with_size("b.png", NEGATIVE) + END, "no plain tar"),
    "a negative size of an unknown kind": (PAIR + with_size("b", NEGATIVE, b"Z") + END, "plain"),
    "a size of no digits": (with_size("a.png", b"soon") + END, "no plain tar"),
    "a long name of 8 GB": (header("././@LongLink", 8**11 - 1, b"L") + PAIR + END, "a header of"),
    "a long name of 2**62": (with_size("x", HUGE, b"L") + PAIR + END, "a header of"),
    "a long name of -2048": (with_size("x", NEGATIVE, b"L") + PAIR + END, "a header of"),
    "a pax header of 8 GB": (header("x", 8**11 - 1, b"x") + PAIR + END, "a header of"),
    "a pax size below 0": (member("x", b"12 size=-99\n", b"x") + PAIR + END, "no plain tar"),
    "a pax size of 2**70": (
        member("x", b"31 size=1180591620717411303424\n", b"x") + PAIR + END,
        "no plain tar",
    ),
    "2000 long names": (member("x", b"long\0", b"L") * 2000 + PAIR + END, "no plain tar"),
    "captions alone": (member("a.txt", b"a cat") + END, "holds no pairs"),
    "pictures alone": (member("a.png", png(1)) + END, "holds no pairs"),
    "links": (header("a.png", 0, b"2", linkname="/etc/passwd") + END, "holds no pairs"),
    "folders": (header("a.png", 0, b"5") + header("a.txt", 0, b"5") + END, "holds no pairs"),
    "a picture that is none": (member("a.png", b"x") + PAIR[2048:] + END, "a.tar"),
    "a picture of nothing": (member("a.png", b"") + member("a.txt", b"a") + END, "cannot be read"),
    "a bomb": (member("a.png", png_of_size(60000, 60000)) + member("a.txt", b"a") + END, "Bomb"),
    "a caption in bytes": (member("a.png", png(1)) + member("a.txt", b"\xff") + END, "pair 0"),
    "a caption with a null byte": (
        member("a.png", png(1)) + member("a.txt", b"a\0b") + END,
        "null byte",
    ),
    "a caption of 2 MB": (
        member("a.png", png(1)) + member("a.txt", b"a" * (2 << 20)) + END,
        "pair 0",
    ),
    "a caption that is no JSON": (member("a.png", png(1)) + member("a.json", b"{") + END, "JSON"),
    "a caption nested too deep": (
        member("a.png", png(1)) + member("a.json", DEEP.encode()) + END,
        "nested too deep",
    ),
    "a caption without a key": (member("a.png", png(1)) + member("a.json", b"{}") + END, "no text"),
}


def shard(content):
    def make(folder):
        (folder / "data").mkdir()
        write(folder / "data/a.tar", content)

    return make


def large_shard(folder):
    """A picture of 300 MB, none of which is on the disk."""
    shard(header("a.png", 300 << 20))(folder)
    with open(folder / "data/a.tar", "r+b") as file:
        file.seek(512 + (300 << 20))
        file.write(member("a.txt", b"a cat") + END)


def strange_metadata(kind: str):
    def make(folder):
        strange_files(folder, ".jsonl")
        (folder / "data").mkdir()
        (folder / f"{kind}.jsonl").rename(folder / "data/metadata.jsonl")

    return make


def strange_shard(kind: str):
    def make(folder):
        strange_files(folder, ".tar")
        (folder / "data").mkdir()
        (folder / f"{kind}.tar").rename(folder / "data/a.tar")

    return make


def strange_picture(kind: str):
    return picture(lambda folder, name: strange_one(folder, kind, name))


def strange_one(folder, kind: str, name: str) -> None:
    strange_files(folder, ".x")
    (folder / f"{kind}.x").rename(folder / name)


def eps(folder, name: str) -> None:
    """What Pillow gives Ghostscript to run."""
    head = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    (folder / name).write_text(head)


def large_picture(folder, name: str) -> None:
    with open(folder / name, "wb") as file:
        file.truncate(300 << 20)


KINDS = ("folder", "pipe", "zero", "socket", "circle")
LINE = '{"file_name": "a.png", "text": "a cat"}'
PAIRS = {
    "nothing": (lambda tmp: None, "metadata.jsonl"),
    "a file": (lambda tmp: write(tmp / "data", "words"), "metadata.jsonl"),
    "a pipe": (lambda tmp: os.mkfifo(tmp / "data"), "metadata.jsonl"),
    "an empty folder": (lambda tmp: (tmp / "data").mkdir(), "metadata.jsonl"),
    "no lines": (metadata(), "no prompts"),
    "no JSON": (metadata(LINE, "a.png a cat"), "line 2"),
    "no caption": (metadata('{"file_name": "a.png"}'), "no text"),
    "no name": (metadata('{"text": "a cat"}'), "file_name"),
    "a name that is a number": (metadata('{"file_name": 3, "text": "a"}'), "file_name"),
    "a name that is a list": (metadata('{"file_name": ["a"], "text": "a"}'), "file_name"),
    "an empty name": (named(""), "file_name"),
    "a name with a null byte": (named("a\0.png"), "no path inside"),
    "a name with half a character": (named("\ud800.png"), "no path inside"),
    "an absolute name": (named("/etc/passwd"), "no path inside"),
    "a name above": (named("../a.png"), "no path inside"),
    "a name above by a way": (named("sub/../../a.png"), "no path inside"),
    "a name that is the folder above": (named(".."), "no path inside"),
    "a name that is the folder": (named("."), "cannot be read"),
    "a name too long": (named("a" * 300), "cannot be read"),
    "a name of 100 000": (named("a" * 100_000), "cannot be read"),
    "nested too deep": (metadata('{"file_name": "a.png", "text": "a", "x": ' + DEEP + "}"), "deep"),
    "a line above 1 MB": (metadata(LINE, "x" * (2 << 20)), "line 2"),
    "a caption of half a character": (
        metadata('{"file_name": "a.png", "text": "\\ud800"}'),
        "half a character",
    ),
    "no picture": (named("b.png"), "b.png"),
    "an empty picture": (picture(b""), "it.png"),
    "half a picture": (picture(png(1)[:40]), "it.png"),
    "a picture of words": (picture("words"), "it.png"),
    "a bomb": (picture(png_of_size(60000, 60000)), "Bomb"),
    "half a bomb": (picture(png_of_size(11000, 11000)), "Bomb"),
    "a picture without width": (picture(png_of_size(0, 10)), "it.png"),
    "less than it promises": (picture(png_of_size(1000, 1000)), "it.png"),
    "a program for Ghostscript": (picture(eps), "it.png"),
    "a picture of 300 MB": (picture(large_picture), "more than 256 MB"),
    "a picture of 300 MB in a shard": (large_shard, "pair 0"),
}
PAIRS |= {f"metadata as a {kind}": (strange_metadata(kind), "metadata.jsonl") for kind in KINDS}
PAIRS |= {f"a shard as a {kind}": (strange_shard(kind), "a.tar") for kind in KINDS}
PAIRS |= {f"a picture as a {kind}": (strange_picture(kind), "it.png") for kind in KINDS}
PAIRS |= {f"shard: {name}": (shard(content), words) for name, (content, words) in SHARDS.items()}


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(refused, name, case_folder, monkeypatch, capsys):
    before, words = PAIRS[name]
    case = Case(
        name,
        "zoo --pretrain-data {tmp}/data --output-dir {tmp}/out",
        ("--pretrain-data", words),
        before=before,
    )
    main = large_scale_ppo.main
    ends_in_one_line(case, main, "large_scale_ppo.py", case_folder, monkeypatch, capsys)


def test_a_broken_picture_in_the_middle_has_the_next_in_its_place(tmp_path, capsys):
    """Each kind of damage that a picture may have, when a run is under way."""
    source = write_folder(tmp_path / "data", count=8)
    folder = tmp_path / "data/sub"
    (folder / "1.png").write_bytes(png_of_size(60000, 60000))
    (folder / "2.png").write_bytes(png_of_size(11000, 11000))
    (folder / "3.png").unlink()
    (folder / "4.png").unlink()
    os.mkfifo(folder / "4.png")
    Image.new("RGB", (2000, 2)).save(folder / "5.png")
    with bounded():
        pictures, captions = take_pairs(open_pairs(source, 0), 0, 0, 8, 8)
    assert len(pictures) == 8 and {*captions} == {"caption 0", "caption 6", "caption 7"}
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) >= 5 and all(len(line) < 1000 for line in warnings)


def test_pairs_none_of_which_can_be_read_end_in_one_line(tmp_path):
    pairs = open_pairs(write_folder(tmp_path / "data"), 0)
    for i in range(5):
        (tmp_path / f"data/sub/{i}.png").write_bytes(b"")
    with pytest.raises(SourceError) as error:
        take_pairs(pairs, 0, 0, 2, 8)
    is_one_line(error.value, "cannot be read")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "I;16", "I", "F", "LAB", "HSV"])
def test_pictures_of_every_mode_have_a_middle_or_are_refused(mode):
    try:
        assert to_tensor(Image.new(mode, (10, 8)), 4).shape == (3, 4, 4)
    except SourceError as error:
        is_one_line(error, "RGB")


# --- Code of the user

RAISED = {
    "sys.exit(0)": "sys.exit(0)",
    "sys.exit() with words": "sys.exit('all is well')",
    "SystemExit of an object": "raise SystemExit(object())",
    "exit()": "exit()",
    "quit()": "quit(0)",
    "KeyboardInterrupt": "raise KeyboardInterrupt",
    "GeneratorExit": "raise GeneratorExit",
    "BaseException": "raise BaseException('of all')",
    "a BaseException of its own": "class Own(BaseException): pass\n    raise Own",
    "asyncio's": "import asyncio\n    raise asyncio.CancelledError",
    "MemoryError": "raise MemoryError",
    "more memory than there is": "bytearray(1 << 60)",
    "RecursionError": "deep = lambda: deep()\n    deep()",
    "StopIteration": "raise StopIteration",
    "a message of lines": "raise ValueError('one\\ntwo\\r\\nthree')",
    "a message of 10 MB": "raise ValueError('x' * 10_000_000)",
    "a message with escapes": "raise ValueError('\\x1b[2J\\x07\\0')",
    "a message of half a character": "raise ValueError('\\ud800')",
    "a message that raises": "raise type('Own', (Exception,), {'__str__': lambda e: 1 / 0})",
    "a message that ends": "raise type('Own', (Exception,), {'__str__': lambda e: sys.exit(0)})",
    "a name of 10 000": "raise type('E' * 10_000, (Exception,), {})",
    "a warning": "raise UserWarning('look')",
    "no exception": "raise 3",
    "an exception from another": "raise OSError(28, 'no space') from KeyError('x')",
    "an assertion": "assert False, 'never'",
    "UnicodeError": "b'\\xff'.decode()",
    "an import": "import nothing_of_this_name",
    "a RewardError": "import common.rewards\n    raise common.rewards.RewardError('a\\nb' * 999)",
    "a SourceError": "import harness.prompts\n    raise harness.prompts.SourceError('a\\n' * 999)",
}
IMAGES, PROMPTS = torch.rand(2, 3, 8, 8), ["a cat", "a dog"]
SIZES = "[torch.zeros(2), torch.zeros(3)]"


def raising(code: str, where: str) -> str:
    """A user's file, in which this is raised on import, in the call, or for an item."""
    text = f"import sys, torch\ndef raises():\n    {code}\n"
    if where == "import":
        text += "raises()\n"
    in_call = "raises()" if where == "call" else "None"
    text += f"def reward(images, prompts):\n    {in_call}\n    return torch.zeros(len(prompts))\n"
    text += "class Items:\n    def __len__(self): return 3\n    def __getitem__(self, i):\n"
    text += f"        {'raises()' if where == 'item' else 'None'}\n        return 'a cat'\n"
    return text + f"def prompts(seed):\n    {in_call}\n    return Items()\n"


@pytest.mark.parametrize("where", ["import", "call"])
@pytest.mark.parametrize("name", RAISED)
def test_whatever_a_reward_raises_is_its_error(name, where, tmp_path):
    path = write(tmp_path / "mine.py", raising(RAISED[name], where))
    with bounded(), pytest.raises(RewardError) as error:
        load_reward(f"{path}:reward")(IMAGES, PROMPTS)
    is_one_line(error.value)


@pytest.mark.parametrize("where", ["import", "call", "item"])
@pytest.mark.parametrize("name", RAISED)
def test_whatever_a_source_raises_is_its_error(name, where, tmp_path):
    path = write(tmp_path / "mine.py", raising(RAISED[name], where))
    for read in (open_prompts, open_pairs):
        with bounded(), pytest.raises(SourceError) as error:
            read(f"{path}:prompts", 0)
        is_one_line(error.value)


FILES = {
    "a syntax error": "def f(:",
    "null bytes": "x = '\0'",
    "bytes": b"\xff\xfe",
    "another coding": "# coding: nothing\n",
    "nested too deep": "x = " + "(" * 1000 + ")" * 1000,
    "a number of 5000 digits": "x = " + "9" * 5000,
    "nothing": "",
    "a word for a function": "f = 'reward'",
    "a module that ends when it is asked": "import sys\ndef __getattr__(name): sys.exit(0)",
    "a class that needs more": "class f:\n    def __init__(self, a, b, c): pass",
    "a function of nothing": "def f(): return [1.0, 2.0]",
    "a generator": "def f(images, prompts): yield 1",
    "a coroutine": "async def f(images, prompts): return 1",
    "itself": "import sys\nf = sys.modules[__name__]",
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_a_reward(name, tmp_path):
    path = write(tmp_path / "mine.py", FILES[name])
    with bounded(), pytest.warns() if name == "a coroutine" else contextlib.nullcontext():
        with pytest.raises(RewardError) as error:
            load_reward(f"{path}:f")(IMAGES, PROMPTS)
        is_one_line(error.value, "mine.py")
        del error
        gc.collect()


RETURNED = {
    "None": "None",
    "a word": "'a lot'",
    "words": "['a', 'b']",
    "a number": "1.0",
    "one for two": "torch.ones(1)",
    "three for two": "torch.ones(3)",
    "none for two": "torch.ones(0)",
    "a column": "torch.ones(2, 1)",
    "a matrix": "torch.ones(2, 2)",
    "NaN": "torch.tensor([0, torch.nan])",
    "inf": "[0.0, float('inf')]",
    "too large for float32": "torch.ones(2, dtype=torch.float64) * 1e300",
    "complex numbers": "torch.ones(2, dtype=torch.complex64)",
    "sparse": "torch.ones(2).to_sparse()",
    "on meta": "torch.ones(2, device='meta')",
    "nested": f"torch.nested.nested_tensor({SIZES})",
    "of other lengths": "[[1.0], [1.0, 2.0]]",
    "a dict": "{'reward': torch.ones(2)}",
    "a set": "{1.0, 2.0}",
    "a class": "torch.Tensor",
    "bytes": "b'\\x01\\x02\\x03'",
    "an array of objects": "__import__('numpy').array([None, {}])",
    "an array of words": "__import__('numpy').array(['a', 'b'])",
    "numbers too large": "[2 ** 70, 1]",
    "a list of itself": "(lambda x: x.append(x) or x)([])",
    "what raises as an array": "type('A', (), {'__array__': lambda *a, **k: exit(0)})()",
    "what raises as a number": "[type('A', (), {'__float__': lambda a: exit(0)})()] * 2",
    "a range without end": "__import__('itertools').count()",
}


@pytest.mark.parametrize("name", RETURNED)
def test_whatever_a_reward_returns(name, tmp_path):
    text = f"import torch\ndef f(images, prompts): return {RETURNED[name]}\n"
    path = write(tmp_path / "mine.py", text)
    with bounded(), pytest.raises(RewardError) as error:
        load_reward(f"{path}:f")(IMAGES, PROMPTS)
    is_one_line(error.value, "mine.py")


SEQUENCES = {
    "None": "None",
    "a number": "7",
    "nothing": "[]",
    "a generator": "(str(i) for i in range(3))",
    "a set": "{'a cat'}",
    "a dict": "{'a': 'cat'}",
    "numbers": "[1, 2]",
    "bytes": "[b'a cat']",
    "half a character": "['\\ud800']",
    "a null byte": "['a\\0b']",
    "10 MB": "['x' * 10_000_000]",
    "a length of 2**62": "Items(1 << 62)",
    "a length of 2**70": "Items(1 << 70)",
    "a negative length": "Items(-1)",
    "a length that is a word": "Items('3')",
    "an array": "__import__('numpy').zeros(3)",
    "a picture alone": "[__import__('PIL.Image').Image.new('RGB', (8, 8))]",
    "a caption alone": "[(None, 'a cat')]",
    "three": "[('a', 'b', 'c')]",
    "a text that raises": "[Text()]",
}
ITEMS = """
class Items:
    def __init__(self, n): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return None
class Text:
    def __repr__(self): raise SystemExit(0)
"""


@pytest.mark.parametrize("name", SEQUENCES)
def test_whatever_a_source_returns(name, tmp_path):
    path = write(tmp_path / "mine.py", f"{ITEMS}\ndef f(seed): return {SEQUENCES[name]}\n")
    for read in (open_prompts, open_pairs):
        with bounded(), pytest.raises(SourceError) as error:
            read(f"{path}:f", 0)
        is_one_line(error.value, "mine.py")


LATER = """
import sys
class Items(list):
    def __getitem__(self, i):
        if i: CODE
        return "a cat"
def f(seed): return Items("abc")
"""


@pytest.mark.parametrize(
    "code", ["sys.exit(0)", "raise KeyboardInterrupt", "self.clear()", "return 3", "return '\\0'"]
)
def test_a_source_that_fails_later(code, tmp_path):
    """In the middle of a run, after a first item that is right."""
    source = write(tmp_path / "mine.py", LATER.replace("CODE", code)) + ":f"
    prompts = open_prompts(source, 0)
    if code == "self.clear()":
        prompts[1]
        prompts.items[:] = []
        prompts.items.__class__.__getitem__ = list.__getitem__
    with pytest.raises(SourceError) as error:
        take(prompts, 0, 0, 3)
    is_one_line(error.value, "item", "mine.py")


def test_a_file_of_prompts_that_changes_later(tmp_path):
    prompts = open_prompts(write(tmp_path / "p.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n'), 0)
    for text in ('{"prompt"\n' * 4, b"\xff" * 40, None):
        write(tmp_path / "p.jsonl", text) if text else (tmp_path / "p.jsonl").unlink()
        with pytest.raises(SourceError) as error:
            take(prompts, 0, 0, 2)
        is_one_line(error.value, "put it back")


CHANGING = """
import torch
kept = []
def f(images, prompts):
    kept.append((images, prompts))
    scores = images.mean((1, 2, 3))
    images.zero_(), prompts.clear(), torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float64), torch.set_default_device("meta")
    for old, _ in kept: old.fill_(9)
    return scores
torch.set_default_dtype(torch.float16), torch.set_default_device("meta")
torch.set_grad_enabled(False)
guard = torch.inference_mode()
guard.__enter__()
"""


def in_a_thread(call, term):
    """As harness.rewards.within calls it."""
    results = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


@pytest.mark.parametrize("limit", [lambda call, term: call(), in_a_thread])
def test_a_reward_that_changes_its_input_and_torch(limit, tmp_path):
    path = write(tmp_path / "mine.py", CHANGING)
    path_of_another = write(tmp_path / "other.py", "def f(i, p): return i.mean((1, 2, 3))\n")
    reward = load_reward(f"1*{path}:f+1*{path_of_another}:f", limit=limit)
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    images, prompts = IMAGES.clone(), list(PROMPTS)
    for _ in range(2):
        scores = reward(images, prompts)
        torch.testing.assert_close(scores, 2 * IMAGES.mean((1, 2, 3)))
        assert images.equal(IMAGES) and prompts == PROMPTS
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert torch.zeros(1).dtype == torch.float32 and torch.zeros(1).device.type == "cpu"


def test_a_source_that_changes_torch(tmp_path):
    text = CHANGING + "def g(seed): torch.set_default_dtype(torch.float64); return ['a']\n"
    open_prompts(write(tmp_path / "mine.py", text) + ":g", 0)
    assert torch.is_grad_enabled() and torch.zeros(1).dtype == torch.float32


ENDS = {
    "import": (2, "import sys\nsys.exit(0)\n"),
    "call": (
        1,
        "import sys, torch\ndef f(images, prompts):\n    sys.exit(0)\n",
    ),
}


@pytest.mark.parametrize("where", ENDS)
def test_a_run_whose_reward_ends_it_says_so(where, tiny_sd, case_folder, monkeypatch, capsys):
    """sys.exit(0) is no success; what is done when it is called is saved."""
    code, text = ENDS[where]
    flags = f"--model {tiny_sd} --num-inference-steps 2 --samples-per-iteration 2"
    flags += " --num-iterations 1 --reward {tmp}/mine.py:f --output-dir {tmp}/out"
    before = lambda tmp: write(tmp / "mine.py", text)
    case = Case(where, flags, ("mine.py", "SystemExit"), code, before)
    ends_in_one_line(case, dpok.main, "dpok.py", case_folder, monkeypatch, capsys)
    assert (case_folder / "out/checkpoint/state.pt").exists() == (where == "call")


ON_RANKS = """
import os, sys
import torch, torch.distributed as dist
sys.path[:0] = [os.getcwd()]
from common.rewards import RewardError, load_reward
from harness.pairs import open_pairs, take_pairs
from harness.prompts import SourceError, open_prompts, take
from harness.ranks import everybodys

folder, rank = os.path.dirname(os.path.abspath(__file__)), int(os.environ["RANK"])
dist.init_process_group("gloo")
faults = []
for name in ("shape", "memory", "exit", "interrupt"):
    reward = load_reward(f"{folder}/mine.py:{name}", gather=everybodys)
    try:
        reward(torch.rand(2, 3, 8, 8), ["a cat", "a dog"])
    except RewardError as error:
        faults.append(str(error))
for call in (
    lambda: take(open_prompts(f"{folder}/mine.py:prompts", 0), 0, 0, 3),
    lambda: take_pairs(open_pairs(f"{folder}/mine.py:pairs", 0), 0, 3 * rank, 3 * (1 - rank), 8),
    lambda: take_pairs(open_pairs(f"{folder}/mine.py:pairs", 0), 0, 0, 3 * rank, 8),
):
    try:
        call()
    except SourceError as error:
        faults.append(str(error))
torch.save(faults, f"{folder}/{rank}.pt")
total = torch.ones(1)
dist.all_reduce(total)
assert total.item() == 2, "the ranks are in step"
dist.destroy_process_group()
"""
MINE_ON_RANKS = """
import os, sys
import torch
from PIL import Image
SECOND = os.environ["RANK"] == "1"
def shape(images, prompts): return torch.ones(3 if SECOND else 2)
def memory(images, prompts):
    if SECOND: raise MemoryError
    return torch.ones(2)
def exit(images, prompts):
    if SECOND: sys.exit(0)
    return torch.ones(2)
def interrupt(images, prompts):
    if not SECOND: raise KeyboardInterrupt
    return torch.ones(2)
class Items(list):
    def __getitem__(self, i):
        if i and SECOND: sys.exit(0)
        return super().__getitem__(i)
def prompts(seed): return Items(["a", "b", "c"])
class Later(list):
    reads = 0
    def __getitem__(self, i):
        self.reads += 1
        if self.reads > 1 and SECOND: sys.exit(0)
        return super().__getitem__(i)
def pairs(seed): return Later([(Image.new("RGB", (8, 8)), "a")] * 3)
"""


def test_a_fault_of_one_rank_is_that_of_all(tmp_path):
    (tmp_path / "script.py").write_text(ON_RANKS)
    (tmp_path / "mine.py").write_text(MINE_ON_RANKS)
    result = run_script(tmp_path / "script.py", ranks=2, timeout=120)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first == second and len(first) == 6, first
    for fault, word in zip(first, ("(3,)", "MemoryError", "SystemExit", "KeyboardInterrupt")):
        assert word in fault and "mine.py" in fault
    assert all("SystemExit" in fault for fault in first[4:])


# --- Servers

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def answer(body, status: bytes = b"200 OK", *headers: bytes) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [b"HTTP/1.1 " + status, b"Content-Length: %d" % len(data), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + data


def says(content) -> bytes:
    return answer({"choices": [{"message": {"content": content}}]})


def without_end(head: bytes, part: bytes, pause: float = 0):
    def send(connection):
        connection.sendall(head)
        while True:
            connection.sendall(part)
            time.sleep(pause)

    return send


MODELS = answer({"data": [{"id": "tiny"}]})
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
# What a server may answer, to the list of models or to a picture.
ANSWERS = {
    "nothing": b"",
    "no HTTP": b"ready\r\n",
    "HTTP/9": b"HTTP/9.9 200 OK\r\n\r\n",
    "a status of words": b"HTTP/1.1 fine\r\n\r\n",
    "a status of 1000": b"HTTP/1.1 1000 OK\r\n\r\n",
    "a line of 100 000": b"HTTP/1.1 200 " + b"a" * 100_000 + b"\r\n\r\n",
    "1000 headers": OK + b"X: y\r\n" * 1000 + b"\r\n{}",
    "a header of 100 000": OK + b"X: " + b"y" * 100_000 + b"\r\n\r\n{}",
    "a negative length": OK + b"Content-Length: -5\r\n\r\n{}",
    "a length of words": OK + b"Content-Length: many\r\n\r\n",
    "half of what it promises": OK + b"Content-Length: 100\r\n\r\n{",
    "a length of 2**62": OK + b"Content-Length: 4611686018427387904\r\n\r\n{",
    "a chunk of no number": CHUNKED + b"zz\r\n",
    "a chunk of 2**62": CHUNKED + b"4000000000000000\r\n{",
    "no JSON": answer(b"<html>"),
    "an empty body": answer(b""),
    "bytes": answer(b"\xff\xfe\x00"),
    "nested too deep": answer(DEEP.encode()),
    "a number of 5000 digits": answer(b"9" * 5000),
    "null": answer(None),
    "a number": answer(3),
    "NaN": answer(b"NaN"),
    "a list": answer(["no", "memory"]),
    "an empty object": answer({}),
    "an error": answer({"error": "no memory"}),
    "an error of escapes": answer({"error": "\x1b[2J\n\r\0"}),
    "an error of 500 KB": answer({"error": "x" * 500_000}),
    "2 MB": answer({"error": "x" * (2 << 20)}),
    "HTTP 204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "HTTP 304": b"HTTP/1.1 304 Not Modified\r\n\r\n",
    "HTTP 400": answer({"error": "no"}, b"400 Bad"),
    "HTTP 401": answer({"error": "no key"}, b"401 Unauthorized", b"WWW-Authenticate: Basic x"),
    "HTTP 407": answer(b"", b"407 Proxy", b"Proxy-Authenticate: Basic"),
    "HTTP 500 in lines": answer(b"a\r\nb\nc", b"500 Bad"),
    "HTTP 503 of 2 MB": answer(b"x" * (2 << 20), b"503 Busy"),
    "a redirect without a place": answer(b"", b"302 Found"),
    "a redirect to a file": answer(b"", b"302 Found", b"Location: file:///etc/passwd"),
    "a redirect to itself": answer(b"", b"301 Moved", b"Location: /"),
    "without end": without_end(OK + b"\r\n", b" " * 65536),
    "without end in chunks": without_end(CHUNKED, b"10000\r\n" + b" " * 65536 + b"\r\n"),
    "headers without end": without_end(OK, b"X: y\r\n"),
    "a first line without end": without_end(b"HTTP/1.1 200 ", b"a" * 65536),
    "a drip": without_end(OK + b"Content-Length: 1000\r\n\r\n", b" ", 0.1),
    "a drip of headers": without_end(OK, b"X", 0.1),
    "100 Continue without end": without_end(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.01),
    "silence": without_end(b"", b"", 0.1),
}
# These are as they should be up to where a description would be.
DESCRIPTIONS = {
    "choices as a dict": answer({"choices": {"0": {"message": {"content": "a"}}}}),
    "choices as a word": answer({"choices": "abc"}),
    "no choices": answer({"choices": []}),
    "choices that are null": answer({"choices": None}),
    "a choice that is null": answer({"choices": [None]}),
    "no message": answer({"choices": [{}]}),
    "a message as a list": answer({"choices": [{"message": ["content"]}]}),
    "no content": answer({"choices": [{"message": {}}]}),
    "3": says(3),
    "0": says(0),
    "true": says(True),
    "false": says(False),
    "NaN": answer(b'{"choices": [{"message": {"content": NaN}}]}'),
    "an object": says({"text": "a cat"}),
    "an empty object": says({}),
    "a list of numbers": says([3]),
    "a list of words": says(["a cat"]),
    "parts without text": says([{"type": "image"}]),
    "parts of numbers": says([{"text": 3}]),
    "a part that is null": says([None]),
}
LISTS_OF_MODELS = {
    "no models": answer({"data": []}),
    "models as a dict": answer({"data": {"0": {"id": "tiny"}}}),
    "models that are null": answer({"data": None}),
    "a model without a name": answer({"data": [{}]}),
    "a model as a number": answer({"data": [{"id": 7}]}),
    "a model as null": answer({"data": [{"id": None}]}),
    "a model as NaN": answer(b'{"data": [{"id": NaN}]}'),
    "a model as an object": answer({"data": [{"id": {"name": "tiny"}}]}),
}


class Raw(socketserver.BaseRequestHandler):
    """Answers the path /NAME/... with server.answers[NAME], by (models, chat)."""

    def handle(self):
        with contextlib.suppress(OSError):
            received = b""
            while b"\r\n\r\n" not in received:
                part = self.request.recv(65536)
                if not part:
                    return
                received += part
            head, _, body = received.partition(b"\r\n\r\n")
            for line in head.lower().split(b"\r\n"):
                if line.startswith(b"content-length:"):
                    while len(body) < int(line.split(b":")[1]):
                        body += self.request.recv(65536)
            self.server.asked.append(head)
            number, _, what = head.split()[1].decode().strip("/").partition("/")
            models, chat = self.server.answers[int(number)]
            reply = models if what == "models" else chat
            try:
                reply(self.request) if callable(reply) else self.request.sendall(reply)
            finally:
                self.server.closed.append(time.monotonic())


@contextlib.contextmanager
def serving(*answers):
    """A server on the loopback; `answers` are (to models, to chat) of /0, /1 and so on."""
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Raw)
    server.daemon_threads, server.block_on_close = True, False
    server.answers, server.asked, server.closed = list(answers), [], []
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


SERVED = [(f"models: {name}", reply, None) for name, reply in (ANSWERS | LISTS_OF_MODELS).items()]
SERVED += [(f"chat: {name}", MODELS, reply) for name, reply in (ANSWERS | DESCRIPTIONS).items()]
ONCE = read_options({"timeout": "1", "retries": "0"})


@pytest.fixture(scope="module")
def server():
    with serving(*((models, chat) for _, models, chat in SERVED)) as (_, url):
        yield url


@pytest.mark.parametrize("number", range(len(SERVED)), ids=[name for name, _, _ in SERVED])
def test_answers_of_a_server(number, server):
    url = f"{server}/{number}"
    with bounded(), pytest.raises(RewardError) as error:
        describe_on_server(url, ONCE)([Image.new("RGB", (8, 8))])
    is_one_line(error.value, url)


def test_no_thread_goes_on_reading(monkeypatch):
    """At the deadline the connection is closed: the server cannot send on, and no thread waits."""
    endless = [ANSWERS[name] for name in ("without end in chunks", "a drip", "a drip of headers")]
    with serving(*((reply, None) for reply in endless)) as (server, url):
        before = {*threading.enumerate()}
        for number in range(len(endless)):
            with pytest.raises(RewardError, match=r"within 1 s|more than 1048576 bytes"):
                ask_vlm(f"{url}/{number}/models", None, 1, 0)
        limit = time.monotonic() + 5
        while time.monotonic() < limit:
            readers = {*threading.enumerate()} - before
            if not readers and len(server.closed) == len(endless):
                break
            time.sleep(0.05)
        assert not readers and len(server.closed) == len(endless)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_follows_no_redirect(status, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    with serving((MODELS, says("a cat"))) as (other, other_url):
        to_other = answer(b"", b"%d Moved" % status, b"Location: %s/0/models" % other_url.encode())
        with serving((to_other, None), (MODELS, to_other)) as (named, url):
            for number in (0, 1):
                with pytest.raises(RewardError) as error:
                    describe_on_server(f"{url}/{number}", ONCE)([Image.new("RGB", (8, 8))])
                is_one_line(error.value, f"HTTP {status}", "redirect")
        assert len(named.asked) == 3 and all(b"sk-secret" in head for head in named.asked)
        assert not other.asked, "the other server is never asked"


@pytest.mark.parametrize("key", ["sk\r\nX: y", "sk\x00", "schlüssel", "\udcff"])
def test_a_key_that_cannot_be_sent_is_not_quoted(key, monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ, "OPENAI_API_KEY": key})
    with pytest.raises(RewardError) as error:
        ask_vlm("http://127.0.0.1:9/models", None, 1, 0)
    is_one_line(error.value, "OPENAI_API_KEY")
    assert key not in str(error.value)


def test_a_server_that_is_not_there_or_only_listens():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with bounded(), pytest.raises(RewardError) as error:
            describe_on_server(f"http://127.0.0.1:{port}/v1", ONCE)
        is_one_line(error.value, "within 1 s")
    for url in (f"http://127.0.0.1:{port}", f"https://127.0.0.1:{port}", "http://nowhere.invalid"):
        with bounded(), pytest.raises(RewardError) as error:
            describe_on_server(url, ONCE)
        is_one_line(error.value, url)


# --- What a run is resumed with


def test_identity_of_prompts(tmp_path):
    path = tmp_path / "p.txt"
    first = identity(open_prompts(write(path, "a cat\na dog\n"), 0))
    assert first.startswith("2, sha256 ")
    (tmp_path / "sub").mkdir()
    same = write(tmp_path / "sub/q.txt", "a cat\na dog\n")
    os.utime(same, (0, 0))
    assert identity(open_prompts(same, 0)) == first, "neither name nor time takes part"
    packed = write(tmp_path / "p.txt.gz", gzip.compress(b"a cat\na dog\n"))
    assert identity(open_prompts(packed, 0)) == first
    assert identity(open_prompts(write(path, "a cat\na pig\n"), 0)) != first, "of the same length"
    source = write(tmp_path / "p.jsonl", '{"prompt": "a", "text": "b"}')
    keys = {identity(open_prompts(source + key, 0)) for key in ("", "#text")}
    assert len(keys) == 2, "another key is other prompts"
    mine = write(tmp_path / "mine.py", "def f(seed): return ['a']\n") + ":f"
    of_function = identity(open_prompts(mine, 0))
    write(tmp_path / "mine.py", "def f(seed): return ['b']\n")
    assert of_function.startswith("1, sha256 ") and identity(open_prompts(mine, 0)) != of_function
    assert identity([]) == "0"


def test_identity_of_pairs(tmp_path):
    folder = write_folder(tmp_path / "folder")
    first = identity(open_pairs(folder, 0))
    lines = (tmp_path / "folder/metadata.jsonl").read_text()
    (tmp_path / "folder/metadata.jsonl").write_text(lines.replace("caption 3", "caption 4"))
    assert first.startswith("5, sha256 ") and identity(open_pairs(folder, 0)) != first
    shards = write_shards(tmp_path / "shards")
    first = identity(open_pairs(shards, 0))
    os.utime(tmp_path / "shards/00000.tar", (0, 0))
    assert first.startswith("5, sha256 ") and identity(open_pairs(shards, 0)) == first
    (tmp_path / "shards/00001.tar").rename(tmp_path / "shards/00002.tar")
    assert identity(open_pairs(shards, 0)) != first


def test_a_damaged_cache_is_made_anew(tmp_path):
    shards = write_shards(tmp_path / "shards")
    expected = [caption for _, caption in open_pairs(shards, 0)]
    for garbage in (b"", b"\x93NUMPY garbage", b"x" * 300):
        for kept in cache_folder().iterdir():
            kept.write_bytes(garbage)
        assert [caption for _, caption in open_pairs(shards, 0)] == expected


# --- Fuzzing: returns, or raises the error that is documented

fuzzed = hypothesis.settings(
    derandomize=True,
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[*hypothesis.HealthCheck],
)
WORDS_OF_SPECS = some.sampled_from(
    [
        *["0.5", "1e3", "-1", "*", "+", "?", "&", "=", ":", ",", "%", "%00", "[", "]", "@", "#"],
        *["aesthetic", "clip_score", "jpeg_compressibility", "llava_bertscore", ".py", "f"],
        *["labels", "timeout", "retries", "http://", "https://", "localhost", ":80", "/v1"],
        *["\ud800", "\0"],
    ]
)
SPEC_TEXT = some.lists(WORDS_OF_SPECS | some.text(max_size=3), max_size=12).map("".join)


def within_bounds(function, *args):
    """Nothing but a RewardError or a SourceError of one line may come out."""
    with contextlib.suppress(RewardError, SourceError, PromptError):
        try:
            return function(*args)
        except (RewardError, SourceError) as error:
            is_one_line(error)
            raise


@fuzzed
@hypothesis.given(SPEC_TEXT)
def test_fuzz_specs(spec):
    within_bounds(check_spec, spec)
    for weight, term in within_bounds(parse_sum, spec) or []:
        assert np.isfinite(weight) and isinstance(term, str)


class Tasks:
    prompts_per_task, images_per_prompt, seed = 2, 2, 0


@fuzzed
@hypothesis.given(
    some.lists(WORDS_OF_SPECS | some.sampled_from([" ", "'", "2x2", "\\"]), max_size=9)
)
def test_fuzz_tasks(words):
    args = Tasks()
    args.tasks = ("".join(words),)
    with contextlib.redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as end:
        read_tasks(args)
    assert end.value.code == 2 and stderr.getvalue().count("\n") == 1


JSON_VALUES = some.recursive(
    some.none() | some.booleans() | some.floats() | some.integers() | some.text(max_size=8),
    lambda values: some.lists(values, max_size=3) | some.dictionaries(some.text(), values),
    max_leaves=8,
)
RECORDS = some.dictionaries(
    some.sampled_from(["prompt", "text", "caption", "objects", "file_name"]), JSON_VALUES
)
LINES_OF_FILES = some.one_of(
    some.binary(max_size=40), RECORDS.map(lambda r: json.dumps(r).encode()), some.just(b"")
)


@fuzzed
@hypothesis.given(some.lists(LINES_OF_FILES, max_size=5), some.sampled_from([".txt", ".jsonl"]))
def test_fuzz_files_of_prompts(tmp_path_factory, lines, suffix):
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    path.write_bytes(b"\n".join(lines))
    for prompt in within_bounds(open_prompts, str(path), 0) or []:
        assert prompt.strip() == prompt != ""
        prompt.encode()


@fuzzed
@hypothesis.given(some.binary(max_size=60), some.binary(max_size=200))
def test_fuzz_gzip(tmp_path_factory, junk, text):
    path = tmp_path_factory.getbasetemp() / "fuzz.txt.gz"
    packed = bytearray(gzip.compress(text))
    packed[len(junk) % len(packed) :] = junk
    path.write_bytes(bytes(packed))
    within_bounds(open_prompts, str(path), 0)


@fuzzed
@hypothesis.given(RECORDS | JSON_VALUES, some.text(max_size=3))
def test_fuzz_metadata(record, key):
    for function in (lambda line: json_prompt(line, key), ImageFolder.parse):
        with contextlib.suppress(ValueError):
            try:
                function(json.dumps(record))
            except ValueError as error:
                is_one_line(error)
                raise


@fuzzed
@hypothesis.given(
    some.lists(
        some.tuples(some.integers(0, 4000), some.binary(min_size=1, max_size=12)), max_size=6
    )
)
def test_fuzz_shards(tmp_path_factory, changes):
    """A shard, some bytes of which are other ones, with the sums of its headers put right."""
    path = tmp_path_factory.getbasetemp() / "fuzz.tar"
    data = bytearray(member("long.png", b"long/name.png\0", b"L") + PAIR + PAIR + END)
    for place, new in changes:
        place %= len(data)
        data[place : place + len(new)] = new
        head = place // 512 * 512
        data[head + 148 : head + 156] = b" " * 8
        data[head + 148 : head + 156] = b"%06o\0 " % sum(data[head : head + 512])
    path.write_bytes(bytes(data[: len(data) // 512 * 512]))
    with bounded():
        pairs = within_bounds(TarShards, [path])
    for i in range(len(pairs) if pairs else 0):
        within_bounds(pairs.__getitem__, i)


@fuzzed
@hypothesis.given(some.text(), some.integers(3, 50))
def test_fuzz_quotes(text, length):
    short = shortened(text, length)
    assert len(short) <= length and short.isprintable()


def test_one_prompt_alone_is_checked():
    args = type("Args", (), {"prompts_file": None, "prompt": "a \udcff cat"})
    with pytest.raises(SourceError, match="--prompt"):
        prompts_of(args)


def test_warnings_do_not_quote_a_line_of_any_length():
    assert len(shortened("x" * 10_000_000)) == 200 and sys.getsizeof(shortened("x" * 10_000)) < 500
