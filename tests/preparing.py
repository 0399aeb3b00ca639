"""Small real parts of an SD1.x base, and pictures, for preparing data sets on a CPU."""

import json
import sys
from pathlib import Path

import torch
from comfyui_wplus.wplus_core.checkpoints import save_parser
from comfyui_wplus.wplus_core.parsing import FaceParser, ParserConfig
from comfyui_wplus.wplus_core.photos import save_png
from diffusers import AutoencoderKL
from pictures import astronaut
from seeded import seed_
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    OPTConfig,
    PreTrainedTokenizerFast,
)

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts"))
import stand_ins  # noqa: E402

SPECIAL = ("<|startoftext|>", "<|endoftext|>")
SIZE = 64


def small_vae(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    vae = AutoencoderKL(3, 3, down, up, (32,) * 4, layers_per_block=1, latent_channels=4, sample_size=SIZE)
    return vae.eval().requires_grad_(False)


def small_text_encoder(seed: int = 0) -> CLIPTextModel:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=768, intermediate_size=64, num_hidden_layers=1, num_attention_heads=12)
    special = dict(bos_token_id=512, eos_token_id=513, pad_token_id=513, hidden_act="quick_gelu")
    return CLIPTextModel(CLIPTextConfig(vocab_size=514, **sizes, **special)).eval()


def write_tokenizer(folder: Path) -> Path:
    """CLIP's byte-pair tokenizer without a single merge: every letter is a token."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in kept] + [chr(256 + n) for n in range(256 - len(kept))]
    vocabulary = [*letters, *(c + "</w>" for c in letters), *SPECIAL]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    options = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": SPECIAL[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(options))
    return folder


def write_base(folder: Path) -> Path:
    """A diffusers folder without a UNet."""
    small_vae().save_pretrained(folder / "vae")
    small_text_encoder().save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    return folder


def small_world(folder: Path) -> dict[str, Path]:
    """base, encoder (with its generator) and parser."""
    return {
        "base": write_base(folder / "base"),
        "encoder": stand_ins.write(folder, "encoder"),
        "parser": write_parser(folder / "parser.safetensors"),
    }


def write_parser(path: Path) -> Path:
    """Random, but of weights by which a face has background, skin and hair."""
    save_parser(seed_(FaceParser(ParserConfig(channels=(8,) * 5, body=1)), 1, "parse."), path)
    return path


def write_photos(folder: Path) -> Path:
    """Five pictures of a face with captions, one of them in a subfolder, and four that cannot be used."""
    photo = astronaut()
    (folder / "more").mkdir(parents=True)
    good = {"a": photo, "b": photo.flip(2), "c": photo * 0.8, "d": photo[:, :400], "more/e": photo[:, :, 100:]}
    bad = {"empty": torch.full((3, 64, 64), 0.5), "small": half(photo), "twins": torch.cat([photo, photo], 2)}
    for name, picture in (good | bad).items():
        save_png(picture, folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"\na picture called {name}\nsecond line\n")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    (folder / "broken.txt").write_text("a broken picture")
    (folder / "notes.md").write_text("no picture")
    return folder


def half(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.interpolate(x[None], scale_factor=0.5, mode="area")[0]


def write_blip2(folder: Path) -> Path:
    """A random BLIP-2 of the published parts (ViT, Q-Former, OPT), in transformers' layout."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"word{i}": 3 + i for i in range(60)} | {"<image>": 63}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", eos_token="</s>", bos_token="</s>", unk_token="<unk>")
    special |= dict(extra_special_tokens={"image_token": "<image>"})
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    small = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    ids = dict(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    text = OPTConfig(ffn_dim=32, word_embed_proj_dim=16, **small, **ids)
    small |= dict(intermediate_size=32)
    config = Blip2Config(
        vision_config=Blip2VisionConfig(image_size=28, patch_size=14, **small).to_dict(),
        qformer_config=Blip2QFormerConfig(vocab_size=64, encoder_hidden_size=16, **small).to_dict(),
        text_config=text.to_dict(),
        num_query_tokens=4,
        image_token_index=63,
    )
    torch.manual_seed(0)
    Blip2ForConditionalGeneration(config).save_pretrained(folder)
    images = BlipImageProcessor(size={"height": 28, "width": 28})
    Blip2Processor(images, fast, num_query_tokens=4).save_pretrained(folder)
    return folder
