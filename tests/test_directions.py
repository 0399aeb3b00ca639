"""Editing directions: one strength for all, stacks, undoing, orthogonal pairs, plausible codes, files and names."""

import json
import logging
import math
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_wplus.wplus_core import direction_commands
from comfyui_wplus.wplus_core.checkpoints import load_identity, save_identity, save_reference_generator
from comfyui_wplus.wplus_core.direction_files import (
    Collection,
    load_collection,
    load_directions,
    load_spread,
    parse_edits,
    save_directions,
    spread_of,
)
from comfyui_wplus.wplus_core.directions import (
    Direction,
    Edit,
    edit,
    edit_identity,
    format_layers,
    orthogonalise,
    parse_layers,
)
from comfyui_wplus.wplus_core.errors import FileError, WPlusError
from comfyui_wplus.wplus_core.identity import Identity
from comfyui_wplus.wplus_core.plausible import Spread
from comfyui_wplus.wplus_core.stylegan2 import Generator, GeneratorConfig
from PIL import Image

DATA = Path(__file__).parents[2] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"REAL CODES AND DIRECTIONS NOT FOUND at {DATA}")


def direction(name="smile", rows=1, seed=0, **kw):
    return Direction(name, torch.randn(rows, 512, generator=torch.Generator().manual_seed(seed)), **kw)


@pytest.fixture(scope="module")
def real():
    return load_collection(DATA / "directions")


@pytest.fixture(scope="module")
def photos():
    return torch.cat([load_identity(p).w for p in sorted((DATA / "codes").glob("*.pth"))])


def random_spread(count=20):
    torch.manual_seed(5)
    basis = torch.linalg.qr(torch.randn(512, count))[0].T
    return Spread(torch.randn(512), basis, torch.linspace(3, 0.4, count))


# One direction


def test_an_edit_and_its_negative_undo_each_other():
    d, w = direction(layers=(2, 7)), torch.randn(3, 18, 512)
    torch.testing.assert_close(d.move(d.move(w, 2.5), -2.5), w, rtol=1e-6, atol=1e-6)


def test_only_the_named_layers_move():
    d, w = direction(layers=(2, 7)), torch.randn(1, 18, 512)
    moved = (d.move(w, 1.0) != w).any(-1)[0]
    assert moved.nonzero().flatten().tolist() == list(range(2, 7))


def test_a_step_per_layer():
    d, w = direction(rows=18), torch.randn(2, 18, 512)
    torch.testing.assert_close(d.move(w, -0.5), w - 0.5 * d.vector)


def test_a_target_is_reached_and_stays_reached():
    """The coordinate is read from layer 0, so an edit that moves layer 0 arrives at its strength, once."""
    d, w = direction(origin=torch.randn(512)), torch.randn(2, 18, 512)
    once = d.move(w, 3.0)
    reached = (once[:, 0] - d.origin) @ d.vector[0] / d.vector[0].square().sum()
    torch.testing.assert_close(reached, torch.full((2,), 3.0))
    torch.testing.assert_close(d.move(once, 3.0), once, rtol=1e-5, atol=1e-4)


def test_a_target_direction_at_a_strength_is_a_step():
    """Strength 0 changes nothing; only the raw number is a target."""
    d, w = direction(origin=torch.randn(512)), torch.randn(2, 18, 512)
    assert torch.equal(edit(w, [Edit(d, 0.0)]), w)
    assert not torch.allclose(d.move(w, 0.0), w)
    torch.testing.assert_close(edit(w, [Edit(d, 2.0)]), w + 2 * d.unit * d.vector)


@pytest.mark.parametrize("layers", [None, (0, 8), (4, 5), (8, 18), parse_layers("all"), parse_layers("fine")])
@pytest.mark.parametrize("scale", [0.3, 1.0, 20.0])
def test_strength_one_goes_as_far_whatever_the_file_holds(layers, scale):
    for rows in (1, 18):
        d = Direction("x", scale * torch.randn(rows, 512), layers)
        assert Edit(d, 1.0).step(torch.zeros(1, 18, 512)).norm().item() == pytest.approx(math.sqrt(18), rel=1e-5)


