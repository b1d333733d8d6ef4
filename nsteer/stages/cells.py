"""Turns a study into the labelled grid of its work: one cell a commit, each with the fingerprint of all it rests on.

A fingerprint covers what the numbers depend on and nothing else: not the batch size, not the store's path, not
the other cells. So "what is left to do" is "which cells are missing", and a changed knob recomputes just what
depends on it. Each stage's cells carry the fingerprints of the cells they are made from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from nsteer.models.templates import Turns, dates, turns_of
from nsteer.plan import formulas
from nsteer.plan.capability import shipped
from nsteer.plan.check import (
    Study,
    conditions,
    counts_for,
    formula_of,
    neutral_count,
    reads_instruction,
    sample_count,
    stands_for,
    steering_vectors,
    strengths_of,
    swept,
    vectors_for,
)
from nsteer.plan.prompts import asked_prompts, prompt_set, questions, sample_text, system_text
from nsteer.plan.schema import (
    SIDES,
    Also,
    Calibrated,
    Continuing,
    Contrast,
    Direction,
    Editing,
    Filter,
    Judge,
    Method,
    Model,
    Plan,
    Steer,
    Where,
)
from nsteer.program.ops import REFERENCED, UNSCALED
from nsteer.program.randomness import generator
from nsteer.science.presets import NEUTRAL
from nsteer.stages import judges
from nsteer.stages.job import Job
from nsteer.stages.keys import (
    Condition,
    Edited,
    EditSearch,
    Judged,
    JudgedEdited,
    JudgedPrompted,
    JudgedUnsteered,
    OfModel,
    Prompted,
    Read,
    ResponseChunk,
    SampleChunk,
    Sentences,
    Unsteered,
    Vector,
)
from nsteer.system.fingerprints import fingerprint

CHUNK = 16
"""Samples in one cell of samples and activations."""

VERSIONS = {
    "samples": 2,
    "activations": 1,
    "embeddings": 1,
    "swapped": 1,
    "vectors": 1,
    "responses": 1,
    "responses_judged": 1,
    "directions": 1,
    "steering": 2,
    "calibration": 2,
    "capability": 1,
    "judged": 4,
    "outcomes": 1,
    "lens": 1,
    "anisotropy": 1,
    "reads": 3,
    "edited": 1,
}
"""The algorithm version of each stage: raised when the same knobs come to give other numbers."""

K = TypeVar("K", bound=tuple)

Cells = dict[K, int]
"""The cells of a group that a study wants: key -> fingerprint."""


def knobs(job: Job) -> dict[str, Any]:
    """What of a model its numbers depend on."""
    spec = job.model
    return {
        "identity": job.facts.identity,
        "tokenizer": job.facts.tokenizer,
        "dtype": spec.dtype,
        "quantization": spec.quantization,
        "attn_implementation": spec.attn_implementation,
        **engine(job.plan, spec),
    }


def engine(plan: Plan, spec: Model) -> dict[str, Any]:
    """What of an executor a model's numbers depend on.

    Nothing where they are those of transformers, up to rounding, by the proof that is made before any program: so local
    cells and those of a server or a float32 engine are the same cells. In half precision other kernels round otherwise
    by enough to write another text; and what was not compared with transformers is not known to be the same.
    """
    same = plan.executor != "vllm" or (spec.dtype == "float32" and plan.vllm.reference)
    return {} if same else {"engine": "vllm"}


def counts(study: Study, method: Method) -> dict[str, int]:
    """How many samples each label of the emotion axis has under a method."""
    emotions = {label: sample_count(method, study.texts, label) for label in study.plan.emotion_labels()}
    return {**emotions, NEUTRAL: neutral_count(method)}


def chunks(count: int) -> list[range]:
    """Sample numbers in chunks of CHUNK."""
    return [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]


def samples(job: Job) -> Cells[SampleChunk]:
    """The fingerprints of the texts of every chunk."""
    if job.study.texts is None:
        return {}
    cells: Cells[SampleChunk] = {}
    for name, method in job.plan.methods.items():
        shared = {"version": VERSIONS["samples"], "model": knobs(job), **_writing(job.plan, name, method)}
        for emotion, count in counts(job.study, method).items():
            for b, chunk in enumerate(chunks(count)):
                shown = [sample_text(method, job.study.texts, emotion, k) for k in chunk]
                systems = [system_text(method, job.study.texts, emotion, k) for k in chunk]
                turns = [turns_of(text, system) for text, system in zip(shown, systems, strict=True)]
                drawn = {"emotion": emotion, "first": chunk.start} if method.generate.sample else {}
                drawn |= dated(job, method.chat, turns)
                key = SampleChunk(job.label, name, emotion, b)
                cells[key] = fingerprint({**shared, "texts": shown, "systems": systems, **drawn})
    return cells


def dated(job: Job, chat: str, conversations: Iterable[Turns]) -> dict[str, Any]:
    """What a model's chat template writes of the clock into conversations, and what it is told besides, if anything.

    All else that decides what a model reads is in its files, which `knobs` cover, and in the texts.
    """
    if chat == "never" or job.facts.template is None:
        return {}
    told = job.plan.chat_arguments
    date_texts = dates(job.facts.template, conversations, job.study.moment, told)
    return {**({"dates": date_texts} if date_texts else {}), **({"chat_arguments": told} if told else {})}


def _dated_prompts(job: Job, chat: str, prompts: Any) -> dict[str, Any]:
    return dated(job, chat, map(turns_of, prompt_set(prompts, job.study.texts).values()))


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


def leaders(wanted: Mapping[K, int]) -> dict[int, K]:
    """Fingerprint -> the first cell of that fingerprint. Cells of one fingerprint hold the same: one is computed."""
    first_cells: dict[int, K] = {}
    for key, number in wanted.items():
        first_cells.setdefault(number, key)
    return first_cells


def activations(job: Job) -> Cells[SampleChunk]:
    """The fingerprints of the pooled residual streams of every chunk."""
    cells: Cells[SampleChunk] = {}
    for key, made_from in job.wanted(samples).items():
        method = job.plan.methods[key.method]
        what = {"version": VERSIONS["activations"], "samples": made_from, "layers": job.layers, **_reading(method)}
        cells[key] = fingerprint(what)
    return cells


def _reading(method: Method) -> dict[str, Any]:
    """How a method's texts are read: behind what, and which positions."""
    return {"pooling": method.pooling.model_dump(), "context": "text" if _alone(method) else "with_prompt"}


