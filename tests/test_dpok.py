"""dpok.py: its gradient against Eq. 9 written out, its estimator against a closed form, and runs as users make them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, read_metrics, run_script
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence

import dpok
from common.scheduler import ddim_step_with_logprob

TINY = ("--num-inference-steps", "4", "--samples-per-iteration", "10", "--reward", "jpeg_incompressibility")


@pytest.mark.parametrize("kl, rewarded_share", [("exact", 1.0), ("released", 1.0), ("exact", 0.5)])
def test_gradient_is_that_of_eq_9_written_out(tiny_sd, tmp_path, monkeypatch, kl, rewarded_share):
    """The gradient that the script hands to its optimizer at the third update, where neither the ratios are 1 nor the
    KL is 0, against autograd of Eq. 9 in float64 with torch.distributions and LoRA merged into the weights."""
    alpha, beta, clip, w, n, T = 7.0, 30.0 if kl == "exact" else 150.0, 5e-4, 3.0, 12, 4
    recorded = []
    adamw_step = torch.optim.AdamW.step

    def step(optimizer, *args, **kwargs):
        parameters = optimizer.param_groups[0]["params"]
        recorded.append([(p.detach().clone(), p.grad.clone()) for p in parameters])
        return adamw_step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    flags = f"--num-iterations 1 --gradient-steps 3 --batch-size {n} --micro-batch-size 5 --learning-rate 3e-3 "
    flags += f"--alpha {alpha} --beta {beta} --clip-range {clip} --guidance-scale {w} --kl {kl} --max-grad-norm 1e9 "
    flags += f"--rewarded-share {rewarded_share} --value-function --output-dir {tmp_path / 'run'} --model {tiny_sd}"
    monkeypatch.setattr(sys, "argv", ["dpok.py", *flags.split(), *TINY])
    dpok.main()
    weights_and_gradients = recorded[-1]

    replay = torch.load(tmp_path / "run/checkpoint/replay-00000.pt", weights_only=True)
    state = torch.load(tmp_path / "run/checkpoint/state.pt", weights_only=True)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(T)
    text, pooled = dpok.encode_prompts(pipeline, [dpok.Args().prompt], "cpu")
    no_text, _ = dpok.encode_prompts(pipeline, [""], "cpu")
    drawn = torch.randperm(10 * T, generator=dpok.seeded(0, 1, 0, 2))[:n]
    i, j = drawn // T, drawn % T
    x_t, x_prev = replay["trajectory"][0, i, j].double(), replay["trajectory"][0, i, j + 1].double()
    t = scheduler.timesteps[j]

    unet = pipeline.unet.double()
    frozen = dict(unet.named_parameters())
    leaves = [weight.double().requires_grad_() for weight, _ in weights_and_gradients]
    merged, pairs = {}, iter(zip(leaves[::2], leaves[1::2]))
    for name in unet.attn_processors:
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            key = f"{name.removesuffix('.processor')}.{projection}.weight"
            a, b = next(pairs)
            merged[key] = frozen[key].detach() + b @ a

    def noise(weights):
        def run(embedding):
            return torch.func.functional_call(unet, weights, (x_t, t, embedding.double().expand(n, -1, -1))).sample

        return w * run(text) + (1 - w) * run(no_text)

    eps, eps_pre = noise({**frozen, **merged}), noise(frozen).detach()
    a_t = scheduler.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
    prev_t = t - 1000 // T
    a_prev = torch.where(
        prev_t >= 0, scheduler.alphas_cumprod.double()[prev_t.clamp(min=0)], scheduler.alphas_cumprod[0]
    )
    a_prev = a_prev.view(-1, 1, 1, 1)
    sigma = ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)).sqrt()

    def mu(e):
        return a_prev.sqrt() * (x_t - (1 - a_t).sqrt() * e) / a_t.sqrt() + (1 - a_prev - sigma**2).sqrt() * e

    policy, pre = Normal(mu(eps), sigma), Normal(mu(eps_pre), sigma)
    value_function = dpok.ValueFunction(4 * 8 * 8 + 32, T)
    value_function.load_state_dict(state["value_function"])
    with torch.no_grad():
        value = value_function(x_t.float(), j, pooled.expand(n, -1)).double()
    advantages = replay["reward"][0, i].double() - value
    ratio = (policy.log_prob(x_prev).flatten(1).mean(1) - replay["log_prob"][0, i, j].double()).exp()
    clipped = ratio.clamp(1 - clip, 1 + clip)
    penalty = kl_divergence(policy, pre) if kl == "exact" else (eps - eps_pre) ** 2
    policy_loss = (-alpha * advantages * clipped * (j < rewarded_share * T)).mean()
    kl_loss = beta * penalty.flatten(1).mean(1).mean()
    parts = [torch.autograd.grad(part, leaves, retain_graph=True) for part in (policy_loss, kl_loss)]
    of_policy, of_kl = (torch.cat([gradient.flatten() for gradient in part]) for part in parts)

    assert 0 < (ratio != clipped).sum() < n, "the case should have ratios inside and outside of the band"
    ours = torch.cat([gradient.flatten() for _, gradient in weights_and_gradients]).double()
    expected = of_policy + of_kl
    assert 0.1 < (share := of_policy.norm() / of_kl.norm()) < 10, (
        f"{share}: both terms of Eq. 9 should matter in this case"
    )
    assert (ours - expected).norm() < 1e-4 * expected.norm()


def test_score_function_estimator_is_unbiased():
    """E[r sum_t grad log p] (Eq. 6) against the closed form of a one-dimensional Gaussian chain: eps = theta x_t."""
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", set_alpha_to_one=False)
    scheduler.register_to_config(steps_offset=1, clip_sample=False)
    scheduler.set_timesteps(5)
    theta = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    variance = torch.ones((), dtype=torch.float64)
    for t in scheduler.timesteps:  # x_{t-1} = c x_t + sigma z, so that Var <- c^2 Var + sigma^2; r = x_0^2
        a = scheduler.alphas_cumprod.double()[t]
        a_prev = scheduler.alphas_cumprod.double()[max(int(t) - 200, 0)]
        sigma2 = (1 - a_prev) / (1 - a) * (1 - a / a_prev)
        c = a_prev.sqrt() * (1 - (1 - a).sqrt() * theta) / a.sqrt() + (1 - a_prev - sigma2).sqrt() * theta
        variance = c**2 * variance + sigma2
    exact = torch.autograd.grad(variance, theta)[0].item()

    estimates = []
    for batch in range(64):
        generator = torch.Generator().manual_seed(batch)
        theta = torch.tensor(0.3, requires_grad=True)
        x, score = torch.randn(4000, 1, 1, 1, generator=generator), 0.0
        for t in scheduler.timesteps:
            drawn = torch.randn(x.shape, generator=generator)
            with torch.no_grad():
                x_prev = ddim_step_with_logprob(scheduler, theta * x, t, x, noise=drawn).prev_sample
            score = score + ddim_step_with_logprob(scheduler, theta * x, t, x, prev_sample=x_prev).log_prob
            x = x_prev
        estimates.append(torch.autograd.grad((x.flatten() ** 2 * score).mean(), theta)[0].item())
    error = np.std(estimates, ddof=1) / np.sqrt(len(estimates))
    assert error < 0.1 * abs(exact)
    assert abs(np.mean(estimates) - exact) < 3 * error


@pytest.fixture(scope="module")
def default_run(tiny_sd, tmp_path_factory):
    """The configuration without a preset, on SD v1.5's layout shrunk; only the model, the reward and 2 iterations."""
    folder = tmp_path_factory.mktemp("default") / "run"
    result = run_script(
        "dpok.py", "--model", tiny_sd, "--reward", "jpeg_compressibility", "--num-iterations", 2, "--output-dir", folder
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_default_run_leaves_what_it_promises(default_run):
    lines = read_metrics(default_run)
    assert [line["iteration"] for line in lines] == [0, 1] and [line["samples"] for line in lines] == [10, 20]
    keys = "reward/mean reward/std kl/pretrained ratio/first_max_deviation grad_norm "
    keys += "time/sample_s time/reward_s time/train_s"
    for line in lines:
        assert set(keys.split()) <= set(line) and all(np.isfinite(value) for value in line.values())
    assert lines[0]["ratio/first_max_deviation"] < 1e-5
    assert lines[0]["reward/mean"] < 0 < lines[1]["kl/pretrained"]
    args = json.loads((default_run / "args.json").read_text())
    assert (args["alpha"], args["beta"], args["learning_rate"], args["lora_rank"]) == (10.0, 0.01, 1e-5, 4)
    assert list(default_run.glob("events.out.tfevents.*"))
    for name in ("samples/000000.png", "samples/000002.png", "learning_curve.png"):
        assert Image.open(default_run / name).size[0] > 100
    before, after = (np.asarray(Image.open(default_run / f"samples/00000{k}.png"), int) for k in (0, 2))
    assert before.shape == after.shape and np.abs(before - after).mean() < 10, "fixed seeds should make grids compare"


def test_lora_of_a_run_loads_in_plain_diffusers(default_run, tiny_sd):
    pytest.importorskip("peft")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_sd)
    pipeline.load_lora_weights(default_run)
    state = load_file(default_run / "pytorch_lora_weights.safetensors")
    assert any(value.abs().max() > 0 for key, value in state.items() if "lora_B" in key)
    assert pipeline.get_active_adapters()


