"""Turns the name of a plan into its file: one where one stands, or one of those that come with nsteer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from nsteer.errors import did_you_mean

SHIPPED = Path(__file__).parent / "shipped"
"""The plans of the repository's folder `plans/`, which this is a link to; a wheel holds copies."""


def shipped() -> dict[str, Path]:
    """Name -> file of every plan that comes with nsteer."""
    return {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}


def find(plan: str | os.PathLike) -> tuple[Path, str]:
    """The file of a plan that is named by its path, or by its name alone; and what is to be said of a name alone.

    A file where one stands comes first, `quickstart` or `quickstart.yaml`; then the plan of that name that comes with
    nsteer. What is none of these is a path as it was given.
    """
    given = os.fspath(plan)
    if os.path.lexists(given) or os.path.basename(given) != given or given not in shipped():
        return Path(given), ""
    own = Path(f"{given}.yaml")
    if os.path.lexists(own):
        return own, f"{given} is {own} of this folder, not the plan of that name that comes with nsteer"
    return shipped()[given], f"{given} is the plan of that name that comes with nsteer"


def hint(plan: str | os.PathLike) -> str:
    """What to try in place of a name alone that is none: the nearest plan that comes with nsteer, or all of them."""
    given = os.fspath(plan)
    if os.path.basename(given) != given or os.path.splitext(given)[1]:
        return ""
    return did_you_mean(given, list(shipped())) + "; see nsteer plans"


def purposes() -> Mapping[str, str]:
    """Name -> what the plan says it is for, of every plan that comes with nsteer."""
    from nsteer.plan import reader

    plans = {name: reader.read(file, anywhere=True).data for name, file in shipped().items()}
    return {name: str(data.get("about", "")) for name, data in plans.items()}
