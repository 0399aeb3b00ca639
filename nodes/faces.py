"""Nodes from a photo to aligned faces and back."""

from __future__ import annotations

import logging

import torch
from comfy_api.v0_0_2 import io

from ..wplus_core.align import PADDINGS, align, paste_back
from ..wplus_core.errors import WPlusError
from ..wplus_core.faces import ORDERS, given_faces, pick
from .types import Crop, Crops, CropsIO, FaceToolsIO, LandmarksIO, to_bchw, to_image, watched

log = logging.getLogger(__name__)


class AlignFace(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusAlignFace",
            display_name="W+ Find & Align Face",
            category="W+",
            description="Finds faces in photos and cuts them out as FFHQ does: upright, eyes and mouth in place.",
            search_aliases=["face crop", "ffhq crop", "face detection", "align face"],
            inputs=[
                io.Image.Input("photo", tooltip="One or several photos."),
                io.Combo.Input("faces", options=["one", "all"], tooltip="One face of each photo, or all of them."),
                io.Int.Input("index", default=0, min=0, max=999, tooltip="Which face when one is taken, from 0."),
                io.Combo.Input("order", options=list(ORDERS), tooltip="What the index counts, and the order of all."),
                io.Combo.Input(
                    "padding",
                    options=list(PADDINGS),
                    tooltip="Outside the photo: its blurred reflection as in FFHQ, or black as in the paper's code.",
                ),
                io.Int.Input("size", default=512, min=64, max=2048, step=64, tooltip="Side of the crop in pixels."),
                io.Combo.Input(
                    "if_none",
                    options=["error", "skip"],
                    tooltip="A photo without a face stops the workflow, or is left out (for frames of a video).",
                    advanced=True,
                ),
                FaceToolsIO.Input("face_tools", optional=True, tooltip="The detector; not needed with landmarks."),
                LandmarksIO.Input("landmarks", optional=True, tooltip="Landmarks of ComfyUI's MediaPipe face nodes."),
            ],
            outputs=[
                io.Image.Output("face", display_name="face", tooltip="The aligned faces."),
                CropsIO.Output("crops", display_name="crops", tooltip="Where they were, to paste them back."),
            ],
        )

    @classmethod
    def execute(
        cls, photo, faces, index, order, padding, size, if_none, face_tools=None, landmarks=None
    ) -> io.NodeOutput:
        if face_tools is None and landmarks is None:
            raise WPlusError("W+ Find & Align Face needs face_tools (Load W+ Face Tools) or landmarks")
        found = []
        for n, pixels in enumerate(watched(to_bchw(photo))):
            try:
                seen = given_faces(landmarks, n, order) if landmarks is not None else face_tools.finder(pixels, order)
                chosen = seen if faces == "all" else [pick(seen, index)]
            except WPlusError as error:
                if if_none == "error":
                    raise
                log.warning("W+: photo %d skipped: %s", n, error)
                continue
            for face in chosen:
                origin = {"box": list(face.box), "score": round(face.score, 3), "detector": face.detector}
                found.append(Crop(n, align(pixels, [face.landmarks], size, padding), origin))
        if not found:
            raise WPlusError(f"no face in any of {len(photo)} photos")
        return io.NodeOutput(to_image(torch.cat([c.aligned.images for c in found])), Crops(tuple(found)))


class PasteFace(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusPasteFace",
            display_name="W+ Paste Face Back",
            category="W+",
            description="Lays pictures of aligned faces back over the photos they were cut from, with a soft edge.",
            search_aliases=["face paste", "uncrop face"],
            inputs=[
                io.Image.Input("photo", tooltip="The photos that the crops come from."),
                io.Image.Input("face", tooltip="Pictures in the crops' place, one per crop, of any size."),
                CropsIO.Input("crops", tooltip="From W+ Find & Align Face."),
                io.Float.Input(
                    "feather",
                    default=0.1,
                    min=0.0,
                    max=0.5,
                    step=0.01,
                    tooltip="Width of the soft edge as a part of the crop's side.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="Where to paste, in the crop; everywhere without one."),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The photos with the faces in them.")],
        )

    @classmethod
    def execute(cls, photo, face, crops, feather, mask=None) -> io.NodeOutput:
        if len(face) != len(crops.faces):
            raise WPlusError(f"W+ Paste Face Back needs a picture per crop, got {len(face)} for {len(crops.faces)}")
        photos, faces = to_bchw(photo), to_bchw(face)
        if mask is not None:
            mask = mask[None] if mask.ndim == 2 else mask
            if len(mask) not in (1, len(faces)):
                raise WPlusError(f"W+ Paste Face Back needs one mask or one each, got {len(mask)} for {len(faces)}")
            mask = mask[:, None].float().expand(len(faces), -1, -1, -1)
        for n, crop in enumerate(crops.faces):
            where = None if mask is None else mask[n, None]
            photos[crop.photo] = paste_back(photos[crop.photo], faces[n, None], crop.aligned, feather, where)
        return io.NodeOutput(to_image(photos))
