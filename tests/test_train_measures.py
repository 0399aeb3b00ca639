"""What is measured of pictures, against the formulas written out, on planted pictures and real photos."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comfyui_wplus.train.measures import (
    BackgroundChange,
    ClipScore,
    Detection,
    DlibFaces,
    Fid,
    IdentityDistance,
    Lpips,
    Moved,
    MtcnnFaces,
    Picture,
    Remembered,
    Shown,
    face_square,
)
from comfyui_wplus.train.recognisers import TEMPLATE, ArcFace, arcface_crop, load_recogniser
from comfyui_wplus.wplus_core.directions import Direction
from comfyui_wplus.wplus_core.encoder import EncoderConfig
from comfyui_wplus.wplus_core.errors import FileError, WPlusError
from comfyui_wplus.wplus_core.faces import Landmarks
from comfyui_wplus.wplus_core.parsing import CLASSES
from evaluation import small_clip, torchscript_recogniser
from pictures import astronaut

FACE = Landmarks((40.0, 40.0), (60.0, 40.0), (42.0, 62.0), (58.0, 62.0))


def picture(key="a", size=96):
    return Picture(key, torch.rand(3, size, size))


def shown(a, reference=None, before=None, prompt="a face", **edit):
    return Shown(a, prompt, "someone", reference, before, **edit)


def at_face(picture):
    return FACE


def same(a, b):
    return a == pytest.approx(b, nan_ok=True)


def test_detection_is_a_share_of_the_pictures():
    finds = Detection(lambda p: FACE if p.key == "a" else None)
    assert finds([shown(picture("a")), shown(picture("b"))]) == {"detection": [1.0, 0.0]}


def test_a_picture_is_looked_at_once():
    looked = []
    detector = Remembered(lambda p: looked.append(p.key))
    for key in "aba":
        detector(picture(key))
    assert looked == ["a", "b"]


def test_the_crop_brings_the_points_to_their_places():
    photo = torch.zeros(3, 96, 96)
    for n, (x, y) in enumerate((FACE.eye_left, FACE.eye_right, FACE.mouth_left)):
        photo[n, int(y), int(x)] = 1
    crop = arcface_crop(photo, FACE)
    for channel, place in zip(crop, TEMPLATE, strict=False):
        y, x = divmod(int(channel.argmax()), 112)
        assert math.dist((x, y), place) < 4  # the template's face is a little narrower than this one


def test_the_crop_of_a_face_that_lies_as_the_template_is_the_picture():
    photo = F.interpolate(torch.rand(1, 3, 14, 14), (112, 112), mode="bilinear")[0]
    assert (arcface_crop(photo, Landmarks(*TEMPLATE)) - photo).abs().max() < 1e-4
    turned = [(111 - y, x) for x, y in TEMPLATE]
    assert (arcface_crop(photo.rot90(-1, (1, 2)), Landmarks(*turned)) - photo).abs().max() < 1e-4


def test_identity_distance_is_one_minus_the_cosine():
    vectors = {"a": [1.0, 0.0], "b": [0.6, 0.8], "c": [-1.0, 0.0]}
    pictures = {k: Picture(k, torch.full((3, 96, 96), 0.1 * (n + 1))) for n, k in enumerate([*vectors, "no face"])}

    def recogniser(faces):
        return torch.stack([torch.tensor(vectors["abc"[round(float(f.mean() * 10)) - 1]]) for f in faces])

    a, b, c, none = pictures.values()
    measure = IdentityDistance(recogniser, lambda p: FACE if p.key in vectors else None)
    got = measure([shown(a, a), shown(a, b, c), shown(b, c, a), shown(none, a), shown(a, none)])
    assert same(got["id"], [0, 0.4, 1.6, math.nan, math.nan])
    assert same(got["id_kept"], [math.nan, 2, 0.4, math.nan, math.nan])
    assert same(got["top1"], [math.nan] * 5)
    gallery = [("someone", b), ("another", c), ("faceless", none)]
    measure = IdentityDistance(recogniser, measure.detector, gallery)
    assert same(measure([shown(a), shown(b), shown(c), shown(none)])["top1"], [1.0, 1.0, 0.0, math.nan])


def test_background_change_is_what_changed_outside_the_face():
    before, square = picture("before"), face_square(FACE, (96, 96))
    assert square.sum() == pytest.approx((0.8 * FACE.size) ** 2, rel=0.02) and square[50, 50] == 1
    measure = BackgroundChange(at_face)
    for inside, outside in ((0.3, 0.0), (0.0, 0.2), (0.1, 0.05)):
        moved = Picture(f"{inside}", before.pixels + inside * square + outside * (1 - square))
        got = measure([shown(moved, before=before, edit="smile", strength=1.0)])
        assert same(got["background_change"], [outside]) and same(got["face_change"], [inside])


def test_there_is_no_background_change_without_edit_face_or_background():
    close = Landmarks((10.0, 20.0), (80.0, 20.0), (15.0, 95.0), (75.0, 95.0))
    for detector, before in ((at_face, None), (lambda p: None, picture("b")), (lambda p: close, picture("b"))):
        assert same(BackgroundChange(detector)([shown(picture(), before=before)])["background_change"], [math.nan])


def test_with_a_parser_the_head_is_what_it_says():
    class HairOnTop(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one = torch.nn.Parameter(torch.ones(1))

        def forward(self, x):
            logits = torch.zeros(len(x), len(CLASSES), 512, 512)
            logits[:, CLASSES.index("hair"), :256] = 1
            return logits

    head = BackgroundChange(at_face, HairOnTop()).head(picture().pixels, FACE)
    centre = FACE.axes()[0]
    assert head[int(centre[1]) - 8, int(centre[0])] == 1 and head[int(centre[1]) + 8, int(centre[0])] == 0


def test_how_far_the_face_moved_is_in_units_of_strength():
    rng = torch.Generator().manual_seed(0)
    smile = Direction("smile", torch.randn(18, 512, generator=rng), layers=(0, 8))
    measure = Moved(None, {"smile": smile}, at_face)
    w = torch.randn(18, 512, generator=rng)
    across = torch.randn(18, 512, generator=rng)
    across -= (across * smile.rows(18)).sum() / smile.rows(18).square().sum() * smile.rows(18)
    measure.known = {"before": w, "after": w + 1.7 * smile.unit * smile.rows(18) + across}
    moved = shown(picture("after"), before=picture("before"), edit="smile", strength=2.0)
    assert measure([moved])["moved"] == [pytest.approx(1.7, rel=1e-4)]


def test_clip_score_is_clips_own_cosine(tmp_path):
    measure = ClipScore(small_clip(tmp_path / "clip"))
    pictures = [picture(size=40), picture("b", 40)]
    got = measure([shown(p, prompt=t) for p, t in zip(pictures, ("a face", "a longer text, longer"), strict=True)])
    images = measure.images([(p.pixels * 255).round().byte() for p in pictures], return_tensors="pt").pixel_values
    for n, text in enumerate(("a face", "a longer text, longer")):
        ids = measure.tokens([text], return_tensors="pt")
        logits = measure.model(**ids, pixel_values=images[n, None]).logits_per_image
        assert got["clip"][n] == pytest.approx(float(logits / measure.model.logit_scale.exp()), abs=1e-5)


def test_lpips_is_zhangs_formula(tmp_path):
    models, tm = pytest.importorskip("torchvision.models"), pytest.importorskip("torchmetrics")
    alexnet = models.alexnet(weights=None).eval()
    torch.save({k: x for k, x in alexnet.state_dict().items() if k.startswith("features")}, tmp_path / "alexnet.pth")
    heads = torch.load(f"{tm.__path__[0]}/functional/image/lpips_models/alex.pth", map_location="cpu")
    a, b = picture(size=64), picture("b", 64)

    def features(x):
        shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
        x, found = ((2 * x.pixels - 1 - shift[:, None, None]) / scale[:, None, None])[None], []
        for i, layer in enumerate(alexnet.features):
            x = layer(x)
            found += [F.normalize(x)] if i in (1, 4, 7, 9, 11) else []
        return found

    layers = enumerate(zip(features(a), features(b), strict=True))
    expected = sum(F.conv2d((x - y).square(), heads[f"lin{n}.model.1.weight"]).mean() for n, (x, y) in layers)
    measure = Lpips(tmp_path / "alexnet.pth")
    got = measure([shown(a, b), shown(a, a), shown(a), shown(a, b, a, edit="smile", strength=1.0)])["lpips"]
    assert same(got, [expected.item(), 0.0, math.nan, math.nan]) and got[0] > 1e-3


class ThreeColours(torch.nn.Module):
    num_features = 3

    def forward(self, x):
        return x.float().mean((2, 3)) / 255


def test_fid_is_the_distance_of_two_gaussians():
    pytest.importorskip("torchmetrics")
    rng = np.random.default_rng(0)
    real, made = (torch.tensor(rng.uniform(0, 1, (n, 3, 1, 1))).float().expand(-1, 3, 8, 8) for n in (40, 30))
    fid = Fid(ThreeColours(), real.split(7))
    a, b = ((x[:, :, 0, 0] * 255).round().double() / 255 for x in (real, made))
    roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).sqrt().real.sum()
    expected = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * roots
    for _ in range(2):  # one method after the other
        assert fid(made.split(8))["fid"] == pytest.approx(float(expected), rel=1e-3)
    assert fid(real.split(8))["fid"] == pytest.approx(0, abs=1e-6)
    assert fid([made[:1]]) == {}
    with pytest.raises(WPlusError, match="at least two"):
        Fid(ThreeColours(), [real[:1]])


def test_a_face_is_found_in_a_photo_and_not_in_noise():
    pytest.importorskip("dlib")
    detector = DlibFaces()
    photo, noise = Picture("photo", astronaut()), picture("noise", 128)
    assert Detection(detector)([shown(photo), shown(noise)])["detection"] == [1.0, 0.0]
    assert 160 < detector(photo).size < 320


def test_mtcnn_finds_the_face_that_dlib_finds():
    pytest.importorskip("facenet_pytorch", reason="pip install --no-deps facenet-pytorch")
    photo = Picture("photo", astronaut())
    a, b = MtcnnFaces()(photo), DlibFaces()(photo)
    assert math.dist(a.eye_left, b.eye_left) < 5 and math.dist(a.mouth_right, b.mouth_right) < 5
    assert MtcnnFaces()(picture("noise", 128)) is None


def small_arcface():
    torch.manual_seed(0)
    return ArcFace(EncoderConfig(units=(1, 1, 1, 1), channels=(16, 32, 48, 64)), dim=24).eval()


def test_the_weights_of_an_ir_se_are_a_recogniser(tmp_path):
    network, faces = small_arcface(), torch.rand(2, 3, 112, 112)
    torch.save(network.state_dict(), tmp_path / "ir_se.pth")
    got = load_recogniser(tmp_path / "ir_se.pth")(faces)
    torch.testing.assert_close(got, F.normalize(network(2 * faces - 1)))
    torch.save({k: x for k, x in network.state_dict().items() if "body.2" not in k}, tmp_path / "cut.pth")
    with pytest.raises(FileError, match="missing"):
        load_recogniser(tmp_path / "cut.pth")


def test_the_published_ir_se_50_fits():
    with torch.device("meta"):
        shapes = {k: tuple(x.shape) for k, x in ArcFace(EncoderConfig()).state_dict().items()}
    assert shapes["output_layer.3.weight"] == (512, 25088) and len([k for k in shapes if "res_layer.1.w" in k]) == 24


def test_a_torchscript_program_runs_only_when_it_is_trusted(tmp_path):
    path, faces = torchscript_recogniser(tmp_path / "colours.pt"), torch.rand(2, 3, 112, 112)
    with pytest.raises(FileError, match="trust-torchscript"):
        load_recogniser(path)
    expected = F.normalize(F.adaptive_avg_pool2d(2 * faces - 1, 3).flatten(1))
    torch.testing.assert_close(load_recogniser(path, trust=True)(faces), expected)


@pytest.mark.parametrize("batch", ["B", 1])
def test_an_onnx_recogniser(tmp_path, batch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    value = onnx.helper.make_tensor_value_info
    nodes = [onnx.helper.make_node("GlobalAveragePool", ["x"], ["p"]), onnx.helper.make_node("Flatten", ["p"], ["y"])]
    given, out = value("x", 1, [batch, 3, 112, 112]), value("y", 1, [batch, 3])
    model = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, "g", [given], [out]),
        ir_version=8,
        opset_imports=[onnx.helper.make_opsetid("", 13)],
    )
    onnx.save(model, tmp_path / "means.onnx")
    faces = torch.rand(3, 3, 112, 112)
    got = load_recogniser(tmp_path / "means.onnx")(faces)
    torch.testing.assert_close(got, F.normalize(2 * faces.mean((2, 3)) - 1), atol=1e-5, rtol=1e-4)
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "means.onnx").read_bytes()[:40])
    with pytest.raises(FileError, match="damaged ONNX"):
        load_recogniser(tmp_path / "cut.onnx")


def test_every_missing_file_says_what_to_get(tmp_path):
    nothing, other = tmp_path / "nothing", tmp_path / "other.pth"
    torch.save({"layer.weight": torch.zeros(2, 2)}, other)
    for make, words in (
        (lambda: load_recogniser(nothing), "w600k_r50.onnx"),
        (lambda: load_recogniser(other), "model_ir_se50.pth"),
        (lambda: ClipScore(nothing), "openai/clip-vit-large-patch14"),
        (lambda: Lpips(other), "alexnet-owt-7be5be79.pth"),
        (lambda: Fid(nothing, []), "inception"),
    ):
        with pytest.raises(WPlusError, match=words):
            make()
