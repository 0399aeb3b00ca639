"""Prepared pictures on disk, and the stream of training images made of them.

A data set is a folder:
    index.json            format, version, w_layers, latent_size, scaling_factor, prompts, shards [{file, count}], and
                          what it was made with; written last, so that a folder that has it is complete
    prompts.safetensors   text [P, 77, 768]: the text encoder's output for index.json's prompts; row 0 is ""
    shard-*.safetensors   stacked over its n samples:
        latents [n, K, 8, h, w]     mean and standard deviation of the VAE's latent, K augmented variants
        w       [n, L, 512]
        face    [n, K, 1, h', w']   1 on the face, eroded and blurred (what stage II needs)
        weights [n, K, 1, h, w]     how much each place counts in L_rec; without them all alike
        text    [n, 77, 768]        of the sample's own caption; without it a prompt is drawn (stage I)
      or, instead of latents, face and weights, what index.json's `views` are drawn from while training:
        picture [bytes], picture_ends [n]   the photos' JPEG files, one after the other, and where each ends
        mask    [n, 1, m, m]        uint8, the face in its aligned crop
        to_mask [n, 3, 3]           float64, pixel indices of the photo -> of the mask
      its metadata `about` is JSON: {"rows": [{name, caption, ...} of each sample], "bad": [{file, reason}, ...]}
Files are read where they are needed, row by row; float16 is enough for all of them.

    writer = Writer(folder, {"": text_of(""), "a face": text_of("a face")})
    for number in range(len(writer), count):      # killed, and started again: goes on after the last whole shard
        writer.append({"latents": ..., "w": ...}, name=f"{number:05d}")
    writer.finish()
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from ..wplus_core.directions import Direction
from ..wplus_core.errors import FileError, WPlusError
from ..wplus_core.files import read, write_safetensors, write_whole
from .base import LATENT_CHANNELS, latents
from .draws import DROP_TEXT, DROP_W, IMAGE, Augment, Dropout, normal, partner_of, sample_of, stream
from .objectives import STEPS, Batch
from .views import Views, corners, from_jpeg

FORMAT, VERSION = "wplus-dataset", 1
AGAIN = "Prepare the data set again"
PICTURE = {"picture", "picture_ends"}
Sample = dict[str, Tensor]


class Drawn(NamedTuple):
    """A batch whose latents are still to be made: `encode` does it.

    picture: [B, 3, H, W] in 0..1. posterior: [B, 4, h, w], normal, which point of the VAE's posterior it will be.
    """

    picture: Tensor
    posterior: Tensor
    batch: Batch


@dataclass(frozen=True)
class Index:
    """What index.json says."""

    w_layers: int
    latent_size: tuple[int, int]
    prompts: tuple[str, ...]
    shards: tuple[dict[str, Any], ...]
    scaling_factor: float = 0.18215
    views: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT
    version: int = VERSION


class Prepared:
    """One data set; `prepared[i]` is a dict of the tensors of its sample i."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.ends = list(accumulate(s["count"] for s in self.index.shards))
        self.views = Views(**self.index.views) if self.index.views else None
        self.files: dict[str, Any] = {}
        if not len(self):
            raise FileError(self.folder, "the data set is empty", AGAIN)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k != "prompts"} | {"files": {}}

    @cached_property
    def prompts(self) -> Tensor:
        """Embeddings [P, 77, 768] of the index's prompts; row 0 is ""."""
        path = self.folder / "prompts.safetensors"
        text = read(path).tensors.get("text")
        if text is None or len(text) != len(self.index.prompts):
            raise FileError(path, f"expected `text` of {len(self.index.prompts)} rows", AGAIN)
        return text

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        shard, row = self.locate(i)
        file = self.open(shard)
        sample = {k: file.get_slice(k)[row] for k in file.keys() if k not in PICTURE}
        return sample | ({"picture": picture_of(file, row)} if PICTURE <= set(file.keys()) else {})

    def w(self, i: int) -> Tensor:
        shard, row = self.locate(i)
        return self.open(shard).get_slice("w")[row].float()

    def about(self, i: int) -> dict[str, Any]:
        """What the shard says about sample i, such as its name and caption."""
        shard, row = self.locate(i)
        return read_about(self.folder / shard)["rows"][row]

    def draw(self, rng: np.random.Generator, sample: Sample) -> tuple[Tensor, Tensor]:
        """A view of a sample that is a picture: [3, S, S] in 0..1, and its face [1, h, w]."""
        photo, mask = from_jpeg(sample["picture"]).float() / 255, sample["mask"].float() / 255
        view = self.views.draw(rng, photo.shape[1:], corners(sample["to_mask"], mask.shape[-1]))
        picture, face = self.views.render(view, photo, mask, sample["to_mask"])
        return picture, F.interpolate(face[None], self.index.latent_size, mode="area")[0]

    def locate(self, i: int) -> tuple[str, int]:
        number = next(k for k, end in enumerate(self.ends) if i < end)
        count = self.index.shards[number]["count"]
        return self.index.shards[number]["file"], i - self.ends[number] + count

    def open(self, name: str):
        if name not in self.files:
            try:
                self.files[name] = safe_open(self.folder / name, framework="pt")
            except (SafetensorError, OSError) as e:
                raise FileError(self.folder / name, f"damaged or missing shard ({e})", AGAIN) from e
        return self.files[name]


