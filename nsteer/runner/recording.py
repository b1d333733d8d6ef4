"""Stages `reads` and `edited`: the general form of a plan, streams recorded and text generated under edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nsteer.errors import EditError, ExecutionError, InputError, ModelError
from nsteer.models.facts import Facts
from nsteer.plan import formulas, positions
from nsteer.plan.check import Study, derived_for, directions_of, rated_emotions, stands_for
from nsteer.plan.check.borrowing import misfit
from nsteer.plan.layers import resolve
from nsteer.plan.prompts import Encoded, encode, weights
from nsteer.plan.schema import Direction
from nsteer.program.form import Form, ReadSite, Row, RowEdit
from nsteer.program.ops import ACTING_AT_ZERO
from nsteer.program.randomness import uniforms, unit_vector
from nsteer.runner.deriving import named
from nsteer.runner.editing import conditional, row_edit, scale
from nsteer.runner.failing import kind_of
from nsteer.runner.session import Clock, Session, check_receipt
from nsteer.runner.sources import there, vectors_of
from nsteer.runner.steering import Derived, check_reached, encode_all, with_text
from nsteer.runner.writing import decoding
from nsteer.science.directions import combine
from nsteer.stages import arrays, cells, forms
from nsteer.store import slug


def record(session: Session) -> None:
    """Fills the missing cells of `reads`, `streams` and `edited` for the model at hand."""
    facts, plan = session.facts, session.study.plan
    assert facts is not None
    wanted_reads, wanted_texts = session.wanted(cells.reads), session.wanted(cells.edited)
    todo_reads = missing_reads(session, wanted_reads)
    texts_of = {(facts.label, *key): fp for key, fp in wanted_texts.items()}
    todo_texts = session.missing("edited", "edited", texts_of) if texts_of else {}
    if not (todo_reads or todo_texts):
        return
    where = [read.positions for read in plan.reads.values()]
    where += [edit.positions for edits in plan.edits.values() for edit in edits]
    prompts = encode_all(session, plan.prompts, plan.chat, where)
    directions = Directions(session)
    if todo_reads:
        longest = max(len(prompt.tokens) for prompt in prompts.values())
        session.prepare(arrays.reads_groups(session.study, facts, longest))
    for product in ("reads", "streams"):
        path = f"{product}/{slug(facts.label)}"
        mine = {key: fp for key, fp in todo_reads.items() if product_of(session, key[1]) == product}
        mine = with_vectors(session, product, path, mine)
        for edit in dict.fromkeys(key[2] for key in mine):
            here = {key: fp for key, fp in mine.items() if key[2] == edit}
            for wave in session.waves(product, path, here):
                record_reads(session, product, edit, prompts, directions, {key: here[key] for key in wave})
    todo_texts = with_vectors(session, "edited", "edited", todo_texts)
    for wave in session.waves("edited", "edited", todo_texts, lambda key: len(prompts)):
        for key in wave:
            with session.guarded("edited", "edited", key, todo_texts[key]):
                generate(session, key, prompts, directions, todo_texts[key])


def product_of(session: Session, read: str) -> str:
    """Where a read is kept: `reads` hold one vector a prompt, `streams` one a position."""
    return "streams" if session.study.plan.reads[read].pooling is None else "reads"


def with_vectors(session: Session, stage: str, path: str, todo: Mapping[tuple, int]) -> dict[tuple, int]:
    """The cells whose edits' directions rest on vectors that are all there; the others wait."""
    plan = session.study.plan
    needed = {
        label: [one for edit in edits for name in directions_of(edit) for one in derived_for(plan, name)]
        for label, edits in plan.edits.items()
    }
    if not any(needed.values()):
        return dict(todo)
    return Derived(session).ready(stage, path, todo, lambda key: needed.get(key[-1], []))


