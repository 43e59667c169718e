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
import importlib.util
import json
import os
import re
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np

from common import UserError

KEYS = ("prompt", "text", "caption")
CACHED_FROM = 1 << 20
"""Bytes from which a file's map of lines is kept, so that the next start does not read the file."""


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
        prompts = users_sequence(source, seed)
        if not isinstance(prompts[0], str):
            rule = "must return a sequence of prompts"
            raise SourceError(f"{source} {rule}, and its first is {prompts[0]!r:.80}")
        return prompts
    name, _, key = source.partition("#")
    path = Path(name)
    kind = path.name.lower().removesuffix(".gz").rpartition(".")[2]
    if not path.is_file():
        raise SourceError(f"there is no file {name!r}; give a text file, one prompt a line")
    if key and kind not in ("jsonl", "parquet"):
        raise SourceError(f"{source}: a #KEY is for .jsonl and .parquet files; leave it out")
    parse = (lambda text: json_prompt(text, key)) if kind in ("jsonl", "parquet") else str
    if kind == "parquet":
        path = converted(path, key, parquet_lines)
    elif path.suffix.lower() == ".gz":
        path = converted(path, "", gunzipped)
    return Lines(path, parse, source)


def take(items: Sequence, seed: int, position: int, count: int) -> list:
    """Items `position` to `position + count` of the endless stream; an epoch has each item once."""
    numbers = (divmod(n, len(items)) for n in range(position, position + count))
    return [items[int(order(len(items), seed, epoch)[n])] for epoch, n in numbers]


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
        self.path, self.parse, self.name = path, parse, name or str(path)
        if path.stat().st_size < CACHED_FROM:
            self.offsets = self.index()
        else:
            index = cached(path, self.name.partition("#")[2] + ".offsets")
            if not index.exists():
                with replacing(index) as file:
                    np.save(file, self.index())
            self.offsets = np.load(index, mmap_mode="r")

    def index(self) -> np.ndarray:
        offsets, offset = array("q"), 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
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
        with open(self.path, "rb") as file:
            file.seek(self.offsets[i])
            return self.parse(self.text(file.readline()))


def json_prompt(text: str, key: str) -> str:
    """The prompt of a JSON line; its list "objects", if any, becomes the prompt's attribute."""
    record = json_object(text)
    key = key or next((key for key in KEYS if key in record), KEYS[0])
    if not isinstance(record.get(key), str) or not record[key].strip():
        raise ValueError(f"there is no text under {key!r}; name its key as in prompts.jsonl#KEY")
    if "\0" in record[key] or any("\ud800" <= letter <= "\udfff" for letter in record[key]):
        fault = f"the text under {key!r} has a null byte or half a character"
        raise ValueError(f"{fault}; write it anew")
    if "objects" not in record:
        return record[key].strip()
    objects = record["objects"]
    if not isinstance(objects, list) or not all(isinstance(name, str) for name in objects):
        raise ValueError('"objects" is not a list of words')
    prompt = Prompt(record[key].strip())
    prompt.objects = objects
    return prompt


def json_object(text: str) -> dict:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    return record


def users_sequence(source: str, seed: int) -> Sequence:
    """What function(seed) of "path/to/file.py:function" returns: a sequence that is not empty."""
    path, _, name = source.rpartition(":")
    if not Path(path).is_file():
        raise SourceError(f"there is no file {path!r} ({source})")
    module_name = re.sub(r"\W", "_", f"source {Path(path).resolve()}")
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module  # where pickle looks for classes
    try:
        spec.loader.exec_module(module)
        items = getattr(module, name)(seed)
        if len(items) == 0:
            raise SourceError(f"{source} returned nothing")
        items[0]
    except SourceError:
        raise
    except Exception as error:  # the user's own code
        raise SourceError(f"{source} failed with {type(error).__name__}: {error}") from error
    return items


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


def gunzipped(path: Path, key: str) -> Iterable[bytes]:
    try:
        with gzip.open(path, "rb") as file:
            while part := file.read(1 << 24):
                yield part
    except (OSError, EOFError) as error:
        raise SourceError(f"{path} cannot be unpacked ({error}); pack it again with gzip") from None


def parquet_lines(path: Path, key: str) -> Iterable[bytes]:
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        remedy = "pip install pyarrow, or save it as .jsonl"
        raise SourceError(f"{path} needs pyarrow: {remedy}") from None
    file = ParquetFile(path)
    columns = file.schema_arrow.names
    key = key or next((name for name in KEYS if name in columns), KEYS[0])
    if key not in columns:
        there_are, remedy = ", ".join(columns), f"name one as in {path}#COLUMN"
        raise SourceError(f"{path} has no column {key!r}; there are {there_are}: {remedy}")
    for batch in file.iter_batches(columns=[key]):
        for value in batch.column(0).to_pylist():
            if str(value or "").strip():
                yield json.dumps({key: str(value)}).encode() + b"\n"


def read_prompts(args) -> list[str]:
    """Of --prompts-file, one a line, or --prompt alone. Raises SourceError."""
    if args.prompts_file is None:
        if not args.prompt.strip():
            raise SourceError("--prompt is empty; give a prompt")
        return [args.prompt]
    try:
        return list(Lines(args.prompts_file, str))
    except SourceError as error:
        raise SourceError(f"--prompts-file: {error}") from None
    except OSError as error:
        fault = f"--prompts-file {args.prompts_file}: {error.strerror}"
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
        words = ", ".join(unknown)
        print(f"warning: the model does not know these words: {words}", file=sys.stderr)
    lost = [tokenizer.decode(tokenizer(prompt).input_ids[length - 1 : -1]) for prompt in prompts]
    if any(lost):
        example = next(filter(None, lost))
        example = example if len(example) < 200 else f"{example[:200]}..."
        count = f"{sum(map(bool, lost))} of the prompts end" if len(lost) > 1 else "the prompt ends"
        end = f"after {length} tokens for the model; this is lost: {example!r}"
        print(f"warning: {count} {end}", file=sys.stderr)
