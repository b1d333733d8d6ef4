"""Turns a filled store into its claims table, and keeps the table in the store."""

from __future__ import annotations

import pandas as pd
import xarray as xr

from nsteer import claims
from nsteer.fingerprints import fingerprint
from nsteer.outcomes import Thresholds
from nsteer.results import Results
from nsteer.store import Group, Variable

DTYPES = {"f": "float32", "i": "int64", "O": "string"}


def evidence(opened: Results) -> claims.Evidence:
    """What a report rests on, with the thresholds of the store's plan."""
    return claims.Evidence(opened, rules(opened), None)


def report(opened: Results, given: claims.Evidence | None = None) -> xr.Dataset:
    """The claims of a store over `row`, from `given` where it is at hand; also kept in the group `claims`."""
    found = claims.of(given or evidence(opened))
    keep(opened, found)
    return found


def table(found: xr.Dataset) -> pd.DataFrame:
    """The table as pandas, one line a row."""
    return claims.table(found)


def rules(opened: Results) -> claims.Rules:
    """The rules of the table, with what the plan of the last run says of thresholds."""
    plan = claims.Evidence(opened, claims.Rules(), None).plan
    given = (plan.get("measure") or {}).get("thresholds") or {}
    return claims.Rules(thresholds=Thresholds(**given))


def keep(opened: Results, found: xr.Dataset) -> None:
    """Commits the table as one cell of `claims`; the same table again changes nothing."""
    made_of = {name: found[name].values.tolist() for name in ("claim", "what", "scope", "ours", "verdict", "why")}
    mark = fingerprint(made_of)
    label = f"{mark:013x}"
    variables = {
        str(name): Variable(("report", "row"), DTYPES[column.dtype.kind], str(name)) for name, column in found.items()
    }
    coords: dict[str, list] = {"report": [label], "row": list(range(found.sizes["row"]))}
    opened.store.prepare(
        [Group("claims", coords, variables, ("report",), attrs={"product": "claims", "product_version": 1})]
    )
    if opened.store.missing("claims", {(label,): mark}):
        opened.store.commit("claims", (label,), found, fingerprint=mark)
