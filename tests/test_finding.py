"""Finding directions: a planted one comes back, chance is called chance, PCA and SeFA against their definitions."""

import builtins

import numpy as np
import pytest
import torch
from comfyui_wplus.wplus_core.checkpoints import save_identity
from comfyui_wplus.wplus_core.direction_files import spread_of
from comfyui_wplus.wplus_core.errors import FileError, WPlusError
from comfyui_wplus.wplus_core.finding import (
    contact_sheet,
    find_direction,
    folder_codes,
    pca,
    scored_codes,
    sefa,
)
from comfyui_wplus.wplus_core.identity import Identity
from comfyui_wplus.wplus_core.sheets import to_tensor
from comfyui_wplus.wplus_core.stylegan2 import Generator, GeneratorConfig
from pictures import shared

needs_sklearn = pytest.mark.skipif(
    pytest.importorskip("importlib.util").find_spec("sklearn") is None, reason="scikit-learn is not installed"
)


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0).item()


def labelled(planted, count=100, step=3.0, noise=0.3, seed=0):
    """Codes [count, 18, 512] with and without the planted direction [512] or [18, 512], in W's kind of noise."""
    rng = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(512, 40, generator=rng))[0].T
    std = torch.linspace(2.5, 0.5, 40)
    person = (torch.randn(2, count, 1, 40, generator=rng) * std) @ basis
    w = person + noise * torch.randn(2, count, 18, 512, generator=rng)
    return w[0] + step * planted, w[1] - step * planted


def unit_vector(*shape, seed=9):
    v = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return v / v.norm(dim=-1, keepdim=True)


@needs_sklearn
@pytest.mark.parametrize("method", ["svm", "logistic"])
def test_a_planted_direction_comes_back_from_200_codes(method):
    planted = unit_vector(512)
    found = find_direction(*labelled(planted), "beard", method)
    d = found.direction
    assert d.vector.shape == (1, 512) and cosine(d.vector, planted) >= 0.95
    assert d.unit == pytest.approx(1, rel=1e-5) and found.counts == (100, 100) and found.chance == 0.5
    assert found.accuracy > 0.97 and f"accuracy {found.accuracy:.3f} (chance 0.500)" in d.source


@needs_sklearn
def test_a_planted_direction_per_layer():
    planted = unit_vector(18, 512)
    planted[8:] = 0
    d = find_direction(*labelled(planted), "beard", layers=(0, 8), per_layer=True).direction
    assert d.vector.shape == (18, 512) and d.layers == (0, 8) and d.vector[8:].abs().max() == 0
    assert cosine(d.vector[:8], planted[:8]) >= 0.95 and d.unit == pytest.approx(1.5, rel=1e-4)  # sqrt(18 / 8)


@needs_sklearn
def test_labels_that_mean_nothing_are_at_chance():
    w = torch.randn(120, 18, 512, generator=torch.Generator().manual_seed(1))
    found = find_direction(w[:60], w[60:], "nothing")
    assert abs(found.accuracy - 0.5) < 0.15


@needs_sklearn
def test_the_accuracy_is_of_codes_not_seen():
    """60 codes in 512 dimensions are parted without error by some boundary whatever their labels."""
    positive, negative = labelled(unit_vector(512), 30, step=0.1)
    assert find_direction(positive, negative, "weak").accuracy < 0.8


@pytest.mark.parametrize(
    "positive, negative, message",
    [
        (torch.randn(4, 18, 512), torch.randn(9, 18, 512), "at least 5 codes with .* got 4 and 9"),
        (torch.randn(9, 18, 512), torch.randn(9, 14, 512), "two sets of codes"),
        (torch.randn(9, 512), torch.randn(9, 512), "two sets of codes"),
        (torch.full((9, 18, 512), float("nan")), torch.randn(9, 18, 512), "NaN"),
    ],
)
def test_wrong_sets_are_told(positive, negative, message):
    with pytest.raises(WPlusError, match=message):
        find_direction(positive, negative, "x")


