"""Look at a prepared data set: is it whole, do its numbers make sense, and what does it show?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from ..wplus_core.errors import FileError
from ..wplus_core.files import read
from ..wplus_core.sheets import grid
from .data import AGAIN, Prepared, read_about
from .draws import VIEWS, stream
from .sampling import decode
from .views import from_jpeg

NAMED = 3  # samples that a message names
DAMAGED = "Delete it, and give the same `prepare` command again"
FEW_CODES = 0.5  # different codes for each sample; with no more the encoder is not what it should be
TILES, COLUMNS, TILE = 24, 6, 256
DIM = 0.4  # of a picture outside the face, on the sheet


def check(folder: str | Path) -> int:
    """Print what is wrong with a data set and what to do, or else its summary; returns 1 or 0."""
    folder = Path(folder)
    problems = list(faults(folder))
    for problem in problems:
        print(problem)
    if not problems:
        print(describe(Prepared(folder)))
    return int(bool(problems))


def faults(folder: Path) -> Iterator[str]:
    """Everything that is wrong, in words, with what to do."""
    settings = folder / "settings.json"
    if settings.is_file() and not (folder / "index.json").is_file():
        shards = len(list(folder.glob("shard-*.safetensors")))
        yield f"{folder}: not complete ({shards} shards so far). Give the same `prepare` command again: it goes on"
        return
    try:
        data = Prepared(folder)
        yield from prompt_faults(data)
    except FileError as e:
        yield str(e)
        return
    codes = []
    for shard in data.index.shards:
        path = folder / shard["file"]
        try:
            tensors, rows = read(path).tensors, read_about(path)["rows"]
        except FileError as e:
            yield f"{path}: {e.problem}. {DAMAGED}"
            continue
        width = codes[0].shape[-1] if codes else None
        found = list(shard_faults(data, tensors, rows, shard["count"], width))
        yield from (f"{path}: {problem}. {DAMAGED}" for problem in found)
        codes += [] if found else [tensors["w"].float()]
    if codes:
        yield from code_faults(folder, torch.cat(codes))


def prompt_faults(data: Prepared) -> Iterator[str]:
    prompts, path = data.prompts, data.folder / "prompts.safetensors"
    if not data.index.prompts or data.index.prompts[0] != "":
        yield f'{data.folder}: its first prompt must be "" (for dropped text), got {data.index.prompts[:1]}. {AGAIN}'
    if prompts.ndim != 3 or not prompts.isfinite().all():
        yield f"{path}: expected finite numbers [P, 77, 768], got {list(prompts.shape)}. {AGAIN}"
    if "text" not in data[0] and len(data.index.prompts) < 2:
        yield f'{data.folder}: its samples have no captions, and there are no prompts but "". {AGAIN}'


def shard_faults(
    data: Prepared, tensors: dict[str, Tensor], rows: list[dict], count: int, width: int | None
) -> Iterator[str]:
    """width: of the codes in the shards before, None for any."""
    index = data.index
    h, w = index.latent_size
    text = tuple(data.prompts.shape[1:])
    shapes = {"w": (index.w_layers, width), "text": text, "latents": (None, 8, h, w), "face": (None, 1, h, w)}
    shapes |= {"weights": (None, 1, h, w), "mask": (1, None, None), "to_mask": (3, 3), "picture_ends": ()}
    needed = {"picture", "picture_ends", "mask", "to_mask"} if data.views else {"latents"}
    if missing := (needed | {"w"}) - tensors.keys():
        yield f"it has no {sorted(missing)}"
        return
    if len(rows) != count:
        yield f"the index says {count} samples, the shard {len(rows)}"
        return
    for name, shape in shapes.items():
        x = tensors.get(name)
        if x is not None and not fits(x.shape, (count, *shape)):
            wanted = ", ".join("any" if n is None else str(n) for n in (count, *shape))
            yield f"{name} is {list(x.shape)}, expected [{wanted}]"
            return
    for problem, bad in bad_rows(data, tensors, count):
        if bad:
            names = ", ".join(str(rows[i].get("name", f"sample {i}")) for i in bad[:NAMED])
            yield f"{problem} in {len(bad)} of {count} samples ({names}{', ...' if len(bad) > NAMED else ''})"


def fits(shape: torch.Size, wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(b in (None, a) for a, b in zip(shape, wanted, strict=True))


def bad_rows(data: Prepared, tensors: dict[str, Tensor], count: int) -> Iterator[tuple[str, list[int]]]:
    """What can be wrong with a sample, and which are so."""
    for name, x in tensors.items():
        if x.is_floating_point():
            yield f"NaN or Inf in `{name}`", where(~x.flatten(1).isfinite().all(1))
    if "latents" in tensors:
        yield "a standard deviation below 0 in `latents`", where((tensors["latents"][:, :, 4:] < 0).flatten(1).any(1))
    if "face" in tensors:
        faces = tensors["face"].flatten(1)
        yield "`face` outside 0..1", where((faces < 0).any(1) | (faces > 1).any(1))
        yield "no face in `face`", where(~(faces > 0).any(1))
    if "weights" in tensors:
        weights = tensors["weights"].flatten(2)
        yield "`weights` below 0, or nothing but 0", where(((weights < 0).any(2) | ~(weights > 0).any(2)).any(1))
    if data.views:
        yield "a picture that cannot be decoded", [i for i in range(count) if not decodes(tensors, i)]


def where(bad: Tensor) -> list[int]:
    return bad.nonzero().flatten().tolist()


def decodes(tensors: dict[str, Tensor], i: int) -> bool:
    ends = tensors["picture_ends"]
    try:
        return from_jpeg(tensors["picture"][(ends[i - 1] if i else 0) : ends[i]]).ndim == 3
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for damaged files
        return False


def code_faults(folder: Path, w: Tensor) -> Iterator[str]:
    different = len(w.unique(dim=0))
    if len(w) > 1 and different <= FEW_CODES * len(w):
        yield (
            f"{folder}: only {different} different codes in {len(w)} samples. Are the pictures different, is the "
            f"encoder trained? {AGAIN}"
        )


def describe(data: Prepared) -> str:
    """A few lines on a whole data set."""
    index, rows = data.index, [read_about(data.folder / s["file"])["rows"] for s in data.index.shards]
    w = torch.stack([data.w(i) for i in range(len(data))])
    sample = data[0]
    captions = [about["caption"] for some in rows for about in some if about.get("caption")]
    kept = "pictures, encoded in training" if data.views else f"latents, {len(sample['latents'])} of each"
    text = f"{len(set(captions))} different captions" if "text" in sample else f"{len(index.prompts) - 1} prompts"
    spread = (w - w.mean(0)).square().mean().sqrt() if len(w) > 1 else torch.tensor(0.0)
    lines = [
        f"{data.folder}: {len(data)} samples in {len(index.shards)} shards, nothing wrong",
        f"  {kept}; latent size {index.latent_size[0]} x {index.latent_size[1]}, {text}",
        f"  codes {list(w.shape[1:])}: mean {w.mean():.3f}, spread {spread:.3f}, {len(w.unique(dim=0))} different",
    ]
    return "\n".join(lines)


def sheet(data: Prepared, vae: AutoencoderKL) -> Image.Image:
    """Some samples as the trainer sees them, decoded from their latents, with what is not the face dimmed."""
    count = min(TILES, len(data))
    numbers = [i * len(data) // count for i in range(count)]
    tiles = [tile(data, vae, i) for i in numbers]
    return grid(tiles, min(COLUMNS, count), [label(data.about(i)) for i in numbers])


def tile(data: Prepared, vae: AutoencoderKL, i: int) -> Tensor:
    sample = data[i]
    if data.views:
        picture, face = data.draw(stream(0, VIEWS, i), sample)
    else:
        z0 = sample["latents"][0, :4].float() * data.index.scaling_factor
        picture, face = decode(vae, z0[None])[0].cpu(), sample["face"][0].float() if "face" in sample else None
    if face is not None:
        face = F.interpolate(face[None], picture.shape[-2:], mode="bilinear")[0]
        picture = picture * (DIM + (1 - DIM) * face)
    small = F.interpolate(picture[None], (TILE, TILE), mode="bilinear", antialias=True)
    return small[0].clamp(0, 1)


def label(about: dict[str, Any]) -> str:
    return str(about.get("caption") or about.get("name", ""))
