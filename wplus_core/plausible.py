"""Where a generator's codes lie in W, and how far from the average face a code is in their own spread."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import WPlusError

LIMIT = 1.75
"""e4e's codes of real photos stay under 1.2 on every layer. A direction at strength 3 takes them to at most 1.7; it is
held from about 4 on a single layer, 8 on layers 0-7 and 17 on all layers, since a distance over 512 dimensions notices
broad steps late. The limit stops runaway stacks; it does not promise a pretty face."""


@dataclass(frozen=True, eq=False)
class Spread:
    """PCA of W. mean: [512]; basis: [K, 512], orthonormal; std: [K], descending. float32.

    The 512 - K directions that the PCA leaves out are taken to have the last, smallest deviation.
    """

    mean: Tensor
    basis: Tensor
    std: Tensor

    def __post_init__(self):
        mean, basis, std = (x.detach().float() for x in (self.mean, self.basis, self.std))
        k = len(std)
        good = mean.ndim == std.ndim == 1 and basis.shape == (k, len(mean)) and bool((std > 0).all())
        if not good or (basis @ basis.T - torch.eye(k)).abs().max() > 1e-3:
            raise WPlusError(
                "expected a PCA of W: mean [512], orthonormal components [K, 512] and K deviations above 0, "
                f"got {list(mean.shape)}, {list(basis.shape)}, {list(std.shape)}"
            )
        for name, x in (("mean", mean), ("basis", basis), ("std", std)):
            object.__setattr__(self, name, x)

    def whiten(self, x: Tensor) -> Tensor:
        """Differences of codes x [..., 512] -> [..., 512] in deviations of W, in float64."""
        x, basis, std = (t.double().cpu() for t in (x, self.basis, self.std))
        coordinates = x @ basis.T
        return x / std[-1] + (coordinates * (1 / std - 1 / std[-1])) @ basis

    def distance(self, w: Tensor) -> Tensor:
        """Codes w [B, L, 512] -> [B, L]: rms deviations from the average face; a typical code of W has at most 1."""
        self._check(w)
        return self.whiten(w - self.mean.to(w)).square().mean(-1).sqrt().float()

    def hold(self, before: Tensor, after: Tensor, limit: float = LIMIT) -> tuple[Tensor, Tensor]:
        """Codes [B, L, 512] before and after edits -> the edited codes, and the share of the edits kept [B] in 0..1.

        The longest part of the way on which no layer gets further than `limit` from the average face; a layer that
        was further already may stay as far. One share per code, so that the edit keeps its direction.
        """
        self._check(before)
        self._check(after)
        if not limit > 0:
            raise WPlusError(f"the limit of plausible codes must be above 0 (usual: {LIMIT}), got {limit}")
        a, b = self.whiten(before - self.mean.to(before)), self.whiten(after - before)
        aa, ab, bb = ((x * y).sum(-1) for x, y in ((a, a), (a, b), (b, b)))
        room = (limit**2 * a.shape[-1] - aa).clamp(min=0)
        share = (-ab + (ab.square() + bb * room).sqrt()) / bb  # |a + share b| is the limit; 0 / 0 where nothing moves
        kept = share.nan_to_num(1.0, posinf=1.0).clamp(0, 1).amin(1).to(before)
        held = before + kept[:, None, None] * (after - before)
        return torch.where((kept < 1)[:, None, None], held, after), kept

    def _check(self, w: Tensor):
        if w.ndim != 3 or w.shape[-1] != len(self.mean):
            raise WPlusError(f"expected codes [B, L, {len(self.mean)}] for this PCA of W, got {list(w.shape)}")
