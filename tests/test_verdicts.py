"""What benchmarks/verdicts.py makes of the runs and evaluations that the claims' commands leave."""

import itertools
import json
import os
import re
import shlex
import shutil
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from conftest import ROOT
from scipy import stats

from benchmarks import claim_parts, claim_runs, rates, report, run, verdicts
from benchmarks.claim_pictures import PICTURES
from common.lora import FILE_NAME
from evaluation.digests import digest_of_model
from evaluation.judge import load_judge
from evaluation.models import names_of
from zoo import judge as judging
from zoo import world

FOLDER, SEEDS = ROOT / "benchmarks/claims", (0, 1, 2)
WEIGHTS = digest_of_model(str(ROOT / "zoo/sd"))


def commands_of(name: str) -> list[str]:
    return [line for paragraph in run.read_commands(FOLDER / name) for line in paragraph]


def runs_of_the_commands() -> list[str]:
    files = [file.name for file in FOLDER.glob("*.sh") if file.name != "evaluate.sh"]
    folders = [
        run.folder_of(run.with_seed(command, seed)).relative_to(ROOT).as_posix()
        for file in files
        for command in commands_of(file)
        for seed in SEEDS
    ]
    return [*dict.fromkeys(folders)]  # a run that is resumed is there once


def folders_of_weights() -> list[str]:
    """Of the runs, and of the weights that are kept on their way."""
    stops = [
        f"{run.folder_of(run.with_seed(command, seed)).relative_to(ROOT).as_posix()}/{stop}"
        for command in commands_of("over.sh")
        for seed in SEEDS
        for stop in re.findall(r"mkdir -p (after_\d+)", command)
    ]
    return runs_of_the_commands() + stops


def same_folder(folder: str, pattern: str) -> bool:
    """As a shell has it, where a star stands for no slash."""
    return PurePosixPath(folder).match(pattern)


def prompts_of(values: dict[str, str]) -> list[str]:
    if "--prompt" in values:
        return [values["--prompt"]]
    return (ROOT / values["--prompts-file"]).read_text().splitlines()


def rewards_of(command: str) -> list[str]:
    """Those that an evaluation asks for; the zoo's preset has one."""
    words = shlex.split(command)
    after = words[words.index("--rewards") + 1 :] if "--rewards" in words else [claim_runs.REWARD]
    return [*itertools.takewhile(lambda word: not word.startswith("--"), after)]


def write_results(folder, figures: dict, count: int) -> None:
    """As evaluate.py writes them; figures are by model, prompt and key."""
    folder.mkdir(parents=True)
    models = {
        model: {
            "prompts": {
                prompt: {
                    "rewards": {
                        spec: {"mean": mean, "standard_error": of["std"] / count**0.5}
                        for spec, mean in of["rewards"].items()
                    },
                    "success": {"mean": of["success"]},
                    "kl": {"mean": of.get("kl", 0.0)},
                    "image_quality": of["distance"],
                }
                for prompt, of in drawn.items()
            },
            "path": None if model == "base" else f"runs/claims-some/{model}",
            "sha256": "that of its run",
        }
        for model, drawn in figures.items()
    }
    models["base"]["sha256"] = WEIGHTS
    results = {"models": models, "settings": {"images_per_prompt": count}}
    (folder / "results.json").write_text(json.dumps(results))


