"""The losses: identities between stages and passes, and what each loss is."""

import pytest
import torch
import torch.nn.functional as F
from comfyui_wplus.train.model import Denoiser, new_adapter, set_trainable
from comfyui_wplus.train.objectives import Batch, Objective, add_noise, alphas_cumprod, without_gradient
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from training import LAYERS, small_unet


@pytest.fixture(scope="module")
def model():
    unet = small_unet()
    return Denoiser(unet, new_adapter(unet, LAYERS))


@pytest.fixture
def batch():
    rng = torch.Generator().manual_seed(5)
    z0, noise = torch.randn(2, 3, 4, 16, 16, generator=rng)
    w, w_hat = torch.randn(2, 3, LAYERS, 512, generator=rng)
    w[1] = w_hat[1] = 0
    face = torch.zeros(3, 1, 32, 32)
    face[..., 8:20, 10:22] = 1
    c, weights = torch.randn(3, 77, 768, generator=rng), torch.ones(3, 1, 16, 16)
    return Batch(z0, noise, torch.tensor([5, 500, 990]), c, w, w_hat, face, weights)


def gradients(model, losses):
    return torch.autograd.grad(losses["total"], [p for p in model.adapter.parameters() if p.requires_grad])


def test_the_noise_schedule_is_that_of_sd1():
    ddpm = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    assert torch.equal(alphas_cumprod(), ddpm.alphas_cumprod)
    z, noise, t = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.tensor([0, 400, 999])
    torch.testing.assert_close(add_noise(z, noise, t), ddpm.add_noise(z, noise, t))


def test_stage_two_without_its_two_losses_is_stage_one(model, batch):
    set_trainable(model.adapter, True)
    one, two = Objective()(model, batch), Objective(disen=1e-30, reg=1e-30)(model, batch)
    assert one["total"] == one["rec"] == two["rec"]
    for a, b in zip(gradients(model, one), gradients(model, two), strict=True):
        torch.testing.assert_close(a, b)


def test_stage_one_is_one_pass_and_stage_two_two(model, batch):
    calls = []

    def counted(z, t, c, w, scale=1.0):
        calls.append((len(z), torch.is_grad_enabled()))
        return model(z, t, c, w, scale)

    for disen, reg, expected in ((0, 0, []), (1.5, 1, [(6, False)]), (0, 1, [(3, False)]), (1, 0, [(3, False)])):
        calls.clear()
        Objective(disen, reg)(counted, batch)
        assert calls == [*expected, (3, True)]


def test_the_passes_without_gradient_are_the_same_one_by_one(model, batch):
    zt = add_noise(batch.z0, batch.noise, batch.t)
    both = without_gradient(model, zt, batch, disen=True, reg=True)
    with torch.no_grad():
        torch.testing.assert_close(both["disen"], model(zt, batch.t, batch.c, batch.w_hat))
        torch.testing.assert_close(both["reg"], model.unet(zt, batch.t, batch.c).sample)
    assert not any(x.requires_grad for x in both.values())


def test_the_total_is_the_weighted_sum(model, batch):
    losses = Objective(disen=1.5, reg=1.0)(model, batch)
    torch.testing.assert_close(losses["total"], losses["rec"] + 1.5 * losses["disen"] + losses["reg"])
    assert set(losses) == {"rec", "disen", "reg", "total"} and all(x > 0 for x in losses.values())


def test_losses_are_means_over_all_elements(batch):
    """A model that answers with constants: 3 for w, 1 for w_hat, 0 without the adapter."""

    def constants(z, t, c, w, scale=1.0):
        level = torch.where(torch.isin(w[:, 0, 0], batch.w[[0, 2], 0, 0]), 3.0, 1.0)
        return (level * torch.as_tensor(scale).flatten()).view(-1, 1, 1, 1).expand_as(z)

    rows = Batch(*(x[[0, 2]] for x in batch))
    losses = Objective(disen=1.0, reg=1.0)(constants, rows)
    outside = 1 - 12 * 12 / 32**2
    torch.testing.assert_close(losses["disen"], torch.tensor(4 * outside))
    torch.testing.assert_close(losses["reg"], torch.tensor(9.0))
    torch.testing.assert_close(losses["rec"], (rows.noise - 3).square().mean())


