"""The LoRA processor against diffusers' own attention, its file against diffusers' own loader."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0

from common.lora import FILE_NAME, add_lora, load_lora, lora_state_dict, pretrained, save_lora


def randomise(parameters, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


@pytest.fixture
def unet(tiny_sd):
    return UNet2DConditionModel.from_pretrained(tiny_sd / "unet").eval()


@pytest.fixture
def inputs():
    g = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, 4, 8, 8, generator=g),
        torch.tensor([10, 700]),
        torch.randn(2, 24, 32, generator=g),
    )


@torch.no_grad()
def test_untrained_and_scale_0_are_the_pretrained_model_exactly(unet, inputs):
    before = unet(*inputs).sample
    parameters = add_lora(unet, rank=4)
    assert torch.equal(unet(*inputs).sample, before)
    randomise(parameters)
    assert (unet(*inputs).sample - before).abs().max() > 1e-3
    with pretrained(unet):
        assert torch.equal(unet(*inputs).sample, before)
    assert (unet(*inputs).sample - before).abs().max() > 1e-3


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
def test_picture_of_plain_diffusers_equals_our_own(tiny_sd, tmp_path, rank):
    """`pipe.load_lora_weights(run_dir)` in a fresh pipeline.

    It gives the picture that the script's UNet gives.
    """
    pytest.importorskip("peft")

    def picture(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": 4, "output_type": "pt"}
        return pipeline("a cat", generator=torch.Generator().manual_seed(0), **settings).images

    ours = StableDiffusionPipeline.from_pretrained(tiny_sd)
    base = picture(ours)
    randomise(add_lora(ours.unet, rank))
    save_lora(ours.unet, tmp_path)
    plain = StableDiffusionPipeline.from_pretrained(tiny_sd)
    plain.load_lora_weights(tmp_path)
    assert (picture(ours) - base).abs().max() > 1e-2
    torch.testing.assert_close(picture(plain), picture(ours), atol=1e-4, rtol=0)


def test_save_and_load(unet, tiny_sd, tmp_path):
    randomise(add_lora(unet, 4))
    save_lora(unet, tmp_path)
    other = UNet2DConditionModel.from_pretrained(tiny_sd / "unet")
    add_lora(other, 4)
    load_lora(other, tmp_path)
    expected, loaded = lora_state_dict(unet), lora_state_dict(other)
    assert (tmp_path / FILE_NAME).is_file()
    assert all(torch.equal(expected[key], loaded[key]) for key in expected)
    third = UNet2DConditionModel.from_pretrained(tiny_sd / "unet")
    add_lora(third, 2)
    with pytest.raises(ValueError, match="another model or rank"):
        load_lora(third, tmp_path)
