"""The measurer of pictures, in place of CLIP, a face detector and a face recogniser: what is in a picture, and who.

Three small networks, trained on drawn pictures alone: one sees in the whole picture whether somebody is there and what
the scene is, one where the face is, and the third reads a person's factors in the face that is cut out there. None of
them ever sees what the other networks make.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
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
SCENE = EncoderConfig("single", layers=1, w_dim=sum(HEADS.values()), units=(1, 1, 1, 1), channels=(16, 32, 48, 64),
                      image_size=SIZE)  # fmt: skip
FACE = EncoderConfig("single", layers=1, w_dim=len(world.FACTORS), units=(1, 1, 1, 1), channels=(32, 48, 64, 80),
                     image_size=CROP)  # fmt: skip


class Where(nn.Module):
    """Pictures [B, 3, S, S] in -1..1 -> points [B, 5, 2] in pixels: the middle of where each of them may be."""

    def __init__(self, channels: tuple[int, ...] = (16, 24, 32, 48)):
        super().__init__()
        strides = (2, 2, 2, 1, 1)
        widths = (3, *channels, channels[-1])
        layers = [nn.Conv2d(*pair, 3, s, 1) for pair, s in zip(pairwise(widths), strides, strict=True)]
        self.layers = nn.ModuleList(layers)
        self.to_maps = nn.Conv2d(channels[-1], 5, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        side = x.shape[-1]
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.1)
        maps = self.to_maps(x).float()
        cell = side / maps.shape[-1]
        at = (torch.arange(maps.shape[-1], device=x.device) + 0.5) * cell - 0.5
        share = maps.flatten(2).softmax(2).unflatten(2, maps.shape[2:])
        return torch.stack([share.sum(2) @ at, share.sum(3) @ at], 2)


@dataclass(frozen=True)
class Seen:
    """person: [B], the logit of somebody being there. factors: [B, F]. points: [B, 5, 2] in pixels.

    labels: by name of `scenes.LABELS`, logits [B, values].
    """

    person: Tensor
    factors: Tensor
    points: Tensor
    labels: dict[str, Tensor]


class Judge(nn.Module):
    """Pictures [B, 3, 128, 128] in 0..1 -> what is seen in them."""

    def __init__(self):
        super().__init__()
        self.scene, self.where, self.face = build_encoder(SCENE), Where(), build_encoder(FACE)

    def forward(self, x: Tensor, points: Tensor | None = None) -> Seen:
        """points: [B, 5, 2], where the faces are, instead of where it sees them itself."""
        parts = self.scene(x * 2 - 1)[:, 0].float().split(list(HEADS.values()), 1)
        parts = dict(zip(HEADS, parts, strict=True))
        found = self.where(x * 2 - 1)
        factors = self.read_face(aligned(x, found.detach() if points is None else points))
        return Seen(parts["person"][:, 0], factors, found, {name: parts[name] for name in scenes.LABELS})

    def read_face(self, x: Tensor) -> Tensor:
        """Aligned faces [B, 3, 64, 64] in 0..1 -> factors [B, F]."""
        return self.face(x * 2 - 1)[:, 0].float()


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


def loss(judge: Judge, batch: int, rng: np.random.Generator) -> dict[str, Tensor]:
    x = drawn(batch, rng, judge.scene.latent_avg.device)
    blurred = F.avg_pool2d(F.pad(x.images, (1, 1, 1, 1), mode="replicate"), 3, 1)  # as soft as a VAE's pictures
    images = x.images.lerp(blurred, torch.from_numpy(rng.random((batch, 1, 1, 1), dtype=np.float32)).to(blurred))
    wrong = torch.from_numpy(rng.standard_normal((batch, 5, 2), dtype=np.float32)).to(x.points)
    seen = judge(images, x.points + JITTER * wrong)
    of_scene = {"place", "light", "style"}  # the other labels are a person's
    person, scene, both = (m.float() / m.float().mean().clamp(min=1e-3)
                           for m in (x.there, ~x.aligned, x.there & ~x.aligned))  # fmt: skip
    labels = {k: F.cross_entropy(y, getattr(x.scenes, k), reduction="none") for k, y in seen.labels.items()}
    losses = {
        "person": F.binary_cross_entropy_with_logits(seen.person, x.there.float()),
        "factors": (person[:, None] * (seen.factors - x.factors).square()).mean(),
        "points": (person[:, None, None] * ((seen.points - x.points) / (0.2 * SIZE)).square()).mean(),
        "labels": sum(((scene if k in of_scene else both) * y).mean() for k, y in labels.items()),
    }
    return losses | {"total": sum(losses.values())}


def make(out: Path, settings: Fit, device: str) -> Path:
    torch.manual_seed(6)
    judge = fit(Judge(), loss, settings, out / "runs" / "judge", device).cpu()
    state = {k: x.half() if x.is_floating_point() else x for k, x in judge.state_dict().items()}
    write_safetensors(out / "judge.safetensors", state, {})
    return out / "judge.safetensors"


def load(out: Path, device: str = "cpu") -> Judge:
    judge = Judge()
    judge.load_state_dict(read(out / "judge.safetensors").tensors)
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
