"""Look at the drawn world: people, what each attribute does to two of them, and all places and styles.

python -m comfyui_wplus.train.mini.sheet miniature_world.jpg --seed 3
python -m comfyui_wplus.train.mini.sheet miniature_faces.png --edits miniature   what the generator makes of codes
python -m comfyui_wplus.train.mini.sheet miniature_scenes.jpg --painted miniature   and what the adapter does
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ...wplus_core.checkpoints import load_adapter
from ...wplus_core.direction_files import load_directions
from ...wplus_core.directions import Edit, edit
from ...wplus_core.sheets import grid
from ..sampling import Sampling, decode, noise
from ..sampling import sample as sample_latents
from . import autoencoder, base, encoder, generator, pack, text
from .directions import face
from .evaluation import LATENT, Size
from .pictures import SIZE
from .scenes import LABELS, sample_scenes, scenes
from .witness import PROMPTS
from .world import FACTORS, NAMES, NEUTRAL, faces, sample

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


def scene_sheet(rng: np.random.Generator, size: int = 128) -> Image.Image:
    """One person in all places for each style; clothes, light and pose as they come."""
    places, styles = LABELS["place"], LABELS["style"]
    n, columns = len(places) * len(styles), torch.arange(len(places)).repeat(len(styles))
    s = replace(sample_scenes(n, rng), place=columns, style=torch.arange(n) // len(places))
    z = sample(len(styles), rng).repeat_interleave(len(places), 0)
    return grid(scenes(z, s, size).images, len(places), column_labels=places, row_labels=styles)


def world_sheet(seed: int = 0, width: int = 900) -> Image.Image:
    """All three, one under the other."""
    rng = np.random.default_rng(seed)
    parts = [people_sheet(rng), scene_sheet(rng), attribute_sheet(rng)]
    parts = [part.resize((width, round(part.height * width / part.width)), Image.Resampling.LANCZOS) for part in parts]
    sheet = Image.new("RGB", (width, sum(part.height for part in parts)), "white")
    for n, part in enumerate(parts):
        sheet.paste(part, (0, sum(above.height for above in parts[:n])))
    return sheet


EDITS = {"smile": (2, -2), "eyes_open": (-2,), "age": (2.5,), "glasses": (3,), "turn": (2,)}


@torch.no_grad()
def edits_sheet(folder: Path, rows: Sequence[int] = (0, 3, 4), size: int = 96) -> Image.Image:
    """Some of the loader's people as they are drawn, encoded, and edited, by the networks of a folder."""
    painter, known = generator.load(folder), load_directions(folder / "directions" / "drawn.safetensors")
    by_name = {d.name: d for d in known}
    edits = [Edit(by_name[name], s) for name, strengths in EDITS.items() for s in strengths]
    drawn = faces(pack.people()[list(rows)])
    w = encoder.load(folder)(drawn * 2 - 1)
    columns = [drawn, face(painter, w), *(face(painter, edit(w, [e])) for e in edits)]
    pictures = F.interpolate(torch.stack(columns, 1).flatten(0, 1), size=size, mode="bilinear")
    names = [f"{e.direction.name.replace('_', ' ')} {e.strength:+g}" for e in edits]
    return grid(pictures, len(columns), column_labels=["drawn", "encoded", *names])


SHOTS = (NEUTRAL, *tuple(PROMPTS)[:4])


@torch.no_grad()
def painted_sheet(folder: Path) -> Image.Image:
    """The loader's people as they are drawn, and painted by the adapter: the same noise along a row."""
    drawn = faces(pack.people(), SIZE)
    w = encoder.load(folder)(faces(pack.people()) * 2 - 1)
    adapter, words = load_adapter(folder / "adapter.safetensors").float(), text.load(folder)
    unet, vae, how = base.load(folder), autoencoder.load(folder), Sampling(Size.steps, Size.guidance)
    rows = [drawn]
    for n, prompt in enumerate(SHOTS):
        c, start = words([prompt]).expand(len(w), -1, -1), noise([(n,)] * len(w), LATENT)
        rows.append(decode(vae, sample_latents(unet, adapter, w, c, words([""])[0], start, how)))
    labels = ["drawn", *(prompt.removeprefix("a person in ") for prompt in SHOTS)]
    return grid(torch.cat(rows), len(w), row_labels=labels)


def main(args: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m comfyui_wplus.train.mini.sheet", description=__doc__.split("\n")[0]
    )
    parser.add_argument("out", type=Path, help="picture to write: .jpg, .png, ...")
    parser.add_argument("--seed", type=int, default=0)
    of = parser.add_mutually_exclusive_group()
    of.add_argument("--edits", type=Path, metavar="MINIATURE", help="edited faces, by the networks of this folder")
    of.add_argument("--painted", type=Path, metavar="MINIATURE", help="people by the adapter of this folder")
    options = parser.parse_args(args)
    if options.painted:
        sheet = painted_sheet(options.painted)
    else:
        sheet = edits_sheet(options.edits) if options.edits else world_sheet(options.seed)
    sheet.save(options.out, quality=80)
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
