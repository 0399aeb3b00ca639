"""The face-parsing net: which part of the face each pixel of an aligned face is.

Module names are those of the published file (`parse_multi_iter_90000.pth`). Source: Chen et al., "Progressive
Semantic-Aware Style Transformation for Blind Face Restoration" (PSFRGAN).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from .errors import WPlusError

CLASSES = (
    "background", "skin", "nose", "eyeglasses", "left_eye", "right_eye", "left_brow", "right_brow", "left_ear",
    "right_ear", "mouth", "upper_lip", "lower_lip", "hair", "hat", "earring", "necklace", "neck", "cloth",
)  # fmt: skip


@dataclass(frozen=True)
class ParserConfig:
    """Sizes of a parser; the defaults are the published net's.

    channels: of the first convolution and after each halving. body: residual units at the smallest size.
    """

    channels: tuple[int, ...] = (64, 128, 256, 256, 256)
    body: int = 10
    classes: int = len(CLASSES)

    def __post_init__(self):
        object.__setattr__(self, "channels", tuple(self.channels))


class Norm(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Conv(nn.Module):
    """3 x 3 convolution after reflection padding; nearest upsampling before it, or a batch norm after, on request."""

    def __init__(self, c_in: int, c_out: int, scale: str = "none", norm: bool = False):
        super().__init__()
        self.up = scale == "up"
        self.conv2d = nn.Conv2d(c_in, c_out, 3, 2 if scale == "down" else 1, bias=not norm)
        if norm:
            self.norm = Norm(c_out)

    def forward(self, x: Tensor) -> Tensor:
        if self.up:
            x = F.interpolate(x, scale_factor=2, mode="nearest")
        x = self.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"))
        return self.norm(x) if hasattr(self, "norm") else x


class ResidualUnit(nn.Module):
    """scale: "none", "down" (halves the size in conv2) or "up" (doubles it before conv1)."""

    def __init__(self, c_in: int, c_out: int, scale: str = "none"):
        super().__init__()
        self.plain = c_in == c_out and scale == "none"
        if not self.plain:
            self.shortcut_func = Conv(c_in, c_out, scale)
        self.conv1 = Conv(c_in, c_out, scale if scale == "up" else "none", norm=True)
        self.conv2 = Conv(c_out, c_out, scale if scale == "down" else "none", norm=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(F.leaky_relu(self.conv1(x), 0.2))
        return y + (x if self.plain else self.shortcut_func(x))


class FaceParser(nn.Module):
    """Aligned faces [B, 3, 512, 512] in [-1, 1] -> class logits [B, 19, 512, 512]."""

    def __init__(self, config: ParserConfig | None = None):
        super().__init__()
        self.config = config = config or ParserConfig()
        c = config.channels
        pairs = list(zip(c, c[1:], strict=False))
        self.encoder = nn.Sequential(Conv(3, c[0]), *(ResidualUnit(a, b, "down") for a, b in pairs))
        self.body = nn.Sequential(*(ResidualUnit(c[-1], c[-1]) for _ in range(config.body)))
        self.decoder = nn.Sequential(*(ResidualUnit(b, a, "up") for a, b in reversed(pairs)))
        self.out_img_conv = Conv(c[0], 3)  # in the file, not used
        self.out_mask_conv = Conv(c[0], config.classes)

    def forward(self, x: Tensor) -> Tensor:
        step = 2 ** len(self.decoder)
        if x.ndim != 4 or x.shape[1] != 3 or x.shape[2] % step or x.shape[3] % step:
            raise WPlusError(f"faces to parse must be [B, 3, H, W], sides in multiples of {step}, got {list(x.shape)}")
        x = self.encoder(x)
        return self.out_mask_conv(self.decoder(x + self.body(x)))
