"""Pictures of every identity, prompt, method and edit, what is measured of them, and the paper's tables.

`evaluate` takes methods and measurers as Python objects; `evaluate_files` makes them of the files that settings name.

    RUN/pictures/METHOD/EDIT/IDENTITY/PROMPT-N.png
    RUN/made_with.json      what the pictures were made with: another run folder for anything else
    RUN/values.jsonl        the pictures, with every number measured of each
    RUN/evaluation.json, evaluation.md, *.png

A picture's noise is a function of the seed, its identity, its prompt and its number, and of nothing else: the same for
every method, edit and scale. Pictures that are there are kept, so the same command goes on where it was stopped, and
more methods, identities, prompts or strengths can be added later. Where RANK and WORLD_SIZE are set, as `accelerate
launch` sets them, each process paints its part, and the last one to end measures.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..wplus_core.directions import Direction, Edit, edit
from ..wplus_core.errors import WPlusError
from ..wplus_core.files import write_whole
from ..wplus_core.photos import load_photo, save_png
from .measures import Measurer, Picture, SetMeasurer, Shown
from .sampling import noise

log = logging.getLogger(__name__)

Paint = Callable[[Tensor, Sequence[str], Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Method:
    """paint: codes [B, L, 512], prompts, noise [B, 4, h, w] -> pictures [B, 3, H, W] in 0..1.

    scale: lambda, for the sweep of methods that share a name. made_with: JSON values that decide what it paints.
    """

    name: str
    paint: Paint
    scale: float = 1.0
    made_with: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.name}@{self.scale:g}"


@dataclass(frozen=True)
class Shot:
    """One picture to be made. strength 0: without an edit."""

    method: str
    identity: str
    prompt: str
    number: int
    edit: str = ""
    strength: float = 0.0

    @property
    def path(self) -> Path:
        """In the run folder."""
        moved = f"{file_name(self.edit)}{self.strength:+g}" if self.edit else "unedited"
        name = f"{file_name(self.prompt)[:48]}-{hash_of(self.prompt):08x}-{self.number}.png"
        return Path("pictures", self.method, moved, self.identity, name)

    def key(self, seed: int) -> tuple[int, ...]:
        """Of the noise."""
        return seed, hash_of(self.identity), hash_of(self.prompt), self.number

    def unedited(self) -> Shot:
        return Shot(self.method, self.identity, self.prompt, self.number)


def file_name(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text.lower()).strip("-")


def hash_of(text: str) -> int:
    return zlib.crc32(text.encode())


@dataclass(frozen=True, eq=False)
class Plan:
    """Which pictures are made, and of whom.

    identities: a code [L, 512] by name. references: their photos' files. edits: directions by name, each at every
    strength. edited_prompts: how many of the prompts the edits get, 0 for all. numbers: pictures of each combination.
    latent: (h, w) of the noise. made_with: JSON values that decide all pictures.
    """

    run: Path
    identities: Mapping[str, Tensor]
    prompts: Sequence[str]
    references: Mapping[str, Path | Tensor] = field(default_factory=dict)
    edits: Mapping[str, Direction] = field(default_factory=dict)
    strengths: Sequence[float] = ()
    edited_prompts: int = 0
    numbers: int = 1
    latent: tuple[int, int] = (64, 64)
    batch: int = 4
    seed: int = 0
    made_with: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if len({w.shape for w in self.identities.values()}) != 1:
            shapes = {name: list(w.shape) for name, w in self.identities.items()}
            raise WPlusError(f"identities must be codes [L, 512] of one generator, got {shapes or 'none'}")

    @property
    def layers(self) -> int:
        return len(next(iter(self.identities.values())))

    def shots(self, method: str) -> list[Shot]:
        """The unedited pictures, then each edit's."""
        moves = [(name, s) for name, s in product(self.edits, self.strengths) if s]
        prompts = self.prompts[: self.edited_prompts or None]
        plain = product(self.identities, self.prompts, range(self.numbers))
        edited = product(moves, self.identities, prompts, range(self.numbers))
        return [Shot(method, *x) for x in plain] + [Shot(method, i, p, n, *move) for move, i, p, n in edited]

    def code(self, shot: Shot) -> Tensor:
        w = self.identities[shot.identity][None]
        return (edit(w, [Edit(self.edits[shot.edit], shot.strength)]) if shot.edit else w)[0]

    def reference(self, identity: str) -> Picture | None:
        photo = self.references.get(identity)
        return None if photo is None else reference_picture(identity, photo)

    def picture(self, shot: Shot) -> Picture:
        return Picture(str(shot.path), load_photo(self.run / shot.path).pixels)

    def shown(self, shot: Shot) -> Shown:
        before = self.picture(shot.unedited()) if shot.edit else None
        compared = self.reference(shot.identity), before
        return Shown(self.picture(shot), shot.prompt, shot.identity, *compared, shot.edit, shot.strength)


def reference_picture(identity: str, photo: Path | Tensor) -> Picture:
    return Picture(f"reference/{identity}", photo if isinstance(photo, Tensor) else load_photo(photo).pixels)


