"""The workflows' twins that run on the miniature: the same graphs, with its loader in place of the model files.

scripts/sync_workflows.py writes them to workflows/miniature. A twin takes a drawn, aligned face for the photo, so
nothing is searched in it, and everything in pixels is a quarter as large: 128 instead of 512.
"""

import copy
from typing import Any

Prompt = dict[str, dict[str, Any]]

FOLDER = "miniature"
LOADED = {"CheckpointLoaderSimple": (0, 1, 2), "WPlusLoadEncoder": (3,), "WPlusLoadAdapter": (4,)}  # its outputs
FACES = 5
LEFT_OUT = ("WPlusLoadFaceTools", "WPlusAlignFace")
WITHOUT = ("controlnet",)  # workflows that need a model which the miniature has none of
SMALLER = 4
PIXELS = {  # inputs in pixels, by kind of node
    "EmptyLatentImage": ("width", "height"), "SolidMask": ("width", "height"), "MaskComposite": ("x", "y"),
    "FeatherMask": ("left", "top", "right", "bottom"),
}  # fmt: skip
SAMPLER = {"steps": 20, "cfg": 4}
ENCODE = {"remove_background": False}  # the faces are on white
DECODE = {"resolution": "64"}
PROMPTS = {
    "animated_smile": "a person in a yellow sweater in the city by day, photo",
    "anime": "a person in a purple dress in a garden by day, watercolor",
    "edit_grid": "a person in a blue shirt in the forest by day, photo",
    "edit_in_place": "a person in a white sweater in the city at sunset, photo",
    "edit_strip": "a person in a blue shirt in the forest by day, photo",
    "emotion_set": "a person in a red jacket on the beach by day, photo",
    "identity_file": "a person in a green jacket in a room at night, pencil sketch",
    "interpolation": "a person in a white jacket in space at night, photo",
    "live_editing": "a person in an orange shirt with a balloon in a garden by day, photo",
    "lambda_sweep": "a person in a red dress on the beach by day, watercolor",
    "photo_batch": "a person in an orange sweater in the snow by day, photo",
    "portrait": "a person in a red dress on the beach by day, photo",
    "two_people": "a person in a green shirt in a garden by day, photo",
}
EDITS = (  # by their full names, for the user may have others called smile
    "drawn/smile=0\ndrawn/smile=2 drawn/eyes_open=1\ndrawn/eyes_open=2 drawn/brows=2\ndrawn/smile=-2\n"
    "drawn/smile=-2 drawn/brows=-2\ndrawn/age=2\ndrawn/glasses=3\ndrawn/eyes_open=-2"
)


def twin(name: str, prompt: Prompt) -> Prompt:
    """The API form of workflow `name` → its twin's."""
    old = copy.deepcopy(prompt)
    kinds = {node_id: node["class_type"] for node_id, node in old.items()}
    photos = [node_id for node_id, kind in kinds.items() if kind == "LoadImage"]
    places = {node_id: photos.index(node["inputs"]["photo"][0]) for node_id, node in old.items()
              if node["class_type"] == "WPlusAlignFace"}  # fmt: skip
    loader = str(1 + max(map(int, old)))
    new: Prompt = {loader: {"inputs": {}, "class_type": "WPlusLoadMiniature", "_meta": {"title": "Miniature"}}}
    for node_id, node in old.items():
        kind, title = node["class_type"], node["_meta"]["title"]
        if kind in LOADED or kind in LEFT_OUT:
            continue
        if kind == "LoadImage":
            person = {"image": [loader, FACES], "batch_index": photos.index(node_id), "length": 1}
            new[node_id] = {"inputs": person, "class_type": "ImageFromBatch", "_meta": {"title": title}}
            continue
        inputs = {}
        for key, value in node["inputs"].items():
            if not isinstance(value, list):
                inputs[key] = changed(name, kind, title, key, value)
            elif kinds[value[0]] in LOADED:
                inputs[key] = [loader, LOADED[kinds[value[0]]][value[1]]]
            elif kinds[value[0]] == "WPlusAlignFace" and value[1] == 0:
                inputs[key] = [photos[places[value[0]]], 0]
            elif kinds[value[0]] not in LEFT_OUT:
                inputs[key] = value
        new[node_id] = node | {"inputs": inputs}
    return new


def changed(name: str, kind: str, title: str, key: str, value: Any) -> Any:
    """What an input is set to in the twin."""
    fixed = {"KSampler": SAMPLER, "WPlusEncodeIdentity": ENCODE, "WPlusDecodeIdentity": DECODE}.get(kind, {})
    if key in fixed:
        return fixed[key]
    if key in PIXELS.get(kind, ()):
        return value // SMALLER
    if key == "text":
        return PROMPTS[name] if title == "prompt" else ""
    if key == "filename_prefix":
        return f"{FOLDER}_{value}"
    if key == "identity_name":
        return value.replace("identity_", f"{FOLDER}_identity_")
    if kind == "WPlusEditStack" and key == "edits":
        return "drawn/smile=2 drawn/age=1.5"
    if title == "emotions":
        return EDITS
    if key.endswith("direction") and isinstance(value, str):
        return f"drawn/{value.rpartition('/')[2]}"
    return value
