"""New directions: boundaries between labelled codes, GANSpace's PCA and SeFA of any generator, and pictures of them.

Sources: InterFaceGAN (Shen et al., the boundary's normal), GANSpace (Härkönen et al.), SeFA (Shen and Zhou).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .checkpoints import load_identity
from .direction_files import SUFFIXES
from .directions import Direction, Edit, Layers, edit
from .errors import FileError, WPlusError
from .mixing import signed
from .sheets import grid
from .stylegan2 import Generator

FOLDS = 5
STRENGTHS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
Method = Literal["svm", "logistic"]
Watch = Callable[[Sequence], Iterable]  # passes on the items of a long loop, to show how far it is or to end it


@dataclass(frozen=True)
class Found:
    """A direction and how well its boundary parts codes it was not fitted to; chance: the larger class's share."""

    direction: Direction
    accuracy: float
    chance: float
    counts: tuple[int, int]

    def __str__(self) -> str:
        return f"{self.direction.name}: {self.direction.source}"


def find_direction(
    positive: Tensor,
    negative: Tensor,
    name: str,
    method: Method = "svm",
    layers: Layers | None = None,
    per_layer: bool = False,
    watch: Watch = iter,
) -> Found:
    """The normal of a linear boundary from codes without an attribute to codes with it, both [N, L, 512].

    It is fitted to the mean over the layers (those of the range, if given) and has one row for all of them; with
    per_layer=True to all layers side by side, with a row each, which needs more codes. At least 5 codes a side. How
    strongly the fit is regularised is chosen by cross-validation, and the strongest wins a tie: with fewer codes than
    numbers in a code many boundaries part them all, and that one is least led by chance. The accuracy is
    cross-validated around that choice, in steps that go through `watch` (`tqdm.tqdm`, say). Needs scikit-learn.
    """
    check_codes(positive, negative)
    depth = positive.shape[1]
    first, end = layers or (0, depth)
    if first >= min(end, depth):
        raise WPlusError(f"codes of {depth} layers have none in {first}-{end - 1}")
    w = torch.cat([negative, positive]).float()[:, first:end]
    x = w.flatten(1) if per_layer else w.mean(1)
    y = torch.cat([torch.zeros(len(negative)), torch.ones(len(positive))])
    normal, accuracy = boundary(x, y, method, watch)
    vector = normal.reshape(-1, w.shape[2])
    vector = vector * math.sqrt(len(vector)) / vector.norm()
    if per_layer:
        vector = F.pad(vector, (0, 0, first, depth - first - len(vector)))
    counts = len(positive), len(negative)
    what = {"svm": "linear SVM", "logistic": "logistic regression"}[method]
    chance = max(counts) / sum(counts)
    source = (
        f"{what}, {counts[0]} codes with and {counts[1]} without, cross-validated accuracy {accuracy:.3f} "
        f"(chance {chance:.3f})"
    )
    return Found(Direction(name, vector, layers, source=source), accuracy, chance, counts)


def boundary(x: Tensor, y: Tensor, method: Method, watch: Watch = iter) -> tuple[Tensor, float]:
    """Codes x [N, D], labels y [N] in 0, 1 -> the normal [D], the cross-validated accuracy."""
    sk = sklearn()
    if method not in ("svm", "logistic"):
        raise WPlusError(f'expected the method "svm" or "logistic", got {method!r}')
    x = (x - x.mean(0)).double()
    scale = x.square().mean().sqrt().item()
    if not scale > 1e-12:
        raise WPlusError("all codes are the same; two different sets are needed")
    x, y = (x / scale).cpu().numpy(), y.cpu().numpy()
    strengths = [c * 512 / x.shape[1] for c in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)]  # ascending: the first wins a tie
    model = sk["svm"](max_iter=5000) if method == "svm" else sk["logistic"](max_iter=1000)
    inner = sk["folds"](3, shuffle=True, random_state=0)
    search = sk["search"](model, {"C": strengths}, cv=inner)
    outer = sk["folds"](FOLDS, shuffle=True, random_state=0)
    folds = [*outer.split(x, y)]
    accuracy = fmean(search.fit(x[some], y[some]).score(x[rest], y[rest]) for some, rest in watch(folds))
    return torch.from_numpy(search.fit(x, y).best_estimator_.coef_[0]).float(), accuracy


