"""What `prepare --check` finds: every planted damage, and nothing in a whole set."""

import json
import re
import shutil

import pytest
import torch
from comfyui_wplus.train.__main__ import main
from comfyui_wplus.train.check import check, sheet
from comfyui_wplus.train.data import Prepared, Writer, read_about, write_dataset
from comfyui_wplus.train.views import Views, scaling, to_jpeg
from preparing import small_vae
from safetensors.torch import load_file, save_file
from training import LAYERS, sample

PROMPTS = {"": torch.zeros(77, 768).half(), "a face": torch.ones(77, 768).half()}


def good_set(folder):
    rng = torch.Generator().manual_seed(0)
    writer = Writer(folder, PROMPTS, shard=4, settings={"kind": "wild"})
    for n in range(6):
        writer.append(sample(rng, text=True), name=f"{n}.png", caption=f"person {n}")
    writer.finish()
    return folder


def pictures_set(folder):
    views = vars(Views(size=64))
    writer = Writer(folder, PROMPTS, shard=4, settings={}, latent_size=(8, 8), views=views)
    for n in range(3):
        photo = torch.randint(0, 255, (3, 80, 90), dtype=torch.uint8)
        to_mask = scaling(0.5, 0.5)
        to_mask[:2, 2] = -5.0
        mask = torch.full((1, 16, 16), 255, dtype=torch.uint8)
        rest = {"w": torch.randn(LAYERS, 512).half(), "text": torch.randn(77, 768).half()}
        writer.append({"picture": to_jpeg(photo), "mask": mask, "to_mask": to_mask} | rest, name=f"{n}.png")
    writer.finish()
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return good_set(tmp_path_factory.mktemp("check") / "set")


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "set")


def change(folder, **changes):
    """Change tensors of the first shard."""
    path = folder / "shard-00000.safetensors"
    tensors, about = load_file(path), read_about(path)
    for name, act in changes.items():
        if act is None:
            del tensors[name]
        else:
            tensors[name] = act(tensors[name].clone())
    save_file({k: x.contiguous() for k, x in tensors.items()}, path, {"about": json.dumps(about)})


def put(index, value):
    def act(x):
        x[index] = value
        return x

    return act


def change_index(folder, **changes):
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    "cut short": (lambda f: cut(f / "shard-00001.safetensors"), "shard-00001.*damaged.*same `prepare` command"),
    "missing": (lambda f: (f / "shard-00001.safetensors").unlink(), "shard-00001.*no such file.*same `prepare`"),
    "nan": (lambda f: change(f, latents=put((2, 0), float("nan"))), "NaN or Inf in `latents` in 1 of 4 samples .2.png"),
    "inf": (lambda f: change(f, w=put(slice(0, 4), float("inf"))), r"NaN or Inf in `w` in 4 of 4.*2.png, \.\.\.\)"),
    "negative": (lambda f: change(f, latents=put((1, 0, 5), -1)), "standard deviation below 0.*1.png"),
    "bright": (lambda f: change(f, face=put((3, 1), 1.5)), "`face` outside 0..1.*3.png"),
    "faceless": (lambda f: change(f, face=put((0,), 0)), "no face in `face` in 1 of 4 samples .0.png"),
    "weightless": (lambda f: weigh(f, 0.0), "`weights` below 0, or nothing but 0 in 4 of 4"),
    "weights": (lambda f: weigh(f, -1.0), "`weights` below 0, or nothing but 0 in 4 of 4"),
    "shape": (lambda f: change(f, text=lambda x: x[:, :50]), r"text is \[4, 50, 768\], expected \[4, 77, 768\]"),
    "layers": (lambda f: change(f, w=lambda x: x[:, :2]), r"w is \[4, 2, 512\], expected \[4, 4, any\]"),
    "width": (lambda f: change(f, w=lambda x: x[..., :64]), r"00001.*w is \[2, 4, 512\], expected \[2, 4, 64\]"),
    "no w": (lambda f: change(f, w=None), "it has no .'w'"),
    "rows": (lambda f: change(f, face=lambda x: x[:3]), r"face is \[3, 2, 1, 16, 16\], expected \[4, any, 1, 16, 16\]"),
    "counts": (lambda f: change_index(f, shards=[{"file": "shard-00000.safetensors", "count": 3}]), "says 3 samples"),
    "prompts": (lambda f: change_index(f, prompts=["a face", ""]), 'first prompt must be ""'),
    "more prompts": (lambda f: change_index(f, prompts=["", "a", "b"]), "expected `text` of 3 rows"),
    "index": (lambda f: (f / "index.json").write_text("{"), "index.json: damaged"),
    "unfinished": (lambda f: (f / "index.json").unlink(), "not complete .2 shards so far.*goes on"),
    "same codes": (lambda f: [change(f, w=put(slice(None), 1))], "only 3 different codes in 6 samples"),
}


