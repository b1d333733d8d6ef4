"""Turns YAML text into JSON data in which every node knows its file, line and column.

YAML 1.2 (ruamel): `1e-3` is a number, `no` is text, a key given twice is an error, one document a file.
Reading imports neither torch nor xarray.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path as FilePath
from typing import Any, NamedTuple

from nsteer.errors import PlanError, Problem, masked
from nsteer.plan import named
from nsteer.system.files import content

Path = tuple[str | int, ...]

MAX_BYTES = 16 * 2**20
MAX_VALUES = 200_000
MAX_LEVELS = 60
"""What a document may hold. Aliases of aliases make a few lines into more values than memory holds."""


class Mark(NamedTuple):
    """Where a node stands: file, 1-based line, 1-based column."""

    file: str
    line: int
    column: int


@dataclass(frozen=True)
class Document:
    """JSON data, the text it came from and the marks of its nodes.

    `values[path]` is where the value begins, `keys[path]` where its key does (mapping entries only). `anywhere` and
    `host` are the word of who uses it: whether it may name files outside, and the NDIF server that they trust.

    problems : what is wrong with it as YAML, and hides nothing else: keys given twice, whose first value holds; tags
    refused : paths whose data is not to be looked at for it
    """

    data: Any
    text: str
    file: str
    values: Mapping[Path, Mark] = field(default_factory=dict)
    keys: Mapping[Path, Mark] = field(default_factory=dict)
    bases: tuple[str, ...] = ()
    anywhere: bool = False
    host: str | None = None
    problems: tuple[Problem, ...] = ()
    refused: frozenset[Path] = frozenset()

    def may_read(self, target: FilePath) -> bool:
        """Whether the document may name this file: below its own folder or the one where one stands, links followed."""
        return self.anywhere or _below(target, [FilePath(self.file).parent, FilePath()])

    def mark(self, path: Path, key: bool = False) -> Mark:
        """The mark of `path`, or of its nearest ancestor that the text holds."""
        for end in range(len(path), -1, -1):
            where = path[:end]
            for table in (self.keys, self.values) if key else (self.values, self.keys):
                if where in table:
                    return table[where]
        return Mark(self.file, 1, 1)

    def problem(self, path: Path, actual: str, expected: str, hint: str = "", key: bool = False) -> Problem:
        """A Problem located at `path`."""
        file, line, column = self.mark(path, key)
        return Problem(spell(path), actual, expected, hint, file, line, column)


def spell(path: Path) -> str:
    """`("steer", "strengths", 0)` as a person writes it: `steer.strengths[0]`."""
    text = ""
    for key in path:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


def unspell(text: str) -> Path:
    """`steer.strengths[0]` (or `steer.strengths.0`) as a path; a quoted key may hold dots.

    Raises LookupError for text that is no path.
    """
    if not re.fullmatch(r'("[^"]+"|[^.\[\]"]+)(\[\d+\]|\."[^"]+"|\.[^.\[\]"]+)*', text):
        raise LookupError(repr(text))
    matches = re.findall(r'"([^"]*)"|\[(\d+)\]|([^.\[\]"]+)', text)
    return tuple(quoted or (int(i) if i else int(word) if word.isdecimal() else word) for quoted, i, word in matches)


def read(file: str | FilePath, anywhere: bool = False, strict: bool = True) -> Document:
    """The document in `file`, built on the one its `extends:` names (maps merge, all else replaces).

    anywhere : whether it may name files outside its own folder and the one where one stands
    strict : as in `parse`
    Raises PlanError when a file can not be read, is not UTF-8 or not YAML, or extends itself.
    """
    document = replace(_read(FilePath(file), (), anywhere), anywhere=anywhere)
    if document.problems and strict:
        raise PlanError(document.problems)
    return document


def _below(target: FilePath, folders: Iterable[FilePath]) -> bool:
    try:
        return any(target.resolve().is_relative_to(folder.resolve()) for folder in folders)
    except (OSError, RuntimeError, ValueError):  # links in a circle, a NUL in the name: it is nowhere
        return False


def parse(text: str, file: str = "<plan>", strict: bool = True) -> Document:
    """YAML text as a Document.

    strict : whether a key given twice, or what is no JSON data, raises; else it is in `problems`
    Raises PlanError with every one of these, or the first syntax error, or for what holds too much.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    def too_much(what: str) -> PlanError:
        return PlanError([Problem("", what, "a document that a person could have written", "", file)])

    if len(text) > MAX_BYTES:
        raise too_much(f"{len(text):,} characters")
    yaml = YAML(typ="safe", pure=True)
    yaml.composer.warn_double_anchors = False  # an anchor given again is YAML: the later holds
    try:
        node = yaml.compose(text)
    except RecursionError:
        raise too_much("collections nested too deep") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        context = f" {error.context}" if error.context else ""
        actual = f"a syntax error: {error.problem}{context}"
        raise PlanError([Problem("", actual, "valid YAML", "", file, line, column)]) from None
    except YAMLError as error:  # a character that YAML does not allow
        before = text[: getattr(error, "position", 0)]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise PlanError([Problem("", str(error).splitlines()[0], "valid YAML", "", file, line, column)]) from None
    if node is None:
        return Document({}, text, file)
    builder = _Builder(file, yaml.constructor)
    try:
        data = builder.build(node, ())
    except _TooMuch as error:
        raise too_much(str(error)) from None
    if builder.problems and strict:
        raise PlanError(builder.problems)
    problems, refused = tuple(builder.problems), frozenset(builder.refused)
    return Document(data, text, file, builder.values, builder.keys, problems=problems, refused=refused)


