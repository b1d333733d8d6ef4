"""The judge that is people: tables of raters joined with the texts that they rated."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from planside import PLAN, STEER

from nsteer.errors import PlanError
from nsteer.plan import check, ratings, reader
from nsteer.stages import judges
from nsteer.stages.judges import Asked, Tools

TEXTS = ["she  laughed", "he wept ,\nloudly", "=1+1"]


def table(file, columns, rows) -> None:
    with file.open("w", newline="", encoding="utf-8-sig") as out:
        writer = csv.writer(out)
        writer.writerow(columns)
        writer.writerows(rows)


def study(folder, scores: str):
    (folder / "p.yaml").write_text(f"{PLAN}{STEER}\njudge: {{scores: {scores}}}\n")
    return check.study(reader.read(folder / "p.yaml"))


def read(checked_study, *texts: str):
    about = judges.known(checked_study.plan.judge, checked_study)
    said: list[str] = []
    loaded = judges.load(checked_study.plan.judge, about, Tools(said.append, False, np.zeros, list, list))
    return about, loaded.read([Asked(text) for text in texts])["score"], said


@pytest.fixture
def sent(tmp_path):
    """Two raters' tables and the key, as they are sent out: the second rater left a row out."""
    ids = [f"t{i}" for i in range(3)]
    key = [[name, "happy", ratings.digest(text), *["-"] * len(ratings.LABELS)] for name, text in zip(ids, TEXTS)]
    table(tmp_path / "key.csv", ratings.KEY, key)
    for number, scores in enumerate(([100, 0, 50], [50, 20, ""])):
        rows = [[n, "happy", "p", ratings.guarded(text), s] for n, text, s in zip(ids, TEXTS, scores)]
        table(tmp_path / f"r{number}.csv", ratings.TABLE, rows[::-1])
    return tmp_path


def test_scores_are_the_mean_of_those_who_rated_a_text(sent):
    checked_study = study(sent, "{tables: [r0.csv, r1.csv], key: key.csv}")
    about, scores, said = read(checked_study, *TEXTS, "another", "")
    assert about.classes == ("happy",) and about.threshold == 0.5 and about.said == {"raters": 2, "texts": 3}
    np.testing.assert_allclose(scores[:, 0], [0.75, 0.1, 0.5, np.nan, np.nan])
    assert said == ["some texts were rated by nobody: missing values"]


def test_what_was_said_is_the_identity_and_not_the_file(sent):
    checked_study = study(sent, "{tables: r0.csv, key: key.csv}")
    before = judges.known(checked_study.plan.judge, checked_study).identity
    rows = list(csv.reader((sent / "r0.csv").open(encoding="utf-8-sig")))
    table(sent / "r0.csv", rows[0], rows[:0:-1])
    assert judges.known(checked_study.plan.judge, checked_study).identity == before
    rows[1][-1] = "7"
    table(sent / "r0.csv", rows[0], rows[1:])
    assert judges.known(checked_study.plan.judge, checked_study).identity != before


def test_a_plain_table_needs_no_key(tmp_path):
    rows = [["she laughed", "happy", "80"], ["she laughed", "sad", "5"], ["he wept", "sad", ""]]
    table(tmp_path / "mine.csv", ("score", "text", "concept"), [[s, t, c] for t, c, s in rows])
    about, scores, _ = read(study(tmp_path, "{tables: mine.csv}"), "she laughed", "he wept")
    assert about.classes == ("happy", "sad")
    np.testing.assert_allclose(scores, [[0.8, 0.05], [np.nan, np.nan]])


def test_tables_that_can_be_none_are_told_by_line(sent):
    table(sent / "bad.csv", ratings.KEYLESS, [["a", "happy", "high"], ["b", "happy", "101"], ["a", "happy", "1"]])
    with pytest.raises(PlanError) as caught:
        study(sent, "{tables: bad.csv}")
    told = [problem.found for problem in caught.value.problems]
    assert {problem.path for problem in caught.value.problems} == {"judge.scores.tables"} and len(told) == 2
    assert "bad.csv:2: score" in told[0] and "bad.csv:3: score" in told[1]
    for scores, words in (
        ("{tables: none.csv}", "can not be read"),
        ("{tables: r0.csv}", ""),
        ("{tables: /etc/hosts}", "outside"),
    ):
        if not words:
            continue
        with pytest.raises(PlanError, match=words):
            study(sent, scores)
