"""Fixtures for tests that run inside ComfyUI's own Python.

Not collected by the project's pytest; tests/comfyui/test_in_process.py runs them in each version's environment.
"""

import pytest
import torch
from comfy_setup import CHANNELS, small_model


def pytest_runtest_setup():
    torch.manual_seed(0)  # before the fixtures


@pytest.fixture(scope="session")
def model():
    return small_model()


@pytest.fixture(scope="session")
def adapter():
    from comfyui_wplus.nodes.types import LoadedAdapter
    from comfyui_wplus.wplus_core.adapter import AdapterConfig, WPlusAdapter

    torch.manual_seed(1)
    core = WPlusAdapter(AdapterConfig(channels=CHANNELS)).requires_grad_(False)
    torch.nn.init.normal_(core.mapping.norm.bias)  # so that the zero code's tokens are something
    for layer in core.layers:
        layer.to_q.weight *= 3
        layer.to_v.weight *= 3
    return LoadedAdapter("small", core)