def test_a_negative_unit_turns_the_strength_and_leaves_the_raw_number():
    d = direction(unit=-2.0)
    w = torch.randn(1, 18, 512)
    torch.testing.assert_close(edit(w, [Edit(d, 1.0)]), w - 2 * d.vector)
    torch.testing.assert_close(d.move(w, 1.0), w + d.vector)


def test_codes_of_another_generator_are_refused():
    w = torch.randn(1, 14, 512)
    for d in (direction(rows=18), direction(layers=(14, 18))):
        with pytest.raises(WPlusError, match="same generator"):
            d.move(w, 1)
    with pytest.raises(WPlusError, match="same generator"):
        direction().move(torch.randn(1, 14, 256), 1)


@pytest.mark.parametrize(
    "bad",
    [torch.randn(512), torch.tensor([[float("nan")] * 512]), torch.zeros(1, 512).long(), torch.zeros(1, 512)],
)
def test_bad_vectors_are_refused(bad):
    with pytest.raises(WPlusError, match="smile"):
        Direction("smile", bad)


@pytest.mark.parametrize("layers", [(3, 3), (-1, 2)])
def test_bad_layers_are_refused(layers):
    with pytest.raises(WPlusError, match=r"\[first, end\)"):
        direction(layers=layers)
    with pytest.raises(WPlusError, match=r"\[first, end\)"):
        Edit(direction(), 1, layers)


@pytest.mark.parametrize("bad", [{"unit": 0.0}, {"unit": math.nan}, {"usual": (3, -3)}, {"usual": (0, math.inf)}])
def test_a_scale_that_makes_no_sense_is_refused(bad):
    with pytest.raises(WPlusError, match="unit other than 0 and a range"):
        direction(**bad)


def test_a_strength_must_be_finite():
    with pytest.raises(WPlusError, match="finite"):
        Edit(direction(), math.nan)


# Stacks


def stack():
    target = direction("c", seed=3, origin=torch.randn(512), layers=(0, 8))
    return [
        Edit(direction("a", seed=1), 1.5),
        Edit(direction("b", 18, seed=2), -2.0, (3, 9)),
        Edit(target, 4.0, raw=True),
    ]


def test_the_order_of_edits_does_not_matter():
    w, edits = torch.randn(2, 18, 512), stack()
    for other in (edits[::-1], edits[1:] + edits[:1]):
        torch.testing.assert_close(edit(w, edits), edit(w, other), rtol=0, atol=2e-6)


def test_a_stack_is_the_sum_of_its_steps():
    w, edits = torch.randn(2, 18, 512), stack()
    torch.testing.assert_close(edit(w, edits) - w, sum(edit(w, [e]) - w for e in edits), rtol=0, atol=1e-5)
    assert torch.equal(edit(w, []), w)


def test_edits_are_noted_in_the_identity():
    before = Identity(torch.randn(1, 18, 512), "Anna", {"source": "photo"})
    once = edit_identity(before, [Edit(direction(unit=4.0, layers=(0, 8)), 2.0)])
    twice = edit_identity(once, [Edit(direction("age"), -3.0, (2, 4), raw=True)])
    assert twice.provenance == {
        "source": "photo",
        "edits": [
            {"direction": "smile", "strength": 2.0, "raw": 8.0, "layers": [0, 8]},
            {"direction": "age", "raw": -3.0, "layers": [2, 4]},
        ],
    }
    assert json.loads(json.dumps(twice.provenance)) == twice.provenance and before.provenance == {"source": "photo"}


# Orthogonal directions


@pytest.mark.parametrize("rows", [(1, 1, 1), (18, 1, 18), (1, 18, 18)])
def test_an_orthogonal_direction_has_no_share_in_the_others(rows):
    d, *others = (direction(n, r, i, layers=(0, 8)) for i, (n, r) in enumerate(zip("abc", rows, strict=True)))
    left = orthogonalise(d, others)
    for o in others:
        dots = (left.vector.double() * o.vector.double()).sum(-1)
        assert dots.abs().max() < 1e-6 * left.vector.norm() * o.vector.norm()
    assert left.layers == (0, 8) and "orthogonal to b, c" in left.source
    w = torch.zeros(1, 18, 512)
    assert Edit(left, 1.0).step(w).norm() == pytest.approx(Edit(d, 1.0).step(w).norm().item(), rel=1e-4)


