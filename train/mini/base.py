"""The miniature's text-to-image model: a UNet of SD1.x's plan on 16 x 16 latents, with its noise schedule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from ...wplus_core.files import read, write_safetensors
from ..attention import install
from ..data import Index
from ..objectives import STEPS, add_noise, reconstruction
from . import autoencoder, text
from .fit import Fit, fit, in_bfloat16
from .pictures import SIZE, Pictures

WIDTHS = (64, 128, 128)  # multiples of the first, as ComfyUI builds it
HEADS = 2  # of each attention, for SD1.x's eight would be narrow here
DROP_TEXT = 0.1
FACE, FEATURES = 3.0, 8.0  # how much more faces count than what is around them, and eyes, nose and mouth than those
NEAR = 0.3  # of the distance between the eyes, what is counted to a feature; at least half a place of the latent
MIN_SNR = 5.0  # what is seen early counts more than fine noise (Hang et al. 2023)


def new_unet() -> UNet2DConditionModel:
    torch.manual_seed(5)
    with_text = len(WIDTHS) - 1
    return UNet2DConditionModel(
        sample_size=16,
        cross_attention_dim=768,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * with_text + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * with_text,
        attention_head_dim=HEADS,  # diffusers' name for their number
    )


@torch.no_grad()
def make_latents(out: Path, device: str) -> Path:
    """latents.safetensors: mean and deviation [N, 8, 16, 16] of every picture's latent, in float16."""
    pictures, vae = Pictures(out), autoencoder.load(out, device).to(memory_format=torch.channels_last)
    parts = []
    for start in range(0, len(pictures), 64):
        x = pictures.get("images", slice(start, start + 64)).to(device) * 2 - 1
        with in_bfloat16(device):
            d = vae.encode(x).latent_dist
        parts.append(torch.cat([d.mean, d.std], 1).half().cpu())
    write_safetensors(out / "latents.safetensors", {"latents": torch.cat(parts)}, {})
    return out / "latents.safetensors"


def loss_on(latents: Tensor, pictures: Pictures, words):
    """latents: [N, 8, h, w]. words: captions -> embeddings."""

    def loss(unet: UNet2DConditionModel, batch: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """|| noise - eps ||^2 with min-SNR weights, most in the face; the caption is left out of every tenth picture.

        Captions say something of the person's looks too, as those that SD1.x learned from do: so the cross-attention
        that the adapter adds to has learned to paint faces by it.
        """
        rows = rng.integers(len(latents), size=batch)
        mean, std = latents[rows].float().chunk(2, 1)
        draw = torch.from_numpy(rng.standard_normal((2, *mean.shape), dtype=np.float32))
        z0, noise = (mean + std * draw[0]) * Index.scaling_factor, draw[1]
        t = torch.from_numpy(rng.integers(STEPS, size=batch))
        dropped = rng.random(batch) < DROP_TEXT
        captions = ["" if d else c for c, d in zip(pictures.captions(rows, rng), dropped, strict=True)]
        counts = weights(pictures.get("masks", rows), pictures.points[rows], z0.shape[-1])
        z0, noise, t, counts = (x.to(unet.device) for x in (z0, noise, t, counts))
        eps = unet(add_noise(z0, noise, t), t, words(captions)).sample.float()
        return {"total": reconstruction(eps, noise, t, MIN_SNR, counts), "mse": reconstruction(eps, noise, t)}

    return loss


def weights(masks: Tensor, points: Tensor, size: int) -> Tensor:
    """How much each place of a latent counts [B, 1, size, size], from the face's masks and five points in pixels."""
    return 1 + FACE * F.adaptive_avg_pool2d(masks, size) + FEATURES * features(points, size)


def features(points: Tensor, size: int) -> Tensor:
    """1 at the eyes, nose and mouth, 0 elsewhere, soft between [B, 1, size, size]; points: [B, 5, 2] in pixels.

    Small as they are, they tell most of who it is and of the expression, and hardly move a plain mean.
    """
    cell = SIZE / size
    at = (torch.arange(size) + 0.5) * cell - 0.5
    near = (NEAR * (points[:, 1] - points[:, 0]).norm(dim=1)).clamp(min=cell / 2)[:, None, None, None]
    x, y = at - points[:, :, None, None, 0], at[:, None] - points[:, :, None, None, 1]
    return (-(x.square() + y.square()) / (2 * near.square())).exp().amax(1, keepdim=True)


def make(out: Path, settings: Fit, device: str, start: Path | None = None) -> Path:
    """start: the folder of a miniature whose UNet it begins from, in place of random weights."""
    latents = read(out / "latents.safetensors").tensors["latents"]
    loss = loss_on(latents, Pictures(out), text.load(out, device))
    unet = new_unet()
    if start:
        unet.load_state_dict(load(start).state_dict())
    install(unet)  # its attention is faster on a CPU
    if device == "cuda":
        unet.to(memory_format=torch.channels_last)  # PyTorch's group norm is many times slower with it on a CPU
    unet = fit(unet, loss, settings, out / "runs" / "unet", device)
    unet.to("cpu", memory_format=torch.contiguous_format).half().save_pretrained(out / "base" / "unet")
    return out / "base" / "unet" / "diffusion_pytorch_model.safetensors"


def load(out: Path, device: str = "cpu") -> UNet2DConditionModel:
    unet = UNet2DConditionModel.from_pretrained(out / "base" / "unet", torch_dtype=torch.float32)
    return unet.to(device).eval().requires_grad_(False)
