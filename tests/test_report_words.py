"""What `nsteer report` prints for people: totals by verdict, what was asked for, 80 columns."""

from __future__ import annotations

import json

import pytest
import textstore
from rich.console import Console

from nsteer.cli import main
from nsteer.report import terminal


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return str(textstore.make(tmp_path_factory.mktemp("words") / "s.zarr", models=1).path)


def printed(capsys, monkeypatch, *words: str) -> str:
    monkeypatch.setattr(terminal, "console", lambda: Console(width=80))  # as at a terminal; a pipe is not cut
    with pytest.raises(SystemExit) as ended:
        main(["report", *words])
    assert not ended.value.code
    return capsys.readouterr().out


def test_totals_come_first_and_all_fits_eighty_columns(store, capsys, monkeypatch):
    chosen = [word for verdict in ("agrees", "differs", "inconclusive") for word in ("--verdict", verdict)]
    text = printed(capsys, monkeypatch, store, *chosen)
    whole = printed(capsys, monkeypatch, store, "--claims")
    assert "rows can not be compared" in whole and "Did it work?" in whole
    rows = json.loads(printed(capsys, monkeypatch, store, "--json"))
    counts = {v: sum(row["verdict"] == v for row in rows) for v in ("agrees", "differs", "inconclusive")}
    first = next(line for line in whole.splitlines() if " rows: " in line)
    assert first.startswith(f"{len(rows)} rows: ") and all(f"{n} {v}" in first for v, n in counts.items())
    assert max(map(len, text.splitlines())) <= 80 and len(text.splitlines()) < 70
    assert "no activations" not in text


def test_rows_are_chosen_by_claim_and_by_verdict(store, capsys, monkeypatch):
    rows = json.loads(printed(capsys, monkeypatch, store, "--json", "--claim", "4", "--claim", "effects"))
    assert {row["claim"] for row in rows} == {"4", "effects"}
    lost = json.loads(printed(capsys, monkeypatch, store, "--json", "--verdict", "cannot"))
    assert lost and {row["verdict"] for row in lost} == {"cannot be compared"}
    assert "random rotation" in printed(capsys, monkeypatch, store, "--claim", "effects")


def test_a_claim_that_is_not_there_is_told(store, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["report", store, "--claim", "7"])
    assert ended.value.code and "there are 1, 2, 3" in capsys.readouterr().err
