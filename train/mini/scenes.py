"""People of the drawn world in the wild: body, clothes, place, light and style, with exact captions and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import places
from .draw import Canvas, arc, box, capsule, colour, ellipse, grid, palette, union
from .world import CHUNK, NEUTRAL, draw_head, person, points

COLOURS = {
    "red": "D8343C", "orange": "F08A24", "yellow": "F4C93A", "green": "3E9B4F", "blue": "2F6FD0",
    "purple": "7D4AB8", "white": "F4F1EA", "black": "2A2A30",
}  # fmt: skip
GARMENTS = ("shirt", "sweater", "dress", "jacket")
ACTIONS = ("", "waving", "with a balloon")
LIGHTS = {"by day": (1.0, 1.0, 1.0), "at sunset": (1.02, 0.86, 0.72), "at night": (0.56, 0.62, 0.84)}
STYLES = ("photo", "pencil sketch", "watercolor", "pop art", "pixel art")
LABELS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "garment": GARMENTS,
    "action": ACTIONS,
    "place": tuple(places.PLACES),
    "light": tuple(LIGHTS),
    "style": STYLES,
}
FACE_HEIGHT = 1.53  # chin to top of the average head, in the head's units
NECK = 0.95  # where the head turns on the body


def _words() -> tuple[str, ...]:
    phrases = ["a person in", NEUTRAL, *(v for values in LABELS.values() for v in values)]
    return tuple(sorted({word for phrase in phrases for word in phrase.split()}))


WORDS = _words()


@dataclass(frozen=True)
class Scenes:
    """Everything about B pictures but the people in them.

    colour, garment, action, place, light, style: int64 [B], indices into `LABELS`. x, y: [B], where the middle of the
    face is, and height: the face's, as fractions of the picture. roll: [B] in radians, to the right. detail: [B, 8]
    in 0..1, what else varies.
    """

    colour: Tensor
    garment: Tensor
    action: Tensor
    place: Tensor
    light: Tensor
    style: Tensor
    x: Tensor
    y: Tensor
    height: Tensor
    roll: Tensor
    detail: Tensor

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, rows: slice | Tensor | Sequence[int]) -> Scenes:
        return Scenes(*(getattr(self, f.name)[rows] for f in fields(self)))

    def to(self, device: torch.device | str) -> Scenes:
        return Scenes(*(getattr(self, f.name).to(device) for f in fields(self)))


class Pictures(NamedTuple):
    """images: [B, 3, S, S] in 0..1. masks: [B, 1, S, S] in 0..1, the head: what `faces` draws.

    to_head: [B, 3, 3], pixel indices → the head's frame. points: [B, 5, 2] in pixel indices, as `landmarks`.
    """

    images: Tensor
    masks: Tensor
    to_head: Tensor
    points: Tensor


def sample_scenes(n: int, rng: np.random.Generator) -> Scenes:
    """n scenes: every label uniform, but two in five are photos; the face 25 to 50 % of the picture's height."""
    labels = [torch.from_numpy(rng.integers(len(values), size=n)) for values in LABELS.values()]
    labels[-1] *= torch.from_numpy((rng.random(n) < 0.75).astype(np.int64))
    u = torch.from_numpy(rng.random((n, 12), dtype=np.float32))
    height = 0.25 + 0.25 * u[:, 0]
    x = 0.5 + (2 * u[:, 1] - 1) * (0.32 - 0.4 * height)
    y = 0.72 * height + 0.02 + u[:, 2] * (0.42 - 0.62 * height)
    return Scenes(*labels, x, y, height, 0.5 * (u[:, 3] - 0.5), u[:, 4:])


def captions(scenes: Scenes) -> list[str]:
    """What is in the pictures, of all that `LABELS` holds: never who is in them, nor their expression."""
    rows = torch.stack([getattr(scenes, name) for name in LABELS], 1).tolist()
    return [_caption(*(values[i] for values, i in zip(LABELS.values(), row, strict=True))) for row in rows]


def _caption(colour: str, garment: str, action: str, place: str, light: str, style: str) -> str:
    article = "an" if colour[0] in "aeiou" else "a"
    return " ".join(f"a person in {article} {colour} {garment} {action} {place} {light}, {style}".split())


def landmarks(z: Tensor, scenes: Scenes, size: int = 128) -> Tensor:
    """[B, 5, 2] pixel indices, for `wplus_core.faces.from_5`: left and right eye, nose, corners of the mouth."""
    return _in_picture(points(z), _to_head(scenes, size))


def _in_picture(points: Tensor, to_head: Tensor) -> Tensor:
    back = torch.linalg.inv(to_head)
    return points @ back[:, :2, :2].mT + back[:, None, :2, 2]


