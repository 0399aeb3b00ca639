"""Where the scenes of the drawn world are set: one small painting per place, in the light of day, sunset or night."""

from __future__ import annotations

import torch
from torch import Tensor

from .draw import Canvas, box, capsule, colour, ellipse, palette, union

SKIES = (("5FB2EE", "D8F0FB"), ("54408C", "FFA25E"), ("1A2450", "4A5A9A"))  # day, sunset, night: top and horizon


class Place(Canvas):
    """A canvas over the whole picture: x, y in 0..1. light: [B, 1, 1], 0 day, 1 sunset, 2 night. detail: [B, 8]."""

    def __init__(self, light: Tensor, detail: Tensor, size: int):
        i = (torch.arange(size, device=detail.device) + 0.5) / size
        x, y = i.expand(len(light), size, size), i[:, None].expand(len(light), size, size)
        rgb = detail.new_zeros(len(light), 3, size, size)
        super().__init__(rgb, torch.zeros_like(rgb[:, :1]), x, y, detail.new_full((1, 1, 1), 1 / size))
        self.light, self.detail = light, detail

    def d(self, i: int) -> Tensor:
        """[B, 1, 1]"""
        return self.detail[:, i, None, None]

    def is_light(self, i: int) -> Tensor:
        return (self.light == i).float()[:, None, None]


def backgrounds(place: Tensor, light: Tensor, detail: Tensor, size: int) -> Tensor:
    """place, light: int64 [B]. detail: [B, 8] in 0..1 → [B, 3, size, size]"""
    out = detail.new_zeros(len(place), 3, size, size)
    for i, draw in enumerate(PLACES.values()):
        rows = (place == i).nonzero()[:, 0]
        if len(rows):
            canvas = Place(light[rows], detail[rows], size)
            draw(canvas)
            out[rows] = canvas.rgb
    return out


def _sky(c: Place, horizon: float):
    tops, ends = zip(*SKIES, strict=True)
    top, end = (palette(c.light / 2, stops) for stops in (tops, ends))
    c.rgb.copy_(torch.lerp(top, end, (c.y / horizon).clamp(0, 1)[:, None]))
    stars = _scattered(c.x, c.y, 0.11, c.d(1)) - 0.004 - 0.004 * c.d(2)
    c.lay(stars, "FFFBE0", c.is_light(2) * (1 - c.y / horizon).clamp(0, 1))
    x, y = c.x - 0.12 - 0.76 * c.d(0), c.y - 0.13 - 0.07 * c.d(1)
    glow = (1 - (x.square() + y.square()).sqrt() / 0.3).clamp(0, 1).square()
    c.paint(glow * 0.6, palette(c.light / 2, ("FFFDE0", "FFD08A", "C8D4FF")))
    disc = (x.square() + y.square()).sqrt() - 0.065
    moon = torch.maximum(disc, 0.055 - ((x - 0.03).square() + (y + 0.015).square()).sqrt())
    c.paint(c.cover(torch.where(c.is_light(2) > 0, moon, disc)), palette(c.light / 2, ("FFF3A0", "FFE08A", "FFFBE6")))


def _clouds(c: Place, height: float):
    for k in range(2):
        x, y = c.x - (0.15 + 0.55 * k + 0.3 * c.d(2 + k)), c.y - height - 0.12 * c.d(4 + k)
        puffs = union(
            ellipse(x, y, 0.13, 0.03), ellipse(x + 0.03, y + 0.025, 0.06, 0.04), ellipse(x - 0.05, y, 0.05, 0.05)
        )
        c.paint(c.cover(puffs) * 0.85, palette(c.light / 2, ("FFFFFF", "FFC7A8", "5B679F")))


def _scattered(x: Tensor, y: Tensor, cell: float, seed: Tensor) -> Tensor:
    """Distance to the nearest of points scattered one to a cell."""
    i, j = (x / cell).floor(), (y / cell).floor()
    u, v = _weyl(i, j, seed), _weyl(j, i, seed + 0.37)
    return ((x - (i + 0.2 + 0.6 * u) * cell).square() + (y - (j + 0.2 + 0.6 * v) * cell).square()).sqrt()


