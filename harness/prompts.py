"""Prompts from a source of any length, in an order that is a function of seed and epoch alone.

    prompts.txt  prompts.txt.gz            a prompt a line
    prompts.jsonl[#KEY]  prompts.jsonl.gz  an object a line, the prompt under KEY (by default
                                           prompt, text or caption)
    prompts.parquet[#COLUMN]               the same of a column (pip install pyarrow)
    path/to/file.py:function               your own: function(seed) returns a sequence of
                                           prompts, e.g. a list

Text stays in its file. What is in memory is the map of where each line begins, 8 bytes a prompt and
shared among the ranks of a machine, and the order of the current epoch, 4 bytes a prompt.
"""

import gzip
import hashlib
import json
import os
import re
import sys
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np

from common import UserError
from common.users_code import (
    load_users_function,
    quoted,
    shortened,
    users_code,
)
from harness.checkpoint import sha256
from harness.ranks import on_all_ranks
from harness.stored import is_text

KEYS = ("prompt", "text", "caption")
CACHED_FROM = 1 << 20
"""Bytes from which a file's map of lines is kept, so that the next start does not read the file."""
LONGEST_LINE = 1 << 20
"""Bytes of a prompt or a caption, and of a line of any file; no text encoder reads near as many."""
UNPACKED, RATIO = 100 << 20, 100
"""What a packed file unpacks to is refused where it is more than both: these bytes, and this many
times those of the file. Text packs about three times; prompts that are all alike, 20 times."""
MOST_SHOWN = 64
"""Validation prompts."""
MOST = (1 << 31) - 1
"""Items of a sequence, whose order is in int32."""


class SourceError(UserError):
    """A source that cannot be used as it is; the message is one line for the user."""


class Prompt(str):
    """A prompt that names its objects itself, for the reward object_detection."""

    objects: list[str]


def open_prompts(source: str, seed: int) -> Sequence[str]:
    """The prompts of `source` (see above) in the order of the file.

    Raises SourceError, with the number of the line.
    """
    if ".py:" in source:
        return UsersSequence(source, seed, fault_of_prompt)
    name, _, key = source.partition("#")
    path = Path(name)
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    check_file(path)
    if key and kind not in ("jsonl", "parquet"):
        fault = f"{shortened(source)}: a #KEY is for .jsonl and .parquet files"
        raise SourceError(f"{fault}; leave it out")
    parse = (lambda text: json_prompt(text, key)) if kind in ("jsonl", "parquet") else str
    if kind == "parquet":
        path = converted(path, key, parquet_lines)
    elif path.suffix.lower() == ".gz":
        path = converted(path, "", gunzipped)
    try:
        return Lines(path, parse, source)
    except SourceError:
        if path != Path(name):
            path.unlink(missing_ok=True)  # what was made of a file that is no use
        raise


def check_file(path: Path) -> None:
    """Raises SourceError for what is no regular file: a named pipe, for one, may never end."""
    if not os.path.isfile(path):
        what = "is not a regular file" if os.path.lexists(path) else "is not there"
        remedy = (
            "give a text file, one prompt a line; docs/prompts.md says where to get the papers'"
        )
        raise SourceError(f"{quoted(str(path))} {what}; {remedy}")


def fault_of_prompt(prompt) -> str | None:
    """What is wrong with a prompt, or with a caption; None where it is as it should be."""
    if not isinstance(prompt, str):
        return f"{shortened(prompt)} is not text, as prompts and captions are"
    if not is_text(prompt):
        return f"{quoted(prompt)} has a null byte or half a character; write it anew"
    if len(prompt) > LONGEST_LINE:
        return f"{quoted(prompt)} has more than {LONGEST_LINE} characters"
    return None


def take(items: Sequence, seed: int, position: int, count: int) -> list:
    """Items `position` to `position + count` of the endless stream; an epoch has each item once.

    Collective where there are several ranks: the SourceError of one is raised on all of them.
    """
    return read_on_all_ranks(lambda: taken(items, seed, position, count))


def taken(items: Sequence, seed: int, position: int, count: int) -> list:
    """The same on this rank alone."""
    numbers = (divmod(n, len(items)) for n in range(position, position + count))
    return [items[int(order(len(items), seed, epoch)[n])] for epoch, n in numbers]