def _to_head(s: Scenes, size: int) -> Tensor:
    """[B, 3, 3], pixel indices → the head's frame."""
    px = FACE_HEIGHT / (s.height * size)
    c, i = px * s.roll.cos(), px * s.roll.sin()
    x, y = s.x * size - 0.5, s.y * size - 0.5
    o, one = torch.zeros_like(px), torch.ones_like(px)
    rows = [c, i, -c * x - i * y, -i, c, i * x - c * y + 0.025, o, o, one]
    return torch.stack(rows, 1).view(-1, 3, 3)


def _to_body(s: Scenes, to_head: Tensor, size: int) -> Tensor:
    """[B, 3, 3], pixel indices → the upright body's frame: the head's units, the neck at the origin."""
    neck = _in_picture(to_head.new_tensor([[[0.0, NECK]]]).expand(len(to_head), -1, -1), to_head)[:, 0]
    px = FACE_HEIGHT / (s.height * size)
    out = torch.eye(3, device=px.device).repeat(len(px), 1, 1)
    out[:, 0, 0] = out[:, 1, 1] = px
    out[:, :2, 2] = -px[:, None] * neck
    return out


@torch.no_grad()
def scenes(z: Tensor, scene: Scenes, size: int = 128) -> Pictures:
    """People z [B, F], each in its scene."""
    chunks = [_scenes(z[i : i + CHUNK], scene[i : i + CHUNK], size) for i in range(0, len(z), CHUNK)]
    return Pictures(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _scenes(z: Tensor, s: Scenes, size: int) -> Pictures:
    p, to_head = person(z), _to_head(s, size)
    to_body = _to_body(s, to_head, size)
    px = to_body[:, 0, 0, None, None]
    rgb = places.backgrounds(s.place, s.light, s.detail, size)
    c = Canvas(rgb, torch.zeros_like(rgb[:, :1]), *grid(to_body, size), px)
    draw_body(c, p, s)
    head = Canvas(rgb, torch.zeros_like(rgb[:, :1]), *grid(to_head, size), px)
    draw_head(head, p)
    tint = torch.tensor(list(LIGHTS.values()), device=z.device)[s.light][:, :, None, None]
    rgb = (rgb * tint.lerp(torch.ones_like(tint), 0.6 * head.alpha)).clamp(0, 1)
    return Pictures(styled(rgb, s.style), head.alpha, to_head, _in_picture(points(z), to_head))


def draw_body(c: Canvas, p: SimpleNamespace, s: Scenes):
    """Torso, arms and clothes, and a balloon, over what is on the canvas."""
    cloth = palette(s.colour / (len(COLOURS) - 1), tuple(COLOURS.values()))
    garment = lambda name: (s.garment == GARMENTS.index(name)).float()[:, None, None]  # noqa: E731
    action = lambda name: (s.action == ACTIONS.index(name)).float()[:, None, None]  # noqa: E731
    up = 1 - action("")
    side = torch.where(s.x < 0.5, 1.0, -1.0)[:, None, None]  # the arm that has room
    x, y = c.x * side, c.y
    shade = (1.0 - 0.12 * (c.x + 0.3).square()).clamp(0.7, 1.05)[:, None]
    _balloon(c, x, y, action("with a balloon"), s)
    torso = union(ellipse(x, y - 0.62, 0.80, 0.56), box(x, y - 2.4, 0.70 + 0.04 * y, 1.9, 0.3), smooth=0.25)
    low = capsule(-x, y, 0.72, 0.42, 0.98, 1.55, 0.19)
    low_hand = ((-x - 1.0).square() + (y - 1.7).square()).sqrt() - 0.17
    elbow_x, elbow_y = 0.72 + 0.48, 0.42 + 0.95 - 0.55 * up
    hand_x, hand_y = 1.0 + 0.42 * up, 1.55 - 1.85 * up
    arm = union(
        capsule(x, y, 0.72, 0.42, elbow_x * up + (1 - up) * 0.98, elbow_y, 0.19),
        capsule(x, y, elbow_x * up + (1 - up) * 0.98, elbow_y, hand_x, hand_y, 0.16),
    )
    hand = ((x - hand_x).square() + (y - hand_y).square()).sqrt() - 0.17
    skin = p.skin * 0.94
    bare = garment("dress")
    limbs = union(low, arm)
    sleeve = torch.lerp(cloth, skin, bare[:, None])
    short = garment("shirt")
    c.paint(c.cover(union(low_hand, hand)), skin)
    c.paint(c.cover(limbs), sleeve * 0.9)
    beyond = torch.maximum(limbs, 0.62 - torch.minimum(((-x - 0.72).square() + (y - 0.42).square()).sqrt(), ((x - 0.72).square() + (y - 0.42).square()).sqrt()))
    c.paint(c.cover(beyond) * short, skin)
    c.paint(c.cover(torso), cloth * shade)
    _pattern(c, torso, limbs, cloth, garment)
    c.paint(c.cover(ellipse(c.x, c.y - 0.02, 0.34, 0.24)) * garment("dress"), skin)


def _pattern(c: Canvas, torso: Tensor, limbs: Tensor, cloth: Tensor, garment):
    """What tells the clothes apart."""
    white, x, y = colour("FFFFFF", c.x.device), c.x, c.y
    light = torch.lerp(cloth, white, 0.55)
    dark = cloth * 0.62 + 0.02
    inside = c.cover(torso)
    everywhere = c.cover(union(torso, limbs))
    stripes = c.cover(((y - 0.15).remainder(0.4) - 0.2).abs() - 0.075)
    c.paint(stripes * everywhere * garment("sweater"), torch.lerp(light, dark, (cloth.mean(1, keepdim=True) > 0.75).float()))
    c.paint(c.cover(box(x, y - 0.02, 0.30, 0.15, 0.1)) * garment("sweater"), dark)
    dots = ((x.remainder(0.36) - 0.18).square() + (y.remainder(0.36) - 0.18).square()).sqrt() - 0.075
    c.paint(c.cover(dots) * inside * garment("dress"), torch.lerp(light, dark, (cloth.mean(1, keepdim=True) > 0.75).float()))
    opening = x.abs() - 0.30 + 0.16 * y
    c.paint(c.cover(torch.maximum(opening.clamp(min=-1), torso)) * garment("jacket"), torch.lerp(white, colour("8FA3B8", x.device), 0.25))
    lapel = torch.maximum((opening - 0.06).abs() - 0.07, y - 1.0)
    c.paint(c.cover(torch.maximum(lapel, torso)) * garment("jacket"), dark)
    collar = capsule(x.abs(), y, 0.13, 0.02, 0.24, 0.22, 0.09)
    c.paint(c.cover(collar) * garment("shirt"), light)
    buttons = ((y - 0.35).remainder(0.34) - 0.17).square() + x.square()
    c.paint(c.cover(buttons.sqrt() - 0.04) * inside * garment("shirt") * c.cover(0.3 - y), dark)


def _balloon(c: Canvas, x: Tensor, y: Tensor, shown: Tensor, s: Scenes):
    at_x, at_y = 1.45, -1.15
    c.paint(c.cover(capsule(x, y, 1.42, -0.3, at_x, at_y + 0.4, 0.018)) * shown, colour("F5F5F5", x.device))
    skin = palette(s.detail[:, 0], ("E8483F", "F5B52E", "4FB06B", "3F83E0", "C45BC0"))
    c.paint(c.cover(union(ellipse(x - at_x, y - at_y, 0.40, 0.47), ellipse(x - at_x, y - at_y - 0.5, 0.08, 0.06))) * shown, skin)
    c.paint(c.cover(ellipse(x - at_x + 0.13, y - at_y + 0.17, 0.09, 0.13), 0.05) * shown * 0.7, colour("FFFFFF", x.device))


def styled(rgb: Tensor, style: Tensor) -> Tensor:
    """rgb [B, 3, S, S] in 0..1, style [B] → the pictures in their styles."""
    out = rgb.clone()
    for i, draw in enumerate((None, _pencil, _watercolor, _pop_art, _pixel_art)):
        rows = (style == i).nonzero()[:, 0]
        if draw and len(rows):
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
    lines = (grey / (_blur(grey, 3) + 0.02)).clamp(0, 1).pow(1.6)
    paper = 0.86 + 0.14 * grey - 0.10 * (_grain(rgb) < 0.6 - grey).float()
    return 0.98 * lines * torch.lerp(paper.expand_as(rgb), rgb + (1 - rgb) * 0.3, 0.5)


def _watercolor(rgb: Tensor) -> Tensor:
    smooth = _blur(rgb, 1, 1)
    steps = torch.lerp(smooth, (smooth * 6).round() / 6, 0.5)
    edge = (_blur(rgb, 2) - smooth).abs().mean(1, keepdim=True)
    paper = 0.05 * (_blur(_grain(rgb), 1, 1) - 0.5)
    return 0.14 + 0.88 * steps - 0.9 * edge + paper


def _pop_art(rgb: Tensor) -> Tensor:
    grey = rgb.mean(1, keepdim=True)
    vivid = (grey + 1.7 * (rgb - grey) - 0.5) * 1.25 + 0.5
    i = torch.arange(rgb.shape[-1], device=rgb.device)
    dots = ((i % 4 - 1.5).square() + (i[:, None] % 4 - 1.5).square()).sqrt()
    dots = (dots < 1.2).float() * ((grey - _blur(grey, 2)).abs() < 0.03)
    return (vivid * 4).round() / 4 - 0.09 * dots


def _pixel_art(rgb: Tensor) -> Tensor:
    small = F.avg_pool2d(rgb, 2, ceil_mode=True)
    return F.interpolate((small * 6).round() / 6, scale_factor=2)[..., : rgb.shape[2], : rgb.shape[3]]
