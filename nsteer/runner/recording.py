"""Stages `reads` and `edited`: the general form of a plan, streams recorded and text generated under edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from nsteer.errors import EditError, ExecutionError, InputError, ModelError
from nsteer.plan import positions
from nsteer.plan.check import directions_of
from nsteer.plan.prompts import Encoded, weights
from nsteer.program.form import Form, Row, RowEdit
from nsteer.program.ops import ACTING_AT_ZERO
from nsteer.program.randomness import uniforms
from nsteer.runner.editing import conditional, row_edit, scale
from nsteer.runner.failing import kind_of
from nsteer.runner.model import ModelRun, check_receipt
from nsteer.runner.runs import Clock
from nsteer.runner.steering import Derived, check_reached, encode_all, with_text
from nsteer.runner.writing import decoding
from nsteer.stages import arrays, cells, forms
from nsteer.stages.keys import Edited, Read, Vector

K = TypeVar("K", Read, Edited)


def reads(model: ModelRun) -> None:
    """Fills the missing cells of `reads` for the model at hand."""
    record(model, "reads")


def streams(model: ModelRun) -> None:
    """Fills the missing cells of `streams` for the model at hand."""
    record(model, "streams")


def record(model: ModelRun, product: str) -> None:
    """Fills the missing cells of `reads`, which hold one vector a prompt, or of `streams`: one a position."""
    path, todo = model.path(product), model.missing(product)
    if not todo:
        return
    prompts, directions = prompts_of(model), Directions(model)
    longest = max(len(prompt.tokens) for prompt in prompts.values())
    model.run.prepare(arrays.reads_groups(model.study, model.facts, longest))
    mine = with_vectors(model, product, path, todo)
    for edit in dict.fromkeys(key.edit for key in mine):
        here = {key: fp for key, fp in mine.items() if key.edit == edit}
        for wave in model.run.waves(product, path, here):
            record_reads(model, product, edit, prompts, directions, {key: here[key] for key in wave})


def edit(model: ModelRun) -> None:
    """Fills the missing cells of `edited` for the model at hand."""
    todo = with_vectors(model, "edited", "edited", model.missing("edited"))
    if not todo:
        return
    prompts, directions = prompts_of(model), Directions(model)
    for wave in model.run.waves("edited", "edited", todo, lambda key: len(prompts)):
        for key in wave:
            with model.run.guarded("edited", "edited", key, todo[key]):
                generate(model, key, prompts, directions, todo[key])


def prompts_of(model: ModelRun) -> dict[str, Encoded]:
    """The plan's own prompts, by label."""
    plan = model.plan
    where = [read.positions for read in plan.reads.values()]
    where += [edit.positions for edits in plan.edits.values() for edit in edits]
    return encode_all(model, plan.prompts, plan.chat, where)


def with_vectors(model: ModelRun, stage: str, path: str, todo: Mapping[K, int]) -> dict[K, int]:
    """The cells whose edits' directions are all there; the others wait."""
    plan = model.plan
    needed = {
        label: [(plan.directions[name].source, name) for edit in edits for name in directions_of(edit)]
        for label, edits in plan.edits.items()
    }
    if not any(needed.values()) or not todo:
        return dict(todo)
    return Derived(model).ready(stage, path, todo, lambda key: needed.get(key.edit, []))


class Directions:
    """The plan's directions for the model at hand, as the store has them: (name, layer) -> vector [d_model]."""

    def __init__(self, model: ModelRun):
        self.model = model

    def get(self, name: str, layer: int) -> np.ndarray:
        """Raises ExecutionError where it is not a number at the layer, InputError where it is not in the store."""
        key = Vector(self.model.label, self.model.plan.directions[name].source, name)
        cell = self.model.kept_input(self.model.path("vectors"), key, self.model.wanted(cells.directions)[key])
        vector = cell.vector.sel({"layer": layer}).values
        if not np.isfinite(vector).all():
            raise ExecutionError(f"the direction {name!r} is not a number at layer {layer} of {self.model.label}")
        return vector


def row_edits(model: ModelRun, flat: forms.Flat, prompt: Encoded, found: Directions) -> tuple[RowEdit, ...]:
    """A prompt's part in every edit of a condition."""
    generate = model.plan.generate
    made, new = [], generate.max_new_tokens if generate else 0
    for layer, edit, _ in flat:
        source = layer if edit.vector_layer == "same" else model.job.resolve(edit.vector_layer)[0]
        vector = found.get(edit.direction, source)
        length = float(np.linalg.norm(vector))
        scaled = scale(edit, vector / max(length, 1e-12), length, edit.strength, None)
        reference = float(found.get(edit.reference, layer) @ scaled[0]) if edit.reference else 0.0
        gate = edit.when.direction if edit.when is not None and edit.when.direction is not None else edit.direction
        one = row_edit(edit, prompt, *scaled, reference)
        made.append(conditional(model, edit, prompt, one, found.get(gate, source), new))
    return tuple(made)


