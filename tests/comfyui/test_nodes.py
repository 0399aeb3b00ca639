"""The pack's nodes as a running server shows and runs them: the contract, what it refuses, and that it lasts."""

import copy
import json
import os
import re
import shutil
import threading
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from comfyui_wplus.client import ComfyError
from PIL import Image, ImageOps

from .workflows import by_title, fetched, newest_only, pixels, small

SNAPSHOT = Path(__file__).with_name("object_info.json")
KEPT = (
    "display_name", "description", "category", "search_aliases", "input", "input_order", "output", "output_name",
    "output_tooltips", "output_is_list", "output_node", "deprecated", "experimental",
)  # fmt: skip


def our_nodes(client):
    """/object_info of this pack, without what ComfyUI adds itself and without the files that lie in the folders."""
    everything = client.object_info()
    ours = {i: n for i, n in everything.items() if n["python_module"] == "custom_nodes.ComfyUI-WPlus"}
    ours = {i: {key: node[key] for key in KEPT} for i, node in sorted(ours.items())}
    for node in ours.values():
        for groups in (node["input"], node["input_order"]):
            groups.pop("hidden", None)
        for name, spec in inputs(node):
            if name.endswith(("_name", "direction")) and "options" in spec[1]:
                spec[1]["options"] = []
    return ours


def inputs(node):
    """(name, specification) of all inputs, those under the choices of a combo too."""
    found = [pair for group in node["input"].values() for pair in group.items()]
    choices = [choice for _, spec in found for choice in spec[1].get("options", []) if isinstance(choice, dict)]
    return found + [pair for choice in choices for pair in inputs({"input": choice["inputs"]})]


def test_object_info_is_the_contract(client):
    """Saved workflows depend on it. If it is meant to change: WPLUS_SNAPSHOT=write scripts/test -k contract"""
    ours = our_nodes(client)
    if os.environ.get("WPLUS_SNAPSHOT") == "write":
        SNAPSHOT.write_text(json.dumps(ours, indent=1) + "\n")
    assert json.dumps(ours, indent=1) + "\n" == SNAPSHOT.read_text()


def test_everything_is_explained(client, server):
    for node_id, node in our_nodes(client).items():
        with urllib.request.urlopen(f"{server.url}/extensions/ComfyUI-WPlus/docs/{node_id}.md") as response:
            page = response.read().decode()
        assert page.startswith(f"# {node['display_name']}\n") and node["description"] and node["search_aliases"]
        for name, spec in inputs(node):
            assert spec[1].get("tooltip"), f"{node_id}.{name} has no tooltip"
            assert f"**{name.removeprefix('second_')}**" in page, f"{node_id}.md says nothing of {name}"
        assert all(node["output_tooltips"]) and all(f"**{name}**" in page for name in node["output_name"])


def test_docs_are_of_nodes_that_exist(client):
    pages = Path(__file__).parents[2].glob("web/docs/*.md")
    assert sorted(page.stem for page in pages) == list(our_nodes(client))


def test_what_did_not_change_is_not_run_again(client, photo):
    workflow = small(client, "portrait", photo)
    client.run(workflow)
    assert set(client.run(workflow).cached) == set(workflow)
    workflow[by_title(workflow, "Sampler")]["inputs"]["seed"] += 1
    again = set(workflow) - set(client.run(workflow).cached)
    assert again == {by_title(workflow, title) for title in ("Sampler", "Decode", "Save picture")}


def test_a_changed_photo_is_seen(client, photo, tmp_path):
    workflow = small(client, "portrait", photo)
    before = client.run(workflow)
    mine = tmp_path / photo.name
    ImageOps.mirror(Image.open(photo)).save(mine)
    after = client.run(small(client, "portrait", mine))
    seen = by_title(workflow, "What the encoder saw")
    assert before.outputs[seen] != after.outputs[seen]


