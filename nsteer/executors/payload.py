"""Turns a program's text and tensors into the bytes that travel to a server (its answer: answers.py).

Several batches of one text travel together as one nnsight session: the function `run` that every executor runs,
called once a batch. Functions travel as code in text, tensors as tensors; nothing of nsteer, no bytecode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import zstandard
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend

from nsteer.program import code

TOGETHER = """

def together(model, batches, **where):
    with model.session(**where) as session:
        results = [].save()
        for data in batches:
            results.append(run(model, data))
    return results
"""


STOP = "            tracer.stop()\n"
"""Where a text ends its forward early. NDIF's sandbox takes the end of a stopped trace for the end of the next one
in the session, so traces that travel together run to their end: a little more work there, for one job less."""


class _Packed(BaseException):
    """Leaves the traced block once its payload is made; no `except Exception` on the way may take it."""


class _Pack(Backend):
    """An nnsight backend that keeps the payload of a block instead of running it."""

    blob = b""

    def __call__(self, tracer: Any) -> None:
        self.blob = RequestModel.serialize(tracer, compress=False)
        raise _Packed


def pack(model: Any, text: str, batches: Sequence[dict[str, Any]]) -> bytes:
    """The payload of one job: `text` run on each batch of tensors in turn; uncompressed.

    Raises whatever nnsight or pickle raise for what can not travel.
    """
    if len(batches) > 1:
        text = text.replace(STOP, "")
    return _packed(code.load(text + TOGETHER, "together"), model, list(batches))


def pack_alone(model: Any, text: str, data: dict[str, Any]) -> bytes:
    """The payload of a text sent by itself, as anyone can who saved it: `run(model, data, remote=True)`."""
    return _packed(code.load(text), model, data)


def _packed(function: Any, model: Any, argument: Any) -> bytes:
    backend = _Pack()
    try:
        function(model, argument, backend=backend)
    except _Packed:
        return backend.blob
    raise AssertionError("nnsight did not hand the block to its backend")


def compress(blob: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=6).compress(blob)
