"""The reader: what YAML means, where every node stands, what `extends` and `--set` make of it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nsteer.errors import PlanError
from nsteer.plan import reader
from nsteer.plan.reader import Mark, override, parse, read, spell, unspell


def fails(call, *arguments) -> list[str]:
    with pytest.raises(PlanError) as caught:
        call(*arguments)
    return [str(problem) for problem in caught.value.problems]


# ---- YAML 1.2 -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1.e3", 1000.0),
        (".5", 0.5),
        ("-3", -3),
        ("+1", 1),
        ("0o17", 15),
        ("0x1F", 31),
        ("-.inf", -math.inf),
        ("true", True),
        ("~", None),
        ("null", None),
        ("", None),
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("off", "off"),
        ("1:30", "1:30"),
        ("2:4", "2:4"),
        ("017", 17),
        ("2020-01-01", "2020-01-01"),
        ("2020-01-01 10:00:00", "2020-01-01 10:00:00"),
        ("=", "="),
        ("'1'", "1"),
        ("!!str 1", "1"),
        ("!!int '7'", 7),
    ],
)
def test_a_scalar_means_what_yaml_1_2_says(text, value):
    scalar = parse(f"a: {text}").data["a"]
    assert scalar == value and type(scalar) is type(value)


def test_nothing_is_an_empty_mapping():
    assert parse("").data == parse("# only this\n").data == {}


def test_keys_are_text():
    assert parse("1: a\ntrue: b\n~: c").data == {"1": "a", "true": "b", "~": "c"}


def test_an_alias_is_the_value_it_names():
    assert parse("a: &x {b: [1]}\nc: *x").data == {"a": {"b": [1]}, "c": {"b": [1]}}


# ---- marks ----------------------------------------------------------------------------------------------------

NESTED = """\
name: x
steer:
  - op: add
    strengths: [1,
                2.5]
  - {op: clamp, strengths: [3]}
