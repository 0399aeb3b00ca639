"""Writes a small random SD1.x checkpoint that ComfyUI's CheckpointLoaderSimple takes for SD1.5.

    python scripts/tiny_sd.py models/checkpoints/untrained_sd.safetensors

What can shrink and what cannot (ComfyUI 0.14.0 and 0.33.0): SD1.5 is recognised by model_channels 320 and context 768,
so every level has 320 channels instead of 320, 640, 1280, 1280; the 16 attention sites are where they always are.
The text encoder is built from a fixed configuration, so it is a whole CLIP-L. The VAE is the size of TAESD.
`channel_mult=(1, 2, 4, 4)` gives the real UNet (1.7 GB).
"""

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file

CHANNELS, CONTEXT, TIME = 320, 768, 1280
CONTRAST = 0.1  # of the decoder's last layer: grey in the middle, and little of the picture clipped
Shapes = Iterator[tuple[str, tuple[int, ...]]]


def affine(name: str, *shape: int) -> Shapes:
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def res_block(name: str, c_in: int, c_out: int) -> Shapes:
    yield from affine(f"{name}.in_layers.0", c_in)
    yield from affine(f"{name}.in_layers.2", c_out, c_in, 3, 3)
    yield from affine(f"{name}.emb_layers.1", c_out, TIME)
    yield from affine(f"{name}.out_layers.0", c_out)
    yield from affine(f"{name}.out_layers.3", c_out, c_out, 3, 3)
    if c_in != c_out:
        yield from affine(f"{name}.skip_connection", c_out, c_in, 1, 1)


def transformer(name: str, c: int) -> Shapes:
    yield from affine(f"{name}.norm", c)
    yield from affine(f"{name}.proj_in", c, c, 1, 1)
    yield from affine(f"{name}.proj_out", c, c, 1, 1)
    block = f"{name}.transformer_blocks.0"
    for attention, context in (("attn1", c), ("attn2", CONTEXT)):
        yield f"{block}.{attention}.to_q.weight", (c, c)
        yield f"{block}.{attention}.to_k.weight", (c, context)
        yield f"{block}.{attention}.to_v.weight", (c, context)
        yield from affine(f"{block}.{attention}.to_out.0", c, c)
    yield from affine(f"{block}.ff.net.0.proj", 8 * c, c)
    yield from affine(f"{block}.ff.net.2", c, 4 * c)
    for i in (1, 2, 3):
        yield from affine(f"{block}.norm{i}", c)


def unet(channel_mult: tuple[int, ...]) -> Shapes:
    """The SD1.x UNet: attention on every level but the deepest, two residual blocks a level, three on the way up."""
    yield from affine("time_embed.0", TIME, CHANNELS)
    yield from affine("time_embed.2", TIME, TIME)
    yield from affine("input_blocks.0.0", CHANNELS, 4, 3, 3)
    c, skips, deepest = CHANNELS, [CHANNELS], len(channel_mult) - 1
    for level, mult in enumerate(channel_mult):
        for _ in range(2):
            block = f"input_blocks.{len(skips)}"
            yield from res_block(f"{block}.0", c, mult * CHANNELS)
            c = mult * CHANNELS
            if level < deepest:
                yield from transformer(f"{block}.1", c)
            skips.append(c)
        if level < deepest:
            yield from affine(f"input_blocks.{len(skips)}.0.op", c, c, 3, 3)
            skips.append(c)
    yield from res_block("middle_block.0", c, c)
    yield from transformer("middle_block.1", c)
    yield from res_block("middle_block.2", c, c)
    for level, mult in reversed(list(enumerate(channel_mult))):
        for i in range(3):
            block = f"output_blocks.{3 * (deepest - level) + i}"
            yield from res_block(f"{block}.0", c + skips.pop(), mult * CHANNELS)
            c = mult * CHANNELS
            if level < deepest:
                yield from transformer(f"{block}.1", c)
            if level and i == 2:
                yield from affine(f"{block}.{2 if level < deepest else 1}.conv", c, c, 3, 3)
    yield from affine("out.0", c)
    yield from affine("out.2", 4, c, 3, 3)


