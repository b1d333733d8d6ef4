"""Turns the name of a text set into what reports need of it: the groups of its emotions, the targets of its scenarios.

Of a text set of the package these sections alone are read, without the schema of plans: the whole file takes a third of
the time of a report. A test holds that they are those of the whole file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nsteer.plan import reader

FOLDER = Path(__file__).parent / "texts"
SECTION = re.compile(r"^(?:emotions|scenario_targets):.*\n(?:[ \t#].*\n|\n)*", re.MULTILINE)


class Outline(NamedTuple):
    """emotions : emotion -> positive, negative or other; scenario_targets : scenario -> {emotion, sign}"""

    emotions: Mapping[str, str]
    scenario_targets: Mapping[str, Mapping[str, Any]]


def shipped() -> tuple[str, ...]:
    """The names of the text sets in the package."""
    return tuple(sorted(file.stem for file in FOLDER.glob("*.yaml")))


def outline(name: str) -> Outline:
    """The outline of a text set of the package, or of a file. Raises as `texts.find` and `texts.load` do."""
    if name in shipped():
        file = FOLDER / f"{name}.yaml"
        data = reader.parse("".join(SECTION.findall(file.read_text(encoding="utf-8"))), str(file)).data
        return Outline(data["emotions"], data.get("scenario_targets", {}))
    from nsteer.plan import texts  # here: it needs the schema of plans

    text_set = texts.load(texts.find(name))
    return Outline(text_set.emotions, text_set.scenario_targets)
