"""People of the drawn world in the wild: body, clothes, place, light and style, with exact captions and masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import places
from .draw import Canvas, box, capsule, ellipse, grid, palette, union
from .styles import STYLES, styled
from .world import LOOK_WORDS, NEUTRAL, chunk_size, draw_head, person, points

COLOURS = {
    "red": "D8343C", "orange": "F08A24", "yellow": "F4C93A", "green": "3E9B4F", "blue": "2F6FD0",
    "purple": "7D4AB8", "white": "F4F1EA", "black": "2A2A30",
}  # fmt: skip
GARMENTS = ("shirt", "sweater", "dress", "jacket")
ACTIONS = ("", "waving", "with a balloon", "with a cat")
LIGHTS = {"by day": (1.0, 1.0, 1.0), "at sunset": (1.03, 0.92, 0.82), "at night": (0.60, 0.66, 0.88)}
LABELS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "garment": GARMENTS,
    "action": ACTIONS,
    "place": tuple(places.PLACES),
    "light": tuple(LIGHTS),
    "style": tuple(STYLES),
}
FACE_HEIGHT = 1.53  # chin to top of the average head, in the head's units
NECK = 0.95  # where the head turns on the body
FINGERS = ((-0.2, -0.1), (-0.1, -0.24), (0.05, -0.25), (0.17, -0.17))  # tips, from the middle of the hand


def _words() -> tuple[str, ...]:
    phrases = ["a person in an", NEUTRAL, *LOOK_WORDS, *(v for values in LABELS.values() for v in values)]
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
    """n scenes: every label uniform, but two in three are photos; the face 50 to 68 % of the picture's height."""
    labels = [torch.from_numpy(rng.integers(len(values), size=n)) for values in LABELS.values()]
    labels[-1] *= torch.from_numpy((rng.random(n) < 0.4).astype(np.int64))
    u = torch.from_numpy(rng.random((n, 12), dtype=np.float32))
    height = 0.50 + 0.18 * u[:, 0]
    x = 0.5 + (2 * u[:, 1] - 1) * (0.32 - 0.4 * height)
    y = 0.69 * height + 0.02 + u[:, 2] * (0.42 - 0.6 * height)
    return Scenes(*labels, x, y, height, 0.5 * (u[:, 3] - 0.5), u[:, 4:])


def captions(scenes: Scenes) -> list[str]:
    """What is in the pictures, all that `LABELS` holds: never who is in them nor how they look (`world.looking`)."""
    rows = torch.stack([getattr(scenes, name) for name in LABELS], 1).tolist()
    return [caption(row) for row in rows]


