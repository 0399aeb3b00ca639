"""Weights as a function of (seed, key, shape): the recipe of the golden tensors."""

import math
import zlib

import torch
from torch import Tensor, nn

KEPT = ("kernel", "position_ids")


def seeded_tensor(key: str, shape: torch.Size, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{key}".encode()))
    if key.endswith("running_var"):
        return 0.5 + torch.rand(shape, generator=g)
    if key.endswith(("running_mean", "bias")):
        return 0.1 * torch.randn(shape, generator=g)
    if len(shape) <= 1:
        return 1.0 + 0.1 * torch.randn(shape, generator=g)
    return torch.randn(shape, generator=g) / math.sqrt(math.prod(shape[1:]))


def seeded_state(template: dict[str, Tensor], seed: int, prefix: str = "") -> dict[str, Tensor]:
    """Fill a state dict by the recipe; the key that counts is prefix + key. Integers and kernels stay."""
    return {
        k: seeded_tensor(prefix + k, x.shape, seed) if x.is_floating_point() and k.rsplit(".", 1)[-1] not in KEPT else x
        for k, x in template.items()
    }


def seed_(module: nn.Module, seed: int, prefix: str = "") -> nn.Module:
    """Fill a module in place by the recipe, ready for inference."""
    module.load_state_dict(seeded_state(module.state_dict(), seed, prefix), assign=True)
    return module.eval().requires_grad_(False)
