"""The harness itself, on stock nodes: what fails here has nothing to do with this pack."""

import copy
import json
import threading
import time

import pytest
from comfyui_wplus.client import Client, ComfyError, main, resolve
from PIL import Image

from .browser import Frontend

TEXT_TO_IMAGE = {
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "untrained_sd.safetensors"}},
    "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a face", "clip": ["1", 1]}, "_meta": {"title": "prompt"}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["1", 1]}, "_meta": {"title": "negative"}},
    "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 64, "batch_size": 1}},
    "5": {
        "class_type": "KSampler",
        "inputs": {
            "seed": 1, "steps": 2, "cfg": 5, "sampler_name": "euler", "scheduler": "normal", "denoise": 1,
            "model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["4", 0],
        },
    },
    "6": {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}},
    "7": {"class_type": "SaveImage", "inputs": {"filename_prefix": "host", "images": ["6", 0]}},
}  # fmt: skip
INVERT = {
    "1": {"class_type": "LoadImage", "inputs": {"image": "none.png"}, "_meta": {"title": "photo"}},
    "2": {"class_type": "ImageInvert", "inputs": {"image": ["1", 0]}},
    "3": {"class_type": "PreviewImage", "inputs": {"images": ["2", 0]}},
}


@pytest.fixture
def graph():
    return copy.deepcopy(TEXT_TO_IMAGE)


def saved(folder, workflow):
    path = folder / "workflow.json"
    path.write_text(json.dumps(workflow))
    return str(path)


def pixels(client, result, folder):
    (path,) = client.fetch(result, folder)
    return Image.open(path).convert("RGB")


def test_stock_graph_makes_a_picture_and_the_prompt_matters(client, server, graph, tmp_path):
    seen = []
    first = client.run(graph, lambda *progress: seen.append(progress))
    assert ("KSampler", 2, 2) in seen
    picture = pixels(client, first, tmp_path)
    assert picture.size == (64, 64)
    low, high = picture.convert("L").getextrema()
    assert 0 < low + 50 < high < 255  # neither flat nor clipped: a changed latent shows

    graph["2"]["inputs"]["text"] = "something else"
    again = client.run(graph)
    assert set(again.cached) == {"1", "3", "4"}
    assert pixels(client, again, tmp_path).tobytes() != picture.tobytes()
    assert client.run(graph).cached == list(graph)
    assert "missing" not in server.log().lower()  # the checkpoint is complete: no weight left as it was in memory


def test_no_import_failed(server):
    assert server.failed_imports() == []


def test_refused_input_is_told_with_comfyuis_words(client, graph):
    graph["5"]["inputs"]["steps"] = 0
    with pytest.raises(ComfyError, match=r"KSampler \(5\): Value 0 smaller than min of 1: steps") as refusal:
        client.run(graph)
    assert refusal.value.details["node_errors"]["5"]["class_type"] == "KSampler"


def test_unknown_node_type_is_refused(client, graph):
    graph["7"]["class_type"] = "NoSuchNode"
    with pytest.raises(ComfyError, match="NoSuchNode"):
        client.run(graph)


def test_error_in_a_node_names_it(client, graph, server):
    (server.base / "models/checkpoints/broken.safetensors").write_bytes(b"not a checkpoint")
    graph["1"]["inputs"]["ckpt_name"] = "broken.safetensors"
    with pytest.raises(ComfyError, match=r"CheckpointLoaderSimple \(1\): .*") as failure:
        client.run(graph)
    assert failure.value.details["traceback"]


def test_interrupt_in_mid_sampling(client, graph):
    graph["5"]["inputs"] |= {"steps": 1000, "seed": 2}
    started, outcome = threading.Event(), []

    def run():
        with pytest.raises(ComfyError, match=r"KSampler \(5\): interrupted") as stopped:
            client.run(graph, lambda title, done, total: done and started.set())
        outcome.append(stopped)

    thread = threading.Thread(target=run)
    thread.start()
    assert started.wait(60)
    client.interrupt()
    thread.join(60)
    assert outcome
    graph["5"]["inputs"]["steps"] = 1
    assert client.run(graph).files()  # and the server works on


def test_prompt_deleted_from_the_queue_does_not_hang(client, graph, monkeypatch):
    monkeypatch.setattr("comfyui_wplus.client.SILENCE", 0.5)
    graph["5"]["inputs"] |= {"steps": 1000, "seed": 3}
    messages = []

    def run(workflow):
        try:
            client.run(workflow)
        except ComfyError as error:
            messages.append(str(error))

    second = copy.deepcopy(graph)
    second["5"]["inputs"]["seed"] = 4
    threads = [threading.Thread(target=run, args=[workflow]) for workflow in (graph, second)]
    for thread in threads:
        thread.start()
    wait_for(lambda: len(queue(client)["queue_running"]) == len(queue(client)["queue_pending"]) == 1)
    client._request("POST", "/queue", json={"clear": True})
    wait_for(lambda: messages)
    client.interrupt()
    for thread in threads:
        thread.join(60)
    assert messages[0] == "the prompt was taken off the queue before it ran"
    assert "interrupted" in messages[1]


