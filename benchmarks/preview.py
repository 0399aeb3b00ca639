"""From a slider of W+ Edit Stack to the picture: how long the live preview takes, seen from the browser.

    scripts/setup && scripts/comfy-env newest      # once: the environments
    .venv/bin/python benchmarks/preview.py [--moves 15]

Starts ComfyUI on the CPU with a generator of FFHQ's size (1024 px, 18 layers, random weights) and a direction that
moves every layer, so that nothing of the picture before can be kept; opens a W+ Edit Stack in headless Chromium; moves
the slider again and again, and waits each time for the quick picture (128 px) and the fine one (256 px). Both times
count from the slider's move; the fine one waits 100 ms for another move before it starts. Then, without a browser, what
the same pictures cost the plain generator, in turns with the painter, as a ratio of the fastest of each.
OMP_NUM_THREADS is taken from the environment, else all cores.
The last line is a JSON object: first_ms, refined_ms (medians), painter_over_generator (at 256 px).
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from comfyui_wplus.wplus_core.checkpoints import save_generator
from comfyui_wplus.wplus_core.direction_files import save_directions
from comfyui_wplus.wplus_core.directions import Direction
from comfyui_wplus.wplus_core.painter import Painter
from comfyui_wplus.wplus_core.stylegan2 import Generator, GeneratorConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from comfyui.browser import Frontend, chromium  # noqa: E402
from comfyui.server import Server  # noqa: E402

ADD_NODE = "() => app.graph.add(window.stack = LiteGraph.createNode('WPlusEditStack'))"
MOVE = """async (value) => {
    const slider = document.querySelector(".wplus-row input[type=range]");
    const picture = document.querySelector(".wplus-picture");
    const shown = (size) => new Promise((done) => {
        const look = () => {
            if (picture.naturalWidth !== size || picture.dataset.edits !== `everything=${value}`) return;
            picture.removeEventListener("load", look);
            done(performance.now());
        };
        picture.addEventListener("load", look);
    });
    const began = performance.now(), pictures = [shown(128), shown(256)];
    slider.value = value;
    slider.dispatchEvent(new Event("input"));
    return [await pictures[0] - began, await pictures[1] - began];
}"""


def write_models(folder: Path) -> Generator:
    generator = Generator(GeneratorConfig.for_size(1024)).requires_grad_(False)
    (folder / "directions").mkdir(parents=True)
    save_generator(generator, folder / "generator.safetensors")
    save_directions([Direction("everything", torch.randn(18, 512))], folder / "directions/one.safetensors")
    return generator


def in_the_browser(url: str, moves: int) -> tuple[list[float], list[float]]:
    """Milliseconds to the quick and to the fine picture of each move."""
    with chromium() as browser, Frontend(browser, url) as frontend:
        frontend.page.evaluate(ADD_NODE)
        frontend.page.wait_for_selector(".wplus-picture[data-size='256']", timeout=120_000)
        values = [round(-3 + 0.05 * (7 * n % 120), 2) or 1 for n in range(1, moves + 2)]
        times = [frontend.page.evaluate(MOVE, value) for value in values][1:]
    return [t[0] for t in times], [t[1] for t in times]


@torch.inference_mode()
def painter_over_generator(generator: Generator, size: int, rounds: int = 5) -> float:
    painter, fastest = Painter(generator), {"generator": math.inf, "painter": math.inf}
    for w in torch.randn(rounds, 18, 512):
        plain, quick = partial(generator, w[None], max_resolution=size), partial(painter.paint, w, size)
        for name, paint in (("generator", plain), ("painter", quick)):
            began = time.perf_counter()
            paint()
            fastest[name] = min(fastest[name], time.perf_counter() - began)
    print(f"{size} px: " + ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in fastest.items()))
    return fastest["painter"] / fastest["generator"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moves", type=int, default=15)
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as base:
        generator = write_models(Path(base, "models/wplus"))
        with Server("newest", Path(base)) as server:
            first, refined = in_the_browser(server.url, args.moves)
    for name, times in (("first", first), ("refined", refined)):
        print(f"{name}: " + " ".join(f"{t:.0f}" for t in times) + " ms")
    ratios = {size: painter_over_generator(generator, size) for size in (128, 256)}
    results = {"first_ms": round(statistics.median(first)), "refined_ms": round(statistics.median(refined))}
    print(json.dumps(results | {"painter_over_generator": round(ratios[256], 3)}))


if __name__ == "__main__":
    main()
