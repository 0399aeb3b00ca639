"""The node that puts the adapter and one or more identities on a model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..wplus_core.adapter import FoldedAdapter, WPlusAdapter, pixel_weights
from ..wplus_core.errors import WPlusError
from .patch import Site, Switch, WPlusPatch, apply_patch, sites_of
from .types import AdapterIO, IdentityIO, InPlace, Placed, PlacedIO, placed

log = logging.getLogger(__name__)

NEGATIVES = ("zeros", "average face", "none")
# Which cross-attentions a preset leaves on, by their site in ComfyUI's UNet and whether they are the widest ones.
LAYER_PRESETS = {
    "all": lambda site, deep: True,
    "down": lambda site, deep: site[0] == "input",
    "up": lambda site, deep: site[0] == "output",
    "deep": lambda site, deep: deep,
    "shallow": lambda site, deep: not deep,
}


class Apply(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        people = io.Autogrow.TemplatePrefix(
            io.MultiType.Input("identity", [IdentityIO, PlacedIO], tooltip="As it is, or from W+ Place Identity."),
            prefix="identity",
            min=1,
            max=8,
        )
        return io.Schema(
            node_id="WPlusApply",
            display_name="Apply W+ Adapter",
            category="W+",
            description=(
                "Puts one or more identities on an SD1.x model. A batch of identities gives one to each latent, so a "
                "strip of edits or an animation is a single sampling run."
            ),
            search_aliases=["face adapter", "identity adapter", "ip adapter face", "apply identity"],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.x model; other patches may come before or after."),
                AdapterIO.Input("adapter", tooltip="From Load W+ Adapter."),
                io.Autogrow.Input("identities", template=people, tooltip="Who is in the picture."),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="The paper's lambda: 0 is the plain model, 1 as trained; less leaves more to the prompt.",
                    display_mode=io.NumberDisplay.slider,
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where in the sampling the adapter sets in; later keeps more of the prompt's composition.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where in the sampling the adapter ends.",
                ),
                io.Combo.Input(
                    "negative",
                    options=list(NEGATIVES),
                    tooltip="The identity of the negative prompt: a zero code (as trained), the average face, or none.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "layers",
                    options=list(LAYER_PRESETS),
                    tooltip="Which cross-attentions the adapter acts on.",
                    advanced=True,
                ),
                io.String.Input(
                    "layer_weights",
                    default="",
                    tooltip="Instead of the preset: a weight per layer, such as 1, 1, 0.5, ... (down, up, middle).",
                    advanced=True,
                ),
            ],
            outputs=[io.Model.Output("model", display_name="model", tooltip="The model with the identities.")],
        )

    @classmethod
    def execute(
        cls, model, adapter, identities, weight, start_percent, end_percent, negative, layers, layer_weights
    ) -> io.NodeOutput:
        if not identities:
            raise WPlusError("Apply W+ Adapter: connect at least one identity")
        core = adapter.adapter
        shares = [share for i in identities.values() for share in shares_of(placed(i))]
        people = [share.person for share in shares]
        sites = sites_of(model, core.config.channels)
        scales = [weight * s for s in parse_layers(layers, layer_weights, sites, core.config.channels)]
        patch = WPlusPatch(
            side_by_side(fold(core, p, scales) for p in people),
            side_by_side(fold_negative(core, p, scales, negative) for p in people) if negative != "none" else None,
            *masks_of(shares),
            start_percent,
            end_percent,
            sites,
        )
        return io.NodeOutput(apply_patch(model, patch))


@dataclass(frozen=True)
class Share:
    """One identity's share of a picture. after: it is the edited one, which an edit in place gives its share."""

    person: Placed
    after: bool = False

    @property
    def edit(self) -> InPlace | None:
        return self.person.edit


def shares_of(person: Placed) -> list[Share]:
    """One, or that of the unedited and that of the edited identity, which change over in the course of the sampling."""
    if person.edit is None:
        return [Share(person)]
    return [Share(person), Share(replace(person, identity=person.edit.identity), after=True)]


