"""The files of the miniature that the node pack carries: float16 safetensors, in the layouts that users' files have."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...wplus_core.checkpoints import load_adapter, save_adapter, save_generator
from ...wplus_core.files import read
from ...wplus_core.photos import save_png
from . import generator as generators
from . import world

WHOLE = (
    "numbers.json",
    "encoder.safetensors",
    "judge.safetensors",
    "where.safetensors",
    "directions/drawn.safetensors",
    "pca.safetensors",
    "base/tokenizer/vocab.json",
    "base/tokenizer/merges.txt",
    "base/tokenizer/tokenizer_config.json",
    "base/text_encoder/config.json",
    "base/text_encoder/model.safetensors",
    "base/vae/config.json",
    "base/vae/diffusion_pytorch_model.safetensors",
    "base/unet/config.json",
    "base/unet/diffusion_pytorch_model.safetensors",
)
ADAPTERS = {"adapter": "full"}
PEOPLE, SEED, CALM = 8, 21, 0.3  # on the sheet of faces, and how much of their expressions


def write(out: Path, folder: Path) -> dict[Path, int]:
    """Copy what is done so far -> the sizes in bytes. The encoder's file has the generator in it, once there is one."""
    written = [write_people(folder / "people.png")]
    alone = folder / "generator.safetensors"
    alone.unlink(missing_ok=True)
    if not (out / "encoder.safetensors").is_file():
        save_generator(generators.load(out).half(), alone)
        written.append(alone)
    for name in WHOLE:
        if (out / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            written.append(Path(shutil.copyfile(out / name, folder / name)))
    for name, training in ADAPTERS.items():
        source = out / "adapters" / f"{training}.safetensors"
        if source.is_file():
            kept = {k: v for k, v in read(source, "meta").metadata.items() if k in ("stage", "images", "weights")}
            save_adapter(load_adapter(source).half(), folder / f"{name}.safetensors", kept)
            written.append(folder / f"{name}.safetensors")
    return {file: file.stat().st_size for file in written}


def people() -> Tensor:
    """Factors [8, F] of people that nothing was trained on, as the loader's faces show them."""
    z = world.sample(PEOPLE, np.random.default_rng(SEED))
    z[:, [f.kind == "attribute" for f in world.FACTORS]] *= CALM
    return z


def write_people(path: Path) -> Path:
    """Their aligned faces, side by side."""
    save_png(torch.cat(list(world.faces(people())), 2), path)
    return path
