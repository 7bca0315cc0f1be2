"""Rows of CSV, JSON and parquet files and of hub data sets, as they are written, each with its place in its file."""

from __future__ import annotations

import csv
import glob
import gzip
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .base_files import looks_like_a_path
from .tasks import FORMATS, Task
from .yaml_values import is_file, is_folder, one_line, shortened

TEXT_FORMATS = ("jsonl", "json", "csv", "tsv")


@dataclass(frozen=True)
class Rows:
    """Some rows of some files.

    Args:
        columns: name -> values, n of each.
        names: of all columns in the files, those that are not kept included.
        places: (file, number) of each row; the number counts from 1, in a .jsonl file it is the line's.
        class_names: column -> the names behind its numbers, where the file says them.
    """

    columns: Mapping[str, list[Any]]
    names: Sequence[str]
    places: Sequence[tuple[str, int]]
    class_names: Mapping[str, Sequence[str]]

    def __len__(self) -> int:
        return len(self.places)

    def place(self, i: int) -> str:
        """Return where row i stands, for a message."""
        file, number = self.places[i]
        return f"row {number} of {file}"

    def select(self, chosen: Iterable[int]) -> Rows:
        """Return some of the rows, in the order given."""
        order = [int(i) for i in chosen]
        columns = {name: [values[i] for i in order] for name, values in self.columns.items()}
        return Rows(columns, self.names, [self.places[i] for i in order], self.class_names)


@dataclass(frozen=True)
class _Table:
    """One file: records as dictionaries of the wanted columns, their numbers, and what the header says."""

    records: Sequence[Mapping[str, Any]]
    numbers: list[int]
    names: list[str]
    class_names: Mapping[str, Sequence[str]]


def read_rows(name: str, source: str | Sequence[str], split: str, task: Task) -> Rows:
    """Return the rows of a task's files or hub data set.

    Args:
        name: of the task, for messages.
        source: files, a pattern of files, or the hub id of a data set.
        split: of a hub data set.
        task: whose columns are kept.

    Raises:
        ConfigError: no such file, a file that is not of its format, is empty, or has a column twice.
    """
    where = f"task {name!r}"
    sources = [file for one in ([source] if isinstance(source, str) else source) for file in _expanded(where, one)]
    kind = task.format or _format_of(where, sources[0], task)
    if kind == "hub":
        if len(sources) > 1:
            raise ConfigError(f"{where}: name one data set of the hub, got {len(sources)}: {', '.join(sources)}.")
        tables = [("the data set", _hub(where, sources[0], task, split))]
    else:
        _check_no_hub(where, sources[0], task)
        tables = [(file, _file(where, file, kind, task.columns)) for file in sources]
    names = list(dict.fromkeys(name for _, table in tables for name in table.names))
    wanted = [column for column in task.columns if column in names]
    columns = {column: [row.get(column) for _, table in tables for row in table.records] for column in wanted}
    places = [(Path(file).name, number) for file, table in tables for number in table.numbers]
    classes = {column: found for _, table in tables for column, found in table.class_names.items()}
    return Rows(columns, names, places, classes)


def _check_no_hub(where: str, source: str, task: Task) -> None:
    """Refuse what chooses a part of a hub data set where there are files: it would change nothing."""
    given = {"subset": task.subset, "split": task.split if task.split != "train" else None}
    for key, value in {**given, "eval_split": task.eval_split}.items():
        if value is not None:
            raise ConfigError(
                f"{where}: {key} is of hub data sets, and {shortened(source)} is a file: leave it out, and name the "
                "evaluation rows under eval."
            )


def _expanded(where: str, source: str) -> list[str]:
    """Return a file, or the files that a pattern names."""
    if is_file(source) or not any(mark in source for mark in "*?["):
        return [source]
    found = sorted(glob.glob(source, recursive=True))
    if not found:
        raise ConfigError(f"{where}: no file fits the pattern {shortened(source)} (looked from {Path.cwd()}).")
    return found


def _format_of(where: str, source: str, task: Task) -> str:
    """Return the format of a source by its ending; "hub" only where the task says that it is a data set."""
    suffixes = [suffix.removeprefix(".").lower() for suffix in Path(source).suffixes]
    if suffixes[-1:] == ["gz"]:
        suffixes = suffixes[:-1]
    ending = suffixes[-1] if suffixes else ""
    if is_folder(source):
        raise ConfigError(f"{where}: {source} is a folder: name its files, or a pattern such as {source}/*.jsonl.")
    if ending in FORMATS:
        return ending
    endings = ", ".join(f".{f}" for f in FORMATS)
    if is_file(source):
        raise ConfigError(f"{where}: {source} does not end in one of {endings}: set format.")
    if not looks_like_a_path(source) and (task.subset or task.eval_split or task.split != "train"):
        return "hub"  # files have no such parts
    raise ConfigError(
        f"{where}: no file {shortened(source)} (looked from {Path.cwd()}). A file's name ends in one of {endings}, or "
        "format says what it holds; for a data set of the hub set format: hub."
    )