def test_interrupt_in_mid_sampling(client, photo):
    workflow = small(client, "portrait", photo, "Sampler.steps=1000", "seed=11")
    started, outcome = threading.Event(), []

    def run():
        with pytest.raises(ComfyError, match=r"Sampler \(\d+\): interrupted") as stopped:
            client.run(workflow, lambda title, done, total: title == "Sampler" and done > 1 and started.set())
        outcome.append(stopped)

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(120)
    client.interrupt()
    thread.join(60)
    assert outcome
    assert client.run(small(client, "portrait", photo, "Sampler.steps=1", "seed=11")).files()


@pytest.mark.parametrize(
    "setting, message",
    [
        ("Apply W+.weight=5", r"Apply W\+ \(\d+\): Value 5(.0)? bigger than max of 2.0: weight"),
        ("Adapter=nothing.bin", r"Adapter \(\d+\): Value not in list: adapter_name: 'nothing.bin' not in"),
        ("Adapter=untrained_encoder.pt", r"Adapter \(\d+\): Value not in list: adapter_name"),
        ("Encoder=../../secret.pt", r"Encoder \(\d+\): Value not in list: encoder_name"),
        ("Find face.index=9", r"Find face \(\d+\): .*9"),
        ("Apply W+.layer_weights=1 2 3", r"Apply W\+ .*layer_weights: expected 16 numbers .* got '1 2 3'"),
        ("Apply W+.layer_weights=1, x", r"Apply W\+ .*layer_weights: expected 16 numbers, got '1, x'"),
    ],
)
def test_a_wrong_value_is_refused_with_its_reason(client, photo, setting, message):
    with pytest.raises(ComfyError, match=message):
        client.run(small(client, "portrait", photo, setting))


def test_a_picture_without_a_face_is_refused_with_advice(client, picture):
    with pytest.raises(ComfyError, match=r"Find face \(\d+\): .*no face found in .* Use a photo with a face"):
        client.run(small(client, "portrait", picture))


@pytest.mark.parametrize(
    "title, link, message",
    [
        ("Apply W+", "identities.identity0", r"Required input is missing.*identit"),
        ("Find face", "face_tools", r"needs face_tools \(Load W\+ Face Tools\) or landmarks"),
        ("Encode identity", "encoder", r"Required input is missing: encoder"),
    ],
)
def test_a_missing_link_is_refused_with_its_name(client, photo, title, link, message):
    workflow = small(client, "portrait", photo)
    del workflow[by_title(workflow, title)]["inputs"][link]
    with pytest.raises(ComfyError, match=message):
        client.run(workflow)


@pytest.mark.parametrize(
    "shape, setting, message",
    [
        ((18, 512), "Apply W+.negative=average face", "does not know its encoder's average face; encode it"),
        ((14, 512), "Apply W+.weight=1", r"reads codes of shape \[B, 18, 512\], got \[1, 14, 512\]; use the encoder"),
        ((1, 512), "Apply W+.weight=1", r"one w vector \[1, 512\], not W\+. Repeat it"),
    ],
)
def test_a_code_that_does_not_fit_is_refused(client, server, photo, shape, setting, message):
    np.save(server.base / "input/code.npy", np.zeros(shape))
    workflow = small(client, "identity_file", photo, "identity=code.npy [input]", setting)
    del workflow[by_title(workflow, "The identity")]
    with pytest.raises(ComfyError, match=message):
        client.run(workflow)


def test_paste_back_wants_a_picture_per_crop(client, photo):
    workflow = small(client, "portrait", photo)
    face, picture = by_title(workflow, "Find face"), by_title(workflow, "photo")
    batch = {"class_type": "BatchImagesNode", "inputs": {"images.image0": [face, 0], "images.image1": [face, 0]}}
    paste = {"photo": [picture, 0], "face": [face, 0], "crops": [face, 1], "feather": 0.1}
    small_graph = {i: workflow[i] for i in (face, picture, by_title(workflow, "Face tools"))} | {
        "batch": batch,
        "paste": {"class_type": "WPlusPasteFace", "inputs": paste},
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["paste", 0]}},
    }
    assert len(client.run(small_graph).files()) == 1
    twice = copy.deepcopy(small_graph)
    twice["paste"]["inputs"]["face"] = ["batch", 0]
    with pytest.raises(ComfyError, match="needs a picture per crop, got 2 for 1"):
        client.run(twice)


