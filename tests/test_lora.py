"""The LoRA processor against diffusers' own attention, its file against diffusers' own loader."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0

from common.lora import (
    FILE_NAME,
    LoRALinear,
    add_lora,
    load_lora,
    lora_state_dict,
    project,
    save_lora,
    save_weights,
    sharing_weights,
)


def randomise(parameters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


@pytest.fixture
def unet(shrunk_sd):
    return UNet2DConditionModel.from_pretrained(shrunk_sd / "unet").eval()


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, 4, 8, 8, generator=g),
        torch.tensor([10, 700]),
        torch.randn(2, 24, 32, generator=g),
    )


@torch.no_grad()
def test_untrained_it_is_the_pretrained_model_exactly(unet, inputs):
    before, pretrained = unet(*inputs).sample, sharing_weights(unet)
    parameters = add_lora(unet, rank=4)
    assert torch.equal(unet(*inputs).sample, before)
    randomise(parameters)
    assert (unet(*inputs).sample - before).abs().max() > 1e-3
    assert torch.equal(pretrained(*inputs).sample, before)


def test_pretrained_model_takes_no_memory_of_its_own(unet):
    pretrained = sharing_weights(unet)
    add_lora(unet, rank=4)
    own = {p.data_ptr() for p in unet.parameters()}
    assert {p.data_ptr() for p in pretrained.parameters()} < own
    assert len(list(pretrained.parameters())) == len(list(pretrained.state_dict()))


@pytest.mark.parametrize("dtype, bound", [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
def test_half_precision_differs_from_a_float32_lora_by_its_rounding(dtype, bound):
    """A layer of SD v1.5's size: its outputs, and the gradients of A and B, against float64's.

    The bound is four units in the last place, of the largest.
    """
    torch.manual_seed(0)
    layers = [torch.nn.Linear(320, 320, bias=False).requires_grad_(False) for _ in range(3)]
    loras = [LoRALinear(320, 320, 4) for _ in range(3)]
    randomise([p for lora in loras for p in lora.parameters()])
    x = torch.randn(2, 64, 320)

    def outputs_and_gradients(kind):
        for layer in layers:
            layer.to(kind)
        outputs = project(x.to(kind), *zip(layers, loras))
        torch.stack(outputs).double().pow(2).mean().backward()
        gradients = [p.grad.clone() for lora in loras for p in lora.parameters()]
        for lora in loras:
            lora.zero_grad()
        return [*outputs, *gradients]

    half = outputs_and_gradients(dtype)
    exact = []
    for k, (layer, lora) in enumerate(zip(layers, loras)):
        W, A, B = (
            w.to(dtype).double() for w in (layer.weight, lora.lora_A.weight, lora.lora_B.weight)
        )
        A, B = A.requires_grad_(), B.requires_grad_()
        output = x.to(dtype).double() @ (W + B @ A).T
        gradients = torch.autograd.grad(output.pow(2).mean() / 3, (A, B))
        exact.append((output, *gradients))
        assert half[3 + 2 * k].dtype == torch.float32
    expected = [output for output, _, _ in exact]
    expected += [gradient for _, *gradients in exact for gradient in gradients]
    for value, wanted in zip(half, expected, strict=True):
        assert (value.double() - wanted).abs().max() <= bound * wanted.abs().max()
        assert value.double().sub(wanted).abs().max() > 0  # it was half precision


def test_no_float32_copy_of_the_inputs_is_kept(unet, inputs):
    """For the backward pass of a bfloat16 UNet nothing as large as its activations is float32."""
    add_lora(unet.to(torch.bfloat16), 4)
    kept = []
    pack = lambda x: kept.append((x.dtype, x.numel())) or x
    x, t, text = inputs
    x = x.repeat(1, 1, 4, 4).bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        unet(x, t, text.bfloat16()).sample.float().sum()
    assert sum(n for dtype, n in kept if dtype == torch.bfloat16) > 100 * x.numel()
    # Left are sums of the norms, a number for each group or token.
    assert max(n for dtype, n in kept if dtype == torch.float32) < x.numel()


@torch.no_grad()
def test_equals_merged_weights(unet, inputs):
    """W + B A in place of W, run by diffusers' own processor."""
    randomise(add_lora(unet, rank=3))
    expected, state = unet(*inputs).sample, lora_state_dict(unet)
    unet.set_attn_processor(AttnProcessor2_0())
    for key in [key for key in state if key.endswith("lora_A.weight")]:
        layer = unet.get_submodule(key.removeprefix("unet.").removesuffix(".lora_A.weight"))
        layer.weight += state[key.replace("lora_A", "lora_B")] @ state[key]
    torch.testing.assert_close(unet(*inputs).sample, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_only_the_lora_is_trained_and_all_of_it(unet, inputs, rank):
    parameters = add_lora(unet, rank)
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    assert sum(p.numel() for p in parameters) == trained
    assert all(p.dtype == torch.float32 for p in parameters)
    randomise(parameters)
    x, t, text = inputs
    # Of 8 x 8 latents one token is left in the middle, whose attention to itself has no gradient.
    x = x.repeat(1, 1, 2, 2) + torch.randn(1, 4, 16, 16)
    unet(x, t, text).sample.square().mean().backward()
    assert all(p.grad.abs().max() > 0 for p in parameters)


def test_float32_weights_under_half_precision(unet, inputs):
    parameters = add_lora(unet.to(torch.bfloat16), 4)
    randomise(parameters)
    x, t, text = inputs
    out = unet(x.bfloat16(), t, text.bfloat16()).sample
    assert out.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in parameters)


@pytest.mark.parametrize("rank", [1, 4])
def test_picture_of_plain_diffusers_equals_our_own(shrunk_sd, tmp_path, rank):
    """`pipe.load_lora_weights(run_dir)` in a fresh pipeline.

    It gives the picture that the script's UNet gives.
    """
    pytest.importorskip("peft")

    def picture(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": 4, "output_type": "pt"}
        return pipeline("a cat", generator=torch.Generator().manual_seed(0), **settings).images

    ours = StableDiffusionPipeline.from_pretrained(shrunk_sd)
    base = picture(ours)
    randomise(add_lora(ours.unet, rank))
    save_lora(ours.unet, tmp_path)
    plain = StableDiffusionPipeline.from_pretrained(shrunk_sd)
    plain.load_lora_weights(tmp_path)
    assert (picture(ours) - base).abs().max() > 1e-2
    torch.testing.assert_close(picture(plain), picture(ours), atol=1e-4, rtol=0)


def test_save_and_load(unet, shrunk_sd, tmp_path):
    randomise(add_lora(unet, 4))
    save_lora(unet, tmp_path)
    other = UNet2DConditionModel.from_pretrained(shrunk_sd / "unet")
    add_lora(other, 4)
    load_lora(other, tmp_path)
    expected, loaded = lora_state_dict(unet), lora_state_dict(other)
    assert (tmp_path / FILE_NAME).is_file()
    assert all(torch.equal(expected[key], loaded[key]) for key in expected)
    third = UNet2DConditionModel.from_pretrained(shrunk_sd / "unet")
    add_lora(third, 2)
    with pytest.raises(ValueError, match="another model or rank"):
        load_lora(third, tmp_path)


def test_a_unet_takes_the_place_of_the_one_before_when_it_is_whole(unet, tmp_path, monkeypatch):
    save_weights(unet, tmp_path)
    before = (tmp_path / "unet/config.json").read_bytes()

    def killed(folder):
        folder.mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(unet, "save_pretrained", killed)
        save_weights(unet, tmp_path)
    assert (tmp_path / "unet/config.json").read_bytes() == before
    save_weights(unet, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]
