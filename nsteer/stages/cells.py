"""Turns a study into the labelled grid of its work: one cell a commit, each with the fingerprint of all it rests on.

A fingerprint covers what the numbers depend on and nothing else: not the batch size, not the store's path, not
the other cells. So "what is left to do" is "which cells are missing", and a changed knob recomputes just what
depends on it. Each stage's cells carry the fingerprints of the cells they are made from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from nsteer.models.facts import Facts, label_of
from nsteer.models.templates import Turns, dates, turns_of
from nsteer.plan import formulas
from nsteer.plan.check import Study, formula_of, layer_sets, neutral_count, rated_emotions, stands_for
from nsteer.plan.layers import resolve
from nsteer.plan.prompts import prompt_set, sample_text, system_text
from nsteer.plan.schema import Also, Calibrated, Direction, Edit, Method, Model, Plan, Steer, Where
from nsteer.program.ops import REFERENCED, UNSCALED
from nsteer.science.presets import NEUTRAL
from nsteer.system.fingerprints import fingerprint

BLOCK = 16
"""Samples in one cell of samples and activations."""

VERSIONS = {
    "samples": 2,
    "activations": 1,
    "vectors": 1,
    "steering": 2,
    "calibration": 2,
    "judged": 2,
    "outcomes": 1,
    "lens": 1,
    "anisotropy": 1,
    "reads": 2,
}
"""The algorithm version of each stage: raised when the same knobs come to give other numbers."""

Cells = dict[tuple, int]


def model_of(study: Study, facts: Facts) -> Model:
    """The plan's entry for a model."""
    return next(m for m in study.plan.models if label_of(m) == facts.label)


def knobs(study: Study, facts: Facts) -> dict[str, Any]:
    """What of a model its numbers depend on."""
    spec = model_of(study, facts)
    return {
        "identity": facts.identity,
        "tokenizer": facts.tokenizer,
        "dtype": spec.dtype,
        **({"quantization": spec.quantization} if spec.quantization else {}),  # none: as cells were named before it
        "attn_implementation": spec.attn_implementation,
        **engine(study.plan, spec),
    }


def engine(plan: Plan, spec: Model) -> dict[str, Any]:
    """What of an executor a model's numbers depend on.

    Nothing where they are those of transformers, up to rounding, by the proof that is made before any program: so local
    cells and those of a server or a float32 engine are the same cells. In half precision other kernels round otherwise
    by enough to write another text; and what was not held against transformers is not known to be the same.
    """
    same = plan.executor != "vllm" or (spec.dtype == "float32" and plan.vllm.reference)
    return {} if same else {"engine": "vllm"}


def counts(study: Study, method: Method) -> dict[str, int]:
    """How many samples each label of the emotion axis has under a method."""
    emotions = dict.fromkeys(study.plan.emotion_labels(), method.samples)
    return {**emotions, NEUTRAL: neutral_count(method)}


