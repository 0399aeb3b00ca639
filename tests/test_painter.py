"""The quick previews against the generator whose pictures they are."""

import pytest
import torch
from comfyui_wplus.wplus_core.errors import WPlusError
from comfyui_wplus.wplus_core.painter import Painter, Stopped, quick_dtype
from comfyui_wplus.wplus_core.stylegan2 import Generator, GeneratorConfig

SMALL = GeneratorConfig(channels=(16, 16, 12, 8), w_dim=16, mapping_layers=2)  # 32 px, 8 layers


@pytest.fixture
def generator():
    g = Generator(SMALL).requires_grad_(False)
    for name, x in g.named_parameters():
        if name.endswith(("noise.weight", "bias")):
            x.copy_(0.3 * torch.randn_like(x))
    return g


@pytest.fixture
def w():
    return torch.randn(SMALL.layers, 16)


@pytest.mark.parametrize("size", [4, 8, 16, 32])
def test_it_paints_the_generators_picture(generator, w, size):
    expected = generator(w[None], max_resolution=size)[0]
    torch.testing.assert_close(Painter(generator, dtype=torch.float32).paint(w, size), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_close_enough_to_look_the_same(generator, w):
    """PSNR of at least 38 dB, where a contrast of 2 is a picture's whole range."""
    exact, quick = (Painter(generator, dtype=dtype).paint(w, 32) for dtype in (torch.float32, torch.bfloat16))
    contrast = exact.max() - exact.min()
    assert not torch.equal(exact, quick)
    assert 10 * torch.log10(contrast.square() / (exact - quick).square().mean()) > 38


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_from_the_last_picture_changes_no_bit(generator, w, dtype):
    kept = Painter(generator, dtype=dtype)
    kept.paint(w, 32)
    for layer in range(SMALL.layers):
        w = w.clone()
        w[layer] += 1
        for size in (16, 32):
            assert torch.equal(kept.paint(w, size), Painter(generator, dtype=dtype).paint(w, size)), layer


@pytest.mark.parametrize("first, again", [(0, 4), (1, 4), (2, 3), (3, 3), (4, 2), (6, 1), (7, 1)])
def test_only_resolutions_from_the_first_changed_layer_on_are_painted_again(generator, w, first, again, monkeypatch):
    painter = Painter(generator)
    painter.paint(w, 32)
    stages, stage = [], painter.stage
    monkeypatch.setattr(painter, "stage", lambda j, w: stages.append(j) or stage(j, w))
    painter.paint(torch.cat([w[:first], w[first:] + 1]), 32)
    assert stages == list(range(4))[-again:]


def test_a_finer_picture_of_the_same_code_goes_on_from_the_coarser(generator, w, monkeypatch):
    painter = Painter(generator)
    painter.paint(w, 16)
    stages, stage = [], painter.stage
    monkeypatch.setattr(painter, "stage", lambda j, w: stages.append(j) or stage(j, w))
    painter.paint(w, 32)
    assert stages == [3]


def test_an_unwanted_picture_stops_and_the_next_is_right(generator, w):
    painter, asked = Painter(generator, dtype=torch.float32), []
    with pytest.raises(Stopped):
        painter.paint(w, 32, lambda: len(asked) == 2 or asked.append(None))
    expected = Painter(generator, dtype=torch.float32).paint(w, 32)
    assert torch.equal(painter.paint(w, 32), expected)


def test_sizes_are_powers_of_two_up_to_its_own(generator, w):
    assert Painter(generator, size=20).paint(w, 256).shape == (3, 16, 16)
    assert Painter(generator, size=256).paint(w, 31).shape == (3, 16, 16)


def test_it_shares_no_memory_with_the_generator(generator, w):
    painter = Painter(generator, dtype=torch.float32)
    before = painter.paint(w, 32).clone()
    for x in (*generator.parameters(), *generator.buffers()):
        x.zero_()
    assert torch.equal(painter.paint(w, 32), before)
    painter.done.clear()
    assert torch.equal(painter.paint(w, 32), before)


def test_wrong_codes_are_named(generator):
    with pytest.raises(WPlusError, match=r"32 px generator reads codes of shape \[8, 16\], got \[7, 16\]"):
        Painter(generator).paint(torch.zeros(7, 16), 32)


def test_the_quick_dtype_is_one_of_two():
    assert quick_dtype() in (torch.float32, torch.bfloat16)
