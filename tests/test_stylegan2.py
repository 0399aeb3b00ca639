"""StyleGAN2 against its paper's formulas, and what its options must mean."""

import pytest
import torch
import torch.nn.functional as F
from comfyui_wplus.wplus_core.errors import WPlusError
from comfyui_wplus.wplus_core.stylegan2 import (
    Generator,
    GeneratorConfig,
    ModulatedConv,
    blur,
    blur_kernel,
    truncate,
    upsample,
)

SMALL = GeneratorConfig(channels=(12, 12, 8, 4), w_dim=16, mapping_layers=2)


@pytest.fixture
def generator():
    torch.manual_seed(0)
    g = Generator(SMALL).requires_grad_(False)
    for name, x in g.named_parameters():
        if name.endswith("noise.weight"):
            x.fill_(0.3)
    return g


@pytest.mark.parametrize("size, layers", [(256, 14), (512, 16), (1024, 18)])
def test_layers_for_a_size(size, layers):
    config = GeneratorConfig.for_size(size)
    assert (config.size, config.layers) == (size, layers)


def test_ffhq_channels():
    assert GeneratorConfig.for_size(1024).channels == (512, 512, 512, 512, 512, 256, 128, 64, 32)


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("demodulate", [False, True])
def test_scaling_features_equals_scaling_weights(up, demodulate):
    """Equations 1-3 of the paper, literally: weights per sample, convolved one sample at a time."""
    torch.manual_seed(0)
    conv = ModulatedConv(5, 7, 3, 16, up, demodulate)
    x, w = torch.randn(3, 5, 6, 6), torch.randn(3, 16)
    weight = conv.scale * conv.weight * conv.modulation(w)[:, None, :, None, None]
    if demodulate:
        weight = weight / (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
    outs = []
    for xi, wi in zip(x, weight, strict=True):
        if up:
            y = F.conv_transpose2d(xi[None], wi.transpose(0, 1), stride=2)
            outs.append(blur(y, blur_kernel(4), (1, 1)))
        else:
            outs.append(F.conv2d(xi[None], wi, padding=1))
    torch.testing.assert_close(conv(x, w), torch.cat(outs), rtol=1e-4, atol=1e-5)


def test_upsampling_keeps_a_constant_picture_inside():
    x = torch.full((1, 3, 8, 8), 2.5)
    y = upsample(x, blur_kernel(4))
    assert y.shape == (1, 3, 16, 16)
    torch.testing.assert_close(y[..., 2:-2, 2:-2], torch.full((1, 3, 12, 12), 2.5))


def test_a_batch_is_its_pictures_one_by_one(generator):
    w = torch.randn(3, SMALL.layers, 16)
    alone = torch.cat([generator(x[None]) for x in w])
    torch.testing.assert_close(generator(w), alone, rtol=1e-4, atol=1e-5)


def test_one_w_is_the_same_w_on_every_layer(generator):
    w = torch.randn(2, 16)
    assert torch.equal(generator(w), generator(w[:, None].expand(-1, SMALL.layers, -1)))


def test_each_layer_of_w_matters_once(generator):
    w = torch.randn(1, SMALL.layers, 16)
    picture = generator(w)
    for i in range(SMALL.layers):
        changed = w.clone()
        changed[:, i] += 1
        assert not torch.equal(generator(changed), picture), f"layer {i} changes nothing"


def test_stopping_early_ignores_the_finer_layers(generator):
    w = torch.randn(1, SMALL.layers, 16)
    finer = w.clone()
    finer[:, 6:] += 1
    preview = generator(w, max_resolution=16)
    assert preview.shape == (1, 3, 16, 16)
    assert torch.equal(preview, generator(finer, max_resolution=16))
    assert torch.equal(generator(w, max_resolution=31), preview)
    assert torch.equal(generator(w, max_resolution=4096), generator(w))


def test_noise(generator):
    w = torch.randn(1, SMALL.layers, 16)
    fixed = generator(w)
    assert torch.equal(generator(w), fixed)
    given = generator.noise_maps("fixed")
    assert torch.equal(generator(w, noise=given), fixed)
    assert not torch.equal(generator(w, noise="none"), fixed)
    one, again, other = (generator(w, noise="random", generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    with pytest.raises(WPlusError, match=r"sides \[4, 8, 8, 16, 16, 32, 32\]"):
        generator(w, noise=given[:-1])
    with pytest.raises(WPlusError, match='"fixed"'):
        generator(w, noise="loud")


def test_mapping_ignores_the_length_of_z(generator):
    z = torch.randn(2, 16)
    torch.testing.assert_close(generator.mapping(z), generator.mapping(5 * z), rtol=1e-4, atol=1e-6)


def test_mean_w_is_seeded_and_near_the_mean_of_others(generator):
    assert torch.equal(generator.mean_w(500, seed=3), generator.mean_w(500, seed=3))
    many = generator.mapping(torch.randn(4000, 16))
    assert (generator.mean_w(4000) - many.mean(0)).norm() < 0.1 * many.std(0).norm()


def test_truncation():
    w, avg = torch.randn(2, 4, 16), torch.randn(16)
    torch.testing.assert_close(truncate(w, avg, 1.0), w)
    torch.testing.assert_close(truncate(w, avg, 0.0), avg.expand_as(w))
    torch.testing.assert_close(truncate(truncate(w, avg, 0.5), avg, 0.5), truncate(w, avg, 0.25))


@pytest.mark.parametrize("shape", [(2, 15), (2, 7, 16), (8, 8, 8)])
def test_wrong_codes_are_named(generator, shape):
    with pytest.raises(WPlusError, match=r"32 px generator reads codes of shape \[B, 16\] or \[B, 8, 16\]"):
        generator(torch.randn(shape))


def test_impossible_sizes_are_refused():
    for size in (4, 100):
        with pytest.raises(WPlusError, match="power of two"):
            GeneratorConfig.for_size(size)
