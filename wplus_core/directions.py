"""Editing directions in W+: moving a code so that one attribute of the face changes.

Sources: InterFaceGAN (Shen et al.), StyleGAN2 latent directions (Puzer), GANSpace (Härkönen et al.).

Strength has one meaning for all directions: strength 1 moves a code of L layers by the distance sqrt(L), on however few
layers. That is as far as InterFaceGAN's unit normals move it at 1. On this scale ±1 is modest and ±3 strong:
InterFaceGAN is commonly used up to ±3, and the median of GANSpace's hand-set strengths is 4.6. It is a distance between
codes, not between pictures: the eyes change fewer pixels at 3 than the pose does. `unit`, the raw number of strength 1,
is stored with a direction and can be set to something better.

The command line (list, apply, find, pca, sefa, sheet) is described in `direction_commands`:

    python -m comfyui_wplus.wplus_core.directions --help
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .errors import WPlusError
from .identity import Identity
from .plausible import LIMIT, Spread

log = logging.getLogger(__name__)

Layers = tuple[int, int]  # [first, end)
FFHQ_LAYERS = 18
MAX_LAYERS = 24
LAYER_GROUPS: dict[str, Layers] = {"coarse": (0, 4), "middle": (4, 8), "fine": (8, MAX_LAYERS)}  # 4-8, 16-32, 64- px
LITTLE_LEFT = 0.25


@dataclass(frozen=True, eq=False)
class Direction:
    """One named edit. vector: [L, 512], or [1, 512] for the same step on every layer; float32.

    layers: the range [first, end) that moves, None for all. origin: None for a step, w + raw * vector; [512] for
    GANSpace's target rule, where the raw number is the coordinate along the vector that layer 0 would be moved to.
    unit: the raw number of strength 1, by default `natural_unit`; negative where the file's vector points to less of
    what the name says. usual: strengths that are usually wanted.
    """

    name: str
    vector: Tensor
    layers: Layers | None = None
    origin: Tensor | None = None
    source: str = ""
    unit: float | None = None
    usual: tuple[float, float] = (-3.0, 3.0)

    def __post_init__(self):
        v = self.vector
        if v.ndim != 2 or not v.is_floating_point() or not torch.isfinite(v).all():
            raise WPlusError(f"direction {self.name!r}: expected finite [L, 512] or [1, 512], got {list(v.shape)}")
        object.__setattr__(self, "vector", v.detach().float())
        if self.layers is not None and not 0 <= self.layers[0] < self.layers[1]:
            raise WPlusError(f"direction {self.name!r}: expected layers [first, end), first < end, got {self.layers}")
        if self.origin is not None and self.origin.shape != v.shape[1:]:
            raise WPlusError(
                f"direction {self.name!r}: expected an origin {list(v.shape[1:])}, got {list(self.origin.shape)}"
            )
        unit = natural_unit(self) if self.unit is None else float(self.unit)
        low, high = self.usual
        if not math.isfinite(unit) or unit == 0 or not -math.inf < low < high < math.inf:
            raise WPlusError(
                f"direction {self.name!r}: expected a unit other than 0 and a range low < high, "
                f"got {unit} and {self.usual}; a vector of zeros is no direction"
            )
        object.__setattr__(self, "unit", unit)

    def __repr__(self) -> str:
        return f"Direction({self.name}: layers {format_layers(self.layers)}, 1 is {self.unit:.3g} of the file's unit)"

    def rows(self, layers: int, only: Layers | None = None) -> Tensor:
        """The step of raw number 1 on codes of that many layers: [layers, 512], zero on layers that do not move.

        only: moves these layers in place of the direction's own.
        """
        first, end = only or self.layers or (0, layers)
        if self.vector.shape[0] not in (1, layers) or first >= layers:
            raise WPlusError(
                f"direction {self.name!r} of {list(self.vector.shape)} on layers {first}-{end - 1} does not fit codes "
                f"of {layers} layers; use directions and an encoder of the same generator"
            )
        rows = torch.zeros(layers, self.vector.shape[1])
        rows[first:end] = self.vector.expand(layers, -1)[first:end]
        return rows

    def move(self, w: Tensor, raw: float) -> Tensor:
        """w [B, L, 512] -> the edited codes, by the file's own rule and in its own unit."""
        return edit(w, [Edit(self, raw, raw=True)])


def natural_unit(direction: Direction) -> float:
    """The raw number at which the step is sqrt(L) long. L is the vector's, or 18 where it has one row for all."""
    v = direction.vector.double()
    layers = len(v) if len(v) > 1 else FFHQ_LAYERS
    first, end = direction.layers or (0, layers)
    end = max(first + 1, min(end, layers))  # a group may end beyond the last layer
    rows = v[first:end] if len(v) > 1 else v.expand(end - first, -1)
    length = rows.norm().item()
    return math.sqrt(layers) / length if length else math.inf


