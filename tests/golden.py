"""Compare ours with the reference implementation's tensors under seeded weights.

    python tests/golden.py DIR [--data DIR]
    python tests/golden.py DIR --comfyui

DIR: a folder of golden .safetensors files. --data: the folder of photos/ and directions/, by default DIR/../data.
Prints a line per case: name, error, bound, ok. Exits 1 if a case is over its bound or a file has no case.
Errors are relative, ||ours - golden|| / ||golden|| in float32, unless the case's name says otherwise.
"""

from __future__ import annotations

import argparse
import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from comfyui.server import environment
from comfyui_wplus.train.attention import cross_attention_channels, install
from comfyui_wplus.train.draws import DROP_TEXT, DROP_W
from comfyui_wplus.train.model import Denoiser, set_trainable
from comfyui_wplus.train.objectives import Batch, Objective, add_noise
from comfyui_wplus.wplus_core.adapter import (
    AdapterConfig,
    ResidualCrossAttention,
    WPlusAdapter,
    add_folded,
    fold_attention,
)
from comfyui_wplus.wplus_core.align import align
from comfyui_wplus.wplus_core.background import parse
from comfyui_wplus.wplus_core.direction_files import load_directions
from comfyui_wplus.wplus_core.encoder import EncoderConfig, build_encoder
from comfyui_wplus.wplus_core.faces import FaceFinder
from comfyui_wplus.wplus_core.formats import adapter_from_reference, adapter_to_reference
from comfyui_wplus.wplus_core.parsing import FaceParser
from comfyui_wplus.wplus_core.photos import load_photo
from comfyui_wplus.wplus_core.stylegan2 import Generator, GeneratorConfig, truncate
from diffusers import UNet2DConditionModel
from golden_form import Golden, Result, case, largest_difference, relative, report
from seeded import seed_, seeded_state
from torch import Tensor


@lru_cache(1)
def seeded_adapter(seed: int, channels: tuple[int, ...], mapping="w_proj.", layers="wplus_adapter.") -> WPlusAdapter:
    """An adapter whose weights the recipe makes under the reference's keys, which go through our key table."""
    with torch.device("meta"):
        adapter = WPlusAdapter(AdapterConfig(channels=channels))
    template = adapter_to_reference(adapter.state_dict())
    state = {}
    for part, prefix in (("w_proj.", mapping), ("wplus_adapter.", layers)):
        keys = {k.removeprefix(part): x for k, x in template.items() if k.startswith(part)}
        state |= {part + k: x for k, x in seeded_state(keys, seed, prefix).items()}
    adapter.load_state_dict(adapter_from_reference(state), assign=True)
    return adapter.eval().requires_grad_(False)


@lru_cache(1)
def seeded_sd15(seed: int) -> UNet2DConditionModel:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    seed_(unet, seed, "unet.")
    install(unet)
    return unet


@case("mapping")
def mapping(g: Golden) -> Iterator[Result]:
    adapter = seeded_adapter(g.seed, AdapterConfig.channels)
    yield Result("tokens", relative(adapter.mapping(g["w"]), g["tokens"]), 1e-5)
    zero = adapter.mapping(torch.zeros_like(g["w"][:1]))
    yield Result("tokens of zero", relative(zero, g["tokens_of_zero"]), 1e-5)


@case("attention")
def attention(g: Golden) -> Iterator[Result]:
    width = g["hidden"].shape[-1]
    residual = ResidualCrossAttention(width)
    keys = {k.replace("_wplus", ""): k for k in g.metadata["processor_keys"]}
    weights = seeded_state({theirs: residual.state_dict()[k] for k, theirs in keys.items()}, g.seed, f"proc{width}.")
    residual.load_state_dict({k: weights[theirs] for k, theirs in keys.items()})
    sizes = {k: torch.empty(s) for k, s in g.metadata["attention_keys"].items()}
    attn = seeded_state(sizes, g.seed, f"attn{width}.")
    heads = residual.heads
    qkv = (F.linear(x, attn[f"to_{n}.weight"]) for n, x in zip("qkv", (g["hidden"], g["text"], g["text"]), strict=True))
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in qkv)
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    fold = fold_attention(residual.to_q.weight, residual.to_k.weight, residual.to_v.weight, g["tokens"], heads)

    def out(h: Tensor) -> Tensor:
        return F.linear(h, attn["to_out.0.weight"], attn["to_out.0.bias"])

    for scale, golden in g.numbered("out_scale_"):
        reference = h + scale * residual(h, g["tokens"])
        yield Result(f"scale {scale}, reference form", relative(out(reference), golden), 1e-5)
        folded = add_folded(h, *fold, g["tokens"].shape[1], heads, torch.full((1, 1, 1), scale))
        yield Result(f"scale {scale}, folded", relative(out(folded), golden), 1e-5)


