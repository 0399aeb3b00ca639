"""A world of drawn people, with the truth about each: a person is a row of standard normal numbers, one per factor.

    python -m comfyui_wplus.train.mini.world --sheet people.jpg

Everything is drawn in the frame of the head: x to the right, y down, the eyes at y = 0, and the half side of FFHQ's
crop about 1. `faces` draws the crop that FFHQ's alignment gives, on white, as the background removal leaves it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .draw import Canvas, arc, capsule, colour, ellipse, grid, palette, union

CHUNK = 32  # people drawn at a time: what a CPU's cache holds
EYES_APART, MOUTH_DOWN = 0.25, 0.46
SKIN = ("FFE8DA", "FBD9BE", "F3C39E", "E0A478", "C68350", "9A5F38", "6E4127", "4A2B1C")
HAIR = ("17131A", "3B241A", "6B3F22", "A4511F", "C9892F", "EBC76A", "E8E0D0", "D9738F", "6A5ACD", "2F8F8B")
EYES = ("2A1A12", "5A3517", "8A6A24", "4E7F3A", "2F7F8F", "3E73C4", "8AA3B8")
LIPS = ("A85B50", "C0605C", "D2505A", "B8325A", "8C2F4A")


@dataclass(frozen=True)
class Factor:
    """A standard normal number; low and high: what the person is at -3 and +3."""

    name: str
    kind: Literal["identity", "attribute"]
    low: str
    high: str


def _factors(kind: Literal["identity", "attribute"], table: str) -> tuple[Factor, ...]:
    rows = [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]
    return tuple(Factor(name, kind, low, high) for name, low, high in rows)


FACTORS = _factors(
    "identity",
    """
    face_width     | narrow face               | wide face
    jaw            | pointed chin              | square jaw
    face_length    | short chin                | long chin
    skin           | light skin                | dark skin
    hair_colour    | black, brown, red         | blond, white, pink, violet, green
    hair_length    | cropped                   | below the shoulders
    hair_volume    | flat hair                 | big hair
    hair_curl      | smooth hair               | curly hair
    fringe         | bare forehead             | hair down to the brows
    parting        | hair swept to the left    | hair swept to the right
    eye_colour     | brown eyes                | green, then blue eyes
    eye_size       | small eyes                | large eyes
    eye_spacing    | eyes close together       | eyes far apart
    brow_thickness | thin brows                | thick brows
    brow_tilt      | brows that rise inwards   | brows that fall inwards
    nose           | small nose                | big nose
    mouth_width    | narrow mouth              | wide mouth
    lips           | pale thin lips            | dark full lips
    freckles       | none                      | many
    beard          | none                      | full beard
    """,
) + _factors(
    "attribute",
    """
    smile          | sad                       | laughing
    mouth_open     | closed                    | open
    eyes_open      | shut                      | wide open
    brows          | frowning                  | raised
    age            | young                     | old: wrinkles, grey hair
    glasses        | none                      | heavy frames
    turn           | turned to the left        | turned to the right
    nod            | looking up                | looking down
    """,
)
NAMES = tuple(f.name for f in FACTORS)
NEUTRAL = "a face on white"


def sample(n: int, rng: np.random.Generator) -> Tensor:
    """n people: z [n, F], standard normal."""
    return torch.from_numpy(rng.standard_normal((n, len(FACTORS)), dtype=np.float32))


def person(z: Tensor) -> SimpleNamespace:
    """z [B, F] → what is drawn: sizes [B, 1, 1] in the head's frame, colours [B, 3, 1, 1]."""
    t = SimpleNamespace(**dict(zip(NAMES, _squashed(z).unbind(1), strict=True)))  # each [B] in -1..1
    at = lambda middle, spread, value: (middle + spread * value)[:, None, None]  # noqa: E731
    grey = (1.6 * t.age - 0.1).clamp(0, 0.85)[:, None, None, None]
    skin = palette((t.skin + 1) / 2, SKIN)
    hair = torch.lerp(palette((t.hair_colour + 1) / 2, HAIR), colour("CFCBC8", z.device), grey)
    width = at(0.62, 0.09, t.face_width)
    opened = torch.sigmoid(3.2 * t.mouth_open - 1.2)
    return SimpleNamespace(
        width=width,
        top=-0.74,
        chin=at(0.79, 0.07, t.face_length) + at(0, 0.05, opened) * 0.6,
        jaw=at(0.22, -0.15, t.jaw),
        square=at(2.35, 0.3, t.jaw),
        skin=torch.lerp(skin, skin.mean(1, keepdim=True) * 1.06, (0.22 * t.age.clamp(min=0))[:, None, None, None]),
        cheeks=at(0.34, 0.16, t.smile) * at(1, -0.35, t.age),
        hair=hair,
        hair_length=at(0.55, 0.9, t.hair_length),
        hair_volume=at(0.16, 0.10, t.hair_volume),
        curl=at(0.5, 0.5, t.hair_curl),
        fringe=at(-0.40, 0.17, t.fringe),
        parting=at(0, 0.30, t.parting),
        eye_x=at(EYES_APART, 0.028, t.eye_spacing),
        eye_a=at(0.122, 0.024, t.eye_size),
        eye_b=at(0.135, 0.026, t.eye_size),
        eyes_open=at(0.62, 0.58, t.eyes_open) * at(1, -0.07, t.smile),
        shut=at(0.5, -0.5, t.eyes_open),
        iris=palette((t.eye_colour + 1) / 2, EYES),
        brow=torch.lerp(hair, colour("2A1B16", z.device), 0.45),
        brow_y=at(-0.235, -0.06, t.brows) - 0.5 * at(0, 0.026, t.eye_size),
        brow_t=at(0.03, 0.019, t.brow_thickness),
        brow_tilt=at(0, 0.26, t.brow_tilt) - at(0, 0.22, t.brows),
        nose=at(0.085, 0.035, t.nose),
        mouth_w=at(0.20, 0.045, t.mouth_width),
        smile=at(0.03, 0.125, t.smile),
        grin=at(1.03, 0.10, t.smile),
        opened=at(0, 0.17, opened),
        lip=palette((t.lips + 1) / 2, LIPS) * (0.55 + 0.45 * skin.mean(1, keepdim=True)),
        lip_t=at(0.028, 0.016, t.lips),
        freckles=at(-0.1, 1.0, t.freckles).clamp(0, 1),
        beard=at(-0.35, 1.5, t.beard).clamp(0, 0.95),
        wrinkles=at(0.0, 1.0, t.age).clamp(0, 1),
        glasses=at(-0.15, 1.4, t.glasses).clamp(0, 1),
        turn=at(0, 0.26, t.turn),
        nod=at(0, 0.17, t.nod),
    )


