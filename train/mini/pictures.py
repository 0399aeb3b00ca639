"""Drawn scenes and faces, kept on disk as they are needed many times: pictures, crops, masks and who is in them.

    OUT/pictures/images.npy   uint8 [N, 3, 128, 128]
    OUT/pictures/crops.npy    uint8 [N, 3, 64, 64], the aligned face on white, cut from the picture
    OUT/pictures/masks.npy    uint8 [N, 1, 32, 32], the face's share of each place
    OUT/pictures/truth.safetensors   factors [N, F], five points [N, 5, 2] in pixels and the label numbers [N, 6]

Every fourth picture is an aligned face on white, which has the labels -1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.format import open_memmap
from torch import Tensor

from ...wplus_core.files import read, write_safetensors, write_whole
from ..draws import stream
from . import scenes, world

SIZE, CROP, MASK = 128, 64, 32
EVERY_FACE = 4
CHUNK = 256
FILES = {"images": (3, SIZE, SIZE), "crops": (3, CROP, CROP), "masks": (1, MASK, MASK)}
TRUTH = {"z": (len(world.FACTORS),), "points": (5, 2), "labels": (len(scenes.LABELS),)}


def draw(n: int, rng: np.random.Generator, device: str = "cpu") -> dict[str, Tensor]:
    """n pictures by the names of `FILES`, in 0..1, with what `TRUTH` names."""
    z, scene = world.sample(n, rng), scenes.sample_scenes(n, rng)
    labels = torch.stack([getattr(scene, name) for name in scenes.LABELS], 1)
    z, pictures = z.to(device), scenes.scenes(z.to(device), scene.to(device), SIZE)
    images, masks, points = pictures.images, pictures.masks, pictures.points
    crops = aligned(images * masks + 1 - masks, points)
    rows = slice(0, None, EVERY_FACE)
    images[rows], crops[rows], masks[rows], labels[rows] = world.faces(z[rows], SIZE), world.faces(z[rows], CROP), 1, -1
    points[rows] = world.points_in_crop(z[rows], SIZE)
    masks = F.adaptive_avg_pool2d(masks, MASK)
    return {"images": images, "crops": crops, "masks": masks, "z": z, "points": points, "labels": labels}


def aligned(images: Tensor, points: Tensor, size: int = CROP) -> Tensor:
    """FFHQ crops [B, 3, size, size] of pictures [B, 3, S, S] with five points [B, 5, 2]; white outside the picture."""
    to_picture = world.ffhq(points, size)
    x = torch.arange(size, dtype=images.dtype, device=images.device)
    pixels = torch.stack([*torch.meshgrid(x, x, indexing="xy"), torch.ones_like(x).expand(size, size)], -1)
    at = torch.einsum("bij,hwj->bhwi", to_picture[:, :2], pixels)
    grid = (2 * at + 1) / images.shape[-1] - 1
    return F.grid_sample(images - 1, grid, align_corners=False) + 1


def caption(labels: list[int]) -> str:
    """The caption of one row of label numbers."""
    if labels[0] < 0:
        return world.NEUTRAL
    return scenes.caption(labels)


def make(out: Path, count: int, device: str, seed: int = 11) -> Path:
    """Draw them, CHUNK at a time; a killed run goes on where it was."""
    folder, done = out / "pictures", out / "pictures" / "done"
    folder.mkdir(parents=True, exist_ok=True)
    mode = "r+" if done.is_file() else "w+"
    arrays = {k: open_memmap(folder / f"{k}.npy", mode, np.uint8, (count, *shape)) for k, shape in FILES.items()}
    for k, shape in TRUTH.items():
        dtype = np.int64 if k == "labels" else np.float32
        arrays[k] = open_memmap(folder / f"{k}.npy", mode, dtype, (count, *shape))
    for start in range(int(done.read_text()) if mode == "r+" else 0, count, CHUNK):
        n = min(CHUNK, count - start)
        drawn = draw(n, stream(seed, start), device)
        for k, x in drawn.items():
            arrays[k][start : start + n] = (x * 255).round().byte().cpu().numpy() if k in FILES else x.cpu().numpy()
            arrays[k].flush()
        write_whole(done, lambda p, end=start + n: p.write_text(str(end)))
    truth = {k: torch.from_numpy(np.array(arrays[k])) for k in TRUTH}
    write_safetensors(folder / "truth.safetensors", truth, {})
    return folder / "truth.safetensors"


class Pictures:
    """The pictures on disk; `images(rows)` and so on give floats in 0..1."""

    def __init__(self, out: Path):
        self.folder = out / "pictures"
        truth = read(self.folder / "truth.safetensors").tensors
        self.z, self.points, self.labels = (truth[k] for k in TRUTH)
        self.arrays = {k: np.load(self.folder / f"{k}.npy", mmap_mode="r") for k in FILES}

    def __len__(self) -> int:
        return len(self.z)

    def get(self, name: str, rows) -> Tensor:
        return torch.from_numpy(np.array(self.arrays[name][rows])).float() / 255

    def captions(self, rows, rng: np.random.Generator | None = None) -> list[str]:
        """With rng they also say some of how the person looks."""
        plain = [caption(row) for row in self.labels[rows].tolist()]
        if rng is None:
            return plain
        words = world.some_looks(self.z[rows], rng)
        return [world.looking(c, w) for c, w in zip(plain, words, strict=True)]