def sklearn() -> dict:
    """What we use of scikit-learn, which is optional."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, StratifiedKFold
        from sklearn.svm import LinearSVC
    except ImportError as e:
        raise WPlusError("finding directions needs scikit-learn: pip install scikit-learn") from e
    return {"svm": LinearSVC, "logistic": LogisticRegression, "search": GridSearchCV, "folds": StratifiedKFold}


def check_codes(positive: Tensor, negative: Tensor):
    if positive.ndim != 3 or negative.ndim != 3 or positive.shape[1:] != negative.shape[1:]:
        raise WPlusError(f"expected two sets of codes [N, L, 512], got {list(positive.shape)}, {list(negative.shape)}")
    if min(len(positive), len(negative)) < FOLDS:
        raise WPlusError(
            f"expected at least {FOLDS} codes with the attribute and {FOLDS} without, got {len(positive)} and "
            f"{len(negative)}; from about 100 a side the direction is reliable"
        )
    if not (torch.isfinite(positive).all() and torch.isfinite(negative).all()):
        raise WPlusError("the codes hold NaN or Inf; encode those photos again")


def folder_codes(folder: str | Path) -> Tensor:
    """All codes of a folder's identity files: [N, L, 512]."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileError(folder, "there is no such folder", "Check the path")
    return stacked([p for p in sorted(folder.iterdir()) if p.suffix in SUFFIXES and p.is_file()], folder)


def stacked(paths: Sequence[Path], place: Path) -> Tensor:
    if not paths:
        remedy = "Photos become identity files with python -m comfyui_wplus.wplus_core.encode"
        raise FileError(place, "no identity files there", remedy)
    codes = [load_identity(p).w for p in paths]
    for path, w in zip(paths, codes, strict=True):
        if w.shape[1:] != codes[0].shape[1:]:
            problem = f"codes {list(w.shape[1:])} beside {list(codes[0].shape[1:])} of {paths[0].name}"
            raise FileError(path, problem, "Use codes of one generator")
    return torch.cat(codes)


def scored_codes(table: str | Path, share: float = 0.5) -> tuple[Tensor, Tensor]:
    """A CSV of (identity file, score) -> codes of the highest and of the lowest scores [N, L, 512] each.

    share: of the files on each side, at most 0.5; below it the undecided middle is left out, as InterFaceGAN does.
    Scores of two values are labels, and share is not used. Paths are relative to the table, which may have a header.
    """
    table = Path(table)
    if not 0 < share <= 0.5:
        raise WPlusError(f"the share of files on each side must be above 0 and at most 0.5, got {share}")
    rows = sorted(read_scores(table), key=lambda row: row[1])
    values = {score for _, score in rows}
    if len(values) < 2:
        raise FileError(table, f"{len(rows)} files and {len(values)} different scores", "At least two are needed")
    count = max(1, int(len(rows) * share))
    low, high = rows[:count], rows[-count:]
    if len(values) == 2:
        low, high = ([r for r in rows if r[1] == v] for v in sorted(values))
    elif low[-1][1] == high[0][1]:
        raise FileError(table, f"score {high[0][1]:g} would be on both sides", "Use a smaller share")
    return stacked([p for p, _ in high], table), stacked([p for p, _ in low], table)


