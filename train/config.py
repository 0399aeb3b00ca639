"""The settings of a run: frozen dataclasses, from a YAML preset and the command line, kept with what they made."""

from __future__ import annotations

import types
import typing
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from math import cos, pi
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import tyro
import yaml

from ..wplus_core.errors import FileError, WPlusError
from ..wplus_core.files import write_whole
from .draws import Augment, Dropout
from .objectives import Objective

PRESETS = Path(__file__).with_name("presets")
PLAIN = {bool: bool, int: int, float: (int, float), str: str, Path: str}  # what YAML gives for each type
T = TypeVar("T")


@dataclass(frozen=True)
class Optim:
    """AdamW. warmup: images over which the learning rate rises linearly. clip: largest gradient norm, 0 for any."""

    lr: float = 1e-4
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
    warmup: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    clip: float = 1.0

    def lr_at(self, images: int, end: int) -> float:
        """The learning rate of the step that starts after so many images, of a training of `end` images."""
        rise = min(1.0, (images + 1) / self.warmup) if self.warmup else 1.0
        x = min(1.0, max(0.0, (images - self.warmup) / max(1, end - self.warmup)))
        return self.lr * rise * (0.5 * (1 + cos(pi * x)) if self.schedule == "cosine" else 1.0)


@dataclass(frozen=True)
class Speed:
    """What changes how fast and in how much memory, not what is learned (but for rounding).

    micro_batch: images per process and pass, 0 for an equal part of the batch; the rest is accumulated.
    """

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    micro_batch: int = 0
    gradient_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    workers: int = 2


@dataclass(frozen=True)
class Keep:
    """What is kept of the run, counted in images.

    every: between checkpoints. last: how many stay. log: between lines of stats.jsonl. ema_half_life: of the moving
    average of the weights, 0 for none. bad_steps: stop after so many steps in a row whose gradient was not finite,
    which is looked at with each line of stats.jsonl.
    """

    every: int = 16_000
    last: int = 3
    log: int = 160
    ema_half_life: int = 100_000
    bad_steps: int = 20


@dataclass(frozen=True)
class Validate:
    """What the run is judged by before its first step, then every so many images and at the end, with the averaged
    weights: the loss on held-out data, and sheets of pictures in RUN/validation. Without data and identities, nothing.

    data: prepared sets kept out of the training. images: of them, whose loss is taken. identities: files of codes, a
    sheet each. prompts: the sheet's rows. edits: its columns, such as "smile=2 age=-1", "" for none. directions: files
    or folders of them, for the edits. tokenizer: CLIP's, if the base is a single file. steps, guidance: of DDIM. seed:
    of the noise.
    """

    every: int = 32_000
    data: tuple[Path, ...] = ()
    images: int = 256
    identities: tuple[Path, ...] = ()
    prompts: tuple[str, ...] = ("a photo of a face",)
    edits: tuple[str, ...] = ("",)
    directions: tuple[Path, ...] = ()
    tokenizer: Path | None = None
    steps: int = 50
    guidance: float = 7.5
    seed: int = 0

    def __post_init__(self):
        if min(self.every, self.images, len(self.prompts), len(self.edits)) < 1:
            raise WPlusError(f"expected at least one image, prompt and edit to validate with (\"\" is no edit), {self}")


@dataclass(frozen=True)
class Track:
    """Where the curves of stats.jsonl go besides. to: tensorboard writes into RUN/tensorboard. project: its name."""

    to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    project: str = "wplus"


@dataclass(frozen=True)
class Config:
    """One training run.

    run: the folder that it writes; the same command resumes it. base: the SD1.x model, a diffusers folder or a
    single-file checkpoint. data: prepared data sets. shares: how often each is drawn, by its size if empty. stage: 1 or
    2, for the record. adapter: weights to start from, in any form; without it a new one. train_mapping: stage I, and
    the paper's one-stage ablation. parallel: its "PCA" ablation. images: length of the training. batch: images per
    optimiser step, all processes together. directions: a file of them, for that augmentation. vae: instead of the
    base's, for data sets that are pictures, and for those that validation draws.
    """

    run: Path
    base: Path
    data: tuple[Path, ...]
    stage: Literal[1, 2] = 1
    shares: tuple[float, ...] = ()
    adapter: Path | None = None
    train_mapping: bool = True
    parallel: bool = False
    images: int = 1_600_000
    batch: int = 16
    seed: int = 0
    directions: Path | None = None
    vae: Path | None = None
    objective: Objective = field(default_factory=Objective)
    dropout: Dropout = field(default_factory=Dropout)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    speed: Speed = field(default_factory=Speed)
    keep: Keep = field(default_factory=Keep)
    validate: Validate = field(default_factory=Validate)
    track: Track = field(default_factory=Track)

    def __post_init__(self):
        if tyro.MISSING_NONPROP in vars(self).values() or tyro.MISSING in vars(self).values():
            return
        if self.batch < 1 or self.images < 1 or self.images % self.batch:
            raise WPlusError(f"images must be a multiple of the batch, got {self.images} and {self.batch}")
        if not self.train_mapping and self.adapter is None:
            raise WPlusError(
                "the mapping network is frozen, so it must come from stage I: --adapter stage1.safetensors "
                "(or --train-mapping, for one-stage training)"
            )

    def micro(self, processes: int) -> int:
        """Images per process and pass."""
        micro = self.speed.micro_batch or self.batch // processes
        if micro < 1 or self.batch % (micro * processes):
            raise WPlusError(f"a batch of {self.batch} cannot be split over {processes} processes, {micro} at a time")
        return micro

    def due(self, images: int, every: int) -> bool:
        """Whether what is done every so many images is due after a step, as it is after the last one."""
        return images % every < self.batch or images >= self.images


