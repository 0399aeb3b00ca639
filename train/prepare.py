"""Prepare data sets: photos or StyleGAN2 samples to codes, latents, face masks and text embeddings.

    prepare aligned PHOTOS... DST --base SD15 --encoder e4e_ffhq_encode.pt --parser parse_multi_iter_90000.pth
    prepare aligned FFHQ DST --already-aligned --base SD15 --encoder E4E --parser PARSER
    prepare wild PHOTOS... DST --base SD15 --encoder E4E --parser PARSER --captions blip2-opt-2.7b/
    prepare wild PHOTOS... DST --base SD15 --encoder E4E --captions captions.csv --variants 8 --scale 1.0 1.6
    prepare wild PHOTOS... DST --base SD15 --encoder E4E --online-vae
    prepare synthetic e4e_ffhq_encode.pt DST --base SD15 --count 70000 --truncation 0.7
    prepare --check DST...

each after `python -m comfyui_wplus.train`; `prepare wild --help` lists the options. PHOTOS are picture files, or
folders with all their subfolders. SD15 is a diffusers folder or a single-file checkpoint (which needs --tokenizer too).

aligned makes stage I's data: FFHQ crops with the paper's neutral prompts. wild makes stage II's: pictures with
captions, --variants of each drawn at random, or with --online-vae drawn and encoded anew whenever one is trained on, as
in the paper. synthetic makes StyleGAN2 samples with their codes. Codes of photos are made without background.

Killed, the same command goes on, and ends with the same files. Under `accelerate launch` (or with RANK and WORLD_SIZE
set) each process does its part, and the last one to end completes the data set. Pictures that cannot be used are in
DST/quarantine.jsonl with the reason; DST/contact_sheet.png shows what the trainer will see.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import getdoc
from itertools import islice
from typing import Any

import torch
import tyro
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..wplus_core.encode import DTYPES
from ..wplus_core.files import write_whole
from .check import check, sheet
from .data import Prepared, Writer, read_about
from .makers import AlignedMaker, Maker, SyntheticMaker, WildMaker
from .recipes import Aligned, Settings, Synthetic, Wild
from .sources import Bad, Photos
from .views import Views

KINDS = {"aligned": (Aligned, AlignedMaker), "wild": (Wild, WildMaker), "synthetic": (Synthetic, SyntheticMaker)}
NOT_FINITE = "not finite: fp16 overflows; prepare into another folder with --precision fp32 or bf16"
REASONS = 8  # kinds of reasons that the summary lists


def prepare(kind: str, s: Settings) -> Prepared | None:
    """Do this process's part of a data set; returns it if that completes it."""
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    source = open_source(s)
    maker = KINDS[kind][1](s, device_of(s), DTYPES[s.precision])
    writer = open_writer(kind, s, source, maker)
    parts = [range(n, min(n + s.shard, len(source))) for n in range(0, len(source), s.shard)]
    mine = [p for p in range(rank, len(parts), ranks) if not writer.has(p)]
    pictures = read(source, [n for p in mine for n in parts[p]], s)
    with tqdm(total=sum(len(parts[p]) for p in mine), unit="picture", desc=f"{kind} {rank + 1}/{ranks}") as progress:
        for p in mine:
            write_part(writer, p, ticking(islice(pictures, len(parts[p])), progress), maker, s.batch)
    missing = sum(not writer.has(p) for p in range(len(parts)))
    if missing:
        print(f"{writer.folder}: {missing} of {len(parts)} shards are still to be done, by other processes")
        return None
    for half_written in writer.folder.glob(".shard-*.part" if ranks > 1 else ".*.part"):
        half_written.unlink(missing_ok=True)
    return complete(writer, len(parts), maker)


def open_source(s: Settings) -> Photos | range:
    """What samples are made of, by number. Whatever is missing for finding faces is said here, once."""
    if isinstance(s, Synthetic):
        return range(s.count)
    photos = Photos(s)
    if not (isinstance(s, Aligned) and s.already_aligned):
        photos.find  # noqa: B018
    return photos


def read(source: Photos | range, numbers: list[int], s: Settings) -> Iterator[Any]:
    """The source's items of those numbers in their order, by worker processes where there is work."""
    workers = min(s.workers, len(numbers)) if isinstance(source, Photos) else 0
    fresh = "spawn" if workers else None  # dlib's threads do not live on in a forked process: it would wait for them
    options = {"num_workers": workers, "multiprocessing_context": fresh, "collate_fn": as_it_is}
    return iter(DataLoader(source, None, sampler=numbers, **options))


