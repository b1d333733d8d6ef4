"""Turns a program into the data of its requests, and what they gave back into readouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from nsteer.errors import ExecutionError
from nsteer.executors.common import readouts, tensors
from nsteer.program.anatomy import Anatomy
from nsteer.program.form import Program, Readouts, of_rows

SECOND = ("pooled", "norms", "receipts", "ends", "written")
"""What has its row as the second axis, as texts give it."""


def rows_of_program(program: Program, anatomy: Anatomy, number: int) -> list[dict[str, Any]]:
    """What the text of a program expects of each row. The unedited copy of a row is no row; a logit lens is one
    request."""
    if program.form.promote:
        return [_data(program, anatomy, number)]
    arrays = {name: array for name, array in program.arrays.items() if name != "unedited"}
    alone = Program(replace(program.form, against=False), program.keys, arrays)
    return [_data(of_rows(alone, slice(i, i + 1)), anatomy, number) for i in range(program.rows)]


def _data(program: Program, anatomy: Anatomy, number: int) -> dict[str, Any]:
    return {**tensors(program, anatomy), "tokens": program.arrays["input_ids"][0].tolist(), "program": number}


def turns(rows: Sequence[Mapping[str, Any]], apart: bool) -> list[list[int]]:
    """The places of rows; where they are to be kept `apart`, so that no two of one turn have equal tokens."""
    seen: dict[tuple[int, ...], int] = {}
    by_turn: list[list[int]] = []
    for i, row in enumerate(rows):
        text = tuple(row["tokens"]) if apart else ()
        turn = seen[text] = seen.get(text, -1) + 1 if apart else 0
        by_turn.extend([[]] if turn == len(by_turn) else [])
        by_turn[turn].append(i)
    return by_turn


def gathered(program: Program, by_name: Mapping[str, list[Any]], d_model: int) -> Readouts:
    """What requests gave, as readouts. Raises ExecutionError for a text that ended before its end."""
    saved: dict[str, Any] = {}
    for name, values in by_name.items():
        if name == "streams":
            mask = torch.from_numpy(program.arrays["attention_mask"]).bool()
            saved[name] = torch.full((len(values[0]), *mask.shape, d_model), torch.nan)
            for i, value in enumerate(values):
                saved[name][:, i, mask[i]] = value[:, 0].float()
        elif name == "tokens":
            new = torch.nn.utils.rnn.pad_sequence([value.flatten() for value in values], True, -1)
            saved[name] = torch.cat([torch.from_numpy(program.arrays["input_ids"]), new], 1)
        else:
            saved[name] = torch.cat(values, 1 if name in SECOND else 0)
    back = readouts(program, saved)
    if back.tokens is not None and any(-1 in row for row in back.tokens):
        raise ExecutionError("a row ended with neither its end of text nor all of its tokens")
    return back
