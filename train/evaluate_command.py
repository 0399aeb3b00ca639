"""`train evaluate`: from the files that settings name to the pictures, the numbers and the tables.

    python -m comfyui_wplus.train evaluate wild --run runs/tables --base stable-diffusion-v1-5/ --identities codes/ \\
        --adapters full.safetensors pca.safetensors --directions w_directions/ \\
        --measure.clip clip-vit-large-patch14/ --measure.recogniser w600k_r50.onnx
    python -m comfyui_wplus.train evaluate aligned --run runs/stage1 --base stable-diffusion-v1-5/ \\
        --identities codes/ --adapters stage1.safetensors --directions w_directions/ \\
        --encoder e4e_ffhq_encode.pt --measure.lpips alexnet-owt-7be5be79.pth

The first word is a preset (wild: Tables 1 and 3; aligned: Table 2) or a YAML file of settings. The same command again
goes on where it was stopped. What a measurer needs and was not given is not measured; the report says so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from ..wplus_core.adapter import WPlusAdapter
from ..wplus_core.background import resize
from ..wplus_core.checkpoints import load_adapter, load_encoder, load_generator, load_identity, load_parser
from ..wplus_core.direction_files import load_collection
from ..wplus_core.directions import Direction
from ..wplus_core.errors import FileError, WPlusError
from ..wplus_core.files import sha256
from ..wplus_core.identity import Identity
from ..wplus_core.photos import load_photo
from . import measures
from .attention import cross_attention_channels
from .base import digest, load_text_encoder, load_vae
from .config import PRESETS, load_yaml, save_yaml, to_yaml
from .evaluate import Method, Plan, evaluate, file_name, reference_picture
from .evaluate_report import write_report
from .loop import DTYPES
from .model import load_unet
from .recognisers import load_recogniser
from .sampling import Sampling, decode, sample

log = logging.getLogger(__name__)

CODES = (".safetensors", ".pth", ".pt", ".npy")
PHOTOS = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Measure:
    """Files that measuring needs; what is not given is not measured.

    clip: folder of CLIP-L/14, as transformers saves it. recogniser: an ArcFace of 112 px: .onnx, model_ir_se50.pth, or,
    with trust_torchscript, a TorchScript program. detector: mtcnn is the paper's (pip install --no-deps
    facenet-pytorch). faces_models: folders of dlib's files. parser: parse_multi_iter_90000.pth, for an exact head in
    background_change. lpips: torchvision's alexnet-owt-7be5be79.pth. inception: torch-fidelity's
    weights-inception-2015-12-05-6726825d.pth, with real: folders of photos to compare with, by default the identities'.
    """

    clip: Path | None = None
    recogniser: Path | None = None
    trust_torchscript: bool = False
    detector: Literal["dlib", "mtcnn", "none"] = "dlib"
    faces_models: tuple[Path, ...] = ()
    parser: Path | None = None
    lpips: Path | None = None
    inception: Path | None = None
    real: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """Which pictures are made with which weights, and what is measured of them.

    run: the folder that it writes; the same command resumes it. base: the SD1.x model, a diffusers folder or a
    single-file checkpoint. vae, tokenizer: instead of the base's own. identities: code files, or
    folders of them. adapters: files, each a method under its file's name. scales: lambda; every adapter at each of
    them. references: folder of the identities' aligned photos, NAME.png; by default `crops/` beside the codes, as
    `encode` writes it, else the thumbnail. prompts: what is painted. prompt_file: instead, one a line. pictures: of
    each identity and prompt. edits: directions by name, from files or folders of `directions`, each at all strengths.
    edited_prompts: how many of the prompts the edits get, 0 for all. encoder: an e4e file; its generator paints the
    codes as the method e4e, and it measures how far an edit moved the face. size: side of the pictures in pixels.
    steps, guidance, start, end: of the sampler, the latter two the part of the noise schedule with the adapter.
    """

    run: Path
    base: Path
    identities: tuple[Path, ...]
    adapters: tuple[Path, ...]
    scales: tuple[float, ...] = (1.0,)
    references: Path | None = None
    prompts: tuple[str, ...] = ()
    prompt_file: Path | None = None
    pictures: int = 1
    edits: tuple[str, ...] = ()
    strengths: tuple[float, ...] = ()
    edited_prompts: int = 0
    directions: tuple[Path, ...] = ()
    encoder: Path | None = None
    vae: Path | None = None
    tokenizer: Path | None = None
    size: int = 512
    batch: int = 4
    seed: int = 0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    steps: int = Sampling.steps
    guidance: float = Sampling.guidance
    start: float = Sampling.start
    end: float = Sampling.end
    measure: Measure = field(default_factory=Measure)

    def __post_init__(self):
        if tyro.MISSING_NONPROP in vars(self).values() or tyro.MISSING in vars(self).values():
            return
        if not self.prompts and not self.prompt_file:
            raise WPlusError("nothing to paint: give --prompts or --prompt-file")
        if self.edits and not self.directions:
            raise WPlusError(
                f"--directions must say where {' and '.join(self.edits)} are; a bare --edits makes no edits"
            )


def evaluate_command(args: list[str]) -> int:
    """The command line after `evaluate`: a preset and options; returns the exit status."""
    if not args or args[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if args else 2
    name, *args = args

    def options(settings: Annotated[Evaluation, tyro.conf.arg(name="")] = preset(name), dry_run: bool = False):  # noqa: B008
        """Make the paper's tables for given weights.

        Args:
            dry_run: print the settings and stop.
        """
        return settings, dry_run

    settings, dry_run = tyro.cli(options, prog=f"python -m comfyui_wplus.train evaluate {name}", args=args)
    print(to_yaml(settings), end="", flush=True)
    if not dry_run and evaluate_files(settings) is not None:
        print(settings.run / "evaluation.md")
    return 0


def preset(name: str) -> Evaluation:
    path = PRESETS / "evaluate" / f"{name}.yaml"
    if not path.is_file() and not Path(name).is_file():
        names = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
        raise WPlusError(f"no preset {name!r}: there are {names}, or give a YAML file of settings")
    return load_yaml(path if path.is_file() else name, Evaluation)


def evaluate_files(settings: Evaluation) -> dict[str, Any] | None:
    """Pictures, measures and report of the settings; the measurers' files are looked at before anything is painted."""
    save_yaml(settings, settings.run / "settings.yaml")
    settings = replace(settings, device=own_device(settings.device))
    people = load_people(settings.identities)
    edits = find_edits(settings)
    references = find_references(people, settings.references)
    measurers, sets, missing = build_measurers(settings, edits, references)
    base = Base(settings)
    prompts = read_prompts(settings.prompt_file) if settings.prompt_file else settings.prompts
    plan = Plan(
        settings.run,
        {name: i.w[0] for name, (i, _) in people.items()},
        prompts,
        references,
        edits,
        settings.strengths,
        settings.edited_prompts,
        settings.pictures,
        base.latent,
        settings.batch,
        settings.seed,
        base.made_with(),
    )
    results = evaluate(plan, build_methods(settings, base, plan.layers), measurers, sets)
    if results is not None:
        write_report(results, settings.run, missing)
    return results


