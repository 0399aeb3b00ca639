"""How good the miniature's networks are, on people that none of them was trained on: numbers.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...wplus_core.direction_files import load_directions
from ...wplus_core.directions import Edit, edit
from ...wplus_core.files import write_whole
from ...wplus_core.stylegan2 import Generator
from . import autoencoder, encoder, generator, judge, pictures, world
from .directions import face

SEED = 2000
STRENGTH = 2.0  # of the edits in the table of what moves what


def psnr(x: Tensor, y: Tensor) -> float:
    """Mean over pictures [B, 3, S, S] in 0..1, in dB."""
    return (-10 * (x - y).square().mean((1, 2, 3)).log10()).mean().item()


@torch.no_grad()
def of_generator(out: Path, people: int) -> dict[str, Any]:
    """PSNR of the generator's faces against the drawn ones."""
    g, w, factors = people_of(out, people)
    return {"generator_psnr_db": psnr(face(g, w), world.faces(factors, g.config.size))}


@torch.no_grad()
def of_encoder(out: Path, people: int) -> dict[str, Any]:
    """PSNR of the faces that come back through encoder and generator, the error in the code by W's spread, and how the
    factors that the codes say correlate with the true ones."""
    g, w, factors = people_of(out, people)
    drawn = world.faces(factors, g.config.size)
    found = encoder.load(out)(drawn * 2 - 1)
    error = (found - w).square().mean() / (w - w.mean(0)).square().mean()
    said = found.mean(1) @ generator.says_who(g)
    tells = [torch.corrcoef(torch.stack(pair))[0, 1].item() for pair in zip(said.T, factors.T, strict=True)]
    return {
        "encoder_psnr_db": psnr(face(g, found), drawn),
        "encoder_code_error": error.sqrt().item(),
        "encoder_tells": rounded(dict(zip(world.NAMES, tells, strict=True))),
    }


def people_of(out: Path, count: int) -> tuple[Generator, Tensor, Tensor]:
    """The generator, and people's codes [count, L, w_dim] and factors [count, F]."""
    g = generator.load(out)
    z = generator.draw_z(count, np.random.default_rng(SEED), g.config.w_dim)
    return g, g.mapping(z)[:, None].expand(-1, g.config.layers, -1), z[:, : generator.FACTORS]


def of_judge(out: Path, people: int) -> dict[str, Any]:
    """What it sees rightly in drawn pictures."""
    found = judge.accuracy(judge.load(out), people, SEED)
    return {"judge": {k: rounded(v) if isinstance(v, dict) else round(v, 3) for k, v in found.items()}}


@torch.no_grad()
def of_directions(out: Path, people: int) -> dict[str, Any]:
    """What the judge sees move when an attribute is edited by STRENGTH, and when it is drawn that much stronger."""
    (g, w, factors), read = people_of(out, people), judge.load(out).reader.read_face
    plain, drawn = read(face(g, w)), read(world.faces(factors, g.config.size))
    table: dict[str, dict] = {"edit_moves": {}, "drawn_moves": {}}
    for d in load_directions(out / "directions" / "drawn.safetensors"):
        i = world.NAMES.index(d.name)
        if world.FACTORS[i].kind == "attribute":
            stronger = factors + STRENGTH * torch.eye(len(world.NAMES))[i]
            table["edit_moves"][d.name] = named(read(face(g, edit(w, [Edit(d, STRENGTH)]))) - plain)
            table["drawn_moves"][d.name] = named(read(world.faces(stronger, g.config.size)) - drawn)
    return {"edit_strength": STRENGTH, **table}


def of_autoencoder(out: Path, people: int) -> dict[str, Any]:
    drawn = pictures.draw(people, np.random.default_rng(SEED))["images"]
    return {"autoencoder_psnr_db": psnr(autoencoder.restored(autoencoder.load(out), drawn), drawn)}


def named(moves: Tensor) -> dict[str, float]:
    """Factors [B, F] -> their means over the people, by name."""
    return rounded(dict(zip(world.NAMES, moves.mean(0).tolist(), strict=True)))


def rounded(numbers: dict[str, float]) -> dict[str, float]:
    return {k: round(x, 3) for k, x in numbers.items()}


def has(*files: str) -> Callable[[Path], bool]:
    return lambda out: all((out / file).is_file() for file in files)


JUDGE = "judge.safetensors", "where.safetensors"
MEASURES: tuple[tuple[Callable[[Path], bool], Callable[[Path, int], dict[str, Any]]], ...] = (
    (has(*JUDGE), of_judge),
    (lambda out: generator.file_in(out).is_file(), of_generator),
    (has("encoder.safetensors"), of_encoder),
    (has("pca.safetensors", *JUDGE), of_directions),
    (has("base/vae/config.json"), of_autoencoder),
)


def make(out: Path, people: int) -> Path:
    """Measure what is there."""
    found: dict[str, Any] = {"people": people}
    for ready, measure in MEASURES:
        if ready(out):
            found |= measure(out, people)
    found = {k: round(x, 4) if isinstance(x, float) else x for k, x in found.items()}
    write_whole(out / "numbers.json", lambda p: p.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8"))
    return out / "numbers.json"
