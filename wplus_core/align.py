"""FFHQ's face crop as one anti-aliased similarity warp, and the way back into the photo.

Coordinates are pixel indices (a pixel's centre is a whole number), as landmarks are. Source: Karras et al.,
"A Style-Based Generator Architecture for GANs" (FFHQ).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from kornia.geometry.transform import warp_affine
from torch import Tensor

from .errors import WPlusError
from .faces import Landmarks
from .photos import check_pixels, check_shape, check_values

PADDINGS = ("reflect", "black")


@dataclass(frozen=True)
class AlignedFaces:
    """Crops of one photo. images: [F, 3, S, S] in 0..1. to_crop: [F, 3, 3] float64 on the CPU, photo → crop.

    photo_size: (H, W) of the photo.
    """

    images: Tensor
    to_crop: Tensor
    photo_size: tuple[int, int]

    @property
    def to_photo(self) -> Tensor:
        """[F, 3, 3] float64, crop → photo."""
        return torch.linalg.inv(self.to_crop)

    @property
    def sides(self) -> list[float]:
        """Side of each crop in pixels of the photo."""
        return [self.images.shape[-1] * s for s in _scales(self.to_photo)]

    @property
    def outside(self) -> list[float]:
        """The part of each crop that lies outside the photo, 0..1."""
        size, device = self.images.shape[-2:], self.images.device
        return [1 - _coverage(t[None], size, self.photo_size, device).mean().item() for t in self.to_photo]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> AlignedFaces:
        return replace(self, images=self.images[i, None], to_crop=self.to_crop[i, None])


def ffhq_transform(landmarks: Landmarks, size: int) -> Tensor:
    """[3, 3] float64 from the photo to the crop of size x size: FFHQ's square around the eyes and the mouth."""
    centre, x = landmarks.axes()
    s, c = 2 / size, (size - 1) / size
    y = (-x[1], x[0])
    to_photo = [
        [s * x[0], s * y[0], centre[0] - c * (x[0] + y[0])],
        [s * x[1], s * y[1], centre[1] - c * (x[1] + y[1])],
        [0, 0, 1],
    ]
    return torch.linalg.inv(torch.tensor(to_photo, dtype=torch.float64))


def align(photo: Tensor, faces: Sequence[Landmarks], size: int = 512, padding: str = "reflect") -> AlignedFaces:
    """photo [3, H, W] in 0..1, F faces → their FFHQ crops [F, 3, size, size], on the photo's device.

    padding: what lies outside the photo is its blurred reflection (as in FFHQ), or black (as in the paper's code).
    Raises WPlusError for a bad photo, an unknown padding, no faces, or landmarks that lie outside the photo.
    """
    photo = check_shape(photo)
    if padding not in PADDINGS:
        raise WPlusError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
    if not faces or size < 1:
        raise WPlusError(f"expected at least one face and a size of at least 1, got {len(faces)} and {size}")
    to_crop = torch.stack([ffhq_transform(f, size) for f in faces])
    height, width = photo.shape[1:]
    to_photo = torch.linalg.inv(to_crop)
    for n, quad in enumerate(_corners(to_photo, (size, size))):
        if (quad.amax(0) <= 0).any() or (quad.amin(0) >= torch.tensor([width - 1, height - 1])).any():
            raise WPlusError(f"face {n} lies outside the photo of {width} x {height}; were the landmarks made for it?")
    images = warp(photo[None], to_photo, (size, size), "reflection" if padding == "reflect" else "border")
    images = check_values(images, slack=0.5)  # not the whole photo's: on a large one that costs more than the warp
    return AlignedFaces(_pad_outside(images, to_photo, (height, width), padding), to_crop, (height, width))


def paste_back(
    photo: Tensor, images: Tensor, aligned: AlignedFaces, feather: float = 0.1, mask: Tensor | None = None
) -> Tensor:
    """photo [3, H, W], images [F, 3, S, S] that replace the crops → the photo with them in place, in their order.

    S may differ from the crops' size. feather: width of the soft edge as a fraction of the crop's side, 0..0.5.
    mask: [F, 1, S, S] in 0..1, where to paste at all.
    """
    photo, images = check_pixels(photo), check_pixels(images, "images", batch=True)
    _check_fit(images, aligned, "images")
    if photo.shape[1:] != aligned.photo_size:
        raise WPlusError(f"photo: the faces come from one of {aligned.photo_size}, got {tuple(photo.shape[1:])}")
    size = images.shape[-1]
    alpha = _feathered_square(size, feather, photo.device).expand(len(images), 1, -1, -1)
    if mask is not None:
        _check_fit(mask, aligned, "mask")
        alpha = alpha * F.interpolate(mask.to(alpha), (size, size), mode="bilinear")
    out = photo.clone()
    layers = torch.cat([images.to(photo), alpha], dim=1)
    for layer, to_crop in zip(layers, _at_size(aligned, size), strict=True):
        (top, bottom, left, right), to_source = _window(to_crop, size, aligned.photo_size)
        *rgb, a = warp(layer[None], to_source, (bottom - top, right - left), "border")[0]
        a = a * _coverage(to_source, (bottom - top, right - left), (size, size), photo.device)[0]
        out[:, top:bottom, left:right].lerp_(torch.stack(rgb), a.clamp(0, 1))
    return out.clamp_(0, 1)


