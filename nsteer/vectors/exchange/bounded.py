"""Holds what a file of vectors declares against what it can hold, and makes one line of whatever is wrong with it."""

from __future__ import annotations

import io
import json
import math
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nsteer.errors import ExchangeError
from nsteer.system import files

MAX_BYTES = 512 * 2**20
"""Bytes of a file, and of the arrays in it: 171 emotions at 80 layers of width 8192 are 428 MiB."""

MAX_JSON = 32 * 2**20
"""Bytes of JSON: in memory its values are some twenty times as large."""

MAX_ARRAYS = 20_000
"""Arrays of a file, members of an archive."""


def load(path: Path) -> bytes:
    """The bytes of a file of vectors. Raises ExchangeError for a pipe, a device, a folder, or one beyond the bounds."""
    try:
        return files.content(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise ExchangeError(f"{path}: no such file") from error
    except ValueError as error:
        raise ExchangeError(f"{path} is not read: {error}") from error
    except OSError as error:
        raise ExchangeError(f"{path} can not be read: {error.strerror or error}") from error


@contextmanager
def damaged(path: Path, kind: str) -> Iterator[None]:
    """Whatever another library raises over a damaged or hostile file is an ExchangeError of one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ExchangeError:
        raise
    except Exception as error:  # any: a parser fed with noise fails in any way
        first = str(error).strip().splitlines()[:1] or [""]
        said = f"{type(error).__name__}: {first[0][:200]}".removesuffix(": ")
        raise ExchangeError(f"{path} is no {kind} that can be read: {said}") from error


def parsed(text: bytes | str) -> Any:
    """JSON of at most MAX_JSON bytes. Raises ValueError, RecursionError where it is nested too deeply."""
    if len(text) > MAX_JSON:
        raise ValueError(f"{len(text):,} bytes of JSON; at most {MAX_JSON:,} are read")
    return json.loads(text)


def mapping(document: Any) -> dict[str, Any]:
    """JSON that is an object. Raises ValueError for anything else."""
    if not isinstance(document, dict):
        raise ValueError(f"expected a mapping, found {type(document).__name__}")
    return document


def members(data: bytes) -> dict[str, bytes]:
    """The members of a zip archive. Raises ValueError where they declare more than the archive can mean to hold.

    Zeros shrink to a thousandth, so a small archive may hold much; but one whose every member is noise does not.
    """
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = archive.infolist()
        if len(entries) > MAX_ARRAYS:
            raise ValueError(f"{len(entries):,} members; at most {MAX_ARRAYS:,} are read")
        if (total := sum(entry.file_size for entry in entries)) > MAX_BYTES:
            raise ValueError(f"its members declare {total:,} bytes; at most {MAX_BYTES:,} are read")
        if len({entry.filename for entry in entries}) != len(entries):
            raise ValueError("two members have one name")
        if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
            raise ValueError("a compression other than deflate")
        return {entry.filename: _member(archive, entry) for entry in entries}


def _member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    with archive.open(entry) as file:
        content = file.read(entry.file_size)  # told how much: else what it unpacks to is made whole, then cut
    if len(content) != entry.file_size:
        raise ValueError(f"{entry.filename[:64]!r} declares {entry.file_size:,} bytes and holds {len(content):,}")
    return content


def array(dtype: str, shape: Sequence[int], raw: bytes | memoryview) -> np.ndarray:
    """Numbers as they lie in a file. Raises ValueError where shape and bytes do not fit each other."""
    kind = np.dtype(dtype)
    wanted = math.prod(shape) * kind.itemsize  # of Python's integers, which do not overflow
    if any(size < 0 for size in shape) or wanted != len(raw) or len(shape) > 8:
        raise ValueError(f"{list(shape)[:8]} of {dtype} declared, {len(raw):,} bytes found")
    return np.frombuffer(raw, kind).reshape(tuple(shape))


def brain(raw: np.ndarray) -> np.ndarray:
    """bfloat16, given as uint16, as float32: its upper half."""
    return (raw.astype(np.uint32) << 16).view(np.float32)


def floats(path: Path, layers: Mapping[int, Any]) -> dict[int, np.ndarray]:
    """The same as float32, ascending. Raises ExchangeError for what is no number, and widths that differ."""
    vectors = {}
    for number in sorted(layers):
        values = np.asarray(layers[number])
        with np.errstate(over="ignore"):
            vector = values.astype(np.float32) if values.dtype.kind in "fiu" else values
        if values.dtype.kind not in "fiu" or values.ndim != 1 or not values.size or not np.isfinite(vector).all():
            raise ExchangeError(
                f"{path}: layer {number} is no vector of finite numbers ({values.dtype} {values.shape})"
            )
        vectors[number] = vector
    widths = {vector.size for vector in vectors.values()}
    if len(widths) != 1:
        raise ExchangeError(f"{path}: its vectors have the widths {sorted(widths)}: expected vectors of one model")
    return vectors
