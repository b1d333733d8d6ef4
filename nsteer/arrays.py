"""Turns what a study computes into labelled arrays: the groups of its store, and the dataset of each cell.

Names, dims, units and dtypes of everything in a store are written here, once. This is the side that meets
labels: it knows nothing of models or programs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsteer import calibration, cells
from nsteer.check import Study, labels_of, layer_sets
from nsteer.models import Facts
from nsteer.plan import Calibrated
from nsteer.prompts import prompt_set
from nsteer.store import Group, Variable, slug

SITE = "resid_post"
RECEIPT = {
    "touched": "positions touched by the edit, over prompt and generated tokens",
    "relative_change": "mean of ‖Δ‖/‖h‖ over touched positions",
    "cosine": "mean cosine of the residual stream before and after, over touched positions",
    "injected": "mean of ‖Δ‖ over touched positions",
}
CONDITION = ("model", "op", "layer_set", "method", "emotion", "strength", "control")
ROW = ("prompt", "seed")


def text(dims: tuple[str, ...], long_name: str) -> Variable:
    return Variable(dims, "string", long_name)


def number(dims: tuple[str, ...], long_name: str, units: str = "1", compress: bool = False) -> Variable:
    return Variable(dims, "float32", long_name, units, compress)


def count(dims: tuple[str, ...], long_name: str) -> Variable:
    return Variable(dims, "int32", long_name)


def groups(study: Study) -> list[Group]:
    """The groups of a study's store, with every label that the plan gives."""
    found = [models_group(study)] + [methods_group(study)] * bool(study.plan.methods)
    for facts in study.facts:
        if study.plan.methods:
            found += [samples_group(study, facts), activations_group(study, facts), vectors_group(study, facts)]
    if study.plan.steer:
        found += steering_groups(study)
    found += measured_groups(study)
    if study.plan.generate is not None:
        found += edited_groups(study)
    return found


# ---- models and programs ---------------------------------------------------------------------------------

MODEL_TEXTS = {
    "id": "hub id, directory or zoo name",
    "revision": "commit on the hub, empty for a local directory",
    "identity": "commit, or hash of a local directory's files",
    "tokenizer": "hash of the tokenizer's files, chat template included",
    "model_type": "architecture",
    "dtype": "dtype of the weights in memory",
    "quantization": "int8 (LLM.int8 by bitsandbytes), or empty",
    "device": "class of device",
    "attn_implementation": "attention implementation",
    "executor": "where programs ran",
    "versions": "versions of what computed, as JSON",
    "settings": "torch's settings and the most padded tokens in a batch by stage, as JSON",
}
MODEL_NUMBERS = {"n_layers": "blocks", "d_model": "width of the residual stream", "parameters": "parameters"}


def models_group(study: Study) -> Group:
    variables = {name: text(("model",), meaning) for name, meaning in MODEL_TEXTS.items()}
    variables |= {name: Variable(("model",), "int64", meaning) for name, meaning in MODEL_NUMBERS.items()}
    return Group("models", {"model": [f.label for f in study.facts]}, variables, ("model",), attrs=about("models"))


def model_data(facts: Facts, described: Mapping[str, Any]) -> xr.Dataset:
    """What is known of a model: its facts, and what the executor says it loaded."""
    versions = {k: described[k] for k in ("torch", "transformers", "nnsight") if k in described}
    values = {**vars(facts), **described, "revision": facts.revision or "", "versions": json.dumps(versions)}
    values["settings"] = json.dumps(described.get("settings", {}))
    names = {**MODEL_TEXTS, **MODEL_NUMBERS}
    return xr.Dataset({name: ((), values.get(name, "" if name in MODEL_TEXTS else -1)) for name in names})


def programs_group(digests: Sequence[str]) -> Group:
    variables = {"source": text(("program",), "compiled source text, as it ran"), "stage": text(("program",), "stage")}
    return Group("programs", {"program": list(digests)}, variables, ("program",), attrs=about("programs"))


# ---- samples, activations, vectors -----------------------------------------------------------------------


def _axes(study: Study, facts: Facts) -> dict[str, Sequence]:
    most = max(n for m in study.plan.methods.values() for n in cells.counts(study, m).values())
    return {
        "model": [facts.label],
        "method": list(study.plan.methods),
        "emotion": labels_of(study.plan),
        "sample": list(range(most)),
    }


