"""Views of a photo: the face whole and where the mask says, the window full, all as the paper has it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comfyui_wplus.train.draws import stream
from comfyui_wplus.train.views import View, Views, corners, from_jpeg, scaling, similarity, to_jpeg
from comfyui_wplus.wplus_core.align import align, project_mask, warp
from comfyui_wplus.wplus_core.errors import WPlusError
from comfyui_wplus.wplus_core.faces import given_faces
from pictures import astronaut, psnr

FACE = given_faces(np.array([(205, 102), (240, 101), (224, 122), (208, 143), (243, 142)]))[0]
PLAIN = Views(scale=(1, 1), rotation=0, jitter=0, erode=1, blur=1)


@pytest.fixture(scope="module")
def photo():
    return astronaut()


@pytest.fixture(scope="module")
def to_mask(photo):
    return align(photo, [FACE.landmarks], 128).to_crop[0]


def quad_in(view: View, to_mask):
    """The face's corners [4, 2] in the training picture."""
    points = F.pad(corners(to_mask, 128), (0, 1), value=1.0) @ torch.linalg.inv(view.to_photo).mT
    return points[:, :2]


def test_corners_are_those_of_the_crop(to_mask):
    centre, x = FACE.landmarks.axes()
    y = np.array([-x[1], x[0]])
    wanted = [centre - x - y, centre + x - y, centre + x + y, centre - x + y]
    assert np.allclose(corners(to_mask, 128), wanted, atol=1e-6)


def test_the_plain_view_of_a_square_photo_is_the_photo(photo, to_mask):
    view = PLAIN.draw(stream(0), photo.shape[1:], corners(to_mask, 128))
    assert torch.allclose(view.to_photo, torch.eye(3, dtype=torch.float64), atol=1e-9)
    picture, face = PLAIN.render(view, photo, torch.ones(1, 128, 128), to_mask)
    assert psnr(picture, photo) > 80
    projected = project_mask(torch.ones(1, 1, 128, 128), align(photo, [FACE.landmarks], 128))[0]
    assert (face - projected).abs().mean() < 1e-3


@pytest.mark.parametrize("shape", [(512, 512), (512, 900), (1000, 480), (3000, 2000)])
@pytest.mark.parametrize("scale", [(0.8, 1.2), (1.0, 1.6)])
def test_the_face_is_whole_and_the_window_full_in_every_view(shape, scale, to_mask):
    views = Views(scale=scale)
    face = corners(to_mask, 128)
    for n in range(60):
        view = views.draw(stream(n), shape, face)
        quad = quad_in(view, to_mask)
        assert quad.min() > -0.51 and quad.max() < 511.51
        zoom = 1 / view.to_photo[:2, :2].det().sqrt() / (512 / min(shape))
        least = 64 / FACE.size / (512 / min(shape))
        assert max(scale[0], least) - 1e-9 <= zoom <= max(scale[1], least) + 1e-9
        assert abs(torch.atan2(view.to_photo[0, 1], view.to_photo[0, 0])) <= np.deg2rad(10) + 1e-9
        centre = view.to_photo @ torch.tensor([255.5, 255.5, 1], dtype=torch.float64)
        reach = 256 / zoom / (512 / min(shape))
        inside = [reach <= c + 0.5 + 1e-6 and c + 0.5 <= length - reach + 1e-6
                  for c, length in zip(centre[:2], reversed(shape), strict=True)]  # fmt: skip
        at_the_edge = quad.min() < 0.5 or quad.max() > 510.5  # else the face would be cut
        assert all(inside) or zoom < 1 or at_the_edge


def test_a_face_larger_than_the_window_is_shown_smaller_and_a_tiny_one_larger(to_mask):
    face = corners(to_mask, 128)
    large = (face - face.mean(0)) * 4 + 256
    extent = [quad_of(Views(scale=(2, 2)).draw(stream(n), (512, 512), large), large) for n in range(20)]
    assert all(q.min() > -0.51 and q.max() < 511.51 for q in extent)
    tiny = (face - face.mean(0)) / 10 + 200
    for n in range(20):
        q = quad_of(Views(smallest=64).draw(stream(n), (512, 512), tiny), tiny)
        assert (q[1] - q[0]).norm() == pytest.approx(64)


