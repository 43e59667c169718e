"""evaluate.py: its statistics against scipy, its KL against torch.distributions, and real runs.

Of the runs: what they leave, ranks, batches, a stop in the middle, wrong input.
"""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy import stats
from torch.distributions import Normal, kl_divergence

import evaluate
from common.lora import FILE_NAME, add_lora, save_lora
from common.scheduler import ddim_step_with_logprob
from evaluation.models import finetuned, read_models
from evaluation.sampler import encode_prompts, guided_noise, kl_to_pretrained, sample
from evaluation.sheet import GAP, LEFT, TOP
from evaluation.statistics import compare, diversity, mean_and_error

PROMPTS = ["A green colored rabbit", "A cat and a dog", "a dog on the moon"]
SETTINGS = ("--images-per-prompt", 4, "--shard-size", 4)
SETTINGS += ("--num-inference-steps", 3, "--guidance-scale", 2)
SETTINGS += ("--seed", 7)


def make_lora(pipeline_folder, folder, rank: int, size: float, reward: str | None = None):
    """A run's folder with a LoRA of random weights; with `size` 0 it changes nothing."""
    unet = UNet2DConditionModel.from_pretrained(pipeline_folder / "unet")
    torch.manual_seed(rank)
    for parameter in add_lora(unet, rank):
        parameter.data = torch.randn_like(parameter) * size
    folder.mkdir(parents=True)
    save_lora(unet, folder)
    if reward:
        run = {"reward": reward, "num_inference_steps": 3, "guidance_scale": 2.0, "eta": 1.0}
        (folder / "args.json").write_text(json.dumps(run))
    return folder


@pytest.fixture(scope="module")
def work(tiny_sd, tmp_path_factory):
    """Three LoRAs on the tiny model, prompts, and two rewards.

    The LoRAs are a run's folder that was trained on brightness, one that changes nothing, and a
    bare file.
    """
    work = tmp_path_factory.mktemp("evaluate")
    (work / "prompts.txt").write_text("\n".join(PROMPTS))
    (work / "mine.py").write_text(
        "import os, time\n"
        "def red(images, prompts):\n"
        "    time.sleep(float(os.environ.get('SLOW', 0)))\n"
        "    return 10 * (images[:, 0].mean((1, 2)) - 0.48)\n"
        "def contrast(images, prompts): return 10 * images.flatten(1).std(1)\n"
    )
    reward = f"0.5*{work}/mine.py:red+0.5*jpeg_compressibility"
    make_lora(tiny_sd, work / "runs/red", 3, 0.5, reward)
    make_lora(tiny_sd, work / "runs/nothing", 2, 0.0, "aesthetic")
    bare = make_lora(tiny_sd, work / "runs/bare", 4, 0.3)
    shutil.move(bare / FILE_NAME, work / "bare.safetensors")
    return work


def flags(work, tiny_sd, *more) -> list:
    rewards = ["--rewards", f"{work}/mine.py:red", "--rewards", f"{work}/mine.py:contrast"]
    return ["--model", tiny_sd, "--prompts-file", work / "prompts.txt", *rewards, *SETTINGS, *more]


def run_here(monkeypatch, *words) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    evaluate.main()


def read(folder) -> dict:
    return json.loads((folder / "results.json").read_text())["models"]


@pytest.fixture(scope="module")
def evaluation(work, tiny_sd):
    """The whole command as a user makes it."""
    words = flags(work, tiny_sd, "--rewards", "statistical_parity:zoo/skin_tone")
    words += ["--micro-batch-size", 16, "--output-dir", work / "out"]
    words += ["--lora", work / "runs/red", work / "runs/nothing"]
    words += ["--lora", work / "bare.safetensors"]
    result = run_script("evaluate.py", *words)
    assert result.returncode == 0, result.stderr
    assert "| red |" in result.stdout
    assert "warning" not in result.stderr.replace("warning: the model does not", "")
    return work / "out"


def samples(folder, name: str) -> dict[str, np.ndarray]:
    """All shards of a model, (P, N, ...); scores by their spec, without the digest of its file."""
    shards = [dict(np.load(file)) for file in sorted((folder / "samples" / name).glob("*.npz"))]
    whole = {key: np.concatenate([shard[key] for shard in shards]) for key in shards[0]}
    whole = {key.partition(" sha256:")[0]: value for key, value in whole.items()}
    return {key: value.reshape(3, 4, *value.shape[1:]) for key, value in whole.items()}


