"""Nodes that make, show, keep and place identities."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import comfy.utils
import folder_paths
import torch
from comfy_api.v0_0_2 import io, ui
from torch import Tensor

from ..wplus_core.background import WITHOUT_PARSER
from ..wplus_core.checkpoints import load_identity, save_identity
from ..wplus_core.encode import average, average_of, codes, thumbnail
from ..wplus_core.errors import WPlusError
from ..wplus_core.identity import Identity, described
from ..wplus_core.mixing import codes_from
from ..wplus_core.refine import RefineConfig, refine
from . import folders
from .edit import DirectionNode
from .types import (
    CropsIO,
    EncoderIO,
    FaceToolsIO,
    IdentityIO,
    InPlace,
    LoadedEncoder,
    Placed,
    PlacedIO,
    finite_mask,
    interruptible,
    numbers,
    placed,
    to_bchw,
    to_image,
    watched,
)

log = logging.getLogger(__name__)

CHUNK = 8  # faces that are encoded at once
RESOLUTIONS = ["64", "128", "256", "512", "1024"]


class EncodeIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusEncodeIdentity",
            display_name="W+ Encode Identity",
            category="W+",
            description="Aligned faces to an identity: StyleGAN2 W+ codes that the adapter and the edits work on.",
            search_aliases=["face to latent", "gan inversion", "e4e encode"],
            inputs=[
                EncoderIO.Input("encoder", tooltip="From Load W+ Encoder."),
                io.Image.Input("face", tooltip="Aligned faces from W+ Find & Align Face."),
                io.Combo.Input(
                    "faces_are",
                    options=["one person", "one each"],
                    tooltip="One person: the codes are averaged. One each: a batch of identities, one per picture.",
                ),
                io.String.Input("name", default="", tooltip="A name to know the identity by."),
                io.Boolean.Input(
                    "remove_background",
                    default=True,
                    tooltip="White where no face, hair or neck is (needs a parser); a background leaks into pictures.",
                ),
                io.Int.Input(
                    "refine_steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Optimise the code through the generator for a closer likeness; 0 is off, 100 is slow.",
                    advanced=True,
                ),
                FaceToolsIO.Input("face_tools", optional=True, tooltip="Its parser removes the background."),
                CropsIO.Input("crops", optional=True, tooltip="Notes in the identity where the faces were found."),
            ],
            outputs=[
                IdentityIO.Output("identity", display_name="identity", tooltip="W+ codes and where they come from."),
                io.Image.Output("seen", display_name="seen", tooltip="What the encoder saw."),
            ],
        )

    @classmethod
    def execute(
        cls, encoder, face, faces_are, name, remove_background, refine_steps, face_tools=None, crops=None
    ) -> io.NodeOutput:
        parser = face_tools.parser if face_tools is not None and remove_background else None
        if remove_background and parser is None:
            log.warning("W+ Encode Identity: %s", WITHOUT_PARSER)
        network, device = encoder.encoder.load(), encoder.encoder.device
        regions = parser.load() if parser else None
        parts = [codes(to_bchw(some).to(device), network, regions) for some in watched(face.split(CHUNK))]
        w, seen = (torch.cat([part[i].cpu() for part in parts]) for i in (0, 1))
        provenance = {
            "source": "photo",
            "photos": [c.origin for c in crops.faces] if crops is not None else [],
            "encoder": {"file": encoder.name, "sha256": encoder.sha256},
            "background_removed": parser is not None,
        }
        identity = Identity(w, name, provenance, thumbnail(to_bchw(face[:1])[0]), average_of(network))
        if refine_steps:
            identity = refined(identity, seen, encoder, refine_steps)
        if faces_are == "one person" and len(identity) > 1:
            identity = average([identity])
        return io.NodeOutput(identity, to_image(seen))


def refined(identity: Identity, seen: Tensor, encoder: LoadedEncoder, steps: int) -> Identity:
    """Each code by itself, since a batch in one graph takes gigabytes. The losses of several codes are a list each."""
    generator, config, count = encoder.load_generator(), RefineConfig(steps=steps), len(identity)
    bar, done = comfy.utils.ProgressBar(steps * count), []
    for n in range(count):
        one, progress = codes_from(identity, n), interruptible(bar, n * steps)
        done.append(refine(one, seen[n, None], generator, one.average, config=config, progress=progress))
    records = [one.provenance["refine"] for one in done]
    record = records[0] if count == 1 else records[0] | {"losses": [r["losses"] for r in records]}
    w = torch.cat([one.w for one in done])
    return replace(identity, w=w, provenance=identity.provenance | {"refine": record})


class DecodeIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusDecodeIdentity",
            display_name="W+ Decode Identity",
            category="W+",
            description="The face that an identity's codes stand for, painted by StyleGAN2: a quick look at an edit.",
            search_aliases=["stylegan preview", "latent to face"],
            inputs=[
                IdentityIO.Input("identity", tooltip="The identity to look at."),
                EncoderIO.Input("encoder", tooltip="From Load W+ Encoder; its file must hold the generator."),
                io.Combo.Input(
                    "resolution", options=RESOLUTIONS, default="256", tooltip="At most; lower is much quicker."
                ),
                io.Combo.Input(
                    "noise",
                    options=["fixed", "random", "none"],
                    tooltip="Pores and strands of hair: always the same, by the seed, or none.",
                    advanced=True,
                ),
                io.Int.Input("seed", default=0, min=0, max=2**63 - 1, tooltip="For random noise.", advanced=True),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="One picture per code.")],
        )

    @classmethod
    def execute(cls, identity, encoder, resolution, noise, seed) -> io.NodeOutput:
        generator = encoder.load_generator()
        weight = next(generator.parameters())
        rng = torch.Generator().manual_seed(seed)
        pictures = [
            generator(w.to(weight), noise, int(resolution), rng).float().cpu() for w in watched(identity.w.split(4))
        ]
        return io.NodeOutput(to_image(torch.cat(pictures) / 2 + 0.5))


class SaveIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusSaveIdentity",
            display_name="Save W+ Identity",
            category="W+",
            description="Saves an identity to output/wplus, where Load W+ Identity finds it.",
            search_aliases=["save face", "export identity"],
            inputs=[
                IdentityIO.Input("identity", tooltip="The identity to save, with its history and a thumbnail."),
                io.String.Input("filename_prefix", default="identity", tooltip="A name; a number is added."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, identity, filename_prefix) -> io.NodeOutput:
        folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
            f"{folders.SAVED}/{filename_prefix}", folder_paths.get_output_directory()
        )
        while (path := Path(folder) / f"{name}_{counter:05}.safetensors").exists():
            counter += 1
        save_identity(identity, path)
        shown = {"identities": [{"filename": path.name, "subfolder": subfolder, "type": "output"}]}
        if identity.thumbnail is not None:
            shown |= ui.PreviewImage(identity.thumbnail[None].float() / 255, cls=cls).as_dict()
        return io.NodeOutput(ui=shown)


class LoadIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusLoadIdentity",
            display_name="Load W+ Identity",
            category="W+",
            description="Loads an identity saved here, or a bare W+ code (.pth, .pt, .npy, .safetensors).",
            search_aliases=["load face", "import identity"],
            inputs=[
                io.Combo.Input(
                    "identity_name",
                    options=folders.identity_files(),
                    tooltip="A file in models/wplus, output/wplus or input.",
                )
            ],
            outputs=[IdentityIO.Output("identity", display_name="identity", tooltip="W+ codes and their history.")],
        )

    @classmethod
    def fingerprint_inputs(cls, identity_name):
        return folders.fingerprint(folders.identity_path(identity_name))

    @classmethod
    def execute(cls, identity_name) -> io.NodeOutput:
        return io.NodeOutput(load_identity(folders.identity_path(identity_name)))


class PlaceIdentity(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusPlaceIdentity",
            display_name="W+ Place Identity",
            category="W+",
            description="How strongly and where an identity acts, for several people in one picture.",
            search_aliases=["identity mask", "identity weight", "regional face"],
            inputs=[
                IdentityIO.Input("identity", tooltip="The identity to place."),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    tooltip="Times the weight of Apply W+ Adapter.",
                    display_mode=io.NumberDisplay.slider,
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where it acts, over the picture; one mask, or one per frame."
                ),
                io.String.Input(
                    "frame_weights",
                    optional=True,
                    default="",
                    tooltip="Times the weight: one per picture of the batch, such as 0, 0.25, 0.5, 0.75, 1.",
                    advanced=True,
                ),
            ],
            outputs=[PlacedIO.Output("identity", display_name="identity", tooltip="For Apply W+ Adapter.")],
        )

    @classmethod
    def execute(cls, identity, weight, mask=None, frame_weights="") -> io.NodeOutput:
        by_frame = numbers("frame_weights", frame_weights) or [1.0]
        return io.NodeOutput(Placed(identity, weight, finite_mask(mask, "W+ Place Identity"), tuple(by_frame)))


class EditInPlace(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusEditInPlace",
            display_name="W+ Edit in Place",
            category="W+/editing",
            description=(
                "Edits a person and leaves the rest of the picture nearly as it was: the edited code sets in when the "
                "composition is there, and only inside the mask."
            ),
            search_aliases=["keep background", "same picture", "local edit", "masked edit", "delayed edit"],
            inputs=[
                io.MultiType.Input(
                    "identity",
                    [IdentityIO, PlacedIO],
                    tooltip="The person before the edit: an identity, or one from W+ Place Identity.",
                ),
                IdentityIO.Input("edited", tooltip="The same person after it, from W+ Edit Stack for example."),
                io.Float.Input(
                    "start_percent",
                    default=0.3,
                    min=0.0,
                    max=1.0,
                    step=0.001,
                    tooltip="Where in the sampling the edit sets in: later keeps more of the picture and edits less.",
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="Where the edit acts, over the picture: the face; else everywhere."
                ),
            ],
            outputs=[PlacedIO.Output("identity", display_name="identity", tooltip="For Apply W+ Adapter.")],
        )

    @classmethod
    def execute(cls, identity, edited, start_percent, mask=None) -> io.NodeOutput:
        before = placed(identity)
        if before.edit:
            raise WPlusError(
                "W+ Edit in Place: this identity has an edit in its place already; make all edits of `edited` in one "
                "W+ Edit Stack, or chain W+ Edit Identity before it"
            )
        edit = InPlace(edited, start_percent, finite_mask(mask, "W+ Edit in Place"))
        return io.NodeOutput(replace(before, edit=edit))


class IdentityInfo(DirectionNode):  # whose spread it reads
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusIdentityInfo",
            display_name="W+ Identity Info",
            category="W+",
            description="What is known of an identity, as text: its codes, where they come from, its edits.",
            search_aliases=["inspect identity", "provenance", "identity history"],
            inputs=[IdentityIO.Input("identity", tooltip="The identity to look at.")],
            outputs=[io.String.Output("text", display_name="text", tooltip="For a node that shows text.")],
        )

    @classmethod
    def execute(cls, identity) -> io.NodeOutput:
        return io.NodeOutput("\n".join(described(identity, folders.directions().spread)))
