"""scripts/download.py against a web server of its own: whole files, files that broke off, damaged ones, none."""

import functools
import hashlib
import importlib.util
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pictures import shared

SCRIPT = Path(__file__).parents[1] / "scripts/download.py"
DATA = bytes(range(256)) * 5000
HASHED = f"points-{hashlib.sha256(DATA).hexdigest()[:8]}.dat"


@pytest.fixture(scope="module")
def download():
    spec = importlib.util.spec_from_file_location("download", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["download"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


class Handler(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer()

    def answer(self, body=True):
        files, ranges = self.server.files, self.headers.get("Range")
        self.server.seen.append((self.command, self.path, ranges))
        data = files.get(self.path.lstrip("/"))
        if data is None:
            return self.send_error(404)
        start = int(ranges.removeprefix("bytes=").rstrip("-")) if ranges and self.server.resumable else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body:
            self.wfile.write(data[start : start + self.server.breaks_off_after])

    def log_message(self, *_):
        pass


@pytest.fixture
def web():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.seen, server.resumable, server.breaks_off_after = {}, [], True, 1 << 30
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def get(download, web, folder, name, data=DATA):
    web.files[name] = data
    weights = download.Weights(f"{web.url}/{name}", "wplus", "none")
    download.fetch(weights, weights.address, folder / name, download.size_of(weights.address))
    return (folder / name).read_bytes()


def test_a_file_arrives_whole(download, web, tmp_path):
    assert get(download, web, tmp_path, HASHED) == DATA
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("resumable", [True, False])
def test_a_download_that_broke_off_goes_on(download, web, tmp_path, resumable):
    web.resumable, web.breaks_off_after = resumable, 1_000_000
    with pytest.raises((ValueError, OSError)):
        get(download, web, tmp_path, HASHED)
    assert not (tmp_path / HASHED).exists()
    assert (tmp_path / f"{HASHED}.part").stat().st_size == 1_000_000
    web.breaks_off_after = 1 << 30
    assert get(download, web, tmp_path, HASHED) == DATA
    assert web.seen[-1] == ("GET", f"/{HASHED}", "bytes=1000000-")


@pytest.mark.parametrize("there", [DATA, DATA + b"more"], ids=["whole", "too long"])
def test_a_part_that_is_whole_or_too_long(download, web, tmp_path, there):
    (tmp_path / f"{HASHED}.part").write_bytes(there)
    assert get(download, web, tmp_path, HASHED) == DATA
    assert all(ranges is None for _, _, ranges in web.seen)


def test_a_damaged_file_is_not_kept(download, web, tmp_path):
    with pytest.raises(ValueError, match="is damaged: its sha256 does not start with"):
        get(download, web, tmp_path, HASHED, DATA[::-1])
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run(download, command_line):
    return functools.partial(command_line, download.main)


def test_it_shows_all_and_asks_first(web, tmp_path):
    def run(*arguments, answer):
        return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, input=answer)

    web.files["wplus_adapter.bin"] = DATA
    done = run("--from", web.url, "--models", tmp_path, answer="n\n")
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert "wplus_adapter.bin\n    1.3 MB\n    NTU S-Lab License 1.0: non-commercial use only" in done.stdout
    assert "e4e_ffhq_encode.pt\n    size unknown" in done.stdout and "stage1" not in done.stdout
    assert all(method == "HEAD" for method, _, _ in web.seen)


def test_it_fetches_what_is_named_once(run, web, tmp_path):
    web.files["wplus_adapter_stage1.bin"] = DATA
    options = ["--from", web.url, "--models", tmp_path, "wplus_adapter_stage1.bin"]
    assert run(*options, answer="y\n").returncode == 0
    assert (tmp_path / "wplus/wplus_adapter_stage1.bin").read_bytes() == DATA
    asked = len(web.seen)
    again = run(*options)
    assert again.returncode == 0 and "is there already" in again.stdout and len(web.seen) == asked


def test_what_cannot_be_had_is_an_error(run, web, tmp_path):
    done = run("--from", web.url, "--models", tmp_path, "--yes", "wplus_adapter.bin")
    assert done.returncode == 1 and "wplus_adapter.bin: HTTP Error 404" in done.stderr
    assert run("nothing.bin").returncode == 2


def test_directions_come_together_as_our_folders_group_them(run, download, web, tmp_path):
    names = [w.name for w in download.WEIGHTS if w.called == "directions"]
    assert len(names) == len(set(names))  # a mirror has them all in one folder
    web.files |= dict.fromkeys(names, DATA)
    done = run("--from", web.url, "--models", tmp_path, "--yes", "directions")
    assert done.returncode == 0, done.stderr
    assert f"directions: {len(names)} files, such as {web.url}/age.pt\n    {len(names) * 1.28:.1f} MB" in done.stdout
    got = {p.relative_to(tmp_path / "wplus/directions").as_posix() for p in tmp_path.rglob("*.*")}
    assert len(got) == len(names) and {"interfacegan/smile.pt", "latent_directions/smile.npy"} < got
    assert "directions: is there already" in run("--models", tmp_path, "directions").stdout


def test_the_directions_are_those_that_the_pack_reads(download):
    folder = shared("data/directions/interfacegan/smile.pt").parents[1]
    known = {p.relative_to(folder.parent).as_posix() for p in folder.rglob("*.*")}
    listed = {f"{w.folder.removeprefix('wplus/')}/{w.name}" for w in download.WEIGHTS if w.called == "directions"}
    # the pool that training edits codes with has no names, and InterFaceGAN's pose is not published with the adapter
    assert known - listed <= {"directions/att_direction_scale.pth", "directions/interfacegan/pose.pt"}
    assert listed <= known


def test_real_addresses_and_the_hash_in_a_name(download):
    by_name = {w.name: w for w in download.WEIGHTS}
    assert by_name["shape_predictor_68_face_landmarks-fbdc2cb8.dat"].sha256_start == "fbdc2cb8"
    assert by_name["wplus_adapter.bin"].sha256_start == ""
    assert all(w.address.startswith("https://") and w.licence for w in download.WEIGHTS)
