"""What holds for every script: a run as a user makes it, ranks, micro-batches, resume.

And faults, and wrong input.
"""

import importlib
import json
import re
import resource
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, read_metrics, run_here, run_script, run_together, write_smooth_reward
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from scripts import PROMPT, PROMPTS, SCRIPTS, TABLE, ten_samples, tiny, tiny_and_own
from short_runs import assert_same_run, steady_metrics
from transformers import CLIPTextModel
from written_out import record_updates

from common.stable_diffusion import PromptEncoder
from harness.folder import run_name


@pytest.fixture(scope="module", params=SCRIPTS)
def default_run(request, tiny_sd, tmp_path_factory):
    """No preset, on a tiny model: 2 iterations of 10 samples, the JPEG's size."""
    folder = tmp_path_factory.mktemp("default") / "run"
    flags = ten_samples(request.param, "jpeg_compressibility", "prompts/zoo.txt")
    flags += ["--num-iterations", 2]
    result = run_script(request.param, "--model", tiny_sd, *flags, "--output-dir", folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_default_run_leaves_what_it_promises(default_run, request):
    script = request.node.callspec.params["default_run"]
    lines, args = read_metrics(default_run), json.loads((default_run / "args.json").read_text())
    first = args.get("dataset_size", 0)
    assert [line["iteration"] for line in lines] == [0, 1]
    assert [line["samples"] for line in lines] == [first + 10, first + 20]
    keys = "reward/mean reward/std kl/pretrained grad_norm time/sample_s time/reward_s time/train_s"
    for line in lines:
        assert set(keys.split()) <= set(line) and all(np.isfinite(value) for value in line.values())
    if "clip_range" in args:  # policy gradient
        assert lines[0]["ratio/first_max_deviation"] < 1e-5
    assert lines[0]["reward/mean"] < 0 < lines[1]["kl/pretrained"]
    assert args["num_inference_steps"] == TABLE[script].steps
    assert list(default_run.glob("events.out.tfevents.*"))
    for name in ("samples/000000.png", "samples/000002.png", "learning_curve.png"):
        assert Image.open(default_run / name).size[0] > 100
    grids = [Image.open(default_run / f"samples/00000{k}.png") for k in (0, 2)]
    before, after = (np.asarray(grid, int) for grid in grids)
    assert before.shape == after.shape
    assert np.abs(before - after).mean() < 10, "fixed seeds should make grids compare"


def assert_all_trained(before: dict, after: dict) -> None:
    assert not [key for key in before if after[key].equal(before[key])]


def test_weights_of_a_run_load_in_plain_diffusers(default_run, tiny_sd):
    """The LoRA, or the UNet, all of which has been trained."""
    pytest.importorskip("peft")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    if json.loads((default_run / "args.json").read_text())["lora_rank"] == 0:
        unet = UNet2DConditionModel.from_pretrained(default_run / "unet")
        before, after = pipeline.unet.state_dict(), unet.state_dict()
        assert_all_trained(before, after)
        pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd, unet=unet)
        pipeline(PROMPT, num_inference_steps=1, output_type="np")
        return
    pipeline.load_lora_weights(default_run)
    state = load_file(default_run / "pytorch_lora_weights.safetensors")
    assert any(value.abs().max() > 0 for key, value in state.items() if "lora_B" in key)
    assert pipeline.get_active_adapters()


@pytest.mark.parametrize("script", SCRIPTS)
def test_rate_without_a_flag_is_that_of_what_is_trained(tiny_sd, tmp_path, script, monkeypatch):
    for rank, rate in ((0, TABLE[script].rate), (4, TABLE[script].rate_of_lora)):
        flags = [*tiny(script, tmp_path, "jpeg_compressibility"), "--num-iterations", 1]
        flags += ["--model", tiny_sd, "--lora-rank", rank, "--output-dir", tmp_path / str(rank)]
        run_here(monkeypatch, script, *flags, "--weight-decay", 0.03)
        state = torch.load(tmp_path / str(rank) / "checkpoint/state.pt", weights_only=True)
        (group,) = state["kept"]["optimizer"]["param_groups"]
        assert (group["lr"], group["weight_decay"]) == (rate, 0.03)


