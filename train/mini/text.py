"""The miniature's text encoder: a one-layer CLIP and a CLIP tokenizer that knows the drawn world's words.

Both are files of the usual kind: transformers, diffusers and ComfyUI load them as they load SD1.x's.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..base import TextEncoder, load_text_encoder
from . import scenes, world
from .fit import Fit, fit

TOKENS = 40  # of a prompt: start, words, end, and ends up to here
START, END = "<|startoftext|>", "<|endoftext|>"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:;!?-_'\"()[]{}<>/\\|+*&%$#@=~^`"


def merges(words: tuple[str, ...] = scenes.WORDS) -> list[tuple[str, str]]:
    """Byte-pair encoding, most common pair first, until every word is one token."""
    split = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    found = []
    while pairs := Counter(pair for pieces in split for pair in pairwise(pieces)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        found.append(best)
        split = [merged(pieces, best) for pieces in split]
    return found


def merged(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def write_tokenizer(folder: Path):
    """A folder that CLIPTokenizer.from_pretrained takes."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = merges()
    pieces = [*CHARACTERS, *(f"{c}</w>" for c in CHARACTERS), *("".join(pair) for pair in pairs), START, END]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, indent=0), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in pairs)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


def new_text_model(vocabulary: dict[str, int]) -> CLIPTextModel:
    torch.manual_seed(3)
    ends = {"bos_token_id": vocabulary[START], "eos_token_id": vocabulary[END], "pad_token_id": vocabulary[END]}
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary), hidden_size=768, intermediate_size=64, num_hidden_layers=1,
            num_attention_heads=12, max_position_embeddings=TOKENS, hidden_act="quick_gelu", projection_dim=768, **ends,
        )
    )  # fmt: skip


class Labeller(nn.Module):
    """The text model with heads that tell the scene's labels and the person's looks from the last token, as CLIP tells
    its picture."""

    def __init__(self, text: CLIPTextModel):
        super().__init__()
        self.text = text
        self.heads = nn.ModuleList(nn.Linear(768, len(values)) for values in scenes.LABELS.values())
        self.looks = nn.Linear(768, len(world.LOOK_WORDS))

    def forward(self, ids: Tensor) -> tuple[list[Tensor], Tensor]:
        pooled = self.text(ids).pooler_output
        return [head(pooled) for head in self.heads], self.looks(pooled)


def loss_with(tokenizer):
    def loss(labeller: Labeller, batch: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """Cross-entropy of each label and word, read from the caption."""
        s, device = scenes.sample_scenes(batch, rng), labeller.looks.weight.device
        words = world.some_looks(world.sample(batch, rng), rng)
        captions = [world.looking(c, w) for c, w in zip(scenes.captions(s), words, strict=True)]
        ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        logits, looks = labeller(ids.to(device))
        said = torch.tensor([[float(word in row) for word in world.LOOK_WORDS] for row in words], device=device)
        labels = [getattr(s, name).to(device) for name in scenes.LABELS]
        right = torch.stack([(x.argmax(1) == y).float().mean() for x, y in zip(logits, labels, strict=True)])
        losses = [F.cross_entropy(x.float(), y) for x, y in zip(logits, labels, strict=True)]
        seen = F.binary_cross_entropy_with_logits(looks.float(), said, reduction="none").sum(1).mean()
        return {"total": torch.stack(losses).mean() + 0.1 * seen, "accuracy": right.mean(), "looks": seen}

    return loss


@torch.no_grad()
def keep_words(model: CLIPTextModel, vocabulary: dict[str, int], start: Path):
    """Take the weights of the text encoder in the base folder `start`, and train nothing but words that it lacks.

    So every caption that it knew is embedded as before, and a UNet that was trained with it goes on where it was.
    """
    old = CLIPTextModel.from_pretrained(start / "text_encoder", torch_dtype=torch.float32)
    words = json.loads((start / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    both = [word for word in words if word in vocabulary]
    places = slice(old.config.max_position_embeddings)
    rows = {  # of the new tables, and of the old
        "token_embedding": ([vocabulary[word] for word in both], [words[word] for word in both]),
        "position_embedding": (places, places),
    }
    weights = dict(old.named_parameters())
    for name, p in model.named_parameters():
        to, of = next((pair for table, pair in rows.items() if table in name), (slice(None), slice(None)))
        learns = torch.ones_like(p)
        p[to], learns[to] = weights[name][of], 0
        p.register_hook(lambda gradient, learns=learns: gradient * learns.to(gradient.device))


def make(out: Path, settings: Fit, device: str, start: Path | None = None) -> Path:
    """Write base/tokenizer, train the model and write base/text_encoder.

    start: the folder of a miniature whose words it keeps.
    """
    base = out / "base"
    write_tokenizer(base / "tokenizer")
    vocabulary = json.loads((base / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    loss, model = loss_with(tokenizer), new_text_model(vocabulary)
    if start:
        keep_words(model, vocabulary, start / "base")
    labeller = fit(Labeller(model), loss, settings, out / "runs" / "text", device)
    labeller.text.cpu().half().save_pretrained(base / "text_encoder")
    return base / "text_encoder" / "model.safetensors"


def load(out: Path, device: str = "cpu") -> TextEncoder:
    encoder = load_text_encoder(out / "base")
    encoder.model.to(device)
    return encoder
