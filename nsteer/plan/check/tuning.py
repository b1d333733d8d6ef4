"""Checks of `tune`: the entry it searches, what it is judged by, its budget, and what is held out."""

from __future__ import annotations

from typing import Any

from nsteer.models.templates import shown
from nsteer.plan.check.base import Checker
from nsteer.plan.check.implied import layer_sets
from nsteer.plan.reader import Path
from nsteer.plan.schema import Plan, Steer

PATH: Path = ("tune",)
HELD = ".held-out"
"""What follows an entry's label on the axis `op`, where its settings are scored on what is held out."""


def tuned(plan: Plan) -> Steer | None:
    """The entry that a plan tunes; None where it can not be determined."""
    named = [entry for entry in plan.steer if plan.tune is None or plan.tune.steer in (None, entry.name or entry.op)]
    return named[0] if len(named) == 1 else None


def budget(plan: Plan, entry: Steer, continuations: int) -> int | None:
    """The most settings a vector; None for no limit."""
    assert plan.tune is not None
    if plan.tune.generations is not None:
        return plan.tune.generations // continuations
    return plan.tune.cells


def search(check: Checker, plan: Plan) -> None:
    """An entry to tune, a judge and perplexities to choose by, room for the coarse grid, and something held out."""
    if plan.tune is None or check.fails(*PATH):
        return
    if not check.given(plan, "judge", "judges"):
        check.add(PATH, "no `judge`", "a judge, whose verdict is the objective", "judge: zoo/judge")
    elif plan.tune.judge is not None:
        check.known((*PATH, "judge"), plan.tune.judge, [*plan.all_judges(), *check.names("judges")], "a judge's label")
    if (plan.measure is None or not plan.measure.perplexity) and not check.fails("measure"):
        check.add(PATH, "no perplexities", "`measure` with perplexity, which limits the search", "measure: {}")
    entry = tuned(plan)
    if entry is None:
        labels = [entry.name or entry.op for entry in plan.steer]
        if plan.tune.steer is not None:
            check.known((*PATH, "steer"), plan.tune.steer, labels, "the label of a steer entry")
        elif not check.fails("steer"):
            check.add(PATH, f"{len(labels)} steer entries", "one, or `steer: LABEL`", "it searches a single entry")
        return
    if "zero" not in entry.controls:
        check.add(
            (*PATH, "steer"), "an entry without the control `zero`", "it", "settings are scored beside strength 0"
        )
    if any(other.name == f"{entry.name or entry.op}{HELD}" for other in plan.steer):
        check.add(
            (*PATH, "steer"), f"a steer entry labelled {entry.name}{HELD}", "that label free", "it is the search's"
        )
    if not all(label > 0 for label in entry.labels()):
        check.add((*PATH, "steer"), "a strength of 0 or less in its grid", "strengths above 0")
    _budget(check, plan, entry)
    _held_out(check, plan, entry)


def _budget(check: Checker, plan: Plan, entry: Steer) -> None:
    tune = plan.tune
    assert tune is not None
    if (tune.cells is None) == (tune.generations is None):
        actual = "neither cells nor generations" if tune.cells is None else "cells and generations"
        return check.add(PATH, actual, "one of them: the budget", "cells: 24")
    if check.fails("steer"):
        return
    try:
        continuations = len(_texts(check, entry.prompts)) * len(entry.seeds)
        for facts in check.facts:
            coarse = len(layer_sets(entry.layers, facts.n_layers)) * len(entry.labels())
            limit = budget(plan, entry, continuations)
            if limit is not None and limit < coarse:
                field = "cells" if tune.generations is None else "generations"
                needed = coarse if field == "cells" else coarse * continuations
                what = f"{getattr(tune, field)}, with a coarse grid of {needed} in {facts.label}"
                return check.add((*PATH, field), what, f"at least {needed}", "or fewer layer sets or strengths")
    except LookupError:
        return  # said elsewhere


def _held_out(check: Checker, plan: Plan, entry: Steer) -> None:
    """Prompts or seeds that the search does not see."""
    assert plan.tune is not None
    held, path = plan.tune.held_out, (*PATH, "held_out")
    if check.fails(*path):
        return
    if held.prompts is None and held.seeds is None:
        return check.add(path, "nothing", "prompts or seeds", "held_out: {prompts: others}")
    if held.seeds is not None:
        check.distinct((*path, "seeds"), held.seeds)
        if not entry.generate.sample:
            check.add((*path, "seeds"), "seeds in greedy decoding", "prompts", "or generate: {sample: true}")
    seeds = set(held.seeds or entry.seeds) & set(entry.seeds)
    if isinstance(held.prompts, str) and check.texts is not None:
        what = f"a prompt set of the text set {check.texts.name!r}, a list, or label: prompt"
        if not check.known((*path, "prompts"), held.prompts, check.texts.prompts, what):
            return
    try:
        own = _texts(check, entry.prompts)
        other = own if held.prompts is None else _texts(check, held.prompts)
    except LookupError:
        return  # said elsewhere
    both = sorted(set(own.values()) & set(other.values()))
    if both and seeds:
        actual = f"the prompt {both[0][:40]!r} with seed {min(seeds)}, which the search sees"
        check.add(path, actual, "prompts or seeds that it does not see")


def _texts(check: Checker, prompts: Any) -> dict[str, str]:
    """Prompts by label. Raises LookupError for a set that is not there."""
    if isinstance(prompts, str) and check.texts is None:
        raise LookupError(prompts)
    prompt_set = check.texts.prompts[prompts] if isinstance(prompts, str) and check.texts else prompts
    named = prompt_set.items() if isinstance(prompt_set, dict) else ((shown(text), text) for text in prompt_set)
    return {label: shown(text) for label, text in named}