def queue(client):
    return json.loads(client._request("GET", "/queue"))


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_command_line_uploads_sets_and_fetches(server, tmp_path, picture, capsys):
    arguments = [saved(tmp_path, INVERT), "--set", f"photo={picture}", "--server", server.url, "--out", str(tmp_path)]
    assert main(arguments) == 0
    (written,) = capsys.readouterr().out.split()
    inverted = Image.open(written).convert("RGB")
    assert written.startswith(str(tmp_path / "temp"))
    assert inverted.getpixel((5, 5)) == tuple(255 - value for value in Image.open(picture).getpixel((5, 5)))


def test_command_line_overrides_by_title_and_says_what_went_wrong(server, tmp_path, graph, capsys):
    workflow = saved(tmp_path, graph)
    settings = ["KSampler.steps=1", "seed=7", "prompt=a cat", "4.width=128"]
    options = [word for setting in settings for word in ("--set", setting)]
    assert main([workflow, *options, "--server", server.url, "--out", str(tmp_path)]) == 0
    metadata = json.loads(Image.open(capsys.readouterr().out.strip()).info["prompt"])
    assert metadata["5"]["inputs"]["steps"] == 1 and metadata["5"]["inputs"]["seed"] == 7
    assert metadata["2"]["inputs"]["text"] == "a cat" and metadata["4"]["inputs"]["width"] == 128
    assert main([workflow, "--set", "KSampler.steps=0", "--server", server.url]) == 1
    assert "Value 0 smaller than min of 1: steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting, message",
    [
        ("KSampler.stesp=4", "nothing is called 'KSampler.stesp'. Did you mean ksampler.steps"),
        ("nobody=4", "nothing is called 'nobody'. These can be set:\n  CheckpointLoaderSimple.ckpt_name"),
        ("text=hello", "'text' fits several inputs, say which by its node id: 2.text (prompt), 3.text (negative)"),
        ("model=1", "nothing is called 'model'"),
        ("steps=many", "steps takes a number (it is 2), got 'many'"),
        ("steps=true", "steps takes a number (it is 2), got 'true'"),
    ],
)
def test_settings_that_fit_nothing(setting, message, tmp_path, graph, capsys):
    assert main([saved(tmp_path, graph), "--set", setting]) == 1
    assert message in capsys.readouterr().err


def test_titles_come_before_types_and_types_before_inputs(graph):
    graph["8"] = copy.deepcopy(graph["5"]) | {"_meta": {"title": "seed"}}
    assert resolve(graph, "KSampler.steps") == ("5", "steps")
    assert resolve(graph, "seed.steps") == ("8", "steps")
    assert resolve(graph, "SEED") == ("8", "seed")
    assert resolve(graph, "prompt") == ("2", "text")


def test_no_server_is_a_clear_error(graph):
    with pytest.raises(ComfyError, match="no answer from a ComfyUI at http://127.0.0.1:1: is it running?"):
        Client("http://127.0.0.1:1").run(graph)


def test_editor_format_is_refused_with_advice(tmp_path, capsys):
    assert main([saved(tmp_path, {"nodes": [], "links": []})]) == 1
    assert "give its API twin" in capsys.readouterr().err


def test_frontend_opens_a_graph_and_exports_the_same_prompt(frontend, graph, tmp_path):
    frontend.load_api(graph)
    editor_format = frontend.serialize()
    assert {node["type"] for node in editor_format["nodes"]} == {node["class_type"] for node in graph.values()}
    frontend.load(editor_format)
    exported = frontend.prompt()
    assert {i: (n["class_type"], n["inputs"]) for i, n in exported.items()} == {
        i: (n["class_type"], n["inputs"]) for i, n in graph.items()
    }
    assert frontend.screenshot(tmp_path / "screen.png").stat().st_size > 20_000


def test_frontend_unknown_node_is_an_error(browser, server, graph):
    with Frontend(browser, server.url) as page:  # its own, as a dialog about the node stays open in it
        page.load_api(graph)
        editor_format = page.serialize()
        editor_format["nodes"][-1]["type"] = "NoSuchNode"
        page.load(editor_format)
        with pytest.raises(AssertionError, match="does not know"):
            page.prompt()