def read_on_all_ranks(read: Callable):
    """read(), or on every rank the SourceError of the first rank where there is one. Collective."""

    def read_or_say():
        try:
            return read()
        except MemoryError:
            fault = "the memory does not suffice for what was read of prompts or pairs; give fewer"
            raise SourceError(fault) from None

    return on_all_ranks(read_or_say, SourceError)


def identity(sequence: Sequence) -> str:
    """What tells prompts or pairs from others: their number, and a digest of what they are read of.

    For `Run(fixed=...)`: a run is not resumed with other prompts than it began with. The digest is
    that of a file's content, of metadata.jsonl, of the names, sizes and headers of shards, or of
    the user's .py; where and when a file was written takes no part in it.
    """
    digest = getattr(sequence, "digest", None)
    return f"{len(sequence)}, {digest()}" if digest else str(len(sequence))


@lru_cache(maxsize=8)
def order(length: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation (length,) of an epoch, int32."""
    return np.random.default_rng([seed, epoch]).permutation(np.arange(length, dtype=np.int32))


class Lines(Sequence):
    """The lines of a UTF-8 file that are not empty, as `parse` reads them.

    For a line that it cannot read, `parse` raises ValueError, which names the fault. All are read
    once, when the file is first seen: the offsets of those of a large file are kept in the cache
    folder.
    """

    def __init__(self, path: Path, parse: Callable[[str], object], name: str = ""):
        check_file(path)
        self.path, self.parse, self.name = path, parse, shortened(name or str(path))
        self.key = name.partition("#")[2]
        if path.stat().st_size < CACHED_FROM:
            self.offsets = self.index()
        else:
            self.offsets = cached_array(path, self.key + ".offsets", self.index)

    def index(self) -> np.ndarray:
        offsets, offset = array("q"), 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(bounded_lines(file, self.name), 1):
                try:
                    if b"\0" in line:
                        raise ValueError("there is a null byte in it; save the file as UTF-8 text")
                    if self.text(line):
                        self.parse(self.text(line))
                        offsets.append(offset)
                except UnicodeDecodeError:
                    fault = f"{self.name} is not UTF-8 in line {number}"
                    raise SourceError(f"{fault}; save it as UTF-8") from None
                except ValueError as error:
                    raise SourceError(f"{self.name}, line {number}: {error}") from None
                offset += len(line)
        if not offsets:
            raise SourceError(f"{self.name} has no prompts; write one a line")
        return np.array(offsets, dtype=np.int64)

    @staticmethod
    def text(line: bytes) -> str:
        return line.decode("utf-8").lstrip("\ufeff").strip()

    def __len__(self) -> int:
        return len(self.offsets)

    def __getitem__(self, i: int):
        try:
            with open(self.path, "rb") as file:
                file.seek(self.offsets[i])
                return self.parse(self.text(file.readline(LONGEST_LINE + 1)))
        except (OSError, ValueError) as error:
            fault = f"{self.name} can no longer be read as at the start ({shortened(str(error))})"
            raise SourceError(f"{fault}; put it back") from None

    def digest(self) -> str:
        return f"sha256 {sha256(self.path)}{self.key and f' {shortened(self.key)}'}"


def bounded_lines(file: BinaryIO, name: str) -> Iterator[bytes]:
    """The lines of a file; raises SourceError for one that is too long to be any text."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            fault = f"{name}, line {number} is longer than {LONGEST_LINE} bytes"
            raise SourceError(f"{fault}; write a prompt a line")
        yield line


def json_prompt(text: str, key: str) -> str:
    """The prompt of a JSON line; its list "objects", if any, becomes the prompt's attribute."""
    record = json_object(text)
    key = key or next((key for key in KEYS if key in record), KEYS[0])
    if not isinstance(record.get(key), str) or not record[key].strip():
        fault = f"there is no text under {quoted(key)}"
        raise ValueError(f"{fault}; name its key as in prompts.jsonl#KEY")
    if fault := fault_of_prompt(record[key]):
        raise ValueError(f"under {quoted(key)} {fault}")
    if "objects" not in record:
        return record[key].strip()
    objects = record["objects"]
    if not isinstance(objects, list) or any(map(fault_of_prompt, objects)):
        raise ValueError('"objects" is not a list of words')
    prompt = Prompt(record[key].strip())
    prompt.objects = objects
    return prompt


def json_object(text: str) -> dict:
    try:
        record = json.loads(text)
    except RecursionError:
        raise ValueError("not JSON (nested too deep)") from None
    except ValueError as error:  # a number of 5000 digits is one without being a JSONDecodeError
        raise ValueError(f"not JSON ({shortened(str(error))})") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


class UsersSequence(Sequence):
    """What function(seed) of "path/to/file.py:function" returns: a sequence that is not empty.

    `fault_of(item)` tells what is wrong with an item, or None. Whatever the user's code raises, now
    or when an item is asked for, is a SourceError.
    """

    def __init__(self, source: str, seed: int, fault_of: Callable[[object], str | None]):
        self.source, self.fault_of = source, fault_of
        function = load_users_function(source, SourceError, "source")
        self.sha256 = sha256(Path(source.rpartition(":")[0]))
        with users_code(SourceError, f"source {quoted(source)}"):
            self.items = function(seed)
            self.length = len(self.items)
        if not 0 < self.length <= MOST:
            number = "nothing" if self.length == 0 else f"more than {MOST} items"
            raise SourceError(f"source {quoted(source)} returned {number}")
        self[0]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int):
        if not 0 <= i < self.length:
            raise IndexError(i)
        with users_code(SourceError, f"item {i} of source {quoted(self.source)}"):
            item = self.items[i]
            fault = self.fault_of(item)
        if fault:
            raise SourceError(f"item {i} of source {quoted(self.source)} is wrong: {fault}")
        return item

    def digest(self) -> str:
        return f"sha256 {self.sha256}"


def cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clean-diffusion-rl"


def cached(path: Path, what: str) -> Path:
    """The file in the cache folder that is made from `path` as it is now."""
    stat = path.stat()
    # A cached file's name tells what is in it; when it was written differs between processes that
    # make it at the same time.
    written = 0 if path.parent == cache_folder() else stat.st_mtime_ns
    key = json.dumps([str(path.resolve()), stat.st_size, written, what])
    return cache_folder() / f"{path.name}.{hashlib.sha256(key.encode()).hexdigest()[:16]}"


@contextmanager
def replacing(path: Path):
    """A binary file to write; `path` appears when all of it is written.

    That holds whichever of several processes is first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def converted(path: Path, key: str, read: Callable[[Path, str], Iterable[bytes]]) -> Path:
    """The plain file in the cache folder that holds what `read` makes of `path`."""
    plain = cached(path, f"{key}.plain")
    if not plain.exists():
        with replacing(plain) as file:
            for part in read(path, key):
                file.write(part)
    return plain


def cached_array(path: Path, what: str, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What make() gives of the file `path`, kept in the cache folder and mapped from there."""
    kept = cached(path, what)
    with suppress(OSError, ValueError, EOFError):  # not there yet, or damaged
        return np.load(kept, mmap_mode="r")
    with replacing(kept) as file:
        np.save(file, make())
    return np.load(kept, mmap_mode="r")


def gunzipped(path: Path, key: str) -> Iterable[bytes]:
    unpacked, most = 0, max(UNPACKED, RATIO * path.stat().st_size)
    try:
        with gzip.open(path, "rb") as file:
            for line in bounded_lines(file, shortened(str(path))):
                unpacked += len(line)
                if unpacked > most:
                    fault = f"{shortened(str(path))} unpacks to more than {most >> 20} MB"
                    raise SourceError(f"{fault}, which no text does; give it unpacked")
                yield line
    except (OSError, EOFError, zlib.error) as error:
        fault = f"{shortened(str(path))} cannot be unpacked ({shortened(str(error))})"
        raise SourceError(f"{fault}; pack it again with gzip") from None