def _squashed(z: Tensor) -> Tensor:
    """Identity: uniform in -1..1, so that all looks are equally common. Attributes: slower, to move on up to 3."""
    identity = torch.tensor([f.kind == "identity" for f in FACTORS], device=z.device)
    return torch.where(identity, torch.erf(z / math.sqrt(2)), torch.tanh(z / 2) / math.tanh(1.5)).clamp(-1, 1)


# The face is painted on a round head: turning and nodding move what is in the middle, not the outline.
ROUND_X, ROUND_Y, MIDDLE_Y = 0.95, 1.15, 0.15


def _turned(x, y, p: SimpleNamespace, sign: int = 1):
    """Points of the face at rest → where they are seen; with sign -1, back."""
    x = ROUND_X * torch.sin(torch.asin((x / ROUND_X).clamp(-0.999, 0.999)) + sign * p.turn)
    y = ROUND_Y * torch.sin(torch.asin(((y - MIDDLE_Y) / ROUND_Y).clamp(-0.999, 0.999)) + sign * p.nod) + MIDDLE_Y
    return x, y


def points(z: Tensor) -> Tensor:
    """z [B, F] → [B, 5, 2] in the head's frame: left and right eye, nose, left and right corner of the mouth.

    The corners are those of the mouth at rest: so a smile never moves the crop.
    """
    p = person(z)
    e, m = p.eye_x[..., 0], p.mouth_w[..., 0]
    x = torch.cat([-e, e, 0 * e, -m, m], 1)
    y = torch.tensor([0, 0, 0.22, MOUTH_DOWN, MOUTH_DOWN], device=z.device).expand_as(x)
    flat = SimpleNamespace(turn=p.turn[..., 0], nod=p.nod[..., 0])
    return torch.stack(_turned(x, y, flat), -1)


