"""Captions of pictures: from text files beside them, from a table, or by BLIP-2."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, Blip2ForConditionalGeneration

from ..wplus_core.errors import FileError, WPlusError
from ..wplus_core.photos import to_uint8

MAX_TOKENS = 40
FILE_COLUMNS, CAPTION_COLUMNS = ("file", "file_name", "image"), ("caption", "text")


class Beside:
    """The first line that is not empty of NAME.txt beside NAME.jpg."""

    def __call__(self, path: Path) -> str:
        try:
            lines = path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise WPlusError(f"no caption: {path.with_suffix('.txt').name} beside it cannot be read") from e
        return first_of(line.strip() for line in lines)


class Table:
    """A CSV file with columns `file` (or file_name, image) and `caption` (or text).

    A picture is found by the end of its path: `a.jpg` or `people/a.jpg`.
    """

    def __init__(self, path: Path):
        try:
            with open(path, newline="", encoding="utf-8-sig") as f:
                rows = list(csv.DictReader(f))
        except (OSError, UnicodeDecodeError, csv.Error) as e:
            raise FileError(path, f"no readable CSV ({e})", "Give a CSV file with columns file,caption") from e
        columns = rows[0].keys() if rows else ()
        file, caption = (next((c for c in names if c in columns), None) for names in (FILE_COLUMNS, CAPTION_COLUMNS))
        if file is None or caption is None:
            raise FileError(path, f"columns {list(columns)}", "Give a CSV file with columns file,caption")
        self.path, self.captions = path, {Path(r[file]).as_posix(): (r[caption] or "").strip() for r in rows if r[file]}

    def __call__(self, path: Path) -> str:
        parts = path.resolve().parts
        ends = ("/".join(parts[n:]) for n in range(len(parts)))
        known = next((e for e in (path.resolve().as_posix(), *ends) if e in self.captions), None)
        if known is None:
            raise WPlusError(f"no caption: {self.path.name} has no row for it")
        return first_of([self.captions[known]])


@dataclass
class Blip2:
    """BLIP-2 from a folder in transformers' layout; always the same caption for the same picture (no sampling)."""

    model: Blip2ForConditionalGeneration
    processor: Any

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Blip2:
        try:
            model = Blip2ForConditionalGeneration.from_pretrained(folder, local_files_only=True)
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as e:
            raise FileError(folder, f"no BLIP-2 here ({e})", "Fetch Salesforce/blip2-opt-2.7b into it") from e
        return cls(model.to(device, dtype).eval().requires_grad_(False), processor)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Tensor]) -> list[str]:
        """Pictures [3, H, W] in 0..1 of any sizes -> a caption each."""
        inputs = self.processor(images=[to_uint8(p) for p in pictures], return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        return [t.strip() for t in self.processor.batch_decode(tokens, skip_special_tokens=True)]


def first_of(lines) -> str:
    """The first text that is not empty."""
    text = next((x for x in lines if x), "")
    if not text:
        raise WPlusError("no caption: the text is empty")
    return text
