"""The crop against the reference's, and the identities that a warp and its way back obey."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comfyui_wplus.wplus_core.align import align, ffhq_transform, paste_back, project_mask, warp
from comfyui_wplus.wplus_core.errors import WPlusError
from comfyui_wplus.wplus_core.faces import Landmarks, from_68
from comfyui_wplus.wplus_core.photos import load_photo, to_uint8
from pictures import astronaut, psnr, shared
from PIL import Image
from safetensors.torch import load_file

FACE = Landmarks((205, 102), (240, 101), (208, 143), (243, 142))  # the astronaut's
LARGE = Landmarks((180, 200), (330, 220), (170, 370), (320, 390))
OVER = Landmarks((20, 40), (100, 36), (26, 130), (102, 126))  # beyond the left and the upper edge


@pytest.fixture(scope="module")
def photo():
    return astronaut()


def moved(face: Landmarks, matrix: np.ndarray) -> Landmarks:
    points = np.array([face.eye_left, face.eye_right, face.mouth_left, face.mouth_right])
    return Landmarks(*map(tuple, points @ matrix[:2, :2].T + matrix[:2, 2]))


def reference_crop(photo: torch.Tensor, face: Landmarks, size: int) -> torch.Tensor:
    """4096² samples of the quad by Pillow, shrunk by LANCZOS; 0.5 because Pillow counts from a pixel's edge."""
    c, x = face.axes()
    y = np.array([-x[1], x[0]])
    quad = np.stack([c - x - y, c - x + y, c + x + y, c + x - y]) + 0.5
    big = Image.fromarray(to_uint8(photo)).transform((4096, 4096), Image.QUAD, quad.flatten(), Image.BILINEAR)
    return torch.from_numpy(np.array(big.resize((size, size), Image.LANCZOS))).permute(2, 0, 1) / 255


def test_the_golden_crop():
    golden = load_file(shared("golden/photo_to_w.safetensors"))
    wanted = load_photo(shared("golden/aligned.png")).pixels
    ours = align(load_photo(shared("data/photos/1.jpg")).pixels, [from_68(golden["landmarks"][0])], 512, "black")
    assert psnr(ours.images[0], wanted) > 48


@pytest.mark.parametrize("face", [FACE, LARGE, OVER], ids=["small", "large", "over the edge"])
@pytest.mark.parametrize("size", [64, 256, 512])
def test_the_reference_way_from_a_large_shrinking_to_a_large_enlargement(photo, face, size):
    ours = align(photo, [face], size, "black").images[0]
    assert psnr(ours, reference_crop(photo, face, size)) > 41


