"""Mixing identities: special cases, layers, averages, attributes, sweeps; what a mix says of itself."""

import json

import pytest
import torch
from comfyui_wplus.wplus_core.directions import Direction, Edit, edit
from comfyui_wplus.wplus_core.errors import WPlusError
from comfyui_wplus.wplus_core.identity import Identity
from comfyui_wplus.wplus_core.mixing import (
    batched,
    blend,
    codes_from,
    interpolate,
    move_attributes,
    spaced,
    style_mix,
    sweep,
    sweep_between,
    sweep_edits,
    truncate,
)
from comfyui_wplus.wplus_core.sheets import grid, to_tensor


def identity(name, seed, count=1, layers=18, **kw):
    rng = torch.Generator().manual_seed(seed)
    return Identity(torch.randn(count, layers, 512, generator=rng), name, **kw)


ANNA, BEN, EVE = identity("Anna", 0, provenance={"source": "photo"}), identity("Ben", 1), identity("Eve", 2)
SMILE = Direction("smile", torch.randn(1, 512, generator=torch.Generator().manual_seed(3)), (2, 9))
AGE = Direction("age", torch.randn(18, 512, generator=torch.Generator().manual_seed(4)))


def test_the_ends_of_an_interpolation_are_the_two():
    assert torch.equal(interpolate(ANNA, BEN, 0).w, ANNA.w)
    assert torch.equal(interpolate(ANNA, BEN, 1).w, BEN.w)
    torch.testing.assert_close(interpolate(ANNA, BEN, 0.25).w, 0.75 * ANNA.w + 0.25 * BEN.w)
    torch.testing.assert_close(interpolate(ANNA, BEN, 1.5).w, BEN.w + 0.5 * (BEN.w - ANNA.w))


def test_an_amount_per_layer_group():
    w = interpolate(ANNA, BEN, {"middle": 1.0, "fine": 0.5}).w
    assert torch.equal(w[:, :4], ANNA.w[:, :4]) and torch.equal(w[:, 4:8], BEN.w[:, 4:8])
    torch.testing.assert_close(w[:, 8:], (ANNA.w + BEN.w)[:, 8:] / 2)
    everywhere = interpolate(ANNA, BEN, {"coarse": 0.3, "middle": 0.3, "fine": 0.3})
    torch.testing.assert_close(everywhere.w, interpolate(ANNA, BEN, 0.3).w)


def test_a_style_mix_is_an_interpolation_of_whole_groups():
    torch.testing.assert_close(style_mix(ANNA, BEN, ["coarse", "fine"]).w,
                               interpolate(ANNA, BEN, {"coarse": 1, "fine": 1}).w)  # fmt: skip
    w = style_mix(ANNA, BEN, (3, 5)).w
    assert (w == BEN.w).all(-1)[0].nonzero().flatten().tolist() == [3, 4]
    assert torch.equal(style_mix(ANNA, BEN, "middle").w, style_mix(ANNA, BEN, (4, 8)).w)


def test_a_blend_of_two_is_the_middle():
    torch.testing.assert_close(blend([ANNA, BEN]).w, interpolate(ANNA, BEN, 0.5).w)
    torch.testing.assert_close(blend([ANNA, BEN, EVE], [2, 1, 1]).w, (2 * ANNA.w + BEN.w + EVE.w) / 4)
    several = identity("Ida", 5, count=3)
    torch.testing.assert_close(blend([several]).w, several.w.mean(0, keepdim=True))


def test_a_blend_with_other_weights_for_some_layers():
    w = blend([ANNA, BEN, EVE], [1, 1, 0], {"coarse": [0, 0, 2], "8-9": [0, 3, 1]}).w
    torch.testing.assert_close(w[:, :4], EVE.w[:, :4])
    torch.testing.assert_close(w[:, 8:10], (0.75 * BEN.w + 0.25 * EVE.w)[:, 8:10])
    torch.testing.assert_close(w[:, 10:], (ANNA.w + BEN.w)[:, 10:] / 2)
    torch.testing.assert_close(blend([ANNA, BEN], None, {"all": [1, 3]}).w, interpolate(ANNA, BEN, 0.75).w)


def test_codes_in_a_batch_and_out_again():
    several = identity("Ida", 5, count=3)
    both = batched([ANNA, several])
    assert len(both) == 4 and both.name == "Anna + Ida"
    assert torch.equal(codes_from(both, 0).w, ANNA.w) and torch.equal(codes_from(both, 1, 9).w, several.w)
    assert torch.equal(codes_from(both, 9).w, several.w[2:])


