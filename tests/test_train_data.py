"""The stream of training images: a pure function of (seed, n), with the right proportions; and its files."""

import collections
import json
import pickle

import numpy as np
import pytest
import torch
from comfyui_wplus.train.data import Prepared, Rows, Stream, write_dataset
from comfyui_wplus.train.draws import DROP_TEXT, DROP_W, Augment, Dropout, partner_of, place, sample_of, stream
from comfyui_wplus.wplus_core.directions import Direction
from comfyui_wplus.wplus_core.errors import FileError, WPlusError
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from training import LAYERS, SIZE, sample, small_dataset

NEVER = Dropout(0, 0, 0)


@pytest.fixture
def data(tmp_path):
    return Prepared(small_dataset(tmp_path / "wild", count=10))


@pytest.fixture
def faces(tmp_path):
    return Prepared(small_dataset(tmp_path / "faces", count=6, text=False, seed=1))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_an_image_is_a_function_of_seed_and_number(data):
    a, b, other = (Stream([data], seed, 4) for seed in (0, 0, 1))
    order = [7, 3, 5, 3]
    first = {n: a[n] for n in order}
    assert all(equal(first[n], b[n]) for n in reversed(order))
    assert not equal(first[3], first[5]) and not equal(first[3], other[3])


def test_every_source_is_seen_once_before_anything_is_seen_twice():
    seen = [sample_of(n, seed=3, lengths=[6, 4], shares=[0.6, 0.4]) for n in range(30)]
    for epoch in range(3):
        assert len(set(seen[10 * epoch : 10 * epoch + 10])) == 10
    assert seen[:10] != seen[10:20]


@pytest.mark.parametrize("shares", [(0.6, 0.4), (1.0,), (0.5, 0.3, 0.2), (3.0, 1.0, 1.0)])
def test_sources_are_interleaved_in_proportion(shares):
    counts = collections.Counter()
    for n in range(1000):
        source, before = place(n, shares)
        assert before == counts[source]
        counts[source] += 1
        for s, share in enumerate(shares):
            assert abs(counts[s] - (n + 1) * share / sum(shares)) < 2
    assert sum(counts.values()) == 1000


def test_partners_are_a_shuffle_of_the_batch_whoever_asks(data):
    for number in range(3):
        batch = range(4 * number, 4 * number + 4)
        assert sorted(partner_of(n, 0, 4) for n in batch) == list(batch)
    assert len({tuple(partner_of(n, 0, 4) - n for n in range(b, b + 4)) for b in range(0, 40, 4)}) > 3
    shuffled = Stream([data], 0, 4, dropout=NEVER, augment=Augment(("shuffle",)))
    plain = [shuffled[n] for n in range(4)]
    for n in range(4):
        assert torch.equal(plain[n].w_hat, plain[partner_of(n, 0, 4)].w)


def test_augmentations_are_the_papers():
    w, other = torch.randn(2, 18, 512)
    noise = Augment(("noise",), noise=0.3)(stream(0, 1), w, other) - w
    both = Augment(("both",), noise=0.3)(stream(0, 1), w, other)
    torch.testing.assert_close(both - other, noise)
    assert abs(noise.std() - 0.3) < 0.01 and abs(noise.mean()) < 0.02
    assert torch.equal(Augment(("shuffle",))(stream(0, 1), w, other), other)
    assert Augment().kinds == ("shuffle", "noise", "both")
    drawn = [Augment()(stream(0, i), w, other) for i in range(60)]
    assert sum(torch.equal(x, other) for x in drawn) in range(10, 31)
    with pytest.raises(WPlusError, match="flip"):
        Augment(("flip",))


def test_extrapolation_and_directions_stay_in_their_range():
    w, other = torch.randn(2, 18, 512)
    line = other - w
    steps = [(Augment(("extrapolate",))(stream(0, i), w, other) - w) / line for i in range(200)]
    assert all(x.std() < 0.05 for x in steps)
    factors = torch.stack([x.median() for x in steps])
    assert 35 < factors.abs().max() <= 40.01 and abs(factors.mean()) < 6
    d = Direction("a", torch.nn.functional.normalize(torch.randn(1, 512), dim=-1))
    moved = [(Augment(("direction",))(stream(0, i), w, other, [d]) - w) for i in range(200)]
    strengths = torch.stack([(x @ d.rows(18)[0]).mean() for x in moved])
    assert 54 < strengths.abs().max() <= 60.01 and abs(strengths.mean()) < 9
    torch.testing.assert_close(moved[0], d.move(w[None], strengths[0].item())[0] - w, rtol=1e-3, atol=1e-3)


def test_directions_must_be_given_for_their_augmentation(data):
    with pytest.raises(WPlusError, match="--directions"):
        Stream([data], 0, 4, augment=Augment(("direction",)))


def test_dropping_has_the_given_probabilities():
    counts = collections.Counter(Dropout()(stream(0, 9, i)) for i in range(20_000))
    assert set(counts) == {0, DROP_W, DROP_TEXT, DROP_W | DROP_TEXT}
    assert all(abs(counts[code] / 20_000 - 0.05) < 0.006 for code in (1, 2, 3))
    assert {Dropout(0, 0, 1)(stream(0, i)) for i in range(20)} == {3}
    with pytest.raises(WPlusError, match="at most 1"):
        Dropout(0.5, 0.5, 0.5)


