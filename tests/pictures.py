"""Real photos for the tests: what ships with scikit-image, and the project's shared folder."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

SHARED = Path(__file__).resolve().parents[2] / "shared"


def astronaut() -> Tensor:
    """[3, 512, 512] in 0..1: one face, about 90 px wide, in the upper middle."""
    data = pytest.importorskip("skimage.data", reason="scikit-image is not installed: pip install scikit-image")
    return torch.from_numpy(data.astronaut()).permute(2, 0, 1).float() / 255


def shared(path: str) -> Path:
    """A file of the project's shared folder; skips the test where it is not there."""
    if not (SHARED / path).is_file():
        pytest.skip(f"REAL DATA MISSING: {SHARED / path} is not there, so this was not compared with the reference")
    return SHARED / path


def psnr(a: Tensor, b: Tensor) -> float:
    """dB, for pictures in 0..1."""
    return -10 * float(np.log10((a - b).square().mean().item() + 1e-12))
