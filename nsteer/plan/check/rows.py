"""Takes the texts that a plan names in files and datasets into it, and says what they lack, where it stands.

From then on a plan holds its texts, wherever they came from: what is computed of them is known by their content.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from nsteer.errors import Problem, did_you_mean
from nsteer.plan import placeholders, reader, rows
from nsteer.plan.check.base import Checker
from nsteer.plan.reader import Path
from nsteer.plan.rows import Record, Table
from nsteer.plan.schema import Calibrated, Contrast, Dataset, Direction, Plan, Responses, Rows, Steer
from nsteer.plan.schema.datasets import ENDINGS, RESERVED, conversation
from nsteer.plan.texts import TextSet
from nsteer.science.presets import NEUTRAL
from nsteer.system.fingerprints import fingerprint

LABEL = 64
"""Characters of a value that are shown of one that is told by."""


@dataclass(frozen=True)
class Taken:
    """What one place of a plan took of a file or dataset.

    name : of the file or dataset; records: where each row stands in it
    texts : by the name that the plan gives them (`text`, `positive`, …), one a row
    columns : name of a coordinate -> values, one a row
    """

    name: str
    records: list[Record]
    labels: list[str]
    texts: dict[str, list[Any]]
    columns: dict[str, list[str]]


def spelled(value: Any) -> str:
    """A value of a column as text: `1` for 1.0, `true` for True."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _same(value: Any) -> str:
    """What two values have in common that a plan means by one word: `True` of a CSV file is YAML's true."""
    text = spelled(value)
    return text.lower() if text.lower() in ("true", "false") else text


def checked_rows(check: Checker, path: Path, spec: Rows, wanted: Mapping[str, Any], label: str = "") -> Taken | None:
    """The rows of a dataset, each with the texts `wanted` (name -> column, template or turns); None where some lack.

    label : what names a row: a column, or the row's number where empty
    """
    where = _table(check, path, spec)
    if where is None:
        return None
    table, records = where
    given = {name: _columns_of(what) for name, what in wanted.items()}
    columns = [column for columns in given.values() for column in columns]
    asked = [*dict.fromkeys([*columns, *([label] if label else []), *spec.columns.values()])]
    filters = {column: {_same(label) for label in _many(value)} for column, value in (spec.where or {}).items()}
    selection = Taken(table.name, [], [], {name: [] for name in wanted}, {name: [] for name in spec.columns})
    seen: dict[str, set[str]] = {column: set() for column in filters}
    read = 0
    for record in records:
        read += 1
        for column, values in seen.items():
            if column in record.fields and len(values) < 50:
                values.add(_same(record.fields[column]))
        if any(_same(record.fields.get(column)) not in values for column, values in filters.items()):
            continue
        if any(column in table.columns and column not in record.fields for column in asked):
            gone = next(column for column in asked if column in table.columns and column not in record.fields)
            table.say("lacks a column", record, gone, "nothing", f"a field {gone!r}, as other rows have")
            continue
        if all(column in record.fields for column in asked):
            _take(table, record, spec, wanted, given, label, selection)
        if spec.limit is not None and len(selection.labels) >= spec.limit:
            break
    absent = [column for column in [*asked, *filters] if column not in table.columns]
    if read and not table.broken:
        for column in absent:
            table.lacks(column)
    problems = table.close()
    check.problems += problems
    if problems:
        return None
    if not selection.labels:
        known = "; ".join(f"{column}: {', '.join(sorted(values)[:6])}" for column, values in seen.items())
        check.add(path, f"no row of {table.name}" + (" that `where` lets through" if filters else ""), "rows", known)
        return None
    return selection