"""


@pytest.mark.parametrize(
    ("path", "line", "column", "key"),
    [
        ((), 1, 1, False),
        (("name",), 1, 7, False),
        (("name",), 1, 1, True),
        (("steer",), 3, 3, False),
        (("steer", 0), 3, 5, False),
        (("steer", 0, "op"), 3, 5, True),
        (("steer", 0, "op"), 3, 9, False),
        (("steer", 0, "strengths", 1), 5, 17, False),
        (("steer", 1, "strengths", 0), 6, 29, False),
        (("steer", 1, "strengths", 9), 6, 28, False),  # not there: where its nearest ancestor is
        (("steer", 1, "scale"), 6, 5, False),
        (("nowhere", "at", "all"), 1, 1, False),
    ],
)
def test_every_node_knows_its_place(path, line, column, key):
    assert parse(NESTED, "f.yaml").mark(path, key) == Mark("f.yaml", line, column)


def test_a_problem_says_file_line_column_path():
    problem = parse(NESTED, "f.yaml").problem(("steer", 0, "strengths", 1), "2.5", "less", "try 2")
    assert str(problem) == "f.yaml:5:17: steer[0].strengths[1]: expected less, found 2.5 (try 2)"


# ---- what is refused ------------------------------------------------------------------------------------------


def test_every_key_given_twice_is_told_at_once():
    messages = fails(parse, "a: 1\nb: {c: 1, c: 2}\na: 3\na: 4\n", "f.yaml")
    assert messages == [
        "f.yaml:2:11: b.c: expected each key once, found 'c' given twice (first in line 2)",
        "f.yaml:3:1: a: expected each key once, found 'a' given twice (first in line 1)",
        "f.yaml:4:1: a: expected each key once, found 'a' given twice (first in line 1)",
    ]


def test_a_reader_that_goes_on_keeps_the_first_value_and_says_so(tmp_path):
    text = "a: 1\nb: {c: 1, c: 2}\nd: !x 5\na: 3\n"
    (tmp_path / "p.yaml").write_text(text)
    for document in (parse(text, str(tmp_path / "p.yaml"), strict=False), read(tmp_path / "p.yaml", strict=False)):
        assert document.data == {"a": 1, "b": {"c": 1}, "d": "5"} and document.refused == {("d",)}
        assert [problem.path for problem in document.problems] == ["b.c", "d", "a"]
        changed = override(document, ["d=7", "a.x=1"], strict=False)
        assert changed.data["d"] == 7 and not changed.refused
        assert [problem.path for problem in changed.problems] == ["b.c", "d", "a", "a.x"]


def test_keys_alike_as_text_are_the_same_key():
    assert fails(parse, "1: a\n'1': b") == [
        "<plan>:2:1: 1: expected each key once, found '1' given twice (first in line 1)"
    ]


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("a: [1", "1:6", "while parsing a flow sequence"),
        ("a: 1\n b: 2", "2:3", "mapping values are not allowed"),
        ("a: 1\n\tb: 2", "2:1", "cannot start any token"),
        ("a: 'x", "1:6", "quoted scalar"),
        ("a: *x", "1:4", "undefined alias 'x'"),
        ("a: 1\n---\nb: 2", "2:1", "another document"),
        ("a: 1\nb: \x01", "2:4", "#x0001"),
    ],
)
def test_a_syntax_error_is_located(text, place, words):
    (message,) = fails(parse, text, "f.yaml")
    assert (
        message.startswith(f"f.yaml:{place}: expected valid YAML, found") and words in message and "\n" not in message
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !py x", "<plan>:1:4: a: expected JSON data, found the YAML tag '!py'"),
        ("a: !!set {b, c}", "<plan>:1:4: a: expected JSON data, found the YAML tag 'tag:yaml.org,2002:set'"),
        ("a: !m {b: 1}", "<plan>:1:4: a: expected JSON data, found the YAML tag '!m'"),
        ("a: [0, !s [1]]", "<plan>:1:8: a[1]: expected JSON data, found the YAML tag '!s'"),
        ("a: !!int high", "<plan>:1:4: a: expected JSON data, found 'high', which is no int"),
        ("a: !!bool maybe", "<plan>:1:4: a: expected JSON data, found 'maybe', which is no bool"),
        ("a: &x [*x]", "<plan>:1:4: a[0]: expected JSON data, found a collection inside itself"),
        ("? [b]\n: c", "<plan>:1:3: expected text, found a collection as a key"),
    ],
)
def test_what_is_not_plain_data_is_refused(text, message):
    assert fails(parse, text) == [message]


def test_files_that_can_not_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    (tmp_path / "list.yaml").write_text("- a")
    assert fails(read, tmp_path / "no.yaml") == [
        f"{tmp_path}/no.yaml: expected a readable file, found No such file or directory"
    ]
    assert fails(read, tmp_path) == [f"{tmp_path}: expected a readable file, found Is a directory"]
    assert fails(read, tmp_path / "latin.yaml") == [
        f"{tmp_path}/latin.yaml: expected UTF-8 text, found byte 9 that is not"
    ]
    assert fails(read, tmp_path / "list.yaml") == [
        f"{tmp_path}/list.yaml:1:1: expected a mapping of plan fields, found a list of 1"
    ]


def test_pipes_and_devices_are_no_plans(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "huge.yaml").touch()
    os.truncate(tmp_path / "huge.yaml", 2**40)
    for name, fault in (("pipe", "no regular file"), ("zero", "no regular file"), ("huge", "1,099,511,627,776 bytes")):
        [message] = fails(read, tmp_path / f"{name}.yaml")
        assert f"{name}.yaml: expected a readable file, found {fault}" in message
    (tmp_path / "lines.yaml").write_bytes(b"a: |\r\n  b\r\n  c\r\n")
    assert read(tmp_path / "lines.yaml").data == {"a": "b\nc\n"} and "\r" not in read(tmp_path / "lines.yaml").text


# ---- extends --------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    def write(**texts: str) -> Path:
        for name, text in texts.items():
            (tmp_path / f"{name}.yaml").write_text(text)
        return tmp_path

    return write


def test_extends_merges_mappings_and_replaces_the_rest(files):
    here = files(
        base="name: base\nmethods:\n  a: {samples: 3, chat: auto}\n  b: {samples: 4}\nmodels: [x, y]\nsteer: {op: add}",
        top="extends: base.yaml\nname: top\nmethods:\n  a: {samples: 9}\nmodels: [z]\nsteer: [1]\n",
    )
    document = read(here / "top.yaml")
    assert document.data == {
        "name": "top",
        "methods": {"a": {"samples": 9, "chat": "auto"}, "b": {"samples": 4}},
        "models": ["z"],
        "steer": [1],
    }
    base, top = str(here / "base.yaml"), str(here / "top.yaml")
    assert document.bases == (base,)
    assert document.mark(("methods", "a", "samples")) == Mark(top, 4, 16)
    assert document.mark(("methods", "a", "chat")) == Mark(base, 3, 25)
    assert document.mark(("methods", "b"), key=True) == Mark(base, 4, 3)
    assert document.mark(("models", 0)) == Mark(top, 5, 10)
    assert document.mark(("models", 1)) == Mark(top, 5, 9), "y is gone, and its mark with it"
    assert document.mark(("steer", "op")) == Mark(top, 6, 8), "what replaced the mapping"


def test_extends_goes_through_folders_and_generations(files):
    here = files(top="extends: middle/plan.yaml\nc: 3")
    (here / "middle").mkdir()
    (here / "middle" / "plan.yaml").write_text("extends: ../bottom.yaml\nb: 2")
    files(bottom="a: 1\nb: 1\nc: 1")
    document = read(here / "top.yaml")
    assert document.data == {"a": 1, "b": 2, "c": 3}
    assert [Path(base).name for base in document.bases] == ["bottom.yaml", "plan.yaml"]


def test_a_loop_is_told_where_it_closes(files):
    here = files(a="extends: b.yaml", b="x: 1\nextends: a.yaml")
    messages = fails(read, here / "a.yaml")
    assert f"{here}/a.yaml:1:10: extends: expected a plan that reads without errors, found b.yaml" in messages[0]
    assert f"{here}/b.yaml:2:10: extends: expected another plan, found a.yaml, which leads back here" in messages[1]
    assert len(fails(read, files(self="extends: self.yaml") / "self.yaml")) == 1


def test_a_base_with_errors_is_told_with_the_line_that_asks_for_it(files):
    here = files(top="name: t\nextends: base.yaml", base="a: 1\na: 2\nb: 1\nb: 2")
    messages = fails(read, here / "top.yaml")
    assert [line.split(": ")[0] for line in messages] == [
        f"{here}/base.yaml:2:1",
        f"{here}/base.yaml:4:1",
        f"{here}/top.yaml:2:10",
    ]


def test_a_base_that_is_not_there(files):
    messages = fails(read, files(top="extends: no.yaml") / "top.yaml")
    assert any("no.yaml: expected a readable file" in line for line in messages)
    assert any("top.yaml:1:10: extends" in line for line in messages)
    assert fails(read, files(top="extends: [a]") / "top.yaml")[0].endswith(
        "expected the path of a plan, found a list of 1"
    )


# ---- --set ----------------------------------------------------------------------------------------------------

DATA = 'a: {b: [1, {c: 2}], d: text}\nprompts: {"1": one, x.y: two}\n'


@pytest.mark.parametrize(
    ("setting", "path", "value"),
    [
        ("a.d=other", ("a", "d"), "other"),
        ("a.b[0]=5", ("a", "b", 0), 5),
        ("a.b.0=5", ("a", "b", 0), 5),
        ("a.b[1].c=1e-3", ("a", "b", 1, "c"), 0.001),
        ("a.b=[0.1, 0.2]", ("a", "b"), [0.1, 0.2]),
        ("a={e: {f: no}}", ("a",), {"e": {"f": "no"}}),
        ("new.deep.er=1", ("new", "deep", "er"), 1),
        ('prompts."x.y"=2', ("prompts", "x.y"), 2),
        ("prompts.1=uno", ("prompts", "1"), "uno"),
        ("a.d=", ("a", "d"), None),
        (" a.d = x=y", ("a", "d"), "x=y"),
    ],
)
def test_set_puts_a_yaml_value_at_a_path(setting, path, value):
    document = override(parse(DATA, "f.yaml"), [setting])
    data = document.data
    for part in path:
        data = data[part]
    assert data == value
    assert document.mark(path) == Mark(f"--set {setting}", 0, 0)
    assert document.mark((*path, "within"), key=True).file == f"--set {setting}"
    assert str(document.problem(path, "x", "y")).startswith(f"--set {setting}: {spell(path)}: expected y")
    assert parse(DATA).data["a"]["d"] == "text", "the first document is as it was"


def test_later_settings_win_and_keep_the_earlier():
    document = override(parse(DATA), ["a.b[0]=5", "a.b[1]=6", "a.b[0]=7"])
    assert document.data["a"]["b"] == [7, 6]


def test_every_bad_setting_is_told():
    messages = fails(
        override, parse(DATA), ["nope", "=5", "a.b[7]=1", "a.d.x=1", "a.b=[1", "a..b=1", "a.b[]=1", ".=1", "extends=f"]
    )
    assert messages == sorted(
        [
            "--set nope: expected path=value, found 'nope' (e.g. --set 'steer.strengths=[0.1,0.2]')",
            "--set =5: expected path=value, found '=5' (e.g. --set 'steer.strengths=[0.1,0.2]')",
            "--set a.b[7]=1: a.b[7]: expected a path that the plan has, found 7 in a list of 2",
            "--set a.d.x=1: a.d.x: expected a path that the plan has, found 'x' inside 'text'",
            "--set a.b=[1:1:3: expected valid YAML, found a syntax error: expected ',' or ']', but got '<stream end>' "
            "while parsing a flow sequence",
            "--set a..b=1: a..b: expected a path that the plan has, found 'a..b'",
            "--set a.b[]=1: a.b[]: expected a path that the plan has, found 'a.b[]'",
            "--set .=1: .: expected a path that the plan has, found '.'",
            "--set extends=f: extends: expected it in the plan's file only, found 'f'",
        ]
    )


# ---- properties -----------------------------------------------------------------------------------------------

WORD = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Cn", "Zl", "Zp")), max_size=8).filter(
    lambda text: "\ufeff" not in text
)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
SCALAR = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | FINITE | WORD
PLAIN = st.recursive(
    SCALAR, lambda children: st.lists(children, max_size=4) | st.dictionaries(WORD, children, max_size=4), max_leaves=12
)
MAPPING = st.dictionaries(WORD, PLAIN, max_size=5)
FLOW = st.booleans()


def dump(data, flow: bool) -> str:
    """YAML by other hands than the reader's library: JSON, or JSON scalars in block style."""
    return json.dumps(data, ensure_ascii=False) if flow else "".join(f"{line}\n" for line in block(data)) or "{}\n"


