"""Loading and saving: from any file a user has to a network, and to our safetensors or the published layouts.

Our files carry `format` (wplus-adapter, wplus-encoder, ...), `version` and `config` (JSON) in their metadata.
Networks are built on the meta device and take the file's tensors as they are, in the file's dtype.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from .adapter import AdapterConfig, WPlusAdapter
from .encoder import Encoder, EncoderConfig, build_encoder
from .errors import FileError, WPlusError
from .files import AGAIN, Contents, read, write_safetensors, write_torch
from .formats import VERSION, adapter_from_reference, adapter_to_reference, expect
from .identity import Identity
from .parsing import FaceParser, ParserConfig
from .state_dicts import (
    State,
    adapter_config,
    check_finite,
    config_of,
    encoder_config,
    fill,
    generator_config,
    parse_json,
    parser_config,
    part,
    with_prefix,
    without_prefix,
)
from .stylegan2 import Generator, GeneratorConfig

UNSAID = ("w_dim", "heads", "parallel")  # of an adapter's config, in the reference's layout


def load_adapter(path: str | Path) -> WPlusAdapter:
    """The adapter of a wplus_adapter.bin, a reference training run's pytorch_model.bin, or our safetensors."""
    contents = read(path)
    expect(contents, "adapter")
    state = adapter_state(contents)
    return fill(lambda: WPlusAdapter(config_of(contents, AdapterConfig, lambda: adapter_config(state))), state, path)


def load_encoder(path: str | Path) -> Encoder:
    """The encoder of an e4e or pSp file (such as e4e_ffhq_encode.pt), or of our safetensors; latent_avg in it."""
    contents = read(path)
    expect(contents, "encoder")
    state = encoder_state(contents)
    config = config_of(contents, EncoderConfig, lambda: encoder_config(state, contents), "config")
    latent_avg = state.get("latent_avg")
    if latent_avg is not None and latent_avg.shape[-1:] == (config.w_dim,):
        rows = latent_avg.reshape(-1, config.w_dim)
        state["latent_avg"] = rows.expand(config.layers, -1) if len(rows) == 1 else rows
    return fill(lambda: build_encoder(config), state, path)


def load_generator(path: str | Path) -> Generator:
    """The generator of an e4e or pSp file's decoder, a rosinality file (g_ema), or our safetensors."""
    contents = read(path)
    expect(contents, "generator", "encoder")
    state = generator_state(contents)
    if not state:
        raise FileError(path, "this encoder file has no generator in it", "Choose a file with its decoder")
    config = config_of(contents, GeneratorConfig, lambda: generator_config(state), "generator")
    return fill(lambda: Generator(config), state, path)


def load_average(path: str | Path) -> Tensor | None:
    """The average w, [w_dim] or [L, w_dim], that an encoder or generator file carries, or None."""
    average = part(read(path).tensors, "latent_avg").get("")
    return None if average is None else average.clone()  # what is mapped changes with the file


def load_parser(path: str | Path) -> FaceParser:
    """The face-parsing net of parse_multi_iter_90000.pth or our safetensors."""
    contents = read(path)
    expect(contents, "parser")
    state = without_prefix(contents.tensors)
    return fill(lambda: FaceParser(config_of(contents, ParserConfig, lambda: parser_config(state))), state, path)


def save_adapter(adapter: WPlusAdapter, path: str | Path, metadata: Mapping[str, str] | None = None):
    """Write a wplus-adapter safetensors; metadata adds strings such as `stage`."""
    write_ours("adapter", path, adapter.state_dict(), config=asdict(adapter.config), **(metadata or {}))


def save_encoder(encoder: Encoder, path: str | Path, generator: Generator | None = None):
    """Write a wplus-encoder safetensors, with its generator if given."""
    state = with_prefix("encoder.", encoder.state_dict())
    extra = {}
    if generator is not None:
        state |= with_prefix("generator.", generator.state_dict())
        extra["generator"] = json.dumps(asdict(generator.config))
    write_ours("encoder", path, state, config=asdict(encoder.config), **extra)


def save_generator(generator: Generator, path: str | Path, latent_avg: Tensor | None = None):
    """Write a wplus-generator safetensors, with the average w if given."""
    state = with_prefix("generator.", generator.state_dict())
    if latent_avg is not None:
        state["latent_avg"] = latent_avg
    write_ours("generator", path, state, generator=json.dumps(asdict(generator.config)))


