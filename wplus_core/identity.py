"""An identity: the W+ code of a face, and where it came from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import WPlusError
from .plausible import LIMIT, Spread


@dataclass(frozen=True)
class Identity:
    """Codes w [B, L, 512] in float32: one person's face, or one face per picture of a batch.

    provenance: JSON values: source files with their hashes, the encoder, the edits made since.
    thumbnail: a picture [H, W, 3] in uint8, or None. average: the encoder's average face [L, 512], or None.
    """

    w: Tensor
    name: str = ""
    provenance: dict[str, Any] = field(default_factory=dict)
    thumbnail: Tensor | None = None
    average: Tensor | None = None

    def __post_init__(self):
        w, thumbnail = self.w, self.thumbnail
        if not isinstance(w, Tensor) or not w.is_floating_point() or w.ndim not in (2, 3) or 0 in w.shape:
            came = f"{w.dtype} {list(w.shape)}" if isinstance(w, Tensor) else type(w).__name__
            raise WPlusError(f"an identity's codes must be a float tensor [B, L, 512] or [L, 512], got {came}")
        w = w.detach().float()
        if not torch.isfinite(w).all():
            raise WPlusError("an identity's codes hold NaN or Inf; encode the photo again")
        object.__setattr__(self, "w", w if w.ndim == 3 else w[None])
        if self.average is not None and self.average.shape != self.w.shape[1:]:
            raise WPlusError(f"the average face must be {list(self.w.shape[1:])}, got {list(self.average.shape)}")
        if thumbnail is not None and (thumbnail.dtype != torch.uint8 or thumbnail.shape[2:] != (3,)):
            raise WPlusError(f"a thumbnail must be uint8 [H, W, 3], got {thumbnail.dtype} {list(thumbnail.shape)}")

    def __len__(self) -> int:
        return len(self.w)

    def __repr__(self) -> str:
        b, layers, dim = self.w.shape
        return f"Identity({self.name or 'unnamed'}: {b} code{'s' * (b > 1)} of {layers} x {dim})"


def described(identity: Identity, spread: Spread | None = None) -> Iterator[str]:
    """Lines on an identity: its codes, how far each is from the average face, where it comes from, what was done to it.

    spread: where plausible codes lie; with it the distance is also in deviations of W, of the farthest layer.
    """
    yield repr(identity)
    if identity.average is not None:
        far = (identity.w - identity.average).square().mean((1, 2)).sqrt()
        yield f"distance from the average face: {listed(far)}"
    if spread is not None and identity.w.shape[2] == len(spread.mean):
        far, layer = spread.distance(identity.w).max(1)
        yield f"in deviations of W: {listed(far)} on layers {listed(layer)} (plausible up to {LIMIT})"
    history = dict(identity.provenance)
    for edit in history.pop("edits", []):
        yield f"edit: {json.dumps(edit)}"
    for key, value in history.items():
        yield f"{key}: {json.dumps(value)}"


def listed(numbers: Tensor) -> str:
    return ", ".join(f"{x:.3g}" for x in numbers.tolist())