def caption(row: Sequence[int]) -> str:
    """The caption for a number of each of `LABELS`, in their order."""
    return _caption(*(values[i] for values, i in zip(LABELS.values(), row, strict=True)))


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
    n = chunk_size(z, size)
    chunks = [_scenes(z[i : i + n], scene[i : i + n], size) for i in range(0, len(z), n)]
    return Pictures(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _scenes(z: Tensor, s: Scenes, size: int) -> Pictures:
    p, to_head = person(z), _to_head(s, size)
    rgb = places.backgrounds(s.place, s.light, s.detail, size)
    body = Body(rgb, _to_body(s, to_head, size), s)
    draw_body(body, p)
    px = (FACE_HEIGHT / (s.height * size))[:, None, None]
    head = Canvas(rgb, torch.zeros_like(rgb[:, :1]), *grid(to_head, size), px)
    draw_head(head, p)
    tint = torch.tensor(list(LIGHTS.values()), device=z.device)[s.light][:, :, None, None]
    rgb = (rgb * tint.lerp(torch.ones_like(tint), 0.55 * torch.maximum(head.alpha, body.alpha))).clamp(0, 1)
    return Pictures(styled(rgb, s.style), head.alpha, to_head, _in_picture(points(z), to_head))


class Body(Canvas):
    """A canvas in the upright body's frame. mirrored: [B, H, W], x with the side that has room in the picture right."""

    def __init__(self, rgb: Tensor, to_body: Tensor, scenes: Scenes):
        px = to_body[:, 0, 0, None, None]
        super().__init__(rgb, torch.zeros_like(rgb[:, :1]), *grid(to_body, rgb.shape[-1]), px)
        self.mirrored = self.x * torch.where(scenes.x < 0.5, 1.0, -1.0)[:, None, None]
        self.scenes = scenes

    def has(self, value: str) -> Tensor:
        """[B, 1, 1]: 1 where the scene has this garment or action."""
        name = "garment" if value in GARMENTS else "action"
        return (getattr(self.scenes, name) == LABELS[name].index(value)).float()[:, None, None]


def draw_body(c: Body, p: SimpleNamespace):
    """Torso, arms and clothes, a balloon or a cat, over what is on the canvas."""
    cloth = palette(c.scenes.colour / (len(COLOURS) - 1), tuple(COLOURS.values()))
    skin = p.skin * 0.94
    torso = union(ellipse(c.x, c.y - 0.62, 0.80, 0.56), box(c.x, c.y - 2.4, 0.70 + 0.04 * c.y, 1.9, 0.3), smooth=0.25)
    _balloon(c)
    limbs = _arms(c, cloth, skin)
    c.lay(torso, cloth * (1 - 0.12 * (c.x + 0.3).square()).clamp(0.7, 1.05)[:, None])
    for dress in (_sweater, _dress, _jacket, _shirt):
        dress(c, torso, limbs, cloth, skin)
    _cat(c)


def _arms(c: Body, cloth: Tensor, skin: Tensor) -> Tensor:
    """Two arms, one of them raised where the person waves or holds something; their distance [B, H, W]."""
    x, y = c.mirrored, c.y
    up = c.has("waving") + c.has("with a balloon")
    elbow, hand = (0.98 + 0.16 * up, 1.37 - 0.55 * up), (1.0 + 0.28 * up, 1.55 - 1.75 * up)
    low = capsule(-x, y, 0.72, 0.42, 0.98, 1.55, 0.19)
    arm = union(capsule(x, y, 0.72, 0.42, *elbow, 0.19), capsule(x, y, *elbow, *hand, 0.16))
    limbs = union(low, arm)
    hands = union(ellipse(-x - 1, y - 1.7, 0.17, 0.17), ellipse(x - hand[0], y - hand[1], 0.17, 0.17))
    fingers = union(*(capsule(x - hand[0], y - hand[1], 0, 0, *tip, 0.05) for tip in FINGERS))
    c.lay(fingers, skin, c.has("waving"))
    c.lay(hands, skin)
    c.lay(limbs, torch.lerp(cloth, skin, c.has("dress")[:, None]) * 0.9)
    shoulders = ellipse(x.abs() - 0.72, y - 0.42, 0.42, 0.42)
    c.lay(torch.maximum(limbs, -shoulders), skin, c.has("shirt"))
    return limbs


def _accent(cloth: Tensor) -> Tensor:
    """A colour that stands out on the cloth: lighter, or darker on a light one."""
    light = (cloth.mean(1, keepdim=True) > 0.7).float()
    return torch.lerp(cloth.lerp(torch.ones_like(cloth), 0.55), 0.62 * cloth + 0.02, light)


def _sweater(c: Body, torso: Tensor, limbs: Tensor, cloth: Tensor, skin: Tensor):
    stripes = ((c.y - 0.15).remainder(0.4) - 0.2).abs() - 0.075
    c.lay(stripes, _accent(cloth), c.cover(union(torso, limbs)) * c.has("sweater"))
    c.lay(box(c.x, c.y - 0.02, 0.30, 0.15, 0.1), cloth * 0.62 + 0.02, c.has("sweater"))


def _dress(c: Body, torso: Tensor, limbs: Tensor, cloth: Tensor, skin: Tensor):
    dots = ellipse(c.x.remainder(0.36) - 0.18, c.y.remainder(0.36) - 0.18, 0.075, 0.075)
    c.lay(dots, _accent(cloth), c.cover(torso) * c.has("dress"))
    c.lay(ellipse(c.x, c.y - 0.02, 0.36, 0.26), skin, c.has("dress"))


def _jacket(c: Body, torso: Tensor, limbs: Tensor, cloth: Tensor, skin: Tensor):
    opening = c.x.abs() - 0.30 + 0.16 * c.y
    c.lay(torch.maximum(opening, torso), "E4E9EF", c.has("jacket"))
    lapel = torch.maximum((opening - 0.06).abs() - 0.07, c.y - 1.0)
    c.lay(torch.maximum(lapel, torso), cloth * 0.62 + 0.02, c.has("jacket"))


def _shirt(c: Body, torso: Tensor, limbs: Tensor, cloth: Tensor, skin: Tensor):
    collar = capsule(c.x.abs(), c.y, 0.13, 0.02, 0.24, 0.22, 0.09)
    c.lay(collar, cloth.lerp(torch.ones_like(cloth), 0.4), c.has("shirt"))
    buttons = ellipse(c.x, (c.y - 0.35).remainder(0.34) - 0.17, 0.04, 0.04)
    c.lay(torch.maximum(buttons, 0.35 - c.y), _accent(cloth), c.cover(torso) * c.has("shirt"))


def _balloon(c: Body):
    x, y, shown = c.mirrored - 1.3, c.y + 1.15, c.has("with a balloon")
    c.lay(capsule(x, y, -0.02, 0.95, 0, 0.4, 0.018), "F5F5F5", shown)
    rubber = palette(c.scenes.detail[:, 0], ("E8483F", "F5B52E", "4FB06B", "3F83E0", "C45BC0"))
    c.lay(union(ellipse(x, y, 0.40, 0.47), ellipse(x, y - 0.5, 0.08, 0.06)), rubber, shown)
    c.lay(ellipse(x + 0.13, y + 0.17, 0.09, 0.13), "FFFFFF", 0.7 * shown)


def _cat(c: Body):
    """It sits on the shoulder."""
    x, y, shown = c.mirrored - 0.98, c.y + 0.10, c.has("with a cat")
    fur = palette(c.scenes.detail[:, 0], ("F0A04A", "8A8A94", "3A3540", "F4EEE2"))
    side = x.abs()
    ears = torch.maximum((side - 0.19).abs() * 1.8 + y + 0.16 - 0.22, -y - 0.45)
    body = union(ellipse(x, y - 0.36, 0.24, 0.30), capsule(x, y, 0.2, 0.55, 0.5, 0.2, 0.06), smooth=0.05)
    c.lay(body, fur * 0.86, shown)
    c.lay(union(ellipse(x, y, 0.32, 0.26), ears), fur, shown)
    c.lay(ellipse(x, y - 0.11, 0.14, 0.10), fur.lerp(torch.ones_like(fur), 0.6), shown)
    c.lay(ellipse(side - 0.13, y + 0.02, 0.055, 0.07), "2A2430", shown)
    c.lay(ellipse(side - 0.115, y + 0.045, 0.02, 0.022), "FFFFFF", shown)
    c.lay(ellipse(x, y - 0.07, 0.04, 0.03), "E87A86", shown)
