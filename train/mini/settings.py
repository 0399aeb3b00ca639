"""How long each part of the miniature is trained: by the core-hour on a CPU, and on a GPU in ten minutes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config import Speed
from . import world
from .adapters import Length
from .directions import LEAST, SHOWN
from .fit import CPU_HAS_BFLOAT16, Fit


@dataclass(frozen=True)
class Settings:
    """The lengths of the parts, by name. pictures: how many are drawn. people: how many things are measured on.

    directions: the factors that get one, if the codes tell them with at least this accuracy, and the generator shows at
    least this part of them.
    """

    generator: Fit = Fit(240_000, 8, 2e-2, every=2000)
    critic: Fit = Fit(24_000, 16, 2e-3, every=2000)
    encoder: Fit = Fit(96_000, 16, 2e-3, every=1600)
    judge: Fit = Fit(64_000, 16, 2e-3, every=1600)
    where: Fit = Fit(48_000, 64, 2e-3, every=3200)
    pictures: int = 32_768
    text: Fit = Fit(25_600, 32, 1e-3, every=3200)
    autoencoder: Fit = Fit(96_000, 8, 1e-3, every=1600)
    unet: Fit = Fit(240_000, 64, 1e-3, every=3200)
    adapters: Length = Length(72_000, 48_000, 8, speed=Speed("bf16" if CPU_HAS_BFLOAT16 else "fp32", workers=0))
    people: int = 256
    directions: tuple[str, ...] = world.NAMES
    least_accuracy: float = LEAST
    least_shown: float = SHOWN


CPU = Settings()
GPU = Settings(
    generator=Fit(1_000_000, 64, 2e-2, every=100_000),
    critic=Fit(500_000, 128, 1e-3, every=100_000),
    encoder=Fit(500_000, 128, 2e-3, every=100_000),
    judge=Fit(500_000, 128, 2e-3, every=100_000),
    where=Fit(500_000, 256, 2e-3, every=100_000),
    pictures=65_536,
    text=Fit(50_000, 128, 5e-4, every=50_000),
    autoencoder=Fit(300_000, 64, 1e-3, every=100_000),
    unet=Fit(3_000_000, 256, 1e-3, every=200_000),
    adapters=Length(128_000, 128_000, 64, 5e-4, Speed("bf16", channels_last=True)),
)
TINY = Settings(
    generator=Fit(4, 2, 2e-3),
    critic=Fit(4, 2, 1e-3),
    encoder=Fit(4, 2, 1e-3),
    judge=Fit(4, 2, 1e-3),
    where=Fit(8, 4, 1e-3),
    pictures=32,
    text=Fit(4, 2, 5e-4),
    autoencoder=Fit(4, 2, 1e-3),
    unet=Fit(4, 2, 1e-3),
    adapters=Length(4, 4, 2),
    people=48,
    directions=("smile",),
    least_accuracy=0.0,
    least_shown=-math.inf,
)
