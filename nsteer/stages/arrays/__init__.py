"""Turns what a study computes into labelled arrays: the groups of its store, and the dataset of each cell.

Names, dims, units and dtypes of everything in a store are written here, once. This is the side that meets
labels: it knows nothing of models or programs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import xarray as xr

from nsteer.models.facts import Facts
from nsteer.plan.check import Study, labels_of
from nsteer.plan.prompts import questions
from nsteer.plan.schema import SIDES, Contrast
from nsteer.stages import cells
from nsteer.stages.arrays.base import (
    CONDITION,
    RECEIPT,
    SITE,
    attributes,
    count,
    dataset,
    depths,
    number,
    ragged,
    receipt_values,
    text,
    texts_data,
    vector_axes,
)
from nsteer.stages.arrays.measured import (
    WHERE,
    capability_data,
    judge_passages_group,
    judged_group,
    judges_group,
    measured_groups,
    replies_group,
)
from nsteer.stages.arrays.recorded import RECEIPTS, condition_data, edited_groups, reads_groups
from nsteer.stages.arrays.steering import (
    ARMS,
    MEASURED,
    SPLITS,
    calibration_data,
    further_data,
    settings_data,
    steering_groups,
    tuned_group,
)
from nsteer.stages.judges import BESIDE
from nsteer.stages.keys import ResponseChunk, SampleChunk, Vector
from nsteer.store import Group, Variable, slug

__all__ = [
    "ARMS",
    "CONDITION",
    "FAILURE",
    "MEASURED",
    "RECEIPT",
    "RECEIPTS",
    "SAMPLE",
    "SPLITS",
    "WHERE",
    "attributes",
    "calibration_data",
    "capability_data",
    "condition_data",
    "dataset",
    "directions_group",
    "edited_groups",
    "failures_group",
    "further_data",
    "groups",
    "imports_group",
    "jobs_group",
    "judge_passages_group",
    "judged_group",
    "judges_group",
    "measured_groups",
    "model_data",
    "number",
    "programs_group",
    "protocols",
    "ragged",
    "reads_groups",
    "receipt_values",
    "replies_group",
    "responses_group",
    "responses_judged_group",
    "settings_data",
    "steering_groups",
    "text",
    "texts_data",
    "tuned_group",
    "vectors_group",
    "vectors_of",
    "verification_group",
]


def groups(study: Study) -> list[Group]:
    """The groups of a study's store, with every label that the plan gives."""
    plan = study.plan
    store_groups = [models_group(study)] + [methods_group(study)] * bool(plan.methods)
    store_groups += [directions_group(plan.directions)] * bool(plan.directions)
    for facts in study.facts:
        if study.plan.methods:
            store_groups += [samples_group(study, facts), activations_group(study, facts)]
            if plan.measure is not None and plan.measure.embeddings:
                store_groups.append(embeddings_group(study, facts))
            if plan.measure is not None and plan.measure.swap:
                store_groups.append(swapped_group(study, facts, plan.measure.swap))
        if written := cells.written(plan):
            store_groups.append(responses_group(facts, written))
            if filtered := {name: contrast for name, contrast in written.items() if contrast.filter is not None}:
                store_groups.append(responses_judged_group(facts, filtered))
        if study.plan.methods or study.plan.directions:
            store_groups.append(vectors_group(study, facts))
    if study.plan.steer:
        store_groups += steering_groups(study)
    store_groups += measured_groups(study)
    if plan.generate is not None or plan.edits:
        store_groups += edited_groups(study)
    return store_groups


# ---- models and programs ---------------------------------------------------------------------------------

MODEL_TEXTS = {
    "id": "hub id, directory or zoo name",
    "revision": "commit on the hub, empty for a local directory",
    "identity": "commit, or hash of a local directory's files",
    "tokenizer": "hash of the tokenizer's files, chat template included",
    "gguf": "GGUF file that the model is read from, or empty",
    "weights": "types of that file's tensors, and that they are dequantised, or empty",
    "adapter": "directory of the adapter (PEFT) that is merged into it, or empty",
    "model_type": "architecture",
    "dtype": "dtype of the weights in memory",
    "quantization": "int8 (LLM.int8 by bitsandbytes), or empty",
    "device": "class of device",
    "attn_implementation": "attention implementation",
    "executor": "where programs ran",
    "versions": "versions of what computed, as JSON",
    "health": "how it was seen to read texts: with BOS, without, padded, in chats, beyond its positions, as JSON",
    "settings": "torch's settings and the most padded tokens in a batch by stage, as JSON",
}
MODEL_NUMBERS = {"n_layers": "blocks", "d_model": "width of the residual stream", "parameters": "parameters"}


