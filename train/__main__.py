"""Train the adapter, and turn a run into files to use.

    python -m comfyui_wplus.train prepare aligned FFHQ data/ffhq --base sd15.safetensors --encoder e4e_ffhq_encode.pt
    python -m comfyui_wplus.train stage1 --run runs/one --base sd15.safetensors --data data/ffhq data/synthetic
    python -m comfyui_wplus.train stage2 --run runs/two --base sd15.safetensors --data data/wild --adapter one.safetensors
    accelerate launch -m comfyui_wplus.train stage1 --run runs/one --base stable-diffusion-v1-5/ --data data/ffhq data/synthetic
    python -m comfyui_wplus.train runs/one/config.yaml --images 3200000
    python -m comfyui_wplus.train plot runs/one runs/two --out curves.png
    python -m comfyui_wplus.train export runs/one one.safetensors wplus_adapter.bin
    python -m comfyui_wplus.train evaluate wild --run runs/tables --base sd15/ --identities codes/ --adapters two.safetensors --directions w_directions/

The first word is prepare (`prepare --help` says how), a preset (stage1, stage2, smoke), a YAML file of settings, plot,
export or evaluate. The same command again resumes.
--dry-run prints the settings and stops; `stage1 --help` lists them. Ctrl-C and SIGTERM save a checkpoint and stop.
export writes our .safetensors or the reference's .bin, by the name's ending; --raw instead of the moving average.
evaluate makes the paper's tables (wild: 1 and 3, aligned: 2) for given weights; `evaluate wild --help` lists its options.
Exits 1 if something is wrong with the input, 2 with the options.
"""  # noqa: E501

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import torch
import tyro

from ..wplus_core.errors import WPlusError
from .config import Config, preset, to_yaml
from .evaluate_command import evaluate_command
from .export import export
from .loop import train
from .plot import plot
from .prepare import command


def parse(name: str, args: list[str]) -> tuple[Config, bool]:
    """The settings of the preset with the command line's changes, and whether to stop at printing them."""

    def options(config: Annotated[Config, tyro.conf.arg(name="")] = preset(name), dry_run: bool = False):  # noqa: B008
        """Train the adapter.

        Args:
            dry_run: print the settings and stop.
        """
        return config, dry_run

    return tyro.cli(options, prog=f"python -m comfyui_wplus.train {name}", args=args)


def run(name: str, args: list[str]):
    config, dry_run = parse(name, args)
    first = os.environ.get("RANK", "0") == "0"
    if first:
        print(to_yaml(config), end="", flush=True)
    if dry_run:
        return
    state = train(config)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if not first:
        return
    done = "done" if state.images >= config.images else "stopped, the same command resumes"
    print(f"{config.run}: {state.images} of {config.images} images, {done}")


def export_command(
    run: Annotated[Path, tyro.conf.Positional],
    files: Annotated[tuple[Path, ...], tyro.conf.Positional],
    /,
    raw: bool = False,
    images: int | None = None,
):
    """Write a run's adapter to .safetensors (ours) or .bin (the reference's) files.

    Args:
        run: the run's folder.
        files: where to write it.
        raw: the weights of the last step instead of their moving average.
        images: the checkpoint after so many images instead of the last one.
    """
    for file in files:
        print(f"{file}: {export(run, file, raw, images)}")


def plot_command(runs: Annotated[tuple[Path, ...], tyro.conf.Positional], /, out: Path | None = None):
    """Draw the curves of runs, for comparing them or one alone.

    Args:
        runs: their folders.
        out: the PNG file, by default curves.png in the first run's folder.
    """
    if not runs:
        raise WPlusError("expected the folders of runs: plot RUN...")
    file = out or runs[0] / "curves.png"
    plot(runs, file)
    print(file)


COMMANDS = {"export": export_command, "plot": plot_command}


def main(args: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if args else 2
    try:
        if args[0] == "prepare":
            return command(args[1:])
        if args[0] == "evaluate":
            return evaluate_command(args[1:])
        if args[0] in COMMANDS:
            tyro.cli(COMMANDS[args[0]], prog=f"python -m comfyui_wplus.train {args[0]}", args=args[1:])
        else:
            run(args[0], args[1:])
    except WPlusError as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
