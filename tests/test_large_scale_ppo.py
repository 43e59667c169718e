"""large_scale_ppo.py: Eq. 7, 9 and 10 against what is written out, parity in closed form.

And streams over kills, and ranks.
"""

import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, read_metrics, run_script
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from written_out import merged_unet, policies, record_rollouts, record_updates

import ddpo
import large_scale_ppo
from common.rewards.statistical_parity import statistical_parity
from harness.prompts import open_prompts, take

PROMPT = "A cat and a dog"
PROMPTS = [PROMPT, "Four wolves in the park"]


def run_here(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["large_scale_ppo.py", *map(str, flags)])
    large_scale_ppo.main()


@pytest.fixture
def small(tiny_sd, tmp_path):
    """Flags of a run: ten samples of one prompt in four steps, and four pairs with one caption."""
    (tmp_path / "prompt.txt").write_text(PROMPT)
    (tmp_path / "pairs.py").write_text(
        "import numpy as np\n"
        "from PIL import Image\n"
        "def f(seed):\n"
        "    rng = np.random.default_rng(seed)\n"
        "    arrays = [rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(9)]\n"
        f"    return [(Image.fromarray(array), {PROMPT!r}) for array in arrays]\n"
    )
    flags = ["--model", tiny_sd, "--tasks", f"jpeg_incompressibility {tmp_path}/prompt.txt 1x10"]
    flags += ["--num-iterations", 1, "--seed", 3]
    flags += ["--num-inference-steps", 4, "--training-timesteps", 3]
    flags += ["--guidance-scale", 3, "--micro-batch-size", 10]
    flags += ["--pretrain-data", f"{tmp_path}/pairs.py:f", "--pretrain-batch-size", 4]
    return [*flags, "--lora-rank", 4, "--max-grad-norm", 1e9]


def gradient(update):
    return torch.cat([g.flatten() for _, g in update]).double()


