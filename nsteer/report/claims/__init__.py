"""Turns a store into the claims table: every claim of Jeong 2026 beside what was measured, from labels alone.

    found = claims.claims(nsteer.open("store/jeong2026-zoo.zarr"))    # xr.Dataset over `row`
    claims.table(found)                                               # pandas, one line a row
    claims.follow(results, found, row=3)                              # the Datasets that row 3 came from
    claims.cells(results, found, row=3)                               # and the cells, with their commit records

What the store lacks gives a row "cannot be compared" that says what is missing; a figure whose interval leaves the
question open is "inconclusive": a verdict is not a guess (`nsteer.report.claims.verdicts`). What the paper does not
state is named in `assumed`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from nsteer.report.claims.cost import capability_cost
from nsteer.report.claims.evidence import AGREES, DIFFERS, INCONCLUSIVE, OPEN, Evidence, Row, Rules, outcomes_of
from nsteer.report.claims.extraction import methods_differ
from nsteer.report.claims.geometry import geometry
from nsteer.report.claims.judges import judges_agree
from nsteer.report.claims.middle import middle_layers
from nsteer.report.claims.regimes import regimes
from nsteer.report.claims.rsa import rsa
from nsteer.report.claims.scripts import entanglement
from nsteer.report.claims.steering import steering_works, turning_points, turning_points_of
from nsteer.report.claims.streams import anisotropy
from nsteer.report.claims.swap import swap
from nsteer.report.claims.verdicts import decided
from nsteer.science import statistics
from nsteer.science.axis import EMOTION
from nsteer.store import Cell
from nsteer.store.results import Results, select

__all__ = [
    "AGREES",
    "DIFFERS",
    "INCONCLUSIVE",
    "OPEN",
    "Evidence",
    "Row",
    "Rules",
    "cells",
    "claims",
    "follow",
    "inputs",
    "outcomes_of",
    "table",
    "table_of",
    "turning_points",
    "turning_points_of",
]


def claims(
    results: Results, rules: Rules | None = None, targets: Mapping[str, Mapping[str, Any]] | None = None
) -> xr.Dataset:
    """The claims table of a store, over `row`: the fields of `Row`, `inputs` as JSON.

    targets : scenario kind -> {emotion, sign}; those of the plan's text set when None
    The same store, rules and seed give the same digits. Attributes: `rules` (JSON), `multiplicity` (what is left of the
    table's p values when all are counted).
    """
    return table_of(Evidence(results, rules or Rules(), targets))


def table_of(evidence: Evidence) -> xr.Dataset:
    """The claims table of a store by its evidence: what was computed for it can be used again."""
    rows: list[Row] = []
    for claim in (*(CLAIMS if evidence.axis == EMOTION else ()), capability_cost, judges_agree):
        rows += claim(evidence)
    return dataset(decided(rows), evidence.rules)


CLAIMS = (methods_differ, middle_layers, anisotropy, steering_works, regimes, entanglement, rsa, geometry, swap)
"""The claims of the paper, which are about emotions: of a store of concepts there are none."""


def dataset(rows: Sequence[Row], rules: Rules) -> xr.Dataset:
    """Rows as labelled columns."""
    columns: dict[str, Any] = {}
    for name in Row.__dataclass_fields__:
        values = [getattr(row, name) for row in rows]
        if name == "inputs":
            values = [
                json.dumps([{"group": g, "labels": dict(s)} for g, s in listed], ensure_ascii=False)
                for listed in values
            ]
        kind = (
            object
            if isinstance(getattr(Row("", "", "", ""), name), str | tuple)
            else type(getattr(Row("", "", "", ""), name))
        )
        columns[name] = (("row",), np.array(values, kind))
    tests = {f"{row.claim}. {row.what} ({row.scope})": row.p for row in rows if row.tests}
    attrs = {
        "title": "claims of Jeong 2026 (arXiv 2604.04064) beside what was measured",
        "rules": json.dumps(asdict(rules)),
        "multiplicity": statistics.multiplicity(tests),
    }
    return xr.Dataset(columns, coords={"row": np.arange(len(rows))}, attrs=attrs)


def table(report: xr.Dataset) -> pd.DataFrame:
    """The table as pandas, one line a row, without the inputs; of `claims`, or as a store keeps it (`.claims`)."""
    names = [name for name in Row.__dataclass_fields__ if name != "inputs"]
    return report[names].reset_coords(drop=True).to_dataframe().reset_index(drop=True)


def inputs(report: xr.Dataset, row: int) -> list[tuple[str, dict[str, Any]]]:
    """What a row came from: [(group, {dim: label or labels})]."""
    listed = json.loads(str(report.inputs.sel({"row": row}).values.item()))
    return [(entry["group"], entry["labels"]) for entry in listed]


def follow(results: Results, report: xr.Dataset, row: int) -> list[xr.Dataset]:
    """What of the store a row came from."""
    return [select(results[group], labels, where=group) for group, labels in inputs(report, row)]


def cells(results: Results, report: xr.Dataset, row: int) -> dict[str, dict[tuple, Cell]]:
    """The finished cells that a row came from: group -> labels along its cell axes -> commit record.

    A record tells the cell's fingerprint, the run that made it and when, and a fingerprint of its values.
    """
    records: dict[str, dict[tuple, Cell]] = {}
    for group, labels in inputs(report, row):
        leaf = results.store.leaf(group)
        axes = leaf.cell if leaf else ()
        wanted = [_listed(labels[axis]) if axis in labels else None for axis in axes]
        records.setdefault(group, {}).update(
            {
                key: record
                for key, record in results.store.committed(group).items()
                if all(some is None or label in some for label, some in zip(key, wanted, strict=True))
            }
        )
    return records


def _listed(label: Any) -> list:
    return label if isinstance(label, list) else [label]
