"""Pictures in a labelled grid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .errors import WPlusError
from .photos import to_uint8

MAX_SIDE = 16384


def grid(
    pictures: Tensor | Sequence[Tensor],
    columns: int,
    labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
) -> Image.Image:
    """Pictures [N, 3, H, W] in 0..1, row by row. labels: one under each picture; column_labels above, row_labels left.

    Labels that are too long for their place are cut off with two dots.
    """
    count = len(pictures)
    rows = -(-count // columns) if columns > 0 else 0
    for name, given, wanted in (("labels", labels, count), ("column_labels", column_labels, columns),
                                ("row_labels", row_labels, rows)):  # fmt: skip
        if given and len(given) != wanted:
            raise WPlusError(f"expected {wanted} {name}, got {len(given)}")
    if not count or columns < 1:
        raise WPlusError(f"a grid needs at least one picture and one column, got {count} and {columns}")
    height, width = pictures[0].shape[-2:]
    text = max(11, min(width, height) // 14)
    font = ImageFont.load_default(text)
    line = text + 6
    left = min(2 * width, max(int(font.getlength(x)) for x in row_labels) + 12) if row_labels else 0
    top, cell = line if column_labels else 0, height + (line if labels else 0)
    if max(left + columns * width, top + rows * cell) > MAX_SIDE:
        raise WPlusError(f"the grid would be over {MAX_SIDE} px on a side; use fewer or smaller pictures")
    sheet = Image.new("RGB", (left + columns * width, top + rows * cell), "white")
    draw = ImageDraw.Draw(sheet)

    def write(x: int, y: int, label: str, room: int):
        draw.text((x + 4, y + 2), fitting(label, font, room - 8), "black", font=font)

    for n, picture in enumerate(pictures):
        x, y = left + n % columns * width, top + n // columns * cell
        sheet.paste(Image.fromarray(to_uint8(picture)), (x, y))
        if labels:
            write(x, y + height, labels[n], width)
    for n, label in enumerate(column_labels):
        write(left + n * width, 0, label, width)
    for n, label in enumerate(row_labels):
        write(0, top + n * cell + (height - line) // 2, label, left)
    return sheet


def fitting(label: str, font: ImageFont.FreeTypeFont, room: int) -> str:
    if font.getlength(label) <= room:
        return label
    while label and font.getlength(label + "..") > room:
        label = label[:-1]
    return label + ".."


def to_tensor(sheet: Image.Image) -> Tensor:
    """A picture [3, H, W] in 0..1."""
    data = torch.frombuffer(bytearray(sheet.convert("RGB").tobytes()), dtype=torch.uint8)
    return data.reshape(sheet.height, sheet.width, 3).permute(2, 0, 1).float() / 255
