"""Everything that is measured on one GPU, in one call: `python -m experiments.gpu --out FOLDER --seconds 480`.

Sections run in the order of their worth, each for its share of the time that is left; what one does not need goes to
the next, and what is left over is tried again at the end. A row that fails says why, and the rest goes on; one that
hangs, or takes the device with it, costs the process, and another takes up where it ended. FOLDER/gpu.json is whole
after each row; the same call again goes on with what is not there yet. At the end one page is printed, and written to
FOLDER/gpu.md.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .book import PATIENCE, Book, Lost, Row
from .page import page


@dataclass(frozen=True)
class Section:
    """A module of this package with `rows(machine, found)`, found() its rows so far, found(name) another section's; and
    its seconds of 480.
    """

    name: str
    seconds: float


SECTIONS = (
    Section("warm", 50),
    Section("numerics", 80),
    Section("table", 75),
    Section("decode", 25),
    Section("end_to_end", 90),
    Section("dispatcher", 40),
    Section("variants", 35),
    Section("tiles", 30),
    Section("host", 30),
    Section("counters", 25),
)
FAILING = Section("failures", 10)  # in a rehearsal: rows that raise, hang and end the process
OVER = "the time was over"
LOST = 3  # how a process ends whose device is lost
PROCESSES = 3  # that a section may cost before the others have had their turn, or that may end outside of any row
GRACE = 5.0  # seconds that a row may run over the end


def parser() -> argparse.ArgumentParser:
    """Return the command's arguments."""
    names = [section.name for section in (*SECTIONS, FAILING)]
    found = argparse.ArgumentParser(prog="python -m experiments.gpu", description=__doc__)
    found.formatter_class = argparse.RawDescriptionHelpFormatter
    found.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")
    found.add_argument("--seconds", type=float, default=480.0, help="time for all of it")
    found.add_argument("--only", nargs="+", choices=names, metavar="SECTION", help=", ".join(names))
    found.add_argument("--commit", help="what is measured, where there is no git")
    found.add_argument("--cache", type=Path, help="kernels that were compiled elsewhere: see pack.py")
    found.add_argument("--rehearse", choices=["quick", "whole"], help="without a GPU, at toy sizes")
    found.add_argument("--until", type=float, help=argparse.SUPPRESS)  # a process of its own: see `watch`
    return found


def sections(options: argparse.Namespace) -> list[Section]:
    """Return the sections that are asked for."""
    known = (*SECTIONS, FAILING) if options.rehearse else SECTIONS
    return [section for section in known if not options.only or section.name in options.only]


def rows_of(section: Section, options: argparse.Namespace, book: Book) -> Generator[Row]:
    """Yield a section's rows; in a quick rehearsal one of each kind."""
    kinds = set()
    module = importlib.import_module(f".{section.name}", __package__)
    device = machine(options) if section is not FAILING else None
    for row in module.rows(device, lambda name=section.name: book.content["sections"].get(name, {})):
        kind = row.kind or row.name
        if options.rehearse != "quick" or (kind not in kinds and not row.slow):
            yield row
        kinds.add(kind)


def machine(options: argparse.Namespace) -> Any:
    """Return the device that is measured, or the pretended one of a rehearsal."""
    if options.rehearse:
        pretended = importlib.import_module(".pretended", __package__)
        pretended.choose_as_on_a_gpu()
        return pretended.Rehearsal()
    return importlib.import_module(".machine", __package__).Machine()


def work(options: argparse.Namespace, book: Book) -> None:
    """Run every section twice: for its share, and then for what is left.

    One whose rows take process after process with them waits for the second time, so that the others have theirs.
    """
    if "environment" not in book.content and options.only != [FAILING.name]:
        common = importlib.import_module("experiments.bench.common")
        book.content["environment"] = {"date": time.strftime("%Y-%m-%d"), **common.environment()}
        book.content["environment"] |= {"commit": options.commit} if options.commit else {}
        book.save()
    asked = sections(options)
    for attempt in (1, 2):
        for n, section in enumerate(asked):
            if attempt == 1 and book.content.get("processes lost", {}).get(section.name, 0) >= PROCESSES:
                continue
            left = options.until - time.time()
            wanted = sum(other.seconds for other in asked[n:])
            share = left if attempt == 2 else left * section.seconds / wanted
            try:
                with closing(rows_of(section, options, book)) as rows:
                    left_over = book.run(section.name, rows, time.time() + share)
                book.content.setdefault("left over", {})[section.name] = left_over
            except Lost:
                raise
            except Exception:  # noqa: BLE001 - a section that cannot begin leaves the others be
                book.fail(section.name, "the section itself", traceback.format_exc()[-1500:], 0.0)
            book.save()


def watch(options: argparse.Namespace, arguments: list[str]) -> None:
    """Run the work in a process of its own, and another where one hangs or ends, until the time is over."""
    file, until, outside = options.out / "gpu.json", time.time() + options.seconds, 0
    while time.time() < until:
        command = [sys.executable, "-m", "experiments.gpu", *arguments, "--until", str(until)]
        started = time.time()
        process = subprocess.Popen(command, start_new_session=True)
        said = None
        while process.poll() is None and said is None:
            time.sleep(0.2)
            under_way = _under_way(file)
            if time.time() > until + GRACE:
                said = OVER
            elif under_way and under_way["since"] >= started and time.time() > under_way["until"]:
                said = f"it ran for more than {under_way['until'] - under_way['since']:.0f} s"
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        if code == 0:
            return
        under_way = _under_way(file)
        if under_way is None and code != LOST:
            outside += 1
            print(f"experiments.gpu: the process ended with code {code} outside of any row.")
            if outside == PROCESSES:
                return
        if under_way is not None:
            said = said or f"the process ended with code {code}"
            book = Book(file)
            if said == OVER:
                book.cut(under_way["section"], under_way["row"])
                return
            book.fail(under_way["section"], under_way["row"], said, time.time() - under_way["since"])
            book.lose(under_way["section"])


def _under_way(file: Path) -> Any:
    return json.loads(file.read_text()).get("under way") if file.exists() else None


def has_driver() -> bool:
    """Return whether there is a CUDA driver; torch, which knows more, takes long to import on a cold disk."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def unpacked(packed: Path, out: Path) -> str:
    """Return a folder with the kernels of a file that `pack.py` wrote; it lies beside the results, not in them."""
    folder = out.resolve().parent / f".{out.resolve().name}-triton"
    with tarfile.open(packed) as file:
        file.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 and later
        file.extractall(folder)
    return str(folder)


def main(arguments: list[str] | None = None) -> None:
    """Measure, and print the page."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.until is not None:
        try:
            work(options, Book(options.out / "gpu.json", PATIENCE if options.rehearse else 1.0))
        except Lost:
            sys.exit(LOST)
        return
    os.environ.pop("TRITON_INTERPRET", None)
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not has_driver():
        print("not measured: there is no CUDA driver here. `--rehearse whole` goes through all of it at toy sizes.")
        return
    # Nothing is fetched, and what libraries warn of is not read here.
    os.environ.update({"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"})
    if options.cache and not options.cache.exists():
        print(f"{options.cache} is not here: kernels are compiled.")
    elif options.cache:
        os.environ["TRITON_CACHE_DIR"] = unpacked(options.cache, options.out)
    watch(options, arguments)
    text = page(Book(options.out / "gpu.json").content)
    (options.out / "gpu.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
