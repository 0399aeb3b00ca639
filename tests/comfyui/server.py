"""A real headless ComfyUI of one version, run as a subprocess from its own environment (scripts/comfy-env).

    with Server("newest", base_dir) as server:
        Client(server.url).run(workflow)

This repository is linked into the server's custom_nodes; models, input, output and user files live under base_dir.
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
NO_CHECKOUT = 3  # exit code of scripts/comfy-env
# Opened for the first time, the frontend covers its canvas with a template browser; this says it has been seen.
USER_SETTINGS = {"Comfy.TutorialCompleted": True}


class NoCheckout(RuntimeError):
    """There is no ComfyUI of this version here and none could be cloned."""


def environment(version: str) -> tuple[Path, Path]:
    """(checkout, python) of ComfyUI "newest" or "floor", made ready by scripts/comfy-env."""
    script = subprocess.run([REPOSITORY / "scripts/comfy-env", version], capture_output=True, text=True)
    if script.returncode == NO_CHECKOUT:
        raise NoCheckout(script.stderr.strip().splitlines()[-1])
    if script.returncode:
        raise RuntimeError(f"scripts/comfy-env {version} failed:\n{script.stderr}")
    checkout, python = script.stdout.splitlines()
    return Path(checkout), Path(python)


class Server:
    """Starts on entering, stops on leaving; `extra` are more command line flags, `device` is empty for a GPU."""

    def __init__(self, version: str, base: Path, extra: tuple[str, ...] = (), device: tuple[str, ...] = ("--cpu",)):
        self.checkout, self.python = environment(version)
        self.base, self.log_path = base, base / "server.log"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        where = ["--listen", "127.0.0.1", "--port", str(self.port), "--base-directory", str(base)]
        database = ["--database-url", f"sqlite:///{base}/comfy.db"]
        self.flags = [*device, *where, *database, "--disable-api-nodes", *extra]

    def __enter__(self) -> "Server":
        self.start()
        return self

    def __exit__(self, exception_type, *_) -> None:
        if exception_type:
            self.process.kill()  # perhaps in the middle of a prompt, where it cannot stop in peace
        else:
            self.stop()

    def start(self, timeout: float = 120) -> None:
        lay_out(self.base)
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [self.python, self.checkout / "main.py", *self.flags],
                cwd=self.base, env=clean_environ(), stdout=log, stderr=log, preexec_fn=die_with_parent,
            )  # fmt: skip
        deadline = time.monotonic() + timeout
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise RuntimeError(f"ComfyUI did not start, {self.log_path} ends with\n{self.log()[-3000:]}")
            time.sleep(0.1)

    def stop(self, timeout: float = 60) -> None:
        """Stops it as Ctrl-C does; a server that does not leave in peace is an error."""
        self.process.send_signal(signal.SIGINT)
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        assert code == 0, f"ComfyUI ended with {code}, {self.log_path} ends with\n{self.log()[-3000:]}"

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/queue", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def failed_imports(self) -> list[str]:
        """Log lines about node files and packs that could not be imported, ours and ComfyUI's own."""
        signs = ("IMPORT FAILED", "Error while calling comfy_entrypoint", "Cannot import")
        return [line for line in self.log().splitlines() if any(sign in line for sign in signs)]


def lay_out(base: Path) -> None:
    """The folders and settings ComfyUI expects under --base-directory, with this repository as a custom node."""
    for folder in ("custom_nodes", "models/checkpoints", "input", "output", "user/default"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes/ComfyUI-WPlus"
    if not link.is_symlink():
        link.symlink_to(REPOSITORY, target_is_directory=True)
    settings = base / "user/default/comfy.settings.json"
    if not settings.exists():
        settings.write_text(json.dumps(USER_SETTINGS))


def clean_environ() -> dict[str, str]:
    ours = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    # One thread: what the tests run is small, and two threads that wait for each other on a busy machine take 10 x.
    return {"OMP_NUM_THREADS": "1"} | ours | {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def die_with_parent() -> None:
    """A killed pytest must not leave servers behind (Linux only: PR_SET_PDEATHSIG).

    A shell lets its background jobs ignore Ctrl-C, and so would a server that such a pytest starts.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGINT)