def test_a_code_out_of_a_batch_takes_its_own_photo_and_thumbnail_along():
    photos = [{"file": f"{n}.jpg"} for n in range(3)]
    kept = {"provenance": {"source": "photo", "photos": photos}, "thumbnail": torch.zeros(8, 8, 3, dtype=torch.uint8)}
    several = identity("Ida", 5, count=3, **kept)
    first, second = codes_from(several, 0), codes_from(several, 1, 2)
    assert first.provenance["photos"] == photos[:1] and first.thumbnail is several.thumbnail
    assert second.provenance == {"source": "photo", "photos": photos[1:]} and second.thumbnail is None
    assert codes_from(several, 9).provenance["photos"] == photos[2:] and several.provenance["photos"] == photos
    averaged = identity("Ida", 5, count=3, provenance={"photos": photos, "averaged": 3})  # frames of one person
    assert codes_from(averaged, 1).provenance["photos"] == photos


def test_truncation():
    mean = torch.randn(18, 512)
    known = Identity(ANNA.w, "Anna", average=mean)
    assert torch.equal(truncate(known, 0).w[0], mean)
    torch.testing.assert_close(truncate(known, 1).w, ANNA.w)
    torch.testing.assert_close(truncate(ANNA, 0.7, mean).w, mean + 0.7 * (ANNA.w - mean))
    torch.testing.assert_close(truncate(ANNA, 0.7, mean[0]).w, mean[0] + 0.7 * (ANNA.w - mean[0]))
    fine = truncate(known, {"fine": 0.0}).w
    assert torch.equal(fine[:, 8:], mean[None, 8:]) and torch.allclose(fine[:, :8], ANNA.w[:, :8], atol=1e-6)
    assert truncate(known, 0.7).provenance["edits"] == [{"truncate": 0.7}]
    with pytest.raises(WPlusError, match="does not know the average face"):
        truncate(ANNA, 0.7)
    with pytest.raises(WPlusError, match="average face must be"):
        truncate(ANNA, 0.7, torch.zeros(14, 512))


def coordinates(i, d):
    return (i.w * d.rows(18)).sum(-1)


def test_attributes_move_and_the_rest_stays():
    done = move_attributes(ANNA, BEN, [SMILE, AGE])
    for d in (SMILE, AGE):
        torch.testing.assert_close(coordinates(done, d), coordinates(ANNA, d), rtol=1e-4, atol=1e-3)
    span = torch.stack([SMILE.rows(18), AGE.rows(18)], 2)
    rest = torch.linalg.qr(torch.cat([span, torch.randn(18, 512, 40)], 2))[0]
    other = rest[5, :, 2:]  # orthogonal to both on layer 5
    torch.testing.assert_close(done.w[0, 5] @ other, BEN.w[0, 5] @ other, rtol=1e-4, atol=1e-4)
    assert done.name == "Ben"
    assert done.provenance["edits"] == [{"attributes_of": "Anna", "directions": ["smile", "age"], "amount": 1.0}]


def test_attributes_of_oneself_change_nothing():
    torch.testing.assert_close(move_attributes(ANNA, ANNA, [SMILE, AGE]).w, ANNA.w)
    torch.testing.assert_close(move_attributes(ANNA, BEN, [SMILE], 0.0).w, BEN.w)
    only = move_attributes(ANNA, BEN, [SMILE]).w
    assert (only != BEN.w).any(-1)[0].nonzero().flatten().tolist() == list(range(2, 9))


def test_a_sweep_is_a_batch_of_edits():
    strengths = spaced(-4, 4, 9)
    done, labels = sweep(ANNA, (SMILE, strengths))
    assert len(done) == 9 and labels[0] == "smile -4" and labels[4] == "smile 0" and labels[8] == "smile +4"
    for s, w in zip(strengths, done.w, strict=True):
        assert torch.equal(w[None], edit(ANNA.w, [Edit(SMILE, s)]))
    assert done.provenance["edits"] == [{"sweep": {"smile": strengths}}]


def test_two_axes_are_a_grid_row_by_row():
    done, labels = sweep(ANNA, (SMILE, [-1, 1]), (AGE, [0, 1, 2]))
    assert labels[:4] == ["smile -1, age 0", "smile -1, age +1", "smile -1, age +2", "smile +1, age 0"]
    torch.testing.assert_close(done.w[5:], edit(ANNA.w, [Edit(AGE, 2), Edit(SMILE, 1)]))