def test_statistics_equal_those_of_scipy():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(5, 12)) + np.arange(5)[:, None]
    ours = base + rng.normal(0.3, 1, size=(5, 12))
    ours[:, :3] = base[:, :3]  # ties
    for j in range(5):
        found = compare(ours[j : j + 1], base[j : j + 1])
        paired = stats.ttest_rel(ours[j], base[j])
        assert found["mean"] == pytest.approx(np.mean(ours[j]))
        assert found["standard_error"] == pytest.approx(stats.sem(ours[j]), rel=1e-12)
        assert found["gain"] == pytest.approx(np.mean(ours[j]) - np.mean(base[j]))
        error = found["gain"] / paired.statistic
        assert found["gain_standard_error"] == pytest.approx(error, rel=1e-9)
        # In each pair the better one has rank 2, and 1.5 where they are equal.
        ranks = stats.rankdata(np.stack([base[j], ours[j]]), axis=0)[1]
        assert found["win_rate"] == pytest.approx(np.mean(ranks - 1))
        assert found["win_rate_standard_error"] == pytest.approx(stats.sem(ranks - 1))
    found = compare(ours, base)
    assert found["mean"] == pytest.approx(ours.mean())
    assert found["gain"] == pytest.approx((ours - base).mean())
    error = np.sqrt(np.mean(stats.sem(ours, axis=1) ** 2) / 5)
    assert found["standard_error"] == pytest.approx(error, rel=1e-12)
    ranks = stats.rankdata(np.stack([base, ours]), axis=0)[1]
    assert found["win_rate"] == pytest.approx(np.mean(ranks - 1))


def test_standard_error_in_all_is_that_of_other_noise_and_the_same_prompts():
    """The estimate against the spread of the mean over 4000 evaluations.

    Their prompts differ a lot and stay.
    """
    rng = np.random.default_rng(1)
    means, spreads = np.array([[-3.0], [0.0], [5.0]]), np.array([[1.0], [0.2], [2.0]])
    found = [mean_and_error(rng.normal(means, spreads, size=(3, 10))) for _ in range(4000)]
    spread = np.std([mean for mean, _ in found], ddof=1)
    assert np.sqrt(np.mean([error**2 for _, error in found])) == pytest.approx(spread, rel=0.05)
    assert mean_and_error(np.array([[1.0], [2.0]])) == (1.5, None)


def test_diversity_is_the_mean_over_pairs():
    a = torch.rand(4, 30, generator=torch.Generator().manual_seed(0))
    pairs = [((a[i] - a[j]) ** 2).mean().sqrt().item() for i in range(4) for j in range(i)]
    assert diversity(a) == pytest.approx(np.mean(pairs))
    assert diversity(a[:1]) is None


@torch.no_grad()
def test_kl_is_that_of_torch_distributions(work, tiny_sd):
    """Of the fine-tuned model's own steps, run again along its trajectories.

    0 where the LoRA changes nothing.
    """
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    args = evaluate.Args(guidance_scale=3.0, num_inference_steps=5)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    scheduler.set_timesteps(5)
    text = encode_prompts(pipeline, PROMPTS[:2], "cpu")
    no_text = encode_prompts(pipeline, [""], "cpu")
    noise = torch.randn(2, 6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for run in ("red", "nothing"):
        unet = finetuned(pipeline.unet, work / "runs" / run)
        trajectory, stds = sample(args, unet, scheduler, text, no_text, noise)
        expected = torch.zeros(2, dtype=torch.float64)
        for j, t in enumerate(scheduler.timesteps):
            steps = []
            x_t, x_prev = trajectory[:, j], trajectory[:, j + 1]
            for network in (unet, pipeline.unet):
                guided = guided_noise(args, network, x_t, t.expand(2), text, no_text)
                step = ddim_step_with_logprob(scheduler, guided, t, x_t, prev_sample=x_prev)
                steps.append(Normal(step.mean.double(), step.std.double().view(2, 1, 1, 1)))
            expected += kl_divergence(*steps).sum((1, 2, 3))
        texts = (text, no_text)
        found = kl_to_pretrained(args, pipeline.unet, scheduler, *texts, noise, trajectory, stds)
        if run == "red":
            assert expected.min() > 1e-3
            torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-6)
        else:
            assert found.abs().max() < 1e-6


