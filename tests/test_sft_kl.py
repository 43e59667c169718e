"""sft_kl.py: Lemma 4.3 where both sides are known, its loss against the one written out.

And a data set that is reused.
"""

import json
import math
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, read_metrics, run_script
from diffusers import DDIMScheduler, DDPMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file
from written_out import merged_unet, record_updates

import sft_kl
from harness.checkpoint import CheckpointError, hold_dataset, lock

PROMPT = "A cat and a dog"
PROMPTS = [PROMPT, "Four wolves in the park"]
FLAGS = ("--num-inference-steps", 4, "--dataset-size", 12)
FLAGS += ("--shard-size", 6, "--batch-size", 5, "--seed", 3)
FLAGS += ("--reward", "jpeg_incompressibility", "--gradient-steps", 2)
FLAGS += ("--micro-batch-size", 3, "--num-iterations", 1)
FLAGS += ("--samples-per-iteration", 2)


class Toy:
    """x_0 ~ N(0.5, 0.6^2) as the pretrained model draws it, six steps, f linear.

    The expectations are exact, by quadrature. The generative chain is x_T ~ N(0, 1), then Gaussian
    steps with the posterior's variance and mean mu_theta. The last of them (t = 1 in the paper, 0
    here), which Lemma 4.3 puts into its constant, is the same for all theta.
    """

    mean, var, gamma = 0.5, 0.36, 0.8
    scheduler = DDPMScheduler(num_train_timesteps=6, beta_start=0.1, beta_end=0.5)
    alphas = scheduler.alphas_cumprod.double()

    def __init__(self):
        nodes, weights = np.polynomial.hermite_e.hermegauss(40)
        self.nodes = torch.tensor(nodes)
        self.weights = torch.tensor(weights) / math.sqrt(2 * math.pi)
        self.x0 = self.mean + math.sqrt(self.var) * self.nodes
        # More than -gamma at all nodes that count.
        self.reward = torch.sin(self.x0) + 0.3 * self.x0**2
        assert (self.reward + self.gamma > 0).all()

    def terms(self, t):
        alpha, alpha_prev = self.alphas[t], self.alphas[t - 1]
        beta = 1 - alpha / alpha_prev
        of_x0 = alpha_prev.sqrt() * beta / (1 - alpha)
        of_x_t = (1 - beta).sqrt() * (1 - alpha_prev) / (1 - alpha)
        return of_x0, of_x_t, (1 - alpha_prev) / (1 - alpha) * beta

    def best(self, t):
        """E[x_0 | x_t] = slope x_t + offset: what a converged pretrained model predicts."""
        alpha = self.alphas[t]
        slope = alpha.sqrt() * self.var / (alpha * self.var + 1 - alpha)
        return slope, self.mean - slope * alpha.sqrt() * self.mean

    def last_step(self):
        """Slope, offset and variance of p(x_0 | x_1): the pretrained model's own."""
        slope, offset = self.best(0)
        return slope, offset, self.var * (1 - self.alphas[0].sqrt() * slope)

    def x_t(self, t):
        """(x_0's nodes, x_t's nodes)."""
        alpha = self.alphas[t]
        return alpha.sqrt() * self.x0[:, None] + (1 - alpha).sqrt() * self.nodes[None, :]

    def left_side(self, theta):
        """E[-(r + gamma) log p_theta(x_0)]: the chain is linear, so x_0 is Gaussian."""
        mean, var = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        for t in range(5, 0, -1):
            of_x0, of_x_t, variance = self.terms(t)
            slope, offset = theta[t - 1]
            mean = (of_x_t + of_x0 * slope) * mean + of_x0 * offset
            var = (of_x_t + of_x0 * slope) ** 2 * var + variance
        slope, offset, variance = self.last_step()
        mean, var = slope * mean + offset, slope**2 * var + variance
        log_p = torch.distributions.Normal(mean, var.sqrt()).log_prob(self.x0)
        return (self.weights * -(self.reward + self.gamma) * log_p).sum()

    def constant(self):
        """C_1: the KL of q(x_T | x_0) to p(x_T), and the last step, each times r + gamma (A.4)."""
        alpha, normal = self.alphas[5], torch.distributions.Normal
        noised = normal(alpha.sqrt() * self.x0, (1 - alpha).sqrt())
        kl = torch.distributions.kl_divergence(noised, normal(0.0, 1.0))
        slope, offset, variance = self.last_step()
        last = -normal(slope * self.x_t(0) + offset, variance.sqrt()).log_prob(self.x0[:, None])
        both = kl + (self.weights * last).sum(1)
        return (self.weights * (self.reward + self.gamma) * both).sum()

    def right_side(self, theta, regularization):
        """Eq. 11 with "kl-d" and Eq. 12 with "kl-o", without the constants.

        The script's own loss and weights.
        """
        args, total = sft_kl.Args(regularization=regularization, gamma=self.gamma), 0.0
        for t in range(1, 6):
            x_t = self.x_t(t)
            x0 = self.x0[:, None].expand_as(x_t).reshape(-1, 1, 1, 1)
            reward = self.reward[:, None].expand_as(x_t).reshape(-1, 1, 1, 1)
            lines = (theta[t - 1], self.best(t))
            f, f_pre = ((slope * x_t + offset).view(-1, 1, 1, 1) for slope, offset in lines)
            weight = sft_kl.step_weights(self.scheduler, torch.tensor([t]), "bound").double()
            loss = weight * sft_kl.sft_loss(args, reward.flatten(), x0, f, f_pre)
            total = total + (self.weights[:, None] * self.weights * loss.view_as(x_t)).sum()
        return total

    def pretrained_error(self):
        """C_2 - C_1: gamma times the pretrained model's own distance to mu_tilde."""
        best = [self.best(t) for t in range(1, 6)]
        return self.right_side(best, "kl-d") - self.right_side(best, "kl-o")


