"""Runs a workflow on a running ComfyUI, from photo to pictures, without a browser.

    python -m comfyui_wplus.client WORKFLOW.json --set photo=me.jpg --set seed=3 --out DIR
    python -m comfyui_wplus.client WORKFLOW.json --list

WORKFLOW.json is in the API format (ComfyUI: File > Export (API)). What --set names:

    --set "Portrait.steps=20"   the input `steps` of the node titled Portrait (or its id, or its type: KSampler.steps)
    --set photo=me.jpg          the first input of the node titled photo; files are uploaded where the input takes one
    --set seed=3                the input `seed`, when only one node has it

As a library: `client = Client(url); result = client.run(workflow); client.fetch(result, folder)`.
"""

import argparse
import asyncio
import difflib
import functools
import json
import sys
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import aiohttp
from tqdm import tqdm

Workflow = dict[str, dict[str, Any]]
Progress = Callable[[str, int, int], None]  # node title, steps done, steps in all
SILENCE = 10  # seconds without a message, then the queue is asked whether the prompt is still there


class ComfyError(RuntimeError):
    """What ComfyUI, or the way to it, has against a request; `details` is ComfyUI's own answer."""

    def __init__(self, message: str, details: dict[str, Any] | None = None):
        super().__init__(message)
        self.details = details or {}


@dataclass
class Result:
    """Outputs by node id in ComfyUI's form, {"images": [{filename, subfolder, type}]}; `cached` nodes did not run."""

    prompt_id: str
    outputs: dict[str, dict[str, Any]]
    cached: list[str]

    def files(self) -> list[dict[str, str]]:
        lists = [value for output in self.outputs.values() for value in output.values() if isinstance(value, list)]
        return [item for items in lists for item in items if isinstance(item, dict) and "filename" in item]


