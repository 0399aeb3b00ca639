"""Nodes that load, make, find and keep editing directions."""

from __future__ import annotations

import re
from dataclasses import replace

from comfy_api.v0_0_2 import io

from ..wplus_core.direction_files import save_directions
from ..wplus_core.directions import MAX_LAYERS, orthogonalise, parse_layers
from ..wplus_core.errors import WPlusError
from ..wplus_core.finding import find_direction, pca, sefa
from ..wplus_core.mixing import title
from . import folders
from .edit import DirectionNode, direction_input
from .types import DirectionIO, EncoderIO, IdentityIO, watched

LAYERS = "all, coarse, middle, fine, or numbers such as 0-7."


class LoadDirection(DirectionNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusLoadDirection",
            display_name="Load W+ Direction",
            category="W+/directions",
            description="An editing direction by its name, to be changed or compared with others.",
            search_aliases=["editing direction", "interfacegan", "ganspace", "latent direction"],
            inputs=[direction_input("direction_name")],
            outputs=[DirectionIO.Output("direction", display_name="direction", tooltip="The direction.")],
        )

    @classmethod
    def execute(cls, direction_name) -> io.NodeOutput:
        return io.NodeOutput(folders.directions().find(direction_name))


class Orthogonalise(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        others = io.Autogrow.TemplatePrefix(
            DirectionIO.Input("other", tooltip="One that is to stay as it is; connect it for the next socket."),
            prefix="other",
            min=1,
            max=16,
        )
        return io.Schema(
            node_id="WPlusOrthogonalise",
            display_name="W+ Orthogonalise Direction",
            category="W+/directions",
            description="A direction without what it shares with others: smile without age (conditional manipulation).",
            search_aliases=["disentangle", "conditional manipulation", "orthogonalize"],
            inputs=[
                DirectionIO.Input("direction", tooltip="The direction to clean."),
                io.Autogrow.Input("others", template=others, tooltip="What is not to change with it."),
            ],
            outputs=[DirectionIO.Output("direction", display_name="direction", tooltip="The part that is its own.")],
        )

    @classmethod
    def execute(cls, direction, others) -> io.NodeOutput:
        return io.NodeOutput(orthogonalise(direction, list(others.values())))


class FindDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusFindDirection",
            display_name="W+ Find Direction",
            category="W+/directions",
            description="A new direction from two sets of faces, with an attribute and without it (as InterFaceGAN).",
            search_aliases=["train direction", "svm boundary", "new slider", "attribute direction"],
            inputs=[
                IdentityIO.Input("positive", tooltip="A batch of identities with the attribute, 5 or more."),
                IdentityIO.Input("negative", tooltip="A batch of identities without it, 5 or more."),
                io.String.Input("name", default="found", tooltip="What the attribute is called in edits."),
                io.Combo.Input(
                    "method",
                    options=["svm", "logistic"],
                    tooltip="How the boundary between them is fitted: linear SVM or logistic regression.",
                    advanced=True,
                ),
                io.String.Input(
                    "layers", default="all", tooltip=f"Layers that are looked at and move: {LAYERS}", advanced=True
                ),
                io.Boolean.Input(
                    "per_layer",
                    default=False,
                    tooltip="A step of its own for every layer; needs many more faces.",
                    advanced=True,
                ),
            ],
            outputs=[
                DirectionIO.Output("direction", display_name="direction", tooltip="From without to with it."),
                io.String.Output("report", display_name="report", tooltip="How well it tells new faces apart."),
            ],
        )

    @classmethod
    def execute(cls, positive, negative, name, method, layers, per_layer) -> io.NodeOutput:
        found = find_direction(positive.w, negative.w, callable_name(name), method, some(layers), per_layer, watched)
        return io.NodeOutput(found.direction, str(found))


class GeneratorDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusGeneratorDirection",
            display_name="W+ Generator Direction",
            category="W+/directions",
            description="A direction of the generator itself, without any labels: GANSpace's PCA, or SeFA.",
            search_aliases=["ganspace", "sefa", "pca", "unsupervised direction"],
            inputs=[
                EncoderIO.Input("encoder", tooltip="From Load W+ Encoder; its file must hold the generator."),
                io.Combo.Input(
                    "method",
                    options=["pca", "sefa"],
                    tooltip="pca: how faces vary most. sefa: what the layers' weights react to most.",
                ),
                io.Int.Input("component", default=0, min=0, max=511, tooltip="Which one, the strongest is 0."),
                io.String.Input("layers", default="all", tooltip=f"Layers that move (and sefa looks at): {LAYERS}"),
            ],
            outputs=[DirectionIO.Output("direction", display_name="direction", tooltip="The component.")],
        )

    @classmethod
    def execute(cls, encoder, method, component, layers) -> io.NodeOutput:
        generator, layers = encoder.load_generator(), some(layers)
        if method == "sefa":
            return io.NodeOutput(sefa(generator, layers, component + 1)[component])
        return io.NodeOutput(replace(pca(generator, component + 1)[component], layers=layers, unit=None))


class SaveDirection(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusSaveDirection",
            display_name="Save W+ Direction",
            category="W+/directions",
            description="Saves a direction to output/wplus/directions, where every W+ node finds it by its name.",
            search_aliases=["export direction", "keep direction"],
            inputs=[
                DirectionIO.Input("direction", tooltip="The direction to save."),
                io.String.Input(
                    "name",
                    default="",
                    tooltip="What edits call it; empty: its own name. Folders (mine/beard) work, and a number is added "
                    "where the name is taken.",
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, direction, name) -> io.NodeOutput:
        folder = folders.saved_directions()
        wanted = path = folder / f"{callable_name(name or title(direction))}.safetensors"
        if not path.resolve().is_relative_to(folder.resolve()):
            raise WPlusError(f"Save W+ Direction: the name {name!r} leads out of {folder.name}")
        number = 1
        while path.exists():
            number += 1
            path = wanted.with_stem(f"{wanted.stem}_{number}")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_directions([replace(direction, name=path.stem)], path)
        subfolder = path.parent.relative_to(folder.parents[1]).as_posix()
        return io.NodeOutput(ui={"directions": [{"filename": path.name, "subfolder": subfolder, "type": "output"}]})


def callable_name(name: str) -> str:
    """Without what ends a name in a line of edits."""
    return re.sub(r"[\s,;=@]+", "_", name.strip())


def some(layers: str) -> tuple[int, int] | None:
    """The layers of a text; None for all of them."""
    chosen = parse_layers(layers.strip().lower() or "all")
    return None if chosen == (0, MAX_LAYERS) else chosen
