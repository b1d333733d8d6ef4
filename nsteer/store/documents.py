"""Turns declared arrays into the JSON documents of Zarr v3, published by atomic renames.

The documents are put together here, and not by `zarr.consolidate_metadata`, because that reads the shapes on
disk: a group that a killed process left half grown would be published half grown by the next one's root.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, VLenUTF8Codec, ZstdCodec

from nsteer.errors import StoreError

FILE = "zarr.json"


def array_document(
    dims: Sequence[str], shape: Sequence[int], chunks: Sequence[int], dtype: str, fill: Any,
    attrs: Mapping[str, Any], compress: bool = False,
) -> dict:  # fmt: skip
    """The document of one array, spelled by zarr itself. crc32c comes last: a damaged chunk raises on read."""
    memory: dict = {}
    text = dtype == "string"
    packed = [ZstdCodec(level=1)] if text else [BloscCodec(cname="zstd", clevel=1, shuffle="shuffle")]
    zarr.create_array(
        memory,
        shape=tuple(shape),
        chunks=tuple(chunks),
        dtype=dtype,
        fill_value=fill,
        filters=None,
        serializer=VLenUTF8Codec() if text else BytesCodec(),
        compressors=[*(packed if text or compress else []), Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},  # flat: no new folders for each chunk
        dimension_names=tuple(dims),
        attributes=dict(attrs),
    )
    return json.loads(memory[FILE].to_bytes())


def group_document(attrs: Mapping[str, Any], members: Mapping[str, dict] | None = None) -> dict:
    """The document of a group with the published documents of all that is below it."""
    inline = {"kind": "inline", "must_understand": False, "metadata": dict(members or {})}
    return {
        "attributes": dict(attrs),
        "zarr_format": 3,
        "consolidated_metadata": inline,
        "node_type": "group",
    }


def members(document: Mapping | None) -> dict[str, dict]:
    """What a group publishes below it: path -> document."""
    return ((document or {}).get("consolidated_metadata") or {}).get("metadata", {})


def read_raw(folder: Path) -> bytes | None:
    """The text of the document in a folder, or None where there is none."""
    try:
        return (folder / FILE).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_document(folder: Path) -> dict | None:
    """The document in a folder, or None where there is none. StoreError when it is no JSON object."""
    raw = read_raw(folder)
    try:
        document = None if raw is None else json.loads(raw)
    except ValueError as error:
        raise StoreError(f"{folder / FILE} is damaged: {error}") from error
    if document is not None and not isinstance(document, dict):
        raise StoreError(f"{folder / FILE} is damaged: not a JSON object")
    return document


def document_at(folder: Path) -> dict:
    """The document in a folder that must have one. StoreError where it has not."""
    if (document := read_document(folder)) is None:
        raise StoreError(f"{folder / FILE} is gone; the store was changed by something else")
    return document


def write_document(folder: Path, document: Mapping) -> bool:
    """Publishes a document in one rename, unless the very same stands there. True if it was written."""
    if read_document(folder) == document:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"zarr.{secrets.token_hex(8)}.partial"
    try:
        part.write_text(json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        os.replace(part, folder / FILE)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    return True


def sweep(folders: Iterable[Path]) -> None:
    """Removes what killed processes left beside documents. Only under the lock: nobody else writes them."""
    for folder in folders:
        for part in folder.glob("zarr.*.partial"):
            part.unlink(missing_ok=True)


def plain(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as JSON would give them back; numpy numbers become numbers. TypeError names what can not."""
    return json.loads(json.dumps(dict(attrs), allow_nan=False, default=_number))


def _number(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} can not be an attribute of the store")