@pytest.fixture
def smooth(tmp_path):
    """A smooth reward: the size of a JPEG jumps with the last bit of a pixel."""
    (tmp_path / "mine.py").write_text("def f(images, prompts):\n    return 10 * images[:, 0].mean((1, 2))\n")
    return ["--reward", f"{tmp_path}/mine.py:f"]


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_do_not_change_the_result(tiny_sd, tmp_path, smooth, ranks):
    """10 samples on 1 and on `ranks` processes (uneven for 3): the same metrics and LoRA after 3 iterations."""
    flags = [*TINY, *smooth, "--num-iterations", 3, "--value-function", "--learning-rate", 1e-3, "--model", tiny_sd]
    for name, count in (("one", 1), ("many", ranks)):
        result = run_script("dpok.py", *flags, "--output-dir", tmp_path / name, ranks=count)
        assert result.returncode == 0, result.stderr
    for a, b in zip(read_metrics(tmp_path / "one"), read_metrics(tmp_path / "many"), strict=True):
        for key in a:
            if not key.startswith(("time/", "ratio/first")):
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-5), key
    one, many = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("one", "many"))
    difference = sum((one[key] - many[key]).square().sum() for key in one) ** 0.5
    assert difference < 1e-4 * sum(value.square().sum() for value in one.values()) ** 0.5