def test_what_is_orthogonal_already_stays():
    e = torch.eye(512)
    d = orthogonalise(Direction("x", e[:1], unit=-2.0), [Direction("y", e[1:2]), Direction("y again", e[1:2])])
    torch.testing.assert_close(d.vector, e[:1])
    assert d.unit == pytest.approx(-2.0)


def test_nothing_left_is_an_error_and_little_a_warning(caplog):
    e = torch.eye(512)
    d = Direction("smile", e[:1])
    with pytest.raises(WPlusError, match="nothing is left of 'smile' without age"):
        orthogonalise(d, [Direction("age", -2 * e[:1])])
    orthogonalise(d, [Direction("age", e[:1] + 0.1 * e[1:2])])
    assert "10 % of smile is left without age" in caplog.text


# Plausible codes


def test_whitened_codes_of_w_are_at_distance_one():
    s = random_spread(512)
    w = s.mean + (torch.randn(64, 18, 512) * s.std) @ s.basis
    assert s.distance(w).mean().item() == pytest.approx(1, abs=0.01)
    assert s.distance(s.mean.expand(1, 18, -1)).max() == 0


def test_edits_are_held_at_the_limit_and_keep_their_direction():
    s, w = random_spread(), None
    w = s.mean + 0.3 * torch.randn(3, 18, 512)
    after = edit(w, [Edit(direction(layers=(2, 9)), 20.0)])
    held, kept = s.hold(w, after, 1.75)
    assert (kept > 0).all() and (kept < 1).all()
    torch.testing.assert_close(s.distance(held).amax(1), torch.full((3,), 1.75), rtol=1e-4, atol=0)
    torch.testing.assert_close(held - w, kept[:, None, None] * (after - w), rtol=1e-4, atol=1e-5)
    small = edit(w, [Edit(direction(), 0.1)])
    same, all_of_it = s.hold(w, small)
    assert torch.equal(same, small) and (all_of_it == 1).all()
    assert torch.equal(s.hold(w, w)[0], w)


def test_a_code_beyond_the_limit_may_come_back_but_not_go_further():
    s = random_spread()
    w = s.mean + torch.zeros(1, 18, 512)
    w[:, 4] += 300 * s.basis[0]
    assert s.hold(w, s.mean.expand_as(w))[1].item() == 1
    further = w.clone()
    further[:, 4] += s.basis[0]
    assert s.hold(w, further)[1].item() == pytest.approx(0, abs=1e-6)


def test_what_was_held_is_logged_and_noted(caplog):
    s = random_spread()
    identity = Identity(s.mean.expand(2, 18, -1), "Anna")
    with caplog.at_level(logging.WARNING):
        done = edit_identity(identity, [Edit(direction(), 30.0), Edit(direction("age", seed=1), 9.0)], s)
    assert "Anna: kept [" in caplog.text
    kept = [e["kept"] for e in done.provenance["edits"]]
    assert len(kept) == 2 and kept[0] == kept[1] and len(kept[0]) == 2 and 0 < kept[0][0] < 1
    assert "kept" not in edit_identity(identity, [Edit(direction(), 0.1)], s).provenance["edits"][0]


def test_a_spread_of_wrong_shapes_is_refused():
    with pytest.raises(WPlusError, match="PCA of W"):
        Spread(torch.zeros(512), torch.ones(2, 512), torch.ones(2))
    with pytest.raises(WPlusError, match=r"\[B, L, 512\]"):
        random_spread().distance(torch.randn(18, 512))
    with pytest.raises(WPlusError, match="above 0"):
        random_spread().hold(torch.zeros(1, 18, 512), torch.zeros(1, 18, 512), 0)


# Files and names


