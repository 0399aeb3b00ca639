"""The nodes from photos to identities as ComfyUI calls them: many faces, many frames, and files that come and go."""

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import pytest
import torch
from comfyui_wplus.nodes import folders
from comfyui_wplus.nodes.directions import FindDirection
from comfyui_wplus.nodes.faces import AlignFace, PasteFace
from comfyui_wplus.nodes.identity import DecodeIdentity, EncodeIdentity, IdentityInfo
from comfyui_wplus.nodes.loaders import LoadFaceTools
from comfyui_wplus.nodes.types import LoadedEncoder, Managed
from comfyui_wplus.wplus_core.checkpoints import save_identity
from comfyui_wplus.wplus_core.encode import codes
from comfyui_wplus.wplus_core.encoder import EncoderConfig, build_encoder
from comfyui_wplus.wplus_core.identity import Identity
from comfyui_wplus.wplus_core.refine import RefineConfig, refine
from comfyui_wplus.wplus_core.stylegan2 import Generator, GeneratorConfig

FACE = np.array([(20, 25), (40, 25), (30, 35), (22, 45), (38, 45)])


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    config = EncoderConfig(layers=8, units=(1, 2, 1, 1), channels=(16, 16, 32, 32), image_size=64)
    network = build_encoder(config).eval().requires_grad_(False)
    generator = Generator(GeneratorConfig.for_size(32, max_channels=16)).eval()
    return LoadedEncoder("small", "", Managed(network), Managed(generator))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Empty model, output and input folders."""
    for name in ("models/wplus", "output/wplus", "input", "packs"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "get_input_directory", lambda: str(tmp_path / "input"))
    extensions = folder_paths.folder_names_and_paths["wplus"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "wplus", ([str(tmp_path / "models/wplus")], extensions))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "custom_nodes", ([str(tmp_path / "packs")], set()))
    return tmp_path


@pytest.fixture
def bar(monkeypatch):
    """What ComfyUI's progress bar is told."""
    moves = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, *_, **__: moves.append((done, total)))
    return moves


@pytest.fixture
def interrupted():
    comfy.model_management.interrupt_current_processing(True)
    yield pytest.raises(comfy.model_management.InterruptProcessingException)
    comfy.model_management.interrupt_current_processing(False)


def encoded(encoder, faces, steps=0, faces_are="one each"):
    return EncodeIdentity.execute(encoder, faces, faces_are, "", False, steps).args


def test_many_faces_are_encoded_a_few_at_a_time(encoder, bar):
    faces, sizes = torch.rand(19, 64, 64, 3), []
    network = encoder.encoder.network
    handle = network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    identity, seen = encoded(encoder, faces)
    handle.remove()
    assert sizes == [8, 8, 3] and bar[-1] == (3, 3) and seen.shape == faces.shape
    torch.testing.assert_close(identity.w, codes(faces.movedim(-1, 1), network)[0], rtol=1e-4, atol=1e-4)


def test_each_code_is_refined_as_if_it_were_alone(encoder, bar):
    faces = torch.rand(2, 64, 64, 3)
    both = encoded(encoder, faces, 3)[0]
    assert bar[-1] == (6, 6)
    for n in (0, 1):
        alone = encoded(encoder, faces[n, None], 3)[0]
        torch.testing.assert_close(both.w[n, None], alone.w, rtol=1e-4, atol=1e-4)
        assert both.provenance["refine"]["losses"][n] == pytest.approx(alone.provenance["refine"]["losses"], rel=1e-3)
    start = encoded(encoder, faces[1:])[0]
    target, generator = faces[1:].movedim(-1, 1), encoder.generator.network
    expected = refine(start, target, generator, start.average, config=RefineConfig(steps=3))
    torch.testing.assert_close(alone.w, expected.w)


def test_long_work_shows_how_far_it_is(encoder, bar):
    DecodeIdentity.execute(Identity(torch.randn(9, 8, 512)), encoder, "64", "fixed", 0)
    assert bar[-1] == (3, 3)
    AlignFace.execute(torch.rand(5, 64, 64, 3), "one", 0, "largest", "black", 64, "error", landmarks=FACE)
    assert bar[-1] == (5, 5)


def test_long_work_can_be_interrupted(encoder, interrupted):
    with interrupted:
        DecodeIdentity.execute(Identity(torch.randn(9, 8, 512)), encoder, "64", "fixed", 0)


