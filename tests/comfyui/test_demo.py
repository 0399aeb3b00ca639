"""scripts/demo, the README's first command, and what it takes from a models folder."""

import os
import shutil
import subprocess
import sys

import pytest
from comfyui_wplus.wplus_core.checkpoints import load_identity
from PIL import Image

from .server import REPOSITORY, NoCheckout, environment


def find_models(models, base):
    script = [sys.executable, REPOSITORY / "scripts/find_models.py", models, base]
    return subprocess.run(script, capture_output=True, text=True, check=True)


def test_demo_from_photo_to_picture(stand_ins, photo, tmp_path):
    try:
        environment("newest")
    except NoCheckout as reason:
        pytest.skip(str(reason))
    (tmp_path / "stand-ins").symlink_to(stand_ins)
    command = [REPOSITORY / "scripts/demo", photo, "--set", "Sampler.steps=1", "--set", "size.width=64"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"WPLUS_DEMO_OUT": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    if not (REPOSITORY / "models").exists():
        assert "UNTRAINED stand-in" in done.stderr
        assert Image.open(tmp_path / "portrait_00001_.png").size == (64, 256)
    identity = load_identity(tmp_path / "wplus/identity_00001.safetensors")
    assert identity.w.shape == (1, 18, 512)
    assert "Prompt executed" in (tmp_path / "server.log").read_text()


def test_a_photo_that_is_not_there_is_told_at_once(tmp_path):
    command = [REPOSITORY / "scripts/demo", tmp_path / "nobody.jpg"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"WPLUS_DEMO_OUT": str(tmp_path)})
    assert done.returncode == 2 and f"no such photo: {tmp_path}/nobody.jpg" in done.stderr


def test_files_are_found_by_content(stand_ins, tmp_path):
    models, base = tmp_path / "models", tmp_path / "out/comfy"
    models.mkdir()
    (base.parent).mkdir()
    (base.parent / "stand-ins").symlink_to(stand_ins)
    shutil.copy(stand_ins / "wplus/untrained_encoder.pt", models / "mine.bin")
    shutil.copy(stand_ins / "wplus/untrained_adapter.bin", models / "other.pt")
    (models / "points.dat").write_bytes(b"dlib")
    (models / "broken.pth").write_bytes(b"PK\x03\x04")

    alone = find_models(models, base)
    assert alone.stdout.split("\n")[:4] == [
        "Adapter=untrained_adapter.bin", "Encoder=mine.bin", "Face tools=untrained_parser.pth",
        "Checkpoint=untrained_sd.safetensors",
    ]  # fmt: skip
    assert "an adapter needs an SD1.x checkpoint" in alone.stderr and "passed over" in alone.stderr
    assert (base / "models/wplus/points.dat").read_bytes() == b"dlib"

    (models / "sd.safetensors").symlink_to(stand_ins / "checkpoints/untrained_sd.safetensors")
    both = find_models(models, base)
    assert "Adapter=other.pt" in both.stdout and "Checkpoint=sd.safetensors" in both.stdout
    assert "steps" not in both.stdout and "UNTRAINED stand-in: untrained_parser.pth" in both.stderr
    assert (base / "models/checkpoints/sd.safetensors").exists()
    assert not (base / "models/wplus/untrained_adapter.bin").exists()
