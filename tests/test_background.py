"""Background removal against the reference's classes, and on masks that we know."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comfyui_wplus.wplus_core.background import REGIONS, Regions, parse, remove_background, resize
from comfyui_wplus.wplus_core.errors import WPlusError
from comfyui_wplus.wplus_core.parsing import CLASSES, FaceParser
from comfyui_wplus.wplus_core.photos import load_photo
from pictures import shared
from safetensors.torch import load_file
from seeded import seed_
from torch import Tensor, nn


class Fake(nn.Module):
    """Class by brightness of the picture: dark is background, middle is skin, bright is cloth."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.calls = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((tuple(x.shape), x.min().item(), x.max().item()))
        grey = x.mean(1)
        classes = torch.where(grey < -0.5, 0, torch.where(grey < 0.5, CLASSES.index("skin"), CLASSES.index("cloth")))
        return F.one_hot(classes, len(CLASSES)).movedim(-1, 1).float()


@pytest.fixture
def bands() -> Tensor:
    """Dark, middle and bright thirds from left to right, 512²."""
    x = torch.zeros(1, 3, 512, 512)
    x[..., 171:342], x[..., 342:] = 0.5, 1
    return x


def test_background_and_cloth_turn_white_and_the_face_stays(bands):
    clean, regions = remove_background(bands, Fake())
    assert clean.shape == (1, 3, 256, 256) and regions.classes.shape == (1, 512, 512)
    assert torch.allclose(clean[..., :83], torch.ones(())) and torch.allclose(clean[..., 174:], torch.ones(()))
    assert torch.allclose(clean[..., 90:166], torch.tensor(0.5), atol=1e-6)


def test_the_mask_is_blurred_by_five_pixels_then_halved(bands):
    """The step at 171 px, blurred with OpenCV's 5 taps (σ 1.1) and averaged over 2 px: m = 1 - (1 - x') / 0.5."""
    taps = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 1.1**2))
    step = (np.arange(160, 190) < 171).astype(float)
    blurred = np.convolve(step, taps / taps.sum(), "same")[4:24]
    wanted = (blurred[0::2] + blurred[1::2]) / 2
    mid_grey = torch.full_like(bands, 0.5)
    parser = Fake()
    regions = parse(bands, parser)
    clean, _ = remove_background(mid_grey, Replay(regions))
    assert np.allclose((clean[0, 0, 100, 82:92].numpy() - 0.5) / 0.5, wanted, atol=1e-4)


class Replay(Fake):
    def __init__(self, regions: Regions):
        super().__init__()
        self.logits = F.one_hot(regions.classes.long(), len(CLASSES)).movedim(-1, 1).float()

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


@pytest.mark.parametrize("size", [256, 700])
def test_the_parser_always_sees_512_in_minus_one_to_one_a_few_at_a_time(size):
    parser = Fake()
    x = torch.rand(5, 3, size, size)
    x[:, :, :9, :9], x[:, :, -9:, -9:] = 0, 1
    parse(x, parser, batch=2)
    assert [s for s, *_ in parser.calls] == [(2, 3, 512, 512)] * 2 + [(1, 3, 512, 512)]
    assert all(-1 <= low < -0.9 and 0.9 < high <= 1 for _, low, high in parser.calls)


def test_regions_cover_the_classes():
    regions = Regions(torch.arange(19, dtype=torch.uint8).reshape(1, 1, 19))
    assert regions.mask("eyes")[0, 0, 0].nonzero().flatten().tolist() == [4, 5]
    assert regions.mask("mouth")[0, 0, 0].nonzero().flatten().tolist() == [10, 11, 12]
    assert regions.mask("background")[0, 0, 0].nonzero().flatten().tolist() == [0, 18]
    assert torch.equal(regions.mask("hair", "eyes"), regions.mask("hair") + regions.mask("eyes"))
    assert torch.equal(regions.mask("left_ear", "right_ear", "earring"), regions.mask("ears"))
    assert regions.mask(*REGIONS).all()
    for bad in (("beard",), ()):
        with pytest.raises(WPlusError, match="regions: expected some of background, skin"):
            regions.mask(*bad)


def test_without_a_parser_the_plain_crop():
    x = torch.rand(2, 3, 256, 256)
    clean, regions = remove_background(x, None)
    assert torch.equal(clean, x) and regions is None


def test_resize_stays_in_range():
    x = (torch.rand(1, 3, 64, 64) > 0.5).float()
    assert 0 <= resize(x, 100).min() and resize(x, 100).max() <= 1
    assert resize(x, 64) is x


def test_nan_faces():
    with pytest.raises(WPlusError, match="aligned faces: holds NaN"):
        remove_background(torch.full((1, 3, 64, 64), float("nan")), Fake())


def test_the_reference_on_its_own_crop():
    golden = load_file(shared("golden/photo_to_w.safetensors"))
    crop = load_photo(shared("golden/aligned.png")).pixels[None]
    clean, regions = remove_background(crop, seed_(FaceParser(), 1, "parse."))
    assert (regions.classes[:, ::4, ::4] == golden["parse_classes_stride4"]).float().mean() >= 0.995
    assert (regions.mask("background")[0, 0] == golden["background_mask"]).float().mean() >= 0.995
    assert (clean[0] * 2 - 1 - golden["masked_image"].float()).abs().max() < 2.5 / 127.5  # theirs was rounded to 8 bit
