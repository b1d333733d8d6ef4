"""Turns a document of a store, a stranger's perhaps, into one that zarr may see, or refuses it by name.

zarr looks codecs and data types up by the names in a document, and makes arrays as large as it declares. So what
a document may say is what nsteer writes: format 3, a few data types and codecs, regular chunks, attributes within
limits. Nothing here reads a chunk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from nsteer.store.group import cell_dims

MAX_BYTES = 2**26
"""Bytes of a document: one of a million labels is far smaller, since labels lie in chunks."""

MAX_MEMBERS = 100_000
MAX_LABELS = 2**31
MAX_VALUES = 2**48
MAX_CHUNK = 2**29
MAX_DEPTH = 12
MAX_DIMS = 12

TYPES = {"float32": 4, "float64": 8, "int32": 4, "int64": 8, "bool": 1, "string": 16}
"""Data types -> bytes of a value."""

CODECS: dict[str, set[str]] = {
    "bytes": {"endian"},
    "blosc": {"typesize", "cname", "clevel", "shuffle", "blocksize"},
    "crc32c": set(),
    "vlen-utf8": set(),
    "zstd": {"level", "checksum"},
}
"""Codecs -> what may stand in their configuration."""

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}", re.ASCII)


class Unfit(ValueError):
    """What a document says that no document of ours says."""


def check(document: Mapping[str, Any]) -> None:
    """Raises Unfit for a document, or one published in it, that nsteer could not have written."""
    _sized(document)
    if document.get("node_type") == "array":
        return _array(document)
    _node(document, "group")
    inline = document.get("consolidated_metadata")
    if inline is None:
        return
    published = inline.get("metadata") if isinstance(inline, dict) else None
    if not isinstance(inline, dict) or inline.get("kind") != "inline" or not isinstance(published, dict):
        raise Unfit("its consolidated metadata are none")
    if len(published) > MAX_MEMBERS:
        raise Unfit(f"it publishes {len(published):,} members")
    for path, member in published.items():
        if not all(NAME.fullmatch(component) and ".." not in component for component in path.split("/")):
            raise Unfit(f"a member of it has the name {path[:80]!r}")
        if not isinstance(member, dict):
            raise Unfit(f"{path}: no document")
        try:
            if member.get("node_type") == "array":
                _array(member)
            else:
                _node(member, "group")
                if (member.get("consolidated_metadata") or {}) not in ({}, EMPTY):
                    raise Unfit("a group within it publishes members of its own")
        except Unfit as error:
            raise Unfit(f"{path}: {error}") from None


EMPTY = {"kind": "inline", "must_understand": False, "metadata": {}}


def _node(document: Mapping[str, Any], kind: str) -> None:
    if document.get("node_type") != kind:
        raise Unfit(f"node type {_said(document.get('node_type'))}, not group or array")
    if document.get("zarr_format") != 3 or isinstance(document.get("zarr_format"), bool):
        raise Unfit(f"zarr format {_said(document.get('zarr_format'))}, not 3")
    if not isinstance(document.get("attributes", {}), dict):
        raise Unfit("attributes that are no mapping")


ARRAY = {
    *("shape", "data_type", "chunk_grid", "chunk_key_encoding", "fill_value", "codecs", "attributes"),
    *("dimension_names", "zarr_format", "node_type", "storage_transformers"),
}


def _array(document: Mapping[str, Any]) -> None:
    _node(document, "array")
    if unknown := document.keys() - ARRAY:
        raise Unfit(f"an array with {_said(sorted(unknown)[0])}")
    if document.get("storage_transformers"):
        raise Unfit("an array with storage transformers")
    dtype = document.get("data_type")
    if not isinstance(dtype, str) or dtype not in TYPES:
        raise Unfit(f"data type {_said(dtype)}, none of {', '.join(TYPES)}")
    shape = _counts(document.get("shape"), "shape", 0)
    grid = document.get("chunk_grid")
    if not isinstance(grid, dict) or grid.get("name") != "regular" or not isinstance(grid.get("configuration"), dict):
        raise Unfit("a chunk grid that is not regular")
    chunks = _counts(grid["configuration"].get("chunk_shape"), "chunk shape", 1)
    names = document.get("dimension_names")
    if not isinstance(names, list) or not all(isinstance(name, str) and NAME.fullmatch(name) for name in names):
        raise Unfit("dimensions without names")
    if not len(shape) == len(chunks) == len(names) or len(set(names)) < len(names):
        raise Unfit(f"{len(shape)} sizes, {len(chunks)} chunk sizes and the dimensions {names}")
    if math.prod(shape) > MAX_VALUES:
        raise Unfit(f"shape {shape}: more values than any store holds")
    if TYPES[dtype] * math.prod(chunks) > MAX_CHUNK:
        raise Unfit(f"chunk shape {chunks}: more than {MAX_CHUNK:,} bytes")
    if document.get("chunk_key_encoding") != {"name": "default", "configuration": {"separator": "."}}:
        raise Unfit("chunks under other names than c.0")
    _codecs(document.get("codecs"), dtype)
    _fill(document.get("fill_value"), dtype)


def _counts(sizes: Any, what: str, least: int) -> list[int]:
    if not isinstance(sizes, list) or len(sizes) > MAX_DIMS:
        raise Unfit(f"a {what} that is no list of up to {MAX_DIMS} sizes")
    if not all(type(count) is int and least <= count <= MAX_LABELS for count in sizes):
        raise Unfit(f"{what} {_said(sizes)}")
    return sizes


def _codecs(codecs: Any, dtype: str) -> None:
    if not isinstance(codecs, list) or not all(isinstance(codec, dict) for codec in codecs):
        raise Unfit("codecs that are no list")
    names = [codec.get("name") for codec in codecs]
    if foreign := [name for name in names if not isinstance(name, str) or name not in CODECS]:
        raise Unfit(f"the codec {_said(foreign[0])}, none of {', '.join(CODECS)}")
    for codec in codecs:
        settings = codec.get("configuration", {})
        if (
            not isinstance(settings, dict)
            or settings.keys() - CODECS[codec["name"]]
            or codec.keys() - {"name", "configuration"}
        ):
            raise Unfit(f"the codec {codec['name']} with other settings than its own")
        if not all(type(value) in (int, str, bool) and len(str(value)) < 40 for value in settings.values()):
            raise Unfit(f"the codec {codec['name']} with settings that are none")
    text = dtype == "string"
    packed = ("zstd",) if text else ("blosc",)
    first = "vlen-utf8" if text else "bytes"
    if names not in ([first, "crc32c"], [first, *packed, "crc32c"]):
        raise Unfit(f"the codecs {', '.join(names)} of {dtype}")
    for codec in codecs:
        _settings(codec["name"], codec.get("configuration", {}), TYPES[dtype])


def _settings(name: str, settings: Mapping[str, Any], size: int) -> None:
    """The settings that zarr's own classes would refuse by words of their own."""
    right = {
        "bytes": settings.get("endian", "little") == "little",
        "blosc": (settings.get("cname"), settings.get("shuffle"), settings.get("typesize"), settings.get("blocksize"))
        == ("zstd", "shuffle", size, 0)
        and settings.get("clevel") in range(10),
        "zstd": settings.get("level") in range(-50, 23) and type(settings.get("checksum", False)) is bool,
    }
    if not right.get(name, not settings):
        raise Unfit(f"the codec {name} with the settings {_said(dict(settings))}")


