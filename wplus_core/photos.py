"""Any picture a person has, as a tensor: upright, RGB, on white where it was transparent."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

from .errors import FileError, WPlusError

log = logging.getLogger(__name__)

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF", "HEIF")
MAX_PIXELS = 210_000_000  # phones reach 200 MP; as float32 RGB that is 2.5 GB
_pillow_limit = threading.Lock()


@dataclass(frozen=True)
class Photo:
    """pixels: [3, H, W] float32 in 0..1, upright sRGB. sha256: of the file's bytes.

    untouched: the pixels are the file's own, neither rotated nor converted, so other decoders see the same picture.
    """

    pixels: Tensor
    sha256: str
    path: Path
    untouched: bool = False


def load_photo(path: str | Path) -> Photo:
    """A picture file → `Photo`: EXIF rotation and colour profile applied, transparency put on white, first frame.

    Raises FileError when the file is missing, no picture, damaged or beyond `MAX_PIXELS`.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise FileError(path, f"cannot be read ({error.strerror})", "Check the path") from error
    image, untouched = _decode(data, path)
    pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous()
    pixels = pixels if pixels.is_floating_point() else pixels.float().div_(255)
    return Photo(pixels, hashlib.sha256(data).hexdigest(), path, untouched)


def check_pixels(x: Tensor, name: str = "photo", batch: bool = False) -> Tensor:
    """[3, H, W] (or [B, 3, H, W]) in 0..1 → the same as float32, overshoot of up to 0.1 clamped; else WPlusError."""
    return check_values(check_shape(x, name, batch), name)


def check_shape(x: Tensor, name: str = "photo", batch: bool = False) -> Tensor:
    """[3, H, W] (or [B, 3, H, W]) as float32 (integers are scaled to 0..1); WPlusError for any other shape."""
    shape = "[B, 3, H, W]" if batch else "[3, H, W]"
    if not isinstance(x, Tensor) or x.ndim != 3 + batch or x.shape[-3] != 3 or 0 in x.shape:
        came = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise WPlusError(f"{name}: expected an RGB tensor {shape}, got {came}")
    return x.float() if x.is_floating_point() else x.float() / torch.iinfo(x.dtype).max


def check_values(x: Tensor, name: str = "photo", slack: float = 0.1) -> Tensor:
    """Finite values in 0..1, an overshoot of up to `slack` clamped; else WPlusError."""
    low, high = (v.item() for v in x.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise WPlusError(f"{name}: holds NaN or infinite values; the step that made it failed, look there")
    if low < -slack or high > 1 + slack:
        raise WPlusError(f"{name}: expected values in 0..1, got {low:.3g}..{high:.3g}; rescale it first")
    return x.clamp(0, 1) if low < 0 or high > 1 else x


def to_uint8(pixels: Tensor) -> np.ndarray:
    """[3, H, W] in 0..1 → [H, W, 3] uint8."""
    return (pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().cpu().numpy()


def save_png(pixels: Tensor, path: str | Path) -> None:
    """Writes [3, H, W] in 0..1 as a PNG, whatever the name's ending."""
    Image.fromarray(to_uint8(pixels)).save(path, "PNG")


def _decode(data: bytes, path: Path) -> tuple[np.ndarray, bool]:
    try:
        with _own_size_limit(), Image.open(io.BytesIO(data), formats=_formats()) as image:
            if image.width * image.height > MAX_PIXELS:
                raise FileError(
                    path,
                    f"{image.width} x {image.height} pixels, more than the {MAX_PIXELS / 1e6:.0f} million we open",
                    "Save a smaller copy",
                )
            upright = ImageOps.exif_transpose(image)
            rgb = _to_rgb(upright)
            same = rgb is upright and image.getexif().get(0x0112, 1) == 1
            return np.array(rgb), same
    except FileError:
        raise
    except Exception as error:  # decoders raise whatever the bytes lead them to
        heic = " (HEIC photos of phones too)" if data[4:8] == b"ftyp" else ""
        remedy = f"Save it as PNG or JPEG{heic}; {', '.join(_formats())} are read"
        raise FileError(path, f"not a picture, or a damaged one ({error})", remedy) from error


def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow and its plugins have; others may start programs, as EPS does Ghostscript."""
    Image.init()
    return [f for f in FORMATS if f in Image.OPEN]


def _to_rgb(image: Image.Image) -> Image.Image | np.ndarray:
    if image.mode.startswith("I"):  # 16 bit greyscale; convert() would clip it to 255
        grey = np.asarray(image, np.float32).clip(0, 65535) / 65535
        return np.repeat(grey[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("32-bit float, whose range nobody knows")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        colours = _to_srgb(rgba.convert("RGB"))
        return Image.composite(colours, Image.new("RGB", rgba.size, "white"), rgba.getchannel("A"))
    return _to_srgb(image)


def _to_srgb(image: Image.Image) -> Image.Image:
    icc = image.info.get("icc_profile")
    if icc and image.mode in ("RGB", "CMYK"):
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
            if "srgb" not in ImageCms.getProfileDescription(profile).lower():
                return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        except (ImageCms.PyCMSError, OSError) as error:
            log.info("colour profile ignored: %s", error)
    return image if image.mode == "RGB" else image.convert("RGB")


@contextmanager
def _own_size_limit():
    """Pillow's limit is a module variable; it is put aside while we decode, and ours applies."""
    with _pillow_limit:
        theirs, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = theirs
