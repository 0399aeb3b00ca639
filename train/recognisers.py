"""Face recognisers from a user's file, and the crop that they look at.

A recogniser maps faces [B, 3, 112, 112] in 0..1 to unit vectors [B, D]; the cosine of two says how alike they are. The
crop is ArcFace's: the similarity that brings both eyes and both corners of the mouth nearest, in least squares, to
their places in insightface's 112 px template (its fifth point, the nose, is left out: FFHQ's alignment has none).
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..wplus_core.align import warp
from ..wplus_core.encoder import Encoder, EncoderConfig
from ..wplus_core.errors import FileError, WPlusError
from ..wplus_core.faces import Landmarks
from ..wplus_core.files import read
from ..wplus_core.state_dicts import config_of, encoder_config, fill, shape, without_prefix

SIDE = 112
TEMPLATE = (38.2946, 51.6963), (73.5318, 51.5014), (41.5493, 92.3655), (70.7299, 92.2041)
WHICH = (
    "Give an ArcFace recogniser of 112 px: an .onnx (such as insightface's w600k_r50.onnx), the weights of an IR-SE-50 "
    "(model_ir_se50.pth, which e4e and pSp train with), or a TorchScript program"
)

Recogniser = Callable[[Tensor], Tensor]


def arcface_crop(photo: Tensor, face: Landmarks) -> Tensor:
    """photo [3, H, W] -> [3, 112, 112], black outside the photo."""
    points = [complex(*p) for p in (face.eye_left, face.eye_right, face.mouth_left, face.mouth_right)]
    a, b = similarity(np.array([complex(*p) for p in TEMPLATE]), np.array(points))
    to_photo = torch.tensor([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag], [0, 0, 1]], dtype=torch.float64)
    return warp(photo[None], to_photo[None], (SIDE, SIDE))[0].clamp(0, 1)


def similarity(p: np.ndarray, q: np.ndarray) -> tuple[complex, complex]:
    """(a, b) that minimise sum |a p + b - q|^2, points being complex numbers."""
    from_p, from_q = p - p.mean(), q - q.mean()
    a = np.vdot(from_p, from_q) / np.vdot(from_p, from_p).real
    return a, q.mean() - a * p.mean()


class ArcFace(nn.Module):
    """The body of the encoders with ArcFace's head, under the names of model_ir_se50.pth (Deng et al., "ArcFace")."""

    def __init__(self, config: EncoderConfig, dim: int = 512):
        super().__init__()
        encoder, channels = Encoder(config), config.channels[-1]
        self.input_layer, self.body = encoder.input_layer, encoder.body
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Dropout(),
            nn.Flatten(),
            nn.Linear(channels * (SIDE // 16) ** 2, dim),
            nn.BatchNorm1d(dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.output_layer(self.body(self.input_layer(x)))


def load_recogniser(path: str | Path, trust: bool = False, device: str | torch.device = "cpu") -> Recogniser:
    """The recogniser of a file, which is told by its content.

    A TorchScript file is a program: it is run only if `trust` says that it may be. Raises FileError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileError(path, "there is no such file", WHICH)
    with open(path, "rb") as f:
        head = f.read(4)
    if is_torchscript(path):
        return torchscript(path, trust, device)
    if head[:1] == b"\x08":  # a protobuf that begins with ONNX's field 1, its version
        return onnx(path)
    return ir_se(path, device)


def is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as z:
        return any(name.split("/", 1)[-1] == "constants.pkl" for name in z.namelist())


def ir_se(path: Path, device: str | torch.device) -> Recogniser:
    contents = read(path)
    state = without_prefix(contents.tensors)
    if "output_layer.3.weight" not in state:
        raise FileError(path, "this is no face recogniser that we know", WHICH)
    config = config_of(contents, EncoderConfig, lambda: encoder_config(state, contents))
    dim = shape(state, "output_layer.3.weight")[0]
    network = fill(lambda: ArcFace(config, dim), state, path).float().to(device)
    return torch.no_grad()(lambda faces: F.normalize(network(faces.to(device) * 2 - 1).float()).cpu())


def torchscript(path: Path, trust: bool, device: str | torch.device) -> Recogniser:
    if not trust:
        raise FileError(
            path,
            "this is a TorchScript program, which can do anything that you can",
            "If you trust where it comes from, give --measure.trust-torchscript; or " + WHICH[0].lower() + WHICH[1:],
        )
    try:
        network = torch.jit.load(path, map_location=device).eval()
    except RuntimeError as e:
        raise FileError(path, f"damaged TorchScript ({e})", WHICH) from e
    return torch.no_grad()(lambda faces: F.normalize(network(faces.to(device) * 2 - 1).float().flatten(1)).cpu())


def onnx(path: Path) -> Recogniser:
    runtime = import_or_say("onnxruntime", "an .onnx recogniser")
    try:
        session = runtime.InferenceSession(str(path), providers=runtime.get_available_providers())
    except Exception as e:  # onnxruntime raises a class of its own for every kind of damage
        raise FileError(path, f"damaged ONNX ({type(e).__name__})", WHICH) from e
    (given,) = session.get_inputs()
    batch, *form = given.shape
    if any(isinstance(n, int) and n != want for n, want in zip(form, (3, SIDE, SIDE), strict=False)) or len(form) != 3:
        raise FileError(path, f"it reads pictures of {given.shape}, not [B, 3, {SIDE}, {SIDE}]", WHICH)

    def recognise(faces: Tensor) -> Tensor:
        parts = (faces * 2 - 1).float().cpu().split(1 if batch == 1 else len(faces))
        vectors = [torch.from_numpy(session.run(None, {given.name: x.numpy()})[0]) for x in parts]
        return F.normalize(torch.cat(vectors).float().flatten(1))

    return recognise


def import_or_say(module: str, what: str, install: str = "") -> Any:
    """A module that only this needs; WPlusError says how to install it."""
    try:
        return __import__(module, fromlist=["*"])
    except ImportError as e:
        raise WPlusError(f"{what} needs {module} ({e}). Install it with: pip install {install or module}") from e