@dataclass
class Stream(Dataset):
    """`stream[n]` is training image number n, a row of a Batch; a pure function of (seed, n) and the data sets.

    batch: how many images one optimiser step sees in all processes together. shares: of each source, by size if empty.
    """

    sources: Sequence[Prepared]
    seed: int
    batch: int
    shares: tuple[float, ...] = ()
    dropout: Dropout = field(default_factory=Dropout)
    augment: Augment = field(default_factory=Augment)
    directions: Sequence[Direction] = ()

    def __post_init__(self):
        self.lengths = [len(s) for s in self.sources]
        self.shares = tuple(self.shares) or tuple(map(float, self.lengths))
        if len(self.shares) != len(self.sources) or min(self.shares) <= 0:
            raise WPlusError(f"expected {len(self.sources)} shares above 0, one per data set, got {self.shares}")
        forms = {(s.index.w_layers, s.index.latent_size) for s in self.sources}
        if len(forms) > 1:
            raise WPlusError(f"data sets must have w layers and a latent size in common, got {sorted(forms)}")
        if len({s.views is None for s in self.sources}) > 1:
            raise WPlusError("data sets of latents and of pictures (--online-vae) cannot be mixed; prepare all alike")
        if "direction" in self.augment.kinds and not self.directions:
            raise WPlusError("augmenting along directions needs a file of directions (--directions)")

    @property
    def online(self) -> bool:
        """Whether the samples are pictures, and the rows `Drawn`."""
        return self.sources[0].views is not None

    def __getitem__(self, n: int) -> Batch | Drawn:
        source, i = self.locate(n)
        data, rng = self.sources[source], stream(self.seed, IMAGE, n)
        sample, other = data[i], self.w(partner_of(n, self.seed, self.batch))
        picture, mean, std, face, weights = draw_picture(rng, data, sample)
        posterior = normal(rng, mean.shape)
        z0 = (mean + std * posterior) * data.index.scaling_factor
        noise, t, drop = normal(rng, z0.shape), int(rng.integers(STEPS)), self.dropout(rng)
        prompt = rng.integers(1, len(data.index.prompts)) if "text" not in sample else 0
        c = data.prompts[0] if drop & DROP_TEXT else sample.get("text", data.prompts[prompt])
        w = sample["w"].float()
        w_hat = self.augment(rng, w, other, self.directions)
        kept = 0.0 if drop & DROP_W else 1.0
        batch = Batch(z0, noise, torch.tensor(t), c.float(), kept * w, kept * w_hat, face, weights)
        return batch if picture is None else Drawn(picture, posterior, batch)

    def check(self, face: bool):
        """Whether the samples have all that the objective wants."""
        for source in self.sources:
            keys = source[0].keys()
            needed = {"picture", "mask", "to_mask"} if source.views else {"latents", *(["face"] if face else [])}
            missing = (needed | {"w"}) - keys
            if missing:
                raise FileError(source.folder, f"its samples have no {sorted(missing)}", "Prepare `wild` pictures")
            if "text" not in keys and len(source.index.prompts) < 2:
                raise FileError(source.folder, 'neither captions nor prompts but ""', AGAIN)

    def locate(self, n: int) -> tuple[int, int]:
        return sample_of(n, self.seed, self.lengths, self.shares)

    def w(self, n: int) -> Tensor:
        source, i = self.locate(n)
        return self.sources[source].w(i)


