"""The miniature's e4e: from a drawn face to its code, through the generator that it inverts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...wplus_core.checkpoints import load_encoder, save_encoder
from ...wplus_core.encoder import Encoder, EncoderConfig, build_encoder
from ...wplus_core.refine import picture_loss
from ...wplus_core.stylegan2 import Generator
from . import generator as generators
from . import world
from .critic import moved
from .fit import Fit, fit

UNITS, CHANNELS = (1, 2, 2, 1), (32, 48, 64, 48)
CODE, PICTURE, DELTA = 1.0, 1.0, 0.1  # weights: distance to the code, of the picture, and e4e's pull towards W


def new_encoder(generator: Generator) -> Encoder:
    torch.manual_seed(1)
    c = generator.config
    encoder = build_encoder(EncoderConfig("e4e", c.layers, c.w_dim, UNITS, CHANNELS, image_size=c.size))
    encoder.latent_avg.copy_(generator.mean_w())
    return encoder


def loss_through(generator: Generator):
    """The loss of an encoder for this generator."""

    def loss(encoder: Encoder, batch: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """Distances between codes and between pictures; the deltas are what W+ has beyond W (e4e)."""
        z = generators.draw_z(batch, rng, generator.config.w_dim).to(encoder.latent_avg)
        with torch.no_grad():
            faces = world.faces(z[:, : generators.FACTORS], generator.config.size) * 2 - 1
            w = generator.mapping(z)[:, None]
        found = encoder(moved(faces, rng)).float()
        picture = generator(found, noise="none").float()
        losses = {
            "code": (found - w).square().mean(),
            "picture": picture_loss(picture, faces, torch.ones_like(faces[:, :1])),
            "delta": (found - found[:, :1]).square().mean(),
        }
        weights = {"code": CODE, "picture": PICTURE, "delta": DELTA}
        return losses | {"total": sum(weights[k] * x for k, x in losses.items())}

    return loss


def make(out: Path, settings: Fit, device: str) -> Path:
    """Train it and write encoder.safetensors, the generator in it, in float16."""
    generator = generators.load(out, device)
    encoder = fit(new_encoder(generator.cpu()), loss_through(generator.to(device)), settings,
                  out / "runs" / "encoder", device)  # fmt: skip
    save_encoder(encoder.cpu().half(), out / "encoder.safetensors", generator.cpu().half())
    return out / "encoder.safetensors"


def load(out: Path, device: str = "cpu") -> Encoder:
    return load_encoder(out / "encoder.safetensors").float().to(device)
