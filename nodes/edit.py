"""Nodes that move an identity along editing directions."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import replace

from comfy_api.v0_0_2 import io
from safetensors.torch import save

from ..wplus_core.direction_files import Collection, parse_edits
from ..wplus_core.directions import Edit, Layers, edit_identity, parse_layers
from ..wplus_core.errors import WPlusError
from ..wplus_core.identity import Identity
from ..wplus_core.mixing import move_attributes
from . import folders
from .types import DirectionIO, IdentityIO, words

OWN_LAYERS = "default"
KEEP_PLAUSIBLE = (
    "Shortens edits that lead too far from the average face, and says so in the log; needs a PCA of W among the "
    "directions, such as ffhq_pca.pt."
)
NO_SPREAD = (
    "keep_plausible needs a PCA of W in models/wplus/directions: ffhq_pca.pt, or one that "
    "`python -m comfyui_wplus.wplus_core.directions pca` wrote"
)


class DirectionNode(io.ComfyNode):
    """A node that looks directions up by name, and runs again when a direction file changes."""

    @classmethod
    def fingerprint_inputs(cls, **inputs):
        return folders.directions_fingerprint()


class EditIdentity(DirectionNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusEditIdentity",
            display_name="W+ Edit Identity",
            category="W+/editing",
            description="Moves an identity along one direction: smile, age, eyes open, ... Chain it for several edits.",
            search_aliases=["face edit", "expression", "smile", "age slider", "interfacegan", "ganspace"],
            inputs=[
                IdentityIO.Input("identity", tooltip="The identity to edit; a batch is edited as a whole."),
                direction_input("direction"),
                io.Float.Input(
                    "strength",
                    default=2.0,
                    min=-5.0,
                    max=5.0,
                    step=0.05,
                    tooltip="1 is modest, 3 strong, the same for every direction; negative is less of it.",
                    display_mode=io.NumberDisplay.slider,
                ),
                layers_input("layers"),
                io.Boolean.Input("keep_plausible", default=False, tooltip=KEEP_PLAUSIBLE, advanced=True),
                custom_input("custom_direction"),
            ],
            outputs=[IdentityIO.Output("identity", display_name="identity", tooltip="The edited identity.")],
        )

    @classmethod
    def execute(cls, identity, direction, strength, layers, keep_plausible, custom_direction=None) -> io.NodeOutput:
        known = folders.directions()
        edits = [Edit(custom_direction or known.find(direction), strength, own_or(layers))]
        return io.NodeOutput(edited(identity, edits, keep_plausible, known))


class EditStack(DirectionNode):
    @classmethod
    def define_schema(cls):
        more = io.Autogrow.TemplatePrefix(
            DirectionIO.Input("direction", tooltip="Called by its name in the edits, in place of a file's."),
            prefix="direction",
            min=0,
            max=16,
        )
        return io.Schema(
            node_id="WPlusEditStack",
            display_name="W+ Edit Stack",
            category="W+/editing",
            description="Any number of edits at once, as a list of names and strengths: smile=2 age=-1.5 eyes_open=1",
            search_aliases=["face edits", "expression sliders", "edit list", "face sliders"],
            inputs=[
                IdentityIO.Input("identity", tooltip="The identity to edit; a batch is edited as a whole."),
                io.String.Input(
                    "edits",
                    default="",
                    multiline=True,
                    placeholder="smile=2 age=-1.5 eyes_open=1",
                    tooltip="name=strength, an edit per line or with blanks between; 1 is modest, 3 strong. @0-7 after "
                    "it moves these layers only, raw: before the number takes the file's own unit.",
                ),
                io.Boolean.Input("keep_plausible", default=False, tooltip=KEEP_PLAUSIBLE, advanced=True),
                io.Autogrow.Input(
                    "directions", template=more, tooltip="Directions that lie in no file, such as a found one."
                ),
            ],
            outputs=[IdentityIO.Output("identity", display_name="identity", tooltip="The edited identity.")],
            is_output_node=True,  # so that it runs by itself, and its identity reaches the browser from the cache too
        )

    @classmethod
    def execute(cls, identity, edits, keep_plausible, directions=None) -> io.NodeOutput:
        known = folders.directions()
        known = replace(known, directions=known.directions | {d.name: d for d in (directions or {}).values()})
        after = edited(identity, parse_edits(edits, known), keep_plausible, known)
        return io.NodeOutput(after, ui={"wplus_identity": [first_code(identity)]})


class MoveAttributes(DirectionNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusMoveAttributes",
            display_name="W+ Move Attributes",
            category="W+/editing",
            description="Gives one identity the attributes of another: its smile, its age, its pose.",
            search_aliases=["copy expression", "transfer smile", "attribute transfer"],
            inputs=[
                IdentityIO.Input("identity", tooltip="Who gets the attributes."),
                IdentityIO.Input("source", tooltip="Whose attributes they are."),
                io.String.Input(
                    "attributes",
                    default="smile eyes_open",
                    tooltip="Names of directions with blanks or commas between.",
                ),
                io.Float.Input(
                    "amount",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="0 changes nothing, 1 has as much of them as the source, above is more than that.",
                    display_mode=io.NumberDisplay.slider,
                ),
            ],
            outputs=[IdentityIO.Output("identity", display_name="identity", tooltip="With the attributes moved.")],
        )

    @classmethod
    def execute(cls, identity, source, attributes, amount) -> io.NodeOutput:
        moved = [folders.directions().find(name) for name in words(attributes)]
        return io.NodeOutput(move_attributes(source, identity, moved, amount))


def direction_input(name: str) -> io.Combo.Input:
    tooltip = "A direction of a file in models/wplus/directions, or one that Save W+ Direction wrote."
    return io.Combo.Input(name, options=folders.direction_names(), tooltip=tooltip)


def custom_input(name: str) -> io.Input:
    return DirectionIO.Input(name, optional=True, tooltip="Takes the place of the name that is chosen above.")


def layers_input(name: str) -> io.String.Input:
    return io.String.Input(
        name,
        default=OWN_LAYERS,
        tooltip="Which layers move: default (the direction's own), all, coarse (pose, face shape), middle (expression, "
        "hair), fine (colour, light), or numbers such as 0-7.",
        advanced=True,
    )


def own_or(layers: str) -> Layers | None:
    """The layers of a text; None, the direction's own, for "default"."""
    text = layers.strip().lower()
    return None if text in ("", OWN_LAYERS) else parse_layers(text)


def edited(identity: Identity, edits: Sequence[Edit], keep_plausible: bool, known: Collection) -> Identity:
    if keep_plausible and known.spread is None:
        raise WPlusError(NO_SPREAD)
    return edit_identity(identity, edits, known.spread if keep_plausible else None)


def first_code(identity: Identity) -> str:
    """The identity's first code as base64 safetensors, w [1, L, 512] and average [L, 512] in float16: for a preview."""
    tensors = {"w": identity.w[:1]} | ({} if identity.average is None else {"average": identity.average})
    return base64.b64encode(save({k: x.half().cpu().contiguous() for k, x in tensors.items()})).decode()