def test_places_count_by_their_weights(model, batch):
    """Half the picture with weight 0: the loss is that of the other half, whatever the scale of the weights."""
    half = torch.zeros_like(batch.weights)
    half[..., : half.shape[-1] // 2] = 3.0
    with torch.no_grad():
        eps = model(add_noise(batch.z0, batch.noise, batch.t), batch.t, batch.c, batch.w)
        error = (eps - batch.noise).square()[..., : half.shape[-1] // 2].mean()
        torch.testing.assert_close(Objective()(model, batch._replace(weights=half))["rec"], error)
        by_face = Objective(face=4.0)(model, batch)["rec"]
        mask = 1 + 4 * F.interpolate(batch.face, eps.shape[-2:], mode="area")
        torch.testing.assert_close(Objective()(model, batch._replace(weights=mask))["rec"], by_face)


def test_disentanglement_sees_nothing_of_the_face(model, batch):
    everywhere = batch._replace(face=torch.ones_like(batch.face))
    assert Objective(disen=1.0)(model, everywhere)["disen"] == 0
    same = batch._replace(w_hat=batch.w)
    assert Objective(disen=1.0)(model, same)["disen"] < 1e-10


def test_the_targets_have_no_gradient(model, batch):
    """With eps held, only the targets could carry gradients: d L_reg / d W' is that of eps alone."""
    set_trainable(model.adapter, False)
    zt = add_noise(batch.z0, batch.noise, batch.t)
    target = model(zt, batch.t, batch.c, batch.w_hat).detach()
    face = torch.zeros_like(batch.face)
    by_hand = (model(zt, batch.t, batch.c, batch.w) - target).square().mean()
    expected = gradients(model, {"total": by_hand})
    losses = Objective(disen=1.0)(model, batch._replace(face=face))
    got = gradients(model, {"total": losses["disen"]})
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_dropped_rows_stay_in_every_loss(model, batch):
    """Row 1 has no w; without it the losses are others, and its own tokens are the guidance's unconditional ones."""
    all_rows, two = Objective(1.5, 1.0)(model, batch), Objective(1.5, 1.0)(model, Batch(*(x[[0, 2]] for x in batch)))
    alone = Objective(1.5, 1.0)(model, Batch(*(x[[1]] for x in batch)))
    for name in all_rows:
        torch.testing.assert_close(all_rows[name], (2 * two[name] + alone[name]) / 3)
    assert alone["reg"] > 0 and alone["disen"] < 1e-10


def test_min_snr_weighs_rows_by_their_noise(model, batch):
    ddpm = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    ratio = compute_snr(ddpm, batch.t)
    with torch.no_grad():
        eps = model(add_noise(batch.z0, batch.noise, batch.t), batch.t, batch.c, batch.w)
        rows = (eps - batch.noise).square().mean((1, 2, 3))
        expected = (rows * ratio.clamp(max=5) / ratio).mean()
        torch.testing.assert_close(Objective(min_snr=5.0)(model, batch)["rec"], expected)
        torch.testing.assert_close(Objective(min_snr=1e9)(model, batch)["rec"], Objective()(model, batch)["rec"])
    assert expected < 0.8 * rows.mean()


def test_the_face_counts_more_in_the_reconstruction(model, batch):
    with torch.no_grad():
        eps = model(add_noise(batch.z0, batch.noise, batch.t), batch.t, batch.c, batch.w)
        error = (eps - batch.noise).square().mean(1)
        inside = torch.zeros_like(error)
        inside[:, 4:10, 5:11] = 1  # the mask at the latent's size
        expected = (error * (1 + 3 * inside)).mean() / (1 + 3 * inside).mean()
        torch.testing.assert_close(Objective(face=3.0)(model, batch)["rec"], expected)
        assert (expected - error.mean()).abs() > 1e-4
        everywhere = batch._replace(face=torch.ones_like(batch.face))
        torch.testing.assert_close(Objective(face=3.0)(model, everywhere)["rec"], error.mean())


@pytest.mark.parametrize("objective", [Objective(disen=1.5), Objective(face=3.0), Objective(reg=1.0)])
def test_masks_are_needed_where_they_are_used(objective):
    assert objective.needs_face == (not objective.reg)