def models_group(study: Study) -> Group:
    variables = {name: text(("model",), meaning) for name, meaning in MODEL_TEXTS.items()}
    variables |= {name: Variable(("model",), "int64", meaning) for name, meaning in MODEL_NUMBERS.items()}
    return Group("models", {"model": [f.label for f in study.facts]}, variables, ("model",), attrs=attributes("models"))


def model_data(facts: Facts, described: Mapping[str, Any]) -> xr.Dataset:
    """What is known of a model: its facts, and what the executor says it loaded."""
    versions = {k: described[k] for k in ("torch", "transformers", "nnsight") if k in described}
    values = {**vars(facts), **described, "revision": facts.revision or "", "versions": json.dumps(versions)}
    values |= {name: json.dumps(described.get(name, {})) for name in ("settings", "health")}
    names = {**MODEL_TEXTS, **MODEL_NUMBERS}
    return xr.Dataset({name: ((), values.get(name, "" if name in MODEL_TEXTS else -1)) for name in names})


def programs_group(digests: Sequence[str]) -> Group:
    """The texts of the programs that ran, by digest."""
    variables = {"source": text(("program",), "compiled code, as it ran"), "stage": text(("program",), "stage")}
    return Group("programs", {"program": list(digests)}, variables, ("program",), attrs=attributes("programs"))


# ---- samples, activations, vectors -----------------------------------------------------------------------


def _axes(study: Study, facts: Facts) -> dict[str, Sequence]:
    samples = max(n for m in study.plan.methods.values() for n in cells.counts(study, m).values())
    return {
        "model": [facts.label],
        "method": list(study.plan.methods),
        "emotion": labels_of(study.plan),
        "sample": list(range(samples)),
    }


VECTOR = Vector._fields
SAMPLE = (*VECTOR, "sample")


def samples_group(study: Study, facts: Facts) -> Group:
    longest = max([m.generate.max_new_tokens for m in study.plan.methods.values() if m.source == "generation"] or [1])
    variables = {
        "instruction": text(SAMPLE, "instruction or passage, before the chat template"),
        "prompt": text(SAMPLE, "text as the model got it"),
        "text": text(SAMPLE, "text that was read: the generated one, or the passage"),
        "chat": Variable(SAMPLE, "bool", "whether the chat template was used"),
        "prompt_tokens": count(SAMPLE, "tokens of the prompt"),
        "generated_tokens": count(SAMPLE, "tokens generated"),
        "token_id": Variable((*SAMPLE, "token"), "int32", "generated token ids, -1 beyond the end", compress=True),
    }
    coords: dict[str, Sequence] = {**_axes(study, facts), "token": list(range(longest))}
    return _by_sample("samples", facts, coords, variables, _beside_samples(study, coords))


def _beside_samples(study: Study, coords: Mapping[str, Sequence]) -> dict[str, Any]:
    """The columns that the file or dataset of the text set brings along, of the passages that methods read."""
    if not any(method.source == "comprehension" for method in study.plan.methods.values()):
        return {}
    variable = Variable(("emotion", "sample"), "string", "column of the passage's row", "")
    columns = {}
    for name, by_emotion in study.beside_passages.items():
        rows = [by_emotion.get(emotion, []) for emotion in coords["emotion"]]
        columns[name] = (variable, [[row[k] if k < len(row) else "" for k in coords["sample"]] for row in rows])
    return columns


def activations_group(study: Study, facts: Facts) -> Group:
    layers, depth = depths(facts)
    variables = {
        "pooled": number((*SAMPLE, "layer", "d_model"), f"pooled {SITE}", compress=True),
        "token_norm": number((*SAMPLE, "layer"), f"mean L2 norm of {SITE} over a text's tokens (BOS left out)"),
        "positions": count(SAMPLE, "positions pooled; 0 for a missing value"),
    }
    coords: dict[str, Sequence] = {**_axes(study, facts), "layer": layers, "d_model": list(range(facts.d_model))}
    return _by_sample("activations", facts, coords, variables, {**depth, **_beside_samples(study, coords)})