@pytest.mark.parametrize(
    "share, steps, K, eta", [(1.0, 4, 3, 1.0), (0.5, 2, 2, 1.0), (1.0, 4, 3, 0.6)]
)
def test_gradients_of_the_policy_are_those_of_eq_7(
    tiny_sd, tmp_path, monkeypatch, small, share, steps, K, eta
):
    """Every update's gradient against autograd in float64 of Eq. 7 and 10.

    One timestep each of the rewarded ones, all samples, log-probs of the rollout; the ratios are 1
    at the first and leave the band on either side later.
    """
    clip, T, m = 1e-4, 4, 10
    rollouts = record_rollouts(monkeypatch, large_scale_ppo)
    rewards, advantages = [], large_scale_ppo.per_batch_advantages
    recorded_advantages = lambda r: rewards.append(r) or advantages(r)
    monkeypatch.setattr(large_scale_ppo, "per_batch_advantages", recorded_advantages)
    recorded = record_updates(monkeypatch)
    flags = ["--clip-range", clip, "--learning-rate", 3e-3]
    flags += ["--rewarded-share", share, "--training-timesteps", K, "--eta", eta]
    (tmp_path / "prompt.txt").write_text("\n".join(PROMPTS))
    small = [str(flag).replace("1x10", "2x5") for flag in small]
    flags += ["--pretrain-beta", 0, "--output-dir", tmp_path / "run"]
    run_here(monkeypatch, *small, *flags)
    monkeypatch.undo()
    # Grids of pictures have eight.
    ((trajectory, log_prob, _),) = [r for r in rollouts if len(r.trajectory) == m]
    (r,) = rewards
    r = r.double().numpy()
    A = torch.from_numpy((r - r.mean()) / np.sqrt(((r - r.mean()) ** 2).mean()))
    timesteps = torch.randperm(steps, generator=large_scale_ppo.seeded(3, 1, 0, 0))[:K].tolist()
    assert len(recorded) == K
    deviations, of_all_cases = [], set()
    order = np.random.default_rng([3, 0]).permutation(np.arange(2, dtype=np.int32))
    prompts = [PROMPTS[order[i // 5]] for i in range(m)]
    for update, j in zip(recorded, timesteps):
        weights, x_t, at = [w for w, _ in update], trajectory[:, j], torch.full((m,), j)
        leaves, policy, *_ = policies(tiny_sd, weights, T, 3.0, prompts, x_t, at, eta)
        log_p = policy.log_prob(trajectory[:, j + 1].double()).flatten(1).mean(1)
        w = (log_p - log_prob[:, j].double()).exp()
        total = 0.0
        for i in range(m):
            g = (1 + clip) * A[i] if A[i] >= 0 else (1 - clip) * A[i]
            total = total + min(w[i] * A[i], g)
            of_all_cases.add((bool(A[i] >= 0), bool(w[i] * A[i] < g)))
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(-total / m, leaves)])
        assert (gradient(update) - expected).norm() < 1e-3 * expected.norm()
        deviations.append((w - 1).abs().max().item())
    assert len(of_all_cases) == 4, "both signs, inside and outside"
    line = read_metrics(tmp_path / "run")[0]
    assert deviations[0] < 1e-5 > line["ratio/first_max_deviation"] and max(deviations[1:]) > clip
    assert line["ratio/max_deviation"] == pytest.approx(max(deviations[1:]), rel=1e-2)
    assert "loss/pretrain" not in line


@pytest.mark.parametrize(
    "prediction_type, dropout", [("epsilon", 0), ("epsilon", 1), ("v_prediction", 0)]
)
def test_gradient_of_the_pretraining_loss_is_that_of_eq_9(
    tiny_sd, tmp_path, monkeypatch, small, prediction_type, dropout
):
    """The last update of an iteration, with beta, on pairs that the VAE encoded.

    Dropout 1 is the empty caption.
    """
    model = shutil.copytree(tiny_sd, tmp_path / "model")
    config = model / "scheduler/scheduler_config.json"
    changed = json.loads(config.read_text()) | {"prediction_type": prediction_type}
    config.write_text(json.dumps(changed))
    recorded = record_updates(monkeypatch)
    flags = ["--pretrain-beta", 0.3, "--caption-dropout", dropout]
    flags += ["--learning-rate", 1e-3, "--model", model]
    run_here(monkeypatch, *small, *flags, "--output-dir", tmp_path / "run")
    monkeypatch.undo()
    assert len(recorded) == 4, "three timesteps of the task, and the pre-training loss"

    pairs = large_scale_ppo.open_pretrain_data(f"{tmp_path}/pairs.py:f", 3)
    order = np.random.default_rng([3, 0]).permutation(np.arange(9, dtype=np.int32))[:4]
    pictures = torch.from_numpy(np.stack([np.array(pairs[i][0]) for i in order]))
    pipeline = StableDiffusionPipeline.from_pretrained(model)
    x = pictures.permute(0, 3, 1, 2).double() / 127.5 - 1
    encoded = pipeline.vae.double().encode(x).latent_dist
    mean, log_var = encoded.parameters.chunk(2, dim=1)
    z, t, eps = [], [], []
    for i in range(4):
        generator = large_scale_ppo.seeded(3, 2, 0, i)
        torch.rand(1, generator=generator)
        t.append(torch.randint(1000, (1,), generator=generator))
        noise = torch.randn(2, 4, 8, 8, generator=generator).double()
        latent = (mean[i] + (log_var[i] / 2).exp() * noise[0]).detach()
        z.append(latent * pipeline.vae.config.scaling_factor)
        eps.append(noise[1])
    z, t, eps = torch.stack(z), torch.cat(t), torch.stack(eps)
    alpha = pipeline.scheduler.alphas_cumprod.double()[t].view(-1, 1, 1, 1)
    z_t = alpha.sqrt() * z + (1 - alpha).sqrt() * eps
    target = eps if prediction_type == "epsilon" else alpha.sqrt() * eps - (1 - alpha).sqrt() * z
    caption = "" if dropout else PROMPT
    leaves, predicted, _ = merged_unet(model, [w for w, _ in recorded[3]], 1.0, [caption])
    loss = 0.3 * ((predicted(z_t, t) - target) ** 2).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, leaves)])
    assert (gradient(recorded[3]) - expected).norm() < 1e-3 * expected.norm() > 0
    line = read_metrics(tmp_path / "run")[0]
    assert line["loss/pretrain"] == pytest.approx(loss.item() / 0.3, rel=1e-3)