def _file(where: str, file: str, kind: str, wanted: Sequence[str]) -> _Table:
    if not is_file(file):
        if is_folder(file):
            raise ConfigError(f"{where}: {file} is a folder: name its files, or a pattern such as {file}/*.{kind}.")
        raise ConfigError(f"{where}: no file {shortened(file)} (looked from {Path.cwd()}).")
    if Path(file).stat().st_size == 0:
        raise ConfigError(f"{where}: {file} has no rows, it is empty.")
    if kind == "parquet":
        table = _parquet(where, file, wanted)
    else:
        readers: dict[str, Callable[[str, Sequence[str]], _Table]] = {
            "csv": lambda text, columns: _delimited(text, columns, ","),
            "tsv": lambda text, columns: _delimited(text, columns, "\t"),
            "json": _json,
            "jsonl": _lines,
        }
        text = _text(where, file)
        try:
            table = readers[kind](text, wanted)
        except (ValueError, csv.Error, RecursionError) as error:
            raise ConfigError(f"{where}: {file} cannot be read as {kind}: {one_line(error)}.") from error
    if not table.records:
        raise ConfigError(f"{where}: {file} has no rows.")
    return table


def _text(where: str, file: str) -> str:
    """Return a file's text, unpacked where it ends in .gz."""
    try:
        data = Path(file).read_bytes()
        data = gzip.decompress(data) if file.endswith(".gz") else data
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: {file} is not UTF-8 at byte {error.start}: save it in that encoding.") from None
    except (OSError, EOFError) as error:
        raise ConfigError(f"{where}: {file} cannot be read: {one_line(error)}.") from error


def _delimited(text: str, wanted: Sequence[str], delimiter: str) -> _Table:
    """Return the records of a CSV file; every value is the text that is written there, an empty one is None."""
    csv.field_size_limit(2**31 - 1)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = next(lines, [])
    twice = next((column for column in header if header.count(column) > 1), None)
    if twice is not None:
        raise ValueError(f"the column {twice!r} is there twice")
    at = {column: header.index(column) for column in wanted if column in header}
    records: list[Mapping[str, Any]] = []
    numbers = []
    for number, line in enumerate((line for line in lines if line), 1):
        if len(line) > len(header):
            raise ValueError(f"row {number} has {len(line)} values, and there are {len(header)} columns")
        records.append({column: (line[i] or None) if i < len(line) else None for column, i in at.items()})
        numbers.append(number)
    return _Table(records, numbers, header, {})


def _lines(text: str, wanted: Sequence[str]) -> _Table:
    """Return the objects of a JSON lines file, numbered by their lines."""
    values, numbers = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            numbers.append(number)
    return _objects(values, numbers, wanted, "line")


def _json(text: str, wanted: Sequence[str]) -> _Table:
    """Return the objects of a JSON list, or of JSON lines."""
    try:
        value = json.loads(text)
    except ValueError as error:
        if "Extra data" not in str(error):
            raise
        return _lines(text, wanted)
    if isinstance(value, dict):
        return _lines(text, wanted) if "\n" not in text.strip() else _objects([value], [1], wanted, "row")
    if not isinstance(value, list):
        raise ValueError(f"it holds a {type(value).__name__}, expected a list of objects")
    return _objects(value, list(range(1, len(value) + 1)), wanted, "row")


def _objects(values: Sequence[Any], numbers: list[int], wanted: Sequence[str], unit: str) -> _Table:
    names: dict[str, None] = {}
    for number, value in zip(numbers, values, strict=True):
        if not isinstance(value, dict):
            raise ValueError(f"{unit} {number} holds a {type(value).__name__}, expected an object with columns")
        names.update(dict.fromkeys(value))
    records = [{column: value[column] for column in wanted if column in value} for value in values]
    return _Table(records, numbers, list(names), {})


def _parquet(where: str, file: str, wanted: Sequence[str]) -> _Table:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        opened = pa.parquet.ParquetFile(file)
        schema = opened.schema_arrow
        kept = [column for column in wanted if column in schema.names]
        columns = opened.read(columns=kept).to_pydict()
        n_rows = opened.metadata.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"{where}: {file} cannot be read as parquet: {one_line(error)}.") from error
    records = [{column: columns[column][i] for column in kept} for i in range(n_rows)]
    return _Table(records, list(range(1, n_rows + 1)), list(schema.names), _class_names(schema.metadata or {}))


def _class_names(metadata: Mapping[bytes, bytes]) -> dict[str, Sequence[str]]:
    """Return column -> class names, which the datasets library writes into a parquet file's metadata."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return {column: row["names"] for column, row in features.items() if isinstance(row, dict) and row.get("names")}


def _hub(where: str, source: str, task: Task, split: str) -> _Table:
    """Return the rows of a hub data set."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    try:
        rows = load_dataset(source, task.subset, split=split)
    except (DatasetNotFoundError, DatasetGenerationError, ConnectionError) as error:
        raise ConfigError(f"{where}: the hub does not give {source!r}: {one_line(error)}") from error
    except ValueError as error:  # an unknown subset or split
        raise ConfigError(f"{where}: the data set {source!r} cannot be read: {one_line(error)}") from error
    kept = [column for column in task.columns if column in rows.column_names]
    columns = {column: rows[column][:] for column in kept}
    records = [{column: columns[column][i] for column in kept} for i in range(len(rows))]
    names = {column: list(feature.names) for column, feature in rows.features.items() if hasattr(feature, "names")}
    return _Table(records, list(range(1, len(rows) + 1)), list(rows.column_names), names)
