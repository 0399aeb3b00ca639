"""From a run to a file that ComfyUI, or the reference's code, reads."""

from __future__ import annotations

from pathlib import Path

from ..wplus_core.checkpoints import load_adapter, save_adapter, save_reference_adapter
from ..wplus_core.errors import FileError
from ..wplus_core.files import read
from .run_folder import RunFolder


def export(run: str | Path, file: str | Path, raw: bool = False, images: int | None = None) -> str:
    """Write the adapter of the run's last checkpoint, or of that after so many images; returns what it is, in words.

    The moving average, unless raw. A `.safetensors` keeps stage and settings in its metadata, a `.bin` cannot.
    """
    file = Path(file)
    checkpoint = RunFolder(Path(run)).checkpoint(images)
    source = checkpoint / ("adapter.safetensors" if raw else "ema.safetensors")
    adapter, metadata = load_adapter(source), read(source, "meta").metadata
    if file.suffix == ".bin" and adapter.config.parallel:
        raise FileError(file, "a .bin cannot say that this adapter's attention is parallel", "Choose .safetensors")
    if file.suffix == ".bin":
        save_reference_adapter(adapter, file)
    elif file.suffix == ".safetensors":
        kept = {k: metadata[k] for k in ("stage", "images", "training")}
        save_adapter(adapter, file, kept | {"weights": "raw" if raw else "average"})
    else:
        raise FileError(file, "this ending is not known", "End the name in .safetensors (ours) or .bin (the reference)")
    return f"stage {metadata['stage']}, {metadata['images']} images, {'raw' if raw else 'moving average'}"
