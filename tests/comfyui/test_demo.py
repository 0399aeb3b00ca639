"""scripts/demo, the README's first command, and what it takes from a models folder."""

import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from .server import REPOSITORY, NoCheckout, environment


def find_models(models, base):
    script = [sys.executable, REPOSITORY / "scripts/find_models.py", models, base]
    return subprocess.run(script, capture_output=True, text=True, check=True)


@pytest.mark.skipif((REPOSITORY / "models").exists(), reason="with files in models/ the demo runs other workflows")
def test_demo_from_photo_to_pictures(photo, tmp_path):
    try:
        environment("newest")
    except NoCheckout as reason:
        pytest.skip(str(reason))
    settings = [f"{which}.steps=1" for which in ("Sampler", "Second sampler", "Third sampler")]
    command = [REPOSITORY / "scripts/demo", photo, *(word for setting in settings for word in ("--set", setting))]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"WPLUS_DEMO_OUT": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert "missing in models/: adapter, encoder, parser, checkpoint" in done.stderr
    assert "it/s" not in done.stderr  # no bars where nobody watches
    assert Image.open(tmp_path / "found_face_00001_.png").size == (512, 512)
    story = Image.open(tmp_path / "miniature_story_00001_.png")
    assert story.width > 5 * 128 and story.height > 3 * 128
    assert (tmp_path / "server.log").read_text().count("Prompt executed") == 2


def test_a_photo_that_is_not_there_is_told_at_once(tmp_path):
    command = [REPOSITORY / "scripts/demo", tmp_path / "nobody.jpg"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"WPLUS_DEMO_OUT": str(tmp_path)})
    assert done.returncode == 2 and f"no such photo: {tmp_path}/nobody.jpg" in done.stderr


def test_files_are_found_by_content(stand_ins, tmp_path):
    models, base = tmp_path / "models", tmp_path / "out/comfy"
    models.mkdir()
    (base.parent).mkdir()
    shutil.copy(stand_ins / "wplus/untrained_encoder.pt", models / "mine.bin")
    shutil.copy(stand_ins / "wplus/untrained_adapter.bin", models / "other.pt")
    (models / "points.dat").write_bytes(b"dlib")
    (models / "broken.pth").write_bytes(b"PK\x03\x04")

    some = find_models(models, base)
    assert not some.stdout and "missing in" in some.stderr and "parser, checkpoint" in some.stderr
    assert "passed over" in some.stderr and "--download" in some.stderr
    assert (base / "models/wplus/points.dat").read_bytes() == b"dlib"

    (models / "sd.safetensors").symlink_to(stand_ins / "checkpoints/untrained_sd.safetensors")
    (models / "skin.pth").symlink_to(stand_ins / "wplus/untrained_parser.pth")
    every = find_models(models, base)
    assert sorted(every.stdout.splitlines()) == [
        "Adapter=other.pt", "Checkpoint=sd.safetensors", "Encoder=mine.bin", "Face tools=skin.pth",
    ]  # fmt: skip
    assert "missing" not in every.stderr
    assert (base / "models/checkpoints/sd.safetensors").exists() and (base / "models/wplus/other.pt").exists()
