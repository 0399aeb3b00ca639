"""The editing nodes as ComfyUI calls them: what they make of identities, and what a sweep is to the sampler."""

import base64

import pytest
import torch
from comfyui_wplus.nodes import folders
from comfyui_wplus.nodes.directions import (
    FindDirection,
    GeneratorDirection,
    LoadDirection,
    Orthogonalise,
    SaveDirection,
)
from comfyui_wplus.nodes.edit import EditIdentity, EditStack, MoveAttributes
from comfyui_wplus.nodes.identity import IdentityInfo, PlaceIdentity
from comfyui_wplus.nodes.mix import BatchIdentities, IdentityFromBatch, MixIdentities, StyleMix, Truncate
from comfyui_wplus.nodes.sweep import Grid, Sweep
from comfyui_wplus.wplus_core.direction_files import save_directions
from comfyui_wplus.wplus_core.directions import Direction, Edit, edit
from comfyui_wplus.wplus_core.errors import WPlusError
from comfyui_wplus.wplus_core.finding import pca
from comfyui_wplus.wplus_core.identity import Identity
from comfyui_wplus.wplus_core.mixing import spaced
from comfyui_wplus.wplus_core.stylegan2 import Generator, GeneratorConfig
from safetensors.torch import load
from test_patch import ANNA, BEN, apply, noise, relative, sample

SMILE = Direction("smile", torch.randn(18, 512, generator=torch.Generator().manual_seed(1)), (0, 8))
AGE = Direction("age", torch.randn(18, 512, generator=torch.Generator().manual_seed(2)), (0, 8))
ANNA = Identity(ANNA.w, "Anna", average=torch.zeros(18, 512))


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """The direction folders: models/wplus/directions with smile and age, and output/wplus/directions."""
    models, saved = tmp_path / "models", tmp_path / "output/wplus/directions"
    models.mkdir()
    save_directions([SMILE, AGE], models / "known.safetensors")
    monkeypatch.setattr(folders, "saved_directions", lambda: saved)
    monkeypatch.setattr(folders, "direction_places", lambda: tuple(p for p in (models, saved) if p.is_dir()))
    return models


def out(node, *args, **kw):
    return node.execute(*args, **kw).args[0]


def one_edit(direction, strength, layers="default", **kw):
    return out(EditIdentity, ANNA, direction, strength, layers, kw.pop("keep_plausible", False), **kw)


def stack(edits, keep_plausible=False, **directions):
    return EditStack.execute(ANNA, edits, keep_plausible, directions)


def test_a_chain_of_edits_is_a_stack():
    first = one_edit("known/smile", 2.0)
    assert torch.equal(first.w, edit(ANNA.w, [Edit(SMILE, 2.0)]))
    both = out(EditIdentity, first, "known/age", -1.5, "4-9", False)
    torch.testing.assert_close(stack("smile=2\nage=-1.5@4-9").args[0].w, both.w)
    assert [e["direction"] for e in both.provenance["edits"]] == ["known/smile", "known/age"]


def test_layers_of_an_edit():
    for text, moved in (("default", (0, 8)), ("all", (0, 18)), ("middle", (4, 8)), ("5", (5, 6)), ("Fine", (8, 18))):
        where = (one_edit("known/smile", 1.0, text).w != ANNA.w).any(-1)[0].nonzero().flatten().tolist()
        assert where == list(range(*moved)), text


def test_a_direction_from_a_wire_takes_the_place_of_the_name():
    mine = Direction("smile", torch.randn(18, 512))
    wanted = edit(ANNA.w, [Edit(mine, 1.0)])
    assert torch.equal(one_edit("known/age", 1.0, custom_direction=mine).w, wanted)
    assert torch.equal(one_edit("none", 1.0, custom_direction=mine).w, wanted)  # no file is needed for it
    assert torch.equal(stack("smile=1", direction0=mine).args[0].w, wanted)
    assert torch.equal(stack("known/smile=1", direction0=mine).args[0].w, one_edit("known/smile", 1.0).w)


