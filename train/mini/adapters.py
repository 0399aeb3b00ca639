"""The miniature's adapters, made by the project's own trainer: both stages, and the paper's ablations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...wplus_core.align import warp
from ...wplus_core.errors import WPlusError
from ...wplus_core.files import read
from ..config import Config, Keep, Optim, Speed, Track
from ..data import Writer
from ..export import export
from ..loop import train
from ..objectives import Objective
from ..views import Views, shift
from . import base, encoder, text, world
from .pictures import CROP, SIZE, Pictures

# Less than the paper's 1.5 and 1: with 1 the least of L_rec + L_reg is half way from the plain model to the person, and
# more of L_disen costs likeness, as a change of the face shows around it in any case (docs/miniature.md).
FULL = Objective(disen=0.15, reg=0.02, min_snr=5.0)
STAGE1 = Objective(min_snr=5.0)
VIEWS = Views(SIZE, erode=SIZE // 16, blur=3)  # kernels of the same share of the picture as the paper's
WEAKER, STRONGER = 0.1, 50.0  # times the weights of L_reg and of L_disen, in the ablations
DATA = ("aligned", "wild")
TRAININGS = (
    "stage1", "full", "without_disen", "stronger_disen", "without_reg", "weaker_reg", "one_stage", "parallel_stage1",
    "parallel",
)  # fmt: skip


@dataclass(frozen=True)
class Length:
    """Images and batch of both stages, and how fast."""

    stage1: int
    stage2: int
    batch: int = 32
    lr: float = 1e-3
    speed: Speed = Speed(workers=0)


def configs(out: Path, length: Length, start: Path | None = None) -> dict[str, Config]:
    """Every training by name, each after the one that it starts from.

    start: the folder of a miniature from whose adapter stage I goes on, in place of random weights.
    """
    aligned, wild = (out / "data" / name for name in DATA)
    common = dict(base=out / "base", batch=length.batch, speed=length.speed, objective=STAGE1)
    optim = Optim(lr=length.lr, warmup=500, schedule="cosine")
    keep = Keep(every=2000 - 2000 % length.batch, last=1, log=160, ema_half_life=4000)
    common |= dict(optim=optim, keep=keep, track=Track(to=()))
    first = start and start / "adapter.safetensors"
    one = Config(out / "runs" / "stage1", data=(aligned,), stage=1, images=length.stage1, adapter=first, **common)
    two = replace(
        one, run=out / "runs" / "full", data=(wild,), stage=2, adapter=out / "adapters" / "stage1.safetensors",
        train_mapping=False, images=length.stage2, objective=FULL,
    )  # fmt: skip
    parallel1 = replace(one, adapter=None, parallel=True)
    variants = {
        "without_disen": replace(two, objective=replace(FULL, disen=0.0)),
        "stronger_disen": replace(two, objective=replace(FULL, disen=STRONGER * FULL.disen)),
        "without_reg": replace(two, objective=replace(FULL, reg=0.0)),
        "weaker_reg": replace(two, objective=replace(FULL, reg=WEAKER * FULL.reg)),
        "one_stage": replace(two, adapter=None, train_mapping=True, images=length.stage1 + length.stage2),
        "parallel_stage1": parallel1,
        "parallel": replace(two, adapter=out / "adapters" / "parallel_stage1.safetensors", parallel=True),
    }
    variants = {name: replace(c, run=out / "runs" / name) for name, c in variants.items()}
    return {"stage1": one, "full": two} | variants


def make(out: Path, name: str, length: Length, start: Path | None = None) -> Path:
    """Train one of `configs` and export its moving average; WPlusError if a signal stopped it before its end."""
    config = configs(out, length, start)[name]
    images = train(config).images
    if images < config.images:
        raise WPlusError(f"{name} was stopped after {images} of {config.images} images; the same command goes on")
    export(out / "runs" / name, out / "adapters" / f"{name}.safetensors")
    return out / "adapters" / f"{name}.safetensors"


def make_data(out: Path, name: str, device: str) -> Path:
    """The prepared data set of a stage: aligned faces with neutral captions, or people in scenes with theirs.

    w is what the encoder sees in the aligned crop. The scenes are of all styles: from photos alone an adapter learns
    less well to bring a person into another. What counts in them counted for the UNet too.
    """
    pictures, words = Pictures(out), text.load(out, device)
    prompts = {p: words([p])[0].half().cpu() for p in ("", world.NEUTRAL)}
    writer = Writer(out / "data" / name, prompts)
    faces = is_aligned(pictures)
    rows = torch.from_numpy(faces if name == "aligned" else ~faces).nonzero()[:, 0]
    for sample in samples(out, pictures, rows[len(writer) :], words if name == "wild" else None, device):
        writer.append(sample)
    writer.finish()
    return out / "data" / name / "index.json"


def is_aligned(pictures: Pictures):
    return (pictures.labels[:, 0] < 0).numpy()


@torch.no_grad()
def samples(out: Path, pictures: Pictures, rows: Tensor, words, device: str) -> Iterator[dict[str, Tensor]]:
    latents, e4e = read(out / "latents.safetensors").tensors["latents"], encoder.load(out, device)
    for part in rows.split(128):
        w = e4e(pictures.get("crops", part.numpy()).to(device) * 2 - 1).half().cpu()
        points, masks = pictures.points[part], pictures.get("masks", part.numpy())
        size = latents.shape[-1]
        made = {"latents": latents[part], "weights": base.weights(masks, points, size).half()}
        if words:
            made |= {"face": crops_in(points, size).half(), "text": words(pictures.captions(part)).half().cpu()}
        for i, code in enumerate(w):
            yield {k: x[i] if k == "text" else x[i, None] for k, x in made.items()} | {"w": code}


def crops_in(points: Tensor, size: int) -> Tensor:
    """The paper's face regions [B, 1, size, size], 1 inside: the square of FFHQ's crop, eroded and blurred.

    points: [B, 5, 2] in pixels of a picture.
    """
    to_crop = torch.linalg.inv(world.ffhq(points.double(), CROP))
    framed = F.pad(torch.ones(1, 1, CROP, CROP), (1, 1, 1, 1))  # a border of 0, so that outside the crop is no face
    inside = warp(framed, shift(1) @ to_crop, (SIZE, SIZE))
    return F.adaptive_avg_pool2d(torch.stack([VIEWS.soften(x) for x in inside]), size)