def _fill(fill_value: Any, dtype: str) -> None:
    kinds: dict[str, tuple[type, ...]] = {"string": (str,), "bool": (bool,)}
    special = dtype.startswith("float") and fill_value in ("NaN", "Infinity", "-Infinity")
    right = kinds.get(dtype, (int, float) if dtype.startswith("float") else (int,))
    if not special and (not isinstance(fill_value, right) or (isinstance(fill_value, bool) and dtype != "bool")):
        raise Unfit(f"the fill value {_said(fill_value)} of {dtype}")
    if dtype.startswith("int") and not -(2 ** (8 * TYPES[dtype] - 1)) <= fill_value < 2 ** (8 * TYPES[dtype] - 1):
        raise Unfit(f"the fill value {_said(fill_value)} of {dtype}")


def _sized(node: Any, depth: int = 0) -> None:
    """Raises Unfit for what is nested deeper than a document of ours."""
    if depth > MAX_DEPTH:
        raise Unfit("it is nested too deep")
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        if isinstance(value, dict | list):
            _sized(value, depth + 1)


def _said(content: Any) -> str:
    text = repr(content)
    return text if len(text) <= 60 else f"{text[:57]}…"


def leaf(document: Mapping[str, Any]) -> None:
    """Raises Unfit for a group of results, right as a document, whose attributes do not fit its arrays."""
    attrs, arrays = document["attributes"], document["consolidated_metadata"]["metadata"]
    dims = {name: array["shape"][0] for name, array in arrays.items() if array.get("dimension_names") == [name]}
    cell, chunks, structures = (attrs.get(f"nsteer_{name}") for name in ("cell", "chunks", "structures"))
    if not all(array.get("node_type") == "array" for array in arrays.values()):
        raise Unfit("a group of results that holds groups")
    if not isinstance(cell, list) or not cell or not all(isinstance(dim, str) and dim in dims for dim in cell):
        raise Unfit(f"the cell axes {_said(cell)}, which are not all its dims")
    right = isinstance(chunks, dict) and all(
        dim in dims and type(size) is int and 0 < size <= MAX_LABELS and f"{dim}_chunk" in dims
        for dim, size in chunks.items()
    )
    if not right:
        raise Unfit(f"the chunks {_said(chunks)}")
    if not isinstance(attrs.get("coordinates", ""), str) or set(attrs.get("coordinates", "").split()) - arrays.keys():
        raise Unfit("coordinates that it does not hold")
    if not isinstance(structures, list) or not all(_structure(structure, dims) for structure in structures):
        raise Unfit("structures of cells that are none")
    if not isinstance(attrs.get("nsteer_labels", {}), dict):
        raise Unfit("numbers of labels that are none")
    order = attrs.get("nsteer_ordered_as", "x")
    if not isinstance(order, str) or not all(map(NAME.fullmatch, order.split("/"))):
        raise Unfit(f"labels in the order of {_said(order)}, which is no group")
    for name, array in arrays.items():
        wrong = [d for d, n in zip(array["dimension_names"], array["shape"], strict=True) if dims.get(d) != n]
        if wrong:
            raise Unfit(f"{name}: its size along {wrong[0]!r} is not the number of labels there")
    axes = [*cell, "cell_field"]
    if "cell" not in arrays or arrays["cell"]["dimension_names"] != axes or arrays["cell"]["data_type"] != "float64":
        raise Unfit("no array of commit records over its cell axes")
    if math.prod(dims[axis] for axis in cell) > MAX_CELLS:
        raise Unfit(f"more than {MAX_CELLS:,} cells")
    cuts = cell_dims(cell, chunks)
    variables = arrays.keys() - dims.keys() - set(attrs.get("coordinates", "").split()) - {"cell"}
    for name in variables:
        if lost := [axis for axis in cuts if axis not in arrays[name]["dimension_names"]]:
            raise Unfit(f"{name}: without the cell axis {lost[0]!r}")
    for structure in structures:
        if lost := [name for name in structure["variables"] if name not in variables]:
            raise Unfit(f"cells that hold {_said(lost[0])}, which is none of its variables")
        inner = {dim for name in structure["variables"] for dim in arrays[name]["dimension_names"]} - cuts.keys()
        if lost := sorted(inner - structure["sizes"].keys()):
            raise Unfit(f"cells of no size along {lost[0]!r}")


MAX_CELLS = 10**7
"""Of a group; each takes some 100 bytes when the group is opened."""


def _structure(structure: Any, dims: Mapping[str, int]) -> bool:
    if not isinstance(structure, dict) or not isinstance(structure.get("variables"), list):
        return False
    sizes = structure.get("sizes")
    right = isinstance(sizes, dict) and all(
        dim in dims and type(size) is int and 0 <= size <= dims[dim] for dim, size in sizes.items()
    )
    return right and all(isinstance(name, str) for name in structure["variables"])