def test_bounds_of_lemma_4_3_hold():
    toy, rng = Toy(), np.random.default_rng(0)
    gaps = []
    for spread in [0.0] + 50 * [0.4]:
        theta = [tuple(v + spread * rng.normal() for v in toy.best(t)) for t in range(1, 6)]
        left = toy.left_side(theta)
        eq_11 = toy.right_side(theta, "kl-d") + toy.constant()
        eq_12 = toy.right_side(theta, "kl-o") + toy.constant() + toy.pretrained_error()
        assert left <= eq_11 + 1e-9 and left <= eq_12 + 1e-9
        # Where f_pre is the conditional mean of x_0, as it is here, Eq. 20 is an equality, and so
        # are Eq. 11 and 12.
        assert eq_12.item() == pytest.approx(eq_11.item(), abs=1e-6)
        gaps.append((eq_11 - left).item())
    assert gaps[0] < min(gaps[1:]), "the pretrained model itself should be nearest to the bound"


def test_kl_d_is_the_shifted_reward():
    torch.manual_seed(0)
    x0, f = torch.randn(6, 4, 8, 8), torch.randn(6, 4, 8, 8, requires_grad=True)
    reward = torch.randn(6)
    kl_d, plain = sft_kl.Args(regularization="kl-d", gamma=1.3), sft_kl.Args(regularization="none")
    shifted = sft_kl.sft_loss(kl_d, reward, x0, f, None)
    none = sft_kl.sft_loss(plain, (reward + 1.3).clamp(min=0), x0, f, None)
    gradients = [torch.autograd.grad(loss.sum(), f)[0] for loss in (shifted, none)]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-9) and gradients[0].abs().max() > 0


@pytest.mark.parametrize("regularization", ["kl-o", "kl-d", "none"])
def test_rewards_below_the_floor_are_not_unlearned(regularization):
    """A sample with r + gamma <= 0 has no part in the loss wherever x_0, f_pre, f are (App. B)."""
    torch.manual_seed(0)
    x0, f_pre = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    args = sft_kl.Args(regularization=regularization, gamma=0.5, filter="drop")
    for scale in (1.0, 100.0, -100.0):
        f = (f_pre + scale * (x0 - f_pre)).requires_grad_()
        loss = sft_kl.sft_loss(args, torch.tensor([-9.0, -0.5]), x0, f, f_pre)
        assert (loss == 0).all() and (torch.autograd.grad(loss.sum(), f)[0] == 0).all()


