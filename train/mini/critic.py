"""The measurer of faces: reads a person's factors back from the picture of an aligned face.

It is trained on drawn faces alone and never sees what the other networks make; so it can judge them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...wplus_core.encoder import EncoderConfig, build_encoder
from ...wplus_core.files import read, write_safetensors
from . import world
from .encoder import moved
from .fit import Fit, fit

CONFIG = EncoderConfig("single", layers=1, w_dim=len(world.FACTORS), units=(1, 1, 1, 1), channels=(32, 48, 64, 96),
                       image_size=64)  # fmt: skip


class Reader(nn.Module):
    """Aligned faces [B, 3, 64, 64] in 0..1 -> factors [B, F]."""

    def __init__(self, config: EncoderConfig = CONFIG):
        super().__init__()
        self.body = build_encoder(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x * 2 - 1)[:, 0]


def loss(reader: Reader, batch: int, rng: np.random.Generator) -> dict[str, Tensor]:
    z = world.sample(batch, rng).to(reader.body.latent_avg)
    read = reader(moved(world.faces(z) * 2 - 1, rng) / 2 + 0.5).float()
    return {"total": (read - z).square().mean()}


def make(out: Path, settings: Fit, people: int, device: str) -> Path:
    torch.manual_seed(2)
    reader = fit(Reader(), loss, settings, out / "runs" / "reader", device)
    accuracy = correlations(reader.cpu(), people)
    write_safetensors(out / "reader.safetensors", {k: x.half() if x.is_floating_point() else x for k, x in
                      reader.state_dict().items()}, {k: f"{v:.4f}" for k, v in accuracy.items()})  # fmt: skip
    return out / "reader.safetensors"


def load(out: Path, device: str = "cpu") -> Reader:
    reader = Reader()
    reader.load_state_dict(read(out / "reader.safetensors").tensors)
    return reader.to(device).eval().requires_grad_(False)


@torch.no_grad()
def correlations(reader: Reader, n: int, seed: int = 1000) -> dict[str, float]:
    """Of what it reads with the truth, over n drawn people that it was not trained on."""
    z = world.sample(n, np.random.default_rng(seed))
    found = torch.cat([reader(world.faces(part)) for part in z.split(100)])
    pairs = torch.stack([found.T, z.T], 1)  # [F, 2, n]
    return {name: torch.corrcoef(pair)[0, 1].item() for name, pair in zip(world.NAMES, pairs, strict=True)}
