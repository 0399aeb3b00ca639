"""Every workflow runs from its API twin on both versions, and opens in the editor, which exports just that twin."""

import json
import urllib.request

import pytest
from comfyui_wplus.wplus_core.checkpoints import load_identity
from PIL import Image, ImageOps

from .workflows import FOLDER, NAMES, SIZE, fetched, newest_only, pixels, small

# Pictures, previews (a saved identity shows its thumbnail) and codes in the saved identity.
OUTPUTS = {
    "anime": (1, 2, 1),
    "controlnet": (1, 3, 1),
    "edit_in_place": (2, 0, 0),
    "live_editing": (1, 1, 0),
    "photo_batch": (3, 4, 3),
    "portrait": (1, 2, 1),
    "two_people": (1, 0, 0),
}
# Columns and rows of the saved sheet, whether a preview by StyleGAN2 comes before it, and settings for few frames.
SHEETS = {
    "edit_grid": (2, 3, True, []),
    "edit_strip": (3, 1, True, []),
    "emotion_set": (4, 1, True, ["emotions=smile=0\nemotion_happy=3\nemotion_sad=3 age=1\nemotion_angry=3"]),
    "interpolation": (3, 1, True, []),
    "lambda_sweep": (3, 1, False, ["weights=0\n0.5\n1", "size.batch_size=3"]),
}


def get(server, path):
    with urllib.request.urlopen(server.url + path) as response:
        return response.read()


@pytest.mark.parametrize("name", OUTPUTS)
def test_workflow_runs(client, name, photo, tmp_path):
    pictures, previews, identities = fetched(client, client.run(small(client, name, photo)), tmp_path)
    codes = [len(load_identity(path)) for path in identities]
    assert (len(pictures), len(previews), sum(codes)) == OUTPUTS[name]
    assert {Image.open(path).size for path in pictures} == {SIZE}
    assert all(path.name.startswith(name) for path in pictures)
    assert len({pixels(path) for path in pictures}) == len(pictures)
    low, high = Image.open(pictures[0]).convert("L").getextrema()
    assert high - low > 50


def test_identity_saved_by_one_workflow_gives_the_same_picture_in_another(client, photo, tmp_path):
    same = ("seed=7", "prompt=a face")
    result = client.run(small(client, "portrait", photo, *same, "Save identity.filename_prefix=people/ann"))
    (direct,), _, (file,) = fetched(client, result, tmp_path)
    assert file == tmp_path / "wplus/people/ann_00001.safetensors"
    identity = load_identity(file)
    assert identity.w.shape == (1, 18, 512) and identity.average is not None and identity.thumbnail is not None
    assert identity.provenance["encoder"]["file"] == "untrained_encoder.pt" and identity.provenance["photos"]

    stored = small(client, "identity_file", photo, *same, f"identity=wplus/people/{file.name} [output]")
    (loaded,), (preview,), none = fetched(client, client.run(stored), tmp_path)
    assert pixels(loaded) == pixels(direct) and not none
    assert Image.open(preview).size == (64, 64)


def test_the_identity_and_its_weight_reach_the_picture(client, photo, tmp_path):
    def picture(*settings):
        result = client.run(small(client, "portrait", photo, *settings))
        return pixels(fetched(client, result, tmp_path)[0][0])

    plain = picture("Apply W+.weight=0")
    assert picture("Apply W+.weight=0", "Apply W+.negative=none") == plain
    assert picture("Apply W+.weight=1") != plain
    assert picture("Apply W+.layer_weights=" + "0 " * 16) == plain


def cells(path, columns, rows, under=False):
    """The pictures of a sheet with labels above and left, or under them."""
    sheet = Image.open(path).convert("RGB")
    left, top = sheet.width - columns * SIZE[0], sheet.height - rows * SIZE[1]
    assert 0 <= left <= 2 * SIZE[0] and 0 < top < SIZE[1]
    corners = [(left + c * SIZE[0], (not under) * top + r * SIZE[1]) for r in range(rows) for c in range(columns)]
    return [sheet.crop((x, y, x + SIZE[0], y + SIZE[1])).tobytes() for x, y in corners]


@pytest.mark.parametrize("name", SHEETS)
def test_sweep_becomes_a_sheet_of_frames(client, name, photo, tmp_path):
    columns, rows, previewed, settings = SHEETS[name]
    if name == "interpolation":
        other = tmp_path / "other.png"
        ImageOps.mirror(Image.open(photo)).save(other)
        settings = [f"second photo={other}"]
    result = client.run(small(client, name, photo, *settings))
    (sheet,), previews, _ = fetched(client, result, tmp_path)
    assert len(previews) == previewed and sheet.name.startswith(name)
    assert len(set(cells(sheet, columns, rows, under=name == "emotion_set"))) == columns * rows


def test_frames_of_a_sweep_share_their_noise(client, photo, tmp_path):
    result = client.run(small(client, "edit_strip", photo, "Apply W+.weight=0"))
    (sheet,), *_ = fetched(client, result, tmp_path)
    assert len(set(cells(sheet, 3, 1))) == 1


def test_animation_is_saved_as_a_film_and_as_frames(client, photo, tmp_path):
    pictures, *_ = fetched(client, client.run(small(client, "animated_smile", photo)), tmp_path)
    (film,) = [path for path in pictures if path.suffix == ".webp"]
    frames = [path for path in pictures if path.suffix == ".png"]
    assert Image.open(film).n_frames == len(frames) == 3
    assert {Image.open(path).size for path in pictures} == {SIZE}
    assert len({pixels(path) for path in frames}) == 3


def test_every_workflow_is_covered():
    tested = sorted([*OUTPUTS, *SHEETS, "animated_smile", "identity_file"])
    assert NAMES == tested == sorted(p.stem for p in (FOLDER / "api").glob("*.json"))


@newest_only
@pytest.mark.parametrize("name", NAMES)
def test_editor_opens_it_and_exports_its_twin(frontend, name):
    text = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
    frontend.load(json.loads(text))
    assert frontend.prompt() == json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8")), (
        "run scripts/sync_workflows.py"
    )
    assert "/home/" not in text and "/tmp/" not in text and "\\\\" not in text


@newest_only
def test_template_browser_lists_them_with_pictures(server):
    listed = json.loads(get(server, "/workflow_templates"))["ComfyUI-WPlus"]
    assert sorted(listed) == NAMES
    for name in NAMES:
        assert json.loads(get(server, f"/api/workflow_templates/ComfyUI-WPlus/{name}.json"))["nodes"]
        assert get(server, f"/api/workflow_templates/ComfyUI-WPlus/{name}.jpg").startswith(b"\xff\xd8")


@pytest.mark.parametrize("name", NAMES)
def test_model_links_are_safetensors_of_files_that_the_node_names(name):
    for node in json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["nodes"]:
        for link in node["properties"].get("models", []):
            assert link["name"] in node["widgets_values"]
            assert link["url"].startswith("https://huggingface.co/") and link["url"].endswith(link["name"])
            assert link["directory"] in ("checkpoints", "controlnet") and link["name"].endswith(".safetensors")