def quad_of(view, quad):
    return (F.pad(quad, (0, 1), value=1.0) @ torch.linalg.inv(view.to_photo).mT)[:, :2]


def test_the_face_stays_under_its_mask_when_it_is_turned_and_scaled(photo, to_mask):
    """A picture whose face is painted is, seen through any view, its own mask."""
    painted = project_mask(torch.ones(1, 1, 128, 128), align(photo, [FACE.landmarks], 128))[0]
    views = Views(jitter=0, erode=1, blur=1)
    for n in range(5):
        view = views.draw(stream(n), photo.shape[1:], corners(to_mask, 128))
        picture, face = views.render(view, painted.expand(3, -1, -1), torch.ones(1, 128, 128), to_mask)
        inside = warp(torch.ones(1, 1, 512, 512), view.to_photo[None], (512, 512))[0]  # not the photo's reflection
        assert ((picture[:1] - face) * inside).abs().mean() < 2e-3


def test_the_mask_is_eroded_and_blurred_by_the_papers_kernels():
    face = torch.zeros(1, 200, 200)
    face[:, 50:150, 50:] = 1
    eroded = Views(blur=1).soften(face)[0]
    rows, columns = eroded.any(1).nonzero().flatten(), eroded.any(0).nonzero().flatten()
    assert len(rows) == 100 - 31 and columns[-1] == 199 and len(columns) in (150 - 15, 150 - 16)
    soft = Views().soften(face)[0]
    taps = np.exp(-(np.arange(-3, 4) ** 2) / (2 * 1.4**2))
    step = np.convolve(eroded[:, 190].numpy(), taps / taps.sum(), "same")
    assert np.allclose(soft[:, 190], step, atol=1e-5)


def test_views_are_a_function_of_the_seed_alone_and_differ(to_mask):
    face = corners(to_mask, 128)
    a, b, c = (Views().draw(stream(0, VIEW, k), (512, 512), face) for VIEW, k in ((3, 0), (3, 0), (3, 1)))
    assert torch.equal(a.to_photo, b.to_photo) and a.jitter == b.jitter
    assert not torch.equal(a.to_photo, c.to_photo) and a.jitter != c.jitter
    factors = [f for n in range(50) for _, f in Views().draw(stream(n), (512, 512), face).jitter]
    assert 0.8 <= min(factors) < 0.82 and 1.18 < max(factors) <= 1.2


def test_similarity_puts_the_centre_where_it_was_asked_for():
    to_photo = similarity([30.0, 40.0], [100.0, 7.0], 2.0, 0.3)
    point = to_photo @ torch.tensor([100.0, 7.0, 1], dtype=torch.float64)
    assert point.tolist() == pytest.approx([30, 40, 1])
    assert to_photo[:2, :2].det() == pytest.approx(0.25)


def test_scaling_maps_the_edges_to_the_edges():
    first, last = (scaling(2, 3) @ torch.tensor([x, x, 1], dtype=torch.float64) for x in (-0.5, 9.5))
    assert first.tolist() == [-0.5, -0.5, 1] and last.tolist() == [19.5, 29.5, 1]


def test_a_photo_comes_back_from_its_file(photo):
    bytes_ = to_jpeg((photo * 255).round().byte())
    assert psnr(from_jpeg(bytes_) / 255, photo) > 38 and len(bytes_) < 200_000


@pytest.mark.parametrize("wrong", [{"scale": (1.2, 0.8)}, {"size": 100}, {"blur": 6}, {"jitter": 1}, {"smallest": 600}])
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(WPlusError, match="expected"):
        Views(**wrong)