def test_parity_has_a_gradient_per_batch_and_none_per_prompt():
    """Two prompts, two images each, of class 1 with probability p. All 16 outcomes, enumerated.

    The chance of a mixed group is u = 2 p (1 - p). With the batch's mean and std the advantages are
    +1 and -1 where one group is mixed and the other not, and the expected gradient is
    2 (E[score, mixed] (1 - u) - E[score, not mixed] u) = 2 du/dp = 4 (1 - 2p). With each prompt's
    own mean every advantage is 0, as its images share their reward.
    """
    for p in (0.1, 0.4, 0.5, 0.8):
        per_batch = 0.0
        for images in itertools.product((0, 1), repeat=4):
            groups = images[:2], images[2:]
            rewards = [-statistical_parity(list(group), 2) for group in groups for _ in group]
            rewards = torch.tensor(rewards)
            chance = np.prod([p if image else 1 - p for image in images])
            score = [1 / p if image else -1 / (1 - p) for image in images]
            score = torch.tensor(score, dtype=torch.float64)
            advantages = large_scale_ppo.per_batch_advantages(rewards)
            per_batch += chance * (advantages * score).sum().item()
            history = torch.full((2, 8), float("nan"), dtype=torch.float64)
            per_prompt = ddpo.per_prompt_advantages(history, torch.tensor([0, 0, 1, 1]), rewards, 2)
            assert (per_prompt == 0).all()
        assert per_batch == pytest.approx(4 * (1 - 2 * p), abs=1e-5)


def test_equal_rewards_give_no_advantage():
    assert (large_scale_ppo.per_batch_advantages(torch.full((7,), 0.1)).abs() < 1e-6).all()
    ours = large_scale_ppo.per_batch_advantages(torch.tensor([3, -1, 4, 1, -5]))
    assert ours.mean().item() == pytest.approx(0, abs=1e-12)
    assert ours.std(correction=0).item() == pytest.approx(1)


def test_groups_are_places_in_the_batch(tmp_path, monkeypatch, small):
    """Three places for two prompts: one is there twice, in two groups of exactly G pictures."""
    seen = []

    def recorder(images, prompts, groups):
        seen.append((prompts, groups))
        return images.mean((1, 2, 3))

    recorder.start = lambda images, prompts: None
    monkeypatch.setattr(large_scale_ppo, "load_run_reward", lambda *args: recorder)
    (tmp_path / "two.py").write_text("def f(seed):\n    return ['a cat', 'a dog']\n")
    tasks = ["--tasks", f"jpeg_compressibility {tmp_path}/two.py:f 3x4", "--pretrain-beta", 0]
    run_here(monkeypatch, *small, *tasks, "--output-dir", tmp_path / "run")
    # The fixture's own task has ten pictures.
    ((prompts, groups),) = [call for call in seen if len(call[0]) == 12]
    assert groups == [0] * 4 + [1] * 4 + [2] * 4
    assert sorted(prompts.count(prompt) for prompt in set(prompts)) == [4, 8]


