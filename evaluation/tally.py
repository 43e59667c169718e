"""The tally of a human evaluation: how often raters prefer which of its two models."""

import os
from pathlib import Path
from statistics import NormalDist
from typing import Literal, NotRequired, TypedDict

from evaluation.models import NAME
from evaluation.page import ANSWERS, KEY_NAME, QUESTIONNAIRES
from evaluation.places import check_place
from harness.args import fail
from harness.stored import StoredError, read_stored

QUESTIONS = [name for asked in QUESTIONNAIRES.values() for name in asked.questions]


class Pair(TypedDict):
    """A pair of the page: the models on its sides."""

    prompt: str
    image: int
    """The number of the prompt's picture, or of the first one of the set."""
    left: str
    right: str


class Key(TypedDict):
    """What key.json holds."""

    study: str
    models: list[str]
    questions: NotRequired[Literal[tuple(QUESTIONNAIRES)]]
    set_size: NotRequired[int]
    """Pages of single pictures were first written without these two."""
    shuffle_seed: int
    pairs: list[Pair]


class Answers(TypedDict):
    """What the page saves: by the pair's number and the question an answer."""

    study: str
    session: str
    rater: NotRequired[str]
    answers: dict[str, dict[Literal[tuple(QUESTIONS)], Literal[tuple(ANSWERS)]]]


Verdict = int | str | None
"""Of a pair: the model that is preferred (0 or 1), "similar", "not_loaded", None without answer."""


