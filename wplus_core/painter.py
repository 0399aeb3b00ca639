"""Quick previews: one code at a time through a StyleGAN2 generator on the CPU, while somebody moves a slider.

The same picture as `stylegan2.Generator` paints, sooner: what does not depend on the code is made once (scaled weights,
their energy for the demodulation), convolutions run in bfloat16 where the CPU multiplies it, and the resolutions before
the first layer that changed stay as they were in the picture before. A finer picture of the same code costs its last
resolution alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import WPlusError
from .stylegan2 import Generator, ModulatedConv, StyledConv, ToRGB, blur, upsample

SQRT2 = math.sqrt(2)


class Stopped(Exception):
    """A picture was given up because it was no longer wanted."""


class Features(NamedTuple):
    """What a resolution hands on. x: [1, C, r, r]; rgb: [1, 3, r, r] float32, the picture so far."""

    x: Tensor
    rgb: Tensor


def quick_dtype() -> torch.dtype:
    """bfloat16 where the CPU has instructions for it, else float32."""
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


class Modulation:
    """Style and demodulation of a convolution, in float32: a small step of the code must not drown in rounding."""

    def __init__(self, conv: ModulatedConv):
        affine = conv.modulation
        self.weight, self.bias = affine.weight.float() * affine.scale, affine.bias.float() * affine.lr_mul
        self.kernel = conv.weight[0].float() * conv.scale
        self.energy = self.kernel.square().sum((2, 3))

    def style(self, w: Tensor) -> Tensor:
        """w [1, w_dim] → [1, c_in]."""
        return F.linear(w, self.weight, self.bias)

    def demodulation(self, style: Tensor) -> Tensor:
        """[1, c_in] → [1, c_out]."""
        return torch.rsqrt(F.linear(style.square(), self.energy) + 1e-8)


class QuickConv:
    """A styled convolution whose weights are laid out for one picture at a time."""

    def __init__(self, layer: StyledConv, noise: Tensor, dtype: torch.dtype):
        conv, self.modulation = layer.conv, Modulation(layer.conv)
        kernel, self.modulation.kernel = self.modulation.kernel, None
        self.blur = conv.blur.kernel.float().clone() if conv.up else None
        self.weight = (kernel.transpose(0, 1) if conv.up else kernel).to(dtype, memory_format=torch.channels_last)
        self.noise = (SQRT2 * layer.noise.weight.float() * noise.float()).to(dtype)
        self.bias = (SQRT2 * layer.activate.bias.float())[:, None, None].to(dtype)

    def __call__(self, x: Tensor, w: Tensor) -> Tensor:
        style = self.modulation.style(w)
        x = x * style[:, :, None, None].to(x.dtype)
        if self.blur is None:
            x = F.conv2d(x, self.weight, padding=1)
        else:
            x = blur(F.conv_transpose2d(x, self.weight, stride=2), self.blur, (1, 1))
        scale = SQRT2 * self.modulation.demodulation(style)[:, :, None, None]  # the activation's gain, moved before it
        return F.leaky_relu_(x.mul_(scale.to(x.dtype)).add_(self.noise).add_(self.bias), 0.2)


class QuickRGB:
    def __init__(self, layer: ToRGB):
        self.modulation, self.bias = Modulation(layer.conv), layer.bias.float().clone()
        self.upsample = layer.upsample.kernel.float().clone() if hasattr(layer, "upsample") else None

    def __call__(self, x: Tensor, w: Tensor, skip: Tensor | None) -> Tensor:
        weight = self.modulation.kernel * self.modulation.style(w)[:, :, None, None]
        rgb = F.conv2d(x, weight.to(x.dtype)).float() + self.bias
        return rgb if skip is None else rgb + upsample(skip, self.upsample)


class Painter:
    """Paints codes [L, w_dim] up to `size` px, with the generator's fixed noise, one at a time.

    It shares no memory with the generator and is not for several threads.
    """

    @torch.inference_mode()
    def __init__(self, generator: Generator, size: int = 256, dtype: torch.dtype | None = None):
        self.config, dtype = generator.config, dtype or quick_dtype()
        self.size = min(2 ** (size.bit_length() - 1), self.config.size)
        stages, noise = self.stages(self.size), generator.noise_maps("fixed")
        styled = [generator.conv1, *generator.convs][: 2 * stages - 1]
        self.convs = [QuickConv(layer, noise[i], dtype) for i, layer in enumerate(styled)]
        self.to_rgbs = [QuickRGB(layer) for layer in [generator.to_rgb1, *generator.to_rgbs][:stages]]
        self.input = generator.input.input.to(dtype, memory_format=torch.channels_last, copy=True)
        self.w, self.done = torch.full((self.config.layers, self.config.w_dim), torch.nan), []

    @staticmethod
    def stages(size: int) -> int:
        """How many resolutions lead to this size: 4 px is one, 8 px two."""
        return max(size, 4).bit_length() - 2

    @torch.inference_mode()
    def paint(self, w: Tensor, size: int, unwanted: Callable[[], bool] = lambda: False) -> Tensor:
        """A code [L, w_dim] → its picture [3, s, s] in about [-1, 1], float32; s: the largest power of two up to size.

        unwanted is asked before each resolution; if it says so, Stopped is raised and what was done serves the next.
        """
        if w.shape != self.w.shape:
            raise WPlusError(
                f"this {self.config.size} px generator reads codes of shape {list(self.w.shape)}, got {list(w.shape)}; "
                "use codes of an encoder for this generator"
            )
        w = w.float()
        changed = (w != self.w).any(1).nonzero()
        if len(changed):
            del self.done[changed[0].item() // 2 :]  # resolution j reads layers up to 2 j + 1
        self.w, stages = w.clone(), self.stages(min(size, self.size))
        while len(self.done) < stages:
            if unwanted():
                raise Stopped
            self.done.append(self.stage(len(self.done), w[:, None]))
        return self.done[stages - 1].rgb[0]

    def stage(self, j: int, w: Tensor) -> Features:
        """Resolution 4 · 2^j of the code's rows w [L, 1, w_dim], from the one before."""
        if j == 0:
            x = self.convs[0](self.input, w[0])
            return Features(x, self.to_rgbs[0](x, w[1], None))
        before = self.done[j - 1]
        x = self.convs[2 * j](self.convs[2 * j - 1](before.x, w[2 * j - 1]), w[2 * j])
        return Features(x, self.to_rgbs[j](x, w[2 * j + 1], before.rgb))
