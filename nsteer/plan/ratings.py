"""Turns filled-in tables of blind raters, with the key that was kept apart, into scores of texts by concept.

    found = ratings.read(["ratings.csv", "ratings-2.csv"], "ratings.key.csv")
    found.of(text, "happy")                     # mean of the raters in 0 .. 1, or None where nobody rated it
    found.agreement                             # of two raters: Spearman's correlation over what both rated

`nsteer export STORE --format raters` writes the tables and the key. A table is data: nothing of it is run.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsteer.errors import ExchangeError, did_you_mean, printable

LOW, HIGH = 0.0, 100.0
"""What a rater may write: from not at all to entirely."""

KEYLESS = ("text", "concept", "score")
TABLE = ("id", "concept", "prompt", "text", "score")
LABELS = ("group", "model", "op", "layer_set", "method", "label", "strength", "control", "prompt", "seed")
KEY = ("id", "concept", "text_sha256", *LABELS)
MAX_BYTES = 64 * 2**20
"""Bytes of a table that are read."""


@dataclass(frozen=True)
class Ratings:
    """Scores of texts: (sha256 of the text, concept) -> one score a rater, each in 0 .. 1; agreement of raters."""

    scores: Mapping[tuple[str, str], tuple[float, ...]]
    raters: int
    agreement: float

    def of(self, text: str, concept: str) -> float | None:
        """The mean of what raters said of a text; None where nobody rated it."""
        scores = self.scores.get((digest(text), concept))
        return sum(scores) / len(scores) if scores else None

    @property
    def concepts(self) -> list[str]:
        """The concepts that were asked about."""
        return list(dict.fromkeys(concept for _, concept in self.scores))


def digest(text: str) -> str:
    """What a text is known by in a key: a spreadsheet may change line ends and spaces, so these do not count."""
    return hashlib.sha256(" ".join(printable(text).split()).encode("utf-8", "backslashreplace")).hexdigest()


def read(tables: Sequence[str | os.PathLike], key: str | os.PathLike, partly: bool = False) -> Ratings:
    """The scores of one or several raters, joined with the key. `partly`: rows without a score are left out.

    Raises ExchangeError that names every problem by file and line: a row that is not in the key, is missing, stands
    twice, has another text or concept than was sent out, no score, none that is a number, or one out of range.
    """
    problems: list[str] = []
    known = {row["id"]: row for _, row in _rows(key, KEY, problems)}
    each: list[dict[str, float]] = []
    for table in tables:
        each.append(_rater_scores(table, known, partly, problems))
    if problems:
        raise ExchangeError("\n".join(problems))
    ratings: dict[tuple[str, str], list[float]] = {}
    for given in each:
        for name, score in given.items():
            row = known[name]
            ratings.setdefault((row["text_sha256"], row["concept"]), []).append((score - LOW) / (HIGH - LOW))
    return Ratings({pair: tuple(scores) for pair, scores in ratings.items()}, len(each), _agreement(each))


def read_keyless(tables: Sequence[str | os.PathLike]) -> Ratings:
    """The scores of tables that need no key: rows of `text`, `concept` and `score`. Rows without a score are left out.

    Raises ExchangeError as `read` does.
    """
    problems: list[str] = []
    each: list[dict[Any, float]] = []
    for table in tables:
        scores: dict[Any, float] = {}
        for line, row in _rows(table, KEYLESS, problems):
            pair = digest(row["text"]), row["concept"]
            if pair in scores:
                problems.append(f"{table}:{line}: text: {row['text'][:40]!r} stands twice for {row['concept']!r}")
            else:
                _score(f"{table}:{line}", row["score"], True, pair, scores, problems)
        each.append(scores)
    if problems:
        raise ExchangeError("\n".join(problems))
    ratings: dict[tuple[str, str], list[float]] = {}
    for given in each:
        for pair, score in given.items():
            ratings.setdefault(pair, []).append((score - LOW) / (HIGH - LOW))
    return Ratings({pair: tuple(scores) for pair, scores in ratings.items()}, len(each), _agreement(each))


def of_plan(tables: Sequence[str], key: str | None, folder: Path) -> Ratings:
    """The scores of the tables that a plan in a folder names, with the key where there is one. Raises ExchangeError."""
    files = [path_beside(folder, table) for table in tables]
    ratings = read_keyless(files) if key is None else read(files, path_beside(folder, key), partly=True)
    if not ratings.scores:
        raise ExchangeError(f"{', '.join(map(str, files))}: no row has a score")
    return ratings


def path_beside(folder: Path, name: str) -> Path:
    """A file that a plan names: in the plan's folder, else from where one stands."""
    return folder / name if (folder / name).is_file() else Path(name)


