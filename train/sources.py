"""Reading pictures: the face found, cropped and judged by the rules of the data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..wplus_core.align import align
from ..wplus_core.background import resize
from ..wplus_core.encode import CROP
from ..wplus_core.errors import FileError, WPlusError
from ..wplus_core.faces import DOUBTFUL, Face, FaceFinder
from ..wplus_core.files import files_below
from ..wplus_core.photos import load_photo, to_uint8
from .captions import Beside, Table
from .recipes import BESIDE, Aligned, Faces, Wild
from .views import Views, scaling

RIVAL = 0.5  # another face counts from this part of the largest one's size on


@dataclass(frozen=True)
class Bad:
    """A picture that cannot be used."""

    file: str
    reason: str


@dataclass(frozen=True)
class Loaded:
    """A picture with its face. crop: [3, 512, 512] in 0..1. side: of the crop, in pixels of the picture's file.

    In the wild: photo [3, H, W] in uint8, no finer than its views need it; to_crop [3, 3] float64, photo -> crop.
    """

    number: int
    name: str
    crop: Tensor
    side: float
    caption: str = ""
    photo: Tensor | None = None
    to_crop: Tensor | None = None


class Photos(Dataset):
    """`photos[n]` is picture n of the sources, `Loaded`, or `Bad` with the reason."""

    def __init__(self, settings: Aligned | Wild):
        self.settings = settings
        self.files = pictures_in(settings.files[:-1], settings.files[-1])
        self.caption = caption_source(settings)

    def __len__(self) -> int:
        return len(self.files)

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "find"}

    @cached_property
    def find(self) -> FaceFinder:
        return FaceFinder(self.settings.faces_models)

    def __getitem__(self, n: int) -> Loaded | Bad:
        path, name = self.files[n]
        try:
            return self.load(n, path, name)
        except (WPlusError, RuntimeError, MemoryError) as e:
            return Bad(name, str(e).removeprefix(f"{path}: "))

    def load(self, n: int, path: Path, name: str) -> Loaded:
        s, caption = self.settings, self.caption(path) if self.caption else ""
        photo = load_photo(path)
        if isinstance(s, Aligned) and s.already_aligned:
            return Loaded(n, name, square(photo.pixels, s.min_face), photo.pixels.shape[-1])
        face = usable(self.find(photo, name=name), s)
        aligned = align(photo.pixels, [face.landmarks], CROP, s.padding)
        if aligned.outside[0] > s.max_cut:
            raise WPlusError(f"the face is cut: {aligned.outside[0]:.0%} of its crop lie outside the picture")
        loaded = Loaded(n, name, aligned.images[0], face.size, caption)
        return loaded if isinstance(s, Aligned) else with_photo(loaded, photo.pixels, aligned.to_crop[0], s.views)


def usable(faces: Sequence[Face], s: Faces) -> Face:
    """The largest of the faces (largest first) that are surely faces, if the rules allow it."""
    face, *others = [f for f in faces if f.score > DOUBTFUL] or faces
    rivals = sum(f.size >= RIVAL * face.size for f in others)
    if rivals and s.several == "drop":
        raise WPlusError(f"{rivals + 1} faces of similar size (--several largest takes the largest)")
    if face.size < s.min_face:
        raise WPlusError(f"the face is small: its crop has {face.size:.0f} px, expected at least {s.min_face:g}")
    return face


def with_photo(loaded: Loaded, pixels: Tensor, to_crop: Tensor, views: Views) -> Loaded:
    """Keep the photo [3, H, W], shrunk to what its views need."""
    height, width = pixels.shape[1:]
    k = min(1.0, views.finest((height, width), loaded.side))
    size = round(height * k), round(width * k)
    small = F.interpolate(pixels[None], size, mode="bicubic", antialias=True)[0] if k < 1 else pixels
    small = torch.from_numpy(to_uint8(small)).permute(2, 0, 1).contiguous()
    return replace(loaded, photo=small, to_crop=to_crop @ scaling(width / size[1], height / size[0]))


def square(pixels: Tensor, smallest: float) -> Tensor:
    height, width = pixels.shape[1:]
    if height != width or width < smallest:
        raise WPlusError(f"{width} x {height} px is no aligned face; expected a square of at least {smallest:g} px")
    return resize(pixels[None], CROP)[0]


def pictures_in(sources: Iterable[Path], made: Path) -> list[tuple[Path, str]]:
    """Every picture file in a fixed order, with its name relative to the source. made: a folder that is left out."""
    endings, found, made = Image.registered_extensions(), {}, made.absolute()
    for source in sources:
        if source.is_dir():
            others = (p for p in files_below(source) if made not in p.absolute().parents)
            found |= {p: p.relative_to(source).as_posix() for p in others if p.suffix.lower() in endings}
        elif source.is_file():
            found[source] = source.name
        else:
            raise FileError(source, "there is no such file or folder", "Check the path")
    if not found:
        raise WPlusError(f"no pictures in {', '.join(map(str, sources))}")
    return list(found.items())


def caption_source(s: Aligned | Wild) -> Beside | Table | None:
    """Where captions are looked up; None where there are none, or BLIP-2 makes them."""
    if isinstance(s, Aligned) or s.captions.is_dir():
        return None
    return Beside() if s.captions == BESIDE else Table(s.captions)
