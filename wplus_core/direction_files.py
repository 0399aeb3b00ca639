"""Direction files of every form, folders of them looked up by name, and the text form of edits."""

from __future__ import annotations

import csv
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor

from .checkpoints import write_ours
from .directions import Direction, Edit, Layers, parse_layers
from .errors import FileError, WPlusError
from .files import AGAIN, Contents, files_below, read, sha256, unreadable
from .formats import expect
from .plausible import Spread
from .state_dicts import check_finite, parse_json

log = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".pt", ".pth", ".npy", ".bin")
TABLE = "ganspace_configs.csv"
FIRST_GROUPS = ("interfacegan", "latent_directions", "ganspace")  # whose `smile` a plain "smile" is
LAST_GROUPS = ("drawn",)  # the miniature's, which are always there
# Two published latent directions point to less of their name: smile has cosine -0.91 with emotion_happy of the same set
# and -0.62 with InterFaceGAN's smile, age -0.39 with InterFaceGAN's age. A strength turns them round, a raw number not.
POINT_TO_LESS = {
    "ac46b59d1cd793cab7ba6b8b4dd2e00fb7cf565d130baeaf84165f3ba0f762ad": "smile",
    "457ac7452a1cfe6e95cfba92518a27eac9cd80f4d474604f4b1da6c32b1fdcc2": "age",
}


def load_directions(path: str | Path) -> list[Direction]:
    """Directions of any form: InterFaceGAN, latent directions, GANSpace, a list or dict of steps, or our safetensors.

    GANSpace's components are named by a ganspace_configs.csv in the same folder; without one they are numbered. A bare
    [L, 512] numpy array is a latent direction and moves layers 0-7, as the reference moves it.
    """
    path = Path(path)
    contents = read(path)
    kind = expect(contents, "directions", "bare")
    check_finite(path, contents.tensors)
    contents = contents.copied()
    try:
        if contents.ours:
            return our_directions(contents)
        if kind == "directions" and "comp" in contents.tensors:
            return ganspace_directions(contents)
        return plain_directions(contents)
    except FileError:
        raise
    except (WPlusError, KeyError, TypeError, ValueError) as e:
        raise FileError(path, f"damaged directions ({e})", AGAIN) from e


def save_directions(directions: Sequence[Direction], path: str | Path):
    """Write a wplus-directions safetensors."""
    state, config = {}, []
    for i, d in enumerate(directions):
        state[f"{i}.vector"] = d.vector.clone()  # safetensors refuses shared memory, and components share their origin
        if d.origin is not None:
            state[f"{i}.origin"] = d.origin.clone()
        config.append({"name": d.name, "layers": d.layers, "source": d.source, "unit": d.unit, "usual": d.usual})
    write_ours("directions", path, state, config=config)


def our_directions(contents: Contents) -> list[Direction]:
    x, found = contents.tensors, []
    for i, c in enumerate(parse_json(contents, "config", list)):
        first, end = c["layers"] or (None, None)
        low, high = c.get("usual") or Direction.usual
        layers = None if end is None else (int(first), int(end))
        rule = x[f"{i}.vector"], layers, x.get(f"{i}.origin")
        found.append(Direction(str(c["name"]), *rule, str(c["source"]), c.get("unit"), (float(low), float(high))))
    return found


def plain_directions(contents: Contents) -> list[Direction]:
    """A step per tensor [D], [L, D] or [1, L, D], and N steps per tensor [N, L, D], numbered.

    A lone tensor is named by its file, those of a list by the file and their number, others by their key's last part.
    """
    path, found = contents.path, []
    for name, x in zip(step_names(path.stem, list(contents.tensors)), contents.tensors.values(), strict=True):
        steps = x if x.ndim == 3 else x.reshape(1, -1, x.shape[-1])
        latent = path.suffix == ".npy" and list(contents.tensors) == [""] and steps.shape[1] > 8
        layers, source = ((0, 8), "latent direction") if latent else (None, path.name)
        names = [name] if len(steps) == 1 else [f"{name}_{i}" for i in range(len(steps))]
        found += [Direction(n, step, layers, source=source) for n, step in zip(names, steps, strict=True)]
    if path.suffix == ".npy" and sha256(path) in POINT_TO_LESS:
        found = [replace(d, unit=-d.unit) for d in found]
    return found


