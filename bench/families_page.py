"""Turns the rows of bench/families.py into docs/families.md."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

EXACT = 1e-4
"""The largest relative difference of a captured stream that is called equal: rounding in float32 is far below."""

HEAD = (
    "| family | outcome | streams off by | steered texts equal | `attn_out` | `mlp_out` | logits | batches | rows |\n"
    "|---|---|---|---|---|---|---|---|---|"
)

OUTCOMES = {
    "exact": "streams and steered texts as by hooks",
    "read only": "streams as by hooks; steering while it generates is refused by name",
    "refused": "the model is refused in one line, nothing is computed",
    "wrong": "other numbers than by hooks, and no word of it",
    "broken": "a failure that is that shows a traceback or is not reported",
    "not built": "the tiny model can not be made here, or takes too long: nothing is known",
}

TOP = """# Model families

Made by `python bench/families.py` with {versions}.
For {count} families that transformers has a causal language model for, a tiny model with random weights (float32, CPU)
is read and steered in padded batches of three texts of 4, 23 and 2 tokens, and compared with plain torch hooks on one
text at a time. Read: every position at blocks 5 and 2, at every site. Steered: a vector is added at each site, at the
prompt, at generated tokens or at both; greedy texts of 6
tokens, and those without steering, must be the same token by token. Streams are called equal up to {exact:.0e} of their
largest value.

{counts}

What the columns say: the module whose output is `attn_out` or `mlp_out`, found and proved when a model is loaded
([where](howto/where.md)), several in hybrid models, none where the site is refused by name; what makes logits of the
head's output (*returned*: no arithmetic is known, log-probabilities are read from what the model returns); which texts
may share a batch (*any*, with padding; of *equal* length; *none*); whether rows that have ended *leave* their batch or
*stay* (slower, equally right; [why](#why-rows-stay)). A family is not its checkpoints: own code, quantisation and sizes
are not tried here.
"""


def outcome(row: dict[str, Any]) -> str:
    """Which of OUTCOMES a row is."""
    for key in ("not_built", "broken"):
        if key in row:
            return key.replace("_", " ")
    if max(row.get("capture", {}).values(), default=0.0) > EXACT:
        return "wrong"
    if "refused" in row:
        return "refused"
    if row["stepless"]:
        return "read only"
    return "exact" if row["equal"] + row["ties"] == row["of"] else "wrong"


def line(row: dict[str, Any]) -> str:
    """A family's row of the table."""
    off = f"{max(row['capture'].values()):.0e}" if row.get("capture") else ""
    tied = f", {row['ties']} at a tie" if row.get("ties") else ""
    equal = f"{row['equal']} of {row['of']}{tied}" if "equal" in row else ""
    paths = [" / ".join(f"`{path}`" for path in row.get("sites", {}).get(site, ())) for site in ("attn_out", "mlp_out")]
    scaling = row.get("scaling")
    logits = scaling if isinstance(scaling, str) else f"{scaling[0]} {scaling[1]:g}" if scaling else ""
    rows = "" if "stays" not in row else "stay" if row["stays"] else "leave"
    cells = [row["family"], outcome(row), off, equal, *paths, logits, row.get("batches", ""), rows]
    return f"| {' | '.join(cells)} |"


def counts(rows: Sequence[dict[str, Any]]) -> str:
    """How many rows have which outcome, as a list."""
    outcomes = [outcome(row) for row in rows]
    return "\n".join(f"- **{name}** {outcomes.count(name)}: {words}" for name, words in OUTCOMES.items())


def reasons(rows: Sequence[dict[str, Any]], key: str) -> list[str]:
    """What was said, and of which families, as a list: the most frequent first."""
    families = defaultdict(list)
    for row in rows:
        if row.get(key):
            families[" ".join(row[key].split())].append(row["family"])
    often = sorted(families.items(), key=lambda item: -len(item[1]))
    return [f"- {', '.join(of)}: {said}" for said, of in often]


def page(rows: Sequence[dict[str, Any]]) -> str:
    """The whole page, in Markdown."""
    packages = sorted({f"{package} {version}" for row in rows for package, version in row["versions"].items()})
    top = TOP.format(versions=", ".join(packages), count=len(rows), exact=EXACT, counts=counts(rows))
    parts = [top, "\n".join([HEAD, *map(line, rows)]) + "\n"]
    sections = {
        "Refused, with which words": "refused",
        "Read only, because": "stepless",
        "Why texts do not share batches": "batches_because",
        "Why rows stay": "stays",
        "Broken": "broken",
        "Not built": "not_built",
    }
    for title, key in sections.items():
        if said := reasons(rows, key):
            parts.append(f"## {title}\n\n" + "\n".join(said) + "\n")
    return "\n".join(parts)