@pytest.mark.parametrize("script", SCRIPTS)
def test_updates_are_clipped_to_the_norm_of_the_flag(tiny_sd, tmp_path, script, monkeypatch):
    """And the metric is the norm before."""
    recorded, limit = record_updates(monkeypatch), 1e-6
    flags = [*tiny_and_own(script, tmp_path, "jpeg_incompressibility"), "--num-iterations", 1]
    flags += ["--model", tiny_sd, "--lora-rank", 4, "--max-grad-norm", limit]
    run_here(monkeypatch, script, *flags, "--output-dir", tmp_path / "run")
    # A value function's are not: its first weight has not the LoRA's rank.
    of_lora = [update for update in recorded if len(update[0][0]) == 4]
    norms = [torch.cat([g.flatten() for _, g in update]).norm().item() for update in of_lora]
    # Where they are small torch leaves them a little smaller: it divides by norm + 1e-6.
    assert norms and norms == pytest.approx([limit] * len(norms), rel=0.05)
    assert read_metrics(tmp_path / "run")[0]["grad_norm"] > 10 * limit


@pytest.mark.parametrize("script", SCRIPTS)
def test_half_precision_has_the_gradients_of_float32(
    tiny_sd, tmp_path, smooth, script, monkeypatch
):
    """In norm, up to rounding: fp16's are scaled by 65536 and more until they are clipped."""
    norms = {}
    for dtype in ("fp32", "bf16", "fp16"):
        flags = [*tiny_and_own(script, tmp_path, smooth), "--num-iterations", 1]
        flags += ["--model", tiny_sd, "--lora-rank", 4, "--learning-rate", 1e-9, "--dtype", dtype]
        if script == "sft_kl.py":  # the paper's weights make gradients of 1000 and more
            flags += ["--weighting", "simple"]
        run_here(monkeypatch, script, *flags, "--output-dir", tmp_path / dtype)
        norms[dtype] = read_metrics(tmp_path / dtype)[0]["grad_norm"]
    assert norms["bf16"] == pytest.approx(norms["fp32"], rel=0.05)
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.01)


@pytest.mark.parametrize("script", SCRIPTS)
def test_all_weights(tiny_sd, tmp_path, script, monkeypatch):
    """--lora-rank 0: every weight is trained, and a resumed run is bitwise the undisturbed one.

    The KL is to a frozen copy of the pretrained UNet.
    """
    flags = tiny_and_own(script, tmp_path, "jpeg_incompressibility")
    flags += ["--learning-rate", 1e-4, "--model", tiny_sd, "--lora-rank", 0]
    for folder, iterations in (("whole", 3), ("parts", 1)):
        words = ["--num-iterations", iterations, "--output-dir", tmp_path / folder]
        run_here(monkeypatch, script, *flags, *words)
    run_here(monkeypatch, script, "--resume", tmp_path / "parts", "--num-iterations", 3)
    whole, parts = (steady_metrics(tmp_path / name) for name in ("whole", "parts"))
    assert whole == parts
    assert 0 <= whole[0]["kl/pretrained"] < whole[2]["kl/pretrained"]
    unets = [
        UNet2DConditionModel.from_pretrained(tmp_path / name / "unet")
        for name in ("whole", "parts")
    ]
    whole, parts = (unet.state_dict() for unet in unets)
    before = UNet2DConditionModel.from_pretrained(tiny_sd, subfolder="unet").state_dict()
    assert all(whole[key].equal(parts[key]) for key in before)
    assert_all_trained(before, whole)
    assert not list((tmp_path / "whole").glob("*.safetensors"))