def test_a_stack_sends_the_browser_the_first_code_that_it_got():
    ui = EditStack.execute(Identity(torch.cat([ANNA.w, BEN.w]), average=ANNA.average), "smile=3", False).ui
    sent = load(base64.b64decode(ui["wplus_identity"][0]))
    assert torch.equal(sent["w"], ANNA.w.half()) and torch.equal(sent["average"], torch.zeros(18, 512).half())
    bare = load(base64.b64decode(EditStack.execute(BEN, "", False).ui["wplus_identity"][0]))
    assert list(bare) == ["w"] and torch.equal(bare["w"], BEN.w.half())


def test_keep_plausible_needs_a_pca_and_then_holds(places):
    with pytest.raises(WPlusError, match="needs a PCA of W in models/wplus/directions"):
        one_edit("known/smile", 2.0, keep_plausible=True)
    generator = Generator(GeneratorConfig.for_size(32, max_channels=16)).eval()
    components = pca(generator, 8, samples=600)
    save_directions(components, places / "pca.safetensors")
    mean = Identity(components[0].origin.expand(1, 18, 512))
    free, held = (EditStack.execute(mean, "smile=400", keep).args[0] for keep in (False, True))
    (kept,) = held.provenance["edits"][0]["kept"]
    assert 0 < kept < 0.9
    torch.testing.assert_close(held.w - mean.w, kept * (free.w - mean.w), rtol=0.01, atol=1e-3)


def test_attributes_move():
    moved = out(MoveAttributes, ANNA, BEN, "smile, age", 1.0)
    for d in (SMILE, AGE):
        torch.testing.assert_close((moved.w * d.rows(18)).sum(-1), (BEN.w * d.rows(18)).sum(-1), rtol=1e-3, atol=1e-2)
    assert torch.equal(out(MoveAttributes, ANNA, ANNA, "smile", 1.0).w, ANNA.w)


def sweep(along, **inputs):
    return Sweep.execute(ANNA, {"along": along, **inputs}).args


def axis(direction="known/smile", start=-2.0, end=2.0, count=5, layers="default", prefix=""):
    values = dict(direction=direction, start=start, end=end, count=count, layers=layers)
    return {f"{prefix}{k}": v for k, v in values.items()}


def test_a_sweep_along_a_direction():
    frames, count, labels, columns, rows = sweep("one direction", **axis())
    assert count == len(frames) == 5 and columns.splitlines() == ["-2", "-1", "0", "+1", "+2"] and rows == "smile"
    assert labels.splitlines()[0] == "smile -2"
    for w, strength in zip(frames.w, spaced(-2, 2, 5), strict=True):
        torch.testing.assert_close(w[None], one_edit("known/smile", strength).w)
    layered = sweep("one direction", **axis(layers="0-3"))[0]
    torch.testing.assert_close(layered.w[4:], one_edit("known/smile", 2.0, "0-3").w)
    wired = sweep("one direction", **axis(), custom_direction=AGE)
    torch.testing.assert_close(wired[0].w[4:], one_edit("known/age", 2.0).w)


def test_a_sweep_along_two_directions_is_a_grid():
    second = axis("known/age", 0.0, 1.0, 2, "all", "second_")
    frames, count, labels, columns, rows = sweep("two directions", **axis(count=3), **second)
    assert count == 6 and columns.splitlines() == ["age 0", "age +1"]
    assert rows.splitlines() == ["smile -2", "smile 0", "smile +2"] and labels.splitlines()[1] == "smile -2, age +1"
    torch.testing.assert_close(frames.w[5:], stack("smile=2 age=1@all").args[0].w)


