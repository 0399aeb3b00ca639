"""Settings: presets hold the paper's values, YAML and the command line agree, faults are named."""

import json
from pathlib import Path

import pytest
import tyro
from comfyui_wplus.train.__main__ import main, parse
from comfyui_wplus.train.config import Config, Optim, check_resumable, from_dict, load_yaml, preset, save_yaml, to_dict
from comfyui_wplus.wplus_core.errors import FileError, WPlusError

GIVEN = ["--run", "r", "--base", "sd15", "--data", "a", "b"]


def test_stage_one_is_the_papers():
    c, _ = parse("stage1", GIVEN)
    assert (c.stage, c.train_mapping, c.shares, c.batch) == (1, True, (0.6, 0.4), 16)
    assert (c.objective.disen, c.objective.reg, c.objective.min_snr) == (0, 0, 0)
    assert (c.dropout.w, c.dropout.text, c.dropout.both) == (0.05, 0.05, 0.05)
    assert (c.optim.lr, c.optim.weight_decay) == (1e-4, 0.01)


def test_stage_two_is_the_papers():
    c, _ = parse("stage2", [*GIVEN, "--adapter", "one.safetensors"])
    assert (c.stage, c.train_mapping, c.batch, c.parallel) == (2, False, 16, False)
    assert (c.objective.disen, c.objective.reg) == (1.5, 1.0)
    assert c.augment.kinds == ("shuffle", "noise", "both")


@pytest.mark.parametrize("name", ["stage1", "stage2"])
def test_a_stage_validates_as_the_paper_samples_once_files_are_given(name):
    c = preset(name)
    assert (c.validate.steps, c.validate.guidance, c.track.to) == (50, 7.5, ("tensorboard",))
    assert c.validate.data == c.validate.identities == () and c.validate.every % c.keep.every == 0
    given = ["--validate.identities", "a.pth", "b.pth", "--validate.edits", "", "smile=2", "--track.to", "wandb"]
    c, _ = parse(name, [*GIVEN, "--adapter", "one.safetensors", *given])
    assert c.validate.identities == (Path("a.pth"), Path("b.pth")) and c.validate.edits == ("", "smile=2")
    assert c.track.to == ("wandb",) and parse(name, [*GIVEN, "--adapter", "x", "--track.to"])[0].track.to == ()


def test_stage_two_needs_stage_ones_weights_or_says_one_stage():
    with pytest.raises(WPlusError, match="--adapter"):
        parse("stage2", GIVEN)
    assert parse("stage2", [*GIVEN, "--train-mapping"])[0].train_mapping


def test_the_command_line_wins_over_the_preset():
    c, dry = parse("smoke", [*GIVEN, "--optim.lr", "3e-4", "--objective.reg", "0.5", "--augment.kinds", "noise"])
    assert (c.optim.lr, c.objective.reg, c.augment.kinds, dry) == (3e-4, 0.5, ("noise",), False)
    assert c.keep == preset("smoke").keep


def test_settings_come_back_from_yaml_and_json(tmp_path):
    c, _ = parse("smoke", [*GIVEN, "--speed.micro-batch", "1"])
    save_yaml(c, tmp_path / "config.yaml")
    assert load_yaml(tmp_path / "config.yaml") == c
    assert from_dict(Config, json.loads(json.dumps(to_dict(c)))) == c


def test_a_yaml_file_of_ones_own_is_a_preset(tmp_path):
    (tmp_path / "mine.yaml").write_text("batch: 2\nimages: 4\noptim: {lr: 1}\n")
    c, _ = parse(str(tmp_path / "mine.yaml"), GIVEN)
    assert (c.batch, c.optim) == (2, Optim(lr=1.0))


@pytest.mark.parametrize(
    "text, message",
    [
        ("bacth: 2", "bacth"),
        ("batch: two", "batch must be of type int"),
        ("batch: true", "batch must be of type int"),
        ("train_mapping: 1", "train_mapping must be of type bool"),
        ("optim: {lr: fast}", "lr must be of type float"),
        ("optim: {schedule: linear}", "cosine"),
        ("optim: 3", "of optim"),
        ("stage: 3", "stage must be one of"),
        ("augment: {kinds: [flip]}", "flip"),
        ("track: {to: [tensorbord]}", "tensorboard"),
        ("validate: {prompts: []}", "at least one image, prompt"),
        ("a: [", "no readable YAML"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path, text, message):
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(FileError, match=message):
        load_yaml(tmp_path / "wrong.yaml")


def test_what_is_required_stays_to_be_given():
    c = preset("stage1")
    assert tyro.MISSING in (c.run,) and tyro.MISSING in (c.base,)
    with pytest.raises(WPlusError, match="smoke, stage1, stage2"):
        preset("stage3")


def test_batches_must_divide():
    with pytest.raises(WPlusError, match="multiple"):
        parse("smoke", [*GIVEN, "--images", "10"])
    c, _ = parse("stage1", [*GIVEN, "--speed.micro-batch", "2"])
    assert (c.micro(1), c.micro(8), preset("smoke").micro(2)) == (2, 2, 2)
    with pytest.raises(WPlusError, match="3 processes"):
        c.micro(3)
    assert parse("stage1", GIVEN)[0].micro(4) == 4


def test_the_learning_rate_warms_up_and_decays():
    constant, cosine = Optim(lr=2.0, warmup=10), Optim(lr=2.0, warmup=10, schedule="cosine")
    assert [constant.lr_at(i, 110) for i in (0, 4, 9, 10, 109)] == pytest.approx([0.2, 1.0, 2.0, 2.0, 2.0])
    assert [cosine.lr_at(i, 110) for i in (0, 10, 60, 110)] == pytest.approx([0.2, 2.0, 1.0, 0.0])
    assert Optim(lr=2.0).lr_at(0, 100) == 2.0


def test_a_run_goes_on_with_its_own_settings():
    c, _ = parse("smoke", GIVEN)
    faster, _ = parse("smoke", [*GIVEN, "--speed.workers", "3", "--images", "32", "--keep.last", "1"])
    check_resumable(c, faster)
    other, _ = parse("smoke", [*GIVEN, "--seed", "1", "--objective.reg", "2", "--validate.steps", "9"])
    with pytest.raises(WPlusError, match=r"seed: 0 -> 1, objective.reg: 1.0 -> 2"):
        check_resumable(c, other)


def test_a_dry_run_prints_and_stops(capsys, tmp_path):
    run = tmp_path / "run"
    assert main(["smoke", "--run", str(run), "--base", "none", "--data", "none", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "disen: 1.5" in out and str(run) in out and not run.exists()


def test_wrong_input_is_one_line_and_exit_one(capsys, tmp_path):
    assert main(["smoke", "--run", str(tmp_path / "r"), "--base", "none", "--data", str(tmp_path)]) == 1
    assert "index.json is missing" in capsys.readouterr().err
    assert main(["stage7"]) == 1
    assert main([]) == 2
