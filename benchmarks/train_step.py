"""What a training step costs: ours against the published trainer's way of doing it, interleaved in one run.

    python benchmarks/train_step.py                                # SD1.5's plan at 1/8 of its widths, 256 px, CPU
    python benchmarks/train_step.py --precision bf16               # the reference under autocast, ours in bfloat16
    python benchmarks/train_step.py --no-compile                   # ours without torch.compile, too
    python benchmarks/train_step.py --full --device cuda           # SD1.5, 512 px, generated data, bfloat16

The reference's way: the VAE and the text encoder run in every step, the UNet is float32 under autocast, the adapter's
attentions are computed as they are written, and stage II makes three passes one after the other. Ours: latents and text
embeddings are read from the data set, the UNet is in the training precision, channels-last and compiled, as by the
presets `stage1` and `stage2`, the adapter is folded with its tokens, and stage II's two passes without gradient are one
batch. "cached" is the reference's way with ours' latents and text: what of the difference is the rest. All have the
same batch, the same adapter in float32, the same attention (SDPA) and the same precision, on a CPU float32 throughout
unless told otherwise. Reading data and compiling are left out of all; ours does more in a step (gradient clipping, the
check for NaN, the moving average).

Each round times every way once, in an order that rotates. The speed-up is the median over the rounds of the reference's
time over ours, for machines are noisy and the two of a round have met the same noise; images_per_s is of each way's
median step. peak_bytes is of a process of its own per way and stage: what it allocates beyond what it had after its
imports (CPU), or on the device (GPU). The last line is a JSON object: stage1_speedup, stage2_speedup, images_per_s and
peak_bytes by way and stage, and encoding_share, what of the reference's step is VAE and text encoder.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from comfyui_wplus.train import loop
from comfyui_wplus.train.attention import install
from comfyui_wplus.train.config import Config, Speed
from comfyui_wplus.train.model import Denoiser, new_adapter, set_trainable
from comfyui_wplus.train.objectives import Batch, Objective
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.utils import logging
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

OBJECTIVES = {1: Objective(), 2: Objective(disen=1.5, reg=1.0)}
WAYS = ("reference", "cached", "ours")
SHARE = 8


@dataclass
class Networks:
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text: CLIPTextModel


def networks(share: int) -> Networks:
    """SD1.5's, each at 1/share of its widths: fewer heads of the same width, and one layer of the text encoder, whose
    width is the context's."""
    norm = 32 if share == 1 else 8
    down, up = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
    unet, vae = (tuple(w // share for w in ws) for ws in ((320, 640, 1280, 1280), (128, 256, 512, 512)))
    layers = {"num_hidden_layers": 12 if share == 1 else 1, "intermediate_size": 3072 // share}
    return Networks(
        UNet2DConditionModel(
            sample_size=64,
            cross_attention_dim=768,
            block_out_channels=unet,
            norm_num_groups=norm,
            attention_head_dim=8 // share,  # diffusers' name for their number
        ),
        AutoencoderKL(3, 3, down, up, vae, layers_per_block=2, latent_channels=4, norm_num_groups=norm),
        CLIPTextModel(CLIPTextConfig(hidden_size=768, num_attention_heads=12, **layers)),
    )


@dataclass
class Inputs:
    """One generated batch, in both ways' forms: pictures and token numbers, or latents and embeddings."""

    pictures: Tensor
    ids: Tensor
    batch: Batch


def inputs(n: int, pixels: int, device: str) -> Inputs:
    rng = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng).to(device)

    side = pixels // 8
    t = torch.randint(1000, (n,), generator=rng).to(device)
    face = torch.zeros(n, 1, side, side, device=device)
    face[..., side // 4 : side // 2, side // 4 : side // 2] = 1
    batch = Batch(
        normal(n, 4, side, side), normal(n, 4, side, side), t, normal(n, 77, 768), normal(n, 18, 512),
        normal(n, 18, 512), face, torch.ones_like(face),
    )  # fmt: skip
    ids = torch.randint(49000, (n, 77), generator=rng).to(device)
    return Inputs(normal(n, 3, pixels, pixels).clamp(-1, 1), ids, batch)


class Reference:
    """The published way, written from its description. cached: latents and text are given instead."""

    def __init__(self, parts: Networks, stage: int, device: str, dtype: torch.dtype, cached: bool):
        self.unet, self.adapter = parts.unet.to(device).requires_grad_(False), new_adapter(parts.unet).to(device)
        install(self.unet)
        self.vae, self.text = (m.to(device, dtype).requires_grad_(False) for m in (parts.vae, parts.text))
        self.stage, self.dtype, self.device, self.cached = stage, dtype, device, cached
        trained = set_trainable(self.adapter, mapping=stage == 1)
        self.optimizer = torch.optim.AdamW(trained.values(), lr=1e-4, weight_decay=0.01)
        self.scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")

    def __call__(self, x: Inputs):
        with torch.autocast(torch.device(self.device).type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss(x)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def loss(self, x: Inputs) -> Tensor:
        z0, c = (x.batch.z0, x.batch.c) if self.cached else self.encode(x)
        noise = torch.randn_like(z0)
        t = torch.randint(1000, (len(z0),), device=z0.device)
        zt = self.scheduler.add_noise(z0, noise, t)
        eps = self.predict(zt, t, c, x.batch.w)
        loss = F.mse_loss(eps, noise.float())
        if self.stage == 1:
            return loss
        with torch.no_grad():
            eps_hat = self.predict(zt, t, c, x.batch.w_hat)
            plain = self.predict(zt, t, c, x.batch.w, 0.0)
        outside = 1 - F.interpolate(x.batch.face, z0.shape[-2:], mode="area")
        return loss + 1.5 * F.mse_loss(outside * eps, outside * eps_hat) + F.mse_loss(eps, plain)

    def predict(self, zt: Tensor, t: Tensor, c: Tensor, w: Tensor, scale: float = 1.0) -> Tensor:
        wplus = self.adapter.residual(self.adapter.mapping(w), scale)
        return self.unet(zt, t, c, cross_attention_kwargs={"wplus": wplus}).sample.float()

    @torch.no_grad()
    def encode(self, x: Inputs) -> tuple[Tensor, Tensor]:
        z0 = self.vae.encode(x.pictures.to(self.dtype)).latent_dist.sample() * self.vae.config.scaling_factor
        return z0, self.text(x.ids).last_hidden_state


class Ours:
    """`loop.step`, set up as `loop.train` does it."""

    def __init__(self, parts: Networks, stage: int, device: str, dtype: torch.dtype, compile: bool = True):
        name = {d: n for n, d in loop.DTYPES.items()}[dtype]
        speed = Speed(precision=name, channels_last=True, compile=compile)
        self.config = Config(Path("run"), Path("base"), (), objective=OBJECTIVES[stage], speed=speed)
        adapter = new_adapter(parts.unet)
        self.model = loop.prepare_unet(Denoiser(parts.unet.to(dtype), adapter), self.config).to(device)
        trained = set_trainable(adapter, mapping=stage == 1)
        optimizer, zero = loop.new_optimizer(trained, self.config.optim), torch.zeros((), dtype=int, device=device)
        ema = copy.deepcopy(adapter).requires_grad_(False)
        scaler = torch.amp.GradScaler(device, enabled=False)
        self.state = loop.State(adapter, ema, trained, optimizer, scaler, zero, zero)
        self.accelerator = Accelerator(cpu=device == "cpu")

    def __call__(self, x: Inputs):
        return loop.step(self.model, self.state, self.config, [x.batch], self.accelerator)


def make(way: str, stage: int, args: argparse.Namespace) -> Callable[[Inputs], object]:
    torch.manual_seed(0)
    parts, dtype = networks(1 if args.full else SHARE), loop.DTYPES[args.precision]
    if way == "ours":
        return Ours(parts, stage, args.device, dtype, args.compile)
    return Reference(parts, stage, args.device, dtype, way == "cached")


def timed(step: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(stage: int, x: Inputs, args: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each way's step in every round."""
    steps = {way: make(way, stage, args) for way in WAYS}
    for step in steps.values():
        step(x)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for i in range(args.rounds):
        for way in WAYS[i % len(WAYS) :] + WAYS[: i % len(WAYS)]:
            times[way].append(timed(lambda way=way: steps[way](x), args.device))
    return times


def times_faster(seconds: dict[str, list[float]], way: str) -> float:
    """The reference's time over this way's, the median of the rounds."""
    return median(a / b for a, b in zip(seconds["reference"], seconds[way], strict=True))


def peak(way: str, stage: int, args: argparse.Namespace) -> int:
    """Bytes that two steps of this way need in this process."""
    before = resident("VmRSS")
    step, x = make(way, stage, args), inputs(args.batch, args.pixels, args.device)
    for _ in range(2):
        step(x)
    if args.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes of this process by the kernel's name for them (Linux)."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def peak_elsewhere(way: str, stage: int) -> int:
    command = [sys.executable, __file__, *sys.argv[1:], "--peak", way, str(stage)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="SD1.5's widths")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", choices=tuple(loop.DTYPES), help="fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pixels", type=int, help="256, or 512 with --full")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="ours; the default")
    parser.add_argument("--peak", nargs=2, metavar=("WAY", "STAGE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    args.pixels = args.pixels or (512 if args.full else 256)
    args.precision = args.precision or ("fp32" if args.device == "cpu" else "bf16")
    if args.peak:
        print(peak(args.peak[0], int(args.peak[1]), args))
        return
    x = inputs(args.batch, args.pixels, args.device)
    result, rates, peaks, encoding = {}, {}, {}, {}
    for stage in (1, 2):
        seconds = measure(stage, x, args)
        name = f"stage{stage}"
        result[f"{name}_speedup"] = times_faster(seconds, "ours")
        rates[name] = {way: args.batch / median(s) for way, s in seconds.items()}
        encoding[name] = 1 - 1 / times_faster(seconds, "cached")
        peaks[name] = {way: peak_elsewhere(way, stage) for way in WAYS}
        print(json.dumps({name: {way: median(s) for way, s in seconds.items()}}), flush=True)
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    more = {"images_per_s": rates, "peak_bytes": peaks, "encoding_share": encoding, "device": device}
    settings = {k: getattr(args, k) for k in ("precision", "batch", "pixels", "full", "compile")}
    print(json.dumps(result | more | settings))


if __name__ == "__main__":
    main()
