"""The trainable model: where the adapter's weights begin, precision, the parallel variant, loading a base."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from comfyui_wplus.train.model import Denoiser, load_unet, new_adapter, set_trainable
from comfyui_wplus.wplus_core.checkpoints import load_adapter, save_adapter
from comfyui_wplus.wplus_core.errors import FileError, WPlusError
from safetensors.torch import save_file
from training import LAYERS, small_unet

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import tiny_sd  # noqa: E402


def inputs(b=2):
    rng = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    return normal(b, 4, 16, 16), torch.tensor([10, 900])[:b], normal(b, 77, 768), normal(b, LAYERS, 512)


@pytest.fixture(params=[False, True], ids=["residual", "parallel"])
def model(request):
    unet = small_unet()
    return Denoiser(unet, new_adapter(unet, LAYERS, request.param))


def test_the_residual_attention_begins_as_a_copy_of_the_unets_own(model):
    weights = dict(model.unet.named_parameters())
    layers = [k for k in weights if "attn2.to_q" in k]
    order = [k for part in ("down", "up", "mid") for k in layers if k.startswith(part)]
    for name, layer in zip(order, model.adapter.layers, strict=True):
        for x in "qkv":
            own, ours = weights[name.replace("to_q", f"to_{x}")], getattr(layer, f"to_{x}").weight
            assert torch.equal(own, ours) and own.data_ptr() != ours.data_ptr()


def test_the_mapping_network_is_a_function_of_the_seed():
    unet = small_unet()
    a, b, c = (new_adapter(unet, LAYERS, seed=s).mapping.proj[0].weight for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_scale_zero_is_the_plain_model_row_by_row(model):
    z, t, c, w = inputs()
    plain = model.unet(z, t, c).sample
    assert torch.equal(model(z, t, c, w, 0.0), plain)
    one_of_both = model(z, t, c, w, torch.tensor([0.0, 1.0])[:, None, None])
    torch.testing.assert_close(one_of_both[0], plain[0])
    torch.testing.assert_close(one_of_both[1], model(z, t, c, w)[1])
    assert (one_of_both[1] - plain[1]).norm() > 1e-2 * plain[1].norm()


def test_parallel_attention_asks_with_the_input_of_the_attention():
    unet = small_unet()
    model = Denoiser(unet, new_adapter(unet, LAYERS, parallel=True))
    seen = {}
    first = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    first.to_q.register_forward_hook(lambda m, args, out: seen.update(x=args[0]))
    model.adapter.layers[0].to_q.register_forward_hook(lambda m, args, out: seen.update(query=args[0]))
    model(*inputs())
    assert torch.equal(seen["x"], seen["query"])
    residual = Denoiser(small_unet(), new_adapter(unet, LAYERS))
    residual.adapter.load_state_dict(model.adapter.state_dict())
    assert not torch.allclose(residual(*inputs()), model(*inputs()), rtol=1e-2)


def test_a_parallel_adapter_is_known_by_its_file_and_not_folded(tmp_path):
    adapter = new_adapter(small_unet(), LAYERS, parallel=True)
    save_adapter(adapter, tmp_path / "pca.safetensors")
    loaded = load_adapter(tmp_path / "pca.safetensors")
    assert loaded.config == adapter.config and loaded.config.parallel
    with pytest.raises(WPlusError, match="parallel"):
        loaded.fold(torch.randn(1, LAYERS, 512))


def test_gradients_reach_what_is_trained_and_nothing_else(model):
    for mapping in (True, False):
        model.zero_grad()
        trained = set_trainable(model.adapter, mapping)
        model(*inputs()).square().mean().backward()
        reached = {k for k, p in model.adapter.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert reached == set(trained) == {k for k, _ in model.adapter.named_parameters() if mapping or "layers" in k}
        assert all(p.grad is None for p in model.unet.parameters())


def test_gradient_checkpointing_changes_no_number(model):
    set_trainable(model.adapter, True)
    expected = torch.autograd.grad(model(*inputs()).square().mean(), list(model.adapter.parameters()))
    model.unet.train()
    model.unet.enable_gradient_checkpointing()
    got = torch.autograd.grad(model(*inputs()).square().mean(), list(model.adapter.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_bf16_unet_trains_float32_weights(model):
    exact, half = model(*inputs()), copy.deepcopy(model)
    half.unet.to(torch.bfloat16)
    eps = half(*inputs(), torch.tensor([1.0, 1.0])[:, None, None])
    assert eps.dtype == torch.float32 and (eps - exact).norm() < 0.03 * exact.norm()
    eps.square().mean().backward()
    assert {p.grad.dtype for p in half.adapter.parameters()} == {torch.float32}


def test_an_adapter_of_another_model_is_refused():
    adapter = new_adapter(small_unet(), LAYERS)
    other = small_unet()
    other.mid_block.attentions[0].transformer_blocks[0].attn2.to_q = torch.nn.Linear(8, 8)
    with pytest.raises(WPlusError, match="the UNet has"):
        Denoiser(other, adapter)


def test_a_base_is_a_pipelines_folder_or_the_unets_own(tmp_path):
    small_unet().save_pretrained(tmp_path / "unet")
    for folder in (tmp_path, tmp_path / "unet"):
        assert torch.equal(load_unet(folder).conv_in.weight, small_unet().conv_in.weight)
    with pytest.raises(FileError, match="no SD1.x base"):
        load_unet(tmp_path / "nothing")


@pytest.fixture
def single_file(tmp_path, monkeypatch):
    """ComfyUI's and A1111's form, at 32 channels."""
    monkeypatch.setattr(tiny_sd, "CHANNELS", 32)
    monkeypatch.setattr(tiny_sd, "TIME", 128)
    rng = torch.Generator().manual_seed(0)
    shapes = [("model.diffusion_model." + k, s) for k, s in tiny_sd.unet((1, 2, 2, 2))]
    state = {k: tiny_sd.weight(k, s, rng) for k, s in shapes}
    save_file(state, tmp_path / "base.safetensors")
    torch.save({"state_dict": state}, tmp_path / "base.ckpt")
    return state, tmp_path


@pytest.mark.parametrize("name", ["base.safetensors", "base.ckpt"])
def test_a_base_is_a_single_file_checkpoint(single_file, name):
    state, folder = single_file
    unet = load_unet(folder / name)
    assert list(unet.config.block_out_channels) == [32, 64, 64, 64]
    key = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.attn2.to_k.weight"
    last = unet.up_blocks[3].attentions[2].transformer_blocks[0].attn2.to_k.weight
    assert torch.equal(last, state[key].float())
    assert sum(p.numel() for p in unet.parameters()) == sum(x.numel() for x in state.values())
    assert len(new_adapter(unet).layers) == 16


def test_a_unet_with_a_missing_tensor_is_refused(single_file):
    state, folder = single_file
    del state["model.diffusion_model.middle_block.1.transformer_blocks.0.norm3.bias"]
    save_file(state, folder / "part.safetensors")
    with pytest.raises(FileError, match=f"its UNet has {len(state)} tensors, expected {len(state) + 1}"):
        load_unet(folder / "part.safetensors")


def test_another_checkpoint_is_no_base(tmp_path):
    save_file({"x.weight": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(FileError, match="no diffusion model"):
        load_unet(tmp_path / "x.safetensors")
    save_file({"model.diffusion_model.x": torch.zeros(2)}, tmp_path / "sdxl.safetensors")
    with pytest.raises(FileError, match="no SD1.x UNet"):
        load_unet(tmp_path / "sdxl.safetensors")
