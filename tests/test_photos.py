"""Every kind of picture file becomes the same kind of tensor, or an error that names the file and the remedy."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_wplus.wplus_core.errors import FileError, WPlusError
from comfyui_wplus.wplus_core.photos import MAX_PIXELS, check_pixels, load_photo, save_png, to_uint8
from PIL import Image, ImageCms

RAMP = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (16, 1))
RGB = np.dstack([RAMP, 255 - RAMP, RAMP // 2])  # [16, 24, 3]


def written(tmp_path: Path, image: Image.Image, name: str, **options) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


def pixels(path: Path) -> np.ndarray:
    return to_uint8(load_photo(path).pixels)


def test_a_png_is_read_to_the_bit_and_written_to_the_bit(tmp_path):
    path = written(tmp_path, Image.fromarray(RGB), "a.png")
    photo = load_photo(path)
    assert photo.pixels.shape == (3, 16, 24) and photo.pixels.dtype == torch.float32
    assert photo.untouched and photo.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (to_uint8(photo.pixels) == RGB).all()
    save_png(photo.pixels, tmp_path / "b.png")
    assert (pixels(tmp_path / "b.png") == RGB).all()


def test_greyscale_has_three_equal_channels(tmp_path):
    x = pixels(written(tmp_path, Image.fromarray(RGB[..., 0]), "grey.png"))
    assert (x == RGB[..., :1]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_put_on_white(tmp_path, mode):
    image = Image.fromarray(np.dstack([RGB // 4, np.full((16, 24), 255, np.uint8)]), "RGBA")
    image.paste((9, 9, 9, 0), (0, 0, 24, 8))
    path = written(tmp_path, image.quantize() if mode == "P" else image.convert(mode), "t.png")
    x = pixels(path)
    assert (x[:8] == 255).all() and (x[8:] < 80).all()


def test_half_transparent_is_half_white(tmp_path):
    path = written(tmp_path, Image.new("RGBA", (4, 4), (0, 100, 200, 128)), "half.png")
    assert np.abs(pixels(path).astype(int) - (127, 177, 227)).max() <= 1


def test_16_bit_keeps_its_range(tmp_path):
    wide = (np.arange(24, dtype=np.uint16) * 2700)[None].repeat(16, 0)
    photo = load_photo(written(tmp_path, Image.fromarray(wide), "wide.png"))
    assert torch.allclose(photo.pixels[1], torch.from_numpy(wide / 65535).float(), atol=1e-6)


def test_exif_rotation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rows are columns
    photo = load_photo(written(tmp_path, Image.fromarray(RGB), "turned.png", exif=exif))
    assert (to_uint8(photo.pixels) == np.rot90(RGB, -1)).all() and not photo.untouched


def test_cmyk(tmp_path):
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    x = pixels(written(tmp_path, image, "cmyk.jpg", quality=98))
    assert x[..., 0].max() < 10 and x[..., 1:].min() > 245


def test_a_colour_profile_is_applied_and_srgb_is_left_alone(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image = Image.fromarray(RGB)
    assert (pixels(written(tmp_path, image, "srgb.png", icc_profile=srgb)) == RGB).all()
    assert (pixels(written(tmp_path, image, "lab.png", icc_profile=lab)) == RGB).all()  # does not fit RGB: ignored


def red_and_green_swapped() -> bytes:
    """sRGB's profile under another name, with the two primaries exchanged."""
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for a, b in ((b"rXYZ", b"?XYZ"), (b"gXYZ", b"rXYZ"), (b"?XYZ", b"gXYZ")):
        icc = icc.replace(a, b)
    return icc.replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))


def test_a_colour_profile_is_applied_beneath_transparency(tmp_path):
    icc, opaque = red_and_green_swapped(), np.dstack([RGB, np.full((16, 24), 255, np.uint8)])
    plain = pixels(written(tmp_path, Image.fromarray(RGB), "rgb.png", icc_profile=icc))
    assert np.abs(plain.astype(int) - RGB[..., [1, 0, 2]]).max() <= 4
    assert (pixels(written(tmp_path, Image.fromarray(opaque), "rgba.png", icc_profile=icc)) == plain).all()
    opaque[:8, :, 3] = 0
    half = pixels(written(tmp_path, Image.fromarray(opaque), "half.png", icc_profile=icc))
    assert (half[:8] == 255).all() and (half[8:] == plain[8:]).all()