def missing_reads(session: Session, wanted: Mapping[tuple, int]) -> dict[tuple, int]:
    """Cells of `reads` and `streams` still to do, by (model, read, edit)."""
    assert session.facts is not None
    todo: dict[tuple, int] = {}
    for product in ("reads", "streams"):
        mine = {(session.facts.label, *k): v for k, v in wanted.items() if product_of(session, k[0]) == product}
        if mine:
            todo |= session.missing(product, f"{product}/{slug(session.facts.label)}", mine)
    return todo


class Directions:
    """The plan's directions for the model at hand, worked out when first used: (name, layer) -> vector [d_model]."""

    def __init__(self, session: Session):
        self.session = session
        self.found: dict[str, Any] = {}

    def get(self, name: str, layer: int) -> np.ndarray:
        spec = self.session.study.plan.directions[name]
        facts = self.session.facts
        assert facts is not None
        if spec.random is not None:
            return unit_vector(facts.d_model, spec.random, name)  # of all layers: independent draws cancel
        vector = self.everywhere(name)[layer]
        if not np.isfinite(vector).all():
            raise ExecutionError(f"the direction {name!r} is a hole at layer {layer} of {facts.label}")
        return vector

    def everywhere(self, name: str) -> np.ndarray:
        """A direction at all layers: [layer, d_model]."""
        study, facts = self.session.study, self.session.facts
        spec = study.plan.directions[name]
        assert facts is not None
        if spec.random is not None:
            return np.stack([self.get(name, layer) for layer in range(facts.n_layers)])
        if name not in self.found:
            if spec.formula is not None:
                self.found[name] = combine(formulas.replaced(formulas.parse(spec.formula), self.leaf))
            else:
                self.found[name] = stored(study, facts, spec) if spec.store else from_texts(self.session, spec)
        return self.found[name]

    def leaf(self, parts: tuple[str, ...]) -> np.ndarray:
        """What stands for a name in a formula, at all layers: [layer, d_model]."""
        plan, facts = self.session.study.plan, self.session.facts
        assert facts is not None
        kind, *where = stands_for(plan, parts)
        if kind == "direction":
            return self.everywhere(where[0])
        rest = rated_emotions(plan, kind, where[1])
        made = there(self.session, where[0], vectors_of(self.session, where[0]), rest)
        return named(self.session.study, kind, where[1], made)


def from_texts(session: Session, spec: Direction) -> np.ndarray:
    """mean(positive) - mean(negative) of pooled streams, or the mean of one group, at every layer: [layer, d_model]."""
    facts, groups = session.facts, spec.contrast or spec.mean
    assert facts is not None and groups is not None
    sides = ("positive", "negative") if spec.contrast else ("texts",)
    rows = []
    for side in sides:
        for i, text in enumerate(getattr(groups, side)):
            prompt = encode(session.executor.tokenizer, text, groups.chat, moment=session.study.moment)
            rows.append(Row((side, i), prompt.tokens, {"text": weights(groups.pooling, prompt, len(prompt.tokens))}))
    form = Form(reads=tuple(ReadSite(layer) for layer in range(facts.n_layers)))
    results = session.execute("directions", form, rows)
    session.stop.check()
    for error in results.failed.values():
        raise error
    found = results.found
    means = [np.mean([out["pooled"] for key, out in found.items() if key[0] == side], 0) for side in sides]
    return means[0] - means[1] if spec.contrast else means[0]


def stored(study: Study, facts: Facts, spec: Direction) -> np.ndarray:
    """A vector of this model from a store: [layer, d_model], NaN at layers that it lacks.

    Raises ModelError when the store holds none, or one of another width.
    """
    assert spec.store is not None
    found = study.borrowed(facts, spec.store)
    why = "no finished one" if found is None else misfit(found, facts)
    if why:
        what = f"{spec.store.method} / {spec.store.emotion}"
        raise ModelError(f"the vector {what} of {facts.label} in the store {spec.store.path!r}: {why}")
    return found.reindex({"layer": range(facts.n_layers)}).values


