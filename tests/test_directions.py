"""Editing directions: steps, layer ranges and GANSpace's target rule."""

import pytest
import torch
from comfyui_wplus.wplus_core.directions import Direction
from comfyui_wplus.wplus_core.errors import WPlusError


def direction(**kw):
    torch.manual_seed(0)
    return Direction("smile", torch.randn(1, 512), **kw)


def test_an_edit_and_its_negative_undo_each_other():
    d, w = direction(layers=(2, 7)), torch.randn(3, 18, 512)
    torch.testing.assert_close(d.move(d.move(w, 2.5), -2.5), w, rtol=1e-6, atol=1e-6)


def test_only_the_named_layers_move():
    d, w = direction(layers=(2, 7)), torch.randn(1, 18, 512)
    moved = (d.move(w, 1.0) != w).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == list(range(2, 7))


def test_a_step_per_layer():
    d, w = Direction("age", torch.randn(18, 512)), torch.randn(2, 18, 512)
    torch.testing.assert_close(d.move(w, -0.5), w - 0.5 * d.vector)


def test_a_target_is_reached_and_stays_reached():
    """The coordinate is read from layer 0, so an edit that moves layer 0 arrives at its strength, once."""
    d, w = direction(origin=torch.randn(512)), torch.randn(2, 18, 512)
    once = d.move(w, 3.0)
    reached = (once[:, 0] - d.origin) @ d.vector[0] / d.vector[0].square().sum()
    torch.testing.assert_close(reached, torch.full((2,), 3.0))
    torch.testing.assert_close(d.move(once, 3.0), once, rtol=1e-5, atol=1e-4)


def test_codes_of_another_generator_are_refused():
    with pytest.raises(WPlusError, match="same generator"):
        Direction("age", torch.randn(18, 512)).move(torch.randn(1, 14, 512), 1)


@pytest.mark.parametrize("bad", [torch.randn(512), torch.tensor([[float("nan")] * 512]), torch.zeros(1, 512).long()])
def test_bad_vectors_are_refused(bad):
    with pytest.raises(WPlusError, match="smile"):
        Direction("smile", bad)


@pytest.mark.parametrize("layers", [(3, 3), (-1, 2)])
def test_bad_layers_are_refused(layers):
    with pytest.raises(WPlusError, match=r"\[first, end\)"):
        direction(layers=layers)