def test_finding_faces_can_be_interrupted(interrupted):
    with interrupted:
        AlignFace.execute(torch.rand(5, 64, 64, 3), "one", 0, "largest", "black", 64, "error", landmarks=FACE)


def test_fitting_a_direction_shows_how_far_it_is(bar):
    fitted(8)
    assert bar[-1] == (5, 5)


def test_fitting_a_direction_can_be_interrupted(interrupted):
    with interrupted:
        fitted(8)


def fitted(count):
    people = torch.randn(2, count, 18, 512)
    return FindDirection.execute(Identity(people[0] + 1), Identity(people[1] - 1), "x", "svm", "all", False)


def test_a_mask_without_a_batch_is_one_mask():
    photo, face = torch.zeros(1, 64, 64, 3), torch.ones(1, 32, 32, 3)
    crops = AlignFace.execute(photo, "one", 0, "largest", "black", 64, "error", landmarks=FACE).args[1]
    mask = torch.zeros(32, 32)
    mask[:16] = 1
    flat, batch = (PasteFace.execute(photo, face, crops, 0.1, m).args[0] for m in (mask, mask[None]))
    assert torch.equal(flat, batch) and flat.max() > 0.9


def test_what_cannot_be_read_is_in_no_list(place):
    save_identity(Identity(torch.randn(1, 18, 512)), place / "input/me.safetensors")
    for folder in ("models/wplus", "output/wplus", "input"):
        (place / folder / "gone.safetensors").symlink_to(place / "nowhere")
    assert folders.identity_files() == ["me.safetensors [input]"]
    assert folders.model_files("adapter", "encoder", "identity", "") == []
    assert folders.kind_at(place / "nowhere.pt") == "" and folders.fingerprint(place / "nowhere.pt")
    (place / "input/locked.pt").symlink_to("/proc/self/mem")  # which even root cannot read
    assert folders.identity_files() == ["me.safetensors [input]"]
    assert not folders.has_generator(str(place / "input/locked.pt"), "")


def test_an_identity_file_is_found_by_its_name_alone(place, monkeypatch):
    for inside in ("input", "input/sub", "input/.trash", "output/wplus", "output", "models/wplus", "models",
                   "models/wplus/directions"):  # fmt: skip
        (place / inside).mkdir(exist_ok=True)
        save_identity(Identity(torch.randn(1, 18, 512)), place / inside / "me.safetensors")
    (place / "input/note.txt").write_text("hello")
    listed = folders.identity_files()
    assert listed == ["me.safetensors", "wplus/me.safetensors [output]", "me.safetensors [input]",
                      "sub/me.safetensors [input]"]  # fmt: skip
    monkeypatch.setattr(folders, "files_below", None)  # no listing
    assert [folders.identity_file(n) for n in listed] == [
        place / p / "me.safetensors" for p in ("models/wplus", "output/wplus", "input", "input/sub")
    ]
    for name in (
        "../me.safetensors", "../models/wplus/me.safetensors [input]", "me.safetensors [output]", "note.txt [input]",
        ".trash/me.safetensors [input]", "directions/me.safetensors", "nobody.pt", "", " [input]", "wplus [output]",
        f"{place}/models/me.safetensors", f"{place}/input/me.safetensors [input]", "wplus/../me.safetensors [output]",
        "a\0b.pt [input]", "a\0b.pt", "\ud800.pt [output]", "x" * 5000 + ".pt [input]",
    ):  # fmt: skip
        assert folders.identity_file(name) is None, name


def test_face_tools_are_loaded_again_when_dlibs_files_come(place):
    states = [LoadFaceTools.fingerprint_inputs("none")]
    for folder in ("models/dlib", "packs/other/dlib"):
        (place / folder).mkdir(parents=True)
        (place / folder / "shape_predictor.dat").write_bytes(b"\0")
        states.append(LoadFaceTools.fingerprint_inputs("none"))
        assert place / folder in LoadFaceTools.execute("none").args[0].folders
    (place / folder / "shape_predictor.dat").write_bytes(b"\0\0")
    states.append(LoadFaceTools.fingerprint_inputs("none"))
    assert len(set(states)) == 4 and LoadFaceTools.fingerprint_inputs("none") == states[-1]


def test_info_is_told_again_when_a_direction_file_comes(place):
    before = IdentityInfo.fingerprint_inputs(identity=None)
    (place / "models/wplus/directions").mkdir()
    np.save(place / "models/wplus/directions/brow.npy", np.ones((18, 512)))
    assert IdentityInfo.fingerprint_inputs(identity=None) != before
