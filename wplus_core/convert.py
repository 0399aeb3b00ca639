"""Convert between our safetensors and the published layouts.

    python -m comfyui_wplus.wplus_core.convert wplus_adapter.bin wplus_adapter.safetensors
    python -m comfyui_wplus.wplus_core.convert wplus_adapter.safetensors wplus_adapter.bin
    python -m comfyui_wplus.wplus_core.convert e4e_ffhq_encode.pt e4e.safetensors --dtype float16
    python -m comfyui_wplus.wplus_core.convert face.pth face.safetensors
    python -m comfyui_wplus.wplus_core.convert smile.npy smile.safetensors --as directions

What IN is comes from its keys. OUT ending in .safetensors is our format; .bin, .pt or .pth is the layout that the
reference's code reads.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from . import checkpoints as ck
from .direction_files import load_directions, save_directions
from .errors import FileError, WPlusError
from .files import Contents, read, write_torch
from .formats import OUR_FORMATS, expect

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NETWORKS = ("adapter", "encoder", "generator", "parser")


def convert(source: Path, target: Path, read_as: str | None = None, dtype: torch.dtype | None = None) -> str:
    """Convert one file; returns the kind it was. read_as decides what a bare W+ tensor is: identity or directions."""
    if target.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
        raise WPlusError(f"{target}: expected a name ending in .safetensors, .bin, .pt or .pth")
    contents = read(source, "meta")
    kind = expect(contents, *OUR_FORMATS, "bare")
    if kind == "bare":
        kind = read_as or "identity"
    ours = target.suffix == ".safetensors"
    if kind in NETWORKS:
        convert_network(kind, contents, target, ours, dtype)
    elif kind == "identity":
        identity = ck.load_identity(source)
        ck.save_identity(identity, target) if ours else write_torch(target, identity.w)
    elif ours:
        save_directions(load_directions(source), target)
    else:
        raise WPlusError(f"{target}: directions have names and layer ranges that only .safetensors keeps")
    return kind


def convert_network(kind: str, contents: Contents, target: Path, ours: bool, dtype: torch.dtype | None):
    source = contents.path

    def cast(network: nn.Module) -> nn.Module:
        return network.to(dtype) if dtype else network

    if kind == "adapter":
        adapter = cast(ck.load_adapter(source))
        kept = {k: v for k, v in contents.metadata.items() if k not in ("format", "version", "config")}
        ck.save_adapter(adapter, target, kept) if ours else ck.save_reference_adapter(adapter, target)
    elif kind == "parser":
        save = ck.save_parser if ours else ck.save_reference_parser
        save(cast(ck.load_parser(source)), target)
    elif kind == "generator":
        save = ck.save_generator if ours else ck.save_reference_generator
        save(cast(ck.load_generator(source)), target, ck.load_average(source))
    else:
        save = ck.save_encoder if ours else ck.save_reference_encoder
        generator = cast(ck.load_generator(source)) if ck.generator_state(contents) else None
        save(cast(ck.load_encoder(source)), target, generator)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m comfyui_wplus.wplus_core.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="IN")
    parser.add_argument("target", type=Path, metavar="OUT")
    parser.add_argument("--as", dest="read_as", choices=("identity", "directions"), help="what a bare W+ tensor is")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as they are)")
    args = parser.parse_args(argv)
    try:
        kind = convert(args.source, args.target, args.read_as, DTYPES.get(args.dtype))
    except (FileError, WPlusError) as e:
        print(e, file=sys.stderr)
        return 1
    print(f"{args.target}: W+ {kind}, {args.target.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
