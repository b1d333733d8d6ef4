"""Turns a study into what it will run: resolved knobs, and the source text of its programs, without weights."""

from __future__ import annotations

from typing import Any

from nsteer.models import facts as models
from nsteer.models.facts import Facts
from nsteer.plan.check import Study, layer_sets
from nsteer.plan.layers import resolve
from nsteer.stages import cells
from nsteer.stages.arrays import protocols


def preview(study: Study, source: bool = False, trust_remote_code: bool = False) -> dict[str, Any]:
    """The plan resolved, as plain data; with `source`, the text of every distinct program under its digest.

    Building the text needs the model's classes, not its weights. Raises AnatomyError, ModelError.
    """
    shown: dict[str, Any] = {"plan": study.plan.model_dump(mode="json"), "models": [], "programs": {}}
    shown["protocols"] = protocols(study)
    for facts in study.facts:
        sets = {cells.op_label(b): layer_sets(b.layers, facts.n_layers) for b in study.plan.steer}
        shown["models"].append(
            {
                "label": facts.label,
                "identity": facts.identity,
                "n_layers": facts.n_layers,
                "d_model": facts.d_model,
                "layers": resolve(study.plan.layers, facts.n_layers),
                "layer_sets": sets,
            }
        )
        if source:
            shown["programs"] |= model_programs(study, facts, trust_remote_code)
    return shown


def model_programs(study: Study, facts: Facts, trusted: bool = False) -> dict[str, dict[str, str]]:
    """digest -> {model, stage, source} of one model's programs."""
    from nsteer.program import requests, source
    from nsteer.stages import forms

    anatomy, eos, pad = outline(study, facts, trusted)
    write = requests.write if study.plan.executor == "vllm" else source.write
    found: dict[str, dict[str, str]] = {}
    for stage, form in forms.all_of(study, facts, eos, pad):
        text = write(form, anatomy)
        found.setdefault(source.digest(text), {"model": facts.label, "stage": stage, "source": text})
    return found


def rehearsal(study: Study, trusted: bool = False) -> dict[str, int]:
    """digest -> bytes of every program as it would travel to an NDIF server, loaded again as strictly as there.

    Needs no server and no weights. Raises ExecutionError with what a server would refuse, ModelError, AnatomyError.
    """
    from nsteer.executors import create
    from nsteer.program import source
    from nsteer.program.form import specimen
    from nsteer.stages import forms

    sizes = {}
    for facts in study.facts:
        spec = cells.model_of(study, facts)
        trust = spec.trust_remote_code and trusted
        with models.unchanged(facts):
            made: Any = create("ndif", facts.source, revision=spec.revision, trust_remote_code=trust)
        for _, form in forms.all_of(study, facts, made.eos, made.pad):
            program = specimen(form, made.anatomy.d_model)
            sizes[source.digest(made.source(program))] = made.travels(program)
        made.close()
    return sizes


def outline(study: Study, facts: Facts, trusted: bool = False) -> tuple[Any, tuple[int, ...], int]:
    """Anatomy and end-of-text ids of a model built without weights, as the remote executor builds it."""
    from nsteer.executors import skeleton
    from nsteer.executors.common import ends
    from nsteer.executors.vllm.engine import served

    spec = cells.model_of(study, facts)
    settings = {"revision": facts.revision, "trust_remote_code": spec.trust_remote_code and trusted}
    with models.unchanged(facts):
        model, tokenizer = skeleton.build(facts.source, None, spec.attn_implementation, settings)
    found = skeleton.outline(model)
    if study.plan.executor == "vllm":
        found = served(found, model._module.base_model_prefix)
    return found, *ends(model._module, tokenizer)
