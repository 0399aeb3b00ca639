"""The optimisation gets nearer to the picture, stops when told to, and runs where ComfyUI runs nodes."""

from dataclasses import replace

import pytest
import torch
from comfyui_wplus.wplus_core.errors import WPlusError
from comfyui_wplus.wplus_core.identity import Identity
from comfyui_wplus.wplus_core.refine import RefineConfig, picture_loss, refine
from comfyui_wplus.wplus_core.stylegan2 import Generator, GeneratorConfig

QUICK = RefineConfig(steps=40, rate=0.05, average=0.0, patience=40, size=32)


@pytest.fixture(scope="module")
def generator():
    torch.manual_seed(0)
    return Generator(GeneratorConfig.for_size(32, max_channels=16)).eval()


@pytest.fixture(scope="module")
def problem(generator):
    """A code near the average, and the picture of another one: the average code, w, target."""
    torch.manual_seed(1)
    average = generator.mean_w(256)[None].expand(generator.config.layers, -1)
    w = average + 0.1 * torch.randn(1, *average.shape)
    with torch.no_grad():
        target = generator(w + 0.5 * torch.randn_like(w)).clamp(-1, 1) / 2 + 0.5
    return average, Identity(w, "someone", {"source": "photo"}), target


def distance(generator, identity, target):
    with torch.no_grad():
        return picture_loss(generator(identity.w), target * 2 - 1, torch.ones(1, 1, 32, 32)).item()


def test_it_gets_nearer_and_says_how(generator, problem):
    average, identity, target = problem
    better = refine(identity, target, generator, average, config=QUICK)
    losses = better.provenance["refine"]["losses"]
    assert distance(generator, better, target) < 0.8 * distance(generator, identity, target)
    assert losses[0] == pytest.approx(distance(generator, identity, target), abs=1e-4)
    assert min(losses) == pytest.approx(distance(generator, better, target), abs=1e-4)
    assert better.name == "someone" and better.provenance["source"] == "photo"
    assert "refine" not in identity.provenance


def test_inputs_and_generator_are_left_as_they_were(generator, problem):
    average, identity, target = problem
    before = [t.clone() for t in (average, identity.w, target, *generator.parameters())]
    refine(identity, target, generator, average, config=replace(QUICK, steps=3))
    for a, b in zip(before, (average, identity.w, target, *generator.parameters()), strict=True):
        assert torch.equal(a, b)
    assert all(p.grad is None for p in generator.parameters())


def test_it_runs_inside_inference_mode_with_tensors_and_weights_made_there(problem):
    average, identity, target = problem
    with torch.inference_mode():
        torch.manual_seed(0)
        made_here = Generator(GeneratorConfig.for_size(32, max_channels=16)).eval()
        code, x, centre = Identity(identity.w.clone()), target.clone(), average.clone()
        mask = torch.ones(1, 1, 32, 32)
        losses = refine(code, x, made_here, centre, mask, QUICK).provenance["refine"]["losses"]
    assert min(losses) < 0.9 * losses[0]


def test_a_stronger_pull_ends_nearer_the_average(generator, problem):
    average, identity, target = problem
    free, held = (
        refine(identity, target, generator, average, config=replace(QUICK, average=a)).w - average for a in (0.0, 10.0)
    )
    assert held.norm() < 0.7 * free.norm()


def test_what_is_masked_does_not_count(generator, problem):
    _, identity, target = problem
    spoiled, mask = target.clone(), torch.ones(1, 1, 32, 32)
    spoiled[..., :16], mask[..., :16] = 0, 0
    a, b = (refine(identity, x, generator, mask=mask, config=replace(QUICK, steps=5)).w for x in (target, spoiled))
    assert torch.equal(a, b)
    assert not torch.equal(a, refine(identity, target, generator, config=replace(QUICK, steps=5)).w)


def test_progress_and_cancelling(generator, problem):
    _, identity, target = problem
    seen = []

    def progress(step, steps, loss):
        seen.append((step, steps, loss))
        return step < 4

    losses = refine(identity, target, generator, config=QUICK, progress=progress).provenance["refine"]["losses"]
    assert [s for s, *_ in seen] == [1, 2, 3, 4] and seen[0][1] == QUICK.steps
    assert [x for *_, x in seen] == pytest.approx(losses, abs=1e-5)

    class Interrupted(Exception):
        pass

    def interrupt(*_):
        raise Interrupted

    with pytest.raises(Interrupted):
        refine(identity, target, generator, config=QUICK, progress=interrupt)


def test_it_stops_when_nothing_improves(generator, problem):
    _, identity, target = problem
    still = replace(QUICK, rate=0.0, patience=3)
    assert len(refine(identity, target, generator, config=still).provenance["refine"]["losses"]) == 4


def test_zero_steps_is_the_code_itself(generator, problem):
    _, identity, target = problem
    assert torch.equal(refine(identity, target, generator, config=replace(QUICK, steps=0)).w, identity.w)


@pytest.mark.parametrize("size", [16, 32, 64])
def test_other_picture_sizes(generator, problem, size):
    _, identity, target = problem
    losses = refine(identity, target, generator, config=replace(QUICK, size=size, steps=2, render=16))
    assert losses.provenance["refine"]["size"] == min(size, 32)


def test_what_does_not_fit(generator, problem):
    _, identity, target = problem
    for change, says in (
        (dict(identity=Identity(torch.zeros(1, 18, 512))), "the code has 18 layers, this generator 8"),
        (dict(target=target.repeat(2, 1, 1, 1)), "expected 1 aligned faces, one per code, got 2"),
        (dict(target=target * 255), "expected values in 0..1"),
        (dict(target=target * float("nan")), "NaN"),
        (dict(mask=torch.ones(1, 32, 32)), r"mask: expected \[1, 1, S, S\]"),
    ):
        with pytest.raises(WPlusError, match=says):
            refine(**{"identity": identity, "target": target, "generator": generator, **change})
