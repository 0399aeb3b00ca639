"""Writes small, untrained files of the real formats, for trying the nodes where the real weights are not at hand.

    python scripts/stand_ins.py models                       all of them, into models/wplus, models/checkpoints, ...
    python scripts/stand_ins.py models adapter checkpoint    only these

The same names as the real ones' contents, but random (seeded): what comes out is noise in the right shapes. The
checkpoint has 320 channels at every attention (tiny_sd.py says why) and the adapter fits it and no other; the encoder
and its 1024 px generator have 18 layers, as e4e_ffhq_encode.pt has, so that its codes fit any adapter.
"""

import argparse
from pathlib import Path

import tiny_sd
import torch
from comfyui_wplus.wplus_core.adapter import AdapterConfig, WPlusAdapter
from comfyui_wplus.wplus_core.checkpoints import save_reference_adapter, save_reference_encoder, save_reference_parser
from comfyui_wplus.wplus_core.direction_files import save_directions
from comfyui_wplus.wplus_core.directions import Direction
from comfyui_wplus.wplus_core.encoder import EncoderConfig, build_encoder
from comfyui_wplus.wplus_core.parsing import FaceParser, ParserConfig
from comfyui_wplus.wplus_core.stylegan2 import Generator, GeneratorConfig


def write_adapter(path: Path) -> None:
    save_reference_adapter(WPlusAdapter(AdapterConfig(channels=(tiny_sd.CHANNELS,) * 16)).half(), path)


def write_encoder(path: Path) -> None:
    encoder = build_encoder(EncoderConfig(kind="single", units=(1, 1, 1, 1), channels=(16, 32, 48, 64)))
    generator = Generator(GeneratorConfig(channels=(16,) * 5 + (8,) * 4, mapping_layers=2))
    encoder.latent_avg.copy_(generator.mean_w())
    save_reference_encoder(encoder, path, generator)


def write_parser(path: Path) -> None:
    save_reference_parser(FaceParser(ParserConfig(channels=(8,) * 5, body=1)), path)


def write_directions(path: Path) -> None:
    """Names as the published ones have, on the layers that they move."""
    save_directions([Direction(name, torch.randn(18, 512), (0, 8)) for name in ATTRIBUTES], path)


EMOTIONS = [f"emotion_{name}" for name in ("angry", "disgust", "easy", "fear", "happy", "sad", "surprise")]
ATTRIBUTES = ["smile", "age", "pose", "eyes_open", *EMOTIONS]
WRITERS = {
    "adapter": ("wplus/untrained_adapter.bin", write_adapter),
    "encoder": ("wplus/untrained_encoder.pt", write_encoder),
    "parser": ("wplus/untrained_parser.pth", write_parser),
    "directions": ("wplus/directions/untrained.safetensors", write_directions),
    "checkpoint": ("checkpoints/untrained_sd.safetensors", tiny_sd.write),
    "controlnet": ("controlnet/untrained_controlnet.safetensors", tiny_sd.write_controlnet),
}


def write(models: Path, kind: str) -> Path:
    """The stand-in of this kind under the models folder, made only where it does not lie already."""
    name, writer = WRITERS[kind]
    path = models / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        writer(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path)
    parser.add_argument("kinds", nargs="*", choices=[[], *WRITERS], metavar="KIND", help=", ".join(WRITERS))
    args = parser.parse_args()
    for kind in args.kinds or WRITERS:
        path = write(args.models, kind)
        print(f"{path}: untrained {kind}, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
