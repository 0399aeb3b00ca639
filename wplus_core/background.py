"""White where the background was: what is left of it in a code leaks into every picture made with that code."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from kornia.filters import gaussian_blur2d
from torch import Tensor

from .errors import WPlusError
from .parsing import CLASSES, FaceParser
from .photos import check_pixels

PARSE_SIZE = 512
WITHOUT_PARSER = (
    "no face-parsing model (parse_multi_iter_90000.pth) was given: the background stays in the picture, and traces of "
    "it will show in pictures made with the code"
)
BACKGROUND = ("background", "cloth")
REGIONS: dict[str, tuple[str, ...]] = {
    "background": BACKGROUND,
    "skin": ("skin", "nose", "left_ear", "right_ear"),
    "nose": ("nose",),
    "eyes": ("left_eye", "right_eye"),
    "brows": ("left_brow", "right_brow"),
    "mouth": ("mouth", "upper_lip", "lower_lip"),
    "ears": ("left_ear", "right_ear", "earring"),
    "glasses": ("eyeglasses",),
    "hair": ("hair",),
    "hat": ("hat",),
    "neck": ("neck", "necklace"),
    "cloth": ("cloth",),
    "face": ("skin", "nose", "eyeglasses", "left_eye", "right_eye", "left_brow", "right_brow", "mouth", "upper_lip",
             "lower_lip"),
    "head": tuple(c for c in CLASSES if c not in (*BACKGROUND, "neck", "necklace")),
}  # fmt: skip


@dataclass(frozen=True)
class Regions:
    """classes [B, 512, 512] in uint8: an index into `parsing.CLASSES` for each pixel of the aligned faces."""

    classes: Tensor

    def mask(self, *names: str) -> Tensor:
        """[B, 1, 512, 512], 1 in any of these `REGIONS` or classes, else 0."""
        unknown = [n for n in names if n not in REGIONS and n not in CLASSES]
        if unknown or not names:
            raise WPlusError(f"regions: expected some of {', '.join(REGIONS)}, got {', '.join(unknown) or 'none'}")
        wanted = {CLASSES.index(c) for n in names for c in REGIONS.get(n, (n,))}
        return torch.isin(self.classes, self.classes.new_tensor(sorted(wanted))).float()[:, None]


@torch.no_grad()
def parse(images: Tensor, parser: FaceParser, batch: int = 4) -> Regions:
    """Aligned faces [B, 3, S, S] in 0..1 → their regions, on the images' device."""
    images = check_pixels(images, "aligned faces", batch=True)
    weight = next(parser.parameters())
    logits = (parser((resize(x, PARSE_SIZE) * 2 - 1).to(weight)) for x in images.split(batch))
    return Regions(torch.cat([x.argmax(dim=1).byte() for x in logits]).to(images.device))


def remove_background(images: Tensor, parser: FaceParser | None, size: int = 256) -> tuple[Tensor, Regions | None]:
    """Aligned faces [B, 3, S, S] in 0..1 → [B, 3, size, size], white where no face, hair or neck is, and the regions.

    Without a parser the faces are only resized, and there are no regions: `WITHOUT_PARSER` says what that means.
    """
    images = check_pixels(images, "aligned faces", batch=True)
    if parser is None:
        return resize(images, size), None
    regions = parse(images, parser)
    m = gaussian_blur2d(regions.mask("background"), (5, 5), (1.1, 1.1))  # OpenCV's sigma for a kernel of 5
    m = F.interpolate(m, (size, size), mode="area")
    return resize(images, size) * (1 - m) + m, regions


def resize(images: Tensor, size: int) -> Tensor:
    """[B, 3, S, S] → [B, 3, size, size], anti-aliased, in 0..1."""
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
