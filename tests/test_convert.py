"""The two command lines of the core, as a user runs them."""

import importlib
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from comfyui_wplus.wplus_core import checkpoints as ck
from comfyui_wplus.wplus_core.adapter import AdapterConfig, WPlusAdapter
from comfyui_wplus.wplus_core.direction_files import load_directions


@pytest.fixture
def run(command_line):
    def run(module, *args):
        return command_line(importlib.import_module(f"comfyui_wplus.wplus_core.{module}").main, *args)

    return run


@pytest.fixture(scope="module")
def adapter_bin(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("files") / "wplus_adapter.bin"
    ck.save_reference_adapter(WPlusAdapter(AdapterConfig()), path)
    return path


def test_there_and_back(run, adapter_bin, tmp_path):
    ours, back = tmp_path / "adapter.safetensors", tmp_path / "back.bin"
    done = run("convert", adapter_bin, ours)
    assert done.returncode == 0 and "W+ adapter, 154" in done.stdout, done
    assert run("convert", ours, back).returncode == 0
    a, b = (torch.load(p, weights_only=True) for p in (adapter_bin, back))
    assert all(torch.equal(x, b[part][k]) for part in a for k, x in a[part].items())


def test_half_precision(run, adapter_bin, tmp_path):
    assert run("convert", adapter_bin, tmp_path / "half.safetensors", "--dtype", "float16").returncode == 0
    assert {x.dtype for x in ck.load_adapter(tmp_path / "half.safetensors").state_dict().values()} == {torch.float16}


def test_inspect_an_adapter(run, adapter_bin):
    done = run("inspect", adapter_bin)
    assert done.returncode == 0, done.stderr
    for part in ("a W+ adapter", "7,079,424", "31,559,680", "16 layers", "(54 float32)", "sha256", "not recorded"):
        assert part in done.stdout


def test_a_bare_tensor_is_what_the_user_says(run, tmp_path):
    torch.save(torch.randn(1, 18, 512), tmp_path / "x.pth")
    assert "identity's code or an editing direction" in run("inspect", tmp_path / "x.pth").stdout
    assert run("convert", tmp_path / "x.pth", tmp_path / "i.safetensors").returncode == 0
    assert run("convert", tmp_path / "x.pth", tmp_path / "d.safetensors", "--as", "directions").returncode == 0
    assert ck.load_identity(tmp_path / "i.safetensors").name == "x"
    assert load_directions(tmp_path / "d.safetensors")[0].name == "x"
    assert "direction                 x:" in run("inspect", tmp_path / "d.safetensors").stdout


def test_errors_are_one_line(run, tmp_path):
    path = tmp_path / "lora.safetensors"
    safetensors.torch.save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, path)
    done = run("convert", path, tmp_path / "out.safetensors")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "this is a LoRA" in done.stderr
    assert not (tmp_path / "out.safetensors").exists()
    assert "a LoRA, which this pack does not load" in run("inspect", path).stdout
    assert "ending in .safetensors" in run("convert", path, tmp_path / "out.txt").stderr


@pytest.mark.parametrize("module", ["convert", "inspect"])
def test_the_modules_run_by_their_names(module, tmp_path):
    (tmp_path / "x.bin").write_bytes(b"nothing")
    arguments = [tmp_path / "x.bin", *([tmp_path / "y.safetensors"] if module == "convert" else [])]
    command = [sys.executable, "-W", "error::RuntimeWarning", "-m", f"comfyui_wplus.wplus_core.{module}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "x.bin" in done.stderr and len(done.stderr.splitlines()) == 1, done
