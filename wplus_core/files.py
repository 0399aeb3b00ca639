"""Reading any file into a flat dict of tensors without executing it, and writing files that are whole or not there."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from secrets import token_hex
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .errors import FileError

AGAIN = "Download or copy it again"
NOT_MODELS = {
    b"<!DO": "this is a web page, saved in place of the file",
    b"<!do": "this is a web page, saved in place of the file",
    b"<htm": "this is a web page, saved in place of the file",
    b"vers": "this is a Git LFS pointer, not the file it points to",
    b"GGUF": "this is a GGUF language or image model",
}
NESTING = 8
ENTRIES = 500_000  # a few bytes of shared references can stand for billions


@dataclass(frozen=True)
class Contents:
    """What a file holds: tensors by flat key ("a.b.0"), the safetensors metadata, and a pickle's other values."""

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether this pack wrote it; other writers have a format and a version in their metadata too."""
        return self.metadata.get("format", "").startswith("wplus-")

    def copied(self) -> Contents:
        """With tensors in memory: mapped ones change with the file, and end the process when it gets shorter."""
        return replace(self, tensors={k: x.clone() for k, x in self.tensors.items()})


def read(path: str | Path, device: str = "cpu") -> Contents:
    """Read a safetensors, torch (weights only) or numpy file; device "meta" reads names, shapes and dtypes alone.

    Large files are memory-mapped. Raises FileError for anything that is not whole, not a tensor file, or would have to
    be executed to be read.
    """
    path = Path(path)
    try:
        return read_any(path, device)
    except OSError as e:
        raise unreadable(path, e) from e


def read_any(path: Path, device: str) -> Contents:
    if not path.is_file():
        raise FileError(path, "there is no such file", "Check the path")
    with open(path, "rb") as f:
        head = f.read(16)
    if head[:4] == b"PK\x03\x04":
        return read_torch_zip(path, device)
    if head[:6] == b"\x93NUMPY":
        return read_numpy(path, device)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8:
        return read_safetensors(path, device)
    if head[:1] == b"\x80":
        return read_pickle(path, device, mmap=False)
    problem = NOT_MODELS.get(head[:4], "this is no safetensors, torch or numpy file, or its start is lost")
    raise FileError(path, problem, AGAIN)


def unreadable(path: str | Path, error: OSError) -> FileError:
    return FileError(path, f"cannot be read ({error.strerror or error})", "Check the path and who may read the file")


def read_safetensors(path: Path, device: str) -> Contents:
    try:
        with safetensors.safe_open(path, framework="pt") as f:
            metadata = f.metadata() or {}
            if device == "meta":
                slices = {k: f.get_slice(k) for k in f.keys()}
                return Contents(path, {k: meta_tensor(s) for k, s in slices.items()}, metadata)
            return Contents(path, {k: f.get_tensor(k) for k in f.keys()}, metadata)
    except (safetensors.SafetensorError, KeyError) as e:
        raise FileError(path, f"damaged safetensors file ({e})", AGAIN) from e


def meta_tensor(piece) -> Tensor:
    floats = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    dtype = floats.get(piece.get_dtype(), torch.int64 if piece.get_dtype() == "I64" else torch.uint8)
    return torch.empty(piece.get_shape(), dtype=dtype, device="meta")


def read_numpy(path: Path, device: str) -> Contents:
    try:
        array = np.load(path, allow_pickle=False, mmap_mode="r" if device == "meta" else None)
    except ValueError as e:
        if "allow_pickle" in str(e):
            raise refused(path, "a numpy object array") from e
        raise FileError(path, f"damaged numpy file ({e})", AGAIN) from e
    except Exception as e:  # numpy parses the header as Python, and a damaged one raises almost anything
        raise FileError(path, f"damaged numpy file ({type(e).__name__})", AGAIN) from e
    if array.dtype.kind != "f":
        raise FileError(path, f"a numpy file of {array.dtype}", "Expected an array of floating-point numbers")
    if device == "meta":
        return Contents(path, {"": torch.empty(array.shape, device="meta")})
    return Contents(path, {"": torch.from_numpy(array.astype(np.float32))})


def read_torch_zip(path: Path, device: str) -> Contents:
    try:
        with zipfile.ZipFile(path) as z:
            entries = z.infolist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, EOFError) as e:
        raise FileError(path, f"a torch file that is cut short or damaged ({e})", AGAIN) from e
    names = {e.filename.split("/", 1)[-1] for e in entries}
    if "constants.pkl" in names:
        raise refused(path, "a TorchScript program")
    if "data.pkl" not in names:
        raise FileError(path, "a zip archive without a torch state dict", "Unpack it and use the file inside")
    if any(e.compress_type != zipfile.ZIP_STORED for e in entries):
        raise FileError(path, "a torch file that was compressed afterwards", "Save it again with torch.save")
    return read_pickle(path, device, mmap=device == "cpu")


def read_pickle(path: Path, device: str, mmap: bool) -> Contents:
    try:
        loaded = torch.load(path, map_location=device, weights_only=True, mmap=mmap)
    except UnpicklingError as e:
        if "Unsupported" in str(e):
            raise refused(path, unsupported_part(str(e))) from e
        raise FileError(path, "a torch file that is cut short or damaged", AGAIN) from e
    except Exception as e:  # a damaged pickle raises almost anything
        raise FileError(path, f"a torch file that is cut short or damaged ({type(e).__name__})", AGAIN) from e
    tensors, values = {}, {}
    flatten(path, loaded, "", tensors, values, iter(range(ENTRIES)))
    check_extents(path, tensors)
    return Contents(path, tensors, {}, values)


def refused(path: Path, what: str) -> FileError:
    return FileError(
        path,
        f"refused, because loading it would run code from the file: it holds {what}",
        "Use a file of plain tensors: a state dict saved with torch.save, or safetensors",
    )


def unsupported_part(message: str) -> str:
    """The name in torch's weights-only message, such as `os.system`."""
    for mark in ("GLOBAL ", "Unsupported class ", "Unsupported operand "):
        if mark in message:
            return message.split(mark, 1)[1].split()[0].rstrip(".,:")
    return "more than tensors"


