"""Steer entries of one store with grids of their own: nothing is said of a strength that an entry never ran."""

from __future__ import annotations

import re

import pytest
import textstore

import nsteer
from nsteer.report import claims, figures, shown
from nsteer.report.claims import Rules

ENTRIES = {"add": (0.05, 0.2), "turn": (10.0, 30.0)}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    store = textstore.make(tmp_path_factory.mktemp("entries") / "two.zarr", ops=ENTRIES)
    return nsteer.open(store.path)


@pytest.fixture(scope="module")
def table(opened):
    return claims.table(claims.claims(opened, Rules(shuffles=9)))


def test_rows_are_of_strengths_that_their_entry_ran(table):
    told = [re.search(r"(add|turn), .*strength ([0-9.e+-]+)", scope) for scope in table.scope]
    told = [(match[1], float(match[2])) for match in told if match]
    assert {op for op, _ in told} == set(ENTRIES)
    assert all(strength in ENTRIES[op] for op, strength in told)


def test_the_greatest_strength_is_that_of_the_entry(table):
    for claim in ("5", "6"):
        scopes = [scope for scope in table[table.claim == claim].scope if "strength" in scope]
        assert len(scopes) == 4
        for scope in scopes:
            assert scope.endswith(f"strength {max(ENTRIES['add' if ', add,' in scope else 'turn']):g}"), scope


def test_nothing_stands_in_a_row_that_was_never_measured(table):
    for text in (*table.ours, *table.control):
        assert "0 of 0" not in text and "nan" not in text and "nothing" not in text, text


def test_models_are_counted_together_within_an_entry_alone(table):
    joint = table[(table.claim == "4") & table.scope.str.startswith("2 models")]
    assert sorted(joint.scope) == sorted(
        f"2 models, {op}, all, generation, strength {s:g}" for op, own in ENTRIES.items() for s in own
    )
    for row in joint.itertuples():
        parts = table[table.scope.isin([row.scope.replace("2 models", f"made/m{k}") for k in (0, 1)])]
        assert row.n == 4 and (parts[parts.what == row.what].n == 4).all(), "models share their prompts"


def test_figures_have_the_strengths_of_their_entry(opened):
    evidence = claims.Evidence(opened, Rules(shuffles=5), None)
    doses = [picture for picture in figures.pictures(opened, evidence=evidence) if picture.name.startswith("dose-")]
    assert len(doses) == 4
    for picture in doses:
        own = ENTRIES["add" if "-add-" in picture.name else "turn"]
        assert [float(s) for s in re.findall(r"strength ([0-9.]+)", picture.alt)] == list(own)


def test_the_terminal_too(opened):
    dose = shown.view(opened, Rules(shuffles=0))["dose"]
    assert {(row["op"], row["strength"]) for row in dose} == {(op, s) for op, own in ENTRIES.items() for s in own}
