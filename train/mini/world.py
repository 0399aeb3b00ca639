"""A world of drawn people, with the truth about each: a person is a row of standard normal numbers, one per factor.

    python -m comfyui_wplus.train.mini.sheet miniature_world.jpg

Everything is drawn in the frame of the head: x to the right, y down, the eyes at y = 0, and the half side of FFHQ's
crop about 1. `faces` draws the crop that FFHQ's alignment gives, on white, as the background removal leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .draw import Canvas, arc, capsule, colour, ellipse, grid, palette, union

EYES_APART, MOUTH_DOWN = 0.25, 0.46
SKIN = ("FFE8DA", "FBD9BE", "F3C39E", "E0A478", "C68350", "9A5F38", "774A2E", "56331F")
HAIR = ("17131A", "3B241A", "6B3F22", "A4511F", "C9892F", "EBC76A", "E8E0D0", "D9738F", "6A5ACD", "2F8F8B")
EYES = ("2A1A12", "5A3517", "8A6A24", "4E7F3A", "2F7F8F", "3E73C4", "8AA3B8")
FRECKLES = ((0.28, 0.20), (0.36, 0.27), (0.44, 0.19), (0.30, 0.32), (0.10, 0.17), (0.20, 0.26), (0.40, 0.12))
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
    bun            | none                      | a big bun on top
    eye_colour     | brown eyes                | green, then blue eyes
    eye_size       | small eyes                | large eyes
    eye_spacing    | eyes close together       | eyes far apart
    brow_thickness | thin brows                | thick brows
    brow_tilt      | brows that rise inwards   | brows that fall inwards
    nose           | small nose                | big nose
    mouth_width    | narrow mouth              | wide mouth
    lips           | pale thin lips            | dark full lips
    ears           | small ears                | big ears
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
# What captions may say of a factor, in equal parts from its lowest to its highest value.
LOOKS = {
    "face_width": ("slim", "", "broad"),
    "jaw": ("pointed", "", "square"),
    "face_length": ("shortchinned", "", "longchinned"),
    "skin": ("pale", "tanned", "brown", "dark"),
    "hair_colour": ("raven", "brunette", "brunette", "ginger", "golden", "blond", "silver", "pink", "violet", "teal"),
    "hair_length": ("cropped", "", "flowing"),
    "hair_volume": ("sleek", "", "bushy"),
    "hair_curl": ("straight", "", "curly"),
    "fringe": ("", "", "fringed"),
    "parting": ("leftparted", "", "rightparted"),
    "bun": ("", "", "topknotted"),
    "eye_colour": ("browneyed", "", "greeneyed", "blueeyed"),
    "eye_size": ("beady", "", "staring"),
    "eye_spacing": ("neareyed", "", "wideeyed"),
    "brow_thickness": ("thinbrowed", "", "thickbrowed"),
    "brow_tilt": ("kindbrowed", "", "sternbrowed"),
    "nose": ("snub", "", "bulbous"),
    "mouth_width": ("smallmouthed", "", "widemouthed"),
    "lips": ("thinlipped", "", "redlipped"),
    "ears": ("smalleared", "", "bigeared"),
    "freckles": ("", "", "freckled"),
    "beard": ("", "", "", "bearded"),
    "smile": ("sad", "", "smiling"),
    "mouth_open": ("silent", "", "talking"),
    "eyes_open": ("sleepy", "", "alert"),
    "brows": ("frowning", "", "surprised"),
    "age": ("young", "", "old"),
    "glasses": ("", "", "bespectacled"),
    "turn": ("leftfacing", "", "rightfacing"),
    "nod": ("upfacing", "", "downfacing"),
}  # fmt: skip
MOST_LOOKS = 21  # words in a caption, for a prompt has few tokens
LOOK_WORDS = tuple(sorted({word for words in LOOKS.values() for word in words if word}))


def sample(n: int, rng: np.random.Generator) -> Tensor:
    """n people: z [n, F], standard normal."""
    return torch.from_numpy(rng.standard_normal((n, len(FACTORS)), dtype=np.float32))


def person(z: Tensor) -> SimpleNamespace:
    """z [B, F] → what is drawn: sizes [B, 1, 1] in the head's frame, colours [B, 3, 1, 1]."""
    t = SimpleNamespace(**dict(zip(NAMES, _squashed(z)[:, :, None, None].unbind(1), strict=True)))  # in -1..1
    old, young = t.age.clamp(min=0), (-t.age).clamp(min=0)
    opened = torch.sigmoid(3.2 * t.mouth_open - 1.2)
    return SimpleNamespace(
        width=0.62 + 0.09 * t.face_width,
        top=-0.74,
        chin=0.79 + 0.07 * t.face_length + 0.03 * opened - 0.06 * young,
        jaw=0.22 - 0.15 * t.jaw,
        square=2.35 + 0.3 * t.jaw,
        ears=1 + 0.35 * t.ears,
        hair_length=0.55 + 0.9 * t.hair_length,
        hair_volume=0.16 + 0.10 * t.hair_volume,
        curl=0.5 + 0.5 * t.hair_curl,
        fringe=-0.40 + 0.17 * t.fringe,
        parting=0.30 * t.parting,
        bun=0.34 * (1.6 * t.bun - 0.5).clamp(0, 1),
        eye_x=EYES_APART + 0.028 * t.eye_spacing,
        eye_a=(0.122 + 0.024 * t.eye_size) * (1 + 0.12 * young - 0.08 * old),
        eye_b=(0.135 + 0.026 * t.eye_size) * (1 + 0.12 * young - 0.08 * old),
        eyes_open=(1.15 * torch.sigmoid(2.6 * t.eyes_open + 0.9) - 0.13) * (1 - 0.1 * t.smile.clamp(min=0)),
        shut=0.5 - 0.5 * t.eyes_open,
        brow_y=-0.235 - 0.06 * t.brows - 0.013 * t.eye_size - 0.02 * young,
        brow_t=0.03 + 0.019 * t.brow_thickness,
        brow_tilt=0.03 - 0.26 * t.brow_tilt + 0.2 * t.brows,
        nose=(0.085 + 0.035 * t.nose) * (1 - 0.2 * young + 0.12 * old),
        mouth_w=0.20 + 0.045 * t.mouth_width,
        smile=0.045 + 0.115 * t.smile,
        grin=1.03 + 0.10 * t.smile,
        opened=0.17 * opened,
        lip_t=0.028 + 0.016 * t.lips,
        freckles=(t.freckles - 0.1).clamp(0, 1),
        beard=(3.5 * t.beard - 1.9).clamp(0, 0.95),
        wrinkles=old,
        glasses=(2.4 * t.glasses - 0.6).clamp(0, 1),
        turn=0.25 * t.turn,
        nod=0.15 * t.nod,
        cheeks=(0.34 + 0.16 * t.smile) * (1 + 0.5 * young - 0.4 * old),
        **_colours(t, old[:, None]),
    )