def test_a_sweep_to_another_identity_and_by_a_list():
    frames, count, labels, *_ = sweep("to another identity", other=BEN, start=0.0, end=1.0, count=3)
    assert count == 3 and torch.equal(frames.w[2:], BEN.w) and labels.splitlines() == ["0 %", "50 %", "100 %"]
    frames, count, labels, *_ = sweep("listed edits", edits="smile=0\n\nsmile=1 age=-1\n")
    assert count == 2 and torch.equal(frames.w[:1], ANNA.w) and labels.splitlines() == ["smile 0", "smile +1, age -1"]
    torch.testing.assert_close(frames.w[1:], stack("age=-1 smile=1").args[0].w)


@pytest.mark.parametrize(
    "along, message",
    [
        (None, "expected along to be one of one direction, two directions, to another identity, listed edits"),
        ({"along": "listed edits", "edits": " \n"}, "1 to 1024 lists of edits, got 0"),
        ({"along": "listed edits", "edits": "smile=1\nsmil=2"}, "no direction 'smil' among the 2 known.*known/smile"),
        ({"along": "one direction", **axis(layers="9-3")}, "expected layers such as 0-7"),
        ({"along": "to another identity", "other": BEN.__class__(torch.zeros(1, 14, 512)), "start": 0.0, "end": 1.0,
          "count": 2}, "different generators"),
    ],
)  # fmt: skip
def test_a_wrong_sweep_is_told(along, message):
    with pytest.raises(WPlusError, match=message):
        Sweep.execute(ANNA, along)


def test_a_grid_of_labelled_pictures():
    pictures = torch.rand(6, 40, 60, 3)
    assert out(Grid, pictures, 3).shape == (1, 80, 180, 3)
    assert out(Grid, pictures, 0).shape == (1, 80, 180, 3)  # about square
    sheet = out(Grid, pictures, 0, column_labels="a\nb", row_labels="one\ntwo\nthree")
    assert sheet.shape[1] > 120 and 120 < sheet.shape[2] < 240
    assert (sheet[0, -40:, -60:] - pictures[5]).abs().max() < 0.003
    with pytest.raises(WPlusError, match="expected 6 labels, got 2"):
        out(Grid, pictures, 3, labels="a\nb")


def test_mixes():
    def mix(weights="", coarse="", middle="", fine=""):
        return out(MixIdentities, {"identity0": ANNA, "identity1": BEN}, weights, coarse, middle, fine).w

    torch.testing.assert_close(mix(), (ANNA.w + BEN.w) / 2)
    torch.testing.assert_close(mix("3, 1")[:, 9], (0.75 * ANNA.w + 0.25 * BEN.w)[:, 9])
    w = mix("1 0", coarse="0 1", fine="1 1")
    torch.testing.assert_close(w[:, :4], BEN.w[:, :4])
    torch.testing.assert_close(w[:, 4:8], ANNA.w[:, 4:8])
    torch.testing.assert_close(w[:, 8:], (ANNA.w + BEN.w)[:, 8:] / 2)
    with pytest.raises(WPlusError, match="coarse: expected numbers such as 1, 0.5, got 'much'"):
        mix(coarse="much")
    with pytest.raises(WPlusError, match="weights: expected numbers such as 1, 0.5, got '1, nan'"):
        mix("1, nan")
    with pytest.raises(WPlusError, match="expected 2 weights"):
        mix("1 2 3")


def test_layers_of_another_and_of_the_average():
    w = out(StyleMix, ANNA, BEN, "coarse, 9-10").w
    assert (w == BEN.w).all(-1)[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 9, 10]
    half = out(Truncate, ANNA, 0.5, "middle").w
    torch.testing.assert_close(half[:, 4:8], ANNA.w[:, 4:8] / 2)
    torch.testing.assert_close(half[:, 8:], ANNA.w[:, 8:])
    torch.testing.assert_close(out(Truncate, ANNA, 0.0, "all").w, torch.zeros(1, 18, 512))
    with pytest.raises(WPlusError, match="does not know the average face"):
        out(Truncate, BEN, 0.5, "all")