def test_fp16_where_ranks_have_no_transitions(tiny_sd, tmp_path, smooth):
    """Three processes and one transition, or sample, an update: two of them have none.

    In the first update of a run, and of a resumed one.
    """
    runs = {
        "dpok.py": "--lora-rank 4 --batch-size 1 --gradient-steps 3 --value-function "
        "--value-batch-size 1",
        "ddpo.py": "--lora-rank 0 --gradient-steps 6 --min-count 2",
    }
    commands = []
    for script, own in runs.items():
        flags = [*tiny(script, tmp_path, smooth), "--model", tiny_sd, *own.split()]
        flags += ["--dtype", "fp16", "--num-inference-steps", 2, "--samples-per-iteration", 6]
        flags += ["--learning-rate", 1e-4, "--output-dir", tmp_path / script]
        commands.append([script, *flags, "--num-iterations", 1])
        resume = ["--resume", tmp_path / script, "--num-iterations", 2, "--reward", smooth]
        commands.append([script, *resume])
    run_together(commands, 3, tmp_path)
    for script in runs:
        lines = read_metrics(tmp_path / script)
        assert len(lines) == 2
        # The scaler finds its scale by skipping: it begins where float16 may overflow.
        assert all(line["updates/skipped"] < 4 and line["grad_norm"] > 0 for line in lines)
        assert all(line["ratio/first_max_deviation"] < 1e-6 for line in lines)


@pytest.mark.parametrize("script", SCRIPTS)
def test_grid_and_prompts_are_bounded_by_the_micro_batch(tiny_sd, tmp_path, script, monkeypatch):
    """No forward pass has more than a micro-batch of three (twice that, with guidance).

    And of 400 prompts those alone are encoded that are drawn.
    """
    sizes = {UNet2DConditionModel: [], CLIPTextModel: [], AutoencoderKL: []}

    def record(network, name):
        method, seen = getattr(network, name), sizes[network]
        recorded = lambda self, x, *a, **k: seen.append(len(x)) or method(self, x, *a, **k)
        monkeypatch.setattr(network, name, recorded)

    record(UNet2DConditionModel, "forward")
    record(CLIPTextModel, "forward")
    record(AutoencoderKL, "decode")
    (tmp_path / "many.txt").write_text("".join(f"a cat {i}\n" for i in range(400)))
    flags = ten_samples(script, "jpeg_compressibility", tmp_path / "many.txt")
    flags += [*TABLE[script].takes_part.split(), "--num-inference-steps", 4, "--num-iterations", 1]
    flags += ["--micro-batch-size", 3, "--output-dir", tmp_path / "run"]
    run_here(monkeypatch, script, *flags, "--model", tiny_sd)
    assert max(sizes[UNet2DConditionModel]) == 6 and max(sizes[AutoencoderKL]) <= 3
    assert max(sizes[CLIPTextModel]) == 1 and len(sizes[CLIPTextModel]) < 50


def test_prompts_are_encoded_once_and_few_are_kept(tiny_sd):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    encode, prompts = PromptEncoder(pipeline, "cpu", kept=10), [f"a cat {i}" for i in range(30)]
    hidden, pooled = encode(prompts)
    padded = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    ids = pipeline.tokenizer(prompts, **padded).input_ids
    with torch.no_grad():
        expected = pipeline.text_encoder(ids)
    assert torch.allclose(hidden, expected.last_hidden_state, atol=1e-5)
    assert torch.allclose(pooled, expected.pooler_output, atol=1e-5)
    cache = encode.encode_one.cache_info()
    assert (cache.currsize, cache.misses) == (10, 30)
    assert encode(prompts[20:] + prompts[20:])[0].equal(hidden[20:].repeat(2, 1, 1))
    assert encode.encode_one.cache_info().misses == 30


