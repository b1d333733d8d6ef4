"""Turns a filled store into its claims table, and keeps the table, and what it rests on, in the store."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import xarray as xr

from nsteer.errors import StoreError
from nsteer.report import claims
from nsteer.report.claims.rsa import between_models
from nsteer.science import outcomes
from nsteer.science.outcomes import Thresholds
from nsteer.store import Group, Variable, slug
from nsteer.store.results import Results
from nsteer.system.fingerprints import fingerprint

DTYPES = {"f": "float32", "i": "int64", "O": "string", "b": "bool"}


def evidence(opened: Results) -> claims.Evidence:
    """What a report rests on, with the thresholds of the store's plan."""
    basis = claims.Evidence(opened, claims.Rules(), None)
    basis.rules = rules_of(basis)
    return basis


def report(opened: Results, given: claims.Evidence | None = None) -> xr.Dataset:
    """The claims of a store over `row`, from `given` where there is one.

    Also kept in the store: the table as `claims`, and as `summary/<name>` what `summaries` tells. A store that can not
    be written is reported all the same: the attribute `not_kept` then says why.
    """
    given = given or evidence(opened)
    claims_table = claims.table_of(given)
    kept = {"claims": claims_table, **{f"summary/{name}": summary for name, summary in summaries(given).items()}}
    try:
        keep(opened, kept)
    except OSError as error:
        claims_table.attrs["not_kept"] = error.strerror or str(error)
    except StoreError as error:
        claims_table.attrs["not_kept"] = str(error)
    return claims_table


def table(claims_table: xr.Dataset) -> pd.DataFrame:
    """The table as pandas, one line a row."""
    return claims.table(claims_table)


def rules(opened: Results) -> claims.Rules:
    """The rules of the table, with what the plan of the last run says of thresholds."""
    return evidence(opened).rules


def rules_of(evidence: claims.Evidence) -> claims.Rules:
    """The same, of an open store."""
    given = (evidence.plan.get("measure") or {}).get("thresholds") or {}
    return claims.Rules(thresholds=Thresholds(**given))


def summaries(evidence: claims.Evidence) -> dict[str, xr.Dataset]:
    """What an analyst asks for first, as labelled arrays: those that the store allows.

    `dose_response`: change of P(target class) against strength, and its trend; `turning_points`: flip point, sweet spot
    and collapse point; `regimes`: share of each regime; `changed_script`, `promoted_tokens`: (model, emotion, script,
    token, count) of what steering wrote in another script, and of what vectors promote; `rsa`: RDM correlation of every
    two models beside its ceiling; `separation/<model>`: every measure of `separation.measure`, layer by layer;
    `swap/<model>`: what vectors follow, text or instruction, layer by layer.
    """
    arrays: dict[str, xr.Dataset] = {}
    if evidence.judged is not None:
        arrays["dose_response"] = outcomes.dose_response(evidence.judged.change)
        if evidence.steered is not None:
            arrays["turning_points"] = claims.turning_points_of(evidence)
    if evidence.steered is not None:
        arrays["regimes"] = outcomes.regime_counts(evidence.steered.regime)
    arrays |= words(evidence)
    if (between := between_models(evidence)) is not None:
        arrays["rsa"] = between
    for model in evidence.with_activations():
        if any(evidence.pair(model)):
            arrays[f"separation/{slug(model)}"] = evidence.measured(model).drop_vars(
                ["cv_influence", "accuracy_hit", "rdm", "emotion_2"]
            )
    for model in evidence.models:
        if swapped := evidence.swapped(model):
            arrays[f"swap/{slug(model)}"] = xr.concat(swapped.values(), pd.Index(list(swapped), name="method"))
    return arrays


def words(evidence: claims.Evidence) -> dict[str, xr.Dataset]:
    """Tables of tokens by script, over `row`; none where there is nothing to tell."""
    token_frames: dict[str, list[pd.DataFrame]] = {"changed_script": [], "promoted_tokens": []}
    results = evidence.results
    if evidence.has("generations") and evidence.has("unsteered"):
        text = results["generations"].text.sel({"control": ["none"]}).load()
        token_frames["changed_script"].append(outcomes.changed_table(text, results["unsteered"].text.load()))
    for model in evidence.models:
        if (tokens := evidence.promoted(model)) is not None:
            token_frames["promoted_tokens"].append(tokens)
    tables = {name: pd.concat(frames, ignore_index=True) for name, frames in token_frames.items() if frames}
    return {
        name: xr.Dataset(
            {str(c): (("row",), table[c].to_numpy()) for c in table}, coords={"row": np.arange(len(table))}
        )
        for name, table in tables.items()
        if len(table)
    }


def keep(opened: Results, kept: Mapping[str, xr.Dataset]) -> None:
    """Commits each dataset as one cell of its group, labelled by what it holds; the same again changes nothing."""
    ready = {path: bare for path, dataset in kept.items() if (bare := _bare(dataset)).data_vars}
    marks = {
        path: fingerprint({name: _plain(column) for name, column in dataset.variables.items()})
        for path, dataset in ready.items()
    }
    with opened.store.adding():
        opened.store.prepare(_declared(path, dataset, f"{marks[path]:013x}") for path, dataset in ready.items())
        for path, dataset in ready.items():
            cell = (f"{marks[path]:013x}",)
            if opened.store.missing(path, {cell: marks[path]}):
                opened.store.commit(path, cell, dataset, fingerprint=marks[path])


def _bare(dataset: xr.Dataset) -> xr.Dataset:
    """What a cell can hold of a dataset."""
    dataset = dataset.drop_vars([name for name in dataset.coords if name not in dataset.dims])
    # an empty dim: such as no opposite pair at all
    return dataset.drop_dims([dim for dim, size in dataset.sizes.items() if not size])


def _declared(path: str, dataset: xr.Dataset, label: str) -> Group:
    """The group of a dataset, with this one cell."""
    variables = {
        str(name): Variable(
            ("report", *map(str, column.dims)),
            DTYPES[column.dtype.kind],
            str(column.attrs.get("long_name", name)),
        )
        for name, column in dataset.items()
    }
    coords: Mapping[str, list] = {"report": [label], **{str(d): dataset[d].values.tolist() for d in dataset.dims}}
    attrs = {"product": path.split("/")[0], "product_version": 1}
    return Group(path, dict(coords), variables, ("report",), attrs=attrs)


def _plain(column: xr.Variable) -> list:
    """Values as JSON holds them: a float by its digits, NaN too."""
    values = column.values.ravel()
    return [repr(label) for label in values.tolist()] if values.dtype.kind == "f" else np.array(values, object).tolist()