def ffhq(points: Tensor, size: int) -> Tensor:
    """Five points [B, 5, 2] → [B, 3, 3], pixel indices of FFHQ's crop → the points' frame, as `wplus_core.align`."""
    eyes, mouth = points[:, :2], points[:, 3:]
    eye, e2e = eyes.mean(1), eyes[:, 1] - eyes[:, 0]
    e2m = mouth.mean(1) - eye
    x = e2e - torch.stack([-e2m[:, 1], e2m[:, 0]], 1)
    half = torch.maximum(2 * e2e.norm(dim=1), 1.8 * e2m.norm(dim=1))
    x = x * (half / x.norm(dim=1))[:, None]
    y = torch.stack([-x[:, 1], x[:, 0]], 1)
    s, c = 2 / size, (size - 1) / size
    out = torch.eye(3, device=points.device, dtype=points.dtype).repeat(len(points), 1, 1)
    out[:, :2] = torch.stack([s * x, s * y, eye + 0.1 * e2m - c * (x + y)], 2)
    return out


@torch.no_grad()
def faces(z: Tensor, size: int = 64) -> Tensor:
    """z [B, F] → aligned faces [B, 3, size, size] in 0..1, on white."""
    return torch.cat([_faces(chunk, size) for chunk in z.split(CHUNK)]) if len(z) else z.new_zeros(0, 3, size, size)


def _faces(z: Tensor, size: int) -> Tensor:
    to_head = ffhq(points(z), size)
    x, y = grid(to_head, size)
    rgb = z.new_ones(len(z), 3, size, size)
    canvas = Canvas(rgb, torch.zeros_like(rgb[:, :1]), x, y, to_head[:, 0, 0, None, None])
    draw_head(canvas, person(z))
    return rgb


def draw_head(c: Canvas, p: SimpleNamespace):
    """The head with neck and hair, over what is on the canvas."""
    face = _outline(c, p)
    _back_hair(c, p)
    _neck(c, p)
    _ears(c, p)
    _skin(c, p, face)
    inside = c.cover(face)
    x, y = c.x, c.y
    c.x, c.y = _turned(x, y, p, -1)
    _wrinkles(c, p)
    _beard(c, p, inside)
    _cheeks(c, p, inside)
    _nose(c, p)
    _mouth(c, p)
    _eyes(c, p)
    _brows(c, p)
    _glasses(c, p, inside)
    c.x, c.y = x, y
    _front_hair(c, p, face)


def _outline(c: Canvas, p) -> Tensor:
    middle, b = (p.top + p.chin) / 2, (p.chin - p.top) / 2
    v = (c.y - middle) / b
    narrowed = 1 - p.jaw * v.clamp(0, 1.2).square()
    u = c.x / (p.width * narrowed)
    k = (u.abs().pow(p.square) + v.abs().pow(p.square)).pow(1 / p.square)
    return (k - 1) * 0.66


def _back_hair(c: Canvas, p):
    ripple = p.curl * 0.045 * torch.sin(17 * torch.atan2(c.x, 0.2 - c.y) + 2 * c.y)
    skull = ellipse(c.x, c.y + 0.10, p.width + 0.4 * p.hair_volume + 0.02, 0.70 + 0.5 * p.hair_volume)
    half = (p.hair_length + 0.2) / 2
    fall = ellipse(c.x, c.y - p.hair_length + half, p.width + 0.75 * p.hair_volume - 0.05, (half + 0.16).clamp(min=0.1))
    c.paint(c.cover(union(skull, fall, smooth=0.1) + ripple), p.hair * 0.74)


def _neck(c: Canvas, p):
    neck = capsule(c.x, c.y, 0, 0.6, 0, 1.06, 0.24)
    shade = (1.35 - 0.7 * c.y).clamp(0.72, 0.86)
    c.paint(c.cover(neck), p.skin * shade[:, None])


