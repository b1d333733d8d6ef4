"""Writes a first plan and its sample of texts into a folder, for a newcomer to change."""

from __future__ import annotations

import os
from pathlib import Path

from nsteer.errors import PlanError, Problem

STARTS = Path(__file__).parent / "starts"
"""A commented plan and a sample CSV of each kind."""

KINDS = {
    "contrast": "pairs of texts make a direction, which steers",
    "emotion": "texts of several labels make a vector each, which steer",
    "capture": "activations of texts, nothing steered",
}
"""What a first plan can be of."""


def begin(kind: str, folder: str | os.PathLike = ".") -> list[Path]:
    """The files that were written: KIND.yaml and KIND.csv, in a folder that is made where it is not there.

    Nothing is overwritten. Raises PlanError, which names every file in the way, or says why the folder is not written.
    """
    names = [f"{kind}{ending}" for ending in (".yaml", ".csv")]
    target = Path(folder)
    if there := [target / name for name in names if os.path.lexists(target / name)]:
        hint = "another folder, or another name for that file"
        raise PlanError([Problem("", f"{file}, which is there", "a place for a first plan", hint) for file in there])
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name in names:
            with open(target / name, "x", encoding="utf-8") as file:
                file.write((STARTS / name).read_text(encoding="utf-8"))
    except OSError as error:
        actual = f"{error.filename or target}: {error.strerror or error}"
        raise PlanError([Problem("", actual, "a folder that can be written")]) from error
    return [target / name for name in names]
