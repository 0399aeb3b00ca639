"""Editing directions on the command line.

    python -m comfyui_wplus.wplus_core.directions list directions/
    python -m comfyui_wplus.wplus_core.directions apply anna.safetensors "smile=2 age=-1.5" happy.safetensors --directions directions/
    python -m comfyui_wplus.wplus_core.directions find with/ without/ directions/beard.safetensors
    python -m comfyui_wplus.wplus_core.directions find --scores scores.csv directions/beard.safetensors --method logistic
    python -m comfyui_wplus.wplus_core.directions pca e4e_ffhq_encode.pt directions/pca.safetensors
    python -m comfyui_wplus.wplus_core.directions sefa e4e_ffhq_encode.pt directions/sefa.safetensors --layers 0-7
    python -m comfyui_wplus.wplus_core.directions sheet e4e_ffhq_encode.pt directions/sefa.safetensors sheet.png

list: the directions of files and folders, with the raw number of one strength. Strength 1 is modest, 3 strong.
apply: edits an identity: name=strength, "@0-7" after it for these layers only, "raw:" before the number for the file's
own unit. With --hold, edits that leave the plausible faces are shortened (needs a PCA such as ffhq_pca.pt or ours).
find: a direction from two folders of identity files, with the attribute and without, or from a table of file,score.
pca, sefa: directions of a generator, without labels. sheet: a picture of directions from -3 to 3 (first 20, or --names).
Exits 1 if something is wrong with the input, 2 with the options.
"""  # noqa: E501

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .checkpoints import load_generator, load_identity, save_identity
from .direction_files import Collection, load_collection, load_spread, parse_edits, save_directions
from .directions import Direction, edit_identity, format_layers, orthogonalise, parse_layers
from .errors import WPlusError
from .finding import STRENGTHS, contact_sheet, find_direction, folder_codes, pca, scored_codes, sefa
from .plausible import LIMIT

ROWS = 20


def list_(args: argparse.Namespace):
    collection = load_collection(*args.places)
    width = max([10, *map(len, collection.directions)])
    print(f"{'name':{width}}  {'layers':7} {'1 is raw':>9}  {'usual':>8}  source")
    for name, d in collection.directions.items():
        usual = f"{d.usual[0]:g}..{d.usual[1]:g}"
        print(f"{name:{width}}  {format_layers(d.layers):7} {d.unit:9.3f}  {usual:>8}  {d.source}")


def apply(args: argparse.Namespace):
    out = ours(args.out)
    identity, collection = load_identity(args.identity), load_collection(*args.directions)
    spread = load_spread(args.spread) if args.spread else collection.spread
    if args.hold and spread is None:
        raise WPlusError("--hold needs a PCA of W among the directions, or --spread ffhq_pca.pt")
    edits = parse_edits(args.edits, collection)
    done = edit_identity(identity, edits, spread if args.hold else None, args.limit)
    save_identity(done, out)
    print(f"{out}: {' '.join(map(str, edits)) or 'no edits'}")


def find(args: argparse.Namespace):
    out = ours(args.out)
    if args.scores and not args.folders:
        positive, negative = scored_codes(args.scores, args.share)
    elif len(args.folders) == 2 and not args.scores:
        positive, negative = map(folder_codes, args.folders)
    else:
        raise WPlusError(f"expected two folders, with and without, or --scores; got {len(args.folders)} folders")
    name = args.name or out.stem
    found = find_direction(positive, negative, name, args.method, args.layers, args.per_layer)
    others = [load_collection(*args.directions).find(n) for n in args.orthogonal_to]
    write([orthogonalise(found.direction, others) if others else found.direction], out)
    print(found)


def pca_(args: argparse.Namespace):
    out = ours(args.out)
    write(pca(load_generator(args.generator), args.count, args.samples, args.seed), out)


def sefa_(args: argparse.Namespace):
    out = ours(args.out)
    write(sefa(load_generator(args.generator), args.layers, args.count), out)


