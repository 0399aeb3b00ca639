"""Keeps workflows/api, which the client runs, in step with workflows, which the editor opens.

    .venv/bin/python scripts/sync_workflows.py               after a workflow was changed in the editor
    .venv/bin/python scripts/sync_workflows.py --pictures    draws the thumbnails and docs/*.jpg too

Each workflows/NAME.json is opened in ComfyUI's own frontend (scripts/comfy-env newest, Chromium) and what it would
queue becomes workflows/api/NAME.json. Where only the API form exists, the editor's form is laid out from it. Then the
twins for the miniature are made (twins.py), both forms, in workflows/miniature.
"""

import argparse
import io
import json
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import torch
from comfyui_wplus.client import Client, load, override
from comfyui_wplus.wplus_core.photos import load_photo
from comfyui_wplus.wplus_core.sheets import grid
from PIL import Image
from skimage.data import astronaut

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "tests"))

from comfyui.browser import Frontend, chromium  # noqa: E402
from comfyui.server import Server, lay_out  # noqa: E402
from stand_ins import write  # noqa: E402
from twins import FOLDER, WITHOUT, twin  # noqa: E402

WORKFLOWS, DOCS = REPOSITORY / "workflows", REPOSITORY / "docs"
COLUMN, GAP = 350, 56
THUMBNAIL, FULL = 600, 1800  # widths in pixels
IN_PLACE = "edit_in_place"
IN_PLACE_OFF = ("Edit in place.start_percent=0", "Whole picture.value=1")
STORY = "story"  # of the miniature alone, scripts/demo runs it
IN_README = ("portrait", "two_people")
# Pictures show the workflows as on a machine that has the files: the stand-ins go by the real names for them.
REAL_NAMES = {
    "adapter": ["wplus/wplus_adapter.bin"],
    "encoder": ["wplus/e4e_ffhq_encode.pt"],
    "parser": ["wplus/parse_multi_iter_90000.pth"],
    "directions": [f"wplus/directions/{group}/stand_in.safetensors" for group in ("interfacegan", "latent_directions")],
    "checkpoint": ["checkpoints/v1-5-pruned-emaonly-fp16.safetensors", "checkpoints/dreamlike-anime-1.0.safetensors"],
    "controlnet": ["controlnet/control_v11p_sd15_canny_fp16.safetensors"],
}
PHOTOS = ("photo.jpg", "photo2.jpg", "photo3.jpg", "composition.jpg")
PLAIN_CANVAS = {
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,
    "Comfy.RightSidePanel.ShowErrorsTab": False,
}


def export(frontend: Frontend, name: str, folder: Path = WORKFLOWS) -> None:
    """FOLDER/NAME.json to FOLDER/api/NAME.json, or the other way where the first is missing."""
    ui, api = folder / f"{name}.json", folder / "api" / f"{name}.json"
    if not ui.exists():
        ui.write_text(dump(lay_out_graph(frontend, json.loads(api.read_text()), name)))
    frontend.load(json.loads(ui.read_text()))
    api.write_text(dump(frontend.prompt()))


def export_twin(frontend: Frontend, name: str) -> None:
    """Both forms of the twin, anew."""
    folder = WORKFLOWS / FOLDER
    (folder / "api").mkdir(parents=True, exist_ok=True)
    prompt = twin(name, json.loads((WORKFLOWS / "api" / f"{name}.json").read_text()))
    (folder / "api" / f"{name}.json").write_text(dump(prompt))
    (folder / f"{name}.json").unlink(missing_ok=True)
    export(frontend, name, folder)


def dump(workflow: dict[str, Any]) -> str:
    return json.dumps(workflow, indent=1, ensure_ascii=False) + "\n"


def lay_out_graph(frontend: Frontend, prompt: dict[str, Any], name: str) -> dict[str, Any]:
    """The editor's form with nodes in columns, each right of what it takes its inputs from."""
    frontend.load_api(prompt)
    ui = frontend.serialize()
    depth: dict[str, int] = {}

    def depth_of(node_id: str) -> int:
        links = [value[0] for value in prompt[node_id]["inputs"].values() if isinstance(value, list)]
        depth[node_id] = depth.get(node_id) or 1 + max((depth_of(i) for i in links), default=0)
        return depth[node_id]

    tops: dict[int, float] = {}
    for node in ui["nodes"]:
        column = depth_of(str(node["id"])) - 1
        node["pos"] = [column * COLUMN, tops.get(column, 0)]
        tops[column] = tops.get(column, 0) + node["size"][1] + GAP
    return ui | {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"comfyui-wplus/{name}"))}


def furnish(base: Path) -> None:
    """A base folder in which every file that the workflows name exists."""
    lay_out(base)
    settings = base / "user/default/comfy.settings.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | PLAIN_CANVAS))
    for kind, names in REAL_NAMES.items():
        path = write(base / "stand-ins", kind)
        for name in names:
            (base / "models" / name).parent.mkdir(parents=True, exist_ok=True)
            (base / "models" / name).symlink_to(path)
    for name in PHOTOS:
        Image.fromarray(astronaut()).save(base / "input" / name)


def picture(frontend: Frontend, ui: dict[str, Any], notes: bool = True) -> Image.Image:
    """The graph alone, as large as the window is wide."""
    if not notes:
        ui = ui | {"nodes": [node for node in ui["nodes"] if node["type"] != "MarkdownNote"]}
    frontend.load(ui)
    frontend.page.wait_for_timeout(1000)  # photos load, and the view moves to its place
    x, y, width, height = frontend.page.evaluate(FIT)
    shot = frontend.page.screenshot(clip={"x": x, "y": y, "width": width, "height": height})
    return Image.open(io.BytesIO(shot)).convert("RGB")


