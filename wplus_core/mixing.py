"""Mixing identities: between two, of several, by layer, toward the average face, and attributes of one on another.

By layer: Karras et al., "A Style-Based Generator Architecture for GANs" (style mixing, truncation). An amount is one
number, or one per layer group: {"coarse": 0.2, "middle": 1.0, "8-11": 0.0}, where a layer left out stays as it is.
Groups are named as `directions.parse_layers` reads them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .directions import Direction, Edit, Layers, edit, format_layers, noted, parse_layers
from .errors import WPlusError
from .identity import Identity

Amount = float | Mapping[str, float]
MAX_SWEEP = 1024


def interpolate(a: Identity, b: Identity, amount: Amount = 0.5) -> Identity:
    """From a (0) to b (1), linearly; outside 0..1 beyond them. Codes pair up, one code goes with all."""
    wa, wb = pair(a, b)
    return mixed(torch.lerp(wa, wb, per_layer(amount, wa.shape[1], 0.0)), [a, b], "interpolate", amount=amount)


def blend(
    identities: Sequence[Identity],
    weights: Sequence[float] | None = None,
    groups: Mapping[str, Sequence[float]] | None = None,
) -> Identity:
    """The weighted mean of several people, one code. An identity of several codes counts as their mean.

    weights: one each, equal by default; only their ratios count. groups: other weights for some layers,
    {"coarse": [1, 0]}. For photos of one person there is `encode.average`, which looks for outliers.
    """
    if not identities:
        raise WPlusError("nothing to blend: give at least one identity")
    for other in identities[1:]:
        check_layers(identities[0], other)
    weights = [1.0] * len(identities) if weights is None else weights
    shares = shares_of(weights, len(identities)).expand(identities[0].w.shape[1], -1).clone()
    for name, own in (groups or {}).items():
        first, end = parse_layers(name)
        shares[first:end] = shares_of(own, len(identities))
    w = sum(shares[:, n, None] * i.w.mean(0, keepdim=True).cpu() for n, i in enumerate(identities))
    record = {"weights": list(weights)} | ({"groups": {k: list(x) for k, x in groups.items()}} if groups else {})
    return mixed(w, identities, "blend", **record)


def shares_of(weights: Sequence[float], count: int) -> Tensor:
    """Weights as parts of one, [count]."""
    x = torch.tensor([float(x) for x in weights])
    if len(x) != count or not x.isfinite().all() or x.sum().abs() < 1e-6:
        raise WPlusError(f"expected {count} weights with a sum other than 0, got {list(weights)}")
    return x / x.sum()


def style_mix(a: Identity, b: Identity, layers: Layers | str | Sequence[str]) -> Identity:
    """a with the layers of b: a range [first, end), or text such as "coarse" and "4-5".

    coarse (0-3): pose, head and face shape; middle (4-7): features, expression, hair style; fine (8-): colour, light.
    """
    ranges = [layers] if isinstance(layers, tuple) and isinstance(layers[0], int) else ranges_of(layers)
    wa, wb = pair(a, b)
    w = wa.clone()
    for first, end in ranges:
        w[:, first:end] = wb[:, first:end]
    return mixed(w, [a, b], "style mix", layers=[format_layers(r) for r in ranges])


def truncate(identity: Identity, psi: Amount, average: Tensor | None = None) -> Identity:
    """Toward the average face: psi = 1 keeps the identity, 0 is the average, above 1 exaggerates.

    average: [L, 512] or [512]; by default the one that the encoder left in the identity.
    """
    average = identity.average if average is None else average
    if average is None:
        raise WPlusError("this identity does not know the average face; encode it anew, or give a generator's average")
    if average.shape[-1] != identity.w.shape[2] or average.shape[:-1] not in ((), identity.w.shape[1:2]):
        raise WPlusError(f"the average face must be {list(identity.w.shape[1:])}, got {list(average.shape)}")
    average, psis = average.to(identity.w), per_layer(psi, identity.w.shape[1], 1.0)
    return noted(identity, average + psis * (identity.w - average), [{"truncate": as_json(psi)}])


def batched(identities: Sequence[Identity]) -> Identity:
    """All codes as one batch: an identity for each picture."""
    for other in identities[1:]:
        check_layers(identities[0], other)
    return mixed(torch.cat([i.w.cpu() for i in identities]), identities, "batch")


def codes_from(identity: Identity, first: int, count: int = 1) -> Identity:
    """Some of a batch's codes; numbers beyond its end are taken as the last one.

    The thumbnail, which is the first code's, stays with it; of photos with an entry per code each stays with its own.
    """
    first = min(first, len(identity) - 1)
    provenance, photos = identity.provenance, identity.provenance.get("photos")
    if isinstance(photos, list) and len(photos) == len(identity) and "averaged" not in provenance:
        provenance = provenance | {"photos": photos[first : first + count]}
    thumbnail = None if first else identity.thumbnail
    return replace(identity, w=identity.w[first : first + count], provenance=provenance, thumbnail=thumbnail)


def move_attributes(
    source: Identity, target: Identity, directions: Sequence[Direction], amount: float = 1.0
) -> Identity:
    """The target with the source's attributes: on every layer that they move, its coordinates along the directions.

    With amount 1 both have the same dot product with each direction, and what is orthogonal to them is the target's.
    """
    if not directions:
        raise WPlusError("no attributes to move: give at least one direction")
    wt, ws = pair(target, source)
    rows = torch.stack([d.rows(wt.shape[1]).double() for d in directions], 2)  # [L, 512, directions]
    difference = (ws - wt).double().cpu()[..., None]
    moved = rows @ (torch.linalg.pinv(rows) @ difference)
    names = [d.name for d in directions]
    record = {"attributes_of": source.name, "directions": names, "amount": amount}
    return noted(target, wt + amount * moved[..., 0].to(wt), [record])


def sweep(identity: Identity, *axes: tuple[Direction, Sequence[float]]) -> tuple[Identity, list[str]]:
    """One code along directions, as a batch with a label each. Two axes are a grid: rows of the first, row by row.

    An axis is (direction, strengths); `spaced` makes even strengths.
    """
    count = math.prod(len(strengths) for _, strengths in axes) if axes else 0
    if not 1 <= count <= MAX_SWEEP:
        raise WPlusError(f"expected axes that make 1 to {MAX_SWEEP} codes, got {count if axes else 'no axis'}")
    points = list(product(*([Edit(d, s) for s in strengths] for d, strengths in axes)))
    labels = [", ".join(f"{title(e.direction)} {signed(e.strength)}" for e in point) for point in points]
    record = {"sweep": {d.name: [float(s) for s in strengths] for d, strengths in axes}}
    return noted(identity, edited_codes(identity, points), [record]), labels


def sweep_edits(identity: Identity, frames: Sequence[Sequence[Edit]]) -> tuple[Identity, list[str]]:
    """One code with each frame's edits, as a batch with a label each; no edits are the code itself."""
    if not 1 <= len(frames) <= MAX_SWEEP:
        raise WPlusError(f"expected 1 to {MAX_SWEEP} lists of edits, got {len(frames)}")
    labels = [", ".join(f"{title(e.direction)} {signed(e.strength)}" for e in edits) for edits in frames]
    record = {"sweep": [" ".join(map(str, edits)) for edits in frames]}
    return noted(identity, edited_codes(identity, frames), [record]), labels