@case("unet")
def unet(g: Golden) -> Iterator[Result]:
    model = seeded_sd15(g.seed)
    adapter = seeded_adapter(g.seed, cross_attention_channels(model))
    tokens, folded = adapter.mapping(g["w"]), adapter.fold(g["w"])

    def eps(wplus=None) -> Tensor:
        return model(g["latents"], g["timesteps"], g["text"], cross_attention_kwargs={"wplus": wplus}).sample

    plain = eps()
    yield Result("plain", relative(plain, g["eps_plain"]), 1e-4)
    for scale, golden in g.numbered("eps_scale_"):
        reference, fold = eps(adapter.residual(tokens, scale)), eps(folded.scaled(scale))
        yield Result(f"scale {scale}, reference form", relative(reference, golden), 1e-4)
        yield Result(f"scale {scale}, folded", relative(fold, golden), 1e-4)
        yield Result(f"scale {scale}, folded against reference form", relative(fold, reference), 1e-5)
        if scale == 0:
            for form, x in (("reference form", reference), ("folded", fold)):
                yield Result(f"scale 0, {form}, numbers that differ from plain", (x != plain).sum().item(), 0)


@case("sampling")
def sampling(g: Golden) -> Iterator[Result]:
    model = seeded_sd15(g.seed)
    adapter = seeded_adapter(g.seed, cross_attention_channels(model))
    codes = torch.cat([torch.zeros_like(g["w"]), g["w"]])  # unconditional first
    folded = adapter.fold(codes).scaled(float(g.metadata["scale"]))
    text = torch.cat([g["negative"], g["positive"]])
    sigmas, guidance = g["sigmas"], float(g.metadata["guidance"])
    for start, golden in g.numbered("final_start_"):
        x = g["noise"] * (1 + sigmas[0] ** 2).sqrt()
        for i, t in enumerate(g["sampler_timesteps"]):
            z = (x / (1 + sigmas[i] ** 2).sqrt()).repeat(2, 1, 1, 1)
            wplus = folded if i > start else None
            uncond, cond = model(z, t, text, cross_attention_kwargs={"wplus": wplus}).sample.chunk(2)
            x = x + (sigmas[i + 1] - sigmas[i]) * (uncond + guidance * (cond - uncond))
        yield Result(f"on after step {start:.0f}", relative(x, golden), 1e-3)


@lru_cache(1)
def seeded_e4e(seed: int):
    with torch.device("meta"):
        encoder = build_encoder(EncoderConfig())
    state = encoder.state_dict()
    latent_avg = {"latent_avg": state.pop("latent_avg")}
    state = seeded_state(state, seed, "encoder.") | seeded_state(latent_avg, seed)
    state = {k: torch.zeros((), dtype=x.dtype) if x.is_meta else x for k, x in state.items()}
    encoder.load_state_dict(state, assign=True)
    return encoder.eval().requires_grad_(False)


@case("e4e")
def e4e(g: Golden) -> Iterator[Result]:
    encoder, x = seeded_e4e(g.seed), g["image"].float()
    yield Result("latent_avg", relative(encoder.latent_avg, g["latent_avg"]), 1e-4)
    yield Result("raw codes", relative(encoder.offsets(x), g["raw_codes"]), 1e-4)
    yield Result("codes", relative(encoder(x), g["codes"]), 1e-4)


