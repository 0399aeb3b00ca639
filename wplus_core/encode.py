"""Photos to identities.

    python -m comfyui_wplus.wplus_core.encode PHOTOS... --encoder e4e_ffhq_encode.pt --out DIR

PHOTOS are picture files or folders of them. Writes DIR/NAME.safetensors per photo, its crop as DIR/crops/NAME.png, and
DIR/contact_sheet.png. A photo that cannot be used is listed at the end with the reason; a second run does only what
is missing or was made with another encoder or other settings. Exits 0 if there is at least one identity, 1 if there is
none, 2 if the options or model files are wrong.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from .align import PADDINGS, AlignedFaces, align
from .background import WITHOUT_PARSER, Regions, remove_background, resize
from .checkpoints import load_encoder, load_generator, load_identity, load_parser, save_identity
from .encoder import Encoder
from .errors import FileError, WPlusError
from .faces import ORDERS, Face, FaceFinder, pick
from .files import sha256
from .identity import Identity
from .parsing import FaceParser
from .photos import Photo, load_photo, save_png, to_uint8
from .refine import RefineConfig, refine
from .sheets import grid

log = logging.getLogger(__name__)

CROP = 512
THUMBNAIL = 192
COLUMNS, PAGE = 6, 240  # identities in a row and on a page of the contact sheet
SMALL_FACE = 160  # px of crop side; below it the encoder sees mostly blur
OUTLIER = 1.3
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Choice:
    """Which face of a photo, and what lies outside the photo in its crop. face: index in `order`."""

    face: int = 0
    order: str = "largest"
    padding: str = "reflect"


@dataclass(frozen=True)
class Crop:
    """One aligned face of a photo, ready for the encoder, and how it came about (JSON values)."""

    name: str
    aligned: AlignedFaces
    origin: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Encoded:
    """seen: [3, s, s] in 0..1, what the encoder saw. regions: the crop's, if there was a parser."""

    identity: Identity
    crop: Crop
    seen: Tensor
    regions: Regions | None


def crop_face(photo: Photo | Tensor, find: Callable[..., list[Face]] | Sequence[Face], choice: Choice, name="") -> Crop:
    """A photo [3, H, W] in 0..1, and a `FaceFinder` or faces already known → the chosen face's crop of 512 px."""
    pixels = photo.pixels if isinstance(photo, Photo) else photo
    name = name or (photo.path.stem if isinstance(photo, Photo) else "photo")
    face = pick(find(photo, choice.order, name) if callable(find) else find, choice.face)
    if face.size < SMALL_FACE:
        log.info("%s: the face is %.0f px large; from %d px on the likeness is better", name, face.size, SMALL_FACE)
    origin = {"box": list(face.box), "score": round(face.score, 3), "detector": face.detector, "side": face.size}
    if isinstance(photo, Photo):
        origin |= {"file": photo.path.name, "sha256": photo.sha256}
    return Crop(name, align(pixels, [face.landmarks], CROP, choice.padding), origin)


def encode(
    crops: Iterable[Crop],
    encoder: Encoder,
    parser: FaceParser | None = None,
    batch: int = 8,
    made_with: dict[str, Any] | None = None,
) -> Iterator[Encoded]:
    """Crops → an identity each, in batches, in the encoder's device and dtype.

    made_with: JSON values for the provenance, such as the encoder's file.
    """
    if parser is None:
        log.warning(WITHOUT_PARSER)
    crops = iter(crops)
    while some := list(islice(crops, batch)):
        w, seen, regions = codes(torch.cat([c.aligned.images for c in some]), encoder, parser)
        for n, crop in enumerate(some):
            here = {"source": "photo", "photos": [crop.origin], "background_removed": parser is not None}
            identity = Identity(
                w[n, None], crop.name, here | (made_with or {}), thumbnail(crop.aligned.images[0]), average_of(encoder)
            )
            yield Encoded(identity, crop, seen[n], regions and Regions(regions.classes[n, None]))


def thumbnail(image: Tensor) -> Tensor:
    """An aligned face [3, S, S] in 0..1 → [192, 192, 3] in uint8."""
    return torch.from_numpy(to_uint8(resize(image[None], THUMBNAIL)[0]))


def average_of(encoder: Encoder) -> Tensor:
    """The encoder's average face [L, 512], float32 on the CPU."""
    return encoder.latent_avg.float().cpu()