def project_mask(mask: Tensor, aligned: AlignedFaces) -> Tensor:
    """Masks [F, 1, S, S] of the crops → [F, 1, H, W] in the photo, 0 outside the crop."""
    _check_fit(mask, aligned, "mask")
    size = mask.shape[-1]
    out = mask.new_zeros(len(mask), 1, *aligned.photo_size, dtype=torch.float32)
    for n, to_crop in enumerate(_at_size(aligned, size)):
        (top, bottom, left, right), to_source = _window(to_crop, size, aligned.photo_size)
        shape = (bottom - top, right - left)
        inside = _coverage(to_source, shape, (size, size), mask.device)
        out[n, 0, top:bottom, left:right] = warp(mask[n, None].float(), to_source, shape, "border")[0, 0] * inside[0]
    return out.clamp_(0, 1)


def warp(image: Tensor, to_source: Tensor, size: tuple[int, int], outside: str = "zeros") -> Tensor:
    """image [1, C, H, W], to_source [F, 3, 3] → [F, C, *size]: out(p) = image(to_source · p), without aliasing.

    outside: "zeros", "border" or "reflection". One bilinear sample per pixel where the source is no finer than the
    output; else four, shrunk with Lanczos' filter, and a source more than 4 x finer is averaged in blocks first.
    """
    blocks = [_block(s) for s in _scales(to_source)]
    out = image.new_empty(len(to_source), image.shape[1], *size)
    for block in sorted(set(blocks)):
        rows = [n for n, b in enumerate(blocks) if b == block]
        out[rows] = _warp_alike(image, to_source[rows], size, outside, block)
    return out


