"""Turns a file of rows, or a dataset of the Hub, into records that know where they stand.

CSV and TSV by the standard library, a line at a time; parquet and datasets by `pyarrow` and `datasets` (extra
`nsteer[data]`), imported where they are used. Imports neither torch nor pandas.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from nsteer.errors import Problem, did_you_mean
from nsteer.system import hub
from nsteer.system.files import opened

MAX_FIELD = 2**27
"""Characters of one field of a CSV file: a whole book is a slip, not a text."""

MAX_SAID = 20
"""Problems of one kind that are said one by one; of the rest the number is."""


class Record(NamedTuple):
    """One row: its line in the file (0 where it has none), its number from 1, and its fields by column."""

    line: int
    number: int
    fields: Mapping[str, Any]


@dataclass
class Table:
    """Rows of one file or dataset, read once, from first to last.

    columns : known before the first row of a CSV file, else as far as rows were read
    problems : what is wrong with what was read, each where it stands
    """

    name: str
    columns: dict[str, None] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    broken: bool = False
    _said: dict[str, int] = field(default_factory=dict)

    def say(self, sort: str, record: Record, column: str, actual: str, expected: str, hint: str = "") -> None:
        """One more problem of a sort; of many the first are said, and of the rest their number, by `close`."""
        self._said[sort] = self._said.get(sort, 0) + 1
        if self._said[sort] > MAX_SAID:
            return
        where = column if record.line else f"row {record.number}" + (f", {column}" if column else "")
        self.problems.append(Problem(where, actual, expected, hint, self.name, record.line, 1 if record.line else 0))

    def fail(self, actual: str, expected: str, hint: str = "", line: int = 0) -> None:
        """What is wrong with it as a whole: nothing else is said of its rows."""
        self.broken = True
        self.problems.append(Problem("", actual, expected, hint, self.name, line, 1 if line else 0))

    def lacks(self, column: str) -> None:
        """A column that no row has."""
        known = ", ".join(map(repr, self.columns)) or "nothing"
        hint = did_you_mean(column, list(self.columns))
        hint = hint if hint.startswith("did") else ""
        if len(self.columns) == 1 and (other := next((s for s in ";\t|" if s in next(iter(self.columns))), "")):
            hint = f"separator: {other!r}"
        line = 1 if self.name.lower().endswith((".csv", ".tsv")) else 0
        self.problems.append(Problem("", f"the columns {known}", f"a column {column!r}", hint, self.name, line, line))

    def close(self) -> list[Problem]:
        """Every problem, once all rows are read."""
        more = [
            Problem("", f"{count - MAX_SAID:,} more of the same kind ({sort})", "none", "", self.name)
            for sort, count in self._said.items()
            if count > MAX_SAID
        ]
        return [*self.problems, *more]


def of_file(path: Path, name: str, separator: str | None = None) -> tuple[Table, Iterator[Record]]:
    """The rows of a file, by the end of its name. What can not be read is a problem of the table."""
    table, ending = Table(name), path.suffix.lower()
    readers = {".csv": _separated, ".tsv": _separated, ".txt": _lines, ".parquet": _parquet}
    separator = separator or ("\t" if ending == ".tsv" else ",")
    return table, _guarded(table, readers.get(ending, _json)(table, path, separator))


def _guarded(table: Table, records: Iterator[Record]) -> Iterator[Record]:
    """The records, up to where the system refuses the file."""
    try:
        yield from records
    except (OSError, ValueError) as error:
        table.fail(getattr(error, "strerror", None) or str(error), "a readable file")


def _decoded(table: Table, file: BinaryIO) -> Iterator[str]:
    """The lines of a file as text; each that is no UTF-8 is a problem."""
    for number, line in enumerate(file, 1):
        if number == 1:
            if line.startswith((b"\xff\xfe", b"\xfe\xff")):
                table.fail("UTF-16 text", "UTF-8 text", "save it as UTF-8 (Excel: `CSV UTF-8`)", 1)
                return
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError as error:
            actual = f"byte {error.start + 1} of the line, {line[error.start]:#04x}, that is not"
            table.say("not UTF-8", Record(number, number, {}), "", actual, "UTF-8 text", "save the file as UTF-8")
            yield line.decode("utf-8", "replace")


def _separated(table: Table, path: Path, separator: str) -> Iterator[Record]:
    csv.field_size_limit(MAX_FIELD)
    with opened(path) as file:
        reader = csv.reader(_decoded(table, file), delimiter=separator, strict=True)
        line = number = 1
        try:
            header = next(reader, None)
            if header is None:
                if not table.broken:
                    table.fail("an empty file", "a line with the names of the columns")
                return
            if twice := [column for i, column in enumerate(header) if column in header[:i]]:
                table.fail(f"the column {twice[0]!r} twice", "each column once", line=1)
                return
            table.columns.update(dict.fromkeys(header))
            line, number = reader.line_num + 1, 0
            for fields in reader:
                here, line = line, reader.line_num + 1
                if not fields:
                    continue
                number += 1
                if len(fields) != len(header):
                    record = Record(here, number, {})
                    table.say("ragged", record, "", f"{len(fields)} fields", f"the header's {len(header)}", RAGGED)
                    continue
                yield Record(here, number, dict(zip(header, fields, strict=True)))
        except csv.Error as error:
            table.fail(f"{error}", "CSV: a field that holds quotes or line ends stands in quotes", line=line)


RAGGED = "a field that holds the separator stands in quotes"


def _json(table: Table, path: Path, separator: str) -> Iterator[Record]:
    with opened(path) as file:
        number = 0
        for line, text in enumerate(_decoded(table, file), 1):
            if not text.strip():
                continue
            number += 1
            try:
                fields = json.loads(text)
            except (ValueError, RecursionError) as error:
                words = str(error).split(": ")[0].lower()
                record = Record(line, number, {})
                table.say("no JSON", record, "", words, "one JSON object a line")
                continue
            if not isinstance(fields, dict):
                table.say("no object", Record(line, number, {}), "", text.strip()[:40], "one JSON object a line")
                continue
            table.columns.update(dict.fromkeys(fields))
            yield Record(line, number, fields)


def _lines(table: Table, path: Path, separator: str) -> Iterator[Record]:
    table.columns["text"] = None
    with opened(path) as file:
        number = 0
        for line, text in enumerate(_decoded(table, file), 1):
            if text.strip():
                number += 1
                yield Record(line, number, {"text": text.rstrip("\r\n")})


WANTED = "pip install 'nsteer[data]'"


def _parquet(table: Table, path: Path, separator: str) -> Iterator[Record]:
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError:
        table.fail("no pyarrow", "it installed, to read parquet", WANTED)
        return
    with opened(path) as file:
        try:
            whole = parquet.ParquetFile(file)
            table.columns.update(dict.fromkeys(whole.schema_arrow.names))
            number = 0
            for batch in whole.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield Record(0, number, fields)
        except arrow.ArrowException as error:
            table.fail(str(error).splitlines()[0], "a parquet file")


def of_hub(
    name: str, config: str | None = None, revision: str | None = None, split: str | None = None
) -> tuple[Table, Iterator[Record]]:
    """The rows of a dataset of the Hub, or of a folder with one. What can not be had is a problem of the table."""
    table = Table(name)
    return table, _dataset(table, name, config, revision, split or "train")


def _dataset(table: Table, name: str, config: str | None, revision: str | None, split: str) -> Iterator[Record]:
    try:
        import datasets
    except ImportError:
        table.fail("no package datasets", "it installed, to read datasets of the Hub", WANTED)
        return
    try:
        dataset = _loaded(datasets, name, config, revision, split)
    except Exception as error:  # no network, no such dataset, revision or split, files that are none: kinds of its own
        words = (str(error) or type(error).__name__).splitlines()[0]
        table.fail(words[:200], "a dataset that can be read", _hint(name))
        return
    table.columns.update(dict.fromkeys(dataset.column_names))
    for number, fields in enumerate(dataset, 1):
        yield Record(0, number, fields)


def _hint(name: str) -> str:
    return "" if os.path.isdir(name) or hub.reachable() else "the hub does not answer, and it was not fetched before"


def _loaded(datasets: Any, name: str, config: str | None, revision: str | None, split: str) -> Any:
    """A split of a dataset. Raises what `datasets` raises, and LookupError for a split that a saved one lacks."""
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    if any(os.path.isfile(os.path.join(name, file)) for file in ("state.json", "dataset_dict.json")):
        saved = datasets.load_from_disk(name)
        if not isinstance(saved, dict):
            return saved
        if split not in saved:
            raise LookupError(f"no split {split!r}; it has {', '.join(saved)}")
        return saved[split]
    with contextlib.nullcontext() if os.path.isdir(name) or hub.reachable() else hub.offline(datasets.config):
        return datasets.load_dataset(name, config, revision=revision, split=split)
