"""The adapter's maths: folded = reference, and what several identities, masks and scales must mean."""

import pytest
import torch
from comfyui_wplus.wplus_core.adapter import (
    AdapterConfig,
    MappingNetwork,
    ResidualCrossAttention,
    WPlusAdapter,
    add_folded,
    default_splits,
    fold_attention,
    pixel_weights,
)
from comfyui_wplus.wplus_core.errors import WPlusError
from hypothesis import given
from hypothesis import strategies as st

SMALL = AdapterConfig(channels=(16, 32), splits=(1, 2, 4), w_dim=8, token_dim=24, heads=4)


@pytest.fixture
def adapter():
    torch.manual_seed(0)
    return WPlusAdapter(SMALL).requires_grad_(False)


def relative(x, y):
    return ((x.double() - y.double()).norm() / y.double().norm()).item()


@given(
    batch=st.integers(1, 3),
    pixels=st.integers(1, 9),
    tokens=st.integers(1, 5),
    heads=st.sampled_from([1, 2, 8]),
    width=st.sampled_from([1, 5]),
    context=st.sampled_from([3, 16]),
    shared=st.booleans(),
)
def test_folded_is_the_reference_form_for_any_shape(batch, pixels, tokens, heads, width, context, shared):
    torch.manual_seed(batch + 10 * pixels)
    layer = ResidualCrossAttention(heads * width, context, heads)
    h = torch.randn(batch, pixels, heads * width)
    t = torch.randn(1 if shared else batch, tokens, context)
    a, m = fold_attention(layer.to_q.weight, layer.to_k.weight, layer.to_v.weight, t, heads)
    expected = h + layer(h, t.expand(batch, -1, -1))
    torch.testing.assert_close(add_folded(h, a, m, tokens, heads), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "dtype, bound",
    [(torch.float64, 1e-6), (torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)],
)
def test_folded_in_the_hidden_states_dtype(adapter, dtype, bound):
    h, w = torch.randn(2, 50, 32), torch.randn(2, 4, 8)
    expected = adapter.residual(adapter.mapping(w)).add(h, 1)
    folded = adapter.fold(w).to(dtype=dtype).add(h.to(dtype), 1)
    assert folded.dtype == dtype
    assert relative(folded, expected) < bound


def test_the_folded_forms_gradients_are_the_reference_forms(adapter):
    """Of all weights, the code and what comes before, with a scale for each row."""
    adapter.requires_grad_(True)
    h, w = torch.randn(3, 50, 32, requires_grad=True), torch.randn(3, 4, 8, requires_grad=True)
    scale, goal = torch.tensor([1.0, 0.5, 0.0])[:, None, None], torch.randn(3, 50, 32)
    layer = adapter.layers[1]
    wanted = [h, w, layer.to_q.weight, layer.to_k.weight, layer.to_v.weight, *adapter.mapping.parameters()]
    tokens = adapter.mapping(w)
    forms = adapter.residual(tokens, scale), adapter.fold_tokens(tokens).scaled([scale, scale])
    reference, folded = (torch.autograd.grad((f.add(h, 1) * goal).sum(), wanted, retain_graph=True) for f in forms)
    for x, y in zip(folded, reference, strict=True):
        assert y.norm() > 0 and relative(x, y) < 1e-5


def test_weights_in_half_precision_are_folded_in_float32(adapter):
    w = torch.randn(1, 4, 8)
    folded = adapter.half().fold(w)
    assert folded.layers[0][0].dtype == torch.float32
    assert adapter.mapping(w.half()).dtype == torch.float32


@pytest.mark.parametrize("form", ["reference", "scaled", "weight"])
def test_scale_zero_is_the_plain_model_bit_for_bit(adapter, form):
    h, w = torch.randn(2, 50, 16), torch.randn(2, 4, 8)
    out = {
        "reference": lambda: adapter.residual(adapter.mapping(w), 0.0).add(h, 0),
        "scaled": lambda: adapter.fold(w).scaled(0).add(h, 0),
        "weight": lambda: adapter.fold(w).add(h, 0, torch.zeros(1, 1, 1)),
    }[form]()
    assert torch.equal(out, h)
    assert not torch.equal(adapter.fold(w).add(h, 0), h)


def test_a_scale_is_a_weight_is_a_multiple_of_the_residual(adapter):
    h, w = torch.randn(2, 50, 16), torch.randn(2, 4, 8)
    fold = adapter.fold(w)
    expected = h + 0.7 * (fold.add(h, 0) - h)
    torch.testing.assert_close(fold.scaled(0.7).add(h, 0), expected)
    torch.testing.assert_close(fold.add(h, 0, torch.full((1, 1, 1), 0.7)), expected)


def test_layer_weights_reach_their_layer(adapter):
    h, w = torch.randn(1, 5, 32), torch.randn(1, 4, 8)
    fold = adapter.fold(w).scaled([0, 0.5])
    assert torch.equal(fold.add(h[..., :16], 0), h[..., :16])
    torch.testing.assert_close(fold.add(h, 1), adapter.fold(w).scaled(0.5).add(h, 1))
    with pytest.raises(WPlusError, match="2 layers, got 3"):
        fold.scaled([1, 1, 1])


