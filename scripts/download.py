"""Fetches the real weights into models/, after showing where they come from, how large they are and their licences.

    scripts/demo --download                    what the demo needs, and the editing directions
    scripts/demo --download wplus_adapter.bin  only these
    scripts/demo --download directions         only the editing directions
    scripts/demo --download --yes              without asking
    scripts/demo --download --from URL         from a mirror that has them all, as URL/NAME

A download that broke off goes on where it stopped (NAME.part). Files that are there stay as they are.
"""

import argparse
import re
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from comfyui_wplus.wplus_core.files import sha256
from tqdm import tqdm

ADAPTER = "https://github.com/csxmli2016/w-plus-adapter/releases/download/v1"
PARSER = "https://github.com/chaofengc/PSFRGAN/releases/download/v0.1.0"
SD15 = "https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main"
W_DIRECTION = (
    "https://raw.githubusercontent.com/csxmli2016/w-plus-adapter/a0cc9a99981e17c9470786d37f3f3b7bf68ecb99/w_direction"
)
S_LAB = "NTU S-Lab License 1.0: non-commercial use only"
DIRECTIONS = "wplus/directions"
BLOCK = 1 << 20


@dataclass(frozen=True)
class Weights:
    address: str
    folder: str
    licence: str
    needed: bool = True

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]

    @property
    def called(self) -> str:
        """What it is listed as, and asked for by: the many small files of the directions go together."""
        return "directions" if self.folder.startswith(DIRECTIONS) else self.name

    @property
    def sha256_start(self) -> str:
        """Some names carry the first eight digits of the file's hash."""
        found = re.search(r"-([0-9a-f]{8})\.\w+$", self.name)
        return found[1] if found else ""


WEIGHTS = [
    Weights(f"{ADAPTER}/wplus_adapter.bin", "wplus", S_LAB),
    Weights(f"{ADAPTER}/wplus_adapter_stage1.bin", "wplus", S_LAB, needed=False),
    Weights(f"{ADAPTER}/e4e_ffhq_encode.pt", "wplus", f"{S_LAB}; trained on FFHQ (CC BY-NC-SA 4.0)"),
    Weights(f"{PARSER}/parse_multi_iter_90000.pth", "wplus", "CC BY-NC-SA 4.0: non-commercial use only"),
    Weights(
        f"{ADAPTER}/shape_predictor_68_face_landmarks-fbdc2cb8.dat",
        "wplus",
        "trained on iBUG 300-W: non-commercial use only",
    ),
    Weights(f"{ADAPTER}/mmod_human_face_detector.dat", "wplus", "of dlib's models; in a non-commercial release here"),
    Weights(f"{SD15}/v1-5-pruned-emaonly-fp16.safetensors", "checkpoints", "CreativeML Open RAIL-M"),
]
DIRECTION_FILES = {  # by our folder and theirs
    ("interfacegan", "interfacegan_directions"): "age.pt smile.pt",
    ("latent_directions", "latent_directions"): "age.npy angle_horizontal.npy angle_pitch.npy beauty.npy "
    "emotion_angry.npy emotion_disgust.npy emotion_easy.npy emotion_fear.npy emotion_happy.npy emotion_sad.npy "
    "emotion_surprise.npy eyes_open.npy face_shape.npy gender.npy glasses.npy height.npy race_black.npy race_white.npy "
    "race_yellow.npy smile.npy width.npy",
    ("ganspace", "gan_space"): "ffhq_pca.pt ganspace_configs.csv",
}
WEIGHTS += [
    Weights(f"{W_DIRECTION}/{theirs}/{name}", f"{DIRECTIONS}/{ours}", S_LAB)
    for (ours, theirs), names in DIRECTION_FILES.items()
    for name in names.split()
]
NAMES = list(dict.fromkeys(w.called for w in WEIGHTS))


def request(address: str, method: str = "GET", start: int = 0):
    headers = {"User-Agent": "ComfyUI-WPlus"} | ({"Range": f"bytes={start}-"} if start else {})
    return urllib.request.urlopen(urllib.request.Request(address, headers=headers, method=method), timeout=60)


def size_of(address: str) -> int | None:
    """In bytes, as the server says; None if it does not."""
    try:
        with request(address, "HEAD") as answer:
            return int(answer.headers["Content-Length"]) if answer.headers["Content-Length"] else None
    except urllib.error.URLError:
        return None


def fetch(weights: Weights, address: str, target: Path, size: int | None) -> None:
    """Into target, by way of target.part; raises ValueError for a file that is not what it should be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    start = part.stat().st_size if part.exists() else 0
    if not start or start != size:
        receive(address, part, start if size is None or start < size else 0)
    if size is not None and part.stat().st_size != size:
        raise ValueError(f"{target.name} broke off at {part.stat().st_size} of {size} bytes; run this again to go on")
    if not sha256(part).startswith(weights.sha256_start):
        part.unlink()
        raise ValueError(f"{target.name} is damaged: its sha256 does not start with {weights.sha256_start}; run again")
    part.replace(target)


def receive(address: str, part: Path, start: int) -> None:
    with request(address, start=start) as answer:
        resumed = answer.status == 206  # 200: the server sends it all again
        left = int(answer.headers["Content-Length"] or 0)
        done = start if resumed else 0
        with (
            part.open("ab" if resumed else "wb") as file,
            tqdm(
                total=done + left or None, initial=done, unit="B", unit_scale=True, desc=part.stem, disable=None
            ) as bar,
        ):
            while block := answer.read(BLOCK):
                file.write(block)
                bar.update(len(block))


def megabytes(sizes: list[int | None]) -> str:
    known = [size for size in sizes if size is not None]
    return f"{sum(known) / 1e6:,.1f} MB" if len(known) == len(sizes) else "size unknown"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--from", dest="mirror", metavar="URL")
    parser.add_argument("--yes", action="store_true")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(NAMES):
        parser.error(f"unknown: {', '.join(unknown)}; choose from {', '.join(NAMES)}")
    return args


def show(files: list[Weights], addresses: dict[Weights, str], sizes: dict[Weights, int | None]) -> None:
    """One of `NAMES`: where its files come from, how large those are that are missing, and their licence."""
    missing = [w for w in files if w in sizes]
    many = "" if len(missing) < 2 else f"{len(missing)} files, such as "
    print(f"{files[0].called}: {many + addresses[missing[0]] if missing else 'is there already'}")
    if missing:
        print(f"    {megabytes([sizes[w] for w in missing])}")
    print(f"    {files[0].licence}")


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    wanted = [w for w in WEIGHTS if (w.called in args.names if args.names else w.needed)]
    missing = [w for w in wanted if not (args.models / w.folder / w.name).exists()]
    addresses = {w: f"{args.mirror.rstrip('/')}/{w.name}" if args.mirror else w.address for w in missing}
    sizes = {w: size_of(addresses[w]) for w in missing}
    for name in NAMES:
        if files := [w for w in wanted if w.called == name]:
            show(files, addresses, sizes)
    if not missing:
        return 0
    if not args.yes and input(f"Download {len(missing)} files into {args.models}? [y/N] ").strip().lower() != "y":
        return 1
    for w in missing:
        try:
            fetch(w, addresses[w], args.models / w.folder / w.name, sizes[w])
        except (ValueError, OSError) as error:
            print(f"error: {w.name}: {error}", file=sys.stderr)
            return 1
        print(f"{args.models / w.folder / w.name}: done")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, EOFError):
        sys.exit(130)
