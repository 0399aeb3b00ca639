"""What is measured of generated pictures, each from files that the user has: nothing is ever downloaded.

A measurer gives each picture some numbers, a set measurer gives some to all pictures of a method. Anything of these
forms can be handed to `evaluate`, ground truth too. Numbers and their names:

    clip               cosine of CLIP's picture and text vectors, -1 to 1; the paper's is CLIP-L/14
    detection          1 where the detector finds a face, else 0
    id                 1 - cosine of the recogniser's vectors of the picture and of the identity's photo, 0 to 2
    id_kept            the same between an edited picture and the one before the edit
    top1               1 where no other identity's photo is nearer to the picture than its own, else 0
    background_change  mean |edited - before| over the pixels outside both faces, of values in 0..1
    face_change        the same inside them
    moved              how far the edited face's e4e code went along the edit's direction, in units of strength
    lpips              distance of the unedited picture and the identity's photo (Zhang et al., CVPR 2018)
    fid                Frechet distance of the unedited pictures and photos in Inception's features

Where no face is found, what needs one is NaN and is left out of means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..wplus_core.align import align, project_mask
from ..wplus_core.background import parse, resize
from ..wplus_core.directions import Direction
from ..wplus_core.encode import codes
from ..wplus_core.encoder import Encoder
from ..wplus_core.errors import FileError, WPlusError
from ..wplus_core.faces import FaceFinder, Landmarks, from_5
from ..wplus_core.files import read
from ..wplus_core.parsing import FaceParser
from ..wplus_core.photos import to_uint8
from ..wplus_core.state_dicts import fill, part
from .recognisers import Recogniser, arcface_crop, import_or_say

NAN = math.nan
HEAD = 0.8  # half side of the square that counts as the face without a parser, by that of FFHQ's crop: brow to chin
LEAST_OUTSIDE = 0.02  # part of the picture; with less of it there is no background to speak of
LPIPS_NETS = {(64, 3, 11, 11): "alex", (64, 3, 3, 3): "vgg"}


@dataclass(frozen=True, eq=False)
class Picture:
    """pixels: [3, H, W] in 0..1. key: one per picture; what was found in it is remembered by it."""

    key: str
    pixels: Tensor


@dataclass(frozen=True, eq=False)
class Shown:
    """A generated picture and what it can be compared with.

    reference: the identity's photo. before: the picture of the same method and noise without the edit, None if this is
    it. edit: the direction's name, with its strength.
    """

    picture: Picture
    prompt: str
    identity: str
    reference: Picture | None = None
    before: Picture | None = None
    edit: str = ""
    strength: float = 0.0


class Measurer(Protocol):
    def __call__(self, shown: Sequence[Shown]) -> dict[str, list[float]]:
        """Names, with a number for each picture; NaN where there is none."""


class SetMeasurer(Protocol):
    def __call__(self, pictures: Iterable[Tensor]) -> dict[str, float]:
        """Names, with a number for all pictures [B, 3, H, W] together."""


Detector = Callable[[Picture], Landmarks | None]


class Remembered:
    """A detector that looks at each picture once."""

    def __init__(self, detector: Detector):
        self.detector, self.known = detector, {}

    def __call__(self, picture: Picture) -> Landmarks | None:
        if picture.key not in self.known:
            self.known[picture.key] = self.detector(picture)
        return self.known[picture.key]


class DlibFaces:
    """The largest face that dlib finds (HOG, then the CNN where its file is there). Not the paper's detector."""

    def __init__(self, folders: Iterable[str | Path] = ()):
        self.find = FaceFinder(folders)

    def __call__(self, picture: Picture) -> Landmarks | None:
        try:
            return self.find(picture.pixels)[0].landmarks
        except WPlusError:  # none found
            return None


class MtcnnFaces:
    """The largest face that MTCNN finds, as in the paper; facenet-pytorch brings its weights along."""

    def __init__(self, device: str | torch.device = "cpu"):
        mtcnn = import_or_say("facenet_pytorch", "the detector mtcnn", "--no-deps facenet-pytorch")
        self.net = mtcnn.MTCNN(keep_all=True, device=device)

    def __call__(self, picture: Picture) -> Landmarks | None:
        _, _, points = self.net.detect(to_uint8(picture.pixels), landmarks=True)
        faces = [from_5(p.astype(float)) for p in points] if points is not None else []
        return max(faces, key=lambda f: f.size, default=None)


class Detection:
    def __init__(self, detector: Detector):
        self.detector = detector

    def __call__(self, shown: Sequence[Shown]) -> dict[str, list[float]]:
        return {"detection": [float(self.detector(s.picture) is not None) for s in shown]}


