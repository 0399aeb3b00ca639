"""The miniature's StyleGAN2: trained by regression, since here every code's face is known.

The renderer's factors are the first numbers of the generator's own normal vector z, after its normalisation to the
sphere; the others are free. So the mapping network, the average face, PCA and truncation are those of any StyleGAN2,
and `code_of` gives the code of any drawn person.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...wplus_core.checkpoints import load_generator, save_generator
from ...wplus_core.refine import picture_loss
from ...wplus_core.stylegan2 import Generator, GeneratorConfig
from . import critic as critics
from . import world
from .fit import STATE, Fit, fit

CONFIG = GeneratorConfig(channels=(128, 128, 64, 32, 16), w_dim=64, mapping_layers=2)
JITTER = 0.05  # of w, on every layer by itself: near codes give the same face, so W+ is smooth about W
MAPPING_RATE = 100.0  # undoes the mapping's lr_mul of 0.01: here it learns a known function, not one that a game moves
FOCUS = 4.0  # the weight that the middle of the face has more than its border
GROWTH = {16: 0.1, 32: 0.15, 64: 0.75}  # shares of the images on which it is trained up to this resolution
CRITIC = 0.1  # the weight of what the critic reads: it counts a smile as much as the hair's colour
CRITICISED = 0.5  # of each batch
TOLD = 0.1  # the weight of what w tells of the factors: those that change few pixels would be lost on the way to w
CODES = 4096  # from which it is known what w tells
FACTORS = len(world.FACTORS)


def new_generator(config: GeneratorConfig = CONFIG) -> Generator:
    """An untrained generator whose mapping turns W without squeezing it: a step in a factor is a step in w."""
    torch.manual_seed(0)
    generator = Generator(config)
    for layer in generator.style[1:]:
        nn.init.orthogonal_(layer.weight, gain=math.sqrt(config.w_dim) / layer.lr_mul)
    return generator


def draw_z(n: int, rng: np.random.Generator, dim: int = CONFIG.w_dim) -> Tensor:
    """n vectors [n, dim] on the sphere of radius sqrt(dim), as the mapping network sees them."""
    z = torch.from_numpy(rng.standard_normal((n, dim), dtype=np.float32))
    return z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def complete(factors: Tensor, dim: int = CONFIG.w_dim) -> Tensor:
    """Factors [n, F] -> z [n, dim] on the sphere that carries them, the free numbers all equal."""
    rest = (dim - factors.square().sum(1, keepdim=True)).clamp(min=0) / (dim - factors.shape[1])
    return torch.cat([factors, rest.sqrt().expand(-1, dim - factors.shape[1])], 1)


def code_of(generator: Generator, factors: Tensor) -> Tensor:
    """Factors [n, F] -> w [n, w_dim]."""
    return generator.mapping(complete(factors, generator.config.w_dim).to(generator.style[1].weight))


@torch.no_grad()
def says_who(generator: Generator) -> Tensor:
    """[w_dim, F], which takes differences of codes to those of the factors that they stand for (least squares).

    Most of W's spread is the hair's and the skin's: a plain distance of codes hardly counts a nose.
    """
    z = draw_z(CODES, np.random.default_rng(3), generator.config.w_dim).to(generator.style[1].weight)
    w = generator.mapping(z)
    return torch.linalg.lstsq(w - w.mean(0), z[:, :FACTORS]).solution


def loss_at(resolution: int, who: Tensor, critic: critics.Critic | None = None):
    """The loss of the generator's pictures up to a resolution; the critic reads the largest. who: see `says_who`."""

    def loss(generator: Generator, batch: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """L1 of pictures and gradients over scales, to the face drawn from the same factors; and that the codes of any
        two tell in what they differ."""
        z = draw_z(batch, rng, generator.config.w_dim).to(generator.input.input.device)
        w = generator.mapping(z)
        codes = w[:, None].expand(-1, generator.config.layers, -1)
        noise = torch.from_numpy(rng.standard_normal(tuple(codes.shape), dtype=np.float32)).to(w)
        x = generator(codes + JITTER * noise, noise="none", max_resolution=resolution).float()
        faces = world.faces(z[:, :FACTORS], generator.config.size) * 2 - 1
        faces = F.adaptive_avg_pool2d(faces, x.shape[2:])
        differ = (w - w.roll(1, 0)) @ who, (z - z.roll(1, 0))[:, :FACTORS]
        losses = {"mse": F.mse_loss(x, faces), "told": F.mse_loss(*differ)}
        losses["total"] = picture_loss(x, faces, focus(x)) + TOLD * losses["told"]
        if critic:
            seen, real = (critic(y[: round(CRITICISED * batch)] / 2 + 0.5) for y in (x, faces))
            losses["read"] = F.mse_loss(seen.float(), real.float())
            losses["total"] = losses["total"] + CRITIC * losses["read"]
        return losses

    return loss


def focus(x: Tensor) -> Tensor:
    """Weights [B, 1, S, S] for pictures x [B, 3, S, S]: eyes and mouth are small, but they are the expression."""
    i = (torch.arange(x.shape[-1], device=x.device) + 0.5) / x.shape[-1]
    distance = ((i - 0.5).square() + (i[:, None] - 0.58).square()).sqrt()  # to between the eyes and the mouth
    return (1 + FOCUS * (1 - distance / 0.35).clamp(0, 1)).expand(len(x), 1, -1, -1)


def make(out: Path, settings: Fit, device: str, config: GeneratorConfig = CONFIG) -> Path:
    """Train it, growing, and write generator.safetensors with its average w."""
    generator, critic = new_generator(config), critics.load(out, device)
    who = says_who(generator).to(device)
    folders = {resolution: out / "runs" / f"generator_{resolution}" for resolution in GROWTH}
    begun = [resolution for resolution, folder in folders.items() if (folder / STATE).is_file()]
    for resolution in [r for r in GROWTH if r >= max(begun, default=0)]:
        part = replace(settings, images=max(settings.batch, round(GROWTH[resolution] * settings.images)))
        loss = loss_at(resolution, who, critic if resolution == config.size else None)
        generator = fit(generator, loss, part, folders[resolution], device, rates={"style.": MAPPING_RATE})
    generator.cpu()
    save_generator(generator, out / "generator.safetensors", generator.mean_w())
    return out / "generator.safetensors"


def file_in(out: Path) -> Path:
    """Of the folder that it was trained in, or of the pack, where the encoder's file carries it."""
    alone = out / "generator.safetensors"
    return alone if alone.is_file() else out / "encoder.safetensors"


def load(out: Path, device: str = "cpu") -> Generator:
    return load_generator(file_in(out)).float().to(device)