@pytest.fixture(scope="session")
def on_ranks(tiny_sd, tmp_path_factory):
    """Short runs of all scripts on 1 and 3 processes, whose shares are uneven, dpok.py on 2 too.

    By script and number of processes, SCRIPT-N, in one folder.
    """
    folder = tmp_path_factory.mktemp("ranks")
    smooth = write_smooth_reward(folder)
    for ranks, scripts in ((1, SCRIPTS), (2, ("dpok.py",)), (3, SCRIPTS)):
        commands = []
        for script in scripts:
            # With much smaller steps the KL is a difference of nearly equal numbers; with larger
            # ones, and with the default guidance of 7.5, rounding is amplified.
            flags = [*tiny_and_own(script, folder, smooth), "--num-iterations", 2]
            flags += ["--learning-rate", 2e-3, "--guidance-scale", 2, "--lora-rank", 4]
            # Of 3, so that ranks with 3 and 4 samples have micro-batches of other sizes.
            flags += ["--micro-batch-size", 3]
            flags += ["--model", tiny_sd, "--output-dir", folder / f"{script}-{ranks}"]
            commands.append([script, *flags])
        run_together(commands, ranks, folder)
    return folder


@pytest.mark.parametrize("script, ranks", [*((script, 3) for script in SCRIPTS), ("dpok.py", 2)])
def test_ranks_do_not_change_the_result(on_ranks, script, ranks):
    """The same metrics and LoRA."""
    one, many = (on_ranks / f"{script}-{number}" for number in (1, ranks))
    for a, b in zip(read_metrics(one), read_metrics(many), strict=True):
        assert b.get("ratio/first_max_deviation", 0) < 1e-6
        for key in a:
            if not key.startswith(("time/", "ratio/first")):
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key
    one, many = (load_file(run / "pytorch_lora_weights.safetensors") for run in (one, many))
    difference = sum((one[key] - many[key]).square().sum() for key in one) ** 0.5
    assert difference < 1e-4 * sum(value.square().sum() for value in one.values()) ** 0.5


@pytest.mark.parametrize("script", SCRIPTS)
def test_micro_batch_size_does_not_change_the_result(
    tiny_sd, tmp_path, smooth, script, monkeypatch
):
    flags = [*tiny_and_own(script, tmp_path, smooth), "--num-iterations", 1, "--model", tiny_sd]
    if script == "dpok.py":  # else a ratio at the very edge of the band is in or out by rounding
        flags += ["--clip-range", 0.1]
    for size in (3, 64):
        words = ["--micro-batch-size", size, "--output-dir", tmp_path / str(size)]
        run_here(monkeypatch, script, *flags, *words)
    small, large = read_metrics(tmp_path / "3")[0], read_metrics(tmp_path / "64")[0]
    for key in small:
        if not key.startswith(("time/", "ratio/first")):
            assert small[key] == pytest.approx(large[key], rel=1e-3, abs=1e-5), key


@pytest.mark.parametrize("script", SCRIPTS)
def test_resumed_run_equals_an_undisturbed_one(tiny_sd, tmp_path, script, monkeypatch, capsys):
    flags = tiny_and_own(script, tmp_path, "jpeg_incompressibility")
    flags += ["--learning-rate", 1e-3, "--model", tiny_sd, "--lora-rank", 4]
    for folder, iterations in (("whole", 4), ("parts", 2)):
        words = ["--num-iterations", iterations, "--output-dir", tmp_path / folder]
        run_here(monkeypatch, script, *flags, *words)
    run_here(monkeypatch, script, "--resume", tmp_path / "parts", "--num-iterations", 4)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, script, "--resume", tmp_path / "parts", "--weight-decay", 3)
    assert end.value.code == 2 and "--weight-decay" in capsys.readouterr().err


def test_scripts_run_without_what_the_tests_need(tmp_path):
    (tmp_path / "sees.py").write_text(
        "from importlib.util import find_spec\nimport sys\n"
        "sys.exit(any(map(find_spec, ('accelerate', 'bert_score', 'peft', 'scipy'))))\n"
    )
    assert run_script(tmp_path / "sees.py").returncode == 0


