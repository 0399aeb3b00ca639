"""The whole way that a user goes: photos, prepare, stage I, stage II, export, a picture; real files and commands."""

import pytest
import torch
from comfyui_wplus.train.__main__ import main
from comfyui_wplus.train.base import load_text_encoder, load_vae
from comfyui_wplus.train.data import Prepared
from comfyui_wplus.train.model import load_unet
from comfyui_wplus.train.run_folder import RunFolder
from comfyui_wplus.train.sampling import Sampling, decode, noise, sample
from comfyui_wplus.wplus_core.checkpoints import load_adapter, save_identity
from comfyui_wplus.wplus_core.identity import Identity
from comfyui_wplus.wplus_core.photos import load_photo, save_png
from diffusers import UNet2DConditionModel
from pictures import astronaut
from preparing import SIZE, small_world

pytest.importorskip("dlib", reason="dlib is not installed: pip install dlib-bin face_recognition_models")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base of SD1.x's plan (16 cross-attentions), encoder, generator and parser, and two photos with captions."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("world")
    files = small_world(folder)
    torch.manual_seed(0)
    widths = (32, 64, 64, 64)
    unet = UNet2DConditionModel(sample_size=SIZE // 8, cross_attention_dim=768, block_out_channels=widths)
    unet.save_pretrained(files["base"] / "unet")
    photos = folder / "photos"
    photos.mkdir()
    for name, photo in (("a", astronaut()), ("b", astronaut().flip(2))):
        save_png(photo, photos / f"{name}.png")
        (photos / f"{name}.txt").write_text("an astronaut before a flag")
    return folder, {k: str(x) for k, x in files.items()}


def test_from_photos_to_a_picture(world, tmp_path, capsys):
    folder, files = world

    def run(*args):
        assert main([str(a) for a in args]) == 0, capsys.readouterr().err

    base, small = ["--base", files["base"]], ["--size", SIZE, "--workers", "0"]
    faces = ["--encoder", files["encoder"], "--parser", files["parser"], "--min-face", "60"]
    run("prepare", "aligned", folder / "photos", tmp_path / "faces", *base, *faces, *small)
    run("prepare", "synthetic", files["encoder"], tmp_path / "synthetic", *base, *small, "--count", "2")
    run("prepare", "wild", folder / "photos", tmp_path / "wild", *base, *faces, *small, "--variants", "2")
    run("prepare", "--check", tmp_path / "faces", tmp_path / "synthetic", tmp_path / "wild")
    faces, wild = Prepared(tmp_path / "faces"), Prepared(tmp_path / "wild")
    assert len(faces) == len(wild) == 2
    save_identity(Identity(faces.w(0)), tmp_path / "ann.safetensors")

    length = ["--images", "4", "--batch", "2", "--keep.log", "2", "--speed.workers", "0", "--speed.precision", "fp32"]
    length += ["--speed.no-compile"]
    seen = ["--validate.data", tmp_path / "wild", "--validate.images", "2", "--validate.steps", "2"]
    seen += ["--validate.identities", tmp_path / "ann.safetensors", "--optim.lr", "1e-3"]
    data = tmp_path / "faces", tmp_path / "synthetic"
    run("stage1", "--run", tmp_path / "one", *base, "--data", *data, *length, *seen)
    run("export", tmp_path / "one", tmp_path / "one.safetensors")
    stage2 = ["stage2", "--run", tmp_path / "two", *base, "--data", tmp_path / "wild", *length, *seen]
    run(*stage2, "--adapter", tmp_path / "one.safetensors")
    run("export", tmp_path / "two", tmp_path / "two.safetensors", tmp_path / "two.bin")
    run("plot", tmp_path / "one", tmp_path / "two")

    for name, losses in (("one", {"rec", "total"}), ("two", {"rec", "disen", "reg", "total"})):
        lines = RunFolder(tmp_path / name).stats()
        assert [x["images"] for x in lines] == [0, 2, 4, 4] and losses <= lines[1].keys()
        assert {f"validation/{k}" for k in losses} <= lines[0].keys() and lines[-1]["validation/rec"] < 2
        sheet = load_photo(tmp_path / name / "validation" / "00000004-ann.png")
        assert sheet.pixels.shape[1] > SIZE
        assert list((tmp_path / name / "tensorboard").rglob("events.*"))
    assert load_photo(tmp_path / "one" / "curves.png").pixels.std() > 0

    picture, plain = (draw(files["base"], file, wild) for file in (tmp_path / "two.bin", None))
    save_png(picture, tmp_path / "picture.png")
    assert load_photo(tmp_path / "picture.png").pixels.shape == (3, SIZE, SIZE)
    assert picture.isfinite().all() and picture.std() > 0 and not torch.equal(picture, plain)
    assert torch.equal(picture, draw(files["base"], tmp_path / "two.safetensors", wild))


def draw(base, file, data):
    adapter = load_adapter(file) if file else None
    assert adapter is None or len(adapter.layers) == 16
    text = load_text_encoder(base)(["", "an astronaut"])
    start, w = noise([0], data.index.latent_size), data.w(0)[None]
    return decode(load_vae(base), sample(load_unet(base), adapter, w, text[1:], text[0], start, Sampling(steps=3)))[0]