def sheet(args: argparse.Namespace):
    if args.out.suffix.lower() not in Image.registered_extensions():
        raise WPlusError(f"{args.out}: expected a picture's name, such as sheet.png")
    collection = load_collection(args.place)
    shown = chosen(collection, args.names)
    w = load_identity(args.identity).w if args.identity else None
    contact_sheet(load_generator(args.generator), shown, w, STRENGTHS, args.size).save(args.out)
    print(f"{args.out}: {len(shown)} of {len(collection.directions)} directions")


def chosen(collection: Collection, names: Sequence[str]) -> list[Direction]:
    return [collection.find(n) for n in names] or list(collection.directions.values())[:ROWS]


def write(directions: Sequence[Direction], out: Path):
    save_directions(directions, out)
    print(f"{out}: {len(directions)} direction{'s' * (len(directions) > 1)}")


def ours(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise WPlusError(f"{path}: expected a name ending in .safetensors")
    return path


def layers(text: str) -> tuple[int, int]:
    try:
        return parse_layers(text)
    except WPlusError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m comfyui_wplus.wplus_core.directions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function, help: str):
        sub = commands.add_parser(name, help=help)
        sub.set_defaults(run=function)
        return sub.add_argument

    add = command("list", list_, "directions in files and folders")
    add("places", nargs="+", type=Path, metavar="PLACE")

    add = command("apply", apply, "edit an identity")
    add("identity", type=Path, metavar="IDENTITY")
    add("edits", metavar="EDITS", help='such as "smile=2 age=-1.5@0-7"')
    add("out", type=Path, metavar="OUT")
    add("--directions", nargs="+", type=Path, required=True, metavar="PLACE")
    add("--hold", action="store_true", help="shorten edits that leave the plausible faces")
    add("--limit", type=float, default=LIMIT, help=f"how far from the average face, in deviations of W ({LIMIT})")
    add("--spread", type=Path, metavar="FILE", help="the PCA of W (the first one among the directions)")

    add = command("find", find, "a direction from labelled identities")
    add("folders", nargs="*", type=Path, metavar="FOLDER", help="identities with the attribute, and without")
    add("out", type=Path, metavar="OUT")
    add("--scores", type=Path, metavar="CSV", help="lines of identity file, score")
    add("--share", type=float, default=0.5, help="of the files on each side of --scores (0.5)")
    add("--name", help="of the direction (OUT's)")
    add("--method", choices=("svm", "logistic"), default="svm")
    add("--layers", type=layers, help="that are looked at and that move, such as 0-7")
    add("--per-layer", action="store_true", help="a step of its own for every layer")
    add("--orthogonal-to", nargs="+", default=[], metavar="NAME", help="keep these out; needs --directions")
    add("--directions", nargs="+", type=Path, default=[], metavar="PLACE")

    for name, function, count, help in (
        ("pca", pca_, 80, "GANSpace: components of W"),
        ("sefa", sefa_, 10, "SeFA: eigenvectors of the modulation weights"),
    ):
        add = command(name, function, help)
        add("generator", type=Path, metavar="GENERATOR")
        add("out", type=Path, metavar="OUT")
        add("--count", type=int, default=count, help=f"how many ({count})")
        if name == "pca":
            add("--samples", type=int, default=20000)
            add("--seed", type=int, default=0)
        else:
            add("--layers", type=layers, help="such as 0-7 (all)")

    add = command("sheet", sheet, "a picture of directions")
    add("generator", type=Path, metavar="GENERATOR")
    add("place", type=Path, metavar="PLACE", help="a file or folder of directions")
    add("out", type=Path, metavar="OUT")
    add("--names", nargs="+", default=[], metavar="NAME", help=f"which (the first {ROWS})")
    add("--identity", type=Path, metavar="FILE", help="on this face (the average face)")
    add("--size", type=int, default=128, help="px of a picture (128)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        args.run(args)
    except (WPlusError, OSError) as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