def _depth(facts: Facts) -> tuple[list[int], dict[str, Any]]:
    layers = list(range(facts.n_layers))
    depth = np.array(layers, np.float64) / facts.n_layers
    return layers, {"depth": (Variable(("layer",), "float64", "relative depth, layer / n_layers"), depth)}


SAMPLE = ("model", "method", "emotion", "sample")
VECTOR = SAMPLE[:3]


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
    return _by_sample("samples", facts, coords, variables)


def activations_group(study: Study, facts: Facts) -> Group:
    layers, depth = _depth(facts)
    variables = {
        "pooled": number((*SAMPLE, "layer", "d_model"), f"pooled {SITE}", compress=True),
        "token_norm": number((*SAMPLE, "layer"), f"mean L2 norm of {SITE} over a text's tokens (BOS left out)"),
        "positions": count(SAMPLE, "positions pooled; 0 for a hole"),
    }
    coords: dict[str, Sequence] = {**_axes(study, facts), "layer": layers, "d_model": list(range(facts.d_model))}
    return _by_sample("activations", facts, coords, variables, depth)


def _by_sample(product: str, facts: Facts, coords: dict, variables: dict, auxiliary: dict | None = None) -> Group:
    path = f"{product}/{slug(facts.label)}"
    blocks = {"sample": cells.BLOCK}
    cell = ("model", "method", "emotion", "sample_block")
    return Group(path, coords, variables, cell, blocks, auxiliary or {}, about(product, site=SITE))


def vectors_group(study: Study, facts: Facts) -> Group:
    return vectors_of(facts, list(study.plan.methods), study.plan.emotion_labels())


