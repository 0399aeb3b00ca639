"""The form of a golden folder: reading its files, registering cases for them, running and reporting."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor


@dataclass
class Golden:
    """One golden file: its tensors by name, its metadata (JSON values), and where the real data lie."""

    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, Any]
    path: Path
    data: Path

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    @property
    def seed(self) -> int:
        return int(self.metadata["seed"])

    def numbered(self, prefix: str) -> list[tuple[float, Tensor]]:
        """(x, tensor) of every key `prefix` + x."""
        return [(float(k.removeprefix(prefix)), x) for k, x in self.tensors.items() if k.startswith(prefix)]


@dataclass
class Result:
    name: str
    error: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.error <= self.bound


CASES: dict[str, Callable[[Golden], Iterator[Result]]] = {}


def case(name: str):
    def register(function):
        CASES[name] = function
        return function

    return register


def relative(ours: Tensor, golden: Tensor) -> float:
    if ours.shape != golden.shape:
        return math.inf
    return ((ours.float() - golden.float()).norm() / golden.float().norm()).item()


def largest_difference(ours: Tensor, golden: Tensor) -> float:
    return (ours.double() - golden.double()).abs().max().item() if ours.shape == golden.shape else math.inf


def read(path: Path, data: Path) -> Golden:
    with safe_open(path, framework="pt") as f:
        metadata = {k: json.loads(v) for k, v in (f.metadata() or {}).items()}
        return Golden(path.stem, {k: f.get_tensor(k) for k in f.keys()}, metadata, path, data)


def case_of(name: str) -> Callable[[Golden], Iterator[Result]] | None:
    """`attention_320` is a case of `attention`; the longest matching name wins."""
    matching = [c for c in CASES if name == c or name.startswith(f"{c}_")]
    return CASES[max(matching, key=len)] if matching else None


@torch.inference_mode()
def run(path: Path, data: Path) -> Iterator[Result | str]:
    """The results of one golden file; a string says why there are none."""
    function = case_of(path.stem)
    if function is None:
        yield "no case for this file"
        return
    try:
        yield from function(read(path, data))
    except (LookupError, OSError, ValueError) as e:
        yield f"missing: {e}"


def report(paths: list[Path], data: Path) -> int:
    """Run and print every file's cases; returns how many failed or are missing."""
    bad = 0
    for path in paths:
        for result in run(path, data):
            if isinstance(result, str):
                print(f"{path.stem}: {result}  FAIL")
                bad += 1
            else:
                verdict = "ok" if result.ok else "FAIL"
                print(f"{path.stem}: {result.name}  {result.error:.2e}  <= {result.bound:g}  {verdict}", flush=True)
                bad += not result.ok
    print(f"{bad} failed" if bad else "all ok")
    return bad