def _ears(c: Canvas, p):
    x = c.x.abs() - p.width * 0.99
    ear = ellipse(x, c.y - 0.08 + 0.15 * p.nod, 0.10, 0.15)
    c.paint(c.cover(ear), p.skin * 0.93)
    c.paint(c.cover(ear + 0.055, 0.03) * 0.5, p.skin * colour("D08878", c.x.device))


def _skin(c: Canvas, p, face: Tensor):
    light = 1.02 - 0.16 * ((c.x + 0.25) / 1.1).square() - 0.10 * ((c.y + 0.1) / 0.9).square()
    rim = (1 + face * 2.2).clamp(0, 1) * 0.13
    c.paint(c.cover(face), (p.skin * (light - rim)[:, None]).clamp(0, 1))


def _wrinkles(c: Canvas, p):
    x = c.x.abs()
    lines = union(
        arc(c.x, c.y + 0.36, 0.24, -0.025, 0.012),
        arc(c.x, c.y + 0.44, 0.20, -0.025, 0.012),
        arc(x - p.eye_x, c.y - 0.19, 0.10, 0.03, 0.012),
        capsule(x, c.y, 0.17, 0.25, 0.27, 0.40, 0.012),
        capsule(x, c.y, p.eye_x + 0.15, 0.02, p.eye_x + 0.22, 0.05, 0.01),
    )
    c.paint(c.cover(lines, 0.02) * p.wrinkles * 0.55, p.skin * 0.62)


def _beard(c: Canvas, p, inside: Tensor):
    jaw = (c.y - 0.34 + 0.9 * (c.x / 0.62).square() * -0.45 + 0.02 * torch.sin(24 * c.x)) * -1
    around_mouth = ellipse(c.x, c.y - MOUTH_DOWN - 0.02, p.mouth_w + 0.055, 0.11)
    c.paint(c.cover(torch.maximum(jaw, -around_mouth), 0.04) * p.beard * inside, p.hair * 0.82)


def _cheeks(c: Canvas, p, inside: Tensor):
    x = c.x.abs()
    blush = (1 - ellipse(x - 0.37, c.y - 0.26, 0.17, 0.13).add(0.13).clamp(min=0) / 0.16).clamp(min=0)
    rosy = p.skin * colour("FF9A94", c.x.device) + colour("2A0808", c.x.device)
    c.paint(blush * p.cheeks * 1.5 * inside, rosy.clamp(0, 1))
    spots = [(0.28, 0.20), (0.36, 0.27), (0.44, 0.19), (0.30, 0.32), (0.10, 0.17), (0.20, 0.26), (0.40, 0.12)]
    d = union(*((x - sx).square() + (c.y - sy).square() for sx, sy in spots)).sqrt() - 0.017
    c.paint(c.cover(d, 0.01) * p.freckles * 0.75 * inside, p.skin * colour("B06A48", c.x.device))


def _nose(c: Canvas, p):
    x, y = c.x - 0.10 * torch.sin(p.turn), c.y - 0.22 - 0.06 * torch.sin(p.nod)
    c.paint(c.cover(ellipse(x, y - 0.012, p.nose * 1.08, p.nose * 0.80), 0.03) * 0.75, p.skin * colour("D89A88", x.device))
    tip = (p.skin * 1.05 + 0.02).clamp(0, 1)
    c.paint(c.cover(ellipse(x + 0.012, y + 0.012, p.nose * 0.85, p.nose * 0.62), 0.04), tip)
    c.paint(c.cover(ellipse(x + p.nose * 0.3, y + p.nose * 0.35, p.nose * 0.24, p.nose * 0.18), 0.02) * 0.6, (tip + 0.3).clamp(0, 1))


