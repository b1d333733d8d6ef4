"""Turns a study into what it will run: resolved knobs, and the code of its programs, without weights."""

from __future__ import annotations

from typing import Any

from nsteer.models import facts as models
from nsteer.plan.check import Study
from nsteer.stages.arrays import protocols
from nsteer.stages.forms import Ends
from nsteer.stages.job import Job, jobs
from nsteer.stages.table import forms_of


def preview(study: Study, programs: bool = False, trust_remote_code: bool = False) -> dict[str, Any]:
    """The plan resolved, as JSON data; with `programs`, the code of every distinct program under its digest.

    Building the text needs the model's classes, not its weights. Raises AnatomyError, ModelError.
    """
    shown: dict[str, Any] = {"plan": study.as_json(study.plan), "models": [], "programs": {}}
    shown["protocols"] = protocols(study)
    for job in jobs(study):
        shown["models"].append(
            {
                "label": job.label,
                "identity": job.facts.identity,
                "n_layers": job.facts.n_layers,
                "d_model": job.facts.d_model,
                "layers": job.layers,
                "layer_sets": {entry.label: job.layer_sets(entry) for entry in study.plan.steer},
            }
        )
        if programs:
            shown["programs"] |= model_programs(job, trust_remote_code)
    return shown


def model_programs(job: Job, trusted: bool = False) -> dict[str, dict[str, str]]:
    """digest -> {model, stage, source} of one model's programs."""
    from nsteer.program import code, requests

    anatomy, ends = outline(job, trusted)
    write = requests.write if job.plan.executor == "vllm" else code.write
    programs: dict[str, dict[str, str]] = {}
    for stage, form in forms_of(job, ends):
        text = write(form, anatomy)
        programs.setdefault(code.digest(text), {"model": job.label, "stage": stage, "source": text})
    return programs


def rehearsal(study: Study, trusted: bool = False) -> dict[str, int]:
    """digest -> bytes of every program as it would travel to an NDIF server, loaded again as strictly as there.

    Needs no server and no weights. Raises ExecutionError with what a server would refuse, ModelError, AnatomyError.
    """
    from nsteer.executors import create
    from nsteer.program import code
    from nsteer.program.form import specimen

    sizes = {}
    for job in jobs(study):
        trust = job.model.trust_remote_code and trusted
        with models.unchanged(job.facts):
            executor: Any = create("ndif", job.facts.name_or_path, revision=job.model.revision, trust_remote_code=trust)
        for _, form in forms_of(job, Ends(executor.eos, executor.pad)):
            program = specimen(form, executor.anatomy.d_model)
            sizes[code.digest(executor.code(program))] = executor.travels(program)
        executor.close()
    return sizes


def outline(job: Job, trusted: bool = False) -> tuple[Any, Ends]:
    """Anatomy and end-of-text ids of a model built without weights, as the remote executor builds it."""
    from nsteer.executors import skeleton
    from nsteer.executors.common import ends
    from nsteer.executors.vllm.engine import served

    settings = {"revision": job.facts.revision, "trust_remote_code": job.model.trust_remote_code and trusted}
    with models.unchanged(job.facts):
        model, tokenizer = skeleton.build(job.facts.name_or_path, None, job.model.attn_implementation, settings)
    anatomy = skeleton.outline(model)
    if job.plan.executor == "vllm":
        anatomy = served(anatomy, model._module.base_model_prefix)
    return anatomy, Ends(*ends(model._module, tokenizer))
