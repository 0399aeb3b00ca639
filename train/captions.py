"""Captions of pictures from text files beside them or from a table."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from ..wplus_core.errors import FileError, WPlusError

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

    A picture is found by the end of its path: `a.jpg` or `people/a.jpg`; a link by its own name before its file's.
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
        known = next((e for p in (path.absolute(), path.resolve()) for e in ends(p) if e in self.captions), None)
        if known is None:
            raise WPlusError(f"no caption: {self.path.name} has no row for it")
        return first_of([self.captions[known]])


def ends(path: Path) -> list[str]:
    """A whole path, and what is left of it without more and more of its first parts."""
    return [path.as_posix(), *("/".join(path.parts[n:]) for n in range(1, len(path.parts)))]


def first_of(lines: Iterable[str]) -> str:
    """The first text that is not empty."""
    text = next((x for x in lines if x), "")
    if not text:
        raise WPlusError("no caption: the text is empty")
    return text
