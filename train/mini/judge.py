"""The measurer of pictures, in place of CLIP, a face detector and a face recogniser: what is in a picture, and who.

Three small networks, trained on drawn pictures alone: one sees in the whole picture whether somebody is there and what
the scene is, one where the face is, and the third reads a person's factors in the face that is cut out there. None of
them ever sees what the other networks make.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...wplus_core.encoder import EncoderConfig, build_encoder
from ...wplus_core.files import read, write_safetensors
from . import places, scenes, styles, world
from .fit import Fit, fit
from .pictures import CROP, SIZE, aligned

HEADS = {"person": 1} | {k: len(v) for k, v in scenes.LABELS.items()}
EMPTY, FACES = 0.2, 0.25  # of the pictures it learns from have nobody in them, and are aligned faces
JITTER = 1.5  # pixels by which points are found wrongly: faces are cut out so to learn from
CELL = 4  # pixels of a picture to one of the maps of where the points are
VIEWS = 4  # of each drawn picture, to learn where faces are from
SCENE = EncoderConfig("single", layers=1, w_dim=sum(HEADS.values()), units=(1, 1, 1, 1), channels=(16, 32, 48, 64),
                      image_size=SIZE)  # fmt: skip
FACE = EncoderConfig("single", layers=1, w_dim=len(world.FACTORS), units=(1, 1, 1, 1), channels=(32, 48, 64, 80),
                     image_size=CROP)  # fmt: skip


class Where(nn.Module):
    """Pictures [B, 3, S, S] in -1..1 -> points [B, 5, 2] in pixels, each where its map is highest."""

    def __init__(self, channels: int = 32, dilations: tuple[int, ...] = (1, 2, 4, 8, 4, 1)):
        super().__init__()
        self.down = nn.ModuleList([nn.Conv2d(3, channels // 2, 3, 2, 1), nn.Conv2d(channels // 2, channels, 3, 2, 1)])
        self.layers = nn.ModuleList(nn.Conv2d(channels, channels, 3, 1, d, d) for d in dilations)
        self.to_maps = nn.Conv2d(channels, 5, 3, 1, 1)

    def maps(self, x: Tensor) -> Tensor:
        """Logits [B, 5, S / CELL, S / CELL] of where each point is."""
        for layer in self.down:
            x = F.leaky_relu(layer(x), 0.1)
        for layer in self.layers:
            x = x + F.leaky_relu(layer(x), 0.1)
        return self.to_maps(x).float()

    def forward(self, x: Tensor) -> Tensor:
        """The middle of what lies near the highest place: far away the map has noise."""
        maps = self.maps(x)
        y, x = cells(maps.shape[-1], maps.device)
        top = maps.flatten(2).argmax(2)[..., None, None]
        near = torch.maximum((x - x.flatten()[top]).abs(), (y - y.flatten()[top]).abs()) <= 2.5 * CELL
        share = maps.masked_fill(~near, -torch.inf).flatten(2).softmax(2)
        return torch.stack([share @ x.flatten(), share @ y.flatten()], 2)


def cells(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """y and x of the middles of the cells of side x side maps, in pixels: [side, side] each."""
    at = (torch.arange(side, device=device, dtype=torch.float32) + 0.5) * CELL - 0.5
    return torch.meshgrid(at, at, indexing="ij")


@dataclass(frozen=True)
class Seen:
    """person: [B], the logit of somebody being there. factors: [B, F]. points: [B, 5, 2] in pixels.

    labels: by name of `scenes.LABELS`, logits [B, values].
    """

    person: Tensor
    factors: Tensor
    points: Tensor
    labels: dict[str, Tensor]


class Reader(nn.Module):
    """Reads the scene in the whole picture, and the factors in the face."""

    def __init__(self):
        super().__init__()
        self.scene, self.face = build_encoder(SCENE), build_encoder(FACE)

    def forward(self, x: Tensor, points: Tensor) -> Seen:
        """x: [B, 3, 128, 128] in 0..1. points: [B, 5, 2], where the faces are."""
        parts = self.scene(x * 2 - 1)[:, 0].float().split(list(HEADS.values()), 1)
        parts = dict(zip(HEADS, parts, strict=True))
        labels = {name: parts[name] for name in scenes.LABELS}
        return Seen(parts["person"][:, 0], self.read_face(aligned(x, points)), points, labels)

    def read_face(self, x: Tensor) -> Tensor:
        """Aligned faces [B, 3, 64, 64] in 0..1 -> factors [B, F]."""
        return self.face(x * 2 - 1)[:, 0].float()


class Judge(nn.Module):
    """Pictures [B, 3, 128, 128] in 0..1 -> what is seen in them."""

    def __init__(self):
        super().__init__()
        self.reader, self.where = Reader(), Where()

    def forward(self, x: Tensor) -> Seen:
        return self.reader(x, self.where(x * 2 - 1))


@dataclass(frozen=True)
class Drawn:
    """images: [B, 3, 128, 128] in 0..1. there: [B], whether somebody is in them. aligned: [B], faces without a scene.

    factors: [B, F]. points: [B, 5, 2] in pixels.
    """

    images: Tensor
    there: Tensor
    aligned: Tensor
    factors: Tensor
    points: Tensor
    scenes: scenes.Scenes


def drawn(n: int, rng: np.random.Generator, device: str) -> Drawn:
    """n pictures such as it learns from."""
    z, s = world.sample(n, rng).to(device), scenes.sample_scenes(n, rng).to(device)
    pictures = scenes.scenes(z, s, SIZE)
    kind = torch.from_numpy(rng.random(n)).to(device)
    empty, alone = kind < EMPTY, kind > 1 - FACES
    images, points = pictures.images.clone(), pictures.points.clone()
    of_place = places.backgrounds(s.place[empty], s.light[empty], s.detail[empty], SIZE)
    images[empty] = styles.styled(of_place, s.style[empty])
    images[alone], points[alone] = world.faces(z[alone], SIZE), world.points_in_crop(z[alone], SIZE)
    return Drawn(images, ~empty, alone, z, points, s)


def softened(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Pictures [B, 3, S, S], each blurred a little or not: down to what a VAE's are."""
    blurred = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return x.lerp(blurred, torch.from_numpy(rng.random((len(x), 1, 1, 1), dtype=np.float32)).to(x))