def as_it_is(item: Any) -> Any:
    return item


def device_of(s: Settings) -> torch.device:
    cuda = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return torch.device(s.device or (cuda if torch.cuda.is_available() else "cpu"))


def open_writer(kind: str, s: Settings, source: Photos | range, maker: Maker) -> Writer:
    names = "\n".join(name for _, name in source.files) if isinstance(source, Photos) else ""
    fixed = {"kind": kind, **s.fixed(), "pictures": len(source), "names": hashlib.sha256(names.encode()).hexdigest()}
    online = isinstance(s, Wild) and s.online_vae
    reduction = 2 ** (len(maker.vae.config.block_out_channels) - 1)
    return Writer(
        s.files[-1],
        dict(zip(maker.prompts, maker.text(maker.prompts).half().cpu(), strict=True)),
        s.shard,
        fixed | {"made_with": maker.made_with()},
        scaling_factor=maker.vae.config.scaling_factor,
        latent_size=(s.size // reduction,) * 2,
        views=fixed["views"] if online else None,
    )


def ticking(items: Iterable[Any], progress: tqdm) -> Iterator[Any]:
    for item in items:
        progress.update()
        yield item


def write_part(writer: Writer, number: int, items: Iterator[Any], maker: Maker, batch: int):
    """Make one shard. Its batches do not reach over its ends, so it is the same whoever makes it, and when."""
    made, bad, waiting = [], [], []
    for item in items:
        (bad if isinstance(item, Bad) else waiting).append(item)
        if len(waiting) == batch:
            made += maker(waiting)
            waiting = []
    made += maker(waiting) if waiting else []
    bad += [Bad(about["name"], NOT_FINITE) for x, about in made if not finite(x)]
    made = [(x, about) for x, about in made if finite(x)]
    writer.write(number, [x for x, _ in made], [about for _, about in made], [vars(b) for b in bad])


def finite(sample: Mapping[str, Tensor]) -> bool:
    return all(bool(x.isfinite().all()) for x in sample.values() if x.is_floating_point())


def complete(writer: Writer, shards: int, maker: Maker) -> Prepared:
    """The index, and for people: what was left out, a summary, and a contact sheet."""
    abouts = [read_about(writer.path(n)) for n in range(shards)]
    bad = [line for about in abouts for line in about["bad"]]
    lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in bad)
    write_whole(writer.folder / "quarantine.jsonl", lambda p: p.write_text(lines, encoding="utf-8"))
    writer.finish(shards)
    data = Prepared(writer.folder)
    sheet(data, maker.vae).save(writer.folder / "contact_sheet.png")
    size = sum(p.stat().st_size for p in writer.folder.glob("*.safetensors"))
    print(f"{writer.folder}: {len(data)} samples in {len(data.index.shards)} shards, {size / 1e6:.1f} MB")
    print(summary_of(bad), end="")
    return data


def summary_of(bad: Sequence[dict[str, str]]) -> str:
    """How many pictures were left out for which kinds of reasons."""
    if not bad:
        return ""
    kinds = Counter(line["reason"].split(":")[0].split("(")[0].split(" in ")[0].strip() for line in bad)
    lines = [f"  {n} x {reason}\n" for reason, n in kinds.most_common(REASONS)]
    return f"{len(bad)} pictures left out (quarantine.jsonl says which and why):\n" + "".join(lines)


def command(args: list[str]) -> int:
    """`prepare` on the command line; the exit status."""
    if args[:1] == ["--check"]:
        return max([check(folder) for folder in args[1:]], default=2)
    if not args or args[0] not in KINDS:
        print(__doc__)
        return 0 if args and args[0] in ("-h", "--help") else 2
    kind, settings = args[0], KINDS[args[0]][0]
    prog = f"python -m comfyui_wplus.train prepare {kind}"
    prepare(kind, tyro.cli(settings, prog=prog, description=help_of(settings), args=args[1:]))
    return 0


def help_of(settings: type[Settings]) -> str:
    """What the options mean, those of all kinds last."""
    inherited = [c for c in settings.__mro__ if issubclass(c, Settings)]
    return "\n\n".join(getdoc(c) for c in (*inherited, *([Views] if settings is Wild else [])))