def test_a_photo_ten_times_finer_than_the_crop(photo):
    fine = F.interpolate(photo[None], (3000, 3000), mode="bicubic")[0].clamp(0, 1)
    fine = (fine + 0.05 * torch.randn(fine.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    k = 3000 / 512
    face = moved(LARGE, np.array([[k, 0, (k - 1) / 2], [0, k, (k - 1) / 2], [0, 0, 1]]))
    assert psnr(align(fine, [face], 256, "black").images[0], reference_crop(fine, face, 256)) > 42


def test_an_upright_square_of_whole_pixels_is_that_square(photo):
    """Eyes 2 h apart and the mouth 2 h below: the half side is 4 h, the centre 0.2 h below the eyes."""
    h = 20
    face = Landmarks((200.5 - h, 150.5 - 4), (200.5 + h, 150.5 - 4), (200.5 - h, 150.5 + 36), (200.5 + h, 150.5 + 36))
    assert face.size == 8 * h
    crop = align(photo, [face], 8 * h).images[0]
    assert torch.allclose(crop, photo[:, 71:231, 121:281], atol=1e-4)


def test_the_corners_are_ffhqs():
    c, x = LARGE.axes()
    y = np.array([-x[1], x[0]])
    size = 100
    corners = np.array([[-0.5, -0.5, 1], [-0.5, 99.5, 1], [99.5, 99.5, 1], [99.5, -0.5, 1]])
    there = corners @ torch.linalg.inv(ffhq_transform(LARGE, size)).numpy().T
    assert np.allclose(there[:, :2], [c - x - y, c - x + y, c + x + y, c + x - y])


def test_the_reflection_is_blurred_and_the_photo_is_not():
    noise = torch.rand(3, 300, 300, generator=torch.Generator().manual_seed(0))
    face = Landmarks((130, 40), (170, 40), (134, 84), (166, 84))
    aligned = align(noise, [face], 256)
    edge = round((aligned.to_crop[0] @ torch.tensor([150, -0.5, 1.0]).double())[1].item())
    rough = aligned.images[0].diff(dim=-1).abs().mean((0, 2))
    assert 40 < edge < 128
    assert rough[: edge - 35].max() < 0.15 * rough[edge + 5 :].min()


def test_transform_and_inverse_cancel_and_carry_the_landmarks(photo):
    aligned = align(photo, [FACE, LARGE], 256)
    assert torch.allclose(aligned.to_crop @ aligned.to_photo, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))
    assert aligned.sides == pytest.approx([FACE.size, LARGE.size])
    for n, face in enumerate((FACE, LARGE)):
        left, right = (aligned.to_crop[n] @ torch.tensor([*p, 1.0]).double() for p in (face.eye_left, face.eye_right))
        assert (left + right)[0] / 2 == pytest.approx(127.5, abs=5)
        assert 90 < left[1] < 128 and left[0] < right[0]


@pytest.mark.parametrize("degrees", [-90, 17, 45, 180])
@pytest.mark.parametrize("scale", [0.7, 1.6])
def test_a_turned_and_scaled_photo_gives_the_same_crop(photo, degrees, scale):
    a, size = math.radians(degrees), 900
    r = scale * np.array([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]])
    matrix = np.eye(3)
    matrix[:2, :2], matrix[:2, 2] = r, np.array([size / 2, size / 2]) - r @ (222, 122)
    smooth = F.avg_pool2d(photo[None], 5, 1, 2)  # the two photos then hold the same picture
    turned = warp(smooth, torch.from_numpy(np.linalg.inv(matrix))[None], (size, size))[0]
    there = align(turned, [moved(FACE, matrix)], 128).images
    here = align(smooth[0], [FACE], 128).images
    assert psnr(here, there) > 40


@pytest.mark.parametrize("padding", ["reflect", "black"])
def test_a_batch_is_its_single_faces(photo, padding):
    faces = [FACE, LARGE, OVER]
    batch = align(photo, faces, 200, padding)
    for n, face in enumerate(faces):
        single = align(photo, [face], 200, padding)
        assert torch.allclose(batch.images[n], single.images[0], atol=1e-6)
        assert torch.equal(batch[n].to_crop, single.to_crop)


def test_black_outside_and_a_reflection_that_joins_smoothly(photo):
    photo = F.avg_pool2d(photo[None], 9, 1, 4, count_include_pad=False)[0]
    black, reflect = (align(photo, [OVER], 256, p) for p in ("black", "reflect"))
    left_edge = (black.to_crop[0] @ torch.tensor([-0.5, 60, 1.0]).double())[:2].round().long().tolist()
    row, column = left_edge[1], left_edge[0]
    assert black.images[0, :, row, : column - 3].max() == 0
    assert reflect.images[0, :, row, : column - 3].min() > 0.01
    jump = reflect.images[0, :, row].diff(dim=-1).abs()[:, column - 4 : column + 4].max()
    assert jump < 0.1 < black.images[0, :, row].diff(dim=-1).abs()[:, column - 4 : column + 4].max()
    inside = align(photo, [FACE], 256, "black").images - align(photo, [FACE], 256, "reflect").images
    assert inside.abs().max() == 0


@pytest.mark.parametrize("face", [FACE, LARGE, OVER], ids=["small", "large", "over the edge"])
def test_crop_then_paste_back_is_the_photo(photo, face):
    aligned = align(photo, [face], 1024)
    pasted = paste_back(photo, aligned.images, aligned)
    inside = project_mask(torch.ones(1, 1, 1024, 1024), aligned)[0, 0]
    assert inside.sum() > 5000 and psnr(pasted[:, inside > 0], photo[:, inside > 0]) > 33
    assert torch.equal(pasted[:, inside == 0], photo[:, inside == 0])