def record_reads(
    model: ModelRun,
    product: str,
    edit: str,
    prompts: Mapping[str, Encoded],
    found: Directions,
    todo: Mapping[Read, int],
) -> None:
    """All missing reads of one product under one condition, in one forward a prompt."""
    facts, plan = model.facts, model.plan
    path = model.path(product)
    flat = forms.flatten(plan.edits.get(edit, []), facts.n_layers)
    names = [key.read for key in todo]
    form = forms.record(model.job, names, flat)
    rows: list[Row] = []
    for label, prompt in prompts.items():
        total = len(prompt.tokens)
        pools = {}
        for place, name in enumerate(names):
            if (pooling := plan.reads[name].pooling) is not None:
                pools[f"read_{place}"] = weights(pooling, prompt, total)
        try:
            rows.append(Row(label, prompt.tokens, pools, row_edits(model, flat, prompt, found)))
        except (ModelError, ExecutionError, InputError) as error:  # a direction: all of the condition's reads need it
            for key, fingerprint in todo.items():
                model.run.fail(product, path, key, fingerprint, str(error), kind_of(error))
            return
    clock = Clock()
    results = model.execute(product, form, rows)
    share = clock.share(len(todo))
    for key, fingerprint in todo.items():
        if not model.run.came_back(product, path, key, fingerprint, prompts, results):
            continue
        name = key.read
        read = plan.reads[name]
        layers = model.job.resolve(read.layers)
        if product == "reads":
            kept = [(site.layer, site.weights) for site in form.reads if site.what == "pooled"]
            places = [kept.index((layer, f"read_{names.index(name)}")) for layer in layers]
            data = pooled_data(results.found, list(prompts), layers, places)
        else:
            kept_whole = [(site.layer, site.site) for site in form.reads if site.what == "tokens"]
            places = [kept_whole.index((layer, read.site)) for layer in layers]
            masks = {label: prompt.mask(read.positions) for label, prompt in prompts.items()}
            data = stream_data(results.found, masks, layers, places)
        if not receipts_fine(model, product, path, key, fingerprint, results.found, flat):
            continue
        commit_receipts(model, model.path("read_receipts"), key, results.found, flat, fingerprint)
        model.run.commit(path, key, data, fingerprint, share)
        model.run.finished(product, key)


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


def generate(model: ModelRun, key: Edited, prompts: Mapping[str, Encoded], found: Directions, fingerprint: int) -> None:
    """One cell of `edited`: every prompt continued under one condition."""
    plan = model.plan
    assert plan.generate is not None and model.facts is not None
    flat = forms.flatten(plan.edits.get(key.edit, []), model.facts.n_layers)
    form = Form(edits=forms.sites(flat), decoding=decoding(model, plan.generate))
    steps = plan.generate.max_new_tokens
    rows = [
        Row(
            label,
            prompt.tokens,
            {},
            row_edits(model, flat, prompt, found),
            uniforms(steps, plan.seed, label) if plan.generate.sample else None,
        )
        for label, prompt in prompts.items()
    ]
    clock = Clock()
    back = model.execute("edited", form, rows)
    if not model.run.came_back("edited", "edited", key, fingerprint, prompts, back):
        return
    results = {(label,): with_text(model, out) for label, out in back.found.items()}
    plain = {label: results[label,] for label in prompts}
    if not receipts_fine(model, "edited", "edited", key, fingerprint, plain, flat):
        return
    commit_receipts(model, "edited_receipts", key, plain, flat, fingerprint)
    data = arrays.texts_data(list(prompts), None, results)
    model.run.commit("edited", key, data, fingerprint, clock.share(1))
    model.run.finished("edited", key)


def receipts_fine(
    model: ModelRun, stage: str, path: str, key: tuple, fingerprint: int, results: Mapping, flat: Sequence
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
        model.run.fail(stage, path, key, fingerprint, str(error))
        return False
    return True


def commit_receipts(model: ModelRun, path: str, key: tuple, results: Mapping, flat: Sequence, fingerprint: int) -> None:
    """Receipts over (prompt, entry, layer); NaN where an entry does not act."""
    prompts = list(results)
    entries = list(range(1 + max((entry for _, _, entry in flat), default=0)))
    values = np.full((len(prompts), len(entries), model.facts.n_layers, len(arrays.RECEIPT)), np.nan, np.float32)
    for p, label in enumerate(prompts):
        for i, (layer, _, entry) in enumerate(flat):
            values[p, entry, layer] = arrays.receipt_values(results[label]["receipts"][i])
    dims = {"prompt": prompts, "entry": entries, "layer": range(model.facts.n_layers)}
    data = arrays.dataset(dims, {name: (tuple(dims), values[..., i]) for i, name in enumerate(arrays.RECEIPT)})
    model.run.commit(path, key, data, fingerprint, 0.0)
