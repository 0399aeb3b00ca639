"""A sweep makes the frames of a strip, a grid or an animation; a grid shows the pictures with their labels."""

from __future__ import annotations

import math
from dataclasses import replace

from comfy_api.v0_0_2 import io

from ..wplus_core.direction_files import parse_edits
from ..wplus_core.directions import Direction
from ..wplus_core.errors import WPlusError
from ..wplus_core.identity import Identity
from ..wplus_core.mixing import signed, spaced, sweep, sweep_between, sweep_edits, title
from ..wplus_core.sheets import grid, to_tensor
from . import folders
from .edit import DirectionNode, custom_input, direction_input, layers_input, own_or
from .types import IdentityIO, to_bchw, to_image

ONE, TWO, BETWEEN, LISTED = "one direction", "two directions", "to another identity", "listed edits"


class Sweep(DirectionNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusSweep",
            display_name="W+ Sweep",
            category="W+/editing",
            description=(
                "One identity as a batch of frames: along a direction or two, toward another identity, or by a list "
                "of edits. With one noise for all frames, a strip, a grid or an animation is a single sampling run."
            ),
            search_aliases=["edit strip", "interpolation", "animate face", "xy grid", "face animation", "walk"],
            inputs=[
                IdentityIO.Input("identity", tooltip="Where the sweep starts from; one code."),
                io.DynamicCombo.Input(
                    "along",
                    options=[
                        io.DynamicCombo.Option(ONE, axis_inputs("", 7)),
                        io.DynamicCombo.Option(TWO, [*axis_inputs("", 5), *axis_inputs("second_", 5)]),
                        io.DynamicCombo.Option(BETWEEN, between_inputs()),
                        io.DynamicCombo.Option(LISTED, [listed_input()]),
                    ],
                    tooltip="What changes from frame to frame.",
                ),
            ],
            outputs=[
                IdentityIO.Output("identity", display_name="identity", tooltip="A batch, one identity per frame."),
                io.Int.Output("count", display_name="count", tooltip="How many frames: the batch size of the latent."),
                io.String.Output("labels", display_name="labels", tooltip="What each frame is, one per line."),
                io.String.Output(
                    "column_labels", display_name="column_labels", tooltip="For W+ Grid, above the columns."
                ),
                io.String.Output("row_labels", display_name="row_labels", tooltip="For W+ Grid, left of the rows."),
            ],
        )

    @classmethod
    def execute(cls, identity, along=None) -> io.NodeOutput:
        kind = (along or {}).get("along")
        if kind not in FRAMES:
            raise WPlusError(f"W+ Sweep: expected along to be one of {', '.join(FRAMES)}")
        frames, labels, columns, rows = FRAMES[kind](identity, along)
        return io.NodeOutput(frames, len(frames), *("\n".join(lines) for lines in (labels, columns, rows)))


class Grid(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusGrid",
            display_name="W+ Grid",
            category="W+/editing",
            description="Pictures of a batch as one labelled sheet, row by row: a strip, a grid, a contact sheet.",
            search_aliases=["contact sheet", "image grid", "strip", "xy plot", "labels"],
            inputs=[
                io.Image.Input("images", tooltip="The pictures, such as the frames of a sweep."),
                io.Int.Input(
                    "columns",
                    default=0,
                    min=0,
                    max=256,
                    tooltip="Pictures in a row; 0: as many as there are column labels, else about as many as rows.",
                ),
                lines_input("labels", "One under each picture."),
                lines_input("column_labels", "Above the columns."),
                lines_input("row_labels", "Left of the rows."),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The sheet, one picture.")],
        )

    @classmethod
    def execute(cls, images, columns, labels="", column_labels="", row_labels="") -> io.NodeOutput:
        under, above, left = labels.splitlines(), column_labels.splitlines(), row_labels.splitlines()
        columns = columns or len(above) or math.ceil(math.sqrt(len(images)))
        return io.NodeOutput(to_image(to_tensor(grid(to_bchw(images), columns, under, above, left))[None]))


def axis_inputs(prefix: str, count: int) -> list[io.Input]:
    def strength(name: str, default: float) -> io.Float.Input:
        tooltip = f"Strength of the {'first' if default < 0 else 'last'} frame; 1 is modest, 3 strong."
        return io.Float.Input(f"{prefix}{name}", default=default, min=-20.0, max=20.0, step=0.05, tooltip=tooltip)

    return [
        direction_input(f"{prefix}direction"),
        strength("start", -3.0),
        strength("end", 3.0),
        count_input(f"{prefix}count", count),
        layers_input(f"{prefix}layers"),
        custom_input(f"{prefix}custom_direction"),
    ]


def between_inputs() -> list[io.Input]:
    def part(name: str, default: float, which: str) -> io.Float.Input:
        tooltip = f"Of the {which} frame: 0 is the identity, 1 the other one; outside of 0 to 1 beyond them."
        return io.Float.Input(name, default=default, min=-2.0, max=3.0, step=0.05, tooltip=tooltip)

    other = IdentityIO.Input("other", tooltip="Where the sweep goes to; one code.")
    return [other, part("start", 0.0, "first"), part("end", 1.0, "last"), count_input("count", 7)]


def count_input(name: str, default: int) -> io.Int.Input:
    return io.Int.Input(name, default=default, min=1, max=256, tooltip="How many steps, with both ends.")


def listed_input() -> io.String.Input:
    return io.String.Input(
        "edits",
        default="smile=0\nsmile=2\nsmile=2 age=-1.5",
        multiline=True,
        tooltip="A frame per line, as in W+ Edit Stack; name=0 is the identity as it is.",
    )


def lines_input(name: str, tooltip: str) -> io.String.Input:
    tooltip = f"{tooltip} One per line, from W+ Sweep or a text node."
    return io.String.Input(name, optional=True, force_input=True, tooltip=tooltip)


Axis = tuple[Direction, list[float]]
Frames = tuple[Identity, list[str], list[str], list[str]]  # identities, labels, column labels, row labels


def one_direction(identity: Identity, along: dict) -> Frames:
    axis = axis_of(along)
    return *sweep(identity, axis), [signed(s) for s in axis[1]], [title(axis[0])]


def two_directions(identity: Identity, along: dict) -> Frames:
    rows, columns = axis_of(along), axis_of(along, "second_")
    return *sweep(identity, rows, columns), axis_labels(columns), axis_labels(rows)


def to_another(identity: Identity, along: dict) -> Frames:
    frames, labels = sweep_between(identity, along["other"], along["count"], along["start"], along["end"])
    return frames, labels, labels, []


def listed_edits(identity: Identity, along: dict) -> Frames:
    lines = [line for line in along["edits"].splitlines() if line.strip()]
    frames, labels = sweep_edits(identity, [parse_edits(line, folders.directions()) for line in lines])
    return frames, labels, [], []


FRAMES = {ONE: one_direction, TWO: two_directions, BETWEEN: to_another, LISTED: listed_edits}


def axis_of(along: dict, prefix: str = "") -> Axis:
    direction = along.get(f"{prefix}custom_direction") or folders.directions().find(along[f"{prefix}direction"])
    direction = replace(direction, layers=own_or(along[f"{prefix}layers"]) or direction.layers)
    return direction, spaced(along[f"{prefix}start"], along[f"{prefix}end"], along[f"{prefix}count"])


def axis_labels(axis: Axis) -> list[str]:
    return [f"{title(axis[0])} {signed(s)}" for s in axis[1]]
