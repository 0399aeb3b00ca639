"""Loading and saving: from any file a user has to a network, and to our safetensors or the published layouts.

Our files carry `format` (wplus-adapter, wplus-encoder, ...), `version` and `config` (JSON) in their metadata.
Networks are built on the meta device and take the file's tensors as they are, in the file's dtype.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from .adapter import AdapterConfig, WPlusAdapter
from .directions import Direction
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
    """Write the reference's wplus_adapter.bin: {"w_proj": ..., "wplus_adapter": ...}."""
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
        return Identity(contents.tensors["w"], str(info.get("name", "")), provenance, contents.tensors.get("thumbnail"))
    except FileError:
        raise
    except WPlusError as e:
        raise FileError(path, f"damaged identity ({e})", AGAIN) from e


def save_identity(identity: Identity, path: str | Path):
    """Write a wplus-identity safetensors: codes, thumbnail and provenance."""
    state = {"w": identity.w}
    if identity.thumbnail is not None:
        state["thumbnail"] = identity.thumbnail
    write_ours("identity", path, state, config={"name": identity.name}, provenance=json.dumps(identity.provenance))


def load_directions(path: str | Path) -> list[Direction]:
    """Directions of any form: InterFaceGAN, latent directions, GANSpace, a list or dict of steps, or our safetensors.

    GANSpace's components are named by a ganspace_configs.csv in the same folder; without one they are numbered. A bare
    [L, 512] numpy array is a latent direction and moves layers 0-7, as the reference moves it.
    """
    path = Path(path)
    contents = read(path)
    kind = expect(contents, "directions", "bare")
    check_finite(path, contents.tensors)
    if "format" in contents.metadata:
        return our_directions(contents)
    if kind == "directions" and "comp" in contents.tensors:
        return ganspace_directions(contents)
    found = []
    for key, x in contents.tensors.items():
        name = f"{path.stem}_{key}" if key.isdigit() else key.rsplit(".", 1)[-1] or path.stem
        rows = x.reshape(-1, *x.shape[-2:])[0] if x.ndim == 3 else x.reshape(-1, x.shape[-1])
        latent = key == "" and path.suffix == ".npy" and len(rows) > 8
        found.append(Direction(name if len(contents.tensors) > 1 else path.stem, rows, (0, 8) if latent else None))
    return found


def save_directions(directions: Sequence[Direction], path: str | Path):
    """Write a wplus-directions safetensors."""
    state, config = {}, []
    for i, d in enumerate(directions):
        state[f"{i}.vector"] = d.vector
        if d.origin is not None:
            state[f"{i}.origin"] = d.origin
        config.append({"name": d.name, "layers": d.layers, "source": d.source})
    write_ours("directions", path, state, config=config)


def our_directions(contents: Contents) -> list[Direction]:
    config, x = parse_json(contents, "config", list), contents.tensors
    try:
        return [
            Direction(str(c["name"]), x[f"{i}.vector"], our_layers(c["layers"]), x.get(f"{i}.origin"), str(c["source"]))
            for i, c in enumerate(config)
        ]
    except (KeyError, TypeError, ValueError) as e:
        raise FileError(contents.path, f"damaged directions ({e})", AGAIN) from e


def our_layers(layers: list[int] | None) -> tuple[int, int] | None:
    if layers is None:
        return None
    first, end = layers
    return int(first), int(end)


def ganspace_directions(contents: Contents) -> list[Direction]:
    """GANSpace's PCA as target-rule directions: the vector is std_k comp_k, so that a unit is one deviation."""
    x = contents.tensors
    count = len(x["std"])
    if x["comp"].shape != (count, 1, 512) or x["mean"].numel() != 512 or x["std"].ndim != 1:
        shapes = {k: list(v.shape) for k, v in x.items()}
        raise FileError(contents.path, f"expected comp [K, 1, 512], mean [1, 512], std [K], got {shapes}", AGAIN)
    vectors = x["comp"].float() * x["std"].float()[:, None, None]
    origin = x["mean"].reshape(512).float()
    return [
        Direction(name, vectors[k], layers, origin, "GANSpace")
        for name, k, layers in ganspace_names(contents.path.parent, count)
    ]


def ganspace_names(folder: Path, count: int) -> list[tuple[str, int, tuple[int, int] | None]]:
    """(name, component, layers) by ganspace_configs.csv, whose last column, a default strength, is not used."""
    table = folder / "ganspace_configs.csv"
    if not table.is_file():
        return [(f"component_{k}", k, None) for k in range(count)]
    with open(table, newline="") as f:
        rows = [row for row in csv.reader(f, delimiter="\t") if row]
    try:
        named = [(name, int(k), (int(first), int(end))) for name, k, first, end, *_ in rows]
    except ValueError as e:
        raise FileError(table, f"expected rows of name, component, first, end ({e})", "Restore the file") from e
    return [row for row in named if row[1] < count]


def adapter_state(contents: Contents) -> State:
    state = without_prefix(contents.tensors)
    return state if "format" in contents.metadata else adapter_from_reference(state)


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
