"""The miniature's making: every part on a tiny scale, resuming, and the committed weights against their numbers."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comfyui_wplus.train.measures import Picture, Shown
from comfyui_wplus.train.mini import (
    adapters,
    autoencoder,
    base,
    directions,
    encoder,
    evaluation,
    generator,
    judge,
    numbers,
    pack,
    pictures,
    scenes,
    sheet,
    text,
    witness,
    world,
)
from comfyui_wplus.train.mini.__main__ import make_parts, parts
from comfyui_wplus.train.mini.evaluation import Bench, Size
from comfyui_wplus.train.mini.fit import Fit, fit
from comfyui_wplus.train.mini.judge import Judge, Seen
from comfyui_wplus.train.mini.settings import TINY
from comfyui_wplus.train.sampling import noise
from comfyui_wplus.wplus_core.adapter import AdapterConfig
from comfyui_wplus.wplus_core.checkpoints import load_adapter, load_encoder, load_generator
from comfyui_wplus.wplus_core.direction_files import load_directions
from comfyui_wplus.wplus_core.errors import WPlusError
from comfyui_wplus.wplus_core.faces import from_5
from comfyui_wplus.wplus_core.stylegan2 import GeneratorConfig
from torchvision.transforms.functional import pil_to_tensor
from transformers import CLIPTokenizer

pytestmark = pytest.mark.xdist_group("mini")  # they share what they train

MINIATURE = Path(__file__).parents[1] / "miniature"
SMALL = GeneratorConfig(channels=(8, 8, 8), w_dim=64, mapping_layers=1)
LOSS = generator.loss_at(16, generator.says_who(generator.new_generator(SMALL)))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mini")
    make_parts(folder, TINY, "cpu", through_stage2(folder))
    return folder


def through_stage2(folder):
    """The ablations after it are the same code with other settings."""
    names = tuple(parts(folder, TINY, "cpu"))
    return names[: names.index("full") + 1]


def test_every_part_writes_its_file_and_is_not_made_twice(out):
    done = {name: parts(out, TINY, "cpu")[name][0] for name in through_stage2(out)}
    assert all(file.is_file() for file in done.values())
    before = {file: file.stat().st_mtime_ns for file in done.values()}
    make_parts(out, TINY, "cpu", tuple(done))
    assert before == {file: file.stat().st_mtime_ns for file in done.values()}


def test_an_unknown_part_is_named(tmp_path):
    with pytest.raises(WPlusError, match="unett"):
        make_parts(tmp_path, TINY, "cpu", ("unett",))


def test_the_unet_begins_from_a_finished_one_where_that_is_wanted(out, tmp_path):
    (tmp_path / "base").mkdir()
    for name in ("pictures", "latents.safetensors", "base/tokenizer", "base/text_encoder"):
        (tmp_path / name).symlink_to(out / name)
    base.make(tmp_path, Fit(0, 2, 1e-3), "cpu", start=out)
    for a, b in zip(base.load(tmp_path).parameters(), base.load(out).parameters(), strict=True):
        assert a.equal(b)
    assert (tmp_path / "base/unet/config.json").read_text() == (out / "base/unet/config.json").read_text()


def test_the_encoder_begins_from_a_finished_one_where_that_is_wanted(out, tmp_path):
    for name in ("pictures", "generator.safetensors"):
        (tmp_path / name).symlink_to(out / name)
    encoder.make(tmp_path, Fit(0, 2, 1e-3), "cpu", start=out)
    begun, finished = encoder.load(tmp_path).state_dict(), encoder.load(out).state_dict()
    assert all(begun[name].equal(x) for name, x in finished.items())


@torch.no_grad()
def test_a_code_that_loses_a_factor_costs_something():
    network = generator.new_generator(SMALL)
    who = generator.says_who(network)
    lost = F.normalize(who[:, world.NAMES.index("freckles")], dim=0)[:, None]
    blind = who - lost @ lost.T @ who  # as if no w had anything along the direction that tells of freckles
    first, second = (generator.loss_at(16, x)(network, 32, np.random.default_rng(0)) for x in (who, blind))
    more = second["told"] - first["told"]
    assert 1 < more * len(world.NAMES) < 3  # 2 is what differences of normal numbers vary by
    assert second["total"] - first["total"] == pytest.approx((generator.TOLD * more).item(), rel=1e-3)


def test_codes_say_how_much_of_a_factor_somebody_has():
    g, z = generator.load(MINIATURE), world.sample(64, np.random.default_rng(0))
    for name in ("skin", "nose", "smile"):
        more = z + torch.eye(len(world.NAMES))[world.NAMES.index(name)]
        moved = ((generator.code_of(g, more) - generator.code_of(g, z)) @ generator.says_who(g)).mean(0)
        assert moved.argmax() == world.NAMES.index(name) and 0.5 < moved.max() < 1.5
        assert moved.sort().values[-2] < 0.3


def test_the_encoder_learns_who_it_is_from_photos_too(out):
    """Other people in the photos: only what the code says of them is another."""
    g, kept, loss = generator.load(out), pictures.Pictures(out), []
    for _ in range(2):
        parts = encoder.loss_through(g, kept)(encoder.load(out), 8, np.random.default_rng(0))
        loss.append({k: x.item() for k, x in parts.items()})
        kept.z = kept.z.roll(1, 0)
    assert {k for k in loss[0] if loss[0][k] != loss[1][k]} == {"who", "total"}


def test_stage_two_learns_from_scenes_of_every_style(out):
    labels = pictures.Pictures(out).labels
    in_scenes = labels[labels[:, 0] >= 0]
    styles = in_scenes[:, list(scenes.LABELS).index("style")]
    assert len(styles.unique()) > 1  # or the next line would say nothing
    shards = json.loads((out / "data" / "wild" / "index.json").read_text())["shards"]
    assert sum(shard["count"] for shard in shards) == len(in_scenes)


def test_the_face_and_its_features_count_more_for_the_unet(out, monkeypatch):
    face = torch.tensor([1.0, 0.0])[:, None].repeat_interleave(16, 0).expand(1, 1, 32, 32)  # the upper half
    points = torch.tensor([[[44.0, 36.0], [84.0, 36.0], [64.0, 52.0], [52.0, 84.0], [76.0, 84.0]]])
    (counts,) = base.weights(face, points, 16)[:, 0]
    assert counts.shape == (16, 16) and counts[15, 0] == pytest.approx(1, abs=1e-3)
    assert counts[0, 0] == pytest.approx(1 + base.FACE, abs=0.01)
    assert counts[4, 5] == pytest.approx(1 + base.FACE + base.FEATURES, rel=0.05)  # an eye
    assert counts[10, 6] == pytest.approx(1 + base.FEATURES, rel=0.05)  # a corner of the mouth

    class Zero(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, x, t, c):
            return SimpleNamespace(sample=torch.zeros_like(x))

    kept = pictures.Pictures(out)
    loss = base.loss_on(torch.randn(len(kept), 8, 16, 16), kept, lambda captions: None)
    found = loss(Zero(), 64, np.random.default_rng(0))
    monkeypatch.setattr(base, "weights", lambda masks, points, size: torch.ones(len(masks), 1, size, size))
    plain = loss(Zero(), 64, np.random.default_rng(0))
    assert plain["mse"] == found["mse"] and abs(plain["total"] / found["total"] - 1) > 1e-3


def test_what_counts_in_the_adapters_pictures_counted_for_the_unet(out):
    kept, words = pictures.Pictures(out), text.load(out)
    rows = torch.tensor([0, 1])  # every fourth picture is aligned
    assert adapters.is_aligned(kept)[rows].tolist() == [True, False]
    for row, said in zip(rows, (None, words), strict=True):
        (sample,) = adapters.samples(out, kept, row[None], said, "cpu")
        expected = base.weights(kept.get("masks", row[None].numpy()), kept.points[row[None]], 16)
        torch.testing.assert_close(sample["weights"].float(), expected, rtol=1e-3, atol=0)
        assert ("face" in sample) == ("text" in sample) == (said is not None)


def test_the_face_of_a_scene_is_the_square_of_its_crop():
    """Eroded and blurred: 1 where the crop's middle is, 0 outside it, and the edge where the crop's is, less 4 px."""
    points = torch.tensor([[[52.0, 60.0], [76.0, 60.0], [64.0, 70.0], [56.0, 84.0], [72.0, 84.0]]])
    to_picture = world.ffhq(points, 64)[0]
    left, top = (to_picture @ torch.tensor([-0.5, -0.5, 1.0]))[:2].tolist()
    right, bottom = (to_picture @ torch.tensor([63.5, 63.5, 1.0]))[:2].tolist()
    face = adapters.crops_in(points, 128)[0, 0]
    assert face.shape == (128, 128) and face.min() == 0 and face.max() == pytest.approx(1)
    across, down = face[round((top + bottom) / 2)], face[:, round((left + right) / 2)]
    for line, start, end in ((across, left, right), (down, top, bottom)):
        inside = (line > 0.5).nonzero()[:, 0]
        assert inside[0] - start == pytest.approx(4.5, abs=1) and end - inside[-1] == pytest.approx(4.5, abs=1)
    turned = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    small = adapters.crops_in((points - 64) @ turned.T + 64, 16)[0, 0]
    assert 0.9 < small.sum() * 64 / face.sum() < 1  # a turned square loses more, as photos' do


def test_words_that_were_known_keep_their_meaning(out, tmp_path, monkeypatch):
    """A text encoder that learns more words embeds captions of the old ones as before."""
    merges = text.merges
    monkeypatch.setattr(text, "merges", lambda: merges(("umbrella", *scenes.WORDS)))
    monkeypatch.setattr(world, "some_looks", lambda z, rng: [["umbrella"] for _ in z])
    monkeypatch.setattr(text, "TOKENS", text.TOKENS + 3)
    text.make(tmp_path, Fit(8, 4, 1e-2), "cpu", start=out)
    old, new = text.load(out), text.load(tmp_path)
    captions = ["a smiling person in a red dress on the beach by day, photo", world.NEUTRAL, ""]
    assert new(captions)[:, :-3].equal(old(captions))
    untrained = tmp_path / "untrained"
    text.make(untrained, Fit(0, 4, 1e-2), "cpu", start=out)
    assert not new(["umbrella"]).equal(text.load(untrained)(["umbrella"]))


def test_the_adapter_fits_the_miniatures_own_encoder_and_unet(out):
    config = load_adapter(out / "adapters" / "full.safetensors").config
    found = load_encoder(out / "encoder.safetensors").config
    assert (config.w_layers, config.w_dim) == (found.layers, found.w_dim) == (10, 64)
    assert config == AdapterConfig((64, 128, 128, 128, 64, 64, 128), (2, 5, 8, 10), w_dim=64, heads=2)


def test_the_pack_is_what_the_loader_looks_for(out, tmp_path):
    numbers.make(out, 4)
    written = {file.relative_to(tmp_path).as_posix() for file in pack.write(out, tmp_path)}
    assert {"encoder.safetensors", "adapter.safetensors", "base/unet/config.json", "numbers.json"} <= written
    assert load_generator(tmp_path / "encoder.safetensors").config == generator.CONFIG


def test_a_training_that_was_stopped_is_not_taken_for_done(tmp_path, monkeypatch):
    monkeypatch.setattr(adapters, "train", lambda config: SimpleNamespace(images=config.images - config.batch))
    with pytest.raises(WPlusError, match="stage1 was stopped after 6 of 8 images"):
        adapters.make(tmp_path, "stage1", adapters.Length(8, 4, 2))
    assert not (tmp_path / "adapters").exists()


def test_the_evaluation_measures_what_is_trained_and_writes_its_tables(out, tmp_path):
    size = Size(4, 2, 2, 1, 3, 2, strengths=(1.0, 2.0), scales=(0.0, 1.0), tried=24, steps=2, batch=4)
    bench = Bench(out, size, "cpu")
    results = evaluation.measure(bench)
    painted = {path: path.stat().st_mtime_ns for path in (out / "evaluation").rglob("*.png")}
    assert evaluation.variants(bench)["lambda0"] == results["variants"]["lambda0"]
    assert painted == {path: path.stat().st_mtime_ns for path in (out / "evaluation").rglob("*.png")}

    assert list(results["variants"]) == ["drawn", "restored", "told", "full", "confined", "lambda0"]
    full = results["variants"]["full"]
    assert full["pictures"] == 20 and 0 <= full["text_agreement"] <= 1 and full["id"] > 0
    assert results["scales"]["0"]["retrieval_top1"] <= 1 and set(results["edit_curves"]["smile"]) == {"+1", "+2"}

    assert results["words"].keys() == world.LOOKS.keys()
    assert results["words"]["glasses"]["high"] == "bespectacled" and results["words"]["glasses"]["moved"] != 0

    page = tmp_path / "miniature.md"
    page.write_text("before\n", encoding="utf-8")
    with pytest.raises(WPlusError, match="no place for the tables"):
        evaluation.write(results, tmp_path)
    page.write_text(f"before\n{evaluation.BEGIN}OLD TABLE\n{evaluation.END}after\n", encoding="utf-8")
    evaluation.write(results, tmp_path)
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n") and text.endswith("after\n") and "OLD TABLE" not in text
    assert "| lambda0 |" in text and json.loads((tmp_path / "miniature.json").read_text())["variants"]["full"] == full


def test_a_confined_adapter_works_where_the_plain_model_paints_the_face(out, monkeypatch):
    bench, masks = Bench(out, Size(3, steps=1, tried=24, batch=3), "cpu"), []
    monkeypatch.setattr(evaluation, "sample", lambda *args: masks.append(args[7]) or args[5])
    shifted = [[40.0, 40.0], [60.0, 40.0], [50.0, 50.0], [42.0, 60.0], [58.0, 60.0]]
    known = iter([from_5(np.array(shifted)), None, from_5(np.array(shifted) + 20)])
    monkeypatch.setattr(bench.witness, "points", lambda picture: next(known))
    method = bench.method("full", name="confined", confined=True)
    method.paint(bench.people.codes[:3], list(witness.PROMPTS)[:3], noise(range(3), evaluation.LATENT))
    assert masks[0] is None
    first, nobody, second = masks[1][:, 0]
    assert 0 < first.mean() < 1 and first[50, 50] == 1 and torch.equal(first.roll((20, 20), (0, 1)), second)
    assert nobody.min() == 1


def test_the_plain_model_is_told_all_looks_that_fit_in(out, monkeypatch):
    bench, captions = Bench(out, Size(4, steps=1, tried=24, batch=3), "cpu"), []
    embed = bench.text
    monkeypatch.setattr(bench, "text", lambda texts: captions.extend(texts) or embed(texts))
    painted = evaluation.told(bench)
    assert [len(x) for x in painted.values()] == [4] * 5 and not torch.equal(*painted[next(iter(painted))][:2])
    looks = world.looks(bench.people.factors)
    for caption, prompt, words in zip(captions, [p for p in painted for _ in range(4)], looks * 5, strict=True):
        assert caption.endswith(prompt.removeprefix("a "))
        said = [word for word in caption.split() if word in words]
        assert len(said) == min(len(words), world.MOST_LOOKS) > 10


def test_what_the_edits_mean_is_drawn_and_hardly_moves_what_is_around_the_face(out, monkeypatch):
    bench = Bench(out, Size(4, 3, steps=1, tried=24, batch=4), "cpu")
    places = scenes.scenes(bench.people.factors, bench.people.scenes(next(iter(witness.PROMPTS)))).points

    def there(picture):
        return from_5(places[int(picture.key.rpartition("/")[2])].double().numpy())

    monkeypatch.setattr(bench.witness, "points", there)
    drawn, restored = evaluation.redrawn(bench).values()
    assert drawn["background_change"] < 0.1 * drawn["face_change"] and drawn["face_change"] > 0.001
    assert restored["background_change"] > drawn["background_change"]


def test_the_documented_tables_are_those_of_the_documented_numbers():
    docs = Path(__file__).parents[1] / "docs"
    results = json.loads((docs / "miniature.json").read_text(encoding="utf-8"))
    page = (docs / "miniature.md").read_text(encoding="utf-8")
    assert f"{evaluation.BEGIN}\n{evaluation.report(results)}\n{evaluation.END}" in page
    shorter = {"full_shorter", "without_disen_shorter"}  # what the ablations, trained as long, compare with
    assert set(results["variants"]) == {*evaluation.ALWAYS, *evaluation.VARIANTS, *shorter}
    assert all(v["pictures"] >= 500 for v in results["variants"].values())


def test_rows_that_are_asked_for_stay_beside_those_measured_anew(out, tmp_path, monkeypatch):
    old = {"full": {"pictures": 1}, "parallel": {"retrieval_top1": 0.75, "pictures": 2}, "one_stage": {"pictures": 3}}
    (tmp_path / "miniature.json").write_text(json.dumps({"variants": old}), encoding="utf-8")
    page = tmp_path / "miniature.md"
    page.write_text(f"{evaluation.BEGIN}{evaluation.END}", encoding="utf-8")
    size = Size(people=2, tried=8)
    whole = json.loads((Path(__file__).parents[1] / "docs" / "miniature.json").read_text(encoding="utf-8"))
    anew = {name: whole["variants"][name] for name in ("full", "lambda0")}
    measured = []
    monkeypatch.setattr(evaluation, "measure", lambda bench: measured.append(1) or whole | {"variants": dict(anew)})

    for keep, docs, reason in (
        (("parallel",), None, "--docs must say"),
        (("full",), tmp_path, "full is measured anew"),
        (("lambda0",), tmp_path, "lambda0 is measured anew"),
        (("without_reg",), tmp_path, "no without_reg to keep; it has full, parallel, one_stage"),
        (("parallel",), tmp_path / "nowhere", "no parallel to keep; it has no rows"),
    ):
        with pytest.raises(WPlusError, match=reason):
            evaluation.main(out, docs, keep, size)
    assert not measured, "a mistake must be told before the measuring, which takes long"

    evaluation.main(out, tmp_path, ("parallel",), size)
    rows = json.loads((tmp_path / "miniature.json").read_text())["variants"]
    assert rows == anew | {"parallel": old["parallel"]}
    assert "| parallel | 0.750 |" in page.read_text(encoding="utf-8")


def test_an_evaluation_without_an_adapter_says_what_is_missing(out, tmp_path):
    for path in out.iterdir():
        if path.name not in ("adapters", "evaluation"):
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(WPlusError, match="stage1 and full first"):
        evaluation.measure(Bench(tmp_path, Size(people=2, tried=8), "cpu"))


class Omniscient(Judge):
    """Sees in a picture of one grey what its list has at that grey."""

    def __init__(self, seen: list[Seen]):
        super().__init__()
        self.seen = seen

    def forward(self, x):
        rows = [self.seen[round(float(p.mean()) * 100)] for p in x]
        labels = {k: torch.stack([r.labels[k] for r in rows]) for k in scenes.LABELS}
        return Seen(*(torch.stack([getattr(r, k) for r in rows]) for k in ("person", "factors", "points")), labels)


def test_the_witness_counts_what_the_judge_sees(monkeypatch):
    monkeypatch.setattr(witness, "exactness", lambda network, vae, tried: torch.ones(len(witness.WHO)))
    people, prompt = world.sample(3, np.random.default_rng(0)), next(iter(witness.PROMPTS))
    right = witness.PROMPTS[prompt]

    def seen(factors, person=1.0, wrong=0):
        values = [n if i >= wrong else (n + 1) % 3 for i, n in enumerate(right)]
        hot = {k: torch.eye(len(v))[n] for n, (k, v) in zip(values, scenes.LABELS.items(), strict=True)}
        return Seen(torch.tensor(person), factors, 30 + 40 * torch.rand(5, 2), hot)

    smiling = people[1] + 2 * torch.eye(len(world.NAMES))[world.NAMES.index("smile")]
    network = Omniscient([seen(people[1]), seen(smiling), seen(people[2], -1.0, wrong=3)])
    look = witness.Witness(network, people, autoencoder.new_autoencoder())
    grey = [Picture(str(i), torch.full((3, 128, 128), i / 100)) for i in range(3)]
    found = look([
        Shown(grey[0], prompt, "001"),
        Shown(grey[1], prompt, "001", before=grey[0], edit="smile", strength=2.0),
        Shown(grey[2], prompt, "001"),
    ])  # fmt: skip
    assert found["text_agreement"] == [1, 1, 0.5] and found["detection"] == [1, 1, 0]
    assert found["top1"] == [1, 1, 0] and found["id"][:2] == [0, 0] and found["id"][2] > 0.2
    assert found["moved_smile"][1] == pytest.approx(2) and np.isnan(found["moved_smile"][0])
    assert found["moved_age"][1] == found["moved_identity"][1] == 0
    assert look.points(grey[2]) is None and look.points(grey[0]) is not None


@pytest.mark.parametrize("killed_after", [1, 3])
def test_a_resumed_training_is_the_uninterrupted_one(tmp_path, killed_after):
    settings = Fit(images=8, batch=2, lr=1e-2, every=2)
    whole = fit(generator.new_generator(SMALL), LOSS, settings, tmp_path / "whole")

    def dying(network, batch, rng):
        dying.calls += 1
        if dying.calls > killed_after:
            raise KeyboardInterrupt
        return LOSS(network, batch, rng)

    dying.calls = 0
    with pytest.raises(KeyboardInterrupt):
        fit(generator.new_generator(SMALL), dying, settings, tmp_path / "cut")
    resumed = fit(generator.new_generator(SMALL), LOSS, settings, tmp_path / "cut")
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert a.equal(b)


def test_a_checkpoint_of_another_size_is_refused(tmp_path):
    fit(generator.new_generator(SMALL), LOSS, Fit(2, 2, 1e-2), tmp_path)
    with pytest.raises(WPlusError, match="another size"):
        fit(generator.new_generator(replace(SMALL, w_dim=128)), LOSS, Fit(2, 2, 1e-2), tmp_path)


def test_the_generators_z_carries_the_factors():
    factors = world.sample(20, np.random.default_rng(0))
    z = generator.complete(factors)
    assert torch.allclose(z.square().mean(1), torch.ones(20), atol=1e-5)
    network = generator.new_generator(SMALL)
    assert torch.allclose(network.style[0](z)[:, : generator.FACTORS], factors, atol=1e-4)


def test_every_word_is_one_token_and_strange_ones_are_spelled(tmp_path):
    text.write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert {len(tokenizer(word).input_ids) for word in scenes.WORDS} == {3}
    spelled = tokenizer("moped").input_ids[1:-1]
    assert 1 < len(spelled) <= len("moped") and tokenizer.eos_token_id not in spelled
    captions = [
        scenes.caption([values.index(v) for v, values in zip(row, scenes.LABELS.values(), strict=True)])
        for row in itertools.product(*scenes.LABELS.values())
    ]
    longest = max(len(ids) for ids in tokenizer(captions).input_ids)
    assert longest + world.MOST_LOOKS == text.TOKENS


def test_captions_of_pictures_say_looks_only_when_asked(out):
    kept, rows = pictures.Pictures(out), np.arange(12)
    plain, rng = kept.captions(rows), np.random.default_rng(0)
    told = kept.captions(rows, rng)
    assert any(a != b for a, b in zip(plain, told, strict=True))
    for caption, without, true in zip(told, plain, world.looks(kept.z[rows]), strict=True):
        words = caption.split()
        extra = words[1 : len(words) - len(without.split()) + 1]
        assert set(extra) <= set(true) and len(extra) <= world.MOST_LOOKS
        assert [w for w in words[1:] if w not in extra] == without.split()[1:]


def test_where_finds_the_highest_place_between_cells():
    where = judge.Where()
    points = torch.tensor([[[20.3, 31.0], [90.0, 33.7], [60.2, 50.1], [45.5, 70.0], [80.0, 71.9]]])
    y, x = judge.cells(32, torch.device("cpu"))
    distance = (x - points[..., 0, None, None]).square() + (y - points[..., 1, None, None]).square()
    where.maps = lambda images: -distance / (2 * judge.CELL**2)
    assert (where(torch.zeros(1, 3, 128, 128)) - points).abs().max() < 0.5


def test_views_move_the_points_with_the_picture():
    points = torch.tensor([[[60.0, 50.0], [75.0, 52.0], [66.0, 60.0], [61.0, 70.0], [72.0, 71.0]]])
    at = torch.arange(128.0)
    dot = torch.exp(-((at - points[0, 0, 0]) ** 2 + (at[:, None] - points[0, 0, 1]) ** 2) / 18)
    seen, moved = judge.views(dot.expand(1, 3, 128, 128), points, np.random.default_rng(0))
    share = seen[:, 0] / seen[:, 0].sum((1, 2), keepdim=True)
    middle = torch.stack([(share.sum(1) * at).sum(1), (share.sum(2) * at).sum(1)], 1)
    assert len(seen) == judge.VIEWS and (moved[:, 0] - points[:, 0]).abs().amax() > 5
    assert (middle - moved[:, 0]).abs().max() < 0.5


def test_a_crop_cut_from_a_photo_is_the_aligned_face():
    """The same person drawn aligned, and cut out of a scene by the landmarks, differ by resampling and light alone."""
    rng = np.random.default_rng(3)
    z, s = world.sample(24, rng), scenes.sample_scenes(24, rng)
    plain = (s.style == 0) & (s.light == 0)
    z, s = z[plain], s[plain]
    drawn = scenes.scenes(z, s, 256)
    crops = pictures.aligned(drawn.images * drawn.masks + 1 - drawn.masks, drawn.points)
    assert (crops - world.faces(z)).abs().mean() < 0.03


@pytest.fixture(scope="module")
def said():
    """What the committed networks' numbers say."""
    return json.loads((MINIATURE / "numbers.json").read_text())


