"""Styles of the drawn world's pictures, each made from the picture as a photo."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def styled(rgb: Tensor, style: Tensor) -> Tensor:
    """rgb [B, 3, S, S] in 0..1, style [B] → the pictures in their styles."""
    out = rgb.clone()
    for i, draw in enumerate(STYLES.values()):
        rows = (style == i).nonzero()[:, 0]
        if len(rows):
            out[rows] = draw(rgb[rows]).clamp(0, 1)
    return out


def _blur(x: Tensor, radius: int, times: int = 2) -> Tensor:
    for _ in range(times):
        x = F.avg_pool2d(F.pad(x, (radius,) * 4, mode="replicate"), 2 * radius + 1, 1)
    return x


def _steps(x: Tensor, count: int, sharp: float) -> Tensor:
    """In so many steps, their edges soft or (1) sharp."""
    return torch.lerp(x, (x * count).round() / count, sharp)


def _pencil(rgb: Tensor) -> Tensor:
    grey = rgb.mean(1, keepdim=True)
    lines = (grey / (_blur(grey, 3) + 0.04)).clamp(0, 1).pow(1.5)
    paper = 0.86 + 0.14 * grey
    return 0.98 * lines * torch.lerp(paper.expand_as(rgb), rgb + (1 - rgb) * 0.3, 0.5)


def _watercolor(rgb: Tensor) -> Tensor:
    smooth = torch.lerp(_blur(rgb, 1, 1), rgb, 0.4)
    edge = (_blur(rgb, 2) - smooth).abs().mean(1, keepdim=True)
    return 0.14 + 0.88 * _steps(smooth, 6, 0.5) - 0.9 * edge


def _pop_art(rgb: Tensor) -> Tensor:
    grey = rgb.mean(1, keepdim=True)
    vivid = (grey + 1.5 * (rgb - grey) - 0.5) * 1.2 + 0.5
    outline = ((grey - _blur(grey, 2)).abs() - 0.06).clamp(0, 0.12)
    return _steps(vivid, 4, 0.7) - 3 * outline


def _pixel_art(rgb: Tensor) -> Tensor:
    small = F.avg_pool2d(rgb, 4, ceil_mode=True)
    return F.interpolate(_steps(small, 6, 1), scale_factor=4)[..., : rgb.shape[2], : rgb.shape[3]]


def _photo(rgb: Tensor) -> Tensor:
    return rgb


STYLES = {
    "photo": _photo,
    "pencil sketch": _pencil,
    "watercolor": _watercolor,
    "pop art": _pop_art,
    "pixel art": _pixel_art,
}