def test_an_unreadable_file_is_in_no_list_and_in_the_log_once(client, server):
    broken = server.base / "models/wplus/cut_short.safetensors"
    broken.write_bytes(b"\x40\x00\x00\x00\x00\x00\x00\x00{" + b"\x00" * 100)
    (server.base / "models/wplus/page.bin").write_bytes(b"<!DOCTYPE html>")
    try:
        lists = [json.dumps(client.object_info()) for _ in range(3)]
    finally:
        broken.unlink()
        (server.base / "models/wplus/page.bin").unlink()
    assert not any("cut_short" in text or "page.bin" in text for text in lists)
    said = [line for line in server.log().splitlines() if "cut_short.safetensors" in line or "page.bin" in line]
    assert len(said) == 2 and all("not listed" in line for line in said)
    assert any("this is a web page" in line for line in said)


def test_a_link_that_leads_nowhere_takes_no_node_down(client, server):
    places = [server.base / place for place in ("models/wplus", "models/wplus/directions", "output/wplus", "input")]
    links = [place / "gone.safetensors" for place in places]
    for link in links:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to("nowhere")
    try:
        assert list(our_nodes(client)) == list(json.loads(SNAPSHOT.read_text()))
        assert "gone.safetensors" not in json.dumps(client.object_info())
        with urllib.request.urlopen(f"{server.url}/wplus/directions") as response:
            assert json.load(response)["generators"] == ["untrained_encoder.pt", "miniature"]
    finally:
        for link in links:
            link.unlink()


def test_files_are_told_by_content_and_a_new_one_is_listed_at_once(client, server, stand_ins):
    def options(node, name):
        return client.object_info(node)[node]["input"]["required"][name][1]["options"]

    odd = server.base / "models/wplus/sub/my encoder.bin"
    odd.parent.mkdir(exist_ok=True)
    shutil.copy(stand_ins / "wplus/untrained_encoder.pt", odd)
    try:
        assert options("WPlusLoadEncoder", "encoder_name") == ["sub/my encoder.bin", "untrained_encoder.pt"]
        assert options("WPlusLoadAdapter", "adapter_name") == ["untrained_adapter.bin"]
        assert options("WPlusLoadFaceTools", "parser_name") == ["untrained_parser.pth", "none"]
    finally:
        shutil.rmtree(odd.parent)


