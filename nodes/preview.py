"""Live previews for the panel of W+ Edit Stack: two HTTP routes, and the one thread that paints for them.

    GET  /wplus/directions   the directions, in the order in which a bare name is looked up, and the generator files
    POST /wplus/preview      {"client", "edits", "size", "generator", "identity" or "identity_name", "keep_plausible"}
                             -> a JPEG; errors are {"error": message}

A preview never waits for a running prompt and takes nothing from it but some of its CPU time: it stays off the GPU and
out of ComfyUI's memory management, which serves the prompt's thread alone. The painter takes about 150 MB and is let go
when nobody has looked for a minute.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import json
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import safetensors.torch
import torch
from aiohttp import web
from PIL import Image
from safetensors import SafetensorError
from server import PromptServer
from torch import Tensor

from ..wplus_core.checkpoints import load_average, load_generator, load_identity
from ..wplus_core.direction_files import by_group, parse_edits
from ..wplus_core.directions import MAX_LAYERS, edit, format_layers
from ..wplus_core.errors import WPlusError
from ..wplus_core.identity import Identity
from ..wplus_core.painter import Painter, Stopped
from . import folders
from .edit import NO_SPREAD

SIZES = (128, 256)
MAX_BODY = 1 << 18  # a code of 24 layers is 33 kB in base64
MAX_TEXT = 10_000
MAX_CLIENTS = 16
IDLE_SECONDS = 60.0
NICENESS = 5  # beside a prompt on the CPU, three quarters of the cores are the prompt's

T = TypeVar("T")
Unwanted = Callable[[], bool]


class Refused(Exception):
    def __init__(self, status: int, message: str):
        self.status, self.message = status, message
        super().__init__(message)


@dataclass(frozen=True)
class Wish:
    """What the panel asks for. identity: safetensors with w [1, L, 512]; without it and a name, the average face."""

    client: str
    edits: str
    size: int
    generator: str
    identity: bytes | None
    identity_name: str | None
    keep_plausible: bool

    @classmethod
    def read(cls, body: bytes) -> Wish:
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError) as e:
            raise Refused(400, f"the body is no JSON ({e})") from e
        if not isinstance(fields, dict):
            raise Refused(400, "expected a JSON object")
        size = field(fields, "size", int, SIZES[0])
        if size not in SIZES:
            raise Refused(400, f"size must be one of {list(SIZES)}, got {size}")
        identity = field(fields, "identity", str, None)
        return cls(
            client=field(fields, "client", str, "")[:100],
            edits=field(fields, "edits", str, ""),
            size=size,
            generator=field(fields, "generator", str, ""),
            identity=None if identity is None else decoded(identity),
            identity_name=field(fields, "identity_name", str, None),
            keep_plausible=field(fields, "keep_plausible", bool, False),
        )


def field(fields: dict[str, Any], name: str, kind: type, default: Any) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not kind or (name == "edits" and len(value) > MAX_TEXT):
        what = {str: f"a text of at most {MAX_TEXT} letters", int: "a whole number", bool: "true or false"}[kind]
        raise Refused(400, f"{name} must be {what}")
    return value


def decoded(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as e:
        raise Refused(400, f"identity is no base64 ({e})") from e


class LatestWins:
    """Runs jobs in one thread, one at a time. A client's newer job makes its older one unwanted, waiting or running:
    the older one's run raises Stopped at once."""

    def __init__(self):
        self.thread = ThreadPoolExecutor(1, "wplus-preview", initializer=be_nice)
        self.wanted: dict[str, asyncio.Future] = {}

    async def run(self, client: str, job: Callable[[Unwanted], T]) -> T:
        if older := self.wanted.pop(client, None):
            older.cancel()
        if len(self.wanted) >= MAX_CLIENTS:
            raise Refused(503, "too many previews are waiting, try again")
        unwanted = threading.Event()  # for the job that runs; one that waits never begins
        mine = asyncio.get_running_loop().run_in_executor(self.thread, job, unwanted.is_set)
        self.wanted[client] = mine
        try:
            return await mine
        except asyncio.CancelledError:
            if self.wanted.get(client) is mine:  # the client has gone
                raise
            raise Stopped from None
        finally:
            unwanted.set()
            if self.wanted.get(client) is mine:
                del self.wanted[client]