def step_names(stem: str, keys: Sequence[str]) -> list[str]:
    """A name per key of a file; the whole key where its last part alone is not unique."""
    if len(keys) == 1:
        return [stem]
    lasts = [key.rsplit(".", 1)[-1] for key in keys]
    count = Counter(lasts)
    names = [last if count[last] == 1 else key for key, last in zip(keys, lasts, strict=True)]
    return [f"{stem}_{key}" if key.isdigit() else name or stem for key, name in zip(keys, names, strict=True)]


def ganspace_directions(contents: Contents) -> list[Direction]:
    """GANSpace's PCA as target-rule directions: the vector is std_k comp_k, so that a raw unit is one deviation.

    Where the table's own strength is negative, so is our unit: its smile at -20 smiles toward less of component 46.
    """
    mean, comp, std = ganspace_pca(contents)
    found = []
    for name, k, layers, strength in ganspace_names(contents.path.parent, len(std)):
        source = f"GANSpace, component {k}" + (f", table strength {strength:g}" if strength else "")
        d = Direction(name, (comp[k] * std[k])[None], layers, mean, source)
        found.append(replace(d, unit=-d.unit) if strength < 0 else d)
    return found


def ganspace_pca(contents: Contents) -> tuple[Tensor, Tensor, Tensor]:
    x = contents.tensors
    count = len(x["std"]) if x["std"].ndim else 0
    if x["comp"].shape != (count, 1, 512) or x["mean"].numel() != 512 or x["std"].ndim != 1:
        shapes = {k: list(v.shape) for k, v in x.items()}
        raise FileError(contents.path, f"expected comp [K, 1, 512], mean [1, 512], std [K], got {shapes}", AGAIN)
    return x["mean"].reshape(512).float(), x["comp"][:, 0].float(), x["std"].float()


def ganspace_names(folder: Path, count: int) -> list[tuple[str, int, Layers | None, float]]:
    """(name, component, layers, strength) by ganspace_configs.csv."""
    table = folder / TABLE
    if not table.is_file():
        return [(f"component_{k}", k, None, 0.0) for k in range(count)]
    try:
        with open(table, newline="") as f:
            rows = [row for row in csv.reader(f, delimiter="\t") if row]
        named = [(name, int(k), (int(first), int(end)), float(s)) for name, k, first, end, s, *_ in rows]
    except OSError as e:
        raise unreadable(table, e) from e
    except ValueError as e:
        raise FileError(table, f"expected rows of name, component, first, end, strength ({e})", "Restore it") from e
    return [row for row in named if 0 <= row[1] < count]


def load_spread(path: str | Path) -> Spread:
    """Where plausible codes lie, from a GANSpace PCA (ffhq_pca.pt) or a file that our `pca` command wrote."""
    contents = read(path)
    expect(contents, "directions", "bare")
    check_finite(path, contents.tensors)
    contents = contents.copied()
    try:
        if {"mean", "comp", "std"} <= set(contents.tensors):
            return Spread(*ganspace_pca(contents))
        return spread_of(load_directions(path))
    except FileError:
        raise
    except WPlusError as e:
        raise FileError(path, f"no PCA of W ({e})", "Choose ffhq_pca.pt, or write one with the pca command") from e


def spread_of(directions: Sequence[Direction]) -> Spread:
    """The spread of W from all components of one PCA, as `finding.pca` makes them."""
    first = directions[0] if directions else None
    if any(d.origin is None or len(d.vector) > 1 or not d.origin.equal(first.origin) for d in directions) or not first:
        raise WPlusError("expected the components of one PCA, which share their origin")
    vectors = [d.vector[0] for d in directions]
    std = [v.norm() for v in vectors]
    order = sorted(range(len(std)), key=lambda k: -std[k])
    basis = torch.stack([vectors[k] / std[k] for k in order])
    return Spread(first.origin, basis, torch.stack([std[k] for k in order]))