def test_a_dropped_w_is_zero_before_and_after_augmentation_and_a_dropped_text_the_empty_one(data):
    for dropout, no_w, no_text in ((Dropout(1, 0, 0), 1, 0), (Dropout(0, 1, 0), 0, 1), (Dropout(0, 0, 1), 1, 1)):
        x = Stream([data], 0, 4, dropout=dropout)[2]
        kept = Stream([data], 0, 4, dropout=NEVER)[2]
        assert (x.w.count_nonzero() == 0) == (x.w_hat.count_nonzero() == 0) == bool(no_w)
        assert torch.equal(x.c, data.prompts[0].float() if no_text else kept.c)
        assert equal((x.z0, x.noise, x.t), (kept.z0, kept.noise, kept.t))


def test_a_picture_without_caption_gets_one_of_the_neutral_prompts(faces):
    s = Stream([faces], 0, 2, dropout=NEVER)
    rows = [next(i for i, p in enumerate(faces.prompts) if torch.equal(s[n].c, p.float())) for n in range(40)]
    assert set(rows) == {1, 2}


def test_latents_are_drawn_from_the_vaes_posterior_and_its_variants(data):
    s = Stream([data], 0, 2, dropout=NEVER)
    n = next(n for n in range(20) if s.locate(n) == (0, 3))
    sample = data[3]
    close = []
    for seed in range(12):
        s = Stream([data], seed, 2, dropout=NEVER)
        x = s[next(n for n in range(20) if s.locate(n) == (0, 3))]
        z = x.z0 / 0.18215
        fits = [((z - mean) / std).std() for mean, std in (v.float().chunk(2) for v in sample["latents"])]
        close.append(int(np.argmin(fits)))
        assert 0.9 < min(fits) < 1.1
        assert torch.equal(x.face, sample["face"][close[-1]].float())
    assert set(close) == {0, 1} and n >= 0


def test_a_sample_may_say_how_much_its_places_count(tmp_path):
    rng = torch.Generator().manual_seed(0)
    samples = [sample(rng, text=True) | {"weights": torch.rand(2, 1, SIZE, SIZE, generator=rng)} for _ in range(3)]
    plain = small_dataset(tmp_path / "plain", 3)
    write_dataset(tmp_path / "data", samples, {"": torch.zeros(77, 768)})
    s, seen = Stream([Prepared(tmp_path / "data")], 0, 2, dropout=NEVER), set()
    for n in range(24):
        x, given = s[n], s.sources[0][s.locate(n)[1]]
        variant = next(k for k in (0, 1) if torch.equal(x.face, given["face"][k].float()))
        assert torch.equal(x.weights, given["weights"][variant])
        seen.add(variant)
    assert seen == {0, 1}
    assert Stream([Prepared(plain)], 0, 2)[0].weights.equal(torch.ones(1, SIZE, SIZE))


def test_a_loader_with_workers_gives_the_same_batches(data, faces):
    s = Stream([data, faces], 0, 4, shares=(0.6, 0.4))
    batches = [list(DataLoader(s, batch_sampler=Rows(4, 12, 2), num_workers=k)) for k in (0, 2)]
    assert len(batches[0]) == 4 and all(map(equal, *batches))
    assert equal((x[1] for x in batches[0][0]), s[5])
    assert pickle.loads(pickle.dumps(data))[2]["w"].equal(data[2]["w"])


@pytest.mark.parametrize("processes, micro", [(1, 8), (1, 2), (2, 4), (4, 1), (2, 2)])
def test_processes_and_micro_batches_share_every_batch_out(processes, micro):
    samplers = [Rows(16, 40, micro, r, processes) for r in range(processes)]
    ranks = [list(s) for s in samplers]
    assert [len(r) for r in ranks] == [len(s) for s in samplers] == [24 // (micro * processes)] * processes
    rounds = 8 // (micro * processes)
    for b in range(3):
        taken = [n for r in ranks for rows in r[b * rounds : (b + 1) * rounds] for n in rows]
        assert sorted(taken) == list(range(16 + 8 * b, 24 + 8 * b))


def test_the_index_finds_every_sample(data):
    assert [s["count"] for s in data.index.shards] == [4, 4, 2]
    codes = torch.stack([data.w(i) for i in range(len(data))])
    assert len(codes.unique(dim=0)) == 10 and codes.shape == (10, LAYERS, 512)
    assert data.index.latent_size == (SIZE, SIZE) and data.index.w_layers == LAYERS


def test_what_is_wrong_with_a_data_set_is_said(tmp_path, data, faces):
    with pytest.raises(FileError, match="index.json is missing"):
        Prepared(tmp_path)
    with pytest.raises(WPlusError, match="one per data set"):
        Stream([data, faces], 0, 2, shares=(1.0,))
    index = json.loads((data.folder / "index.json").read_text())
    (faces.folder / "index.json").write_text(json.dumps(index | {"version": 99}))
    with pytest.raises(FileError, match="Update"):
        Prepared(faces.folder)
    (faces.folder / "index.json").write_text("{")
    with pytest.raises(FileError, match="damaged"):
        Prepared(faces.folder)
    (data.folder / "shard-00001.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(FileError, match="shard-00001"):
        Prepared(data.folder)[5]
    other = Prepared(small_dataset(tmp_path / "other"))
    save_file({"w": torch.zeros(4, LAYERS, 512)}, other.folder / "shard-00000.safetensors")
    with pytest.raises(FileError, match="latents"):
        Stream([other], 0, 2).check(face=False)


def test_data_sets_must_fit_together(tmp_path, data):
    folder = small_dataset(tmp_path / "more")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"w_layers": 18}))
    with pytest.raises(WPlusError, match="in common"):
        Stream([data, Prepared(folder)], 0, 2)