# What may differ between a run and its resumption: where things lie, how fast it goes, how long, what is kept.
FREE = {"run", "base", "data", "adapter", "directions", "vae", "images", "speed", "validate", "track"}
FREE |= {"keep.every", "keep.last", "keep.log", "keep.bad_steps"}


def check_resumable(old: Config, new: Config):
    """A run goes on with the settings that it began with; WPlusError names those that differ."""
    before, now = flat(to_dict(old)), flat(to_dict(new))
    changed = [k for k in now if now[k] != before.get(k) and not FREE & {k, k.split(".")[0]}]
    if changed:
        changes = ", ".join(f"{k}: {before.get(k)} -> {now[k]}" for k in changed)
        raise WPlusError(f"{new.run} began with other settings ({changes}); give them again, or another --run folder")


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    items = {}
    for k, v in tree.items():
        items |= flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
    return items


def to_dict(config: Any) -> dict[str, Any]:
    """Plain values that YAML and JSON know."""

    def plain(x):
        if isinstance(x, dict):
            return {k: plain(v) for k, v in x.items()}
        return [plain(v) for v in x] if isinstance(x, tuple | list) else str(x) if isinstance(x, Path) else x

    return plain(asdict(config))


def from_dict(cls: type[T], values: dict[str, Any], where: str = "") -> T:
    """The dataclass of those values; settings without a default that are missing stay to be given."""
    known = {f.name: f for f in fields(cls)}
    if not isinstance(values, dict) or set(values) - set(known):
        wrong = sorted(set(values) - set(known)) if isinstance(values, dict) else values
        raise WPlusError(f"no such settings{where}: {wrong}; there are {sorted(known)}")
    hints = get_type_hints(cls)
    given = {k: convert(hints[k], v, f"{where} {k}") for k, v in values.items()}
    required = (k for k, f in known.items() if f.default is MISSING and f.default_factory is MISSING)
    return cls(**{k: tyro.MISSING for k in required} | given)


def convert(hint: Any, value: Any, where: str) -> Any:
    if is_dataclass(hint):
        return from_dict(hint, value, f" of{where}")
    if get_origin(hint) in (typing.Union, types.UnionType):
        return None if value is None else convert(get_args(hint)[0], value, where)
    if get_origin(hint) is tuple:
        return tuple(convert(get_args(hint)[0], v, where) for v in value)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise WPlusError(f"{where.strip()} must be one of {get_args(hint)}, got {value!r}")
        return value
    if isinstance(value, bool) != (hint is bool) or not isinstance(value, PLAIN[hint]):
        raise WPlusError(f"{where.strip()} must be of type {hint.__name__}, got {value!r}")
    return hint(value)


def to_yaml(config: Any) -> str:
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def load_yaml(path: str | Path, cls: type[T] = Config) -> T:
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as e:
        raise FileError(path, f"no readable YAML ({e})", "Give a preset's name or a YAML file of settings") from e
    try:
        return from_dict(cls, values or {})
    except WPlusError as e:
        raise FileError(path, str(e), "Correct the file") from e


def save_yaml(config: Any, path: Path):
    write_whole(path, lambda p: p.write_text(to_yaml(config), encoding="utf-8"))


def preset(name: str) -> Config:
    """The preset of that name, or the settings of a YAML file."""
    path = PRESETS / f"{name}.yaml"
    if not path.is_file() and not Path(name).is_file():
        names = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise WPlusError(f"no preset {name!r}: there are {names}, or give a YAML file of settings")
    return load_yaml(path if path.is_file() else name)