@torch.no_grad()
def codes(images: Tensor, encoder: Encoder, parser: FaceParser | None = None) -> tuple[Tensor, Tensor, Regions | None]:
    """Aligned faces [B, 3, S, S] in 0..1 → codes [B, L, 512] float32, what the encoder saw [B, 3, s, s], regions."""
    height, width = images.shape[-2:]
    if height != width:
        raise WPlusError(f"expected aligned faces, which are square, got {width} x {height}; align the photo first")
    weight = next(encoder.parameters())
    seen, regions = remove_background(images, parser, encoder.config.image_size)
    w = encoder((seen * 2 - 1).to(weight)).float().to(images.device)
    if not w.isfinite().all():
        raise WPlusError(f"the encoder gave NaN or infinite codes in {weight.dtype}; use fp32 or bf16")
    return w, seen, regions


def average(identities: Sequence[Identity], name: str = "") -> Identity:
    """One person's identities → their mean code, with a note in the provenance for a photo that disagrees.

    A photo disagrees if it is `OUTLIER` times as far from the mean of the others as is usual; from three photos on.
    """
    if not identities:
        raise WPlusError("nothing to average: no photo gave a code")
    if len({i.w.shape[1:] for i in identities}) > 1:
        raise WPlusError(f"codes of different generators: {[list(i.w.shape) for i in identities]}")
    w = torch.cat([i.w for i in identities])
    names = [i.name for i in identities for _ in i.w]
    photo = [n if names.count(n) == 1 and n else f"photo {i} {n}".strip() for i, n in enumerate(names, 1)]
    notes = [
        f"{photo[n]} disagrees with the others ({ratio:.1f} x the usual distance); is it the same person?"
        for n, ratio in enumerate(disagreement(w))
        if ratio > OUTLIER
    ]
    for note in notes:
        log.warning(note)
    photos = [p for i in identities for p in i.provenance.get("photos", [])]
    provenance = identities[0].provenance | {"photos": photos, "averaged": len(w), "notes": notes}
    first = identities[0]
    return Identity(w.mean(0, keepdim=True), name or names[0], provenance, first.thumbnail, first.average)


def disagreement(w: Tensor) -> list[float]:
    """Codes [B, L, 512] → each one's distance to the mean of the others, over the median of these; [] for B < 3."""
    if len(w) < 3:
        return []
    others = (w.sum(0) - w) / (len(w) - 1)
    d = (w - others).flatten(1).norm(dim=1)
    return (d / d.median().clamp(min=1e-9)).tolist()


def contact_sheet(identities: Iterable[Identity]) -> Image.Image:
    """The identities' thumbnails with their names, for those that have one."""
    tiles = [i for i in identities if i.thumbnail is not None]
    pictures = [i.thumbnail.permute(2, 0, 1).float() / 255 for i in tiles]
    return grid(pictures, min(COLUMNS, len(tiles)), [i.name for i in tiles])