def blocks(count: int) -> list[range]:
    """Sample numbers in blocks of BLOCK."""
    return [range(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]


def samples(study: Study, facts: Facts) -> Cells:
    """(method, emotion, block) -> fingerprint of the texts of that block."""
    assert study.texts is not None
    cells: Cells = {}
    for name, method in study.plan.methods.items():
        shared = {"version": VERSIONS["samples"], "model": knobs(study, facts), **_writing(study.plan, name, method)}
        for emotion, count in counts(study, method).items():
            for b, block in enumerate(blocks(count)):
                shown = [sample_text(method, study.texts, emotion, k) for k in block]
                systems = [system_text(method, study.texts, emotion, k) for k in block]
                turns = [turns_of(text, system) for text, system in zip(shown, systems, strict=True)]
                drawn = {"emotion": emotion, "first": block.start} if method.generate.sample else {}
                drawn |= dated(study, facts, method.chat, turns)
                cells[name, emotion, b] = fingerprint({**shared, "texts": shown, "systems": systems, **drawn})
    return cells


def dated(study: Study, facts: Facts, chat: str, conversations: Iterable[Turns]) -> dict[str, Any]:
    """What a model's chat template writes of the clock into conversations; nothing where it reads none.

    All else that decides what a model reads is in its files, which `knobs` cover, and in the texts.
    """
    if chat == "never" or facts.template is None:
        return {}
    found = dates(facts.template, conversations, study.moment)
    return {"dates": found} if found else {}


def _dated_prompts(study: Study, facts: Facts, chat: str, prompts: Any) -> dict[str, Any]:
    return dated(study, facts, chat, map(turns_of, prompt_set(prompts, study.texts).values()))


def _writing(plan: Plan, name: str, method: Method) -> dict[str, Any]:
    """What decides the texts of a method, besides what each one shows."""
    common = {"source": method.source, "chat": method.chat}
    if method.source == "comprehension":
        return common
    seed = {"seed": plan.seed, "method": drawn_as(name, method)} if method.generate.sample else {}
    return {**common, "generate": method.generate.model_dump(), **seed}


def drawn_as(name: str, method: Method) -> str:
    """The name that the draws of a method's texts go by."""
    return method.draws_of or name


def leaders(wanted: Mapping[tuple, int]) -> dict[int, tuple]:
    """Fingerprint -> the first cell of that fingerprint. Cells of one fingerprint hold the same: one is computed."""
    found: dict[int, tuple] = {}
    for key, number in wanted.items():
        found.setdefault(number, key)
    return found


def activations(study: Study, facts: Facts) -> Cells:
    """(method, emotion, block) -> fingerprint of the pooled residual streams of that block."""
    layers = resolve(study.plan.layers, facts.n_layers)
    cells: Cells = {}
    for (name, emotion, b), made_from in samples(study, facts).items():
        pooling = study.plan.methods[name].pooling.model_dump()
        what = {"version": VERSIONS["activations"], "samples": made_from, "pooling": pooling, "layers": layers}
        cells[name, emotion, b] = fingerprint(what)
    return cells


def vectors(study: Study, facts: Facts) -> Cells:
    """(method, emotion) -> fingerprint of an emotion's vectors at all layers."""
    read = activations(study, facts)
    cells: Cells = {}
    for name, method in study.plan.methods.items():
        groups = {
            e: [fp for (m, label, _), fp in read.items() if (m, label) == (name, e)] for e in counts(study, method)
        }
        knob: dict[str, Any] = {
            "baseline": method.baseline,
            "unit_norm": method.unit_norm,
            "version": VERSIONS["vectors"],
        }
        knob["variance"] = method.project_out.variance if method.project_out else None
        if method.estimator.kind != "mean_difference":  # else: as cells were named before there were others
            knob["estimator"] = {"kind": method.estimator.kind, **method.estimator.parameters()}
        if method.labels == "shuffled":
            knob["shuffled"] = {"seed": study.plan.seed, "method": name}
        uses_neutral = method.baseline == "neutral_mean" or method.project_out
        shared: dict[str, Any] = {"neutral": groups[NEUTRAL] if uses_neutral else [], **knob}
        if rests_on_all(method):
            shared["emotions"] = {e: groups[e] for e in study.plan.emotion_labels()}
        for emotion in study.plan.emotion_labels():
            cells[name, emotion] = fingerprint({**shared, "samples": groups[emotion]})
    return cells


def shuffled(study: Study) -> Study:
    """The same study with the labels of every method shuffled."""
    methods = {name: one.model_copy(update={"labels": "shuffled"}) for name, one in study.plan.methods.items()}
    return replace(study, plan=study.plan.model_copy(update={"methods": methods}))


def rests_on_all(method: Method) -> bool:
    """Whether a vector rests on the samples of every emotion, not of its own alone."""
    return method.baseline in ("grand_mean", "rest") or method.labels == "shuffled"


def averaged(study: Study, name: str, emotion: str) -> list[str]:
    """The labels whose samples a vector rests on: its emotion's, and those of its baseline and its denoising."""
    method = study.plan.methods[name]
    labels = list(study.plan.emotion_labels()) if rests_on_all(method) else [emotion]
    return labels + [NEUTRAL] * bool(method.baseline == "neutral_mean" or method.project_out)


def op_label(block: Steer) -> str:
    """The label of a steer block on the `op` axis."""
    return block.name or block.op


def steered_methods(plan: Plan, block: Steer) -> list[str]:
    return block.vectors.methods or list(plan.methods)


def steered_emotions(plan: Plan, block: Steer) -> list[str]:
    """The labels under which vectors steer: emotions, then formulas."""
    emotions = plan.emotion_labels() if block.vectors.emotions is None else block.vectors.emotions
    return [*emotions, *block.vectors.formulas]


def controls(block: Steer) -> list[str]:
    """The labels of the `control` axis: the vector itself is `none`."""
    return ["none", *(control for control in block.controls if control != "zero")]


def _continuing(study: Study, facts: Facts, block: Steer) -> dict[str, Any]:
    """What decides a continuation, besides its edits."""
    drawn = {"seeds": sorted(block.seeds), "seed": study.plan.seed} if block.generate.sample else {}
    return {
        "version": VERSIONS["steering"],
        "model": knobs(study, facts),
        "prompts": prompt_set(block.prompts, study.texts),
        "chat": block.chat,
        "generate": block.generate.model_dump(),
        **drawn,
        **_dated_prompts(study, facts, block.chat, block.prompts),
    }


def unsteered(study: Study, facts: Facts) -> Cells:
    """(model, op) -> fingerprint of the continuations without any edit: the zero control."""
    derived = vectors(study, facts)
    return {
        (facts.label, op_label(block)): fingerprint(
            {**_continuing(study, facts, block), **_projected(derived, block, steered_methods(study.plan, block))}
        )
        for block in study.plan.steer
        if "zero" in block.controls
    }


def _projected(derived: Cells, block: Steer, methods: list[str]) -> dict[str, Any]:
    """The vectors that a block's streams are projected on: every emotion's, of the methods named."""
    return {"projected": {m: {e: fp for (n, e), fp in derived.items() if n == m} for m in methods if block.project}}


def calibration(study: Study, facts: Facts) -> Cells:
    """The keys of `steering`, of conditions whose strength is to be found -> fingerprint of the search."""
    return _grid(study, facts)[1]


def calibrated_by(block: Steer, key: tuple) -> tuple:
    """The cell of `calibration` whose strength a cell of `steering` has: of a random control mostly its vector's."""
    own = isinstance(block.strengths, Calibrated) and block.strengths.random == "own"
    return key if own else (*key[:-1], "none")


def steering(study: Study, facts: Facts) -> Cells:
    """(model, op, layer_set, method, emotion, strength, control) -> fingerprint of that cell's continuations."""
    return _grid(study, facts)[0]


def _searching(study: Study, facts: Facts, block: Steer, spec: Calibrated) -> dict[str, Any]:
    """What decides the strength that is found, besides the edit and the target."""
    prompts = block.prompts if spec.prompts is None else spec.prompts
    return {
        "version": VERSIONS["calibration"],
        "model": knobs(study, facts),
        "prompts": prompt_set(prompts, study.texts),
        "chat": block.chat,
        "tokens": min(spec.tokens, block.generate.max_new_tokens),
        "measure": spec.measure,
        "tolerance": spec.tolerance,
        "most": spec.most,
        **_dated_prompts(study, facts, block.chat, prompts),
    }


def _grid(study: Study, facts: Facts) -> tuple[Cells, Cells]:
    """The cells of `steering`, and those of `calibration` that they rest on."""
    plan, derived, read = study.plan, vectors(study, facts), activations(study, facts)
    null = vectors(shuffled(study), facts) if any("shuffled" in block.controls for block in plan.steer) else {}
    cells: Cells = {}
    searches: Cells = {}
    for block in plan.steer:
        spec = block.strengths if isinstance(block.strengths, Calibrated) else None
        for layer_set, chosen in layer_sets(block.layers, facts.n_layers).items():
            going_on = _continuing(study, facts, block)
            shared = {**going_on, **_applying(block), "layers": chosen}
            if block.vectors.layer != "same":
                shared["vector_layer"] = resolve(block.vectors.layer, facts.n_layers)
            for method in steered_methods(plan, block):
                if block.scale == "reference_norm" or block.op in REFERENCED:
                    shared["reference"] = [fp for (m, e, _), fp in read.items() if (m, e) == (method, NEUTRAL)]
                shared |= _projected(derived, block, [method])
                if block.when is not None and block.when.direction is not None:
                    shared["gate"] = derived[method, block.when.direction]
                if block.also:  # else: as cells were named before there were further edits
                    shared["also"] = [_further(study, facts, one, method, derived, read) for one in block.also]
                made_with = fingerprint(shared)  # once: the grid may have many cells
                edit = {k: v for k, v in shared.items() if k not in (*going_on, "project", "projected")}
                sought_with = fingerprint({**edit, **_searching(study, facts, block, spec)}) if spec else 0
                strengths: list[Any] = block.strengths if isinstance(block.strengths, list) else block.labels()
                for emotion in steered_emotions(plan, block):
                    vector = _steering_vector(plan, block, method, emotion, derived)
                    drawn: dict[str, dict[str, Any]] = {
                        "random": {"seed": plan.seed, "method": method, "emotion": emotion, "draw": "rotation"}
                    }
                    if "shuffled" in block.controls:
                        drawn["shuffled"] = {"shuffled": _steering_vector(plan, block, method, emotion, null)}
                    for strength in strengths:
                        for control in controls(block):
                            key = (facts.label, op_label(block), layer_set, method, emotion, float(strength), control)
                            if study.only is not None and key not in study.only:
                                continue
                            own = {"vector": vector, "strength": strength}
                            if spec:
                                by = calibrated_by(block, key)
                                of = {**own, "control": by[-1], **drawn.get(by[-1], {})}
                                searches[by] = fingerprint({"sought_with": sought_with, **of})
                                own["strength"] = {"calibration": searches[by]}
                            own |= {"control": control, **drawn.get(control, {})}
                            cells[key] = fingerprint({"made_with": made_with, **own})
    return cells, searches


def _steering_vector(plan: Plan, block: Steer, method: str, label: str, derived: Cells) -> Any:
    """The fingerprint of the vector that steers under a label; of a formula, what stands for its names."""
    text = block.vectors.formulas.get(label)
    return derived[method, label] if text is None else _formula(plan, text, method, derived)


def _formula(plan: Plan, text: str, method: str, derived: Cells) -> dict[str, Any]:
    """What a formula that steers is made from."""
    return {"formula": formulas.replaced(formulas.parse(text), lambda parts: _leaf(plan, parts, derived, method))}


def _leaf(plan: Plan, parts: tuple[str, ...], derived: Cells, method: str | None = None) -> dict[str, Any]:
    """What a name in a formula rests on: the vectors of one emotion, or of all that are rated."""
    kind, *where = stands_for(plan, parts, method)
    ratings = {"scale": where[1], "ratings": plan.scales()} if kind == "axis" else {}
    return {"vectors": {e: derived[where[0], e] for e in rated_emotions(plan, kind, where[1])}, **ratings}


def _applying(block: Steer) -> dict[str, Any]:
    """What decides how a vector is applied."""
    return {"project": block.project, **_acting(block)}


def _acting(edit: Steer | Also) -> dict[str, Any]:
    """What an edit does, besides its vector, its strength and its layers."""
    return {
        "op": edit.op,
        "scale": None if edit.op in UNSCALED else edit.scale,
        "norm_skip": edit.norm_skip,
        "positions": _plain(edit.positions),
        **_conditional(edit),
    }


def _further(study: Study, facts: Facts, one: Also, method: str, derived: Cells, read: Cells) -> dict[str, Any]:
    """An edit of `also` as resolved data, under a method."""
    text = formula_of(study.plan, one)
    vector = derived[method, one.direction] if text is None else _formula(study.plan, text, method, derived)
    made = {
        **_acting(one),
        "layers": resolve(one.layers, facts.n_layers),
        "order": one.order,
        "strength": one.strength,
        "vector": vector,
    }
    if one.op in REFERENCED or (one.scale == "reference_norm" and one.op not in UNSCALED):
        made["reference"] = [fp for (m, e, _), fp in read.items() if (m, e) == (method, NEUTRAL)]
    if one.when is not None and one.when.direction is not None:
        made["gate"] = derived[method, one.when.direction]
    return made


def _plain(positions: Any) -> Any:
    """Positions as plain data."""
    return positions.model_dump(exclude_none=True) if isinstance(positions, Where) else positions


CONDITIONAL = ("when", "schedule", "site")


def _conditional(edit: Steer | Edit | Also) -> dict[str, Any]:
    """Where, when and how long an edit acts; nothing where it always does, after blocks: so cells were named before."""
    when = edit.when.model_dump(exclude={"direction"}) if edit.when else None
    schedule = edit.schedule.model_dump() if edit.schedule else None
    site = None if edit.site == "resid_post" else edit.site
    return {name: value for name, value in (("when", when), ("schedule", schedule), ("site", site)) if value}


def judged(cells: Cells, judge: str, over: str) -> Cells:
    """The same keys, with the fingerprint of what a judge of identity `judge` says of those cells."""
    shared = {"version": VERSIONS["judged"], "judge": judge, "over": over}
    return {key: fingerprint({**shared, "cell": made_from}) for key, made_from in cells.items()}


def outcomes(cells: Cells) -> Cells:
    """The same keys, with the fingerprint of what is measured of those continuations under the unsteered model."""
    return {key: fingerprint({"version": VERSIONS["outcomes"], "cell": made_from}) for key, made_from in cells.items()}


def lens(study: Study, facts: Facts) -> Cells:
    """(method, emotion) -> fingerprint of the tokens that a vector promotes."""
    top = study.plan.measure.lens if study.plan.measure else 0
    shared = {"version": VERSIONS["lens"], "top": top, "model": knobs(study, facts)}
    return {key: fingerprint({**shared, "vector": fp}) for key, fp in vectors(study, facts).items()} if top else {}


def anisotropy(study: Study, facts: Facts) -> Cells:
    """(bos,) -> fingerprint of the neutral sentences' last-token streams, with BOS and without."""
    if study.texts is None or study.plan.measure is None or not study.plan.measure.anisotropy:
        return {}
    if not study.texts.neutral_sentences:
        return {}
    shared = {"version": VERSIONS["anisotropy"], "model": knobs(study, facts)}
    shared["sentences"] = study.texts.neutral_sentences
    return {(bos,): fingerprint({**shared, "bos": bos}) for bos in ("with", "without")}


def _conditions(study: Study, facts: Facts) -> dict[str, list[dict[str, Any]]]:
    """Every condition of `edits:` as resolved data, `none` (no edit) first."""
    plan = study.plan
    found: dict[str, list[dict[str, Any]]] = {"none": []}
    derived = vectors(study, facts) if any(one.formula for one in plan.directions.values()) else {}
    for name, edits in plan.edits.items():
        found[name] = [
            {
                **edit.model_dump(exclude={"direction", "layers", "vector_layer", "reference", *CONDITIONAL}),
                "positions": _plain(edit.positions),
                **_conditional(edit),
                "layers": resolve(edit.layers, facts.n_layers),
                "vector_layer": edit.vector_layer
                if edit.vector_layer == "same"
                else resolve(edit.vector_layer, facts.n_layers),
                "direction": _named(study, facts, edit.direction, derived),
                **({"reference": _named(study, facts, edit.reference, derived)} if edit.reference else {}),
                **({"gate": _named(study, facts, gate, derived)} if (gate := _gate(edit)) else {}),
            }
            for edit in edits
        ]
    return found


def _gate(edit: Edit) -> str | None:
    return edit.when.direction if edit.when else None


def _named(study: Study, facts: Facts, name: str, derived: Cells) -> dict[str, Any]:
    """What a direction of the plan is made from; of a formula, what stands for its names."""
    spec = study.plan.directions[name]
    if spec.formula is None:
        drawn = {"name": name, "layers": "one draw"} if spec.random is not None else {}  # the draw depends on it
        groups = spec.contrast or spec.mean
        texts = [text for side in ("positive", "negative", "texts") for text in getattr(groups, side, ())]
        date = dated(study, facts, groups.chat, map(turns_of, texts)) if groups else {}
        return {**_direction(study, facts, spec), **drawn, **date}

    def leaf(parts: tuple[str, ...]) -> dict[str, Any]:
        kind, *where = stands_for(study.plan, parts)
        if kind == "direction":
            return {"direction": _named(study, facts, where[0], derived)}
        return _leaf(study.plan, parts, derived)

    return {"formula": formulas.replaced(formulas.parse(spec.formula), leaf)}


def _direction(study: Study, facts: Facts, spec: Direction) -> dict[str, Any]:
    """What a direction is made from; of one from a store, the vector itself, wherever the store lies."""
    if spec.store is None:
        # none: as cells were named before there were means and formulas
        return spec.model_dump(exclude={"formula"} | (set() if spec.mean else {"mean"}))
    found = study.borrowed(facts, spec.store)
    return {"vector": None if found is None else hashlib.sha256(found.values.tobytes()).hexdigest()}


def _prompted(study: Study, facts: Facts) -> dict[str, Any]:
    plan = study.plan
    shared = {"version": VERSIONS["reads"], "model": knobs(study, facts), "chat": plan.chat}
    date = _dated_prompts(study, facts, plan.chat, plan.prompts)
    return {**shared, **date, "prompts": prompt_set(plan.prompts, study.texts)}


def reads(study: Study, facts: Facts) -> Cells:
    """(read, edit) -> fingerprint of a recorded stream under a condition."""
    if not study.plan.reads:
        return {}
    shared, cells = _prompted(study, facts), {}
    for edit, edits in _conditions(study, facts).items():
        for name, read in study.plan.reads.items():
            what = {**read.model_dump(exclude={"positions"}), "layers": resolve(read.layers, facts.n_layers)}
            if read.positions != "all":  # else: as cells were named before
                what["positions"] = _plain(read.positions)
            cells[name, edit] = fingerprint({**shared, "read": what, "edits": edits})
    return cells


def edited(study: Study, facts: Facts) -> Cells:
    """(edit,) -> fingerprint of the continuations under a condition of `edits:`."""
    generate = study.plan.generate
    if generate is None:
        return {}
    shared = {**_prompted(study, facts), "generate": generate.model_dump()}
    if generate.sample:
        shared["seed"] = study.plan.seed
    return {(edit,): fingerprint({**shared, "edits": edits}) for edit, edits in _conditions(study, facts).items()}
