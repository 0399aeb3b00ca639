"""What a file is, told from its keys, and the key tables between foreign layouts and ours."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from .errors import FileError
from .files import Contents

OUR_FORMATS = ("adapter", "encoder", "generator", "parser", "identity", "directions")
VERSION = 1

# The first pattern that any key matches decides; ours stand before the foreign ones that they could be taken for.
OURS = {
    "adapter": r"(^|\.)\d+\.to_[qkv]_wplus\.weight$|^(w_proj|w_proj_model)\.",
    "parser": r"^(encoder\.0|out_mask_conv)\.conv2d\.",
    "encoder": r"(^|\.)(body\.0\.res_layer|input_layer|styles\.0\.convs)\.",
    "generator": r"^((g_ema|g|decoder)\.)?(style\.1\.weight|convs\.0\.conv\.modulation|to_rgb1|input\.input)",
}
FOREIGN = {
    "an IP-Adapter": r"^(ip_adapter|image_proj|image_proj_model)\.",
    "a ControlNet": r"^(control_model\.|controlnet_|input_hint_block\.|zero_convs\.)",
    "a LoRA": r"lora_(up|down|A|B)\b|^lora_|\.lora\.",
    "an SD checkpoint": r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.",
    "a diffusers UNet": r"^(unet\.)?(down_blocks|up_blocks|mid_block)\.",
    "a VAE": r"^(encoder\.(down|down_blocks)\.|decoder\.(up|up_blocks)\.|post_quant_conv|quant_conv)",
    "a CLIP text encoder": r"^(text_model|transformer\.text_model|token_embedding)\b",
    "a CLIP vision model": r"^(vision_model|visual)\.",
    "a textual inversion": r"^(string_to_param|string_to_token|emb_params)\b",
    "an ArcFace recogniser": r"^output_layer\.",
}


def kind_of(contents: Contents) -> str:
    """One of OUR_FORMATS, "bare" (a W+ tensor without a word on what it is for), or "foreign: what it seems to be"."""
    if contents.ours:
        return contents.metadata["format"].removeprefix("wplus-")
    keys = [k.removeprefix("module.").removeprefix("state_dict.") for k in contents.tensors]
    if any(re.search(FOREIGN["an ArcFace recogniser"], k) for k in keys) and not any("styles." in k for k in keys):
        return "foreign: an ArcFace recogniser"
    for kind, pattern in OURS.items():
        if any(re.search(pattern, k) for k in keys):
            return kind
    for what, pattern in FOREIGN.items():
        if any(re.search(pattern, k) for k in keys):
            return f"foreign: {what}"
    if {"mean", "comp", "std"} <= set(keys):
        return "directions"
    if keys and all(is_codes(x) for x in contents.tensors.values()):
        return "bare" if len(keys) == 1 else "directions"
    return "foreign: a file without any key this pack knows"


def is_codes(x: Tensor) -> bool:
    """Whether a tensor could be W+ codes or steps: [512], [L, 512] or [B, L, 512]."""
    return x.is_floating_point() and 1 <= x.ndim <= 3 and x.shape[-1] == 512 and x.numel() > 0


def expect(contents: Contents, *kinds: str) -> str:
    """The file's kind, which must be one of those; FileError says what the file is instead."""
    kind = kind_of(contents)
    if kind not in kinds:
        wanted = " or ".join(f"a W+ {k}" for k in kinds if k != "bare")
        is_ours = f"a W+ {kind}" if kind in OUR_FORMATS else "a bare W+ tensor"
        what = kind.removeprefix("foreign: ") if kind.startswith("foreign: ") else is_ours
        raise FileError(contents.path, f"this is {what}, not {wanted}", f"Choose {wanted} file here")
    version = contents.metadata.get("version", str(VERSION))
    if contents.ours and (not version.isdigit() or int(version) > VERSION):
        raise FileError(
            contents.path, f"format version {version!r}, this pack reads up to {VERSION}", "Update ComfyUI-WPlus"
        )
    return kind


def reference_keys(tokens: int, layers: int) -> dict[str, str]:
    """Our adapter keys to the reference's. Its layer numbers count attn1 too, so cross-attention i is number 2i + 1."""
    table = {f"mapping.proj.{i}.weight": f"w_proj.proj_{i}.weight" for i in range(tokens)}
    table |= {f"mapping.norm.{x}": f"w_proj.norm.{x}" for x in ("weight", "bias")}
    for i in range(layers):
        table |= {f"layers.{i}.to_{x}.weight": f"wplus_adapter.{2 * i + 1}.to_{x}_wplus.weight" for x in "qkv"}
    return table


def numbers(keys: Iterable[str], pattern: str) -> list[int]:
    """The sorted numbers that the pattern's group takes over the keys."""
    found = (re.match(pattern, k) for k in keys)
    return sorted({int(m[1]) for m in found if m})


def adapter_from_reference(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """wplus_adapter.bin's keys, or those of a training run's pytorch_model.bin, to ours; its "unet.*" are left out."""
    renamed = {}
    for k, x in tensors.items():
        if not k.startswith("unet."):
            k = re.sub(r"^w_proj_model\.", "w_proj.", k)
            renamed[re.sub(r"^adapter_modules\.", "wplus_adapter.", k)] = x
    tokens = min(len(renamed), max(numbers(renamed, r"w_proj\.proj_(\d+)\."), default=-1) + 1)
    layers = min(len(renamed), (max(numbers(renamed, r"wplus_adapter\.(\d+)\."), default=-1) + 1) // 2)
    ours = {theirs: k for k, theirs in reference_keys(tokens, layers).items()}
    return {ours.get(k, k): x for k, x in renamed.items()}


def adapter_to_reference(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our keys to those of wplus_adapter.bin (nested keys joined by a dot)."""
    tokens = len(numbers(tensors, r"mapping\.proj\.(\d+)\."))
    layers = len(numbers(tensors, r"layers\.(\d+)\."))
    table = reference_keys(tokens, layers)
    return {table[k]: x for k, x in tensors.items()}