def weigh(folder, value):
    """Give the first shard weights: all 1 but for one of 2 variants of each sample, which is all `value`."""
    path = folder / "shard-00000.safetensors"
    tensors, about = load_file(path), read_about(path)
    weights = torch.ones(4, 2, 1, 16, 16)
    weights[:, 1] = value
    save_file(tensors | {"weights": weights}, path, {"about": json.dumps(about)})


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def test_a_whole_set_has_nothing_wrong(whole, capsys):
    assert check(whole) == 0
    said = capsys.readouterr().out
    assert "6 samples in 2 shards, nothing wrong" in said and "6 different captions" in said
    assert "latents, 2 of each" in said and f"codes [{LAYERS}, 512]" in said


@pytest.mark.parametrize("damage", DAMAGES)
def test_planted_damage_is_found_and_nothing_else(folder, capsys, damage):
    act, message = DAMAGES[damage]
    act(folder)
    assert check(folder) == 1
    said = capsys.readouterr().out
    assert re.search(message, said), said
    assert len(said.splitlines()) == 1 and str(folder) in said


def test_codes_of_any_width_are_right_if_all_have_it(tmp_path, capsys):
    rng = torch.Generator().manual_seed(0)
    samples = [sample(rng, text=True) for _ in range(6)]
    write_dataset(tmp_path, [x | {"w": x["w"][:, :64]} for x in samples], PROMPTS, shard=4)
    assert check(tmp_path) == 0 and f"codes [{LAYERS}, 64]" in capsys.readouterr().out


def test_a_set_without_captions_needs_prompts(tmp_path, capsys):
    rng = torch.Generator().manual_seed(0)
    write_dataset(tmp_path, [sample(rng, text=False) for _ in range(2)], {"": PROMPTS[""]})
    assert check(tmp_path) == 1 and 'no prompts but ""' in capsys.readouterr().out


def test_pictures_are_decoded(tmp_path, capsys):
    assert check(pictures_set(tmp_path)) == 0
    assert "pictures, encoded in training" in capsys.readouterr().out
    change(tmp_path, picture=put(slice(10, 2000), 7))
    assert check(tmp_path) == 1
    assert "a picture that cannot be decoded in 1 of 3 samples (0.png)" in capsys.readouterr().out


def test_several_sets_at_once_and_no_set(whole, tmp_path, capsys):
    assert main(["prepare", "--check", str(whole), str(whole)]) == 0
    assert main(["prepare", "--check", str(whole), str(tmp_path)]) == 1
    assert "index.json is missing" in capsys.readouterr().out
    assert main(["prepare", "--check"]) == 2


def test_the_contact_sheet_shows_what_is_trained_on(whole, tmp_path):
    vae = small_vae()
    shown = sheet(Prepared(whole), vae)
    assert shown.size[0] == 6 * 256 and 256 < shown.size[1] < 300
    rng = torch.Generator().manual_seed(0)
    dark = sample(rng, text=True)
    dark["face"] = torch.zeros_like(dark["face"])
    light = dark | {"face": torch.ones_like(dark["face"])}
    write_dataset(tmp_path / "two", [dark, light], PROMPTS)
    two = torch.frombuffer(bytearray(sheet(Prepared(tmp_path / "two"), vae).crop((0, 0, 512, 256)).tobytes()),
                           dtype=torch.uint8).float().view(256, 2, 256, 3)  # fmt: skip
    assert torch.allclose(two[:, 0], two[:, 1] * 0.4, atol=1)
