"""What surrounds the UNet in an SD1.x base: the VAE, and the text encoder with its tokenizer. Nothing is downloaded.

    vae = load_vae("sd15.safetensors")
    text = load_text_encoder("sd15.safetensors", tokenizer="ComfyUI/comfy/sd1_tokenizer")
    latents(vae, pictures)               # [B, 8, h, w]
    text(["", "a photo of a face"])      # [2, 77, 768]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..wplus_core.errors import FileError
from ..wplus_core.files import read
from ..wplus_core.formats import numbers
from ..wplus_core.state_dicts import part, with_prefix

LATENT_CHANNELS = 4
VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
VAE, TEXT = "first_stage_model.", "cond_stage_model.transformer."
TOKENIZER = (
    "Give its folder: --tokenizer ComfyUI/comfy/sd1_tokenizer (any ComfyUI has it), or fetch vocab.json and merges.txt "
    "of openai/clip-vit-large-patch14"
)


@dataclass(frozen=True)
class TextEncoder:
    """Prompts -> embeddings [P, 77, 768], float32 on the encoder's device."""

    tokenizer: CLIPTokenizer
    model: CLIPTextModel

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> Tensor:
        length = self.model.config.max_position_embeddings
        options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
        ids = self.tokenizer(list(prompts), **options).input_ids
        return self.model(ids.to(self.model.device)).last_hidden_state.float()


@torch.no_grad()
def latents(vae: AutoencoderKL, pictures: Tensor, batch: int = 8) -> Tensor:
    """Pictures [B, 3, H, W] in 0..1 -> mean and standard deviation of their latents [B, 8, h, w], float32, unscaled."""
    found = [vae.encode((x * 2 - 1).to(vae.device, vae.dtype)).latent_dist for x in pictures.split(batch)]
    return torch.cat([torch.cat([d.mean, d.std], 1).float() for d in found])


def load_vae(base: str | Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """The VAE of a diffusers folder (a pipeline's or its own), of an SD1.x checkpoint, or of a VAE file."""
    base = Path(base)
    if base.is_file():
        return single_file_vae(base, dtype)
    for folder in (base / "vae", base):
        if (folder / "config.json").is_file():
            vae = AutoencoderKL.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
            return vae.eval().requires_grad_(False)
    raise FileError(base, "no VAE here", "Give a diffusers folder, a single-file checkpoint, or --vae")


def single_file_vae(path: Path, dtype: torch.dtype) -> AutoencoderKL:
    tensors = read(path).tensors
    state = part(tensors, f"state_dict.{VAE}", VAE, "state_dict.") or tensors
    state = {k: x for k, x in state.items() if k.startswith(VAE_PARTS)}
    with TemporaryDirectory() as folder:
        config = vae_config(path, state)
        Path(folder, "config.json").write_text(json.dumps(config))
        vae = AutoencoderKL.from_single_file(
            with_prefix(VAE, state),
            config=folder,
            torch_dtype=dtype,
            local_files_only=True,
            low_cpu_mem_usage=False,
        )
    wanted = len(vae.state_dict())
    if len(state) != wanted:  # diffusers would leave what is missing random
        raise FileError(path, f"its VAE has {len(state)} tensors, expected {wanted}", "Choose an unmodified file")
    return vae.eval().requires_grad_(False)


def vae_config(path: Path, state: dict[str, Tensor]) -> dict:
    """diffusers' config of a KL autoencoder in the layout of the first SD checkpoints; sizes from its tensors."""
    keys = [f"encoder.down.{i}.block.0.conv1.weight" for i in numbers(state, r"encoder\.down\.(\d+)\.")]
    widths = [state[k].shape[0] for k in keys if k in state]
    if not widths or "quant_conv.weight" not in state or "decoder.conv_out.weight" not in state:
        problem = "there is no VAE of SD1.x's kind in it (a TAESD has no posterior)"
        raise FileError(path, problem, "Give one with --vae: a VAE file or a diffusers folder")
    n = len(widths)
    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * n,
            up_block_types=("UpDecoderBlock2D",) * n,
            block_out_channels=tuple(widths),
            layers_per_block=len(numbers(state, r"encoder\.down\.0\.block\.(\d+)\.")),
            latent_channels=state["quant_conv.weight"].shape[0] // 2,
        )
    return dict(vae.config)


def load_text_encoder(
    base: str | Path, dtype: torch.dtype = torch.float32, tokenizer: str | Path | None = None
) -> TextEncoder:
    """The text encoder of a diffusers folder or an SD1.x checkpoint; for a checkpoint the tokenizer must be given."""
    base = Path(base)
    if base.is_file():
        model = single_file_text(base, dtype)
    elif (base / "text_encoder" / "config.json").is_file():
        model = CLIPTextModel.from_pretrained(base / "text_encoder", local_files_only=True).to(dtype)
    else:
        raise FileError(base, "no text encoder here", "Give a diffusers folder or a single-file checkpoint of SD1.x")
    return TextEncoder(load_tokenizer(Path(tokenizer or base / "tokenizer")), model.eval().requires_grad_(False))


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    folder = folder if folder.is_dir() else folder.parent
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        problem = "CLIP's tokenizer (vocab.json and merges.txt, or tokenizer.json) is not here"
        raise FileError(folder, problem, TOKENIZER)
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def single_file_text(path: Path, dtype: torch.dtype) -> CLIPTextModel:
    """CLIP's text model from its tensors; transformers' own names begin with `text_model.` before its version 5.6."""
    tensors = read(path).tensors
    state = part(tensors, f"state_dict.{TEXT}text_model.", f"{TEXT}text_model.", f"state_dict.{TEXT}", TEXT)
    state.pop("embeddings.position_ids", None)
    with torch.device("meta"):
        model = CLIPTextModel(text_config(path, state))
    if any(k.startswith("text_model.") for k in model.state_dict()):
        state = with_prefix("text_model.", state)
    missing = model.state_dict().keys() ^ state.keys()
    if missing:
        raise FileError(path, f"its text encoder is no CLIP of SD1.x: {sorted(missing)[:4]}", "Choose an SD1.x model")
    model = CLIPTextModel(text_config(path, state))
    model.load_state_dict(state)
    return model.to(dtype)


def text_config(path: Path, state: dict[str, Tensor]) -> CLIPTextConfig:
    state = part(state, "text_model.") or state
    try:
        vocabulary, width = state["embeddings.token_embedding.weight"].shape
        inner = state["encoder.layers.0.mlp.fc1.weight"].shape[0]
        positions = state["embeddings.position_embedding.weight"].shape[0]
    except KeyError as e:
        raise FileError(path, "there is no CLIP text encoder of SD1.x in it", "Choose an SD1.x model") from e
    return CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=len(numbers(state, r"encoder\.layers\.(\d+)\.")),
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=positions,
        hidden_act="quick_gelu",
    )


def digest(*modules: nn.Module) -> str:
    """A hash of the modules' weights, wherever they were loaded from."""
    total = hashlib.sha256()
    for module in modules:
        for name, x in sorted(module.state_dict().items()):
            total.update(name.encode())
            total.update(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return total.hexdigest()[:16]
