"""Runs tests/in_process inside each ComfyUI's own Python, where the pack's patch meets ComfyUI's samplers."""

import os
import subprocess
from pathlib import Path

import pytest

from .server import NoCheckout, environment

TESTS = Path(__file__).parents[1] / "in_process"


@pytest.mark.parametrize("version", ["newest", "floor"])
def test_in_process(version):
    try:
        checkout, python = environment(version)
    except NoCheckout as reason:
        pytest.skip(str(reason))
    here = ["-c", os.devnull, "--rootdir", TESTS, "--confcutdir", TESTS, TESTS]
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *here]
    env = os.environ | {"COMFYUI_CHECKOUT": str(checkout)}
    done = subprocess.run(command, cwd=TESTS, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout.splitlines()[-1]
