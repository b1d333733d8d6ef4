"""Turns an overview into what a terminal shows: answers first, then doses, layers, texts, judges."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import xarray as xr
from rich.console import Console
from rich.table import Table

from nsteer.report.claims.evidence import CONTROLS, Evidence, Rules
from nsteer.report.display import sparkline
from nsteer.report.overview import RULE, Card, Dose, Layers, Overview, Pair
from nsteer.report.overview.pairs import pairs
from nsteer.report.overview.said import card_said
from nsteer.report.terminal import console, rich_text, table
from nsteer.store.results import Results

LOOKED_THROUGH = 5000
"""Texts from which a run shows three at its end: to look through more takes seconds."""

MAX_LINES = 12
"""Lines of one table of doses that a terminal gets."""

HINT = "-o report.html for a page with figures and every text; --claims for the claims of Jeong 2026"
NAMES = {"none": "steered", "random": "random", "shuffled": "shuffled"}


def print_overview(overview: Overview, paper: bool) -> None:
    """The first screen of a store; `paper`: whether the claims of the paper follow it."""
    out = console()
    out.print(rich_text(overview.name, "bold", lines=False))
    for line in overview.asked:
        out.print(rich_text(line))
    if overview.answers:
        out.print(rich_text("\nDid it work?", "bold"))
    for answer in overview.answers:
        said = rich_text(f"{answer.verdict}: ", "bold")
        beside = f" Beside: {answer.control}." if answer.control else ""
        out.print(said.append_text(rich_text(f"{answer.of}. {answer.text}{beside}")))
    for setup, rows in groupby(overview.doses, key=lambda dose: dose.setup):
        print_doses(out, setup, list(rows), overview.axis)
    if overview.layers:
        print_layers(out, overview.layers)
    for card in overview.cards:
        print_card(out, card)
    if overview.pairs:
        out.print(rich_text("\nTexts", "bold").append_text(rich_text(f" ({RULE})", "not bold dim")))
    for pair in overview.pairs:
        print_pair(out, pair)
    if not (overview.asked or overview.doses or overview.layers):
        out.print(rich_text("nothing captured and nothing steered in this store; `nsteer ls` lists what it holds"))
    out.print(rich_text(f"\n{HINT if not paper else HINT.split(';')[0]}", "dim"))


def print_end(opened: Results) -> None:
    """The end of a run: three texts beside the unsteered, unless there are too many to look through; what to try."""
    out = console()
    texts = [opened[path].text for path in ("generations", "edited") if path in opened]
    if texts and sum(answer.size for answer in texts) <= LOOKED_THROUGH:
        for pair in pairs(Evidence(opened, Rules(shuffles=0), None)):
            print_pair(out, pair)
    out.print(f"\ntry: nsteer report {opened.path} -o report.html")
    leaf = opened.store.leaf("steering")
    first = next(iter(opened.store.committed("steering")), None)  # nothing need be computed for its labels
    if leaf and first:
        key = dict(zip(leaf.cell, first, strict=True))
        vector = f"{opened.path}:{key['method']}/{key[opened.axis]}"
        model = model_words(opened["models"].sel({"model": key["model"]}))
        out.print(rich_text(f"     nsteer chat {model} --vector {shlex.quote(vector)}"), soft_wrap=True)


def model_words(kept: xr.Dataset) -> str:
    """A model of a store as a command takes it: its id, its label where that is another, and what else makes it."""
    label, named = str(kept.model.item()), str(kept.id.item())
    file, folder = Path(kept.gguf.item()), Path(named).expanduser().resolve()
    within = file.relative_to(folder) if file.is_relative_to(folder) else file  # of several such files, or on the hub
    options = {
        "--label": label if label != named else "",
        "--revision": str(kept.revision.item()),
        "--gguf": str(within) if kept.gguf.item() and not named.endswith(".gguf") else "",
        "--peft": str(kept.adapter.item()),
        "--dtype": str(kept.dtype.item()) if kept.dtype.item() != "float32" else "",
    }
    return shlex.join([named, *(word for name, value in options.items() if value for word in (name, value))])


def print_doses(out: Console, setup: str, rows: Sequence[Dose], axis: str) -> None:
    """One setup: what moved at each strength, beside its controls, and what it cost."""
    arms = [arm for arm in ("none", *CONTROLS) if any(arm in row.moved for row in rows)]
    arms += [arm for arm in dict.fromkeys(a for row in rows for a in row.moved) if arm not in arms]
    what = "texts that moved to the target" if arms else "no judge"
    out.print(rich_text(f"\nDose and response: {setup}", "bold").append_text(rich_text(f" ({what})", "not bold")))
    word = "edit" if setup.startswith("edits") else axis
    rest = [(name, cell) for name, cell in CELLS.items() if any(cell(row) for row in rows)]
    grid = table(word, "strength", *(NAMES.get(arm, arm) for arm in arms), *(name for name, _ in rest))
    for row in rows[:MAX_LINES]:
        moved = [f"{row.moved[arm][0]}/{row.moved[arm][1]}" if arm in row.moved else "-" for arm in arms]
        strength = f"{row.strength:g}" if row.strength == row.strength else ""
        shown = [row.concept or "all", strength, *moved, *(cell(row) or "-" for _, cell in rest)]
        grid.add_row(*map(rich_text, shown))
    out.print(grid)
    if len(rows) > MAX_LINES:
        out.print(rich_text(f"{len(rows) - MAX_LINES} more lines on the page", "dim"))


def _share(value: float) -> str:
    return f"{value:.0%}" if value == value else ""


CELLS: dict[str, Any] = {
    "changed": lambda row: _share(row.changed),
    "stream": lambda row: f"{row.pushed:.1%}" if row.pushed == row.pushed else "",
    "loops": lambda row: _share(row.repetitive),
    "perplexity": lambda row: f"x{row.ratio:.2g}" if row.ratio == row.ratio else "",
    "NLL": lambda row: f"{row.nll:+.2f}" if row.nll == row.nll else "",
    "answers": lambda row: f"{row.answers:+.0%}" if row.answers == row.answers else "",
}
"""Column -> what stands there of a dose: '' where it is not there."""


def print_layers(out: Console, rows: Sequence[Layers]) -> None:
    """Held-out accuracy over the layers of each method."""
    out.print(rich_text("\nLayers", "bold").append_text(rich_text(" (held-out accuracy, first to last)", "not bold")))
    grid = table("model, method", "by layer", "best", "accuracy", "n", "chance")
    for row in rows:
        bars = rich_text(sparkline(_in_few(row.accuracy), not out.is_terminal))
        edges = f"{row.chosen:.2f} ({row.low:.2f}-{row.high:.2f})" if row.n else "-"
        best = "-" if row.best is None else str(row.best)
        cells = [rich_text(v) for v in (best, edges, str(row.n), f"{row.chance:.2f}")]
        grid.add_row(rich_text(f"{row.model}, {row.method}"), bars, *cells)
    out.print(grid)


def _in_few(values: Sequence[float], max_values: int = 16) -> list[float | None]:
    """At most so many values: the greatest of neighbours where there are more; None for what is not there."""
    step = -(-len(values) // max_values) or 1
    runs = [[v for v in values[i : i + step] if v == v] for i in range(0, len(values), step)]
    return [max(run, default=None) for run in runs]


def print_card(out: Console, card: Card) -> None:
    """How well a judge tells the project's own passages apart."""
    out.print(rich_text(f"\nJudge {card.judge}", "bold"))
    out.print(rich_text(card_said(card)))


def print_pair(out: Console, pair: Pair) -> None:
    """A steered text below its unsteered continuation."""
    grid = Table(box=None, pad_edge=False, show_header=False, padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    out.print(rich_text("\n" + ", ".join(f"{axis} {label}" for axis, label in pair.labels.items()), "dim"))
    grid.add_row(rich_text("prompt", "dim"), rich_text(pair.prompt.strip(), "dim"))
    for name, text, said in (("unsteered", pair.unsteered, pair.said_unsteered), ("steered", pair.text, pair.said)):
        shown = rich_text(" ".join(text.split()) or "(empty)")
        grid.add_row(rich_text(name, "bold"), shown.append_text(rich_text(f"  [{said}]" if said else "", "dim")))
    out.print(grid)
