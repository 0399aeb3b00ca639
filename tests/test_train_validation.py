"""Validation: pictures and held-out losses that change nothing in the training, and faults found before it begins."""

import signal
from dataclasses import replace

import pytest
import torch
from comfyui_wplus.train import loop, validation
from comfyui_wplus.train.config import Keep, Speed, Track, Validate
from comfyui_wplus.train.run_folder import RunFolder
from comfyui_wplus.wplus_core.checkpoints import save_identity
from comfyui_wplus.wplus_core.direction_files import save_directions
from comfyui_wplus.wplus_core.directions import Direction
from comfyui_wplus.wplus_core.errors import FileError, WPlusError
from comfyui_wplus.wplus_core.identity import Identity
from PIL import Image
from preparing import write_base
from training import (
    LAYERS,
    everything,
    exit_code,
    small_config,
    small_dataset,
    small_world,
    start_process,
    train_and_die,
    train_in_two_processes,
)

PIXELS = 128


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    world = small_world(folder)
    write_base(world["base"])
    return world


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Held-out data, two identity files with three codes, a direction."""
    folder = tmp_path_factory.mktemp("files")
    rng = torch.Generator().manual_seed(5)
    torch.save(torch.randn(1, LAYERS, 512, generator=rng), folder / "ann.pth")
    save_identity(Identity(torch.randn(2, LAYERS, 512, generator=rng), "bob"), folder / "bob b.safetensors")
    save_directions([Direction("smile", torch.randn(LAYERS, 512, generator=rng))], folder / "d.safetensors")
    return dict(
        data=(small_dataset(folder / "held_out", seed=7),),
        identities=(folder / "ann.pth", folder / "bob b.safetensors"),
        directions=(folder / "d.safetensors",),
    )


@pytest.fixture
def settings(files):
    return Validate(every=8, images=3, prompts=("a face",), edits=("", "smile=2"), steps=2, **files)


def validated(run):
    return [x for x in RunFolder(run).stats() if "validation/s" in x]


def stable(run, images):
    """Tensors and statistics of a run without its validation."""
    tensors, lines = everything(run, images)
    return tensors, [x for x in lines if "validation/s" not in x]


def assert_same_training(a, b, images):
    (ours, lines), (theirs, their_lines) = stable(a, images), stable(b, images)
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []
    assert lines == their_lines


def test_validation_changes_nothing_and_a_run_killed_in_it_makes_it_again(world, settings, tmp_path):
    plain, whole, killed = (
        small_config(world, tmp_path / n, images=16, speed=Speed(workers=0)) for n in ("plain", "whole", "killed")
    )
    whole, killed = (replace(c, validate=settings) for c in (whole, killed))
    loop.train(plain)
    loop.train(whole)
    assert_same_training(plain.run, whole.run, 16)
    assert [x["images"] for x in validated(whole.run)] == [0, 8, 16]
    assert exit_code(start_process(train_and_die, killed, "in validation", 2)) == -signal.SIGKILL
    assert validated(killed.run) == []
    assert exit_code(start_process(train_and_die, killed, "in validation", 5)) == -signal.SIGKILL
    assert [x["images"] for x in validated(killed.run)] == [0] and RunFolder(killed.run).latest().name[-2:] == "08"
    loop.train(killed)
    assert_same_training(plain.run, killed.run, 16)
    assert [x | {"validation/s": 0} for x in validated(whole.run)] == [
        x | {"validation/s": 0} for x in validated(killed.run)
    ]
    names = sorted(p.name for p in (whole.run / "validation").iterdir())
    assert names == sorted(f"{n:08d}-{p}.png" for n in (0, 8, 16) for p in ("ann", "bob_b-1", "bob_b-2"))
    for name in names:
        assert (whole.run / "validation" / name).read_bytes() == (killed.run / "validation" / name).read_bytes()
    loop.train(killed)
    assert len(validated(killed.run)) == 3
    denoiser, state, v = open_at_start(whole)
    accelerator = loop.new_accelerator(whole)
    averaged, raw = (v(denoiser.unet, a, 99, accelerator)[0]["total"] for a in (state.ema, state.adapter))
    assert averaged == pytest.approx(validated(whole.run)[-1]["validation/total"], rel=1e-6) != raw


def open_at_start(config):
    stream = loop.open_stream(config)
    denoiser, state = loop.start(config, RunFolder(config.run), stream, torch.device("cpu"))
    return denoiser, state, validation.open_validation(config, stream, 1)


def test_a_sheet_has_prompts_down_edits_across_and_one_noise_in_a_row(world, settings, tmp_path):
    settings = replace(settings, prompts=("a face", "a cat"), edits=("", "smile=-2", "smile=2"))
    config = small_config(world, tmp_path / "run", validate=settings, speed=Speed(workers=0))
    denoiser, state, v = open_at_start(config)
    person = v.sheets.people[0]
    pictures = v.sheets.draw(person, denoiser.unet, state.ema)
    assert pictures.shape == (6, 3, PIXELS, PIXELS)
    different = [(pictures[0] - x).abs().mean().item() for x in pictures]
    assert 0 < different[1] < different[3] and 0 < different[2] < different[3]
    one = replace(v.sheets, settings=replace(settings, prompts=("a face",), edits=("",)), edits=([],), batch=1)
    one = replace(one, text=v.sheets.text[:2])
    torch.testing.assert_close(one.draw(person, denoiser.unet, state.ema)[0], pictures[0], atol=1e-5, rtol=1e-4)
    sheet = v.sheets.sheet(pictures)
    assert sheet.width > 3 * PIXELS and sheet.height > 2 * PIXELS
    state.ema.layers[0].to_v.weight.data.mul_(-3)
    assert not torch.equal(v.sheets.draw(person, denoiser.unet, state.ema), pictures)


def test_the_held_out_loss_is_of_the_average_and_of_fixed_draws(world, settings, tmp_path):
    losses = {}
    for micro in (1, 2):
        speed = Speed(micro_batch=micro, workers=0)
        config = small_config(world, tmp_path / "run", validate=replace(settings, identities=()), speed=speed)
        denoiser, state, v = open_at_start(config)
        accelerator = loop.new_accelerator(config)
        losses[micro] = v(denoiser.unet, state.ema, 0, accelerator)[0]
    assert losses[1] == pytest.approx(losses[2], rel=1e-5)
    assert losses[1]["total"] == pytest.approx(sum(losses[1][k] * x for k, x in dict(rec=1, disen=1.5, reg=1).items()))
    batch = [v.held_out.stream[n] for n in range(3)]
    batch = loop.Batch(*(torch.stack(x) for x in zip(*batch, strict=True)))
    assert all(batch.w.flatten(1).any(1))  # nothing is dropped
    assert losses[1]["rec"] == pytest.approx(config.objective(denoiser, batch)["rec"].item(), rel=1e-5)
    for p in denoiser.adapter.parameters():
        p.data.zero_()
    assert v(denoiser.unet, state.ema, 0, accelerator)[0] == losses[2]
    for p in state.ema.parameters():
        p.data.zero_()
    assert v(denoiser.unet, state.ema, 0, accelerator)[0] != losses[2]


def test_two_processes_share_the_validation(world, settings, tmp_path):
    one, two = (small_config(world, tmp_path / n, images=2, validate=settings) for n in ("one", "two"))
    loop.train(one)
    train_in_two_processes(two)
    for a, b in zip(validated(one.run), validated(two.run), strict=True):
        assert a["validation/total"] == pytest.approx(b["validation/total"], rel=1e-4)
    names = [sorted(p.name for p in (c.run / "validation").iterdir()) for c in (one, two)]
    assert names[0] == names[1] and len(names[0]) == 6


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(edits=("simle=2",)), "no direction 'simle'.*smile"),
        (dict(directions=(), edits=("smile=2",)), "no direction files"),
        (dict(prompts=("a face",) * 150), "grid would be over"),
        (dict(identities="twice"), "names of their own"),
        (dict(identities="other generator"), "18 layers"),
        (dict(data="nothing"), "index.json is missing"),
    ],
)
def test_a_fault_is_found_before_the_first_step(world, settings, tmp_path, monkeypatch, change, match):
    torch.save(torch.randn(18, 512), tmp_path / "w.pt")
    named = {"twice": settings.identities[:1] * 2, "other generator": (tmp_path / "w.pt",), "nothing": (tmp_path,)}
    change = {k: named[x] if isinstance(x, str) else x for k, x in change.items()}
    monkeypatch.setattr(loop, "step", None)
    with pytest.raises(WPlusError, match=match):
        loop.train(small_config(world, tmp_path / "run", validate=replace(settings, **change)))


def test_a_base_without_vae_is_said_at_the_start(world, settings, tmp_path, monkeypatch):
    bare = small_world(tmp_path)
    monkeypatch.setattr(loop, "step", None)
    with pytest.raises(FileError, match="text encoder.*leave out --validate.identities"):
        loop.train(small_config(bare, tmp_path / "run", validate=settings))


def test_tensorboard_shows_curves_and_sheets_and_goes_on_after_a_kill(world, settings, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = small_config(world, tmp_path / "run", images=8, validate=settings)
    config = replace(config, track=Track(), keep=Keep(every=4, log=2), speed=Speed(workers=0))
    assert exit_code(start_process(train_and_die, config, "in a step", 4)) == -signal.SIGKILL
    loop.train(config)
    events = EventAccumulator(str(config.run / "tensorboard" / "wplus"), purge_orphaned_data=True).Reload()
    assert [x.step for x in events.Scalars("total")] == [2, 4, 6, 8]
    assert [x.step for x in events.Scalars("validation/total")] == [0, 8]
    lines = {x["images"]: x["total"] for x in RunFolder(config.run).stats() if "total" in x}
    assert {x.step: x.value for x in events.Scalars("total")} == pytest.approx(lines, rel=1e-6)
    assert {x.step for x in events.Images("validation/ann")} == {0, 8}
    with Image.open(config.run / "validation" / "00000008-ann.png") as sheet:
        assert events.Images("validation/ann")[-1].width == sheet.width


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_tracker_is_said_at_the_start(world, tmp_path, monkeypatch, name):
    monkeypatch.setattr("comfyui_wplus.train.record.find_spec", lambda name: None)
    with pytest.raises(WPlusError, match=f"pip install {name}"):
        loop.train(small_config(world, tmp_path / "run", track=Track(to=(name,))))
    assert not (tmp_path / "run").exists()