def test_unknown_words_are_named(tmp_path):
    flags = ["zoo", "--prompt", "A purple zebra", "--output-dir", tmp_path / "run"]
    flags += ["--num-iterations", 1, "--samples-per-iteration", 2]
    flags += ["--num-inference-steps", 2, "--gradient-steps", 1]
    result = run_script("dpok.py", *flags)
    assert result.returncode == 0, result.stderr
    warning = [line for line in result.stderr.splitlines() if line.startswith("warning:")]
    assert len(warning) == 1 and "purple, zebra" in warning[0]


def test_what_a_long_prompt_loses_is_shown(tiny_sd, tmp_path, monkeypatch, capsys):
    """A file with a byte order mark, an empty line, another script, and parts of a path.

    One prompt of it has 10 000 characters.
    """
    prompts = ["a cat", "", "قطة", "a white dog " * 840, "../../../tmp/a/b"]
    (tmp_path / "p.txt").write_text("\ufeff" + "\n".join(prompts) + "\n")
    flags = [*tiny("dpok.py", tmp_path, "jpeg_compressibility"), "--model", tiny_sd]
    flags += ["--num-iterations", 1, "--gradient-steps", 1]
    flags += ["--prompts-file", tmp_path / "p.txt", "--output-dir", tmp_path / "run"]
    run_here(monkeypatch, "dpok.py", *flags)
    (lost,) = [line for line in capsys.readouterr().err.splitlines() if "this is lost" in line]
    assert "1 of the prompts" in lost and "white dog" in lost and len(lost) < 400


@pytest.mark.parametrize(
    "prompt", ["../../../tmp/a/b", "/etc/passwd", "قطة", "a\\b:c*?", "\n", "x" * 10_000, ".."]
)
def test_no_prompt_reaches_a_path(prompt):
    """A folder's name in runs/ is one name, of plain letters and digits, and not long."""
    name = run_name("dpok.py", prompt, 0)
    assert re.fullmatch(r"dpok__[a-z0-9-]{1,40}__0__[0-9-]+", name)


