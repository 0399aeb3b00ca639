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


def _grain(rgb: Tensor) -> Tensor:
    """[1, 1, S, S] in 0..1: the paper's, always the same."""
    generator = torch.Generator().manual_seed(5)
    return torch.rand(1, 1, *rgb.shape[2:], generator=generator).to(rgb)


def _pencil(rgb: Tensor) -> Tensor:
    grey = rgb.mean(1, keepdim=True)
    lines = (grey / (_blur(grey, 3) + 0.04)).clamp(0, 1).pow(1.5)
    paper = 0.86 + 0.14 * grey - 0.07 * (_grain(rgb) < 0.6 - grey).float()
    return 0.98 * lines * torch.lerp(paper.expand_as(rgb), rgb + (1 - rgb) * 0.3, 0.5)


def _watercolor(rgb: Tensor) -> Tensor:
    smooth = torch.lerp(_blur(rgb, 1, 1), rgb, 0.4)
    steps = torch.lerp(smooth, (smooth * 6).round() / 6, 0.5)
    edge = (_blur(rgb, 2) - smooth).abs().mean(1, keepdim=True)
    paper = 0.05 * (_blur(_grain(rgb), 1, 1) - 0.5)
    return 0.14 + 0.88 * steps - 0.9 * edge + paper


def _pop_art(rgb: Tensor) -> Tensor:
    grey = rgb.mean(1, keepdim=True)
    vivid = (grey + 1.5 * (rgb - grey) - 0.5) * 1.2 + 0.5
    i = torch.arange(rgb.shape[-1], device=rgb.device)
    dots = ((i % 4 - 1.5).square() + (i[:, None] % 4 - 1.5).square()).sqrt()
    dots = (dots < 1.2).float() * ((grey - _blur(grey, 2)).abs() < 0.03)
    return (vivid * 4).round() / 4 - 0.09 * dots


def _pixel_art(rgb: Tensor) -> Tensor:
    small = F.avg_pool2d(rgb, 2, ceil_mode=True)
    return F.interpolate((small * 6).round() / 6, scale_factor=2)[..., : rgb.shape[2], : rgb.shape[3]]


def _photo(rgb: Tensor) -> Tensor:
    return rgb


STYLES = {
    "photo": _photo,
    "pencil sketch": _pencil,
    "watercolor": _watercolor,
    "pop art": _pop_art,
    "pixel art": _pixel_art,
}
