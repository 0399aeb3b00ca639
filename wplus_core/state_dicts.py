"""State dicts: the sizes of a network told from its tensors, and tensors into a network with every fault reported."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .adapter import AdapterConfig
from .encoder import EncoderConfig
from .errors import FileError, WPlusError
from .files import AGAIN, Contents
from .formats import numbers
from .parsing import ParserConfig
from .stylegan2 import GeneratorConfig

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
COUNTS = {"units", "layers", "body", "mapping_layers"}
T = TypeVar("T")
State = dict[str, Tensor]


def with_prefix(prefix: str, state: Mapping[str, Tensor]) -> State:
    return {prefix + k: x for k, x in state.items()}


def without_prefix(state: Mapping[str, Tensor], prefix: str = "module.") -> State:
    return {k.removeprefix(prefix): x for k, x in state.items()}


def part(state: Mapping[str, Tensor], *prefixes: str) -> State:
    """The keys under the first prefix that has any, without it."""
    for p in prefixes:
        if found := {k[len(p) :]: x for k, x in state.items() if k.startswith(p)}:
            return found
    return {}


def shape(state: State, key: str) -> tuple[int, ...]:
    """A key's shape, or zeros where the key is missing (it is reported with all the others by `fill`)."""
    return tuple(state[key].shape) if key in state and state[key].ndim else (0, 0, 0, 0)


