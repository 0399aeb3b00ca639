"""The W+ adapter: a mapping network and one residual cross-attention per cross-attention of the UNet.

Two forms of the same maths. The reference form (`ResidualCrossAttention`) is the paper's. The folded form
(`FoldedAdapter`) is made once per identity: the tokens are few and the same at every pixel, so the query, key and value
projections collapse into two skinny matrices a layer. They do not change over the sampling steps either, so that the
31.6 M weights can stay off the device; training folds anew in every step and differentiates through it.

Layers are in the order of diffusers' `unet.attn_processors`, cross-attentions only: down blocks, up blocks, mid block.
Source: Li et al., "When StyleGAN Meets Stable Diffusion: a W+ Adapter for Personalized Image Generation", CVPR 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import WPlusError

SD1_CHANNELS = (320,) * 2 + (640,) * 2 + (1280,) * 5 + (640,) * 3 + (320,) * 3 + (1280,)


def default_splits(layers: int, tokens: int = 4) -> tuple[int, ...]:
    """Where each token's share of w ends: 4, 8, 12, L for a face generator of 256 px and more, equal shares below."""
    if tokens == 4 and layers > 12:
        return 4, 8, 12, layers
    return tuple(round(layers * (i + 1) / tokens) for i in range(tokens))


@dataclass(frozen=True)
class AdapterConfig:
    """Sizes of an adapter; the defaults are SD1.x with 18 x 512 codes.

    channels: C of each cross-attention, in layer order. splits: token i reads the w layers `splits[i-1]:splits[i]`.
    parallel: the query is the cross-attention's input x instead of its output h (the paper's "PCA" ablation).
    """

    channels: tuple[int, ...] = SD1_CHANNELS
    splits: tuple[int, ...] = (4, 8, 12, 18)
    w_dim: int = 512
    token_dim: int = 768
    heads: int = 8
    parallel: bool = False

    def __post_init__(self):
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "splits", tuple(self.splits))
        if any(c % self.heads for c in self.channels):
            raise WPlusError(f"every channel count must be a multiple of {self.heads} heads, got {self.channels}")
        if not self.splits or any(b <= a for a, b in pairwise((0, *self.splits))):
            raise WPlusError(f"splits must increase from above 0, got {self.splits}")

    @property
    def tokens(self) -> int:
        return len(self.splits)

    @property
    def w_layers(self) -> int:
        return self.splits[-1]


class MappingNetwork(nn.Module):
    """w [B, L, 512] -> tokens [B, T, 768], in float32: a bias-free linear per token, then one LayerNorm.

    w = 0 gives the unconditional tokens of classifier-free guidance: the norm's bias, T times.
    """

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config
        sizes = [b - a for a, b in pairwise((0, *config.splits))]
        self.proj = nn.ModuleList(nn.Linear(n * config.w_dim, config.token_dim, bias=False) for n in sizes)
        self.norm = nn.LayerNorm(config.token_dim)

    def forward(self, w: Tensor) -> Tensor:
        expected = (self.config.w_layers, self.config.w_dim)
        if w.ndim != 3 or w.shape[1:] != expected:
            raise WPlusError(
                f"this adapter reads codes of shape [B, {expected[0]}, {expected[1]}], got {list(w.shape)}; "
                "use the encoder it was trained with"
            )
        with torch.autocast(w.device.type, enabled=False):
            parts = w.float().tensor_split(self.config.splits[:-1], dim=1)
            t = torch.stack(
                [F.linear(p.flatten(1), m.weight.float()) for p, m in zip(parts, self.proj, strict=True)], dim=1
            )
            return F.layer_norm(t, t.shape[-1:], self.norm.weight.float(), self.norm.bias.float(), self.norm.eps)


class ResidualCrossAttention(nn.Module):
    """Attention from the text attention's *output* to the identity tokens.

    h: [B, N, C] before to_out, t: [B, T, D] -> [B, N, C], to be added to h times the scale (paper eq. 3).
    """

    def __init__(self, channels: int, token_dim: int = 768, heads: int = 8):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(token_dim, channels, bias=False)
        self.to_v = nn.Linear(token_dim, channels, bias=False)

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        t = t.to(h.dtype)
        qkv = self.to_q(h), self.to_k(t), self.to_v(t)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in qkv)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class WPlusAdapter(nn.Module):
    """The mapping network and every layer's residual cross-attention (7.1 M + 31.6 M parameters for SD1.x)."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config
        self.mapping = MappingNetwork(config)
        self.layers = nn.ModuleList(ResidualCrossAttention(c, config.token_dim, config.heads) for c in config.channels)

    def residual(self, tokens: Tensor, scale: float | Tensor = 1.0) -> TokenResidual:
        """The reference form for these tokens [B, T, D]."""
        return TokenResidual(self, tokens, scale)

    @torch.no_grad()
    def fold(self, w: Tensor) -> FoldedAdapter:
        """Fold the codes w [B, L, 512], one identity per row, in float32 on the adapter's device."""
        return self.fold_tokens(self.mapping(w.to(self.mapping.norm.weight.device)))

    def fold_tokens(self, tokens: Tensor) -> FoldedAdapter:
        """Fold the tokens [B, T, D], one identity per row, in float32; gradients go back to them and to the weights."""
        if self.config.parallel:
            raise WPlusError(
                "this adapter was trained with parallel attention, an ablation that only the trainer's own sampling "
                "knows; choose an adapter with residual attention"
            )
        folds = (fold_attention(x.to_q.weight, x.to_k.weight, x.to_v.weight, tokens, x.heads) for x in self.layers)
        return FoldedAdapter(tuple(folds), self.config.tokens, self.config.heads)


