"""The miniature: the drawn world's whole pipeline, in the objects that ComfyUI's own nodes work with.

ComfyUI recognises SD1.5 by its widths, which these are not. So its own classes are built here from the files' configs:
UNetModel as SD15 has it, AutoencoderKL, and CLIP with its tokenizer; its own tables translate diffusers' keys.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import comfy.clip_model
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from comfy_api.v0_0_2 import io
from torch import Tensor

from ..wplus_core.checkpoints import load_adapter, load_encoder, load_generator
from ..wplus_core.errors import FileError
from ..wplus_core.files import read, sha256
from ..wplus_core.photos import load_photo
from .folders import MINIATURE
from .types import AdapterIO, EncoderIO, LoadedAdapter, LoadedEncoder, Managed

WEIGHTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
HOW = "python -m comfyui_wplus.train.mini OUT --pack miniature makes it"


class LoadMiniature(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="WPlusLoadMiniature",
            display_name="Load W+ Miniature",
            category="W+",
            description=(
                "A whole trained W+ pipeline of a few megabytes, for trying things out without downloads: a text-to-"
                "image model of drawn people (128 x 128 pixels, SD1.x's plan), with its encoder, generator and adapter."
            ),
            search_aliases=["tiny model", "demo model", "test checkpoint"],
            inputs=[],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="Draws people; its pictures are 128 x 128."),
                io.Clip.Output("clip", display_name="clip", tooltip="Knows the words of the drawn world."),
                io.Vae.Output("vae", display_name="vae", tooltip="Between pictures and latents, 8 x smaller."),
                EncoderIO.Output("encoder", display_name="encoder", tooltip="Encoder and 64 px generator."),
                AdapterIO.Output("adapter", display_name="adapter", tooltip="Trained for this model and encoder."),
                io.Image.Output("faces", display_name="faces", tooltip="Some drawn people, aligned, to be encoded."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        base = MINIATURE / "base"
        path = found(MINIATURE / "encoder.safetensors")
        encoder = LoadedEncoder("miniature", sha256(path), Managed(load_encoder(path)), Managed(load_generator(path)))
        adapter = LoadedAdapter("miniature", load_adapter(found(MINIATURE / "adapter.safetensors")))
        return io.NodeOutput(load_unet(base), load_clip(base), load_vae(base), encoder, adapter, load_faces())


def found(path: Path) -> Path:
    if not path.is_file():
        raise FileError(path, "the miniature has no such file yet", HOW)
    return path


def load_faces() -> Tensor:
    """[N, 64, 64, 3] of the sheet that has them side by side."""
    sheet = load_photo(found(MINIATURE / "people.png")).pixels
    return torch.stack(sheet.split(sheet.shape[1], 2)).movedim(1, -1)


def part(base: Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of one folder of a diffusers model."""
    weights = read(found(base / name / f"{WEIGHTS[name]}.safetensors")).tensors
    return json.loads(found(base / name / "config.json").read_text(encoding="utf-8")), weights


def load_unet(base: Path) -> comfy.model_patcher.ModelPatcher:
    """As comfy.sd.load_diffusion_model_state_dict, with the config given instead of detected."""
    config, weights = part(base, "unet")
    wanted = unet_config(config)
    config = comfy.supported_models.SD15(wanted)
    config.unet_config |= wanted  # SD15 brings its own eight heads along
    device, offload = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    dtypes, count = config.supported_inference_dtypes, comfy.utils.calculate_parameters(weights)
    dtype = comfy.model_management.unet_dtype(model_params=count, supported_dtypes=dtypes, weight_dtype=torch.float16)
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device, dtypes))
    keys = comfy.utils.unet_to_diffusers(config.unet_config)
    model = config.get_model({}, "")
    model.load_model_weights({keys[k]: x for k, x in weights.items()}, "")
    return comfy.model_patcher.ModelPatcher(model.to(offload), load_device=device, offload_device=offload)


def unet_config(config: dict[str, Any]) -> dict[str, Any]:
    """diffusers' config of a UNet of SD1.x's plan, in ComfyUI's words."""
    widths, blocks = config["block_out_channels"], config["layers_per_block"]
    depth = [int(name.startswith("CrossAttn")) for name in config["down_block_types"]]
    return {
        "image_size": 32,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [blocks] * len(widths),
        "num_heads": config["attention_head_dim"],
        "context_dim": config["cross_attention_dim"],
        "transformer_depth": [d for d in depth for _ in range(blocks)],
        "transformer_depth_output": [d for d in depth for _ in range(blocks + 1)],
        "transformer_depth_middle": 1,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "use_temporal_attention": False,
        "adm_in_channels": None,
        "legacy": False,
    }


def load_vae(base: Path) -> comfy.sd.VAE:
    config, weights = part(base, "vae")
    widths = config["block_out_channels"]
    plan = {
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "z_channels": config["latent_channels"],
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "resolution": config["sample_size"],
        "double_z": True,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    return comfy.sd.VAE(weights, config={"params": {"ddconfig": plan, "embed_dim": config["latent_channels"]}})


class SmallVocabulary(comfy.clip_model.CLIPTextModel):
    """CLIP's text model with as many tokens as its config says; ComfyUI's has CLIP's 49,408."""

    def __init__(self, config, dtype, device, operations):
        super().__init__(config, dtype, device, operations)
        size = config["vocab_size"], config["hidden_size"]
        self.set_input_embeddings(operations.Embedding(*size, dtype=dtype, device=device))


def load_clip(base: Path) -> comfy.sd.CLIP:
    config, weights = part(base, "text_encoder")
    length, end = config["max_position_embeddings"], config["eos_token_id"]
    special = {"start": config["bos_token_id"], "end": end, "pad": end}
    text = partial(
        comfy.sd1_clip.SDClipModel, max_length=length, textmodel_json_config=config, model_class=SmallVocabulary,
        special_tokens=special, return_projected_pooled=False,
    )  # fmt: skip
    words = partial(comfy.sd1_clip.SDTokenizer, str(found(base / "tokenizer" / "vocab.json").parent), max_length=length)
    target = comfy.supported_models_base.ClipTarget(
        partial(comfy.sd1_clip.SD1Tokenizer, tokenizer=words), partial(comfy.sd1_clip.SD1ClipModel, clip_model=text)
    )
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        parameters=comfy.utils.calculate_parameters(weights),
    )
    weights = {k if k.startswith("text_model.") else f"text_model.{k}": x for k, x in weights.items()}
    clip.load_sd(weights | {"text_projection.weight": torch.eye(config["hidden_size"])})
    return clip