def _weyl(i: Tensor, j: Tensor | float, seed: Tensor) -> Tensor:
    """Even numbers in 0..1, one for each pair of whole numbers."""
    return (i * 0.7548777 + j * 0.5698403 + i * j * 0.6180340 + seed).remainder(1)


def _repeated(x: Tensor, period: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    """x → the distance to the middle of its period, and a number in 0..1 for the period."""
    i = ((x + seed * period) / period).floor()
    return (x + seed * period) - (i + 0.5) * period, _weyl(i, 1.0, seed)


def _beach(c: Place):
    _sky(c, 0.55)
    _clouds(c, 0.2)
    c.lay(0.52 - c.y, "2E86B8")
    waves = ((c.y - 0.52) / (0.035 + 0.12 * (c.y - 0.5)) + 0.3 * torch.sin(20 * c.x + 9 * c.d(3))).remainder(1)
    c.lay((waves - 0.5).abs() * 0.05 - 0.006, "9AD4E8", c.cover(0.52 - c.y) * 0.7)
    shore = 0.70 + 0.025 * torch.sin(7 * c.x + 6 * c.d(4))
    c.lay(shore - 0.02 - c.y, "FFFFFF")
    c.lay(shore - c.y, "F2D8A0")
    c.lay(_scattered(c.x, c.y, 0.07, c.d(5)) - 0.005, "D9B878", c.cover(shore + 0.02 - c.y))
    x = c.x - torch.where(c.d(6) < 0.5, 0.08, 0.92)
    trunk = capsule(x - 0.03 * torch.sin(4 * c.y), c.y, 0, 0.36, 0, 0.8, 0.018)
    c.lay(trunk, "8A5A34")
    leaves = union(ellipse(x.abs() - 0.1, c.y - 0.34, 0.10, 0.022), ellipse(x.abs() - 0.07, c.y - 0.29, 0.10, 0.022))
    c.lay(leaves, "2F8F4A")


def _forest(c: Place):
    _sky(c, 0.7)
    rows = ((0.30, 0.13, "7FB58A"), (0.42, 0.19, "3F8A58"), (0.58, 0.30, "236040"))
    for depth, (tall, period, shade) in enumerate(rows):
        x, h = _repeated(c.x, period, c.d(3 + depth))
        ground = 0.66 + 0.07 * depth
        top = ground - tall * (0.75 + 0.35 * h)
        t = ((c.y - top) / (ground - top)).clamp(min=0)
        half = period * 0.62 * (t * 0.75 + 0.25 * (t * 3).remainder(1))
        c.lay(torch.maximum(torch.maximum(x.abs() - half, top - c.y), c.y - ground), shade)
        c.lay(torch.maximum(x.abs() - 0.1 * period, (c.y - ground - 0.03).abs() - 0.04), "5B3A26")
    c.lay(0.80 + 0.02 * torch.sin(9 * c.x + 6 * c.d(6)) - c.y, "5A9A4A")
    c.lay(_scattered(c.x, c.y, 0.09, c.d(7)) - 0.009, "E8624A", c.cover(0.84 - c.y))


def _city(c: Place):
    _sky(c, 0.8)
    for depth, (tall, period, shade) in enumerate(((0.62, 0.15, "8FA0BC"), (0.45, 0.22, "5A6684"))):
        x, h = _repeated(c.x, period, c.d(3 + depth))
        top = 0.86 - tall * (0.6 + 0.5 * h)
        body = torch.maximum(x.abs() - 0.44 * period, top - c.y)
        c.lay(body, shade)
        u, v = (x.remainder(0.045) - 0.0225), ((c.y - top).remainder(0.06) - 0.03)
        lit = (_weyl((x / 0.045).floor(), ((c.y - top) / 0.06).floor(), h) < 0.6).float()
        shown = c.cover(body + 0.012) * (0.25 + 0.75 * lit)
        c.paint(c.cover(box(u, v, 0.011, 0.016)) * shown, palette(c.light / 2, ("DDEBFA", "FFE3A0", "FFE27A")))
    c.lay(0.86 - c.y, "4A4D5A")
    c.lay(torch.maximum((c.y - 0.93).abs() - 0.008, (c.x + c.d(5)).remainder(0.2) - 0.1), "F4E6A0")


def _room(c: Place):
    c.rgb.copy_(palette(c.detail[:, 2], ("F2C9B8", "EBD9A8", "BFD8C0", "C9C4E6")).expand_as(c.rgb))
    c.lay((c.x.remainder(0.12) - 0.06).abs() - 0.008, "FFFFFF", 0.35)
    left = torch.where(c.d(3) < 0.5, 0.0, 0.52)
    x, y = c.x - left - 0.24, c.y - 0.24
    c.lay(box(x, y, 0.17, 0.17, 0.01), "FFFFFF")
    view = box(x, y, 0.15, 0.15)
    tops, ends = zip(*SKIES, strict=True)
    pane = torch.lerp(palette(c.light / 2, tops), palette(c.light / 2, ends), (c.y / 0.4).clamp(0, 1)[:, None])
    c.paint(c.cover(view), pane)
    disc = ((x - 0.06).square() + (y + 0.06).square()).sqrt() - 0.035
    c.paint(c.cover(torch.maximum(disc, view)), palette(c.light / 2, ("FFF3A0", "FFE08A", "FFFBE6")))
    c.lay(torch.minimum(x.abs(), y.abs()) - 0.008, "FFFFFF", c.cover(view))
    px, py = c.x - 0.76 + left, c.y - 0.22
    c.lay(box(px, py, 0.10, 0.08, 0.005), "7A4E30")
    c.lay(box(px, py, 0.085, 0.065), "F7EBD0")
    c.lay(torch.maximum(ellipse(px, py - 0.05, 0.07, 0.06), box(px, py, 0.085, 0.065)), "5E9E8A")
    c.lay(0.80 - c.y, "A8714A")
    c.lay(((c.y - 0.80).abs()) - 0.012, "FFF6EA")
    c.lay(((c.x + 0.25 * (c.y - 0.8)).remainder(0.16) - 0.08).abs() - 0.003, "86552F", c.cover(0.81 - c.y))


def _snow(c: Place):
    _sky(c, 0.7)
    hills = 0.50 + 0.10 * torch.sin(5 * c.x + 6 * c.d(3)) + 0.05 * torch.sin(11 * c.x + 6 * c.d(4))
    c.lay(hills - c.y, "C3D6EC")
    x, h = _repeated(c.x, 0.24, c.d(5))
    top = 0.42 + 0.12 * h
    t = ((c.y - top) / 0.3).clamp(min=0)
    half = 0.085 * (0.7 * t + 0.3 * (3 * t).remainder(1))
    tree = torch.maximum(x.abs() - half, (c.y - top - 0.15).abs() - 0.15)
    c.lay(tree, "3C7A6A")
    c.lay(torch.maximum(tree, (t * 3).remainder(1) * 0.1 - 0.035), "FFFFFF", 0.9)
    c.lay(0.72 + 0.03 * torch.sin(6 * c.x + 6 * c.d(6)) - c.y, "F6FAFF")
    c.lay(_scattered(c.x, c.y, 0.10, c.d(7)) - 0.012, "FFFFFF", 0.95)


def _space(c: Place):
    top = palette(c.light / 2, ("2B3F8F", "5A2A6A", "07081A"))
    end = palette(c.light / 2, ("4A7AC0", "C05A5A", "1A1440"))
    c.rgb.copy_(torch.lerp(top, end, (0.5 * c.x + 0.5 * c.y)[:, None]))
    c.lay(_scattered(c.x, c.y, 0.09, c.d(1)) - 0.005, "FFFFFF")
    c.lay(_scattered(c.x, c.y, 0.21, c.d(2)) - 0.010, "FFE9A0")
    x, y = c.x - 0.14 - 0.1 * c.d(3), c.y - 0.16 - 0.1 * c.d(4)
    planet = ellipse(x, y, 0.10, 0.10)
    ball = palette(c.detail[:, 5], ("E88A4A", "D86A8A", "6AA8D8", "7AC09A"))
    c.paint(c.cover(planet), ball * (1 - 1.8 * (x + y).clamp(-0.1, 0.2))[:, None])
    ring = (ellipse(x + 0.3 * y, y + 0.25 * x, 0.17, 0.035)).abs() - 0.009
    c.lay(torch.maximum(ring, torch.where(y + 0.25 * x < 0, -planet, torch.full_like(planet, -1.0))), "F6E0B0")
    ground = 0.86 - 0.05 * (1 - (2 * c.x - 1).square())
    c.lay(ground - c.y, "A8A4B8")
    crater = ellipse((c.x + c.d(6)).remainder(0.3) - 0.15, c.y - 0.93, 0.08, 0.022)
    c.lay(crater, "837F98")


def _sea(c: Place):
    top = palette(c.light / 2, ("6ADCE8", "8A9AC8", "1A4A80"))
    end = palette(c.light / 2, ("0E5A9A", "2A3A80", "061A48"))
    c.rgb.copy_(torch.lerp(top, end, c.y[:, None]))
    rays = torch.sin(14 * (c.x - 0.35 * c.y) + 6 * c.d(1)).clamp(min=0) * (0.8 - c.y).clamp(min=0)
    c.paint(rays * 0.4, colour("FFFFFF", c.x.device))
    for k, shade in enumerate(("FF8A3A", "FFD84A", "F06AA0")):
        x = (c.x - c.d(2 + k) - 0.3 * k).remainder(1) - 0.12
        y = c.y - 0.14 - 0.22 * k - 0.05 * c.d(5)
        tail = torch.maximum(x - 0.095, y.abs() - 0.8 * (x - 0.04))
        c.lay(union(ellipse(x, y, 0.06, 0.036), tail), shade)
        c.lay((x + 0.03).abs().maximum((y + 0.006).abs()) - 0.007, "1A1A2A")
    c.lay((_scattered(c.x, c.y, 0.16, c.d(6)) - 0.016).abs() - 0.004, "DFF8FF", 0.8)
    c.lay(0.86 + 0.02 * torch.sin(8 * c.x) - c.y, "E8CF9A")
    x, h = _repeated(c.x, 0.13, c.d(7))
    weed = torch.maximum((x + 0.02 * torch.sin(22 * c.y + 6 * h)).abs() - 0.016, 0.72 + 0.12 * h - c.y)
    c.lay(torch.maximum(weed, c.y - 0.9), "2F9A6A")


def _garden(c: Place):
    _sky(c, 0.6)
    _clouds(c, 0.16)
    c.lay(0.55 + 0.06 * torch.sin(4 * c.x + 6 * c.d(3)) - c.y, "9BD070")
    x, h = _repeated(c.x, 0.075, c.d(6))
    picket = torch.maximum(x.abs() - 0.024, 0.52 + x.abs() - c.y)
    c.lay(torch.maximum(union(picket, (c.y - 0.60).abs() - 0.012, (c.y - 0.70).abs() - 0.012), c.y - 0.76), "FFFDF6")
    c.lay(0.74 - c.y, "5FB04A")
    for k, shade in enumerate(("F0527A", "FFD23A", "FFFFFF")):
        d = _scattered(c.x + 0.05 * k, c.y + 0.03 * k, 0.12, c.d(7 - k))
        grown = c.cover(0.77 - c.y)
        c.lay(d - 0.026, shade, grown)
        c.lay(d - 0.010, "F2A03A", grown)


PLACES = {
    "on the beach": _beach,
    "in the forest": _forest,
    "in the city": _city,
    "in a room": _room,
    "in the snow": _snow,
    "in space": _space,
    "under the sea": _sea,
    "in a garden": _garden,
}
