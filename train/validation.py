"""What a run is judged by as it goes on: the loss on held-out data, and pictures of fixed people, prompts and edits.

Everything is a function of the settings and the averaged weights: no random state of the training is touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from torch.utils.data import default_collate

from ..wplus_core.adapter import WPlusAdapter
from ..wplus_core.checkpoints import load_identity
from ..wplus_core.direction_files import Collection, load_collection, parse_edits
from ..wplus_core.directions import Edit, edit
from ..wplus_core.errors import FileError, WPlusError
from ..wplus_core.files import write_whole
from ..wplus_core.sheets import grid
from .base import load_text_encoder, load_vae
from .config import Config, Validate
from .data import Prepared, Stream, encode
from .draws import Dropout
from .model import Denoiser
from .sampling import Sampling, decode, noise, sample

INSTEAD = "without VAE, text encoder and tokenizer there are no pictures: leave out --validate.identities"


@dataclass(frozen=True)
class HeldOut:
    """The mean losses of the images 0 to `images` of a stream; nothing is dropped, so that they compare over runs."""

    stream: Stream
    config: Config
    vae: AutoencoderKL | None

    def __call__(self, model: Denoiser, accelerator: Accelerator) -> dict[str, float]:
        micro, images = self.config.micro(accelerator.num_processes), self.config.validate.images
        sums: dict[str, Tensor] = {}
        for first in range(micro * accelerator.process_index, images, micro * accelerator.num_processes):
            rows = default_collate([self.stream[n] for n in range(first, min(first + micro, images))])
            batch = encode(rows, accelerator.device, self.vae)
            for k, x in self.config.objective(model, batch).items():
                sums[k] = sums.get(k, 0) + x * len(batch.z0)
        names = self.config.objective.names
        total = torch.stack([sums.get(k, torch.zeros((), device=accelerator.device)) for k in names])
        return dict(zip(names, (accelerator.reduce(total, "sum") / images).tolist(), strict=True))


@dataclass(frozen=True)
class Person:
    """One row of codes for a sheet: w [L, 512] and its name."""

    name: str
    w: Tensor


@dataclass(frozen=True)
class Sheets:
    """A sheet a person: prompts down, edits across, the same noise along a row.

    text: [1 + P, 77, 768], of "" and the prompts. edits: of each column.
    """

    settings: Validate
    people: tuple[Person, ...]
    edits: tuple[list[Edit], ...]
    text: Tensor
    vae: AutoencoderKL
    size: tuple[int, int]
    batch: int

    def draw(self, person: Person, unet: UNet2DConditionModel, adapter: WPlusAdapter) -> Tensor:
        """Pictures [P * E, 3, H, W] in 0..1, on the CPU."""
        columns, prompts = len(self.edits), len(self.settings.prompts)
        w = torch.cat([edit(person.w[None], edits) for edits in self.edits]).repeat(prompts, 1, 1)
        c = self.text[1:].repeat_interleave(columns, 0)
        start = noise([(self.settings.seed, p) for p in range(prompts)], self.size).repeat_interleave(columns, 0)
        sampling = Sampling(self.settings.steps, self.settings.guidance)
        pictures = []
        for rows in zip(*(x.split(self.batch) for x in (w, c, start)), strict=True):
            some_w, some_c, z = (x.to(unet.device) for x in rows)
            pictures.append(decode(self.vae, sample(unet, adapter, some_w, some_c, self.text[0], z, sampling)).cpu())
        return torch.cat(pictures)

    def sheet(self, pictures: Tensor) -> Image.Image:
        columns = [text or "no edit" for text in self.settings.edits]
        return grid(pictures, len(columns), column_labels=columns, row_labels=self.settings.prompts)

    def check(self):
        """Whether the pictures fit on a sheet and the directions fit the codes."""
        height, width = (n * 2 ** (len(self.vae.config.block_out_channels) - 1) for n in self.size)
        self.sheet(torch.zeros(1, 3, height, width).expand(len(self.edits) * len(self.settings.prompts), -1, -1, -1))
        names = [p.name for p in self.people]
        if len(set(names)) < len(names):
            raise WPlusError(f"identity files of validation need names of their own, got {sorted(names)}")
        for edits in self.edits:
            edit(self.people[0].w[None], edits)

    def path(self, folder: Path, images: int, person: Person) -> Path:
        return folder / f"{images:08d}-{person.name}.png"


@dataclass(frozen=True)
class Validation:
    """Called with the UNet and the averaged adapter; gives the losses, and the sheets in `folder` by name."""

    folder: Path
    held_out: HeldOut | None
    sheets: Sheets | None
    vae: AutoencoderKL | None

    @torch.no_grad()
    def __call__(
        self, unet: UNet2DConditionModel, adapter: WPlusAdapter, images: int, accelerator: Accelerator
    ) -> tuple[dict[str, float], dict[str, Path]]:
        with uncompiled(), lent(self.vae, accelerator.device):
            losses = self.held_out(Denoiser(unet, adapter), accelerator) if self.held_out else {}
            sheets = self.draw_sheets(unet, adapter, images, accelerator) if self.sheets else {}
        return losses, sheets

    def draw_sheets(
        self, unet: UNet2DConditionModel, adapter: WPlusAdapter, images: int, accelerator: Accelerator
    ) -> dict[str, Path]:
        """Each process draws its share of the people."""
        paths = {p.name: self.sheets.path(self.folder, images, p) for p in self.sheets.people}
        for person in self.sheets.people[accelerator.process_index :: accelerator.num_processes]:
            sheet = self.sheets.sheet(self.sheets.draw(person, unet, adapter))
            write_whole(paths[person.name], partial(sheet.save, format="PNG"))
        accelerator.wait_for_everyone()
        return paths


def open_validation(config: Config, stream: Stream, processes: int) -> Validation | None:
    """All that validating needs, loaded and checked before the training begins; None if nothing is asked for."""
    v = config.validate
    held_out = held_out_stream(config, stream) if v.data else None
    vae = validation_vae(config) if v.identities or (held_out and held_out.online) else None
    sheets = open_sheets(config, stream, vae, config.micro(processes)) if v.identities else None
    losses = HeldOut(held_out, config, vae) if held_out else None
    return Validation(config.run / "validation", losses, sheets, vae) if losses or sheets else None


def held_out_stream(config: Config, stream: Stream) -> Stream:
    v, nothing = config.validate, Dropout(0.0, 0.0, 0.0)
    sources = [Prepared(folder) for folder in v.data]
    held_out = Stream(sources, v.seed, config.batch, (), nothing, config.augment, stream.directions)
    held_out.check(face=config.objective.needs_face)
    layers, expected = sources[0].index.w_layers, stream.sources[0].index.w_layers
    if layers != expected:
        raise FileError(v.data[0], f"has codes of {layers} layers, the training data {expected}", "Choose other data")
    return held_out


def validation_vae(config: Config) -> AutoencoderKL:
    try:
        return load_vae(config.vae or config.base)
    except FileError as e:
        raise FileError(e.path, e.problem, f"{e.remedy}; {INSTEAD}") from e


def open_sheets(config: Config, stream: Stream, vae: AutoencoderKL, batch: int) -> Sheets:
    v, index = config.validate, stream.sources[0].index
    people = tuple(person for file in v.identities for person in people_of(file, index.w_layers))
    known = load_collection(*v.directions) if v.directions else Collection()
    edits = tuple(parse_edits(text, known) for text in v.edits)
    try:
        text = load_text_encoder(config.base, tokenizer=v.tokenizer)(("", *v.prompts))
    except FileError as e:
        raise FileError(e.path, e.problem, f"{e.remedy}; {INSTEAD}") from e
    sheets = Sheets(v, people, edits, text, vae, index.latent_size, batch)
    sheets.check()
    return sheets


def people_of(file: Path, layers: int) -> Iterator[Person]:
    """Every code of an identity file, each with a name that a file can have."""
    identity = load_identity(file)
    if identity.w.shape[1] != layers:
        found = f"its codes have {identity.w.shape[1]} layers, those of the data {layers}"
        raise FileError(file, found, "Encode the photo with the encoder of the data")
    name = re.sub(r"[^\w.-]+", "_", file.stem)
    for i, w in enumerate(identity.w):
        yield Person(f"{name}-{i + 1}" if len(identity) > 1 else name, w)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Validation's many shapes would each compile the UNet again, and drive the training's out of the cache."""
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def lent(vae: AutoencoderKL | None, device: torch.device) -> Iterator[None]:
    """The VAE is on the device only while it is needed."""
    if vae is None:
        yield
        return
    vae.to(device)
    yield
    vae.to("cpu")
