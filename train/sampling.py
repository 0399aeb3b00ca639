"""The trainer's own pictures: DDIM with classifier-free guidance, for validation and evaluation.

    z0 = sample(unet, adapter, w, c, uncond, noise((seed,), (64, 64)), Sampling(scale=0.8))
    pictures = decode(vae, z0)

Every picture's noise is a function of its own seed, so that the same seeds serve every method and batch size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from ..wplus_core.adapter import WPlusAdapter, pixel_weights
from ..wplus_core.errors import WPlusError
from .attention import Residual, install
from .base import LATENT_CHANNELS
from .draws import normal, stream
from .model import residual
from .objectives import STEPS


@dataclass(frozen=True)
class Sampling:
    """How a picture is sampled; the defaults are the paper's.

    scale: of the adapter, lambda; at 0 it is the plain model, bit for bit. start, end: the part of the noise schedule
    with the adapter, 0 to 1 from noise to picture, as ComfyUI counts it.
    """

    steps: int = 50
    guidance: float = 7.5
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self):
        if not 1 <= self.steps <= STEPS or not 0 <= self.start <= self.end <= 1:
            raise WPlusError(f"expected 1 to {STEPS} steps and 0 <= start <= end <= 1, got {self}")

    def with_adapter(self, t: int) -> bool:
        return self.scale != 0 and self.start <= 1 - t / (STEPS - 1) <= self.end


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    adapter: WPlusAdapter | None,
    w: Tensor,
    c: Tensor,
    uncond: Tensor,
    noise: Tensor,
    settings: Sampling | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Latents z_0 of one batch, times the VAE's scaling factor, float32 on the UNet's device; `decode` takes them.

    w: [B, L, 512], c: [B, 77, 768], uncond: [77, 768], the text encoder's "", noise: [B, 4, h, w]. Without an adapter
    it is the plain model. mask: [B, 1, H, W] in 0..1, of any size: where the adapter adds to the text; None: all over.
    """
    settings = settings or Sampling()
    parallel = adapter is not None and adapter.config.parallel
    install(unet, parallel)
    dtype, device, guided = unet.dtype, unet.device, settings.guidance != 1
    w, c, uncond, z = (x.to(device) for x in (w, c, uncond, noise.float()))
    if guided:
        w, c = torch.cat([torch.zeros_like(w), w]), torch.cat([uncond.to(c).expand_as(c), c])
    c = c.to(dtype)
    wplus = None if adapter is None else residual(adapter, w, settings.scale, unet)
    if wplus is not None and mask is not None:
        wplus = Confined(wplus, mask.to(device).repeat(len(w) // len(mask), 1, 1, 1), tuple(z.shape[2:]))
    scheduler = ddim()
    scheduler.set_timesteps(settings.steps)
    for t in scheduler.timesteps.tolist():
        both = (torch.cat([z, z]) if guided else z).to(dtype)
        kwargs = {"wplus": wplus} if settings.with_adapter(t) else {}
        eps = unet(both, t, c, cross_attention_kwargs=kwargs).sample.float()
        if guided:
            without, eps = eps.chunk(2)
            eps = without + settings.guidance * (eps - without)
        z = scheduler.step(eps, t, z).prev_sample
    return z


@dataclass(frozen=True, eq=False)
class Confined:
    """A residual where the mask [B, 1, H, W] is 1, and the text's attention alone where it is 0. latent: (h, w)."""

    residual: Residual
    mask: Tensor
    latent: tuple[int, int]

    def add(self, h: Tensor, i: int, *query: Tensor) -> Tensor:
        size = self.latent
        while size[0] * size[1] > h.shape[1]:
            size = tuple(-(-side // 2) for side in size)
        return torch.lerp(h, self.residual.add(h, i, *query), pixel_weights(self.mask, size).to(h))


def ddim() -> DDIMScheduler:
    """SD1.x's, as its own scheduler_config.json has it."""
    return DDIMScheduler(
        num_train_timesteps=STEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def noise(seeds: Sequence[int | Sequence[int]], size: tuple[int, int]) -> Tensor:
    """[B, 4, h, w], float32 on the CPU: a picture per seed, which may be several numbers, each at least 0."""
    keys = [(s,) if isinstance(s, int) else tuple(s) for s in seeds]
    return torch.stack([normal(stream(*key), (LATENT_CHANNELS, *size)) for key in keys])


@torch.no_grad()
def decode(vae: AutoencoderKL, z0: Tensor) -> Tensor:
    """Latents [B, 4, h, w] -> pictures [B, 3, H, W] in 0..1, float32 on the VAE's device."""
    z0 = (z0 / vae.config.scaling_factor).to(vae.device, vae.dtype)
    return (vae.decode(z0).sample.float() / 2 + 0.5).clamp(0, 1)
