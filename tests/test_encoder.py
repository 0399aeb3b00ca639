"""The encoders: how the kinds relate, and what sizes do."""

import pytest
import torch
from comfyui_wplus.wplus_core.encoder import EncoderConfig, build_encoder
from comfyui_wplus.wplus_core.errors import WPlusError

SMALL = dict(layers=9, w_dim=24, units=(1, 2, 1, 1), channels=(16, 16, 32, 32), image_size=64)


def encoder(kind, **changes):
    torch.manual_seed(0)
    return build_encoder(EncoderConfig(**{**SMALL, "kind": kind, **changes})).eval().requires_grad_(False)


@pytest.mark.parametrize("kind", ["e4e", "psp", "single"])
@pytest.mark.parametrize("squeeze_excite", [True, False])
def test_shapes(kind, squeeze_excite):
    model = encoder(kind, squeeze_excite=squeeze_excite)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 9, 24)


def test_e4e_is_psps_style_0_plus_its_others():
    """The same weights read both ways: w_0 for every layer, and style i added to layer i >= 1."""
    e4e, psp, x = encoder("e4e"), encoder("psp"), torch.randn(2, 3, 64, 64)
    psp.load_state_dict(e4e.state_dict())
    styles = psp.offsets(x)
    codes = e4e.offsets(x)
    torch.testing.assert_close(codes[:, 0], styles[:, 0])
    torch.testing.assert_close(codes[:, 1:], styles[:, :1] + styles[:, 1:])


def test_latent_avg_is_added():
    model, x = encoder("e4e"), torch.randn(1, 3, 64, 64)
    offsets = model.offsets(x)
    model.latent_avg.normal_()
    torch.testing.assert_close(model(x), offsets + model.latent_avg)


def test_single_code_is_one_w_for_all_layers():
    w = encoder("single")(torch.randn(2, 3, 64, 64))
    assert torch.equal(w, w[:, :1].expand_as(w))


def test_a_batch_is_its_faces_one_by_one():
    model, x = encoder("e4e"), torch.randn(3, 3, 64, 64)
    torch.testing.assert_close(model(x), torch.cat([model(f[None]) for f in x]), rtol=1e-4, atol=1e-5)


def test_feature_strides():
    c1, c2, c3 = encoder("e4e").features(torch.randn(1, 3, 64, 64))
    assert [f.shape[-1] for f in (c1, c2, c3)] == [16, 8, 4]
    assert [f.shape[1] for f in (c1, c2, c3)] == [16, 32, 32]


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 3, 32, 32), (1, 1, 64, 64)])
def test_wrong_faces_are_named(shape):
    with pytest.raises(WPlusError, match=r"\[B, 3, 64, 64\]"):
        encoder("e4e")(torch.randn(shape))


@pytest.mark.parametrize("bad", [dict(image_size=100), dict(units=(1, 1)), dict(kind="restyle")])
def test_impossible_configs_are_refused(bad):
    with pytest.raises(WPlusError):
        build_encoder(EncoderConfig(**{**SMALL, **bad}))
