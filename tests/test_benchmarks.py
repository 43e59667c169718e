"""The commands behind the docs' figures: scripts take them, the runner keeps what is done."""

import importlib
import json
import shlex
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT

import ddpo
from benchmarks import comparison, gradient_variance, pages, report, run, zoo_rewards
from common.scheduler import ddim_step_with_logprob
from common.stable_diffusion import load_stable_diffusion
from harness.args import parse_args
from zoo import world

FOLDERS = ROOT / "benchmarks/commands", ROOT / "benchmarks/claims"
FILES = [file for folder in FOLDERS for file in sorted(folder.glob("*.sh"))]
PARAGRAPHS = [(file.name, commands) for file in FILES for commands in run.read_commands(file)]
COMMANDS = [command for _, commands in PARAGRAPHS for command in commands]


def script_and_words(command: str) -> tuple[str, list[str]]:
    """The script that a command runs, and its words, without what the shell does around it."""
    words = shlex.split(run.with_seed(command, 0))
    words = words[words.index("python") + 1 :]
    words = words[: words.index("&&")] if "&&" in words else words
    return words[0].removesuffix(".py"), words[1:]


@pytest.mark.parametrize("command", COMMANDS)
def test_scripts_take_the_commands(command, tmp_path):
    script, words = script_and_words(command)
    # In this test's folder: there is no run to resume, and a user's own may be there.
    flag = "--output-dir" if "--output-dir" in words else "--resume"
    at = words.index(flag)
    words[at : at + 2] = ["--output-dir", str(tmp_path)]
    module = importlib.import_module(script)
    check = None if script == "evaluate" else module.check  # that one asks for the runs themselves
    parse_args(module.PRESETS, module.__doc__, check, words)


def test_no_two_jobs_write_into_one_folder():
    owners = {}
    for number, (_, commands) in enumerate(PARAGRAPHS):
        # Else the job of each seed would have the commands without one.
        assert len({"$SEED" in command for command in commands}) == 1
        for command in commands:
            dataset = run.values_of(command).get("--dataset")
            for folder in {run.folder_of(command), dataset} - {None}:
                assert owners.setdefault(folder, number) == number


@pytest.mark.parametrize("script", ["ddpo", "rwr", "sft_kl"])
def test_report_knows_the_runs_of_the_committed_results(script):
    found = {", ".join(report.curve_and_panel(each)) for each in report.commands_of(script)}
    results = json.loads((ROOT / f"benchmarks/results/{script}.json").read_text())
    assert results["runs"].keys() <= found


@pytest.mark.parametrize("preset", ["zoo", "zoo-compressibility"])
def test_presets_of_ddpo_are_those_of_its_results(preset, monkeypatch):
    """docs/ddpo.md says so of the runs with importance sampling."""
    monkeypatch.chdir(ROOT)
    expected = replace(ddpo.PRESETS[preset], dtype="fp32", allow_tf32=False)
    found = []
    for command in report.commands_of("ddpo"):
        _, words = script_and_words(command)
        words = words[: words.index("--output-dir")]  # the last one; there may be a run
        found.append(parse_args(ddpo.PRESETS, "", ddpo.check, words))
    assert found.count(expected) == 1


OF_DPOK = sorted(name for name, (function, _) in report.REPORTS.items() if function is report.dpok)


@pytest.mark.parametrize("name", OF_DPOK)
def test_report_of_dpok_knows_the_flags_of_the_committed_results(name):
    commands = report.dpok_commands(name)
    results = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    assert {report.flags_of(command) for command in commands} == {results["flags"]}
    assert [run.values_of(each)["--prompt"] for each in commands] == list(results["prompts"])


def test_runner_runs_keeps_and_skips(tmp_path):
    """A command that writes down its words, and fails unless it is resumed."""
    file, ran = tmp_path / "commands.sh", tmp_path / "ran"
    code = f"import sys; print(*sys.argv[1:], file=open({str(ran)!r}, 'a'))"
    fails = f"{code}; sys.exit('--resume' not in sys.argv)"
    a, b = tmp_path / "a__$SEED", tmp_path / "b"
    file.write_text(
        f"# A comment.\n"
        f'python -c "{code}" \\\n    --output-dir {a}\n\n'
        f'python -c "{fails}" --output-dir {b}\n'
        f'python -c "{code}" --resume {b} && echo kept > {b}/kept\n'
    )
    args = run.Args(file, seeds=(0, 1), jobs=2)
    with pytest.raises(SystemExit, match="failed"):
        run.main(args)
    assert sorted(ran.read_text().splitlines()) == [
        f"--output-dir {tmp_path}/a__0",
        f"--output-dir {tmp_path}/a__1",
        f"--output-dir {b}",
    ]
    wall_time = run.read_wall_time(tmp_path / "a__0")
    assert wall_time["seconds"] > 0 and wall_time["jobs_side_by_side"] == 2
    assert run.read_wall_time(b)["finished"] == []

    ran.unlink()
    (b / "checkpoint").mkdir()
    run.main(args)
    assert ran.read_text().splitlines() == [f"--output-dir {b} --resume {b}", f"--resume {b}"]
    assert (b / "kept").exists() and len(run.read_wall_time(b)["finished"]) == 2

    ran.unlink()
    run.main(args)
    assert not ran.exists()


