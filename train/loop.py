"""The training loop: one for both stages; the objective says which losses, the data say what of.

Progress is counted in images. Everything random is a function of (seed, image number), so a checkpoint holds weights,
optimiser state and one integer, and the same command goes on from the last checkpoint as if nothing had happened.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..wplus_core.adapter import WPlusAdapter
from ..wplus_core.checkpoints import load_adapter, save_adapter
from ..wplus_core.direction_files import load_directions
from ..wplus_core.errors import FileError, WPlusError
from .base import load_vae
from .config import Config, Optim, check_resumable, from_dict, save_yaml, to_dict
from .data import Prepared, Rows, Stream, encode
from .model import Denoiser, load_unet, new_adapter, set_trainable
from .objectives import Batch
from .record import Record, check_trackers
from .run_folder import RunFolder
from .validation import Validation, open_validation

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EMA_RAMP = 0.05  # the average reaches back over at most this part of the training so far (as in Karras et al., EDM)


@dataclass
class State:
    """What a training step changes. trained: the adapter's weights that have gradients, by name.

    skipped, bad_in_a_row: steps whose gradient was not finite, counted on the device.
    """

    adapter: WPlusAdapter
    ema: WPlusAdapter
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    skipped: Tensor
    bad_in_a_row: Tensor
    images: int = 0


def train(config: Config) -> State:
    """Train to `config.images`, from the run folder's last checkpoint if it has one; SIGTERM saves and returns.

    The host waits for the device only where a line of statistics, a checkpoint or a validation is due.
    """
    check_trackers(config.track)
    run, stream = RunFolder(config.run), open_stream(config)
    accelerator = new_accelerator(config)
    if config.speed.compile:
        check_compiler(accelerator.device)
    denoiser, state = start(config, run, stream, accelerator.device)
    check_agreement(state, stream, accelerator)
    validation = open_validation(config, stream, accelerator.num_processes)
    model = accelerator.prepare_model(denoiser)
    if accelerator.is_main_process:
        save_yaml(config, run.path / "config.yaml")
        run.rewind_stats(state.images)
        run.rotate(config.keep.last)
    with Record(run, config, accelerator, state.images) as record, stop_signals() as stopping:
        if validation and not run.validated(state.images) and config.due(state.images, config.validate.every):
            validate(validation, denoiser, state, record)
        for micro_batches in steps(config, stream, state.images, accelerator):
            losses, norm = step(model, state, config, micro_batches, accelerator)
            state.images += config.batch
            record.add(losses, norm)
            look = config.due(state.images, config.keep.log)
            if look:
                record.write(state)
            stop = agreed(stopping.is_set(), look, accelerator)
            failed = look and bool(state.bad_in_a_row >= config.keep.bad_steps)
            if stop or failed or config.due(state.images, config.keep.every):
                with record.paused():
                    checkpoint(run, state, config, accelerator)
            if validation and not (stop or failed) and config.due(state.images, config.validate.every):
                validate(validation, denoiser, state, record)
            if failed:
                raise WPlusError(bad_steps_message(run, state))
            if stop:
                break
    return state


def validate(validation: Validation, denoiser: Denoiser, state: State, record: Record):
    with record.paused() as began:
        losses, sheets = validation(denoiser.unet, state.ema, state.images, record.accelerator)
        record.validation(state.images, losses, sheets, time.perf_counter() - began)


def new_accelerator(config: Config) -> Accelerator:
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(
        mixed_precision="no",
        kwargs_handlers=[ddp],
        log_with=list(config.track.to) or None,
        project_dir=config.run / "tensorboard",
    )
    check_processes(accelerator)
    torch.backends.cudnn.benchmark = True  # every step has the same shapes
    return accelerator


def step(
    model: nn.Module, state: State, config: Config, micro_batches: list[Batch], accelerator: Accelerator
) -> tuple[dict[str, Tensor], Tensor]:
    """One optimiser step on a batch, given in parts: the losses and the gradient's norm, both on the device.

    A gradient that is not finite is skipped and counted, which the device decides by itself.
    """
    sums: dict[str, Tensor] = {}
    for i, batch in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with nullcontext() if last else accelerator.no_sync(model):
            losses = config.objective(model, batch)
            state.scaler.scale(losses["total"] / len(micro_batches)).backward()
        sums = {k: sums.get(k, 0) + x.detach() / len(micro_batches) for k, x in losses.items()}
    state.scaler.unscale_(state.optimizer)
    norm = nn.utils.clip_grad_norm_(list(state.trained.values()), config.optim.clip or math.inf)
    bad = ~norm.isfinite()
    set_lr(state.optimizer, config.optim.lr_at(state.images, config.images))
    state.optimizer.found_inf = bad.float()  # where it is 1, fused AdamW leaves weights, moments and step count alone
    state.optimizer.step()
    update_ema(state, config, ~bad)
    state.skipped = state.skipped + bad
    state.bad_in_a_row = (state.bad_in_a_row + 1) * bad
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return sums, norm


@torch.no_grad()
def update_ema(state: State, config: Config, good: Tensor):
    """The average's weight of the past halves every `ema_half_life` images, sooner at the beginning.

    good: whether the step was made; otherwise the average stays.
    """
    half_life = min(config.keep.ema_half_life, EMA_RAMP * state.images)
    keep = 0.5 ** (config.batch / half_life) if half_life else 0.0
    average, weight = dict(state.ema.named_parameters()), (1 - keep) * good
    for name, p in state.trained.items():
        average[name].lerp_(p, weight)


def set_lr(optimizer: torch.optim.Optimizer, lr: float):
    for group in optimizer.param_groups:
        group["lr"] = lr


def start(config: Config, run: RunFolder, stream: Stream, device: torch.device) -> tuple[Denoiser, State]:
    """The model, and the state at the run's last checkpoint or at the beginning."""
    saved = load_checkpoint(run)
    if saved:
        check_resumable(from_dict(Config, saved.info["config"]), config)
    unet = load_unet(config.base, DTYPES[config.speed.precision])
    adapter = saved.adapter if saved else first_adapter(config, unet, stream)
    denoiser = prepare_unet(Denoiser(unet, adapter), config).to(device)
    trained = set_trainable(adapter, config.train_mapping)
    ema = (saved.ema.to(device) if saved else copy.deepcopy(adapter)).requires_grad_(False)
    optimizer = new_optimizer(trained, config.optim)
    scaler = torch.amp.GradScaler(device.type, enabled=config.speed.precision == "fp16")
    info = saved.info if saved else {"images": 0, "skipped": 0, "bad_in_a_row": 0}
    counts = (torch.tensor(info[k], device=device) for k in ("skipped", "bad_in_a_row"))
    state = State(adapter, ema, trained, optimizer, scaler, *counts, images=info["images"])
    if saved:
        optimizer.load_state_dict(saved.optimizer)  # which moves it to the weights' device
        if saved.scaler:
            scaler.load_state_dict(saved.scaler)
    return denoiser, state


