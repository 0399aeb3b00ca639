"""Captions by BLIP-2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoProcessor, Blip2ForConditionalGeneration

from ..wplus_core.errors import FileError
from ..wplus_core.photos import to_uint8

MAX_TOKENS = 40


@dataclass
class Blip2:
    """BLIP-2 from a folder in transformers' layout; always the same caption for the same picture (no sampling)."""

    model: Blip2ForConditionalGeneration
    processor: Any

    @classmethod
    def load(cls, folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Blip2:
        try:
            model = Blip2ForConditionalGeneration.from_pretrained(folder, local_files_only=True)
            processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as e:
            raise FileError(folder, f"no BLIP-2 here ({e})", "Fetch Salesforce/blip2-opt-2.7b into it") from e
        return cls(model.to(device, dtype).eval().requires_grad_(False), processor)

    @torch.no_grad()
    def __call__(self, pictures: Sequence[Tensor]) -> list[str]:
        """Pictures [3, H, W] in 0..1 of any sizes -> a caption each."""
        inputs = self.processor(images=[to_uint8(p) for p in pictures], return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        return [t.strip() for t in self.processor.batch_decode(tokens, skip_special_tokens=True)]
