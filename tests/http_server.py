"""A server in a process of its own, on the loopback, for as long as a test needs it."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@contextmanager
def running(command: Sequence[str], port: int, log: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Run a server until the block ends, from when it says that it is healthy; its address."""
    address = f"http://127.0.0.1:{port}"
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd="/") as process:
        try:
            for _ in range(560):
                assert process.poll() is None, log.read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=2).close()
                    break
                except OSError:
                    time.sleep(1)
            else:
                raise AssertionError(log.read_text()[-3000:])
            yield address
        finally:
            process.terminate()


def complete(address: str, **values: object) -> str:
    """Return what a server answers to a request for a completion."""
    body = json.dumps(values).encode()
    request = urllib.request.Request(f"{address}/v1/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        found: str = answer.read().decode()
        return found
