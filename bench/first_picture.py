"""The first picture of the project, from a stored result: steered texts beside the unsteered, drawn by a rule.

    python bench/first_picture.py store/smollm2.zarr

Writes docs/figures/first.svg. The pairs are those that `nsteer report` shows first; no text was picked by hand.
"""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from xml.sax.saxutils import escape

import nsteer
from nsteer.errors import printable
from nsteer.report import overview, reporting
from nsteer.report.overview import Overview, Pair

DOCS = Path(__file__).resolve().parent.parent / "docs"
WIDTH, PAD, LINE, LINES, CHARS = 880, 20, 19, 4, 47
COLUMNS = (PAD, 116, 506)
COLOURS = ("#0072B2", "#D55E00", "#009E73")
STYLE = """
  text { font: 14px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1b1b1d; }
  .quiet { fill: #5c5c63; } .head { font-size: 17px; font-weight: 600; } .small { font-size: 12px; fill: #5c5c63; }
  .name { font-weight: 600; } .card { fill: #f5f5f6; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e9e9ec; } .quiet, .small { fill: #a3a5ad; } .card { fill: #1e2126; }
  }
"""


def wrapped(text: str) -> list[str]:
    """A text in at most LINES lines."""
    return textwrap.wrap(
        " ".join(printable(text).split()), CHARS, max_lines=LINES, placeholder=" …", break_long_words=True
    )


def block(x: int, y: int, text: str, name: str) -> str:
    lines = "".join(
        f'<tspan x="{x}" dy="{LINE if i else 0}">{escape(line)}</tspan>' for i, line in enumerate(wrapped(text))
    )
    return f'<text x="{x}" y="{y}" class="{name}">{lines}</text>'


def row(pair: Pair, y: int, colour: str) -> tuple[str, int]:
    """One pair as SVG, and how high it is."""
    prompt = textwrap.shorten(" ".join(printable(pair.prompt).split()), 104, placeholder=" …")
    high = LINE * max(len(wrapped(pair.unsteered)), len(wrapped(pair.text)))
    concept = next(label for axis, label in pair.labels.items() if axis in ("emotion", "concept"))
    left, wide = COLUMNS[2] - 12, WIDTH - COLUMNS[2]
    parts = [
        f'<text x="{COLUMNS[1]}" y="{y}" class="small">{escape(prompt)} …</text>',
        f'<text x="{COLUMNS[0]}" y="{y + 24}" class="name" style="fill: {colour}">{escape(concept)}</text>',
        f'<rect x="{left}" y="{y + 8}" width="{wide}" height="{high + 8}" rx="4" class="card"/>',
        f'<rect x="{left}" y="{y + 8}" width="4" height="{high + 8}" style="fill: {colour}"/>',
        block(COLUMNS[1], y + 24, pair.unsteered, "quiet"),
        block(COLUMNS[2], y + 24, pair.text, ""),
    ]
    return "\n".join(parts), high + 42


def picture(summary: Overview) -> str:
    """The whole picture as SVG."""
    top = 112
    parts = [
        f'<text x="{COLUMNS[1]}" y="{top - 22}" class="name quiet">unsteered</text>',
        f'<text x="{COLUMNS[2]}" y="{top - 22}" class="name">steered</text>',
    ]
    for pair, colour in zip(summary.pairs, COLOURS, strict=False):
        part, high = row(pair, top, colour)
        parts.append(part)
        top += high
    asked = next(line for line in summary.asked if "steered to" in line)
    title = "One model, one prompt, one vector added: unsteered and steered"
    alt = "; ".join(f"{next(iter(p.labels.values()))}: {p.unsteered[:60]} / {p.text[:60]}" for p in summary.pairs)
    said = [
        f'<text x="{PAD}" y="30" class="head">{escape(title)}</text>',
        *(
            f'<text x="{PAD}" y="{50 + 16 * i}" class="small">{escape(line)}</text>'
            for i, line in enumerate(textwrap.wrap(printable(asked), 138, max_lines=2))
        ),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 8}" width="{WIDTH}" role="img" '
        f'aria-labelledby="t d">\n<title id="t">{escape(title)}</title>\n<desc id="d">{escape(printable(alt))}</desc>\n'
        f"<style>{STYLE}</style>\n" + "\n".join([*said, *parts]) + "\n</svg>\n"
    )


def main(store: str) -> None:
    summary = overview.overview_of(reporting.evidence(nsteer.open(store)), Path(store).name)
    (DOCS / "figures" / "first.svg").write_text(picture(summary), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
