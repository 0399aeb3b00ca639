"""Training pictures drawn from a photo in the wild: turned, scaled, cropped and recoloured, the face whole in each.

Coordinates are pixel indices, as in wplus_core/align.py.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_saturation

from ..wplus_core.align import warp
from ..wplus_core.errors import WPlusError

JPEG_QUALITY = 95
JITTERS = (adjust_brightness, adjust_contrast, adjust_saturation)
Jitter = tuple[Callable[[Tensor, float], Tensor], float]


@dataclass(frozen=True)
class View:
    """One drawn view. to_photo: [3, 3] float64, training picture -> photo. jitter: what is done to its colours."""

    to_photo: Tensor
    jitter: tuple[Jitter, ...]


@dataclass(frozen=True)
class Views:
    """How views are drawn; the numbers are the paper's, for 512 px.

    size: side of the training picture. scale: of the photo whose shorter side is `size`: 0.8 to 1.2 for portraits, 1.0
    to 1.6 for full-body pictures. rotation: up to so many degrees. jitter: of brightness, contrast and saturation.
    smallest: a face whose crop would be smaller in the training picture is drawn larger. erode, blur: kernels of the
    face mask in pixels.
    """

    size: int = 512
    scale: tuple[float, float] = (0.8, 1.2)
    rotation: float = 10.0
    jitter: float = 0.2
    smallest: int = 64
    erode: int = 32
    blur: int = 7

    def __post_init__(self):
        object.__setattr__(self, "scale", tuple(self.scale))
        low, high = self.scale
        if not 0 < low <= high or self.size < 8 or self.size % 8:
            raise WPlusError(f"expected 0 < scale and a size that is a multiple of 8, got {self.scale}, {self.size}")
        if not 0 <= self.jitter < 1 or self.blur % 2 == 0 or self.erode < 1 or not 0 < self.smallest <= self.size:
            raise WPlusError(f"expected jitter in 0..1, an odd blur, erode from 1, smallest up to the size; got {self}")

    def finest(self, photo: tuple[int, int], side: float) -> float:
        """Pixels of the training picture per pixel of the photo (H, W), at most, whose face crop has this side."""
        return max(self.size / min(photo) * self.scale[1], self.smallest / side)

    def draw(self, rng: np.random.Generator, photo: tuple[int, int], face: Tensor) -> View:
        """A view of a photo (H, W). face: [4, 2], the corners of the face's crop in the photo, in order."""
        scale, angle = rng.uniform(*self.scale), math.radians(rng.uniform(-self.rotation, self.rotation))
        along = face[1] - face[0]
        side, turned = along.norm().item(), math.atan2(along[1], along[0]) + angle
        extent = side * (abs(math.cos(turned)) + abs(math.sin(turned)))  # of the turned square, along the axes
        s = min(max(scale * self.size / min(photo), self.smallest / side), self.size / extent)
        centre, least = face.mean(0).tolist(), extent * s / 2
        place = [self.place(rng, c, n, s) for c, n in zip(centre, reversed(photo), strict=True)]
        place = [min(max(p, least), self.size - least) - 0.5 for p in about(self.size / 2, place, angle)]
        factors = rng.uniform(1 - self.jitter, 1 + self.jitter, 3)
        jitter = tuple((JITTERS[i], float(factors[i])) for i in rng.permutation(3))
        return View(similarity(centre, place, s, angle), jitter)

    def place(self, rng: np.random.Generator, centre: float, length: int, s: float) -> float:
        """Where along one axis of a window full of photo the face's centre lies; a smaller photo is in its middle."""
        before, after = (centre + 0.5) * s, (length - 0.5 - centre) * s
        low, high = self.size - after, before
        return rng.uniform(low, high) if low <= high else (low + high) / 2

    def render(self, view: View, photo: Tensor, mask: Tensor, to_crop: Tensor) -> tuple[Tensor, Tensor]:
        """photo [3, H, W] in 0..1, mask [1, m, m] of the face's crop, to_crop [3, 3] from the photo to a mask of m px.

        -> the training picture [3, size, size] in 0..1 and its face mask [1, size, size], eroded and blurred.
        """
        shape = (self.size, self.size)
        picture = warp(photo[None], view.to_photo[None], shape, "reflection")[0].clamp(0, 1)
        for adjust, factor in view.jitter:
            picture = adjust(picture, factor)
        framed = F.pad(mask[None].float(), (1, 1, 1, 1))  # a border of 0, so that outside the crop is no face
        face = warp(framed, (shift(1) @ to_crop @ view.to_photo)[None], shape, "zeros")[0]
        return picture, self.soften(face.clamp(0, 1))

    def soften(self, face: Tensor) -> Tensor:
        """Erode and blur a mask [1, S, S]; beyond the picture's edge the face goes on."""
        before, after = (self.erode - 1) // 2, self.erode // 2
        face = -F.pad(face[None], (before, after, before, after), value=1.0)
        for kernel in ((self.erode, 1), (1, self.erode)):
            face = F.max_pool2d(face, kernel, 1)
        sigma = 0.3 * ((self.blur - 1) * 0.5 - 1) + 0.8  # OpenCV's for a kernel
        return gaussian_blur2d(-face, (self.blur, self.blur), (sigma, sigma), "replicate")[0].clamp(0, 1)


def similarity(centre: list[float], place: list[float], s: float, angle: float) -> Tensor:
    """[3, 3]: the map whose inverse turns the photo around `centre`, scales it by s, and puts the centre at `place`."""
    c, d = math.cos(angle) / s, math.sin(angle) / s
    (x, y), (u, v) = centre, place
    rows = [[c, d, x - c * u - d * v], [-d, c, y + d * u - c * v], [0, 0, 1]]
    return torch.tensor(rows, dtype=torch.float64)


def about(middle: float, point: list[float], angle: float) -> tuple[float, float]:
    """The point turned around (middle, middle)."""
    x, y = point[0] - middle, point[1] - middle
    return (middle + x * math.cos(angle) - y * math.sin(angle), middle + x * math.sin(angle) + y * math.cos(angle))


def shift(by: float) -> Tensor:
    return torch.tensor([[1, 0, by], [0, 1, by], [0, 0, 1]], dtype=torch.float64)


def scaling(x: float, y: float) -> Tensor:
    """[3, 3]: pixel indices of a picture -> indices of the same picture made x times wider and y times higher."""
    return torch.tensor([[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]], dtype=torch.float64)


def corners(to_crop: Tensor, side: int) -> Tensor:
    """The crop's outer corners in the photo [4, 2]: top left, top right, bottom right, bottom left."""
    a, b = -0.5, side - 0.5
    square = torch.tensor([[a, a, 1], [b, a, 1], [b, b, 1], [a, b, 1]], dtype=torch.float64)
    return (square @ torch.linalg.inv(to_crop).mT)[:, :2]


def to_jpeg(photo: Tensor) -> Tensor:
    """[3, H, W] in uint8 -> the bytes of its file."""
    file = io.BytesIO()
    Image.fromarray(photo.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    return torch.from_numpy(np.frombuffer(file.getvalue(), np.uint8).copy())


def from_jpeg(data: Tensor) -> Tensor:
    """The bytes of a file -> [3, H, W] in uint8."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data.numpy().tobytes())))).permute(2, 0, 1)