@dataclass(frozen=True, eq=False)
class Edit:
    """A direction at a strength; with raw=True at a number in the file's own unit, by the file's own rule.

    layers: a range [first, end) in place of the direction's own. At a strength every direction is a step from where the
    code is, GANSpace's too: strength 0 changes nothing. GANSpace's target rule is its raw number.
    """

    direction: Direction
    strength: float
    layers: Layers | None = None
    raw: bool = False

    def __post_init__(self):
        if not math.isfinite(self.strength):
            raise WPlusError(f"{self.direction.name}: the strength must be a finite number, got {self.strength}")
        if self.layers is not None and not 0 <= self.layers[0] < self.layers[1]:
            raise WPlusError(f"{self.direction.name}: expected layers [first, end), first < end, got {self.layers}")

    def step(self, w: Tensor) -> Tensor:
        """What this edit adds to codes w [B, L, 512]: [B, L, 512], or [L, 512] where it is the same for all."""
        d = self.direction
        rows = d.rows(w.shape[1], self.layers).to(w)
        if not self.raw:
            return self.strength * d.unit * rows
        if d.origin is None:
            return self.strength * rows
        v = d.vector[0].to(w)
        coordinate = (w[:, 0] - d.origin.to(w)) @ v / v.square().sum()
        return (self.strength - coordinate)[:, None, None] * rows

    def __str__(self) -> str:
        """As `parse_edits` reads it."""
        at = f"@{format_layers(self.layers)}" if self.layers else ""
        return f"{self.direction.name}={'raw:' if self.raw else ''}{self.strength:g}{at}"

    def record(self) -> dict[str, Any]:
        """JSON values for an identity's provenance."""
        raw = self.strength if self.raw else self.strength * self.direction.unit
        entry: dict[str, Any] = {"direction": self.direction.name, "raw": round(raw, 5)}
        if not self.raw:
            entry["strength"] = self.strength
        if layers := self.layers or self.direction.layers:
            entry["layers"] = list(layers)
        return entry


def edit(w: Tensor, edits: Iterable[Edit]) -> Tensor:
    """Codes w [B, L, 512] with all edits made at once.

    Each step, GANSpace's raw targets too, is taken from the unedited code, so that the order does not matter.
    """
    total = torch.zeros_like(w)
    for e in edits:
        if w.ndim != 3 or w.shape[2] != e.direction.vector.shape[1]:
            raise WPlusError(
                f"direction {e.direction.name!r} is for codes [B, L, {e.direction.vector.shape[1]}], "
                f"got {list(w.shape)}; use directions and an encoder of the same generator"
            )
        total = total + e.step(w)
    return w + total


def edit_identity(
    identity: Identity, edits: Sequence[Edit], spread: Spread | None = None, limit: float = LIMIT
) -> Identity:
    """The identity with all edits made, each noted in provenance["edits"].

    spread: where plausible codes lie. With it, edits that lead a code further than `limit` from the average face (see
    `Spread.hold`) are shortened together; the share of them that was kept, per code, is logged and noted as "kept".
    """
    w, records = edit(identity.w, edits), [e.record() for e in edits]
    if spread is not None:
        w, kept = spread.hold(identity.w, w, limit)
        if (kept < 1).any():
            shares = [round(k, 4) for k in kept.tolist()]
            log.warning("%s: kept %s of the edits, further is no plausible face", identity.name or "identity", shares)
            records = [r | {"kept": shares} for r in records]
    return noted(identity, w, records)


def noted(identity: Identity, w: Tensor, records: Sequence[dict[str, Any]]) -> Identity:
    """The identity with other codes, and the reason in provenance["edits"]."""
    edits = [*identity.provenance.get("edits", []), *records]
    return replace(identity, w=w, provenance=identity.provenance | {"edits": edits})


def orthogonalise(direction: Direction, others: Sequence[Direction]) -> Direction:
    """The direction without what it shares with others (smile without age): InterFaceGAN's conditional manipulation.

    On every layer the vector is projected off the span of theirs, so that each dot product is zero; a strength goes as
    far as before. WPlusError if nothing is left.
    """
    all_rows = [d.vector for d in (direction, *others)]
    layers = max(map(len, all_rows))
    if any(len(v) not in (1, layers) or v.shape[1] != all_rows[0].shape[1] for v in all_rows):
        raise WPlusError(f"directions of different generators: {[list(v.shape) for v in all_rows]}")
    v, *rest = (x.double().expand(layers, -1) for x in all_rows)
    left = v
    if rest:
        u, s, _ = torch.linalg.svd(torch.stack(rest, 2), full_matrices=False)  # per layer, [512, others]
        basis = u * (s > 1e-6 * s[:, :1].clamp(min=1e-30))[:, None]
        for _ in range(2):  # the second pass takes off what rounding left
            left = left - (basis @ (basis.transpose(1, 2) @ left[..., None]))[..., 0]
    share = (left.norm() / v.norm()).item()
    names = ", ".join(d.name for d in others)
    if share < 1e-3:
        raise WPlusError(f"nothing is left of {direction.name!r} without {names}: they are the same direction")
    if share < LITTLE_LEFT:
        log.warning("only %.0f %% of %s is left without %s", 100 * share, direction.name, names)
    note = f"{direction.source}; orthogonal to {names}".removeprefix("; ")
    before = replace(direction, vector=v.float(), unit=None)
    after = replace(before, vector=left.float(), source=note, unit=None)
    return replace(after, unit=direction.unit * after.unit / before.unit)


def parse_layers(text: str) -> Layers:
    """ "0-7", "5", "all", "coarse", "middle" or "fine" -> [first, end)."""
    if text in LAYER_GROUPS:
        return LAYER_GROUPS[text]
    if text == "all":
        return 0, MAX_LAYERS
    match = re.fullmatch(r"(\d{1,2})(?:-(\d{1,2}))?", text)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if first > last or last >= MAX_LAYERS:
        groups = ", ".join(("all", *LAYER_GROUPS))
        raise WPlusError(f"expected layers such as 0-7 or 5, counted from 0, or one of {groups}; got {text!r}")
    return first, last + 1


def format_layers(layers: Layers | None) -> str:
    """[first, end) as `parse_layers` reads it; "all" for None."""
    if layers in (None, (0, MAX_LAYERS)):
        return "all"
    names = {v: k for k, v in LAYER_GROUPS.items()}
    first, end = layers
    return names.get((first, end)) or (f"{first}-{end - 1}" if end - first > 1 else str(first))


if __name__ == "__main__":
    import sys

    from .direction_commands import main

    sys.exit(main())
