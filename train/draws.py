"""Everything random about image number n, as a pure function of (seed, n): what makes a resumed run the same run.

Images are counted from 0 over the whole training, whatever the number of processes and the size of their batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import floor
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..wplus_core.directions import Direction
from ..wplus_core.errors import WPlusError

IMAGE, ORDER, PARTNERS, VIEWS, Z = range(5)  # streams of random numbers that must not meet
DROP_W, DROP_TEXT = 1, 2

Kind = Literal["shuffle", "noise", "both", "extrapolate", "direction"]


@dataclass(frozen=True)
class Augment:
    """w_hat = Aug(w), one of `kinds` for each image; the paper's are shuffle, noise and both.

    noise: standard deviation (the paper gives none; W+ codes have about 0.5). extrapolate: a step of up to this many
    times the difference to another image's w. direction: a step of up to this raw strength along one of the directions.
    """

    kinds: tuple[Kind, ...] = ("shuffle", "noise", "both")
    noise: float = 0.3
    extrapolate: float = 40.0
    direction: float = 60.0

    def __post_init__(self):
        unknown = set(self.kinds) - set(get_args(Kind))
        if unknown or not self.kinds:
            raise WPlusError(f"augmentations must be some of {get_args(Kind)}, got {self.kinds}")

    def __call__(
        self, rng: np.random.Generator, w: Tensor, other: Tensor, directions: Sequence[Direction] = ()
    ) -> Tensor:
        """w, other: [L, 512], other from another image of the batch."""
        kind = self.kinds[rng.integers(len(self.kinds))]
        if kind == "extrapolate":
            return w + rng.uniform(-self.extrapolate, self.extrapolate) * (other - w)
        if kind == "direction":
            direction = directions[rng.integers(len(directions))]
            return direction.move(w[None], rng.uniform(-self.direction, self.direction))[0]
        w = other if kind in ("shuffle", "both") else w
        return w if kind == "shuffle" else w + self.noise * normal(rng, w.shape)


@dataclass(frozen=True)
class Dropout:
    """Probabilities of dropping w alone, the text alone, and both, for classifier-free guidance."""

    w: float = 0.05
    text: float = 0.05
    both: float = 0.05

    def __post_init__(self):
        if min(self.w, self.text, self.both) < 0 or self.w + self.text + self.both > 1:
            raise WPlusError(f"drop probabilities must be at least 0 and sum to at most 1, got {self}")

    def __call__(self, rng: np.random.Generator) -> int:
        """0 or the bits DROP_W and DROP_TEXT."""
        x = rng.random()
        for code, p in ((DROP_W, self.w), (DROP_TEXT, self.text), (DROP_W | DROP_TEXT, self.both)):
            if x < p:
                return code
            x -= p
        return 0


def stream(seed: int, *key: int) -> np.random.Generator:
    """Random numbers that belong to this key alone."""
    return np.random.default_rng((seed, *key))


def normal(rng: np.random.Generator, shape: Sequence[int]) -> Tensor:
    return torch.from_numpy(rng.standard_normal(tuple(shape), dtype=np.float32))


def place(n: int, shares: Sequence[float]) -> tuple[int, int]:
    """Which source gives image n, and how many it gave before: interleaved evenly, in proportion to the shares."""
    for source, share in enumerate(shares[:-1]):
        p = share / sum(shares[source:])
        taken = floor(n * p)
        if floor((n + 1) * p) > taken:
            return source, taken
        n -= taken
    return len(shares) - 1, n


@lru_cache(8)
def epoch_order(seed: int, source: int, epoch: int, length: int) -> np.ndarray:
    return stream(seed, ORDER, source, epoch).permutation(length)


def sample_of(n: int, seed: int, lengths: Sequence[int], shares: Sequence[float]) -> tuple[int, int]:
    """(source, index in it) of image n: every source goes through all its samples, shuffled anew each time."""
    source, k = place(n, shares)
    epoch, position = divmod(k, lengths[source])
    return source, int(epoch_order(seed, source, epoch, lengths[source])[position])


@lru_cache(8)
def partners(seed: int, number: int, batch: int) -> np.ndarray:
    return stream(seed, PARTNERS, number).permutation(batch)


def partner_of(n: int, seed: int, batch: int) -> int:
    """The image of the same batch whose w image n gets when the batch is shuffled, whoever computes which part."""
    number, row = divmod(n, batch)
    return number * batch + int(partners(seed, number, batch)[row])