def adapter_config(state: State) -> AdapterConfig:
    w_dim = AdapterConfig.w_dim
    ends, end = [], 0
    for i in numbers(state, r"mapping\.proj\.(\d+)\."):
        end += max(1, shape(state, f"mapping.proj.{i}.weight")[-1] // w_dim)
        ends.append(end)
    count = max(numbers(state, r"layers\.(\d+)\."), default=-1) + 1
    channels = [max(shape(state, f"layers.{i}.to_{x}.weight")[0] for x in "qkv") for i in range(min(count, len(state)))]
    token_dim = shape(state, "mapping.norm.weight")[0] or AdapterConfig.token_dim
    return AdapterConfig(tuple(channels), tuple(ends) or AdapterConfig.splits, w_dim, token_dim)


def encoder_config(state: State, contents: Contents) -> EncoderConfig:
    units = [shape(state, f"body.{i}.res_layer.1.weight")[0] for i in numbers(state, r"body\.(\d+)\.")]
    groups = [(c, len(list(g))) for c, g in groupby(units)]
    styles = numbers(state, r"styles\.(\d+)\.")
    linear = "styles.0.linear.weight" if styles else "linear.weight"
    w_dim = shape(state, linear)[0] or EncoderConfig.w_dim
    avg_rows = state["latent_avg"].numel() // w_dim if "latent_avg" in state else EncoderConfig.layers
    psp = contents.values.get("opts.encoder_type") == "GradualStyleEncoder"
    halvings = len(numbers(state, r"styles\.0\.convs\.(\d+)\.")) or 4
    return EncoderConfig(
        kind=("psp" if psp else "e4e") if styles else "single",
        layers=len(styles) or avg_rows,
        w_dim=w_dim,
        units=tuple(n for _, n in groups),
        channels=tuple(c for c, _ in groups),
        image_size=16 * 2**halvings,
        squeeze_excite="body.0.res_layer.5.fc1.weight" in state,
    )


def generator_config(state: State) -> GeneratorConfig:
    ups = [i for i in numbers(state, r"convs\.(\d+)\.") if i % 2 == 0]
    channels = [shape(state, "conv1.conv.weight")[1], *(shape(state, f"convs.{i}.conv.weight")[1] for i in ups)]
    w_dim = shape(state, "conv1.conv.modulation.weight")[1]
    return GeneratorConfig(tuple(channels), w_dim, len(numbers(state, r"style\.(\d+)\.")))


def parser_config(state: State) -> ParserConfig:
    channels = [shape(state, "encoder.0.conv2d.weight")[0]]
    channels += [shape(state, f"encoder.{i}.conv1.conv2d.weight")[0] for i in numbers(state, r"encoder\.([1-9]\d*)\.")]
    body = len(numbers(state, r"body\.(\d+)\."))
    return ParserConfig(tuple(channels), body, shape(state, "out_mask_conv.conv2d.bias")[0])


def config_of(contents: Contents, cls: type[T], infer: Callable[[], T], key: str = "config") -> T:
    """The config of our own files from their metadata, of others from the shapes of their tensors."""
    try:
        return read_config(contents, cls, key) if contents.ours else infer()
    except FileError:
        raise
    except (WPlusError, ValueError) as e:
        raise FileError(contents.path, f"keys are missing or damaged, its sizes make no sense ({e})", AGAIN) from e


def read_config(contents: Contents, cls: type[T], key: str) -> T:
    given = parse_json(contents, key)
    known = {f.name: f for f in fields(cls)}
    for name, value in given.items():
        values = value if isinstance(value, list) else [value]
        limit = len(contents.tensors) if name in COUNTS else 1 << 16
        good = all(isinstance(v, str) or (isinstance(v, int) and 0 <= v <= limit) for v in values)
        if name not in known or not good or len(values) > len(contents.tensors):
            raise FileError(contents.path, f"its config has {name} = {value}, which cannot be", AGAIN)
    try:
        return cls(**given)
    except (TypeError, ZeroDivisionError) as e:
        raise FileError(contents.path, f"its config does not fit ({e})", AGAIN) from e


def parse_json(contents: Contents, key: str, kind: type = dict) -> Any:
    try:
        value = json.loads(contents.metadata.get(key, json.dumps(kind())))
    except (json.JSONDecodeError, RecursionError) as e:
        raise FileError(contents.path, f"its metadata {key!r} is damaged ({e})", AGAIN) from e
    if not isinstance(value, kind):
        raise FileError(contents.path, f"its metadata {key!r} is no JSON {kind.__name__}", AGAIN)
    return value


def fill(build: Callable[[], nn.Module], state: State, path: str | Path) -> Any:
    """Build a network on the meta device and give it the tensors; every key that does not fit is reported at once."""
    try:
        with torch.device("meta"):
            network = build()
    except FileError:
        raise
    except (RuntimeError, TypeError, ValueError) as e:
        raise FileError(path, f"its sizes make no network ({e})", AGAIN) from e
    state = {k: x.float() if x.dtype == torch.float64 else x for k, x in state.items()}
    for key, x in network.state_dict().items():
        if key.endswith("num_batches_tracked"):
            state.setdefault(key, torch.zeros((), dtype=torch.int64))
            state[key] = state[key].to(x.dtype)
    check_keys(path, {k: tuple(x.shape) for k, x in network.state_dict().items()}, state)
    check_finite(path, state)
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def check_keys(path: str | Path, expected: Mapping[str, tuple[int, ...]], state: State):
    missing = [k for k in expected if k not in state]
    unexpected = [k for k in state if k not in expected]
    misshapen = [f"{k} {list(x.shape)} instead of {list(expected[k])}" for k, x in state.items()
                 if k in expected and tuple(x.shape) != expected[k]]  # fmt: skip
    wrong_dtype = [f"{k} {x.dtype}" for k, x in state.items() if k in expected and not plain_dtype(k, x)]
    lists = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen, "of a dtype not read": wrong_dtype}
    found = [f"{len(v)} {name}: {', '.join(v[:4])}{', ...' if len(v) > 4 else ''}" for name, v in lists.items() if v]
    if found:
        raise FileError(path, "its keys do not fit the network; " + "; ".join(found), "Use a complete, unmodified file")


def plain_dtype(key: str, x: Tensor) -> bool:
    return x.dtype == torch.int64 if key.endswith("num_batches_tracked") else x.dtype in FLOATS


def is_finite(x: Tensor) -> bool:
    """Without a copy: the least and the greatest are NaN if any number is."""
    return not x.numel() or all(v.isfinite() for v in x.aminmax())


def check_finite(path: str | Path, state: State):
    bad = [k for k, x in state.items() if x.dtype in FLOATS and not is_finite(x)]
    if bad:
        problem = f"NaN or Inf in {len(bad)} tensors: {', '.join(bad[:4])}"
        raise FileError(path, problem, "The file is damaged or its training diverged: use another one")