@case("stylegan2")
def stylegan2(g: Golden) -> Iterator[Result]:
    size = 2 ** (g["w"].shape[1] // 2 + 1)
    generator = seed_(Generator(GeneratorConfig.for_size(size)), g.seed, "decoder.")
    w_of_z = generator.mapping(g["z"])
    yield Result("w of z (absolute)", (w_of_z - g["w_of_z"]).abs().max().item(), 1e-3)
    for key, image in (
        ("image", generator(g["w"])),
        ("truncated", generator(truncate(w_of_z, w_of_z.mean(0), float(g.metadata.get("truncation", 0.7))))),
    ):
        for name, golden in g.tensors.items():
            if name.startswith(f"{key}_area"):
                error = (F.interpolate(image, golden.shape[-2:], mode="area") - golden).abs().max().item()
                yield Result(f"{name} (absolute)", error, 1e-3)
            elif name.startswith(f"{key}_centre"):
                a = (size - golden.shape[-1]) // 2
                b = a + golden.shape[-1]
                yield Result(f"{name} (absolute)", (image[..., a:b, a:b] - golden).abs().max().item(), 1e-3)


@case("photo_to_w")
def photo_to_w(g: Golden) -> Iterator[Result]:
    photo = load_photo(g.data / "photos" / g.metadata["photo"])
    faces = FaceFinder()(photo, order="as-found")
    boxes, points = torch.tensor([f.box for f in faces]), torch.stack([torch.from_numpy(f.points) for f in faces])
    yield Result("boxes (pixels)", largest_difference(boxes, g["rects"]), 0)
    yield Result("landmarks (pixels)", largest_difference(points, g["landmarks"]), 1)
    theirs = load_photo(g.path.with_name("aligned.png")).pixels
    ours = align(photo.pixels, [faces[0].landmarks], theirs.shape[-1], "black").images[0]
    yield Result("aligned (root mean square; 0.01 is 40 dB)", (ours - theirs).square().mean().sqrt().item(), 0.01)
    regions = parse(theirs[None], seed_(FaceParser(), g.seed, "parse."))
    differ = regions.classes[:, ::4, ::4] != g["parse_classes_stride4"]
    yield Result("classes of the same crop (part that differs)", differ.float().mean().item(), 0.005)
    differ = regions.mask("background")[0, 0] != g["background_mask"]
    yield Result("background of the same crop (part that differs)", differ.float().mean().item(), 0.005)
    codes = seeded_e4e(g.seed)(g["masked_image"][None].float())
    yield Result("w from the masked picture", relative(codes, g["w_from_half_image"]), 1e-4)


@case("losses")
def losses(g: Golden) -> Iterator[Result]:
    with torch.inference_mode(False), torch.enable_grad():
        yield from list(losses_with_gradients(g))


def losses_with_gradients(g: Golden) -> Iterator[Result]:
    x, meta = {k: x.clone() for k, x in g.tensors.items()}, g.metadata
    unet = seed_(UNet2DConditionModel(**meta["unet_config"]), g.seed, meta["prefixes"]["unet"])
    prefixes = meta["prefixes"]["mapping"], meta["prefixes"]["adapter"]
    adapter = copy.deepcopy(seeded_adapter(g.seed, cross_attention_channels(unet), *prefixes))
    model = Denoiser(unet, adapter)
    if (x["drop"] & DROP_TEXT).any():
        raise ValueError("rows without their text, but the file has no embedding of the empty text")
    kept = ((x["drop"] & DROP_W) == 0)[:, None, None]
    w, w_hat = kept * x["w"], kept * x["w_augmented"]
    batch = Batch(x["z0"], x["noise"], x["timesteps"], x["text"], w, w_hat, x["face_mask"], torch.ones(1, 1, 1, 1))
    zt = add_noise(batch.z0, batch.noise, batch.t)
    yield Result("z_t", relative(zt, x["zt"]), 1e-4)
    with torch.no_grad():
        for key, w, scale in (("eps_w", batch.w, 1.0), ("eps_aug", batch.w_hat, 1.0), ("eps_0", batch.w, 0.0)):
            yield Result(key, relative(model(zt, batch.t, batch.c, w, scale), x[key]), 1e-4)

    set_trainable(adapter, mapping=True)
    total = Objective()(model, batch)["total"]
    total.backward()
    yield Result("stage 1", distance(total, meta["stage1"]), 1e-4)
    for name, part in (("mapping", adapter.mapping), ("adapter", adapter.layers)):
        golden = meta["stage1_grad_norms"][name]
        yield Result(f"stage 1, gradient of {name}", distance(gradient_norm(part), golden), 1e-4)

    adapter.zero_grad()
    set_trainable(adapter, mapping=False)
    values = Objective(*meta["lambdas"])(model, batch)
    values["total"].backward()
    for name, golden in meta["stage2"].items():
        yield Result(f"stage 2, {name}", distance(values[name], golden), 1e-4)
    norm = gradient_norm(adapter.layers)
    yield Result("stage 2, gradient of adapter", distance(norm, meta["stage2_adapter_grad_norm"]), 1e-4)
    moved = sum(p.grad is not None or p.requires_grad for p in adapter.mapping.parameters())
    yield Result("stage 2, weights of the mapping network with a gradient", moved, 0)


def distance(ours: Tensor, golden: float) -> float:
    return abs(ours.item() - golden) / abs(golden)


def gradient_norm(module: torch.nn.Module) -> Tensor:
    """In float64: over the mapping network's millions of numbers a float32 norm is off by 6e-5."""
    return torch.stack([p.grad.double().norm() for p in module.parameters()]).norm()


@case("directions")
def directions(g: Golden) -> Iterator[Result]:
    for name, golden in g.tensors.items():
        if name != "w":
            group, direction, strength = name.rsplit("/", 2)
            moved = find_direction(g.data / "directions" / group, direction).move(g["w"], float(strength))
            yield Result(name, relative(moved, golden), 1e-5)


def find_direction(folder: Path, name: str):
    """The named direction of any file in the folder."""
    for path in sorted(folder.iterdir()):
        if path.suffix != ".csv":
            for direction in load_directions(path):
                if direction.name == name:
                    return direction
    raise LookupError(f"no direction {name!r} in {folder}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden", type=Path, metavar="DIR")
    parser.add_argument("--data", type=Path, help="folder with photos/ and directions/ (default: DIR/../data)")
    parser.add_argument("--comfyui", action="store_true", help="the unet and sampling cases through ComfyUI's sampler")
    args = parser.parse_args()
    paths = sorted(args.golden.glob("*.safetensors"))
    if not paths:
        parser.error(f"no .safetensors files in {args.golden}")
    if args.comfyui:
        return run_in_comfyui(args.golden)
    return 1 if report(paths, args.data or args.golden.resolve().parent / "data") else 0


def run_in_comfyui(folder: Path) -> int:
    """The cases of tests/in_process/golden_comfyui.py in ComfyUI's own Python."""
    checkout, python = environment("newest")
    script = Path(__file__).parent / "in_process" / "golden_comfyui.py"
    env = os.environ | {"COMFYUI_CHECKOUT": str(checkout)}
    return subprocess.run([python, script, folder.resolve()], env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