@pytest.fixture
def folder(tmp_path):
    """directions/interfacegan/smile.pt, ganspace/smile, latent_directions/{smile,eyes_open}.npy, moods.safetensors."""
    d = tmp_path / "directions"
    for name in ("interfacegan", "latent_directions", "ganspace", "notes"):
        (d / name).mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(torch.randn(1, 512), d / "interfacegan/smile.pt")
    np.save(d / "latent_directions/smile.npy", np.random.randn(18, 512))
    np.save(d / "latent_directions/eyes open.npy", np.random.randn(18, 512))
    basis, std = torch.linalg.qr(torch.randn(512, 12))[0].T, torch.linspace(2, 1, 12)
    torch.save({"mean": torch.randn(1, 512), "comp": basis[:, None], "std": std}, d / "ganspace/pca.pt")
    (d / "ganspace/ganspace_configs.csv").write_text(
        "smile\t4\t4\t5\t-20\nlipstick\t2\t10\t11\t20\nlost\t99\t1\t2\t20\n"
    )
    save_directions([direction("happy"), direction("sad", seed=1)], d / "moods.safetensors")
    (d / "notes/readme.txt").write_text("not a direction")
    (d / "notes/.hidden.pt").write_text("not a direction")
    return d


def test_names_have_their_folder_or_file_as_a_group(folder):
    assert list(load_collection(folder).directions) == [
        "interfacegan/smile",
        "latent_directions/eyes_open",
        "latent_directions/smile",
        "ganspace/smile",
        "ganspace/lipstick",
        "moods/happy",
        "moods/sad",
    ]


def test_a_plain_name_is_found_and_interfacegan_comes_first(folder, caplog):
    c = load_collection(folder)
    with caplog.at_level(logging.INFO):
        assert c.find("smile").name == "interfacegan/smile"
    assert "not from latent_directions/smile, ganspace/smile" in caplog.text
    assert c.find("Eyes Open").name == "latent_directions/eyes_open"
    assert c.find("ganspace/smile").layers == (4, 5)


def test_a_plain_name_is_the_users_own_before_the_miniatures(tmp_path):
    for group in ("drawn", "mine"):
        save_directions([Direction("smile", torch.ones(18, 512))], tmp_path / group / "smile.safetensors")
    c = load_collection(tmp_path)
    assert list(c.directions) == ["mine/smile", "drawn/smile"]
    assert c.find("smile").name == "mine/smile" and c.find("drawn/smile").name == "drawn/smile"


def test_linked_folders_are_searched_and_loops_end(folder, tmp_path):
    for group in ("mine", "yours"):
        (tmp_path / "linked" / group).parent.mkdir(exist_ok=True)
        (tmp_path / "linked" / group).symlink_to(folder / "interfacegan", target_is_directory=True)
    before = set(load_collection(folder).directions)
    (folder / "interfacegan" / "again").symlink_to(tmp_path / "linked", target_is_directory=True)
    (folder / "notes" / ".hidden").mkdir()
    save_directions([direction("secret")], folder / "notes/.hidden/secret.safetensors")
    assert set(load_collection(tmp_path / "linked").directions) == {"mine/smile", "yours/smile"}
    assert set(load_collection(folder).directions) == before


def test_an_unknown_name_is_told_the_nearest(folder):
    c = load_collection(folder)
    with pytest.raises(WPlusError, match=r"no direction 'smlie' among the 7 known; the nearest: .*interfacegan/smile"):
        c.find("smlie")
    with pytest.raises(WPlusError, match="nearest: ganspace/lipstick"):
        c.find("ganspace/lipstik")
    with pytest.raises(WPlusError, match="the nearest: "):
        c.find("zzz")
    with pytest.raises(WPlusError, match="no direction files were found"):
        Collection().find("smile")


def test_a_broken_file_is_left_out_and_said(folder, caplog):
    (folder / "broken.pt").write_bytes(b"<!DOCTYPE html>")
    c = load_collection(folder)
    assert len(c.directions) == 7 and "web page" in c.problems[folder / "broken.pt"] and "web page" in caplog.text
    with pytest.raises(FileError, match="no such file or folder"):
        load_collection(folder / "gone")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that even root cannot read")
def test_a_file_that_cannot_be_read_is_left_out(folder, caplog):
    (folder / "locked.pt").symlink_to("/proc/self/mem")
    c = load_collection(folder)
    assert len(c.directions) == 7 and "cannot be read" in c.problems[folder / "locked.pt"]