@dataclass(frozen=True)
class Collection:
    """Directions by full name, "group/name"; the group is the folder, or the file of several in the top folder.

    spread: of the first PCA among the files, or None. problems: why a file was left out.
    """

    directions: dict[str, Direction] = field(default_factory=dict)
    spread: Spread | None = None
    problems: dict[Path, str] = field(default_factory=dict)

    def find(self, name: str) -> Direction:
        """By full name, or by name alone: where several groups have it, InterFaceGAN's, latent directions', GANSpace's,
        then the others' by alphabet, the miniature's last. Case does not count; a space is an underscore. WPlusError
        names the nearest.
        """
        wanted = plain(name)
        known = {plain(full): d for full, d in self.directions.items()}
        if wanted in known:
            return known[wanted]
        alike = sorted((full for full in known if full.rsplit("/", 1)[-1] == wanted), key=by_group)
        if len(alike) > 1:
            log.info("%s: taken from %s, not from %s", name, alike[0], ", ".join(alike[1:]))
        if alike:
            return known[alike[0]]
        raise WPlusError(f"no direction {name!r} among the {len(known)} known; {self._nearest(wanted)}")

    def _nearest(self, wanted: str) -> str:
        if not self.directions:
            return "no direction files were found, so check the folder"
        names: dict[str, str] = {}
        for full in sorted(self.directions, key=by_group):
            names[plain(full)] = full
            names.setdefault(plain(full).rsplit("/", 1)[-1], full)
        close = get_close_matches(wanted, names, n=6, cutoff=0.5)
        close = close or get_close_matches(wanted.rsplit("/", 1)[-1], names, n=6, cutoff=0.0)
        return f"the nearest: {', '.join(dict.fromkeys(names[c] for c in close))}"


def plain(name: str) -> str:
    return name.strip().replace(" ", "_").casefold()


def by_group(full: str) -> tuple[int, str]:
    group = full.rpartition("/")[0]
    first = FIRST_GROUPS.index(group) if group in FIRST_GROUPS else len(FIRST_GROUPS)
    return first + (group in LAST_GROUPS), full


def load_collection(*places: str | Path) -> Collection:
    """The directions of files and folders, subfolders included. A name in an earlier place hides it in later ones.

    A file that cannot be read is left out with a warning; a place that is not there is an error.
    """
    directions: dict[str, Direction] = {}
    problems: dict[Path, str] = {}
    spread = None
    for place, path in direction_paths(places):
        try:
            found = load_directions(path)
        except FileError as e:
            log.warning("directions left out: %s", e)
            problems[path] = str(e)
            continue
        if spread is None and any(d.origin is not None for d in found):
            spread = spread_or_none(path)
        for d in found:
            full = full_name(place, path, d.name, len(found) > 1)
            if full in directions:
                log.warning("%s: %s is known already, from another file", path, full)
            directions.setdefault(full, replace(d, name=full))
    order = sorted(directions, key=lambda full: by_group(full)[0])
    return Collection({full: directions[full] for full in order}, spread, problems)


def direction_paths(places: Iterable[str | Path]) -> Iterator[tuple[Path, Path]]:
    """(place, file) of every direction file."""
    for place in map(Path, places):
        if not place.exists():
            raise FileError(place, "there is no such file or folder", "Check the path")
        for path in files_below(place) if place.is_dir() else [place]:
            if path == place or path.suffix in SUFFIXES:
                yield place, path


def full_name(place: Path, path: Path, name: str, several: bool) -> str:
    group = path.relative_to(place).parent.as_posix() if path != place else "."
    if group == "." and several and not name.startswith(f"{path.stem}_"):
        group = path.stem
    return (name if group == "." else f"{group}/{name}").replace(" ", "_")


def spread_or_none(path: Path) -> Spread | None:
    try:
        return load_spread(path)
    except FileError:
        return None  # a part of a PCA, which is fine as directions


def parse_edits(text: str, collection: Collection) -> list[Edit]:
    """ "smile=2 age=-1.5 latent_directions/smile=1@0-7 ganspace/smile=raw:-20" -> edits.

    name=strength, separated by spaces, commas or new lines; @ restricts to layers (0-7, 5, coarse, middle, fine), and
    raw: takes the number in the file's own unit. WPlusError says which part is wrong and names the nearest directions.
    """
    parts = re.split(r"[\s,;]+", re.sub(r"\s*([=@])\s*", r"\1", text.replace("\u2212", "-")).strip())
    return [parse_edit(part, collection) for part in parts if part]


def parse_edit(part: str, collection: Collection) -> Edit:
    match = re.fullmatch(r"([^=@]+)=(raw:)?([^=@]+)(?:@([^=@]+))?", part)
    if not match:
        raise WPlusError(f"expected edits such as smile=2 age=-1.5 eyes_open=1@0-7, got {part!r}")
    name, raw, number, layers = match.groups()
    direction = collection.find(name)
    try:
        return Edit(direction, float(number), parse_layers(layers) if layers else None, bool(raw))
    except WPlusError as e:
        raise WPlusError(f"{part!r}: {e}") from e
    except ValueError as e:
        raise WPlusError(f"{part!r}: expected a number after =, such as {name}=1.5, got {number!r}") from e
