"""Prepared pictures on disk, and the stream of training images made of them.

A data set is a folder:
    index.json            format, version, w_layers, latent_size, scaling_factor, prompts, shards [{file, count}]
    prompts.safetensors   text [P, 77, 768]: the text encoder's output for index.json's prompts; row 0 is ""
    shard-*.safetensors   stacked over its n samples:
        latents [n, K, 8, h, w]     mean and standard deviation of the VAE's latent, K augmented variants
        w       [n, L, 512]
        face    [n, K, 1, h', w']   1 on the face, eroded and blurred (what stage II needs)
        text    [n, 77, 768]        of the sample's own caption; without it a prompt is drawn (stage I)
Files are read where they are needed, row by row; float16 is enough for all of them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from ..wplus_core.directions import Direction
from ..wplus_core.errors import FileError, WPlusError
from ..wplus_core.files import read, write_safetensors, write_whole
from .draws import DROP_TEXT, DROP_W, IMAGE, Augment, Dropout, normal, partner_of, sample_of, stream
from .objectives import STEPS, Batch

FORMAT, VERSION = "wplus-dataset", 1
AGAIN = "Prepare the data set again"


@dataclass(frozen=True)
class Index:
    """What index.json says."""

    w_layers: int
    latent_size: tuple[int, int]
    prompts: tuple[str, ...]
    shards: tuple[dict[str, Any], ...]
    scaling_factor: float = 0.18215
    format: str = FORMAT
    version: int = VERSION


class Prepared:
    """One data set; `prepared[i]` is a dict of the tensors of its sample i."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.ends = list(accumulate(s["count"] for s in self.index.shards))
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
        return {k: file.get_slice(k)[row] for k in file.keys()}

    def w(self, i: int) -> Tensor:
        shard, row = self.locate(i)
        return self.open(shard).get_slice("w")[row].float()

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
        if "direction" in self.augment.kinds and not self.directions:
            raise WPlusError("augmenting along directions needs a file of directions (--directions)")

    def __getitem__(self, n: int) -> Batch:
        source, i = self.locate(n)
        data, rng = self.sources[source], stream(self.seed, IMAGE, n)
        sample, other = data[i], self.w(partner_of(n, self.seed, self.batch))
        variant = rng.integers(len(sample["latents"]))
        mean, std = sample["latents"][variant].float().chunk(2)
        z0 = (mean + std * normal(rng, mean.shape)) * data.index.scaling_factor
        noise, t, drop = normal(rng, z0.shape), int(rng.integers(STEPS)), self.dropout(rng)
        prompt = rng.integers(1, len(data.index.prompts)) if "text" not in sample else 0
        c = data.prompts[0] if drop & DROP_TEXT else sample.get("text", data.prompts[prompt])
        w = sample["w"].float()
        w_hat = self.augment(rng, w, other, self.directions)
        kept = 0.0 if drop & DROP_W else 1.0
        face = sample["face"][variant].float() if "face" in sample else torch.zeros(1, *mean.shape[1:])
        return Batch(z0, noise, torch.tensor(t), c.float(), kept * w, kept * w_hat, face)

    def check(self, face: bool):
        """Whether the samples have all that the objective wants."""
        for source in self.sources:
            keys = source[0].keys()
            missing = {"latents", "w", *(["face"] if face else [])} - keys
            if missing:
                raise FileError(source.folder, f"its samples have no {sorted(missing)}", "Prepare `wild` pictures")
            if "text" not in keys and len(source.index.prompts) < 2:
                raise FileError(source.folder, 'neither captions nor prompts but ""', AGAIN)

    def locate(self, n: int) -> tuple[int, int]:
        return sample_of(n, self.seed, self.lengths, self.shares)

    def w(self, n: int) -> Tensor:
        source, i = self.locate(n)
        return self.sources[source].w(i)


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
    return Index(**{**index.__dict__, "latent_size": tuple(index.latent_size)})


def write_dataset(folder: str | Path, samples: Sequence[dict[str, Tensor]], prompts: dict[str, Tensor], shard=128):
    """Write samples (see the module's docstring, without the first axis) and {prompt: [77, 768]}, "" first."""
    folder, shards = Path(folder), []
    for start in range(0, len(samples), shard):
        rows = samples[start : start + shard]
        name = f"shard-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, {k: torch.stack([s[k] for s in rows]) for k in rows[0]}, {})
        shards.append({"file": name, "count": len(rows)})
    write_safetensors(folder / "prompts.safetensors", {"text": torch.stack(list(prompts.values()))}, {})
    layers, size = len(samples[0]["w"]), tuple(samples[0]["latents"].shape[-2:])
    index = json.dumps(Index(layers, size, tuple(prompts), tuple(shards)).__dict__, indent=1)
    write_whole(folder / "index.json", lambda p: p.write_text(index, encoding="utf-8"))