@pytest.mark.parametrize("kind", ["EPS", "PCX"])
def test_other_formats_are_not_opened_whatever_their_name(tmp_path, kind):
    Image.fromarray(RGB).save(tmp_path / "photo.jpg", kind)
    with pytest.raises(FileError, match="cannot identify.*JPEG, PNG, WEBP, .* are read"):
        load_photo(tmp_path / "photo.jpg")


def test_a_phones_jpeg_of_several_pictures_gives_its_first(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (8, 8), "white").save(path, "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    with Image.open(path) as image:
        assert image.format == "MPO"
    assert (pixels(path) == 255).all()


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    path = written(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    assert (pixels(path) == (255, 0, 0)).all()


def test_one_pixel(tmp_path):
    assert load_photo(written(tmp_path, Image.new("L", (1, 1), 255), "one.png")).pixels.tolist() == [[[1.0]]] * 3


def header_only(path: Path, width: int, height: int) -> Path:
    """A BMP that claims a size and holds no pixels."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "BMP")
    data = bytearray(buffer.getvalue())
    data[18:26] = width.to_bytes(4, "little") + height.to_bytes(4, "little")
    path.write_bytes(data)
    return path


def test_100_megapixels_pass_pillows_guard_which_stays_as_it_was(tmp_path):
    limit = Image.MAX_IMAGE_PIXELS
    image = Image.new("1", (10_000, 10_000), 1)  # a few kB
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(written(tmp_path, image, "100.png")).close()
    photo = load_photo(tmp_path / "100.png")
    assert photo.pixels.shape == (3, 10_000, 10_000) and photo.pixels.min() == 1
    with pytest.raises(FileError, match="damaged"):  # Pillow's own limit is 179 MP: this gets as far as its pixels
        load_photo(header_only(tmp_path / "200.bmp", 16_000, 12_500))
    assert Image.MAX_IMAGE_PIXELS == limit


def test_beyond_our_own_limit_it_says_so_before_decoding(tmp_path):
    side = int(MAX_PIXELS**0.5) + 100
    with pytest.raises(FileError, match=f"{side} x {side} pixels.*Save a smaller copy"):
        load_photo(header_only(tmp_path / "huge.bmp", side, side))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.png", None, "cannot be read"),
        ("text.jpg", b"not a picture at all", "not a picture"),
        ("empty.png", b"", "not a picture"),
        ("phone.heic", b"\0\0\0\x18ftypheic" + b"\0" * 64, "HEIC"),
    ],
)
def test_no_picture(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError, match=says) as error:
        load_photo(tmp_path / name)
    assert name in str(error.value)


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.gif", "cut.webp", "cut.tiff"])
def test_truncated(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    path = written(tmp_path, Image.fromarray(noise), name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(FileError, match="damaged"):
        load_photo(path)


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(FileError, match="cannot be read"):
        load_photo(tmp_path)


@pytest.mark.parametrize(
    ("x", "says"),
    [
        (torch.full((3, 8, 8), float("nan")), "NaN"),
        (torch.full((3, 8, 8), float("inf")), "NaN or infinite"),
        (torch.rand(8, 8, 3), r"expected an RGB tensor \[3, H, W\], got \[8, 8, 3\]"),
        (torch.rand(1, 3, 8, 8), "expected an RGB tensor"),
        (torch.rand(3, 0, 8), "expected an RGB tensor"),
        (torch.rand(3, 8, 8) * 255, "expected values in 0..1"),
        (torch.rand(3, 8, 8) * 2 - 1, "expected values in 0..1"),
        (np.zeros((3, 8, 8)), "got ndarray"),
    ],
)
def test_bad_tensors_are_refused(x, says):
    with pytest.raises(WPlusError, match=says):
        check_pixels(x)


def test_good_tensors_become_float32_in_range():
    assert check_pixels(torch.rand(3, 4, 4).half()).dtype == torch.float32
    assert torch.equal(check_pixels(torch.full((3, 4, 4), 255, dtype=torch.uint8)), torch.ones(3, 4, 4))
    overshoot = check_pixels(torch.linspace(-0.05, 1.05, 12).reshape(3, 2, 2))
    assert overshoot.min() == 0 and overshoot.max() == 1