def _alone(method: Method) -> bool:
    return method.source == "generation" and method.context == "text"


def embeddings(job: Job) -> Cells[SampleChunk]:
    """The fingerprints of what enters the first block, averaged over every text of a chunk of samples."""
    if job.plan.measure is None or not job.plan.measure.embeddings:
        return {}
    shared = {"version": VERSIONS["embeddings"]}
    return {
        key: fingerprint({**shared, "samples": made_from, "alone": _alone(job.plan.methods[key.method])})
        for key, made_from in job.wanted(samples).items()
    }


def swapped(job: Job) -> Cells[SampleChunk]:
    """The fingerprints of the streams of texts that are read again behind the instructions of other emotions."""
    count = job.plan.measure.swap if job.plan.measure else 0
    sample_fingerprints = job.wanted(samples) if count else {}
    cells: Cells[SampleChunk] = {}
    for key, own in sample_fingerprints.items():
        method = job.plan.methods[key.method]
        if key.emotion == NEUTRAL or not reads_instruction(method):
            continue
        chunk = chunks(counts(job.study, method)[key.emotion])[key.sample_chunk]
        asked = [swaps(job.plan, key.emotion, sample) for sample in chunk]
        behind = {e: sample_fingerprints[key._replace(emotion=e)] for few in asked for e in few}
        what = {"version": VERSIONS["swapped"], "samples": own, "layers": job.layers, **_reading(method)}
        cells[key] = fingerprint({**what, "asked": asked, "behind": behind})
    return cells


def swaps(plan: Plan, emotion: str, sample: int) -> list[str]:
    """The emotions behind whose instructions a text is read again, by the plan's seed.

    Each emotion's instruction of a sample number stands before as many texts as every other's.
    """
    labels, count = sorted(plan.emotion_labels()), plan.measure.swap if plan.measure else 0
    steps = generator("swap", plan.seed, sample).permutation(len(labels) - 1)[:count] + 1
    return [labels[(labels.index(emotion) + int(step)) % len(labels)] for step in steps]


def captured(job: Job, method: str, emotion: str) -> list[int]:
    """The fingerprints of the activations of one emotion under a method, by chunk."""
    read = job.wanted(activations)
    return [number for key, number in read.items() if (key.method, key.emotion) == (method, emotion)]


def vectors(job: Job) -> Cells[Vector]:
    """The fingerprints of all vectors, each at all layers: every emotion's, and every direction's."""
    return {**job.wanted(derived), **job.wanted(directions)}


def written(plan: Plan) -> dict[str, Contrast]:
    """The contrasts of a plan whose texts the model writes, by the name of their direction."""
    contrasts = {name: spec.contrast for name, spec in plan.directions.items()}
    return {
        name: contrast for name, contrast in contrasts.items() if contrast is not None and contrast.generate is not None
    }