def embeddings_group(study: Study, facts: Facts) -> Group:
    """What a bag of token embeddings has of each sample."""
    variables = {
        "pooled": number((*SAMPLE, "d_model"), "mean of what enters the first block over the sample's own text"),
        "positions": count(SAMPLE, "positions pooled; 0 for a missing value"),
    }
    return _by_sample("embeddings", facts, {**_axes(study, facts), "d_model": list(range(facts.d_model))}, variables)


def swapped_group(study: Study, facts: Facts, swaps: int) -> Group:
    """Streams of texts that are read again behind the instructions of `swaps` other emotions."""
    layers, depth = depths(facts)
    dims = (*SAMPLE, "swap")
    variables = {
        "asked": text(dims, "emotion of the instruction that the text was read behind"),
        "pooled": number((*dims, "layer", "d_model"), f"pooled {SITE}", compress=True),
        "positions": count(dims, "positions pooled; 0 for a missing value"),
    }
    coords: dict[str, Sequence] = {**_axes(study, facts), "swap": list(range(swaps))}
    coords |= {"layer": layers, "d_model": list(range(facts.d_model))}
    return _by_sample("swapped", facts, coords, variables, depth)


def _by_sample(product: str, facts: Facts, coords: dict, variables: dict, auxiliary: dict | None = None) -> Group:
    path = f"{product}/{slug(facts.label)}"
    chunks = {"sample": cells.CHUNK}
    return Group(path, coords, variables, SampleChunk._fields, chunks, auxiliary or {}, attributes(product, site=SITE))


def vectors_group(study: Study, facts: Facts) -> Group:
    """The vectors that a study derives of a model."""
    axes = vector_axes(study.plan)
    return vectors_of(facts, axes["method"], axes["emotion"])


def vectors_of(facts: Facts, methods: Sequence[str], emotions: Sequence[str]) -> Group:
    """The vectors of a model, whoever made them."""
    layers, depth = depths(facts)
    variables = {
        "vector": number((*VECTOR, "layer", "d_model"), f"emotion vector in {SITE}"),
        "norm": number((*VECTOR, "layer"), "length of the vector before normalisation"),
        "n_samples": count(VECTOR, "samples averaged (missing values left out)"),
        "n_distinct": count(VECTOR, "distinct texts among them"),
    }
    coords: dict[str, Sequence] = {
        "model": [facts.label],
        "method": list(methods),
        "emotion": list(emotions),
        "layer": layers,
        "d_model": list(range(facts.d_model)),
    }
    path = f"vectors/{slug(facts.label)}"
    return Group(path, coords, variables, VECTOR, {}, depth, attributes("vectors", site=SITE))


RESPONSE = ("model", "direction", "side", "response")


def _by_response(product: str, facts: Facts, contrasts: Mapping[str, Contrast], variables: dict, more: dict) -> Group:
    responses = max(len(questions(contrast, side)) for contrast in contrasts.values() for side in SIDES)
    coords: dict[str, Sequence] = {"model": [facts.label], "direction": list(contrasts), "side": list(SIDES)}
    coords["response"] = list(range(responses))
    path, sized = f"{product}/{slug(facts.label)}", {"response": cells.CHUNK}
    return Group(path, {**coords, **more}, variables, ResponseChunk._fields, sized, {}, attributes(product))


def responses_group(facts: Facts, contrasts: Mapping[str, Contrast]) -> Group:
    """What a model answered under the system prompts of each side of contrasts."""
    longest = max(contrast.generate.max_new_tokens for contrast in contrasts.values() if contrast.generate is not None)
    variables = {
        "system": text(RESPONSE, "system prompt"),
        "question": text(RESPONSE, "question, before the chat template"),
        "prompt": text(RESPONSE, "text as the model got it"),
        "text": text(RESPONSE, "answer"),
        "prompt_tokens": count(RESPONSE, "tokens of the prompt"),
        "generated_tokens": count(RESPONSE, "tokens of the answer, end of text included"),
        "token_id": Variable(
            (*RESPONSE, "token"), "int32", "token ids of the answer, -1 beyond its end", compress=True
        ),
        "program": text(RESPONSE, "the program that wrote it: a label of the group programs"),
    }
    return _by_response("responses", facts, contrasts, variables, {"token": list(range(longest))})


