"""The face-parsing net."""

import pytest
import torch
from comfyui_wplus.wplus_core.errors import WPlusError
from comfyui_wplus.wplus_core.parsing import CLASSES, FaceParser, ParserConfig, ResidualUnit


def test_logits_for_every_pixel_and_class():
    parser = FaceParser(ParserConfig(channels=(8, 8, 16), body=1)).eval()
    assert parser(torch.randn(2, 3, 32, 48)).shape == (2, len(CLASSES), 32, 48)


def test_the_body_is_added_to_the_encoders_output():
    torch.manual_seed(0)
    parser = FaceParser(ParserConfig(channels=(8, 8), body=2)).eval()
    x = torch.randn(1, 3, 16, 16)
    features = parser.encoder(x)
    for unit in parser.body:
        torch.nn.init.zeros_(unit.conv2.norm.norm.weight)
        torch.nn.init.zeros_(unit.conv2.norm.norm.bias)
    torch.testing.assert_close(parser(x), parser.out_mask_conv(parser.decoder(2 * features)))


@pytest.mark.parametrize("scale, side", [("none", 8), ("down", 4), ("up", 16)])
def test_units_scale(scale, side):
    assert ResidualUnit(4, 6, scale)(torch.randn(1, 4, 8, 8)).shape == (1, 6, side, side)


@pytest.mark.parametrize("shape", [(3, 512, 512), (1, 3, 500, 512), (1, 1, 512, 512)])
def test_wrong_faces_are_named(shape):
    with pytest.raises(WPlusError, match="multiples of 16"):
        FaceParser()(torch.randn(shape))