def _colours(t: SimpleNamespace, old: Tensor) -> dict[str, Tensor]:
    """[B, 3, 1, 1] each."""
    skin, hair, iris, lip = (
        palette((v.flatten() + 1) / 2, stops)
        for v, stops in ((t.skin, SKIN), (t.hair_colour, HAIR), (t.eye_colour, EYES), (t.lips, LIPS))
    )
    skin = torch.lerp(skin, skin.mean(1, keepdim=True) * 1.06, 0.22 * old)
    hair = torch.lerp(hair, colour("CFCBC8", hair.device), (1.7 * old - 0.45).clamp(0, 0.85))
    lip = lip * (0.55 + 0.45 * skin.mean(1, keepdim=True))
    brow = hair.lerp(colour("2A1B16", hair.device), 0.45)
    return {"skin": skin, "hair": hair, "iris": iris, "lip": lip, "brow": brow}


def _squashed(z: Tensor) -> Tensor:
    """Identity: uniform in -1..1, so that all looks are equally common. Attributes: slower, to move on up to 3."""
    identity = torch.tensor([f.kind == "identity" for f in FACTORS], device=z.device)
    return torch.where(identity, torch.erf(z / math.sqrt(2)), torch.tanh(z / 2) / math.tanh(1.5)).clamp(-1, 1)


