"""Look at the drawn world: people, what each attribute does to two of them, and scenes with their captions.

python -m comfyui_wplus.train.mini.sheet miniature_world.jpg --seed 3
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ...wplus_core.sheets import grid
from .scenes import captions, sample_scenes, scenes
from .world import FACTORS, NAMES, faces, sample

STRENGTHS = (-3, -2, -1, 0, 1, 2, 3)
ATTRIBUTES = [f for f in FACTORS if f.kind == "attribute"]


def people_sheet(rng: np.random.Generator, columns: int = 14, rows: int = 3, size: int = 96) -> Image.Image:
    return grid(faces(sample(columns * rows, rng), size), columns)


def sweep(z: Tensor, name: str) -> Tensor:
    """z [F] → [7, F], one of its factors from -3 to 3."""
    z = z.repeat(len(STRENGTHS), 1)
    z[:, NAMES.index(name)] = torch.tensor(STRENGTHS, dtype=z.dtype)
    return z


def attribute_sheet(rng: np.random.Generator, size: int = 88) -> Image.Image:
    """Two people from -3 to 3 along each attribute, the others of which are 0."""
    z = sample(2, rng)
    z[:, [NAMES.index(f.name) for f in ATTRIBUTES]] = 0
    pictures = faces(torch.cat([sweep(person, f.name) for f in ATTRIBUTES for person in z]), size)
    numbers = [f"{s:+d}" if s else "0" for s in STRENGTHS] * 2
    names = [f.name.replace("_", " ") for f in ATTRIBUTES]
    return grid(pictures, 2 * len(STRENGTHS), column_labels=numbers, row_labels=names)


def scene_sheet(rng: np.random.Generator, columns: int = 7, rows: int = 4, size: int = 192) -> Image.Image:
    """Different people in different places."""
    z, s = sample(columns * rows, rng), sample_scenes(columns * rows, rng)
    labels = [text.removeprefix("a person in ") for text in captions(s)]
    return grid(scenes(z, s, size).images, columns, labels)


def world_sheet(seed: int = 0) -> Image.Image:
    """All three, one under the other."""
    rng = np.random.default_rng(seed)
    parts = [people_sheet(rng), scene_sheet(rng), attribute_sheet(rng)]
    width = max(part.width for part in parts)
    parts = [part.resize((width, round(part.height * width / part.width)), Image.Resampling.LANCZOS) for part in parts]
    sheet = Image.new("RGB", (width, sum(part.height for part in parts)), "white")
    for n, part in enumerate(parts):
        sheet.paste(part, (0, sum(above.height for above in parts[:n])))
    return sheet


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m comfyui_wplus.train.mini.sheet", description=__doc__.split("\n")[0]
    )
    parser.add_argument("out", type=Path, help="picture to write: .jpg, .png, ...")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    world_sheet(options.seed).save(options.out, quality=80)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
