"""Turns the arguments of a Python call that edits into an edit, held to what an edit of a plan is held to."""

from __future__ import annotations

import sys
from typing import Any

from nsteer.errors import ArgumentsError, SteerError
from nsteer.plan.check import fields, form
from nsteer.plan.check.base import Checker
from nsteer.plan.reader import Document, Mark, Path
from nsteer.plan.schema import Editing
from nsteer.plan.schema.values import VectorLayer

NOWHERE: dict[Path, Mark] = {(): Mark("", 0, 0)}
"""Where an argument stands: in no file."""


class Asked(Editing):
    """An edit as a call asks for it: its vector is given, and may be that of another layer."""

    vector_layer: VectorLayer = "same"


def edit_of(**given: Any) -> Asked:
    """The edit of these fields, as they stand in a plan; one that is None was not given.

    Raises ArgumentsError with all problems, SteerError with one, in the words in which `nsteer check` tells them.
    """
    data = {name: value for name, value in given.items() if value is not None}
    check = Checker(Document(data, "", "", values=NOWHERE))
    edit = form.section_of(check, Asked)
    if edit is not None:
        fields.edit(check, (), edit, prompts=None, chat="auto", new=sys.maxsize)
    if check.problems or edit is None:
        problems = [SteerError(str(problem)) for problem in check.problems]
        raise problems[0] if len(problems) == 1 else ArgumentsError(problems)
    return edit
