"""The adapter inside diffusers' UNet, at a small size."""

import copy

import pytest
import torch
import torch.nn.functional as F
from comfyui_wplus.train import attention
from comfyui_wplus.train.attention import attend, cross_attention_channels, cross_attention_names, install
from comfyui_wplus.wplus_core.adapter import AdapterConfig, WPlusAdapter
from comfyui_wplus.wplus_core.errors import WPlusError
from diffusers import UNet2DConditionModel


def small_unet(**changes):
    torch.manual_seed(0)
    sizes = dict(
        sample_size=16,
        cross_attention_dim=768,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    return UNet2DConditionModel(**{**sizes, **changes}).eval().requires_grad_(False)


@pytest.fixture
def world():
    unet = small_unet()
    original = copy.deepcopy(unet)
    install(unet)
    torch.manual_seed(1)
    adapter = WPlusAdapter(AdapterConfig(channels=cross_attention_channels(unet))).requires_grad_(False)
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([10, 900]), torch.randn(2, 77, 768)
    return unet, original, adapter, inputs


def eps(unet, inputs, wplus=None):
    kwargs = {} if wplus is None else {"cross_attention_kwargs": {"wplus": wplus}}
    return unet(*inputs, **kwargs).sample


def test_layer_order_is_down_up_mid():
    names = cross_attention_names(small_unet())
    assert [name.split(".")[0] for name in names] == ["down_blocks", "up_blocks", "up_blocks", "mid_block"]


def test_sd1_has_the_published_sixteen_layers():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
    assert cross_attention_channels(unet) == AdapterConfig.channels


def test_installed_but_unused_is_diffusers_own_model_bit_for_bit(world):
    unet, original, _, inputs = world
    assert torch.equal(eps(unet, inputs), eps(original, inputs))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_few_tokens_on_a_cpu_are_attended_as_by_pytorch(dtype, tolerance, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    q, k, v, gradient = (torch.randn(2, 3, n, 16, generator=rng).to(dtype) for n in (40, 24, 24, 40))
    found = {}
    for name, f in (("ours", attend), ("exact", F.scaled_dot_product_attention)):
        tensors = [x.detach().to(dtype if name == "ours" else torch.float64).requires_grad_() for x in (q, k, v)]
        h = f(*tensors)
        h.backward(gradient.to(h.dtype))
        found[name] = [x.double() for x in (h.detach(), *(t.grad for t in tensors))]
    assert attend(q, k, v).dtype == dtype
    for ours, exact in zip(found["ours"], found["exact"], strict=True):
        assert (ours - exact).norm() / exact.norm() < tolerance
    mask = torch.zeros(2, 3, 40, 24, dtype=dtype)
    mask[..., 12:] = -torch.inf
    torch.testing.assert_close(attend(q, k, v, mask), attend(q, k[:, :, :12], v[:, :, :12]), rtol=0.02, atol=0.02)
    monkeypatch.setattr(attention, "FEW", 1)  # to PyTorch's own
    assert torch.equal(attend(q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_a_padded_prompt_is_masked_as_in_diffusers(world):
    unet, original, _, inputs = world
    mask = torch.ones(2, 77)
    mask[:, 20:] = 0
    masked = [m(*inputs, encoder_attention_mask=mask).sample for m in (unet, original)]
    assert torch.equal(*masked)
    assert not torch.equal(masked[0], eps(original, inputs))


def test_both_forms_agree_and_do_something(world):
    unet, _, adapter, inputs = world
    w = torch.randn(2, 18, 512)
    reference = eps(unet, inputs, adapter.residual(adapter.mapping(w), 0.8))
    folded = eps(unet, inputs, adapter.fold(w).scaled(0.8))
    torch.testing.assert_close(folded, reference, rtol=1e-5, atol=1e-5)
    assert (reference - eps(unet, inputs)).norm() > 1e-2 * reference.norm()


def test_scale_zero_is_the_plain_model_bit_for_bit(world):
    unet, _, adapter, inputs = world
    w = torch.randn(2, 18, 512)
    plain = eps(unet, inputs)
    assert torch.equal(eps(unet, inputs, adapter.fold(w).scaled(0)), plain)
    assert torch.equal(eps(unet, inputs, adapter.residual(adapter.mapping(w), 0.0)), plain)


def test_gradients_reach_every_weight(world):
    unet, _, adapter, inputs = world
    adapter.requires_grad_(True)
    eps(unet, inputs, adapter.residual(adapter.mapping(torch.randn(2, 18, 512)))).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())


def test_another_model_family_is_refused():
    with pytest.raises(WPlusError, match="768"):
        install(small_unet(cross_attention_dim=1024))