def responses(job: Job) -> Cells[ResponseChunk]:
    """The fingerprints of the answers that contrasts are made of."""
    cells: Cells[ResponseChunk] = {}
    for name, contrast in written(job.plan).items():
        how = contrast.generate
        assert how is not None
        shared = {"version": VERSIONS["responses"], "model": knobs(job)}
        shared["generate"] = how.model_dump(exclude={"questions", "samples"})
        for side in SIDES:
            asked = questions(contrast, side)
            for number, chunk in enumerate(chunks(len(asked))):
                some = [asked[k] for k in chunk]
                what = {**shared, "asked": [(question.system, question.text) for question in some]}
                what |= dated(job, "always", [turns_of(question.text, question.system) for question in some])
                if how.sample:
                    what["drawn"] = {"seed": job.plan.seed, "direction": name, "side": side, "first": chunk.start}
                cells[ResponseChunk(job.label, name, side, number)] = fingerprint(what)
    return cells


def filtered_by(job: Job, name: str) -> tuple[Filter, Judge, judges.Known, str]:
    """The filter of a contrast, its judge, what is known of that, and the class whose score counts. Raises
    ModelError."""
    by = job.plan.directions[name].contrast.filter  # type: ignore[union-attr]
    assert by is not None
    spec = job.plan.all_judges()[by.judge]
    about = judges.known(spec, job.study)
    return by, spec, about, counts_for(name, by, spec, about.classes, bool(about.asks)) or ""


def responses_judged(job: Job) -> Cells[ResponseChunk]:
    """The fingerprints of what the judges of filters say of those answers, and of which are kept."""
    cells: Cells[ResponseChunk] = {}
    answers = job.wanted(responses)
    for name, contrast in written(job.plan).items():
        if contrast.filter is None:
            continue
        by, spec, about, target = filtered_by(job, name)
        what = {"version": VERSIONS["responses_judged"], "judge": about.identity, "over": spec.over, "class": target}
        what["filter"] = by.model_dump(include={"above", "below", "coherence"})
        cells |= {key: fingerprint({**what, "responses": fp}) for key, fp in answers.items() if key.direction == name}
    return cells


def directions(job: Job) -> Cells[Vector]:
    """The fingerprints of the plan's directions, each under its source and its name."""
    shared = {"version": VERSIONS["directions"], "model": knobs(job)}
    return {
        Vector(job.label, spec.source, name): fingerprint({**shared, "direction": _named(job, name)})
        for name, spec in job.plan.directions.items()
    }


def derived(job: Job) -> Cells[Vector]:
    """The fingerprints of every emotion's vectors, derived of its samples."""
    cells: Cells[Vector] = {}
    for name, method in job.plan.methods.items():
        groups = {emotion: captured(job, name, emotion) for emotion in counts(job.study, method)}
        knob: dict[str, Any] = {
            "baseline": method.baseline,
            "unit_norm": method.unit_norm,
            "version": VERSIONS["vectors"],
        }
        knob["variance"] = method.project_out.variance if method.project_out else None
        knob["estimator"] = {"kind": method.estimator.kind, **method.estimator.parameters()}
        if method.labels == "shuffled":
            knob["shuffled"] = {"seed": job.plan.seed, "method": name, "draw": max(job.draw, 1)}
        uses_neutral = method.baseline == "neutral_mean" or method.project_out
        shared: dict[str, Any] = {"neutral": groups[NEUTRAL] if uses_neutral else [], **knob}
        if rests_on_all(method):
            shared["emotions"] = {e: groups[e] for e in job.plan.emotion_labels()}
        for emotion in job.plan.emotion_labels():
            cells[Vector(job.label, name, emotion)] = fingerprint({**shared, "samples": groups[emotion]})
    return cells


def rests_on_all(method: Method) -> bool:
    """Whether a vector rests on the samples of every emotion, not of its own alone."""
    return method.baseline in ("grand_mean", "rest") or method.labels == "shuffled"


def averaged(plan: Plan, name: str, emotion: str) -> list[str]:
    """The labels whose samples a vector rests on: its emotion's, and those of its baseline and its denoising."""
    method = plan.methods[name]
    labels = list(plan.emotion_labels()) if rests_on_all(method) else [emotion]
    return labels + [NEUTRAL] * bool(method.baseline == "neutral_mean" or method.project_out)


def steered_methods(plan: Plan, entry: Steer) -> list[str]:
    """The labels of the axis `method` under which vectors of an entry steer."""
    return list(dict.fromkeys(method for method, _ in steering_vectors(plan, entry)))


