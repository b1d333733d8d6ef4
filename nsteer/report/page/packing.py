"""Turns columns of texts into what a page carries: a head as JSON, and compressed chunks as text."""

from __future__ import annotations

import base64
import gzip
import json
from typing import Any

import numpy as np

from nsteer.report.texts import FILTERS, NUMBERS, Texts
from nsteer.science import outcomes
from nsteer.science.axis import word

ROWS = 500
"""Texts in one chunk: what a page unpacks to show one screen."""

CODES = (*FILTERS, "regime", "named", "unsteered")


def pack(corpus: Texts) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """The head, and [(id, base64 of gzip)]: `columns` (four bytes a figure, column after column), `texts-k`,
    `unsteered-k`.

    The head says what the columns are, in order, and what their codes mean.
    """
    if not corpus.rows:
        return {"rows": 0}, []
    columns = [corpus.codes[name].astype("<u4") for name in CODES]
    columns += [corpus.numbers[name].astype("<f4") for name in NUMBERS]
    head = {
        "rows": corpus.rows,
        "chunk": ROWS,
        "codes": list(CODES),
        "numbers": list(NUMBERS),
        "axes": corpus.axes,
        "names": {name: word(title) for name, title in FILTERS.items()},
        "classes": corpus.classes,
        "regimes": list(outcomes.REGIMES),
        "targets": corpus.targets,
        "prompts": corpus.prompts,
        "texts": -(-corpus.rows // ROWS),
        "unsteered": -(-len(corpus.unsteered) // ROWS),
    }
    packed = [("columns", _packed(b"".join(np.ascontiguousarray(column).tobytes() for column in columns)))]
    for name, rows in (("texts", corpus.text), ("unsteered", corpus.unsteered)):
        for k, start in enumerate(range(0, len(rows), ROWS)):
            text = json.dumps(rows[start : start + ROWS], ensure_ascii=False, separators=(",", ":"))
            packed.append((f"{name}-{k}", _packed(text.encode("utf-8", "replace"))))
    return head, packed


def _packed(data: bytes) -> str:
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode("ascii")


def embedded(data: Any) -> str:
    """JSON that can stand inside a script element: no text of it can end the element or open a comment."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
