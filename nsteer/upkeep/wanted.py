"""Turns studies into the cells that they want of a store: group path -> key -> the fingerprints wanted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from nsteer.models import facts as models
from nsteer.models.facts import Facts
from nsteer.plan.check import HELD, Study, tuned
from nsteer.plan.schema import Model
from nsteer.stages import cells
from nsteer.store import slug

Wanted = Mapping[str, Mapping[tuple, set[int]]]


def wanted(studies: Iterable[Study]) -> Wanted:
    """The cells of results that any of these studies would ask for."""
    found: dict[str, dict[tuple, set[int]]] = defaultdict(lambda: defaultdict(set))
    for study in studies:
        for facts in study.facts:
            for path, part in parts(study, facts):
                for key, number in part.items():
                    found[path][key].add(number)
    return found


def parts(study: Study, facts: Facts) -> Iterator[tuple[str, cells.Cells]]:
    """The groups of one model, each with its cells."""
    plan, name = study.plan, slug(facts.label)

    def named(part: cells.Cells) -> cells.Cells:
        return {(facts.label, *key): number for key, number in part.items()}

    if plan.methods:
        for product, of in (("samples", cells.samples), ("activations", cells.activations), ("vectors", cells.vectors)):
            yield f"{product}/{name}", named(of(study, facts))
    if plan.steer:
        yield from steered(study, facts)
    if plan.measure is not None and plan.methods:
        yield f"lens/{name}", named(cells.lens(study, facts))
    yield f"anisotropy/{name}", named(cells.anisotropy(study, facts))
    if plan.prompts is not None:
        read = named(cells.reads(study, facts))
        for product in ("reads", "streams", "read_receipts"):  # a read is in one of the first two
            yield f"{product}/{name}", read
        for product in ("edited", "edited_receipts"):
            yield product, named(cells.edited(study, facts))


def steered(study: Study, facts: Facts) -> Iterator[tuple[str, cells.Cells]]:
    """The cubes of continuations, and of what is measured of them."""
    plan = study.plan
    yield "calibration", cells.calibration(study, facts)
    for suffix, made, texts in (
        ("", cells.steering(study, facts), "generations"),
        ("_unsteered", cells.unsteered(study, facts), "unsteered"),
    ):
        yield texts, made
        if not suffix:
            yield "steering", made
            yield "steering_also", made
        yield f"projections{suffix}", made
        if plan.measure is not None and plan.measure.perplexity:
            yield f"outcomes{suffix}", cells.outcomes(made)
        if plan.judge is not None:
            judge = models.facts(Model(id=plan.judge.classifier, revision=plan.judge.revision))
            yield f"judged{suffix}", cells.judged(made, judge.judging, plan.judge.over)


def searched(study: Study) -> set[str]:
    """The labels on the axis `op` under which a search of this study keeps its cells."""
    block = tuned(study.plan) if study.plan.tune is not None else None
    return set() if block is None else {cells.op_label(block), f"{cells.op_label(block)}{HELD}"}


def names(study: Study) -> dict[str, set[str]]:
    """The labels of a study that the store explains, by the group that does."""
    plan = study.plan
    return {
        "methods": set(plan.methods),
        "ops": {cells.op_label(block) for block in plan.steer} | searched(study),
        "judges": {plan.judge.classifier} if plan.judge else set(),
        "models": {facts.label for facts in study.facts},
    }