def override(document: Document, settings: Iterable[str], strict: bool = True) -> Document:
    """`document` with `--set path=value` applied in order; a value is read as YAML.

    strict : whether a setting that can not be applied raises; else it is in `problems`
    Raises PlanError for a setting without `=`, a path through a scalar, an index out of its list, or `extends`.
    """
    problems: list[Problem] = []
    for setting in settings:
        place = f"--set {masked(setting)}"
        name, equals, text = setting.partition("=")
        if not equals or not name.strip():
            problems.append(Problem("", repr(setting), "path=value", "e.g. --set 'steer.strengths=[0.1,0.2]'", place))
            continue
        try:
            value = parse(text, place).data if text.strip() else None
            path = _keyed(document.data, unspell(name.strip()))
            data = _put(document.data, path, value)
        except PlanError as error:
            problems.extend(error.problems)
        except (LookupError, TypeError) as error:
            problems.append(Problem(name.strip(), str(error.args[0]), "a path that the plan has", "", place))
        else:
            if path[0] == "extends":
                problems.append(Problem("extends", repr(value), "it in the plan's file only", "", place))
            values, keys = (
                {p: mark for p, mark in table.items() if p[: len(path)] != path}
                for table in (document.values, document.keys)
            )
            refused = frozenset(p for p in document.refused if p[: len(path)] != path)
            values[path] = Mark(place, 0, 0)
            document = replace(document, data=data, values=values, keys=keys, refused=refused)
    if problems and strict:
        raise PlanError(problems)
    return replace(document, problems=(*document.problems, *problems))


def at_host(document: Document, host: str) -> Document:
    """`document` with the NDIF server that its user names, whatever it says itself; the address is shown nowhere."""
    path: Path = ("remote", "host")
    try:
        data = _put(document.data, path, host)
    except TypeError:  # `remote` is no mapping, as the check of its form says
        data = document.data
    values = {**document.values, path: Mark("--host", 0, 0)}
    return replace(document, data=data, values=values, host=host)


def _resolved(path: FilePath) -> FilePath:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):
        return path


def _read(file: FilePath, above: tuple[FilePath, ...], anywhere: bool) -> Document:
    try:
        text = _text(file)
    except UnicodeDecodeError as error:
        raise PlanError([Problem("", f"byte {error.start} that is not", "UTF-8 text", "", str(file))]) from None
    return extended(parse(text, str(file), strict=False), anywhere, above)


def extended(document: Document, anywhere: bool = False, above: tuple[FilePath, ...] = ()) -> Document:
    """`document` over the plan that its `extends:` names, a path from its own folder; itself where it names none.

    anywhere : whether that may lie outside. above : the files that extend this one
    Raises PlanError for a document that is no mapping, and for a plan that can not be used or leads back here.
    """
    if not isinstance(document.data, dict):
        raise PlanError([document.problem((), kind(document.data), "a mapping of plan fields")])
    file = FilePath(document.file)
    base = document.data.get("extends")
    if base is None:
        return document
    if not isinstance(base, str):
        raise PlanError([document.problem(("extends",), kind(base), "the path of a plan")])
    target = file.parent / base
    if not (anywhere or _below(target, [(above or (file,))[0].parent, FilePath()])):
        raise PlanError([document.problem(("extends",), f"{base}, outside", WITHIN, OUTSIDE)])
    if _resolved(target) in map(_resolved, (*above, file)):
        raise PlanError([document.problem(("extends",), f"{base}, which leads back here", "another plan")])
    here = document.problem(("extends",), f"{base}, which can not be used", "a plan that reads without errors")
    try:
        below = _read(target, (*above, file), anywhere)
    except PlanError as error:
        raise PlanError([here, *document.problems, *error.problems]) from None
    return _merge(replace(below, problems=(here, *below.problems)) if below.problems else below, document)


def _text(file: FilePath) -> str:
    try:
        return io.TextIOWrapper(io.BytesIO(content(file, MAX_BYTES)), encoding="utf-8").read()  # line ends as one
    except UnicodeDecodeError:
        raise
    except (OSError, ValueError) as error:  # ValueError: too large, a pipe, a name that holds NUL
        words = getattr(error, "strerror", None) or str(error)
        hint = named.hint(file) if isinstance(error, FileNotFoundError) else ""
        raise PlanError([Problem("", words, "a readable file", hint, str(file))]) from None


WITHIN = "a file below the plan's folder or the one you stand in"
OUTSIDE = "--allow-outside lifts this"


