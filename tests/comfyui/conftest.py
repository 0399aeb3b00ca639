"""Fixtures around a real ComfyUI: each test that asks for `server` runs on the newest and on the oldest version."""

import shutil
import subprocess
import sys

import pytest
from comfyui_wplus.client import Client
from PIL import Image

from .browser import Frontend, chromium
from .server import REPOSITORY, NoCheckout, Server, lay_out


@pytest.fixture(scope="session")
def stand_ins(tmp_path_factory):
    """A models folder with untrained files of every kind the workflows load."""
    models = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, REPOSITORY / "scripts/stand_ins.py", models], check=True)
    yield models
    shutil.rmtree(models)  # half a gigabyte, and pytest keeps the folders of three sessions


@pytest.fixture(scope="session", params=["newest", "floor"])
def server(request, tmp_path_factory, stand_ins):
    base = tmp_path_factory.mktemp(f"comfy-{request.param}")
    lay_out(base)
    for path in stand_ins.rglob("*.*"):
        link = base / "models" / path.relative_to(stand_ins)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    try:
        server = Server(request.param, base)
    except NoCheckout as reason:
        pytest.skip(str(reason))
    with server:
        yield server


@pytest.fixture
def client(server):
    return Client(server.url)


@pytest.fixture(scope="session")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="session")
def editor(browser, server):
    """One page for all tests: opening the editor takes longer than any of them."""
    with Frontend(browser, server.url) as page:
        yield page


@pytest.fixture
def frontend(editor):
    """The editor with an empty graph."""
    editor.clear()
    yield editor
    errors, editor.errors = editor.errors, []
    assert not errors, errors


@pytest.fixture
def picture(tmp_path):
    """A small file without a face to upload."""
    path = tmp_path / "picture.png"
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(path)
    return path


@pytest.fixture(scope="session")
def photo(tmp_path_factory):
    """A photo with one face: NASA's portrait of Eileen Collins, which scikit-image carries."""
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed: pip install scikit-image")
    path = tmp_path_factory.mktemp("photos") / "astronaut.png"
    Image.fromarray(data.astronaut()).save(path)
    return path
