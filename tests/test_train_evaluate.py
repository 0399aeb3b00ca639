"""Which pictures an evaluation makes, that they share their noise and survive any stop, and the numbers it reports."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from comfyui_wplus.train.__main__ import main
from comfyui_wplus.train.evaluate import Method, Plan, Shot, curve, evaluate, summary
from comfyui_wplus.train.evaluate_command import (
    Evaluation,
    Measure,
    evaluate_files,
    find_references,
    load_people,
    preset,
)
from comfyui_wplus.train.evaluate_report import draw, write_report
from comfyui_wplus.train.model import new_adapter
from comfyui_wplus.wplus_core.background import resize
from comfyui_wplus.wplus_core.checkpoints import load_generator, save_adapter, save_identity
from comfyui_wplus.wplus_core.errors import FileError, WPlusError
from comfyui_wplus.wplus_core.faces import Landmarks
from comfyui_wplus.wplus_core.identity import Identity
from comfyui_wplus.wplus_core.photos import load_photo
from evaluation import small_adapters, small_base, small_clip, small_directions, small_people, torchscript_recogniser
from planted import UNIT, brightness, corner, gained, killed_evaluation, level, methods, plan
from training import LAYERS, exit_code, small_unet, start_process

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
import stand_ins  # noqa: E402


def test_the_shots_are_every_combination_once():
    shots = plan(None, edited_prompts=1).shots("m@1")
    assert len(shots) == len(set(shots)) == len({s.path for s in shots}) == 2 * 2 * 2 + 3 * 2 * 1 * 2
    assert {s.prompt for s in shots if s.edit} == {"a face"}
    again = {Shot("m@1", "ann", p, 0).path for p in ("a face", "A face", "a face!")}
    assert len(again) == 3  # names that read alike are told apart


def test_the_numbers_are_those_of_the_pictures(tmp_path):
    results = evaluate(plan(tmp_path), methods("one"), [level, gained])
    numbers = results["methods"]["one@1"]
    expected = [0.53] * 4 + [0.48] * 4
    assert numbers["level"]["mean"] == pytest.approx(sum(expected) / 8, abs=1 / 255)
    assert numbers["level"]["error"] == pytest.approx(torch.tensor(expected).std().item() / 8**0.5, abs=1e-3)
    assert numbers["pictures"] == numbers["level"]["n"] == 8 and "gained" not in numbers
    points = results["edits"]["one@1"]["brighter"]
    assert [p["strength"] for p in points] == [-2, 0, 1, 2]
    step = UNIT.unit / 10
    for p in points:
        assert p["level"]["mean"] == pytest.approx(0.505 + p["strength"] * step, abs=1 / 255)
        if p["strength"]:
            assert p["gained"]["mean"] == pytest.approx(p["strength"] * step, abs=1 / 255)
    assert json.loads((tmp_path / "evaluation.json").read_text()) == results


def test_every_picture_is_in_the_index_with_its_numbers(tmp_path):
    evaluate(plan(tmp_path), methods("one", "two"), [level, gained])
    rows = [json.loads(line) for line in (tmp_path / "values.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * (8 + 24) == len(list(tmp_path.rglob("*.png")))
    for row in rows:
        pixels = load_photo(tmp_path / row["file"]).pixels
        assert row["level"] == pytest.approx(pixels[1].mean().item()) and ("gained" in row) == bool(row["edit"])


def test_all_methods_and_edits_share_the_noise_and_nothing_else_does(tmp_path):
    evaluate(plan(tmp_path), methods("one", "two"), [corner])
    rows = [json.loads(line) for line in (tmp_path / "values.jsonl").read_text().splitlines()]
    corners = {}
    for r in rows:
        corners.setdefault((r["identity"], r["prompt"], r["number"]), set()).add(r["corner"])
    assert len(corners) == 8 and all(len(x) == 1 for x in corners.values())
    assert len({x for values in corners.values() for x in values}) == 8


def test_noise_is_of_the_names_and_not_of_the_places(tmp_path):
    evaluate(plan(tmp_path / "a"), methods("one"), [corner])
    some = plan(tmp_path / "b")
    alone = Plan(some.run, {"bob": some.identities["bob"]}, some.prompts[1:], latent=(4, 4))
    evaluate(alone, methods("one"))
    (file,) = (tmp_path / "b").rglob("*.png")
    assert file.read_bytes() == (tmp_path / "a" / file.relative_to(tmp_path / "b")).read_bytes()


def results_of(run):
    files = ("evaluation.json", "values.jsonl")
    pictures = {p.relative_to(run): p.read_bytes() for p in run.rglob("*.png")}
    return [(run / f).read_text() for f in files], pictures


def test_a_killed_evaluation_goes_on_to_the_same_end(tmp_path):
    evaluate(plan(tmp_path / "whole"), methods("one"), [level, gained])
    run = tmp_path / "killed"
    assert exit_code(start_process(killed_evaluation, run, 13)) == -9
    kept = {p: p.stat().st_mtime_ns for p in run.rglob("*.png")}
    assert 0 < len(kept) < 32 and not (run / "evaluation.json").exists()
    evaluate(plan(run), methods("one"), [level, gained])
    assert results_of(run) == results_of(tmp_path / "whole")
    assert sum(p.stat().st_mtime_ns == t for p, t in kept.items()) >= len(kept) - 4  # but those of a half-done batch


def test_processes_share_the_work_and_the_last_one_measures(tmp_path, monkeypatch):
    expected = evaluate(plan(tmp_path / "alone"), methods("one"), [level])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert evaluate(plan(tmp_path / "two"), methods("one"), [level]) is None
    assert 0 < len(list((tmp_path / "two").rglob("*.png"))) < 32
    monkeypatch.setenv("RANK", "0")
    assert evaluate(plan(tmp_path / "two"), methods("one"), [level]) == expected
    assert results_of(tmp_path / "two") == results_of(tmp_path / "alone")


def test_nothing_is_painted_twice(tmp_path):
    evaluate(plan(tmp_path), methods("one"))

    def never(*args):
        raise AssertionError

    again = evaluate(plan(tmp_path), [Method("one", never, made_with={"weights": "one"})], [level])
    assert again["methods"]["one@1"]["level"]["n"] == 8


def test_pictures_of_other_settings_are_not_taken_for_these(tmp_path):
    small = {"edits": {}, "numbers": 1}
    evaluate(plan(tmp_path, **small), methods("one"))
    changed = [
        (plan(tmp_path, seed=1, **small), methods("one"), "pictures: seed"),
        (plan(tmp_path, made_with={}, **{**small, "latent": (8, 8)}), methods("one"), "pictures: latent"),
        (plan(tmp_path, **small), [Method("one", brightness, made_with={"weights": "other"})], "methods: one@1"),
        (Plan(tmp_path, {"ann": torch.zeros(LAYERS, 512)}, ("a face",), latent=(4, 4)), [], "identities: ann"),
    ]
    for other, some, words in changed:
        with pytest.raises(WPlusError, match=words):
            evaluate(other, some)
    more = plan(tmp_path, edits={"brighter": UNIT}, numbers=2)
    assert list(evaluate(more, methods("one", "two"))["methods"]) == ["one@1", "two@1"]


def test_what_cannot_be_told_apart_is_refused(tmp_path):
    with pytest.raises(WPlusError, match="two methods are called one@1"):
        evaluate(plan(tmp_path), methods("one", "one"))
    with pytest.raises(WPlusError, match="of one generator"):
        Plan(tmp_path, {"ann": torch.zeros(LAYERS, 512), "bob": torch.zeros(18, 512)}, ("a face",))


def test_what_cannot_be_measured_is_left_out_of_means():
    what = {"file": "", "method": "m", "edit": "", "prompt": "p", "strength": 0.0}
    numbers = summary([what | {"id": 0.2}, what, what | {"id": 0.4}])
    assert numbers == {"id": {"mean": 0.3, "error": 0.1, "n": 2}, "pictures": 3}


def test_a_curve_starts_from_the_same_prompts():
    def row(prompt, edit, strength, x):
        return {"file": "", "prompt": prompt, "edit": edit, "strength": strength, "x": x}

    rows = [row("a", "", 0.0, 1.0), row("b", "", 0.0, 9.0), row("a", "smile", 2.0, 3.0), row("a", "age", 1.0, 7.0)]
    assert [(p["strength"], p["x"]["mean"]) for p in curve(rows, "smile")] == [(0, 1), (2, 3)]


def test_a_set_measurer_sees_the_unedited_pictures(tmp_path):
    sets = [lambda pictures: {"count": float(sum(map(len, pictures)))}]
    assert evaluate(plan(tmp_path), methods("one"), [], sets)["methods"]["one@1"]["count"] == 8


def test_the_report_has_our_rows_and_the_papers(tmp_path):
    pytest.importorskip("matplotlib")
    some = [Method("full", brightness, s, {"weights": 1}) for s in (0.0, 0.5, 1.0)]
    results = evaluate(plan(tmp_path), some, [level, gained, lambda s: {"clip": [0.25] * len(s)}])
    write_report(results, tmp_path, ["fid: --measure.inception"])
    text = (tmp_path / "evaluation.md").read_text()
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert len({len(x) for x in lines[: next(i for i, x in enumerate(lines) if x[1] == "edit")]}) == 1
    assert ["full@0.5", "0.250 ± 0.000"] in [x[:2] for x in lines]
    assert ["*paper, table 1: W+ adapter*", "0.267", "0.418", "0.950"] in [x[:4] for x in lines]
    assert ["full@1", "brighter", "-2"] in [x[:3] for x in lines]
    assert "fid: --measure.inception" in text and "FID" not in text
    assert {p.name for p in draw(results, tmp_path)} == {"edits.png", "scales.png"}
    assert load_photo(tmp_path / "scales.png").pixels.shape[0] == 3
    results["methods"]["full@1"] |= {"fid": 31.234}
    write_report(results, tmp_path)
    assert "| full@1 |  | 31.23 |" in (tmp_path / "evaluation.md").read_text()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return {
        "base": small_base(folder / "base"),
        "identities": (small_people(folder / "people", "ann", "bob"),),
        "adapters": small_adapters(folder),
        "directions": (small_directions(folder / "directions.safetensors", "smile"),),
        "prompts": ("a face", "a cat"),
        "size": 128,
        "steps": 2,
        "device": "cpu",
    }, folder


@pytest.fixture
def a_face_everywhere(monkeypatch):
    face = Landmarks((12.0, 12.0), (20.0, 12.0), (13.0, 20.0), (19.0, 20.0))
    monkeypatch.setattr("comfyui_wplus.train.evaluate_command.build_detector", lambda *args: lambda picture: face)


def test_from_files_to_tables(world, tmp_path, a_face_everywhere):
    settings, folder = world
    trusted = torchscript_recogniser(folder / "colours.pt")
    measure = Measure(clip=small_clip(folder / "clip"), recogniser=trusted, trust_torchscript=True)
    run = Evaluation(
        run=tmp_path, edits=("smile",), strengths=(1.0,), scales=(0.0, 1.0), measure=measure, **settings
    )
    results = evaluate_files(run)
    assert list(results["methods"]) == ["full@0", "full@1", "parallel@0", "parallel@1"]
    for m in results["methods"].values():
        assert m["detection"]["mean"] == 1 and m["clip"]["n"] == m["id"]["n"] == 4 and 0 <= m["id"]["mean"] <= 2
    plain, full, parallel = (
        {p.relative_to(tmp_path / "pictures" / m): p.read_bytes() for p in (tmp_path / "pictures" / m).rglob("*.png")}
        for m in ("full@0", "full@1", "parallel@1")
    )
    assert len(plain) == 4 + 4 and plain.keys() == full.keys()
    for path, picture in plain.items():
        assert (tmp_path / "pictures" / "parallel@0" / path).read_bytes() == picture
        assert picture == plain[next(p for p in plain if p.parts[0] == "unedited" and p.parts[1:] == path.parts[1:])]
        assert len({picture, full[path], parallel[path]}) == 3
    zero, one = (results["edits"][m]["smile"][-1] for m in ("full@0", "full@1"))
    assert zero["background_change"]["mean"] == zero["id_kept"]["mean"] == 0 < one["background_change"]["mean"]
    report = (tmp_path / "evaluation.md").read_text()
    assert "alexnet-owt-7be5be79.pth" in report and "Not measured" in report
    before = results_of(tmp_path)
    assert evaluate_files(run) == results and results_of(tmp_path) == before


def test_stage_one_against_e4es_own_generator(world, tmp_path, a_face_everywhere):
    encoder = stand_ins.write(tmp_path, "encoder")
    save_adapter(new_adapter(small_unet(), 18), tmp_path / "stage1.safetensors")
    w = torch.randn(18, 512)
    save_identity(Identity(w, "ann"), tmp_path / "people" / "ann.safetensors")
    settings = replace(
        preset("aligned"),
        run=tmp_path / "run",
        base=world[0]["base"],
        identities=(tmp_path / "people",),
        adapters=(tmp_path / "stage1.safetensors",),
        directions=(small_directions(tmp_path / "directions.safetensors", "smile", "age", layers=18),),
        encoder=encoder,
        size=128,
        steps=1,
        device="cpu",
    )
    results = evaluate_files(settings)
    assert list(results["methods"]) == ["stage1@1", "e4e@1"]
    painted = load_photo(next((tmp_path / "run/pictures/e4e@1/unedited").rglob("*.png"))).pixels
    expected = load_generator(encoder)(w[None])[0] / 2 + 0.5
    assert (painted - resize(expected.clamp(0, 1)[None], 128)[0]).abs().max() <= 0.51 / 255
    for curves in results["edits"].values():
        assert [p["strength"] for p in curves["smile"]] == [-3, 0, 3]
        assert all("moved" in p and math.isfinite(p["moved"]["mean"]) for p in curves["age"] if p["strength"])
    assert "| *paper, table 2: e4e* | 0.431 | 32.26 | 0.205 | 0.312 | 0.409 |" in (
        tmp_path / "run/evaluation.md"
    ).read_text()


def test_the_settings_of_a_run_are_kept_and_make_it_again(world, tmp_path, a_face_everywhere, capsys):
    settings, _ = world
    args = ["--run", str(tmp_path), "--base", str(settings["base"]), "--identities", str(settings["identities"][0])]
    args += ["--adapters", str(settings["adapters"][0]), "--size", "128", "--steps", "1", "--edits", "--device", "cpu"]
    (tmp_path / "prompts.txt").write_text("a face\n\n a cat \na face\n")
    args += ["--prompt-file", str(tmp_path / "prompts.txt")]
    assert main(["evaluate", "wild", *args, "--dry-run"]) == 0
    assert "steps: 1" in capsys.readouterr().out and not (tmp_path / "settings.yaml").exists()
    assert main(["evaluate", "wild", *args]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["methods"]["full@1"]["pictures"] == 4
    (tmp_path / "evaluation.json").unlink()
    assert main(["evaluate", str(tmp_path / "settings.yaml")]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["methods"]["full@1"]["pictures"] == 4


def test_a_reference_is_the_crop_beside_the_code_or_its_thumbnail(world, tmp_path):
    settings, folder = world
    people = load_people(settings["identities"])
    assert find_references(people, None)["ann"].shape == (3, 48, 48)
    crops = folder / "people" / "crops"
    crops.mkdir(exist_ok=True)
    (crops / "ann.png").touch()
    assert find_references(people, None)["ann"] == crops / "ann.png"
    with pytest.raises(FileError, match="no photo of bob"):
        find_references(people, crops)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"identities": ("nothing",)}, "no codes here"),
        ({"base": "nothing"}, "no SD1.x base model"),
        ({"adapters": ("nothing.safetensors",)}, "no such file"),
        ({"directions": ("nothing",)}, "no such file or folder"),
        ({"edits": ("frown",)}, "the nearest: smile"),
        ({"measure": Measure(clip="nothing")}, "hf download"),
        ({"measure": Measure(parser="nothing")}, "no such file"),
        ({"directions": ()}, "--directions must say"),
        ({"identities": ("other layers.pth",)}, "reads codes of 4 layers, --identities have 6"),
        ({"prompts": ()}, "nothing to paint"),
        ({"prompt_file": "nothing.txt"}, "one prompt a line"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_painted(
    world, tmp_path, monkeypatch, a_face_everywhere, change, words
):
    def paths(x):
        return tuple(map(Path, x)) if isinstance(x, tuple) and x and x[0] != "frown" else x

    monkeypatch.chdir(tmp_path)
    torch.save(torch.zeros(1, 6, 512), "other layers.pth")
    change = {k: Path(x) if isinstance(x, str) else paths(x) for k, x in change.items()}
    with pytest.raises(WPlusError, match=words):
        evaluate_files(Evaluation(**{"run": tmp_path, "edits": ("smile",), "strengths": (1.0,), **world[0], **change}))
    assert not list(tmp_path.rglob("*.png"))


def test_the_presets_are_whole_and_others_are_refused(capsys):
    assert len(preset("wild").prompts) == len(set(preset("wild").prompts)) == 20
    assert preset("aligned").prompts == ("a photo of a face",)
    assert main(["evaluate", "nothing"]) == 1
    assert "there are aligned, wild" in capsys.readouterr().err
