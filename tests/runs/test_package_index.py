"""Fetching a file of a package index: its hash decides, and nothing in it runs.

Run: pytest tests/runs/test_package_index.py
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import io
import os
import re
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from moa.errors import BackendError
from moa.runs.downloads import DOWNLOADS, Download, listing
from moa.runs.package_index import DEFAULT, fetch, find_link, pip_options, project, without_password

ROOT = Path(__file__).parents[2]
FILE = "Some_Package-1.0.tar.gz"
PAGE = f'<html><body><a href="other-1.0.zip">o</a><a data-x="y" href="../files/{FILE}#sha256=00">f</a></body></html>'


def evil(marker: Path) -> bytes:
    """Return a source archive whose setup code leaves a marker."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in (
            ("setup.py", f"open({str(marker)!r}, 'w').close()\nimport setuptools\nsetuptools.setup()\n"),
            ("PKG-INFO", "Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n"),
        ):
            info = tarfile.TarInfo(f"Some_Package-1.0/{name}")
            info.size = len(text)
            archive.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def wanted(content: bytes, file: str = FILE) -> Download:
    return Download(
        name="Some_Package",
        file=file,
        size=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        holds="something",
        licence="MIT",
        origin="https://example.org",
    )


@pytest.fixture(autouse=True)
def _no_other_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip is configured with is what a test says, and nothing of this machine."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder that is an index: simple/some-package/index.html, simple/files/."""
    (tmp_path / "simple" / "some-package").mkdir(parents=True)
    (tmp_path / "simple" / "files").mkdir()
    (tmp_path / "simple" / "some-package" / "index.html").write_text(PAGE)
    return tmp_path / "simple"


def test_setup_code_of_another_file_never_runs(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marker = tmp_path / "it ran"
    content = evil(marker)
    (index / "files" / FILE).write_bytes(content)
    monkeypatch.setenv("PIP_INDEX_URL", index.as_uri())
    with pytest.raises(BackendError, match=r"has sha256 .*, expected .*it was not used"):
        fetch(wanted(content[:-1] + b"!"))
    assert fetch(wanted(content)) == content, "nor does that of the right file"
    assert not marker.exists()
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and later
        archive.extractall(tmp_path)
    subprocess.run([sys.executable, "setup.py", "--version"], cwd=tmp_path / "Some_Package-1.0", capture_output=True)
    assert marker.exists(), "the trap works"


def test_a_longer_file_is_refused_without_reading_it_whole(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (index / "files" / FILE).write_bytes(b"content" + bytes(1000))
    monkeypatch.setenv("PIP_INDEX_URL", index.as_uri())
    with pytest.raises(BackendError, match=hashlib.sha256(b"content" + bytes(1)).hexdigest()):
        fetch(wanted(b"content"))


def test_further_indices_and_folders(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (index / "files" / FILE).write_bytes(b"content")
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.setenv("PIP_INDEX_URL", empty.as_uri())
    with pytest.raises(
        BackendError, match=r"Some_Package-1\.0\.tar\.gz cannot be downloaded: it is not at file:.*empty"
    ):
        fetch(wanted(b"content"))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{empty.as_uri()} {index.as_uri()}")
    assert fetch(wanted(b"content")) == b"content"
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(BackendError, match="pip is told no-index"):
        fetch(wanted(b"content"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(index / "files"))
    assert fetch(wanted(b"content")) == b"content"


class _Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        given = self.headers.get("Authorization", "")
        if given != "Basic " + base64.b64encode(b"me:p@ss").decode():
            self.send_error(401)
        elif self.path == "/simple/some-package/":
            self._send(PAGE.replace("../files", f"http://me:p%40ss@{self.headers['Host']}/files").encode())
        elif self.path == f"/files/{FILE}":
            self._send(b"content")
        else:
            self.send_error(404)

    def _send(self, content: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"127.0.0.1:{server.server_port}/simple"
        server.shutdown()
        thread.join()


def test_an_index_behind_a_password(served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:p%40ss@{served}")
    assert fetch(wanted(b"content")) == b"content"
    with pytest.raises(BackendError) as error:
        fetch(wanted(b"content", "missing-1.0.tar.gz"))
    assert served in str(error.value) and "p%40ss" not in str(error.value)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://{served}")
    with pytest.raises(BackendError, match="401"):
        fetch(wanted(b"content"))


@pytest.mark.parametrize("address", ["ftp://example.org/simple", "nowhere", "http://["])
def test_an_address_that_is_not_one(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", address)
    with pytest.raises(BackendError, match="cannot be downloaded: "):
        fetch(wanted(b"content"))


def test_options_of_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://a\ncert = c\n[download]\nindex-url = https://b\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert pip_options().get("index-url") == "https://b" and pip_options()["cert"] == "c"
    monkeypatch.setenv("PIP_INDEX_URL", "https://e")
    assert pip_options()["index-url"] == "https://e"


def test_links_as_pep_503_has_them() -> None:
    assert project("Some_.Package") == "some-package"
    assert find_link(PAGE, "https://a/simple/p/", FILE) == f"https://a/simple/files/{FILE}"
    assert find_link(PAGE, "https://a/simple/p/", "none.zip") is None
    assert find_link('<a href="https://b/x%2B1.zip">', DEFAULT, "x+1.zip") == "https://b/x%2B1.zip"
    assert without_password("https://me:you@host:1/p?q") == "https://host:1/p?q"


def test_every_download_is_pinned_and_says_whose_it_is() -> None:
    rows = (ROOT / "docs" / "downloads.md").read_text(encoding="utf-8")
    for one in DOWNLOADS:
        assert re.fullmatch(r"[0-9a-f]{64}", one.sha256) and one.origin.startswith("https://") and one.licence
        assert one.file.lower().startswith(project(one.name).replace("-", "")[:4]) or "_" in one.file
        for said in (one.holds, one.licence, one.origin, one.file, one.sha256):
            assert said in rows and said in listing([one])
    assert len(re.findall(r"^\| `", rows, re.MULTILINE)) == len(DOWNLOADS)
