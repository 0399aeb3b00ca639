"""Curves: every number of stats.jsonl in its panel, several runs together, held-out losses beside the trained ones."""

import pytest
from comfyui_wplus.train.__main__ import main
from comfyui_wplus.train.plot import figure, running_mean
from comfyui_wplus.train.run_folder import RunFolder
from comfyui_wplus.wplus_core.photos import load_photo

LINES = [
    {"images": 0, "validation/total": 5.0, "validation/s": 1.0},
    {"images": 2, "total": 4.0, "lr": 1e-4, "skipped": 0},
    {"images": 4, "lr": 1e-4, "skipped": 1},
    {"images": 6, "total": 2.0, "lr": 1e-4, "skipped": 1},
    {"images": 6, "validation/total": 3.0, "validation/s": 1.0},
]


def test_each_number_has_a_panel_with_all_runs():
    sheet = figure({"a": LINES, "b": LINES[:2]})
    panels = {axes.get_title(): axes for axes in sheet.axes}
    assert list(panels) == ["total", "lr"]
    curves = [(line.get_label(), *map(list, line.get_data())) for line in panels["total"].lines]
    assert ("a", [2, 6], [4.0, 3.0]) in curves and ("b", [2], [4.0]) in curves
    assert ("a, held out", [0, 6], [5.0, 3.0]) in curves
    assert panels["total"].lines[0].get_color() != panels["total"].lines[3].get_color()


def test_the_running_mean_looks_back_only():
    assert running_mean([1.0, 3.0]) == [1.0, 2.0]
    assert running_mean([0.0] * 25 + [25.0])[-1] == 1.0


def test_the_command_writes_a_png(tmp_path, capsys):
    for name in "ab":
        (tmp_path / name).mkdir()
        for line in LINES:
            RunFolder(tmp_path / name).append(line)
    assert main(["plot", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert main(["plot", str(tmp_path / "b"), "--out", str(tmp_path / "x" / "b.png")]) == 0
    printed = capsys.readouterr().out
    for file in (tmp_path / "a" / "curves.png", tmp_path / "x" / "b.png"):
        assert str(file) in printed and load_photo(file).pixels.std() > 0


@pytest.mark.parametrize("args, message", [((), "plot RUN"), (("nothing",), "no statistics")])
def test_what_cannot_be_drawn_is_said(tmp_path, capsys, args, message):
    assert main(["plot", *(str(tmp_path / a) for a in args)]) == 1
    assert message in capsys.readouterr().err
