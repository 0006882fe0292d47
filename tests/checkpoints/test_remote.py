"""Checkpoints by URL: of a server of our own, and of fsspec's memory filesystem."""

import http.server
import io
import re
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from bnfreeze import CheckpointError, UnsupportedFormatError, inspect
from bnfreeze.checkpoints import open_checkpoint
from tests.checkpoints.formats import FORMATS, sparse_checkpoint

fsspec = pytest.importorskip("fsspec")


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, by ranges if the server's `ranges` is set."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        file = server.folder / self.path.partition("?")[0].lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        size = file.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        begin, end = (int(n) for n in asked.groups()) if asked else (0, size - 1)
        if asked and server.ranges:
            end = min(end, size - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{end}/{size}")
        else:
            begin, end = 0, size - 1
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes" if server.ranges else "none")
        self.send_header("Content-Length", str(end - begin + 1))
        self.end_headers()
        if self.command == "GET":
            with open(file, "rb") as stream:
                stream.seek(begin)
                self.wfile.write(stream.read(end - begin + 1))
            server.sent += end - begin + 1

    do_HEAD = do_GET  # noqa: N815


@pytest.fixture
def server(tmp_path):
    pytest.importorskip("aiohttp")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.folder, made.ranges, made.sent = tmp_path, True, 0
        made.url = f"http://127.0.0.1:{made.server_port}"
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


@pytest.mark.parametrize("kind", ["torch zip", "torch legacy", "safetensors", "shard index"])
def test_a_url_gives_what_the_file_gives(kind, model, server, tmp_path):
    path = FORMATS[kind](model.state_dict(), tmp_path / "saved")
    found = inspect(f"{server.url}/{path.relative_to(tmp_path)}")
    assert found.layers == inspect(path).layers
    assert found.origin.kind == kind
    assert found.origin.path.startswith(server.url)


def test_a_question_mark_is_no_part_of_the_name(model, server, tmp_path):
    FORMATS["safetensors"](model.state_dict(), tmp_path / "a.safetensors")
    assert len(inspect(f"{server.url}/a.safetensors?download=true").layers) == 4


def test_of_a_large_file_a_small_part_is_read(server, tmp_path):
    path = tmp_path / "large.pt"
    sparse_checkpoint(path, 100_000_000)
    assert inspect(f"{server.url}/large.pt").layers == inspect(path).layers
    assert server.sent < 10_000_000


def test_errors_of_a_server_are_plain(server, tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        inspect(f"{server.url}/nothing.pt")
    torch.save(nn.BatchNorm2d(4).state_dict(), tmp_path / "a.pt")
    server.ranges = False
    with pytest.raises(UnsupportedFormatError, match="download it"):
        inspect(f"{server.url}/a.pt")
    with pytest.raises(CheckpointError):
        inspect("http://127.0.0.1:9/a.pt")


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


def test_folders_on_other_file_systems_are_read(memory, model, tmp_path):
    """hf:// and s3:// need a server; fsspec's memory filesystem stands in for them."""
    index = FORMATS["shard index"](model.state_dict(), tmp_path / "hf")
    folder = FORMATS["distributed"](model.state_dict(), tmp_path / "dcp")
    for file in (*index.parent.iterdir(), *folder.iterdir()):
        memory.pipe(f"/{file.parent.name}/{file.name}", file.read_bytes())
    for name in ("hf", "dcp"):
        assert inspect(f"memory://{name}").layers == inspect(tmp_path / name).layers


def test_standard_input_is_read(model, tmp_path):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    code = "import bnfreeze; print(len(bnfreeze.inspect('-').layers))"
    done = subprocess.run(
        [sys.executable, "-c", code], input=buffer.getvalue(), capture_output=True, check=True
    )
    assert done.stdout == b"4\n"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("https://example.org/a.pt", r"pip install 'bnfreeze\[remote\]'"),
        ("simplecache::https://example.org/a.pt", "plain URL"),
        ("file:///etc/passwd", "plain URL"),
        ("nothing://a/b.pt", "nothing"),
    ],
)
def test_a_url_that_cannot_be_read_is_refused_and_never_taken_for_a_path(url, words, monkeypatch):
    if "install" in words:
        monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(UnsupportedFormatError, match=words) as caught, open_checkpoint(url):
        pass
    assert url in str(caught.value)
