"""The W+ adapter in diffusers' SD1.x UNet, by attention processors.

    install(unet)
    unet(z, t, c, cross_attention_kwargs={"wplus": adapter.fold(w).scaled(0.8)})
    unet(z, t, c, cross_attention_kwargs={"wplus": adapter.residual(tokens)})      # the reference form
    unet(z, t, c)                                                                  # the plain model
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

from ..wplus_core.errors import WPlusError

FEW = 256 * 256  # pairs of tokens


class Residual(Protocol):
    """What `wplus` must offer: `TokenResidual` and `FoldedAdapter` do; parallel attention adds its input to `add`."""

    def add(self, h: Tensor, i: int) -> Tensor: ...


class WPlusAttnProcessor:
    """Attention as diffusers' AttnProcessor2_0 does it; cross-attention i adds `wplus` to its output before to_out.

    layer: i in the order of the adapter's layers, or None for a self-attention, which ignores `wplus`.
    parallel: `wplus` asks with the attention's input instead of its output (the paper's "PCA" ablation).
    """

    def __init__(self, layer: int | None, parallel: bool = False):
        self.layer, self.parallel = layer, parallel

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        wplus: Residual | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(context))
            attention_mask = attention_mask.unflatten(0, (-1, attn.heads))
        qkv = attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in qkv)
        h = attend(q, k, v, attention_mask).transpose(1, 2).flatten(2)
        if wplus is not None and self.layer is not None:
            h = wplus.add(h, self.layer, hidden_states) if self.parallel else wplus.add(h, self.layer)
        return attn.to_out[1](attn.to_out[0](h))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention; q: [B, H, N, d], k and v: [B, H, M, d], mask: added to the scores.

    PyTorch's kernel for CPUs takes up to four times as long as its products one by one where the numbers have 16 bits
    and the tokens are few (`benchmarks/cpu_attention.py`).
    """
    few = q.shape[-2] * k.shape[-2] <= FEW and mask is None
    if few and q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        weights = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)).softmax(-1)
        return torch.matmul(weights, v)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def cross_attention_names(unet: UNet2DConditionModel) -> list[str]:
    """The UNet's cross-attentions in the order of the adapter's layers."""
    return [name for name in unet.attn_processors if ".attn2." in name]


def cross_attention_channels(unet: UNet2DConditionModel) -> tuple[int, ...]:
    """C of each cross-attention, in the order of the adapter's layers: the `channels` of its AdapterConfig."""
    return tuple(
        unet.get_submodule(name.removesuffix(".processor")).to_q.out_features for name in cross_attention_names(unet)
    )


def install(unet: UNet2DConditionModel, parallel: bool = False):
    """Replace the UNet's attention processors by ours; without `wplus` it stays the plain model, bit for bit but for
    the rounding of 16-bit numbers on a CPU.

    Those that are ours already stay: new ones would make torch.compile start again.
    """
    names = cross_attention_names(unet)
    if not names or unet.config.cross_attention_dim != 768:
        raise WPlusError(f"expected an SD1.x UNet (context width 768), got width {unet.config.cross_attention_dim}")
    ours = (isinstance(p, WPlusAttnProcessor) and p.parallel == parallel for p in unet.attn_processors.values())
    if all(ours):
        return
    layers = {name: i for i, name in enumerate(names)}
    unet.set_attn_processor({name: WPlusAttnProcessor(layers.get(name), parallel) for name in unet.attn_processors})
