"""What the adapter costs in a UNet step: plain, reference form and folded, interleaved in one run.

    python benchmarks/step_overhead.py                      # SD1.5 size, random weights, 32 and 64 px latents, CPU
    python benchmarks/step_overhead.py --device cuda --dtypes float16 bfloat16 --rounds 50

Each round times the three forms one after the other, in an order that rotates. A ratio is the fastest step of a form
over the fastest plain one: other work on the machine only ever adds to a step. "plain again" times the plain model a
second time in each round: its ratio's distance from 1 is the noise of the measurement. On a CPU there is a number that
noise hardly touches: how much of one and the same step the adapter's operations take, "folded_share" (the median).
The last line is a JSON object: folded_over_plain, reference_over_plain and folded_share (the worst over the settings),
resident_bytes (what one identity keeps on the device while sampling, float16), and every setting's numbers.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median

import torch
from comfyui_wplus.train.attention import cross_attention_channels, install
from comfyui_wplus.wplus_core.adapter import AdapterConfig, FoldedAdapter, WPlusAdapter
from diffusers import UNet2DConditionModel


def timed(step, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


class Watched:
    """A folded adapter that adds up the seconds its operations take."""

    def __init__(self, folded: FoldedAdapter):
        self.folded, self.seconds = folded, 0.0

    def add(self, h: torch.Tensor, i: int) -> torch.Tensor:
        start = time.perf_counter()
        h = self.folded.add(h, i)
        self.seconds += time.perf_counter() - start
        return h


def share_of_step(step, watched: Watched) -> float:
    watched.seconds = 0.0
    whole = timed(step, "cpu")
    return watched.seconds / whole


def measure(unet, adapter, side: int, dtype: torch.dtype, device: str, rounds: int) -> dict[str, float]:
    z = torch.randn(2, 4, side, side, device=device, dtype=dtype)
    text = torch.randn(2, 77, 768, device=device, dtype=dtype)
    w = torch.randn(2, adapter.config.w_layers, adapter.config.w_dim, device=device)
    forms = {
        "plain": None,
        "plain again": None,
        "reference": adapter.residual(adapter.mapping(w)),
        "folded": adapter.fold(w).to(dtype=dtype),
    }

    def step(wplus):
        return lambda: unet(z, 500, text, cross_attention_kwargs={"wplus": wplus})

    for wplus in forms.values():
        step(wplus)()
    times = {name: [] for name in forms}
    for i in range(rounds):
        names = list(forms)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(timed(step(forms[name]), device))
    fastest = {name: min(seconds) for name, seconds in times.items()}
    plain = fastest.pop("plain")
    ratios = {f"{name.replace(' ', '_')}_over_plain": s / plain for name, s in fastest.items()}
    if device == "cpu":
        watched = Watched(forms["folded"])
        ratios["folded_share"] = median(share_of_step(step(watched), watched) for _ in range(max(3, rounds // 2)))
    return {"plain_s": plain} | ratios


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--latents", nargs="+", type=int, default=[32, 64])
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.device(args.device):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval()
        install(unet)
        adapter = WPlusAdapter(AdapterConfig(channels=cross_attention_channels(unet))).eval()
    resident = adapter.fold(torch.randn(1, 18, 512, device=args.device)).to(dtype=torch.float16).nbytes
    settings = []
    for name in args.dtypes:
        dtype = getattr(torch, name)
        unet.to(dtype)
        adapter.to(dtype)
        for side in args.latents:
            numbers = measure(unet, adapter, side, dtype, args.device, args.rounds)
            settings.append({"dtype": name, "latents": side} | numbers)
            print(json.dumps(settings[-1]), flush=True)
    names = ("folded_over_plain", "reference_over_plain", "folded_share")
    result = {k: max(s[k] for s in settings) for k in names if k in settings[0]}
    print(json.dumps(result | {"resident_bytes": resident, "device": args.device, "settings": settings}))


if __name__ == "__main__":
    main()
