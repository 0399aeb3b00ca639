"""The miniature through ComfyUI's own text encoder, sampler and VAE, against what the trainer's sampler painted.

    python miniature_comfyui.py MINIATURE EXPECTED.safetensors      in ComfyUI's own Python; prints relative errors

EXPECTED is written by tests/comfyui/test_miniature.py: text, w, noise, timesteps, and the latents and pictures of
scale_0 and scale_1; its metadata has the prompt and the guidance.
"""

import json
import sys
from pathlib import Path

import comfy_setup  # noqa: F401
import torch

sys.path.append(str(Path(__file__).parents[1]))  # after ComfyUI's own: tests/comfyui must not be found as `comfy`
import comfy.samplers
from comfy.k_diffusion.sampling import sample_euler
from comfyui_wplus.nodes import miniature
from comfyui_wplus.nodes.apply import Apply
from comfyui_wplus.wplus_core.identity import Identity
from golden_form import relative
from safetensors import safe_open


def load(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}, f.metadata()


def sample(model, noise: torch.Tensor, timesteps: torch.Tensor, positive, negative, guidance: float) -> torch.Tensor:
    """DDIM is Euler between its sigmas; it ends at the first step's noise level, not at none."""
    table = model.get_model_object("model_sampling").sigmas
    sigmas = table[[*timesteps.tolist(), 0]]
    results = []

    def run(model, x, sigmas, extra_args=None, callback=None, disable=None):
        start = noise * (1 + sigmas[0] ** 2).sqrt()
        results.append(sample_euler(model, start, sigmas, extra_args=extra_args, disable=True))
        return results[-1]

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, negative)
    guider.set_cfg(guidance)
    guider.sample(torch.zeros_like(noise), torch.zeros_like(noise), comfy.samplers.KSAMPLER(run), sigmas, seed=0)
    return results[-1] / (1 + table[0] ** 2).sqrt()


@torch.inference_mode()
def errors(folder: str, expected: str) -> dict[str, float]:
    miniature.MINIATURE = Path(folder)
    x, told = load(expected)
    model, clip, vae, encoder, adapter, faces = miniature.LoadMiniature.execute().args
    positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(t)) for t in (told["prompt"], ""))
    found = {"text": relative(positive[0][0], x["text"])}
    found["encoder"] = relative(encoder.encoder.load()(x["face"]), x["w"])
    assert faces.shape[1:] == (64, 64, 3) and len(faces) > 1
    options = dict(start_percent=0.0, end_percent=1.0, negative="zeros", layers="all", layer_weights="")
    for scale in (0.0, 1.0):
        patched = Apply.execute(model, adapter, {"identity0": Identity(x["w"])}, scale, **options).args[0]
        z = sample(patched, x["noise"], x["timesteps"], positive, negative, float(told["guidance"]))
        found[f"latent {scale:.0f}"] = relative(z, x[f"latent_{scale:.0f}"])
        picture = vae.decode(z / model.model.latent_format.scale_factor).movedim(-1, 1)
        found[f"picture {scale:.0f}"] = relative(picture, x[f"picture_{scale:.0f}"])
    return found


if __name__ == "__main__":
    print(json.dumps(errors(*sys.argv[1:])))
