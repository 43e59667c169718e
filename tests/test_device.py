"""What a GPU asks of the scripts, shown on a CPU: precision, shapes, waiting, compilation."""

import importlib
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import read_metrics, run_here, run_script
from diffusers import UNet2DConditionModel
from scripts import SCRIPTS, TABLE, tiny_and_own
from torch.utils._python_dispatch import TorchDispatchMode

from common.rewards import Ahead, load_reward
from common.stable_diffusion import load_stable_diffusion
from harness import even_size, fit_micro_batches
from harness.memory import largest, out_of_memory, rollout_storage
from harness.metrics import warn_where_above

POLICY_GRADIENT = ("dpok.py", "ddpo.py", "large_scale_ppo.py")
WAITS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")


def odd_flags(script: str, folder, reward: str, dtype: str) -> list:
    """Ten samples in micro-batches of three or four, two iterations, a rate that moves the LoRA."""
    flags = [*tiny_and_own(script, folder, reward), "--dtype", dtype, "--micro-batch-size", 4]
    return [*flags, "--num-iterations", 2, "--learning-rate", 1e-3, "--lora-rank", 4]


def assert_first_ratios_are_1(folder) -> None:
    lines = read_metrics(folder)
    assert len(lines) == 2 and all(line["grad_norm"] > 0 for line in lines)
    assert max(line["ratio/first_max_deviation"] for line in lines) < 1e-6


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("script", POLICY_GRADIENT)
def test_first_ratio_is_1(tiny_sd, tmp_path, smooth, script, dtype, monkeypatch):
    flags = odd_flags(script, tmp_path, smooth, dtype)
    run_here(monkeypatch, script, *flags, "--model", tiny_sd, "--output-dir", tmp_path / "run")
    assert_first_ratios_are_1(tmp_path / "run")


def test_first_ratio_is_1_on_three_ranks(tiny_sd, tmp_path, smooth):
    """In bf16; tests/test_scripts.py has the other dtypes."""
    flags = [*odd_flags("large_scale_ppo.py", tmp_path, smooth, "bf16"), "--model", tiny_sd]
    result = run_script("large_scale_ppo.py", *flags, "--output-dir", tmp_path / "run", ranks=3)
    assert result.returncode == 0, result.stderr
    assert_first_ratios_are_1(tmp_path / "run")


@pytest.mark.parametrize("script", SCRIPTS)
def test_all_calls_of_the_unet_have_one_shape(tiny_sd, tmp_path, smooth, script, monkeypatch):
    """For what has one purpose: ten samples and their updates are in batches of four, padded."""
    forward, shapes = UNet2DConditionModel.forward, Counter()

    def record(self, x, *args, **kwargs):
        shapes[len(x)] += 1
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(UNet2DConditionModel, "forward", record)
    flags = odd_flags(script, tmp_path, smooth, "fp32")
    run_here(monkeypatch, script, *flags, "--model", tiny_sd, "--output-dir", tmp_path / "run")
    conditional = {3} if "pre-training" in TABLE[script].blocks else set()  # five pairs
    assert set(shapes) - conditional <= {6, 8}  # with guidance; 10 in three parts, 6 in two
    if script in POLICY_GRADIENT:
        assert set(shapes) - conditional == {8}


def test_padding_changes_nothing(tiny_sd):
    """Predictions and gradients of five rows are those of the same five in a batch of eight."""
    dpok = importlib.import_module("dpok")
    flags = {"model": str(tiny_sd), "num_inference_steps": 4, "dtype": "fp32"}
    args = dpok.Args(**flags)
    sd = load_stable_diffusion(args, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    for weight in sd.weights:
        torch.nn.init.normal_(weight, std=0.1, generator=generator)
    latents = torch.randn(5, *sd.latent_shape, generator=generator)
    steps = sd.timesteps[torch.arange(5) % 4]
    text = sd.encode(["a", "b", "c", "d", "e"])
    results = []
    for size in (None, 8):
        sd.batch_size = size
        noise = dpok.guided_noise(args, sd, sd.unet, latents, steps, text)
        noise.square().sum().backward()
        results.append([noise.detach(), *(weight.grad for weight in sd.weights)])
        for weight in sd.weights:
            weight.grad = None
    (noise, *gradients), (padded_noise, *padded_gradients) = results
    assert noise.shape == (5, *sd.latent_shape)
    atol = 1e-5 * noise.abs().max().item()
    torch.testing.assert_close(padded_noise, noise, rtol=1e-4, atol=atol)
    # Queries and keys of an attention over one pixel have a gradient of rounding alone.
    atol = 1e-5 * max(gradient.abs().max() for gradient in gradients).item()
    torch.testing.assert_close(padded_gradients, gradients, rtol=1e-4, atol=atol)


def is_mask(x) -> bool:
    """An index of which it is not known how many it chooses."""
    return isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)


class Waits(TorchDispatchMode):
    """Counts, within the micro-batches, what would wait for a GPU to tell a number."""

    def __init__(self):
        super().__init__()
        self.inside, self.calls, self.seen = 0, 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        masks = [x for x in args[1] if is_mask(x)] if name in INDEXING else []
        if self.inside:
            self.calls += 1
            self.seen.update([name] if name in WAITS or masks else [])
        return function(*args, **(kwargs or {}))

    def within(self, loop):
        """`loop`, a function that gives what a for statement goes through, watched."""

        def watched(*args):
            for item in loop(*args):
                self.inside += 1
                yield item
                self.inside -= 1

        return watched


