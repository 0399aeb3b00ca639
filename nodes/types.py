"""What travels along the wires between W+ nodes, and how it prints itself."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import comfy.model_management
import comfy.model_patcher
import comfy.utils
import torch
from comfy_api.v0_0_2 import io
from torch import Tensor, nn

from ..wplus_core.adapter import WPlusAdapter
from ..wplus_core.align import AlignedFaces
from ..wplus_core.errors import WPlusError
from ..wplus_core.faces import FaceFinder
from ..wplus_core.identity import Identity

AdapterIO = io.Custom("WPLUS_ADAPTER")
EncoderIO = io.Custom("WPLUS_ENCODER")
FaceToolsIO = io.Custom("WPLUS_FACE_TOOLS")
CropsIO = io.Custom("WPLUS_CROPS")
IdentityIO = io.Custom("WPLUS_IDENTITY")
DirectionIO = io.Custom("WPLUS_DIRECTION")
PlacedIO = io.Custom("WPLUS_PLACED_IDENTITY")
LandmarksIO = io.Custom("FACE_LANDMARKS")  # of ComfyUI's own MediaPipe nodes


T = TypeVar("T")


class Managed:
    """A network that ComfyUI's memory management moves to the device and away again; float32 on the CPU."""

    def __init__(self, network: nn.Module):
        device = comfy.model_management.text_encoder_device()
        network = network.float() if device.type == "cpu" else network
        self.patcher = comfy.model_patcher.ModelPatcher(
            network, load_device=device, offload_device=comfy.model_management.text_encoder_offload_device()
        )

    @property
    def network(self) -> nn.Module:
        return self.patcher.model

    def load(self) -> nn.Module:
        """The network, on its device."""
        comfy.model_management.load_model_gpu(self.patcher)
        return self.patcher.model

    @property
    def device(self) -> torch.device:
        return self.patcher.load_device


@dataclass(frozen=True)
class LoadedAdapter:
    name: str
    adapter: WPlusAdapter

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.adapter.parameters()) / 1e6
        return f"W+ adapter {self.name}: {len(self.adapter.layers)} layers, {count:.1f} M parameters"


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder and, if its file has one, the generator that it inverts."""

    name: str
    sha256: str
    encoder: Managed
    generator: Managed | None

    @property
    def patcher(self):
        return self.encoder.patcher

    def __repr__(self) -> str:
        c = self.encoder.network.config
        size = f" and {self.generator.network.config.size} px generator" if self.generator else ", no generator"
        return f"W+ encoder {self.name}: {c.kind}, {c.layers} x {c.w_dim}{size}"

    def load_generator(self) -> nn.Module:
        if self.generator is None:
            raise WPlusError(f"{self.name} holds no generator; load a file with one, such as e4e_ffhq_encode.pt")
        return self.generator.load()


@dataclass
class FaceTools:
    """dlib, loaded when it is first needed, and the face-parsing net if there is one."""

    folders: list[Path]
    parser: Managed | None
    parser_name: str = "none"
    _finder: list[FaceFinder] = field(default_factory=list, repr=False)

    @property
    def finder(self) -> FaceFinder:
        if not self._finder:
            self._finder.append(FaceFinder(self.folders))
        return self._finder[0]

    def __repr__(self) -> str:
        return f"W+ face tools: dlib, parser {self.parser_name}"


@dataclass(frozen=True)
class Crop:
    """One aligned face of a batch of photos. origin: JSON values on where it was found."""

    photo: int
    aligned: AlignedFaces
    origin: dict


@dataclass(frozen=True)
class Crops:
    """The aligned faces of a batch of photos, in the order of the crops' pictures."""

    faces: tuple[Crop, ...]

    def __repr__(self) -> str:
        return f"W+ crops: {len(self.faces)} faces of {len({c.photo for c in self.faces})} photos"


@dataclass(frozen=True)
class InPlace:
    """An edited identity that takes the place of the unedited one after a part `start` of the sampling, in 0..1.

    mask: where it does, [frames or 1, H, W] in 0..1, or None for everywhere.
    """

    identity: Identity
    start: float
    mask: Tensor | None = None

    def __repr__(self) -> str:
        where = "everywhere" if self.mask is None else f"mask {list(self.mask.shape)}"
        return f"from {self.start:.0%} of the sampling on {self.identity}, {where}"


@dataclass(frozen=True)
class Placed:
    """An identity with how strongly and where it acts, and perhaps an edit in its place.

    mask: [frames or 1, H, W] in 0..1, or None for everywhere. by_frame: times the weight, one per frame or one for all.
    """

    identity: Identity
    weight: float = 1.0
    mask: Tensor | None = None
    by_frame: tuple[float, ...] = (1.0,)
    edit: InPlace | None = None

    @property
    def weights(self) -> list[float]:
        return [self.weight * x for x in self.by_frame]

    def __repr__(self) -> str:
        where = "everywhere" if self.mask is None else f"mask {list(self.mask.shape)}"
        edit = f"; {self.edit}" if self.edit else ""
        return f"{self.identity} at {', '.join(f'{x:g}' for x in self.weights)}, {where}{edit}"


def finite_mask(mask: Tensor | None, node: str) -> Tensor | None:
    if mask is not None and not torch.isfinite(mask).all():
        raise WPlusError(f"{node}: the mask holds NaN or infinite values")
    return mask


def placed(item: Identity | Placed) -> Placed:
    return item if isinstance(item, Placed) else Placed(item)


def to_bchw(image: Tensor) -> Tensor:
    """ComfyUI's IMAGE [B, H, W, 3 or 4] → [B, 3, H, W] float32."""
    return image[..., :3].float().movedim(-1, 1).contiguous()


def to_image(x: Tensor) -> Tensor:
    """[B, 3, H, W] in 0..1 → ComfyUI's IMAGE."""
    return x.clamp(0, 1).movedim(1, -1).contiguous().to(comfy.model_management.intermediate_device())


def words(text: str) -> list[str]:
    """What stands between blanks, commas and line ends."""
    return [w for w in re.split(r"[\s,;]+", text) if w]


def numbers(name: str, text: str) -> list[float]:
    """The numbers in the text of the input of this name, up to 1000."""
    try:
        found = [float(word) for word in words(text)]
    except ValueError:
        found = [math.nan]
    if not all(abs(x) <= 1000 for x in found):
        raise WPlusError(f"{name}: expected numbers such as 1, 0.5, got {text!r}")
    return found


def interruptible(bar, before: int = 0) -> Callable[[int, int, float], bool]:
    """A progress callback that moves ComfyUI's bar and lets the user interrupt. before: where the bar starts."""

    def progress(step: int, steps: int, loss: float) -> bool:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(before + step)
        return True

    return progress


def watched(items: Sequence[T]) -> Iterator[T]:
    """The items in turn; ComfyUI's bar moves with them, and the user can interrupt before each."""
    bar = comfy.utils.ProgressBar(len(items))
    for n, item in enumerate(items):
        comfy.model_management.throw_exception_if_processing_interrupted()
        yield item
        bar.update_absolute(n + 1)