@pytest.mark.parametrize(
    "name, measure", [("generator_psnr_db", numbers.of_generator), ("encoder_psnr_db", numbers.of_encoder)]
)
def test_the_committed_networks_are_as_good_as_their_numbers_say(said, name, measure):
    assert abs(measure(MINIATURE, 32)[name] - said[name]) < 1


def test_the_committed_encoder_tells_small_features(said):
    found = numbers.of_encoder(MINIATURE, 128)["encoder_tells"]
    for name in ("nose", "mouth_width", "lips", "brows"):
        assert said["encoder_tells"][name] > 0.7 and abs(found[name] - said["encoder_tells"][name]) < 0.15


def test_the_committed_judge_finds_faces(said):
    assert said["judge"]["points_px"] < 2
    assert abs(judge.accuracy(judge.load(MINIATURE), 64)["points_px"] - said["judge"]["points_px"]) < 1


def test_the_committed_adapter_paints_the_person(monkeypatch):
    """Eight people aligned, by the judge; by chance one of them would be recognised."""
    monkeypatch.setattr(sheet, "SHOTS", (world.NEUTRAL,))
    painted = pil_to_tensor(sheet.painted_sheet(MINIATURE)) / 255
    side, who, reader = 128, pack.people(), judge.load(MINIATURE)
    faces = torch.stack(painted[:, -side:, -side * len(who) :].split(side, 2))
    seen = reader.reader.read_face(F.avg_pool2d(faces, 2))
    nearest = witness.Witness(reader, who, autoencoder.load(MINIATURE), 128).distances(seen).argmin(1)
    assert (nearest == torch.arange(len(who))).sum() >= 6


def test_every_edit_moves_its_own_attribute_most(said):
    for name, row in said["edit_moves"].items():
        assert max(row, key=lambda k: abs(row[k])) == name


def test_what_the_generator_hardly_paints_has_no_direction(tmp_path, caplog):
    for name in ("encoder.safetensors", "judge.safetensors", "where.safetensors"):
        (tmp_path / name).symlink_to(MINIATURE / name)
    for shown, names in ((directions.SHOWN, ["smile"]), (0.0, ["smile", "bun"])):
        directions.make(tmp_path, 16, ("smile", "bun"), least=0.8, shown=shown)
        assert [d.name for d in load_directions(tmp_path / "directions" / "drawn.safetensors")] == names
    assert "hardly paints, by the part it does: bun 0.0" in caplog.text


def test_the_committed_directions_fit_the_committed_generator(said):
    config = generator.load(MINIATURE).config
    for d in load_directions(MINIATURE / "directions" / "drawn.safetensors"):
        assert d.rows(config.layers).shape == (config.layers, config.w_dim)