def own_device(device: str) -> str:
    """Under `accelerate launch` each process has a GPU of its own."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


class Base:
    """The SD1.x model that every adapter paints with."""

    def __init__(self, settings: Evaluation):
        dtype = DTYPES[settings.precision]
        self.settings, self.device = settings, torch.device(settings.device)
        self.unet = load_unet(settings.base, dtype).requires_grad_(False).eval().to(self.device)
        self.vae = load_vae(settings.vae or settings.base).to(self.device)  # SD1.x's VAE overflows in float16
        self.text = load_text_encoder(settings.base, tokenizer=settings.tokenizer)
        self.embedded: dict[str, Tensor] = {}
        side = settings.size // 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.latent = side, side

    def embed(self, prompt: str) -> Tensor:
        """[77, 768]"""
        if prompt not in self.embedded:
            self.embedded[prompt] = self.text([prompt])[0].to(self.device)
        return self.embedded[prompt]

    def paint(self, adapter: WPlusAdapter, scale: float) -> Any:
        """The `paint` of a method."""
        s = self.settings
        how = Sampling(s.steps, s.guidance, scale, s.start, s.end)

        def paint(w: Tensor, prompts: Iterable[str], noise: Tensor) -> Tensor:
            c = torch.stack([self.embed(p) for p in prompts])
            return decode(self.vae, sample(self.unet, adapter, w, c, self.embed(""), noise, how))

        return paint

    def made_with(self) -> dict[str, Any]:
        names = ("size", "precision", "steps", "guidance", "start", "end")
        base = digest(self.unet, self.vae, self.text.model)
        return {k: getattr(self.settings, k) for k in names} | {"base": base}


def build_methods(settings: Evaluation, base: Base, layers: int) -> list[Method]:
    """Every adapter at every scale, and e4e; FileError for one that is not for this base or codes of so many layers."""
    methods, channels = [], cross_attention_channels(base.unet)
    for name, path in unique_names(settings.adapters).items():
        adapter = load_adapter(path).float().to(base.device)
        if adapter.config.channels != channels:
            problem = f"is for layers of {adapter.config.channels}, the base has {channels}"
            raise FileError(path, problem, "Choose the adapter's own --base")
        check_layers(path, adapter.config.w_layers, layers)
        made_with = {"adapter": sha256(path)}
        methods += [Method(name, base.paint(adapter, scale), scale, made_with) for scale in settings.scales]
    return methods + ([e4e(settings, layers)] if settings.encoder else [])


def check_layers(path: Path, own: int, given: int):
    if own != given:
        raise FileError(path, f"reads codes of {own} layers, --identities have {given}", "Use its own encoder's codes")


def e4e(settings: Evaluation, layers: int) -> Method:
    """The encoder's own generator: what Table 2 compares stage I with."""
    generator = load_generator(settings.encoder).float().eval().to(settings.device)
    check_layers(settings.encoder, generator.config.layers, layers)

    @torch.no_grad()
    def paint(w: Tensor, prompts: Iterable[str], noise: Tensor) -> Tensor:
        return resize((generator(w.to(settings.device)) / 2 + 0.5).clamp(0, 1), settings.size)

    return Method("e4e", paint, made_with={"encoder": sha256(settings.encoder)})