class Client:
    """A ComfyUI server by its API; every method raises ComfyError."""

    def __init__(self, url: str = "http://127.0.0.1:8188"):
        self.url = url.rstrip("/")

    def run(self, workflow: Workflow, progress: Progress = lambda title, done, total: None) -> Result:
        """Queues the workflow and waits until it is done; Ctrl-C interrupts it on the server."""
        prompt_id = str(uuid.uuid4())
        return self._do(self._run(workflow, prompt_id, progress), lambda: self.interrupt(prompt_id))

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Takes this prompt off the queue or stops it; without an id, stops whichever runs."""
        self._do(self._cancel(prompt_id))

    def object_info(self, node_type: str = "") -> dict[str, Any]:
        """What ComfyUI says of its nodes' inputs and outputs, by node type; {} for a type it does not know."""
        return json.loads(self._request("GET", f"/object_info/{node_type}".rstrip("/")))

    def upload(self, path: Path) -> str:
        """Puts a file into the server's input folder and returns the name it got there."""
        form = aiohttp.FormData({"type": "input"})
        form.add_field("image", path.read_bytes(), filename=path.name)
        return json.loads(self._request("POST", "/upload/image", data=form))["name"]

    def fetch(self, result: Result, folder: Path) -> list[Path]:
        """Saves every file of the result; previews, which ComfyUI calls temporary, go to folder/temp."""
        paths = []
        for file in result.files():
            name = PurePosixPath("" if file["type"] == "output" else file["type"], file["subfolder"], file["filename"])
            if name.is_absolute() or ".." in name.parts:
                raise ComfyError(f"the server named a file outside of its folders: {name}")
            paths.append(folder / name)
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            query = {key: file[key] for key in ("filename", "subfolder", "type")}
            paths[-1].write_bytes(self._request("GET", "/view", params=query))
        return paths

    def _do(self, work: Coroutine[Any, Any, Any], cancel: Callable[[], None] = lambda: None) -> Any:
        """Runs it in a thread of its own: the caller may live in an event loop already (a notebook, Playwright)."""
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(asyncio.run, work)
            try:
                return running.result()
            except KeyboardInterrupt:
                cancel()
                raise
            except (aiohttp.ClientError, OSError) as error:
                raise ComfyError(f"no answer from a ComfyUI at {self.url}: is it running? ({error})") from error

    def _request(self, method: str, path: str, **options: Any) -> bytes:
        return self._do(self._send(method, path, **options))

    async def _send(self, method: str, path: str, **options: Any) -> bytes:
        async with aiohttp.request(method, self.url + path, **options) as response:
            body = await response.read()
        if response.status >= 400:
            answer = json.loads(body) if response.content_type == "application/json" else {}
            raise ComfyError(f"{path}: {response.status} {response.reason}", answer)
        return body

    async def _run(self, workflow: Workflow, prompt_id: str, progress: Progress) -> Result:
        socket = f"{self.url}/ws?clientId={prompt_id}"  # open before the prompt is queued: no message is missed
        async with aiohttp.ClientSession() as session, session.ws_connect(socket, max_msg_size=0) as messages:
            await self._queue(workflow, prompt_id)
            title = ""
            async for event, data in self._events(messages, prompt_id):
                if event == "executing":
                    title = title_of(workflow, data["node"])
                    progress(title, 0, 1)
                elif event == "progress":
                    progress(title, data["value"], data["max"])
        history = json.loads(await self._send("GET", f"/history/{prompt_id}"))
        if prompt_id not in history:
            raise ComfyError("the prompt was taken off the queue before it ran")
        return finished(workflow, prompt_id, history[prompt_id])

    async def _queue(self, workflow: Workflow, prompt_id: str) -> None:
        body = {"prompt": workflow, "prompt_id": prompt_id, "client_id": prompt_id}
        try:
            answer = json.loads(await self._send("POST", "/prompt", json=body))
        except ComfyError as error:
            raise ComfyError(rejection(workflow, error.details) or str(error), error.details) from None
        if answer.get("node_errors"):  # some outputs are refused, and ComfyUI would run the others without a word
            await self._cancel(prompt_id)
            raise ComfyError(rejection(workflow, answer).strip(), answer)

    async def _cancel(self, prompt_id: str | None) -> None:
        await self._send("POST", "/queue", json={"delete": [prompt_id] if prompt_id else []})
        await self._send("POST", "/interrupt", json={"prompt_id": prompt_id} if prompt_id else {})

    async def _events(self, messages, prompt_id: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """Until `executing` names no node: by then the history is written (at execution_success it is not)."""
        while True:
            try:
                message = await messages.receive(timeout=SILENCE)
            except asyncio.TimeoutError:
                queue = json.loads(await self._send("GET", "/queue"))
                if any(item[1] == prompt_id for items in queue.values() for item in items):
                    continue
                return
            if message.type == aiohttp.WSMsgType.BINARY:  # a picture of the live preview
                continue
            if message.type != aiohttp.WSMsgType.TEXT:
                raise ComfyError(f"{self.url} closed the connection while the workflow ran; see the server's log")
            event = json.loads(message.data)
            if event["data"].get("prompt_id") != prompt_id:
                continue
            if event["type"] == "executing" and event["data"]["node"] is None:
                return
            yield event["type"], event["data"]


def finished(workflow: Workflow, prompt_id: str, entry: dict[str, Any]) -> Result:
    """The history entry of a prompt as a Result, or ComfyUI's error raised."""
    messages = dict(entry["status"]["messages"])
    error = messages.get("execution_error") or messages.get("execution_interrupted")
    if not error:
        return Result(prompt_id, entry["outputs"], messages.get("execution_cached", {}).get("nodes", []))
    what = ": ".join(error[key].strip() for key in ("exception_type", "exception_message") if key in error)
    raise ComfyError(f"{title_of(workflow, error['node_id'])} ({error['node_id']}): {what or 'interrupted'}", error)


def rejection(workflow: Workflow, answer: dict[str, Any]) -> str:
    """ComfyUI's refusal of a prompt, one line an error; what has no node comes in `error` alone."""
    lines = [f"{error['message']} {error['details']}".strip() for error in [answer.get("error")] if error]
    for node_id, node in answer.get("node_errors", {}).items():
        where = f"{title_of(workflow, node_id)} ({node_id})"
        lines += [f"  {where}: {reason['message']}: {reason['details']}" for reason in node["errors"]]
    return "\n".join(lines)


def title_of(workflow: Workflow, node_id: str) -> str:
    """The node's title, else its type; a node made at run time ("5.0.2") goes by the one that made it (5)."""
    node = workflow.get(node_id) or workflow.get(node_id.partition(".")[0]) or {}
    return node.get("_meta", {}).get("title") or node.get("class_type") or f"node {node_id}"


def load(path: Path) -> Workflow:
    """A workflow in the API format."""
    workflow = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(workflow, dict) and isinstance(workflow.get("nodes"), list):
        raise ComfyError(f"{path} is in the editor's format: give its API twin (ComfyUI: File > Export (API))")
    if not isinstance(workflow, dict) or not all(isinstance(n, dict) and "class_type" in n for n in workflow.values()):
        raise ComfyError(f"{path} is not a ComfyUI workflow in the API format")
    return workflow


def widgets(node: dict[str, Any]) -> dict[str, Any]:
    """The inputs with a value of their own; a link is [node id, output]."""
    return {name: value for name, value in node["inputs"].items() if not isinstance(value, list)}


def names(workflow: Workflow) -> Iterator[tuple[int, str, tuple[str, str]]]:
    """All that --set understands: (rank, name, (node id, input)); where a name occurs twice the lower rank has it."""
    for node_id, node in workflow.items():
        for i, name in enumerate(widgets(node)):
            yield 2, name, (node_id, name)
            for rank, owner in ((0, node_id), (0, title_of(workflow, node_id)), (1, node["class_type"])):
                yield rank, f"{owner}.{name}", (node_id, name)
                if i == 0:
                    yield rank, owner, (node_id, name)


def listing(workflow: Workflow) -> str:
    """What can be set, one line each."""
    return "\n".join(
        f"  {title_of(workflow, node_id)}.{name} = {json.dumps(value, ensure_ascii=False):.80}"
        for node_id, node in workflow.items()
        for name, value in widgets(node).items()
    )


def resolve(workflow: Workflow, key: str) -> tuple[str, str]:
    """(node id, input) for a name given to --set."""
    known = [(rank, name.lower(), target) for rank, name, target in names(workflow)]
    rank = min((rank for rank, name, _ in known if name == key.lower()), default=None)
    targets = list(dict.fromkeys(target for r, name, target in known if (r, name) == (rank, key.lower())))
    if len(targets) > 1:
        choices = ", ".join(f"{node_id}.{name} ({title_of(workflow, node_id)})" for node_id, name in targets)
        raise ComfyError(f"{key!r} fits several inputs, say which by its node id: {choices}")
    if not targets:
        near = difflib.get_close_matches(key.lower(), dict.fromkeys(name for _, name, _ in known), n=4)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise ComfyError(f"nothing is called {key!r}. {hint}These can be set:\n{listing(workflow)}")
    return targets[0]


def parse(key: str, old: Any, text: str) -> Any:
    """The text as a value of the same kind as the old one; its range is ComfyUI's to check."""
    if isinstance(old, str):
        return text
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if isinstance(old, bool) != isinstance(value, bool) or not isinstance(value, int | float):
        wanted = "true or false" if isinstance(old, bool) else "a number"
        raise ComfyError(f"{key} takes {wanted} (it is {json.dumps(old)}), got {text!r}")
    return value


def takes_file(client: Client, node_type: str, name: str) -> bool:
    inputs = client.object_info(node_type).get(node_type, {}).get("input", {})
    spec = {**inputs.get("required", {}), **inputs.get("optional", {})}.get(name, [])
    return len(spec) > 1 and any(spec[1].get(f"{kind}_upload") for kind in ("image", "video", "audio", "file"))


def override(client: Client, workflow: Workflow, setting: str) -> None:
    """Puts one NAME=VALUE into the workflow; a value for an input that takes a file is uploaded first."""
    key, _, text = setting.partition("=")
    node_id, name = resolve(workflow, key.strip())
    node = workflow[node_id]
    value = parse(key, node["inputs"][name], text)
    if takes_file(client, node["class_type"], name):
        value = client.upload(Path(value).expanduser())
    node["inputs"][name] = value


def show(bar: tqdm, title: str, done: int, total: int) -> None:
    bar.set_description(title, refresh=False)
    bar.n, bar.total = done, total
    bar.refresh()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workflow", type=Path)
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--out", type=Path, default=Path("output"), metavar="DIR")
    parser.add_argument("--server", default="http://127.0.0.1:8188", metavar="URL")
    parser.add_argument("--list", action="store_true", help="show what can be set, and stop")
    options = parser.parse_args(arguments)
    client = Client(options.server)
    try:
        workflow = load(options.workflow)
        if options.list:
            print(listing(workflow))
            return 0
        for setting in options.settings:
            override(client, workflow, setting)
        with tqdm(leave=False, disable=None) as bar:
            result = client.run(workflow, functools.partial(show, bar))
        for path in client.fetch(result, options.out):
            print(path)
    except (ComfyError, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