def test_micro_batch_size_does_not_change_the_result(tiny_sd, tmp_path, smooth):
    for size in (3, 64):
        flags = [*TINY, *smooth, "--num-iterations", 1, "--micro-batch-size", size, "--model", tiny_sd]
        result = run_script("dpok.py", *flags, "--output-dir", tmp_path / str(size))
        assert result.returncode == 0, result.stderr
    small, large = read_metrics(tmp_path / "3")[0], read_metrics(tmp_path / "64")[0]
    for key in small:
        if not key.startswith(("time/", "ratio/first")):
            assert small[key] == pytest.approx(large[key], rel=1e-3, abs=1e-5), key


def test_resumed_run_equals_an_undisturbed_one(tiny_sd, tmp_path):
    flags = [*TINY, "--model", tiny_sd, "--value-function", "--learning-rate", 1e-3]
    for folder, iterations in (("whole", 4), ("parts", 2)):
        result = run_script("dpok.py", *flags, "--num-iterations", iterations, "--output-dir", tmp_path / folder)
        assert result.returncode == 0, result.stderr
    result = run_script("dpok.py", "--resume", tmp_path / "parts", "--num-iterations", 4)
    assert result.returncode == 0, result.stderr
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    for a, b in zip(whole, parts, strict=True):
        assert {k: v for k, v in a.items() if "time/" not in k} == {k: v for k, v in b.items() if "time/" not in k}
    whole, parts = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    result = run_script("dpok.py", "--resume", tmp_path / "parts", "--alpha", 3)
    assert result.returncode == 2 and "--alpha" in result.stderr