def loss(reader: Reader, batch: int, rng: np.random.Generator) -> dict[str, Tensor]:
    x = drawn(batch, rng, reader.scene.latent_avg.device)
    images = softened(x.images, rng)
    wrong = torch.from_numpy(rng.standard_normal((batch, 5, 2), dtype=np.float32)).to(x.points)
    seen = reader(images, x.points + JITTER * wrong)
    of_scene = {"place", "light", "style"}  # the other labels are a person's
    person, scene, both = (m.float() / m.float().mean().clamp(min=1e-3)
                           for m in (x.there, ~x.aligned, x.there & ~x.aligned))  # fmt: skip
    labels = {k: F.cross_entropy(y, getattr(x.scenes, k), reduction="none") for k, y in seen.labels.items()}
    losses = {
        "person": F.binary_cross_entropy_with_logits(seen.person, x.there.float()),
        "factors": (person[:, None] * (seen.factors - x.factors).square()).mean(),
        "labels": sum(((scene if k in of_scene else both) * y).mean() for k, y in labels.items()),
    }
    return losses | {"total": sum(losses.values())}


def loss_of_where(where: Where, batch: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """Cross-entropy of each point's map with a bump of one cell around it. A drawn picture is seen `VIEWS` times."""
    x = drawn(max(1, batch // VIEWS), rng, where.to_maps.weight.device)
    images, points = views(x.images[x.there], x.points[x.there], rng)
    maps = where.maps(softened(images, rng) * 2 - 1)
    at_y, at_x = cells(maps.shape[-1], maps.device)
    distance = (at_x - points[..., 0, None, None]).square() + (at_y - points[..., 1, None, None]).square()
    inside = ((points > 0) & (points < SIZE - 1)).all(2)
    bumps = (-distance / (2 * CELL**2)).flatten(2).softmax(2)
    entropy = -(bumps * maps.flatten(2).log_softmax(2)).sum(2)
    found = (where(images * 2 - 1) - points).norm(dim=2).detach()
    return {"total": entropy[inside].sum() / max(1, inside.sum()), "px": found[inside].sum() / max(1, inside.sum())}


def views(images: Tensor, points: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Pictures [B, 3, S, S] with points [B, 5, 2], `VIEWS` times each: turned, larger or smaller, moved."""
    images, points = images.repeat(VIEWS, 1, 1, 1), points.repeat(VIEWS, 1, 1)
    u = torch.from_numpy(rng.uniform(-1, 1, (4, len(images)))).float().to(images.device)
    size, turn, half = 1.2 ** u[0], 0.2 * u[1], (SIZE - 1) / 2
    c, s = size * turn.cos(), size * turn.sin()
    moved = 0.12 * u[2:].T
    matrix = torch.stack([torch.stack([c, -s], 1), torch.stack([s, c], 1)], 1)  # of the view's frame -> the picture's
    grid = F.affine_grid(torch.cat([matrix, moved[..., None]], 2), list(images.shape), align_corners=True)
    seen = F.grid_sample(images, grid, padding_mode="reflection", align_corners=True)
    at = (points / half - 1 - moved[:, None]) @ torch.linalg.inv(matrix).mT
    return seen, (at + 1) * half


def make(out: Path, settings: Fit, device: str) -> Path:
    """The reader: judge.safetensors."""
    torch.manual_seed(6)
    return write(fit(Reader(), loss, settings, out / "runs" / "judge", device), out / "judge.safetensors")


def make_where(out: Path, settings: Fit, device: str) -> Path:
    torch.manual_seed(8)
    return write(fit(Where(), loss_of_where, settings, out / "runs" / "where", device), out / "where.safetensors")


def write(network: nn.Module, path: Path) -> Path:
    state = {k: x.half() if x.is_floating_point() else x for k, x in network.cpu().state_dict().items()}
    write_safetensors(path, state, {})
    return path


def load(out: Path, device: str = "cpu") -> Judge:
    judge = Judge()
    judge.reader.load_state_dict(read(out / "judge.safetensors").tensors)
    judge.where.load_state_dict(read(out / "where.safetensors").tensors)
    return judge.to(device).eval().requires_grad_(False)


@torch.no_grad()
def accuracy(judge: Judge, n: int, seed: int = 3000) -> dict[str, Any]:
    """On n drawn pictures that it was not trained on: shares that are right, the points' error in pixels, and the
    correlation of the factors that it reads with the truth, in scenes and in aligned faces."""
    x = drawn(n, np.random.default_rng(seed), "cpu")
    parts = [judge(part) for part in x.images.split(64)]
    factors, points, person = (torch.cat([getattr(p, k) for p in parts]) for k in ("factors", "points", "person"))
    right: dict[str, Any] = {"person": ((person > 0) == x.there).float().mean().item()}
    someone = x.there & ~x.aligned
    for k in scenes.LABELS:
        label = torch.cat([p.labels[k].argmax(1) for p in parts])
        right[k] = (label == getattr(x.scenes, k))[someone].float().mean().item()
    right["points_px"] = (points - x.points)[x.there].norm(dim=-1).mean().item()
    for name, rows in (("in_scenes", someone), ("in_faces", x.aligned)):
        pairs = torch.stack([factors[rows].T, x.factors[rows].T], 1)
        right[name] = {k: torch.corrcoef(p)[0, 1].item() for k, p in zip(world.NAMES, pairs, strict=True)}
    return right
