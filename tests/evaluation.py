"""Models small enough to evaluate with on a CPU: a whole SD1.x base of 128 px pictures, CLIP, recognisers."""

from pathlib import Path

import torch
from comfyui_wplus.train.model import new_adapter
from comfyui_wplus.wplus_core.checkpoints import save_adapter, save_identity
from comfyui_wplus.wplus_core.direction_files import save_directions
from comfyui_wplus.wplus_core.directions import Direction
from comfyui_wplus.wplus_core.identity import Identity
from preparing import write_base, write_tokenizer
from training import LAYERS, small_unet
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTextConfig, CLIPVisionConfig

TEXT = dict(intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=514)
TEXT |= dict(bos_token_id=512, eos_token_id=513, pad_token_id=513)


def small_base(folder: Path) -> Path:
    small_unet().save_pretrained(folder / "unet")
    return write_base(folder)


def small_clip(folder: Path) -> Path:
    torch.manual_seed(1)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    text = CLIPTextConfig(hidden_size=16, **TEXT)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def small_adapters(folder: Path) -> tuple[Path, Path]:
    """A residual and a parallel one."""
    paths = folder / "full.safetensors", folder / "parallel.safetensors"
    for path in paths:
        save_adapter(new_adapter(small_unet(), LAYERS, path.stem == "parallel", seed=3), path)
    return paths


def small_people(folder: Path, *names: str) -> Path:
    rng = torch.Generator().manual_seed(2)
    for name in names:
        thumbnail = torch.randint(0, 255, (48, 48, 3), generator=rng, dtype=torch.uint8)
        identity = Identity(torch.randn(LAYERS, 512, generator=rng), name, {}, thumbnail)
        save_identity(identity, folder / f"{name}.safetensors")
    return folder


def small_directions(path: Path, *names: str, layers: int = LAYERS) -> Path:
    rng = torch.Generator().manual_seed(4)
    save_directions([Direction(n, torch.randn(layers, 512, generator=rng)) for n in names], path)
    return path


class Colours(torch.nn.Module):
    """A recogniser that tells people by nine areas' colours; TorchScript can hold it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 3).flatten(1)


def torchscript_recogniser(path: Path) -> Path:
    torch.jit.script(Colours()).save(str(path))
    return path
