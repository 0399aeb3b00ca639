"""A run's folder: checkpoint-N folders that are whole or not there, the statistics, the settings.

    RUN/config.yaml
    RUN/stats.jsonl
    RUN/checkpoint-00016000/   adapter.safetensors, ema.safetensors, optimizer.pt, state.json

The adapters in a checkpoint are ordinary files of ours: any of them can be used as it is.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from ..wplus_core.errors import FileError

log = logging.getLogger(__name__)

CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class RunFolder:
    path: Path

    def checkpoints(self) -> list[Path]:
        """The whole checkpoints, oldest first."""
        found = (p for p in self.path.glob("checkpoint-*") if CHECKPOINT.fullmatch(p.name) and p.is_dir())
        return sorted(found, key=images_of)

    def latest(self) -> Path | None:
        return max(self.checkpoints(), key=images_of, default=None)

    def checkpoint(self, images: int | None = None) -> Path:
        """The checkpoint after so many images, or the latest."""
        found = {images_of(p): p for p in self.checkpoints()}
        if not found or images not in (None, *found):
            raise FileError(self.path, f"no checkpoint {images or ''} here", f"There are {sorted(found) or 'none'}")
        return found[max(found) if images is None else images]

    def save(self, images: int, write: Callable[[Path], None]) -> Path:
        """Write a checkpoint beside its place, force it to the disk, then move it there; an existing one stays."""
        done = self.path / f"checkpoint-{images:08d}"
        if done.exists():
            return done
        part = self.path / f".{done.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write(part)
        for file in (*part.iterdir(), part):
            sync(file)
        part.rename(done)
        sync(self.path)
        return done

    def rotate(self, last: int):
        """Delete all checkpoints but the last ones, and what a killed process left half-written."""
        for p in self.checkpoints()[: -max(1, last)]:
            p.rename(p.with_name(f".{p.name}.old"))
        for p in (*self.path.glob(".checkpoint-*.part"), *self.path.glob(".checkpoint-*.old")):
            shutil.rmtree(p, ignore_errors=True)

    def identifier(self) -> str:
        """A name that no other run has, the same whenever this one goes on."""
        path = self.path / "identifier"
        if not path.is_file():
            path.write_text(uuid4().hex[:8], encoding="utf-8")
        return path.read_text(encoding="utf-8")

    def append(self, line: dict[str, Any]):
        with open(self.path / "stats.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")

    def stats(self) -> list[dict[str, Any]]:
        """The lines of stats.jsonl; one that a killed process left unfinished is left out."""
        path, lines = self.path / "stats.jsonl", []
        for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                log.warning("%s: an unfinished line is left out", path)
        return lines

    def validated(self, images: int) -> bool:
        """Whether the validation after so many images was finished."""
        return any(x["images"] == images and "validation/s" in x for x in self.stats())

    def rewind_stats(self, images: int):
        """Forget the lines after the checkpoint that the run resumes from: they will come again."""
        lines = [x for x in self.stats() if x["images"] <= images]
        part = self.path / ".stats.jsonl.part"
        part.write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")
        os.replace(part, self.path / "stats.jsonl")


def images_of(checkpoint: Path) -> int:
    return int(CHECKPOINT.fullmatch(checkpoint.name)[1])


def sync(path: Path):
    """Force a file, or a folder's list of names, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no fsync for folders
    fd = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
