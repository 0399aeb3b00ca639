"""Preparing data sets from real photos by small real networks: what is in them, over kills, ranks and bad pictures."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import lru_cache

import pytest
import torch
from comfyui_wplus.train import loop, makers, sources
from comfyui_wplus.train import prepare as module
from comfyui_wplus.train.__main__ import main
from comfyui_wplus.train.base import latents, load_text_encoder, load_vae
from comfyui_wplus.train.blip2 import Blip2
from comfyui_wplus.train.config import Keep, Optim
from comfyui_wplus.train.data import Drawn, Prepared, Stream, encode
from comfyui_wplus.train.draws import Dropout
from comfyui_wplus.train.recipes import NEUTRAL
from comfyui_wplus.train.run_folder import RunFolder
from comfyui_wplus.wplus_core import encode as photo_to_w
from comfyui_wplus.wplus_core.align import align
from comfyui_wplus.wplus_core.background import resize
from comfyui_wplus.wplus_core.checkpoints import load_encoder, load_generator, load_parser, save_generator
from comfyui_wplus.wplus_core.errors import WPlusError
from comfyui_wplus.wplus_core.faces import FaceFinder
from comfyui_wplus.wplus_core.photos import load_photo, save_png
from comfyui_wplus.wplus_core.stylegan2 import Generator, GeneratorConfig, truncate
from PIL import Image
from preparing import SIZE, small_world, write_blip2, write_photos
from safetensors.torch import load_file
from training import exit_code, small_config, small_unet, start_process

pytest.importorskip("dlib", reason="dlib is not installed: pip install dlib-bin")
GOOD = ["a.png", "b.png", "c.png", "d.png", "more/e.png"]
BAD = {
    "broken.jpg": "not a picture, or a damaged one",
    "empty.png": "no face found",
    "small.png": "the face is small: its crop has 8. px, expected at least 160",
    "twins.png": "2 faces of similar size",
}


class Remembering(FaceFinder):
    """Looks at each picture once."""

    known: dict = {}

    def __call__(self, photo, *args, **kwargs):
        if photo.sha256 not in self.known:
            self.known[photo.sha256] = super().__call__(photo, *args, **kwargs)
        return self.known[photo.sha256]


@pytest.fixture(scope="module", autouse=True)
def one_finder():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "FaceFinder", lru_cache(Remembering))
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("prepare")
    write_photos(folder / "photos")
    (folder / "few").mkdir()
    for name in ("a.png", "a.txt", "b.png", "b.txt", "small.png", "small.txt"):
        shutil.copy(folder / "photos" / name, folder / "few" / name)
    return small_world(folder) | {"photos": folder / "photos", "few": folder / "few", "folder": folder}


def run(world, kind, out, *options, photos="photos", size=SIZE):
    return main(arguments(world, kind, out, *options, photos=photos, size=size))


def arguments(world, kind, out, *options, photos="photos", size=SIZE):
    files = [str(world[photos]), str(out), "--base", str(world["base"]), "--workers", "0", "--size", str(size)]
    faces = ["--encoder", str(world["encoder"]), "--parser", str(world["parser"])]
    faces = faces if kind != "synthetic" else []
    return ["prepare", kind, *files, *faces, "--shard", "3", "--batch", "2", *options]


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def wild(world):
    assert run(world, "wild", world["folder"] / "wild", "--variants", "3") == 0
    return world["folder"] / "wild"


@pytest.fixture(scope="module")
def few(world):
    """Three shards: a sample, a sample, and none."""
    run_few(world, world["folder"] / "few_set")
    return world["folder"] / "few_set"


FEW = ("--variants", "2", "--shard", "1")


def run_few(world, out, *options, photos="few"):
    return run(world, "wild", out, *FEW, *options, photos=photos)


@pytest.fixture(scope="module")
def online(world):
    assert run(world, "wild", world["folder"] / "online", "--online-vae") == 0
    return world["folder"] / "online"


def names(folder):
    data = Prepared(folder)
    return [data.about(i)["name"] for i in range(len(data))]


def test_aligned_pictures_are_their_crops_with_codes_without_background(world, tmp_path):
    assert run(world, "aligned", tmp_path / "out") == 0
    data = Prepared(tmp_path / "out")
    assert names(tmp_path / "out") == GOOD and data.index.prompts == NEUTRAL and NEUTRAL[2] == "a photo of a face"
    text = load_text_encoder(world["base"])
    torch.testing.assert_close(data.prompts.float(), text(NEUTRAL), rtol=1e-3, atol=1e-3)
    photo = load_photo(world["photos"] / "b.png")
    crop = align(photo.pixels, [FaceFinder()(photo)[0].landmarks], 512).images
    w = photo_to_w.codes(crop, load_encoder(world["encoder"]), load_parser(world["parser"]))[0]
    with_background = photo_to_w.codes(crop, load_encoder(world["encoder"]))[0]
    got = data[1]["w"].float()
    assert torch.allclose(got, w[0], atol=1e-3) and 2 * (got - w[0]).norm() < (got - with_background[0]).norm()
    z = latents(load_vae(world["base"]), resize(crop, SIZE))
    assert torch.allclose(data[1]["latents"].float(), z, atol=3e-3) and data[1]["latents"].shape == (1, 8, 8, 8)
    Stream([data], 0, 2).check(face=False)
    assert Image.open(tmp_path / "out" / "contact_sheet.png").width == 5 * 256


def test_aligned_pictures_may_be_taken_as_they_are(world, tmp_path):
    (tmp_path / "ffhq").mkdir()
    picture = torch.rand(3, 200, 200)
    save_png(picture, tmp_path / "ffhq" / "0.png")
    save_png(picture[:, :150], tmp_path / "ffhq" / "1.png")
    files = {**world, "photos": tmp_path / "ffhq"}
    assert run(files, "aligned", tmp_path / "out", "--already-aligned") == 0
    data, vae = Prepared(tmp_path / "out"), load_vae(world["base"])
    crop = resize(load_photo(tmp_path / "ffhq" / "0.png").pixels[None], 512)
    assert torch.allclose(data[0]["latents"].float(), latents(vae, resize(crop, SIZE)), atol=3e-3)
    assert "no aligned face" in (tmp_path / "out" / "quarantine.jsonl").read_text() and len(data) == 1


def test_wild_pictures_have_variants_faces_and_their_captions(world, wild, capsys):
    data = Prepared(wild)
    assert names(wild) == GOOD and data.index.prompts == ("",)
    assert [data.about(i)["caption"] for i in (0, 4)] == ["a picture called a", "a picture called more/e"]
    text = load_text_encoder(world["base"])(["a picture called a"])[0]
    torch.testing.assert_close(data[0]["text"].float(), text, rtol=1e-3, atol=1e-3)
    sample = data[0]
    assert sample["latents"].shape == (3, 8, 8, 8) and sample["face"].shape == (3, 1, 8, 8)
    assert not torch.equal(sample["latents"][0], sample["latents"][1])
    assert all(0.01 < f.float().mean() < 0.3 and f.max() > 0.9 for f in sample["face"])
    Stream([data], 0, 2).check(face=True)
    assert main(["prepare", "--check", str(wild)]) == 0
    assert "5 samples in 3 shards, nothing wrong" in capsys.readouterr().out


def test_bad_pictures_are_listed_with_the_reason_and_counted(world, wild, tmp_path, capsys):
    lines = [json.loads(x) for x in (wild / "quarantine.jsonl").read_text().splitlines()]
    assert [x["file"] for x in lines] == list(BAD)
    assert all(re.search(BAD[x["file"]], x["reason"]) for x in lines)
    assert run(world, "wild", tmp_path / "more", "--several", "largest", "--min-face", "60") == 0
    assert names(tmp_path / "more") == [*GOOD, "small.png", "twins.png"]
    said = capsys.readouterr().out
    assert "7 samples in 3 shards" in said and "2 pictures left out" in said and "1 x no face found" in said


def test_a_sample_that_is_not_finite_is_left_out_with_the_reason(world, tmp_path, monkeypatch):
    """As a VAE in fp16 makes it of a bright picture."""
    made = makers.AlignedMaker.latents

    def overflown(self, pictures):
        z = made(self, pictures)
        z[0, 0, 0, 0] = torch.inf
        return z

    monkeypatch.setattr(makers.AlignedMaker, "latents", overflown)
    assert run(world, "aligned", tmp_path / "out", "--batch", "3") == 0
    lines = [json.loads(x) for x in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    lost = [x["file"] for x in lines if "not finite" in x["reason"]]
    assert lost and not set(lost) & set(names(tmp_path / "out"))
    assert main(["prepare", "--check", str(tmp_path / "out")]) == 0


def test_a_face_cut_by_the_border_is_left_out(world, tmp_path):
    (tmp_path / "photos").mkdir()
    photo = load_photo(world["photos"] / "a.png").pixels
    save_png(photo[:, 90:], tmp_path / "photos" / "forehead.png")
    (tmp_path / "photos" / "forehead.txt").write_text("cut")
    assert run({**world, "photos": tmp_path / "photos"}, "wild", tmp_path / "out") == 1
    line = json.loads((tmp_path / "out" / "quarantine.jsonl").read_text())
    assert re.fullmatch(r"the face is cut: [34]\d% of its crop lie outside the picture", line["reason"])


def die_at(owner, name, number):
    function, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, counted)


DEATHS = {
    "while a picture is read": lambda n: die_at(module.Photos, "load", n),
    "in the networks": lambda n: die_at(makers.WildMaker, "__call__", n),
    "before a shard gets its name": lambda n: die_at(os, "replace", n),
}


def prepare_and_die(world, out, death=None, number=1):
    torch.set_num_threads(1)
    if death:
        DEATHS[death](number)
    assert run_few(world, out) == 0


def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(world, few, tmp_path):
    out = tmp_path / "killed"
    for death, number, shards in (
        ("before a shard gets its name", 2, 0),  # the first file are the settings
        ("in the networks", 2, 1),
        ("before a shard gets its name", 3, 3),  # the second is quarantine.jsonl
    ):
        assert exit_code(start_process(prepare_and_die, world, out, death, number)) == -signal.SIGKILL, death
        assert len(list(out.glob("shard-*"))) == shards and not (out / "index.json").exists(), death
    assert main(["prepare", "--check", str(out)]) == 1
    assert run_few(world, out) == 0
    assert contents(out) == contents(few)


def test_two_ranks_make_the_set_of_one(world, few, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        assert run_few(world, tmp_path / "out") == 0
        assert (tmp_path / "out" / "index.json").is_file() == (rank == "0")
    assert "2 of 3 shards are still to be done" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(few)


def test_accelerate_launch_shares_the_pictures_out(world, few, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = arguments(world, "wild", tmp_path / "out", *FEW, photos="few")
    done = subprocess.run([*launch, "--module", "comfyui_wplus.train", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert contents(tmp_path / "out") == contents(few)


def test_worker_processes_change_nothing(world, few, tmp_path):
    assert run_few(world, tmp_path / "out", "--workers", "1") == 0
    assert contents(tmp_path / "out") == contents(few)


def test_other_settings_or_pictures_do_not_go_on(world, few, tmp_path, capsys):
    out = shutil.copytree(few, tmp_path / "out")
    (out / "shard-00001.safetensors").unlink()
    assert run_few(world, out, "--rotation", "5") == 1
    assert "begun with other settings (views" in capsys.readouterr().err
    assert run_few(world, out) == 0
    assert contents(out) == contents(few)
    photos = shutil.copytree(world["few"], tmp_path / "photos")
    (photos / "a.png").rename(photos / "z.png")
    assert run_few({**world, "photos": photos}, out, photos="photos") == 1
    assert "names" in capsys.readouterr().err


def test_captions_by_table_and_by_blip2(world, tmp_path, capsys):
    (tmp_path / "c.csv").write_text("file,caption\na.png,from the table\nsmall.png,never seen\n")
    assert run_few(world, tmp_path / "table", "--captions", str(tmp_path / "c.csv")) == 0
    table = Prepared(tmp_path / "table")
    assert len(table) == 1 and table.about(0) | {"side": 0} == {"name": "a.png", "caption": "from the table", "side": 0}
    assert "c.csv has no row for it" in (tmp_path / "table" / "quarantine.jsonl").read_text()
    blip = write_blip2(tmp_path / "blip")
    assert run_few(world, tmp_path / "blip_set", "--captions", str(blip)) == 0
    photo = load_photo(world["few"] / "a.png").pixels
    said = Blip2.load(blip)([photo])[0]
    assert Prepared(tmp_path / "blip_set").about(0)["caption"] == said
    assert run_few(world, tmp_path / "blip_set", "--captions", "txt") == 1
    assert "captions" in capsys.readouterr().err


def test_synthetic_samples_are_the_generators_with_their_codes(world, tmp_path):
    torch.manual_seed(0)
    generator = Generator(GeneratorConfig.for_size(32, max_channels=16, mapping_layers=2)).eval()
    save_generator(generator, tmp_path / "g.safetensors")
    files = {**world, "generator": tmp_path / "g.safetensors"}
    options = ("--count", "7", "--truncation", "0.5", "--size", "32")
    assert run(files, "synthetic", tmp_path / "out", *options, photos="generator") == 0
    data = Prepared(tmp_path / "out")
    assert len(data) == 7 and data.index.w_layers == 8 and data.index.prompts == NEUTRAL
    codes = torch.stack([data.w(i) for i in range(7)])
    assert len(codes.unique(dim=0)) == 7 and torch.equal(codes[:, 0], codes[:, 7])
    picture = (load_generator(tmp_path / "g.safetensors")(codes) / 2 + 0.5).clamp(0, 1)
    z = latents(load_vae(world["base"]), picture)
    assert torch.allclose(torch.cat([data[i]["latents"] for i in range(7)]).float(), z, atol=0.02)
    mean = generator.mean_w()
    assert run(files, "synthetic", tmp_path / "whole", *options[:2], "--size", "32", "--truncation", "1",
               photos="generator") == 0  # fmt: skip
    whole = torch.stack([Prepared(tmp_path / "whole").w(i) for i in range(7)])
    assert torch.allclose(codes, truncate(whole, mean, 0.5), atol=2e-3)


def test_pictures_encoded_in_training_are_the_cached_ones(world, wild, online):
    """With the draws of a cached variant, the picture's latents and face are that variant's, but for JPEG."""
    cached, pictures, vae = Prepared(wild), Prepared(online), load_vae(world["base"])
    assert names(online) == names(wild) and pictures.index.latent_size == cached.index.latent_size
    for i in range(5):
        a, b = cached[i], pictures[i]
        assert torch.equal(a["w"], b["w"]) and torch.equal(a["text"], b["text"])
        number = sorted([*GOOD, *BAD]).index(names(wild)[i])
        for k in range(3):
            picture, face = pictures.draw(makers.stream(0, makers.VIEWS, number, k), b)
            assert torch.allclose(face, a["face"][k].float(), atol=1e-3)
            z, wanted = latents(vae, picture[None])[0], a["latents"][k].float()
            assert (z - wanted)[:4].square().mean() < 0.02 * wanted[:4].square().mean()


def test_the_stream_of_pictures_is_a_function_of_seed_and_number(world, online, wild):
    vae, device = load_vae(world["base"]), torch.device("cpu")
    streams = [Stream([Prepared(online)], seed, 4, dropout=Dropout(0, 0, 0)) for seed in (0, 0, 1)]
    a, b, c = (encode(collated([s[3]]), device, vae) for s in streams)
    assert isinstance(streams[0][3], Drawn)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True)) and not torch.equal(a.z0, c.z0)
    item = streams[0][3]
    mean, std = latents(vae, item.picture[None])[0].chunk(2)
    assert torch.allclose(a.z0[0], (mean + std * item.posterior) * 0.18215, atol=1e-5)
    epochs = [streams[0][n].picture for n in range(20) if streams[0].locate(n) == streams[0].locate(3)]
    assert len(epochs) == 4 and not torch.equal(epochs[0], epochs[1])
    with pytest.raises(WPlusError, match="cannot be mixed"):
        Stream([Prepared(online), Prepared(wild)], 0, 4)


def test_training_on_pictures_resumes_bit_for_bit(world, online, tmp_path):
    base = shutil.copytree(world["base"], tmp_path / "base")
    small_unet().save_pretrained(base / "unet")
    settings = {"base": base, "data": (online,)}
    constant = {"optim": Optim(lr=1e-3), "keep": Keep(every=2, last=2, log=2)}
    for run, lengths in (("whole", [4]), ("parts", [2, 4])):
        for images in lengths:
            loop.train(small_config(settings, tmp_path / run, images=images, **constant))
    folders = (RunFolder(tmp_path / run).checkpoint(4) for run in ("whole", "parts"))
    whole, parts = (load_file(folder / "adapter.safetensors") for folder in folders)
    assert whole.keys() == parts.keys() and all(torch.equal(x, parts[k]) for k, x in whole.items())


def collated(items):
    return torch.utils.data.default_collate(items)


def test_the_mask_may_be_the_parsed_head(world, wild, tmp_path):
    assert run(world, "wild", tmp_path / "out", "--variants", "3", "--mask", "head", "--erode", "1") == 0
    assert run(world, "wild", tmp_path / "crop", "--variants", "3", "--erode", "1") == 0
    head, crop = Prepared(tmp_path / "out"), Prepared(tmp_path / "crop")
    for i in range(5):
        assert (head[i]["face"].float() <= crop[i]["face"].float() + 0.02).all()
        assert head[i]["face"].float().sum() < crop[i]["face"].float().sum()
        assert torch.equal(head[i]["latents"], crop[i]["latents"])


@pytest.mark.parametrize("wrong, message", [
    (["wild", "nowhere"], "there is no such file or folder"),
    (["wild", "photos", "--captions", "nothing.csv"], "no readable CSV"),
    (["wild", "photos", "--base", "nowhere"], "no VAE here"),
])  # fmt: skip
def test_wrong_input_is_said(world, tmp_path, capsys, monkeypatch, wrong, message):
    monkeypatch.chdir(world["folder"])
    kind, source, *options = wrong
    common = ["--base", str(world["base"]), "--encoder", str(world["encoder"]), "--workers", "0"]
    assert main(["prepare", kind, source, str(tmp_path / "out"), *common, *options]) == 1
    assert message in capsys.readouterr().err


def test_settings_that_cannot_be_are_refused(world, capsys):
    no_parser = ["--mask", "head", "--parser", "None"]
    for wrong, message in ((["--variants", "0"], "variants must be"), (no_parser, "--parser")):
        with pytest.raises(SystemExit) as stop:
            run(world, "wild", "out", *wrong)
        assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["aligned", "wild", "synthetic"])
def test_help_says_what_every_option_means(capsys, kind):
    with pytest.raises(SystemExit) as stop:
        main(["prepare", kind, "--help"])
    said = capsys.readouterr().out
    options = {o.removeprefix("no-") for o in re.findall(r"--([a-z][a-z-]+)", said)} - {"help"}
    explained = said.split("positional arguments")[0]
    assert stop.value.code == 0 and "SRC... DST" in said and len(options) > 8
    assert {o for o in options if not re.search(rf"\b{o.replace('-', '_')}\b", explained)} == set()


def test_pictures_in_linked_folders_are_found_and_the_data_sets_own_are_not(world, tmp_path):
    photos = tmp_path / "photos"
    (photos / "made").mkdir(parents=True)
    (photos / "linked").symlink_to(world["few"], target_is_directory=True)
    shutil.copy(world["few"] / "a.png", photos / "made" / "contact_sheet.png")
    assert [name for _, name in sources.pictures_in([photos], photos / "made")] == [
        f"linked/{name}.png" for name in ("a", "b", "small")
    ]
