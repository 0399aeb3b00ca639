"""The losses of both stages (paper eq. 4 to 8), as short callables on a model and a batch.

Every loss is a mean over all elements; rows whose w or text was dropped stay in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 1000

Model = Callable[..., Tensor]  # (z, t, c, w, scale) -> eps


class Batch(NamedTuple):
    """What one loss needs; w, w_hat and c have their dropped rows already.

    z0, noise: [B, 4, h, w], t: [B], c: [B, 77, 768], w and w_hat = Aug(w): [B, L, 512], face: [B, 1, h', w'], 1 on the
    face (its soft edge between). weights: [B, 1, h, w], how much each place counts in L_rec; only their ratios matter.
    """

    z0: Tensor
    noise: Tensor
    t: Tensor
    c: Tensor
    w: Tensor
    w_hat: Tensor
    face: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Objective:
    """L = L_rec + disen * L_disen + reg * L_reg; with both weights 0 it is stage I's loss, in one pass.

    disen: lambda_1, 1.5 in the paper. reg: lambda_2, 1.0 in the paper. min_snr: gamma of min-SNR weighting of L_rec
    (Hang et al., ICCV 2023; 5 is usual), 0 for none as in the paper. face: how much more the face counts in L_rec than
    what is around it (a masked loss, which leaves L_rec's scale as it is), 0 for no more as in the paper.
    """

    disen: float = 0.0
    reg: float = 0.0
    min_snr: float = 0.0
    face: float = 0.0

    @property
    def needs_face(self) -> bool:
        """Whether the samples must have a mask of the face."""
        return bool(self.disen or self.face)

    @property
    def names(self) -> tuple[str, ...]:
        """Of its losses, in order."""
        return "rec", *(k for k in ("disen", "reg") if getattr(self, k)), "total"

    def __call__(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """The losses by name: `rec`, those of `disen` and `reg` that have a weight, and `total`."""
        zt = add_noise(batch.z0, batch.noise, batch.t)
        targets = without_gradient(model, zt, batch, bool(self.disen), bool(self.reg))
        eps = model(zt, batch.t, batch.c, batch.w)
        places = batch.weights * (1 + self.face * at_size(batch.face, eps)) if self.face else batch.weights
        losses = {"rec": reconstruction(eps, batch.noise, batch.t, self.min_snr, places)}
        if self.disen:
            losses["disen"] = disentanglement(eps, targets["disen"], batch.face)
        if self.reg:
            losses["reg"] = F.mse_loss(eps, targets["reg"])
        weights = {"rec": 1.0, "disen": self.disen, "reg": self.reg}
        return losses | {"total": sum(weights[k] * x for k, x in losses.items())}


@torch.no_grad()
def without_gradient(model: Model, zt: Tensor, batch: Batch, disen: bool, reg: bool) -> dict[str, Tensor]:
    """sg[eps(z_t, t, c, w_hat)] and sg[eps(z_t, t, c)] at lambda = 0, those that are wanted, as one batch."""
    passes = {"disen": (batch.w_hat, 1.0)} if disen else {}
    passes |= {"reg": (batch.w, 0.0)} if reg else {}
    if not passes:
        return {}
    n = len(passes)
    zt, t, c = zt.repeat(n, 1, 1, 1), batch.t.repeat(n), batch.c.repeat(n, 1, 1)
    w = torch.cat([w for w, _ in passes.values()])
    scale = torch.cat([w.new_full((len(w), 1, 1), s) for w, s in passes.values()])
    return dict(zip(passes, model(zt, t, c, w, scale).chunk(n), strict=True))


def reconstruction(
    eps: Tensor, noise: Tensor, t: Tensor, min_snr: float = 0.0, weights: Tensor | None = None
) -> Tensor:
    """|| noise - eps ||^2; with min-SNR each row's weight is min(SNR, gamma) / SNR (eps-prediction).

    weights: [B, 1, h, w], how much each place counts; only their ratios within a row matter.
    """
    error = (eps - noise).square()
    if weights is not None:
        error = error * (weights / weights.mean((1, 2, 3), keepdim=True))
    if min_snr:
        ratio = snr(t)
        error = error * (ratio.clamp(max=min_snr) / ratio)[:, None, None, None]
    return error.mean()


def disentanglement(eps: Tensor, eps_hat: Tensor, face: Tensor) -> Tensor:
    """|| m eps - m eps_hat ||^2 with m = 1 outside the face, resized to the latent by area."""
    m = 1 - at_size(face, eps)
    return F.mse_loss(m * eps, m * eps_hat)


def at_size(face: Tensor, eps: Tensor) -> Tensor:
    """Masks [B, 1, h', w'] at the size of the latents [B, 4, h, w], by area: [B, 1, h, w]."""
    return F.interpolate(face.float(), eps.shape[-2:], mode="area")


def add_noise(z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) noise."""
    a = alphas_cumprod(z0.device)[t].view(-1, 1, 1, 1)
    return a.sqrt() * z0 + (1 - a).sqrt() * noise


def snr(t: Tensor) -> Tensor:
    a = alphas_cumprod(t.device)[t]
    return a / (1 - a)


@lru_cache  # a copy to the device in every step would make the host wait for it
def alphas_cumprod(device: torch.device | str = "cpu") -> Tensor:
    """a_t of SD1.x: 1000 DDPM steps, beta from 0.00085 to 0.012, linear in its root."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float32) ** 2
    return (1 - betas).cumprod(0).to(device)
