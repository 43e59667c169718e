"""What benchmarks/verdicts.py makes of the runs and evaluations that the claims' commands leave."""

import json
import shlex
from fnmatch import fnmatch

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy import stats

from benchmarks import run, verdicts
from zoo import judge as judging
from zoo import world

FOLDER, SEEDS = ROOT / "benchmarks/claims", (0, 1, 2)


def commands_of(name: str) -> list[str]:
    return [line for paragraph in run.read_commands(FOLDER / name) for line in paragraph]


def runs_of_the_commands() -> list[str]:
    files = [file.name for file in FOLDER.glob("*.sh") if file.name != "evaluate.sh"]
    return [
        run.values_of(run.with_seed(command, seed))["--output-dir"]
        for file in files
        for command in commands_of(file)
        for seed in SEEDS
    ]


def prompts_of(values: dict[str, str]) -> list[str]:
    if "--prompt" in values:
        return [values["--prompt"]]
    return (ROOT / values["--prompts-file"]).read_text().splitlines()


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """Random figures of every model that evaluate.sh judges, as evaluate.py writes them.

    By evaluation, model, prompt and key.
    """
    rng, figures = np.random.default_rng(0), {}
    for command in commands_of("evaluate.sh"):
        values = run.values_of(command)
        loras = [word for word in shlex.split(command) if word.startswith("runs/claims-")]
        pattern, folder = loras[0], tmp_path / values["--output-dir"]
        models = ["base", *(f for f in runs_of_the_commands() if fnmatch(f, pattern))]
        assert len(models) > 3, "no run has such a folder"
        of_models = figures[folder.name] = {}
        for model in models:
            keys = ("reward", "success", "distance")
            drawn = {p: dict(zip(keys, rng.random(3))) for p in prompts_of(values)}
            of_models[model.rpartition("/")[2]] = drawn
        folder.mkdir(parents=True)
        written = {
            model: {
                "prompts": {
                    prompt: {
                        "rewards": {verdicts.REWARD: {"mean": of["reward"]}},
                        "success": {"mean": of["success"]},
                        "image_quality": of["distance"],
                    }
                    for prompt, of in drawn.items()
                }
            }
            for model, drawn in of_models.items()
        }
        (folder / "results.json").write_text(json.dumps({"models": written}))
    for folder in runs_of_the_commands():
        if "claims-many" in folder:
            (tmp_path / folder).mkdir(parents=True)
            lines = [json.dumps({"reward/mean": value}) for value in rng.random(4)]
            (tmp_path / folder / "metrics.jsonl").write_text("\n".join(lines))
    monkeypatch.setattr(verdicts, "ROOT", tmp_path)
    monkeypatch.setattr(verdicts, "EVALUATIONS", tmp_path / "runs/claims-evaluations")
    verdicts.evaluated.cache_clear()
    yield figures
    verdicts.evaluated.cache_clear()


def test_every_claim_finds_its_runs(figures, monkeypatch):
    monkeypatch.setattr(verdicts, "right_distances", lambda name: None)
    counts = {"1": 12, "2": 12, "3": 12, "4": 3, "5": 3, "6": 12, "7": 30, "8": 12}
    for number, claim in verdicts.CLAIMS.items():
        parts = claim.parts(SEEDS)
        assert len({part.what for part in parts}) == len(parts)
        assert len(parts[0].differences) == counts[number]


def test_figures_are_those_of_the_prompt_method_and_seed(figures, monkeypatch):
    prompt = "Four wolves in the park"
    of = figures["single__four-wolves-in-the-park"]
    first = verdicts.dpok_beats_sft(SEEDS)[0]
    place = 3 * [*verdicts.SINGLE].index(prompt) + 1
    of_run = lambda method: of[f"{method}__four-wolves-in-the-park__1"][prompt]["reward"]
    assert first.differences[place] == of_run("dpok") - of_run("sft")

    at_2 = {part.what: part for part in verdicts.kl_o_repairs_more(SEEDS)}
    of = figures["gamma"]
    of_run = lambda name: of[name]["A green colored rabbit"]["distance"]
    expected = of_run("kl-d-2__0") - of_run("kl-o-2__0")
    assert at_2["distance, KL-D - KL-O at 2"].differences[0] == expected

    gained, equal = verdicts.many_prompts_at_equal_quality(SEEDS)
    of = figures["many"]
    pairs = [(of[f"dpok__{seed}"][p], of["base"][p]) for p in of["base"] for seed in SEEDS]
    assert gained.differences == [a["reward"] - b["reward"] for a, b in pairs]
    expected = [b["distance"] / 10 - (a["distance"] - b["distance"]) for a, b in pairs]
    assert np.allclose(equal.differences, expected)


@pytest.mark.parametrize(
    "differences, verdict",
    [([1, 2, 3], "holds"), ([-1, -2, -3], "does not hold"), ([-1, 2, 0], "cannot be told")],
)
def test_verdict_is_by_two_standard_errors(differences, verdict):
    part = verdicts.Part("", differences)
    assert part.mean == np.mean(differences)
    assert part.standard_error == pytest.approx(stats.sem(differences))
    assert part.verdict == verdict
    bounded = verdicts.Part("", differences, bounded=True)
    assert bounded.verdict == ("does not hold" if verdict == "holds" else "holds")


def test_a_claim_holds_if_all_of_its_parts_do():
    holds, fails, open_ = (
        verdicts.Part("", values) for values in ([1, 2, 3], [-1, -2, -3], [-1, 2, 0])
    )
    assert verdicts.verdict_of([holds, holds]) == "holds"
    assert verdicts.verdict_of([holds, open_]) == "cannot be told"
    assert verdicts.verdict_of([holds, open_, fails]) == "does not hold"


def test_right_pictures_are_compared_equally_many(tmp_path, monkeypatch):
    """Ten right renders, and nine among wrong ones: nine of each."""
    prompt, name = "A red cat", "single__a-red-cat"
    render = lambda text, count: np.stack(
        [
            np.asarray(world.render(world.parse(text), np.random.default_rng(i)))
            for i in range(count)
        ]
    )
    right, wrong = render(prompt, 10), render("A blue dog", 5)
    judge = verdicts.load_judge(str(ROOT / "zoo/sd"))
    models = {"base": right, "other": np.concatenate([wrong, right[:9]])}
    monkeypatch.setattr(verdicts, "EVALUATIONS", tmp_path)
    evaluated = {model: {"prompts": {prompt: {}}} for model in models}
    monkeypatch.setattr(verdicts, "evaluated", lambda name: evaluated)
    for model, images in models.items():
        folder = tmp_path / name / "samples" / model
        folder.mkdir(parents=True)
        np.savez(folder / "00000.npz", images=images)
    found = verdicts.right_distances(name)
    images = torch.from_numpy(right[:9]).permute(0, 3, 1, 2).float() / 255
    expected = judging.image_quality(judge.network, judge.vae, images)
    assert found == {"base": pytest.approx(expected), "other": pytest.approx(expected)}
    np.savez(tmp_path / name / "samples/other/00000.npz", images=right[:7])
    verdicts.right_distances.cache_clear()
    assert verdicts.right_distances(name) is None
    verdicts.right_distances.cache_clear()
