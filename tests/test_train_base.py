"""The VAE and the text encoder of a base: the same from a diffusers folder and from a single-file checkpoint."""

import re

import pytest
import torch
from comfyui_wplus.train.base import digest, latents, load_text_encoder, load_vae
from comfyui_wplus.wplus_core.errors import FileError
from preparing import SIZE, small_text_encoder, small_vae, write_base, write_tokenizer
from safetensors.torch import save_file

PROMPTS = ["", "a photo of a face", "an über-long prompt " * 20]
# From diffusers' names to those of the first SD checkpoints.
VAE_NAMES = [
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_", "mid.attn_1."),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
]


def original_vae(vae) -> dict[str, torch.Tensor]:
    state = {}
    for name, x in vae.state_dict().items():
        for pattern, new in VAE_NAMES:
            name = re.sub(pattern, new, name)
        state[name] = x[..., None, None] if "attn_1" in name and x.ndim == 2 else x
    return {k: x.contiguous() for k, x in state.items()}


def original_text(model) -> dict[str, torch.Tensor]:
    names = {k.removeprefix("text_model."): x for k, x in model.state_dict().items()}
    return {f"cond_stage_model.transformer.text_model.{k}": x for k, x in names.items()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The same weights as a folder, a checkpoint, and a checkpoint of torch's kind."""
    folder = tmp_path_factory.mktemp("bases")
    write_base(folder / "base")
    state = {f"first_stage_model.{k}": x for k, x in original_vae(small_vae()).items()}
    state |= original_text(small_text_encoder()) | {"model.diffusion_model.out.0.bias": torch.zeros(1)}
    save_file(state, folder / "base.safetensors")
    save_file(original_vae(small_vae()), folder / "vae.safetensors")
    torch.save({"state_dict": state}, folder / "base.ckpt")
    return folder


@pytest.mark.parametrize("file", ["base.safetensors", "base.ckpt", "vae.safetensors", "base/vae"])
def test_a_vae_is_the_same_from_every_file(bases, file):
    wanted, got = load_vae(bases / "base"), load_vae(bases / file)
    assert digest(got) == digest(wanted)
    assert got.config.scaling_factor == 0.18215 and not any(p.requires_grad for p in got.parameters())
    x = torch.rand(3, 3, SIZE, SIZE)
    z = latents(got, x, batch=2)
    assert torch.equal(z, latents(wanted, x, batch=2)) and z.shape == (3, 8, SIZE // 8, SIZE // 8)
    posterior = small_vae().encode(x * 2 - 1).latent_dist
    torch.testing.assert_close(z, torch.cat([posterior.mean, posterior.std], 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("file", ["base.safetensors", "base.ckpt"])
def test_a_text_encoder_is_the_same_from_a_checkpoint(bases, file):
    wanted = load_text_encoder(bases / "base")(PROMPTS)
    got = load_text_encoder(bases / file, tokenizer=bases / "base" / "tokenizer")(PROMPTS)
    assert torch.equal(got, wanted) and got.shape == (3, 77, 768) and got.dtype == torch.float32
    assert not torch.equal(got[0], got[1])


def test_a_tokenizer_as_transformers_saves_it(bases, tmp_path):
    wanted = load_text_encoder(bases / "base")
    wanted.tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert torch.equal(load_text_encoder(bases / "base", tokenizer=tmp_path)(PROMPTS), wanted(PROMPTS))


def test_what_is_missing_is_said_with_the_remedy(bases, tmp_path):
    with pytest.raises(FileError, match="comfy/sd1_tokenizer"):
        load_text_encoder(bases / "base.safetensors")
    with pytest.raises(FileError, match="comfy/sd1_tokenizer"):
        load_text_encoder(bases / "base.safetensors", tokenizer=tmp_path)
    with pytest.raises(FileError, match="no CLIP text encoder"):
        load_text_encoder(bases / "vae.safetensors", tokenizer=bases / "base" / "tokenizer")
    with pytest.raises(FileError, match="no VAE here"):
        load_vae(tmp_path)
    with pytest.raises(FileError, match="no text encoder here"):
        load_text_encoder(tmp_path)
    save_file({"first_stage_model.taesd_encoder.0.weight": torch.zeros(1)}, tmp_path / "tiny.safetensors")
    with pytest.raises(FileError, match="TAESD.*--vae"):
        load_vae(tmp_path / "tiny.safetensors")
    text = {k: x for k, x in original_text(small_text_encoder()).items() if "final_layer_norm" not in k}
    save_file(text, tmp_path / "part.safetensors")
    with pytest.raises(FileError, match="final_layer_norm"):
        load_text_encoder(tmp_path / "part.safetensors", tokenizer=write_tokenizer(tmp_path / "tokenizer"))


def test_a_vae_with_a_missing_tensor_is_refused(bases, tmp_path):
    state = original_vae(small_vae())
    del state["decoder.mid.block_1.conv1.bias"]
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(FileError, match=f"its VAE has {len(state)} tensors, expected {len(state) + 1}"):
        load_vae(tmp_path / "vae.safetensors")


def test_a_digest_is_that_of_the_weights():
    vae, other = small_vae(), small_vae(seed=1)
    assert digest(vae) == digest(small_vae()) != digest(other)
    assert digest(vae, other) != digest(other, vae)