def test_what_a_run_leaves(evaluation, work):
    results, specs = read(evaluation), [f"{work}/mine.py:red", f"{work}/mine.py:contrast"]
    parity = "statistical_parity:zoo/skin_tone"
    assert list(results) == ["base", "red", "nothing", "bare"]
    base = samples(evaluation, "base")
    for name, found in results.items():
        own = samples(evaluation, name)
        pictures = own["images"].astype(float) / 255
        assert own[specs[0]] == pytest.approx(10 * (pictures[..., 0].mean((2, 3)) - 0.48), abs=1e-4)
        contrast = 10 * pictures.reshape(3, 4, -1).std(-1, ddof=1)
        assert own[specs[1]] == pytest.approx(contrast, abs=1e-4)
        assert (own[parity] == own[parity][:, :1]).all()  # one for all pictures of a prompt
        levels = [(found["prompts"][prompt], [j]) for j, prompt in enumerate(PROMPTS)]
        for level, rows in [(found["all"], slice(None)), *levels]:
            for spec in specs:
                figures = level["rewards"][spec]
                assert figures["mean"] == pytest.approx(own[spec][rows].mean())
                assert figures["standard_error"] > 0
                if name != "base":
                    ranks = stats.rankdata(np.stack([base[spec][rows], own[spec][rows]]), axis=0)[1]
                    assert figures["win_rate"] == pytest.approx(np.mean(ranks - 1))
                    gain = (own[spec][rows] - base[spec][rows]).mean()
                    assert figures["gain"] == pytest.approx(gain, abs=1e-6)
            assert level["rewards"][parity]["standard_error"] is None
            flat = pictures[rows].reshape(-1, 4, 64 * 64 * 3)
            pairs = [(s[i], s[j]) for s in flat for i in range(4) for j in range(i)]
            apart = [np.sqrt(((a - b) ** 2).mean()) for a, b in pairs]
            assert level["diversity"] == pytest.approx(np.mean(apart), rel=1e-4)
            kl = 0 if name == "base" else pytest.approx(own["kl"][rows].mean(), rel=1e-5)
            assert level["kl"]["mean"] == kl
    assert results["red"]["all"]["kl"]["mean"] > 1e-4
    assert results["nothing"]["all"]["kl"]["mean"] < 1e-5
    assert np.abs(samples(evaluation, "red")["images"].astype(int) - base["images"]).max() > 3
    nothing = results["nothing"]["all"]["rewards"][specs[0]]
    assert (nothing["gain"], nothing["win_rate"]) == (0, 0.5)
    assert results["red"]["trained_on"] == {specs[0]: True, specs[1]: False, parity: False}
    assert results["bare"]["trained_on"] == dict.fromkeys([*specs, parity])

    table = (evaluation / "table.md").read_text()
    trained_on = "red: held out, nothing: held out, bare: not known if trained on"
    assert f"`{specs[1]}` ({trained_on})" in table
    mean = f"{nothing['mean']:+.3f} ± {nothing['standard_error']:.3f}"
    assert f"{mean} | +0.000 ± 0.000 | 50% |" in table
    assert all(table.count(f"| {prompt} |") == 4 for prompt in PROMPTS)

    sheet, names = np.asarray(Image.open(evaluation / "comparison.png")), list(results)
    side = 128 + GAP  # 64 px, twice as large
    for j in range(3):
        for row, name in enumerate(names):
            for i in range(4):
                y = j * (TOP + 4 * side) + TOP + row * side
                x = LEFT + i * side
                cell = sheet[y : y + 128 : 2, x : x + 128 : 2]
                assert np.array_equal(cell, samples(evaluation, name)["images"][j, i]), (j, name, i)


