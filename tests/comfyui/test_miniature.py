"""The miniature in ComfyUI: the same text, latents and pictures as the trainer's own sampler makes of it."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from comfyui_wplus.train.base import load_text_encoder, load_vae
from comfyui_wplus.train.mini import autoencoder, base, generator, pack, text
from comfyui_wplus.train.mini.encoder import new_encoder
from comfyui_wplus.train.model import load_unet, new_adapter
from comfyui_wplus.train.sampling import Sampling, ddim, decode, noise, sample
from comfyui_wplus.wplus_core.checkpoints import load_adapter, load_encoder, save_adapter, save_encoder
from safetensors.torch import save_file

from .server import NoCheckout, environment

IN_PROCESS = Path(__file__).parents[1] / "in_process"
PROMPT, GUIDANCE = "a person in a red dress on the beach by day, photo", 3.0


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A miniature with random weights, as large as the real one."""
    folder = tmp_path_factory.mktemp("miniature")
    text.write_tokenizer(folder / "base" / "tokenizer")
    vocabulary = json.loads((folder / "base" / "tokenizer" / "vocab.json").read_text())
    text.new_text_model(vocabulary).save_pretrained(folder / "base" / "text_encoder")
    autoencoder.new_autoencoder().save_pretrained(folder / "base" / "vae")
    unet = base.new_unet()
    unet.save_pretrained(folder / "base" / "unet")
    painter = generator.new_generator()
    save_encoder(new_encoder(painter).eval(), folder / "encoder.safetensors", painter)
    save_adapter(new_adapter(unet, painter.config.layers, w_dim=painter.config.w_dim), folder / "adapter.safetensors")
    pack.write_people(folder / "people.png")
    return folder


@torch.no_grad()
def expected(folder: Path, file: Path) -> Path:
    """What the trainer's own code makes of the miniature."""
    words, vae, unet = load_text_encoder(folder / "base"), load_vae(folder / "base"), load_unet(folder / "base")
    encoder, adapter = load_encoder(folder / "encoder.safetensors"), load_adapter(folder / "adapter.safetensors")
    face = torch.rand(1, 3, 64, 64) * 2 - 1
    c, w, start = words([PROMPT]), encoder(face), noise([5], (16, 16))
    x = {"text": c, "face": face, "w": w, "noise": start}
    scheduler = ddim()
    scheduler.set_timesteps(4)
    x["timesteps"] = scheduler.timesteps
    for scale in (0.0, 1.0):
        z = sample(unet, adapter, w, c, words([""])[0], start, Sampling(4, GUIDANCE, scale))
        x |= {f"latent_{scale:.0f}": z, f"picture_{scale:.0f}": decode(vae, z)}
    save_file({k: v.contiguous() for k, v in x.items()}, file, {"prompt": PROMPT, "guidance": str(GUIDANCE)})
    return file


@pytest.mark.parametrize("version", ["newest", "floor"])
def test_comfyui_paints_what_the_trainer_paints(version, untrained, tmp_path):
    try:
        checkout, python = environment(version)
    except NoCheckout as reason:
        pytest.skip(str(reason))
    command = [python, IN_PROCESS / "miniature_comfyui.py", untrained, expected(untrained, tmp_path / "x.safetensors")]
    env = os.environ | {"COMFYUI_CHECKOUT": str(checkout)}
    done = subprocess.run(command, cwd=IN_PROCESS, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 6
    assert max(errors.values()) < 1e-3, errors