def _many(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _columns_of(what: Any) -> list[str]:
    """The columns that a text of a row is made of."""
    return placeholders.named(what) or ([] if isinstance(what, list) else [what])


def _take(
    table: Table,
    record: Record,
    spec: Rows,
    wanted: Mapping[str, Any],
    given: Mapping[str, list[str]],
    label: str,
    selection: Taken,
) -> None:
    """Adds what a record gives, or says what it lacks."""
    texts, whole = {}, True
    for name, what in wanted.items():
        for column in given[name]:
            value = record.fields[column]
            if not spelled(value).strip():
                table.say("empty", record, column, "an empty text", "text")
                whole = False
            elif isinstance(value, list | dict) and what == column:
                whole = _is_conversation(table, record, column, value) and whole
            elif isinstance(value, list | dict | bytes) or (what == column and not isinstance(value, str)):
                table.say("no text", record, column, reader.kind(value), "text")
                whole = False
        texts[name] = what
    if label and not spelled(record.fields[label]).strip():
        table.say("no label", record, label, "nothing", "a label")
        whole = False
    if not whole:
        return
    for name, what in texts.items():
        selection.texts[name].append(_filled(what, record.fields))
    selection.records.append(record._replace(fields={}))
    selection.labels.append(spelled(record.fields[label]) if label else str(record.number))
    for name, column in spec.columns.items():
        selection.columns[name].append(spelled(record.fields[column]))


def _is_conversation(table: Table, record: Record, column: str, value: Any) -> bool:
    try:
        conversation(value)
    except Exception as error:
        context = getattr(error, "context", None) or {}
        actual, expected = context.get("found", reader.kind(value)), context.get("expected", "turns")
        table.say("no conversation", record, column, actual, expected)
        return False
    return True


def _filled(what: Any, fields: Mapping[str, Any]) -> Any:
    if isinstance(what, list) or placeholders.named(what):
        return placeholders.filled(what, {name: spelled(value) for name, value in fields.items()})
    return fields[what]


def _table(check: Checker, path: Path, spec: Rows) -> tuple[Table, Iterable[Record]] | None:
    """The rows that a place of the plan names; None where its own fields are wrong."""
    before = len(check.problems)
    if (spec.file is None) == (spec.hub is None):
        check.add(path, "both" if spec.file else "neither", "exactly one of `file` and `hub`")
        return None
    for field in ("config", "revision", "split"):
        if spec.file is not None and getattr(spec, field) is not None:
            check.add((*path, field), str(getattr(spec, field)), "it with `hub` only")
    for name in spec.columns:
        if not name.isidentifier() or name in RESERVED:
            actual = f"{name!r}, which the store uses itself" if name in RESERVED else repr(name)
            check.add((*path, "columns"), actual, "names of letters, digits and '_'", "columns: {name: column}")
    if spec.separator is not None and not (spec.file or "").lower().endswith(".csv"):
        check.add((*path, "separator"), repr(spec.separator), "it with `.csv` only")
    if spec.hub is not None:
        name = _located(check, spec.hub)
        if os.path.isdir(name) and not check.document.may_read(FilePath(name)):
            check.add((*path, "hub"), f"{spec.hub!r}, outside", reader.WITHIN, reader.OUTSIDE)
        return rows.of_hub(name, spec.config, spec.revision, spec.split) if len(check.problems) == before else None
    assert spec.file is not None
    place = _named(check, path, "file")
    if not spec.file.lower().endswith(ENDINGS):
        check.add(place, repr(spec.file), f"a file that ends in {', '.join(ENDINGS)}")
        return None
    name = _located(check, spec.file)
    if not os.path.isfile(name):
        check.add(place, f"{spec.file!r}, which does not exist", "a file, from the plan's folder or where you stand")
    elif not check.document.may_read(FilePath(name)):
        check.add(place, f"{spec.file!r}, outside", reader.WITHIN, reader.OUTSIDE)
    return rows.of_file(FilePath(name), name, spec.separator) if len(check.problems) == before else None


def _named(check: Checker, path: Path, field: str) -> Path:
    """Where a plan names a file: the name alone may stand for the mapping."""
    return (*path, field) if isinstance(check.node(path), dict) else path


def _located(check: Checker, name: str) -> str:
    """A name from where one stands, else from the plan's folder."""
    beside = os.path.join(os.path.dirname(check.document.file), name)
    return beside if not os.path.exists(name) and os.path.exists(beside) else name


# ---- the places of a plan ---------------------------------------------------------------------------------------


def all_datasets(check: Checker, plan: Plan) -> Plan:
    """The plan with the texts of every dataset in its place. What can not be had is left out, its problems said."""
    changed: dict[str, Any] = {}
    if isinstance(plan.prompts, Dataset):
        changed["prompts"] = _prompts(check, ("prompts",), plan.prompts)
    if plan.steer:
        changed["steer"] = [_steer_entry(check, i, entry) for i, entry in enumerate(plan.steer)]
    if plan.tune is not None and isinstance(plan.tune.held_out.prompts, Dataset):
        held = _prompts(check, ("tune", "held_out", "prompts"), plan.tune.held_out.prompts)
        held_out = plan.tune.held_out.model_copy(update={"prompts": held})
        changed["tune"] = plan.tune.model_copy(update={"held_out": held_out})
    if plan.directions:
        changed["directions"] = {
            name: _direction(check, name, direction) for name, direction in plan.directions.items()
        }
    return plan.model_copy(update=changed) if changed else plan


STAND_IN = {"-": "-"}
"""Prompts in place of those that can not be had: their problems are said, and other ones still found."""


def _prompts(check: Checker, path: Path, spec: Dataset, kept: Path = ()) -> dict[str, Any]:
    """Prompts by label: the column `id`, or the number of the row. `kept`: their path in the plan, where another."""
    if spec.label is not None:
        check.add((*path, "label"), repr(spec.label), "no `label` among prompts", "`id` names them, `columns` go along")
    selection = checked_rows(check, path, spec, {"text": spec.text}, spec.id or "")
    if selection is None:
        check.failed.add(check.original(path))
        return STAND_IN
    prompts = dict(zip(selection.labels, selection.texts["text"], strict=True))
    if len(prompts) < len(selection.labels):
        twice, times = Counter(selection.labels).most_common(1)[0]
        check.add(
            (*path, "id"), f"{twice[:LABEL]!r} {times} times in {selection.name}", "a name of its own for each row"
        )
        return STAND_IN
    for name, values in selection.columns.items():
        check.beside.setdefault(name, {}).update(zip(selection.labels, values, strict=True))
    check.named[kept or path] = described(spec, prompts)
    return prompts


def described(spec: Rows, contents: Any) -> dict[str, Any]:
    """A dataset as results tell of it: as the plan has it, how many texts came of it, and a fingerprint of them."""
    what = spec.model_dump(mode="json", exclude_unset=True)
    taken = {side: len(texts) for side, texts in contents.items()} if isinstance(spec, Contrast) else len(contents)
    return {**what, "taken": taken, "fingerprint": fingerprint(contents)}


def _steer_entry(check: Checker, place: int, entry: Steer) -> Steer:
    path, kept = check.steer_path(place), ("steer", place)
    changed: dict[str, Any] = {}
    if isinstance(entry.prompts, Dataset):
        changed["prompts"] = _prompts(check, (*path, "prompts"), entry.prompts, (*kept, "prompts"))
    spec = entry.strengths
    if isinstance(spec, Calibrated) and isinstance(spec.prompts, Dataset):
        where = ("strengths", "prompts")
        prompts = _prompts(check, (*path, *where), spec.prompts, (*kept, *where))
        changed["strengths"] = spec.model_copy(update={"prompts": prompts})
    return entry.model_copy(update=changed) if changed else entry


def _direction(check: Checker, name: str, direction: Direction) -> Direction:
    path: Path = ("directions", name)
    if direction.mean is not None and isinstance(direction.mean.texts, Dataset):
        texts = _texts(check, (*path, "mean", "texts"), direction.mean.texts)
        check.named[(*path, "mean", "texts")] = described(direction.mean.texts, texts)
        return direction.model_copy(update={"mean": direction.mean.model_copy(update={"texts": texts})})
    if direction.contrast is not None:
        sides = _sides(check, (*path, "contrast"), direction.contrast)
        if direction.contrast.outside:
            check.named[(*path, "contrast")] = described(direction.contrast, sides)
        for side in ("positive", "negative"):
            if isinstance(spec := getattr(direction.contrast, side), Dataset):
                check.named[(*path, "contrast", side)] = described(spec, sides[side])
        own = {name: getattr(direction.contrast, name) for name in ("preset", "filter", "pooling", "chat")}
        arguments: dict[str, Any] = {
            **sides,
            **own,
            "generate": _questions(check, (*path, "contrast"), direction.contrast),
        }
        return direction.model_copy(update={"contrast": Contrast.model_construct(**arguments)})
    return direction


def _questions(check: Checker, path: Path, spec: Contrast) -> Responses | None:
    """How a contrast's texts are written, with its questions in place of the dataset that they come from."""
    how = spec.generate
    if how is None or not isinstance(how.questions, Dataset):
        return how
    place: Path = (*path, "generate", "questions")
    questions = _texts(check, place, how.questions)
    check.named[place] = described(how.questions, questions)
    return how.model_copy(update={"questions": questions})


def _texts(check: Checker, path: Path, spec: Dataset) -> list[Any]:
    for field in ("label", "id"):
        if getattr(spec, field) is not None:
            check.add((*path, field), repr(getattr(spec, field)), f"no `{field}` here: all rows are alike")
    selection = checked_rows(check, path, spec, {"text": spec.text})
    return ["-"] if selection is None else selection.texts["text"]


def _sides(check: Checker, path: Path, spec: Contrast) -> dict[str, list[Any]]:
    """The texts of both sides of a contrast."""
    sides = {"positive": spec.positive, "negative": spec.negative}
    stand_in = {side: ["-"] for side in sides}
    if not spec.outside:
        own = {"preset", "generate", "filter", "pooling", "chat"}
        if rest := sorted((Contrast.model_fields.keys() & spec.model_fields_set) - {*sides, *own}):
            check.add((*path, rest[0]), "it without rows", "`file` or `hub` beside it", f"{rest[0]} is of rows")
        return {side: _own(check, (*path, side), texts) for side, texts in sides.items()}
    if bad := [side for side, what in sides.items() if isinstance(what, Dataset)]:
        check.add((*path, bad[0]), "a file within rows", "a column, or a value of `label`")
        return stand_in
    if spec.label is not None:
        return _labelled(check, path, spec, sides) or stand_in
    wrong = [side for side, what in sides.items() if not _is_what(what)]
    for side in wrong:
        actual = reader.kind(sides[side])
        check.add((*path, side), actual, "a column, a text with {column}, or turns", "`label` names a column of values")
    if spec.text is not None and not wrong:
        check.add((*path, "text"), "text, without `label`", "`positive` and `negative` alone: they name the texts")
    rows_of = None if wrong else checked_rows(check, path, spec, sides)
    return stand_in if rows_of is None else rows_of.texts


def _own(check: Checker, path: Path, texts: Any) -> list[Any]:
    if isinstance(texts, Dataset):
        return _texts(check, path, texts)
    if isinstance(texts, list) and not (texts and isinstance(texts[0], dict)):
        return texts
    check.add(path, reader.kind(texts), "a list of texts, or a file of them", "`file` says whose column it is")
    return ["-"]


def _is_what(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _labelled(check: Checker, path: Path, spec: Contrast, sides: Mapping[str, Any]) -> dict[str, list[Any]] | None:
    """The rows of two values of a column. Rows of a third are a problem: `where` says what is meant."""
    assert spec.label is not None
    for side, value in sides.items():
        if isinstance(value, list):
            check.add((*path, side), reader.kind(value), f"a value of the column {spec.label!r}")
            return None
    values = {side: _same(value) for side, value in sides.items()}
    if len(set(values.values())) < len(values):
        check.add((*path, "negative"), f"{values['negative']!r} on both sides", "another value")
        return None
    selection = checked_rows(check, path, spec, {"text": spec.text or "text"}, spec.label)
    if selection is None:
        return None
    labels = list(map(_same, selection.labels))
    have = list(dict.fromkeys(labels))
    for side, value in values.items():
        if value not in have:
            hint = did_you_mean(value, have)
            check.add((*path, side), f"{value!r}, which no row has", f"a value of {spec.label!r}", hint)
    for label in [label for label in have if label not in values.values()][: rows.MAX_SAID]:
        first, count = selection.records[labels.index(label)], labels.count(label)
        where = spec.label if first.line else f"row {first.number}, {spec.label}"
        unknown = f"{label[:LABEL]!r}" + (f" (and in {count - 1:,} rows more)" if count > 1 else "")
        either = " or ".join(map(repr, values.values()))
        hint = f"where: {{{spec.label}: [{', '.join(values.values())}]}} leaves other rows out"
        check.problems.append(Problem(where, unknown, either, hint, selection.name, first.line, int(first.line > 0)))
    return {
        side: [text for text, label in zip(selection.texts["text"], labels, strict=True) if label == value]
        for side, value in values.items()
    }


def text_set(check: Checker, path: Path, spec: Dataset) -> TextSet | None:
    """The text set that labelled rows make: its labels are its emotions, its texts their passages."""
    if spec.label is None:
        check.add(path, "no `label`", LABELLED, LABELLED_HINT)
        return None
    if spec.id is not None:
        check.add((*path, "id"), repr(spec.id), "no `id` here: texts are counted within their label")
    selection = checked_rows(check, path, spec, {"text": spec.text}, spec.label)
    if selection is None:
        return None
    passages: dict[str, list[Any]] = {}
    for i, (label, text) in enumerate(zip(selection.labels, selection.texts["text"], strict=True)):
        passages.setdefault(label, []).append(text)
        for name, values in selection.columns.items():
            check.beside_passages.setdefault(name, {}).setdefault(label, []).append(values[i])
    neutral = passages.pop(NEUTRAL, [])
    name = os.path.basename(spec.file or spec.hub or "")
    return TextSet(name=name, emotions=dict.fromkeys(passages, "other"), passages=passages, neutral_passages=neutral)


LABELLED = "the column that says what each text shows"
LABELLED_HINT = f"texts: {{file: …, text: …, label: …}}; rows of the label {NEUTRAL!r} are the neutral ones"