def test_an_earlier_place_hides_a_later_one(folder, tmp_path, caplog):
    mine = tmp_path / "mine" / "moods.safetensors"
    save_directions([direction("happy", seed=7), direction("wry")], mine)
    c = load_collection(mine.parent, folder)
    assert torch.equal(c.directions["moods/happy"].vector, direction("happy", seed=7).vector)
    assert "moods/wry" in c.directions and "moods/sad" in c.directions and "known already" in caplog.text


def test_ours_keeps_what_a_direction_is(tmp_path):
    d = direction("x", layers=(2, 5), origin=torch.randn(512), source="by hand", unit=-0.7, usual=(-1.0, 4.0))
    save_directions([d], tmp_path / "x.safetensors")
    (back,) = load_directions(tmp_path / "x.safetensors")
    assert torch.equal(back.vector, d.vector) and torch.equal(back.origin, d.origin)
    for name in ("name", "layers", "source", "unit", "usual"):
        assert getattr(back, name) == getattr(d, name)


def test_a_list_of_steps_is_a_pool(tmp_path):
    torch.save([torch.randn(1, 18, 512, requires_grad=True) for _ in range(3)], tmp_path / "pool.pth")
    c = load_collection(tmp_path)
    assert list(c.directions) == ["pool_0", "pool_1", "pool_2"]
    assert not c.find("pool_1").vector.requires_grad


def test_many_steps_in_one_tensor_are_numbered(tmp_path):
    x = torch.randn(3, 18, 512)
    torch.save(x, tmp_path / "pool.pt")
    torch.save({"a": x, "b": x[:1]}, tmp_path / "pools.pt")
    assert [d.name for d in load_directions(tmp_path / "pools.pt")] == ["a_0", "a_1", "a_2", "b"]
    found = load_directions(tmp_path / "pool.pt")
    assert [d.name for d in found] == ["pool_0", "pool_1", "pool_2"]
    assert torch.equal(torch.stack([d.vector for d in found]), x)


def test_the_whole_key_is_the_name_where_its_last_part_is_not_unique(tmp_path):
    v = torch.randn(1, 512)
    torch.save({"men": {"smile": v, "beard": v}, "women": {"smile": v}}, tmp_path / "both.pt")
    assert [d.name for d in load_directions(tmp_path / "both.pt")] == ["men.smile", "beard", "women.smile"]


def test_a_plain_vector(tmp_path):
    torch.save(torch.randn(512), tmp_path / "beard.pt")
    assert load_collection(tmp_path / "beard.pt").find("beard").vector.shape == (1, 512)


def test_a_negative_table_strength_turns_the_direction(folder):
    c = load_collection(folder)
    assert c.find("ganspace/smile").unit < 0 < c.find("lipstick").unit


def test_a_pca_gives_the_spread(folder, tmp_path):
    spread = load_collection(folder).spread
    assert spread.std.tolist() == pytest.approx(torch.linspace(2, 1, 12).tolist())
    rows = (spread.basis * spread.std[:, None])[:, None]
    parts = [Direction(f"c{k}", v, None, spread.mean) for k, v in enumerate(rows)]
    save_directions(parts[::-1], tmp_path / "ours.safetensors")
    again = load_spread(tmp_path / "ours.safetensors")
    torch.testing.assert_close(again.basis, spread.basis)
    torch.testing.assert_close(again.std, spread.std)
    with pytest.raises(FileError, match="no PCA of W"):
        load_spread(folder / "moods.safetensors")
    with pytest.raises(WPlusError, match="share their origin"):
        spread_of([])


# The text form


def test_text_to_edits(folder):
    c = load_collection(folder)
    text = " smile = 2, eyes_open=\u22121.5 @ 0-3\nganspace/smile=raw:-20@middle;happy=+.5@5 "
    edits = parse_edits(text, c)
    assert [(e.direction.name, e.strength, e.layers, e.raw) for e in edits] == [
        ("interfacegan/smile", 2.0, None, False),
        ("latent_directions/eyes_open", -1.5, (0, 4), False),
        ("ganspace/smile", -20.0, (4, 8), True),
        ("moods/happy", 0.5, (5, 6), False),
    ]
    line = " ".join(map(str, edits))
    assert line == (
        "interfacegan/smile=2 latent_directions/eyes_open=-1.5@coarse ganspace/smile=raw:-20@middle moods/happy=0.5@5"
    )
    assert [str(e) for e in parse_edits(line, c)] == [str(e) for e in edits]
    assert parse_edits("  ", c) == []