def block(data) -> list[str]:
    if isinstance(data, (dict, list)) and data:
        lines = []
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            head = f"{json.dumps(key, ensure_ascii=False)}:" if isinstance(data, dict) else "-"
            inner = block(value)
            if isinstance(value, (dict, list)) and value:
                lines += [head, *(f"  {line}" for line in inner)]
            else:
                lines.append(f"{head} {inner[0]}")
        return lines
    return [json.dumps(data, ensure_ascii=False)]


def typed(data):
    """Data in which 1, 1.0 and True differ."""
    if isinstance(data, dict):
        return {key: typed(value) for key, value in data.items()}
    return [typed(item) for item in data] if isinstance(data, list) else (type(data).__name__, data)


@given(MAPPING, FLOW)
def test_plain_data_come_back_through_yaml(data, flow):
    assert typed(parse(dump(data, flow)).data) == typed(data)


@given(MAPPING, FLOW)
def test_every_mark_lies_inside_the_text(data, flow):
    document = parse(text := dump(data, flow))
    lines = [*text.splitlines(keepends=True), ""]
    for table in (document.values, document.keys):
        for mark in table.values():
            assert 1 <= mark.line <= len(lines) and 1 <= mark.column <= len(lines[mark.line - 1]) + 1
    for path, mark in document.keys.items():
        assert mark <= document.values[path], "a key stands before its value"


