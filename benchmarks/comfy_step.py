"""What Apply W+ Adapter costs in a ComfyUI sampling step, beside the plain model and IPAdapter_plus.

    scripts/comfy-env newest                       # prints the checkout and its python; run with that python:
    COMFYUI_CHECKOUT=... PYTHON benchmarks/comfy_step.py [--ipadapter PATH] [--device cuda] [--latent 64]

SD1.5 size, random weights, guidance 7.5 (a batch of two), one identity. Each round times every model in turn, in an
order that rotates; a ratio is the fastest step over the fastest plain one (other work on the machine only ever adds to
a step), and "plain again" shows the measurement's noise. Host syncs are reads of a tensor's value on the host (and
copies from a GPU) in one step, less the plain model's. --ipadapter: a checkout of ComfyUI_IPAdapter_plus, run with
random weights of SD1.5's sizes.
The last line is a JSON object: wplus_over_plain, ipadapter_over_plain, host_syncs_per_step.
"""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "in_process"))
import comfy_setup  # noqa: E402, I001  (finds ComfyUI and this pack)
import comfy.cli_args  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.supported_models  # noqa: E402
import torch  # noqa: E402
from comfyui_wplus.nodes.apply import Apply  # noqa: E402
from comfyui_wplus.nodes.patch import cross_attention_sites  # noqa: E402
from comfyui_wplus.nodes.types import LoadedAdapter  # noqa: E402
from comfyui_wplus.wplus_core.adapter import AdapterConfig, WPlusAdapter  # noqa: E402
from comfyui_wplus.wplus_core.identity import Identity  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

WARM_UP, CALLS = 1, 2  # model calls of each run: the first is not timed


class HostReads(TorchDispatchMode):
    """Counts reads of a tensor's value on the host and copies from a device to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        to_host = isinstance(out, torch.Tensor) and out.device.type == "cpu" and any(
            isinstance(a, torch.Tensor) and a.device.type != "cpu" for a in args
        )
        self.count += func is torch.ops.aten._local_scalar_dense.default or to_host
        return out


def sd15(dtype: torch.dtype) -> comfy.model_patcher.ModelPatcher:
    config = comfy.supported_models.SD15({**comfy_setup.UNET, "model_channels": 320, "dtype": dtype})
    model = config.get_model({}, "")
    comfy_setup.fill(model.diffusion_model)
    model.diffusion_model.to(dtype)
    device = comfy.model_management.get_torch_device()
    return comfy.model_patcher.ModelPatcher(model, device, comfy.model_management.unet_offload_device())


def with_wplus(model):
    options = dict(weight=1.0, start_percent=0.0, end_percent=1.0, negative="zeros", layers="all", layer_weights="")
    adapter = LoadedAdapter("random", WPlusAdapter(AdapterConfig()).requires_grad_(False))
    return Apply.execute(model, adapter, {"identity0": Identity(torch.randn(1, 18, 512))}, **options).args[0]


def with_ipadapter(model, checkout: Path):
    """IPAdapter_plus' own patch on every cross-attention, with tokens as its nodes would make them."""
    spec = importlib.util.spec_from_file_location(
        "ipadapter_plus", checkout / "__init__.py", submodule_search_locations=[str(checkout)]
    )
    sys.modules["ipadapter_plus"] = pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    plus = sys.modules["ipadapter_plus.IPAdapterPlus"]
    device, dtype = comfy.model_management.get_torch_device(), model.model.get_dtype_inference()
    sites = cross_attention_sites(model.model.diffusion_model)
    weights = {
        f"{2 * i + 1}.to_{x}_ip.weight": torch.randn(c, 768) / 28 for i, (_, c) in enumerate(sites) for x in "kv"
    }
    image_proj = {"proj.weight": torch.randn(3072, 1024), "proj.bias": torch.zeros(3072)}
    image_proj |= {"norm.weight": torch.ones(768), "norm.bias": torch.zeros(768)}
    ipadapter = plus.IPAdapter({"image_proj": image_proj, "ip_adapter": weights}, 768, 768).to(device, dtype)
    tokens = [torch.randn(1, 4, 768, device=device, dtype=dtype) for _ in range(2)]
    patched = model.clone()
    for i, ((block, number, _), _) in enumerate(sites):
        kwargs = dict(ipadapter=ipadapter, weight=1.0, cond=tokens[0], uncond=tokens[1], module_key=str(2 * i + 1))
        plus.set_model_patch_replace(patched, kwargs | {"sigma_start": 1e9, "sigma_end": 0.0}, (block, number))
    return patched


def step(model, side: int) -> tuple[float, int]:
    """Seconds and host reads of a model call in a sampling run."""
    seconds, reads = [], []

    def run(model, x, sigmas, extra_args=None, callback=None, disable=None):
        sigma = sigmas[:1].to(x.device).expand(len(x))
        for i in range(WARM_UP + CALLS):
            started = timestamp(x.device)
            out = model(x, sigma, **extra_args)
            if i >= WARM_UP:
                seconds.append(timestamp(x.device) - started)
        with HostReads() as counter:
            model(x, sigma, **extra_args)
        reads.append(counter.count)
        return out

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds([[torch.randn(1, 77, 768), {}]], [[torch.randn(1, 77, 768), {}]])
    guider.set_cfg(7.5)
    x = torch.zeros(1, 4, side, side)
    guider.sample(x + 1, x, comfy.samplers.KSAMPLER(run), torch.tensor([5.0, 0.0]), seed=0, disable_pbar=True)
    return min(seconds), reads[-1]


def timestamp(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ipadapter", type=Path)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--latent", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=8)
    args = parser.parse_args()
    comfy.cli_args.args.cpu = args.device == "cpu"
    plain = sd15(getattr(torch, args.dtype))
    models = {"plain": plain, "plain_again": plain, "wplus": with_wplus(plain)}
    if args.ipadapter:
        models["ipadapter"] = with_ipadapter(plain, args.ipadapter)
    times, syncs = {name: [] for name in models}, {}
    for i in range(args.rounds):
        names = list(models)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds, syncs[name] = step(models[name], args.latent)
            times[name].append(seconds)
        print(f"round {i + 1}: " + ", ".join(f"{n} {t[-1]:.3f} s" for n, t in times.items()), flush=True)
    plain_s = min(times["plain"])
    ratios = {f"{name}_over_plain": min(seconds) / plain_s for name, seconds in times.items() if name != "plain"}
    result = ratios | {"host_syncs_per_step": syncs["wplus"] - syncs["plain"]}
    if args.ipadapter:
        result["ipadapter_host_syncs_per_step"] = syncs["ipadapter"] - syncs["plain"]
    print(json.dumps(result | {"device": args.device, "dtype": args.dtype, "latent": args.latent}))


if __name__ == "__main__":
    main()
