"""Blind tables for raters: what they show, what they hide, and how filled-in ones come back."""

from __future__ import annotations

import csv
import math

import pytest
import textstore

import nsteer
from nsteer.cli import main
from nsteer.errors import ExchangeError, StoreError
from nsteer.plan import ratings
from nsteer.report import raters, reporting

FORMULA = "=HYPERLINK(1)\x1b[31m"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("raters") / "s.zarr"
    textstore.make(path, models=1, strange={0: FORMULA, 1: ""})
    return path


@pytest.fixture
def sent(store, tmp_path):
    """What was sent out to two raters, with its key."""
    evidence = reporting.evidence(nsteer.open(store))
    return raters.write(evidence, tmp_path / "r.csv", seed=3, raters=2)


def rows(path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def filled(path, score, lines=None) -> list[dict[str, str]]:
    """A rater's work: the file written again with scores."""
    done = [{**row, "score": score(row)} for row in (rows(path) if lines is None else lines)]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ratings.TABLE)
        writer.writeheader()
        writer.writerows(done)
    return done


def test_a_table_tells_nothing_but_text_and_concept(sent, store):
    first, second, key = sent
    assert [file.name for file in sent] == ["r.csv", "r-2.csv", "r.key.csv"]
    assert list(rows(first)[0]) == ["id", "concept", "prompt", "text", "score"]
    told = {name: row for row in rows(key) if (name := row["id"])}
    assert {row["id"] for row in rows(first)} == {row["id"] for row in rows(second)} == set(told)
    assert [row["id"] for row in rows(first)] != [row["id"] for row in rows(second)]
    groups = [told[row["id"]]["group"] for row in rows(first)]
    assert {"generations", "unsteered"} == set(groups)
    assert groups != sorted(groups) and groups != sorted(groups, reverse=True), "mixed"
    assert {told[row["id"]]["control"] for row in rows(first)} == {"none", "random", ""}
    opened = nsteer.open(store)
    for row in rows(first):
        known = told[row["id"]]
        if known["group"] == "generations":
            where = {d: known[d] for d in ("model", "op", "layer_set", "method", "control", "prompt")}
            at = {**where, "emotion": known["label"], "strength": float(known["strength"]), "seed": int(known["seed"])}
            text = str(opened["generations"].text.sel(at).values)
            assert row["concept"] == known["label"] and ratings.digest(text) == known["text_sha256"]


def test_the_same_seed_gives_the_same_tables_and_nothing_is_a_formula(store, sent, tmp_path):
    evidence = reporting.evidence(nsteer.open(store))
    again = raters.write(evidence, tmp_path / "a.csv", seed=3, raters=2)
    other = raters.write(evidence, tmp_path / "b.csv", seed=4)
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in sent]
    assert other[0].read_bytes() != sent[0].read_bytes()
    strange = [row["text"] for row in rows(sent[0]) if "HYPERLINK" in row["text"]]
    assert strange == ["'=HYPERLINK(1)\\x1b[31m"]


def test_few_rows_are_drawn_of_steered_and_unsteered_alike(store, tmp_path):
    first, key = raters.write(reporting.evidence(nsteer.open(store)), tmp_path / "r.csv", max_texts=6)
    told = [(row["concept"], row["group"], row["control"]) for row in rows(key)]
    assert len(rows(first)) == 18
    for concept in ("happy", "sad", "angry"):
        for kind in (("generations", "none"), ("generations", "random"), ("unsteered", "")):
            assert told.count((concept, *kind)) == 2


def test_scores_come_back_to_the_texts_they_are_of(sent, store):
    *tables, key = sent
    told = {row["id"]: row for row in rows(key)}
    steered = {name for name, row in told.items() if row["control"] == "none"}
    filled(tables[0], lambda row: "80" if row["id"] in steered else "20")
    filled(tables[1], lambda row: "90.0" if row["id"] in steered else "10")
    human_ratings = ratings.read(tables, key)
    assert human_ratings.raters == 2 and human_ratings.agreement == pytest.approx(1.0)
    opened = nsteer.open(store)
    text = opened["generations"].text.sel(emotion="sad", strength=0.2, control="none").squeeze().values.tolist()
    plain = opened["unsteered"].text.squeeze().values.tolist()
    assert [human_ratings.of(continuation, "sad") for continuation in text] == pytest.approx([0.85] * 4)
    assert [human_ratings.of(continuation, "sad") for continuation in plain] == pytest.approx([0.15] * 4)
    assert (
        human_ratings.of(FORMULA, "happy") == pytest.approx(0.85) and human_ratings.of("another text", "happy") is None
    )
    assert set(human_ratings.concepts) == {"happy", "sad", "angry"}


def test_every_problem_is_told_at_once_by_its_line(sent):
    table, _, key = sent
    lines = rows(table)
    names = [row["id"] for row in lines]
    scores = {names[0]: "101", names[1]: "much", names[2]: "", names[3]: "nan"}
    lines[4] = {**lines[4], "text": "edited"}
    lines[5] = {**lines[5], "id": "t99999"}
    lines = [*lines[:-1], lines[6]]
    filled(table, lambda row: scores.get(row["id"], "50"), lines)
    with pytest.raises(ExchangeError) as error:
        ratings.read([table], key)
    said = str(error.value).splitlines()
    for line, words in (
        (2, "expected a number from 0 to 100, found '101'"),
        (3, "found 'much'"),
        (4, "found nothing"),
        (5, "found 'nan'"),
        (6, "another text or concept"),
        (7, "'t99999' is not in the key"),
        (len(lines) + 1, "stands twice, first in line 8"),
    ):
        assert any(message.startswith(f"{table}:{line}: ") and words in message for message in said), (
            line,
            words,
            said,
        )
    assert any("rows that were sent out are missing" in message and names[5] in message for message in said)
    assert len(said) == 8


def test_part_of_a_table_may_be_read_where_that_is_meant(sent):
    table, _, key = sent
    lines = filled(table, lambda row: "", rows(table)[:5])
    filled(table, lambda row: "100" if row["id"] == lines[0]["id"] else "", lines)
    human_ratings = ratings.read([table], key, partly=True)
    assert len(human_ratings.scores) == 1 and math.isnan(human_ratings.agreement)


def test_what_is_no_table_is_one_clear_line(sent, tmp_path):
    key = sent[-1]
    for content, words in (
        (b"\xff\xfe\x00", "can not be read"),
        (b"a,b\n1,2\n", "expected the columns"),
        (None, "no such file"),
    ):
        other = tmp_path / "other.csv"
        other.unlink(missing_ok=True)
        if content is not None:
            other.write_bytes(content)
        with pytest.raises(ExchangeError, match=words):
            ratings.read([other], key)


def test_a_store_without_texts_has_nothing_to_rate(tmp_path):
    textstore.make(tmp_path / "s.zarr", models=1, without=("generations", "unsteered"))
    with pytest.raises(StoreError, match="nothing to rate"):
        raters.write(reporting.evidence(nsteer.open(tmp_path / "s.zarr")), tmp_path / "r.csv")


def test_the_command_says_what_to_keep_apart(store, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["export", str(store), "--format", "raters", "-o", str(tmp_path / "r.csv"), "--seed", "1", "--rows", "3"])
    said = capsys.readouterr().out
    assert not ended.value.code and "keep" in said and "r.key.csv from the raters" in said
    with pytest.raises(SystemExit) as ended:
        main(["export", str(store), "--format", "raters", "-o", str(tmp_path / "r.csv"), "--strength", "2"])
    assert ended.value.code == 2 and "not of a blind table" in capsys.readouterr().err
