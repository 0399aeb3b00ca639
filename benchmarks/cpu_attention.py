"""Attention as `train.attention.attend` does it on a CPU, and by PyTorch's own kernel: forward and backward.

    python benchmarks/cpu_attention.py

Shapes are those of the miniature's UNet. Each round times the two one after the other; a ratio is the median over the
rounds of the kernel's time over ours. The last line is a JSON object with the ratios.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from comfyui_wplus.train.attention import attend

SHAPES = {"self, 16 x 16": (256, 256, 32), "cross, 16 x 16": (256, 40, 32), "self, 8 x 8": (64, 64, 64),
          "cross, 8 x 8": (64, 40, 64)}  # fmt: skip


def seconds(attention, tensors: list[torch.Tensor], gradient: torch.Tensor) -> float:
    start = time.perf_counter()
    attention(*tensors).backward(gradient)
    return time.perf_counter() - start


def ratio(n: int, m: int, d: int, batch: int, dtype: torch.dtype, rounds: int) -> float:
    tensors = [torch.randn(batch, 2, length, d, dtype=dtype, requires_grad=True) for length in (n, m, m)]
    both = [partial(seconds, f, tensors, torch.randn(batch, 2, n, d, dtype=dtype))
            for f in (F.scaled_dot_product_attention, attend)]  # fmt: skip
    times = [[f() for f in both] for _ in range(rounds + 2)][2:]
    return median(theirs / ours for theirs, ours in times)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    ratios = {k: ratio(*shape, args.batch, getattr(torch, args.dtype), args.rounds) for k, shape in SHAPES.items()}
    for name, x in ratios.items():
        print(f"{name:16s} {x:5.2f} x")
    print(json.dumps({k: round(x, 2) for k, x in ratios.items()}))


if __name__ == "__main__":
    main()
