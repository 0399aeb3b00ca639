"""Reads a person's factors back from the picture of an aligned face; the generator is trained through it.

So it cannot say how good the generator is: the judge does.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...wplus_core.encoder import EncoderConfig, build_encoder
from ...wplus_core.files import read, write_safetensors
from . import world
from .fit import Fit, fit

CONFIG = EncoderConfig("single", layers=1, w_dim=len(world.FACTORS), units=(1, 1, 1, 1), channels=(32, 48, 64, 96),
                       image_size=64)  # fmt: skip
SHIFT = 0.06  # of the crop's side: landmarks found in a photo are never exact


class Critic(nn.Module):
    """Aligned faces [B, 3, 64, 64] in 0..1 -> factors [B, F]."""

    def __init__(self, config: EncoderConfig = CONFIG):
        super().__init__()
        self.body = build_encoder(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * 2 - 1)[:, 0]


def loss(critic: Critic, batch: int, rng: np.random.Generator) -> dict[str, Tensor]:
    z = world.sample(batch, rng).to(critic.body.latent_avg)
    read = critic(moved(world.faces(z) * 2 - 1, rng) / 2 + 0.5).float()
    return {"total": (read - z).square().mean()}


def moved(faces: Tensor, rng: np.random.Generator) -> Tensor:
    """Half of the faces [B, 3, S, S] a little shifted, turned and scaled, white where nothing is."""
    b = len(faces)
    size = SHIFT * torch.from_numpy(rng.uniform(-1, 1, (b, 4)) * (rng.random((b, 1)) < 0.5)).to(faces)
    c, s = (1 + size[:, 0]) * size[:, 1].cos(), (1 + size[:, 0]) * size[:, 1].sin()
    theta = torch.stack([torch.stack([c, -s, size[:, 2]], 1), torch.stack([s, c, size[:, 3]], 1)], 1)
    grid = F.affine_grid(theta, list(faces.shape), align_corners=False)
    return F.grid_sample(faces - 1, grid, align_corners=False) + 1


def make(out: Path, settings: Fit, device: str) -> Path:
    torch.manual_seed(2)
    critic = fit(Critic(), loss, settings, out / "runs" / "critic", device).cpu()
    write_safetensors(out / "critic.safetensors", critic.state_dict(), {})
    return out / "critic.safetensors"


def load(out: Path, device: str = "cpu") -> Critic:
    critic = Critic()
    critic.load_state_dict(read(out / "critic.safetensors").tensors)
    return critic.to(device).eval().requires_grad_(False)