def controlnet(channel_mult: tuple[int, ...]) -> Shapes:
    """The UNet's way down and its middle, "zero" convolutions, and the way in of the hint."""
    down = [s for s in unet(channel_mult) if s[0].startswith(("time_embed.", "input_blocks.", "middle_block."))]
    yield from down
    widths = {int(name.split(".")[1]): shape[0] for name, shape in down if name.startswith("input_blocks.")}
    for i, c in widths.items():
        yield from affine(f"zero_convs.{i}.0", c, c, 1, 1)
    yield from affine("middle_block_out.0", c, c, 1, 1)
    hint = (3, 16, 16, 32, 32, 96, 96, 256, CHANNELS)
    for i, (c_in, c_out) in enumerate(pairwise(hint)):
        yield from affine(f"input_hint_block.{2 * i}", c_out, c_in, 3, 3)


def clip_l() -> Shapes:
    yield "embeddings.token_embedding.weight", (49408, 768)
    yield "embeddings.position_embedding.weight", (77, 768)
    for i in range(12):
        layer = f"encoder.layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from affine(f"{layer}.self_attn.{projection}", 768, 768)
        yield from affine(f"{layer}.mlp.fc1", 3072, 768)
        yield from affine(f"{layer}.mlp.fc2", 768, 3072)
        yield from affine(f"{layer}.layer_norm1", 768)
        yield from affine(f"{layer}.layer_norm2", 768)
    yield from affine("final_layer_norm", 768)


def taesd(coder: str, layers: list[tuple[str, int, int]]) -> Shapes:
    """`layers`: conv (with bias), resample (without) or block, with channels in and out; gaps have no weights."""
    for i, (kind, c_in, c_out) in enumerate(layers):
        if kind == "conv":
            yield from affine(f"{coder}.{i}", c_out, c_in, 3, 3)
        elif kind == "resample":
            yield f"{coder}.{i}.weight", (c_out, c_in, 3, 3)
        elif kind == "block":
            for j in (0, 2, 4):
                yield from affine(f"{coder}.{i}.conv.{j}", c_out, c_in, 3, 3)


def vae() -> Shapes:
    conv_in, conv_out, gap = ("conv", 3, 64), ("conv", 64, 4), ("none", 0, 0)
    block, resample = ("block", 64, 64), ("resample", 64, 64)
    yield from taesd("taesd_encoder", [conv_in, block, *3 * [resample, block, block, block], conv_out])
    up = [block, block, block, gap, resample]
    yield from taesd("taesd_decoder", [gap, ("conv", 4, 64), gap, *3 * up, block, ("conv", 64, 3)])


def weight(name: str, shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    """fp16: norms are the identity, biases zero, matrices keep the scale of what they multiply."""
    if len(shape) == 1:
        is_norm = "norm" in name or name.endswith((".in_layers.0.weight", ".out_layers.0.weight", "out.0.weight"))
        return torch.full(shape, float(is_norm and name.endswith("weight")), dtype=torch.float16)
    fan_in = 1 if "embedding" in name else torch.Size(shape[1:]).numel()
    return torch.empty(shape).normal_(std=fan_in**-0.5, generator=rng).half()


def write_controlnet(path: Path, seed: int = 0, channel_mult: tuple[int, ...] = (1, 1, 1, 1)) -> Path:
    rng = torch.Generator().manual_seed(seed)
    save_file({name: weight(name, shape, rng) for name, shape in controlnet(channel_mult)}, path)
    return path


def write(path: Path, seed: int = 0, channel_mult: tuple[int, ...] = (1, 1, 1, 1)) -> Path:
    """The checkpoint at path, made only where it does not lie already."""
    if path.exists():
        return path
    parts = {
        "model.diffusion_model.": unet(channel_mult),
        "cond_stage_model.transformer.text_model.": clip_l(),
        "first_stage_model.": vae(),
    }
    rng = torch.Generator().manual_seed(seed)
    state = {prefix + name: weight(name, shape, rng) for prefix, shapes in parts.items() for name, shape in shapes}
    state["first_stage_model.taesd_decoder.19.weight"] *= CONTRAST
    state["first_stage_model.taesd_decoder.19.bias"].fill_(0.5)
    state["first_stage_model.vae_scale"] = torch.tensor(1.0)
    state["first_stage_model.vae_shift"] = torch.tensor(0.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, path)
    return path


if __name__ == "__main__":
    write(Path(sys.argv[1]))