def flatten(
    path: Path,
    item: Any,
    key: str,
    tensors: dict[str, Tensor],
    values: dict[str, Any],
    left: Iterator[int],
    depth: int = 0,
):
    """Spread nested dicts and lists over dotted keys, tensors apart from other values, while any entry is left."""
    if next(left, None) is None:
        raise FileError(path, f"more than {ENTRIES:,} entries", "Expected a state dict")
    if isinstance(item, Tensor):
        tensors[key] = item.detach()
    elif isinstance(item, Mapping | list | tuple):
        if depth == NESTING:
            raise FileError(path, f"nested more than {NESTING} levels deep", "Expected a state dict")
        pairs = item.items() if isinstance(item, Mapping) else enumerate(item)
        for k, v in pairs:
            flatten(path, v, f"{key}.{k}" if key else str(k), tensors, values, left, depth + 1)
    else:
        values[key] = item


def check_extents(path: Path, tensors: dict[str, Tensor]):
    """No tensor may claim more elements than the file has bytes (a stride of zero makes a bomb of a few bytes)."""
    size = path.stat().st_size
    large = [k for k, x in tensors.items() if x.numel() > size]
    if large:
        claim = f"{large[0]!r} claims {tensors[large[0]].numel()} numbers in a file of {size} bytes"
        raise FileError(path, claim, AGAIN)


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes; FileError where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    except OSError as e:
        raise unreadable(path, e) from e
    return digest.hexdigest()


def files_below(folder: str | Path) -> list[Path]:
    """All files that are not hidden, sorted, in linked folders too, as ComfyUI lists its models; loops of links end."""
    found: list[Path] = []
    for here, folders, files in os.walk(folder, followlinks=True):
        if Path(here).resolve() in {p.resolve() for p in Path(here).parents}:
            folders.clear()
            continue
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [path for name in files if not name.startswith(".") and os.path.isfile(path := Path(here, name))]
    return sorted(found)


def write_whole(path: str | Path, write: Callable[[Path], object]):
    """Write beside the path, then move into place: a reader finds the old file or the new one, never half of one.

    FileError where it cannot be written, for which safetensors and torch have errors of their own kinds.
    """
    path = Path(path)
    part = path.with_name(f".{os.getpid()}-{token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        os.replace(part, path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as e:
        remedy = "Is the disk full, or may the folder not be written to? What was there before is as it was"
        raise FileError(path, f"could not be written ({e})", remedy) from e
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def write_safetensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]):
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    write_whole(path, lambda p: safetensors.torch.save_file(tensors, p, metadata))


def write_torch(path: str | Path, item: Any):
    write_whole(path, lambda p: torch.save(item, p))