def be_nice():
    """Lowers the priority of this thread and those it starts; only Linux counts threads for itself."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


class Previews:
    """The painter at hand, made from a generator file when one is asked for. Everything here runs in one thread."""

    def __init__(self):
        self.painter: Painter | None = None
        self.average: Tensor | None = None  # [L, 512]
        self.loaded = ""  # the fingerprint of the painter's file

    def forget(self):
        self.painter = self.average = None
        self.loaded = ""

    def load(self, name: str):
        """A painter of this generator file, or of the first there is."""
        known = folders.generator_files()
        if not known:
            raise Refused(404, "no file in models/wplus holds a generator; e4e_ffhq_encode.pt does")
        if name and name not in known:
            raise Refused(404, f"no generator file {name!r}; there are {', '.join(known)}")
        path = folders.generator_path(name or known[0])
        if self.loaded == (state := folders.fingerprint(path)):
            return
        self.forget()
        generator = load_generator(path)
        average = load_average(path)
        average = generator.float().mean_w() if average is None else average.float()
        self.painter = Painter(generator, SIZES[-1])
        self.average = average.expand(generator.config.layers, -1).clone()
        self.loaded = state

    def code(self, wish: Wish) -> Tensor:
        """The unedited code [1, L, 512]."""
        if wish.identity is not None:
            return identity_of(wish.identity).w
        if wish.identity_name is None:
            return self.average[None]
        if (path := folders.identity_file(wish.identity_name)) is None:
            raise Refused(404, f"no identity file {wish.identity_name!r}")
        return load_identity(path).w[:1]

    def picture(self, wish: Wish, unwanted: Unwanted) -> tuple[bytes, float]:
        """A JPEG, and the share of the edits that was kept as plausible."""
        if unwanted():
            raise Stopped
        self.load(wish.generator)
        before, known, kept = self.code(wish), folders.directions(), 1.0
        after = edit(before, parse_edits(wish.edits, known))
        if wish.keep_plausible:
            if known.spread is None:
                raise WPlusError(NO_SPREAD)
            after, share = known.spread.hold(before, after)
            kept = share.item()
        if not after.isfinite().all():
            raise Refused(400, "the edits are too strong for any number")
        return jpeg(self.painter.paint(after[0], wish.size, unwanted)), kept


def identity_of(data: bytes) -> Identity:
    """The identity in the bytes that a node sent: w [1, L, 512] and perhaps average [L, 512]."""
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as e:
        raise Refused(400, f"identity is no safetensors file ({e})") from e
    w = tensors.get("w")
    if w is None or w.ndim != 3 or len(w) != 1 or w.shape[1] > MAX_LAYERS:
        shapes = {k: list(x.shape) for k, x in tensors.items()}
        raise Refused(400, f"identity must hold w [1, L, 512] with L of at most {MAX_LAYERS}, got {shapes}")
    return Identity(w)


def jpeg(rgb: Tensor) -> bytes:
    """A picture [3, H, W] in [-1, 1]."""
    pixels = (rgb.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8).movedim(0, -1)
    out = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(out, "JPEG", quality=92)
    return out.getvalue()


def catalogue() -> dict[str, Any]:
    known = folders.directions()
    entries = []
    for full in sorted(known.directions, key=by_group):
        d, (group, _, label) = known.directions[full], full.rpartition("/")
        entry = {"name": full, "group": group, "label": label, "usual": d.usual, "unit": d.unit, "source": d.source}
        entries.append(entry | {"layers": format_layers(d.layers)})
    return {"directions": entries, "plausible": known.spread is not None, "generators": folders.generator_files()}


def same_origin(request: web.Request) -> bool:
    """Not sent by a page of another site. Programs send neither header; browsers leave the first out on plain HTTP."""
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site is not None:
        return site in ("same-origin", "none")
    return origin is None or urlsplit(origin).netloc == request.host


async def body_of(request: web.Request) -> bytes:
    if request.content_type != "application/json":
        raise Refused(415, "expected the content type application/json")
    body = b""
    async for chunk in request.content.iter_any():
        body += chunk
        if len(body) > MAX_BODY:
            raise Refused(413, f"the body must be at most {MAX_BODY} bytes")
    return body


def answering(handler: Callable[[web.Request], Awaitable[web.Response]]):
    """Turns what a person or page did wrong into {"error": message}."""

    async def answer(request: web.Request) -> web.Response:
        try:
            if not same_origin(request):
                raise Refused(403, "previews are for pages of this server")
            return await handler(request)
        except Refused as e:
            return web.json_response({"error": e.message}, status=e.status)
        except Stopped:
            return web.json_response({"error": "a newer request took its place"}, status=409)
        except WPlusError as e:
            return web.json_response({"error": str(e)}, status=400)

    return answer


def add_routes():
    """Called once, before the server starts."""
    queue, previews = LatestWins(), Previews()
    release: list[asyncio.TimerHandle] = []

    def release_later():
        while release:
            release.pop().cancel()
        release.append(asyncio.get_running_loop().call_later(IDLE_SECONDS, queue.thread.submit, previews.forget))

    @answering
    async def get_directions(request: web.Request) -> web.Response:
        return web.json_response(await asyncio.get_running_loop().run_in_executor(None, catalogue))

    @answering
    async def post_preview(request: web.Request) -> web.Response:
        wish = Wish.read(await body_of(request))
        try:
            picture, kept = await queue.run(wish.client, lambda unwanted: previews.picture(wish, unwanted))
        finally:
            release_later()
        headers = {"Cache-Control": "no-store", "X-WPlus-Kept": f"{kept:.4f}"}
        return web.Response(body=picture, content_type="image/jpeg", headers=headers)

    routes = PromptServer.instance.routes
    routes.get("/wplus/directions")(get_directions)
    routes.post("/wplus/preview")(post_preview)