def figures_of(tree, path=""):
    """Every number of results.json with where it stands."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from figures_of(value, f"{path}/{key}")
    elif isinstance(tree, float):
        yield path, tree


@pytest.mark.parametrize("ranks, micro_batch_size", [(1, 1), (2, 16)])
def test_ranks_and_batches_do_not_change_the_figures(
    evaluation, work, tiny_sd, tmp_path, monkeypatch, ranks, micro_batch_size
):
    words = flags(work, tiny_sd, "--rewards", "statistical_parity:zoo/skin_tone")
    words += ["--output-dir", tmp_path / "out", "--lora", work / "runs/red"]
    words += ["--micro-batch-size", micro_batch_size]
    if ranks == 1:
        run_here(monkeypatch, *words)
    else:
        result = run_script("evaluate.py", *words, ranks=ranks)
        assert result.returncode == 0, result.stderr
    expected, found = dict(figures_of(read(evaluation))), dict(figures_of(read(tmp_path / "out")))
    assert found.keys() == {path for path in expected if path.startswith(("/base/", "/red/"))}
    assert len(found) > 90
    for path in found:
        assert found[path] == pytest.approx(expected[path], rel=1e-4, abs=1e-4), path


def test_a_picture_is_a_function_of_seed_prompt_and_number(
    evaluation, work, tiny_sd, tmp_path, monkeypatch
):
    """Two prompts and three pictures of each are part of three and four."""
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    words = ["--model", tiny_sd, "--prompts-file", tmp_path / "prompts.txt"]
    words += ["--images-per-prompt", 3, *SETTINGS[2:]]  # in place of the first of SETTINGS
    words += ["--rewards", "jpeg_compressibility", "--output-dir", tmp_path / "out"]
    run_here(monkeypatch, *words)
    files = sorted((tmp_path / "out/samples/base").glob("*.npz"))
    shards = [np.load(file)["images"] for file in files]
    fewer = np.concatenate(shards).reshape(2, 3, 64, 64, 3).astype(int)
    assert np.abs(fewer - samples(evaluation, "base")["images"][:2, :3]).max() <= 1
    other = samples(evaluation, "base")["images"].reshape(12, -1)
    assert len({picture.tobytes() for picture in other}) == 12


def test_stopped_in_the_middle_it_goes_on(evaluation, work, tiny_sd, tmp_path, monkeypatch, capsys):
    """Killed while it draws, and begun again: the same figures.

    What was drawn is not drawn again. Then with a reward and a model more; with another seed it
    refuses.
    """
    words = flags(work, tiny_sd, "--micro-batch-size", 16, "--output-dir", tmp_path / "out")
    words = [*map(str, [*words, "--lora", work / "bare.safetensors"])]
    first = tmp_path / "out/samples/base/00000.npz"
    monkeypatch.setenv("SLOW", "1")
    command = [sys.executable, "evaluate.py", *words]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        clock = time.monotonic()
        while not first.exists() and time.monotonic() - clock < 200:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert first.exists() and not (tmp_path / "out/results.json").exists()
    drawn = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/samples/*/*.npz")}
    assert 1 <= len(drawn) < 6
    monkeypatch.setenv("SLOW", "0")

    run_here(monkeypatch, *words)
    assert all(path.stat().st_mtime_ns == before for path, before in drawn.items())
    expected, found = read(evaluation), read(tmp_path / "out")
    assert list(found) == ["base", "bare"]
    for name in found:
        for prompt in PROMPTS:
            ours, theirs = (figures[name]["prompts"][prompt] for figures in (found, expected))
            for spec in ours["rewards"]:
                close = pytest.approx(theirs["rewards"][spec], rel=1e-4, abs=1e-5)
                assert ours["rewards"][spec] == close, (name, prompt)
            assert ours["kl"]["mean"] == pytest.approx(theirs["kl"]["mean"], rel=1e-4)

    pictures = {path: np.load(path)["images"] for path in tmp_path.glob("out/samples/*/*.npz")}
    run_here(monkeypatch, *words, "--rewards", "jpeg_compressibility", "--lora", work / "runs/red")
    assert all(np.array_equal(np.load(path)["images"], before) for path, before in pictures.items())
    found = read(tmp_path / "out")
    kl = expected["red"]["all"]["kl"]["mean"]
    assert found["red"]["all"]["kl"]["mean"] == pytest.approx(kl, rel=1e-4)
    of_all = [model["all"]["rewards"]["jpeg_compressibility"] for model in found.values()]
    assert all(figures["mean"] < 0 for figures in of_all)

    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, *words, "--eta", 0.5, "--num-inference-steps", 4)
    stderr = capsys.readouterr().err
    assert end.value.code == 2 and "--eta" in stderr and "--num-inference-steps" in stderr
    assert "--seed" not in stderr
    bare, other = work / "bare.safetensors", tmp_path / "bare.safetensors"
    save_file({key: value + 1 for key, value in load_file(bare).items()}, other)
    words = [str(other) if word == str(bare) else word for word in words]
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, *words)
    assert end.value.code == 2 and "weights named bare" in capsys.readouterr().err


def test_a_unet_saved_whole_is_evaluated_as_the_lora_merged_into_it(
    evaluation, work, tiny_sd, tmp_path, monkeypatch
):
    unet = UNet2DConditionModel.from_pretrained(tiny_sd / "unet")
    state = load_file(work / "runs/red" / FILE_NAME)
    with torch.no_grad():
        for key in [key for key in state if key.endswith("lora_A.weight")]:
            layer = unet.get_submodule(key.removeprefix("unet.").removesuffix(".lora_A.weight"))
            layer.weight += state[key.replace("lora_A", "lora_B")] @ state[key]
    unet.save_pretrained(tmp_path / "whole/unet")
    run = {"tasks": ["jpeg_compressibility prompts/zoo.txt 8x4"]}
    (tmp_path / "whole/args.json").write_text(json.dumps(run))
    words = ["--model", tiny_sd, "--lora", tmp_path / "whole"]
    words += ["--prompts-file", work / "prompts.txt", *SETTINGS]
    words += ["--rewards", "jpeg_compressibility", "--output-dir", tmp_path / "out"]
    run_here(monkeypatch, *words)
    found = read(tmp_path / "out")["whole"]
    assert found["trained_on"] == {"jpeg_compressibility": True}
    kl = read(evaluation)["red"]["all"]["kl"]["mean"]
    assert found["all"]["kl"]["mean"] == pytest.approx(kl, rel=1e-3)
    ours, theirs = samples(tmp_path / "out", "whole"), samples(evaluation, "red")
    assert np.abs(ours["images"].astype(int) - theirs["images"]).max() <= 1


def test_the_zoo_has_its_judge(tmp_path, monkeypatch):
    from zoo import judge as judging

    folder = make_lora(ROOT / "zoo/sd", tmp_path / "some", 2, 0.05)
    (tmp_path / "prompts.txt").write_text("A cat and a dog\na cat made of glass\n")
    words = ["zoo", "--prompts-file", tmp_path / "prompts.txt"]
    words += ["--images-per-prompt", 6, "--num-inference-steps", 6]
    run_here(monkeypatch, *words, "--lora", folder, "--output-dir", tmp_path / "out")
    assert not (torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32)
    judge = judging.load_judge(ROOT / "zoo/judge")
    vae = StableDiffusionPipeline.from_pretrained(ROOT / "zoo/sd").vae
    for name, found in read(tmp_path / "out").items():
        pictures = np.load(tmp_path / f"out/samples/{name}/00000.npz")["images"]
        pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
        expected = judging.success(judge, pictures[:6], ["A cat and a dog"] * 6).mean().item()
        one, other = found["prompts"].values()
        assert one["success"]["mean"] == pytest.approx(expected) and other["success"] is None
        assert found["all"]["success"]["mean"] == pytest.approx(expected)
        for level, rows in ((found["all"], slice(None)), (one, slice(6))):
            quality = judging.image_quality(judge, vae, pictures[rows])
            assert level["image_quality"] == pytest.approx(quality, rel=1e-3)
        # The second prompt's renders are those that it has among all.
        renders = judging.features_of_renders(judge, vae, pictures)[4 * 6 :]
        quality = judging.distance(judge(pictures[6:])[1], renders)
        assert other["image_quality"] == pytest.approx(quality, rel=1e-3)
        features = judge(pictures[:6])[1].double()
        apart = torch.pdist(features).mean().item() / 8
        assert one["diversity_judge"] == pytest.approx(apart, rel=1e-4)
    assert "distance to renders" in (tmp_path / "out/table.md").read_text()


def test_names_tell_models_apart(tmp_path):
    for place in ("a/run", "b/run", "base", "c/d|e"):
        (tmp_path / place).mkdir(parents=True)
        save_file({"x": torch.zeros(1)}, tmp_path / place / FILE_NAME)
    paths = [tmp_path / "a/run", tmp_path / "b/run" / FILE_NAME, tmp_path / "c/d|e"]
    models = read_models(evaluate.Args(lora=tuple(paths)))
    assert [model.name for model in models] == ["base", "a__run", "b__run", "c__d-e"]
    names = [model.name for model in read_models(evaluate.Args(lora=(tmp_path / "base",)))]
    assert names == ["base", f"{tmp_path.name}__base"]


WRONG = {
    "LoRA of another model": (["--lora", "OTHER"], "--lora"),
    "UNet of another model": (["--lora", "UNET"], "--lora"),
    "folder without weights": (["--lora", "docs"], "--lora docs"),
    "no such folder": (["--lora", "nowhere"], "--lora nowhere"),
    "no safetensors": (["--lora", "README.md"], "--lora README.md"),
    "weights that are no LoRA": (["--lora", "zoo/judge/model.safetensors"], "--lora"),
    "LoRA twice": (["--lora", "RED", "--lora", "RED"], "twice"),
    "unknown reward": (["--rewards", "jpeg_compressibility", "beauty"], "--rewards"),
    "reward weights missing": (["--rewards", "image_reward:nowhere"], "--rewards"),
    "prompts that the reward cannot score": (
        ["--rewards", "object_detection:zoo/detector"],
        "--rewards",
    ),
    "a set of one": (
        ["--rewards", "statistical_parity:zoo/skin_tone", "--images-per-prompt", 1],
        "--images-per-prompt",
    ),
    "no prompts": (["--prompts-file", "EMPTY"], "--prompts-file"),
    "no prompt": (["--prompt", " "], "--prompt"),
    "no prompts file": (["--prompts-file", "nowhere.txt"], "--prompts-file"),
    "no model": (["--model", "./nowhere"], "--model"),
    "no pictures": (["--images-per-prompt", 0], "--images-per-prompt"),
    "negative seed": (["--seed", -1], "--seed"),
    "folder of something else": (["--output-dir", "docs"], "--output-dir"),
    "unknown preset": (["zooo"], "zooo"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(
    name, work, tiny_sd, tmp_path, monkeypatch, capsys
):
    if "another model" in name:
        (tmp_path / "other").mkdir()
        unet = UNet2DConditionModel.from_pretrained(ROOT / "zoo/sd/unet")
        unet.save_pretrained(tmp_path / "whole/unet")
        add_lora(unet, 2)
        save_lora(unet, tmp_path / "other")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "prompt.txt").write_text("colorless ideas sleep")
    words, mentioned = WRONG[name]
    places = {"OTHER": tmp_path / "other", "UNET": tmp_path / "whole", "RED": work / "runs/red"}
    places["EMPTY"] = tmp_path / "empty.txt"
    words = [places.get(word, word) for word in words]
    defaults = {
        "--model": tiny_sd,
        "--prompts-file": tmp_path / "prompt.txt",
        "--rewards": "jpeg_compressibility",
        "--output-dir": tmp_path / "out",
    }
    for flag, value in defaults.items():
        if flag not in words and not (flag == "--prompts-file" and "--prompt" in words):
            words += [flag, value]
    began = time.process_time()
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, *words)
    assert time.process_time() - began < 3
    stderr = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert end.value.code == 2 and len(stderr) == 1 and mentioned in stderr[0], stderr
    assert not (tmp_path / "out").exists()


def test_wrong_input_as_a_user_sees_it(work, tiny_sd):
    """In a process of its own: nothing that a library prints comes beside the line."""
    words = ["--model", tiny_sd, "--prompt", "a cat", "--lora", "zoo/judge/model.safetensors"]
    result = run_script("evaluate.py", *words)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert result.returncode == 2 and len(lines) == 1 and "--lora" in lines[0], result.stderr
