"""Make the miniature from nothing: a drawn world, and a whole W+ pipeline of a few megabytes trained on it.

    python -m comfyui_wplus.train.mini OUT                      all parts, one after the other
    python -m comfyui_wplus.train.mini OUT --parts unet stage1  these alone
    python -m comfyui_wplus.train.mini OUT --pack miniature     and the files that the pack carries, into that folder

Every part is left out when its file is there, and goes on from its last checkpoint when it was killed; so the same
command again resumes. On a GPU it takes about ten minutes; on a CPU (--settings cpu, the default there) some hours.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from ...wplus_core.errors import WPlusError
from . import (
    adapters,
    autoencoder,
    base,
    critic,
    directions,
    encoder,
    generator,
    judge,
    numbers,
    pack,
    pictures,
    settings,
    text,
)
from .command import run

log = logging.getLogger(__name__)


def parts(
    out: Path, s: settings.Settings, device: str, start: Path | None = None
) -> dict[str, tuple[Path, Callable[[], Path]]]:
    """By name, in order: the file that tells that the part is done, and what makes it."""
    table = {
        "critic": ("critic.safetensors", lambda: critic.make(out, s.critic, device)),
        "generator": ("generator.safetensors", lambda: generator.make(out, s.generator, device)),
        "judge": ("judge.safetensors", lambda: judge.make(out, s.judge, device)),
        "where": ("where.safetensors", lambda: judge.make_where(out, s.where, device)),
        "pictures": ("pictures/truth.safetensors", lambda: pictures.make(out, s.pictures, device)),
        "encoder": ("encoder.safetensors", lambda: encoder.make(out, s.encoder, device, start)),
        "directions": (
            "pca.safetensors",
            lambda: directions.make(out, s.people, s.directions, s.least_accuracy, s.least_shown),
        ),
        "text": ("base/text_encoder/model.safetensors", lambda: text.make(out, s.text, device, start)),
        "autoencoder": ("base/vae/config.json", lambda: autoencoder.make(out, s.autoencoder, device)),
        "latents": ("latents.safetensors", lambda: base.make_latents(out, device)),
        "unet": ("base/unet/config.json", lambda: base.make(out, s.unet, device, start)),
    }
    for name in adapters.DATA:
        table[f"{name}_data"] = f"data/{name}/index.json", lambda name=name: adapters.make_data(out, name, device)
    for name in adapters.TRAININGS:
        table[name] = f"adapters/{name}.safetensors", lambda name=name: adapters.make(out, name, s.adapters, start)
    return {name: (out / file, make) for name, (file, make) in table.items()}


def make_parts(out: Path, s: settings.Settings, device: str, only: tuple[str, ...] = (), start: Path | None = None):
    """Make what is not there yet, in order."""
    table = parts(out, s, device, start)
    if unknown := set(only) - set(table):
        raise WPlusError(f"no such parts: {sorted(unknown)}; there are {', '.join(table)}")
    for name, (file, make) in table.items():
        if (not only or name in only) and not file.exists():
            log.info("%s: begins", name)
            make()
            log.info("%s: done", name)


def main(
    out: Annotated[Path, tyro.conf.Positional],
    parts: tuple[str, ...] = (),
    settings_name: Annotated[Literal["auto", "cpu", "gpu", "tiny"], tyro.conf.arg(name="settings")] = "auto",
    start: Path | None = None,
    pack_into: Annotated[Path | None, tyro.conf.arg(name="pack")] = None,
):
    """Make the miniature.

    Args:
        out: the folder that everything is made in.
        parts: the parts to make, all if none is named.
        settings_name: how long each part is trained.
        start: a miniature, such as the pack's, from whose encoder, UNet and adapter the training goes on, and whose
            words keep their meaning.
        pack_into: where to write the files that the pack carries.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = {"auto": device, "gpu": "cuda"}.get(settings_name, settings_name)
    lengths = {"cpu": settings.CPU, "cuda": settings.GPU, "tiny": settings.TINY}[chosen]
    make_parts(out, lengths, device, parts, start)
    if pack_into or not parts:
        numbers.make(out, lengths.people)
    if pack_into:
        for file, size in pack.write(out, pack_into).items():
            print(f"{file}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    run(main, "mini", __doc__)