def evaluate(
    plan: Plan,
    methods: Sequence[Method],
    measurers: Sequence[Measurer] = (),
    set_measurers: Sequence[SetMeasurer] = (),
) -> dict[str, Any] | None:
    """Make the pictures that are missing, measure all, write values.jsonl and evaluation.json; returns the latter.

    None where other processes are still painting.
    {"methods": {method: {number: {mean, error, n}, pictures}}, "edits": {method: {edit: [{strength, number: ...}]}}}
    """
    check_names(methods)
    check_made_with(plan, methods)
    for method in methods:
        paint(plan, method)
    if missing := sum(not (plan.run / s.path).is_file() for m in methods for s in plan.shots(m.key)):
        log.info("%s: %d pictures are still to be made, by other processes", plan.run, missing)
        return None
    rows = [row for method in methods for row in measure(plan, method, measurers)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(plan.run / "values.jsonl", lambda p: p.write_text(lines, encoding="utf-8"))
    results = {"methods": {}, "edits": {}}
    for method in methods:
        own = [r for r in rows if r["method"] == method.key]
        sets = {k: x for m in set_measurers for k, x in m(pictures_of(plan, method)).items()}
        described = {"name": method.name, "scale": method.scale}
        results["methods"][method.key] = described | summary([r for r in own if not r["edit"]]) | sets
        if plan.edits:
            results["edits"][method.key] = {name: curve(own, name) for name in plan.edits}
    save_json(results, plan.run / "evaluation.json")
    return results


def paint(plan: Plan, method: Method):
    """This process's batches; they are the same whatever is there, so that a stop changes no picture."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    shots = plan.shots(method.key)
    batches = [shots[i : i + plan.batch] for i in range(0, len(shots), plan.batch)]
    for batch in tqdm(batches[rank::ranks], desc=method.key, unit="batch", disable=None):
        if all((plan.run / s.path).is_file() for s in batch):
            continue
        w = torch.stack([plan.code(s) for s in batch])
        pictures = method.paint(w, [s.prompt for s in batch], noise([s.key(plan.seed) for s in batch], plan.latent))
        for shot, pixels in zip(batch, pictures, strict=True):
            write_whole(plan.run / shot.path, partial(save_png, pixels))


def measure(plan: Plan, method: Method, measurers: Sequence[Measurer]) -> Iterator[dict[str, Any]]:
    """A row for each picture: what it shows, its file, and its numbers."""
    shots = plan.shots(method.key)
    for i in tqdm(range(0, len(shots), plan.batch), desc=f"measuring {method.key}", unit="batch", disable=None):
        batch = shots[i : i + plan.batch]
        shown = [plan.shown(s) for s in batch] if measurers else []
        values = {k: column for m in measurers for k, column in m(shown).items()}
        for n, shot in enumerate(batch):
            numbers = {k: column[n] for k, column in values.items() if not math.isnan(column[n])}
            yield {"file": shot.path.as_posix()} | vars(shot) | numbers


def pictures_of(plan: Plan, method: Method) -> Iterator[Tensor]:
    """The unedited pictures, in batches."""
    shots = [s for s in plan.shots(method.key) if not s.edit]
    for i in range(0, len(shots), plan.batch):
        yield torch.stack([plan.picture(s).pixels for s in shots[i : i + plan.batch]])


WHAT = ("file", *Shot.__dataclass_fields__)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Each number's mean over the pictures that have it, its standard error, and how many these are."""
    names = dict.fromkeys(k for r in rows for k in r if k not in WHAT)
    columns = {k: [r[k] for r in rows if k in r] for k in names}
    return {k: mean_of(x) for k, x in columns.items()} | {"pictures": len(rows)}


def mean_of(values: Sequence[float]) -> dict[str, float]:
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return {"mean": round(fmean(values), 6), "error": round(error, 6), "n": len(values)}


def curve(rows: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The means at every strength of an edit, in order; 0 is the same prompts' unedited pictures."""
    edited = [r for r in rows if r["edit"] == name]
    prompts = {r["prompt"] for r in edited}
    groups = {0.0: [r for r in rows if not r["edit"] and r["prompt"] in prompts]}
    for r in edited:
        groups.setdefault(r["strength"], []).append(r)
    return [{"strength": s} | summary(groups[s]) for s in sorted(groups)]


def check_names(methods: Sequence[Method]):
    keys = [m.key for m in methods]
    if twice := [k for k in keys if keys.count(k) > 1]:
        raise WPlusError(f"two methods are called {twice[0]}: rename one file, or give each scale once")


def check_made_with(plan: Plan, methods: Sequence[Method]):
    """Pictures of other settings under the same names would be taken for these: WPlusError names what differs."""
    path = plan.run / "made_with.json"
    old = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    new = {
        "pictures": {**plan.made_with, "seed": plan.seed, "latent": list(plan.latent)},
        "methods": {m.key: m.made_with for m in methods},
        "identities": {name: digest(w) for name, w in plan.identities.items()},
        "edits": {name: digest(d.unit * d.rows(plan.layers)) for name, d in plan.edits.items()},
    }
    new = json.loads(json.dumps(new))
    changed = [f"{g}: {k}" for g, now in new.items() for k in now if k in old.get(g, {}) and old[g][k] != now[k]]
    if changed:
        raise WPlusError(
            f"{plan.run} holds pictures that were made otherwise ({', '.join(changed)}); choose another --run folder, "
            "or delete this one"
        )
    save_json({g: old.get(g, {}) | now for g, now in new.items()}, path)


def digest(*tensors: Tensor) -> str:
    sha = hashlib.sha256()
    for x in tensors:
        sha.update(x.detach().float().cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


def save_json(item: Any, path: Path):
    write_whole(path, lambda p: p.write_text(json.dumps(item, indent=1) + "\n", encoding="utf-8"))
