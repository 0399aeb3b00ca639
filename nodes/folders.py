"""Where the pack's model files lie, and which file is what (told by its keys, never by its name)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable
from pathlib import Path, PurePath

import folder_paths

from ..wplus_core.checkpoints import generator_state
from ..wplus_core.direction_files import TABLE, Collection, direction_paths, load_collection
from ..wplus_core.errors import FileError
from ..wplus_core.files import files_below, read
from ..wplus_core.formats import kind_of

log = logging.getLogger(__name__)

KEY = "wplus"
MINIATURE = Path(__file__).parents[1] / "miniature"  # the trained pipeline of drawn people that the pack carries
SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".npy", ".dat"}
SAVED = "wplus"  # subfolder of output/ that the save nodes write to
DIRECTIONS = "directions"  # subfolder of the W+ model folders and of output/wplus; all tensors in it are directions
NO_DIRECTION = "none"  # shown where there is no direction file, so that a connected direction can still take its place


def register():
    """Adds models/wplus; paths from extra_model_paths.yaml under the key `wplus` stay."""
    folder_paths.add_model_folder_path(KEY, str(Path(folder_paths.models_dir) / "wplus"))
    paths, extensions = folder_paths.folder_names_and_paths[KEY]
    folder_paths.folder_names_and_paths[KEY] = (paths, set(extensions) | SUFFIXES)


@functools.lru_cache(maxsize=1024)
def kind(path: str, mtime: float, size: int) -> str:
    """What a file is; "" and a line in the log, once, for one that cannot be read."""
    try:
        return kind_of(read(path, "meta"))
    except FileError as error:
        log.warning("W+: not listed: %s", error)
        return ""


def kind_at(path: Path) -> str:
    try:
        stat = path.stat()
    except (OSError, ValueError):  # it went since it was listed, or no file can have this name
        return ""
    return kind(str(path), stat.st_mtime, stat.st_size)


def model_files(*kinds: str) -> list[str]:
    """Names in the W+ model folders whose files are of these kinds."""
    names = [n for n in folder_paths.get_filename_list(KEY) if not n.endswith(".dat")]
    return [n for n, path in present(names).items() if kind_at(path) in kinds]


def present(names: Iterable[str]) -> dict[str, Path]:
    """The W+ model files of these names; a link that leads nowhere has none."""
    paths = {n: folder_paths.get_full_path(KEY, n) for n in names}
    return {n: Path(path) for n, path in paths.items() if path is not None}


@functools.lru_cache(maxsize=256)
def has_generator(path: str, state: str) -> bool:
    try:
        return bool(generator_state(read(path, "meta")))
    except FileError:
        return False


def generator_files() -> list[str]:
    """Names of the encoder files with a generator in them, of generators alone, and of the miniature's."""
    paths = present([*model_files("encoder"), *model_files("generator")])
    found = [n for n, path in paths.items() if has_generator(str(path), fingerprint(path))]
    return found + ([MINIATURE.name] if generator_path(MINIATURE.name).is_file() else [])


def generator_path(name: str) -> Path:
    return MINIATURE / "encoder.safetensors" if name == MINIATURE.name else model_path(name)


def model_path(name: str) -> Path:
    return Path(folder_paths.get_full_path_or_raise(KEY, name))


def identity_files() -> list[str]:
    """Identities in the W+ model folders, then those saved to output/wplus and put into input/, with their place."""
    names = [n for n in model_files("identity", "bare") if Path(n).parts[0] != DIRECTIONS]
    for place, folder in (("output", Path(folder_paths.get_output_directory()) / SAVED),
                          ("input", Path(folder_paths.get_input_directory()))):  # fmt: skip
        base = folder.parent if place == "output" else folder
        files = [p for p in files_below(folder) if p.suffix in SUFFIXES - {".dat"}]
        names += [f"{p.relative_to(base).as_posix()} [{place}]" for p in files if kind_at(p) in ("identity", "bare")]
    return names


def identity_file(name: str) -> Path | None:
    """The file that `identity_files` has under this name, without a look at any other; None where it has none."""
    place = next((p for p in ("output", "input") if name.endswith(f" [{p}]")), None)
    inner = PurePath(name.removesuffix(f" [{place}]"))
    if inner.anchor or not inner.parts or any(part.startswith(".") for part in inner.parts):  # with a dot: .. as well
        return None
    if place is None:
        path = None if inner.parts[0] == DIRECTIONS else folder_paths.get_full_path(KEY, name)
    elif inner.suffix not in SUFFIXES - {".dat"} or (place == "output" and inner.parts[0] != SAVED):
        path = None
    else:
        path = Path(folder_paths.get_directory_by_type(place)) / inner
    return Path(path) if path is not None and kind_at(Path(path)) in ("identity", "bare") else None


def identity_path(name: str) -> Path:
    if name.endswith((" [output]", " [input]")):
        return Path(folder_paths.get_annotated_filepath(name))
    return model_path(name)


def saved_directions() -> Path:
    return Path(folder_paths.get_output_directory()) / SAVED / DIRECTIONS


def direction_places() -> tuple[Path, ...]:
    places = [*(Path(p) / DIRECTIONS for p in folder_paths.get_folder_paths(KEY)), saved_directions()]
    places.append(MINIATURE / DIRECTIONS)
    return tuple(p for p in places if p.is_dir())


def directions() -> Collection:
    """The directions of all direction folders; they are read again when a file changed."""
    return read_directions(direction_places(), directions_fingerprint())


@functools.lru_cache(maxsize=1)
def read_directions(places: tuple[Path, ...], state: str) -> Collection:
    return load_collection(*places)


def directions_fingerprint() -> str:
    """Changes when any direction file, or the table that names GANSpace's, does."""
    places = direction_places()
    tables = [p for place in places for p in files_below(place) if p.name == TABLE]
    return " ".join(map(fingerprint, [*(path for _, path in direction_paths(places)), *tables]))


def direction_names() -> list[str]:
    return list(directions().directions) or [NO_DIRECTION]


def dlib_folders() -> list[Path]:
    """Where dlib's .dat files may lie: the W+ folders, and the places that other packs have for them."""
    places = [Path(p) for p in folder_paths.get_folder_paths(KEY)]
    places += [Path(p) for key in ("dlib", "facedetection") if key in folder_paths.folder_names_and_paths
               for p in folder_paths.get_folder_paths(key)]  # fmt: skip
    places += [Path(folder_paths.models_dir) / "dlib"]
    for packs in folder_paths.get_folder_paths("custom_nodes"):
        places += sorted(Path(packs).glob("*/dlib"))
    return [p for p in dict.fromkeys(places) if p.is_dir()]


def dlib_fingerprint() -> str:
    """Changes when a .dat file comes, goes or changes, in folders that are made later too."""
    found = [p for folder in dlib_folders() for p in files_below(folder) if p.suffix == ".dat"]
    return " ".join(map(fingerprint, found))


def fingerprint(path: Path) -> str:
    """Changes when the file does, or goes."""
    try:
        stat = path.stat()
    except OSError:
        return f"{path}:gone"
    return f"{path}:{stat.st_mtime_ns}:{stat.st_size}"
