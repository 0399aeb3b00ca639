"""One small training loop for every network of the miniature, resumable at any moment.

A network is trained on data that are drawn as they are needed, by random numbers that are a function of (seed, images
so far); so a checkpoint is the weights, their moving average, the optimiser and one integer.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...wplus_core.errors import WPlusError
from ...wplus_core.files import write_torch
from ..draws import stream

log = logging.getLogger(__name__)

STATE = "state.pt"
CPU_HAS_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
Loss = Callable[[nn.Module, int, np.random.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class Fit:
    """How a network is trained. images: in all. batch: images per step. lr: Adam's, constant, then falling to zero.

    decay: the share of the training in which it falls. warmup: images in which it rises. average: the weights' moving
    average reaches back over this share of the training so far. every: images between checkpoints.
    """

    images: int
    batch: int
    lr: float
    decay: float = 0.4
    warmup: int = 500
    average: float = 0.05
    every: int = 8000

    def lr_at(self, images: int) -> float:
        rise = min(1.0, (images + 1) / max(1, self.warmup))
        return self.lr * rise * min(1.0, (1 - images / self.images) / self.decay + 1e-3)


def fit(
    network: nn.Module,
    loss: Loss,
    settings: Fit,
    folder: Path,
    device: str = "cpu",
    seed: int = 0,
    rates: Mapping[str, float] | None = None,
) -> nn.Module:
    """Train the network to settings.images, from the folder's checkpoint if it has one -> its moving average.

    loss: (network, batch, rng) -> losses by name, of which `total` is minimised. rates: factors of the learning rate,
    by the names that parameters begin with.
    """
    network = network.to(device).train().requires_grad_(True)
    average = copy.deepcopy(network).requires_grad_(False)
    optimizer = torch.optim.Adam(groups(network, rates or {}), lr=settings.lr, betas=(0.9, 0.99))
    images = resume(folder / STATE, network, average, optimizer)
    sums, count, began = {}, 0, time.perf_counter()
    while images < settings.images:
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * settings.lr_at(images)
        losses = step(network, loss, settings.batch, stream(seed, images), optimizer, device)
        images += settings.batch
        update_average(average, network, settings, images)
        sums, count = {k: sums.get(k, 0) + x for k, x in losses.items()}, count + 1
        if images % settings.every < settings.batch or images >= settings.images:
            line = {"images": images} | {k: round((x / count).item(), 5) for k, x in sums.items()}
            line |= {"images_per_s": round(count * settings.batch / (time.perf_counter() - began), 2)}
            save(folder, network, average, optimizer, images, line)
            sums, count, began = {}, 0, time.perf_counter()
    return average.eval()


def in_bfloat16(device: str) -> torch.autocast:
    """Autocast where the device computes faster in bfloat16."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda" or CPU_HAS_BFLOAT16)


def groups(network: nn.Module, rates: Mapping[str, float]) -> list[dict]:
    """The parameters by the factor of their learning rate."""
    by_rate: dict[float, list[nn.Parameter]] = {}
    for name, p in network.named_parameters():
        rate = next((r for prefix, r in rates.items() if name.startswith(prefix)), 1.0)
        by_rate.setdefault(rate, []).append(p)
    return [{"params": p, "rate": rate} for rate, p in by_rate.items()]


def step(network, loss: Loss, batch: int, rng, optimizer, device: str) -> dict[str, Tensor]:
    with in_bfloat16(device):
        losses = loss(network, batch, rng)
    losses["total"].backward()
    nn.utils.clip_grad_norm_(network.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {k: x.detach() for k, x in losses.items()}


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, settings: Fit, images: int):
    keep = 0.5 ** (settings.batch / (settings.average * images))
    for a, p in zip(average.parameters(), network.parameters(), strict=True):
        a.lerp_(p, 1 - keep)
    for a, b in zip(average.buffers(), network.buffers(), strict=True):
        a.copy_(b)


def resume(path: Path, network: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The images that the checkpoint has seen; 0 where there is none."""
    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    try:
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
    except RuntimeError as e:
        raise WPlusError(f"{path} is of another size of network; delete {path.parent} to begin anew") from e
    optimizer.load_state_dict(state["optimizer"])
    return state["images"]


def save(folder: Path, network: nn.Module, average: nn.Module, optimizer, images: int, line: dict):
    state = {"network": network.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
    write_torch(folder / STATE, state | {"images": images})
    with open(folder / "stats.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(line) + "\n")
    log.info("%s: %s", folder.name, line)
    if not all(math.isfinite(x) for x in line.values()):
        raise WPlusError(f"{folder.name}: the loss is not finite; delete {folder} and train with a lower lr")
