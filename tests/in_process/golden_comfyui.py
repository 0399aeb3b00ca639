"""The golden `unet` and `sampling` cases through ComfyUI's own sampler, on a full-size SD1.5 with seeded weights.

Run by `tests/golden.py DIR --comfyui` in ComfyUI's own Python.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import comfy_setup
import torch

sys.path.append(str(Path(__file__).parents[1]))  # after ComfyUI's own: tests/comfyui must not be found as `comfy`
import comfy.model_patcher
import comfy.samplers
import comfy.supported_models
import comfy.utils
from comfy.k_diffusion.sampling import sample_euler
from comfyui_wplus.nodes.apply import Apply
from comfyui_wplus.nodes.types import LoadedAdapter
from comfyui_wplus.wplus_core.adapter import AdapterConfig, WPlusAdapter
from comfyui_wplus.wplus_core.formats import adapter_from_reference, adapter_to_reference
from comfyui_wplus.wplus_core.identity import Identity
from golden_form import CASES, Golden, Result, case, relative, report
from seeded import seeded_state

SD15 = {**comfy_setup.UNET, "model_channels": 320, "dtype": torch.float32}


def sd15(seed: int) -> comfy.model_patcher.ModelPatcher:
    """The recipe fills the weights under diffusers' keys; ComfyUI's own table has their places."""
    model = comfy.supported_models.SD15(SD15).get_model({}, "")
    unet = model.diffusion_model
    state, table = unet.state_dict(), comfy.utils.unet_to_diffusers(SD15)
    weights = seeded_state({theirs: state[ours] for theirs, ours in table.items() if ours in state}, seed, "unet.")
    unet.load_state_dict({table[theirs]: x for theirs, x in weights.items()})
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def adapter(seed: int) -> LoadedAdapter:
    core = WPlusAdapter(AdapterConfig())
    state = seeded_state(adapter_to_reference(core.state_dict()), seed)
    core.load_state_dict(adapter_from_reference(state))
    return LoadedAdapter("seeded", core.requires_grad_(False))


def apply(model, g: Golden, weight: float, start_percent: float = 0.0):
    options = dict(end_percent=1.0, negative="zeros", layers="all", layer_weights="")
    people = {"identity0": Identity(g["w"])}
    return Apply.execute(model, adapter(g.seed), people, weight, start_percent, **options).args[0]


def sample(model, function, g: Golden, positive, negative, cfg: float, like):
    """Runs `function(model, sigmas, extra_args)` as ComfyUI's sampler and returns its result."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds([[positive, {}]], [[negative, {}]])
    guider.set_cfg(cfg)
    results = []

    def run(model, x, sigmas, extra_args=None, callback=None, disable=None):
        results.append(function(model, sigmas, extra_args))
        return results[-1]

    sigmas = g.tensors.get("sigmas", torch.tensor([1.0, 0.0]))
    guider.sample(torch.zeros_like(like), torch.zeros_like(like), comfy.samplers.KSAMPLER(run), sigmas, seed=0)
    return results[-1]


@case("unet")
def unet(g: Golden) -> Iterator[Result]:
    model = sd15(g.seed)
    sigma = model.get_model_object("model_sampling").sigmas[g["timesteps"]][:, None, None, None]
    x = g["latents"] * (1 + sigma**2).sqrt()  # ComfyUI's model divides by it again

    def eps(patched):
        return sample(
            patched, lambda m, _, extra: (x - m(x, sigma.flatten(), **extra)) / sigma, g, g["text"], g["text"], 1.0, x
        )

    yield Result("plain", relative(eps(model), g["eps_plain"]), 1e-3)
    for scale, golden in g.numbered("eps_scale_"):
        yield Result(f"scale {scale}", relative(eps(apply(model, g, scale)), golden), 1e-3)


@case("sampling")
def sampling(g: Golden) -> Iterator[Result]:
    model, scale, cfg = sd15(g.seed), float(g.metadata["scale"]), float(g.metadata["guidance"])
    steps = g["sampler_timesteps"].double()

    def euler(m, sigmas, extra):
        return sample_euler(m, g["noise"] * (1 + sigmas[0] ** 2).sqrt(), sigmas, extra_args=extra, disable=True)

    for start, golden in g.numbered("final_start_"):
        i = int(start)
        percent = 0.0 if i < 0 else 1 - (steps[i] + steps[i + 1]).item() / 2 / 999
        patched = apply(model, g, scale, percent)
        out = sample(patched, euler, g, g["positive"], g["negative"], cfg, g["noise"])
        yield Result(f"on after step {i}", relative(out, golden), 1e-3)


if __name__ == "__main__":
    files = [path for path in sorted(Path(sys.argv[1]).glob("*.safetensors")) if path.stem in CASES]
    sys.exit(1 if not files or report(files, Path(sys.argv[1]).parent / "data") else 0)
