"""Checks of `prompts`, `reads` and `generate`: what is looked at, with edits and without."""

from __future__ import annotations

from nsteer.plan import positions
from nsteer.plan.check import fields
from nsteer.plan.check.base import Checker
from nsteer.plan.schema import Plan


def something_to_do(check: Checker, plan: Plan) -> None:
    """A plan that asks for something, of prompts where it takes them."""
    if not check.given(plan, "methods", "directions", "reads", "generate"):
        actual = "no `methods`, no `directions`, no `reads` and no `generate`"
        check.add((), actual, "something to do", "name methods, directions, or reads and edits over prompts")
    if (plan.reads or plan.generate or plan.edits) and not check.given(plan, "prompts"):
        check.add((), "no `prompts`", "prompts for `reads`, `edits` and `generate`")
    if plan.edits and not check.given(plan, "reads", "generate"):
        check.add(("edits",), "edits that nothing looks at", "`reads` or `generate` beside them", key=True)


def all_reads(check: Checker, plan: Plan) -> None:
    """The prompts, how they are continued, and each read."""
    if plan.prompts is not None:
        fields.prompt_set(check, ("prompts",), plan.prompts)
        fields.chat(check, ("chat",), plan.chat)
    if plan.generate is not None:
        fields.decoding(check, ("generate",), plan.generate)
    for name, read in plan.reads.items():
        place = ("reads", name, "positions")
        fields.check_positions(check, place, read.positions, plan.prompts, plan.chat, 0)
        if read.positions != "all" and read.pooling is not None and not check.fails(*place):
            check.add(place, "positions beside a `pooling`", "one of them", "a pooling names its own positions")
        elif positions.written(read.positions) and read.positions != "all" and not check.fails(*place):
            check.add(place, "generated", "positions of the prompt", "reads generate nothing")
        if read.pooling is not None:
            fields.pooling_of_prompt(check, ("reads", name, "pooling"), read.pooling, "reads generate nothing")
