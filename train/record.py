"""What a run tells of itself while it trains: stats.jsonl, the trackers' curves, and a progress bar."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..wplus_core.errors import WPlusError
from .config import Config, Track, flat, to_dict
from .run_folder import RunFolder

if TYPE_CHECKING:
    from .loop import State

LOGGED = 10.0  # seconds between lines of progress where they go into a file


class Record:
    """The means of the losses over the images since the last line, kept on the device until a line is due."""

    def __init__(self, run: RunFolder, config: Config, accelerator: Accelerator, images: int):
        self.run, self.config, self.accelerator = run, config, accelerator
        main = accelerator.is_main_process
        bar = {"mininterval": 0.1 if sys.stderr.isatty() else LOGGED, "smoothing": 0.05}
        self.progress = tqdm(total=config.images, initial=images, unit="img", disable=not main, **bar)
        if main and config.track.to:
            start_trackers(accelerator, config, run, images)
        self.clear()

    def __enter__(self) -> Record:
        return self

    def __exit__(self, *error):
        self.progress.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def clear(self):
        self.sums: dict[str, Tensor] = {}
        self.good: Tensor | int = 0
        self.images, self.began = 0, time.perf_counter()

    def add(self, losses: dict[str, Tensor], norm: Tensor):
        """A step's losses; they do not count if its gradient was not finite."""
        good = norm.isfinite()
        for k, x in (losses | {"grad_norm": norm}).items():
            self.sums[k] = self.sums.get(k, 0) + torch.where(good, x, 0)
        self.good = self.good + good
        self.images += self.config.batch
        self.progress.update(self.config.batch)

    def write(self, state: State):
        """A line: the means over all processes; without a good step since the last line, only the counts."""
        sums = self.accelerator.reduce(torch.stack([*self.sums.values()]), "mean")
        *sums, good, skipped = torch.stack([*sums, self.good, state.skipped]).tolist()
        seconds = time.perf_counter() - self.began
        means = {k: x / good for k, x in zip(self.sums, sums, strict=True)} if good else {}
        lr, speed = state.optimizer.param_groups[0]["lr"], round(self.images / seconds, 3)
        self.progress.set_postfix({"loss": f"{means.get('total', float('nan')):.4f}"}, refresh=False)
        self.line(state.images, means | {"lr": lr, "skipped": int(skipped), "images_per_s": speed})
        self.clear()

    def line(self, images: int, values: dict[str, float]):
        """Of stats.jsonl and of every tracker."""
        if self.accelerator.is_main_process:
            self.run.append({"images": images} | values)
            self.accelerator.log(values, step=images)

    def validation(self, images: int, losses: dict[str, float], sheets: dict[str, Path], seconds: float):
        """A line of its own, and the sheets (PNG files by name) for the trackers that show pictures."""
        values = losses | {"s": round(seconds, 1)}
        self.line(images, {f"validation/{k}": x for k, x in values.items()})
        for tracker in self.accelerator.trackers:
            for name, path in sheets.items():
                with Image.open(path) as sheet:
                    show(tracker, f"validation/{name}", sheet.convert("RGB"), images)

    @contextmanager
    def paused(self) -> Iterator[float]:
        """What takes time but trains nothing is left out of images_per_s; gives the time when it began."""
        began = time.perf_counter()
        yield began
        self.began += time.perf_counter() - began


def start_trackers(accelerator: Accelerator, config: Config, run: RunFolder, images: int):
    """Each goes on with the curves of a resumed run: what it drew beyond the checkpoint will come again."""
    settings = flat(to_dict(config))
    names = {"name": run.path.name, "config": settings}
    options = {
        "tensorboard": {"purge_step": images + 1},
        "wandb": names | {"id": run.identifier(), "resume": "allow", "dir": str(run.path)},
        "trackio": names | {"name": f"{run.path.name}-{run.identifier()}", "resume": "allow"},
    }
    accelerator.init_trackers(config.track.project, init_kwargs=options)


def show(tracker, name: str, sheet: Image.Image, images: int):
    if tracker.name == "tensorboard":
        tracker.log_images({name: np.asarray(sheet)[None]}, step=images, dataformats="NHWC")
    elif tracker.name == "wandb":
        tracker.log_images({name: [sheet]}, step=images)


def check_trackers(track: Track):
    missing = [name for name in track.to if find_spec(name) is None]
    if missing:
        raise WPlusError(f"not installed: pip install {' '.join(missing)} (or choose other --track.to)")
