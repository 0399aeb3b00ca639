"""StyleGAN2's generator in plain torch, with the state dict of rosinality's implementation (which e4e files carry).

Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN"; layout: rosinality/stylegan2-pytorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import WPlusError

BLUR = (1.0, 3.0, 3.0, 1.0)
Noise = Literal["fixed", "random", "none"] | Sequence[Tensor]


@dataclass(frozen=True)
class GeneratorConfig:
    """Sizes of a generator. channels: feature channels at 4, 8, 16, ... px up to the picture's size."""

    channels: tuple[int, ...]
    w_dim: int = 512
    mapping_layers: int = 8

    def __post_init__(self):
        object.__setattr__(self, "channels", tuple(self.channels))
        if not 1 <= len(self.channels) <= 12:
            raise WPlusError(f"a generator has channel counts for 4 px up to at most 8192 px, got {self.channels}")

    @classmethod
    def for_size(cls, size: int, width: int = 32768, max_channels: int = 512, **rest) -> GeneratorConfig:
        """The published layout: min(max_channels, width / resolution) channels; 1024 px is FFHQ's generator."""
        if size < 8 or size & (size - 1):
            raise WPlusError(f"a generator's size must be a power of two of at least 8, got {size}")
        return cls(tuple(min(max_channels, width // 2**i) for i in range(2, size.bit_length())), **rest)

    @property
    def size(self) -> int:
        return 2 ** (len(self.channels) + 1)

    @property
    def layers(self) -> int:
        """L = 2 log2(size) - 2, the number of w vectors."""
        return 2 * len(self.channels)


def blur_kernel(gain: float = 1.0) -> Tensor:
    k = torch.tensor(BLUR)
    return torch.outer(k, k) * (gain / k.sum() ** 2)


def blur(x: Tensor, kernel: Tensor, pad: tuple[int, int]) -> Tensor:
    """Filter each channel of x [B, C, H, W] with kernel [k, k] after zero padding (before, after) on both axes."""
    kernel = kernel.flip(0, 1).to(x.dtype).expand(x.shape[1], 1, -1, -1)
    return F.conv2d(F.pad(x, (*pad, *pad)), kernel, groups=x.shape[1])


def upsample(x: Tensor, kernel: Tensor) -> Tensor:
    """Twice the size: zeros between pixels, then the blur (whose kernel carries the gain of 4)."""
    b, c, h, w = x.shape
    x = F.pad(x.view(b, c, h, 1, w, 1), (0, 1, 0, 0, 0, 1)).view(b, c, 2 * h, 2 * w)
    return blur(x, kernel, (2, 1))


def scaled_leaky_relu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


class EqualLinear(nn.Module):
    """Linear with weights of unit variance, scaled at run time by lr_mul / sqrt(c_in)."""

    def __init__(self, c_in: int, c_out: int, bias_init: float = 0.0, lr_mul: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in) / lr_mul)
        self.bias = nn.Parameter(torch.full((c_out,), bias_init))
        self.scale, self.lr_mul = lr_mul / math.sqrt(c_in), lr_mul

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias * self.lr_mul)


class PixelNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


class MappingLayer(EqualLinear):
    def __init__(self, dim: int):
        super().__init__(dim, dim, lr_mul=0.01)

    def forward(self, x: Tensor) -> Tensor:
        return scaled_leaky_relu(super().forward(x))


class Kernel(nn.Module):
    """Holds a blur kernel under the name that the files have for it."""

    def __init__(self, gain: float):
        super().__init__()
        self.register_buffer("kernel", blur_kernel(gain))


class ModulatedConv(nn.Module):
    """x [B, c_in, H, W], w [B, w_dim] -> [B, c_out, H, W] (twice the size with up): eq. 1 and 3 of the paper.

    The style scales the input and the demodulation the output, which equals scaling the weights and lets one
    convolution serve the whole batch.
    """

    def __init__(self, c_in: int, c_out: int, size: int, w_dim: int, up: bool = False, demodulate: bool = True):
        super().__init__()
        self.up, self.demodulate, self.pad = up, demodulate, size // 2
        self.scale = 1 / math.sqrt(c_in * size**2)
        self.weight = nn.Parameter(torch.randn(1, c_out, c_in, size, size))
        self.modulation = EqualLinear(w_dim, c_in, bias_init=1.0)
        if up:
            self.blur = Kernel(gain=4.0)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.modulation(w)
        weight = self.weight[0] * self.scale
        x = x * style[:, :, None, None]
        if self.up:
            x = blur(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), self.blur.kernel, (1, 1))
        else:
            x = F.conv2d(x, weight, padding=self.pad)
        if self.demodulate:
            energy = F.linear(style.square(), weight.square().sum((2, 3)))
            x = x * torch.rsqrt(energy + 1e-8)[:, :, None, None]
        return x


class NoiseStrength(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


class ActivationBias(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))


class StyledConv(nn.Module):
    def __init__(self, c_in: int, c_out: int, w_dim: int, up: bool = False):
        super().__init__()
        self.conv = ModulatedConv(c_in, c_out, 3, w_dim, up)
        self.noise = NoiseStrength()
        self.activate = ActivationBias(c_out)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        x = self.conv(x, w)
        if noise is not None:
            x = x + self.noise.weight * noise.to(x)
        return scaled_leaky_relu(x + self.activate.bias[:, None, None])


