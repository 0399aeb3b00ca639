"""Faces in a photo and the four points that FFHQ's alignment needs: found by dlib, or handed in."""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from .errors import FileError, WPlusError
from .files import AGAIN, files_below, unreadable
from .photos import Photo, check_pixels, to_uint8

log = logging.getLogger(__name__)

INSTALL = "pip install dlib-bin face_recognition_models"
ORDERS = ("largest", "left-to-right", "as-found")
# The first bytes of dlib's files: 68 points are a matrix of 136 rows, the detector is a net with an MMOD loss.
PREDICTOR_68 = b"\x01\x01\x81\x88\x81\x01"
MMOD = b"\x01\x01\x01\x0aloss_mmod_"

# MediaPipe's 478 points nearest to dlib's 36..41 and 42..47, and the corners of the lips.
MEDIAPIPE_EYE_LEFT = (33, 160, 158, 133, 153, 144)
MEDIAPIPE_EYE_RIGHT = (362, 385, 387, 263, 373, 380)
MEDIAPIPE_MOUTH = (61, 291)

HOG_PIXELS = 1.5e6  # photos up to here are searched as they are, which is what the reference does with all
MMOD_PIXELS = 0.4e6  # about 3 s on two CPU cores
MIN_SIDE = 16
DOUBTFUL = 0.3  # HOG scores up to here are often no face: then the photo is turned, and the CNN asked
SURE = 0.6  # asked of a face that is found with the photo turned


@dataclass(frozen=True)
class Landmarks:
    """(x, y) of four points in pixel indices of the photo; left and right as the viewer sees an upright face."""

    eye_left: tuple[float, float]
    eye_right: tuple[float, float]
    mouth_left: tuple[float, float]
    mouth_right: tuple[float, float]

    def __post_init__(self):
        points = (self.eye_left, self.eye_right, self.mouth_left, self.mouth_right)
        if not np.isfinite(points).all():
            raise WPlusError(f"landmarks hold NaN or infinite coordinates: {points}")
        if self.size < 2:
            raise WPlusError(f"landmarks describe a face of {self.size:.2g} px; they must be in pixels of the photo")

    def axes(self) -> tuple[np.ndarray, np.ndarray]:
        """FFHQ's crop: its centre and its half side towards the right, [2] each in pixel indices."""
        left, right = np.array(self.eye_left), np.array(self.eye_right)
        eye, e2e = (left + right) / 2, right - left
        e2m = (np.array(self.mouth_left) + np.array(self.mouth_right)) / 2 - eye
        x = e2e - np.array([-e2m[1], e2m[0]])
        x *= max(2 * np.hypot(*e2e), 1.8 * np.hypot(*e2m)) / max(np.hypot(*x), 1e-9)
        return eye + 0.1 * e2m, x

    @property
    def size(self) -> float:
        """The crop's side in pixels of the photo."""
        return 2 * float(np.hypot(*self.axes()[1]))


@dataclass(frozen=True)
class Face:
    """box: left, top, right, bottom in pixel indices. score: the detector's. points: dlib's [68, 2] or None."""

    box: tuple[int, int, int, int]
    score: float
    landmarks: Landmarks
    detector: str = "given"
    points: np.ndarray | None = None

    @property
    def size(self) -> float:
        """The crop's side in pixels of the photo; under 160 it is too small for training."""
        return self.landmarks.size


@dataclass(frozen=True)
class Found:
    """A detection: dlib's rectangle in the photo after `turns` quarter turns to the left."""

    rect: Any
    score: float
    detector: str
    turns: int = 0