def test_two_clients_at_once_get_their_own_pictures(client, photo, tmp_path):
    workflows = [small(client, "portrait", photo, f"seed={seed}", f"prompt=face {seed}") for seed in (21, 22)]
    together = [None, None]

    def run(n):
        together[n] = client.run(workflows[n])

    threads = [threading.Thread(target=run, args=[n]) for n in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    shown = [pixels(fetched(client, result, tmp_path)[0][0]) for result in together]
    assert shown[0] != shown[1]
    for n, workflow in enumerate(workflows):
        workflow[by_title(workflow, "Save picture")]["inputs"]["filename_prefix"] = "alone"
        workflow[by_title(workflow, "Sampler")]["inputs"]["denoise"] = 0.99999  # the same picture, made anew
        alone = client.run(workflow)
        assert by_title(workflow, "Sampler") not in alone.cached
        assert pixels(fetched(client, alone, tmp_path)[0][0]) == shown[n]


@newest_only
def test_memory_is_flat_over_a_hundred_prompts(client, server, photo):
    """Each with another seed and weight: another fold of the identity and another clone of the model."""

    def resident():
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    workflow = small(client, "portrait", photo, "size.width=64", "Sampler.steps=1")
    sizes = []
    for n in range(100):
        workflow[by_title(workflow, "Sampler")]["inputs"]["seed"] = 1000 + n
        workflow[by_title(workflow, "Apply W+")]["inputs"]["weight"] = 0.5 + n / 100
        client.run(workflow)
        sizes.append(resident())
    print([round(size) for size in sizes[::10]])
    assert max(sizes[80:]) - max(sizes[20:40]) < 30  # MB; one identity folded is 1 MB here, one model 400


def edited(client, server, **inputs):
    """A prompt that edits a stored code by a list, and shows what came of it; inputs of the stack."""
    np.save(server.base / "input/code.npy", np.ones((18, 512)))
    stack = {"identity": ["load", 0], "edits": "smile=2", "keep_plausible": False} | inputs
    return {
        "load": {"class_type": "WPlusLoadIdentity", "inputs": {"identity_name": "code.npy [input]"}},
        "stack": {"class_type": "WPlusEditStack", "inputs": stack},
        "info": {"class_type": "WPlusIdentityInfo", "inputs": {"identity": ["stack", 0]}},
        "show": {"class_type": "PreviewAny", "inputs": {"source": ["info", 0]}},
    }


def test_edits_by_text(client, server):
    result = client.run(edited(client, server, edits="smile=2\nuntrained/age=-1.5@0-3"))
    (text,) = result.outputs["show"]["text"]
    assert '"direction": "untrained/smile"' in text and '"strength": -1.5, "layers": [0, 4]' in text
    with pytest.raises(ComfyError, match=r"WPlusEditStack.*no direction 'smiel' .*the nearest: .*untrained/smile"):
        client.run(edited(client, server, edits="smiel=2"))


def test_the_identity_for_the_preview_comes_from_the_cache_too(client, server):
    prompt = edited(client, server)
    first, again = client.run(prompt), client.run(prompt)
    assert set(again.cached) == set(prompt)
    assert first.outputs["stack"]["wplus_identity"] == again.outputs["stack"]["wplus_identity"]
    assert first.outputs["stack"].keys() == {"wplus_identity"} and not first.files()


def test_a_saved_direction_is_known_at_once_and_a_changed_file_is_seen(client, server):
    def save(name):
        load = {"class_type": "WPlusLoadDirection", "inputs": {"direction_name": name}}
        kept = {"direction": ["load", 0], "name": "mine/grin"}
        return {"load": load, "save": {"class_type": "WPlusSaveDirection", "inputs": kept}}

    folder = server.base / "output/wplus/directions"
    try:
        (file,) = client.run(save("untrained/smile")).files()
        assert file == {"filename": "grin.safetensors", "subfolder": "wplus/directions/mine", "type": "output"}
        assert "mine/grin" in client.object_info("WPlusEditIdentity")["WPlusEditIdentity"]["input"]["required"][
            "direction"
        ][1]["options"]  # fmt: skip
        prompt = edited(client, server, edits="grin=2")
        (text,) = client.run(prompt).outputs["show"]["text"]
        (folder / "mine/grin.safetensors").unlink()
        client.run(save("untrained/age"))
        (other,) = client.run(prompt).outputs["show"]["text"]
        assert "mine/grin" in text and text != other
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "setting, message",
    [
        ("Sweep.along.start=-90", r"Sweep \(\d+\): Value -90(.0)? smaller than min of -20.0: along.start"),
        ("Sweep.along.direction=untrained/smlie", r"Sweep \(\d+\): Value not in list: along.direction"),
        ("Sweep.along.layers=30", r"Sweep .*expected layers such as 0-7"),
        ("Sweep.along=nowhere", r"Sweep .*expected along to be one of one direction, two directions"),
    ],
)
def test_a_wrong_sweep_is_refused_with_its_reason(client, photo, setting, message):
    with pytest.raises(ComfyError, match=message):
        client.run(small(client, "edit_strip", photo, setting))