def test_minimum_of_kl_o():
    """Above the floor it is (r x_0 + gamma f_pre) / (r + gamma).

    On the floor the loss is a line that has none.
    """
    torch.manual_seed(0)
    x0, f_pre, other = (torch.randn(3, 4, 8, 8, dtype=torch.float64) for _ in range(3))
    args = sft_kl.Args(regularization="kl-o", gamma=0.5, filter="floor")
    reward = torch.tensor([1.3, -0.2, -0.45], dtype=torch.float64)
    r = reward.view(-1, 1, 1, 1)
    best = ((r * x0 + 0.5 * f_pre) / (r + 0.5)).requires_grad_()
    loss = sft_kl.sft_loss(args, reward, x0, best, f_pre)
    assert torch.autograd.grad(loss.sum(), best)[0].abs().max() < 1e-12
    beside = best.detach() + 0.1 * other
    assert (sft_kl.sft_loss(args, reward, x0, beside, f_pre) > loss.detach()).all()
    kept = sft_kl.sft_loss(
        sft_kl.Args(regularization="kl-o", gamma=0.5, filter="drop"), reward, x0, best, f_pre
    )
    assert torch.equal(kept, loss), "the filter leaves them alone"

    def on_the_floor(step: float) -> float:
        f = f_pre[:1] + step * (f_pre[:1] - x0[:1])
        low = torch.tensor([-2.0], dtype=torch.float64)
        return sft_kl.sft_loss(args, low, x0[:1], f, f_pre[:1]).item()

    slope = on_the_floor(1.0) - on_the_floor(0.0)
    assert slope < -0.1, "away from x_0 it falls"
    assert on_the_floor(1000.0) == pytest.approx(on_the_floor(0.0) + 1000 * slope, rel=1e-9)


def test_kl_to_the_pretrained_model_is_taken_at_random_steps(tiny_sd, tmp_path, monkeypatch):
    """In two iterations the steps are those that the samples' own generators give.

    They give them after prompt and noise.
    """
    seen, of_pretrained = [], sft_kl.ddim_mean_and_std

    def record(scheduler, output, timestep, *args):
        seen.append(timestep.tolist())
        return of_pretrained(scheduler, output, timestep, *args)

    monkeypatch.setattr(sft_kl, "ddim_mean_and_std", record)
    flags = [*FLAGS, "--model", tiny_sd, "--output-dir", tmp_path / "run", "--num-iterations", 2]
    flags += ["--samples-per-iteration", 8, "--micro-batch-size", 8]
    monkeypatch.setattr(sys, "argv", ["sft_kl.py", *map(str, flags)])
    sft_kl.main()
    timesteps = [[751, 501, 251, 1][j] for j in range(4)]
    expected = []
    for iteration in range(2):
        drawn = []
        for i in range(8):
            generator = sft_kl.seeded(3, 2, iteration, i)
            torch.randint(1, (1,), generator=generator)
            torch.randn(5, 4, 8, 8, generator=generator)
            drawn.append(timesteps[torch.randint(4, (1,), generator=generator)])
        expected.append(drawn)
    assert seen == expected and expected[0] != expected[1]