def build_measurers(
    settings: Evaluation, edits: Mapping[str, Direction], references: Mapping[str, Path | Tensor]
) -> tuple[list[measures.Measurer], list[measures.SetMeasurer], list[str]]:
    """The measurers whose files are given, and what the others would need."""
    given, device = settings.measure, settings.device
    measurers: list[measures.Measurer] = []
    missing = []
    parser = load_parser(given.parser).to(device) if given.parser else None
    detector = build_detector(given, device)
    if given.clip:
        measurers.append(measures.ClipScore(given.clip, device))
    else:
        missing.append("clip: --measure.clip, a folder of CLIP-L/14 (openai/clip-vit-large-patch14)")
    if detector:
        measurers += [measures.Detection(detector), measures.BackgroundChange(detector, parser)]
    else:
        missing.append("detection, id, background_change, moved: --measure.detector dlib or mtcnn")
    if given.recogniser and detector:
        recogniser = load_recogniser(given.recogniser, given.trust_torchscript, device)
        gallery = ((name, reference_picture(name, photo)) for name, photo in references.items())
        measurers.append(measures.IdentityDistance(recogniser, detector, gallery))
    else:
        missing.append("id, id_kept: --measure.recogniser, an ArcFace (.onnx or model_ir_se50.pth), and a detector")
    if settings.encoder and detector:
        encoder = load_encoder(settings.encoder).float().eval().to(device)
        measurers.append(measures.Moved(encoder, dict(edits), detector, parser))
    else:
        missing.append("moved: --encoder, the e4e file that made the codes, and a detector")
    if given.lpips:
        measurers.append(measures.Lpips(given.lpips, device))
    else:
        missing.append("lpips: --measure.lpips, torchvision's alexnet-owt-7be5be79.pth")
    sets: list[measures.SetMeasurer] = []
    if given.inception:
        real = find_files(given.real, PHOTOS, "photos") if given.real else list(references.values())
        sets.append(measures.Fid(given.inception, pixels_of(real), device))
    else:
        missing.append("fid: --measure.inception, torch-fidelity's weights-inception-2015-12-05-6726825d.pth")
    if not references and (given.recogniser or given.lpips):
        raise WPlusError("no photo of any identity was found to compare with; give --references FOLDER with NAME.png")
    return measurers, sets, missing


