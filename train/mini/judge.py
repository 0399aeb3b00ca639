"""The measurer of pictures, in place of CLIP, a face detector and a face recogniser: what is in a picture, and who.

It is trained on drawn pictures alone, some of aligned faces and some without a person, and never sees what the other
networks make.
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
from .pictures import SIZE

SIZES = {"factors": len(world.FACTORS), "points": 10, "person": 1} | {k: len(v) for k, v in scenes.LABELS.items()}
EMPTY, FACES = 0.2, 0.25  # of the pictures it learns from have nobody in them, and are aligned faces
CONFIG = EncoderConfig("single", layers=1, w_dim=sum(SIZES.values()), units=(1, 1, 2, 1), channels=(32, 48, 64, 96),
                       image_size=SIZE)  # fmt: skip


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
        self.body = build_encoder(CONFIG)

    def forward(self, x: Tensor) -> Seen:
        parts = dict(zip(SIZES, self.body(x * 2 - 1)[:, 0].float().split(list(SIZES.values()), 1), strict=True))
        points = (parts["points"].unflatten(1, (5, 2)) * 0.2 + 0.5) * SIZE
        labels = {name: parts[name] for name in scenes.LABELS}
        return Seen(parts["person"][:, 0], parts["factors"], points, labels)

    def read_face(self, x: Tensor) -> Tensor:
        """Aligned faces [B, 3, S, S] in 0..1 -> factors [B, F]."""
        return self(enlarged(x)).factors


def enlarged(faces: Tensor) -> Tensor:
    return F.interpolate(faces, size=(SIZE, SIZE), mode="bilinear", antialias=True)


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
    """n pictures that it was trained on, or others like them."""
    z, s = world.sample(n, rng).to(device), scenes.sample_scenes(n, rng).to(device)
    pictures = scenes.scenes(z, s, SIZE)
    kind = torch.from_numpy(rng.random(n)).to(device)
    empty, aligned = kind < EMPTY, kind > 1 - FACES
    images, points = pictures.images.clone(), pictures.points.clone()
    of_place = places.backgrounds(s.place[empty], s.light[empty], s.detail[empty], SIZE)
    images[empty] = styles.styled(of_place, s.style[empty])
    images[aligned] = enlarged(world.faces(z[aligned]))
    points[aligned] = world.points_in_crop(z[aligned], SIZE)
    return Drawn(images, ~empty, aligned, z, points, s)


def loss(judge: Judge, batch: int, rng: np.random.Generator) -> dict[str, Tensor]:
    x = drawn(batch, rng, judge.body.latent_avg.device)
    seen = judge(x.images)
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
