"""Turns a store into labelled arrays, selected by label, in which only finished cells show.

    results = nsteer.open("store/families.zarr")
    results.sel(model="zoo/llama", method="generation", emotion="joy", layer=3)     # the vector [d_model]
    results["steering"].nsteer.sel(method="generation", strength=0.05)

xarray's own `.sel(method="generation")` takes `method` for an argument of its own and returns everything; `.nsteer.sel`
takes every dim by its name, and so does the mapping form `.sel({"method": "generation"})`.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import cached_property, reduce
from operator import or_
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from nsteer.errors import LabelError, StoreWarning, did_you_mean
from nsteer.store import Cell, Store, inputs, slug
from nsteer.store.finished import finished, index_of_finished, is_fill
from nsteer.store.group import CELL, CELL_FIELD, chunk_dim
from nsteer.store.leaf import Leaf
from nsteer.store.records import Records
from nsteer.system import markup

PRINCIPAL = {"vectors": "vector", "activations": "pooled"}  # product -> the variable that `sel` returns of it

WITHIN = {"d_model", "token", "position"}
"""Dims along which a variable holds the many numbers of one fact."""

THERE = "there?"
"""What of a table is there; no variable can have this name."""


def open(path: str | os.PathLike) -> Results:
    """The results at a path. Raises StoreError when no store is there, StoreVersionError for another layout."""
    store = Store(path)
    store.check_version()
    return Results(store)


class Results(Mapping):
    """What a store holds: group path -> Dataset, lazy, unfinished cells masked to the fill.

    A group with commit records of other labels than stand at their places, as an old copy that was restored over a
    newer store leaves them, warns once, by StoreWarning; those cells count as not finished.
    """

    def __init__(self, store: Store):
        self.store = store
        self.misplaced: dict[str, int] = {}  # group that was looked at -> records of other labels in it

    @property
    def path(self) -> Path | str:
        return self.store.path

    @property
    def name(self) -> str:
        """The last name of the path."""
        return PurePosixPath(str(self.path)).name

    def __iter__(self) -> Iterator[str]:
        return iter(self.store.groups())

    def __len__(self) -> int:
        return len(self.store.groups())

    def __getitem__(self, key: str | tuple[str, str]) -> xr.Dataset:
        """`results["steering"]`, or of one model: `results["vectors", "zoo/llama"]`."""
        if not isinstance(key, str):
            group, model = key
            key = f"{group}/{self._slug(group, model)}"
        leaf = self._leaf(key)
        return finished(leaf, self._records(leaf))

    def _records(self, leaf: Leaf) -> Records:
        """The records of a group's finished cells."""
        records, others = leaf.sorted_records()
        if others and leaf.path not in self.misplaced:
            message = (
                f"{self.path}: {leaf.path} has {others} commit records of other labels than stand at their places; "
                "those cells count as not finished. Was an older copy put over this store? See nsteer verify"
            )
            warnings.warn(message, StoreWarning, stacklevel=3)
        self.misplaced[leaf.path] = others
        return records

    def __repr__(self) -> str:
        return describe(self)

    def _repr_html_(self) -> str:
        head, *rows = described(self)
        return markup.table(f"nsteer store {self.path}", rows, head)

    @property
    def claims(self) -> xr.Dataset:
        """The claims table that `nsteer report` left, over `row`; its `inputs` name the cells each row came from.

        Raises LabelError when no report was made of this store.
        """
        return self["claims"].isel({"report": -1})

    @property
    def axis(self) -> str:
        """The name of the axis of what vectors stand for: `emotion`, or `concept` in a study of anything else."""
        return self.store.axis

    @property
    def models(self) -> list[str]:
        """The models of the store, in the order in which they came in."""
        leaves = [leaf for path in self if (leaf := self.store.leaf(path))]
        return list(dict.fromkeys(label for leaf in leaves for label in leaf.along("model")))

    @cached_property
    def tree(self) -> xr.DataTree:
        """All groups as one tree, lazy, unfinished cells masked. As of the first use."""
        tree = xr.DataTree.from_dict({path: self[path] for path in self})
        tree.attrs = self.store.attrs()
        return tree

    def sel(self, product: str = "vectors", variable: str | None = None, **labels: Any) -> xr.Dataset | xr.DataArray:
        """What of a product has these labels: one label drops its dim, a list keeps it.

        Vectors and activations come as an array, other products as a Dataset; `variable` names another array.
        Raises LabelError for a product, variable, dim or label that the store does not hold.
        """
        path = self._product(product, labels)
        selection = select(self[path], labels, where=path)
        variable = variable or PRINCIPAL.get(product)
        return selection if variable is None else selection[_variable(selection, variable, where=path)]

    def to_dataframe(self, product: str = "vectors", variable: str | None = None, **labels: Any) -> pd.DataFrame:
        """A table of the finished cells of a product, or of what has these labels: one row for each fact.

        Labels are columns, and so are the variables; numbers along `d_model`, `token` and `position` are left out, and
        come one a row where `variable` names theirs. Rows of cells that are not there are left out; of what is kept in
        chunks (samples, a plan's own prompts) also those of which no number is known.
        Raises LabelError as `sel` does.
        """
        path = self._product(product, labels)
        leaf = self._leaf(path)
        data = finished(leaf, self._records(leaf))
        names = _facts(data) if variable is None else [_variable(data.drop_vars(CELL), variable, where=path)]
        order = list(
            dict.fromkeys(str(d) for name in sorted(names, key=lambda n: -data[n].ndim) for d in data[name].dims)
        )
        there = index_of_finished(leaf, data, order)
        listed = {dim: [wanted] if np.isscalar(wanted) else wanted for dim, wanted in labels.items()}
        selection = select(data[names].assign({THERE: there}), listed, where=path).load()
        if leaf.chunks:  # a chunk may hold fewer samples of one method than of another, and other prompts
            selection[THERE] = selection[THERE] & reduce(or_, [~is_fill(leaf, selection[name]) for name in names])
        table = selection.to_dataframe(dim_order=order).reset_index()
        return table[table.pop(THERE).to_numpy(bool)].reset_index(drop=True)

    def whole(self, path: str, cell: tuple) -> xr.Dataset:
        """A finished cell, all of it read and compared with what was committed; over the dims that do not make cells.

        Raises LabelError for one that is not finished, InputError for one that holds other values than were committed.
        """
        record = self._leaf(path).those([cell]).get(cell)
        if record is None:
            raise LabelError(f"{path} {inputs.cell_text(cell)} is not finished")
        return inputs.read_whole(self.store, path, {cell: record.fingerprint})[cell]

    def product(self, product: str, model: str) -> str:
        """The path of a product of a model. Raises LabelError where the store has none of it."""
        return self._product(product, {"model": model})

    def _product(self, product: str, labels: Mapping[str, Any]) -> str:
        """The path of a product; of the model named among the labels where each model has a group."""
        paths = list(self)
        models = [path for path in paths if path.startswith(f"{product}/")]
        if product in paths or not models:
            return product
        if isinstance(model := labels.get("model"), str):
            direct = f"{product}/{slug(model)}"
            if direct in models and model in self._leaf(direct).along("model"):  # without a look at the others
                return direct
            return f"{product}/{self._slug(product, model)}"
        if len(models) == 1:
            return models[0]
        raise LabelError(
            f"{product} has one group for each model, since their d_model differ; name one: "
            f"model={' or '.join(map(repr, self._models_of(product)))}"
        )

    def _slug(self, product: str, model: str) -> str:
        models = self._models_of(product)
        if model not in models:
            raise LabelError(f"model {model!r} is not in {product}; {_known(model, models)}")
        return slug(model)

    def _models_of(self, product: str) -> list[str]:
        leaves = [self._leaf(path) for path in self if path.startswith(f"{product}/")]
        return [label for leaf in leaves for label in leaf.along("model")]

    def _names(self) -> list[str]:
        """Products, then groups."""
        return list(dict.fromkeys([*(path.split("/")[0] for path in self), *self]))

    def _leaf(self, path: str) -> Leaf:
        if leaf := self.store.leaf(path):
            return leaf
        if models := self._models_of(path):
            raise LabelError(f"{path!r} has one group for each model: [{path!r}, {models[0]!r}]; {_known('', models)}")
        raise LabelError(f"{self.path} holds no {path!r}; {_known(path, self._names())}")