def read_scores(table: Path) -> list[tuple[Path, float]]:
    try:
        with open(table, newline="", encoding="utf-8-sig") as f:
            rows = [row for row in csv.reader(f) if row]
        if rows and len(rows[0]) == 2 and not is_number(rows[0][1]):
            rows = rows[1:]
        scores = [(table.parent / file, float(score)) for file, score in rows]
    except (OSError, ValueError, csv.Error) as e:
        raise FileError(table, f"expected lines of identity file, score ({e})", "Check the table") from e
    if not all(math.isfinite(score) for _, score in scores):
        raise FileError(table, "holds NaN or infinite scores", "Leave those lines out")
    return scores


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@torch.no_grad()
def pca(generator: Generator, count: int = 80, samples: int = 20000, seed: int = 0) -> list[Direction]:
    """GANSpace: the principal components of W over mapped normal samples, largest first, as target-rule directions.

    The raw number is the coordinate in deviations. They share their origin, the mean, so all of them together are also
    the `Spread` of W. Deterministic in the seed, up to rounding.
    """
    dim = generator.config.w_dim
    if not 1 <= count <= dim or samples <= count:
        raise WPlusError(f"expected 1 to {dim} components and more samples than that, got {count} and {samples}")
    rng = torch.Generator().manual_seed(seed)
    weight = generator.style[1].weight
    parts = [torch.randn(min(4096, samples - i), dim, generator=rng) for i in range(0, samples, 4096)]
    w = torch.cat([generator.mapping(z.to(weight)).double().cpu() for z in parts])
    mean = w.mean(0)
    values, vectors = torch.linalg.eigh((w - mean).T @ (w - mean) / (samples - 1))
    std = values.flip(0)[:count].clamp(min=0).sqrt()
    if not std[-1] > 1e-6 * std[0]:
        raise WPlusError(f"this generator's W has fewer than {count} components that vary; ask for fewer")
    rows = (upright(vectors.flip(1)[:, :count].T) * std[:, None]).float()
    source = f"GANSpace PCA of {samples} samples"
    return [Direction(f"component_{k}", rows[k, None], None, mean.float(), source) for k in range(count)]


@torch.no_grad()
def sefa(generator: Generator, layers: Layers | None = None, count: int = 10) -> list[Direction]:
    """SeFA: what the modulation of those layers reacts to most, as unit steps on them, strongest first.

    The eigenvectors of A^T A, where A [channels, 512] stacks the layers' modulation weights (of the convolution that a
    layer of w drives; of to_rgb for the last one, which drives nothing else).
    """
    depth, dim = generator.config.layers, generator.config.w_dim
    first, end = layers or (0, depth)
    if not 0 <= first < min(end, depth) or not 1 <= count <= dim:
        raise WPlusError(f"expected layers within 0-{depth - 1} and 1 to {dim} directions, got {layers} and {count}")
    end = min(end, depth)
    a = torch.cat([modulation(generator, i) for i in range(first, end)])
    values, vectors = torch.linalg.eigh(a.T @ a)
    rows = upright(vectors.flip(1)[:, :count].T).float()
    shares = values.flip(0)[:count] / values.sum()
    name = "sefa" if layers is None else f"sefa_{first}-{end - 1}"
    return [
        Direction(f"{name}_{k}", rows[k, None], layers and (first, end), source=f"SeFA, eigenvalue share {s:.3f}")
        for k, s in enumerate(shares)
    ]


def modulation(generator: Generator, layer: int) -> Tensor:
    """The modulation weights [channels, 512] behind layer `layer` of w, in float64."""
    convs = [generator.conv1, *generator.convs, generator.to_rgbs[-1] if generator.to_rgbs else generator.to_rgb1]
    linear = convs[layer].conv.modulation
    return linear.weight.double().cpu() * linear.scale


def upright(rows: Tensor) -> Tensor:
    """Rows [K, D] with the sign that makes the largest number positive, since an eigenvector's sign means nothing."""
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * largest.sign()


@torch.no_grad()
def contact_sheet(
    generator: Generator,
    directions: Sequence[Direction],
    w: Tensor | None = None,
    strengths: Sequence[float] = STRENGTHS,
    size: int = 128,
) -> Image.Image:
    """A row of pictures per direction, a column per strength. w: [1, L, 512] or [1, 512], by default the average face.

    size: the pictures' side, a power of two; the generator stops there, without the light and colour of finer layers.
    """
    if not directions or not strengths:
        raise WPlusError(f"expected directions and strengths, got {len(directions)} and {len(strengths)}")
    w = generator.mean_w()[None] if w is None else w
    w = w[:, None].expand(-1, generator.config.layers, -1) if w.ndim == 2 else w
    if len(w) != 1:
        raise WPlusError(f"a contact sheet shows one code, got {len(w)}; choose one of the batch")
    w = w.to(generator.style[1].weight)
    pictures: list[Tensor] = []
    for d in directions:
        codes = torch.cat([edit(w, [Edit(d, s)]) for s in strengths])
        pictures += [generator(c[None], max_resolution=size)[0].cpu() for c in codes]
    shown = [p.float().clamp(-1, 1) / 2 + 0.5 for p in pictures]
    return grid(shown, len(strengths), column_labels=[signed(s) for s in strengths],
                row_labels=[d.name for d in directions])  # fmt: skip