@pytest.fixture
def places(tmp_path, monkeypatch):
    """An empty folder of runs, and nothing stored."""
    monkeypatch.setattr(claim_runs, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(claim_runs, "EVALUATIONS", tmp_path / "runs/claims-evaluations")
    monkeypatch.setattr(claim_runs, "FIGURES", tmp_path / "figures.json")
    claim_runs.stored.cache_clear()
    yield tmp_path
    claim_runs.stored.cache_clear()


@pytest.fixture
def figures(places, monkeypatch):
    """Random figures of every model that evaluate.sh judges, collected.

    By evaluation, model, prompt and key.
    """
    rng, figures = np.random.default_rng(0), {}
    for command in commands_of("evaluate.sh"):
        values = run.values_of(command)
        words = [word for word in shlex.split(command) if word.startswith("runs/claims-")]
        *patterns, folder = [*words[:-1], places / values["--output-dir"]]
        loras = []
        for pattern in patterns:
            found = [folder for folder in folders_of_weights() if same_folder(folder, pattern)]
            assert len(found) >= 3, f"no run has such a folder: {pattern}"
            loras += found
        names = ["base", *names_of([places / lora / FILE_NAME for lora in loras])]
        of_models = figures[folder.name] = {
            name: {
                prompt: dict(zip(("success", "distance", "std", "kl"), rng.random(4)))
                | {"rewards": {spec: rng.random() for spec in rewards_of(command)}}
                for prompt in prompts_of(values)
            }
            for name in names
        }
        write_results(folder, of_models, int(values["--images-per-prompt"]))
        with_pictures = folder.name.startswith(("single", "unseen", "many", "roses", "over_"))
        for model, drawn in of_models.items() if with_pictures else ():
            samples = folder / "samples" / model
            samples.mkdir(parents=True)
            of_prompts = np.arange(len(drawn), dtype=np.uint8).repeat(2)
            images = np.broadcast_to(of_prompts[:, None, None, None], (2 * len(drawn), 4, 4, 3))
            np.savez(samples / "00000.npz", images=images)
    for folder in runs_of_the_commands():
        if folder.split("/")[1].removeprefix("claims-") in claim_runs.TRAINED:
            (places / folder).mkdir(parents=True)
            lines = [json.dumps({"reward/mean": value}) for value in rng.random(5)]
            (places / folder / "metrics.jsonl").write_text("\n".join(lines))
    none = lambda name: dict.fromkeys(claim_runs.evaluated(name))
    monkeypatch.setattr(claim_runs, "right_distances", none)
    monkeypatch.setattr(claim_runs, "share_with", lambda thing, pictures: {None: 0.75}[thing])
    claim_runs.collect()
    return figures


def test_figures_of_other_runs_stay(places):
    """Of two lots of runs, on machines that do not know of each other."""
    of = lambda value: {
        "A red cat": {
            "rewards": {claim_runs.REWARD: value},
            "success": value,
            "distance": value,
            "std": 2 * value,
        }
    }
    for model, value in (("a__0", 1.0), ("b__0", 2.0), ("a__0", 3.0)):
        folder = claim_runs.EVALUATIONS / "queries"
        shutil.rmtree(claim_runs.RUNS, ignore_errors=True)
        write_results(folder, {"base": of(0.5), model: of(value)}, count=16)
        trained = claim_runs.RUNS / "claims-queries" / model
        trained.mkdir(parents=True)
        (trained / "metrics.jsonl").write_text(json.dumps({"reward/mean": value}))
        claim_runs.stored.cache_clear()
        claim_runs.collect()
    claim_runs.stored.cache_clear()
    figure = lambda model, key: claim_runs.figure("queries", model, key, "A red cat")
    assert [figure(model, "reward") for model in ("base", "a__0", "b__0")] == [0.5, 3.0, 2.0]
    assert figure("b__0", "distance") == figure("b__0", "success") == 2.0
    assert claim_runs.training_rewards("queries/a__0") == [3.0]
    assert claim_runs.training_rewards("queries/b__0") == [2.0]
    # The standard deviation is the base's, 2 * 0.5.
    in_stds = claim_runs.in_standard_deviations("queries", "b__0", claim_runs.REWARD)
    assert in_stds == pytest.approx(2.0)
    with pytest.raises(claim_runs.NotHereError):
        claim_runs.drawn("queries", "b__0")


def test_distances_of_right_pictures_are_those_of_all_models_together(places, monkeypatch):
    """They take long: not again for the same pictures, nor where some pictures are elsewhere."""
    calls, name = [], "single__a-red-cat"

    def distances(name):
        calls.append(name)
        models = filter(claim_runs.in_claim_2, claim_runs.evaluated(name))
        return dict.fromkeys(models, len(calls))

    monkeypatch.setattr(claim_runs, "right_distances", distances)
    of = {"rewards": {claim_runs.REWARD: 1.0}, "success": 1.0, "std": 1.0}
    for models, expected in (
        ({"base": 1.0, "dpok__0": 2.0}, {"base": 1, "dpok__0": 1}),
        ({"base": 1.0, "dpok__0": 2.0}, {"base": 1, "dpok__0": 1}),
        ({"base": 1.0, "dpok__0": 3.0}, {"base": 2, "dpok__0": 2}),
        ({"base": 1.0, "sft__0": 2.0}, {"base": 2, "dpok__0": 2}),  # another lot
        ({"base": 1.0, "dpok-without-kl__0": 2.0}, {"base": 2, "dpok__0": 2}),  # of another claim
        ({"base": 1 + 1e-5, "sft__0": 2.0}, {"base": 2, "dpok__0": 2}),  # of another machine
        ({"base": 1.5, "sft__0": 2.0}, None),  # its base is not that of the first lot
        ({"base": 1.5, "dpok__0": 3.0, "sft__0": 2.0}, {"base": 3, "dpok__0": 3, "sft__0": 3}),
    ):
        shutil.rmtree(claim_runs.EVALUATIONS, ignore_errors=True)
        figures = {model: {"A red cat": of | {"distance": d}} for model, d in models.items()}
        write_results(claim_runs.EVALUATIONS / name, figures, count=16)
        claim_runs.collect()
        assert claim_runs.stored()["right_distances"].get(name) == expected


def test_what_is_not_whole_is_left_out(places, capsys):
    """Evaluations of other weights, or without the pictures that it takes; runs that go on."""
    of = {"rewards": {"jpeg_incompressibility": 1.0}, "success": 1.0, "distance": 1.0, "std": 1.0}
    for name in ("queries", "over_incompressibility", "over"):
        write_results(claim_runs.EVALUATIONS / name, {"base": {"A red cat": of}}, count=16)
    file = claim_runs.EVALUATIONS / "queries/results.json"
    file.write_text(file.read_text().replace(WEIGHTS, "others"))
    for seed, iterations in ((0, 2), (1, 3)):
        folder = claim_runs.RUNS / f"claims-many/dpok__{seed}"
        folder.mkdir(parents=True)
        (folder / "args.json").write_text('{"num_iterations": 3}')
        lines = [json.dumps({"iteration": i, "reward/mean": 1.0}) for i in range(iterations)]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
    claim_runs.collect()
    assert [*claim_runs.stored()["evaluations"]] == ["over"]
    assert [*claim_runs.stored()["training"]] == ["many/dpok__1"]
    assert capsys.readouterr().out.count(" is left out: ") == 2


def test_a_run_that_was_stopped_is_not_finished(tmp_path, monkeypatch):
    """SIGTERM ends a run well, after its checkpoint: the command has ended well then, too."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    write = (
        "printf '{\"iteration\": %s}\\n' $(wc -l < runs/a/metrics.jsonl) >> runs/a/metrics.jsonl"
    )
    command = f"{write} # --output-dir runs/a"
    (tmp_path / "runs/a").mkdir(parents=True)
    (tmp_path / "runs/a/metrics.jsonl").touch()
    (tmp_path / "runs/a/args.json").write_text('{"num_iterations": 2}')
    for done in (False, True):
        assert run.run_command(command, 1) == run.is_finished(command) == done


def test_figures_of_other_weights_are_dropped(places):
    claim_runs.FIGURES.write_text(json.dumps({"weights": "others", "training": {"many/a": [1]}}))
    assert claim_runs.stored()["training"] == {}


def test_every_claim_finds_its_runs(figures):
    counts = {"1a": 12, "1b": 12, "2a": 12, "2b": 12, "3": 12, "4": 3, "5": 3, "6": 12, "7": 30}
    counts |= {"8": 12, "9a": 30, "9b": 30, "10": 3, "11a": 30, "11b": 30, "11c": 3, "11d": 3}
    counts |= {"13a": 24, "13b": 6, "14": 180, "15": 3}
    for key, claim in verdicts.CLAIMS.items():
        if claim.parts is None:
            continue
        parts = claim.parts(SEEDS)
        assert len({part.what for part in parts}) == len(parts)
        assert len(parts[0].differences) == counts[key]


def test_figures_are_those_of_the_prompt_method_and_seed(figures, monkeypatch):
    prompt = "Four wolves in the park"
    of = figures["single__four-wolves-in-the-park"]
    place = 3 * [*claim_runs.SINGLE].index(prompt) + 1
    reward_of = lambda of_prompt: of_prompt["rewards"][claim_runs.REWARD]
    of_run = lambda method: of[f"{method}__four-wolves-in-the-park__1"][prompt]
    for sft in ("sft", "sft-kl-o"):
        first = claim_parts.dpok_beats_sft(SEEDS, sft)[0]
        assert first.differences[place] == reward_of(of_run("dpok")) - reward_of(of_run(sft))
    cost = claim_parts.kl_o_costs_quality(SEEDS)[1]
    expected = of_run("sft-kl-o")["distance"] - of_run("dpok")["distance"]
    assert (cost.what, cost.differences[place]) == ("distance, SFT - DPOK", expected)
    kl = claim_parts.kl_of_runs(SEEDS)["dpok-without-kl"]
    assert kl[place] == of_run("dpok-without-kl")["kl"]

    at_2 = {part.what: part for part in claim_parts.kl_o_repairs_more(SEEDS)}
    of = figures["gamma"]
    of_run = lambda name: of[name]["A green colored rabbit"]["distance"]
    expected = of_run("kl-d-2__0") - of_run("kl-o-2__0")
    assert at_2["distance, KL-D - KL-O at 2"].differences[0] == expected

    gained, equal = claim_parts.many_prompts_at_equal_quality(SEEDS)
    of = figures["many"]
    pairs = [(of[f"dpok__{seed}"][p], of["base"][p]) for p in of["base"] for seed in SEEDS]
    assert [*gained.differences] == [reward_of(a) - reward_of(b) for a, b in pairs]
    expected = [a["distance"] - b["distance"] - b["distance"] / 10 for a, b in pairs]
    assert np.allclose(equal.differences, expected)


def test_queries_are_compared_by_reward(figures):
    """In standard deviations of the base's pictures; JPEG sizes are not those of image reward."""
    of_all = claim_parts.ddpo_beats_rwr(SEEDS, [*claim_runs.REWARDS])
    parts = {part.what: part for part in of_all}
    assert len(parts) == 15
    of_claims = verdicts.CLAIMS["9a"].parts(SEEDS) + verdicts.CLAIMS["9b"].parts(SEEDS)
    assert {part.what for part in of_claims} == parts.keys()
    of, spec = figures["queries"], "jpeg_compressibility"
    std = np.sqrt(np.mean([of_prompt["std"] ** 2 for of_prompt in of["base"].values()]))
    prompt = [*of["base"]][4]
    reward = lambda method: of[f"{method}__compressibility__2"][prompt]["rewards"][spec]
    place = 3 * 4 + 2
    found = parts["compressibility, SF - sparse RWR"].differences[place]
    assert found == pytest.approx((reward("ddpo-sf") - reward("rwr-sparse")) / std)
    found = parts["compressibility, SF - IS"].differences[place]
    assert found == pytest.approx((reward("ddpo-sf") - reward("ddpo-is")) / std)
    bounded = {what for what, part in parts.items() if part.bounded}
    assert bounded == {f"{reward}, SF - IS" for reward in claim_runs.REWARDS}
    seen = claim_parts.rewards_by_method(SEEDS)
    of_run = of["rwr-sparse__compressibility__2"].values()
    mean = np.mean([of_prompt["rewards"][spec] for of_prompt in of_run])
    assert seen["compressibility"]["rwr-sparse"][2] == pytest.approx(mean)
    rows = verdicts.markdown_of_methods(seen).splitlines()
    assert rows[2].startswith("| compressibility |") and f"{mean:+.2f} |" in rows[2]


def test_what_goes_too_far_is_seen_on_the_way(figures):
    of, prompt = figures["over"], "A green colored rabbit"
    place = 3 * [*of["base"]].index(prompt) + 1
    parts = {part.what: part for part in claim_parts.judge_falls(SEEDS)}
    stop = lambda count: of[f"ddpo-image-reward__1__after_{count}"][prompt]
    reward = lambda count: stop(count)["rewards"][claim_runs.REWARD]
    found = parts["reward, after 180 iterations - after 45"].differences[place]
    assert found == pytest.approx(reward(180) - reward(45))
    found = parts["success, after 45 iterations - after 180"].differences[place]
    assert found == pytest.approx(stop(45)["success"] - stop(180)["success"])
    (noise,) = claim_parts.ends_in_noise(SEEDS)
    assert {*noise.differences} == {0.25}


def test_with_and_without_the_kl_are_compared_at_equal_reward(figures):
    """More success with it, and less distance."""
    for part, key, sign in zip(claim_parts.kl_delays(SEEDS), ("success", "distance"), (1, -1)):
        ways = [
            [claim_parts.on_the_way(run, 1, of) for of in ("reward", key)]
            for run in ("dpok-with-kl", "dpok-without-kl")
        ]
        assert len(ways[0][0]) == 1 + 4
        _, (with_kl, without_kl) = report.at_equal_reward(ways)
        assert part.what.startswith(key) and len(part.differences) == 3
        assert part.differences[1] == sign * (with_kl - without_kl)


def test_what_the_pretraining_loss_delays_is_of_runs_that_were_there():
    (part,) = claim_parts.pretraining_loss_delays(SEEDS)
    stored = json.loads((ROOT / "benchmarks/results/large_scale_ppo.json").read_text())
    with_loss, without = (
        stored["at_equal_reward"][name]
        for name in ("preference", "preference without the pre-training loss")
    )
    assert [*part.differences] == pytest.approx([b - a for a, b in zip(with_loss, without)])


def test_figures_at_equal_reward():
    """The first way reaches 2, half way between its last two points; the second falls after 2."""
    first, second = ([0, 1, 3], [1.0, 0.8, 0.4]), ([0, 2, 1], [1.0, 0.5, 0.1])
    level, (of_first, of_second) = report.at_equal_reward([first, second])
    assert (level, of_first, of_second) == (2, pytest.approx(0.6), 0.5)


def test_joint_and_single_runs_are_compared_task_by_task(figures):
    of, spec = figures["joint_composition"], "object_detection:zoo/detector"
    prompt = [*of["base"]][1]
    gain = lambda run: (
        of[f"{run}__2"][prompt]["rewards"][spec] - of["base"][prompt]["rewards"][spec]
    )
    parts = {part.what: part for part in claim_parts.joint_run_keeps_gains(SEEDS)}
    assert len(parts) == 3
    found = parts["composition, gain of the joint run - 0.8 of the single run's"].differences[5]
    assert found == pytest.approx(gain("joint") - 0.8 * gain("composition"))
    for part, (task, other) in zip(
        claim_parts.single_runs_pay(SEEDS),
        (("preference", "portraits"), ("portraits", "preference")),
    ):
        of_other, other_spec = figures[f"joint_{other}"], claim_runs.TASKS[other]
        second = [*of_other["base"]][1]
        reward = lambda model: of_other[model][second]["rewards"][other_spec]
        assert part.what == f"{other}, base - trained for {task} alone"
        assert part.differences[5] == pytest.approx(reward("base") - reward(f"{task}__2"))
    seen = claim_parts.gains_by_task(SEEDS)["composition"]["portraits"][0]
    gains = [
        of[f"portraits__{seed}"][p]["rewards"][spec] - of["base"][p]["rewards"][spec]
        for p in of["base"]
        for seed in SEEDS
    ]
    assert seen == pytest.approx(np.mean(gains))
    mean, error = claim_parts.gains_by_task(SEEDS)["composition"]["composition"]
    held_out, _ = claim_parts.held_out_prompts_gain(SEEDS)
    assert (held_out.mean, held_out.standard_error) == (mean, error)


def test_a_claim_that_is_not_there_is_refused():
    with pytest.raises(SystemExit, match="there is no claim 16, 9c"):
        verdicts.main(verdicts.Args(claims=("9", "9c", "16")))


def test_table_marks_what_is_asserted_not_to_be(figures):
    """That SF - IS is above 0 would speak against claim 9."""
    results = {"9a": verdicts.judge(verdicts.CLAIMS["9a"].parts(SEEDS), SEEDS)}
    (row,) = (line for line in verdicts.markdown_of(results).splitlines() if "| 9a |" in line)
    cells = re.split("<br>|[|]", row)
    marked = [cell for cell in cells if "*not above 0*" in cell]
    assert len(marked) == 2 and all("SF - IS" in cell for cell in marked)


def test_every_claim_has_its_picture(figures, tmp_path):
    without = {"12", "15"}  # nothing to show; pictures of its own page
    numbers = {*map(verdicts.number_of, verdicts.CLAIMS)}
    assert PICTURES.keys() == numbers - without
    for number, draw in PICTURES.items():
        draw(SEEDS).savefig(tmp_path / f"{number}.png")
        assert os.path.getsize(tmp_path / f"{number}.png") > 3000


def test_pictures_are_those_of_the_prompt(figures):
    of_prompts = claim_runs.drawn("many", "dpok__1")
    assert [*of_prompts] == (ROOT / "prompts/zoo.txt").read_text().splitlines()
    assert [images.mean() for images in of_prompts.values()] == [*range(len(of_prompts))]


def test_core_hours_are_those_of_the_commands(places):
    """A command has its share of the cores that its jobs had together."""
    for name, seconds, jobs, cores in (("a", 1800, 2, 2), ("b", 900, 1, 2), ("c", 60, 3, 2)):
        folder = claim_runs.RUNS / "claims-many" / name
        folder.mkdir(parents=True)
        wall_time = {"seconds": seconds, "jobs_side_by_side": jobs, "cores": cores}
        (folder / "wall_time.json").write_text(json.dumps(wall_time))
    hours = {"a": 0.5, "b": 0.5, "c": 1 / 60}
    expected = {f"claims-many/{name}": pytest.approx(value) for name, value in hours.items()}
    assert claim_runs.core_hours() == expected


def test_ranking_is_of_the_comparison():
    results = json.loads((ROOT / "benchmarks/results/comparison.json").read_text())["equal_time"]
    parts = {part.what: part for part in claim_parts.ranking_of_methods(SEEDS)}
    assert len(parts) == 8
    of = lambda method: [run[claim_runs.REWARD] for run in results[method]["runs"]]
    expected = [a - b for a, b in zip(of("refl"), of("raft"))]
    assert [*parts["reward, ReFL - RAFT"].differences] == expected
    assert "share of the right colour, PPO - ReFL" in parts


@pytest.mark.parametrize(
    "differences, verdict",
    [([1, 2, 3], "holds"), ([-1, -2, -3], "does not hold"), ([-1, 2, 0], "cannot be told")],
)
def test_verdict_is_by_two_standard_errors(differences, verdict):
    part = claim_parts.Part("", differences)
    assert part.mean == np.mean(differences)
    assert part.standard_error == pytest.approx(stats.sem(differences))
    assert part.verdict == verdict
    bounded = claim_parts.Part("", differences, bounded=True)
    assert bounded.verdict == ("does not hold" if verdict == "holds" else "holds")


def test_rounds_are_counted_by_the_samples_after_them(figures):
    """Of five rounds the first samples are the base's."""
    falls, rises = claim_parts.falls_apart_without_guidance(SEEDS)
    for part, method, before, after in ((falls, "without", 3, 1), (rises, "with", 1, 3)):
        rewards = claim_runs.training_rewards(f"cfg/{method}__2")
        assert len(rewards) == 5
        assert part.differences[2] == rewards[after] - rewards[before]
    assert claim_parts.InAllSeeds("", [0.1, 0.2]).verdict == "holds"
    assert claim_parts.InAllSeeds("", [5, 5, -0.1]).verdict == "does not hold"


def test_errors_over_seeds_and_over_prompts():
    """Of two prompts with three seeds each, from a model of the mean of each in turn."""
    part = claim_parts.Part("", [1, 2, 3, 11, 12, 13])
    errors = part.other_errors(seeds=3)
    assert errors["other prompts"] == pytest.approx(stats.sem([2, 12]))
    of_prompts = [stats.sem([1, 2, 3]), stats.sem([11, 12, 13])]
    assert errors["other seeds"] == pytest.approx(np.hypot(*of_prompts) / 2)
    # 7 is far above the scatter of seeds, and not above that of two prompts.
    assert part.verdict == "holds"
    assert claim_parts.other_verdicts([part], seeds=3) == {"other prompts": "cannot be told"}
    one_prompt = claim_parts.Part("", [1, 2, 3])
    assert one_prompt.other_errors(seeds=3) == {"other seeds": pytest.approx(stats.sem([1, 2, 3]))}
    assert claim_parts.other_verdicts([one_prompt], seeds=3) == {}


def test_a_model_whose_run_was_made_again_is_left_out(places, capsys):
    of = {"success": 0.5, "distance": 1.0, "std": 1.0, "rewards": {claim_runs.REWARD: 0.0}}
    write_results(
        claim_runs.EVALUATIONS / "roses",
        {model: {"Four roses": of} for model in ("base", "a", "b")},
        count=16,
    )
    folder = claim_runs.RUNS / "claims-some/a"
    folder.mkdir(parents=True)
    (folder / FILE_NAME).write_bytes(b"another LoRA")
    claim_runs.collect()
    assert [*claim_runs.stored()["evaluations"]["roses"]] == ["base", "b"]
    assert "roses/a is left out" in capsys.readouterr().out


def test_a_model_without_its_runs_name_is_left_out(places, capsys):
    """evaluate.py names the stops of one run alone after_45 and so on, whatever the run."""
    of = {"success": 0.5, "distance": 1.0, "std": 1.0, "rewards": {claim_runs.REWARD: 0.0}}
    folder, stops = claim_runs.EVALUATIONS / "over", ("after_45", "after_90")
    write_results(folder, {model: {"A red cat": of} for model in ("base", *stops)}, count=16)
    results = json.loads((folder / "results.json").read_text())
    for stop in stops:
        results["models"][stop]["path"] = f"runs/claims-over/ddpo__0/{stop}"
    (folder / "results.json").write_text(json.dumps(results))
    claim_runs.collect()
    assert [*claim_runs.stored()["evaluations"]["over"]] == ["base"]
    assert capsys.readouterr().out.count("has not the name of ddpo__0") == 2


def test_a_claim_holds_if_all_of_its_parts_do():
    holds, fails, open_ = (
        claim_parts.Part("", values) for values in ([1, 2, 3], [-1, -2, -3], [-1, 2, 0])
    )
    assert claim_parts.verdict_of([holds, holds]) == "holds"
    assert claim_parts.verdict_of([holds, open_]) == "cannot be told"
    assert claim_parts.verdict_of([holds, open_, fails]) == "does not hold"


def test_what_the_judge_sees_is_counted():
    pictures = [
        np.asarray(world.render(world.parse(text), np.random.default_rng(i)))
        for i, text in enumerate(["A brown bottle"] * 3 + ["Two red roses"])
    ]
    share = lambda thing: claim_runs.share_with(thing, np.stack(pictures))
    assert [share(thing) for thing in ("bottle", "rose", "cat", None)] == [0.75, 0.25, 0, 0]
    noise = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    assert claim_runs.share_with(None, noise) > 0.5


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
    judge = load_judge(str(ROOT / "zoo/sd"))
    models = {"base": right, "dpok__0": np.concatenate([wrong, right[:9]])}
    monkeypatch.setattr(claim_runs, "EVALUATIONS", tmp_path)
    evaluated = {model: {prompt: {}} for model in models}
    monkeypatch.setattr(claim_runs, "evaluated", lambda name: evaluated)
    for model, images in models.items():
        folder = tmp_path / name / "samples" / model
        folder.mkdir(parents=True)
        np.savez(folder / "00000.npz", images=images)
    found = claim_runs.right_distances(name)
    images = torch.from_numpy(right[:9]).permute(0, 3, 1, 2).float() / 255
    expected = judging.image_quality(judge.network, judge.vae, images)
    assert found == {"base": pytest.approx(expected), "dpok__0": pytest.approx(expected)}
    np.savez(tmp_path / name / "samples/dpok__0/00000.npz", images=right[:7])
    assert claim_runs.right_distances(name) == {"base": None, "dpok__0": None}


def test_rates_are_those_of_the_last_tenth(tmp_path, monkeypatch):
    """Of every run that the tuning's commands make, the method and the rate are found."""
    monkeypatch.setattr(claim_runs, "RUNS", tmp_path / "runs")
    rng, expected = np.random.default_rng(0), {}
    for command in [*commands_of("tuning.sh"), *commands_of("tuning_queries.sh")]:
        values = run.values_of(run.with_seed(command, 3))
        folder = tmp_path / values["--output-dir"]
        folder.mkdir(parents=True)
        count, rate = int(values.get("--num-iterations", 5)), values["--learning-rate"]
        args = {"num_iterations": count, "learning_rate": float(rate), "seed": 3}
        (folder / "args.json").write_text(json.dumps(args))
        rewards = rng.random(count)
        lines = [json.dumps({"reward/mean": reward}) for reward in rewards]
        (folder / "metrics.jsonl").write_text("\n".join(lines))
        method = folder.name.removesuffix(f"-{rate}__3")
        expected.setdefault(method, {})[rate] = rewards[-max(1, count // 10) :].mean()
    assert rates.tried() == {
        method: {rate: pytest.approx(reward) for rate, reward in of_rates.items()}
        for method, of_rates in expected.items()
    }
    table = rates.markdown_of(rates.tried())
    for method, of_rates in expected.items():
        (line,) = (line for line in table.splitlines() if line.startswith(f"| {method} |"))
        assert line.endswith(f"| {max(of_rates, key=of_rates.get)} |")


def test_rates_refuse_a_run_that_is_not_finished(tmp_path, monkeypatch):
    monkeypatch.setattr(claim_runs, "RUNS", tmp_path)
    folder = tmp_path / "claims-tuning/dpok-1e-3__3"
    folder.mkdir(parents=True)
    args = {"num_iterations": 2, "learning_rate": 1e-3, "seed": 3}
    (folder / "args.json").write_text(json.dumps(args))
    (folder / "metrics.jsonl").write_text('{"reward/mean": 1.0}\n')
    with pytest.raises(SystemExit, match="not finished"):
        rates.tried()
    (folder / "args.json").write_text(json.dumps(args | {"num_iterations": 1, "seed": 0}))
    with pytest.raises(SystemExit, match="on seed 3"):
        rates.tried()