def test_paste_back_changes_the_face_and_feathers_the_edge():
    photo = torch.full((3, 512, 512), 0.7)
    aligned = align(photo, [FACE], 256)
    red = torch.zeros(1, 3, 512, 512)  # another size than the crop's, as a generator's picture may have
    red[:, 0] = 1
    pasted = paste_back(photo, red, aligned, feather=0.2)
    c, x = FACE.axes()
    assert torch.allclose(pasted[:, round(c[1]), round(c[0])], torch.tensor([1.0, 0, 0]), atol=1e-3)
    blue = pasted[2, round(c[1]), round(c[0] - np.hypot(*x)) : round(c[0])]
    assert blue[0] > 0.65 and (blue.diff().abs() < 0.06).all()  # from the photo's grey to 0, without a step
    half = torch.zeros(1, 1, 256, 256)
    half[..., 128:] = 1
    masked = paste_back(photo, red, aligned, mask=half)
    assert torch.equal(masked[:, :, : round(c[0]) - 12], photo[:, :, : round(c[0]) - 12])


def test_a_projected_mask_lies_on_its_pixels(photo):
    """A disc around the crop's centre: right area, right place, nothing else."""
    size = 256
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    disc = ((x - 127.5) ** 2 + (y - 127.5) ** 2 < 64**2).float()[None, None]
    aligned = align(photo, [FACE], size)
    there = project_mask(disc, aligned)
    k = FACE.size / size
    assert there.shape == (1, 1, 512, 512) and 0 <= there.min() and there.max() <= 1.01
    assert there.sum().item() == pytest.approx(disc.sum().item() * k * k, rel=0.01)
    columns, rows = there[0, 0].sum(0), there[0, 0].sum(1)
    centre = [(v * torch.arange(512)).sum() / v.sum() for v in (columns, rows)]
    assert np.allclose(centre, FACE.axes()[0], atol=0.1)


def test_crops_of_one_pixel_photos_and_faces_larger_than_the_photo():
    x = torch.full((3, 1, 1), 0.25)
    face = Landmarks((-2, -2), (2, -2), (-2, 2), (2, 2))
    assert torch.allclose(align(x, [face], 32).images, torch.tensor(0.25), atol=1e-5)


def test_half_precision_photo(photo):
    assert align(photo.half(), [FACE], 64).images.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(faces=[]), "at least one face"),
        (dict(padding="mirror"), "padding must be one of reflect, black, got 'mirror'"),
        (dict(size=0), "a size of at least 1"),
        (dict(photo=torch.full((3, 300, 300), math.nan)), "NaN"),
        (dict(photo=torch.rand(300, 300, 3)), r"expected an RGB tensor \[3, H, W\]"),
        (dict(photo=torch.rand(3, 40, 40)), "lies outside the photo of 40 x 40"),
    ],
)
def test_bad_input(change, says):
    with pytest.raises(WPlusError, match=says):
        align(**{"photo": torch.rand(3, 300, 300), "faces": [FACE], "size": 64, **change})


def test_what_does_not_fit_the_crops_is_refused(photo):
    aligned = align(photo, [FACE], 64)
    for images in (torch.rand(2, 3, 64, 64), torch.rand(1, 3, 64, 32)):
        with pytest.raises(WPlusError, match=r"images: expected \[1, C, S, S\]"):
            paste_back(photo, images, aligned)
    with pytest.raises(WPlusError, match="photo: the faces come from one of"):
        paste_back(photo[:, :100], aligned.images, aligned)
    with pytest.raises(WPlusError, match="feather is a fraction"):
        paste_back(photo, aligned.images, aligned, feather=20)
    with pytest.raises(WPlusError, match="mask: expected"):
        project_mask(torch.ones(64, 64), aligned)
