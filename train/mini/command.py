"""How the miniature's commands run: what they do is logged with the time, and a WPlusError is one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import tyro

from ...wplus_core.errors import WPlusError


def run(main: Callable[..., Any], module: str, description: str | None):
    """The command line of `main`, as `python -m comfyui_wplus.train.MODULE`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        tyro.cli(main, prog=f"python -m comfyui_wplus.train.{module}", description=description)
    except WPlusError as e:
        sys.exit(str(e))