def draw_picture(
    rng: np.random.Generator, data: Prepared, sample: Sample
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """The picture if it is still to be encoded, the posterior's mean and standard deviation [4, h, w], the face and the
    weights [1, h, w]."""
    size = data.index.latent_size
    nowhere, everywhere = torch.zeros(1, *size), torch.ones(1, *size)
    if data.views is None:
        variant = rng.integers(len(sample["latents"]))
        mean, std = sample["latents"][variant].float().chunk(2)
        masks = {k: sample[k][variant].float() for k in ("face", "weights") if k in sample}
        return None, mean, std, masks.get("face", nowhere), masks.get("weights", everywhere)
    picture, face = data.draw(rng, sample)
    unknown = torch.zeros(LATENT_CHANNELS, *size)
    return picture, unknown, unknown, face, everywhere


def encode(item: Batch | Drawn, device: torch.device, vae: AutoencoderKL | None = None) -> Batch:
    """A batch of the stream, on the device, with its latents made by the VAE where they are still to be made."""
    if isinstance(item, Batch):
        return Batch(*(x.to(device, non_blocking=True) for x in item))
    mean, std = latents(vae, item.picture.to(device, non_blocking=True)).chunk(2, dim=1)
    z0 = (mean + std * item.posterior.to(device)) * vae.config.scaling_factor
    return encode(item.batch, device)._replace(z0=z0)


def picture_of(file: Any, row: int) -> Tensor:
    """The bytes of a row's JPEG file."""
    ends = file.get_tensor("picture_ends")
    return file.get_slice("picture")[(int(ends[row - 1]) if row else 0) : int(ends[row])]


def stacked(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The tensors of a shard."""
    tensors = {k: torch.stack([s[k] for s in samples]) for k in samples[0] if k != "picture"} if samples else {}
    files = [s["picture"] for s in samples if "picture" in s]
    ends = torch.tensor(list(accumulate(len(x) for x in files)))
    return tensors | ({"picture": torch.cat(files), "picture_ends": ends} if files else {})


@dataclass(frozen=True)
class Rows:
    """A batch sampler: the image numbers that one process takes, one micro-batch after the other.

    Images first..end go in optimiser steps of `batch`, each in `batch / (micro * processes)` rounds, each round with
    consecutive micro-batches for the processes.
    """

    first: int
    end: int
    micro: int
    rank: int = 0
    processes: int = 1

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(self.first + self.rank * self.micro, self.end, self.micro * self.processes):
            yield list(range(start, start + self.micro))

    def __len__(self) -> int:
        return (self.end - self.first) // (self.micro * self.processes)


def read_index(folder: Path) -> Index:
    path = folder / "index.json"
    if not path.is_file():
        raise FileError(folder, "no data set here (index.json is missing)", "Give a folder that `train prepare` wrote")
    try:
        index = Index(**json.loads(path.read_text(encoding="utf-8")))
    except (TypeError, ValueError) as e:
        raise FileError(path, f"damaged ({e})", AGAIN) from e
    if index.format != FORMAT or index.version > VERSION:
        raise FileError(path, f"{index.format} {index.version}, expected {FORMAT} {VERSION}", "Update ComfyUI-WPlus")
    tuples = {k: tuple(getattr(index, k)) for k in ("latent_size", "prompts", "shards")}
    return replace(index, **tuples)


class Writer:
    """Writes a data set shard by shard. A shard is whole or not there, and none is written twice without need.

    prompts: {prompt: [77, 768]}, "" first. settings: JSON values; a folder that was begun with others is refused.
    index: other fields of `Index`.
    """

    def __init__(
        self,
        folder: str | Path,
        prompts: dict[str, Tensor],
        shard: int = 128,
        settings: dict[str, Any] | None = None,
        **index: Any,
    ):
        self.folder, self.prompts, self.shard, self.index = Path(folder), prompts, shard, index
        self.settings = json.loads(json.dumps(settings or {}))  # as they will be read back
        self.buffer: list[tuple[Sample, dict[str, Any]]] = []
        self.begin()
        self.written = next(n for n in count() if not self.has(n))
        self.rows = sum(len(read_about(self.path(n))["rows"]) for n in range(self.written))

    def begin(self):
        path = self.folder / "settings.json"
        if path.is_file():
            check_settings(path, self.settings)
        else:
            text = json.dumps(self.settings, indent=1)
            write_whole(path, lambda p: p.write_text(text, encoding="utf-8"))

    def __len__(self) -> int:
        """Samples so far; after a kill, those of the whole shards."""
        return self.rows + len(self.buffer)

    def append(self, sample: Sample, **about: Any):
        """Add a sample (see the module's docstring, without the first axis); about: JSON values such as its name."""
        self.buffer.append((sample, about))
        if len(self.buffer) == self.shard:
            self.flush()

    def flush(self):
        """Write what was appended as a shard, full or not."""
        if self.buffer:
            samples, about = zip(*self.buffer, strict=True)
            self.write(self.written, samples, about)
            self.rows, self.written, self.buffer = self.rows + len(samples), self.written + 1, []

    def path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def has(self, number: int) -> bool:
        return self.path(number).is_file()

    def write(self, number: int, samples: Sequence[Sample], about: Sequence[dict] = (), bad: Sequence[dict] = ()):
        """Write the shard of that number, in any order and from any process; it may be empty. bad: {file, reason}."""
        (self.folder / "index.json").unlink(missing_ok=True)
        info = json.dumps({"rows": list(about) or [{}] * len(samples), "bad": list(bad)})
        write_safetensors(self.path(number), stacked(samples), {"about": info})

    def finish(self, shards: int | None = None) -> Index:
        """Write the prompts and the index of the shards 0 to `shards`, or of those appended: the data set is complete.

        Every process of a distributed run may call it: they write the same.
        """
        self.flush()
        numbers = range(self.written if shards is None else shards)
        counts = [{"file": self.path(n).name, "count": len(read_about(self.path(n))["rows"])} for n in numbers]
        filled = tuple(c for c in counts if c["count"])
        if not filled:
            raise FileError(self.folder, "not one sample was written", "See quarantine.jsonl, if there is one, for why")
        write_safetensors(self.folder / "prompts.safetensors", {"text": torch.stack(list(self.prompts.values()))}, {})
        with safe_open(self.folder / filled[0]["file"], framework="pt") as first:
            layers = first.get_slice("w").get_shape()[1]
            size = self.index.get("latent_size") or first.get_slice("latents").get_shape()[-2:]
        rest = {k: v for k, v in self.index.items() if k != "latent_size"} | {"settings": self.settings}
        index = Index(layers, tuple(size), tuple(self.prompts), filled, **rest)
        text = json.dumps(index.__dict__, indent=1)
        write_whole(self.folder / "index.json", lambda p: p.write_text(text, encoding="utf-8"))
        return index


def read_about(path: Path) -> dict[str, list[dict[str, Any]]]:
    """What a shard says of its samples (`rows`), and of the pictures that gave none (`bad`)."""
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})["about"])
    except (SafetensorError, OSError, KeyError, ValueError) as e:
        raise FileError(path, f"damaged or missing shard ({e})", "Delete it, and prepare the data set again") from e


def check_settings(path: Path, settings: dict[str, Any]):
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise FileError(path, f"damaged ({e})", "Choose an empty folder") from e
    differing = [k for k in before | settings if before.get(k) != settings.get(k)]
    changed = [f"{k}: {before.get(k)} -> {settings.get(k)}" for k in differing]
    if changed:
        problem = f"this data set was begun with other settings ({'; '.join(changed)})"
        raise FileError(path.parent, problem, "Give them again, or choose another folder")


def write_dataset(folder: str | Path, samples: Sequence[Sample], prompts: dict[str, Tensor], shard: int = 128) -> Index:
    """Write all samples at once, over what lies in the folder; prompts as for `Writer`."""
    writer = Writer(folder, prompts, shard)
    starts = range(0, len(samples), shard)
    for number, start in enumerate(starts):
        writer.write(number, samples[start : start + shard])
    return writer.finish(len(starts))
