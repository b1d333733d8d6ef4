"""Turns what an object says of itself into HTML for notebooks; texts of models, labels and files stay text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from nsteer.errors import printable

STYLE = "text-align: left; vertical-align: top; white-space: pre-wrap"


def text(value: object) -> str:
    """Anything as text in HTML, whatever it holds."""
    return escape(printable(value))


def table(title: object, rows: Iterable[Sequence[object]], head: Sequence[object] = ()) -> str:
    """A table under a title, a row of cells each; `head` names the columns."""
    body = [_row("th", head)] * bool(head) + [_row("td", row) for row in rows]
    return f"<table><caption style='{STYLE}'><b>{text(title)}</b></caption>{''.join(body)}</table>"


def _row(tag: str, cells: Sequence[object]) -> str:
    return "<tr>" + "".join(f"<{tag} style='{STYLE}'>{text(cell)}</{tag}>" for cell in cells) + "</tr>"


def bar(share: float, said: object) -> str:
    """A bar that is full at share 1, and words beside it."""
    return f"<progress max='1' value='{min(max(share, 0.0), 1.0):.3f}'></progress> {text(said)}<br>"