class Run:
    """One call of the command line: models, where things go, and what became of each photo."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.out = args, Path(args.out)
        device, dtype = torch.device(args.device), DTYPES[args.dtype]
        if args.dtype == "fp16" and device.type == "cpu":
            log.warning("fp16 is many times slower than fp32 on a CPU; bf16 is not")
        self.encoder = load_encoder(args.encoder).to(device, dtype).eval()
        self.parser = load_parser(args.parser).to(device, dtype).eval() if args.parser else None
        self.generator = load_generator(args.encoder).to(device).float().eval() if args.refine else None
        self.find = FaceFinder(args.faces_models)
        self.choice = Choice(args.face, args.order, args.padding)
        self.made_with = {
            "encoder": {"file": Path(args.encoder).name, "sha256": sha256(args.encoder)},
            "parser": sha256(args.parser) if args.parser else None,
            "choice": asdict(self.choice),
            "dtype": args.dtype,
            "refine_steps": args.refine,
        }
        self.done: list[Path] = []
        self.skipped: list[tuple[Path, str]] = []
        (self.out / "crops").mkdir(parents=True, exist_ok=True)

    def photos(self, paths: Sequence[Path]) -> None:
        """Encode what is missing, a batch at a time."""
        if self.args.average in [name for name, _ in named(paths)]:
            raise WPlusError(f"--average {self.args.average} is also a photo's name; choose another name")
        for e in encode(self.crops(paths), self.encoder, self.parser, self.args.batch, self.made_with):
            identity = self.refined(e) if self.generator else e.identity
            save_png(e.crop.aligned.images[0], self.out / "crops" / f"{e.crop.name}.png")
            save_identity(identity, self.out / f"{e.crop.name}.safetensors")
            self.done.append(self.out / f"{e.crop.name}.safetensors")

    def crops(self, paths: Sequence[Path]) -> Iterator[Crop]:
        for name, path in tqdm(named(paths), unit="photo", disable=None):
            try:
                if not self.is_there(name, path):
                    yield crop_face(load_photo(path), self.find, self.choice, name)
            except (WPlusError, RuntimeError, MemoryError) as error:
                self.skipped.append((path, str(error).removeprefix(f"{path}: ")))

    def is_there(self, name: str, path: Path) -> bool:
        target = self.out / f"{name}.safetensors"
        try:
            known = load_identity(target).provenance
            same = {k: known.get(k) for k in self.made_with} == self.made_with
            same = same and [p.get("sha256") for p in known["photos"]] == [sha256(path)]
        except (FileError, OSError, KeyError):
            return False
        if same and (self.out / "crops" / f"{name}.png").is_file():
            self.done.append(target)
            return True
        return False

    def refined(self, e: Encoded) -> Identity:
        config = RefineConfig(steps=self.args.refine)
        return refine(e.identity, e.seen[None], self.generator, self.encoder.latent_avg, config=config)

    def finish(self) -> int:
        """The average, the contact sheet and the list of what was skipped; → the exit status."""
        identities = [load_identity(p) for p in self.done]
        if self.args.average and identities:
            save_identity(average(identities, self.args.average), self.out / f"{self.args.average}.safetensors")
        for n in range(0, len(identities), PAGE):
            page = f"_{n // PAGE + 1}" if n else ""
            contact_sheet(identities[n : n + PAGE]).save(self.out / f"contact_sheet{page}.png")
        print(f"{len(identities)} identities in {self.out}")
        for path, reason in self.skipped:
            print(f"skipped {path}: {reason}")
        return 0 if identities else 1


def named(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """A file name per photo: its stem, and the folder's name before it where two photos share a stem."""
    stems = [re.sub(r"[^\w.-]+", "_", p.stem) for p in paths]
    names = [f"{p.parent.name}_{s}" if stems.count(s) > 1 else s for p, s in zip(paths, stems, strict=True)]
    return [(n if names.count(n) == 1 else f"{n}_{i}", p) for i, (n, p) in enumerate(zip(names, paths, strict=True))]


def expand(photos: Sequence[str]) -> list[Path]:
    """Files as they are, folders as the files in them; each once."""
    paths: dict[Path, None] = {}
    for p in map(Path, photos):
        inside = [f for f in sorted(p.iterdir()) if f.is_file() and not f.name.startswith(".")] if p.is_dir() else [p]
        paths |= dict.fromkeys(inside)
    return list(paths)


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, got {text!r}")
    return int(text)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m comfyui_wplus.wplus_core.encode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("photos", nargs="+", metavar="PHOTOS")
    add("--encoder", required=True, help="e4e or pSp file")
    add("--out", required=True, metavar="DIR")
    add("--faces-models", action="append", default=[], metavar="DIR", help="folder with dlib's .dat files; repeatable")
    add("--parser", metavar="FILE", help="parse_multi_iter_90000.pth, to remove the background")
    add("--face", type=int, default=0, help="index of the face in each photo, from 0 (0)")
    add("--order", choices=ORDERS, default="largest", help="what the index counts (largest)")
    add("--padding", choices=PADDINGS, default="reflect", help="what lies outside the photo (reflect)")
    add("--average", metavar="NAME", help="all photos show one person: also write their mean as NAME")
    add("--refine", type=int, default=0, metavar="STEPS", help="optimise each code; needs a file with a generator")
    add("--batch", type=at_least_one, default=8, help="faces encoded at once (8)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, default="fp32")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    args = arguments().parse_args(argv)
    try:
        run = Run(args)
        run.photos(expand(args.photos))
        return run.finish()
    except (WPlusError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