def test_no_sample_above_the_floor_is_said_before_training(tiny_sd, tmp_path):
    code = "def f(images, prompts):\n    return images.mean((1, 2, 3)) - 5\n"
    (tmp_path / "mine.py").write_text(code)
    flags = [*FLAGS, "--model", tiny_sd, "--reward", f"{tmp_path}/mine.py:f"]
    flags += ["--output-dir", tmp_path / "run"]
    result = run_script("sft_kl.py", *flags)
    assert result.returncode == 1 and "start anew with --gamma above 4." in result.stderr
    assert f"the run so far is in {tmp_path}/run" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_x0_and_weights_against_the_scheduler(prediction_type, monkeypatch):
    """f against diffusers; "simple" against the error of the output itself; "bound" against theory.

    That is mu_tilde - mu (Lemma 4.3), taken from DDPMScheduler's own step.
    """
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    config |= {"clip_sample": False, "prediction_type": prediction_type}
    scheduler = DDPMScheduler(variance_type="fixed_small", **config)
    ddim = DDIMScheduler(**config)
    ddim.set_timesteps(1000)
    sd = SimpleNamespace(scheduler=scheduler)
    monkeypatch.setattr(sft_kl, "guided_noise", lambda args, sd, output, *inputs: output)
    torch.manual_seed(0)
    x_t, output, other = (torch.randn(1, 4, 8, 8, dtype=torch.float64) for _ in range(3))
    for t in (1, 20, 500, 999):
        index = torch.tensor([t])
        f, g = (sft_kl.predict_x0(None, sd, o, x_t, index, None) for o in (output, other))
        expected = ddim.step(output, t, x_t).pred_original_sample
        assert torch.allclose(f.double(), expected, rtol=1e-4, atol=1e-4)
        names = ("paper", "bound", "simple")
        weight = {name: sft_kl.step_weights(scheduler, index, name) for name in names}
        difference = ((f - g) ** 2).mean()
        expected = ((output - other) ** 2).mean().item()
        assert (weight["simple"] * difference).item() == pytest.approx(expected, rel=1e-3)
        variance = scheduler._get_variance(t).item()
        assert weight["paper"].item() == pytest.approx(1 / (2 * variance), rel=1e-3)
        means = []
        for o in (output, other):
            # The step's noise is the same in both and falls out of the difference.
            generator = torch.Generator().manual_seed(0)
            means.append(scheduler.step(o, t, x_t, generator=generator).prev_sample)
        expected = ((means[0] - means[1]) ** 2).mean().item() / (2 * variance)
        assert (weight["bound"] * difference).item() == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("regularization", ["kl-o", "kl-d", "none"])
def test_gradient_is_that_of_the_loss_written_out(tiny_sd, tmp_path, monkeypatch, regularization):
    """The gradient of the second update against autograd in float64 of Algorithm 2's."""
    recorded = record_updates(monkeypatch)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    flags = [*FLAGS, "--model", tiny_sd, "--guidance-scale", 3]
    flags += ["--prompts-file", tmp_path / "prompts.txt"]
    flags += ["--max-grad-norm", 1e9, "--learning-rate", 1e-2]
    flags += ["--regularization", regularization, "--gamma", 1.5, "--output-dir", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["sft_kl.py", *map(str, flags)])
    sft_kl.main()
    shards = [load_file(tmp_path / f"run/dataset/{first:06d}.safetensors") for first in (0, 6)]
    x0, reward = (torch.cat([shard[key] for shard in shards]).double() for key in ("x0", "reward"))
    generator = sft_kl.seeded(3, 1, 0, 1)
    batch = torch.randint(12, (5,), generator=generator)
    # Sample i of a shard has drawn its prompt before its noise.
    places = [(first, i) for first in (0, 6) for i in range(6)]
    drawn = [torch.randint(2, (1,), generator=sft_kl.seeded(3, 0, *place)) for place in places]
    prompts = [PROMPTS[drawn[i]] for i in batch]
    assert len(set(prompts)) == 2
    t = torch.randint(1, 1000, (5,), generator=generator)
    noise = torch.randn(5, 4, 8, 8, generator=generator).double()
    alphas = StableDiffusionPipeline.from_pretrained(tiny_sd).scheduler.alphas_cumprod.double()
    alpha, alpha_prev = alphas[t].view(-1, 1, 1, 1), alphas[t - 1].view(-1, 1, 1, 1)
    x0, r = x0[batch], reward[batch].view(-1, 1, 1, 1)
    x_t = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
    weights = [weight for weight, _ in recorded[1]]
    leaves, *networks = merged_unet(tiny_sd, weights, 3.0, prompts)
    f, f_pre = ((x_t - (1 - alpha).sqrt() * eps(x_t, t)) / alpha.sqrt() for eps in networks)
    variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
    if regularization == "kl-o":
        loss = (r * (x0 - f) ** 2 + 1.5 * (f_pre.detach() - f) ** 2) / (2 * variance)
    else:
        loss = (r + (1.5 if regularization == "kl-d" else 0)) * (x0 - f) ** 2 / (2 * variance)
    gradients = torch.autograd.grad(loss.flatten(1).mean(1).mean(), leaves)
    expected = torch.cat([g.flatten() for g in gradients])
    ours = torch.cat([g.flatten() for _, g in recorded[1]]).double()
    assert (ours - expected).norm() < 1e-3 * expected.norm()


