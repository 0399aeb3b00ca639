"""A code made more like its photo: a short optimisation through the generator.

e4e trades detail for editability (Tov et al.). This takes some of the detail back while a pull towards the average
face keeps the code where directions work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from .background import resize
from .errors import WPlusError
from .identity import Identity
from .photos import check_pixels
from .stylegan2 import Generator

Progress = Callable[[int, int, float], bool | None]


@dataclass(frozen=True)
class RefineConfig:
    """steps: at most. rate: Adam's. average: weight of the mean squared distance to the average code.

    patience: steps without an improvement of 0.1 % after which it stops. size: side at which pictures are compared.
    render: stop the generator at this size; much quicker, but what it paints above, light and colour too, goes unseen.
    """

    steps: int = 100
    rate: float = 0.02
    average: float = 0.01
    patience: int = 20
    size: int = 256
    render: int | None = None


def refine(
    identity: Identity,
    target: Tensor,
    generator: Generator,
    average: Tensor | None = None,
    mask: Tensor | None = None,
    config: RefineConfig | None = None,
    progress: Progress | None = None,
) -> Identity:
    """Codes [B, L, 512] whose pictures come closer to the aligned faces target [B, 3, S, S] in 0..1.

    average: [L, 512], the encoder's latent_avg; without it the code is held near where it started. mask: [B, 1, S, S],
    1 where pictures are compared. progress: called with (step, steps, loss) and stops the run by returning False; what
    was best so far is kept. The loss curve goes to provenance["refine"]. Works inside torch.inference_mode().
    """
    config = config or RefineConfig()
    target = check_pixels(target, "target", batch=True)
    _check(identity, target, generator, mask)
    with torch.inference_mode(False), torch.enable_grad():
        device = next(generator.parameters()).device
        start = identity.w.to(device, copy=True)
        anchor = start if average is None else average.to(device, torch.float32, copy=True)
        size = min(config.size, generator.config.size)
        x = resize(target.to(device, copy=True), size) * 2 - 1
        m = torch.ones_like(x[:, :1]) if mask is None else mask.to(x, copy=True)
        m = F.interpolate(m, x.shape[2:], mode="area")
        render = _renderer(generator, size, config.render)

        def objective(w: Tensor) -> Tensor:
            return picture_loss(render(w), x, m) + config.average * F.mse_loss(w, anchor.expand_as(w))

        best, losses = _descend(start, objective, config, progress)
    record = {"losses": [round(v, 6) for v in losses], "average": config.average, "size": size}
    return replace(identity, w=best.to(identity.w.device), provenance=identity.provenance | {"refine": record})


def picture_loss(x: Tensor, y: Tensor, mask: Tensor, smallest: int = 16) -> Tensor:
    """L1 of pictures [B, 3, S, S] and of their gradients, averaged over a pyramid down to `smallest` pixels."""
    losses = []
    while True:
        e = (x - y) * mask
        losses.append(e.abs().mean() + e.diff(dim=-1).abs().mean() + e.diff(dim=-2).abs().mean())
        if x.shape[-1] // 2 < smallest:
            return torch.stack(losses).mean()
        x, y, mask = (F.avg_pool2d(t, 2) for t in (x, y, mask))


def _descend(w: Tensor, objective: Callable[[Tensor], Tensor], config: RefineConfig, progress: Progress | None):
    """Adam on w → the best w and the loss at every step."""
    w = w.clone().requires_grad_()
    adam = torch.optim.Adam([w], lr=config.rate)
    best, losses, since = w.detach().clone(), [], 0
    for step in range(config.steps):
        loss = objective(w)
        value = loss.item()
        since = 0 if not losses or value < min(losses) * 0.999 else since + 1
        if not losses or value < min(losses):
            best = w.detach().clone()
        losses.append(value)
        if since >= config.patience or (progress and progress(step + 1, config.steps, value) is False):
            break
        (w.grad,) = torch.autograd.grad(loss, w)
        adam.step()
    return best, losses


def _renderer(generator: Generator, size: int, largest: int | None) -> Callable[[Tensor], Tensor]:
    """w → picture of this size, through weights that autograd may save even if they were made in inference mode."""
    tensors = dict(generator.named_parameters()) | dict(generator.named_buffers())
    tensors = {k: v.clone() if v.is_inference() else v for k, v in tensors.items()}
    dtype = next(generator.parameters()).dtype

    def render(w: Tensor) -> Tensor:
        image = functional_call(generator, tensors, (w.to(dtype),), {"noise": "fixed", "max_resolution": largest})
        return F.interpolate(image.float(), (size, size), mode="area" if image.shape[-1] >= size else "bilinear")

    return render


def _check(identity: Identity, target: Tensor, generator: Generator, mask: Tensor | None) -> None:
    b, layers, _ = identity.w.shape
    if layers != generator.config.layers:
        raise WPlusError(
            f"the code has {layers} layers, this generator {generator.config.layers}; choose the one it was made for"
        )
    if len(target) != b:
        raise WPlusError(f"target: expected {b} aligned faces, one per code, got {len(target)}")
    if mask is not None and (mask.ndim != 4 or mask.shape[:2] != (b, 1)):
        raise WPlusError(f"mask: expected [{b}, 1, S, S], got {list(mask.shape)}")