def build_detector(given: Measure, device: str) -> measures.Detector | None:
    if given.detector == "none":
        return None
    mtcnn = given.detector == "mtcnn"
    return measures.Remembered(measures.MtcnnFaces(device) if mtcnn else measures.DlibFaces(given.faces_models))


def pixels_of(photos: Iterable[Path | Tensor]) -> Iterator[Tensor]:
    for photo in photos:
        yield (photo if isinstance(photo, Tensor) else load_photo(photo).pixels)[None]


def load_people(places: Iterable[Path]) -> dict[str, tuple[Identity, Path]]:
    """Identities of one code each, with their files, by name; a file of several codes gives several."""
    people = {}
    for name, path in unique_names(find_files(places, CODES, "codes")).items():
        identity = load_identity(path)
        for n, w in enumerate(identity.w):
            one = Identity(w, identity.name, identity.provenance, identity.thumbnail)
            people[name if len(identity) == 1 else f"{name}-{n}"] = one, path
    return people


def find_references(people: Mapping[str, tuple[Identity, Path]], folder: Path | None) -> dict[str, Path | Tensor]:
    """The identities' photos: of the folder, of `crops/` beside the codes, or their thumbnails."""
    found: dict[str, Path | Tensor] = {}
    for name, (identity, path) in people.items():
        where = folder or path.parent / "crops"
        files = [p for p in (where / f"{path.stem}{s}" for s in PHOTOS) if p.is_file()]
        if files:
            found[name] = files[0]
        elif folder:
            raise FileError(folder, f"no photo of {name} in it", f"It must be named {path.stem}.png (or .jpg, .webp)")
        elif identity.thumbnail is not None:
            found[name] = identity.thumbnail.permute(2, 0, 1).float() / 255
    return found


def find_edits(settings: Evaluation) -> dict[str, Direction]:
    if not settings.edits:
        return {}
    collection = load_collection(*settings.directions)
    return {name: collection.find(name) for name in settings.edits}


def find_files(places: Iterable[Path], suffixes: tuple[str, ...], what: str) -> list[Path]:
    """Files as they are, folders as the files in them with these endings, in order."""
    paths: list[Path] = []
    for place in places:
        inside = sorted(p for p in place.iterdir() if p.suffix.lower() in suffixes) if place.is_dir() else [place]
        if not inside or not place.exists():
            raise FileError(place, f"no {what} here", f"Give files or a folder of {', '.join(suffixes)}")
        paths += inside
    return paths


def unique_names(paths: Iterable[Path]) -> dict[str, Path]:
    """By the files' names without their ending, which name folders of pictures and must differ."""
    named: dict[str, Path] = {}
    for path in paths:
        name = file_name(path.stem)
        if name in named:
            raise WPlusError(f"{named[name]} and {path} would have the same name in the tables; rename one")
        named[name] = path
    return named


def read_prompts(path: Path) -> list[str]:
    if not path.is_file():
        raise FileError(path, "there is no such file", "--prompt-file takes a text file of one prompt a line")
    prompts = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    return list(dict.fromkeys(p for p in prompts if p))