def _block(scale: float) -> int:
    """Source pixels per output pixel → side of the blocks to average; 0 where the output is as fine as the source."""
    return max(1, int(scale // 2)) if scale > 1 else 0


def _warp_alike(image: Tensor, to_source: Tensor, size: tuple[int, int], outside: str, block: int) -> Tensor:
    if block > 1:
        image, to_source = _averaged(image, to_source, size, block)
    k = 2 if block else 1
    forward = torch.linalg.inv(to_source @ _pixel_scale(1 / k))[:, :2].to(image)
    source = image.expand(len(forward), -1, -1, -1)
    mode = "bicubic" if block > 1 else "bilinear"  # bilinear is what the reference samples the photo with
    out = warp_affine(source, forward, (k * size[0], k * size[1]), mode, outside, align_corners=True)
    return _halved(out) if block else out


def _halved(x: Tensor) -> Tensor:
    """[B, C, 2 H, 2 W] → [B, C, H, W] with Lanczos' filter of three lobes."""
    t = torch.arange(-5.5, 6) / 2
    taps = torch.sinc(t) * torch.sinc(t / 3)
    first, *rest = (taps / taps.sum()).tolist()
    x = F.pad(x, (5, 5, 5, 5), mode="replicate")
    for dim in (-2, -1):  # strided sums: a depthwise convolution takes four times as long on a CPU
        shifts = x.unfold(dim, 12, 2).unbind(-1)
        x = shifts[0] * first
        for shift, tap in zip(shifts[1:], rest, strict=True):
            x.add_(shift, alpha=tap)
    return x


def _averaged(image: Tensor, to_source: Tensor, size: tuple[int, int], block: int) -> tuple[Tensor, Tensor]:
    quads = _corners(to_source, size).reshape(-1, 2)
    height, width = image.shape[2:]
    left, top = (max(0, int(v) // block * block - 4 * block) for v in quads.amin(0))
    right, bottom = (min(n, int(v) + 4 * block) for n, v in zip((width, height), quads.amax(0), strict=True))
    image = F.avg_pool2d(image[..., top:bottom, left:right], block, ceil_mode=True)
    return image, _pixel_scale(1 / block) @ _shift(-left, -top) @ to_source


def _pad_outside(images: Tensor, to_photo: Tensor, photo_size: tuple[int, int], padding: str) -> Tensor:
    size = images.shape[-1]
    over = [_overhang(quad, photo_size) for quad in _corners(to_photo, (size, size))]
    for n in (n for n, o in enumerate(over) if max(o) > 0):
        if padding == "black":
            images[n] *= _coverage(to_photo[n, None], (size, size), photo_size, images.device)
        else:
            images[n] = _blur_outside(images[n], to_photo[n, None], photo_size, over[n])
    return images


def _blur_outside(image: Tensor, to_photo: Tensor, photo_size: tuple[int, int], over: Sequence[float]) -> Tensor:
    """FFHQ's padding: a blur that sets in at the photo's edge (a little inside it, in FFHQ), then its median colour."""
    size = image.shape[-1]
    side = size * _scales(to_photo)[0]
    left, top, right, bottom = (max(o, 0.3 * side) for o in over)
    x, y = _points(to_photo, (size, size), image.device)
    height, width = photo_size
    depth = torch.stack([-x / left, -y / top, (x - width + 1) / right, (y - height + 1) / bottom]).amax(0)
    sigma = 0.02 * size
    kernel = min(2 * math.ceil(3 * sigma) + 1, size - 1 + size % 2)
    blurred = gaussian_blur2d(image[None], kernel, (sigma, sigma))[0]
    image = image + (blurred - image) * (3 * depth).clamp(0, 1)
    median = image.flatten(1).median(dim=1).values[:, None, None]
    return image + (median - image) * depth.clamp(0, 1)


def _coverage(to_source: Tensor, shape: tuple[int, int], source_size: tuple[int, int], device) -> Tensor:
    """How much of each output pixel [1, *shape] lies on the source: 1 inside, 0 outside, a ramp one pixel wide."""
    x, y = _points(to_source, shape, device)
    height, width = source_size
    inside = torch.stack([x + 0.5, y + 0.5, width - 0.5 - x, height - 0.5 - y]).amin(0)
    return (inside / _scales(to_source)[0] + 0.5).clamp(0, 1)[None]


def _feathered_square(size: int, feather: float, device) -> Tensor:
    if not 0 <= feather <= 0.5:
        raise WPlusError(f"feather is a fraction of the crop's side, 0..0.5; got {feather}")
    t = (torch.arange(size, device=device) + 0.5) / size
    edge = torch.minimum(t, 1 - t)
    ramp = (edge / feather).clamp(0, 1) if feather else torch.ones_like(edge)
    ramp = ramp * ramp * (3 - 2 * ramp)
    return (ramp[:, None] * ramp)[None, None]


def _window(to_crop: Tensor, size: int, photo_size: tuple[int, int]) -> tuple[tuple[int, int, int, int], Tensor]:
    """Rows and columns of the photo that the crop touches (at least one), and the map from that window to the crop."""
    quad = _corners(torch.linalg.inv(to_crop)[None], (size, size))[0]
    (left, right), (top, bottom) = (
        (min(max(0, int(lo)), n - 1), max(1, min(n, math.ceil(hi) + 1)))
        for lo, hi, n in zip(*quad.aminmax(dim=0), reversed(photo_size), strict=True)
    )
    return (top, bottom, left, right), (to_crop @ _shift(left, top))[None]


def _points(to_source: Tensor, shape: tuple[int, int], device) -> tuple[Tensor, Tensor]:
    m = to_source[0].tolist()
    y, x = torch.arange(shape[0], device=device)[:, None], torch.arange(shape[1], device=device)
    return tuple(row[0] * x + row[1] * y + row[2] for row in m[:2])


def _corners(to_source: Tensor, size: tuple[int, int]) -> Tensor:
    """Outer corners of an output of this size in the source, [F, 4, 2]."""
    h, w = size[0] - 0.5, size[1] - 0.5
    corners = torch.tensor([[-0.5, -0.5, 1], [-0.5, h, 1], [w, h, 1], [w, -0.5, 1]], dtype=torch.float64)
    return (corners @ to_source.mT)[..., :2]


def _overhang(quad: Tensor, photo_size: tuple[int, int]) -> list[float]:
    """How far the corners [4, 2] lie beyond the photo: left, top, right, bottom."""
    height, width = photo_size
    (left, top), (right, bottom) = quad.amin(0).tolist(), quad.amax(0).tolist()
    return [-0.5 - left, -0.5 - top, right - width + 0.5, bottom - height + 0.5]


def _scales(to_source: Tensor) -> list[float]:
    return torch.linalg.det(to_source).abs().sqrt().tolist()


def _at_size(aligned: AlignedFaces, size: int) -> Tensor:
    """photo → crop for crops redrawn at another size."""
    return _pixel_scale(size / aligned.images.shape[-1]) @ aligned.to_crop


def _pixel_scale(k: float) -> Tensor:
    """Indices of a picture → indices of the same picture made k times larger."""
    o = (k - 1) / 2
    return torch.tensor([[k, 0, o], [0, k, o], [0, 0, 1]], dtype=torch.float64)


def _shift(x: float, y: float) -> Tensor:
    return torch.tensor([[1, 0, x], [0, 1, y], [0, 0, 1]], dtype=torch.float64)


def _check_fit(x: Tensor, aligned: AlignedFaces, name: str) -> None:
    if x.ndim != 4 or len(x) != len(aligned) or x.shape[-1] != x.shape[-2]:
        raise WPlusError(f"{name}: expected [{len(aligned)}, C, S, S] for the aligned faces, got {list(x.shape)}")