@pytest.mark.parametrize(
    "text, message",
    [
        ("smile", "expected edits such as smile=2"),
        ("smile=2=3", "expected edits such as smile=2"),
        ("=2", "expected edits such as smile=2"),
        ("smile=much", "'smile=much': expected a number after =, such as smile=1.5, got 'much'"),
        ("smile=nan", "'smile=nan': .*finite"),
        ("smile=1@7-3", "'smile=1@7-3': expected layers such as 0-7"),
        ("smile=1@top", "one of all, coarse, middle, fine; got 'top'"),
        ("smile=1@99", "expected layers such as 0-7"),
        ("smil=1", "no direction 'smil'.* nearest: interfacegan/smile"),
    ],
)
def test_wrong_text_says_which_part_and_what_to_write(folder, text, message):
    with pytest.raises(WPlusError, match=message):
        parse_edits(f"happy=1 {text}", load_collection(folder))


@pytest.mark.parametrize("text", ["0-7", "5", "all", "coarse", "middle", "fine"])
def test_layers_as_text(text):
    assert format_layers(parse_layers(text)) == text


# The real files


@needs_data
def test_every_form_of_real_file_is_read(real):
    groups = [n.rpartition("/")[0] for n in real.directions]
    assert {g: groups.count(g) for g in groups} == {
        "interfacegan": 3,
        "latent_directions": 21,
        "ganspace": 42,
        "": 17,
    }
    assert real.problems == {} and real.spread.std.shape == (80,)
    assert {real.find(n).name for n in ("smile", "age", "eyes_open")} == {
        "interfacegan/smile",
        "interfacegan/age",
        "latent_directions/eyes_open",
    }


@needs_data
def test_strength_is_interfacegans_own_on_the_real_files(real):
    for name in ("age", "smile", "pose"):
        assert real.find(f"interfacegan/{name}").unit == pytest.approx(1, rel=1e-4)


@needs_data
@pytest.mark.parametrize("name", ["smile", "age"])
def test_a_strength_means_more_of_the_name_in_every_group(real, name, photos):
    """The published latent directions of these names point to less; the raw number keeps the file's way."""
    ours, latent = real.find(f"interfacegan/{name}"), real.find(f"latent_directions/{name}")
    a, b = (Edit(d, 1.0).step(photos) for d in (ours, latent))
    assert (a * b)[..., :8, :].sum() > 0
    assert (Edit(latent, 1.0, raw=True).step(photos) * a).sum() < 0


@needs_data
def test_real_edits_stack_and_undo(real, photos):
    edits = parse_edits("smile=2 age=-1.5 eyes_open=1 latent_directions/glasses=-3 ganspace/white_hair=3", real)
    w = edit(photos, edits)
    assert (w - photos).norm() > 10
    torch.testing.assert_close(edit(photos, edits[::-1]), w, rtol=1e-6, atol=1e-6)
    back = edit(w, [replace(e, strength=-e.strength) for e in edits])
    assert ((back - photos).norm() / photos.norm()).item() < 1e-6
    one_by_one = photos
    for e in edits:
        one_by_one = edit(one_by_one, [e])
    torch.testing.assert_close(one_by_one, w, rtol=1e-6, atol=2e-6)
    for d in real.directions.values():
        there_and_back = edit(edit(photos, [Edit(d, 3.0)]), [Edit(d, -3.0)])
        assert ((there_and_back - photos).norm() / photos.norm()).item() < 1e-6, d.name


@needs_data
def test_real_pairs_become_orthogonal(real):
    names = ["smile", "age", "pose", "latent_directions/smile", "glasses", "ganspace/white_hair"]
    for a in names:
        for b in names:
            if a != b:
                one, other = real.find(a), real.find(b)
                left = orthogonalise(one, [other])
                dots = (left.vector.double() * other.vector.double()).sum(-1)
                assert dots.abs().max() < 1e-6 * other.vector.norm()