def steered_emotions(plan: Plan, entry: Steer) -> list[str]:
    """The labels under which vectors steer: emotions, then formulas, then directions."""
    return list(dict.fromkeys(label for _, label in steering_vectors(plan, entry)))


def controls(entry: Steer) -> list[str]:
    """The labels of the `control` axis: the vector itself is `none`."""
    return ["none", *(control for control in entry.controls if control not in ("zero", "prompted"))]


def draw_of(control: str) -> tuple[str, int]:
    """What a label of the `control` axis is a draw of, and which: `shuffled-3` is the third of `shuffled`."""
    kind, _, number = control.partition("-")
    return kind, int(number or 1)


def _continuing(job: Job, continuing: Continuing, version: str = "steering") -> dict[str, Any]:
    """What decides a continuation, besides its edits."""
    drawn = {"seeds": sorted(continuing.seeds), "seed": job.plan.seed} if continuing.generate.sample else {}
    return {
        "version": VERSIONS[version],
        "model": knobs(job),
        "prompts": prompt_set(continuing.prompts, job.study.texts),
        "chat": continuing.chat,
        "generate": continuing.generate.model_dump(),
        **drawn,
        **_dated_prompts(job, continuing.chat, continuing.prompts),
    }


def unsteered(job: Job) -> Cells[Unsteered]:
    """The fingerprints of the continuations without any edit: the zero control."""
    return {
        Unsteered(job.label, entry.label): fingerprint(
            {**_continuing(job, entry), **_projected(job, entry, steered_methods(job.plan, entry))}
        )
        for entry in job.plan.steer
        if "zero" in entry.controls
    }


def prompted(job: Job) -> Cells[Prompted]:
    """The fingerprints of the continuations of prompts that ask for an emotion in words."""
    cells: Cells[Prompted] = {}
    for entry in job.plan.steer:
        if "prompted" not in entry.controls:
            continue
        going_on = _continuing(job, entry)
        for emotion in steered_emotions(job.plan, entry):
            for asked in sides(entry):
                shown = asked_prompts(entry, job.study.texts, emotion, asked)
                what = {**going_on, "prompts": shown, **_dated_prompts(job, entry.chat, shown)}
                cells[Prompted(job.label, entry.label, emotion, asked)] = fingerprint(what)
    return cells


def sides(entry: Steer) -> list[str]:
    """Which ways an entry steers: `towards` its emotions, `away` from them."""
    signs = {
        "towards": any(strength >= 0 for strength in entry.labels()),
        "away": any(strength < 0 for strength in entry.labels()),
    }
    return [side for side, there in signs.items() if there]


def _projected(job: Job, continuing: Continuing, methods: list[str]) -> dict[str, Any]:
    """The vectors that an entry's streams are projected on: every emotion's, of the methods named."""
    if not continuing.project:
        return {"projected": {}}
    fingerprints = job.wanted(vectors)
    return {"projected": {m: {key.emotion: fp for key, fp in fingerprints.items() if key.method == m} for m in methods}}


def calibration(job: Job) -> Cells[Condition]:
    """The keys of `steering`, of conditions whose strength is to be found -> fingerprint of the search."""
    return job.wanted(_grid)[1]


def capability(job: Job) -> Cells[Condition]:
    """The keys of `steering` -> fingerprint of what their edits do to the capability passages and questions."""
    return job.wanted(_grid)[2] if weighs(job.plan) else {}


def capability_unsteered(job: Job) -> Cells[OfModel]:
    """The fingerprint of what a model says of the capability passages and questions without any edit."""
    there = weighs(job.plan) and (job.plan.steer or job.plan.edits)
    return {OfModel(job.label): fingerprint(_plain_texts(job))} if there else {}


def capability_edited(job: Job) -> Cells[EditSearch]:
    """The fingerprints of what the conditions of `edits:` do to capability passages and questions, at each strength."""
    if not weighs(job.plan) or not job.plan.edits:
        return {}
    shared, edits_by_strength = _plain_texts(job), job.wanted(_strengths)
    return {
        EditSearch(job.label, label, strength): fingerprint({**shared, "edits": edits})
        for (label, strength), edits in edits_by_strength.items()
        if label in job.plan.edits
    }


def weighs(plan: Plan) -> bool:
    """Whether a plan asks what its edits cost the model."""
    return plan.measure is not None and plan.measure.capability


def _plain_texts(job: Job) -> dict[str, Any]:
    """What decides how a model reads the capability passages and questions, besides edits."""
    return {"version": VERSIONS["capability"], "model": knobs(job), "asked": list(shipped().scored().items())}


