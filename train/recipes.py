"""What `train prepare` can be told: one frozen dataclass for each kind of data set."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..wplus_core.errors import WPlusError
from .config import to_dict
from .views import Views

# The paper's supplement, section V; "" is for dropped text.
NEUTRAL = (
    "",
    "a face",
    "a photo of a face",
    "a close-up of a face",
    "a depiction of a face",
    "a good photo of a face",
    "a photography of a face",
    "a cropped photo of a face",
    "a good photography of a face",
    "a close-up photography of a face",
)
BESIDE = Path("txt")
# What may differ when the same data set goes on: where things lie, and how fast it goes.
FREE = {"files", "base", "vae", "tokenizer", "encoder", "parser", "faces_models", "captions"}
FREE |= {"batch", "device", "workers"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all kinds share.

    files: the sources, and last the data set's folder. base: the SD1.x model, a diffusers folder or a single-file
    checkpoint. vae, tokenizer: instead of the base's own. seed: of all that is drawn. shard: pictures to a file. batch:
    pictures encoded together. precision, device: of the networks; cuda where there is one. workers: processes that read
    pictures and find faces.
    """

    files: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SRC... DST")]
    base: Path
    vae: Path | None = None
    tokenizer: Path | None = None
    seed: int = 0
    shard: int = 128
    batch: int = 8
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str | None = None
    workers: int = 2

    def __post_init__(self):
        if len(self.files) < 2:
            raise WPlusError("expected at least one source and the data set's folder: prepare KIND SRC... DST")
        if min(self.shard, self.batch) < 1:
            raise WPlusError(f"shard and batch must be at least 1, got {self.shard} and {self.batch}")

    def fixed(self) -> dict[str, Any]:
        """What a data set that goes on must have in common with its beginning."""
        return {k: v for k, v in to_dict(self).items() if k not in FREE}


@dataclass(frozen=True, kw_only=True)
class Faces(Settings):
    """Photos with a face.

    encoder: e4e or pSp. parser: the face-parsing net, which removes the background. faces_models: folders with dlib's
    .dat files. several: drop photos with another face of at least half the size, or take the largest. min_face:
    smallest side of the crop, in pixels of the photo. max_cut: largest part of the crop that may lie outside the photo.
    padding: what is seen there.
    """

    encoder: Path
    parser: Path | None = None
    faces_models: tuple[Path, ...] = ()
    several: Literal["drop", "largest"] = "drop"
    min_face: float = 160
    max_cut: float = 0.15
    padding: Literal["reflect", "black"] = "reflect"


@dataclass(frozen=True, kw_only=True)
class Aligned(Faces):
    """Faces cropped as FFHQ does it, for stage I.

    size: side of the training picture. already_aligned: take the pictures as they are, resized.
    """

    size: int = 512
    already_aligned: bool = False


@dataclass(frozen=True, kw_only=True)
class Wild(Faces):
    """Pictures in the wild with captions, for stage II.

    captions: `txt` (NAME.txt beside NAME.jpg), a CSV file with columns file,caption, or a folder with BLIP-2. mask: the
    face is its whole crop, as in the paper, or the head that the parser finds in it. variants: drawn of each picture.
    online_vae: keep the pictures; draw and encode in training.
    """

    captions: Path = BESIDE
    mask: Literal["crop", "head"] = "crop"
    variants: int = 4
    online_vae: bool = False
    views: Annotated[Views, tyro.conf.arg(name="")] = field(default_factory=Views)

    def __post_init__(self):
        super().__post_init__()
        if self.mask == "head" and self.parser is None:
            raise WPlusError("--mask head needs the face-parsing net: --parser parse_multi_iter_90000.pth")
        if self.variants < 1:
            raise WPlusError(f"variants must be at least 1, got {self.variants}")

    @property
    def size(self) -> int:
        return self.views.size


@dataclass(frozen=True, kw_only=True)
class Synthetic(Settings):
    """StyleGAN2 samples with their codes, for stage I: `prepare synthetic GENERATOR DST`.

    count: how many. truncation: psi towards the average face, 1 for none. size: side of the training picture.
    """

    count: int = 70_000
    truncation: float = 0.7
    size: int = 512
