"""Checks of `steer`: the blocks, and the vectors that they steer with."""

from __future__ import annotations

from nsteer import layers, positions
from nsteer.check import fields
from nsteer.check.base import Checker
from nsteer.check.implied import layer_sets, neutral_count
from nsteer.ops import REFERENCED
from nsteer.plan import Plan, Steer
from nsteer.reader import Path


def all_blocks(check: Checker, plan: Plan, emotions: list[str] | None) -> None:
    """Each steer block, then their labels. `emotions` is None where the plan's are in doubt."""
    for i, block in enumerate(plan.steer):
        _block(check, plan, check.steer_path(i), block, emotions)
    _labels(check, plan)


def _block(check: Checker, plan: Plan, path: Path, block: Steer, emotions: list[str] | None) -> None:
    if not check.given(plan, "methods"):
        check.add(path, "no `methods`", "at least one method, whose vectors steer")
    for i, name in enumerate(block.vectors.methods or []):
        if check.given(plan, "methods") and not check.fails("methods"):
            check.known((*path, "vectors", "methods", i), name, check.names("methods"), "a method of this plan")
    for i, emotion in enumerate(block.vectors.emotions or []):
        if emotions is not None:
            check.known((*path, "vectors", "emotions", i), emotion, emotions, "an emotion of this plan")
    check.distinct((*path, "vectors", "methods"), block.vectors.methods or [])
    check.distinct((*path, "vectors", "emotions"), block.vectors.emotions or [])
    check.distinct((*path, "strengths"), block.strengths)
    check.distinct((*path, "seeds"), block.seeds)
    check.distinct((*path, "controls"), block.controls)
    fields.decoding(check, (*path, "generate"), block.generate)
    if len(block.seeds) > 1 and not block.generate.sample and not check.fails(*path, "generate", "sample"):
        check.add(
            (*path, "seeds"), f"{len(block.seeds)} seeds in greedy decoding", "one", "or generate: {sample: true}"
        )
    fields.scale(check, path, block)
    fields.site(check, path, block)
    _neutral_reference(check, plan, path, block)
    fields.when(check, path, block)
    if block.when is not None and block.when.direction is not None and emotions is not None:
        check.known((*path, "when", "direction"), block.when.direction, emotions, "an emotion of this plan")
    fields.schedule(check, path, block, True)
    fields.norm_skip(check, path, block)
    new = block.generate.max_new_tokens
    fields.where(check, (*path, "positions"), block.positions, block.prompts, block.chat, new)
    if not positions.prompted(block.positions) and new == 1 and not check.fails(*path, "positions"):
        check.add(
            (*path, "positions"),
            "generated, with max_new_tokens 1",
            "a position that exists",
            "the first new token comes from the prompt's last position",
        )
    fields.prompt_set(check, (*path, "prompts"), block.prompts)
    fields.chat(check, (*path, "chat"), block.chat)
    if not check.fails(*path, "vectors", "layer"):
        _within_captured(check, plan, path, block)


def _neutral_reference(check: Checker, plan: Plan, path: Path, block: Steer) -> None:
    """What is measured against neutral samples needs some."""
    if block.op not in REFERENCED or check.fails("methods"):
        return
    for name in block.vectors.methods or plan.methods:
        if name in plan.methods and neutral_count(plan.methods[name]) == 0:
            found = f"{block.op} with method {name!r}, which has no neutral samples"
            check.add((*path, "op"), found, "a reference mean", "neutral_samples: 1 or more")


def _within_captured(check: Checker, plan: Plan, path: Path, block: Steer) -> None:
    """Every layer whose vector steers must be among the layers whose vectors are derived."""
    for facts in check.facts:
        try:
            have = set(layers.resolve(plan.layers, facts.n_layers))
            sets = layer_sets(block.layers, facts.n_layers)
            steered = {layer for one in sets.values() for layer in one}
            same = block.vectors.layer == "same"
            need = steered if same else set(layers.resolve(block.vectors.layer, facts.n_layers))
        except LookupError:
            continue  # said elsewhere
        if not same and block.op in REFERENCED and steered - have:
            found = f"layer {min(steered - have)} of {facts.label}, whose reference mean is not captured"
            check.add((*path, "layers"), found, "layers among the plan's `layers`", "layers: all")
            return
        if need - have:
            found = f"layer {min(need - have)} of {facts.label}, whose vector is not derived"
            where = ("layers",) if block.vectors.layer == "same" else ("vectors", "layer")
            check.add((*path, *where), found, "layers among the plan's `layers`", "layers: all")
            return


def _labels(check: Checker, plan: Plan) -> None:
    labels: list[str | int] = [
        i if check.fails("steer", i, "name") or check.fails("steer", i, "op") else block.name or block.op
        for i, block in enumerate(plan.steer)
    ]  # what failed has a label of its own
    for i, label in enumerate(labels):
        if label in labels[:i]:
            check.add(("steer", i), f"a second steer block labelled {label!r}", "distinct labels", "give it a `name`")
