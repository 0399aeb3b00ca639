"""What the miniature's adapters can do, measured on pictures that they paint: docs/miniature.json and its tables.

    python -m comfyui_wplus.train.mini.evaluation OUT              measures the adapters that OUT has
    python -m comfyui_wplus.train.mini.evaluation OUT --docs docs  and writes docs/miniature.json, and into miniature.md
    python -m comfyui_wplus.train.mini.evaluation OUT --docs docs --keep parallel  where a row of before stays

It is `train evaluate` with a measurer that knows the truth (`witness`). The people were never seen in training. The
pictures are kept in OUT/evaluation, so the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any
from uuid import uuid4

import numpy as np
import torch
import tyro
from torch import Tensor

from ...wplus_core.adapter import WPlusAdapter
from ...wplus_core.checkpoints import load_adapter
from ...wplus_core.direction_files import load_directions
from ...wplus_core.directions import Direction
from ...wplus_core.errors import WPlusError
from ...wplus_core.files import sha256, write_whole
from ..evaluate import Method, Plan, evaluate
from ..evaluate_report import table_of
from ..measures import BackgroundChange, Picture, Shown, face_square
from ..sampling import Sampling, decode, noise, sample
from . import adapters, autoencoder, base, judge, numbers, scenes, text, world
from .command import run
from .fit import in_bfloat16
from .witness import ATTRIBUTES, PROMPTS, People, Witness

VARIANTS = tuple(name for name in adapters.TRAININGS if not name.endswith("stage1"))
ALWAYS = ("drawn", "restored", "told", "confined", "lambda0")  # rows beside those of the trainings
LATENT = (16, 16)
NAMES = {"top1": "retrieval_top1"}
EDIT = 2.0  # the strength at which edits are compared
WORDS = "What the plain model paints of a person when words tell it, without any adapter:"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


@dataclass(frozen=True)
class Size:
    """How much is painted, and how.

    people: of the tables, each with all prompts. edited, swept: how many of them with edits, and with every scale.
    pairs, frames: of the interpolations. told: pictures of each word of a person's looks. tried: drawn pictures that
    the judge is tried on. steps, guidance: the sampler's.
    """

    people: int = 100
    edited: int = 50
    swept: int = 50
    pairs: int = 12
    frames: int = 9
    told: int = 10
    tried: int = 512
    strengths: tuple[float, ...] = (-2.0, -1.0, 1.0, EDIT)
    scales: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
    steps: int = 20
    guidance: float = 4.0
    batch: int = 25


class Bench:
    """The miniature's text-to-image model and people, and what looks at the pictures."""

    def __init__(self, out: Path, size: Size, device: str):
        self.out, self.size, self.device = out, size, device
        self.unet, self.vae, self.text = base.load(out, device), autoencoder.load(out, device), text.load(out, device)
        self.people = People(out, size.people, device)
        self.witness = Witness(judge.load(out, device), self.people.factors, self.vae, size.tried)
        self.embedded = {p: self.text([p])[0] for p in ("", *PROMPTS)}

    @cached_property
    def edits(self) -> dict[str, Direction]:
        every = {d.name: d for d in load_directions(self.out / "directions" / "drawn.safetensors")}
        return {world.NAMES[i]: every[world.NAMES[i]] for i in ATTRIBUTES if world.NAMES[i] in every}

    @property
    def trained(self) -> list[str]:
        return [name for name in VARIANTS if (self.out / "adapters" / f"{name}.safetensors").is_file()]

    @property
    def methods(self) -> list[Method]:
        return [self.method(name) for name in self.trained] + [self.method("full", name="confined", confined=True)]

    def method(self, training: str, scale: float = 1.0, name: str = "", confined: bool = False) -> Method:
        """confined: to the face that the plain model paints; the rest changes by what the frozen UNet carries there."""
        file = self.out / "adapters" / f"{training}.safetensors"
        adapter = load_adapter(file).float().to(self.device)
        how = Sampling(self.size.steps, self.size.guidance, scale)

        def paint(w: Tensor, prompts: Sequence[str], start: Tensor) -> Tensor:
            c = torch.stack([self.embedded[p] for p in prompts])
            mask = self.faces(self.paint(None, w, c, start, how)) if confined else None
            return self.paint(adapter, w, c, start, how, mask)

        made_with = {"adapter": sha256(file), "steps": how.steps, "guidance": how.guidance}
        return Method(name or training, paint, scale, made_with)

    @torch.no_grad()
    def paint(
        self,
        adapter: WPlusAdapter | None,
        w: Tensor,
        c: Tensor,
        start: Tensor,
        how: Sampling,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Pictures [B, 3, 128, 128] in 0..1, for what `sample` takes."""
        with in_bfloat16(self.device):
            z0 = sample(self.unet, adapter, w, c, self.embedded[""], start, how, mask)
        return decode(self.vae, z0).cpu()

    def faces(self, pictures: Tensor) -> Tensor:
        """[B, 1, H, W], 1 in the square that `BackgroundChange` leaves out, and everywhere where nobody is seen."""
        found = [self.witness.points(Picture(uuid4().hex, x)) for x in pictures]
        size = pictures.shape[2:]
        return torch.stack([torch.ones(1, *size) if f is None else face_square(f, size)[None] for f in found])

    def plan(self, people: int, prompts: int = len(PROMPTS), **more: Any) -> Plan:
        identities, chosen = self.people.identities(people), tuple(PROMPTS)[:prompts]
        return Plan(self.out / "evaluation", identities, chosen, latent=LATENT, batch=self.size.batch, **more)


def variants(bench: Bench) -> dict[str, Any]:
    """Text, identity and detection of drawn pictures, as they are and as the VAE gives them back, of the plain model
    told by words who it is, of λ = 0, of the method, everywhere and on the face alone, and of its ablations."""
    methods = [*bench.methods, bench.method("full", 0.0, "lambda0")]
    found = evaluate(bench.plan(bench.size.people), methods, [bench.witness])["methods"]
    drawn = {prompt: scenes.scenes(bench.people.factors, bench.people.scenes(prompt)).images for prompt in PROMPTS}
    restored = {prompt: autoencoder.restored(bench.vae, x) for prompt, x in drawn.items()}
    best = {"drawn": drawn, "restored": restored, "told": told(bench)}
    best = {name: seen_in(bench, name, pictures) for name, pictures in best.items()}
    return best | {m.name: means(found[m.key]) for m in methods}


def told(bench: Bench) -> dict[str, Tensor]:
    """By prompt: what the plain model paints of all people when the caption says of their looks what fits in."""
    people, rng, s = bench.people, np.random.default_rng(0), bench.size
    looks = [rng.permutation(words)[: world.MOST_LOOKS].tolist() for words in world.looks(people.factors)]
    painted = {}
    for number, prompt in enumerate(PROMPTS):
        captions = bench.text([world.looking(prompt, words) for words in looks])
        start = noise([(number, i) for i in range(len(looks))], LATENT)
        parts = zip(*(x.split(s.batch) for x in (people.codes, captions, start)), strict=True)
        painted[prompt] = torch.cat([bench.paint(None, *part, Sampling(s.steps, s.guidance)) for part in parts])
    return painted


def seen_in(bench: Bench, name: str, painted: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the witness says of pictures of all people, by prompt."""
    rows = []
    for prompt, pictures in painted.items():
        shown = [Shown(Picture(f"{name}/{prompt}/{i}", x), prompt, f"{i:03d}") for i, x in enumerate(pictures)]
        rows.append(bench.witness(shown))
    found = {NAMES.get(k, k): round(fmean(x for row in rows for x in row[k]), 5) for k in rows[0]}
    return found | {"pictures": sum(map(len, painted.values()))}


def means(row: Mapping[str, Any]) -> dict[str, Any]:
    found = {NAMES.get(k, k): round(x["mean"], 5) for k, x in row.items() if isinstance(x, Mapping)}
    return found | {"pictures": row["pictures"]}


def edits(bench: Bench) -> dict[str, Any]:
    """What an edit changes in and outside the face, by method, and for the full one what moves at each strength."""
    measurers = [bench.witness, BackgroundChange(bench.witness.points)]
    changes, confusion, curves, monotonic = redrawn(bench), {}, {}, {}
    for method in bench.methods:
        strengths = bench.size.strengths if method.name == "full" else (EDIT,)
        plan = bench.plan(bench.size.edited, 1, edits=bench.edits, strengths=strengths)
        found = evaluate(plan, [method], measurers)["edits"][method.key]
        at = [next(p for p in points if p["strength"] == EDIT) for points in found.values()]
        known = {k: [p[k]["mean"] for p in at if k in p] for k in ("background_change", "face_change")}
        changes[method.name] = {k: round(fmean(x), 5) for k, x in known.items() if x}
        if method.name == "full":
            confusion = dict(zip(found, map(moves, at), strict=True))
            curves = {e: curve(points, e) for e, points in found.items()}
            rows = [json.loads(line) for line in (plan.run / "values.jsonl").read_text(encoding="utf-8").splitlines()]
            monotonic = {edit: monotony(rows, edit) for edit in found}
    return {"changes": changes, "edit_confusion": confusion, "edit_curves": curves, "edit_monotonicity": monotonic}


def redrawn(bench: Bench) -> dict[str, dict[str, float]]:
    """What changes in and outside the face when the renderer draws what the edits mean, and when the autoencoder has
    seen it: what a model that changes nothing else would come to."""
    prompt, count = next(iter(PROMPTS)), bench.size.edited
    people, scene = bench.people.factors[:count], bench.people.scenes(prompt)[:count]
    moved = torch.zeros(1 + len(bench.edits), len(world.NAMES))  # the first: by nothing
    for row, name in zip(moved[1:], bench.edits, strict=True):
        row[world.NAMES.index(name)] = EDIT
    drawn = [scenes.scenes(people + row, scene).images for row in moved]
    found = {}
    for name, pictures in {"drawn": drawn, "restored": [autoencoder.restored(bench.vae, x) for x in drawn]}.items():
        before, *after = [[Picture(f"{name}/{n}/{i}", x) for i, x in enumerate(xs)] for n, xs in enumerate(pictures)]
        pairs = [Shown(x, prompt, f"{i:03d}", before=before[i]) for xs in after for i, x in enumerate(xs)]
        changes = BackgroundChange(bench.witness.points)(pairs).items()
        known = {k: [x for x in xs if not math.isnan(x)] for k, xs in changes}
        found[name] = {k: round(fmean(xs), 5) for k, xs in known.items() if xs}
    return found


def moves(point: Mapping[str, Any]) -> dict[str, float]:
    return {k.removeprefix("moved_"): round(x["mean"], 3) for k, x in point.items() if k.startswith("moved_")}


def curve(points: Sequence[Mapping[str, Any]], edit: str) -> dict[str, float]:
    return {f"{p['strength']:+g}": round(p[f"moved_{edit}"]["mean"], 3) for p in points if p["strength"]}


def monotony(rows: Sequence[Mapping[str, Any]], edit: str) -> float:
    """Of all pairs of strengths of the same picture, the share in which the stronger edit shows more."""
    series: dict[tuple, dict[float, float]] = {}
    for r in rows:
        if r["edit"] in ("", edit):
            moved = series.setdefault((r["identity"], r["prompt"], r["number"]), {})
            moved[r["strength"]] = r.get(f"moved_{edit}", 0.0)
    rising = [b > a for moved in series.values() for a, b in pairwise(moved[s] for s in sorted(moved))]
    return round(fmean(rising), 4)


def sweep(bench: Bench) -> dict[str, Any]:
    """Text and identity by λ."""
    methods = [bench.method("full", scale) for scale in bench.size.scales]
    found = evaluate(bench.plan(bench.size.swept, 2), methods, [bench.witness])["methods"]
    return {f"{m.scale:g}": means(found[m.key]) for m in methods}


def interpolation(bench: Bench) -> dict[str, float]:
    """From one person to another in even steps, the same noise: how even are the steps that the picture takes?

    largest_step: the largest change between neighbouring pictures by the mean one; 1 is perfectly even.
    """
    s, paint, prompt = bench.size, bench.method("full").paint, next(iter(PROMPTS))
    amounts = torch.linspace(0, 1, s.frames)[:, None, None]
    steps = []
    for n in range(s.pairs):
        a, b = bench.people.codes[2 * n : 2 * n + 2]
        frames = paint(torch.lerp(a, b, amounts), [prompt] * s.frames, noise([(n,)] * s.frames, LATENT))
        change = frames.diff(dim=0).abs().mean((1, 2, 3))
        steps.append((change.max() / change.mean()).item())
    return {"largest_step": round(fmean(steps), 4), "pairs": s.pairs, "frames": s.frames}


def words(bench: Bench) -> dict[str, dict[str, Any]]:
    """What the plain model paints of a person's looks when words tell it: what it has learned to paint at all, by the
    cross-attention that the adapter adds to.

    By factor: the words of its lowest and its highest values ("" where captions say nothing), and by how many
    deviations the judge sees more of it with the second than with the first, in the same noise.
    """
    s, prompts = bench.size, list(PROMPTS)
    how, start = Sampling(s.steps, s.guidance), noise([(n,) for n in range(s.told)], LATENT)

    @cache
    def seen(word: str) -> Tensor:
        told = [world.looking(prompts[n % len(prompts)], [word] if word else []) for n in range(s.told)]
        pictures = bench.paint(None, bench.people.codes[:1].expand(s.told, -1, -1), bench.text(told), start, how)
        return bench.witness.network(pictures.to(bench.device)).factors.mean(0)

    found = {}
    for name, row in world.LOOKS.items():
        low, high = row[0], row[-1]
        moved = (seen(high) - seen(low))[world.NAMES.index(name)].item()
        found[name] = {"low": low, "high": high, "moved": round(moved, 3)}
    return found


def measure(bench: Bench) -> dict[str, Any]:
    if "full" not in bench.trained:
        raise WPlusError(f"{bench.out} has no adapters/full.safetensors yet: make the parts stage1 and full first")
    table = variants(bench)
    moved = edits(bench)
    for name, changes in moved.pop("changes").items():
        table[name] |= changes
    return {
        "variants": table,
        **moved,
        "scales": sweep(bench),
        "interpolation": interpolation(bench),
        "words": words(bench),
        "judge": numbers.of_judge(bench.out, bench.size.tried)["judge"],
        "size": vars(bench.size),
    }


def findings(results: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """What must hold for the method to be called working: claim, what was measured, whether it holds."""
    v = results["variants"]
    full, plain = v["full"], v["lambda0"]
    found = [
        (
            "of 100 people the right one is recognised in at least 80 %, at λ = 0 in at most 5 %",
            f"{full['retrieval_top1']:.1%}, {plain['retrieval_top1']:.1%}",
            full["retrieval_top1"] >= 0.8 and plain["retrieval_top1"] <= 0.05,
        ),
        (
            "text agreement within 5 % of λ = 0's",
            f"{full['text_agreement']:.3f} against {plain['text_agreement']:.3f}",
            full["text_agreement"] >= 0.95 * plain["text_agreement"],
        ),
    ]
    own = {e: moved[e] for e, moved in results["edit_confusion"].items()}
    others = {e: max(abs(x) for k, x in m.items() if k in world.NAMES and k != e)
              for e, m in results["edit_confusion"].items()}  # fmt: skip
    worst = min(own, key=lambda e: own[e] - 2 * others[e])
    found.append(
        (
            "an edit of +2 moves its attribute, and no other one half as much",
            f"least clear is {worst}: {own[worst]:+.2f}, another {others[worst]:.2f}",
            all(own[e] > 2 * others[e] for e in own),
        )
    )
    if "without_disen" in v:
        whole = v["without_disen"]["background_change"]
        ways = {"full": "of it", "stronger_disen": f"with {adapters.STRONGER:g} times its weight",
                "confined": "if on the face alone"}  # fmt: skip
        ratios = {how: v[name]["background_change"] / whole for name, how in ways.items() if name in v}
        found.append(
            (
                "under an edit the background changes at most 1/3 of what it does without L_disen",
                "; ".join(f"{ratio:.2f} {how}" for how, ratio in ratios.items()),
                ratios["of it"] <= 1 / 3,
            )
        )
    return found


COLUMNS = {
    "retrieval_top1": "recognised among all ↑", "id": "distance to the person ↓", "text_agreement": "text agreement ↑",
    "detection": "somebody there ↑", "background_change": "background change ↓", "face_change": "face change",
    "pictures": "pictures",
}  # fmt: skip


def report(results: Mapping[str, Any]) -> str:
    """Markdown."""
    claims = table_of(
        ["claim", "measured", "holds"], [[c, m, "yes" if holds else "**no**"] for c, m, holds in findings(results)]
    )
    rows = [[name, *(number(x.get(k)) for k in COLUMNS)] for name, x in results["variants"].items()]
    table = table_of(["method", *COLUMNS.values()], rows)
    names = [world.NAMES[i] for i in ATTRIBUTES] + ["identity"]
    moved = [[e, *(f"{m[k]:+.2f}" for k in names)] for e, m in results["edit_confusion"].items()]
    confusion = table_of([f"edit of {EDIT:+g}", *names], moved)
    curves = table_of(
        ["edit", *next(iter(results["edit_curves"].values())), "pairs of strengths in order"],
        [[e, *(f"{x:+.2f}" for x in c.values()), f"{results['edit_monotonicity'][e]:.0%}"]
         for e, c in results["edit_curves"].items()],
    )  # fmt: skip
    scales = table_of(
        ["λ", "recognised among all ↑", "distance to the person ↓", "text agreement ↑"],
        [[k, *(number(x[c]) for c in ("retrieval_top1", "id", "text_agreement"))]
         for k, x in results["scales"].items()],
    )  # fmt: skip
    told = table_of(
        ["factor", "captions say", "moved, deviations"],
        [[k, f"{x['low'] or '-'}, then {x['high'] or '-'}", f"{x['moved']:+.2f}"] for k, x in results["words"].items()],
    )
    smooth = results["interpolation"]
    line = (
        f"Interpolation between two people ({smooth['pairs']} pairs, {smooth['frames']} frames): the largest step is "
        f"{smooth['largest_step']:.2f} times the mean step."
    )
    seen = ", ".join(f"{k} {x:.3f}" for k, x in results["judge"].items() if not isinstance(x, Mapping))
    judged = f"The judge on drawn pictures: {seen}."
    return "\n\n".join([claims, table, confusion, curves, scales, line, WORDS, told, judged]) + "\n"


def number(x: float | None) -> str:
    return "" if x is None else str(x) if isinstance(x, int) else f"{x:.3f}"


def write(results: Mapping[str, Any], docs: Path):
    """docs/miniature.json, and the tables between the marks in docs/miniature.md."""
    page = (docs / "miniature.md").read_text(encoding="utf-8")
    if BEGIN not in page or END not in page:
        raise WPlusError(f"{docs / 'miniature.md'} has no place for the tables: {BEGIN.strip()} and {END.strip()}")
    page = page.partition(BEGIN)[0] + BEGIN + "\n" + report(results) + "\n" + END + page.partition(END)[2]
    write_whole(docs / "miniature.md", lambda p: p.write_text(page, encoding="utf-8"))
    whole = json.dumps(results, indent=1) + "\n"
    write_whole(docs / "miniature.json", lambda p: p.write_text(whole, encoding="utf-8"))


def earlier(docs: Path | None, names: Sequence[str], measured: Sequence[str]) -> dict[str, Any]:
    """Rows of docs/miniature.json by these names. measured: the methods that are measured anew, which cannot stay."""
    if not names:
        return {}
    if docs is None:
        raise WPlusError("--keep names rows of miniature.json; --docs must say in which folder it is")
    if anew := set(names) & set(measured):
        raise WPlusError(f"{', '.join(sorted(anew))} is measured anew, so no old row can stay: leave it out of --keep")
    file = docs / "miniature.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["variants"] if file.is_file() else {}
    if lost := [name for name in names if name not in rows]:
        raise WPlusError(f"{file} has no {', '.join(lost)} to keep; it has {', '.join(rows) or 'no rows'}")
    return {name: rows[name] for name in names}


def main(
    out: Annotated[Path, tyro.conf.Positional],
    docs: Path | None = None,
    keep: tuple[str, ...] = (),
    size: Annotated[Size, tyro.conf.arg(name="")] = Size(),  # noqa: B008
):
    """Measure the miniature's adapters.

    Args:
        out: the folder that the miniature was made in.
        docs: the folder of miniature.md, which gets the tables.
        keep: rows of the tables that stay as they are in docs, of methods that OUT has no adapter of.
        size: how much is painted.
    """
    bench = Bench(out, size, "cuda" if torch.cuda.is_available() else "cpu")
    kept = earlier(docs, keep, [*ALWAYS, *bench.trained])
    results = measure(bench)
    results["variants"] |= kept
    print(report(results))
    if docs:
        write(results, docs)


if __name__ == "__main__":
    run(main, "mini.evaluation", __doc__)
