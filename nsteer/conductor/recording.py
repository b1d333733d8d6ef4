"""Stages `reads` and `edited`: the general form of a plan, streams recorded and text generated under edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nsteer import arrays, cells, forms
from nsteer.conductor.session import Clock, Session, check_receipt
from nsteer.conductor.steering import row_edit, scale, with_text
from nsteer.conductor.writing import decoding
from nsteer.errors import EditError, ModelError
from nsteer.layers import resolve
from nsteer.plan import Direction
from nsteer.program import Form, ReadSite, Row, RowEdit
from nsteer.prompts import Encoded, encode, prompt_set, weights
from nsteer.randomness import uniforms, unit_vector
from nsteer.store import Store, slug


def record(session: Session) -> None:
    """Fills the missing cells of `reads`, `streams` and `edited` for the model at hand."""
    facts, plan = session.facts, session.study.plan
    assert facts is not None
    wanted_reads, wanted_texts = cells.reads(session.study, facts), cells.edited(session.study, facts)
    todo_reads = missing_reads(session, wanted_reads)
    todo_texts = (
        session.missing("edited", "edited", {(facts.label, *k): v for k, v in wanted_texts.items()})
        if (wanted_texts)
        else {}
    )
    if not (todo_reads or todo_texts):
        return
    texts = prompt_set(plan.prompts, session.study.texts)
    prompts = {label: encode(session.executor.tokenizer, text, plan.chat) for label, text in texts.items()}
    directions = Directions(session)
    if todo_reads:
        longest = max(len(prompt.tokens) for prompt in prompts.values())
        session.store.prepare(arrays.reads_groups(session.study, facts, longest))
    for edit in dict.fromkeys(key[1] for key in todo_reads):
        record_reads(session, edit, prompts, directions, {k: v for k, v in todo_reads.items() if k[1] == edit})
    for key, fingerprint in todo_texts.items():
        generate(session, key, prompts, directions, fingerprint)


def missing_reads(session: Session, wanted: Mapping[tuple, int]) -> dict[tuple, int]:
    """Cells of `reads` and `streams` still to do, by (read, edit)."""
    assert session.facts is not None
    todo: dict[tuple, int] = {}
    for product, pooled in (("reads", True), ("streams", False)):
        mine = {k: v for k, v in wanted.items() if (session.study.plan.reads[k[0]].pooling is not None) == pooled}
        if mine:
            full = {(session.facts.label, *key): fp for key, fp in mine.items()}
            path = f"{product}/{slug(session.facts.label)}"
            left = full if path not in session.store.groups() else session.missing(product, path, full)
            todo |= {key[1:]: fp for key, fp in left.items()}
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
            return unit_vector(facts.d_model, spec.random, name, layer)
        if name not in self.found:
            self.found[name] = contrast(self.session, spec) if spec.contrast else stored(facts.label, spec)
        return self.found[name][layer]


def contrast(session: Session, spec: Direction) -> np.ndarray:
    """mean(positive) - mean(negative) of pooled streams, at every layer: [layer, d_model]."""
    facts, groups = session.facts, spec.contrast
    assert facts is not None and groups is not None
    rows = []
    for side in ("positive", "negative"):
        for i, text in enumerate(getattr(groups, side)):
            prompt = encode(session.executor.tokenizer, text, groups.chat)
            rows.append(Row((side, i), prompt.tokens, {"text": weights(groups.pooling, prompt, len(prompt.tokens))}))
    form = Form(reads=tuple(ReadSite(layer) for layer in range(facts.n_layers)))
    found = dict(session.execute("directions", form, rows))
    means = [
        np.mean([out["pooled"] for key, out in found.items() if key[0] == side], 0) for side in ("positive", "negative")
    ]
    return means[0] - means[1]


def stored(label: str, spec: Direction) -> np.ndarray:
    """A vector of this model from a store: [layer, d_model]. Raises ModelError when the store lacks it."""
    assert spec.store is not None
    try:
        group = Store(spec.store.path).read(f"vectors/{slug(label)}").vector
        vector = group.sel({"model": label, "method": spec.store.method, "emotion": spec.store.emotion}).values
    except (KeyError, FileNotFoundError) as error:
        raise ModelError(f"the store {spec.store.path!r} has no such vector for {label}: {error}") from error
    return vector


def row_edits(session: Session, flat: forms.Flat, prompt: Encoded, found: Directions) -> tuple[RowEdit, ...]:
    """A prompt's part in every edit of a condition."""
    assert session.facts is not None
    made = []
    for layer, edit, _ in flat:
        source = layer if edit.vector_layer == "same" else resolve(edit.vector_layer, session.facts.n_layers)[0]
        vector = found.get(edit.direction, source)
        length = float(np.linalg.norm(vector))
        made.append(row_edit(edit, prompt, *scale(edit, vector / max(length, 1e-12), length, edit.strength, None)))
    return tuple(made)