def test_runner_takes_in_runs_as_they_are_finished(tmp_path, monkeypatch):
    """A command that takes runs by a pattern: those at their end, and again when there are more."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    for name, iterations in (("a", 2), ("b", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "args.json").write_text('{"num_iterations": 2}')
        lines = [json.dumps({"iteration": i}) for i in range(iterations)]
        (tmp_path / name / "metrics.jsonl").write_text("\n".join(lines))
    # A shell would give the run that is short of its end for a pattern of it alone.
    assert run.with_paths("echo b* x*") == "echo 'b*' x*"
    command = "echo [ab]* x* >> ran # --output-dir of"
    for _ in range(2):  # the second finds it finished
        assert run.run_command(command, 1)
        assert (tmp_path / "ran").read_text() == "a x*\n"
    (tmp_path / "b/metrics.jsonl").write_text(json.dumps({"iteration": 1}))
    assert not run.is_finished(command)
    assert run.run_command(command, 1)
    assert (tmp_path / "ran").read_text() == "a x*\na b x*\n"


def test_runner_refuses_a_command_without_a_folder(tmp_path):
    (tmp_path / "commands.sh").write_text("python -c pass\n")
    with pytest.raises(SystemExit, match="no --output-dir"):
        run.main(run.Args(tmp_path / "commands.sh"))


def test_a_page_is_filled_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A\n\n<!-- one -->\nold\n<!-- end -->\n\n<!-- two -->\n<!-- end -->\nB\n")
    table = pages.markdown_table(["a", "b"], [["1", "2"]])
    pages.fill(page, {"one": table})
    filled = (
        "# A\n\n<!-- one -->\n| a | b |\n| --- | --- |\n| 1 | 2 |\n<!-- end -->\n\n<!-- two -->\n"
    )
    assert page.read_text() == f"{filled}<!-- end -->\nB\n"
    with pytest.raises(ValueError, match="0 places for three"):
        pages.fill(page, {"three": table})


def test_comparison_has_the_committed_results_on_its_page():
    """Every table of results/comparison.json is the one that docs/comparison.md shows."""
    results = json.loads((ROOT / "benchmarks/results/comparison.json").read_text())
    page = (ROOT / "docs/comparison.md").read_text()
    for name in comparison.TABLES.keys() & results.keys():
        assert comparison.markdown_of(name, results[name]) in page


@pytest.mark.parametrize("prompt", ["a green rabbit", "a red cat", "a blue pig", "a yellow wolf"])
def test_colours_are_those_of_the_render(prompt):
    scene = replace(world.parse(prompt), place="plain")
    [thing] = scene.groups
    scores = {}
    for color in world.COLORS:
        drawn = replace(scene, groups=[replace(thing, color=color)])
        images = [world.render(drawn, np.random.default_rng(i)) for i in range(4)]
        images = torch.stack([torch.from_numpy(np.array(image)) for image in images])
        images = images.permute(0, 3, 1, 2) / 255
        scores[color] = zoo_rewards.colours(images, [prompt] * 4)
        assert scores[color].shape == (4,) and scores[color].max() <= 1
    right = scores.pop(thing.color).min()
    assert right > 0.35 and max(score.max() for score in scores.values()) < 0.2


def test_colours_of_an_empty_picture():
    assert zoo_rewards.colours(torch.full((1, 3, 8, 8), 0.7), ["a red cat"]).tolist() == [0.0]


def test_signal_and_noise_of_known_gradients():
    """Normal vectors round a mean of length 1: the variance is D sigma^2, its error as seen."""
    D, sigma, found = 50, 2.0, []
    for seed in range(40):
        drawn = torch.randn(200, D, generator=torch.Generator().manual_seed(seed))
        found.append(gradient_variance.signal_and_noise(sigma * drawn + D**-0.5))
    of = lambda key: torch.tensor([values[key] for values in found])
    deviation = of("signal").std() / len(found) ** 0.5
    assert abs(of("signal").mean() - 1) < 3 * deviation
    assert of("noise").mean() == pytest.approx(D * sigma**2, rel=0.01)
    assert torch.allclose(of("signal_to_noise"), of("signal") / of("noise"))
    spread = of("signal_to_noise").std().item()
    assert of("error").mean().item() == pytest.approx(spread, rel=0.3)


def test_gradient_of_a_log_prob_is_that_of_the_updates():
    """Each sample's, taken alone, is its share of the gradient that ddpo.py's loss has for all."""
    args = replace(ddpo.PRESETS["zoo"], dtype="fp32", num_inference_steps=3)
    sd = load_stable_diffusion(args, torch.device("cpu"))
    prompts = ["A red cat", "A blue dog"]
    trajectory, images = gradient_variance.draw(args, sd, prompts, seed=0)
    assert trajectory.shape[:2] == (2, 4) and images.shape == (2, 3, 64, 64)
    texts, j = [sd.encode([prompt]) for prompt in prompts], 1
    alone = [
        gradient_variance.log_prob_gradient(args, sd, trajectory[i], texts[i], j) for i in range(2)
    ]
    t = sd.timesteps[j].expand(2)
    prediction = ddpo.guided_noise(args, sd, sd.unet, trajectory[:, j], t, torch.cat(texts))
    step = ddim_step_with_logprob(
        sd.scheduler, prediction, t, trajectory[:, j], args.eta, prev_sample=trajectory[:, j + 1]
    )
    together = torch.autograd.grad(step.log_prob @ torch.tensor([2.0, -1.0]), sd.weights)
    together = torch.cat([gradient.flatten() for gradient in together])
    assert together.norm() > 0
    assert (2 * alone[0] - alone[1] - together).norm() < 1e-4 * together.norm()
