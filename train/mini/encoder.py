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
from .pictures import Pictures

UNITS, CHANNELS = (1, 2, 2, 1), (32, 48, 64, 48)
# Weights: distance to the code, of what it says of the person, of the picture, and e4e's pull towards W.
CODE, WHO, PICTURE, DELTA = 1.0, 4.0, 1.0, 0.1


def new_encoder(generator: Generator) -> Encoder:
    torch.manual_seed(1)
    c = generator.config
    encoder = build_encoder(EncoderConfig("e4e", c.layers, c.w_dim, UNITS, CHANNELS, image_size=c.size))
    encoder.latent_avg.copy_(generator.mean_w())
    return encoder


def loss_through(generator: Generator, pictures: Pictures):
    """The loss of an encoder for this generator: half of what it sees are drawn faces, half were cut from pictures."""
    who = generators.says_who(generator)

    def loss(encoder: Encoder, batch: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """Distances between codes, between who they say it is (in place of e4e's face recogniser) and between pictures;
        the deltas are what W+ has beyond W (e4e)."""
        z = generators.draw_z(batch - batch // 2, rng, generator.config.w_dim).to(encoder.latent_avg)
        rows = rng.integers(len(pictures), size=batch // 2)
        cut = pictures.get("crops", rows).to(z) * 2 - 1
        with torch.no_grad():
            faces = world.faces(z[:, : generators.FACTORS], generator.config.size) * 2 - 1
            w = torch.cat([generator.mapping(z), generators.code_of(generator, pictures.z[rows].to(z))])[:, None]
        found = encoder(moved(torch.cat([faces, cut]), rng)).float()
        drawn = slice(len(faces))
        picture = generator(found[drawn], noise="none").float()
        losses = {
            "code": (found - w)[drawn].square().mean(),
            "who": ((found - w) @ who).square().mean(),
            "picture": picture_loss(picture, faces, torch.ones_like(faces[:, :1])),
            "delta": (found - found[:, :1]).square().mean(),
        }
        weights = {"code": CODE, "who": WHO, "picture": PICTURE, "delta": DELTA}
        return losses | {"total": sum(weights[k] * x for k, x in losses.items())}

    return loss


def make(out: Path, settings: Fit, device: str, start: Path | None = None) -> Path:
    """Train it and write encoder.safetensors, the generator in it, in float16.

    start: the folder of a miniature whose encoder it begins from, in place of random weights.
    """
    generator = generators.load(out)
    encoder = load(start) if start else new_encoder(generator)
    loss = loss_through(generator.to(device), Pictures(out))
    encoder = fit(encoder, loss, settings, out / "runs" / "encoder", device)
    save_encoder(encoder.cpu().half(), out / "encoder.safetensors", generator.cpu().half())
    return out / "encoder.safetensors"


def load(out: Path, device: str = "cpu") -> Encoder:
    return load_encoder(out / "encoder.safetensors").float().to(device)
