"""Random numbers that are the same in every run, and tests spread over pytest-xdist's workers."""

import io
import os
import subprocess

import numpy as np
import pytest
import torch
from hypothesis import settings

GROUPS = ("newest", "floor", "unet", "sampling")
# Elsewhere hypothesis looks for new examples; CI judges a change by those that it has always had.
# Neither is timed: on a busy machine an example may take any time.
settings.register_profile("elsewhere", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "elsewhere")


def pytest_configure():
    seed()  # for what modules draw when they are imported


def pytest_runtest_setup():
    seed()  # before the fixtures


def seed():
    torch.manual_seed(0)
    np.random.seed(0)


def pytest_itemcollected(item):
    """What shares a server or a large model stays in one worker."""
    parameters = item.name.partition("[")[2].rstrip("]").split("-")
    for group in GROUPS:
        if group in parameters:
            item.add_marker(pytest.mark.xdist_group({"sampling": "unet"}.get(group, group)))


@pytest.fixture
def command_line(capsys, monkeypatch):
    """Calls a main(argv) as its command does, in this Python: another takes seconds to begin."""

    def run(main, *arguments, answer=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(answer))
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return run
