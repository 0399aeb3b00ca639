"""The loop: a killed run becomes the run that was never killed; bad steps, signals, several processes, export."""

import copy
import json
import os
import shutil
import signal
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from comfyui_wplus.train import loop
from comfyui_wplus.train.__main__ import main
from comfyui_wplus.train.config import Keep, Optim, Speed, load_yaml
from comfyui_wplus.train.data import Prepared, write_dataset
from comfyui_wplus.train.export import export
from comfyui_wplus.train.objectives import Objective
from comfyui_wplus.train.record import Record
from comfyui_wplus.train.run_folder import RunFolder
from comfyui_wplus.wplus_core.checkpoints import load_adapter
from comfyui_wplus.wplus_core.errors import FileError, WPlusError
from comfyui_wplus.wplus_core.files import read
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from training import (
    LAYERS,
    everything,
    exit_code,
    sample,
    small_config,
    small_dataset,
    small_unet,
    small_world,
    start_process,
    train_and_die,
    train_in_two_processes,
)

posix = pytest.mark.skipif(sys.platform == "win32", reason="kill -9 and SIGTERM are POSIX")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    torch.set_num_threads(1)
    return small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A run that nothing interrupted, of a process of its own as the killed ones are."""
    config = small_config(world, tmp_path_factory.mktemp("runs") / "whole")
    assert exit_code(start_process(train_and_die, config)) == 0
    return config


def assert_same_run(a, b, images=24):
    (ours, lines), (theirs, their_lines) = everything(a, images), everything(b, images)
    assert ours.keys() == theirs.keys()
    assert [k for k in ours if not torch.equal(ours[k], theirs[k])] == []
    assert lines == their_lines


def test_a_run_trains_and_keeps_its_last_checkpoints(whole):
    run = RunFolder(whole.run)
    assert [p.name for p in run.checkpoints()] == ["checkpoint-00000016", "checkpoint-00000024"]
    assert sorted(p.name for p in whole.run.iterdir() if p.name.startswith(".")) == []
    assert [x["images"] for x in run.stats()] == list(range(2, 25, 2))
    assert load_yaml(whole.run / "config.yaml") == whole
    assert {"rec", "disen", "reg", "total", "grad_norm", "lr", "skipped"} <= run.stats()[0].keys()
    first, last = (load_adapter(p / "adapter.safetensors") for p in run.checkpoints())
    assert not torch.equal(first.layers[0].to_q.weight, last.layers[0].to_q.weight)


# Each process goes on where the one before it was killed: (where, at which call of it, images of the last checkpoint).
DEATHS = [
    ("in a step", 2, None),
    ("between two files of a checkpoint", 1, None),
    ("while a checkpoint goes to the disk", 2, None),
    ("before a checkpoint gets its name", 1, None),
    ("after a checkpoint got its name", 1, 8),
    ("in a step", 3, 8),
    ("in the middle of a file of a checkpoint", 1, 8),
    ("after a checkpoint got its name", 1, 16),
    ("while an old checkpoint is deleted", 2, 24),
]


@posix
def test_a_run_killed_anywhere_ends_as_if_it_had_not_been(world, whole, tmp_path):
    config = small_config(world, tmp_path / "killed")
    for death, number, images in DEATHS:
        assert exit_code(start_process(train_and_die, config, death, number)) == -signal.SIGKILL, death
        last = RunFolder(config.run).latest()
        assert (last and int(last.name[-8:])) == images, death
    assert exit_code(start_process(train_and_die, config)) == 0
    assert_same_run(config.run, whole.run)
    assert len(list(config.run.glob("*checkpoint*"))) == 2 and not list(config.run.glob(".*"))


@posix
def test_sigterm_saves_and_the_same_command_resumes(world, whole, tmp_path, monkeypatch):
    config = small_config(world, tmp_path / "preempted")
    step, calls = loop.step, []

    def told_to_stop(*args):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(loop, "step", told_to_stop)
    assert loop.train(config).images == 6
    assert signal.getsignal(signal.SIGTERM) is before
    assert RunFolder(config.run).latest().name == "checkpoint-00000006"
    assert exit_code(start_process(train_and_die, config)) == 0
    assert_same_run(config.run, whole.run)


def test_more_workers_and_a_longer_run_are_resumptions_another_seed_is_not(world, tmp_path):
    config = small_config(world, tmp_path / "run", images=4)
    loop.train(config)
    longer = replace(config, images=8, speed=Speed(micro_batch=2, workers=1))
    assert loop.train(longer).images == 8
    assert loop.train(longer).images == 8
    with pytest.raises(WPlusError, match="seed: 0 -> 1"):
        loop.train(replace(longer, seed=1))


def test_two_processes_give_the_gradients_of_one(world, tmp_path):
    """After one step AdamW's first moment is 0.1 of the gradient."""
    one, two = (small_config(world, tmp_path / n, images=4, batch=4, optim=Optim(clip=0)) for n in ("one", "two"))
    loop.train(one)
    train_in_two_processes(two)
    moments = [everything(c.run, 4)[0] for c in (one, two)]
    keys = [k for k in moments[0] if k.endswith("exp_avg")]
    assert len(keys) == 6 + 12
    for k in keys:
        a, b = (m[k] for m in moments)
        assert a.norm() > 0 and (a - b).norm() < 1e-5 * a.norm(), k
    stats = [RunFolder(c.run).stats()[0] for c in (one, two)]
    assert stats[0]["total"] == pytest.approx(stats[1]["total"], rel=1e-5)


