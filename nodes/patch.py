"""The W+ adapter on a ComfyUI model: late-bound wrappers on a clone, nothing left in the model's attention patches.

At every model call the APPLY_MODEL wrapper copies transformer_options and puts a replacement on each cross-attention
that runs whatever is there (another pack's replacement, else stock attention) and then adds the residual. So the order
of nodes does not matter, and packs that look into `patches_replace` never meet an object of ours.

All that depends on the step or on the rows of the batch (who is in which row, the sigma range, the masks) is made into
tensors in the wrapper, outside the attention: torch.compile may constant-fold Python values that come through
transformer_options, and nothing reads a tensor back from the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

import torch
from comfy.ldm.modules.attention import SpatialTransformer, optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..wplus_core.adapter import FoldedAdapter, pixel_weights
from ..wplus_core.errors import WPlusError

CALLS = "wplus_calls"  # transformer_options: one Call per W+ node on the model
CONDS = "wplus_conds"  # transformer_options: Conds of this sampling run
Site = tuple[str, int, int]  # block, number, transformer index


@dataclass(frozen=True)
class Conds:
    """The sampler's conditionings by their uuid: the negative ones, and areas (h, w, y, x) in latent pixels."""

    negative: frozenset
    areas: dict[Any, tuple[int, ...]]
    latent_size: tuple[int, int]


@dataclass(frozen=True)
class Call:
    """One model call's share: the folded identities of each row, their gate [B, 1, 1] and masks [B, I, h, w]."""

    folded: FoldedAdapter
    gate: Tensor
    masks: Tensor | None

    def add(self, h: Tensor, layer: int, size: Sequence[int]) -> Tensor:
        if len(h) != len(self.gate):
            raise WPlusError(
                f"W+: another patch changed the batch inside the attention from {len(self.gate)} to {len(h)} rows, so "
                "it is unknown which row is which; use ComfyUI's own regional conditioning instead of it"
            )
        weight = self.gate if self.masks is None else self.gate * pixel_weights(self.masks, tuple(size))
        return self.folded.add(h, layer, weight)


@dataclass(frozen=True)
class Switch:
    """Other masks [1 or frames, I, H, W] for each identity from its own start in the sampling on, 0..1."""

    masks: Tensor
    starts: tuple[float, ...]


