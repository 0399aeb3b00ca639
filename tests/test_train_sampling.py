"""The trainer's sampler: DDIM with guidance, both forms of the adapter, noise by seed."""

import pytest
import torch
from comfyui_wplus.train.model import Denoiser, new_adapter
from comfyui_wplus.train.objectives import alphas_cumprod
from comfyui_wplus.train.sampling import Confined, Sampling, ddim, decode, noise, sample
from comfyui_wplus.wplus_core.errors import WPlusError
from diffusers import AutoencoderKL
from training import LAYERS, SIZE, small_unet


@pytest.fixture(scope="module")
def unet():
    return small_unet().eval()


def adapter_of(unet, parallel=False, seed=0):
    return new_adapter(unet, LAYERS, parallel, seed).requires_grad_(False)


def inputs(b=2):
    rng = torch.Generator().manual_seed(5)
    w, c = torch.randn(b, LAYERS, 512, generator=rng), torch.randn(b, 77, 768, generator=rng)
    return w, c, torch.randn(77, 768, generator=rng), noise(range(b), (SIZE, SIZE))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def euler(eps, settings, c, uncond, z):
    """DDIM without noise is Euler's method in sigma = sqrt((1 - a) / a), x = z / sqrt(a): another way to the same."""
    a = alphas_cumprod().double()
    times = list(range(1, 1000, 1000 // settings.steps))[::-1]
    sigma = ((1 - a) / a).sqrt()
    x = z.double() / a[times[0]].sqrt()
    for t, after in zip(times, [*times[1:], 0], strict=True):
        here = (x * a[t].sqrt()).float()
        without, with_text = (eps(here, t, text) for text in (uncond.expand_as(c), c))
        x = x + (sigma[after] - sigma[t]) * (without + settings.guidance * (with_text - without))
    return (x * a[0].sqrt()).float()


@pytest.mark.parametrize("parallel", [False, True], ids=["folded", "parallel"])
def test_it_is_eulers_method_on_the_model_that_is_trained(unet, parallel):
    adapter, (w, c, uncond, z) = adapter_of(unet, parallel), inputs()
    model, settings = Denoiser(unet, adapter), Sampling(steps=4, guidance=3.0, scale=0.7)

    def eps(z, t, text):
        code = torch.zeros_like(w) if text is not c else w
        return model(z, torch.full((len(z),), t), text, code, 0.7)

    with torch.no_grad():
        expected = euler(eps, settings, c, uncond, z)
    assert relative(sample(unet, adapter, w, c, uncond, z, settings), expected) < 1e-4


def test_the_schedule_is_the_one_that_is_trained_on():
    torch.testing.assert_close(ddim().alphas_cumprod, alphas_cumprod())


def test_scale_zero_is_the_plain_model_for_every_adapter(unet):
    w, c, uncond, z = inputs()
    settings = Sampling(steps=2, scale=0.0)
    plain = sample(unet, None, w, c, uncond, z, settings)
    for adapter in (adapter_of(unet), adapter_of(unet, True), adapter_of(unet, seed=7)):
        assert torch.equal(sample(unet, adapter, w, c, uncond, z, settings), plain)


def test_the_form_follows_the_adapter_when_they_take_turns(unet):
    w, c, uncond, z = inputs(1)
    both = [adapter_of(unet), adapter_of(unet, True)]
    first, other, again = (sample(unet, both[i], w, c, uncond, z, Sampling(steps=2)) for i in (0, 1, 0))
    assert torch.equal(first, again) and relative(other, first) > 1e-3


def test_the_adapter_works_between_start_and_end_alone(unet):
    calls = []

    class Counted:
        def add(self, h, i, *query):
            calls.append(i)
            return h

    adapter, (w, c, uncond, z) = adapter_of(unet), inputs(1)
    counted = Counted()
    adapter.fold_tokens = lambda t: type("Fold", (), {"scaled": lambda s, x: s, "to": lambda s, *a: counted})()
    for start, end, steps in ((0, 1, 10), (0.2, 1, 8), (0, 0.5, 5), (0.3, 0.6, 3)):
        calls.clear()
        sample(unet, adapter, w, c, uncond, z, Sampling(steps=10, start=start, end=end))
        assert calls.count(0) == steps


@pytest.mark.parametrize("parallel", [False, True], ids=["folded", "parallel"])
def test_a_mask_says_where_the_adapter_works(unet, parallel):
    adapter, (w, c, uncond, z), settings = adapter_of(unet, parallel), inputs(), Sampling(steps=2)
    masks = torch.stack([torch.zeros(1, 20, 20), torch.ones(1, 20, 20)])
    first, second = sample(unet, adapter, w, c, uncond, z, settings, masks)
    plain, whole = (sample(unet, a, w, c, uncond, z, settings) for a in (None, adapter))
    assert torch.equal(first, plain[0]) and relative(second, whole[1]) < 1e-5 and relative(first, whole[0]) > 1e-3


def test_a_mask_shrinks_with_the_features():
    class Adds:
        def add(self, h, i):
            return h + 4

    mask = torch.zeros(1, 1, 10, 14)
    mask[..., :7] = 1
    confined = Confined(Adds(), mask, (5, 7))  # the UNet's next levels are (3, 4) and (2, 2)
    for h, w in ((5, 7), (3, 4), (2, 2)):
        added = confined.add(torch.zeros(1, h * w, 3), 0).unflatten(1, (h, w))[0, :, :, 0]
        assert (added[:, 0] == 4).all() and (added[:, -1] == 0).all() and (added == added[:1]).all()


def test_it_starts_at_the_noise():
    late, early = Sampling(start=0.5), Sampling(end=0.5)
    assert [late.with_adapter(t) for t in (981, 21)] == [False, True]
    assert [early.with_adapter(t) for t in (981, 21)] == [True, False]


def test_guidance_one_asks_for_the_text_alone(unet):
    adapter, (w, c, uncond, z) = adapter_of(unet), inputs(1)
    settings = Sampling(steps=2, guidance=1.0)
    alone = sample(unet, adapter, w, c, uncond, z, settings)
    assert torch.equal(alone, sample(unet, adapter, w, c, uncond + 1, z, settings))
    almost = sample(unet, adapter, w, c, uncond, z, Sampling(steps=2, guidance=1.0 + 1e-6))
    assert relative(alone, almost) < 1e-4


def test_a_picture_is_a_function_of_its_seed_and_not_of_its_batch(unet):
    adapter, (w, c, uncond, _) = adapter_of(unet), inputs(3)
    z = noise([3, (4, 1), 4], (SIZE, SIZE))
    assert not torch.equal(z[1], z[2])
    together = sample(unet, adapter, w, c, uncond, z, Sampling(steps=2))
    alone = sample(unet, adapter, w[1:2], c[1:2], uncond, noise([(4, 1)], (SIZE, SIZE)), Sampling(steps=2))
    assert relative(together[1:2], alone) < 1e-4


def test_a_bf16_unet_samples_in_float32(unet):
    w, c, uncond, z = inputs(1)
    exact = sample(unet, adapter_of(unet), w, c, uncond, z, Sampling(steps=3, guidance=2.0))
    half = small_unet().to(torch.bfloat16)
    for parallel in (False, True):
        got = sample(half, adapter_of(half, parallel), w, c, uncond, z, Sampling(steps=3, guidance=2.0))
        assert got.dtype == torch.float32 and got.isfinite().all()
        assert parallel or relative(got, exact) < 0.05


def test_decoding_is_the_vaes(unet):
    vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, latent_channels=4, scaling_factor=0.5)
    z = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = vae.decode(z / 0.5).sample
    got = decode(vae, z)
    torch.testing.assert_close(got, (expected / 2 + 0.5).clamp(0, 1))
    assert 0 <= got.min() and got.max() <= 1


def test_impossible_settings_are_refused():
    for wrong in ({"steps": 0}, {"start": 0.6, "end": 0.5}, {"end": 1.1}):
        with pytest.raises(WPlusError, match="expected 1 to 1000 steps"):
            Sampling(**wrong)
