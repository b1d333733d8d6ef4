"""Turns declared arrays into the JSON documents of Zarr v3, published by atomic renames.

The documents are put together here, and not by `zarr.consolidate_metadata`, because that reads the shapes on
disk: a group that a killed process left half grown would be published half grown by the next one's root.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, VLenUTF8Codec, ZstdCodec

from nsteer.errors import StoreError
from nsteer.store import schema
from nsteer.store.places import Changed, Place

FILE = "zarr.json"

MAX_KNOWN = 4 * 2**20
"""Bytes of documents, as they lie in files, of which a process keeps what was read from them."""

_right: set[bytes] = set()
"""Digests of documents that this process has checked or written, those too that are too large to keep."""

MAX_RIGHT = 10_000


class Known:
    """Documents that this process has read, by the digest of their bytes: a root is read far more often than it
    changes. Those used last are kept, as long as they fit. Nobody may change one."""

    def __init__(self, max_bytes: int = MAX_KNOWN):
        self._max_bytes, self._bytes, self._lock = max_bytes, 0, threading.Lock()
        self._documents: OrderedDict[bytes, tuple[dict, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._documents)

    def get(self, digest: bytes) -> dict | None:
        """The document, None where it is not kept."""
        with self._lock:
            if digest not in self._documents:
                return None
            self._documents.move_to_end(digest)
            return self._documents[digest][0]

    def keep(self, digest: bytes, document: dict, size: int) -> None:
        """Keeps a document of `size` bytes, and lets go of those that were not used for longest."""
        with self._lock:
            if size > self._max_bytes or digest in self._documents:
                return
            self._documents[digest] = document, size
            self._bytes += size
            while self._bytes > self._max_bytes:
                _, (_, gone) = self._documents.popitem(last=False)
                self._bytes -= gone


_known = Known()


def array_document(
    dims: Sequence[str], shape: Sequence[int], chunks: Sequence[int], dtype: str, fill: Any,
    attrs: Mapping[str, Any], compress: bool = False,
) -> dict:  # fmt: skip
    """The document of one array, spelled by zarr itself. crc32c comes last: a damaged chunk raises on read."""
    text = _array_text(tuple(dims), tuple(chunks), dtype, fill, json.dumps(dict(attrs)), compress)
    return {**json.loads(text), "shape": list(shape)}


@lru_cache(maxsize=4096)
def _array_text(
    dims: tuple[str, ...], chunks: tuple[int, ...], dtype: str, fill: Any, attrs: str, compress: bool
) -> bytes:
    """The document of an array of one chunk; that of a larger one is it, but for the shape."""
    memory: dict = {}
    text = dtype == "string"
    packed = [ZstdCodec(level=1)] if text else [BloscCodec(cname="zstd", clevel=1, shuffle="shuffle")]
    zarr.create_array(
        memory,
        shape=chunks,
        chunks=chunks,
        dtype=dtype,
        fill_value=fill,
        filters=None,
        serializer=VLenUTF8Codec() if text else BytesCodec(),
        compressors=[*(packed if text or compress else []), Crc32cCodec()],
        chunk_key_encoding={"name": "default", "separator": "."},  # flat: no new folders for each chunk
        dimension_names=dims,
        attributes=json.loads(attrs),
    )
    return memory[FILE].to_bytes()


def group_document(attrs: Mapping[str, Any], members: Mapping[str, dict] | None = None) -> dict:
    """The document of a group with the published documents of all that is below it.

    Siblings stand together: zarr reads what is below a group from neighbouring entries alone.
    """
    inline = {"kind": "inline", "must_understand": False, "metadata": _together(members or {})}
    return {
        "attributes": dict(attrs),
        "zarr_format": 3,
        "consolidated_metadata": inline,
        "node_type": "group",
    }


def _together(members: Mapping[str, dict]) -> dict[str, dict]:
    """The same entries, siblings next to each other, otherwise in their order."""
    rank: dict[str, int] = {}

    def place(path: str) -> list[int]:
        names = path.split("/")
        return [rank.setdefault("/".join(names[: i + 1]), len(rank)) for i in range(len(names))]

    places = {path: place(path) for path in members}
    return {path: members[path] for path in sorted(members, key=places.__getitem__)}


def members(document: Mapping | None) -> dict[str, dict]:
    """What a group publishes below it: path -> document."""
    return ((document or {}).get("consolidated_metadata") or {}).get("metadata", {})


def file_of(folder: str) -> str:
    """The name of the document of a folder; "" is the root."""
    return f"{folder}/{FILE}" if folder else FILE


def parse(place: Place, folder: str, raw: bytes | None) -> dict | None:
    """A document from its bytes, None from None; it may be shared, so nobody changes it. StoreError when they are no
    document that nsteer could have written: zarr, which runs what a document names, never sees it."""
    if raw is None:
        return None
    try:
        if len(raw) > schema.MAX_BYTES:
            raise schema.Unfit(f"{len(raw):,} bytes")
        digest = _digest(raw)
        if (document := _known.get(digest)) is None:
            document = json.loads(raw)
            if not isinstance(document, dict):
                raise schema.Unfit("not a JSON object")
            if digest not in _right:
                schema.check(document)
                _remember(digest)
            _known.keep(digest, document, len(raw))
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{document_path(place, folder)} is damaged: {error}; see nsteer verify") from None
    return document


def _digest(raw: bytes) -> bytes:
    return hashlib.blake2b(raw, digest_size=16).digest()


def _remember(digest: bytes) -> None:
    if len(_right) >= MAX_RIGHT:
        _right.clear()
    _right.add(digest)


def document_path(place: Place, folder: str) -> str:
    """The document of a folder, as messages name it."""
    return f"{place.name}/{file_of(folder)}"


def read_document(place: Place, folder: str) -> dict | None:
    """The document in a folder, or None where there is none. StoreError when it is no JSON object."""
    return parse(place, folder, place.read(file_of(folder)))


def read_all(place: Place, folders: Sequence[str], strict: bool = False) -> dict[str, dict | None]:
    """The documents that are there, in as few requests as the place needs.

    A damaged one counts as none, or raises StoreError if `strict`.
    """
    contents = place.read_all(list(map(file_of, folders)))
    turn = parse if strict else _tolerant
    return {folder: turn(place, folder, contents.get(file_of(folder))) for folder in folders}


def document_at(place: Place, folder: str) -> dict:
    """The document in a folder that must have one. StoreError where it has not."""
    if (document := read_document(place, folder)) is None:
        raise StoreError(f"{document_path(place, folder)} is gone; the store was changed by something else")
    return document


def write_document(
    place: Place, folder: str, document: Mapping, over: Mapping | None = None, seen: str | None = None
) -> bool:
    """Publishes a document at once, unless the very same stands there. True if it was written.

    `over`: the document that it was made from; `seen`: the version of the file that was read while the lock was surely
    ours. StoreError when another one stands there now: the lock was lost.
    """
    text = json.dumps(document, ensure_ascii=False, allow_nan=False).encode()  # no indent: many times as fast
    there = place.read(file_of(folder))
    if there == text or (current_document := _tolerant(place, folder, there)) == document:
        return False
    raw, version = place.versioned(file_of(folder))
    try:
        if over is not None and (current_document if raw == there else _tolerant(place, folder, raw)) != over:
            raise Changed
        place.write(file_of(folder), text, over=version if seen is None else seen)
    except Changed:
        raise lock_lost(document_path(place, folder)) from None
    _remember(_digest(text))  # ours need no check
    return True


def lock_lost(name: str) -> StoreError:
    """What is said when somebody else wrote under a lock that was ours."""
    return StoreError(f"{name} was changed by another process while this one held the lock; run again")


def _tolerant(place: Place, folder: str, raw: bytes | None) -> dict | None:
    """A document as it stands, None where it is damaged: it is put again then."""
    try:
        return parse(place, folder, raw)
    except StoreError:
        return None


def as_json(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes as JSON would give them back; numpy numbers become numbers. TypeError names what can not."""
    return json.loads(json.dumps(dict(attrs), allow_nan=False, default=_number))


def _number(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} can not be an attribute of the store")
