"""ComfyUI's own frontend in headless Chromium: what a user who opens a workflow gets.

    with chromium() as browser, Frontend(browser, server.url) as frontend:
        frontend.load(ui_workflow)
        frontend.prompt()  # its API form
        frontend.screenshot(path)
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright

OFFLINE = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
).split()


@contextmanager
def chromium() -> Iterator[Browser]:
    """Debian's chromium: Playwright's own would have to be downloaded."""
    path = os.environ.get("CHROMIUM_PATH") or shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        raise FileNotFoundError("no chromium on the PATH: apt-get install chromium, or set CHROMIUM_PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=OFFLINE)
        yield browser
        browser.close()


class Frontend:
    """One page of the editor; `errors` collects what the page throws."""

    def __init__(self, browser: Browser, url: str, size: tuple[int, int] = (1600, 900)):
        self.page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(url)
        self.page.wait_for_function("window.app?.graph?.nodes.length > 0")  # its first workflow is open

    def __enter__(self) -> "Frontend":
        return self

    def __exit__(self, *exception) -> None:
        self.page.close()

    def load(self, workflow: dict[str, Any]) -> None:
        """Opens a UI-format workflow as dropping its file on the canvas does, and fits it to the window."""
        self.page.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")

    def clear(self) -> None:
        """An empty graph, seen as in a new window."""
        self.page.evaluate("() => app.loadGraphData({ nodes: [], links: [], version: 0.4 })")
        self.page.evaluate("() => app.canvas.ds.reset()")

    def load_api(self, prompt: dict[str, dict[str, Any]], name: str = "workflow") -> None:
        """Lays out an API-format workflow; serialize() then gives its UI form."""
        self.page.evaluate("([prompt, name]) => app.loadApiJson(prompt, name)", [prompt, name])

    def prompt(self) -> dict[str, dict[str, Any]]:
        """The API form of the graph on the canvas; a node unknown to the frontend is an error."""
        prompt = self.page.evaluate("async () => (await app.graphToPrompt()).output")
        unknown = [node_id for node_id, node in prompt.items() if not node.get("class_type")]
        assert not unknown, f"nodes of a type the frontend does not know: {unknown}"
        return prompt

    def serialize(self) -> dict[str, Any]:
        """The UI form of the graph on the canvas."""
        return json.loads(self.page.evaluate("() => JSON.stringify(app.graph.serialize())"))

    def screenshot(self, path: Path) -> Path:
        self.page.wait_for_timeout(500)  # the view animates to its place
        self.page.screenshot(path=path)
        return path