def test_identities_in_a_batch_and_out_again():
    batch, count = BatchIdentities.execute({"identity0": ANNA, "identity1": BEN, "identity2": ANNA}).args
    assert count == len(batch) == 3
    assert torch.equal(out(IdentityFromBatch, batch, 1, 1).w, BEN.w)
    assert torch.equal(out(IdentityFromBatch, batch, 1, 9).w, torch.cat([BEN.w, ANNA.w]))


def test_info_tells_codes_distance_and_history():
    text = out(IdentityInfo, one_edit("known/smile", 2.0))
    assert "Anna: 1 code of 18 x 512" in text and "distance from the average face: " in text
    assert '"direction": "known/smile"' in text and "deviations" not in text


def test_a_found_direction_is_cleaned_saved_and_called_by_its_name():
    people = torch.randn(40, 18, 512)
    with_it, without = Identity(people + SMILE.vector), Identity(people - SMILE.vector)
    found, report = FindDirection.execute(with_it, without, "big = grin", "svm", "all", False).args
    assert found.name == "big_grin" and "40 codes with and 40 without, cross-validated accuracy" in report
    assert torch.cosine_similarity(found.vector[0], SMILE.vector.mean(0), 0) > 0.95
    clean = out(Orthogonalise, found, {"other0": out(LoadDirection, "known/age")})
    assert (clean.vector[:8] * AGE.vector[:8]).sum(-1).abs().max() < 1e-4
    before = folders.directions_fingerprint()
    for name, called in (("", "big_grin"), ("", "big_grin_2"), ("mine/grin", "mine/grin")):
        SaveDirection.execute(clean, name)
        torch.testing.assert_close(stack(f"{called}=2").args[0].w, edit(ANNA.w, [Edit(clean, 2.0)]))
    assert folders.directions_fingerprint() != before and "mine/grin" in folders.direction_names()
    with pytest.raises(WPlusError, match="leads out of directions"):
        SaveDirection.execute(clean, "../grin")


def test_directions_of_a_generator():
    class Encoder:
        @staticmethod
        def load_generator():
            torch.manual_seed(5)
            return Generator(GeneratorConfig.for_size(32, max_channels=16)).eval()

    for method in ("pca", "sefa"):
        d = out(GeneratorDirection, Encoder, method, 2, "2-4")
        assert d.layers == (2, 5) and d.name.endswith("_2")
        step = edit(torch.zeros(1, 8, 512), [Edit(d, 1.0)])
        assert step.norm().item() == pytest.approx(18**0.5, rel=1e-4)


def test_without_files_there_is_something_to_choose(places):
    (places / "known.safetensors").unlink()
    assert folders.direction_names() == ["none"]
    with pytest.raises(WPlusError, match="no direction files were found"):
        one_edit("none", 1.0)


# What a sweep is to the sampler


@pytest.mark.parametrize("negative", ["zeros", "average face"])
def test_weights_by_frame_are_the_weights_of_single_runs(model, adapter, negative):
    placed = out(PlaceIdentity, ANNA, 0.5, None, "0, 1 2")
    frames = sample(apply(model, adapter, placed, negative=negative), noise(3, same=True))
    assert relative(frames[:1], sample(model, noise())) < 1e-5
    for frame, weight in zip(frames, (0.0, 0.5, 1.0), strict=True):
        alone = sample(apply(model, adapter, ANNA, weight=weight, negative=negative), noise())
        assert relative(frame[None], alone) < 1e-5
    assert relative(frames[1:2], frames[2:]) > 1e-3


def test_weights_by_frame_beside_another_person(model, adapter):
    people = out(PlaceIdentity, ANNA, 1.0, None, "0 1"), BEN
    frames = sample(apply(model, adapter, *people), noise(2, same=True))
    assert relative(frames[:1], sample(apply(model, adapter, BEN), noise())) < 1e-5
    assert relative(frames[1:], sample(apply(model, adapter, ANNA, BEN), noise())) < 1e-5