def edited_codes(identity: Identity, frames: Sequence[Sequence[Edit]]) -> Tensor:
    """[frames, L, 512]"""
    if len(identity) != 1:
        raise WPlusError(f"a sweep starts from one code, got {len(identity)}; choose one of the batch or average them")
    return torch.cat([edit(identity.w, edits) for edits in frames])


def title(direction: Direction) -> str:
    """Its name without the group, for a label."""
    return direction.name.rpartition("/")[2]


def sweep_between(a: Identity, b: Identity, count: int, start: float = 0, end: float = 1) -> tuple[Identity, list[str]]:
    """From one code of a (0) to one of b (1) in even steps, as a batch [count, L, 512] with a label each."""
    if len(a) != 1 or len(b) != 1:
        raise WPlusError(f"a sweep goes between two codes, got {len(a)} and {len(b)}; choose one of each batch")
    wa, wb = pair(a, b)
    amounts = spaced(start, end, count)
    w = torch.cat([torch.lerp(wa, wb, x) for x in amounts])
    return mixed(w, [a, b], "sweep", amounts=amounts), [f"{100 * x:.0f} %" for x in amounts]


def spaced(low: float, high: float, count: int) -> list[float]:
    """Even numbers from low to high, both included; one number is the middle."""
    if not 1 <= count <= MAX_SWEEP or not (math.isfinite(low) and math.isfinite(high)):
        raise WPlusError(f"expected 1 to {MAX_SWEEP} steps between finite numbers, got {count} from {low} to {high}")
    if count == 1:
        return [(low + high) / 2]
    return [low + (high - low) * i / (count - 1) for i in range(count)]


def signed(x: float) -> str:
    return f"{round(x, 2):+g}" if round(x, 2) else "0"


def pair(a: Identity, b: Identity) -> tuple[Tensor, Tensor]:
    """Their codes [B, L, 512], as many of each, on a's device."""
    check_layers(a, b)
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        raise WPlusError(f"expected as many codes of both, or one of one of them, got {len(a)} and {len(b)}")
    count = max(len(a), len(b))
    return a.w.expand(count, -1, -1), b.w.to(a.w).expand(count, -1, -1)


def check_layers(a: Identity, b: Identity):
    if a.w.shape[1:] != b.w.shape[1:]:
        raise WPlusError(f"codes of different generators: {list(a.w.shape[1:])} and {list(b.w.shape[1:])}")


def per_layer(amount: Amount, layers: int, keep: float) -> Tensor:
    """[L, 1] of amounts; `keep` on layers that are not named."""
    if isinstance(amount, Mapping):
        amounts = torch.full((layers, 1), keep)
        for (first, end), x in zip(ranges_of(list(amount)), amount.values(), strict=True):
            amounts[first:end] = float(x)
    else:
        amounts = torch.full((layers, 1), float(amount))
    if not amounts.isfinite().all():
        raise WPlusError(f"expected finite amounts, got {amount}")
    return amounts


def ranges_of(layers: str | Sequence[str]) -> list[Layers]:
    layers = [layers] if isinstance(layers, str) else layers
    if not layers:
        raise WPlusError("no layers given, such as coarse, middle, fine or 0-7")
    return [parse_layers(text) for text in layers]


def mixed(w: Tensor, identities: Sequence[Identity], how: str, **numbers: Any) -> Identity:
    """A new identity that says of whom it was made, how, and what is known of them."""
    of = [{"name": i.name, "provenance": i.provenance} for i in identities]
    numbers = {k: as_json(x) for k, x in numbers.items()}
    average = next((i.average for i in identities if i.average is not None), None)
    name = " + ".join(dict.fromkeys(i.name for i in identities if i.name))
    return Identity(w, name, {"source": "mix", "mix": {"how": how, **numbers, "of": of}}, None, average)


def as_json(x: Any) -> Any:
    return dict(x) if isinstance(x, Mapping) else x
