"""Mixtures trained by many: `.envs/flower/bin/python -m experiments.federated` writes results/federated.json.

Flower simulates ten clients for every aggregator; then a server and two clients run as processes of their own, which
talk over the loopback. `make env-flower` makes the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from flwr.simulation import run_simulation

from experiments.bench.common import write
from experiments.federated import apps

ROOT = Path(__file__).parents[2]
APP = Path(__file__).parent / "app"
BIN = Path(sys.executable).parent


def main() -> None:
    """Run both, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", default=list(apps.ARMS), choices=list(apps.ARMS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of a client in a round")
    parser.add_argument("--only", choices=["simulation", "processes"], help="one of the two")
    parser.add_argument("--out", default="federated", help="name of the result")
    options = parser.parse_args()
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    os.environ |= {"PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    given: dict[str, Any] = {
        "rounds": options.rounds,
        "steps": options.steps,
        "batch": 16,
        "held_out": 200,
        "timeout": 900,
    }
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = {}
        if options.only != "processes":
            ten = {**given, "clients": 10, "examples": 800, "arms": options.arms}
            found["simulation"] = simulated(ten, Path(folder))
        if options.only != "simulation":
            two = {**given, "clients": 2, "examples": 160, "arms": ["fedsb"], "rounds": 2}
            found["processes"] = over_loopback(two, Path(folder))
    write(options.out, {**found, "seconds": round(time.perf_counter() - begun, 1)}, "python -m experiments.federated")


def simulated(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the study of ten clients that Flower simulates on two cores."""
    out = leave(given, folder / "simulation.json")
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_simulation(apps.server_side, apps.client_side, given["clients"], backend_config=resources)
    return json.loads(out.read_text(encoding="utf-8"))


def over_loopback(given: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the study of a server and two clients that are processes of their own."""
    out = leave(given, folder / "processes.json")
    port, *ports = free_ports(3)
    home = folder / "flower"
    home.mkdir()
    os.environ["FLWR_HOME"] = str(home)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    plain = ["--insecure", "--disable-runtime-dependency-installation"]
    server = ["flower-superlink", *plain, "--host", "127.0.0.1", "--port", str(port)]
    started = [spawn(server, folder / "server.log")]
    try:
        wait_for(port)
        for n in range(2):
            node = ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--host", "127.0.0.1"]
            node += ["--port", str(ports[n]), "--node-config", f"partition-id={n}"]
            started.append(spawn(node, folder / f"client {n}.log"))
        subprocess.run([BIN / "flwr", "run", APP, "loopback"], check=True, timeout=120)
        patience = time.monotonic() + given["timeout"]
        while not out.is_file():
            if time.monotonic() > patience or any(p.poll() is not None for p in started):
                logs = "\n".join(f.read_text()[-3000:] for f in folder.glob("*.log"))
                raise RuntimeError(f"the processes did not finish: {logs}")
            time.sleep(0.5)
        return json.loads(out.read_text(encoding="utf-8"))
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGTERM)
        for process in started:
            process.wait(timeout=30)


def leave(given: dict[str, Any], out: Path) -> Path:
    """Put the settings into the environment, which every process inherits."""
    os.environ["MOA_FEDERATED"] = json.dumps({**given, "out": str(out)})
    return out


def spawn(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start one of Flower's programs in a group of its own."""
    with log.open("wb") as file:
        return subprocess.Popen(
            [str(BIN / command[0]), *command[1:]], stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def wait_for(port: int) -> None:
    """Wait until something listens on a port."""
    patience = time.monotonic() + 120
    while time.monotonic() < patience:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise RuntimeError(f"nothing listens on port {port}")


def free_ports(count: int) -> list[int]:
    """Return ports that nothing listens on."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return found


if __name__ == "__main__":
    main()