def calibrated_by(entry: Steer, key: Condition) -> Condition:
    """The cell of `calibration` whose strength a cell of `steering` has: of a random control mostly its vector's."""
    own = isinstance(entry.strengths, Calibrated) and entry.strengths.random == "own"
    return key if own else key._replace(control="none")


def steering(job: Job) -> Cells[Condition]:
    """The fingerprints of the continuations of every condition."""
    return job.wanted(_grid)[0]


def _searching(job: Job, continuing: Continuing, spec: Calibrated) -> dict[str, Any]:
    """What decides the strength that is found, besides the edit and the target."""
    prompts = continuing.prompts if spec.prompts is None else spec.prompts
    return {
        "version": VERSIONS["calibration"],
        "model": knobs(job),
        "prompts": prompt_set(prompts, job.study.texts),
        "chat": continuing.chat,
        "tokens": min(spec.tokens, continuing.generate.max_new_tokens),
        "measure": spec.measure,
        "tolerance": spec.tolerance,
        "most": spec.max_strength,
        **_dated_prompts(job, continuing.chat, prompts),
    }


Grid = tuple[Cells[Condition], Cells[Condition], Cells[Condition]]
"""Cells of `steering`, those of `calibration` that they rest on, those of `capability` beside them."""


def _grid(job: Job) -> Grid:
    grid: Grid = {}, {}, {}
    for entry in job.plan.steer:
        going_on = _continuing(job, entry)
        for layer_set in job.layer_sets(entry):
            for method in steered_methods(job.plan, entry):
                for known, more in zip(grid, _slice(job, entry, layer_set, method, going_on), strict=True):
                    known.update(more)
    return grid


def _slice(job: Job, entry: Steer, layer_set: str, method: str, going_on: dict[str, Any]) -> Grid:
    """Those of one entry, layer set and method, whose edits differ in vector, strength and control alone."""
    grid: Grid = {}, {}, {}
    cells, searches, weighed = grid
    spec = entry.strengths if isinstance(entry.strengths, Calibrated) else None
    edit = _editing(job, entry, job.layer_sets(entry)[layer_set], method)
    made_with = fingerprint({**going_on, **edit, **_projected(job, entry, [method]), "project": entry.project})  # once
    weighed_with = fingerprint({**_plain_texts(job), **edit})
    sought_with = fingerprint({**edit, **_searching(job, entry, spec)}) if spec else 0
    strengths: list[Any] = entry.strengths if isinstance(entry.strengths, list) else entry.labels()
    for emotion in (label for made_by, label in steering_vectors(job.plan, entry) if made_by == method):
        vector = _steering_vector(job, entry, method, emotion)
        drawn: dict[str, dict[str, Any]] = {}
        for control in controls(entry):
            kind, number = draw_of(control)
            if kind == "random":
                drawn[control] = {"seed": job.plan.seed, "method": method, "emotion": emotion, "draw": "rotation"}
            elif kind == "shuffled":
                drawn[control] = {"shuffled": _steering_vector(job.shuffled(number), entry, method, emotion)}
        for strength in strengths:
            for control in controls(entry):
                key = Condition(job.label, entry.label, layer_set, method, emotion, float(strength), control)
                if job.study.only is not None and key not in job.study.only:
                    continue
                own = {"vector": vector, "strength": strength}
                if spec:
                    by = calibrated_by(entry, key)
                    of = {**own, "control": by.control, **drawn.get(by.control, {})}
                    searches[by] = fingerprint({"sought_with": sought_with, **of})
                    own["strength"] = {"calibration": searches[by]}
                own |= {"control": control, **drawn.get(control, {})}
                cells[key] = fingerprint({"made_with": made_with, **own})
                weighed[key] = fingerprint({"weighed_with": weighed_with, **own})
    return grid


def _editing(job: Job, entry: Steer, layers: Sequence[int], method: str) -> dict[str, Any]:
    """What the edits of an entry do at a layer set under a method, besides the entry's own vector and strength."""
    edit = {**_acting(entry), "layers": layers}
    if entry.vectors.layer != "same":
        edit["vector_layer"] = job.resolve(entry.vectors.layer)
    if entry.scale == "reference_norm" or entry.op in REFERENCED:
        edit["reference"] = captured(job, method, NEUTRAL)
    if entry.when is not None and entry.when.direction is not None:
        edit["gate"] = _vector(job, method, entry.when.direction)
    edit["also"] = [_further(job, further, method) for further in entry.also]
    return edit


def _vector(job: Job, method: str, emotion: str) -> int:
    return job.wanted(vectors)[Vector(job.label, method, emotion)]


def _steering_vector(job: Job, entry: Steer, method: str, label: str) -> Any:
    """The fingerprint of the vector that steers under a label; of a formula, what stands for its names."""
    text = entry.vectors.formulas.get(label)
    return _vector(job, method, label) if text is None else _formula(job, text, method)