def masks_of(shares: Sequence[Share]) -> tuple[Tensor | None, Switch | None]:
    """Masks [frames, I, H, W] as the sampling begins, None for everywhere, and what edits in place make of them."""
    own = [s.person.mask for s in shares]
    if not any(s.edit for s in shares):
        return stack_masks(own), None
    nowhere, everywhere = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)
    edited = [s.edit.mask if s.edit else nowhere for s in shares]
    own, edited = stack_masks([everywhere if m is None else m for m in own] + edited).chunk(2, dim=1)
    after = torch.tensor([s.after for s in shares])[:, None, None]
    starts = tuple(s.edit.start if s.edit else 0.0 for s in shares)
    return torch.where(after, 0.0, own), Switch(own * torch.where(after, edited, 1 - edited), starts)


def fold(adapter: WPlusAdapter, person: Placed, scales: Sequence[float]) -> FoldedAdapter:
    return weighted(adapter.fold(person.identity.w), person.weights, scales)


def weighted(folded: FoldedAdapter, weights: Sequence[float], scales: Sequence[float]) -> FoldedAdapter:
    """Times the layers' scales and the frames' weights; of codes and weights the fewer ones start again."""
    if len(weights) == 1:
        return folded.scaled([s * weights[0] for s in scales])
    frames = max(folded.batch, len(weights))
    x = torch.tensor([weights[i % len(weights)] for i in range(frames)], device=folded.layers[0][1].device)
    return folded.rows(torch.arange(frames) % folded.batch).scaled([s * x[:, None, None] for s in scales])


def fold_negative(adapter: WPlusAdapter, person: Placed, scales: Sequence[float], negative: str) -> FoldedAdapter:
    w, average = person.identity.w[:1], person.identity.average
    if negative == "average face" and average is None:
        raise WPlusError(
            f"{person.identity} does not know its encoder's average face; encode it with W+ Encode Identity, or choose "
            "another negative"
        )
    code = torch.zeros_like(w) if negative == "zeros" else average[None]
    return weighted(adapter.fold(code), person.weights, scales)


def side_by_side(folds) -> FoldedAdapter:
    """Several people in one picture; a batch shorter than another one starts again."""
    folds = list(folds)
    batch = max(f.batch for f in folds)
    if len({f.batch for f in folds} - {1}) > 1:
        log.info("W+: batches of %s identities in one picture; the shorter ones repeat", [f.batch for f in folds])
    first, *rest = (f if f.batch in (1, batch) else f.rows(torch.arange(batch) % f.batch) for f in folds)
    return first.beside(*rest)


def stack_masks(masks: Sequence[Tensor | None]) -> Tensor | None:
    """MASKs [frames, H, W] or [H, W] → [frames, people, H, W] at the largest one's size; a missing one is all ones."""
    masks = [None if m is None else (m[None] if m.ndim == 2 else m).cpu() for m in masks]  # --gpu-only has them there
    given = [m for m in masks if m is not None]
    if not given:
        return None
    size = max((m.shape[-2:] for m in given), key=lambda s: s[0] * s[1])
    frames = max(len(m) for m in given)
    at_size = [torch.ones(1, *size) if m is None else resize_mask(m, size) for m in masks]
    return torch.stack([m[torch.arange(frames) % len(m)] for m in at_size], dim=1)


def resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    return pixel_weights(mask, tuple(size))[0].T.unflatten(1, tuple(size))


def parse_layers(preset: str, text: str, sites: Sequence[Site], channels: Sequence[int]) -> list[float]:
    """A weight per layer, from the list if there is one, else from the preset."""
    if not text.strip():
        return [float(LAYER_PRESETS[preset](site, c == max(channels))) for site, c in zip(sites, channels, strict=True)]
    try:
        weights = [float(part) for part in text.replace(",", " ").split()]
    except ValueError as error:
        raise WPlusError(f"layer_weights: expected {len(sites)} numbers, got {text!r}") from error
    if len(weights) != len(sites) or not all(-10 <= x <= 10 for x in weights):
        raise WPlusError(f"layer_weights: expected {len(sites)} numbers (one per layer) in -10..10, got {text!r}")
    return weights