def row_edits(session: Session, flat: forms.Flat, prompt: Encoded, found: Directions) -> tuple[RowEdit, ...]:
    """A prompt's part in every edit of a condition."""
    assert session.facts is not None
    generate = session.study.plan.generate
    made, new = [], generate.max_new_tokens if generate else 0
    for layer, edit, _ in flat:
        source = layer if edit.vector_layer == "same" else resolve(edit.vector_layer, session.facts.n_layers)[0]
        vector = found.get(edit.direction, source)
        length = float(np.linalg.norm(vector))
        scaled = scale(edit, vector / max(length, 1e-12), length, edit.strength, None)
        reference = float(found.get(edit.reference, layer) @ scaled[0]) if edit.reference else 0.0
        gate = edit.when.direction if edit.when is not None and edit.when.direction is not None else edit.direction
        one = row_edit(edit, prompt, *scaled, reference)
        made.append(conditional(session, edit, prompt, one, found.get(gate, source), new))
    return tuple(made)


def record_reads(
    session: Session,
    product: str,
    edit: str,
    prompts: Mapping[str, Encoded],
    found: Directions,
    todo: Mapping[tuple, int],
) -> None:
    """All missing reads of one product under one condition, in one forward a prompt."""
    facts, plan = session.facts, session.study.plan
    assert facts is not None
    path = f"{product}/{slug(facts.label)}"
    flat = forms.flatten(plan.edits.get(edit, []), facts.n_layers)
    names = [key[1] for key in todo]
    form = forms.record(session.study, facts, names, flat)
    rows: list[Row] = []
    for label, prompt in prompts.items():
        total = len(prompt.tokens)
        pools = {}
        for place, name in enumerate(names):
            if (pooling := plan.reads[name].pooling) is not None:
                pools[f"read_{place}"] = weights(pooling, prompt, total)
        try:
            rows.append(Row(label, prompt.tokens, pools, row_edits(session, flat, prompt, found)))
        except (ModelError, ExecutionError, InputError) as error:  # a direction: all of the condition's reads need it
            for key, fingerprint in todo.items():
                session.fail(product, path, key, fingerprint, str(error), kind_of(error))
            return
    clock = Clock()
    results = session.execute(product, form, rows)
    share = clock.share(len(todo))
    for key, fingerprint in todo.items():
        if not session.came_back(product, path, key, fingerprint, prompts, results):
            continue
        name = key[1]
        read = plan.reads[name]
        layers = resolve(read.layers, facts.n_layers)
        if product == "reads":
            kept = [(site.layer, site.weights) for site in form.reads if site.what == "pooled"]
            places = [kept.index((layer, f"read_{names.index(name)}")) for layer in layers]
            data = pooled_data(results.found, list(prompts), layers, places)
        else:
            kept_whole = [(site.layer, site.site) for site in form.reads if site.what == "tokens"]
            places = [kept_whole.index((layer, read.site)) for layer in layers]
            masks = {label: prompt.mask(read.positions) for label, prompt in prompts.items()}
            data = stream_data(results.found, masks, layers, places)
        if not receipts_fine(session, product, path, key, fingerprint, results.found, flat):
            continue
        commit_receipts(session, f"read_receipts/{slug(facts.label)}", key, results.found, flat, fingerprint)
        session.commit(product, path, key, data, fingerprint, share)
        session.finished(product, key)


def pooled_data(results: Mapping, prompts: list[str], layers: Sequence[int], places: list[int]) -> Any:
    values = np.stack([results[label]["pooled"][places] for label in prompts])
    dims = {"prompt": prompts, "layer": layers, "d_model": range(values.shape[-1])}
    return arrays.dataset(dims, {"stream": (tuple(dims), values)})