def _formula(job: Job, text: str, method: str) -> dict[str, Any]:
    """What a formula that steers is made from."""

    def leaf(dotted: tuple[str, ...]) -> dict[str, Any]:
        kind, *where = stands_for(job.plan, dotted, method)
        return _leaf(job, kind, where, job.wanted(vectors))

    return {"formula": formulas.replaced(formulas.parse(text), leaf)}


def _leaf(job: Job, kind: str, where: Sequence[str], fingerprints: Cells[Vector]) -> dict[str, Any]:
    """What a name in a formula rests on, of the vectors made: a direction, one emotion, or all that are rated."""
    ratings = {"scale": where[-1], "ratings": job.plan.scales()} if kind == "axis" else {}
    rest = vectors_for(job.plan, kind, *where)
    return {"vectors": {e: fingerprints[Vector(job.label, by, e)] for by, e in rest}, **ratings}


def _acting(edit: Editing) -> dict[str, Any]:
    """What an edit does, besides its vector, its strength and its layers: every field that all edits have."""
    own = edit.model_dump(include=set(Editing.model_fields) - {"layers", "positions"}, exclude={"when": {"direction"}})
    return {**own, "scale": None if edit.op in UNSCALED else edit.scale, "positions": _dumped(edit.positions)}


def _further(job: Job, further: Also, method: str) -> dict[str, Any]:
    """An edit of `also` as resolved data, under a method."""
    text = formula_of(job.plan, further)
    edit = {
        **_acting(further),
        "layers": job.resolve(further.layers),
        "order": further.order,
        "strength": further.strength,
        "vector": _vector(job, method, further.direction) if text is None else _formula(job, text, method),
    }
    if further.op in REFERENCED or (further.scale == "reference_norm" and further.op not in UNSCALED):
        edit["reference"] = captured(job, method, NEUTRAL)
    if further.when is not None and further.when.direction is not None:
        edit["gate"] = _vector(job, method, further.when.direction)
    return edit


def _dumped(positions: Any) -> Any:
    """Positions as JSON data."""
    return positions.model_dump(exclude_none=True) if isinstance(positions, Where) else positions


def judged(cells: Mapping[K, int], name: str, identity: Any, over: str, asked: Callable[[K], Any]) -> Cells[Any]:
    """The keys with a judge's label, and the fingerprint of what it says of those cells.

    identity : what its scores depend on; asked : the classes that it is asked about in a cell
    """
    shared = {"version": VERSIONS["judged"], "judge": identity, "over": over}
    fingerprints: Cells[Any] = {}
    for key, made_from in cells.items():
        fingerprints[JUDGED[type(key)](*key, name)] = fingerprint({**shared, "asked": asked(key), "cell": made_from})
    return fingerprints


JUDGED: dict[type, Any] = {
    Condition: Judged,
    Unsteered: JudgedUnsteered,
    Prompted: JudgedPrompted,
    Edited: JudgedEdited,
}
"""Key of a cell of continuations -> that of what a judge says of it."""


def outcomes(cells: Cells[K]) -> Cells[K]:
    """The same keys, with the fingerprint of what is measured of those continuations under the unsteered model."""
    return {key: fingerprint({"version": VERSIONS["outcomes"], "cell": made_from}) for key, made_from in cells.items()}


def lens(job: Job) -> Cells[Vector]:
    """The fingerprints of the tokens that each vector promotes."""
    top = job.plan.measure.lens if job.plan.measure else 0
    shared = {"version": VERSIONS["lens"], "top": top, "model": knobs(job)}
    return {key: fingerprint({**shared, "vector": fp}) for key, fp in job.wanted(vectors).items()} if top else {}


def anisotropy(job: Job) -> Cells[Sentences]:
    """The fingerprints of the neutral sentences' last-token streams, with BOS and without."""
    if job.study.texts is None or job.plan.measure is None or not job.plan.measure.anisotropy:
        return {}
    if not job.study.texts.neutral_sentences:
        return {}
    shared = {"version": VERSIONS["anisotropy"], "model": knobs(job)}
    shared["sentences"] = job.study.texts.neutral_sentences
    return {Sentences(job.label, bos): fingerprint({**shared, "bos": bos}) for bos in ("with", "without")}