def _mouth(c: Canvas, p):
    w = p.mouth_w * p.grin
    q = (1 - (c.x / w).square()).clamp(min=0)
    middle = MOUTH_DOWN + p.smile * q
    steep = (1 + (2 * p.smile * c.x / w.square()).square()).sqrt()
    top, bottom = middle - 0.3 * p.opened * q, middle + p.opened * q
    hole = torch.maximum(top - c.y, c.y - bottom) / steep
    ends = c.x.abs() - w
    lips = torch.maximum(hole - p.lip_t * q.sqrt() * 1.1 - 0.004, ends)
    c.paint(c.cover(lips), p.lip)
    line = torch.maximum(hole - 0.010, ends)
    c.paint(c.cover(line), colour("5A1E22", c.x.device))
    inside = c.cover(torch.maximum(hole + 0.006, ends))
    deep = p.opened.clamp(min=0.02)
    c.paint(inside * c.cover(ellipse(c.x, c.y - MOUTH_DOWN - p.smile - 1.15 * deep, 0.6 * w, 0.6 * deep)), colour("E07078", c.x.device))
    c.paint(inside * c.cover(c.y - top - 0.42 * p.opened * q), colour("FFFFFF", c.x.device))


def _eyes(c: Canvas, p):
    side = c.x.sign()
    x, y = c.x.abs() - p.eye_x, c.y
    y = y - p.shut.square() * 0.06 * (1 - (x / p.eye_a).square()).clamp(min=-1)
    b = p.eye_b * p.eyes_open.clamp(min=0.04)
    lid = ellipse(x, y, p.eye_a, b)
    inside = c.cover(lid)
    c.paint(inside, colour("FFFDF8", c.x.device))
    iris = (x.square() + y.square()).sqrt() - 0.105 * (p.eye_b / 0.135)
    c.paint(inside * c.cover(iris), p.iris * (0.8 + 2.2 * y.clamp(-0.05, 0.15))[:, None])
    c.paint(inside * c.cover(iris + 0.05), colour("120C10", c.x.device))
    gleam = union(
        ((x * side + 0.035).square() + (y + 0.04).square()).sqrt() - 0.033,
        ((x * side - 0.035).square() + (y - 0.04).square()).sqrt() - 0.016,
    )
    c.paint(inside * c.cover(gleam), colour("FFFFFF", c.x.device))
    lash = torch.maximum((lid - 0.008).abs() - 0.02, y - 0.2 * b)
    c.paint(c.cover(lash), colour("2A1B1B", c.x.device))


def _brows(c: Canvas, p):
    x = c.x.abs() - p.eye_x
    brow = arc(x, c.y - p.brow_y - p.brow_tilt * -x, 0.14, -0.045, p.brow_t)
    c.paint(c.cover(brow), p.brow)


def _glasses(c: Canvas, p, inside: Tensor):
    x, y = c.x.abs() - p.eye_x, c.y - 0.02
    lens = ellipse(x, y, 0.195, 0.19)
    bridge = torch.maximum((c.y + 0.02).abs() - 0.016, c.x.abs() - p.eye_x + 0.19)
    temple = torch.maximum((c.y + 0.03).abs() - 0.016, p.eye_x + 0.19 - c.x.abs())
    frame = c.cover(union(lens.abs() - 0.012 - 0.014 * p.glasses, bridge)).maximum(c.cover(temple) * inside)
    c.paint(c.cover(lens) * p.glasses * 0.12, colour("BFE3FF", x.device))
    c.paint(frame * p.glasses, colour("2B2A33", x.device))


def _front_hair(c: Canvas, p, face: Tensor):
    ripple = p.curl * 0.03 * torch.sin(17 * torch.atan2(c.x, 0.2 - c.y) + 2 * c.y)
    scalp = ellipse(c.x, c.y + 0.12, p.width + 0.35 * p.hair_volume + 0.015, 0.66 + 0.55 * p.hair_volume)
    sides = (c.x / p.width).square()
    swept = p.parting * c.x
    line = p.fringe + swept + 0.62 * sides.square() - 0.06 * sides
    line = line + p.curl * 0.035 * torch.sin(15 * c.x + 1) + 0.012 * torch.sin(9 * c.x)
    shape = torch.maximum(torch.maximum(scalp + ripple, c.y - line), c.y - 0.12)
    strands = 1 + 0.05 * torch.sin(30 * c.x + 9 * p.parting * c.y) * (1 - 0.5 * p.curl)
    shine = 0.16 * torch.exp(-((c.y + 0.62 + 0.35 * (c.x + 0.15).square()) / 0.07).square())
    c.paint(c.cover(shape), (p.hair * strands[:, None] + shine[:, None]).clamp(0, 1))