@needs_sklearn
def test_wrong_settings_are_told():
    w = torch.randn(9, 18, 512)
    with pytest.raises(WPlusError, match="18 layers have none in 18-19"):
        find_direction(w, w + 1, "x", layers=(18, 20))
    with pytest.raises(WPlusError, match='"svm" or "logistic"'):
        find_direction(w, w + 1, "x", method="forest")
    with pytest.raises(WPlusError, match="all codes are the same"):
        find_direction(torch.ones_like(w), torch.ones_like(w), "x")


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    real_import = builtins.__import__

    def without(name, *args):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real_import(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(WPlusError, match="pip install scikit-learn"):
        find_direction(torch.randn(9, 18, 512), torch.randn(9, 18, 512), "x")


# Labelled files


@pytest.fixture
def files(tmp_path):
    for i in range(6):
        save_identity(Identity(torch.full((1 + (i == 5), 4, 512), float(i))), tmp_path / "codes" / f"{i}.safetensors")
    torch.save(torch.full((1, 4, 512), 6.0), tmp_path / "codes" / "6.pth")
    (tmp_path / "codes" / "notes.txt").write_text("x")
    return tmp_path


def first_numbers(w):
    return w[:, 0, 0].tolist()


def test_a_folders_codes(files):
    assert first_numbers(folder_codes(files / "codes")) == [0, 1, 2, 3, 4, 5, 5, 6]
    (files / "empty").mkdir()
    with pytest.raises(FileError, match="wplus_core.encode"):
        folder_codes(files / "empty")
    save_identity(Identity(torch.randn(1, 6, 512)), files / "codes" / "7.safetensors")
    with pytest.raises(FileError, match=r"7.safetensors: codes \[6, 512\] beside \[4, 512\]"):
        folder_codes(files / "codes")


def table(files, scores, header="file,score\n"):
    path = files / "scores.csv"
    path.write_text(header + "".join(f"codes/{i}.safetensors,{s}\n" for i, s in enumerate(scores)))
    return path


def test_scores_part_at_both_ends(files):
    path = table(files, [0.1, 0.9, 0.2, 0.8, 0.5])
    high, low = scored_codes(path, 0.4)
    assert first_numbers(high) == [3, 1] and first_numbers(low) == [0, 2]


def test_two_scores_are_labels(files):
    high, low = scored_codes(table(files, [1, 0, 0, 1, 0], header=""), 0.1)
    assert first_numbers(high) == [0, 3] and first_numbers(low) == [1, 2, 4]


@pytest.mark.parametrize(
    "scores, share, message",
    [
        ([1, 1, 1], 0.5, "1 different scores"),
        ([1, "many", 2], 0.5, "lines of identity file, score"),
        ([1, "nan", 2], 0.5, "NaN"),
        ([1, 2, 2, 2, 2, 3], 0.5, "on both sides"),
        ([1, 2, 3], 0.9, "share of files"),
    ],
)
def test_wrong_tables_are_told(files, scores, share, message):
    with pytest.raises(WPlusError, match=message):
        scored_codes(table(files, scores), share)


# From a generator


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return Generator(GeneratorConfig.for_size(32, max_channels=16)).eval()


def test_pca_against_numpy(generator):
    found = pca(generator, 10, samples=1200, seed=4)
    z = torch.randn(1200, 512, generator=torch.Generator().manual_seed(4))
    w = generator.mapping(z).detach().double().numpy()
    _, s, v = np.linalg.svd(w - w.mean(0), full_matrices=False)
    for k, d in enumerate(found):
        assert abs(cosine(d.vector[0].double(), torch.from_numpy(v[k]))) > 0.999, k
        assert d.vector.norm().item() == pytest.approx(s[k] / np.sqrt(1199), rel=1e-4)
        assert np.allclose(d.origin.numpy(), w.mean(0), atol=1e-5)
    assert [d.name for d in found[:2]] == ["component_0", "component_1"]


def test_pca_is_the_spread_of_w(generator):
    spread = spread_of(pca(generator, 512, samples=4000))
    z = torch.randn(200, 512, generator=torch.Generator().manual_seed(1))  # the weights were drawn with seed 0
    w = generator.mapping(z)[:, None]
    assert spread.distance(w).mean().item() == pytest.approx(1, abs=0.1)


def test_sefa_finds_what_the_modulation_reacts_to(generator):
    planted = unit_vector(512)
    strong = Generator(generator.config).eval()
    with torch.no_grad():
        for conv in (strong.convs[1], strong.convs[2]):  # driven by layers 2 and 3
            conv.conv.modulation.weight.add_(50 * torch.randn(conv.conv.modulation.weight.shape[0], 1) * planted)
    found = sefa(strong, (2, 4), 5)
    assert abs(cosine(found[0].vector, planted)) > 0.99
    assert found[0].name == "sefa_2-3_0" and found[0].layers == (2, 4)
    for other in ((0, 2), (4, 8)):
        assert abs(cosine(sefa(strong, other, 1)[0].vector, planted)) < 0.5
    v = torch.cat([d.vector for d in found])
    torch.testing.assert_close(v @ v.T, torch.eye(5), rtol=0, atol=1e-5)


def test_sefa_of_all_layers_counts_the_last_to_rgb(generator):
    planted = unit_vector(512)
    strong = Generator(generator.config).eval()
    with torch.no_grad():
        strong.to_rgbs[-1].conv.modulation.weight.add_(90 * torch.randn(16, 1) * planted)
    assert abs(cosine(sefa(strong, count=1)[0].vector, planted)) > 0.99
    assert abs(cosine(sefa(strong, (7, 8), 1)[0].vector, planted)) > 0.99


def test_wrong_numbers_are_told(generator):
    with pytest.raises(WPlusError, match="layers within 0-7"):
        sefa(generator, (8, 9))
    with pytest.raises(WPlusError, match="1 to 512 components"):
        pca(generator, 600)


def test_a_contact_sheet_shows_each_direction_at_each_strength(generator):
    directions = sefa(generator, count=2)
    strengths = (-3.0, 0.0, 3.0)
    sheet = to_tensor(contact_sheet(generator, directions, strengths=strengths, size=32))
    left, top = sheet.shape[2] - 3 * 32, sheet.shape[1] - 2 * 32
    w = generator.mean_w()[None, None].expand(1, 8, -1)
    for row, d in enumerate(directions):
        for column, s in enumerate(strengths):
            shown = sheet[:, top + 32 * row : top + 32 * (row + 1), left + 32 * column : left + 32 * (column + 1)]
            wanted = generator(w + s * d.unit * d.vector).detach()[0].clamp(-1, 1) / 2 + 0.5
            assert (shown - wanted).abs().max() < 0.003
    with pytest.raises(WPlusError, match="one code, got 2"):
        contact_sheet(generator, directions, torch.randn(2, 8, 512))


@needs_sklearn
def test_a_direction_planted_in_real_codes_comes_back():
    """Codes around real people, with and without a step along InterFaceGAN's smile."""
    from comfyui_wplus.wplus_core.checkpoints import load_identity
    from comfyui_wplus.wplus_core.direction_files import load_directions

    people = torch.cat([load_identity(shared(f"data/codes/{i}.pth")).w for i in (1, 2, 3)])
    planted = load_directions(shared("data/directions/interfacegan/smile.pt"))[0].vector
    rng = torch.Generator().manual_seed(0)
    mix = torch.softmax(2 * torch.randn(200, 3, generator=rng), 1)
    w = torch.einsum("np,pld->nld", mix, people) + 0.5 * torch.randn(200, 18, 512, generator=rng)
    found = find_direction(w[:100] + 2 * planted, w[100:] - 2 * planted, "smile")
    assert cosine(found.direction.vector, planted) >= 0.95
