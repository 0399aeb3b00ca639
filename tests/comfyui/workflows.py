"""The pack's workflows as the tests run them: on the untrained stand-ins, small and short."""

from pathlib import Path

import pytest
from comfyui_wplus.client import Client, Workflow, load, override, title_of
from PIL import Image

from .server import REPOSITORY

FOLDER = REPOSITORY / "workflows"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
SMALL = {
    "CheckpointLoaderSimple": ("ckpt_name=untrained_sd.safetensors",),
    "WPlusLoadAdapter": ("adapter_name=untrained_adapter.bin",),
    "WPlusLoadEncoder": ("encoder_name=untrained_encoder.pt",),
    "WPlusLoadFaceTools": ("parser_name=untrained_parser.pth",),
    "ControlNetLoader": ("control_net_name=untrained_controlnet.safetensors",),
    "EmptyLatentImage": ("width=96", "height=64"),
    "KSampler": ("steps=2",),
    "WPlusDecodeIdentity": ("resolution=64",),
    "WPlusSweep": (
        "along.direction=untrained/smile", "along.count=3", "along.second_direction=untrained/age",
        "along.second_count=2",
    ),
}  # fmt: skip
SIZE = (96, 64)
newest_only = pytest.mark.parametrize("server", ["newest"], indirect=True)


def small(client: Client, name: str, photo: Path, *settings: str) -> Workflow:
    """The API form of a workflow, on stand-ins, with this photo wherever one goes in, and these settings."""
    workflow = load(FOLDER / "api" / f"{name}.json")
    for node_id, node in workflow.items():
        ours = SMALL.get(node["class_type"], ()) if node["class_type"] != "LoadImage" else (f"image={photo}",)
        has = [setting for setting in ours if setting.partition("=")[0] in node["inputs"]]
        settings = (*(f"{node_id}.{setting}" for setting in has), *settings)
    for setting in settings:
        override(client, workflow, setting)
    return workflow


def by_title(workflow: Workflow, title: str) -> str:
    """The id of the node with this title."""
    (node_id,) = (node_id for node_id in workflow if title_of(workflow, node_id) == title)
    return node_id


def fetched(client: Client, result, folder: Path) -> tuple[list[Path], list[Path], list[Path]]:
    """(saved pictures, previews, identities) of a result."""
    paths = client.fetch(result, folder)
    identities = [path for path in paths if path.suffix == ".safetensors"]
    previews = [path for path in paths if path.parent.name == "temp"]
    return [path for path in paths if path not in identities + previews], previews, identities


def pixels(path: Path) -> bytes:
    return Image.open(path).convert("RGB").tobytes()
