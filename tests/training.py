"""A world small enough to train in on a CPU: a UNet with four cross-attentions, codes of 4 layers, 16 pixel latents."""

import importlib
import multiprocessing
import os
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch
from comfyui_wplus.train import loop, validation
from comfyui_wplus.train.config import Config, Keep, Optim, Speed, Track
from comfyui_wplus.train.data import write_dataset
from comfyui_wplus.train.objectives import Objective
from comfyui_wplus.train.run_folder import RunFolder
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

LAYERS, SIZE = 4, 16


def small_unet(seed: int = 0) -> UNet2DConditionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet2DConditionModel(
            sample_size=SIZE,
            cross_attention_dim=768,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).requires_grad_(False)


def sample(rng: torch.Generator, text: bool, variants: int = 2) -> dict[str, torch.Tensor]:
    x = {
        "latents": torch.randn(variants, 8, SIZE, SIZE, generator=rng).abs().half(),
        "w": torch.randn(LAYERS, 512, generator=rng).half(),
        "face": torch.rand(variants, 1, SIZE, SIZE, generator=rng).half(),
    }
    return x | ({"text": torch.randn(77, 768, generator=rng).half()} if text else {})


def small_dataset(folder: Path, count: int = 10, text: bool = True, seed: int = 0, shard: int = 4) -> Path:
    rng = torch.Generator().manual_seed(seed)
    prompts = {p: torch.randn(77, 768, generator=rng).half() for p in ("", "a face", "a photo of a face")}
    write_dataset(folder, [sample(rng, text) for _ in range(count)], prompts, shard)
    return folder


def small_world(folder: Path) -> dict[str, Path | tuple[Path, ...]]:
    """The `base` and `data` of a Config."""
    small_unet().save_pretrained(folder / "base" / "unet")
    return {"base": folder / "base", "data": (small_dataset(folder / "data"),)}


def small_config(world: dict, run: Path, **changes) -> Config:
    """Stage II on everything, 12 steps of 2 images, a checkpoint every 4 steps."""
    settings = dict(
        images=24,
        batch=2,
        stage=2,
        objective=Objective(disen=1.5, reg=1.0),
        optim=Optim(lr=1e-3, warmup=6, schedule="cosine"),
        speed=Speed(micro_batch=1, workers=0),
        keep=Keep(every=8, last=2, log=2, ema_half_life=12),
        track=Track(to=()),
    )
    return Config(run=run, **world, **{**settings, **changes})


def everything(run, images):
    """All tensors of a checkpoint, and the statistics but for the clock."""
    folder = RunFolder(run).checkpoint(images)
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)["optimizer"]["state"]
    tensors = {f"{i}.{k}": x for i, moments in optimizer.items() for k, x in moments.items()}
    for name in ("adapter", "ema"):
        tensors |= {f"{name}.{k}": x for k, x in load_file(folder / f"{name}.safetensors").items()}
    lines = [{k: v for k, v in x.items() if k != "images_per_s"} for x in RunFolder(run).stats()]
    return tensors, lines


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner, name: str, number: int, act: Callable, after: bool = False):
    """Do something at the function's call of that number, before it or after."""
    function, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(args)
        if len(calls) == number and not after:
            act(*args)
        result = function(*args, **kwargs)
        if len(calls) == number and after:
            act(*args)
        return result

    setattr(owner, name, counted)


def half_written(item, path):
    Path(path).write_bytes(b"PK half a file")
    die()


def half_deleted(path, *args):
    next(p for p in Path(path).iterdir()).unlink()
    die()


def stop_group(*args):
    os.killpg(0, signal.SIGTERM)
    time.sleep(2)  # in which a worker that dies of it is noticed


DEATHS = {
    "in a step": lambda n: at_call(loop, "step", n, lambda *args: die()),
    "between two files of a checkpoint": lambda n: at_call(loop, "save_adapter", n, lambda *args: die(), after=True),
    "in the middle of a file of a checkpoint": lambda n: at_call(torch, "save", n, half_written),
    "while a checkpoint goes to the disk": lambda n: at_call(os, "fsync", n, lambda *args: die()),
    "before a checkpoint gets its name": lambda n: at_call(Path, "rename", n, lambda *args: die()),
    "after a checkpoint got its name": lambda n: at_call(Path, "rename", n, lambda *args: die(), after=True),
    "while an old checkpoint is deleted": lambda n: at_call(shutil, "rmtree", n, half_deleted),
    "in validation": lambda n: at_call(validation, "decode", n, lambda *args: die()),
    "its group told to stop": lambda n: (
        os.setsid(),
        multiprocessing.set_start_method("fork", force=True),  # the fork server's workers would be in its group
        at_call(loop, "step", n, stop_group),
    ),
    "told to stop": lambda n: at_call(loop, "step", n, lambda *args: os.kill(os.getpid(), signal.SIGTERM)),
}


def train_and_die(config: Config, death: str | None = None, number: int = 1):
    torch.set_num_threads(1)
    if death:
        DEATHS[death](number)
    loop.train(config)


def train_as(config: Config, environment: dict[str, str], death: tuple[str, int] | None = None):
    torch.set_num_threads(1)
    if death:
        DEATHS[death[0]](death[1])
    os.environ.update(environment)
    loop.train(config)
    assert torch.distributed.get_world_size() == int(environment["WORLD_SIZE"])
    torch.distributed.destroy_process_group()


def start_process(target: Callable, *args) -> multiprocessing.Process:
    """A fresh process, forked from a server that has imported the trainer already.

    It finds the target by the file's name: `tests.x`, as pytest calls it, may be another package's.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["comfyui_wplus.train.loop"])
    process = context.Process(target=call, args=(target.__module__.rpartition(".")[2], target.__name__, args))
    process.start()
    return process


def call(module: str, name: str, args: tuple):
    getattr(importlib.import_module(module), name)(*args)


def exit_code(process: multiprocessing.Process, seconds: float = 120) -> int:
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise TimeoutError
    return process.exitcode


def train_in_two_processes(config: Config, deaths: dict[str, tuple[str, int]] | None = None):
    """Under gloo on the CPU, with the environment that `accelerate launch` gives. deaths: by rank."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    deaths = deaths or {}
    ranks = [start_process(train_as, config, shared | {"RANK": r, "LOCAL_RANK": r}, deaths.get(r)) for r in "01"]
    assert [exit_code(p) for p in ranks] == [0, 0]
