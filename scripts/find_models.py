"""Links the model files of one folder, whatever their names, to where ComfyUI looks for them.

    .venv/bin/python scripts/find_models.py models output/comfy

Files are told by what is in them. Prints the settings that the portrait workflow needs, a line each; nothing if files
that it needs are missing. Which file serves as what, or which are missing, goes to stderr.
"""

import argparse
import shutil
import sys
from pathlib import Path

from comfyui_wplus.wplus_core.errors import FileError
from comfyui_wplus.wplus_core.files import files_below, read
from comfyui_wplus.wplus_core.formats import kind_of

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".dat")
FOLDERS = {"adapter": "wplus", "encoder": "wplus", "parser": "wplus", "checkpoint": "checkpoints"}
SETTINGS = {"adapter": "Adapter", "encoder": "Encoder", "parser": "Face tools", "checkpoint": "Checkpoint"}


def kind(path: Path) -> str:
    """One of FOLDERS, "dlib", or "" for a file that is of no use here."""
    if path.suffix == ".dat":
        return "dlib"
    try:
        contents = read(path, "meta")
    except FileError as error:
        say(f"passed over: {error}")
        return ""
    sd15 = contents.tensors.get("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    if sd15 is not None:
        return "checkpoint" if tuple(sd15.shape) == (320, 768) else ""
    return kind_of(contents)


def find(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """The first file of each kind under the folder, and all of dlib's."""
    paths = [p for p in files_below(folder) if p.suffix in SUFFIXES]
    kinds = {path: kind(path) for path in paths}
    found = {k: path for path, k in reversed(kinds.items()) if k in FOLDERS}
    return found, [path for path, k in kinds.items() if k == "dlib"]


def link(path: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / path.name).symlink_to(path.resolve())


def say(line: str) -> None:
    print(line, file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="where your files lie")
    parser.add_argument("base", type=Path, help="the --base-directory of ComfyUI")
    args = parser.parse_args()
    found, dlib = find(args.models)
    shutil.rmtree(args.base / "models", ignore_errors=True)
    for path in dlib:
        link(path, args.base / "models/wplus")
    for k, path in found.items():
        link(path, args.base / "models" / FOLDERS[k])
        say(f"{k}: {path}")
    if missing := [k for k in FOLDERS if k not in found]:
        say(f"missing in {args.models}/: {', '.join(missing)}; scripts/demo --download fetches them")
        return
    for k, path in found.items():
        print(f"{SETTINGS[k]}={path.name}")


if __name__ == "__main__":
    main()
