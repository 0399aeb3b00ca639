"""Shapes as signed distances on a grid of points, painted with edges one pixel wide.

A shape takes points x, y [B, H, W] and sizes that broadcast against them, and gives the distance to its edge,
negative inside, in the units of the points: exact enough near the edge for anti-aliasing, and no further.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Canvas:
    """rgb: [B, 3, H, W] in 0..1, painted over in place. alpha: [B, 1, H, W], what has been covered so far.

    x, y: [B, H, W], where the pixels lie. px: [B, 1, 1], the side of a pixel in the same units.
    """

    rgb: Tensor
    alpha: Tensor
    x: Tensor
    y: Tensor
    px: Tensor

    def cover(self, distance: Tensor, blur: float = 0) -> Tensor:
        """Distance [B, H, W] → how much of each pixel is inside, 0..1; blur: width of a softer edge."""
        return (0.5 - distance / (self.px + blur)).clamp_(0, 1)

    def paint(self, cover: Tensor, colour: Tensor):
        """cover: [B, H, W]. colour: [B, 3, 1, 1] or [B, 3, H, W]."""
        cover = cover[:, None]
        self.rgb.addcmul_(cover, colour - self.rgb)
        self.alpha.addcmul_(cover, 1 - self.alpha)

    def lay(self, shape: Tensor, what: str | Tensor, shown: Tensor | float = 1.0, blur: float = 0):
        """Paint a shape (distance [B, H, W]) in a colour (RRGGBB or a tensor), as far as it is shown (0..1)."""
        self.paint(self.cover(shape, blur) * shown, colour(what, self.x.device) if isinstance(what, str) else what)


def ellipse(x: Tensor, y: Tensor, a, b) -> Tensor:
    """Around the origin, with half axes a and b. Source: Quilez's first-order distance."""
    u, v = x / a, y / b
    k = (u.square() + v.square()).sqrt_()
    slope = ((u / a).square() + (v / b).square()).sqrt_()
    return k * (k - 1) / (slope + 1e-6)


def capsule(x: Tensor, y: Tensor, ax, ay, bx, by, radius) -> Tensor:
    """A line from a to b with round ends."""
    dx, dy = bx - ax, by - ay
    t = (((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy + 1e-9)).clamp(0, 1)
    return ((x - ax - t * dx).square() + (y - ay - t * dy).square()).sqrt() - radius


def box(x: Tensor, y: Tensor, a, b, round=0.0) -> Tensor:
    """A box of half sides a and b with rounded corners."""
    qx, qy = x.abs() - (a - round), y.abs() - (b - round)
    outside = (qx.clamp(min=0).square() + qy.clamp(min=0).square()).sqrt()
    return outside + torch.maximum(qx, qy).clamp(max=0) - round


def arc(x: Tensor, y: Tensor, width, bend, thickness) -> Tensor:
    """A stroke from (-width, 0) to (width, 0) whose middle lies `bend` lower; thin at the ends."""
    u = x / width
    q = (1 - u.square()).clamp(min=0)
    slope = 2 * bend * u / width
    away = (y - bend * q).abs() / (1 + slope.square()).sqrt()
    return torch.maximum(away - thickness * q.sqrt(), x.abs() - width)


def union(*distances: Tensor, smooth=0.0) -> Tensor:
    """Of shapes; smooth: how far around a joint it is rounded (polynomial smooth minimum)."""
    out = distances[0]
    for d in distances[1:]:
        h = (smooth - (out - d).abs()).clamp(min=0) if smooth else 0
        out = torch.minimum(out, d) - (h * h / (4 * smooth) if smooth else 0)
    return out


def grid(to_points: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """to_points [B, 3, 3] from pixel indices → x, y [B, size, size]."""
    i = torch.arange(size, device=to_points.device, dtype=to_points.dtype)
    m = to_points[:, :2, :, None, None]
    x, y = (m[:, :, 0] * i + m[:, :, 1] * i[:, None] + m[:, :, 2]).unbind(1)
    return x, y


def palette(t: Tensor, colours: Sequence[str]) -> Tensor:
    """t [B] in 0..1 along a line through the colours (as RRGGBB) → [B, 3, 1, 1]."""
    stops = torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (0, 2, 4)] for c in colours], device=t.device)
    at = t.clamp(0, 1) * (len(stops) - 1)
    i = at.long().clamp(max=len(stops) - 2)
    return torch.lerp(stops[i], stops[i + 1], (at - i)[:, None])[:, :, None, None]


def colour(rrggbb: str, device=None) -> Tensor:
    """[1, 3, 1, 1]."""
    return palette(torch.zeros(1, device=device), (rrggbb, rrggbb))