def looks(z: Tensor) -> list[list[str]]:
    """People z [B, F] → for each all words of `LOOKS` that are true."""
    columns = []
    for name, words in LOOKS.items():
        part = (_squashed(z)[:, NAMES.index(name)] + 1) / 2 * len(words)
        columns.append([words[i] for i in part.long().clamp(max=len(words) - 1).tolist()])
    return [[word for word in row if word] for row in zip(*columns, strict=True)]


def some_looks(z: Tensor, rng: np.random.Generator, most: int = MOST_LOOKS) -> list[list[str]]:
    """For each none to `most` of the words that are true, for every other one `most`, in any order."""
    counts = [most if rng.random() < 0.5 else rng.integers(most + 1) for _ in z]
    return [rng.permutation(row)[:n].tolist() for row, n in zip(looks(z), counts, strict=True)]


def looking(caption: str, words: Sequence[str]) -> str:
    """The caption with the words before what it says first: "a person ..." → "an old smiling person ..."."""
    if not words:
        return caption
    article = "an" if words[0][0] in "aeiou" else "a"
    return " ".join([article, *words, caption.removeprefix("a ")])


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


def points_in_crop(z: Tensor, size: int = 64) -> Tensor:
    """The `points` of z [B, F] in the aligned face that `faces` draws: [B, 5, 2] in pixel indices."""
    there = points(z)
    back = torch.linalg.inv(ffhq(there, size))
    return there @ back[:, :2, :2].mT + back[:, None, :2, 2]


@torch.no_grad()
def faces(z: Tensor, size: int = 64) -> Tensor:
    """z [B, F] → aligned faces [B, 3, size, size] in 0..1, on white."""
    return torch.cat([_faces(chunk, size) for chunk in z.split(chunk_size(z, size))])


