"""How fast and how faithful photo → W+ is: our alignment against the reference's way, then every step of the path.

    python benchmarks/photo.py [PHOTOS...] [--repeats 5] [--device cpu]

Without PHOTOS: the shared test photo, scikit-image's astronaut, and both enlarged, so that crops are larger and smaller
than the 512 px output. Both ways get the same landmarks, pixels in memory, black padding and one thread (Pillow has no
more), and take turns; times are the best of the repeats. The networks have the published sizes and random weights: the
time is the same, the codes mean nothing. The last line is one JSON object; align_speedup is total over total,
align_psnr_db the worst photo's.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from comfyui_wplus.wplus_core.align import align
from comfyui_wplus.wplus_core.background import remove_background
from comfyui_wplus.wplus_core.encoder import EncoderConfig, build_encoder
from comfyui_wplus.wplus_core.faces import FaceFinder, Landmarks
from comfyui_wplus.wplus_core.parsing import FaceParser
from comfyui_wplus.wplus_core.photos import load_photo, to_uint8
from PIL import Image
from torch import Tensor

SHARED_PHOTO = Path(__file__).resolve().parents[2] / "shared/data/photos/1.jpg"
SIZE = 512
STEPS = ("open", "find", "align", "parse", "encode")


def reference_align(photo: Image.Image, face: Landmarks) -> Image.Image:
    """FFHQ's square sampled to 4096² and shrunk; a pixel's centre is at 0.5 for Pillow."""
    c, x = face.axes()
    y = np.array([-x[1], x[0]])
    corners = np.concatenate([c - x - y, c - x + y, c + x + y, c + x - y]) + 0.5
    large = photo.transform((4096, 4096), Image.Transform.QUAD, corners, Image.Resampling.BILINEAR)
    return large.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def best(repeats: int, function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the fastest call, and what it returned."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times), result


def psnr(a: Tensor, b: Tensor) -> float:
    return -10 * math.log10((a - b).square().mean().item() + 1e-12)


def default_photos(folder: Path) -> Iterator[Path]:
    from skimage.data import astronaut

    pictures = {"astronaut": Image.fromarray(astronaut())}
    if SHARED_PHOTO.is_file():
        pictures["1"] = Image.open(SHARED_PHOTO).convert("RGB")
    for name, picture in pictures.items():
        for scale in (1, 2, 4):
            path = folder / f"{name}_x{scale}.jpg"
            picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.LANCZOS).save(
                path, quality=95
            )
            yield path


def compare_alignment(photos: list[Path], find: FaceFinder, repeats: int, device: str) -> list[dict[str, float]]:
    rows = []
    for path in photos:
        photo = load_photo(path)
        face = find(photo)[0].landmarks
        picture, pixels = Image.fromarray(to_uint8(photo.pixels)), photo.pixels.to(device)
        theirs_s = ours_s = math.inf
        for _ in range(repeats):
            seconds, theirs = best(1, lambda i=picture, f=face: reference_align(i, f))
            theirs_s = min(theirs_s, seconds)
            seconds, ours = best(2, lambda p=pixels, f=face: align(p, [f], SIZE, "black"))
            ours_s = min(ours_s, seconds)
        db = psnr(ours.images[0].cpu(), torch.from_numpy(np.array(theirs)).permute(2, 0, 1) / 255)
        rows.append({"reference": theirs_s, "ours": ours_s, "psnr": db})
        print(
            f"{path.stem:14s} {picture.width:5d} x {picture.height:<5d} crop {face.size:5.0f} px   reference "
            f"{theirs_s * 1e3:4.0f} ms   ours {ours_s * 1e3:5.1f} ms   {theirs_s / ours_s:5.1f} x   {db:.1f} dB"
        )
    return rows


@torch.no_grad()
def time_steps(path: Path, find: FaceFinder, parser: FaceParser, encoder: torch.nn.Module, repeats: int, device: str):
    """Seconds of each of `STEPS` for one photo."""
    opened, photo = best(repeats, lambda: load_photo(path))
    found, faces = best(repeats, lambda: find(photo))
    aligned, crop = best(repeats, lambda: align(photo.pixels.to(device), [faces[0].landmarks]))
    parsed, (seen, _) = best(1, lambda: remove_background(crop.images, parser))
    encoded, _ = best(2, lambda: encoder(seen * 2 - 1))
    return dict(zip(STEPS, (opened, found, aligned, parsed, encoded), strict=True))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("photos", nargs="*", type=Path)
    arguments.add_argument("--repeats", type=int, default=5)
    arguments.add_argument("--device", default="cpu")
    args = arguments.parse_args()
    find = FaceFinder()
    with TemporaryDirectory() as folder:
        photos = args.photos or list(default_photos(Path(folder)))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        rows = compare_alignment(photos, find, args.repeats, args.device)
        torch.set_num_threads(threads)
        parser, encoder = (m.to(args.device).eval() for m in (FaceParser(), build_encoder(EncoderConfig())))
        steps = time_steps(photos[0], find, parser, encoder, args.repeats, args.device)
    print("  ".join(f"{k} {v:.3f} s" for k, v in steps.items()))
    report = {
        "align_speedup": round(sum(r["reference"] for r in rows) / sum(r["ours"] for r in rows), 1),
        "align_psnr_db": round(min(r["psnr"] for r in rows), 1),
        "photo_to_w_s": round(sum(steps.values()), 3),
        "steps_s": {k: round(v, 4) for k, v in steps.items()},
        "device": args.device,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