def _variable(data: xr.Dataset, name: str, where: str) -> str:
    """A variable that a group has. Raises LabelError."""
    if name not in data.data_vars:
        raise LabelError(f"{where} has no variable {name!r}; {_known(name, list(data.data_vars))}")
    return name


def _facts(data: xr.Dataset) -> list[str]:
    """The variables of a table: without commit records, and numbers along `WITHIN` where there are others."""
    names = [str(name) for name in data.data_vars if name != CELL]
    return [name for name in names if not WITHIN.intersection(data[name].dims)] or names


def _known(word: object, known: Sequence[Hashable]) -> str:
    """The close match, where there is one, and what there is."""
    names = list(map(str, known))
    hint = did_you_mean(word if isinstance(word, str) else "", names)  # 99 is not a misspelt 9
    everything = did_you_mean("", names)
    return hint if hint == everything else f"{hint} {everything}" if everything else "there is none"


def select(data: xr.Dataset | xr.DataArray, labels: Mapping[str, Any], where: str = "data") -> Any:
    """What of `data` has these labels. A slice takes numbers from start to stop, both included.

    Raises LabelError for a dim that `data` has not, or a label that the dim has not.
    """
    for dim in labels:
        if dim not in data.dims:
            raise LabelError(f"{where} has no dim {dim!r}; {_known(dim, list(data.dims))}")
    return data.sel({dim: _checked(data, dim, wanted, where) for dim, wanted in labels.items()})