def first_adapter(config: Config, unet: nn.Module, stream: Stream) -> WPlusAdapter:
    """The adapter that a run begins with: a file's, or a new one for this UNet and these codes."""
    source = stream.sources[0]
    layers, w_dim = source.index.w_layers, source.w(0).shape[1]
    if config.adapter is None:
        return new_adapter(unet, layers, config.parallel, config.seed, w_dim)
    adapter = owned(config.adapter)
    has, wanted = adapter.config, (layers, w_dim, config.parallel)
    if (has.w_layers, has.w_dim, has.parallel) != wanted:
        raise FileError(
            config.adapter,
            f"reads codes of {has.w_layers} layers x {has.w_dim}, parallel = {has.parallel}; the data have "
            f"{layers} layers x {w_dim}, parallel = {config.parallel} is set",
            "Choose data, adapter and --parallel that belong together",
        )
    return adapter


def owned(path: Path) -> WPlusAdapter:
    """A file's adapter in float32, in memory of its own."""
    return copy.deepcopy(load_adapter(path)).float()


def prepare_unet(denoiser: Denoiser, config: Config) -> Denoiser:
    speed, unet = config.speed, denoiser.unet
    unet.train(speed.gradient_checkpointing)  # diffusers checkpoints in training mode only; SD1.x has no dropout
    if speed.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if speed.channels_last:
        unet.to(memory_format=torch.channels_last)
    if speed.compile:
        unet.compile(dynamic=False)  # two shapes: with gradients, and the passes without
    return denoiser


def check_compiler(device: torch.device):
    """torch.compile needs a C++ compiler, and Triton on a GPU; without it says so before anything is loaded."""
    try:
        torch.compile(lambda x: 2 * x + 1)(torch.ones(8, device=device))
    except Exception as e:  # a backend may raise anything, wrapped or not
        reason = getattr(e, "inner_exception", e)
        first, *_ = str(reason).strip().splitlines() or [type(reason).__name__]
        raise WPlusError(
            f"torch.compile does not work here ({first}): it needs a C++ compiler, and Triton on a GPU. Install them, "
            "or train without (--speed.no-compile), which is slower"
        ) from e


def new_optimizer(trained: dict[str, nn.Parameter], optim: Optim) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        trained.values(),
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        weight_decay=optim.weight_decay,
        fused=True,  # the only form that skips a bad step without asking the host
    )


def open_stream(config: Config) -> Stream:
    sources = [Prepared(folder) for folder in config.data]
    directions = load_directions(config.directions) if config.directions else ()
    stream = Stream(sources, config.seed, config.batch, config.shares, config.dropout, config.augment, directions)
    stream.check(face=config.objective.needs_face)
    return stream