class FaceFinder:
    """dlib's detectors and 68 landmarks, loaded once.

    folders: searched, subfolders too, for `shape_predictor_68_face_landmarks*.dat` and `mmod_human_face_detector.dat`
    under any name ending in .dat; then the package face_recognition_models is used if it is installed.
    Raises WPlusError with the line to install when dlib or the landmark model is missing.
    """

    def __init__(self, folders: Iterable[str | Path] = ()):
        folders = list(folders)
        self.dlib = _import_dlib()
        predictor, mmod = find_models(folders)
        if predictor is None:
            where = ", ".join(map(str, folders)) or "no folder given"
            raise WPlusError(f"no dlib 68-point landmark model (.dat) found ({where}). Put it there, or: {INSTALL}")
        self.predictor = _loaded(self.dlib.shape_predictor, predictor)
        self.hog = self.dlib.get_frontal_face_detector()
        self.mmod = _loaded(self.dlib.cnn_face_detection_model_v1, mmod) if mmod else None

    def __call__(self, photo: Tensor | Photo, order: str = "largest", name: str = "the photo") -> list[Face]:
        """photo [3, H, W] in 0..1 → every face, in the order asked for; raises WPlusError when there is none."""
        pixels = check_pixels(photo.pixels if isinstance(photo, Photo) else photo, name)
        image = self._as_the_reference_sees_it(photo)
        found = self._detect(pixels, image) if min(image.shape[:2]) >= MIN_SIDE else []
        if not found:
            also = " and the CNN" if self.mmod else ""
            raise WPlusError(
                f"no face found in {name} ({pixels.shape[2]} x {pixels.shape[1]}; dlib's HOG detector{also} tried). "
                "Use a photo with a face of at least 40 px that looks at the camera, or hand in landmarks"
            )
        return in_order([self._landmarks(image, f) for f in found], order)

    def _as_the_reference_sees_it(self, photo: Tensor | Photo) -> np.ndarray:
        # dlib decodes a JPEG's colours differently (by up to 28 levels): enough to move landmarks by a pixel.
        if isinstance(photo, Photo) and photo.untouched and photo.path.suffix.lower() in (".jpg", ".jpeg"):
            try:
                return self.dlib.load_rgb_image(str(photo.path))
            except RuntimeError:
                log.debug("%s: dlib cannot read it, Pillow could", photo.path)
        return to_uint8(photo.pixels if isinstance(photo, Photo) else photo)

    def _detect(self, pixels: Tensor, image: np.ndarray) -> list[Found]:
        scale = min(1.0, math.sqrt(HOG_PIXELS / pixels[0].numel()))
        small = image if scale == 1 else _resized(pixels, scale)
        found = self._hog(small, scale)
        if not _any_above(found, DOUBTFUL):
            found = self._hog(_resized(pixels, 2 * scale), 2 * scale) or found
        if _any_above(found, DOUBTFUL):
            return found
        turned = [f for turns in (1, 2, 3) for f in self._hog(small, scale, turns) if f.score > SURE]
        return turned or self._mmod(pixels) or found

    def _hog(self, image: np.ndarray, scale: float, turns: int = 0) -> list[Found]:
        rects, scores, _ = self.hog.run(_turned(image, turns), 1, 0.0)
        return [Found(self._full_size(r, scale), s, "hog", turns) for r, s in zip(rects, scores, strict=True)]

    def _mmod(self, pixels: Tensor) -> list[Found]:
        if self.mmod is None:
            return []
        scale = min(2.0, math.sqrt(MMOD_PIXELS / pixels[0].numel()))
        found = self.mmod(_resized(pixels, scale), 0)
        return [Found(self._full_size(d.rect, scale), d.confidence, "mmod") for d in found]

    def _full_size(self, rect, scale: float):
        return self.dlib.rectangle(*(round((e + 0.5) / scale - 0.5) for e in _edges(rect)))

    def _landmarks(self, image: np.ndarray, found: Found) -> Face:
        parts = self.predictor(_turned(image, found.turns), found.rect).parts()
        points = _turned_back(np.array([(p.x, p.y) for p in parts], np.float64), found.turns, image.shape)
        corners = _turned_back(np.array(_edges(found.rect), np.float64).reshape(2, 2), found.turns, image.shape)
        return Face(_bounds(corners), float(found.score), from_68(points), found.detector, points)


def find_models(folders: Iterable[str | Path]) -> tuple[Path | None, Path | None]:
    """The 68-point predictor and the MMOD detector in these folders or in face_recognition_models, by their content.

    A file that cannot be read is left out with a warning.
    """
    predictor = mmod = None
    for folder in [*map(Path, folders), *_packaged_models()]:
        for path in (p for p in files_below(folder) if p.suffix == ".dat"):
            try:
                with open(path, "rb") as f:
                    head = f.read(len(MMOD))
            except OSError as error:
                log.warning("%s", unreadable(path, error))
                continue
            predictor = predictor or (path if head.startswith(PREDICTOR_68) else None)
            mmod = mmod or (path if head == MMOD else None)
    return predictor, mmod


def from_68(points: Any) -> Landmarks:
    """dlib's (iBUG's) 68 points [68, 2] → the four."""
    p = np.asarray(points, dtype=np.float64)
    return Landmarks(*map(_xy, (p[36:42].mean(0), p[42:48].mean(0), p[48], p[54])))


def from_5(points: Any) -> Landmarks:
    """[5, 2] in the order of insightface and MTCNN: left eye, right eye, nose, left and right corner of the mouth."""
    p = np.asarray(points, dtype=np.float64)
    return Landmarks(*map(_xy, (p[0], p[1], p[3], p[4])))


def from_mediapipe(points: Any) -> Landmarks:
    """MediaPipe's face mesh [468 or 478, 2], whose coordinates are 0 at the photo's edge, not at a pixel's centre."""
    p = np.asarray(points, dtype=np.float64)[:, :2] - 0.5
    eyes = [p[list(i)].mean(0) for i in (MEDIAPIPE_EYE_LEFT, MEDIAPIPE_EYE_RIGHT)]
    return Landmarks(*map(_xy, (*eyes, *p[list(MEDIAPIPE_MOUTH)])))


