"""The miniature's VAE: an AutoencoderKL of Stable Diffusion's plan (8 x smaller, 4 channels) at small widths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from ...wplus_core.refine import picture_loss
from ..data import Index
from .fit import Fit, fit
from .pictures import Pictures

KL = 1e-6
COLOUR = 2.0  # the weight of hues in blocks of 4 x 4 pixels: what is green and what is grey differ little in L1
CROP = 64  # what it is trained on; being convolutional it serves any size
WIDTHS = (32, 32, 64, 64)  # multiples of 32, ComfyUI's number of groups in a group norm


def new_autoencoder() -> AutoencoderKL:
    torch.manual_seed(4)
    return AutoencoderKL(
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * len(WIDTHS),
        up_block_types=("UpDecoderBlock2D",) * len(WIDTHS),
        norm_num_groups=32,
        sample_size=128,
    )


def loss_on(pictures: Pictures):
    def loss(vae: AutoencoderKL, batch: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """L1 of pictures and gradients over scales, L1 of hues, and a little KL, on random crops."""
        rows = np.sort(rng.integers(len(pictures), size=batch))
        x = crops(pictures.get("images", rows), rng).to(vae.device) * 2 - 1
        moments = vae.quant_conv(vae.encoder(x))
        mean, logvar = moments.chunk(2, 1)
        logvar = logvar.clamp(-30, 20)
        noise = torch.from_numpy(rng.standard_normal(tuple(mean.shape), dtype=np.float32)).to(mean)
        y = vae.decode(mean + noise * (logvar / 2).exp()).sample.float()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).float().sum((1, 2, 3)).mean()
        fidelity = picture_loss(y, x, torch.ones_like(x[:, :1]))
        colour = hue(y - x).abs().mean()
        return {"total": fidelity + COLOUR * colour + KL * kl, "colour": colour, "mse": F.mse_loss(y, x), "kl": kl}

    return loss


def hue(x: Tensor) -> Tensor:
    """[B, 3, H, W] -> what is not grey in blocks of 4 x 4 pixels."""
    return F.avg_pool2d(x - x.mean(1, keepdim=True), 4)


def crops(x: Tensor, rng: np.random.Generator, size: int = CROP) -> Tensor:
    """A random crop of each picture, half of them mirrored; corners at multiples of 8 pixels."""
    side = x.shape[-1]
    corners = 8 * rng.integers((side - size) // 8 + 1, size=(len(x), 2))
    cut = torch.stack([p[:, i : i + size, j : j + size] for p, (i, j) in zip(x, corners, strict=True)])
    mirrored = torch.from_numpy(rng.random(len(x)) < 0.5)[:, None, None, None]
    return torch.where(mirrored, cut.flip(3), cut)


@torch.no_grad()
def restored(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Pictures [B, 3, S, S] in 0..1 -> what comes back through the latent: the best that a UNet could paint."""
    parts = [vae.decode(vae.encode(part.to(vae.device) * 2 - 1).latent_dist.mean).sample for part in x.split(16)]
    return (torch.cat(parts).cpu() / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def normalise(vae: AutoencoderKL, x: Tensor):
    """Shift and scale the latent's channels so that, times Stable Diffusion's 0.18215, they are standard normal.

    The change is folded into the convolutions on either side of the latent; the pictures stay the same.
    """
    mean = torch.cat([vae.encode(part).latent_dist.mean for part in x.split(32)])
    shift, scale = mean.mean((0, 2, 3)), 1 / (mean.std((0, 2, 3)) * Index.scaling_factor)
    into, out_of = vae.quant_conv, vae.post_quant_conv
    out_of.bias += out_of.weight[:, :, 0, 0] @ shift
    out_of.weight /= scale[None, :, None, None]
    into.bias[:4] = (into.bias[:4] - shift) * scale
    into.weight[:4] *= scale[:, None, None, None]
    into.bias[4:] += 2 * scale.log()


def make(out: Path, settings: Fit, device: str) -> Path:
    pictures = Pictures(out)
    vae = fit(new_autoencoder(), loss_on(pictures), settings, out / "runs" / "autoencoder", device)
    normalise(vae, pictures.get("images", slice(0, 256)).to(device) * 2 - 1)
    vae.cpu().half().save_pretrained(out / "base" / "vae")
    return out / "base" / "vae" / "diffusion_pytorch_model.safetensors"


def load(out: Path, device: str = "cpu") -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(out / "base" / "vae", torch_dtype=torch.float32)
    return vae.to(device).eval().requires_grad_(False)