@dataclass(frozen=True)
class TokenResidual:
    """The reference form, bound to tokens: h' = h + scale * Attention(h, t) at layer i.

    A parallel adapter asks with `query`, the attention's input [B, N, C], instead of h.
    """

    adapter: WPlusAdapter
    tokens: Tensor
    scale: float | Tensor = 1.0

    def add(self, h: Tensor, i: int, query: Tensor | None = None) -> Tensor:
        return h + self.scale * self.adapter.layers[i](h if query is None else query, self.tokens)


def fold_attention(w_q: Tensor, w_k: Tensor, w_v: Tensor, t: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Fold one residual cross-attention with its tokens: a [B, C, T*heads] and m [B, T*heads, C], float32.

    w_q: [C, C], w_k and w_v: [C, D], t: [B, T, D]. Column (token, head) of a is q_h^T k_h^T / sqrt(d); the row of m is
    v_h in head h's own channels and zero in the others. Tokens are outermost, so that the softmax over them is strided
    over contiguous heads: twice as fast on a CPU as the other way round.
    """
    q, k, v, t = w_q.float(), w_k.float(), w_v.float(), t.float()
    b, tokens, c = len(t), t.shape[1], w_q.shape[0]
    d = c // heads
    k = F.linear(t, k).view(b, tokens, heads, d)
    v = F.linear(t, v).view(b, tokens, heads, d)
    a = torch.einsum("hdc,bthd->bcth", q.view(heads, d, c), k).flatten(2) * d**-0.5
    m = v.new_zeros(b, tokens, heads, heads, d)
    m.diagonal(dim1=2, dim2=3).copy_(v.transpose(2, 3))
    return a, m.view(b, tokens * heads, c)


def add_folded(h: Tensor, a: Tensor, m: Tensor, tokens: int, heads: int, weight: Tensor | None = None) -> Tensor:
    """h' = h + sum over identities of weight * softmax_over_tokens(h a) m: the folded residual cross-attention.

    h: [B, N, C], a: [B or 1, C, K], m: [B or 1, K, C] with K = identities * tokens * heads, all of one dtype.
    weight: None, or broadcastable to [B, N, identities]: a scale, a sigma gate, a mask per pixel.
    """
    p = (h @ a).unflatten(-1, (-1, tokens, heads)).softmax(-2)
    if weight is not None:
        p = p * weight.to(p.dtype)[..., None, None]
    return torch.baddbmm(h, p.flatten(-3), m.expand(len(h), -1, -1))


@dataclass(frozen=True)
class FoldedAdapter:
    """An adapter folded with identities; frozen, cheap to share, 1.6 MB an identity in float16 for SD1.x.

    layers: per layer a [B or 1, C, K] and m [B or 1, K, C] with K = identities * tokens * heads. The batch is one
    identity per picture; `beside` puts several into the same picture.
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    tokens: int
    heads: int

    @property
    def batch(self) -> int:
        return len(self.layers[0][0])

    @property
    def identities(self) -> int:
        return self.layers[0][0].shape[-1] // (self.tokens * self.heads)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for layer in self.layers for x in layer)

    def add(self, h: Tensor, i: int, weight: Tensor | None = None) -> Tensor:
        """The text attention's output h [B, N, C] at layer i plus the residual; see `add_folded`."""
        a, m = self.layers[i]
        return add_folded(h, a, m, self.tokens, self.heads, weight)

    def scaled(self, scale: float | Sequence[float | Tensor]) -> FoldedAdapter:
        """Times the scale, one for all layers or one per layer; it is folded in and costs nothing later.

        A layer's scale may be [B, 1, 1], a number for each row of the batch.
        """
        scales = [scale] * len(self.layers) if isinstance(scale, int | float) else list(scale)
        if len(scales) != len(self.layers):
            raise WPlusError(f"this adapter has {len(self.layers)} layers, got {len(scales)} layer weights")
        return replace(self, layers=tuple((a, m * s) for (a, m), s in zip(self.layers, scales, strict=True)))

    def beside(self, *others: FoldedAdapter) -> FoldedAdapter:
        """These identities and the others' in the same picture; batches must be equal or 1."""
        every = (self, *others)
        shapes = {(f.tokens, f.heads, tuple(a.shape[1] for a, _ in f.layers)) for f in every}
        if len(shapes) > 1:
            raise WPlusError(f"identities side by side must come from adapters of one shape, got {sorted(shapes)}")
        batch = max(f.batch for f in every)
        if any(f.batch not in (1, batch) for f in every):
            raise WPlusError(f"identities side by side need equal batches (or 1), got {[f.batch for f in every]}")
        layers = []
        for pairs in zip(*(f.layers for f in every), strict=True):
            a = torch.cat([a.expand(batch, -1, -1) for a, _ in pairs], dim=2)
            m = torch.cat([m.expand(batch, -1, -1) for _, m in pairs], dim=1)
            layers.append((a, m))
        return replace(self, layers=tuple(layers))

    def rows(self, index: Tensor) -> FoldedAdapter:
        """The batch rows at index [n], a tensor on the folded layers' device; rows may repeat."""
        return replace(self, layers=tuple((a[index], m[index]) for a, m in self.layers))

    def to(self, *args, **kwargs) -> FoldedAdapter:
        """A copy on another device or in another dtype, as `Tensor.to`."""
        return replace(self, layers=tuple((a.to(*args, **kwargs), m.to(*args, **kwargs)) for a, m in self.layers))


def pixel_weights(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks [I, H, W] or [B, I, H, W] in 0..1 as weights [1 or B, h*w, I] of a feature map of size (h, w).

    By area, so that masks which sum to one at a pixel still do after shrinking.
    """
    masks = masks if masks.ndim == 4 else masks[None]
    return F.interpolate(masks.float(), size, mode="area").flatten(2).transpose(1, 2)