def vectors_of(facts: Facts, methods: Sequence[str], emotions: Sequence[str]) -> Group:
    """The vectors of a model, whoever made them."""
    layers, depth = _depth(facts)
    variables = {
        "vector": number((*VECTOR, "layer", "d_model"), f"emotion vector in {SITE}"),
        "norm": number((*VECTOR, "layer"), "length of the vector before normalisation"),
        "n_samples": count(VECTOR, "samples averaged (holes left out)"),
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
    return Group(path, coords, variables, VECTOR, {}, depth, about("vectors", site=SITE))


def imports_group(labels: Sequence[str], methods: Sequence[str], emotions: Sequence[str]) -> Group:
    """Vectors that came from files, and where from; a vector under these labels is that one if its fingerprint is."""
    coords: dict[str, Sequence] = {"model": list(labels), "method": list(methods), "emotion": list(emotions)}
    variables = {"provenance": text(VECTOR, "file, its sha256, how it counts layers, what it says, as JSON")}
    return Group("imports", coords, variables, VECTOR, attrs=about("imports"))


def methods_group(study: Study) -> Group:
    """What each label of the `method` axis means."""
    variables = {"protocol": text(("method",), "every knob of the method, the assumed ones named, as JSON")}
    return Group("methods", {"method": list(study.plan.methods)}, variables, ("method",), attrs=about("methods"))


def protocols(study: Study) -> dict[str, Any]:
    """Every method's knobs, those that its preset only assumes named."""
    from nsteer.presets import PRESETS

    found = {}
    for name, method in study.plan.methods.items():
        preset = PRESETS.get(method.preset or "")
        given = _given(study, name)
        assumed = [knob for knob in preset.assumed if knob not in given] if preset else []
        found[name] = {**method.model_dump(), "assumed": assumed, "from": preset.source if preset else ""}
    return found


def _given(study: Study, name: str) -> set[str]:
    """The knobs of a method that the plan itself states."""
    own = (study.document.data.get("methods") or {}).get(name)
    return set(own) if isinstance(own, dict) else set()


# ---- steering --------------------------------------------------------------------------------------------


def _union(lists: Sequence[Sequence]) -> list:
    return list(dict.fromkeys(item for one in lists for item in one))


def steering_axes(study: Study) -> dict[str, list]:
    """Labels of the steering cube: the union over models and steer blocks, in the plan's order."""
    plan = study.plan
    return {
        "model": [facts.label for facts in study.facts],
        "op": [cells.op_label(block) for block in plan.steer],
        "layer_set": _union([list(layer_sets(b.layers, f.n_layers)) for b in plan.steer for f in study.facts]),
        "method": _union([cells.steered_methods(plan, block) for block in plan.steer]),
        "emotion": _union([cells.steered_emotions(plan, block) for block in plan.steer]),
        "strength": _union([block.labels() for block in plan.steer]),
        "control": _union([cells.controls(block) for block in plan.steer]),
        "prompt": _union([list(prompt_set(block.prompts, study.texts)) for block in plan.steer]),
        "seed": _union([block.seeds for block in plan.steer]),
    }


def steering_groups(study: Study) -> list[Group]:
    """Texts and numbers of the steered continuations, and of the unsteered ones beside them."""
    axes = steering_axes(study)
    tokens = list(range(max(block.generate.max_new_tokens for block in study.plan.steer)))
    layers = list(range(max(facts.n_layers for facts in study.facts)))
    dims = (*CONDITION, *ROW)
    plain = {name: axes[name] for name in ("model", "op", "prompt", "seed")}
    receipts = {name: number((*dims, "layer"), meaning) for name, meaning in RECEIPT.items()}
    sites = [block.site for block in study.plan.steer]
    found = [
        Group("generations", {**axes, "token": tokens}, _texts(dims), CONDITION, attrs=about("generations")),
        Group("steering", {**axes, "layer": layers}, receipts, CONDITION, {}, *_sited("steering", ("op",), sites)),
        settings_group(study, axes),
        *calibration_groups(study, axes),
    ]
    if most := max(len(block.also) for block in study.plan.steer):
        further = {name: number((*dims, "entry"), f"{meaning}, at all its layers") for name, meaning in RECEIPT.items()}
        coords = {**axes, "entry": list(range(most))}
        found.append(Group("steering_also", coords, further, CONDITION, attrs=about("steering_also")))
    if any("zero" in block.controls for block in study.plan.steer):
        found.append(
            Group(
                "unsteered", {**plain, "token": tokens}, _texts(tuple(plain)), ("model", "op"), attrs=about("unsteered")
            )
        )
    return found


MEASURED = {
    "kl": "nats: KL(steered ‖ unsteered) of the next-token distributions over the unsteered greedy continuation, mean "
    "over its tokens, then over prompts",
    "perplexity_ratio": "perplexity of the unsteered greedy continuation under the steered model over that under the "
    "unsteered one (geometric mean over tokens, then over prompts)",
}
"""What a calibrated strength is a label of."""


def calibration_groups(study: Study, axes: dict[str, list]) -> list[Group]:
    """The strengths found for every condition whose label is a target, with the curves on which they were found."""
    blocks = [block for block in study.plan.steer if isinstance(block.strengths, Calibrated)]
    if not blocks:
        return []
    methods = _union([cells.steered_methods(study.plan, block) for block in blocks])
    coords: dict[str, Sequence] = {
        **{name: axes[name] for name in CONDITION},
        "op": [cells.op_label(block) for block in blocks],
        "method": methods,
        "emotion": _union([cells.steered_emotions(study.plan, block) for block in blocks]),
        "strength": _union([block.labels() for block in blocks]),
        "trial": list(range(calibration.TRIALS)),
    }
    variables = {
        "found": number(CONDITION, "strength found, in the unit of the op's scale; NaN where there is none"),
        "value": number(CONDITION, "value measured at the strength found"),
        "met": Variable(CONDITION, "bool", "whether the value is within the tolerance of the target"),
        "reason": text(CONDITION, "why there is no strength"),
        "monotone": Variable(CONDITION, "bool", "whether the curve never falls with strength, where it was measured"),
        "measure": text(CONDITION, "what the target is of: kl or perplexity_ratio"),
        "rounds": count(CONDITION, "rounds of the search"),
        "batches": count(CONDITION, "forward batches in which the vector's rows travelled"),
        "tried": number((*CONDITION, "trial"), "strengths tried, least first; NaN beyond"),
        "measured": number((*CONDITION, "trial"), "value at each of them"),
    }
    attrs = about("calibration", **{f"strength_{name}": meaning for name, meaning in MEASURED.items()})
    return [Group("calibration", coords, variables, CONDITION, attrs=attrs)]


def calibration_data(search: calibration.Search, measure: str, batches: int) -> xr.Dataset:
    """The end of a search as the cell of its condition."""
    found, curve = search.found, sorted(search.tried.items())
    hole = np.full(calibration.TRIALS - len(curve), np.nan)
    values: dict[str, Any] = {
        "found": np.float32(math.nan if found is None else found),
        "value": np.float32(math.nan if found is None else search.tried[found]),
        "met": found is not None,
        "reason": search.reason,
        "monotone": search.monotone,
        "measure": measure,
        "rounds": np.int32(search.rounds),
        "batches": np.int32(batches),
    }
    lines = {"tried": [s for s, _ in curve], "measured": [v for _, v in curve]}
    scalars = {name: ((), value) for name, value in values.items()}
    return dataset(
        {"trial": range(calibration.TRIALS)},
        {**scalars, **{name: (("trial",), np.r_[line, hole].astype(np.float32)) for name, line in lines.items()}},
    )


ARMS = ("vector", "random", "zero")
PARTS = ("tuned", "held-out")


def tuned_group(study: Study) -> Group:
    """The best layer set and strength of every vector, and what they score beside their controls."""
    axes, cell = steering_axes(study), ("model", "op", "method", "emotion")
    both = (*cell, "part", "arm")
    variables = {
        "layer_set": text(cell, "label of the layer set that is best; empty where there is none"),
        "best": number(cell, "label on the axis strength that is best; NaN where there is none"),
        "reason": text(cell, "why there is none"),
        "tried": count(cell, "settings tried"),
        "settings": text(cell, "the search of the plan, its objective and its limits, as JSON"),
        "score": number(both, "mean of the objective over continuations"),
        "low": number(both, "lower end of its interval at 95 %"),
        "high": number(both, "upper end of its interval at 95 %"),
        "n": count(both, "continuations"),
        "ratio": number(both, "perplexity over that of the unsteered twin, geometric mean"),
    }
    coords: dict[str, Sequence] = {**{name: axes[name] for name in cell}, "part": list(PARTS), "arm": list(ARMS)}
    return Group("tuned", coords, variables, cell, attrs=about("tuned"))


def _sited(product: str, dims: tuple[str, ...], sites: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Auxiliary coordinates and attributes of a group: the site an attribute, and a label where it is another one."""
    found = np.array(sites, object)
    if set(found.flat) <= {SITE, ""}:
        return {}, about(product, site=SITE)
    meaning = "what was read or edited; empty: as the group's attribute says"
    return {"site": (Variable(dims, "string", meaning, ""), found)}, about(product, site=SITE)


def _texts(dims: tuple[str, ...]) -> dict[str, Variable]:
    return {
        "text": text(dims, "continuation"),
        "n_tokens": count(dims, "tokens of the continuation, end of text included"),
        "token_id": Variable(
            (*dims, "token"), "int32", "token ids of the continuation, -1 beyond its end", compress=True
        ),
        "program": text(dims, "the program that wrote it: a label of the group programs"),
    }


def settings_group(study: Study, axes: dict[str, list]) -> Group:
    """What each label of the `op` axis means, and the prompts' texts."""
    variables = {
        "settings": text(("op",), "the steer block, as JSON"),
        "prompt_text": text(("op", "prompt"), "the prompt, before any chat template"),
    }
    return Group("ops", {"op": axes["op"], "prompt": axes["prompt"]}, variables, ("op",), attrs=about("ops"))


def settings_data(study: Study, index: int) -> xr.Dataset:
    block = study.plan.steer[index]
    prompts = prompt_set(block.prompts, study.texts)
    data = {
        "settings": ((), json.dumps(block.model_dump(exclude=set() if block.also else {"also"}))),
        "prompt_text": (("prompt",), list(prompts.values())),
    }
    return xr.Dataset(data, coords={"prompt": list(prompts)})


def measured_groups(study: Study) -> list[Group]:
    """The groups of what `measure:` and `steer: {project: true}` ask for."""
    plan, found = study.plan, []
    zero = any("zero" in block.controls for block in plan.steer)
    if any(block.project for block in plan.steer):
        found += [projections_group("projections", study)]
        found += [projections_group("projections_unsteered", study)] * zero
    if plan.measure is None:
        return found
    if plan.measure.perplexity and plan.steer:
        found += [outcomes_group("outcomes", study)] + [outcomes_group("outcomes_unsteered", study)] * zero
    for facts in study.facts:
        if plan.measure.lens and plan.methods:
            found.append(lens_group(study, facts))
        if plan.measure.anisotropy and study.texts is not None and study.texts.neutral_sentences:
            found.append(anisotropy_group(study, facts))
    return found


WHERE = ("prompt_end", "written")
"""Where a projection is taken: at the prompt's last token; as a mean over the generated tokens fed back."""


def projections_group(path: str, study: Study) -> Group:
    """Projections of the streams on the vectors (at length 1) of every emotion, the `target`.

    "projections": steered, on the vectors of the cell's own method; "projections_unsteered": on those of each method.
    """
    axes = steering_axes(study)
    cell = CONDITION if path == "projections" else ("model", "op")
    middle = ROW if path == "projections" else ("method", *ROW)
    layers = list(range(max(facts.n_layers for facts in study.facts)))
    coords: dict[str, Sequence] = {
        **{name: axes[name] for name in (*cell, *middle)},
        "where": list(WHERE),
        "layer": layers,
    }
    coords["target"] = study.plan.emotion_labels()
    variables = {
        "projection": number(tuple(coords), "projection of the stream on the target's unit vector", compress=True)
    }
    return Group(path, coords, variables, cell, attrs=about(path, site=SITE))


def outcomes_group(path: str, study: Study) -> Group:
    """What is measured of the continuations in `generations` ("outcomes") or `unsteered` ("outcomes_unsteered")."""
    axes = steering_axes(study)
    cell = CONDITION if path == "outcomes" else ("model", "op")
    dims = (*cell, *ROW)
    variables = {
        "log_probability": number(dims, "log P of the continuation under the unsteered model", "nats"),
        "perplexity": number(dims, "perplexity of the continuation under the unsteered model"),
    }
    return Group(path, {name: axes[name] for name in dims}, variables, cell, attrs=about(path))


def lens_group(study: Study, facts: Facts) -> Group:
    """The tokens that each vector promotes most through the unembedding."""
    assert study.plan.measure is not None
    layers, depth = _depth(facts)
    cell = ("model", "method", "emotion")
    dims = (*cell, "layer", "rank")
    variables = {
        "token": text(dims, "token, most promoted first"),
        "token_id": Variable(dims, "int32", "its id"),
        "logit": number(dims, "unembedding · vector"),
    }
    coords: dict[str, Sequence] = {
        "model": [facts.label],
        "method": list(study.plan.methods),
        "emotion": study.plan.emotion_labels(),
        "layer": layers,
        "rank": list(range(study.plan.measure.lens)),
    }
    return Group(f"lens/{slug(facts.label)}", coords, variables, cell, {}, depth, about("lens", site=SITE))


def anisotropy_group(study: Study, facts: Facts) -> Group:
    """Last-token streams of neutral sentences, with BOS and without."""
    assert study.texts is not None
    layers, depth = _depth(facts)
    coords: dict[str, Sequence] = {
        "model": [facts.label],
        "bos": ["with", "without"],
        "sentence": list(range(len(study.texts.neutral_sentences))),
        "layer": layers,
        "d_model": list(range(facts.d_model)),
    }
    variables = {"pooled": number(tuple(coords), f"last-token {SITE}")}
    path = f"anisotropy/{slug(facts.label)}"
    return Group(path, coords, variables, ("model", "bos"), {}, depth, about("anisotropy", site=SITE))


def judged_group(path: str, study: Study, classes: Sequence[str]) -> Group:
    """P(class) of the continuations in `generations` ("judged") or `unsteered` ("judged_unsteered")."""
    axes = steering_axes(study)
    cell = CONDITION if path == "judged" else ("model", "op")
    dims = (*cell, *ROW)
    variables = {"probability": number((*dims, "class"), "probability of the class under the judge")}
    coords: dict[str, Sequence] = {**{name: axes[name] for name in dims}, "class": list(classes)}
    assert study.plan.judge is not None
    return Group(path, coords, variables, cell, attrs=about(path, judge=study.plan.judge.classifier))


def jobs_group(jobs: Sequence[str]) -> Group:
    """Remote jobs that were submitted, so that a client that comes back fetches their results."""
    variables = {
        "digests": text(("job",), "digests of the job's programs, as JSON"),
        "status": text(("job",), "in flight, or done with"),
    }
    return Group("jobs", {"job": list(jobs)}, variables, ("job",), attrs=about("jobs"))


def judges_group(names: Sequence[str]) -> Group:
    """Who judged: identity and the map from emotions to classes, as JSON."""
    variables = {"settings": text(("judge",), "the judge of the plan and its identity, as JSON")}
    return Group("judges", {"judge": list(names)}, variables, ("judge",), attrs=about("judges"))


# ---- reads and edits without emotions -------------------------------------------------------------------


def _conditions(study: Study) -> list[str]:
    return ["none", *study.plan.edits]


def edited_groups(study: Study) -> list[Group]:
    """Continuations under each condition of `edits:`, with a receipt for every edit at every layer."""
    generate = study.plan.generate
    assert generate is not None
    dims = ("model", "edit", "prompt")
    coords = {
        "model": [facts.label for facts in study.facts],
        "edit": _conditions(study),
        "prompt": list(prompt_set(study.plan.prompts, study.texts)),
    }
    texts = Group(
        "edited",
        {**coords, "token": list(range(generate.max_new_tokens))},
        _texts(dims),
        dims[:2],
        attrs=about("edited"),
    )
    return [texts, receipts_group("edited_receipts", study, coords)]


def receipts_group(path: str, study: Study, coords: Mapping[str, Sequence]) -> Group:
    """Receipts of the edits of each condition; `entry` counts the edits in a condition's list."""
    entries = list(range(max((len(edits) for edits in study.plan.edits.values()), default=0) or 1))
    layers = list(range(max(facts.n_layers for facts in study.facts)))
    dims = (*coords, "entry", "layer")
    variables = {name: number(dims, meaning) for name, meaning in RECEIPT.items()}
    cell = tuple(dim for dim in coords if dim != "prompt")
    conditions = [study.plan.edits.get(label, []) for label in _conditions(study)]
    sites = [[edits[i].site if i < len(edits) else "" for i in entries] for edits in conditions]
    sited = _sited(path, ("edit", "entry"), sites)
    return Group(path, {**coords, "entry": entries, "layer": layers}, variables, cell, {}, *sited)


def reads_groups(study: Study, facts: Facts, longest: int) -> list[Group]:
    """Recorded streams: pooled ones in `reads`, whole ones (a vector a position) in `streams`."""
    layers, depth = _depth(facts)
    base: dict[str, Sequence] = {
        "model": [facts.label],
        "read": [],
        "edit": _conditions(study),
        "prompt": list(prompt_set(study.plan.prompts, study.texts)),
    }
    tail = {"layer": layers, "d_model": list(range(facts.d_model))}
    pooled = [name for name, read in study.plan.reads.items() if read.pooling is not None]
    whole = [name for name, read in study.plan.reads.items() if read.pooling is None]
    cell, found = ("model", "read", "edit"), []
    for product, names, middle in (("reads", pooled, {}), ("streams", whole, {"position": list(range(longest))})):
        if names:
            coords: dict[str, Sequence] = {**base, "read": names, **middle, **tail}
            variables = {"stream": number(tuple(coords), "what stood at the read's site", compress=True)}
            path = f"{product}/{slug(facts.label)}"
            site, attrs = _sited(product, ("read",), [study.plan.reads[name].site for name in names])
            found.append(Group(path, coords, variables, cell, {}, {**depth, **site}, attrs))
    receipts = {**base, "read": list(study.plan.reads)}
    return [*found, receipts_group(f"read_receipts/{slug(facts.label)}", study, receipts)]


# ---- failures --------------------------------------------------------------------------------------------

FAILURE = {
    "stage": Variable(("failure",), "string", "stage in which the cell failed"),
    "group": Variable(("failure",), "string", "group of the store that lacks the cell, or holds it with a hole"),
    "model": Variable(("failure",), "string", "label of the model"),
    "labels": Variable(("failure",), "string", "labels of the cell along the cell dims of its group, as JSON"),
    "reason": Variable(("failure",), "string", "what went wrong"),
    "kind": Variable(("failure",), "string", "lasting, passing, or waiting for a cell that failed"),
    "run": Variable(("failure",), "string", "label of the run in which it failed last"),
    "cell_fingerprint": Variable(("failure",), "int64", "fingerprint that the cell was wanted with"),
    "attempts": Variable(("failure",), "int32", "how often it failed"),
    "resolved": Variable(("failure",), "bool", "whether the cell was filled since"),
}


def failures_group(labels: Sequence[str]) -> Group:
    """Cells that could not be computed, one record a cell."""
    return Group("failures", {"failure": list(labels)}, FAILURE, ("failure",), attrs=about("failures"))


# ---- verification ----------------------------------------------------------------------------------------


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
    return Group("verification", coords, variables, ("model",), attrs=about("verification"))


# ---- data of cells ---------------------------------------------------------------------------------------


def about(product: str, **attrs: Any) -> dict[str, Any]:
    """The attributes of a group."""
    return {"product": product, "product_version": 1, **attrs}


def ragged(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Token ids of unequal length as [row, token] int32, -1 beyond the end."""
    out = np.full((len(rows), width), -1, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def dataset(dims: Mapping[str, Sequence], variables: Mapping[str, tuple[tuple[str, ...], Any]]) -> xr.Dataset:
    """A Dataset of variables (dims, values) whose labels are `dims`; text stays text."""
    made = {}
    for name, (own, values) in variables.items():
        array = np.asarray(values)
        made[name] = (own, array.astype(object) if array.dtype.kind in "UT" else array)
    return xr.Dataset(made, coords={dim: list(labels) for dim, labels in dims.items()})


def texts_data(
    prompts: Sequence[str], seeds: Sequence[int] | None, rows: Mapping[tuple, Mapping[str, Any]]
) -> xr.Dataset:
    """Continuations of one cell: `rows[prompt, seed]` (or `rows[prompt,]`) holds text, tokens and program."""
    dims = {"prompt": list(prompts)} | ({} if seeds is None else {"seed": list(seeds)})
    keys = [(p,) for p in prompts] if seeds is None else [(p, s) for p in prompts for s in seeds]
    shape = [len(labels) for labels in dims.values()]
    width = max(max(len(rows[key]["tokens"]) for key in keys), 1)
    own = tuple(dims)

    def column(name: str) -> np.ndarray:
        return np.array([rows[key][name] for key in keys], object).reshape(shape)

    ids = ragged([rows[key]["tokens"] for key in keys], width).reshape(*shape, width)
    lengths = np.array([len(rows[key]["tokens"]) for key in keys], np.int32).reshape(shape)
    return dataset(
        {**dims, "token": range(width)},
        {
            "text": (own, column("text")),
            "n_tokens": (own, lengths),
            "token_id": ((*own, "token"), ids),
            "program": (own, column("program")),
        },
    )


def further_data(receipts: np.ndarray, number: Sequence[int], prompts: list[str], seeds: list[int]) -> xr.Dataset:
    """Receipts of the edits of `also` over (prompt, seed, entry), each over all its layers.

    receipts : [prompt, seed, edit, 4]; number : the entry that each edit is of, below 0 for the block's own op
    """
    entries = list(range(max(number) + 1))
    summed = np.stack([receipts[:, :, [n == entry for n in number]].sum(2) for entry in entries], 2)
    values = receipt_values(summed).astype(np.float32)
    dims: dict[str, Sequence] = {"prompt": prompts, "seed": seeds, "entry": entries}
    return dataset(dims, {name: (tuple(dims), values[..., i]) for i, name in enumerate(RECEIPT)})


def receipt_values(receipt: np.ndarray) -> np.ndarray:
    """Sums of a receipt [..., 4] as touched and means in the order of RECEIPT; NaN means where nothing was touched."""
    touched = receipt[..., :1]
    means = np.divide(receipt[..., 1:], touched, out=np.full_like(receipt[..., 1:], np.nan), where=touched > 0)
    return np.concatenate([touched, means], -1)
