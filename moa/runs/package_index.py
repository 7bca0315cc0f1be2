"""A file of the package index that pip is configured for: fetched, compared with its hash, and never built or run.

`pip download` runs a source archive's setup code to read its metadata. Here an archive is only bytes.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import http.client
import re
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit, urlunsplit

from ..errors import BackendError
from .downloads import Download

DEFAULT = "https://pypi.org/simple"
SECTIONS = (":env:", "download", "global")  # where pip looks for an option, the first one first
TIMEOUT = 60.0  # seconds without an answer


def fetch(download: Download) -> bytes:
    """Return the bytes of a file of the package index, after their hash was compared.

    The index is pip's: index-url, extra-index-url and the folders of find-links, from its files and PIP_… variables.

    Raises:
        BackendError: the file is not there, cannot be read, or is another one than the pinned one.
    """
    options = pip_options()
    context = ssl.create_default_context(cafile=options.get("cert")) if options.get("cert") else None
    try:
        content = _content(download, options, context)
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: an address that is not one
        raise BackendError(
            f"{download.file} cannot be downloaded: {error}. The demo needs the package index that pip is configured "
            "for: see `pip config list`."
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != download.sha256:
        raise BackendError(
            f"{download.file} has sha256 {digest}, expected {download.sha256}: the index serves another file under "
            "this name; it was not used."
        )
    return content


def _content(download: Download, options: dict[str, str], context: ssl.SSLContext | None) -> bytes:
    for folder in options.get("find-links", "").split():
        path = Path(folder.removeprefix("file://")).expanduser() / download.file
        if path.is_file():
            return _read(path.as_uri(), download.size, context)
    indices = [] if _is_on(options.get("no-index")) else [options.get("index-url", DEFAULT)]
    indices += [] if _is_on(options.get("no-index")) else options.get("extra-index-url", "").split()
    seen = []
    for index in indices:
        page = f"{index.rstrip('/')}/{project(download.name)}/"
        seen.append(without_password(page))
        try:
            text = _read(page + "index.html" if page.startswith("file:") else page, None, context).decode()
        except urllib.error.HTTPError as error:
            if error.code != 404:
                raise
            continue
        except urllib.error.URLError:
            if not page.startswith("file:"):
                raise
            continue
        link = find_link(text, page, download.file)
        if link is not None:
            return _read(link, download.size, context)
    raise OSError(f"it is not at {' or '.join(seen) or 'any place: pip is told no-index'}")


def project(name: str) -> str:
    """Return a distribution's name as an index spells it. Source: PEP 503."""
    return re.sub(r"[-_.]+", "-", name).lower()


def find_link(page: str, address: str, file: str) -> str | None:
    """Return the address of a file that an index's page links to, None where it does not.

    Args:
        page: HTML, of links as PEP 503 has them.
        address: of the page.
        file: name of the file.
    """
    parser = _Links()
    parser.feed(page)
    for href in parser.found:
        link = urldefrag(urljoin(address, href)).url
        if unquote(urlsplit(link).path).rpartition("/")[2] == file:
            return link
    return None


class _Links(HTMLParser):
    """The addresses that a page links to."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if tag == "a" and name == "href" and value]


def _read(address: str, size: int | None, context: ssl.SSLContext | None) -> bytes:
    """Return what is at an address, at most one byte more than the size: enough to be another file."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https", "file"):
        raise ValueError(f"{without_password(address)} is not an address of http, https or file")
    request = urllib.request.Request(without_password(address), headers={"Accept": "text/html, */*;q=0.1"})
    if parts.username:
        pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
        request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(pair).decode()}")
    with urllib.request.urlopen(request, timeout=TIMEOUT, context=context) as answer:
        return bytes(answer.read() if size is None else answer.read(size + 1))


def without_password(address: str) -> str:
    """Return an address without the name and the password in it."""
    parts = urlsplit(address)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def pip_options() -> dict[str, str]:
    """Return what pip is configured with, by the options' names.

    Raises:
        BackendError: this Python has no pip.
    """
    command = [sys.executable, "-m", "pip", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(f"pip does not say which index it uses: {done.stderr.strip()[-400:]}")
    found: dict[str, str] = {}
    for section in reversed(SECTIONS):
        for line in done.stdout.splitlines():
            key, _, value = line.partition("=")
            place, _, name = key.rpartition(".")
            if place == section:
                found[name] = str(ast.literal_eval(value))
    return found


def _is_on(value: str | None) -> bool:
    return value is not None and value.lower() not in ("", "0", "no", "false", "off")