def _checked(data: xr.Dataset | xr.DataArray, dim: str, wanted: Any, where: str) -> Any:
    """Labels as xarray selects them, each known to be there."""
    if dim not in data.indexes:
        raise LabelError(f"{where}: dim {dim!r} has no labels to select by")
    known = data.indexes[dim].tolist()
    if isinstance(wanted, slice):
        return [label for label in known if _within(label, wanted, f"{where}: {dim}")]
    if isinstance(wanted, xr.DataArray):
        wanted = wanted.values
    many = isinstance(wanted, list | tuple | range | np.ndarray | pd.Index) and np.ndim(wanted) > 0
    listed = list(wanted) if many else [wanted]
    for label in listed:
        if isinstance(label, bool | np.bool_) or label not in known:
            raise LabelError(f"{where}: {dim} {label!r} is not there; {_known(label, known)}")
    exact = [known[known.index(label)] for label in listed]
    return exact if many else exact[0]


def _within(label: Any, span: slice, where: str) -> bool:
    if isinstance(label, str) or span.step is not None:
        raise LabelError(f"{where}: a range needs number labels and no step; give a list of labels")
    return (span.start is None or label >= span.start) and (span.stop is None or label <= span.stop)


def select_tree(tree: xr.DataTree, labels: Mapping[str, Any]) -> xr.DataTree:
    """Every group that holds the labels, selected. A group without a dim keeps what it has; one whose dim lacks
    the label is left out, as another model's is.

    Raises LabelError when no group has a dim, or none that has one of the dims holds the labels.
    """
    dims = list(dict.fromkeys(str(dim) for node in tree.subtree for dim in node.dims))
    if unknown := [dim for dim in labels if dim not in dims]:
        raise LabelError(f"no group has dim {unknown[0]!r}; {_known(unknown[0], dims)}")
    kept, hits, problems = {}, 0, []
    for node in tree.subtree:
        here = {dim: wanted for dim, wanted in labels.items() if dim in node.dims}
        try:
            selection = select(node.to_dataset(), here, where=node.path)
        except LabelError as error:
            problems.append(error)
        else:
            kept["/" + node.path.removeprefix(tree.path).lstrip("/")] = selection
            hits += bool(here)
    if problems and not hits:
        raise problems[0]
    return xr.DataTree.from_dict(kept)


class Accessor:
    """`.nsteer` of a Dataset, DataArray or DataTree: selection in which `method` is a dim like any other."""

    def __init__(self, data: xr.Dataset | xr.DataArray | xr.DataTree):
        self._data = data

    def sel(self, /, **labels: Any) -> Any:
        """What has these labels: `ds.nsteer.sel(method="generation", layer=3, emotion=["joy", "fear"])`.

        A slice of numbers takes both ends. Raises LabelError for a dim or label that is not there.
        """
        if isinstance(self._data, xr.DataTree):
            return select_tree(self._data, labels)
        return select(self._data, labels)


for _register in (
    xr.register_dataset_accessor,
    xr.register_dataarray_accessor,
    xr.register_datatree_accessor,
):
    _register("nsteer")(Accessor)


def cells(results: Results | str | os.PathLike) -> pd.DataFrame:
    """One row for each committed cell: group, a column for each cell axis, fingerprint (hex), run, finished, seconds.

    `run` is the index into `runs`, whose own records are not listed; `finished` is in UTC.
    """
    store_results = results if isinstance(results, Results) else open(results)
    rows = []
    for path in store_results:
        leaf = store_results.store.leaf(path)
        if leaf is None or path == "runs":
            continue
        for position, cell, _ in store_results._records(leaf):
            labels = dict(zip(leaf.cell, leaf.cell_labels(position), strict=True))
            rows.append({"group": path, **labels, **cell._asdict(), "fingerprint": f"{cell.fingerprint:013x}"})
    ends = list(Cell._fields[:4])  # structure and content are for nsteer verify
    axes = dict.fromkeys(name for row in rows for name in row if name not in {"group", *Cell._fields})
    table = pd.DataFrame(rows, columns=["group", *axes, *ends])
    return table.assign(finished=pd.to_datetime(table["finished"].astype(float), unit="s", utc=True))


def described(results: Results) -> list[tuple[str, str, str]]:
    """A row a group below a head: cells done of cells published, and dims with their sizes."""
    rows = [("group", "cells", "dims")]
    for path in results:
        if leaf := results.store.leaf(path):
            published = math.prod(leaf.dims[axis] for axis in leaf.cell)
            hidden = {CELL_FIELD, *map(chunk_dim, leaf.chunks)}
            dims = " · ".join(f"{dim} {size}" for dim, size in leaf.dims.items() if dim not in hidden)
            rows.append((path, f"{len(results._records(leaf))}/{published}", dims))
    return rows


def describe(results: Results) -> str:
    """What a store holds, as a table in text."""
    rows = described(results)
    wide = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [f"{path:<{wide[0]}}  {done:>{wide[1]}}  {dims}" for path, done, dims in rows]
    return "\n".join([f"nsteer store {results.path}", *lines])
