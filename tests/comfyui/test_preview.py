"""The preview routes on a real server: pictures that follow the edits, bad input, and the latest request winning."""

import base64
import io
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import numpy as np
import pytest
import torch
from comfyui_wplus.wplus_core.checkpoints import load_generator, save_generator, save_identity
from comfyui_wplus.wplus_core.direction_files import load_collection, parse_edits
from comfyui_wplus.wplus_core.directions import edit
from comfyui_wplus.wplus_core.identity import Identity
from comfyui_wplus.wplus_core.stylegan2 import Generator, GeneratorConfig
from PIL import Image
from safetensors.torch import save

W = torch.randn(1, 18, 512, generator=torch.Generator().manual_seed(5))


def send(server, body, **headers):
    """(status, headers, body) of a POST to the preview route."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
    request = urllib.request.Request(f"{server.url}/wplus/preview", data, headers)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def picture(server, **fields):
    status, headers, body = send(server, fields)
    assert status == 200, body
    assert headers["Content-Type"] == "image/jpeg" and headers["Cache-Control"] == "no-store"
    return Image.open(io.BytesIO(body))


def array(image):
    return np.asarray(image.convert("RGB"), dtype=np.float32)


def coded(**tensors):
    return base64.b64encode(save(tensors)).decode()


def test_the_catalogue(server):
    with urllib.request.urlopen(f"{server.url}/wplus/directions") as response:
        answer = json.load(response)
    smile = next(d for d in answer["directions"] if d["label"] == "smile")
    assert smile["name"] == "untrained/smile" and smile["group"] == "untrained" and smile["layers"] == "0-7"
    assert smile["usual"] == [-3, 3] and smile["unit"] > 0
    assert answer["generators"] == ["untrained_encoder.pt", "miniature"] and answer["plausible"] is False
    assert {d["group"] for d in answer["directions"][-5:]} == {"drawn"}  # so that a plain name is the user's own


@pytest.mark.parametrize("size", [128, 256])
def test_the_picture_is_the_generators(server, stand_ins, size):
    known = load_collection(stand_ins / "wplus/directions")
    w = edit(W.half().float(), parse_edits("smile=2 age=-1@4-7", known))
    generator = load_generator(stand_ins / "wplus/untrained_encoder.pt")
    expected = generator(w, max_resolution=size)[0].detach().clamp(-1, 1).movedim(0, -1).numpy() * 127.5 + 127.5
    shown = picture(server, identity=coded(w=W.half()), edits="smile=2, age = -1 @ 4-7", size=size)
    assert shown.size == (size, size)
    assert np.abs(array(shown) - expected).mean() < 12  # noise is what JPEG does worst
    assert np.abs(array(shown)[:, ::-1] - expected).mean() > 40


def test_an_edit_moves_the_picture_and_an_identity_is_not_the_average(server):
    shown = {name: array(picture(server, **fields)) for name, fields in {
        "average": {}, "same": {"edits": ""}, "smile": {"edits": "smile=2"}, "more": {"edits": "smile=3"},
        "somebody": {"identity": coded(w=W)},
    }.items()}  # fmt: skip
    assert np.array_equal(shown["average"], shown["same"])
    for name in ("smile", "somebody"):
        assert np.abs(shown[name] - shown["average"]).mean() > 2, name
    assert np.abs(shown["more"] - shown["smile"]).mean() > 0.5


def test_an_identity_by_its_files_name(server):
    save_identity(Identity(W), server.base / "input/somebody.safetensors")
    by_name = array(picture(server, identity_name="somebody.safetensors [input]"))
    assert np.array_equal(by_name, array(picture(server, identity=coded(w=W))))


@pytest.mark.parametrize(
    "body, status, message",
    [
        (b"\xff\x00 garbage", 400, "the body is no JSON"),
        (b"[" * 100_000, 400, "the body is no JSON"),
        ([], 400, "expected a JSON object"),
        ({"size": 1024}, 400, "size must be one of [128, 256], got 1024"),
        ({"size": "128"}, 400, "size must be a whole number"),
        ({"size": True}, 400, "size must be a whole number"),
        ({"edits": 3}, 400, "edits must be a text"),
        ({"edits": "smile=1 " * 2000}, 400, "edits must be a text of at most 10000 letters"),
        ({"keep_plausible": "yes"}, 400, "keep_plausible must be true or false"),
        ({"keep_plausible": True}, 400, "keep_plausible needs a PCA of W"),
        ({"edits": "smiel=2"}, 400, "no direction 'smiel'"),
        ({"edits": "smile=lots"}, 400, "expected a number after ="),
        ({"edits": "smile=1e300"}, 400, "too strong"),
        ({"generator": "nothing.pt"}, 404, "no generator file 'nothing.pt'; there are untrained_encoder.pt"),
        ({"generator": "../../../etc/passwd"}, 404, "no generator file"),
        ({"generator": "untrained_adapter.bin"}, 404, "no generator file"),
        ({"identity_name": "../secret.safetensors [input]"}, 404, "no identity file"),
        ({"identity_name": "untrained_adapter.bin"}, 404, "no identity file"),
        ({"identity_name": "/etc/passwd [input]"}, 404, "no identity file"),
        ({"identity_name": "wplus/../../secret.safetensors [output]"}, 404, "no identity file"),
        ({"identity_name": "a\0b.pt [input]"}, 404, "no identity file"),
        ({"identity_name": "\ud800.pt"}, 404, "no identity file"),
        ({"identity_name": ""}, 404, "no identity file"),
        ({"identity": "not base64!"}, 400, "identity is no base64"),
        ({"identity": base64.b64encode(b"garbage bytes").decode()}, 400, "identity is no safetensors file"),
        ({"identity": base64.b64encode(b"\xff" * 64).decode()}, 400, "identity is no safetensors file"),
        ({"identity": coded(x=W)}, 400, "identity must hold w [1, L, 512]"),
        ({"identity": coded(w=W[0])}, 400, "identity must hold w [1, L, 512]"),
        ({"identity": coded(w=W[:, :14].clone())}, 400, "reads codes of shape [18, 512], got [14, 512]"),
        ({"identity": coded(w=W[:, :, :16].clone())}, 400, "reads codes of shape [18, 512], got [18, 16]"),
        ({"identity": coded(w=W * torch.nan)}, 400, "NaN or Inf"),
        ({"identity": coded(w=W.long())}, 400, "must be a float tensor"),
        ({"identity": "A" * 300_000}, 413, "the body must be at most 262144 bytes"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_with_its_reason(server, body, status, message):
    got, headers, answer = send(server, body)
    assert got == status and message in json.loads(answer)["error"]


def test_only_pages_of_this_server_are_answered(server):
    for good in ({}, {"Origin": server.url}, {"Sec_Fetch_Site": "same-origin"}):
        assert send(server, {}, **good)[0] == 200
    for bad in (
        {"Origin": "http://evil.example"}, {"Origin": f"http://evil.example:{server.port}"}, {"Origin": "null"},
        {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"},
    ):  # fmt: skip
        assert send(server, {}, **bad)[0] == 403
    assert send(server, {}, Content_Type="text/plain")[0] == 415  # what a foreign form could send unasked
    get = urllib.request.Request(f"{server.url}/wplus/directions", headers={"Sec-Fetch-Site": "cross-site"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(get)


@pytest.fixture
def large(server):
    """A generator that takes a while."""
    path = server.base / "models/wplus/large.safetensors"
    config = GeneratorConfig.for_size(1024, 8192, 256, mapping_layers=1)
    save_generator(Generator(config), path)
    yield path.name
    path.unlink()


def test_the_latest_request_of_a_client_wins_and_others_keep_theirs(server, large):
    with ThreadPoolExecutor(5) as pool:

        def ask(client, edits):
            return pool.submit(send, server, {"client": client, "edits": edits, "generator": large, "size": 256})

        other = ask("b", "")
        asked = [ask("a", "smile=0"), ask("a", "smile=1")]  # who comes first is left open
        for edits in ("smile=2", "smile=3", None):
            done, (latest,) = wait(asked, 60, FIRST_COMPLETED)
            (refused,) = done
            assert refused.result()[0] == 409 and "newer request" in json.loads(refused.result()[2])["error"]
            assert not other.done()  # nor was it waited for
            if edits:
                asked = [latest, ask("a", edits)]
        began = time.monotonic()
        with urllib.request.urlopen(f"{server.url}/queue"):  # the server answers all the while
            assert time.monotonic() - began < 2
        assert other.result(60)[0] == latest.result(60)[0] == 200
    alone = send(server, {"client": "c", "edits": "smile=3", "generator": large, "size": 256})
    assert latest.result()[2] == alone[2]


def test_a_new_direction_file_is_known_at_once(server, stand_ins):
    folder = server.base / "models/wplus/directions"
    np.save(folder / "brow.npy", np.random.default_rng(0).normal(size=(18, 512)))
    try:
        assert picture(server, edits="brow=2").size == (128, 128)
    finally:
        (folder / "brow.npy").unlink()
    assert "no direction 'brow'" in json.loads(send(server, {"edits": "brow=2"})[2])["error"]