def test_a_run_goes_on_with_another_number_of_processes(world, tmp_path):
    one, two = (small_config(world, tmp_path / n, images=8, batch=4) for n in ("one", "two"))
    loop.train(replace(two, images=4))
    train_in_two_processes(two)
    loop.train(replace(one, images=4))
    loop.train(one)
    a, b = everything(one.run, 8)[0], everything(two.run, 8)[0]
    for k in a:
        assert (a[k] - b[k]).norm() <= 1e-3 * a[k].norm(), k


def test_processes_that_do_not_know_of_each_other_write_nothing(world, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(WPlusError, match="ACCELERATE_USE_CPU"):
        loop.train(small_config(world, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def spoiled(world, tmp_path):
    """A data set with NaN in some latents."""
    folder = small_dataset(tmp_path / "spoiled")
    shard = load_file(folder / "shard-00001.safetensors")
    shard["latents"][1] = float("nan")
    save_file(shard, folder / "shard-00001.safetensors")
    return folder


def test_a_bad_gradient_is_skipped_and_counted(world, spoiled, tmp_path):
    config = small_config({**world, "data": (spoiled,)}, tmp_path / "run", images=20, batch=1, keep=Keep(log=1))
    state = loop.train(config)
    assert state.skipped == 2 and state.images == 20
    assert all(p.isfinite().all() for p in (*state.adapter.parameters(), *state.ema.parameters()))
    assert RunFolder(config.run).stats()[-1]["skipped"] == 2
    assert sum("rec" not in x for x in RunFolder(config.run).stats()) == 2


def test_a_skipped_step_changes_nothing(world, tmp_path):
    config = small_config(world, tmp_path / "run", batch=1, images=2, optim=Optim(lr=1e-3))
    stream = loop.open_stream(config)
    denoiser, state = loop.start(config, RunFolder(config.run), stream, torch.device("cpu"))
    state.images = 10_000  # so that the average lags behind
    accelerator = Accelerator(cpu=True)
    good, bad = (loop.Batch(*(x[None] for x in stream[n])) for n in (0, 1))
    loop.step(denoiser, state, config, [good], accelerator)
    before = copy.deepcopy((state.adapter.state_dict(), state.ema.state_dict(), state.optimizer.state_dict()["state"]))
    _, norm = loop.step(denoiser, state, config, [good, bad._replace(z0=bad.z0 / 0)], accelerator)
    after = state.adapter.state_dict(), state.ema.state_dict(), state.optimizer.state_dict()["state"]
    assert norm != norm and (state.skipped, state.bad_in_a_row) == (1, 1)
    for a, b in zip(before, after, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    loop.step(denoiser, state, config, [good], accelerator)
    assert state.bad_in_a_row == 0
    assert not torch.equal(before[0]["layers.0.to_q.weight"], state.adapter.layers[0].to_q.weight)


@pytest.mark.parametrize("name", ["adapter.safetensors", "ema.safetensors", "optimizer.pt", "state.json"])
def test_a_damaged_checkpoint_is_named_with_what_to_do(world, whole, tmp_path, name):
    config = replace(whole, run=tmp_path / "run")
    shutil.copytree(whole.run, config.run)
    file = config.run / "checkpoint-00000024" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(FileError, match="checkpoint-00000024: damaged.*Delete it.*from checkpoint-00000016"):
        loop.train(config)
    shutil.rmtree(file.parent)
    loop.train(config)
    assert_same_run(config.run, whole.run)


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for a GPU: reading a value, or a shape that depends on values."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.seen.append(op)
        return op(*args, **(kwargs or {}))


def test_a_step_reads_nothing_from_the_device(world, tmp_path):
    config = small_config(world, tmp_path / "run", images=2, objective=Objective(disen=1.5, reg=1.0, min_snr=5.0))
    stream = loop.open_stream(config)
    denoiser, state = loop.start(config, RunFolder(config.run), stream, torch.device("cpu"))
    accelerator = Accelerator(cpu=True)
    batches = [loop.Batch(*(x[None] for x in stream[n])) for n in (0, 1)]
    with Record(RunFolder(config.run), config, accelerator, 0) as record, HostReads() as reads:
        record.add(*loop.step(denoiser, state, config, batches, accelerator))
        assert reads.seen == []
        state.skipped.item()
        assert len(reads.seen) == 1


def test_every_lowering_of_the_fp16_scale_is_a_skipped_step(world, tmp_path):
    config = small_config(world, tmp_path / "run", speed=Speed(precision="fp16", workers=0))
    stream = loop.open_stream(config)
    denoiser, state = loop.start(config, RunFolder(config.run), stream, torch.device("cpu"))
    batch, accelerator = loop.Batch(*(x[None] for x in stream[0])), Accelerator(cpu=True)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    for _ in range(2):
        loop.step(denoiser, state, config, [batch], accelerator)
    assert (state.skipped, state.bad_in_a_row, state.scaler.get_scale()) == (2, 2, 2.0**38)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    loop.step(denoiser, state, config, [batch], accelerator)
    assert (state.skipped, state.bad_in_a_row, state.scaler.get_scale()) == (2, 0, 2.0**8)


def test_too_many_bad_steps_stop_the_run_at_its_last_good_state(world, tmp_path):
    folder = small_dataset(tmp_path / "rotten", count=4)
    shard = load_file(folder / "shard-00000.safetensors")
    save_file(shard | {"latents": shard["latents"] / 0}, folder / "shard-00000.safetensors")
    config = small_config({**world, "data": (folder,)}, tmp_path / "run", keep=Keep(bad_steps=3, log=2))
    with pytest.raises(WPlusError, match="3 steps in a row"):
        loop.train(config)
    saved = load_adapter(RunFolder(config.run).checkpoint(6) / "adapter.safetensors")
    untrained = loop.first_adapter(config, loop.load_unet(config.base), loop.open_stream(config))
    torch.testing.assert_close(saved.state_dict(), untrained.state_dict(), rtol=0, atol=0)


def test_accumulation_gives_the_whole_batchs_gradient(world, tmp_path):
    runs = []
    for micro in (1, 2, 4):
        speed = Speed(micro_batch=micro, workers=0)
        config = small_config(world, tmp_path / str(micro), images=4, batch=4, speed=speed)
        loop.train(config)
        runs.append(everything(config.run, 4)[0])
    for k in [k for k in runs[0] if k.endswith("exp_avg")]:
        for other in runs[1:]:
            assert (runs[0][k] - other[k]).norm() < 1e-4 * runs[0][k].norm(), k


def test_clipping_bounds_the_gradient(world, tmp_path):
    runs = {}
    for clip in (0, 1e-2):
        config = small_config(world, tmp_path / str(clip), images=2, optim=Optim(clip=clip))
        loop.train(config)
        moments, (line,) = everything(config.run, 2)
        runs[clip] = torch.stack([10 * x.norm() for k, x in moments.items() if k.endswith("exp_avg")]).norm()
        assert line["grad_norm"] == pytest.approx(runs[0].item(), rel=1e-3)
    assert runs[0] > 0.02 and runs[1e-2].item() == pytest.approx(1e-2, rel=1e-3)


def test_the_moving_average_has_its_half_life(world, tmp_path):
    config = small_config(world, tmp_path / "run", batch=2, keep=Keep(ema_half_life=4))
    _, state = loop.start(config, RunFolder(config.run), loop.open_stream(config), torch.device("cpu"))
    with torch.no_grad():
        for p in state.trained.values():
            p.fill_(0)
    for p in state.ema.parameters():
        p.fill_(1)
    state.images = 10_000
    for expected in (0.5**0.5, 0.5):
        loop.update_ema(state, config, torch.tensor(True))
        torch.testing.assert_close(state.ema.layers[0].to_q.weight.mean(), torch.tensor(expected))
    state.images = 0
    loop.update_ema(state, config, torch.tensor(True))
    assert state.ema.layers[0].to_q.weight.count_nonzero() == 0


@pytest.mark.parametrize(
    "changes",
    [
        dict(speed=Speed(precision="bf16", workers=0)),
        dict(speed=Speed(gradient_checkpointing=True, channels_last=True, workers=0)),
        dict(parallel=True, objective=Objective(reg=0.5, min_snr=5.0)),
        dict(keep=Keep(ema_half_life=0)),
    ],
    ids=["bf16", "checkpointing, channels last", "parallel, without disen, min-SNR", "without EMA"],
)
def test_every_way_of_training_trains(world, tmp_path, changes):
    config = small_config(world, tmp_path / "run", images=4, **changes)
    state = loop.train(config)
    reference = loop.train(small_config(world, tmp_path / "reference", images=4)) if "speed" in changes else None
    if reference is not None:
        total, expected = (RunFolder(c).stats()[-1]["total"] for c in (config.run, tmp_path / "reference"))
        assert total == pytest.approx(expected, rel=0.02)
    raw, average = (load_adapter(RunFolder(config.run).latest() / f"{n}.safetensors") for n in ("adapter", "ema"))
    same = torch.equal(raw.layers[0].to_q.weight, average.layers[0].to_q.weight)
    assert same == (config.keep.ema_half_life == 0) and state.skipped == 0


def test_compiling_makes_one_graph_with_gradients_and_one_without(world, tmp_path, monkeypatch):
    """Whole graphs (a break would make more), by dynamo alone: its backend is tested by those who make it."""
    graphs, compile_ = [], torch.nn.Module.compile

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_(self, backend=backend, **how))
    runs = [small_config(world, tmp_path / n, images=4, speed=Speed(compile=n == "b", workers=0)) for n in ("a", "b")]
    totals = []
    for config in runs:
        loop.train(config)
        totals.append([x["total"] for x in RunFolder(config.run).stats()])
    assert len(graphs) == 2 and totals[0] == pytest.approx(totals[1], rel=1e-6)


def test_no_compiler_is_said_before_anything_is_loaded(world, tmp_path, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("/no/such/compiler",))
    monkeypatch.setattr(loop, "load_unet", lambda *_: pytest.fail("loaded"))
    with pytest.raises(WPlusError, match=r"/no/such/compiler.*--speed\.no-compile"):
        loop.train(small_config(world, tmp_path / "run", images=4, speed=Speed(compile=True, workers=0)))


@posix
def test_sigterm_to_the_whole_process_group_saves(world, tmp_path):
    """As torchelastic, systemd and SLURM send it: the data loader's workers get it too."""
    config = small_config(world, tmp_path / "run", images=24, speed=Speed(workers=1))
    assert exit_code(start_process(train_and_die, config, "its group told to stop", 3)) == 0
    assert RunFolder(config.run).latest().name == "checkpoint-00000006"


@posix
def test_sigterm_to_one_of_two_processes_stops_both(world, tmp_path):
    config = small_config(world, tmp_path / "run", images=24, keep=Keep(log=8))
    train_in_two_processes(config, {"1": ("told to stop", 3)})
    assert [p.name for p in RunFolder(config.run).checkpoints()] == ["checkpoint-00000008"]
    loop.train(config)
    assert RunFolder(config.run).latest().name == "checkpoint-00000024"


def test_processes_that_see_different_checkpoints_are_stopped(world, tmp_path):
    config = small_config(world, tmp_path / "run")
    stream = loop.open_stream(config)
    _, state = loop.start(config, RunFolder(config.run), stream, torch.device("cpu"))
    for other, fits in ((0, True), (8, False)):
        gather = lambda here, other=other: torch.cat([here, here + torch.tensor([[other, 0]])])  # noqa: E731
        with nullcontext() if fits else pytest.raises(WPlusError, match="all machines share"):
            loop.check_agreement(state, stream, SimpleNamespace(device="cpu", gather=gather))


def test_stage_one_then_stage_two_then_export(world, tmp_path, capsys):
    """The commands a user types; the mapping network of stage I comes through stage II unchanged."""
    one, two, file = tmp_path / "one", tmp_path / "two", tmp_path / "one.safetensors"
    faces = small_dataset(tmp_path / "faces", text=False)
    common = ["--base", str(world["base"]), "--images", "4", "--batch", "2", "--speed.workers", "0"]
    common += ["--speed.precision", "fp32", "--speed.no-compile", "--optim.lr", "1e-3"]
    synthetic = str(small_dataset(tmp_path / "synthetic", text=False, seed=2))
    assert main(["stage1", "--run", str(one), "--data", str(faces), synthetic, *common]) == 0
    assert main(["export", str(one), str(file), str(tmp_path / "one.bin")]) == 0
    second = ["stage2", "--run", str(two), "--data", str(world["data"][0]), *common, "--adapter", str(file)]
    assert main(second) == 0
    assert main(["export", str(two), str(tmp_path / "two.safetensors"), "--raw"]) == 0
    assert "stage 2, 4 images, raw" in capsys.readouterr().out
    first, last = load_adapter(file), load_adapter(tmp_path / "two.safetensors")
    torch.testing.assert_close(last.mapping.state_dict(), first.mapping.state_dict(), rtol=0, atol=0)
    assert not torch.equal(last.layers[0].to_v.weight, first.layers[0].to_v.weight)
    torch.testing.assert_close(load_adapter(tmp_path / "one.bin").state_dict(), first.state_dict(), rtol=0, atol=0)
    metadata = read(tmp_path / "two.safetensors").metadata
    training = json.loads(metadata["training"])
    assert (metadata["stage"], metadata["images"], metadata["weights"]) == ("2", "4", "raw")
    assert training["objective"]["disen"] == 1.5 and training["adapter"] == str(file)


def test_what_cannot_be_exported_is_said(world, whole, tmp_path):
    for file, match in (("a.ckpt", "ending"), ("a.safetensors", "no checkpoint 7")):
        with pytest.raises(FileError, match=match):
            export(whole.run, tmp_path / file, images=7 if "7" in match else None)
    with pytest.raises(FileError, match="no checkpoint"):
        export(tmp_path, tmp_path / "a.bin")
    config = small_config(world, tmp_path / "pca", parallel=True, images=2)
    loop.train(config)
    with pytest.raises(FileError, match="parallel"):
        export(config.run, tmp_path / "a.bin")
    export(config.run, tmp_path / "a.safetensors")
    assert load_adapter(tmp_path / "a.safetensors").config.parallel


def test_weights_and_data_that_do_not_belong_together_are_refused(world, whole, tmp_path):
    file = RunFolder(whole.run).latest() / "adapter.safetensors"
    with pytest.raises(FileError, match="parallel"):
        loop.train(small_config(world, tmp_path / "a", adapter=file, parallel=True))
    index = json.loads((Prepared(world["data"][0]).folder / "index.json").read_text())
    other = small_dataset(tmp_path / "other")
    (other / "index.json").write_text(json.dumps(index | {"w_layers": 18}))
    with pytest.raises(FileError, match="18 layers"):
        loop.train(small_config({**world, "data": (other,)}, tmp_path / "b", adapter=file))
    narrow = tmp_path / "narrow.safetensors"
    loop.save_adapter(loop.new_adapter(small_unet(), LAYERS, w_dim=64), narrow, {})
    with pytest.raises(FileError, match=f"{LAYERS} layers x 64"):
        loop.train(small_config(world, tmp_path / "c", adapter=narrow))


def test_a_line_of_statistics_cut_short_is_left_out(tmp_path):
    run = RunFolder(tmp_path)
    for images in (2, 4, 6):
        run.append({"images": images})
    with open(tmp_path / "stats.jsonl", "a") as f:
        f.write('{"images": 8, "re')
    run.rewind_stats(4)
    assert run.stats() == [{"images": 2}, {"images": 4}]


def test_data_without_masks_is_refused_where_the_face_counts(world, tmp_path):
    folder, rng = tmp_path / "data", torch.Generator().manual_seed(0)
    samples = [{k: x for k, x in sample(rng, text=True).items() if k != "face"} for _ in range(4)]
    write_dataset(folder, samples, {p: torch.randn(77, 768).half() for p in ("", "a face")}, 4)
    config = small_config(world | {"data": (folder,)}, tmp_path / "run", objective=Objective(reg=1.0))
    assert loop.open_stream(config)
    with pytest.raises(FileError, match="face"):
        loop.open_stream(replace(config, objective=Objective(face=3.0)))