def test_data_set_is_drawn_once_and_reused(tiny_sd, tmp_path):
    relative = os.path.relpath(tmp_path / "data", ROOT)  # of the working folder, not of the run's
    flags = [*FLAGS, "--model", tiny_sd, "--dataset", relative]
    result = run_script("sft_kl.py", *flags, "--output-dir", tmp_path / "one")
    assert result.returncode == 0, result.stderr
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").glob("*.safetensors")}
    (tmp_path / "data/000006.safetensors").unlink()
    other = ["--output-dir", tmp_path / "two", "--regularization", "kl-d"]
    result = run_script("sft_kl.py", *flags, *other)
    assert result.returncode == 0, result.stderr
    first = tmp_path / "data/000000.safetensors"
    assert len(written) == 2 and first.stat().st_mtime_ns == written[first]
    assert (tmp_path / "data/000006.safetensors").exists()
    assert [line["samples"] for line in read_metrics(tmp_path / "two")] == [14]
    data_set = json.loads((tmp_path / "data/dataset.json").read_text())
    assert data_set["reward"] == "jpeg_incompressibility"
    other = ["--output-dir", tmp_path / "three", "--guidance-scale", 2]
    result = run_script("sft_kl.py", *flags, *other)
    assert result.returncode == 2
    assert "--dataset" in result.stderr and "--guidance-scale" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_data_set_is_drawn_by_one_run_at_a_time(tiny_sd, tmp_path):
    """And not by one that another began meanwhile, with other settings."""
    data = tmp_path / "data"
    flags = [*FLAGS, "--model", tiny_sd, "--dataset", data, "--output-dir"]
    data.mkdir()
    held = lock(data)
    result = run_script("sft_kl.py", *flags, tmp_path / "one")
    assert result.returncode == 1 and "another process is still writing" in result.stderr
    held.close()
    with pytest.raises(CheckpointError, match="other settings"):
        for about in ('{"seed": 1}', '{"seed": 2}'):
            hold_dataset(tmp_path / "others", about).close()
    result = run_script("sft_kl.py", *flags, tmp_path / "two")
    assert result.returncode == 0, result.stderr
    both = tmp_path / "both"  # a folder that the run has locked already
    result = run_script("sft_kl.py", *flags, both, "--dataset", both)
    assert result.returncode == 0 and (both / "dataset.json").exists(), result.stderr


def test_data_set_of_a_reward_whose_code_has_changed_is_refused(tmp_path, capsys):
    code = tmp_path / "mine.py"
    code.write_text("def f(images, prompts):\n    return images.mean(dim=(1, 2, 3))\n")
    args = sft_kl.Args(reward=f"{code}:f", dataset=tmp_path / "data")
    (tmp_path / "data").mkdir()
    about = json.dumps(sft_kl.about_dataset(args, [PROMPT]))
    (tmp_path / "data/dataset.json").write_text(about)
    sft_kl.check_dataset(args, [PROMPT])
    code.write_text(code.read_text().replace("mean", "amax"))
    with pytest.raises(SystemExit) as end:
        sft_kl.check_dataset(args, [PROMPT])
    assert end.value.code == 2 and "other --reward;" in capsys.readouterr().err
