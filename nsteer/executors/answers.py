"""Turns a server's answer into what its programs returned: dense tensors of the shapes that they must have.

A server is a stranger: its bytes are bounded before they are unpacked, nothing in them runs, and what is too much, too
little or of another kind is refused by name before anybody computes with it.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence
from typing import Any

import torch
import zstandard

from nsteer.program.form import Program

SLACK = 2**28
"""Bytes that an answer may have besides twice what its tensors need: a job may hold programs that are known already."""

Shapes = dict[str, tuple[tuple[int, ...], bool]]


def shapes(program: Program, d_model: int) -> Shapes:
    """What a program returns: name -> shape, and whether it is whole numbers. `tokens` may be narrower than said."""
    form, (rows, width) = program.form, program.arrays["input_ids"].shape
    if form.promote:
        ranked = (program.rows, form.promote)
        return {"promoted": (ranked, False), "promoted_tokens": (ranked, True)}
    kinds = [site.what for site in form.reads]
    by_name: Shapes = {}
    if form.edits:
        by_name["receipts"] = ((len(form.edits), rows, 4), False)
    if form.decoding:
        steps = form.decoding.max_new_tokens
        by_name["tokens"] = ((rows, width + steps), True)
        if form.top:
            by_name["logprobs"] = ((rows, steps, form.top), False)
            by_name["candidates"] = ((rows, steps, form.top), True)
        if form.reads:
            by_name["ends"] = by_name["written"] = ((len(form.reads), rows, d_model), False)
            by_name["counted"] = ((rows, 1), False)
        return by_name
    if count := kinds.count("pooled"):
        by_name["pooled"] = ((count, rows, d_model), False)
    if count := kinds.count("norm"):
        by_name["norms"] = ((count, rows), False)
    if count := kinds.count("tokens"):
        by_name["streams"] = ((count, rows, width, d_model), False)
    if form.score:
        by_name["score"] = ((rows,), False)
    if form.against:
        by_name["against"] = ((program.rows, 2), False)
    return by_name


def max_bytes(programs: Sequence[Program], d_model: int) -> int:
    """The bytes that the answer to these programs may have."""
    return SLACK + 2 * sum(
        8 * math.prod(shape) for program in programs for shape, _ in shapes(program, d_model).values()
    )


def unpack(content: bytes, limit: int = SLACK) -> dict[str, Any]:
    """What a job saved, by name, from a server's compressed answer; `results` of `payload.pack`, batch by batch.

    Only tensors and containers are taken: an answer can not run code here. Raises ValueError for anything else,
    and for more than `limit` bytes.
    """
    try:
        with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(content) as stream:
            unpacked = stream.read(limit + 1)
    except (zstandard.ZstdError, MemoryError) as error:
        raise ValueError(f"it can not be decompressed: {error}") from None
    if len(unpacked) > limit:
        raise ValueError(f"it is larger than the {limit:,} bytes that these programs can return")
    try:
        with zipfile.ZipFile(io.BytesIO(unpacked)) as archive:
            packed = [member.filename for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
        if packed:
            raise ValueError("its members are compressed once more")
        saved = torch.load(io.BytesIO(unpacked), map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, torch and its unpickler each raise kinds of their own
        words = " ".join(str(error).split())[:200]
        raise ValueError(f"it is not data alone ({type(error).__name__}: {words})") from None
    if not isinstance(saved, dict):
        raise ValueError("it is no mapping of names")
    return saved


def check(saved: Any, program: Program, d_model: int, vocab: int) -> None:
    """Raises ValueError for results that a program can not have returned."""
    if not isinstance(saved, dict):
        raise ValueError("a batch's results are no mapping of names")
    expected = shapes(program, d_model)
    if missing := expected.keys() - saved.keys():
        raise ValueError(f"{sorted(missing)[0]!r} is missing")
    for name, (shape, whole) in expected.items():
        least = (shape[0], program.arrays["input_ids"].shape[1] + 1) if name == "tokens" else shape
        _check_tensor(name, saved[name], least, shape, whole)
    for name in ("tokens", "candidates", "promoted_tokens"):
        ids = saved[name] if name in expected else torch.zeros(0, dtype=torch.long)
        if ids.numel() and not (-(name == "candidates") <= int(ids.min()) and int(ids.max()) < vocab):
            raise ValueError(f"{name!r} holds ids that are none of the model's {vocab} tokens")
    if "counted" in expected and not bool(((saved["counted"] >= 0) & saved["counted"].isfinite()).all()):
        raise ValueError("'counted' holds what is no count")
    for name in ("score", "against", "promoted"):
        if name in expected and bool(saved[name].isnan().any()):
            raise ValueError(f"{name!r} holds what is no number (NaN)")


def _check_tensor(name: str, value: Any, least: tuple[int, ...], shape: tuple[int, ...], whole: bool) -> None:
    if type(value) is not torch.Tensor or value.layout is not torch.strided or value.is_quantized:
        raise ValueError(f"{name!r} is no dense tensor")
    if value.device.type != "cpu" or value.is_complex() or value.dtype is torch.bool:
        raise ValueError(f"{name!r} is a tensor of {value.dtype} on {value.device.type}")
    if value.is_floating_point() == whole:
        raise ValueError(f"{name!r} is of {value.dtype}, not of {'whole numbers' if whole else 'floats'}")
    had = tuple(value.shape)
    if len(had) != len(shape) or not all(a <= b <= c for a, b, c in zip(least, had, shape, strict=True)):
        raise ValueError(f"{name!r} has shape {had}, not {shape}")
