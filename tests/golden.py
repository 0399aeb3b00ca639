"""Compare ours with the reference implementation's tensors under seeded weights.

    python tests/golden.py DIR [--data DIR]

DIR: a folder of golden .safetensors files. --data: the folder of photos/ and directions/, by default DIR/../data.
Prints a line per case: name, error, bound, ok. Exits 1 if a case is over its bound or a file has no case.
Errors are relative, ||ours - golden|| / ||golden|| in float32, unless the case's name says otherwise.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from comfyui_wplus.train.attention import cross_attention_channels, install
from comfyui_wplus.wplus_core.adapter import (
    AdapterConfig,
    ResidualCrossAttention,
    WPlusAdapter,
    add_folded,
    fold_attention,
)
from comfyui_wplus.wplus_core.checkpoints import load_directions
from comfyui_wplus.wplus_core.encoder import EncoderConfig, build_encoder
from comfyui_wplus.wplus_core.formats import adapter_from_reference, adapter_to_reference
from comfyui_wplus.wplus_core.parsing import FaceParser
from comfyui_wplus.wplus_core.stylegan2 import Generator, GeneratorConfig, truncate
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from seeded import seed_, seeded_state
from torch import Tensor


@dataclass
class Golden:
    """One golden file: its tensors by name, its metadata (JSON values), and where the real data lie."""

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    data: Path

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    @property
    def seed(self) -> int:
        return int(self.metadata["seed"])

    def numbered(self, prefix: str) -> list[tuple[float, Tensor]]:
        """(x, tensor) of every key `prefix` + x."""
        return [(float(k.removeprefix(prefix)), x) for k, x in self.tensors.items() if k.startswith(prefix)]


@dataclass
class Result:
    name: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound


CASES: dict[str, Callable[[Golden], Iterator[Result]]] = {}


def case(name: str):
    def register(function):
        CASES[name] = function
        return function

    return register


def relative(ours: Tensor, golden: Tensor) -> float:
    if ours.shape != golden.shape:
        return math.inf
    return ((ours.float() - golden.float()).norm() / golden.float().norm()).item()


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
    parser = seed_(FaceParser(), g.seed, "parse.")
    encoder = seeded_e4e(g.seed)
    codes = encoder(g["masked_image"][None].float())
    yield Result("w from the masked picture", relative(codes, g["w_from_half_image"]), 1e-4)
    assert parser
    raise NotImplementedError("alignment and parsing of the photo")


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


def read(path: Path, data: Path) -> Golden:
    with safe_open(path, framework="pt") as f:
        metadata = {k: json.loads(v) for k, v in (f.metadata() or {}).items()}
        return Golden(path.stem, {k: f.get_tensor(k) for k in f.keys()}, metadata, data)


def case_of(name: str) -> Callable[[Golden], Iterator[Result]] | None:
    """`attention_320` is a case of `attention`; the longest matching name wins."""
    matching = [c for c in CASES if name == c or name.startswith(f"{c}_")]
    return CASES[max(matching, key=len)] if matching else None


@torch.inference_mode()
def run(path: Path, data: Path) -> Iterator[Result | str]:
    """The results of one golden file; a string says why there are none."""
    function = case_of(path.stem)
    if function is None:
        yield "no case for this file"
        return
    try:
        yield from function(read(path, data))
    except (NotImplementedError, LookupError, FileNotFoundError) as e:
        yield f"missing: {e}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("golden", type=Path, metavar="DIR")
    parser.add_argument("--data", type=Path, help="folder with photos/ and directions/ (default: DIR/../data)")
    args = parser.parse_args()
    paths = sorted(args.golden.glob("*.safetensors"))
    if not paths:
        parser.error(f"no .safetensors files in {args.golden}")
    bad = 0
    for path in paths:
        for result in run(path, args.data or args.golden.resolve().parent / "data"):
            if isinstance(result, str):
                print(f"{path.stem}: {result}  FAIL")
                bad += 1
            else:
                verdict = "ok" if result.ok else "FAIL"
                print(f"{path.stem}: {result.name}  {result.error:.2e}  <= {result.bound:g}  {verdict}", flush=True)
                bad += not result.ok
    print(f"{bad} failed" if bad else "all ok")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