def responses_judged_group(facts: Facts, contrasts: Mapping[str, Contrast]) -> Group:
    """What the judge of a contrast's filter says of those answers, and which are kept; `directions` tells the rule."""
    variables = {
        "score": number(RESPONSE, "score of the class that counts; NaN where the judge gives none"),
        "kept": Variable(RESPONSE, "bool", "whether the answer is among those that are averaged"),
        **{name: number(RESPONSE, meaning) for name, meaning in BESIDE.items()},
    }
    return _by_response("responses_judged", facts, contrasts, variables, {})


def imports_group(labels: Sequence[str], methods: Sequence[str], emotions: Sequence[str]) -> Group:
    """Vectors that came from files, and where from; a vector under these labels is that one if its fingerprint is."""
    coords: dict[str, Sequence] = {"model": list(labels), "method": list(methods), "emotion": list(emotions)}
    variables = {"provenance": text(VECTOR, "file, its sha256, how it counts layers, what it says, as JSON")}
    return Group("imports", coords, variables, VECTOR, attrs=attributes("imports"))


def directions_group(names: Iterable[str]) -> Group:
    """What each direction of a plan is made of; its vector is among `vectors`, under its source and its name."""
    variables = {"settings": text(("direction",), "its source in the plan, as JSON")}
    return Group("directions", {"direction": list(names)}, variables, ("direction",), attrs=attributes("directions"))


def methods_group(study: Study) -> Group:
    """What each label of the `method` axis means."""
    variables = {"protocol": text(("method",), "every knob of the method, the assumed ones named, as JSON")}
    return Group("methods", {"method": list(study.plan.methods)}, variables, ("method",), attrs=attributes("methods"))


def protocols(study: Study) -> dict[str, Any]:
    """Every method's knobs, those that its preset only assumes named."""
    from nsteer.science.presets import PRESETS

    knobs_by_method = {}
    for name, method in study.plan.methods.items():
        preset = PRESETS.get(method.preset or "")
        given = _given(study, name)
        assumed = [knob for knob in preset.assumed if knob not in given] if preset else []
        knobs_by_method[name] = {**method.model_dump(), "assumed": assumed, "from": preset.citation if preset else ""}
    return knobs_by_method


def _given(study: Study, name: str) -> set[str]:
    """The knobs of a method that the plan itself states."""
    own = (study.document.data.get("methods") or {}).get(name)
    return set(own) if isinstance(own, dict) else set()


# ---- jobs, failures, verification ------------------------------------------------------------------------


def jobs_group(jobs: Sequence[str]) -> Group:
    """Remote jobs that were submitted, so that a client that comes back fetches their results."""
    variables = {
        "digests": text(("job",), "digests of the job's programs, as JSON"),
        "status": text(("job",), "in flight, or done with"),
    }
    return Group("jobs", {"job": list(jobs)}, variables, ("job",), attrs=attributes("jobs"))


FAILURE = {
    "stage": Variable(("failure",), "string", "stage in which the cell failed"),
    "group": Variable(
        ("failure",), "string", "group of the store that lacks the cell, or holds it with a missing value"
    ),
    "model": Variable(("failure",), "string", "label of the model"),
    "labels": Variable(("failure",), "string", "labels of the cell along the cell dims of its group, as JSON"),
    "reason": Variable(("failure",), "string", "what went wrong"),
    "kind": Variable(("failure",), "string", "permanent, transient, or waiting for a cell that failed"),
    "run": Variable(("failure",), "string", "label of the run in which it failed last"),
    "cell_fingerprint": Variable(("failure",), "int64", "fingerprint that the cell was wanted with"),
    "attempts": Variable(("failure",), "int32", "how often it failed"),
    "resolved": Variable(("failure",), "bool", "whether the cell was filled since"),
}


def failures_group(labels: Sequence[str]) -> Group:
    """Cells that could not be computed, one record a cell."""
    return Group("failures", {"failure": list(labels)}, FAILURE, ("failure",), attrs=attributes("failures"))


def verification_group(study: Study, rows: int) -> Group:
    """Rows that were run again one at a time."""
    dims = ("model", "row")
    variables = {
        "stage": text(dims, "stage of the row"),
        "label": text(dims, "labels of the row, as JSON"),
        "tokens_equal": Variable(dims, "bool", "whether the tokens of the batch and of the single run are equal"),
        "relative_difference": number(dims, "largest relative difference of pooled streams, NaN where none are read"),
    }
    coords: dict[str, Sequence] = {"model": [facts.label for facts in study.facts], "row": list(range(rows))}
    return Group("verification", coords, variables, ("model",), attrs=attributes("verification"))