def _rater_scores(
    path: str | os.PathLike, known: Mapping[str, dict], partly: bool, problems: list[str]
) -> dict[str, float]:
    """Row -> score of one rater's table; what is wrong with it is added to `problems`."""
    scores: dict[str, float] = {}
    seen: dict[str, int] = {}
    for line, row in _rows(path, TABLE, problems):
        where, name = f"{path}:{line}", row["id"]
        if name not in known:
            problems.append(f"{where}: id: {name!r} is not in the key; {did_you_mean(name, list(known)[:50])}")
        elif name in seen:
            problems.append(f"{where}: id: {name!r} stands twice, first in line {seen[name]}")
        elif (row["concept"], digest(row["text"])) != (known[name]["concept"], known[name]["text_sha256"]):
            problems.append(f"{where}: {name!r} has another text or concept than was sent out; fill in `score` alone")
        else:
            _score(where, row["score"], partly, name, scores, problems)
        seen.setdefault(name, line)
    missing = [name for name in known if name not in seen]
    if missing and not partly:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        problems.append(f"{path}: rows that were sent out are missing: {', '.join(missing[:5])}{more}")
    return scores


def _score(where: str, text: str, partly: bool, name: Any, scores: dict[Any, float], problems: list[str]) -> None:
    if not text.strip():
        if not partly:
            problems.append(f"{where}: score: expected a number from {LOW:g} to {HIGH:g}, found nothing")
        return
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not LOW <= score <= HIGH:
        problems.append(f"{where}: score: expected a number from {LOW:g} to {HIGH:g}, found {text.strip()!r}")
    else:
        scores[name] = score


def _rows(path: str | os.PathLike, columns: Sequence[str], problems: list[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of a CSV that has these columns; what is wrong with the file is added to `problems`."""
    try:
        file = Path(path)
        if not file.is_file() or file.stat().st_size > MAX_BYTES:
            raise OSError(f"no such file, or one of more than {MAX_BYTES >> 20} MiB")
        text = file.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problems.append(f"{path}: can not be read as a table: {error}")
        return
    reader = csv.DictReader(io.StringIO(text, newline=""), restval="")
    try:
        lacking = [column for column in columns if column not in (reader.fieldnames or [])]
        if lacking:
            problems.append(f"{path}:1: expected the columns {', '.join(columns)}; {', '.join(lacking)} missing")
            return
        for row in reader:
            bare = {name: str(row[name] or "") for name in columns}
            yield reader.line_num, {name: _bare(value) for name, value in bare.items()}
    except csv.Error as error:
        problems.append(f"{path}:{reader.line_num}: {error}")


def _bare(value: str) -> str:
    """A field without the apostrophe that keeps a spreadsheet from taking it for a formula."""
    return value[1:] if len(value) > 1 and value[0] == "'" and value[1] in FORMULAS else value


FORMULAS = "=+-@\t\r'"
"""What a spreadsheet takes for a formula, or takes away."""


def guarded(value: str) -> str:
    """A field that no spreadsheet takes for a formula; `read` takes the apostrophe away again."""
    return f"'{value}" if value and value[0] in FORMULAS else value


def _agreement(each: Iterable[Mapping[Any, float]]) -> float:
    """Spearman's correlation of the first two raters over what both rated; NaN for fewer than three, or one rater."""
    first, second = (*each, {}, {})[:2]
    both = [name for name in first if name in second]
    if len(both) < 3:
        return math.nan
    a, b = (_ranks([scores[name] for name in both]) for scores in (first, second))
    mean = (len(both) + 1) / 2
    top = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    scale = math.sqrt(sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b))
    return top / scale if scale else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1, equal values sharing the mean of theirs."""
    order = sorted(values)
    return [order.index(v) + (order.count(v) + 1) / 2 for v in values]
