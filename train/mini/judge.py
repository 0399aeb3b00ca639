"""The measurer of scenes, in place of CLIP, a face detector and a face recogniser: what is in a picture, and who.

It is trained on drawn scenes alone, a quarter of them without a person, and never sees what the other networks make.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
EMPTY = 0.25  # of the pictures it learns from have nobody in them
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


def drawn(n: int, rng: np.random.Generator, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor, scenes.Scenes]:
    """n pictures, whether somebody is in them [n], factors, points and scenes."""
    z, s = world.sample(n, rng).to(device), scenes.sample_scenes(n, rng).to(device)
    pictures = scenes.scenes(z, s, SIZE)
    there = torch.from_numpy(rng.random(n) >= EMPTY).to(device)
    empty = styles.styled(places.backgrounds(s.place, s.light, s.detail, SIZE), s.style)
    return torch.where(there[:, None, None, None], pictures.images, empty), there, z, pictures.points, s


def loss(judge: Judge, batch: int, rng: np.random.Generator) -> dict[str, Tensor]:
    x, there, z, points, s = drawn(batch, rng, judge.body.latent_avg.device)
    seen = judge(x)
    of_scene = {"place", "light", "style"}  # the other labels are a person's
    labels = {k: F.cross_entropy(y, getattr(s, k), reduction="none") for k, y in seen.labels.items()}
    weight = there.float() / there.float().mean().clamp(min=1e-3)
    losses = {
        "person": F.binary_cross_entropy_with_logits(seen.person, there.float()),
        "factors": (weight[:, None] * (seen.factors - z).square()).mean(),
        "points": (weight[:, None, None] * ((seen.points - points) / (0.2 * SIZE)).square()).mean(),
        "labels": sum((x if k in of_scene else weight * x).mean() for k, x in labels.items()),
    }
    return losses | {"total": sum(losses.values())}


def make(out: Path, settings: Fit, people: int, device: str) -> Path:
    torch.manual_seed(6)
    judge = fit(Judge(), loss, settings, out / "runs" / "judge", device).cpu()
    state = {k: x.half() if x.is_floating_point() else x for k, x in judge.state_dict().items()}
    write_safetensors(out / "judge.safetensors", state, {k: f"{v:.4f}" for k, v in accuracy(judge, people).items()})
    return out / "judge.safetensors"


def load(out: Path, device: str = "cpu") -> Judge:
    judge = Judge()
    judge.load_state_dict(read(out / "judge.safetensors").tensors)
    return judge.to(device).eval().requires_grad_(False)


@torch.no_grad()
def accuracy(judge: Judge, n: int, seed: int = 3000) -> dict[str, float]:
    """On n drawn pictures that it was not trained on: shares that are right, the points' error in pixels, and how well
    factors are read (correlation, mean over the identity's)."""
    x, there, z, points, s = drawn(n, np.random.default_rng(seed), "cpu")
    seen = judge(x)
    right = {k: (y.argmax(1) == getattr(s, k))[there].float().mean().item() for k, y in seen.labels.items()}
    who = [i for i, f in enumerate(world.FACTORS) if f.kind == "identity"]
    pairs = torch.stack([seen.factors[there].T, z[there].T], 1)[who]
    return right | {
        "person": ((seen.person > 0) == there).float().mean().item(),
        "points_px": (seen.points - points)[there].norm(dim=-1).mean().item(),
        "identity_correlation": torch.stack([torch.corrcoef(pair)[0, 1] for pair in pairs]).mean().item(),
    }