INSTEAD = {"emotions": "concepts", "concepts": "emotions"}
"""Field of a plan -> the one that takes its place in a plan that extends it."""


def _merge(base: Document, top: Document) -> Document:
    """`top` over `base`: mappings merge key by key, everything else is replaced whole."""
    values, keys = dict(base.values), dict(base.keys)

    def merge(below: Any, above: Any, path: Path) -> Any:
        if not (isinstance(below, dict) and isinstance(above, dict)):
            for table in (values, keys):
                for gone in [p for p in table if p[: len(path)] == path and p != path]:
                    del table[gone]
            return above
        merged = dict(below)
        for key, value in above.items():
            merged[key] = merge(below[key], value, (*path, key)) if key in below else value
        return merged

    own = {k: v for k, v in top.data.items() if k != "extends"}
    data = merge({k: v for k, v in base.data.items() if INSTEAD.get(k) not in own}, own, ())
    refused = top.refused | {p for p in base.refused if p in values}
    return Document(
        data,
        top.text,
        top.file,
        {**values, **top.values},
        {**keys, **top.keys},
        (*base.bases, base.file),
        problems=(*base.problems, *top.problems),
        refused=refused,
    )


def _keyed(data: Any, path: Path) -> Path:
    """`path` with numbers as the text they are where they are keys, not indices (`prompts.1`)."""
    keys: list[str | int] = []
    for key in path:
        keys.append(key if isinstance(data, list) else str(key))
        try:
            data = data[keys[-1]]
        except (LookupError, TypeError):
            data = None
    return tuple(keys)


def _put(data: Any, path: Path, value: Any) -> Any:
    """A copy of `data` with `value` at `path`; missing mappings on the way are made."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(data, list):
        if not isinstance(head, int) or head >= len(data):
            raise LookupError(f"{head!r} in a list of {len(data)}")
        return [_put(item, rest, value) if i == head else item for i, item in enumerate(data)]
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise TypeError(f"{head!r} inside {kind(data)}")
    return {**data, head: _put(data.get(head), rest, value)}


class _TooMuch(Exception):
    """More than a document may hold."""


class _Builder:
    """Walks ruamel's node graph once, keeping marks that loading into Python throws away."""

    def __init__(self, file: str, constructor: Any):
        self.file, self.constructor = file, constructor
        self.values: dict[Path, Mark] = {}
        self.keys: dict[Path, Mark] = {}
        self.problems: list[Problem] = []
        self.refused: set[Path] = set()
        self.open: list[Any] = []  # the collections that the walk is in

    def mark(self, node: Any) -> Mark:
        return Mark(self.file, node.start_mark.line + 1, node.start_mark.column + 1)

    def build(self, node: Any, path: Path) -> Any:
        if len(self.values) >= MAX_VALUES:
            raise _TooMuch(f"more than {MAX_VALUES:,} values, aliases spelled out")
        if len(path) > MAX_LEVELS:
            raise _TooMuch("collections nested too deep")
        self.values[path] = self.mark(node)
        if node.id == "scalar":
            return self.scalar(node, path)
        if node.tag.rsplit(":", 1)[-1] not in ("map", "seq"):
            self.refuse(node, path, f"the YAML tag {str(node.tag)!r}")
        if node in self.open:
            self.refuse(node, path, "a collection inside itself")
            return None
        self.open.append(node)
        data: Any
        if node.id == "mapping":
            data = self.mapping(node, path)
        else:
            data = [self.build(child, (*path, i)) for i, child in enumerate(node.value)]
        self.open.pop()
        return data

    def refuse(self, node: Any, path: Path, actual: str) -> None:
        self.problems.append(Problem(spell(path), actual, "JSON data", "", *self.mark(node)))
        self.refused.add(path)

    def mapping(self, node: Any, path: Path) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            mark = self.mark(key_node)
            if key_node.id != "scalar":
                self.problems.append(Problem(spell(path), "a collection as a key", "text", "", *mark))
                continue
            key = str(key_node.value)
            if key in data:
                first = self.keys[(*path, key)].line
                actual = f"{key!r} given twice (first in line {first})"
                self.problems.append(Problem(spell((*path, key)), actual, "each key once", "", *mark))
                continue
            self.keys[(*path, key)] = mark
            data[key] = self.build(value_node, (*path, key))
        return data

    def scalar(self, node: Any, path: Path) -> Any:
        tag = node.tag.rsplit(":", 1)[-1]
        if tag in ("int", "float", "bool", "null"):
            try:
                return self.constructor.construct_object(node, deep=True)
            except (ValueError, KeyError, IndexError):  # `!!int high`, `!!int` of nothing
                self.refuse(node, path, f"{kind(node.value)}, which is no {tag}")
        elif tag not in ("str", "timestamp", "value", "merge"):  # a date is text, and so are `=` and `<<`
            self.refuse(node, path, f"the YAML tag {str(node.tag)!r}")
        return node.value


def kind(value: Any) -> str:
    """What `value` is, in a reader's words: `'high'`, `3`, `a mapping`, `a list`, `nothing`."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "an empty list" if not value else f"a list of {len(value)}"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…'"