def steps(config: Config, stream: Stream, images: int, accelerator: Accelerator) -> Iterator[list[Batch]]:
    """This process's micro-batches of one optimiser step after the other, on the device."""
    vae = online_vae(config).to(accelerator.device) if stream.online else None
    micro = config.micro(accelerator.num_processes)
    rows = Rows(images, config.images, micro, accelerator.process_index, accelerator.num_processes)
    cuda = accelerator.device.type == "cuda"
    loader = iter(
        DataLoader(
            stream,
            batch_sampler=rows,
            num_workers=config.speed.workers,
            pin_memory=cuda,
            worker_init_fn=outlive_signals,
        )
    )
    while batches := list(islice(loader, config.batch // (micro * accelerator.num_processes))):
        yield [encode(batch, accelerator.device, vae) for batch in batches]


def outlive_signals(worker: int):
    """A stop that is sent to the whole process group is the trainer's to answer; its workers end with it."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def online_vae(config: Config) -> AutoencoderKL:
    """The VAE for data sets that are pictures."""
    return load_vae(config.vae or config.base, DTYPES[config.speed.precision])


def checkpoint(run: RunFolder, state: State, config: Config, accelerator: Accelerator):
    """Save, by the main process, and delete what is too old."""
    if accelerator.is_main_process:
        run.save(state.images, lambda folder: write_state(folder, state, config))
        run.rotate(config.keep.last)
    accelerator.wait_for_everyone()


def write_state(folder: Path, state: State, config: Config):
    counts = {"skipped": state.skipped.item(), "bad_in_a_row": state.bad_in_a_row.item()}
    info = {"images": state.images} | counts | {"config": to_dict(config)}
    for name, adapter in (("adapter", state.adapter), ("ema", state.ema)):
        save_adapter(adapter, folder / f"{name}.safetensors", metadata(config, state.images))
    both = {"optimizer": state.optimizer.state_dict(), "scaler": state.scaler.state_dict()}
    torch.save(both, folder / "optimizer.pt")
    (folder / "state.json").write_text(json.dumps(info), encoding="utf-8")


def metadata(config: Config, images: int) -> dict[str, str]:
    """What the weights' file says of their training."""
    return {"stage": str(config.stage), "images": str(images), "training": json.dumps(to_dict(config))}


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds, on the CPU; info: of state.json."""

    info: dict[str, Any]
    adapter: WPlusAdapter
    ema: WPlusAdapter
    optimizer: dict[str, Any]
    scaler: dict[str, Any]


def load_checkpoint(run: RunFolder) -> Saved | None:
    """The run's last checkpoint, None if it has none yet."""
    *before, folder = [None, None, *run.checkpoints()]
    if folder is None:
        return None
    try:
        info = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        adapter, ema = (owned(folder / f"{name}.safetensors") for name in ("adapter", "ema"))
        return Saved(info, adapter, ema, **torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
    except Exception as e:  # a damaged pickle raises almost anything
        goes_on = f"from {before[-1].name}" if before[-1] else "from the beginning"
        raise FileError(folder, f"damaged checkpoint ({e})", f"Delete it; the run then goes on {goes_on}") from e


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """SIGTERM (a preempted machine) and Ctrl-C set the event instead of ending the process; a second Ctrl-C ends it."""
    stopping = threading.Event()

    def stop(number, frame):
        if number == signal.SIGINT and stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


def check_processes(accelerator: Accelerator):
    """Processes that do not know of each other would write the same run folder."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        raise WPlusError(
            f"{launched} processes were launched, but each trains alone ({accelerator.num_processes}); on CPUs set "
            "ACCELERATE_USE_CPU=true"
        )


def check_agreement(state: State, stream: Stream, accelerator: Accelerator):
    """All processes must go on from the same checkpoint with the same data."""
    here = torch.tensor([state.images, *stream.lengths], device=accelerator.device)
    if (accelerator.gather(here[None]) != here).any():
        raise WPlusError(
            "the processes see different checkpoints or data sets; --run must be a folder that all machines share, and "
            "--data the same on each"
        )


def agreed(stop: bool, look: bool, accelerator: Accelerator) -> bool:
    """Whether any process was told to stop. All must leave the loop after the same step, so several ask each other,
    where the host looks at the device anyway."""
    if accelerator.num_processes == 1:
        return stop
    return look and bool(accelerator.reduce(torch.tensor(float(stop), device=accelerator.device), "sum").item())


def bad_steps_message(run: RunFolder, state: State) -> str:
    return (
        f"{int(state.bad_in_a_row)} steps in a row had a gradient that was not finite; the weights before them are in "
        f"{run.latest()}. Look at the loss in {run.path / 'stats.jsonl'}; try a lower --optim.lr, --speed.precision "
        "bf16 or fp32, or look for damaged pictures in the data"
    )
