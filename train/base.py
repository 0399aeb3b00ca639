"""What surrounds the UNet in an SD1.x base: the VAE, and the text encoder with its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from ..wplus_core.errors import FileError


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


def load_vae(base: str | Path, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """The VAE of a diffusers folder, frozen."""
    return load(AutoencoderKL, Path(base), "vae", torch_dtype=dtype).requires_grad_(False).eval()


def load_text_encoder(base: str | Path, dtype: torch.dtype = torch.float32) -> TextEncoder:
    """The text encoder and tokenizer of a diffusers folder, frozen."""
    model = load(CLIPTextModel, Path(base), "text_encoder", dtype=dtype).requires_grad_(False).eval()
    return TextEncoder(load(CLIPTokenizer, Path(base), "tokenizer"), model)


def load(cls: Any, base: Path, part: str, **options: Any) -> Any:
    if not (base / part).is_dir():
        raise FileError(base, f"there is no folder {part!r} in it", "Give an SD1.x model as a whole diffusers folder")
    return cls.from_pretrained(base / part, local_files_only=True, **options)