@pytest.mark.parametrize("script", SCRIPTS)
def test_nothing_waits_within_micro_batches(tiny_sd, tmp_path, smooth, script, monkeypatch):
    """Steps of a sampler are within those of the rollout."""
    waits, module = Waits(), importlib.import_module(script.removesuffix(".py"))
    monkeypatch.setattr(module, "micro_batches", waits.within(module.micro_batches))
    flags = odd_flags(script, tmp_path, smooth, "fp32")
    with waits:
        run_here(monkeypatch, script, *flags, "--model", tiny_sd, "--output-dir", tmp_path / "run")
    assert waits.inside == 0 and waits.calls > 10_000
    assert not waits.seen


def test_a_wait_is_counted():
    waits = Waits()
    with waits:
        for _ in waits.within(range)(2):
            values = torch.ones(3)
            assert values.sum().item() == 3 and values[values > 0].any()
    assert waits.seen == {"_local_scalar_dense": 4, "index": 2}


# Of every kind one: a kept prediction, several units, a gradient through sampler and VAE. That all
# calls of the UNet have one shape is tested of every script.
@pytest.mark.parametrize("script", ["dpok.py", "large_scale_ppo.py", "draft.py"])
def test_nothing_is_compiled_after_the_second_iteration(
    tiny_sd, tmp_path, smooth, script, monkeypatch
):
    """Rollout, training and reference pass, in uneven micro-batches: each is compiled once."""
    from torch._dynamo.utils import counters

    counts, log, compile_module = [], importlib.import_module("harness.run").Run.log, None
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda m: compile_module(m, backend="eager"))

    def log_and_count(self, *args, **kwargs):
        counts.append(counters["stats"]["unique_graphs"])
        return log(self, *args, **kwargs)

    monkeypatch.setattr("harness.run.Run.log", log_and_count)
    torch._dynamo.reset()
    counters.clear()
    flags = [*odd_flags(script, tmp_path, smooth, "fp32"), "--num-iterations", 3, "--compile"]
    run_here(monkeypatch, script, *flags, "--model", tiny_sd, "--output-dir", tmp_path / "run")
    assert counts[0] > 0 and counts[1:] == [counts[1]] * 2, counts
    assert counters["stats"]["unique_graphs"] == counts[1]  # the grid of samples is none more
    assert not counters["graph_break"], counters["graph_break"]


def test_micro_batch_size_that_fits():
    tried = []
    fits = lambda rows: tried.append(rows) or rows <= 7
    assert largest((1, 2, 3, 4, 6, 8, 12), fits) == 6 and tried == [1, 2, 3, 4, 6, 8]
    assert largest((1, 2), lambda rows: False) == 0
    assert [even_size(10, most) for most in (1, 3, 4, 8, 10, 64)] == [1, 3, 4, 5, 10, 10]
    here = SimpleNamespace(device=torch.device("cpu"))
    args = importlib.import_module("dpok").Args()
    assert args.micro_batch_size == "auto" and args.dtype == "auto"
    assert fit_micro_batches(args, here, None).micro_batch_size == 8


@pytest.mark.parametrize("on_host", [False, True])
def test_rollouts_are_stored_together(on_host, monkeypatch):
    """What is set by whole indices or by tensors is what the same indices give."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)  # which needs a GPU
    stored, other = rollout_storage(torch.device("cpu"), (3, 4, 5), (4,))
    stored.on_host = on_host
    assert stored.values.dtype == other.values.dtype == torch.float32
    expected, generator = torch.zeros(3, 4, 5), torch.Generator().manual_seed(0)
    for index in (slice(0, 2), 2, (1, slice(1, 3)), (torch.tensor([0, 2]), torch.tensor([3, 0]))):
        expected[index] = torch.rand(expected[index].shape, generator=generator)
        stored[index] = expected[index]
        assert stored[index].equal(expected[index])
    assert stored.values.equal(expected) and stored[2].equal(expected[2])


def test_what_counts_as_out_of_memory():
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_warning_of_a_ratio_names_what_there_is_to_try(capsys):
    line = {"ratio": 0.5}
    for flags, remedy in (
        ({"dtype": "fp16", "compile": True}, "try --dtype fp32 or --no-compile"),
        ({"dtype": "fp32", "compile": False}, "no flag mends it"),
    ):
        warn_where_above(line, {"ratio": 0.1}, SimpleNamespace(**flags, allow_tf32=True))
        assert remedy in capsys.readouterr().err
    warn_where_above(line, {"ratio": 0.6}, SimpleNamespace(**flags, allow_tf32=True))
    assert not capsys.readouterr().err


def test_rewards_that_were_started_are_taken_up_in_order():
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    prompts = list("abcdef")
    reward = load_reward("jpeg_compressibility")
    expected = reward(images, prompts)
    for rows in (slice(0, 2), slice(2, 5), slice(5, 6)):
        reward.start(images[rows], prompts[rows])
    assert torch.equal(reward(images, prompts), expected)
    assert torch.equal(reward(images.flip(0), prompts), expected.flip(0))  # none is left over


def test_a_fault_of_a_reward_that_was_started_is_raised():
    """Where its scores are asked for; after that it starts anew."""

    def score(images, prompts):
        if "b" in prompts:
            raise RuntimeError("no score for b")
        return torch.zeros(len(images))

    reward, images = Ahead(score), torch.rand(4, 3, 32, 32)
    reward.start(images[:2], ["a", "b"])
    reward.start(images[2:], ["c", "d"])
    with pytest.raises(RuntimeError, match="no score for b"):
        reward(images, list("abcd"))
    assert reward(images[2:], ["c", "d"]).equal(torch.zeros(2))