def paths(data, above=()):
    yield above
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from paths(value, (*above, key))


PLAIN_WORD = st.from_regex(r"[a-z][a-z0-9_-]{0,5}", fullmatch=True)
NAMED = st.recursive(
    st.integers(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(PLAIN_WORD, children, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(PLAIN_WORD, NAMED, min_size=1, max_size=3), st.data(), st.integers())
def test_what_is_set_is_found_at_its_path_and_nothing_else_moves(data, draw, value):
    path = draw.draw(st.sampled_from([p for p in paths(data) if p and p[0] != "extends"] or [("new",)]))
    before = parse(dump(data, True))
    after = override(before, [f"{spell(path)}={value}"])
    node = after.data
    for part in path:
        node = node[part]
    assert node == value and after.mark(path).file.startswith("--set")
    for other in paths(data):
        if other[: len(path)] != path and path[: len(other)] != other:
            assert after.mark(other) == before.mark(other)
    assert unspell(spell(path)) == path


def test_kind_says_what_a_reader_sees():
    cases = {"'high'": "high", "nothing": None, "a mapping": {"a": 1}, "an empty list": [], "a list of 2": [1, 2]}
    assert {said: reader.kind(value) for said, value in cases.items()} == dict(zip(cases, cases, strict=True))
    assert reader.kind(True) == "true" and len(reader.kind("x" * 99)) <= 60