@dataclass
class WPlusPatch:
    """What one apply node adds to a model.

    people: folded identities, a batch of one or one per latent, scales folded in. negative: the same for the
    unconditional rows, or None to leave them alone. masks: [1 or frames, I, H, W] in 0..1, or None. switch: what
    becomes of the masks, of the same shape; None if they stay.
    start, end: the range of sampling, 0..1 as ComfyUI's start_percent and end_percent. sites: the model's
    cross-attentions in the order of the adapter's layers.
    """

    people: FoldedAdapter
    negative: FoldedAdapter | None
    masks: Tensor | None
    switch: Switch | None
    start: float
    end: float
    sites: tuple[Site, ...]
    _on_device: dict = field(default_factory=dict, repr=False)
    _rows: dict = field(default_factory=dict, repr=False)
    _masks: dict = field(default_factory=dict, repr=False)
    _sigmas: dict = field(default_factory=dict, repr=False)
    _replacements: dict = field(default_factory=dict, repr=False)

    def __call__(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
        """ComfyUI's APPLY_MODEL wrapper."""
        options = transformer_options.copy()
        position = len(options.get(CALLS, ()))
        options[CALLS] = (*options.get(CALLS, ()), self.call(executor.class_obj, x, t, transformer_options))
        replaced = dict(options.get("patches_replace", {}))
        replaced["attn2"] = attn2 = dict(replaced.get("attn2", {}))
        for layer, site in enumerate(self.sites):
            attn2[site] = self.replacement(attn2.get(site, attn2.get(site[:2])), layer, position)
        options["patches_replace"] = replaced
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def sampling(self, executor, guider, sigmas, extra_args, callback, noise, *args, **kwargs):
        """ComfyUI's SAMPLER_SAMPLE wrapper: names the conditionings for `call`; leaves nothing on the device."""
        model_options = dict(extra_args["model_options"])
        options = {CONDS: conds_of(guider, noise), **model_options.get("transformer_options", {})}
        extra_args = {**extra_args, "model_options": model_options | {"transformer_options": options}}
        try:
            return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)
        finally:
            for kept in (self._rows, self._masks, self._on_device):
                kept.clear()

    def call(self, model, x: Tensor, t: Tensor, options: dict) -> Call:
        """The rows of this model call, as tensors on its device."""
        chunks = options.get("cond_or_uncond") or [0]
        if len(x) % len(chunks):
            raise WPlusError(f"W+: {len(x)} latents do not divide into {len(chunks)} conditionings")
        latents = latent_indices(options, len(x) // len(chunks))
        uuids = options.get("uuids") or [None] * len(chunks)
        conds = options.get(CONDS)
        negative = [is_negative(conds, uuid, index) for uuid, index in zip(uuids, chunks, strict=True)]
        folded = self.rows(tuple((n, i) for n in negative for i in latents), x.device, model.get_dtype_inference())
        start, end, *switches = self.sigmas(model.model_sampling)
        gate = ((t <= start) & (t >= end)).to(folded.layers[0][0].dtype)[:, None, None]
        masks = self.mask_rows(conds, uuids, latents, x) if self.masks is not None else None
        if self.switch:
            before, after = masks.chunk(2, dim=1)
            switched = torch.stack([t <= sigma for sigma in switches], dim=1)[..., None, None]
            masks = torch.where(switched, after, before)
        return Call(folded, gate, masks)

    def rows(self, who: tuple[tuple[bool, int], ...], device: torch.device, dtype: torch.dtype) -> FoldedAdapter:
        """One folded row per (is negative, latent); the last arrangement of each device is kept."""
        key = device, dtype
        last = self._rows.get(key)
        if last is None or last[0] != who:
            first = self.negative.batch if self.negative else 1
            index = [i % first if negative else first + i % self.people.batch for negative, i in who]
            last = self._rows[key] = who, self.on_device(*key).rows(torch.tensor(index).to(device, non_blocking=True))
        return last[1]

    def on_device(self, device: torch.device, dtype: torch.dtype) -> FoldedAdapter:
        """The negative (zeros, which add nothing, if there is none) and then the people, in one batch."""
        if (device, dtype) not in self._on_device:
            negative = self.negative or self.people.rows(torch.tensor([0])).scaled(0.0)
            layers = tuple(
                tuple(torch.cat(pair) for pair in zip(n, p, strict=True))
                for n, p in zip(negative.layers, self.people.layers, strict=True)
            )
            stacked = replace(self.people, layers=layers)
            self._on_device[device, dtype] = stacked.to(device, dtype, non_blocking=True)
        return self._on_device[device, dtype]

    def sigmas(self, sampling) -> list[float]:
        """The largest and the smallest sigma at which the adapter is on, and those where masks switch, read once per
        model sampling."""
        if self._sigmas.get("of") is not sampling:
            percents = self.start, self.end, *(self.switch.starts if self.switch else ())
            self._sigmas = {"of": sampling, "sigmas": [sampling.percent_to_sigma(p) for p in percents]}
        return self._sigmas["sigmas"]

    def mask_rows(self, conds: Conds | None, uuids: list, latents: list[int], x: Tensor) -> Tensor:
        """[B, I, h, w], or [B, 2 * I, h, w] with those after the switch: the masks at the latent's size, cut to each
        conditioning's area."""
        full = conds.latent_size if conds else tuple(x.shape[-2:])
        key = full, x.device
        if key not in self._masks:
            every = torch.cat([self.masks, self.switch.masks], dim=1) if self.switch else self.masks
            self._masks[key] = torch.nn.functional.interpolate(every, full, mode="area").to(x.device)
        masks = self._masks[key]
        masks = masks[[i % len(masks) for i in latents]]
        areas = [conds.areas.get(uuid) if conds else None for uuid in uuids]
        return torch.cat([cut(masks, area, tuple(x.shape[-2:])) for area in areas])

    def replacement(self, previous: Callable | None, layer: int, position: int) -> Callable:
        """The attn2 replacement at a layer; the same object from call to call, for torch.compile's sake."""
        kept = self._replacements.get((layer, position))
        if kept is None or kept[0] is not previous:
            kept = self._replacements[layer, position] = previous, replacement(previous, layer, position)
        return kept[1]


def replacement(previous: Callable | None, layer: int, position: int) -> Callable:
    def attention(q: Tensor, k: Tensor, v: Tensor, options: dict) -> Tensor:
        if previous is None:
            h = optimized_attention(
                q, k, v, options["n_heads"], attn_precision=options["attn_precision"], transformer_options=options
            )
        else:
            h = previous(q, k, v, options)
        return options[CALLS][position].add(h, layer, options["activations_shape"][-2:])

    return attention


def conds_of(guider, noise: Tensor) -> Conds:
    """cond_or_uncond cannot tell: 0 is the negative in SAG's second pass and in guiders of three conditionings.

    ComfyUI gives every area a copy of itself in the other lists, uuid and all; the copies get one of their own.
    """
    known, negative, areas = set(), set(), {}
    for name, conds in getattr(guider, "conds", {}).items():
        for cond in conds or ():
            if cond["uuid"] in known:
                cond["uuid"] = uuid4()
            known.add(cond["uuid"])
            if "negative" in name:
                negative.add(cond["uuid"])
            if cond.get("area") is not None:
                areas[cond["uuid"]] = tuple(cond["area"])
    return Conds(frozenset(negative), areas, tuple(noise.shape[-2:]))


def is_negative(conds: Conds | None, uuid, index: int) -> bool:
    return uuid in conds.negative if conds is not None and uuid is not None else index == 1


def latent_indices(options: dict, count: int) -> list[int]:
    """Which latents of the batch this call has: all, or the frames of a context window (ComfyUI's, AnimateDiff's)."""
    window = options.get("context_window")
    if window is not None and window.dim == 0:
        anchor = getattr(window, "causal_anchor_index", None)  # a frame more at the front, from ComfyUI 0.20 on or so
        return [*([] if anchor is None else [anchor]), *window.index_list]
    frames = (options.get("ad_params") or {}).get("sub_idxs")
    return list(frames) if frames is not None else list(range(count))


def cut(masks: Tensor, area: tuple[int, ...] | None, size: tuple[int, int]) -> Tensor:
    """The part of masks [F, I, H, W] that a conditioning's area (h, w, y, x) covers."""
    if area is None or tuple(masks.shape[-2:]) == size:
        return masks
    h, w, y, x = area
    return masks[..., y : y + h, x : x + w]


def cross_attention_sites(unet: UNetModel) -> list[tuple[Site, int]]:
    """(site, channels) of the model's cross-attentions, in the order of the adapter's layers: down, up, middle."""
    sites = []
    for name, blocks in (("input", unet.input_blocks), ("output", unet.output_blocks), ("middle", [unet.middle_block])):
        for number, block in enumerate(blocks):
            transformers = [m for m in block if isinstance(m, SpatialTransformer)]
            attentions = [b.attn2 for m in transformers for b in m.transformer_blocks]
            sites += [((name, number, i), a.to_q.out_features) for i, a in enumerate(attentions) if a is not None]
    return sites


def sites_of(model: ModelPatcher, channels: Sequence[int]) -> tuple[Site, ...]:
    """The model's cross-attentions, one per layer of an adapter with these channels; WPlusError names a misfit."""
    unet = model.model.diffusion_model
    family = type(model.model.model_config).__name__
    if not isinstance(unet, UNetModel) or model.model.model_config.unet_config.get("context_dim") != 768:
        raise WPlusError(f"the W+ adapter is for SD1.x models, this one is {family}; load an SD1.x checkpoint")
    sites = cross_attention_sites(unet)
    if tuple(c for _, c in sites) != tuple(channels):
        raise WPlusError(
            f"this adapter has {len(channels)} layers of {sorted(set(channels))} channels, the model ({family}) has "
            f"{len(sites)} of {sorted({c for _, c in sites})}; use an adapter that was trained for this kind of model"
        )
    return tuple(site for site, _ in sites)


def apply_patch(model: ModelPatcher, patch: WPlusPatch) -> ModelPatcher:
    """A clone of the model with the patch; the model itself stays as it is."""
    patched = model.clone()
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "wplus", patch)
    patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "wplus", patch.sampling)
    return patched
