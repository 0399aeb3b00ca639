"""Photos to identities: the core functions on fake networks, and the command line on real files."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from comfyui_wplus.wplus_core import encode as module
from comfyui_wplus.wplus_core.background import WITHOUT_PARSER
from comfyui_wplus.wplus_core.checkpoints import load_identity, save_encoder, save_parser
from comfyui_wplus.wplus_core.encode import Choice, average, codes, contact_sheet, crop_face, disagreement, encode, main
from comfyui_wplus.wplus_core.encoder import EncoderConfig, build_encoder
from comfyui_wplus.wplus_core.errors import WPlusError
from comfyui_wplus.wplus_core.faces import given_faces
from comfyui_wplus.wplus_core.identity import Identity
from comfyui_wplus.wplus_core.parsing import FaceParser, ParserConfig
from comfyui_wplus.wplus_core.photos import load_photo, save_png, to_uint8
from comfyui_wplus.wplus_core.stylegan2 import Generator, GeneratorConfig
from pictures import astronaut
from PIL import Image

FACE = given_faces(np.array([(205, 102), (240, 101), (224, 122), (208, 143), (243, 142)]))


def small_encoder(seed=0):
    torch.manual_seed(seed)
    config = EncoderConfig(layers=8, units=(1, 2, 1, 1), channels=(16, 16, 32, 32), image_size=64)
    encoder = build_encoder(config).eval().requires_grad_(False)
    encoder.latent_avg.normal_()
    return encoder


def small_parser():
    torch.manual_seed(0)
    return FaceParser(ParserConfig(channels=(8, 8, 8, 8, 8), body=1)).eval()


@pytest.fixture(scope="module")
def photo():
    return astronaut()


@pytest.fixture
def folder(tmp_path, photo):
    """Two good pictures, one without a face, one that is damaged; an encoder and a parser."""
    photos = tmp_path / "photos"
    photos.mkdir()
    save_png(photo, photos / "a.png")
    save_png(photo.flip(2), photos / "b.png")
    save_png(torch.full((3, 64, 64), 0.5), photos / "empty.png")
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    save_encoder(small_encoder(), tmp_path / "encoder.safetensors")
    save_parser(small_parser(), tmp_path / "parser.safetensors")
    return tmp_path


def run(folder, *options, photos=("photos",), encoder="encoder.safetensors"):
    pytest.importorskip("dlib", reason="dlib is not installed: pip install dlib-bin")
    paths = [str(folder / p) for p in photos]
    return main([*paths, "--encoder", str(folder / encoder), "--out", str(folder / "out"), "--device", "cpu", *options])


def test_a_crop_remembers_where_it_came_from(photo, tmp_path):
    save_png(photo, tmp_path / "me.png")
    crop = crop_face(load_photo(tmp_path / "me.png"), FACE, Choice())
    assert crop.name == "me" and crop.aligned.images.shape == (1, 3, 512, 512)
    assert crop.origin["file"] == "me.png" and len(crop.origin["sha256"]) == 64
    assert crop.origin["side"] == pytest.approx(FACE[0].size)
    json.dumps(crop.origin)
    with pytest.raises(WPlusError, match="face 1 was asked for, but 1 face was found"):
        crop_face(photo, FACE, Choice(face=1))


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_a_batch_is_its_singles(photo, batch):
    crops = [crop_face(p, FACE, Choice(), f"p{n}") for n, p in enumerate((photo, photo * 0.5, 1 - photo))]
    encoder, parser = small_encoder(), small_parser()
    together = list(encode(crops, encoder, parser, batch))
    assert [e.identity.name for e in together] == ["p0", "p1", "p2"]
    for crop, e in zip(crops, together, strict=True):
        (alone,) = encode([crop], encoder, parser)
        assert torch.allclose(e.identity.w, alone.identity.w, atol=1e-5)
        assert torch.equal(e.regions.classes, alone.regions.classes)
        assert e.identity.w.shape == (1, 8, 512) and e.seen.shape == (3, 64, 64)
        assert e.identity.provenance["photos"] == [crop.origin]


def test_the_code_is_the_encoders_of_the_small_crop_in_minus_one_to_one():
    encoder, x = small_encoder(), torch.rand(2, 3, 64, 64)
    w, seen, regions = codes(x, encoder)
    assert torch.equal(seen, x) and regions is None
    assert torch.allclose(w, encoder(x * 2 - 1))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.03), (torch.float16, 0.005)])
def test_half_precision_gives_nearly_the_same_code_in_float32(dtype, bound):
    x = torch.rand(1, 3, 64, 64)
    whole, half = codes(x, small_encoder())[0], codes(x, small_encoder().to(dtype))[0]
    assert half.dtype == torch.float32 and 0 < (half - whole).norm() / whole.norm() < bound


def test_codes_that_are_not_numbers_are_an_error():
    encoder = small_encoder()
    encoder.latent_avg.fill_(float("nan"))
    with pytest.raises(WPlusError, match="NaN or infinite codes.*use fp32 or bf16"):
        codes(torch.rand(1, 3, 64, 64), encoder)


def test_a_picture_that_is_not_square_is_not_an_aligned_face():
    with pytest.raises(WPlusError, match="square, got 48 x 64; align"):
        codes(torch.rand(1, 3, 64, 48), small_encoder())


def test_without_a_parser_a_note(photo, caplog):
    (e,) = encode([crop_face(photo, FACE, Choice())], small_encoder())
    assert WITHOUT_PARSER in caplog.text
    assert e.regions is None and not e.identity.provenance["background_removed"]


def person(seed, n, spread=0.3):
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(8, 512, generator=g)
    return [
        Identity(centre + spread * torch.randn(1, 8, 512, generator=g), f"{seed}-{k}", {"photos": [{"file": k}]})
        for k in range(n)
    ]


def test_the_average_of_one_is_itself_and_of_many_their_mean():
    a, b = person(0, 2)
    assert torch.equal(average([a]).w, a.w)
    mean = average([a, b], "both")
    assert torch.allclose(mean.w, (a.w + b.w) / 2) and mean.name == "both"
    assert mean.provenance["photos"] == [{"file": 0}, {"file": 1}] and mean.provenance["averaged"] == 2
    with pytest.raises(WPlusError, match="nothing to average"):
        average([])
    with pytest.raises(WPlusError, match="different generators"):
        average([a, Identity(torch.zeros(1, 18, 512))])


@pytest.mark.parametrize("n", [2, 3, 5])
def test_a_stranger_is_noted_and_nobody_else(n, caplog):
    note = average([*person(0, n), *person(1, 1)]).provenance["notes"]
    assert len(note) == 1 and note[0].startswith("1-0 disagrees with the others")
    assert note[0] in caplog.text
    assert average(person(0, n)).provenance["notes"] == []


def test_a_stranger_without_a_name_of_its_own_is_numbered():
    everyone = [*person(0, 3), *person(1, 1)]
    for name, says in (("", "photo 4 disagrees"), ("Anna", "photo 4 Anna disagrees")):
        (note,) = average([Identity(i.w, name) for i in everyone]).provenance["notes"]
        assert note.startswith(says)


def test_two_photos_cannot_outvote_each_other():
    assert disagreement(torch.cat([i.w for i in (*person(0, 1), *person(1, 1))])) == []


def test_contact_sheet():
    thumbnail = torch.full((192, 192, 3), 200, dtype=torch.uint8)
    sheet = contact_sheet([Identity(torch.zeros(8, 512), f"Zoë 名 {n}", {}, thumbnail) for n in range(8)])
    assert sheet.width >= 6 * 192 and sheet.height >= 2 * 192 and sheet.getpixel((100, 100)) == (200, 200, 200)


def test_command_line(folder, capsys):
    assert run(folder, "--parser", str(folder / "parser.safetensors")) == 0
    out = folder / "out"
    assert sorted(p.name for p in out.iterdir()) == ["a.safetensors", "b.safetensors", "contact_sheet.png", "crops"]
    a = load_identity(out / "a.safetensors")
    assert a.w.shape == (1, 8, 512) and a.name == "a" and a.provenance["background_removed"]
    assert Image.open(out / "crops" / "a.png").size == (512, 512)
    assert a.thumbnail.shape == (192, 192, 3)
    said = capsys.readouterr().out
    assert "2 identities" in said
    assert f"skipped {folder / 'photos' / 'broken.jpg'}: not a picture, or a damaged one" in said
    assert f"skipped {folder / 'photos' / 'empty.png'}: no face found" in said


def test_the_same_picture_twice_is_the_same_code_mirrored_it_is_not(folder, photo):
    save_png(photo, folder / "photos" / "a2.png")
    run(folder)
    a, a2, b = (load_identity(folder / "out" / f"{n}.safetensors").w for n in ("a", "a2", "b"))
    assert torch.allclose(a, a2, atol=1e-5) and not torch.allclose(a, b, atol=1e-2)


def test_a_second_run_does_only_what_is_missing(folder, photo, monkeypatch):
    run(folder)
    encoded = []
    real = module.crop_face
    monkeypatch.setattr(module, "crop_face", lambda p, *rest: encoded.append(rest[-1]) or real(p, *rest))

    def again(*options, **changes):
        encoded.clear()
        assert run(folder, *options, **changes) == 0
        return sorted(set(encoded) - {"empty"})

    assert again() == []
    (folder / "out" / "crops" / "a.png").unlink()
    assert again() == ["a"]
    (folder / "out" / "b.safetensors").write_bytes(b"cut off")
    assert again() == ["b"]
    save_png(photo * 0.9, folder / "photos" / "a.png")
    assert again() == ["a"]
    save_encoder(small_encoder(seed=1), folder / "other.safetensors")
    assert again(encoder="other.safetensors") == ["a", "b"]
    assert again(encoder="other.safetensors") == []
    assert again("--padding", "black", encoder="other.safetensors") == ["a", "b"]


def test_average_and_refine_from_the_command_line(folder):
    torch.manual_seed(0)
    generator = Generator(GeneratorConfig.for_size(32, max_channels=16))
    save_encoder(small_encoder(), folder / "with.safetensors", generator)
    assert run(folder, "--average", "me", "--refine", "2", encoder="with.safetensors") == 0
    a, b, me = (load_identity(folder / "out" / f"{n}.safetensors") for n in ("a", "b", "me"))
    assert len(a.provenance["refine"]["losses"]) == 2
    assert torch.allclose(me.w, (a.w + b.w) / 2, atol=1e-6) and me.name == "me"


def test_photos_with_one_name_do_not_overwrite_each_other(folder, photo):
    (folder / "more").mkdir()
    save_png(photo, folder / "more" / "a.png")
    run(folder, photos=("photos/a.png", "more/a.png"))
    assert sorted(p.stem for p in (folder / "out").glob("*.safetensors")) == ["more_a", "photos_a"]


def test_nothing_worked_is_1_and_a_missing_encoder_2(folder, capsys):
    assert run(folder, photos=("photos/empty.png", "photos/none.png")) == 1
    assert "skipped" in capsys.readouterr().out
    assert run(folder, encoder="none.safetensors") == 2
    assert "none.safetensors" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["photo.png"])
    assert stop.value.code == 2


@pytest.mark.parametrize("batch", ["0", "-1", "two"])
def test_a_batch_is_at_least_one(batch, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["photo.png", "--encoder", "e.pt", "--out", "out", f"--batch={batch}"])
    assert stop.value.code == 2 and "expected a whole number from 1 on" in capsys.readouterr().err


def test_an_average_may_not_take_a_photos_name(folder, capsys):
    assert run(folder, "--average", "a") == 2
    assert "choose another name" in capsys.readouterr().err


def test_importing_needs_neither_dlib_nor_its_models():
    hide = "import sys; sys.modules.update(dlib=None, face_recognition_models=None)"
    subprocess.run([sys.executable, "-c", f"{hide}; import comfyui_wplus.wplus_core.encode"], check=True)


def test_uint8_round_trip():
    x = torch.rand(3, 5, 7)
    assert np.abs(to_uint8(x) / 255 - x.permute(1, 2, 0).numpy()).max() < 0.51 / 255
