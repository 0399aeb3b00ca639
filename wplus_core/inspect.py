"""Say what a file is, and whether it is whole.

    python -m comfyui_wplus.wplus_core.inspect wplus_adapter.bin

Exits 1 if it cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from torch import nn

from . import checkpoints as ck
from .direction_files import load_directions
from .errors import FileError
from .files import Contents, read, sha256
from .formats import kind_of


def describe(path: Path) -> Iterator[tuple[str, object]]:
    """(label, value) lines on a file; the network in it is loaded, so a damaged one raises FileError."""
    contents = read(path, "meta")
    kind = kind_of(contents)
    yield "file", path
    yield "what", what(kind)
    yield "format", contents.metadata["format"] if contents.ours else "foreign"
    if contents.ours and "version" in contents.metadata:
        yield "version", contents.metadata["version"]
    dtypes = Counter(str(x.dtype).removeprefix("torch.") for x in contents.tensors.values())
    yield "tensors", f"{len(contents.tensors)} ({', '.join(f'{n} {t}' for t, n in dtypes.most_common())})"
    yield from KINDS.get(kind, lambda _: iter(()))(contents)
    yield "size", f"{path.stat().st_size:,} bytes"
    yield "sha256", sha256(path)


def what(kind: str) -> str:
    if kind.startswith("foreign: "):
        return kind.removeprefix("foreign: ") + ", which this pack does not load"
    return {"bare": "a bare W+ tensor: an identity's code or an editing direction"}.get(kind, f"a W+ {kind}")


def parameters(network: nn.Module) -> str:
    return f"{sum(x.numel() for x in network.parameters()):,}"


def describe_adapter(contents: Contents) -> Iterator[tuple[str, object]]:
    adapter = ck.load_adapter(contents.path)
    yield "stage", contents.metadata.get("stage", "not recorded (the reference's files of both stages look the same)")
    yield "config", json.dumps(asdict(adapter.config))
    yield "mapping network", parameters(adapter.mapping) + " parameters"
    yield "residual cross-attention", f"{parameters(adapter.layers)} parameters in {len(adapter.layers)} layers"


def describe_encoder(contents: Contents) -> Iterator[tuple[str, object]]:
    encoder = ck.load_encoder(contents.path)
    yield "config", json.dumps(asdict(encoder.config))
    yield "encoder", parameters(encoder) + " parameters"
    if ck.generator_state(contents):
        yield from describe_generator(contents)
    else:
        yield "generator", "none in this file"


def describe_generator(contents: Contents) -> Iterator[tuple[str, object]]:
    generator = ck.load_generator(contents.path)
    c = generator.config
    yield "generator", f"{parameters(generator)} parameters, {c.size} px, {c.layers} layers"


def describe_parser(contents: Contents) -> Iterator[tuple[str, object]]:
    parser = ck.load_parser(contents.path)
    yield "config", json.dumps(asdict(parser.config))
    yield "parser", parameters(parser) + " parameters"


def describe_identity(contents: Contents) -> Iterator[tuple[str, object]]:
    identity = ck.load_identity(contents.path)
    yield "identity", identity
    yield "provenance", json.dumps(identity.provenance)


def describe_directions(contents: Contents) -> Iterator[tuple[str, object]]:
    for d in load_directions(contents.path):
        layers = "all layers" if d.layers is None else f"layers {d.layers[0]}-{d.layers[1] - 1}"
        yield "direction", f"{d.name}: {list(d.vector.shape)}, {layers}{', ' + d.source if d.source else ''}"


def describe_bare(contents: Contents) -> Iterator[tuple[str, object]]:
    yield "shape", list(next(iter(contents.tensors.values())).shape)


KINDS = {
    "adapter": describe_adapter,
    "encoder": describe_encoder,
    "generator": describe_generator,
    "parser": describe_parser,
    "identity": describe_identity,
    "directions": describe_directions,
    "bare": describe_bare,
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m comfyui_wplus.wplus_core.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    try:
        for label, value in describe(args.file):
            print(f"{label:26}{value}")
    except FileError as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