class ToRGB(nn.Module):
    def __init__(self, c_in: int, w_dim: int, up: bool):
        super().__init__()
        self.conv = ModulatedConv(c_in, 3, 1, w_dim, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        if up:
            self.upsample = Kernel(gain=4.0)

    def forward(self, x: Tensor, w: Tensor, skip: Tensor | None = None) -> Tensor:
        x = self.conv(x, w) + self.bias
        return x if skip is None else x + upsample(skip, self.upsample.kernel)


class ConstantInput(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))


class Generator(nn.Module):
    """StyleGAN2: codes to pictures. Layer 0 of w drives conv1, 1 to_rgb1; then per resolution two convs and to_rgb."""

    def __init__(self, config: GeneratorConfig):
        super().__init__()
        self.config = config
        c, w_dim = config.channels, config.w_dim
        self.style = nn.Sequential(PixelNorm(), *(MappingLayer(w_dim) for _ in range(config.mapping_layers)))
        self.input = ConstantInput(c[0])
        self.conv1 = StyledConv(c[0], c[0], w_dim)
        self.to_rgb1 = ToRGB(c[0], w_dim, up=False)
        self.convs, self.to_rgbs = nn.ModuleList(), nn.ModuleList()
        for c_in, c_out in zip(c, c[1:], strict=False):
            self.convs += [StyledConv(c_in, c_out, w_dim, up=True), StyledConv(c_out, c_out, w_dim)]
            self.to_rgbs.append(ToRGB(c_out, w_dim, up=True))
        self.noises = nn.Module()
        for i in range(config.layers - 1):
            self.noises.register_buffer(f"noise_{i}", torch.randn(1, 1, *(2 ** ((i + 5) // 2),) * 2))

    def mapping(self, z: Tensor) -> Tensor:
        """z [B, w_dim] from a standard normal -> w [B, w_dim]."""
        return self.style(z)

    @torch.no_grad()
    def mean_w(self, samples: int = 4096, seed: int = 0) -> Tensor:
        """The average face's w [w_dim], over mapped normal samples (drawn on the CPU, so that a seed is a seed)."""
        z = torch.randn(samples, self.config.w_dim, generator=torch.Generator().manual_seed(seed))
        return self.mapping(z.to(self.style[1].weight)).mean(0)

    def noise_maps(self, noise: Noise, generator: torch.Generator | None = None) -> list[Tensor | None]:
        """One noise map per styled conv: the stored ones, fresh ones, none at all, or those given."""
        fixed = [getattr(self.noises, f"noise_{i}") for i in range(self.config.layers - 1)]
        if noise == "fixed":
            return fixed
        if noise == "none":
            return [None] * len(fixed)
        if noise == "random":
            return [torch.randn(x.shape, generator=generator).to(x) for x in fixed]
        maps = list(noise) if not isinstance(noise, str) else []
        if [x.shape[-2:] for x in maps] != [x.shape[-2:] for x in fixed]:
            sides = [x.shape[-1] for x in fixed]
            raise WPlusError(f'noise must be "fixed", "random", "none" or maps [B, 1, s, s] of sides {sides}')
        return maps

    def forward(
        self,
        w: Tensor,
        noise: Noise = "fixed",
        max_resolution: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """w [B, w_dim] or [B, L, w_dim] -> pictures [B, 3, S, S] in about [-1, 1], unclamped.

        max_resolution: stop there, for a quick preview: the layers so far, as a picture of that size (or the next
        power of two below). generator: a CPU generator for noise="random".
        """
        c = self.config
        if w.ndim == 2:
            w = w[:, None].expand(-1, c.layers, -1)
        if w.ndim != 3 or w.shape[1:] != (c.layers, c.w_dim):
            raise WPlusError(
                f"this {c.size} px generator reads codes of shape [B, {c.w_dim}] or [B, {c.layers}, {c.w_dim}], "
                f"got {list(w.shape)}; use codes of an encoder for this generator"
            )
        if max_resolution is not None and max_resolution < 4:
            raise WPlusError(f"max_resolution must be at least 4, got {max_resolution}")
        maps = self.noise_maps(noise, generator)
        x = self.conv1(self.input.input.expand(len(w), -1, -1, -1), w[:, 0], maps[0])
        rgb = self.to_rgb1(x, w[:, 1])
        for j, to_rgb in enumerate(self.to_rgbs):
            if max_resolution is not None and rgb.shape[-1] * 2 > max_resolution:
                break
            i = 2 * j + 1
            x = self.convs[i - 1](x, w[:, i], maps[i])
            x = self.convs[i](x, w[:, i + 1], maps[i + 1])
            rgb = to_rgb(x, w[:, i + 2], rgb)
        return rgb


def truncate(w: Tensor, w_avg: Tensor, psi: float) -> Tensor:
    """Toward the average face: w_avg + psi (w - w_avg); psi = 1 keeps w, 0 is the average."""
    return w_avg + psi * (w - w_avg)
