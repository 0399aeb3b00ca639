"""Inside ComfyUI's own Python ($COMFYUI_CHECKOUT): its modules, a small SD1.5, and this pack loaded by its path."""

import importlib.util
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, os.environ["COMFYUI_CHECKOUT"])
import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = True
comfy.cli_args.args.use_pytorch_cross_attention = True  # what a GPU gets; compiled it is one graph
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.supported_models  # noqa: E402

ROOT = Path(__file__).parents[2]
UNET = dict(
    image_size=32, in_channels=4, out_channels=4, model_channels=32, num_res_blocks=[2, 2, 2, 2],
    channel_mult=[1, 2, 4, 4], num_heads=8, use_spatial_transformer=True, transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
    transformer_depth_output=[1] * 9 + [0] * 3, transformer_depth_middle=1, context_dim=768, adm_in_channels=None,
    use_linear_in_transformer=False, legacy=False, use_temporal_attention=False,
)  # fmt: skip
CHANNELS = (32, 32, 64, 64, 128, 128, 128, 128, 128, 64, 64, 64, 32, 32, 32, 128)


def load_pack():
    spec = importlib.util.spec_from_file_location(
        "comfyui_wplus", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    sys.modules["comfyui_wplus"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["comfyui_wplus"])


load_pack()


def fill(module):
    g = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        if p.ndim == 1:
            p.data = torch.full(p.shape, float(name.endswith("weight")))
        else:
            p.data = torch.randn(p.shape, generator=g) / p[0].numel() ** 0.5


def small_model(config=comfy.supported_models.SD15, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = config({**UNET, "dtype": dtype, **changes})
    model = config.get_model({}, "")
    fill(model.diffusion_model)
    model.diffusion_model.to(dtype)
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