def _edits(job: Job, label: str, strength: Any) -> list[dict[str, Any]]:
    """A condition of `edits:` as resolved data, at one of its strengths."""
    return [
        {
            **_acting(edit),
            "strength": float(edit.strength) if isinstance(edit.strength, float | int) else strength,
            "layers": job.resolve(edit.layers),
            "vector_layer": edit.vector_layer if edit.vector_layer == "same" else job.resolve(edit.vector_layer),
            "direction": _named(job, edit.direction),
            "reference": _named(job, edit.reference) if edit.reference else None,
            "gate": _named(job, edit.when.direction) if edit.when and edit.when.direction else None,
        }
        for edit in conditions(job.plan)[label]
    ]


def calibration_edits(job: Job) -> Cells[EditSearch]:
    """The fingerprints of the searches for the strengths of conditions that are to be found."""
    cells: Cells[EditSearch] = {}
    for label, edits in job.plan.edits.items():
        if isinstance(spec := swept(edits), Calibrated):
            shared = {"edits": _edits(job, label, "sought"), **_searching(job, job.continuing, spec)}
            for target in spec.targets:
                cells[EditSearch(job.label, label, target)] = fingerprint({**shared, "target": target})
    return cells


def _strengths(job: Job) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """The conditions at their strengths, each with its edits; a strength that is found by the search for it."""
    searches, edits_by_strength = job.wanted(calibration_edits), {}
    for label, edits in conditions(job.plan).items():
        for strength in strengths_of(edits):
            search = EditSearch(job.label, label, strength)
            at = {"calibration": searches[search]} if search in searches else strength
            edits_by_strength[label, strength] = _edits(job, label, at)
    return edits_by_strength


def _named(job: Job, name: str) -> dict[str, Any]:
    """What a direction of the plan is made from; of a formula, what stands for its names."""
    made_from = _made_from(job, name)
    if job.draw and job.plan.directions[name].contrast is not None:
        made_from["shuffled"] = {"seed": job.plan.seed, "direction": name, "draw": job.draw}
    return made_from


def _made_from(job: Job, name: str) -> dict[str, Any]:
    """The same, with the sides of a contrast as they are given."""
    spec = job.plan.directions[name]
    if spec.contrast is not None and spec.contrast.generate is not None:
        answers = job.wanted(responses if spec.contrast.filter is None else responses_judged)
        own = [fp for key, fp in answers.items() if key.direction == name]
        least = spec.contrast.filter.min_answers if spec.contrast.filter else 1
        return {"responses": own, "pooling": spec.contrast.pooling.model_dump(), "least": least}
    if spec.formula is None:
        drawn = {"name": name, "layers": "one draw"} if spec.random is not None else {}  # the draw depends on it
        groups = spec.contrast or spec.mean
        texts = [text for side in ("positive", "negative", "texts") for text in getattr(groups, side, ())]
        date = dated(job, groups.chat, map(turns_of, texts)) if groups else {}
        return {**_direction(job, spec), **drawn, **date}

    def leaf(dotted: tuple[str, ...]) -> dict[str, Any]:
        kind, *where = stands_for(job.plan, dotted)
        if kind == "direction":  # by what it is made of: the cells of all directions are not known yet
            return {"direction": _named(job, *where)}
        return _leaf(job, kind, where, job.wanted(derived))

    return {"formula": formulas.replaced(formulas.parse(spec.formula), leaf)}


def _direction(job: Job, spec: Direction) -> dict[str, Any]:
    """What a direction is made from; of one from a store, the vector itself, wherever the store lies."""
    if spec.store is None:
        return spec.model_dump(exclude={"formula"})
    vector = job.study.borrowed(job.facts, spec.store)
    return {"vector": None if vector is None else hashlib.sha256(vector.values.tobytes()).hexdigest()}


def reads(job: Job) -> Cells[Read]:
    """The fingerprints of the streams that each read records under each condition."""
    if not job.plan.reads:
        return {}
    plan = job.plan
    cells: Cells[Read] = {}
    shared = {"version": VERSIONS["reads"], "model": knobs(job), "chat": plan.chat}
    shown = {
        (product, chunk): fingerprint({"prompts": prompts, **_dated_prompts(job, plan.chat, prompts)})
        for product in dict.fromkeys(map(job.kept_in, plan.reads))
        for chunk, prompts in job.prompt_chunks(product).items()
    }
    for (edit, strength), edits in job.wanted(_strengths).items():
        for name, read in plan.reads.items():
            what = {**read.model_dump(exclude={"positions"}), "layers": job.resolve(read.layers)}
            what["positions"] = _dumped(read.positions)
            made_with = fingerprint({**shared, "read": what, "edits": edits})
            for (product, chunk), prompts in shown.items():
                if product == job.kept_in(name):
                    key = Read(job.label, name, edit, strength, chunk)
                    cells[key] = fingerprint({"made_with": made_with, "prompts": prompts})
    return cells