def test_shares_of_a_parity_group_on_several_ranks(tmp_path, monkeypatch):
    """Two tasks on one process and on two.

    Of the two, one has two images of a group of five and the other three.
    """
    tasks = ["statistical_parity:zoo/skin_tone prompts/zoo_portraits.txt 3x5"]
    tasks += ["image_reward:zoo/image_reward prompts/zoo_preference.txt 2x2"]
    flags = ["zoo", "--tasks", *tasks, "--num-inference-steps", 4]
    flags += ["--training-timesteps", 2, "--num-iterations", 2]
    run_here(monkeypatch, *flags, "--output-dir", tmp_path / "1")
    result = run_script("large_scale_ppo.py", *flags, "--output-dir", tmp_path / "2", ranks=2)
    assert result.returncode == 0, result.stderr
    for a, b in zip(read_metrics(tmp_path / "1"), read_metrics(tmp_path / "2"), strict=True):
        parity = "reward/statistical_parity/mean"
        assert a[parity] == pytest.approx(b[parity], abs=1e-6)
        for key in a:
            if not key.startswith(("time/", "ratio/first")):
                assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), key
    one = load_file(tmp_path / "1/pytorch_lora_weights.safetensors")
    two = load_file(tmp_path / "2/pytorch_lora_weights.safetensors")
    difference = sum((one[key] - two[key]).square().sum() for key in one) ** 0.5
    assert difference < 1e-4 * sum(value.square().sum() for value in one.values()) ** 0.5
    assert read_metrics(tmp_path / "1")[0]["reward/statistical_parity/std"] > 0


REWARD = """
import json, os
def f(images, prompts):
    with open(os.environ["SEEN"] + os.environ.get("RANK", "0"), "a") as file:
        file.write(json.dumps(list(prompts)) + "\\n")
    return images.mean((1, 2, 3))
"""


def test_killed_and_resumed_run_sees_every_prompt_once(tiny_sd, tmp_path, monkeypatch, capsys):
    """Two processes are killed in the middle of an epoch and three go on.

    What the model has learned from is counted.
    """
    (tmp_path / "mine.py").write_text(REWARD)
    lines = [f"{word} cat {i}\n" for i in range(10) for word in ("a", "one")]
    (tmp_path / "prompts.txt").write_text("".join(lines))
    tasks = ["--tasks", f"{tmp_path}/mine.py:f {tmp_path}/prompts.txt 3x3"]
    flags = ["--model", tiny_sd, *tasks, "--pretrain-beta", 0]
    flags += ["--num-inference-steps", 2, "--training-timesteps", 1]
    flags += ["--guidance-scale", 1, "--save-every", 2]
    command = [sys.executable, "large_scale_ppo.py", *map(str, flags)]
    command += ["--output-dir", str(tmp_path / "run")]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    env |= {"SEEN": str(tmp_path / "before")}
    # Without torchrun, whose workers outlive it when it is killed.
    options = {"cwd": ROOT, "stderr": subprocess.DEVNULL}
    ranks = [subprocess.Popen(command, env=env | {"RANK": rank}, **options) for rank in "01"]
    state, metrics = tmp_path / "run/checkpoint/state.pt", tmp_path / "run/metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert all(rank.poll() is None for rank in ranks), "it ended by itself"
        time.sleep(0.05)
    for rank in ranks:
        rank.kill()
        rank.wait()
    saved = torch.load(state, weights_only=True)
    done = saved["iteration"]
    assert done >= 2 and saved["fixed"]["prompts and pairs"][0].startswith("20, sha256")
    monkeypatch.setenv("SEEN", str(tmp_path / "after"))
    total = done + 7
    words = ["--resume", tmp_path / "run", *tasks, "--num-iterations", total]
    result = run_script("large_scale_ppo.py", *words, ranks=3)
    assert result.returncode == 0, result.stderr

    def seen(name: str, ranks: int, iterations: int) -> list[str]:
        """In the order of the samples; a killed rank may have begun another iteration."""
        calls = [(tmp_path / f"{name}{rank}").read_text().splitlines() for rank in range(ranks)]
        calls = [lines[:iterations] for lines in calls]
        shares = [share for shares in zip(*calls, strict=True) for share in shares]
        return [prompt for share in shares for prompt in json.loads(share)]

    learned = seen("before", 2, done) + seen("after", 3, 7)
    stream = take(open_prompts(str(tmp_path / "prompts.txt"), 0), 0, 0, 3 * total)
    assert learned == [prompt for prompt in stream for _ in range(3)]
    assert len(set(stream[:20])) == 20
    assert torch.load(state, weights_only=True)["iteration"] == total
    (tmp_path / "prompts.txt").write_text("a cat\n" * 21)
    with pytest.raises(SystemExit) as end:
        words = ["--resume", tmp_path / "run", *tasks, "--num-iterations", total + 1]
        run_here(monkeypatch, *words)
    assert end.value.code == 2 and "prompts and pairs" in capsys.readouterr().err


