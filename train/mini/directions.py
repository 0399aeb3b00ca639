"""The miniature's editing directions: boundaries between labelled codes, with units measured on pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...wplus_core.direction_files import save_directions
from ...wplus_core.directions import Direction
from ...wplus_core.finding import Found, find_direction, pca
from ...wplus_core.stylegan2 import Generator
from . import generator as generators
from . import judge as judges
from . import world

CODES = 64  # labelled ones for each person of the settings
MARGIN = 0.5  # faces nearer to the middle than this many deviations are no example of either side
COMPONENTS = 48
LEAST = 0.9  # cross-validated accuracy below which the codes do not tell the factor, and there is no direction
SHOWN = 1 / 3  # part of what is drawn below which the generator has not learned to paint the factor; none either

log = logging.getLogger(__name__)


def labelled(generator: Generator, n: int, seed: int = 7) -> tuple[Tensor, Tensor]:
    """n codes [n, L, w_dim] and their people's factors [n, F]."""
    z = generators.draw_z(n, np.random.default_rng(seed), generator.config.w_dim)
    with torch.no_grad():
        w = generator.mapping(z.to(generator.style[1].weight))
    return w[:, None].expand(-1, generator.config.layers, -1), z[:, : generators.FACTORS]


def found(w: Tensor, factors: Tensor, number: int) -> Found:
    """The direction of one factor."""
    has, has_not = factors[:, number] > MARGIN, factors[:, number] < -MARGIN
    return find_direction(w[has], w[has_not], world.NAMES[number], method="logistic")


@torch.no_grad()
def calibrated(
    direction: Direction, number: int, generator: Generator, read: Callable, w: Tensor, factors: Tensor
) -> tuple[Direction, float]:
    """With the unit at which edited pictures differ, to the judge, as drawn ones do by one deviation of the factor; and
    what part of that the generator shows where a code moves as far as one deviation takes it.

    w and factors: some people's codes [B, L, w_dim] and factors [B, F].
    """
    step, one = direction.unit * direction.rows(w.shape[1]), torch.eye(factors.shape[1])[number]
    further, nearer = (generators.code_of(generator, factors + s * one) for s in (0.5, -0.5))
    own = ((further - nearer) @ step[0]).mean() / step[0].square().sum()
    edited = [read(face(generator, w + s * step))[:, number].mean() for s in (-0.5, 0.5)]
    drawn = [read(world.faces(factors + s * one, generator.config.size))[:, number].mean() for s in (-0.5, 0.5)]
    unit = (drawn[1] - drawn[0]) / (edited[1] - edited[0])
    return replace(direction, unit=direction.unit * unit.item()), (own / unit).item()


def face(generator: Generator, w: Tensor) -> Tensor:
    """Codes [B, L, w_dim] -> pictures [B, 3, S, S] in 0..1."""
    return (generator(w, noise="none") / 2 + 0.5).clamp(0, 1)


def make(
    out: Path, people: int, names: tuple[str, ...] = world.NAMES, least: float = LEAST, shown: float = SHOWN
) -> Path:
    """Fit one for each name, the attributes first; write directions/drawn.safetensors and pca.safetensors."""
    generator, read = generators.load(out), judges.load(out).reader.read_face
    (w, factors), some = labelled(generator, CODES * people), slice(people // 8)
    order = sorted(map(world.NAMES.index, names), key=lambda i: world.FACTORS[i].kind != "attribute")
    results = {i: found(w, factors, i) for i in order}
    if unlearned := [str(r) for r in results.values() if r.accuracy < least]:
        log.warning("no directions for what the generator's codes do not tell: %s", "; ".join(unlearned))
    told = {i: r.direction for i, r in results.items() if r.accuracy >= least}
    measured = [calibrated(d, i, generator, read, w[some], factors[some]) for i, d in told.items()]
    if unpainted := [f"{d.name} {part:.2f}" for d, part in measured if part < shown]:
        log.warning("no directions for what the generator hardly paints, by the part it does: %s", ", ".join(unpainted))
    save_directions([d for d, part in measured if part >= shown], out / "directions" / "drawn.safetensors")
    save_directions(pca(generator, COMPONENTS), out / "pca.safetensors")
    return out / "directions" / "drawn.safetensors"
