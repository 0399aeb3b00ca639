"""An evaluation as Markdown tables beside the paper's, and as plots."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..wplus_core.files import write_whole

log = logging.getLogger(__name__)

Results = Mapping[str, Any]

# Li et al., CVPR 2024. Table 1 is of 120 identities x 20 prompts; the paper does not say why "Ours" differs in Table 3.
TABLE_1 = {
    "Textual Inversion": (0.194, 0.575, 0.891),
    "DreamBooth": (0.177, 0.562, 0.800),
    "Custom Diffusion": (0.216, 0.498, 0.850),
    "FastComposer": (0.265, 0.419, 0.950),
    "IP-Adapter-Face": (0.241, 0.407, 0.958),
    "CelebBasis": (0.253, 0.448, 0.916),
    "W+ adapter": (0.267, 0.418, 0.950),
}
TABLE_2 = {"e4e": (0.431, 32.26, 0.205, 0.409, 0.312), "W+ adapter, stage I": (0.435, 31.47, 0.263, 0.393, 0.275)}
TABLE_3 = {
    "parallel attention": (0.243, 0.526, 0.936),
    "without L_reg": (0.136, 0.461, 0.951),
    "weaker L_reg": (0.192, 0.497, 0.946),
    "full": (0.267, 0.516, 0.943),
}
NUMBERS = ("clip", "id", "detection")
SHOWN = {
    "clip": "CLIP score ↑",
    "id": "ID distance ↓",
    "detection": "detection ↑",
    "fid": "FID ↓",
    "lpips": "LPIPS ↓",
    "id_kept": "ID distance to before ↓",
    "top1": "recognised ↑",
    "background_change": "background change ↓",
    "face_change": "face change",
    "moved": "moved along it",
}


def write_report(results: Results, run: Path, missing: Sequence[str] = ()):
    """RUN/evaluation.md and its plots. missing: a line for each thing that was not measured."""
    plots = draw(results, run)
    parts = ["# Evaluation", pictures_table(results)]
    parts += [reconstruction_table(results)] if is_reconstruction(results) else []
    parts += [edits_table(results)] if results["edits"] else []
    parts += [f"![{p.stem}]({p.name})" for p in plots]
    parts += ["Not measured:\n\n" + "\n".join(f"- {x}" for x in missing)] if missing else []
    parts += ["Means ± standard errors; `evaluation.json` has them with their counts, `values.jsonl` each picture's."]
    text = "\n\n".join(parts) + "\n"
    write_whole(run / "evaluation.md", lambda p: p.write_text(text, encoding="utf-8"))


def methods(results: Results) -> list[Results]:
    return list(results["methods"].values())


def pictures_table(results: Results) -> str:
    """Tables 1 and 3, and whatever else was measured of each unedited picture."""
    known = {k for m in methods(results) for k, x in m.items() if isinstance(x, dict)}
    more = sorted(known - {*NUMBERS, "lpips", "fid"})
    columns = [*NUMBERS, *more]
    rows = [[name, *(cell(m.get(k)) for k in columns), str(m["pictures"])] for name, m in results["methods"].items()]
    blank = [""] * (len(more) + 1)
    for number, table in ((1, TABLE_1), (3, TABLE_3)):
        rows += [[f"*paper, table {number}: {name}*", *map(number_of, x), *blank] for name, x in table.items()]
    return "## Text, identity, detection\n\n" + table_of(["method", *map(shown, columns), "pictures"], rows)


def is_reconstruction(results: Results) -> bool:
    return any(m["name"] == "e4e" or {"fid", "lpips"} & set(m) for m in methods(results))


def reconstruction_table(results: Results) -> str:
    """Table 2: the edits' columns are the identity distances between edited and unedited pictures, over strengths."""
    names = list(dict.fromkeys([*(e for x in results["edits"].values() for e in x)]))
    rows = []
    for key, m in results["methods"].items():
        kept = [edited_id(results["edits"].get(key, {}).get(name, [])) for name in names]
        rows.append([key, *(cell(m.get(k)) for k in ("id", "fid", "lpips")), *map(number_of, kept)])
    for name, (*whole, age, smile) in TABLE_2.items():
        theirs = {"age": age, "smile": smile}
        rows.append([f"*paper, table 2: {name}*", *map(number_of, whole), *(number_of(theirs.get(n)) for n in names)])
    head = ["method", *map(shown, ("id", "fid", "lpips")), *(f"ID under {n} ↓" for n in names)]
    return "## Reconstruction\n\n" + table_of(head, rows)


def edited_id(points: Sequence[Results]) -> float | None:
    """The mean over all edited pictures."""
    kept = [p["id_kept"] for p in points if "id_kept" in p]
    count = sum(x["n"] for x in kept)
    return sum(x["mean"] * x["n"] for x in kept) / count if count else None


def edits_table(results: Results) -> str:
    every = [(key, name, p) for key, x in results["edits"].items() for name, points in x.items() for p in points]
    columns = list(dict.fromkeys(k for _, _, p in every for k, x in p.items() if isinstance(x, dict)))
    rows = [[key, name, f"{p['strength']:+g}", *(cell(p.get(k)) for k in columns)] for key, name, p in every]
    return "## Edits\n\n" + table_of(["method", "edit", "strength", *map(shown, columns)], rows)


def table_of(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(name: str) -> str:
    return SHOWN.get(name, name)


def cell(x: Results | float | None) -> str:
    return f"{x['mean']:.3f} ± {x['error']:.3f}" if isinstance(x, Mapping) else number_of(x)


def number_of(x: float | None) -> str:
    return "" if x is None else f"{x:.2f}" if x >= 10 else f"{x:.3f}"


def draw(results: Results, run: Path) -> list[Path]:
    """RUN/edits.png: what edits keep and move by strength; RUN/scales.png: the lambda sweep, where there is one."""
    edits = {
        f"{key}, {name}": [(p["strength"], p) for p in points]
        for key, x in results["edits"].items()
        for name, points in x.items()
    }
    sweeps: dict[str, list[tuple[float, Results]]] = {}
    for m in methods(results):
        sweeps.setdefault(m["name"], []).append((m["scale"], m))
    sweeps = {name: sorted(points, key=lambda p: p[0]) for name, points in sweeps.items() if len(points) > 1}
    plots = {"edits.png": (edits, "strength"), "scales.png": (sweeps, "λ")}
    wanted = {run / name: x for name, x in plots.items() if x[0]}
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        if wanted:
            log.warning("no plots without matplotlib; install it with: pip install matplotlib")
        return []
    return [path for path, (lines, axis) in wanted.items() if draw_lines(lines, axis, path)]


def draw_lines(lines: Mapping[str, Sequence[tuple[float, Results]]], axis: str, path: Path) -> bool:
    """A panel for every number that any line has, with standard errors."""
    from matplotlib.figure import Figure

    every = [p for points in lines.values() for _, p in points]
    names = list(dict.fromkeys(k for p in every for k, x in p.items() if isinstance(x, dict)))
    if not names:
        return False
    figure = Figure(figsize=(4.2 * len(names), 3.6), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for label, points in lines.items():
            known = [(x, p[name]["mean"], p[name]["error"]) for x, p in points if name in p]
            if known:
                panel.errorbar(*zip(*known, strict=True), fmt="o-", capsize=2, label=label)
        panel.set(xlabel=axis, title=shown(name))
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    write_whole(path, save(figure))
    return True


def save(figure: Any) -> Callable[[Path], None]:
    return lambda path: figure.savefig(path, format="png", dpi=120)
