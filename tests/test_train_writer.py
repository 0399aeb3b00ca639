"""Writing data sets: shard by shard, over kills and by several processes."""

import json
import os
import signal

import pytest
import torch
from comfyui_wplus.train.data import Prepared, Writer, read_about
from comfyui_wplus.wplus_core.errors import FileError
from training import exit_code, sample, start_process

PROMPTS = {"": torch.zeros(77, 768).half(), "a face": torch.ones(77, 768).half()}


def rows(count, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [sample(rng, text=True) for _ in range(count)]


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def append_all(folder, count, die_at=None):
    writer = Writer(folder, PROMPTS, shard=4, settings={"scale": (0.8, 1.2)}, scaling_factor=0.5)
    all_rows = rows(count)
    for n in range(len(writer), count):
        if n == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        writer.append(all_rows[n], name=f"{n}.png")
    return writer.finish()


def test_what_was_appended_comes_back_with_what_was_said_about_it(tmp_path):
    index = append_all(tmp_path / "a", 10)
    data = Prepared(tmp_path / "a")
    assert data.index == index and [s["count"] for s in index.shards] == [4, 4, 2]
    assert index.prompts == ("", "a face") and index.scaling_factor == 0.5 and index.settings == {"scale": [0.8, 1.2]}
    for n, wanted in enumerate(rows(10)):
        assert all(torch.equal(x, data[n][k]) for k, x in wanted.items())
    assert read_about(tmp_path / "a" / "shard-00001.safetensors")["rows"] == [{"name": f"{n}.png"} for n in range(4, 8)]


def test_a_killed_writer_goes_on_after_its_last_whole_shard(tmp_path):
    append_all(tmp_path / "whole", 10)
    for die_at in (6, 9):
        process = start_process(append_all, tmp_path / "killed", 10, die_at)
        assert exit_code(process) == -signal.SIGKILL
        assert not (tmp_path / "killed" / "index.json").exists()
    assert len(Writer(tmp_path / "killed", PROMPTS, settings={"scale": (0.8, 1.2)})) == 8
    append_all(tmp_path / "killed", 10)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_shards_come_in_any_order_and_may_be_empty(tmp_path):
    parts = [rows(3), [], rows(2, seed=1)]
    for n in (2, 0, 1):
        bad = [{"file": "b.png", "reason": "no face"}] if not parts[n] else []
        Writer(tmp_path, PROMPTS).write(n, parts[n], bad=bad)
    index = Writer(tmp_path, PROMPTS).finish(3)
    data = Prepared(tmp_path)
    assert len(data) == 5 and [s["count"] for s in index.shards] == [3, 2]
    assert torch.equal(data[4]["w"], parts[2][1]["w"])
    empty = read_about(tmp_path / "shard-00001.safetensors")
    assert empty == {"rows": [], "bad": [{"file": "b.png", "reason": "no face"}]}


def test_what_cannot_be_finished_or_continued_is_said(tmp_path):
    with pytest.raises(FileError, match="not one sample"):
        Writer(tmp_path / "a", PROMPTS).finish()
    writer = Writer(tmp_path / "b", PROMPTS, settings={"size": 512, "seed": 0})
    writer.write(0, rows(1))
    with pytest.raises(FileError, match="shard-00001.*missing"):
        writer.finish(2)
    with pytest.raises(FileError, match=r"begun with other settings \(size: 512 -> 256\)"):
        Writer(tmp_path / "b", PROMPTS, settings={"size": 256, "seed": 0})
    writer.path(0).write_bytes(writer.path(0).read_bytes()[:-9])
    with pytest.raises(FileError, match="shard-00000.*Delete it"):
        Writer(tmp_path / "b", PROMPTS, settings={"size": 512, "seed": 0})
    (tmp_path / "b" / "settings.json").write_text("{")
    with pytest.raises(FileError, match="settings.json.*damaged"):
        Writer(tmp_path / "b", PROMPTS)


def test_a_set_that_grows_has_no_index_until_it_is_complete_again(tmp_path):
    append_all(tmp_path, 8)
    writer = Writer(tmp_path, PROMPTS, shard=4, settings={"scale": (0.8, 1.2)})
    for row in rows(4, seed=1):
        writer.append(row)
    assert not (tmp_path / "index.json").exists()
    assert json.loads((tmp_path / "settings.json").read_text()) == {"scale": [0.8, 1.2]}
    assert sum(s["count"] for s in writer.finish().shards) == 12