class IdentityDistance:
    """gallery: (identity, photo) pairs, among which a picture's own identity should be the nearest."""

    def __init__(self, recogniser: Recogniser, detector: Detector, gallery: Iterable[tuple[str, Picture]] = ()):
        self.recogniser, self.detector = recogniser, detector
        self.known: dict[str, Tensor] = {}
        self.gallery: dict[str, str] = {}
        for identity, photo in gallery:
            self.embed([photo])
            self.gallery[identity] = photo.key

    def __call__(self, shown: Sequence[Shown]) -> dict[str, list[float]]:
        self.embed([p for s in shown for p in (s.picture, s.reference, s.before) if p is not None])
        return {
            "id": [self.distance(s.picture.key, s.reference and s.reference.key) for s in shown],
            "id_kept": [self.distance(s.picture.key, s.before and s.before.key) for s in shown],
            "top1": [self.is_nearest(s) for s in shown],
        }

    def embed(self, pictures: Sequence[Picture]):
        new = {p.key: p for p in pictures if p.key not in self.known}
        crops = {k: arcface_crop(p.pixels, face) for k, p in new.items() if (face := self.detector(p)) is not None}
        if crops:
            self.known |= zip(crops, self.recogniser(torch.stack(list(crops.values()))), strict=True)

    def distance(self, a: str, b: str | None) -> float:
        """Of two pictures, by their keys."""
        return 1 - float(self.known[a] @ self.known[b]) if a in self.known and b in self.known else NAN

    def is_nearest(self, s: Shown) -> float:
        distances = {name: self.distance(s.picture.key, key) for name, key in self.gallery.items()}
        own = distances.get(s.identity, NAN)
        others = [d for d in distances.values() if not math.isnan(d)]
        return NAN if math.isnan(own) or len(others) < 2 else float(own <= min(others))


class BackgroundChange:
    """parser: tells the head from the background; without it a square around the face counts as the head."""

    def __init__(self, detector: Detector, parser: FaceParser | None = None):
        self.detector, self.parser = detector, parser

    def __call__(self, shown: Sequence[Shown]) -> dict[str, list[float]]:
        pairs = [self.change(s.picture, s.before) for s in shown]
        return {"background_change": [x for x, _ in pairs], "face_change": [x for _, x in pairs]}

    def change(self, picture: Picture, before: Picture | None) -> tuple[float, float]:
        if before is None or (first := self.detector(before)) is None:
            return NAN, NAN
        second = self.detector(picture)
        inside = self.head(before.pixels, first)
        inside = inside if second is None else torch.maximum(inside, self.head(picture.pixels, second))
        difference = (picture.pixels - before.pixels).abs().mean(0)
        return mean_where(difference, 1 - inside), mean_where(difference, inside)

    def head(self, pixels: Tensor, face: Landmarks) -> Tensor:
        """[H, W], 1 on the head."""
        if self.parser is None:
            return face_square(face, pixels.shape[1:])
        crop = align(pixels, [face])
        mask = parse(crop.images, self.parser).mask("head")
        return project_mask(F.max_pool2d(mask, 17, 1, 8), crop)[0, 0]


def face_square(face: Landmarks, size: Sequence[int]) -> Tensor:
    """[H, W], 1 in a square as FFHQ's crop, `HEAD` times as large."""
    centre, right = face.axes()
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    half = float(right @ right)
    along = ((x - centre[0]) * right[0] + (y - centre[1]) * right[1]).abs() / half
    across = ((x - centre[0]) * right[1] - (y - centre[1]) * right[0]).abs() / half
    return ((along <= HEAD) & (across <= HEAD)).float()


def mean_where(x: Tensor, weight: Tensor) -> float:
    return float((x * weight).sum() / weight.sum()) if weight.mean() > LEAST_OUTSIDE else NAN


class Moved:
    """Needs an e4e encoder: how far the face itself went, as the encoder sees it, of the strength asked for."""

    def __init__(
        self, encoder: Encoder, directions: dict[str, Direction], detector: Detector, parser: FaceParser | None = None
    ):
        self.encoder, self.directions, self.detector, self.parser = encoder, directions, detector, parser
        self.known: dict[str, Tensor | None] = {}

    def __call__(self, shown: Sequence[Shown]) -> dict[str, list[float]]:
        return {"moved": [self.distance(s) for s in shown]}

    def distance(self, s: Shown) -> float:
        if s.before is None or (w := self.code(s.picture)) is None or (start := self.code(s.before)) is None:
            return NAN
        direction = self.directions[s.edit]
        unit = direction.unit * direction.rows(len(w)).to(w)
        return float(((w - start) * unit).sum() / unit.square().sum())

    def code(self, picture: Picture) -> Tensor | None:
        if picture.key not in self.known:
            face = self.detector(picture)
            crop = None if face is None else align(picture.pixels, [face]).images
            self.known[picture.key] = None if crop is None else codes(crop, self.encoder, self.parser)[0][0].cpu()
        return self.known[picture.key]


