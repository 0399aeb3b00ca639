"""Encoders from an aligned face to W+: e4e, pSp and the single-code baseline, on an IR-SE body.

Module names are those of the published files (`e4e_ffhq_encode.pt`, `psp_ffhq_encode.pt`), so a state dict needs no
translation. Sources: Tov et al., "Designing an Encoder for StyleGAN Image Manipulation" (e4e); Richardson et al.,
"Encoding in Style" (pSp); Deng et al., "ArcFace" (the body).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import WPlusError
from .stylegan2 import EqualLinear

COARSE, MIDDLE = 3, 7  # styles 0-2 read c3, 3-6 read p2, the rest p1


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of an encoder; the defaults are e4e for FFHQ 1024.

    kind: "e4e", "psp" or "single" (one w for all layers). layers: L of the generator. units and channels: IR units and
    channels of the body's four groups. image_size: side of the square input in pixels.
    """

    kind: Literal["e4e", "psp", "single"] = "e4e"
    layers: int = 18
    w_dim: int = 512
    units: tuple[int, ...] = (3, 4, 14, 3)
    channels: tuple[int, ...] = (64, 128, 256, 512)
    image_size: int = 256
    squeeze_excite: bool = True

    def __post_init__(self):
        object.__setattr__(self, "units", tuple(self.units))
        object.__setattr__(self, "channels", tuple(self.channels))
        if len(self.units) != 4 or len(self.channels) != 4:
            raise WPlusError(f"the body has four groups, got units {self.units} and channels {self.channels}")
        if self.image_size not in (2**n for n in range(5, 13)):
            raise WPlusError(f"image_size must be a power of two from 32 to 4096, got {self.image_size}")


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, channels // reduction, 1, bias=False)
        self.fc2 = nn.Conv2d(channels // reduction, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean((2, 3), keepdim=True)
        return x * self.fc2(F.relu(self.fc1(s))).sigmoid()


class IRUnit(nn.Module):
    """ArcFace's improved residual unit: [B, c_in, H, W] -> [B, c_out, H/stride, W/stride]."""

    def __init__(self, c_in: int, c_out: int, stride: int, squeeze_excite: bool):
        super().__init__()
        if c_in == c_out:
            self.shortcut_layer = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(c_in),
            nn.Conv2d(c_in, c_out, 3, 1, 1, bias=False),
            nn.PReLU(c_out),
            nn.Conv2d(c_out, c_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(c_out),
            *([SqueezeExcite(c_out)] if squeeze_excite else []),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class StyleBlock(nn.Module):
    """Strided convolutions down to one pixel, then an equalised linear: [B, C, size, size] -> [B, w_dim]."""

    def __init__(self, c_in: int, w_dim: int, size: int):
        super().__init__()
        convs = []
        for i in range(size.bit_length() - 1):
            convs += [nn.Conv2d(w_dim if i else c_in, w_dim, 3, 2, 1), nn.LeakyReLU()]
        self.convs = nn.Sequential(*convs)
        self.linear = EqualLinear(w_dim, w_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.convs(x).flatten(1))


class Encoder(nn.Module):
    """The IR-SE body and what every encoder shares; `forward` is `offsets(x) + latent_avg`.

    x: aligned faces [B, 3, S, S] in [-1, 1] -> w [B, L, w_dim].
    """

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.config = config
        c = config.channels
        self.input_layer = nn.Sequential(nn.Conv2d(3, c[0], 3, 1, 1, bias=False), nn.BatchNorm2d(c[0]), nn.PReLU(c[0]))
        units = []
        for n, c_in, c_out in zip(config.units, (c[0], *c), c, strict=False):
            for j in range(n):
                units.append(IRUnit(c_out if j else c_in, c_out, 1 if j else 2, config.squeeze_excite))
        self.body = nn.Sequential(*units)
        self.register_buffer("latent_avg", torch.zeros(config.layers, config.w_dim))

    def features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """c1, c2, c3: the body's outputs at strides 4, 8 and 16."""
        s = self.config.image_size
        if x.shape[1:] != (3, s, s):
            raise WPlusError(f"this encoder reads aligned faces of shape [B, 3, {s}, {s}], got {list(x.shape)}")
        n1 = sum(self.config.units[:2])
        n2 = n1 + self.config.units[2]
        c1 = self.body[:n1](self.input_layer(x))
        c2 = self.body[n1:n2](c1)
        return c1, c2, self.body[n2:](c2)

    def offsets(self, x: Tensor) -> Tensor:
        """The codes relative to the average face, [B, L, w_dim]."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.offsets(x) + self.latent_avg


class GradualStyleEncoder(Encoder):
    """pSp: one style block per layer over a three-level feature pyramid."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        c, side = config.channels, config.image_size // 16
        sizes = [side if i < COARSE else 2 * side if i < MIDDLE else 4 * side for i in range(config.layers)]
        self.styles = nn.ModuleList(StyleBlock(c[3], config.w_dim, size) for size in sizes)
        self.latlayer1 = nn.Conv2d(c[2], c[3], 1)
        self.latlayer2 = nn.Conv2d(c[1], c[3], 1)

    def styles_of(self, x: Tensor) -> list[Tensor]:
        c1, c2, c3 = self.features(x)
        p2 = upsample_add(c3, self.latlayer1(c2))
        p1 = upsample_add(p2, self.latlayer2(c1))
        levels = (c3 if i < COARSE else p2 if i < MIDDLE else p1 for i in range(self.config.layers))
        return [style(level) for style, level in zip(self.styles, levels, strict=True)]

    def offsets(self, x: Tensor) -> Tensor:
        return torch.stack(self.styles_of(x), dim=1)


class Encoder4Editing(GradualStyleEncoder):
    """e4e: style 0 for every layer, plus style i as layer i's own small offset."""

    def offsets(self, x: Tensor) -> Tensor:
        first, *rest = self.styles_of(x)
        return first[:, None] + torch.stack([torch.zeros_like(first), *rest], dim=1)


class SingleCodeEncoder(Encoder):
    """pSp's baseline: the pooled last layer gives one w, used by every layer of the generator."""

    def __init__(self, config: EncoderConfig):
        super().__init__(config)
        self.linear = EqualLinear(config.channels[3], config.w_dim)

    def offsets(self, x: Tensor) -> Tensor:
        w = self.linear(self.features(x)[2].mean((2, 3)))
        return w[:, None].expand(-1, self.config.layers, -1)


def upsample_add(x: Tensor, y: Tensor) -> Tensor:
    return F.interpolate(x, y.shape[2:], mode="bilinear", align_corners=True) + y


def build_encoder(config: EncoderConfig) -> Encoder:
    """An encoder of the config's kind, in training mode, with fresh weights."""
    kinds = {"e4e": Encoder4Editing, "psp": GradualStyleEncoder, "single": SingleCodeEncoder}
    if config.kind not in kinds:
        raise WPlusError(f"encoder kind must be one of {sorted(kinds)}, got {config.kind!r}")
    return kinds[config.kind](config)
