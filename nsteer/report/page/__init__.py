"""Turns a store into one HTML page that needs no network and runs under a strict policy.

    page.write("report.html", evidence, None, overview.overview_of(evidence, "quickstart.zarr"))

Everything is in the file: style, scripts, figures as inline SVG, texts as compressed chunks that the page unpacks when
it shows them. The same store gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from importlib import resources
from typing import Any

import jinja2
import xarray as xr
from markupsafe import Markup

from nsteer import __version__
from nsteer.errors import StoreError, printable
from nsteer.report import figures, provenance, texts
from nsteer.report.claims import Evidence
from nsteer.report.overview import RULE, Overview
from nsteer.report.overview.said import card_said
from nsteer.report.page import packing
from nsteer.science import axis
from nsteer.system.files import aside

SCRIPTS = ("page.js", "texts.js")
Ratings = Mapping[str, Mapping[str, float]]


def write(
    path: str | os.PathLike,
    evidence: Evidence,
    table: xr.Dataset | None,
    first: Overview,
    ratings: Ratings | None = None,
) -> None:
    """Writes the page of a store: what `first` tells, then the rest; `table` is its claims table, where one is wanted.

    Raises StoreError if it can not.
    """
    with axis.named(evidence.axis):
        text = html(evidence, table, first, ratings)
    try:
        with aside(path) as temporary:
            temporary.write_bytes(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise StoreError(f"can not write {path}: {error.strerror or error}; name another file with -o") from error


def html(evidence: Evidence, table: xr.Dataset | None, first: Overview, ratings: Ratings | None = None) -> str:
    """The page as text. ratings : as in `figures.plane`."""
    style = asset("page.css")
    scripts = [asset(name) for name in SCRIPTS]
    corpus = texts.collect(evidence)
    head, packed = packing.pack(corpus)
    sections = figures_by_section(evidence, ratings)
    return (
        environment()
        .get_template("page.html")
        .render(
            version=__version__,
            policy=policy([style], scripts),
            style=Markup(style),
            scripts=[Markup(script) for script in scripts],
            name=first.name,
            first=first,
            figure=foremost(sections, any(dose.moved for dose in first.doses)),
            rule=RULE,
            card_said=card_said,
            plan=evidence.plan,
            models=evidence.models,
            claims=None if table is None else claims(table),
            multiplicity="" if table is None else table.attrs.get("multiplicity", ""),
            rules=asdict(evidence.rules),
            sections=sections,
            n_texts=corpus.rows,
            columns={name: axis.word(title) for name, title in texts.FILTERS.items()},
            axes=[(name, labels) for name, labels in corpus.axes.items() if len(labels) > 1],
            fixed=[(name, labels[0]) for name, labels in corpus.axes.items() if len(labels) == 1 and labels[0]],
            head=Markup(packing.embedded(head)),
            packed=[(name, Markup(text)) for name, text in packed],
            missing=provenance.missing(evidence),
            **provenance.collect(evidence),
        )
    )


FOREMOST = ("curves-accuracy", "dose-", "receipts-", "curves-")
"""Names of the figures that may stand first, by rank; where texts are judged, `dose-` is first."""


def foremost(sections: dict[str, list[dict[str, Any]]], judged: bool) -> dict[str, Any] | None:
    """The figure for the first screen, taken out of its section; None where there is none."""
    for wanted in sorted(FOREMOST, key=lambda name: not (judged and name == "dose-")):
        for section, shown in sections.items():
            for figure in shown:
                if figure["id"].startswith(wanted):
                    shown.remove(figure)
                    if not shown:
                        del sections[section]
                    return figure
    return None


def asset(name: str) -> str:
    """A file of this folder, as text."""
    return resources.files("nsteer.report.page").joinpath(name).read_text(encoding="utf-8")


def environment() -> jinja2.Environment:
    env = jinja2.Environment(
        loader=jinja2.FunctionLoader(asset),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters["share"] = lambda value: "" if value != value else f"{value:.0%}"
    env.filters["times"] = lambda value: "" if value != value else f"{value:.2g}"
    env.filters["strength"] = lambda value: "" if value != value else f"{value:g}"
    env.filters["pretty"] = lambda data: json.dumps(data, indent=2, ensure_ascii=False)
    return env


def policy(styles: list[str], scripts: list[str]) -> str:
    """The content security policy: nothing but these very scripts and styles, and pictures that are in the file."""

    def hashes(texts: list[str]) -> str:
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(p.encode()).digest()).decode()}'" for p in texts)

    rules = [f"script-src {hashes(scripts)}", f"style-src {hashes(styles)}", "img-src data:"]
    return "; ".join(["default-src 'none'", *rules, "base-uri 'none'", "form-action 'none'"])


def claims(table: xr.Dataset) -> list[dict[str, Any]]:
    """The claims table as rows of JSON data; figures that are not there are None."""
    rows = []
    for i in range(table.sizes["row"]):
        row = {str(name): column.values[i] for name, column in table.items()}
        row = {k: None if isinstance(v, float) and v != v else v for k, v in row.items()}
        rows.append({**row, "inputs": json.loads(str(row["inputs"]))})
    return rows


def figures_by_section(evidence: Evidence, ratings: Ratings | None) -> dict[str, list[dict[str, Any]]]:
    """Section -> its figures, as inline SVG with their words."""
    sections: dict[str, list[dict[str, Any]]] = {}
    for k, picture in enumerate(figures.pictures(evidence=evidence, ratings=ratings)):
        shown = figures.svg(picture.figure, picture.title, picture.alt, f"f{k}")
        data = {
            "id": picture.name,
            "title": picture.title,
            "caption": picture.caption,
            "alt": picture.alt,
            "svg": Markup(shown),
        }
        sections.setdefault(picture.section, []).append(data)
    return sections
