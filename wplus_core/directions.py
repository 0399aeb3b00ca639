"""Editing directions in W+: moving a code so that one attribute of the face changes.

Sources: InterFaceGAN (Shen et al.), StyleGAN2 latent directions (Puzer), GANSpace (Härkönen et al.).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import WPlusError


@dataclass(frozen=True)
class Direction:
    """One named edit. vector: [L, 512], or [1, 512] for the same step on every layer; float32.

    layers: the range [first, end) that moves, None for all. origin: None for a step, w + strength * vector; [512] for
    GANSpace's target rule, where the strength is the coordinate along the vector that layer 0 would be moved to.
    """

    name: str
    vector: Tensor
    layers: tuple[int, int] | None = None
    origin: Tensor | None = None
    source: str = ""

    def __post_init__(self):
        v = self.vector
        if v.ndim != 2 or not v.is_floating_point() or not torch.isfinite(v).all():
            raise WPlusError(f"direction {self.name!r}: expected finite [L, 512] or [1, 512], got {list(v.shape)}")
        object.__setattr__(self, "vector", v.detach().float())
        if self.layers is not None and not 0 <= self.layers[0] < self.layers[1]:
            raise WPlusError(f"direction {self.name!r}: expected layers [first, end), first < end, got {self.layers}")

    def move(self, w: Tensor, strength: float) -> Tensor:
        """w [B, L, 512] -> the edited codes; strength in the direction's own unit."""
        if w.ndim != 3 or self.vector.shape[0] not in (1, w.shape[1]) or self.vector.shape[1] != w.shape[2]:
            raise WPlusError(
                f"direction {self.name!r} is for codes of {list(self.vector.shape)}, got {list(w.shape)}; "
                "use directions and an encoder of the same generator"
            )
        v = self.vector.to(w)
        step = strength * v[None]
        if self.origin is not None:
            coordinate = (w[:, 0] - self.origin.to(w)) @ v[0] / v[0].square().sum()
            step = (strength - coordinate)[:, None, None] * v
        first, end = self.layers or (0, w.shape[1])
        moves = torch.zeros(w.shape[1], 1, dtype=w.dtype, device=w.device)
        moves[first:end] = 1
        return w + moves * step