@pytest.mark.parametrize("script", SCRIPTS)
def test_reward_that_is_not_finite_stops_the_run(tiny_sd, tmp_path, script, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(
        "def f(images, prompts): return images.mean((1, 2, 3)) * float('nan')\n"
    )
    flags = [*tiny(script, tmp_path, f"{tmp_path}/mine.py:f"), "--model", tiny_sd]
    with pytest.raises(SystemExit) as end:
        run_here(monkeypatch, script, *flags, "--output-dir", tmp_path / "run")
    stderr = capsys.readouterr().err
    assert end.value.code == 1 and "nan" in stderr
    assert any(prompt in stderr for prompt in PROMPTS)
    assert "Traceback" not in stderr


WRONG = {
    "model folder": (["--model", "./nowhere"], "--model"),
    "model folder without index": (["--model", "docs"], "--model"),
    "hub out of reach": (["--model", "nobody/nothing"], "SCRIPT zoo"),
    "default model, no hub": ([], "SCRIPT zoo"),
    "unknown reward": (["zoo", "--reward", "beauty"], "--reward"),
    "reward weights missing": (["zoo", "--reward", "image_reward:nowhere"], "--reward"),
    "reward folder empty": (["zoo", "--reward", "image_reward:docs"], "--reward"),
    "reward file missing": (["zoo", "--reward", "nowhere.py:f"], "--reward"),
    "reward function not named": (["zoo", "--reward", "dpok.py"], "--reward"),
    "empty prompt file": (["zoo", "--prompts-file", "EMPTY"], "--prompts-file"),
    "no prompt file": (["zoo", "--prompts-file", "nowhere.txt"], "--prompts-file"),
    "empty prompt": (["zoo", "--prompt", " "], "--prompt"),
    "two sources of prompts": (
        ["zoo", "--prompt", "a cat", "--prompts-file", "prompts/zoo.txt"],
        "--prompts-file",
    ),
    "no steps": (["zoo", "--num-inference-steps", "0"], "--num-inference-steps"),
    "negative learning rate": (["zoo", "--learning-rate", "-1e-4"], "--learning-rate"),
    "nan": (["zoo", "--guidance-scale", "nan"], "--guidance-scale"),
    "eta 0": (["zoo", "--eta", "0"], "--eta"),
    "eta above 1": (["zoo", "--eta", "2"], "--eta"),
    "more steps than the model has": (
        ["zoo", "--num-inference-steps", "1001"],
        "--num-inference-steps",
    ),
    "a seed of more than 63 bits": (["zoo", "--seed", str(1 << 63)], "--seed"),
    "negative rank of the LoRA": (["zoo", "--lora-rank", "-1"], "--lora-rank"),
    "a rate of 0": (["zoo", "--learning-rate", "0"], "--learning-rate"),
    "gradients clipped to 0": (["zoo", "--max-grad-norm", "0"], "--max-grad-norm"),
    "folder of another run": (["zoo", "--output-dir", "OTHER"], "--resume"),
    "nothing to resume": (["zoo", "--resume", "nowhere"], "--resume"),
    "unknown preset": (["zooo"], "zoo"),
    "track": (["zoo", "--track"], "--track"),
}
WRONG_OF = {
    "dpok.py": {
        "no share of the steps": (["zoo", "--rewarded-share", "0"], "--rewarded-share"),
        "more than all steps": (["zoo", "--rewarded-share", "1.5"], "--rewarded-share"),
        "a cool-down of more than all": (["zoo", "--cooldown-share", "2"], "--cooldown-share"),
    },
    "ddpo.py": {
        "no share of the steps": (["zoo", "--rewarded-share", "0"], "--rewarded-share"),
        "more than all steps": (["zoo", "--timestep-fraction", "1.5"], "--timestep-fraction"),
        "more updates than samples": (["zoo", "--gradient-steps", "33"], "--gradient-steps"),
        "a count that the buffer never has": (["zoo", "--min-count", "40"], "--min-count"),
        "advantages of 0": (["zoo", "--advantage-clip", "0"], "--advantage-clip"),
        "a batch of one sample": (
            ["zoo", "--normalise=per-batch", "--samples-per-iteration=1", "--gradient-steps=1"],
            "--samples-per-iteration",
        ),
    },
    "rwr.py": {
        "shards that do not divide the round": (["zoo", "--shard-size", "70"], "--shard-size"),
        "a percentile in percent": (["zoo", "--percentile", "90"], "--percentile"),
    },
    "sft_kl.py": {
        "shards that do not divide the data": (["zoo", "--shard-size", "70"], "--shard-size"),
        "a data set that is a file": (["zoo", "--dataset", "README.md"], "--dataset"),
        "a data set in a folder of something else": (["zoo", "--dataset", "docs"], "--dataset"),
    },
    "raft.py": {
        "default model, no hub": (["lora"], "SCRIPT zoo"),
        "hub out of reach": (["lora", "--model", "nobody/nothing"], "SCRIPT zoo"),
        "the paper's prompts are not there": ([], "--prompts-file"),
        "no pairs": (["--prompts-file", "prompts/zoo.txt"], "--pretrain-data"),
        "pairs missing": (["zoo", "--pretrain-data", "nowhere"], "--pretrain-data"),
        "none accepted": (["zoo", "--acceptance", "0"], "--acceptance"),
        "more accepted than all": (["zoo", "--acceptance", "1.5"], "--acceptance"),
        "prompts that have no whole share": (["zoo", "--images-per-prompt", "7"], "--images-per"),
        "no dropout of more than all": (["zoo", "--caption-dropout", "1.1"], "--caption-dropout"),
    },
    "reward_weighted.py": {
        "default model, no hub": (["lora"], "SCRIPT zoo"),
        "hub out of reach": (["lora", "--model", "nobody/nothing"], "SCRIPT zoo"),
        "the paper's prompts are not there": ([], "--prompts-file"),
        "no pairs": (["--prompts-file", "prompts/zoo.txt"], "--pretrain-data"),
        "pairs missing": (["zoo", "--pretrain-data", "nowhere"], "--pretrain-data"),
        "prompts that have no whole share": (["zoo", "--images-per-prompt", "7"], "--images-per"),
        "no dropout of more than all": (["zoo", "--caption-dropout", "1.1"], "--caption-dropout"),
    },
    "refl.py": {
        "default model, no hub": (
            ["--prompt", "a cat", "--pretrain-beta", "0"],
            "SCRIPT zoo",
        ),
        "hub out of reach": (
            ["--prompt", "a cat", "--pretrain-beta", "0", "--model", "nobody/nothing"],
            "SCRIPT zoo",
        ),
        "the paper's prompts are not there": ([], "--prompts-file"),
        "no pairs": (["--prompt", "a cat"], "--pretrain-data"),
        "a reward without gradient": (["zoo", "--reward", "jpeg_compressibility"], "ddpo.py"),
        "a sum with one": (
            ["zoo", "--reward", "1*aesthetic+1*statistical_parity"],
            "statistical_parity",
        ),
        "steps in the wrong order": (["zoo", "--fewest-steps-left", "4"], "--fewest-steps-left"),
        "more steps left than steps": (["zoo", "--most-steps-left", "13"], "--most-steps-left"),
        "no dropout of more than all": (["zoo", "--caption-dropout", "1.1"], "--caption-dropout"),
    },
    "draft.py": {
        "default model, no hub": (["--prompt", "a cat"], "SCRIPT zoo"),
        "hub out of reach": (["--prompt", "a cat", "--model", "nobody/nothing"], "SCRIPT zoo"),
        "the paper's prompts are not there": ([], "--prompts-file"),
        "a reward without gradient": (["zoo", "--reward", "jpeg_compressibility"], "ddpo.py"),
        "more steps than there are": (
            ["zoo", "--truncate", "13", "--num-noise", "0"],
            "--truncate",
        ),
        "noise for several steps": (["zoo", "--truncate", "2"], "--num-noise"),
    },
    "large_scale_ppo.py": {  # its tasks, in place of --reward, --prompt and --prompts-file
        name: (["zoo", "--tasks", task], "--tasks")
        for name, task in {
            "unknown reward": "beauty prompts/zoo.txt",
            "reward weights missing": "image_reward:nowhere prompts/zoo.txt",
            "reward folder empty": "image_reward:docs prompts/zoo.txt",
            "reward file missing": "nowhere.py:f prompts/zoo.txt",
            "reward function not named": "dpok.py prompts/zoo.txt",
            "empty prompt file": "jpeg_compressibility EMPTY",
            "no prompt file": "jpeg_compressibility nowhere.txt",
            "empty prompt": " ",
            "two sources of prompts": "jpeg_compressibility prompts/zoo.txt prompts/dpok.txt 2x2",
            "no prompts": "jpeg_compressibility",
            "no size": "jpeg_compressibility prompts/zoo.txt 8by8",
            "no images": "jpeg_compressibility prompts/zoo.txt 8x0",
            "a set of one": "statistical_parity:zoo/skin_tone prompts/zoo_portraits.txt 8x1",
            "prompts that the reward cannot score": (
                "object_detection:zoo/detector prompts/occupations.txt 2x2"
            ),
        }.items()
    }
    | {
        "default model, no hub": (["composition", "--pretrain-beta", "0"], "SCRIPT zoo"),
        "hub out of reach": (
            ["composition", "--pretrain-beta", "0", "--model", "nobody/nothing"],
            "SCRIPT zoo",
        ),
        "the paper's prompts are not there": ([], "--tasks"),
        "no pairs": (["composition"], "--pretrain-data"),
        "pairs missing": (["zoo", "--pretrain-data", "nowhere"], "--pretrain-data"),
        "no dropout of more than all": (["zoo", "--caption-dropout", "1.1"], "--caption-dropout"),
        "more updates than steps": (["zoo", "--training-timesteps", "13"], "--training-timesteps"),
        "more than are rewarded": (["zoo", "--rewarded-share", "0.33"], "--training-timesteps"),
        "no step that is rewarded": (["zoo", "--rewarded-share", "0"], "--rewarded-share"),
        "negative rank": (["zoo", "--lora-rank", "-1"], "--lora-rank"),
    },
}


def is_one_line(stderr: str, mentioned: str) -> bool:
    lines = [line for line in stderr.splitlines() if line.strip()]
    return len(lines) == 1 and mentioned in lines[0]


def wrong_of(script: str) -> dict:
    return WRONG | WRONG_OF.get(script, {})


@pytest.mark.parametrize("script, name", [(s, n) for s in SCRIPTS for n in wrong_of(s)])
def test_wrong_input_is_one_line_and_exit_code_2(script, name, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "other" / "checkpoint").mkdir(parents=True)
    words, mentioned = wrong_of(script)[name]
    replaced = {"EMPTY": tmp_path / "empty.txt", "OTHER": tmp_path / "other"}
    monkeypatch.chdir(ROOT)
    words = [" ".join(str(replaced.get(part, part)) for part in word.split(" ")) for word in words]
    monkeypatch.setattr(sys, "argv", [script, *words])
    began = time.process_time()
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script.removesuffix(".py")).main()
    assert end.value.code == 2 and time.process_time() - began < 3
    stderr = capsys.readouterr().err
    assert is_one_line(stderr, mentioned.replace("SCRIPT", script)), stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_wrong_input_as_a_user_sees_it(script):
    """In a process of its own, in 10 s of its core: no library prints anything beside the line."""
    words, mentioned = wrong_of(script)["default model, no hub"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    result = run_script(script, *words, timeout=60)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 10
    assert result.returncode == 2
    assert is_one_line(result.stderr, mentioned.replace("SCRIPT", script)), result.stderr


@pytest.mark.parametrize(
    "script, flag", [("dpok.py", "--samples-per-iteration"), ("large_scale_ppo.py", "--tasks")]
)
def test_fewer_samples_than_ranks(tiny_sd, tmp_path, script, flag):
    prompts = f"jpeg_compressibility {ROOT}/prompts/zoo.txt 1x1"
    one = {"--tasks": prompts, "--samples-per-iteration": 1}[flag]
    flags = ["--model", tiny_sd, *TABLE[script].needs.split(), flag, one]
    result = run_script(script, *flags, ranks=2)
    errors = [line for line in result.stderr.splitlines() if line.startswith(f"{script}: error:")]
    assert result.returncode != 0 and len(errors) == 1 and flag in errors[0]


def test_blocks_that_are_the_same_in_every_script():
    blocks = {}
    for script in SCRIPTS:
        text = (ROOT / script).read_text()
        marked = r"^# --- same in every script(?: that asks)?: (.+)\n((?:.*\n)*?)# ---\n"
        found = re.findall(marked, text, re.MULTILINE)
        assert tuple(name for name, _ in found) == TABLE[script].blocks, script
        for name, body in found:
            assert body == blocks.setdefault(name, body), (script, name)


def test_flags_with_the_same_name_mean_the_same():
    """A flag that scripts share has the same type, and the same place among those they share."""
    modules = [importlib.import_module(script.removesuffix(".py")) for script in SCRIPTS]
    fields = [module.Args.__dataclass_fields__ for module in modules]
    shared = [name for name in fields[0] if all(name in other for other in fields)]
    of_one_task = {"prompt", "prompts_file", "reward", "samples_per_iteration"}
    assert all(of_one_task <= set(other) or "tasks" in other for other in fields)
    promised = "model num_iterations micro_batch_size num_inference_steps guidance_scale eta "
    promised += "learning_rate lora_rank max_grad_norm seed dtype compile output_dir resume track"
    assert set(promised.split()) <= set(shared)
    for other in fields:
        assert [name for name in other if name in shared] == shared
        # The rate of three scripts depends on what is trained.
        same_type = [name for name in shared if name != "learning_rate"]
        assert all(other[name].type == fields[0][name].type for name in same_type)