def test_checkpointing_and_no_monitoring(tiny_sd, tmp_path, monkeypatch, small):
    """All weights, without a copy of the pretrained ones: no KL.

    Activation checkpointing changes nothing.
    """
    flags = [*small, "--lora-rank", 0, "--learning-rate", 1e-4]
    flags += ["--gradient-checkpointing", "--no-monitor-kl"]
    for folder, iterations in (("whole", 3), ("parts", 1)):
        words = ["--num-iterations", iterations, "--output-dir", tmp_path / folder]
        run_here(monkeypatch, *flags, *words)
    resume = ["--resume", tmp_path / "parts", "--num-iterations", 3, "--no-gradient-checkpointing"]
    resume += ["--pretrain-data", f"{tmp_path}/pairs.py:f"]  # its code is named again
    run_here(monkeypatch, *resume)
    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    for a, b in zip(whole, parts, strict=True):
        assert "kl/pretrained" not in a
        for key in a:
            if not key.startswith("time/"):
                assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-6), key
    whole = UNet2DConditionModel.from_pretrained(tmp_path / "whole/unet").state_dict()
    parts = UNet2DConditionModel.from_pretrained(tmp_path / "parts/unet").state_dict()
    assert all(torch.allclose(whole[key], parts[key], atol=1e-5) for key in whole)


def test_two_tasks_of_one_reward_have_names_of_their_own(tmp_path, monkeypatch, small, tiny_sd):
    (tmp_path / "my prompts.jsonl").write_text('{"text": "a cat"}\n{"text": "a dog"}\n')
    tasks = [
        f"jpeg_compressibility {tmp_path}/prompt.txt 1x4",
        f"jpeg_compressibility '{tmp_path}/my prompts.jsonl' 2x3",
    ]
    place = small.index("--tasks")
    others = small[:place] + small[place + 2 :]
    run_here(monkeypatch, *others, "--tasks", *tasks, "--output-dir", tmp_path / "run")
    line = read_metrics(tmp_path / "run")[0]
    means = line["reward/jpeg_compressibility/mean"], line["reward/jpeg_compressibility-2/mean"]
    assert line["samples"] == 10 and means[0] != means[1]
    assert line["reward/mean"] == pytest.approx(sum(means) / 2)


def test_presets_are_those_of_the_paper():
    for name in ("preference", "composition", "skin-tone", "joint"):
        args = large_scale_ppo.PRESETS[name]
        assert (args.guidance_scale, args.lora_rank, args.learning_rate) == (7, 0, None)
        assert (args.num_inference_steps, args.clip_range) == (50, 1e-4)
        assert (args.prompts_per_task, args.images_per_prompt) == (128, 16)
        assert args.training_timesteps == 5
        assert (args.weight_decay, args.pretrain_batch_size) == (1e-2, 128 * 16)
    rewards = [task.split()[0] for task in large_scale_ppo.PRESETS["joint"].tasks]
    assert rewards == ["image_reward", "object_detection", "statistical_parity"]