def edited(job: Job) -> Cells[Edited]:
    """The fingerprints of the continuations under each condition of `edits:`."""
    if job.plan.generate is None:
        return {}
    methods = list(dict.fromkeys(key.method for key in job.wanted(vectors)))
    projected = {**_projected(job, job.continuing, methods), "project": job.continuing.project}
    going_on = {
        chunk: fingerprint({**_continuing(job, job.some(prompts), "edited"), **projected})
        for chunk, prompts in job.prompt_chunks("edited").items()
    }
    return {
        Edited(job.label, edit, strength, chunk): fingerprint({"going_on": made_with, "edits": edits})
        for (edit, strength), edits in job.wanted(_strengths).items()
        for chunk, made_with in going_on.items()
    }


def pooled_reads(job: Job) -> Cells[Read]:
    """Those of `reads` that keep one vector a prompt."""
    return {key: fp for key, fp in job.wanted(reads).items() if job.kept_in(key.read) == "reads"}


def whole_reads(job: Job) -> Cells[Read]:
    """Those of `reads` that keep the stream of every position."""
    return {key: fp for key, fp in job.wanted(reads).items() if job.kept_in(key.read) == "streams"}


def steered_outcomes(job: Job) -> Cells[Condition]:
    """The fingerprints of what is measured of the steered continuations."""
    return _measured(job, job.wanted(steering))


def unsteered_outcomes(job: Job) -> Cells[Unsteered]:
    """The fingerprints of what is measured of the unsteered continuations."""
    return _measured(job, job.wanted(unsteered))


def prompted_outcomes(job: Job) -> Cells[Prompted]:
    """The fingerprints of what is measured of the continuations that were asked for in words."""
    return _measured(job, job.wanted(prompted))


def prompted_judged(job: Job) -> Cells[JudgedPrompted]:
    """The fingerprints of what the plan's judges say of the continuations that were asked for in words."""
    return _judged(job, "judged_prompted")


def edited_outcomes(job: Job) -> Cells[Edited]:
    """The fingerprints of what is measured of the continuations under `edits`."""
    return _measured(job, job.wanted(edited))


def _measured(job: Job, cells: Cells[K]) -> Cells[K]:
    return outcomes(cells) if job.plan.measure is not None and job.plan.measure.perplexity else {}


def steered_judged(job: Job) -> Cells[Judged]:
    """The fingerprints of what the plan's judges say of the steered continuations."""
    return _judged(job, "judged")


def unsteered_judged(job: Job) -> Cells[JudgedUnsteered]:
    """The fingerprints of what the plan's judges say of the unsteered continuations."""
    return _judged(job, "judged_unsteered")


def edited_judged(job: Job) -> Cells[JudgedEdited]:
    """The fingerprints of what the plan's judges say of the continuations under `edits`."""
    return _judged(job, "judged_edited")


def _judged(job: Job, path: str) -> Cells[Any]:
    return {key: fp for name in job.plan.all_judges() for key, fp in judged_by(job, path, name).items()}


_READ_BY_JUDGES: dict[str, Callable[[Job], Cells[Any]]] = {
    "judged": steering,
    "judged_unsteered": unsteered,
    "judged_prompted": prompted,
    "judged_edited": edited,
}


def judged_by(job: Job, path: str, name: str) -> Cells[Any]:
    """What one judge of the plan says of the cells that a group of judgements is about. Raises ModelError."""
    of: Callable[[Job], Cells[Any]] = _READ_BY_JUDGES[path]
    text_fingerprints, spec = job.wanted(of), job.plan.all_judges()[name]
    if not text_fingerprints:
        return {}
    about = judges.known(spec, job.study)
    asked = {key: asked_about(job, spec, about, key) for key in text_fingerprints}
    some = {key: fp for key, fp in text_fingerprints.items() if asked[key] or not about.asks}
    return judged(some, name, about.identity, spec.over, lambda key: asked[key])


def asked_about(job: Job, spec: Judge, about: judges.Known, key: Any) -> tuple[str, ...]:
    """The classes that a judge is asked about in a cell; () where its question names none.

    Unsteered continuations are compared with all that the entry steers to, so it is asked about all of those; of the
    conditions of `edits` a class stands for their labels.
    """
    if not about.asks:
        return ()
    classes = judges.concepts(spec, job.study)
    by_hand = hasattr(key, "edit")
    own = key.edit if by_hand and key.edit != "none" else getattr(key, "emotion", None)
    if own is not None and about.asks == "own":
        return classes.get(own, ())
    known = job.plan.edits if by_hand else steered_emotions(job.plan, job.steer_entries[key.op])
    return tuple(dict.fromkeys(name for label in known for name in classes.get(label, ())))