def test_a_sweep_of_listed_edits():
    done, labels = sweep_edits(ANNA, [[], [Edit(SMILE, 2)], [Edit(SMILE, 1), Edit(AGE, -1.5)]])
    assert labels == ["", "smile +2", "smile +1, age -1.5"]
    assert torch.equal(done.w[:1], ANNA.w)
    torch.testing.assert_close(done.w[2:], edit(ANNA.w, [Edit(AGE, -1.5), Edit(SMILE, 1)]))
    assert done.provenance["edits"] == [{"sweep": ["", "smile=2", "smile=1 age=-1.5"]}]


def test_labels_leave_the_group_out():
    _, labels = sweep(ANNA, (Direction("interfacegan/smile", SMILE.vector), [1]))
    assert labels == ["smile +1"]


def test_a_sweep_between_two():
    done, labels = sweep_between(ANNA, BEN, 5)
    assert labels == ["0 %", "25 %", "50 %", "75 %", "100 %"]
    assert torch.equal(done.w[:1], ANNA.w) and torch.equal(done.w[4:], BEN.w)
    torch.testing.assert_close(done.w[1:2], interpolate(ANNA, BEN, 0.25).w)


def test_one_code_goes_with_all_of_a_batch():
    several = identity("Ida", 5, count=3)
    assert interpolate(ANNA, several, 0.5).w.shape == (3, 18, 512)
    assert style_mix(several, ANNA, "fine").w.shape == (3, 18, 512)
    with pytest.raises(WPlusError, match="as many codes of both"):
        interpolate(identity("Ivo", 6, count=2), several)


def test_a_mix_says_of_whom_it_was_made():
    done = interpolate(ANNA, BEN, {"fine": 0.5})
    assert done.name == "Anna + Ben"
    assert done.provenance == {
        "source": "mix",
        "mix": {
            "how": "interpolate",
            "amount": {"fine": 0.5},
            "of": [{"name": "Anna", "provenance": {"source": "photo"}}, {"name": "Ben", "provenance": {}}],
        },
    }
    for mix in (done, blend([done, EVE]), style_mix(ANNA, BEN, (0, 4)), sweep_between(ANNA, BEN, 2)[0]):
        json.dumps(mix.provenance)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: interpolate(ANNA, identity("Tom", 1, layers=14)), "different generators"),
        (lambda: blend([ANNA, identity("Tom", 1, layers=14)]), "different generators"),
        (lambda: batched([ANNA, identity("Tom", 1, layers=14)]), "different generators"),
        (lambda: blend([]), "at least one"),
        (lambda: blend([ANNA, BEN], [1]), "expected 2 weights"),
        (lambda: blend([ANNA, BEN], [1, -1]), "sum other than 0"),
        (lambda: blend([ANNA, BEN], None, {"fine": [1]}), "expected 2 weights"),
        (lambda: interpolate(ANNA, BEN, {"top": 1}), "or one of all, coarse, middle, fine; got 'top'"),
        (lambda: interpolate(ANNA, BEN, float("nan")), "finite amounts"),
        (lambda: style_mix(ANNA, BEN, []), "no layers given"),
        (lambda: move_attributes(ANNA, BEN, []), "at least one direction"),
        (lambda: sweep(identity("Ida", 1, count=2), (SMILE, [1])), "starts from one code, got 2"),
        (lambda: sweep(ANNA), "no axis"),
        (lambda: sweep_edits(ANNA, []), "1 to 1024 lists"),
        (lambda: sweep(ANNA, (SMILE, [])), "got 0"),
        (lambda: sweep_between(ANNA, BEN, 0), "1 to 1024 steps"),
        (lambda: spaced(0, float("inf"), 3), "finite"),
    ],
)
def test_wrong_input_is_told(wrong, message):
    with pytest.raises(WPlusError, match=message):
        wrong()


def test_a_grid_places_and_labels_pictures():
    pictures = torch.stack([torch.full((3, 32, 48), n / 6) for n in range(6)])
    sheet = to_tensor(grid(pictures, 3, column_labels="abc", row_labels=["first", "a very long label " * 9]))
    left, top = sheet.shape[2] - 3 * 48, sheet.shape[1] - 2 * 32
    assert top > 10 and 0 < left <= 2 * 48
    for n in range(6):
        y, x = top + n // 3 * 32, left + n % 3 * 48
        assert (sheet[:, y : y + 32, x : x + 48] - n / 6).abs().max() < 0.003
    assert sheet[:, :top].min() < 0.3 and sheet[:, top:, :left].min() < 0.3  # something is written there
    under = to_tensor(grid(pictures, 4, labels=[str(n) for n in range(6)]))
    assert under.shape[2] == 4 * 48 and under.shape[1] > 64
    with pytest.raises(WPlusError, match="expected 6 labels, got 1"):
        grid(pictures, 3, labels=["x"])
    with pytest.raises(WPlusError, match="at least one picture"):
        grid([], 3)