def stream_data(results: Mapping, kept: Mapping[str, np.ndarray], layers: Sequence[int], places: list[int]) -> Any:
    """Streams over (prompt, position, layer, d_model); NaN beyond a prompt's end, and where not `kept` [position]."""
    prompts = list(kept)
    longest = max(results[label]["streams"].shape[1] for label in prompts)
    width = results[prompts[0]]["streams"].shape[-1]
    values = np.full((len(prompts), longest, len(layers), width), np.nan, np.float32)
    for i, label in enumerate(prompts):
        stream = results[label]["streams"][places]
        values[i, : stream.shape[1]] = np.where(kept[label][:, None, None], stream.swapaxes(0, 1), np.nan)
    dims = {"prompt": prompts, "position": range(longest), "layer": layers, "d_model": range(width)}
    return arrays.dataset(dims, {"stream": (tuple(dims), values)})


def generate(session: Session, key: tuple, prompts: Mapping[str, Encoded], found: Directions, fingerprint: int) -> None:
    """One cell of `edited`: every prompt continued under one condition."""
    plan = session.study.plan
    assert plan.generate is not None and session.facts is not None
    flat = forms.flatten(plan.edits.get(key[1], []), session.facts.n_layers)
    form = Form(edits=forms.sites(flat), decoding=decoding(session, plan.generate))
    steps = plan.generate.max_new_tokens
    rows = [
        Row(
            label,
            prompt.tokens,
            {},
            row_edits(session, flat, prompt, found),
            uniforms(steps, plan.seed, label) if plan.generate.sample else None,
        )
        for label, prompt in prompts.items()
    ]
    clock = Clock()
    back = session.execute("edited", form, rows)
    if not session.came_back("edited", "edited", key, fingerprint, prompts, back):
        return
    results = {(label,): with_text(session, out) for label, out in back.found.items()}
    plain = {label: results[label,] for label in prompts}
    if not receipts_fine(session, "edited", "edited", key, fingerprint, plain, flat):
        return
    commit_receipts(session, "edited_receipts", key, plain, flat, fingerprint)
    data = arrays.texts_data(list(prompts), None, results)
    session.commit("edited", "edited", key, data, fingerprint, clock.share(1))
    session.finished("edited", key)


def receipts_fine(
    session: Session, stage: str, path: str, key: tuple, fingerprint: int, results: Mapping, flat: Sequence
) -> bool:
    """Whether every edit did something to every prompt; says so when one did not."""
    try:
        for result in results.values():
            for i, (_, edit, _) in enumerate(flat):
                if edit.strength != 0 or edit.op in ACTING_AT_ZERO:
                    mine, tokens = result["receipts"][i : i + 1], result.get("tokens", ())
                    missing = bool(edit.when) or positions.may_miss(edit.positions)
                    check_receipt(mine, tokens, positions.prompted(edit.positions), missing)
        for i, (_, edit, _) in enumerate(flat):
            check_reached([result["receipts"][i] for result in results.values()], edit)
    except EditError as error:
        session.fail(stage, path, key, fingerprint, str(error))
        return False
    return True


def commit_receipts(
    session: Session, path: str, key: tuple, results: Mapping, flat: Sequence, fingerprint: int
) -> None:
    """Receipts over (prompt, entry, layer); NaN where an entry does not act."""
    assert session.facts is not None
    prompts = list(results)
    entries = list(range(1 + max((entry for _, _, entry in flat), default=0)))
    values = np.full((len(prompts), len(entries), session.facts.n_layers, len(arrays.RECEIPT)), np.nan, np.float32)
    for p, label in enumerate(prompts):
        for i, (layer, _, entry) in enumerate(flat):
            values[p, entry, layer] = arrays.receipt_values(results[label]["receipts"][i])
    dims = {"prompt": prompts, "entry": entries, "layer": range(session.facts.n_layers)}
    data = arrays.dataset(dims, {name: (tuple(dims), values[..., i]) for i, name in enumerate(arrays.RECEIPT)})
    session.commit("receipts", path, key, data, fingerprint, 0.0)