def given_faces(landmarks: Any, frame: int = 0, order: str = "as-found") -> list[Face]:
    """Landmarks from elsewhere → faces: [68, 2], [5, 2], [478, 2], several stacked, or ComfyUI's FACE_LANDMARKS.

    frame: which picture of a FACE_LANDMARKS batch. Raises WPlusError for other shapes and for a frame without faces.
    """
    if isinstance(landmarks, dict):
        return in_order([_from_comfy(f) for f in _frame_of(landmarks, frame)], order)
    points = landmarks.detach().cpu().numpy() if isinstance(landmarks, Tensor) else np.asarray(landmarks)
    points = points[None] if points.ndim == 2 else points
    readers = {68: from_68, 5: from_5, 468: from_mediapipe, 478: from_mediapipe}
    if points.ndim != 3 or points.shape[1] not in readers or points.shape[2] < 2 or not len(points):
        raise WPlusError(f"landmarks: expected [68, 2], [5, 2] or [478, 2] points per face, got {list(points.shape)}")
    read = readers[points.shape[1]]
    return in_order([Face(_bounds(p), 1.0, read(p[:, :2])) for p in points], order)


def in_order(faces: Sequence[Face], order: str) -> list[Face]:
    """Faces by size (largest first), by place (left to right) or as they came; equal ones keep their order."""
    if order not in ORDERS:
        raise WPlusError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    keys = {"largest": lambda f: -f.size, "left-to-right": lambda f: f.box[0] + f.box[2], "as-found": lambda f: 0}
    return sorted(faces, key=keys[order])


def pick(faces: Sequence[Face], index: int) -> Face:
    """The face with this index, from 0; raises WPlusError that says how many there are."""
    if not 0 <= index < len(faces):
        were = "1 face was" if len(faces) == 1 else f"{len(faces)} faces were"
        raise WPlusError(f"face {index} was asked for, but {were} found; the first has index 0")
    return faces[index]


def _import_dlib():
    try:
        import dlib
    except ImportError as error:
        raise WPlusError(f"finding faces needs dlib ({error}). Install it with: {INSTALL}") from error
    return dlib


def _loaded(load: Callable[[str], Any], path: Path) -> Any:
    try:
        return load(str(path))
    except RuntimeError as error:
        raise FileError(path, f"a dlib model that is cut short or damaged ({error})", AGAIN) from error


def _packaged_models() -> list[Path]:
    # Not imported: the package needs pkg_resources, which setuptools no longer has.
    spec = importlib.util.find_spec("face_recognition_models")
    return [Path(p) / "models" for p in spec.submodule_search_locations or ()] if spec else []


def _resized(pixels: Tensor, scale: float) -> np.ndarray:
    size = [max(1, round(n * scale)) for n in pixels.shape[1:]]
    return to_uint8(F.interpolate(pixels[None].cpu(), size, mode="bilinear", antialias=True)[0])


def _any_above(found: Sequence[Found], score: float) -> bool:
    return any(f.score > score for f in found)


def _turned(image: np.ndarray, turns: int) -> np.ndarray:
    return np.ascontiguousarray(np.rot90(image, turns)) if turns else image


def _turned_back(points: np.ndarray, turns: int, shape: Sequence[int]) -> np.ndarray:
    """Points [N, 2] of an image after quarter turns to the left → points of the image, whose shape is (H, W, …)."""
    height, width = shape[:2]
    x, y = points.T
    return np.stack([(x, y), (width - 1 - y, x), (width - 1 - x, height - 1 - y), (y, height - 1 - x)][turns], axis=1)


def _edges(rect) -> tuple[int, int, int, int]:
    return rect.left(), rect.top(), rect.right(), rect.bottom()


def _frame_of(payload: dict, frame: int) -> list[dict]:
    frames = payload.get("frames")
    if frames is None:
        raise WPlusError(f"landmarks: expected FACE_LANDMARKS with 'frames', got a dict with {sorted(payload)}")
    if not 0 <= frame < len(frames):
        raise WPlusError(f"landmarks: picture {frame} was asked for, but they were made for {len(frames)}")
    if not frames[frame]:
        raise WPlusError(f"landmarks: no face was found in picture {frame}; use another photo or lower the confidence")
    return frames[frame]


def _from_comfy(face: dict) -> Face:
    box = tuple(round(float(v)) for v in face["bbox_xyxy"])
    return Face(box, float(face.get("score", 1.0)), from_mediapipe(face["landmarks_xy"]))


def _bounds(points: np.ndarray) -> tuple[int, int, int, int]:
    if not np.isfinite(points).all():
        raise WPlusError("landmarks hold NaN or infinite coordinates")
    (left, top), (right, bottom) = points[:, :2].min(0), points[:, :2].max(0)
    return round(left), round(top), round(right), round(bottom)


def _xy(point: np.ndarray) -> tuple[float, float]:
    return float(point[0]), float(point[1])