def test_identities_side_by_side_with_disjoint_masks_are_each_alone_inside_its_mask(adapter):
    h, w = torch.randn(3, 64, 16), torch.randn(2, 4, 8)
    anna, ben = adapter.fold(w[:1]), adapter.fold(w[1:])
    left = torch.zeros(8, 8)
    left[:, :4] = 1
    out = anna.beside(ben).add(h, 0, pixel_weights(torch.stack([left, 1 - left]), (8, 8)))
    inside = left.flatten().bool()
    torch.testing.assert_close(out[:, inside], anna.add(h, 0)[:, inside])
    torch.testing.assert_close(out[:, ~inside], ben.add(h, 0)[:, ~inside])


def test_identities_side_by_side_add_up(adapter):
    h, w = torch.randn(2, 20, 16), torch.randn(3, 4, 8)
    a, b, c = (adapter.fold(w[i : i + 1]) for i in range(3))
    expected = h + 0.5 * (a.add(h, 0) - h) + (b.add(h, 0) - h) + 2 * (c.add(h, 0) - h)
    torch.testing.assert_close(a.scaled(0.5).beside(b, c.scaled(2)).add(h, 0), expected)
    assert a.beside(b, c).identities == 3


def test_a_batch_of_identities_is_each_alone(adapter):
    h, w = torch.randn(3, 20, 16), torch.randn(3, 4, 8)
    together = adapter.fold(w).add(h, 0)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], adapter.fold(w[i : i + 1]).add(h[i : i + 1], 0))


def test_rows_repeat_and_reorder_a_batch(adapter):
    h, w = torch.randn(4, 20, 16), torch.randn(2, 4, 8)
    index = torch.tensor([1, 0, 0, 1])
    torch.testing.assert_close(adapter.fold(w).rows(index).add(h, 0), adapter.fold(w[index]).add(h, 0))


def test_side_by_side_needs_equal_batches(adapter):
    two, three = adapter.fold(torch.randn(2, 4, 8)), adapter.fold(torch.randn(3, 4, 8))
    with pytest.raises(WPlusError, match=r"\[2, 3\]"):
        two.beside(three)
    assert adapter.fold(torch.randn(1, 4, 8)).beside(three).batch == 3


def test_masks_that_sum_to_one_still_do_at_every_layer():
    masks = torch.rand(3, 64, 48)
    masks /= masks.sum(0)
    for size in ((64, 48), (32, 24), (7, 5), (96, 100)):
        weights = pixel_weights(masks, size)
        assert weights.shape == (1, size[0] * size[1], 3)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, size[0] * size[1]))


def test_the_unconditional_tokens_are_the_norms_bias():
    mapping = MappingNetwork(SMALL)
    torch.nn.init.normal_(mapping.norm.bias)
    tokens = mapping(torch.zeros(2, 4, 8))
    torch.testing.assert_close(tokens, mapping.norm.bias.expand(2, 3, 24))


def test_each_token_reads_its_own_layers_of_w():
    mapping, w = MappingNetwork(SMALL), torch.randn(1, 4, 8)
    changed = w.clone()
    changed[:, 2:] += 1
    same = (mapping(w) == mapping(changed)).all(-1)[0]
    assert same.tolist() == [True, True, False]


def test_mapping_is_float32_under_autocast():
    mapping, w = MappingNetwork(SMALL), torch.randn(1, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mapping(w), mapping.float()(w))


@pytest.mark.parametrize("shape", [(4, 8), (1, 5, 8), (1, 4, 7)])
def test_wrong_codes_are_named(shape):
    with pytest.raises(WPlusError, match=r"\[B, 4, 8\]"):
        MappingNetwork(SMALL)(torch.randn(shape))


def test_sd1_sizes():
    with torch.device("meta"):
        adapter = WPlusAdapter(AdapterConfig())
    assert sum(x.numel() for x in adapter.mapping.parameters()) == 7_079_424
    assert sum(x.numel() for x in adapter.layers.parameters()) == 31_559_680
    assert len(adapter.layers) == 16


def test_one_identity_stays_under_two_megabytes_in_half_precision():
    torch.manual_seed(0)
    fold = WPlusAdapter(AdapterConfig()).fold(torch.randn(1, 18, 512)).to(dtype=torch.float16)
    assert fold.nbytes == 2 * 2 * 32 * sum(AdapterConfig.channels)
    assert fold.nbytes < 2e6


@pytest.mark.parametrize("layers, splits", [(18, (4, 8, 12, 18)), (14, (4, 8, 12, 14)), (10, (2, 5, 8, 10))])
def test_default_splits(layers, splits):
    assert default_splits(layers) == splits
    assert AdapterConfig(splits=splits).w_layers == layers


def test_impossible_sizes_are_refused():
    with pytest.raises(WPlusError, match="multiple of 8 heads"):
        AdapterConfig(channels=(12,))
    with pytest.raises(WPlusError, match="splits must increase"):
        AdapterConfig(splits=(4, 4, 8))