def parquet_lines(path: Path, key: str) -> Iterable[bytes]:
    name = shortened(str(path))
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        remedy = "pip install pyarrow, or save it as .jsonl"
        raise SourceError(f"{name} needs pyarrow: {remedy}") from None
    try:
        file = ParquetFile(path)
        columns = file.schema_arrow.names
        key = key or next((name for name in KEYS if name in columns), KEYS[0])
        if key not in columns:
            there_are, remedy = shortened(", ".join(columns)), f"name one as in {name}#COLUMN"
            raise SourceError(
                f"{name} has no column {quoted(key)}; there are {there_are}: {remedy}"
            )
        row, unpacked, most = 0, 0, max(UNPACKED, RATIO * path.stat().st_size)
        for batch in file.iter_batches(columns=[key], batch_size=1024):
            for value in batch.column(0).to_pylist():
                row += 1
                if value is None or not str(value).strip():
                    continue
                if fault := fault_of_prompt(value):
                    raise SourceError(f"{name}, row {row}: {fault}")
                line = json.dumps({key: value}).encode() + b"\n"
                unpacked += len(line)
                if len(line) > LONGEST_LINE or unpacked > most:
                    raise SourceError(f"{name}, row {row}: this unpacks to more than any text does")
                yield line
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        if isinstance(error, SourceError):
            raise
        fault = f"{name} cannot be read ({shortened(str(error))})"
        raise SourceError(f"{fault}; write it again, or as .jsonl") from None


def read_prompts(args) -> list[str]:
    """Of --prompts-file, one a line, or --prompt alone. Raises SourceError."""
    if args.prompts_file is None:
        if not args.prompt.strip():
            raise SourceError("--prompt is empty; give a prompt")
        if fault := fault_of_prompt(args.prompt):
            raise SourceError(f"--prompt {fault}")
        return [args.prompt]
    return lines_of(args.prompts_file, "--prompts-file")


def read_validation_prompts(args) -> list[str]:
    """Of --validation-prompts, one a line; [] without it. Raises SourceError."""
    if args.validation_prompts is None:
        return []
    prompts = lines_of(args.validation_prompts, "--validation-prompts")
    if len(prompts) > MOST_SHOWN:
        fault = f"--validation-prompts has {len(prompts)} prompts, all drawn with every checkpoint"
        raise SourceError(f"{fault}; take {MOST_SHOWN} at most")
    return prompts


def lines_of(path: Path, flag: str) -> list[str]:
    """The prompts of a text file. Raises SourceError, which names the flag."""
    try:
        return list(Lines(path, str))
    except SourceError as error:
        raise SourceError(f"{flag}: {error}") from None
    except OSError as error:
        fault = f"{flag} {shortened(str(path))}: {error.strerror}"
        raise SourceError(f"{fault}; give a text file, one prompt a line") from None


def tag_of(args) -> str:
    """What the name of a run's folder says of its prompts."""
    return args.prompts_file.stem if args.prompts_file else args.prompt


def warn_of_prompts(encoder, prompts: Sequence[str]) -> None:
    """A line for what the text encoder never sees: words embedded as zeros, ends that are cut.

    `encoder` has the tokenizer and the text_encoder. Of a long list the first 1000 are looked at.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        return
    tokenizer, prompts = encoder.tokenizer, prompts[:1000]
    length = tokenizer.model_max_length
    unseen = (encoder.text_encoder.get_input_embeddings().weight == 0).all(dim=1).cpu()
    unknown = []
    for word in dict.fromkeys(word for prompt in prompts for word in re.findall(r"\w+", prompt)):
        if unseen[tokenizer(word, add_special_tokens=False).input_ids].any():
            unknown.append(word)
    if unknown:
        words = shortened(", ".join(unknown))
        print(f"warning: the model does not know these words: {words}", file=sys.stderr)
    lost = [tokenizer.decode(tokenizer(prompt).input_ids[length - 1 : -1]) for prompt in prompts]
    if any(lost):
        example = quoted(next(filter(None, lost)))
        count = f"{sum(map(bool, lost))} of the prompts end" if len(lost) > 1 else "the prompt ends"
        end = f"after {length} tokens for the model; this is lost: {example}"
        print(f"warning: {count} {end}", file=sys.stderr)
