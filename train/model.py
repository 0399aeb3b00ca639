"""What is trained: a frozen SD1.x UNet with the adapter in its cross-attentions, and where each comes from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..wplus_core.adapter import AdapterConfig, TokenResidual, WPlusAdapter, default_splits
from ..wplus_core.errors import FileError, WPlusError
from ..wplus_core.files import read
from ..wplus_core.formats import numbers
from ..wplus_core.state_dicts import part, with_prefix
from .attention import Residual, cross_attention_channels, cross_attention_names, install

SINGLE_FILE = "model.diffusion_model."


class Denoiser(nn.Module):
    """eps_theta(z_t, t, c, w): the UNet is frozen and of any precision, the adapter's weights stay float32.

    z: [B, 4, h, w], t: [B], c: [B, 77, 768], w: [B, L, 512], scale: a number or [B, 1, 1] -> eps like z, float32.
    """

    def __init__(self, unet: UNet2DConditionModel, adapter: WPlusAdapter):
        super().__init__()
        channels = cross_attention_channels(unet)
        if adapter.config.channels != channels:
            raise WPlusError(f"the adapter is for layers of {adapter.config.channels}, the UNet has {channels}")
        install(unet, adapter.config.parallel)
        self.unet, self.adapter = unet.requires_grad_(False), adapter

    def forward(self, z: Tensor, t: Tensor, c: Tensor, w: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        dtype, wplus = self.unet.dtype, residual(self.adapter, w, scale, self.unet)
        return self.unet(z.to(dtype), t, c.to(dtype), cross_attention_kwargs={"wplus": wplus}).sample.float()


def residual(adapter: WPlusAdapter, w: Tensor, scale: float | Tensor, unet: UNet2DConditionModel) -> Residual:
    """What `wplus` must be for these codes [B, L, 512] and this UNet, scale as in `Denoiser`.

    Folded, which has the gradients of the reference form for a fraction of its work; parallel attention does not fold.
    """
    tokens = adapter.mapping(w.to(adapter.mapping.norm.weight.device))
    if adapter.config.parallel:
        scale = scale.to(unet.dtype) if isinstance(scale, Tensor) else scale
        return Float32Weights(adapter.residual(tokens, scale))
    return adapter.fold_tokens(tokens).scaled([scale] * len(adapter.layers)).to(unet.device, unet.dtype)


@dataclass(frozen=True)
class Float32Weights:
    """A residual whose float32 weights are cast to the hidden states' dtype where they are used."""

    residual: TokenResidual

    def add(self, h: Tensor, i: int, *query: Tensor) -> Tensor:
        with torch.autocast(h.device.type, h.dtype, enabled=h.dtype != torch.float32):
            return self.residual.add(h, i, *query)


def new_adapter(
    unet: UNet2DConditionModel, w_layers: int = 18, parallel: bool = False, seed: int = 0, w_dim: int = 512
) -> WPlusAdapter:
    """An untrained adapter: W' are the UNet's own W_q, W_k, W_v, and the mapping network is random by the seed."""
    attentions = [unet.get_submodule(name.removesuffix(".processor")) for name in cross_attention_names(unet)]
    config = AdapterConfig(
        cross_attention_channels(unet), default_splits(w_layers), w_dim, heads=attentions[0].heads, parallel=parallel
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = WPlusAdapter(config)
    for layer, attention in zip(adapter.layers, attentions, strict=True):
        for name in ("to_q", "to_k", "to_v"):
            getattr(layer, name).weight.data.copy_(getattr(attention, name).weight)
    return adapter


def set_trainable(adapter: WPlusAdapter, mapping: bool) -> dict[str, nn.Parameter]:
    """Stage I trains everything, stage II all but the mapping network; returns the trained weights by name."""
    adapter.requires_grad_(True)
    adapter.mapping.requires_grad_(mapping)
    return {name: p for name, p in adapter.named_parameters() if p.requires_grad}


def load_unet(base: str | Path, dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    """The UNet of a diffusers folder (a pipeline's or the UNet's own) or of a single-file SD1.x checkpoint."""
    base = Path(base)
    if base.is_file():
        return single_file_unet(base, dtype)
    for folder in (base / "unet", base):
        if (folder / "config.json").is_file():
            return UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    raise FileError(base, "no SD1.x base model here", "Give a diffusers folder or a single-file checkpoint")


def single_file_unet(path: Path, dtype: torch.dtype) -> UNet2DConditionModel:
    tensors = read(path).tensors
    state = part(tensors, f"state_dict.{SINGLE_FILE}", SINGLE_FILE)
    if not state:
        raise FileError(path, "this is no SD checkpoint: it has no diffusion model in it", "Choose an SD1.x checkpoint")
    with TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(sd1_config(path, state)))
        unet = UNet2DConditionModel.from_single_file(
            with_prefix(SINGLE_FILE, state),
            config=folder,
            torch_dtype=dtype,
            local_files_only=True,
            low_cpu_mem_usage=False,
        )
    wanted = len(unet.state_dict())
    if len(state) != wanted:  # diffusers would leave what is missing random
        raise FileError(path, f"its UNet has {len(state)} tensors, expected {wanted}", "Choose an unmodified file")
    return unet


def sd1_config(path: Path, state: dict[str, Tensor]) -> dict:
    """diffusers' config of a UNet of SD1.x's plan; the widths are read from the output blocks, 3 to a level."""
    keys = [f"output_blocks.{i}.0.out_layers.3.weight" for i in numbers(state, r"output_blocks\.(\d+)\.")[::3]]
    widths = [state[k].shape[0] for k in reversed(keys) if k in state]
    context = state.get("input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", torch.empty(0, 0)).shape[1]
    if len(widths) != 4 or context != 768:
        raise FileError(path, f"no SD1.x UNet: levels {widths}, context width {context}", "Choose an SD1.x checkpoint")
    with torch.device("meta"):
        return dict(UNet2DConditionModel(sample_size=64, cross_attention_dim=768, block_out_channels=widths).config)