def save_parser(parser: FaceParser, path: str | Path):
    """Write a wplus-parser safetensors."""
    write_ours("parser", path, parser.state_dict(), config=asdict(parser.config))


def save_reference_adapter(adapter: WPlusAdapter, path: str | Path):
    """Write the reference's wplus_adapter.bin: {"w_proj": ..., "wplus_adapter": ...}.

    FileError for an adapter that is not what a reader of tensors alone must take it for.
    """
    config = adapter.config
    unsaid = [f"{k} {getattr(config, k)}" for k in UNSAID if getattr(config, k) != getattr(AdapterConfig, k)]
    if unsaid:
        raise FileError(path, f"the reference's layout cannot say that it has {', '.join(unsaid)}", "Use .safetensors")
    flat = adapter_to_reference(adapter.state_dict())
    write_torch(path, {name: part(flat, f"{name}.") for name in ("w_proj", "wplus_adapter")})


def save_reference_encoder(encoder: Encoder, path: str | Path, generator: Generator | None = None):
    """Write the layout of e4e_ffhq_encode.pt: {"state_dict", "latent_avg", "opts"}."""
    state = dict(encoder.state_dict())
    latent_avg = state.pop("latent_avg")
    state = with_prefix("encoder.", state)
    if generator is not None:
        state |= with_prefix("decoder.", generator.state_dict())
    opts = {"encoder_type": type(encoder).__name__, "stylegan_size": 2 ** (encoder.config.layers // 2 + 1)}
    write_torch(path, {"state_dict": state, "latent_avg": latent_avg, "opts": opts})


def save_reference_generator(generator: Generator, path: str | Path, latent_avg: Tensor | None = None):
    """Write rosinality's layout: {"g_ema": ..., "latent_avg": ...}."""
    extra = {} if latent_avg is None else {"latent_avg": latent_avg}
    write_torch(path, {"g_ema": generator.state_dict(), **extra})


def save_reference_parser(parser: FaceParser, path: str | Path):
    """Write a plain state dict, as parse_multi_iter_90000.pth is."""
    write_torch(path, dict(parser.state_dict()))


def load_identity(path: str | Path) -> Identity:
    """A wplus-identity file, or a bare code [L, 512] or [B, L, 512] in .pth, .pt, .npy or .safetensors."""
    contents = read(path)
    kind = expect(contents, "identity", "bare")
    check_finite(path, contents.tensors)
    contents = contents.copied()
    if kind == "bare":
        (w,) = contents.tensors.values()
        if w.ndim == 1 or w.shape[-2] == 1:
            raise FileError(path, f"one w vector {list(w.shape)}, not W+", "Repeat it over the L layers: [L, 512]")
        return Identity(w.float(), Path(path).stem)
    if "w" not in contents.tensors:
        raise FileError(path, "an identity file without its tensor `w`", AGAIN)
    try:
        info = parse_json(contents, "config")
        provenance = parse_json(contents, "provenance")
        return Identity(name=str(info.get("name", "")), provenance=provenance, **contents.tensors)
    except FileError:
        raise
    except (WPlusError, TypeError) as e:
        raise FileError(path, f"damaged identity ({e})", AGAIN) from e


def save_identity(identity: Identity, path: str | Path):
    """Write a wplus-identity safetensors: codes, thumbnail, average face and provenance."""
    parts = {"w": identity.w, "thumbnail": identity.thumbnail, "average": identity.average}
    state = {k: x for k, x in parts.items() if x is not None}
    write_ours("identity", path, state, config={"name": identity.name}, provenance=json.dumps(identity.provenance))


def adapter_state(contents: Contents) -> State:
    state = without_prefix(contents.tensors)
    return state if contents.ours else adapter_from_reference(state)


def encoder_state(contents: Contents) -> State:
    state = part(contents.tensors, "state_dict.encoder.", "encoder.")
    if latent_avg := part(contents.tensors, "latent_avg"):
        state["latent_avg"] = latent_avg[""]
    return state


def generator_state(contents: Contents) -> State:
    found = part(contents.tensors, "generator.", "state_dict.decoder.", "decoder.", "g_ema.", "g.")
    return found or {k: x for k, x in contents.tensors.items() if k != "latent_avg" and "encoder." not in k}


def write_ours(kind: str, path: str | Path, state: State, config: Any = None, **metadata: str):
    metadata = {"format": f"wplus-{kind}", "version": str(VERSION)} | metadata
    if config is not None:
        metadata["config"] = json.dumps(config)
    write_safetensors(path, state, metadata)