@needs_data
def test_real_codes_and_usual_edits_are_plausible(real, photos):
    assert real.spread.distance(photos).max() < 1.25
    for d in real.directions.values():
        for s in (-3.0, 3.0):
            assert (real.spread.hold(photos, edit(photos, [Edit(d, s)]))[1] == 1).all(), d.name
    assert (real.spread.hold(photos, edit(photos, [Edit(real.find("ganspace/smile"), 12.0)]))[1] < 1).all()


# The command line


@pytest.fixture
def workplace(folder, tmp_path, monkeypatch):
    """What the usage lines speak of, at small sizes."""
    torch.manual_seed(0)
    generator = Generator(GeneratorConfig.for_size(32, max_channels=8)).eval()
    save_reference_generator(generator, tmp_path / "e4e_ffhq_encode.pt")
    save_identity(Identity(torch.randn(1, 8, 512), "Anna"), tmp_path / "anna.safetensors")
    torch.save(torch.randn(1, 512), folder / "age.pt")
    for path in (folder / "latent_directions").iterdir():
        path.unlink()
    lines = ["file,score"]
    for side, shift in (("with", 3.0), ("without", -3.0)):
        for i in range(6):
            w = torch.randn(1, 8, 512)
            w[..., 0] += shift
            save_identity(Identity(w, f"{side}{i}"), tmp_path / side / f"{i}.safetensors")
            lines.append(f"{side}/{i}.safetensors,{shift + i / 10}")
    (tmp_path / "scores.csv").write_text("\n".join(lines))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def usage_lines():
    prefix = "    python -m comfyui_wplus.wplus_core.directions "
    return [x.removeprefix(prefix) for x in direction_commands.__doc__.splitlines() if x.startswith(prefix)]


def test_the_usage_lines_run(workplace, capsys):
    for line in usage_lines():
        assert direction_commands.main(shlex.split(line)) == 0, line
    out = capsys.readouterr().out
    assert "interfacegan/smile" in out and "cross-validated accuracy 1.000" in out
    happy = load_identity("happy.safetensors")
    assert [e["direction"] for e in happy.provenance["edits"]] == ["interfacegan/smile", "age"]
    assert load_collection("directions").find("beard").vector.shape == (1, 512)
    assert load_spread("directions/pca.safetensors").std.shape == (80,)
    with Image.open("sheet.png") as sheet:
        assert sheet.width > 7 * 32 and sheet.height > 10 * 32


@pytest.mark.parametrize(
    "line, message",
    [
        ('apply anna.safetensors "smle=2" x.safetensors --directions directions', "nearest: interfacegan/smile"),
        ('apply anna.safetensors "smile=2" x.png --directions directions/interfacegan', "ending in .safetensors"),
        ('apply anna.safetensors "smile=2" x.safetensors --directions directions/interfacegan --hold', "ffhq_pca.pt"),
        ('apply gone.pth "smile=2" x.safetensors --directions directions', "no such file"),
        ("find with nowhere x.pt", "ending in .safetensors"),
        ("pca gone.pt x.pt", "ending in .safetensors"),
        ("sefa gone.pt x", "ending in .safetensors"),
        ("sheet gone.pt directions x.safetensors", "picture's name"),
        ("find with x.safetensors", "expected two folders"),
        ("find with nowhere x.safetensors", "no such folder"),
        ("sheet anna.safetensors directions x.png", "not a W\\+ generator"),
    ],
)
def test_wrong_input_is_told_and_exits_1(workplace, capsys, line, message):
    assert direction_commands.main(shlex.split(line)) == 1
    err = capsys.readouterr().err
    assert pytest.importorskip("re").search(message, err), err


def test_hold_takes_the_pca_among_the_directions(workplace, caplog):
    line = 'apply anna.safetensors "smile=50" x.safetensors --hold --directions directions'
    assert direction_commands.main(shlex.split(line)) == 0
    assert load_identity("x.safetensors").provenance["edits"][0]["kept"][0] < 1


def test_the_module_runs_by_its_name(workplace):
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", "comfyui_wplus.wplus_core.directions", "list"]
    done = subprocess.run([*command, "directions"], capture_output=True, text=True)
    assert done.returncode == 0 and "interfacegan/smile" in done.stdout, done.stderr
