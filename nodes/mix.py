"""Nodes that make one identity, or a batch of them, out of several."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..wplus_core.mixing import batched, blend, codes_from, style_mix, truncate
from .types import IdentityIO, numbers, words

LAYERS = "coarse (0-3: pose, face shape), middle (4-7: expression, hair), fine (8-17: colour, light), all, or 0-7, 9"


class MixIdentities(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusMixIdentities",
            display_name="W+ Mix Identities",
            category="W+/editing",
            description="One face out of several people: their weighted mean, if wanted with other weights by layer.",
            search_aliases=["average faces", "blend faces", "merge identities", "interpolate faces"],
            inputs=[
                io.Autogrow.Input("identities", template=several(8), tooltip="Who is mixed; a batch is its mean."),
                weights_input("weights", "One each, such as 2, 1; only their ratios count. Empty: equal."),
                weights_input("coarse", "Instead, on layers 0-3: pose and face shape.", advanced=True),
                weights_input("middle", "Instead, on layers 4-7: features, expression and hair.", advanced=True),
                weights_input("fine", "Instead, from layer 8 on: colour and light.", advanced=True),
            ],
            outputs=[IdentityIO.Output("identity", display_name="identity", tooltip="The mixed identity, one code.")],
        )

    @classmethod
    def execute(cls, identities, weights, coarse, middle, fine) -> io.NodeOutput:
        own = {"coarse": coarse, "middle": middle, "fine": fine}
        groups = {name: numbers(name, text) for name, text in own.items() if text.strip()}
        everywhere = numbers("weights", weights) if weights.strip() else None
        return io.NodeOutput(blend(list(identities.values()), everywhere, groups))


class StyleMix(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusStyleMix",
            display_name="W+ Style Mix",
            category="W+/editing",
            description="One identity with some layers of another: its colours and light, its hair, its head shape.",
            search_aliases=["style mixing", "layer mix", "stylegan mixing"],
            inputs=[
                IdentityIO.Input("identity", tooltip="Whose face it stays."),
                IdentityIO.Input("style", tooltip="Whose layers are taken."),
                io.String.Input("layers", default="fine", tooltip=f"Which layers are taken: {LAYERS}."),
            ],
            outputs=[IdentityIO.Output("identity", display_name="identity", tooltip="The mixed identity.")],
        )

    @classmethod
    def execute(cls, identity, style, layers) -> io.NodeOutput:
        return io.NodeOutput(style_mix(identity, style, words(layers.lower())))


class Truncate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusTruncate",
            display_name="W+ Truncate",
            category="W+/editing",
            description="Moves an identity toward the average face, which calms odd codes, or away from it.",
            search_aliases=["truncation", "psi", "average face", "caricature"],
            inputs=[
                IdentityIO.Input("identity", tooltip="The identity; it must know its encoder's average face."),
                io.Float.Input(
                    "psi",
                    default=0.8,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="1 keeps the identity, 0 is the average face, above 1 exaggerates.",
                    display_mode=io.NumberDisplay.slider,
                ),
                io.String.Input("layers", default="all", tooltip=f"Which layers move: {LAYERS}.", advanced=True),
            ],
            outputs=[IdentityIO.Output("identity", display_name="identity", tooltip="The moved identity.")],
        )

    @classmethod
    def execute(cls, identity, psi, layers) -> io.NodeOutput:
        return io.NodeOutput(truncate(identity, dict.fromkeys(words(layers.lower()), psi)))


class BatchIdentities(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusBatchIdentities",
            display_name="W+ Batch Identities",
            category="W+/editing",
            description="Identities to one batch: Apply W+ Adapter then gives one to each picture of the latent batch.",
            search_aliases=["identity list", "combine identities", "join identities"],
            inputs=[io.Autogrow.Input("identities", template=several(64), tooltip="In the order of the pictures.")],
            outputs=[
                IdentityIO.Output("identity", display_name="identity", tooltip="All their codes, in this order."),
                io.Int.Output("count", display_name="count", tooltip="How many codes: the batch size of the latent."),
            ],
        )

    @classmethod
    def execute(cls, identities) -> io.NodeOutput:
        batch = batched(list(identities.values()))
        return io.NodeOutput(batch, len(batch))


class IdentityFromBatch(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusIdentityFromBatch",
            display_name="W+ Identity From Batch",
            category="W+/editing",
            description="One identity, or several in a row, out of a batch.",
            search_aliases=["pick identity", "select identity", "split identities"],
            inputs=[
                IdentityIO.Input("identity", tooltip="The batch."),
                io.Int.Input("batch_index", default=0, min=0, max=4095, tooltip="The first one, counted from 0."),
                io.Int.Input("length", default=1, min=1, max=4096, tooltip="How many."),
            ],
            outputs=[IdentityIO.Output("identity", display_name="identity", tooltip="Those codes.")],
        )

    @classmethod
    def execute(cls, identity, batch_index, length) -> io.NodeOutput:
        return io.NodeOutput(codes_from(identity, batch_index, length))


def several(most: int) -> io.Autogrow.TemplatePrefix:
    one = IdentityIO.Input("identity", tooltip="One of them; connect it, and the next socket appears.")
    return io.Autogrow.TemplatePrefix(one, prefix="identity", min=2, max=most)


def weights_input(name: str, tooltip: str, advanced: bool | None = None) -> io.String.Input:
    return io.String.Input(name, default="", tooltip=tooltip, advanced=advanced)