class ClipScore:
    """folder: a CLIP model with its processor, as transformers saves it; the paper's is CLIP-L/14."""

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu"):
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise FileError(
                folder,
                "no CLIP model here",
                "--measure.clip takes a folder such as `hf download openai/clip-vit-large-patch14 --local-dir` makes",
            )
        try:
            parts = [c.from_pretrained(folder, local_files_only=True) for c in (CLIPImageProcessor, CLIPTokenizer)]
            self.model = CLIPModel.from_pretrained(folder, local_files_only=True).to(device).eval()
        except (OSError, ValueError) as e:
            raise FileError(folder, f"no complete CLIP model ({e})", "Download the whole repository again") from e
        self.images, self.tokens = parts

    @torch.no_grad()
    def __call__(self, shown: Sequence[Shown]) -> dict[str, list[float]]:
        images = self.images([to_uint8(s.picture.pixels) for s in shown], return_tensors="pt")
        text = self.tokens([s.prompt for s in shown], padding=True, truncation=True, return_tensors="pt")
        out = self.model(**{k: x.to(self.model.device) for k, x in (images | text).items()})
        return {"clip": F.cosine_similarity(out.image_embeds, out.text_embeds).tolist()}


class Lpips:
    """backbone: torchvision's alexnet-owt-*.pth (the usual choice) or vgg16-*.pth; torchmetrics brings the heads."""

    def __init__(self, backbone: str | Path, device: str | torch.device = "cpu"):
        lpips = import_or_say("torchmetrics.functional.image.lpips", "LPIPS", "torchmetrics")
        state = part(read(backbone).tensors, "features.")
        name = LPIPS_NETS.get(tuple(state.get("0.weight", torch.empty(0)).shape))
        if name is None:
            raise FileError(
                backbone,
                "no AlexNet or VGG-16 of torchvision",
                "--measure.lpips takes download.pytorch.org/models/alexnet-owt-7be5be79.pth (or vgg16-397923af.pth)",
            )
        network = lpips._LPIPS(net=name, pnet_rand=True)  # the public class would download the backbone
        layers = {k.split(".", 1)[1]: k for k in network.net.state_dict()}  # slice1.0.weight is features.0.weight
        network.net = fill(lambda: network.net.to("meta"), {layers.get(k, k): x for k, x in state.items()}, backbone)
        self.network = network.to(device).eval()

    @torch.no_grad()
    def __call__(self, shown: Sequence[Shown]) -> dict[str, list[float]]:
        return {"lpips": [NAN if s.edit or s.reference is None else self.distance(s) for s in shown]}

    def distance(self, s: Shown) -> float:
        x = s.picture.pixels[None]
        y = resize(s.reference.pixels[None], x.shape[-1])
        device = next(self.network.parameters()).device
        return float(self.network(x.to(device), y.to(device), normalize=True))


class Fid:
    """features: Inception's weights file as torch-fidelity reads it, or any module that maps uint8 pictures to [B, D].

    photos: what real pictures are; pictures of any size.
    """

    def __init__(self, features: str | Path | nn.Module, photos: Iterable[Tensor], device: str | torch.device = "cpu"):
        fid = import_or_say("torchmetrics.image.fid", "FID", "torchmetrics torch-fidelity")
        options = {} if isinstance(features, nn.Module) else {"feature_extractor_weights_path": inception(features)}
        module = features if isinstance(features, nn.Module) else 2048
        self.metric = fid.FrechetInceptionDistance(module, reset_real_features=False, **options).to(device)
        self.count = self.add(photos, real=True)
        if self.count < 2:
            raise WPlusError(f"FID needs at least two real photos, got {self.count}; --measure.real takes their folder")

    def __call__(self, pictures: Iterable[Tensor]) -> dict[str, float]:
        self.metric.reset()
        return {"fid": float(self.metric.compute())} if self.add(pictures, real=False) > 1 else {}

    def add(self, pictures: Iterable[Tensor], real: bool) -> int:
        count = 0
        for batch in pictures:
            self.metric.update((batch * 255).round().byte().to(self.metric.device), real=real)
            count += len(batch)
        return count


def inception(path: str | Path) -> str:
    """The path, if the file is there and holds tensors alone: torch-fidelity would execute whatever else it holds."""
    if not Path(path).is_file():
        raise FileError(
            path,
            "there is no such file",
            "--measure.inception takes weights-inception-2015-12-05-6726825d.pth of github.com/toshas/torch-fidelity",
        )
    read(path, "meta")
    import_or_say("torch_fidelity", "FID", "torch-fidelity")
    return str(path)