# Fits nodes and groups into the window, and gives their rectangle in it.
FIT = """async () => {
    const boxes = [...app.graph.nodes.map(n => n.getBounding()), ...app.graph.groups.map(g => g.boundingRect)];
    const left = Math.min(...boxes.map(b => b[0])), top = Math.min(...boxes.map(b => b[1]));
    const width = Math.max(...boxes.map(b => b[0] + b[2])) - left;
    const height = Math.max(...boxes.map(b => b[1] + b[3])) - top;
    const view = app.canvas.canvas.getBoundingClientRect(), margin = 10;
    const bars = {left: 90, top: 120, bottom: 120};  // what the editor lays over its canvas
    const ds = app.canvas.ds;
    ds.scale = Math.min((view.width - bars.left - margin) / width, (view.height - bars.top - bars.bottom) / height);
    ds.offset[0] = bars.left / ds.scale - left;
    ds.offset[1] = bars.top / ds.scale - top;
    app.canvas.setDirty(true, true);
    await new Promise(done => setTimeout(done, 1000));
    const corner = [view.x + bars.left - margin, view.y + bars.top - margin];
    return [...corner, width * ds.scale + 2 * margin, height * ds.scale + 2 * margin];
}"""


def panel(frontend: Frontend) -> Image.Image:
    """W+ Edit Stack after a run on the miniature, in the dark and in the light theme."""
    ui, shots = json.loads((WORKFLOWS / FOLDER / "live_editing.json").read_text()), []
    for palette in ("dark", "light"):
        frontend.page.evaluate("p => app.extensionManager.setting.set('Comfy.ColorPalette', p)", palette)
        frontend.load(ui)
        frontend.page.evaluate("() => app.queuePrompt(0)")
        frontend.page.get_by_text("The identity of the last run").wait_for(timeout=120_000)
        frontend.page.wait_for_timeout(2000)  # the view moves to its place, and the finer picture comes
        x, y, width, height = frontend.page.evaluate(PANEL)
        frontend.page.wait_for_timeout(1000)
        shot = frontend.page.screenshot(clip={"x": x, "y": y, "width": width, "height": height})
        shots.append(Image.open(io.BytesIO(shot)).convert("RGB"))
    both = Image.new("RGB", (sum(s.width for s in shots), shots[0].height))
    for n, shot in enumerate(shots):
        both.paste(shot, (n * shots[0].width, 0))
    return both


# Puts W+ Edit Stack into view with three presets, and gives its rectangle.
PANEL = """() => {
    const node = app.graph.nodes.find(n => n.comfyClass === "WPlusEditStack");
    const presets = {merry: "smile=2 age=1.5", surprised: "eyes_open=2 brows=2", "half awake": "eyes_open=-1.5"};
    node.setProperty("wplus_presets", presets);
    const text = node.widgets.find(w => w.name === "edits");
    text.callback(text.value);
    node.pos = [-3000, -3000];  // where nothing lies over it
    node.setSize([420, 730]);
    const view = app.canvas.canvas.getBoundingClientRect(), ds = app.canvas.ds;
    ds.scale = 1;
    ds.offset[0] = 120 - node.pos[0];
    ds.offset[1] = 150 - node.pos[1];
    app.canvas.setDirty(true, true);
    return [view.x + 106, view.y + 150 - 56, 448, 56 + 730 + 14];
}"""


def in_place(server: Server) -> Image.Image:
    """Three people of the miniature as they are, edited in place, and edited everywhere from the start: one noise."""
    client, ways = Client(server.url), {"in place": (), "from the start": IN_PLACE_OFF}
    rows = []
    for person in range(1, 4):
        pairs = []
        for settings in ways.values():
            workflow = load(WORKFLOWS / FOLDER / "api" / f"{IN_PLACE}.json")
            for setting in (f"photo.batch_index={person}", "Edit.edits=drawn/smile=2 drawn/glasses=2", *settings):
                override(client, workflow, setting)
            with tempfile.TemporaryDirectory() as folder:
                saved = client.fetch(client.run(workflow), Path(folder))
                pairs.append([load_photo(path).pixels for path in saved])
        rows += [pairs[0][0], *(after for _, after in pairs)]
    return grid(torch.stack(rows), 1 + len(ways), column_labels=["as they are", *ways])


def save_jpeg(image: Image.Image, path: Path, width: int) -> None:
    path.parent.mkdir(exist_ok=True)
    image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS).save(path, quality=85)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", action="store_true")
    args = parser.parse_args()
    names = sorted({path.stem for folder in (WORKFLOWS, WORKFLOWS / "api") for path in folder.glob("*.json")})
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        furnish(base)
        with (
            Server("newest", base) as server,
            chromium() as browser,
            Frontend(browser, server.url, (2400, 1300)) as page,
        ):
            for name in names:
                export(page, name)
                if name not in WITHOUT:
                    export_twin(page, name)
                if args.pictures:
                    ui = json.loads((WORKFLOWS / f"{name}.json").read_text())
                    save_jpeg(picture(page, ui, notes=False), WORKFLOWS / f"{name}.jpg", THUMBNAIL)
                if args.pictures and name in IN_README:
                    save_jpeg(picture(page, ui), DOCS / f"{name}.jpg", FULL)
            export(page, STORY, WORKFLOWS / FOLDER)
            if args.pictures:
                panel(page).save(DOCS / "live_editing.jpg", quality=85)
                in_place(server).save(DOCS / "miniature_in_place.png")


if __name__ == "__main__":
    main()