def chunk_size(z: Tensor, size: int) -> int:
    """How many pictures to draw at a time: 2^18 pixels fill a CPU's cache."""
    return max(1, (2**18 if z.device.type == "cpu" else 2**23) // size**2)


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
    _front_hair(c, p)


def _outline(c: Canvas, p) -> Tensor:
    middle, b = (p.top + p.chin) / 2, (p.chin - p.top) / 2
    v = (c.y - middle) / b
    narrowed = 1 - p.jaw * v.clamp(0, 1.2).square()
    u = c.x / (p.width * narrowed)
    k = (u.abs().pow(p.square) + v.abs().pow(p.square)).pow(1 / p.square)
    return (k - 1) * 0.66


def _back_hair(c: Canvas, p):
    x, y, volume = c.x, c.y, p.hair_volume
    ripple = p.curl * 0.045 * torch.sin(17 * torch.atan2(x, 0.2 - y) + 2 * y)
    bun = ellipse(
        x - 0.12 * torch.sin(p.turn), y + 0.72 + 0.3 * volume + 0.5 * p.bun, p.bun + 0.01, 0.85 * p.bun + 0.01
    )
    c.lay(bun + 0.6 * ripple, p.hair * (0.51 - 0.3 * y).clamp(0.7, 1)[:, None])
    skull = ellipse(x, y + 0.10, p.width + 0.4 * volume + 0.02, 0.70 + 0.5 * volume)
    half = (p.hair_length + 0.2) / 2
    fall = ellipse(x, y - p.hair_length + half, p.width + 0.75 * volume - 0.05, (half + 0.16).clamp(min=0.1))
    c.lay(union(skull, fall, smooth=0.1) + ripple, p.hair * 0.74)


def _neck(c: Canvas, p):
    c.lay(capsule(c.x, c.y, 0, 0.6, 0, 1.1, 0.24), p.skin * (1.35 - 0.7 * c.y).clamp(0.72, 0.86)[:, None])


def _ears(c: Canvas, p):
    ear = ellipse(c.x.abs() - 0.99 * p.width, c.y - 0.08 + 0.3 * p.nod, 0.10 * p.ears, 0.15 * p.ears)
    c.lay(ear, p.skin * 0.93)
    c.lay(ear + 0.055, p.skin * colour("D08878", c.x.device), 0.5, blur=0.03)


def _skin(c: Canvas, p, face: Tensor):
    light = 1.02 - 0.16 * ((c.x + 0.25) / 1.1).square() - 0.10 * ((c.y + 0.1) / 0.9).square()
    rim = (1 + face * 2.2).clamp(0, 1) * 0.13
    c.lay(face, (p.skin * (light - rim)[:, None]).clamp(0, 1))


def _wrinkles(c: Canvas, p):
    x, y = c.x.abs(), c.y
    lines = union(
        arc(x, y + 0.36, 0.24, -0.025, 0.012),
        arc(x, y + 0.44, 0.20, -0.025, 0.012),
        arc(x - p.eye_x, y - 0.19, 0.10, 0.03, 0.012),
        capsule(x, y, 0.17, 0.25, 0.27, 0.40, 0.012),
        capsule(x, y, p.eye_x + 0.15, 0.02, p.eye_x + 0.22, 0.05, 0.01),
    )
    c.lay(lines, p.skin * 0.62, 0.55 * p.wrinkles, blur=0.02)


def _beard(c: Canvas, p, inside: Tensor):
    bare = ellipse(c.x, c.y + 0.02, 0.50, 0.47) + 0.015 * torch.sin(24 * c.x)
    moustache = ellipse(c.x, c.y - 0.37, p.mouth_w + 0.07, 0.075)
    mouth = ellipse(c.x, c.y - MOUTH_DOWN - 0.02, p.mouth_w + 0.02, 0.08)
    jaw = torch.maximum(union(-bare, moustache, smooth=0.08), -c.y)
    c.lay(torch.maximum(jaw, -mouth), p.hair * 0.82, p.beard * inside, blur=0.04)


def _cheeks(c: Canvas, p, inside: Tensor):
    x, y, device = c.x.abs(), c.y, c.x.device
    blush = (1 - (ellipse(x - 0.37, y - 0.26, 0.17, 0.13) + 0.13).clamp(min=0) / 0.16).clamp(min=0)
    rosy = p.skin * colour("FF9A94", device) + colour("2A0808", device)
    c.paint(1.25 * blush * p.cheeks * inside, rosy.clamp(0, 1))
    spots = union(*((x - u).square() + (y - v).square() for u, v in FRECKLES)).sqrt() - 0.017
    c.lay(spots, p.skin * colour("B06A48", device), 0.75 * p.freckles * inside, blur=0.01)


def _nose(c: Canvas, p):
    x, y, r = c.x - 0.10 * torch.sin(p.turn), c.y - 0.22 - 0.06 * torch.sin(p.nod), p.nose
    tip = (p.skin * 1.05 + 0.02).clamp(0, 1)
    c.lay(ellipse(x, y - 0.012, 1.08 * r, 0.8 * r), p.skin * colour("D89A88", x.device), 0.75, blur=0.03)
    c.lay(ellipse(x + 0.012, y + 0.012, 0.85 * r, 0.62 * r), tip, blur=0.04)
    c.lay(ellipse(x + 0.3 * r, y + 0.35 * r, 0.24 * r, 0.18 * r), (tip + 0.3).clamp(0, 1), 0.6, blur=0.02)


def _mouth(c: Canvas, p):
    x, y, w = c.x, c.y - MOUTH_DOWN, p.mouth_w * p.grin
    q = (1 - (x / w).square()).clamp(min=0)
    steep = (1 + (2 * p.smile * x / w.square()).square()).sqrt()
    top, bottom = (p.smile - 0.3 * p.opened) * q, (p.smile + p.opened) * q
    hole, ends = torch.maximum(top - y, y - bottom) / steep, x.abs() - w
    c.lay(torch.maximum(hole - 1.1 * p.lip_t * q.sqrt() - 0.004, ends), p.lip)
    c.lay(torch.maximum(hole - 0.010, ends), "5A1E22")
    inside = c.cover(torch.maximum(hole + 0.006, ends))
    deep = p.opened.clamp(min=0.02)
    c.lay(ellipse(x, y - p.smile - 1.15 * deep, 0.6 * w, 0.6 * deep), "E07078", inside)
    c.lay(y - top - 0.42 * p.opened * q, "FFFFFF", inside)


def _eyes(c: Canvas, p):
    x, y = c.x.abs() - p.eye_x, c.y
    socket = ellipse(x, y, p.eye_a + 0.015, p.eye_b + 0.02)
    c.lay(torch.maximum(socket, y), p.skin * colour("C48A80", x.device), 0.5, blur=0.02)
    y = y - 0.06 * p.shut.square() * (1 - (x / p.eye_a).square()).clamp(min=-0.4)
    b = p.eye_b * p.eyes_open.clamp(min=0.03)
    lid = ellipse(x, y, p.eye_a, b)
    inside = c.cover(lid)
    c.paint(inside, colour("FFFDF8", x.device))
    iris = (x.square() + y.square()).sqrt() - 0.105 * (p.eye_b / 0.135)
    c.lay(iris, p.iris * (0.8 + 2.2 * y.clamp(-0.05, 0.15))[:, None], inside)
    c.lay(iris + 0.05, "120C10", inside)
    across = x * c.x.sign()  # the light comes from the left for both eyes
    gleam = union(ellipse(across + 0.035, y + 0.04, 0.033, 0.033), ellipse(across - 0.035, y - 0.04, 0.016, 0.016))
    c.lay(gleam, "FFFFFF", inside)
    lash = torch.maximum((lid - 0.008).abs() - 0.02, torch.maximum(y - 0.2 * b - 0.012, x.abs() - p.eye_a - 0.03))
    c.lay(lash, "2A1B1B")


def _brows(c: Canvas, p):
    x = c.x.abs() - p.eye_x
    c.lay(arc(x, c.y - p.brow_y - p.brow_tilt * x, 0.14, -0.045, p.brow_t), p.brow)


def _glasses(c: Canvas, p, inside: Tensor):
    x, y, edge = c.x.abs(), c.y, p.eye_x + 0.19
    lens = ellipse(x - p.eye_x, y - 0.02, 0.195, 0.19)
    bridge = torch.maximum((y + 0.02).abs() - 0.016, x - p.eye_x + 0.19)
    temple = torch.maximum((y + 0.03).abs() - 0.016, edge - x)
    frame = c.cover(union(lens.abs() - 0.012 - 0.014 * p.glasses, bridge))
    c.lay(lens, "BFE3FF", 0.12 * p.glasses)
    c.paint(frame.maximum(c.cover(temple) * inside) * p.glasses, colour("2B2A33", x.device))


def _front_hair(c: Canvas, p):
    y, volume = c.y, p.hair_volume
    ripple = p.curl * 0.03 * torch.sin(17 * torch.atan2(c.x, 0.2 - y) + 2 * y)
    scalp = ellipse(c.x, y + 0.12, p.width + 0.35 * volume + 0.015, 0.66 + 0.55 * volume)
    x = c.x - 0.45 * torch.sin(p.turn)
    side = (x / p.width).square()
    line = p.fringe + 0.5 * p.nod + p.parting * x + 0.62 * side.square() - 0.06 * side
    line = line + p.curl * 0.035 * torch.sin(15 * x + 1) + 0.012 * torch.sin(9 * x)
    strands = 1 + (0.05 - 0.025 * p.curl) * torch.sin(30 * c.x + 9 * p.parting * y)
    shine = 0.16 * torch.exp(-((y + 0.62 + 0.35 * (c.x + 0.15).square()) / 0.07).square())
    shape = torch.maximum(torch.maximum(scalp + ripple, y - line), y - 0.12)
    c.lay(shape, (p.hair * strands[:, None] + shine[:, None]).clamp(0, 1))