def wilson_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval for a share of which k of n were seen (1927); (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    z, p = NormalDist().inv_cdf((1 + confidence) / 2), k / n
    middle = p + z**2 / (2 * n)
    half = z * (p * (1 - p) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = ((middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    # Exactly, where rounding would leave 1e-17.
    return (0.0 if k == 0 else low), (1.0 if k == n else high)


def tally(answers: tuple[Path, ...], key: Path) -> dict:
    """The figures of the raters' files `answers`, by the key's file.

    {"questions", "set_size", "raters", "pairs", "answers", "majority", "models"}: `rates` of all
    answers, and of the majorities of each pair, by question. Files that do not belong together end
    the command.
    """
    key = read_key(key)
    models = key["models"]
    of_all, of_majority = {}, {}
    raters = read_raters(answers, key)
    for question in QUESTIONNAIRES[key["questions"]].questions:
        by_rater = [verdicts(key, given, question) for given in raters]
        of_all[question] = rates([verdict for found in by_rater for verdict in found], models)
        by_pair = [majority(list(votes)) for votes in zip(*by_rater)]
        of_majority[question] = rates(by_pair, models)
    return {
        "questions": key["questions"],
        "set_size": key["set_size"],
        "raters": len(raters),
        "pairs": len(key["pairs"]),
        "answers": of_all,
        "majority": of_majority,
        "models": models,
    }


def key_of(answers: tuple[Path, ...], path: Path | None) -> Path:
    """The key's file: `path`, or else what is beside the answers or one folder up.

    Without answers or a key the command ends.
    """
    if not answers:
        fail("there are no answers; name the files that the page has saved, e.g. answers/*.json")
    folder = answers[0].parent
    places = [place / KEY_NAME for place in (folder, folder.parent)]
    path = path or next((place for place in places if os.path.lexists(place)), None)
    if path is None:
        fail(
            f"--key is missing, and there is no {KEY_NAME} beside the answers; "
            "name the one that build has written"
        )
    return path


def read_key(path: Path) -> Key:
    """The key of a page, with "questions" and "set_size" of every page. Raises StoredError."""
    remedy = f"name with --key the {KEY_NAME} that build has written, as it was"
    key = {"questions": "pictures", "set_size": 1} | read_stored(path, Key, remedy)
    models, pairs = key["models"], key["pairs"]
    two = len(models) == 2 and len(set(models)) == 2 and all(map(NAME.fullmatch, models))
    if not two or any({pair["left"], pair["right"]} != set(models) for pair in pairs):
        raise StoredError(f"{path} has no pairs of two models; {remedy}")
    if key["set_size"] < 1:
        raise StoredError(f"{path} has sets of {str(key['set_size'])[:20]} pictures; {remedy}")
    return key


def read_raters(paths: tuple[Path, ...], key: Key) -> list[dict]:
    """What each rater has answered, {pair: {question: answer}}; a rater counts once."""
    given, files = [], {}
    for path in paths:
        content = read_answers(path, key)
        session = content["session"]
        if session in files:
            fail(f"answers {path} and {files[session]} are one rater's; give the later one alone")
        files[session] = path
        given.append(content["answers"])
    return given


def read_answers(path: Path, key: Key) -> Answers:
    """A rater's file, checked against the key. Raises StoredError."""
    remedy = "name only files of answers, as the page has saved them"
    content = read_stored(path, Answers, remedy)
    if content["study"] != key["study"]:
        fail(
            f"answers {path} are of another page than the key's; "
            f"give the {KEY_NAME} that was written with that page"
        )
    known = {str(n) for n in range(len(key["pairs"]))}
    for pair in content["answers"].keys() - known:
        raise StoredError(f"answers {path}: there is no pair {ascii(pair)[:50]}; {remedy}")
    asked = QUESTIONNAIRES[key["questions"]].questions
    for question in {name for given in content["answers"].values() for name in given} - {*asked}:
        raise StoredError(f"answers {path}: nothing was asked about {question}; {remedy}")
    return content


def check_output(path: Path | None, read: tuple[Path | None, ...]) -> None:
    """Refuse a file for the figures that cannot be written, or that is one of those `read`."""
    if path is None:
        return
    check_place("--output", path, is_folder=False)
    for other in read:
        if other is not None and os.path.realpath(other) == os.path.realpath(path):
            fail(f"--output {path} would overwrite {other}, which is read; choose another file")


def verdicts(key: Key, given: dict, question: str) -> list[Verdict]:
    """A rater's answers to one question, pair after pair."""
    out = []
    for n, pair in enumerate(key["pairs"]):
        value = given.get(str(n), {}).get(question)
        preferred = value in ("left", "right")
        out.append(key["models"].index(pair[value]) if preferred else value)
    return out


def majority(votes: list[Verdict]) -> Verdict:
    """What several raters say of one pair: the model that more of them prefer.

    Where they are even it is "similar", if any of them has seen both.
    """
    if votes.count(0) != votes.count(1):
        return int(votes.count(1) > votes.count(0))
    for answer in ("similar", "not_loaded"):
        if answer in votes:
            return answer
    return "similar" if 0 in votes else None


def rates(found: list[Verdict], models: list[str]) -> dict:
    """Counts, and the share of the second model among those that prefer one, with its interval."""
    k, n = found.count(1), found.count(0) + found.count(1)
    return {
        "preferred": {name: found.count(which) for which, name in enumerate(models)},
        "similar": found.count("similar"),
        "not_loaded": found.count("not_loaded"),
        "not_answered": found.count(None),
        "preference": k / n if n else None,
        "interval": list(wilson_interval(k, n)),
    }


def tables(results: dict) -> str:
    """A table of the answers, and one of the raters' majorities if there are several."""
    models = results["models"]
    size = results["set_size"]
    of_sets = f"sets of {size} pictures, " if size > 1 else ""
    head = f"{results['raters']} raters, {results['pairs']} pairs of {of_sets}"
    head += f"{models[0]} and {models[1]}"
    parts = [f"{head}\n", table("answer", results["answers"], models)]
    if results["raters"] > 1:
        parts.append(table("pair, by majority", results["majority"], models))
    return "\n".join(parts)


def table(of: str, results: dict[str, dict], models: list[str]) -> str:
    """Markdown, a line a question."""
    first, second = (name.replace("|", "\\|") for name in models)
    header = [f"each {of}", first, second, "similar", "did not load", "not answered"]
    lines = [f"| {' | '.join(header)} | {second} preferred |", "|---|---|---|---|---|---|---|"]
    for question, found in results.items():
        counts = [*found["preferred"].values()]
        counts += [found["similar"], found["not_loaded"], found["not_answered"]]
        low, high = found["interval"]
        share = found["preference"]
        rate = "–" if share is None else f"{share:.0%} ({low:.0%} to {high:.0%})"
        lines.append(f"| {question} | {' | '.join(map(str, counts))} | {rate} |")
    return "\n".join(lines) + "\n"
