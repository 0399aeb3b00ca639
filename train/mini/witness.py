"""Ground truth in place of CLIP, detector and recogniser: the judge as a measurer of `train evaluate`'s pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ...wplus_core.errors import WPlusError
from ...wplus_core.faces import Landmarks, from_5
from ..measures import NAN, Picture, Shown
from . import encoder, judge, scenes, world
from .autoencoder import restored

SEED = 5000  # of people that no network was trained on
WHO = tuple(i for i, f in enumerate(world.FACTORS) if f.kind == "identity")
ATTRIBUTES = tuple(i for i, f in enumerate(world.FACTORS) if f.kind == "attribute")
SHOWN = (
    ("red", "dress", "", "on the beach", "by day", "photo"),
    ("blue", "shirt", "waving", "in the forest", "at sunset", "photo"),
    ("yellow", "sweater", "with a balloon", "in the city", "by day", "photo"),
    ("purple", "jacket", "", "in a room", "at night", "photo"),
    ("green", "shirt", "with a cat", "in a garden", "by day", "watercolor"),
)
ROWS = [tuple(values.index(v) for v, values in zip(row, scenes.LABELS.values(), strict=True)) for row in SHOWN]
PROMPTS = {scenes.caption(row): row for row in ROWS}  # with the labels that a picture of each should show


class People:
    """Drawn people, factors [N, F], with the codes [N, L, w_dim] that the encoder sees in their aligned faces."""

    def __init__(self, out: Path, count: int, device: str):
        self.factors = world.sample(count, np.random.default_rng(SEED))
        e4e = encoder.load(out, device)
        with torch.no_grad():
            self.codes = torch.cat([e4e(world.faces(z).to(device) * 2 - 1).cpu() for z in self.factors.split(50)])

    def identities(self, count: int) -> dict[str, Tensor]:
        return {f"{i:03d}": w for i, w in enumerate(self.codes[:count])}

    def scenes(self, prompt: str) -> scenes.Scenes:
        """One for each of them, as the prompt says; what it leaves open is drawn by lot."""
        count = len(self.factors)
        s = scenes.sample_scenes(count, np.random.default_rng((SEED, *prompt.encode())))
        given = zip(scenes.LABELS, PROMPTS[prompt], strict=True)
        return replace(s, **{k: torch.full((count,), i) for k, i in given})


class Witness:
    """What the judge sees in a picture. people: [N, F], among whom it looks for the identity. vae: what the pictures
    come out of. tried: drawn pictures from which the judge's exactness is known.

    text_agreement: the share of the prompt's labels that are there. detection: 1 where somebody is. top1: 1 where of
    all people the identity is the likeliest. id: squared distance to the identity's factors, 0 none, 1 a stranger's.
    moved_ATTRIBUTE: by how much an edited picture's differs, in deviations; moved_identity: the same of its factors,
    each in 0..1 of its range. Factors of the identity count by how exactly the judge reads them in drawn pictures that
    came through the VAE: what it loses tells of no one.
    """

    def __init__(self, network: judge.Judge, people: Tensor, vae: AutoencoderKL, tried: int = 512):
        self.network, self.people = network, squashed(people)
        self.weights = exactness(network, vae, tried)
        self.stranger = 2 * (self.weights * self.people.var(0)).sum()
        self.known: dict[str, tuple] = {}

    def __call__(self, shown: Sequence[Shown]) -> dict[str, list[float]]:
        self.look([p for s in shown for p in (s.picture, s.before) if p is not None])
        rows = [self.numbers(s) for s in shown]
        return {k: [row.get(k, NAN) for row in rows] for k in dict.fromkeys(k for row in rows for k in row)}

    @torch.no_grad()
    def look(self, pictures: Sequence[Picture]):
        new = {p.key: p.pixels for p in pictures if p.key not in self.known}
        if new:
            device = next(self.network.parameters()).device
            seen = self.network(torch.stack(list(new.values())).to(device))
            labels = torch.stack([x.argmax(1) for x in seen.labels.values()], 1).tolist()
            rows = zip(seen.person.tolist(), seen.factors.cpu(), seen.points.cpu(), labels, strict=True)
            self.known |= zip(new, rows, strict=True)

    def points(self, picture: Picture) -> Landmarks | None:
        """A detector, for the measurers that need one."""
        self.look([picture])
        person, _, points, _ = self.known[picture.key]
        try:
            return from_5(points.double().numpy()) if person > 0 else None
        except WPlusError:  # points too close together to be a face's
            return None

    def distances(self, factors: Tensor) -> Tensor:
        """Factors that the judge read [B, F] -> squared distances to all people [B, N]."""
        return ((squashed(factors)[:, None] - self.people).square() * self.weights).sum(2)

    def numbers(self, s: Shown) -> dict[str, float]:
        person, factors, _, labels = self.known[s.picture.key]
        distances = self.distances(factors[None])[0]
        own = distances[int(s.identity)]
        row = {
            "text_agreement": fmean(a == b for a, b in zip(labels, PROMPTS[s.prompt], strict=True)),
            "detection": float(person > 0),
            "top1": float(own <= distances.min()),
            "id": float(own / self.stranger),
        }
        if s.before is not None:
            before = self.known[s.before.key][1]
            row |= {f"moved_{world.NAMES[i]}": float(factors[i] - before[i]) for i in ATTRIBUTES}
            row["moved_identity"] = float((squashed(factors[None]) - squashed(before[None])).abs().mean() / 2)
        return row


def squashed(factors: Tensor) -> Tensor:
    """Factors [B, F] -> the identity's [B, I], uniform in -1..1."""
    return torch.erf(factors[:, WHO] / math.sqrt(2))


@torch.no_grad()
def exactness(network: judge.Judge, vae: AutoencoderKL, count: int) -> Tensor:
    """[I], 1 / the mean squared error with which the judge reads each factor of the identity in scenes as the VAE gives
    them back."""
    x = judge.drawn(count, np.random.default_rng(SEED + 1), "cpu")
    scene = x.there & ~x.aligned
    images, device = restored(vae, x.images[scene]), next(network.parameters()).device
    read = torch.cat([network(part.to(device)).factors.cpu() for part in images.split(64)])
    return 1 / (squashed(read) - squashed(x.factors[scene])).square().mean(0)