def test_unknown_words_are_named(tmp_path):
    flags = ["--num-iterations", 1, "--samples-per-iteration", 2, "--num-inference-steps", 2, "--gradient-steps", 1]
    result = run_script("dpok.py", "zoo", "--prompt", "A purple zebra", *flags, "--output-dir", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    warning = [line for line in result.stderr.splitlines() if line.startswith("warning:")]
    assert len(warning) == 1 and "purple, zebra" in warning[0]


def test_reward_that_is_not_finite_stops_the_run(tiny_sd, tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\ndef f(images, prompts): return torch.full((len(prompts),), float('nan'))\n"
    )
    flags = ["--model", tiny_sd, *TINY[:4], "--reward", f"{tmp_path}/mine.py:f", "--output-dir", tmp_path / "run"]
    result = run_script("dpok.py", *flags)
    assert result.returncode == 1 and "nan" in result.stderr and "A green colored rabbit" in result.stderr
    assert "Traceback" not in result.stderr


WRONG = {
    "model folder": (["--model", "./nowhere"], "--model"),
    "model folder without index": (["--model", "docs"], "--model"),
    "hub out of reach": (["--model", "nobody/nothing"], "dpok.py zoo"),
    "default model, no hub": ([], "dpok.py zoo"),
    "unknown reward": (["zoo", "--reward", "beauty"], "--reward"),
    "reward weights missing": (["zoo", "--reward", "image_reward:nowhere"], "--reward"),
    "reward folder empty": (["zoo", "--reward", "image_reward:docs"], "--reward"),
    "reward file missing": (["zoo", "--reward", "nowhere.py:f"], "--reward"),
    "reward function not named": (["zoo", "--reward", "dpok.py"], "--reward"),
    "empty prompt file": (["zoo", "--prompts-file", "EMPTY"], "--prompts-file"),
    "no prompt file": (["zoo", "--prompts-file", "nowhere.txt"], "--prompts-file"),
    "empty prompt": (["zoo", "--prompt", " "], "--prompt"),
    "no steps": (["zoo", "--num-inference-steps", "0"], "--num-inference-steps"),
    "negative learning rate": (["zoo", "--learning-rate", "-1e-4"], "--learning-rate"),
    "nan": (["zoo", "--alpha", "nan"], "--alpha"),
    "no share of the steps": (["zoo", "--rewarded-share", "0"], "--rewarded-share"),
    "more than all steps": (["zoo", "--rewarded-share", "1.5"], "--rewarded-share"),
    "eta 0": (["zoo", "--eta", "0"], "--eta"),
    "folder of another run": (["zoo", "--output-dir", "OTHER"], "--resume"),
    "nothing to resume": (["zoo", "--resume", "nowhere"], "--resume"),
    "dtype": (["zoo", "--dtype", "bf16"], "--dtype"),
    "unknown preset": (["zooo"], "zoo"),
    "track": (["zoo", "--track"], "--track"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(name, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "args.json").write_text("{}")
    words, mentioned = WRONG[name]
    replaced = {"EMPTY": tmp_path / "empty.txt", "OTHER": tmp_path / "other"}
    result = run_script("dpok.py", *[replaced.get(word, word) for word in words], timeout=60)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and mentioned in lines[0], result.stderr


def test_fewer_samples_than_ranks(tiny_sd):
    result = run_script("dpok.py", "--model", tiny_sd, *TINY, "--samples-per-iteration", 1, ranks=2)
    errors = [line for line in result.stderr.splitlines() if line.startswith("dpok.py: error:")]
    assert result.returncode != 0 and len(errors) == 1 and "--samples-per-iteration" in errors[0]


def test_script_is_short_enough_to_read():
    assert 250 <= len(Path(ROOT / "dpok.py").read_text().splitlines()) <= 450