def record_reads(
    session: Session, edit: str, prompts: Mapping[str, Encoded], found: Directions, todo: Mapping[tuple, int]
) -> None:
    """All missing reads of one condition, in one forward a prompt."""
    facts, plan = session.facts, session.study.plan
    assert facts is not None
    flat = forms.flatten(plan.edits.get(edit, []), facts.n_layers)
    names = [name for name, _ in todo]
    form = forms.record(session.study, facts, names, flat)
    rows = []
    for label, prompt in prompts.items():
        total = len(prompt.tokens)
        pools = {}
        for place, name in enumerate(names):
            if (pooling := plan.reads[name].pooling) is not None:
                pools[f"read_{place}"] = weights(pooling, prompt, total)
        rows.append(Row(label, prompt.tokens, pools, row_edits(session, flat, prompt, found)))
    clock = Clock()
    results = dict(session.execute("reads", form, rows))
    share = clock.share(len(todo))
    for (name, _), fingerprint in todo.items():
        read = plan.reads[name]
        layers = resolve(read.layers, facts.n_layers)
        if read.pooling is not None:
            kept = [(site.layer, site.weights) for site in form.reads if site.what == "pooled"]
            places = [kept.index((layer, f"read_{names.index(name)}")) for layer in layers]
            product, data = "reads", pooled_data(results, list(prompts), layers, places)
        else:
            kept_whole = [site.layer for site in form.reads if site.what == "tokens"]
            places = [kept_whole.index(layer) for layer in layers]
            product, data = "streams", stream_data(results, list(prompts), layers, places)
        key = (facts.label, name, edit)
        if not receipts_fine(session, "reads", key, results, flat):
            continue
        commit_receipts(session, f"read_receipts/{slug(facts.label)}", key, results, flat, fingerprint)
        session.commit("reads", f"{product}/{slug(facts.label)}", key, data, fingerprint, share)
        session.finished(product, key)


def pooled_data(results: Mapping, prompts: list[str], layers: Sequence[int], places: list[int]) -> Any:
    values = np.stack([results[label]["pooled"][places] for label in prompts])
    dims = {"prompt": prompts, "layer": layers, "d_model": range(values.shape[-1])}
    return arrays.dataset(dims, {"stream": (tuple(dims), values)})


def stream_data(results: Mapping, prompts: list[str], layers: Sequence[int], places: list[int]) -> Any:
    """Whole streams over (prompt, position, layer, d_model); NaN beyond a prompt's end."""
    longest = max(results[label]["streams"].shape[1] for label in prompts)
    width = results[prompts[0]]["streams"].shape[-1]
    values = np.full((len(prompts), longest, len(layers), width), np.nan, np.float32)
    for i, label in enumerate(prompts):
        stream = results[label]["streams"][places]
        values[i, : stream.shape[1]] = stream.swapaxes(0, 1)
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
    results = {(label,): with_text(session, out) for label, out in session.execute("edited", form, rows)}
    plain = {label: results[label,] for label in prompts}
    if not receipts_fine(session, "edited", key, plain, flat):
        return
    commit_receipts(session, "edited_receipts", key, plain, flat, fingerprint)
    data = arrays.texts_data(list(prompts), None, results)
    session.commit("edited", "edited", key, data, fingerprint, clock.share(1))
    session.finished("edited", key)


def receipts_fine(session: Session, stage: str, key: tuple, results: Mapping, flat: Sequence) -> bool:
    """Whether every edit did something to every prompt; says so when one did not."""
    try:
        for result in results.values():
            for i, (_, edit, _) in enumerate(flat):
                if edit.strength != 0 or edit.op == "clamp":
                    check_receipt(
                        result["receipts"][i : i + 1], result.get("tokens", ()), edit.positions != "generated"
                    )
    except EditError as error:
        session.fail(stage, key, str(error))
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
