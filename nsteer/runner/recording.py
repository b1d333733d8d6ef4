"""Stages `reads` and `edited`: the general form of a plan, streams recorded and text generated under edits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from nsteer.errors import ChangedError, EditError, ModelError
from nsteer.plan.check import conditions, directions_of, swept
from nsteer.plan.prompts import Encoded, weights
from nsteer.plan.schema import Calibrated
from nsteer.program.form import Row
from nsteer.runner.editing import ConditionMaker, usable
from nsteer.runner.model import ModelRun
from nsteer.runner.prompting import At, encoded, prompts_of
from nsteer.runner.runs import WAVE, Clock
from nsteer.runner.steering import Derived, on_all, strengths_found, vectors_of_methods, with_text
from nsteer.runner.writing import decoding
from nsteer.stages import arrays, cells, counting, forms
from nsteer.stages.job import IN_A_CHUNK
from nsteer.stages.keys import Edited, EditSearch, Read, TextRow

K = TypeVar("K", Read, Edited)
C = TypeVar("C", Read, Edited, EditSearch)


def reads(model: ModelRun) -> None:
    """Fills the missing cells of `reads` for the current model."""
    record(model, "reads")


def streams(model: ModelRun) -> None:
    """Fills the missing cells of `streams` for the current model."""
    record(model, "streams")


def record(model: ModelRun, product: str) -> None:
    """Fills the missing cells of `reads`, which hold one vector a prompt, or of `streams`: one a position."""
    path, todo = model.path(product), model.missing(product)
    if not todo:
        return
    reads = [read for name, read in model.plan.reads.items() if model.job.kept_in(name) == product]
    positions = longest(model, reads) if product == "streams" else 0
    model.run.prepare(arrays.reads_groups(model.study, model.facts, product, positions))
    in_place(model, product)
    bare: dict[str, dict[str, None]] = {}
    together = {key: todo[key] for key in sorted(todo, key=lambda key: (key.strength, key.prompt_chunk))}
    last = {key._replace(read=""): key for key in together}  # one forward for all reads of a prompt
    rows = {key: rows_of(model, key) for key in last.values()}
    for maker, here in by_condition(model, product, path, together):
        for wave in model.run.waves(product, path, here, lambda key: rows.get(key, 0)):
            wave_cells = {key: here[key] for key in wave}
            prompts = prompts_by(model, [*reads, *maker.written], product, path, wave_cells)
            record_reads(maker, product, prompts, {key: wave_cells[key] for key in prompts}, bare)
    for read, labels in bare.items():
        first = next(iter(labels))[:40]
        model.warn(f"{read}: {len(labels)} prompts have none of its positions, {first!r} first: missing values")


def rows_of(model: ModelRun, key: Read) -> int:
    """What a chunk of prompts counts for in a wave: its rows; of whole streams, which take far more memory, as if there
    were more."""
    rows, product = counting.read_rows(model.job, key), model.job.kept_in(key.read)
    return max(rows, WAVE // 4) if product == "streams" else rows


def longest(model: ModelRun, at: At) -> int:
    """Tokens of the longest of the plan's own prompts that can be encoded; a chunk of them at a time."""
    lengths = [1]
    for chunk in model.job.prompt_chunks("streams").values():
        with contextlib.suppress(ModelError):  # said where its cells are to be made
            lengths += [len(prompt.tokens) for prompt in encoded(model, model.job.some(chunk), at).values()]
    return max(lengths)


def in_place(model: ModelRun, product: str) -> None:
    """Raises ChangedError where another run has put other prompts into the store since this one began."""
    labels = model.run.store.labels(model.path(product), "prompt")
    place, size = {label: i for i, label in enumerate(labels)}, IN_A_CHUNK[product]
    if any(place[label] // size != number for number, few in model.job.prompt_chunks(product).items() for label in few):
        raise ChangedError(f"{model.run.store.path}: another run has put other prompts into {product}: run again")


def prompts_by(model: ModelRun, at: At, stage: str, path: str, todo: Mapping[K, int]) -> dict[K, dict[str, Encoded]]:
    """The prompts of each cell, by label, encoded when they are used; cells with one that is refused fail."""
    prompts_by_cell: dict[K, dict[str, Encoded]] = {}
    for chunk in dict.fromkeys(key.prompt_chunk for key in todo):
        mine = {key: number for key, number in todo.items() if key.prompt_chunk == chunk}
        prompts = prompts_of(model, model.job.texts_of(next(iter(mine))), at, stage, path, mine)
        prompts_by_cell |= dict.fromkeys(mine, prompts) if prompts is not None else {}
    return {key: prompts_by_cell[key] for key in todo if key in prompts_by_cell}


def edit(model: ModelRun) -> None:
    """Fills the missing cells of `edited` for the current model."""
    for maker, here in by_condition(model, "edited", "edited", model.missing("edited")):
        for wave in model.run.waves("edited", "edited", here, lambda key: counting.text_rows(model.job, key)):
            wave_cells = {key: here[key] for key in wave}
            prompts = prompts_by(model, maker.written, "edited", "edited", wave_cells)
            write_under(maker, prompts, {key: wave_cells[key] for key in prompts})


def by_condition(
    model: ModelRun, stage: str, path: str, todo: Mapping[K, int]
) -> Iterator[tuple[ConditionMaker, dict[K, int]]]:
    """The cells of each condition that can be done, with what makes their rows."""
    ready, strengths = with_strengths(model, stage, path, todo)
    for label in dict.fromkeys(key.edit for key in ready):
        maker = ConditionMaker(model, label, model.job.continuing, new_tokens(model), strengths)
        yield maker, {key: fp for key, fp in ready.items() if key.edit == label}


def new_tokens(model: ModelRun) -> int:
    """Most tokens that are generated under `edits`."""
    return model.plan.generate.max_new_tokens if model.plan.generate else 0


def directed(model: ModelRun, stage: str, path: str, todo: Mapping[C, int]) -> dict[C, int]:
    """The cells whose edits' directions are all there, and all vectors that they are projected on; the others wait."""
    plan = model.plan
    projected = stage == "edited" and plan.project
    every = vectors_of_methods(model, vectors_by(model)) if projected else []
    needed = {
        label: [(plan.directions[name].source, name) for edit in edits for name in directions_of(edit)] + every
        for label, edits in conditions(plan).items()
    }
    if not todo or not any(needed.values()):
        return dict(todo)
    return Derived(model).ready(stage, path, todo, lambda key: needed[key.edit])


def vectors_by(model: ModelRun) -> list[str]:
    """The labels of the axis `method` under which the plan has vectors."""
    return list(dict.fromkeys(key.method for key in model.wanted(cells.vectors)))


def with_strengths(
    model: ModelRun, stage: str, path: str, todo: Mapping[C, int]
) -> tuple[dict[C, int], dict[EditSearch, float]]:
    """The cells whose edits' directions are all there, and whose strengths are found; the others wait, or fail."""
    own, ready = conditions(model.plan), directed(model, stage, path, todo)
    sought = {key: fp for key, fp in ready.items() if isinstance(swept(own[key.edit]), Calibrated)}
    by = {key: EditSearch(key.model, key.edit, key.strength) for key in sought}
    strengths = strengths_found(model, (stage, path), "calibration_edits", by, sought)
    left = {key: fp for key, fp in ready.items() if key not in sought or key in strengths}
    return left, {by[key]: strength for key, strength in strengths.items()}


def record_reads(
    maker: ConditionMaker,
    product: str,
    prompts: Mapping[Read, Mapping[str, Encoded]],
    todo: Mapping[Read, int],
    bare: dict[str, dict[str, None]],
) -> None:
    """Missing reads of one product under one condition, in one forward a prompt and strength.

    bare : read -> prompts that have none of the positions which it pools, to be added to
    """
    model, flat = maker.model, maker.flat
    plan, path = model.plan, model.path(product)
    cell = {key: Edited(key.model, key.edit, key.strength, key.prompt_chunk) for key in todo}
    good = [key for key in todo if usable(maker, product, path, key, todo[key])]
    names = list(dict.fromkeys(key.read for key in good))
    form = forms.record(model.job, names, flat)
    pools = {
        label: {
            f"read_{place}": weights(pooling, prompt, len(prompt.tokens))
            for place, name in enumerate(names)
            if (pooling := plan.reads[name].pooling) is not None
        }
        for label, prompt in {label: prompt for key in good for label, prompt in prompts[key].items()}.items()
    }
    rows = [
        Row(TextRow(cell[key], label, 0), prompt.tokens, pools[label], maker.edits(compiled_edits, prompt))
        for key, compiled_edits in {cell[key]: (key, maker.compiled_edits(key)) for key in good}.values()
        for label, prompt in prompts[key].items()
    ]
    clock = Clock()
    results = model.execute(product, form, rows)
    share = clock.share(len(todo))
    for key in good:
        mine = {label: TextRow(cell[key], label, 0) for label in prompts[key]}
        if not model.run.came_back(product, path, key, todo[key], mine.values(), results):
            continue
        readouts = {label: results.readouts[row] for label, row in mine.items()}
        read = plan.reads[key.read]
        layers = model.job.resolve(read.layers)
        if product == "reads":
            weighed = f"read_{names.index(key.read)}"
            kept = [(site.layer, site.weights) for site in form.reads if site.what == "pooled"]
            places = [kept.index((layer, weighed)) for layer in layers]
            data = pooled_data(readouts, list(mine), layers, places)
            if without := [label for label in mine if not pools[label][weighed].any()]:
                data["stream"].loc[{"prompt": without}] = np.nan
                bare.setdefault(key.read, {}).update(dict.fromkeys(without))
        else:
            kept_whole = [(site.layer, site.site) for site in form.reads if site.what == "tokens"]
            places = [kept_whole.index((layer, read.site)) for layer in layers]
            masks = {label: prompt.mask(read.positions) for label, prompt in prompts[key].items()}
            data = stream_data(readouts, masks, layers, places)
        by_prompt = {(label,): result for label, result in readouts.items()}
        if not did(maker, product, path, key, todo[key], by_prompt):
            continue
        receipts = receipts_data(model, flat, {"prompt": list(mine)}, by_prompt)
        model.run.commit(model.path(arrays.RECEIPTS[product]), key, receipts, todo[key], 0.0)
        model.run.commit(path, key, data, todo[key], share)
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


def write_under(
    maker: ConditionMaker, prompts: Mapping[Edited, Mapping[str, Encoded]], todo: Mapping[Edited, int]
) -> None:
    """Cells of one condition: their prompts and every seed continued at each strength. Their rows travel together."""
    model, texts = maker.model, maker.texts
    form = forms.edited(model.job, maker.flat, decoding(model, texts.generate))
    good = [key for key in todo if usable(maker, "edited", "edited", key, todo[key])]
    clock = Clock()
    back = model.execute("edited", form, [row for key in good for row in maker.rows(key, prompts[key])])
    share = clock.share(len(todo))
    for key in good:
        labels: dict[str, Sequence] = {"prompt": list(prompts[key]), "seed": texts.seeds}
        names = [TextRow(key, label, seed) for label in prompts[key] for seed in texts.seeds]
        if not model.run.came_back("edited", "edited", key, todo[key], names, back):
            continue
        readouts = {(name.prompt, name.seed): with_text(model, back.readouts[name]) for name in names}
        if not did(maker, "edited", "edited", key, todo[key], readouts):
            continue
        if texts.project:
            projected = on_all(model, vectors_by(model), texts, readouts)
            model.run.commit("projections_edited", key, projected, todo[key], 0.0)
        receipts = receipts_data(model, maker.flat, labels, readouts)
        model.run.commit("edited_receipts", key, receipts, todo[key], 0.0)
        data = arrays.texts_data(labels["prompt"], texts.seeds, readouts)
        model.run.commit("edited", key, data, todo[key], share)
        model.run.finished("edited", key)


def did(
    maker: ConditionMaker,
    stage: str,
    path: str,
    key: Edited | Read,
    fingerprint: int,
    results: Mapping[tuple, Mapping[str, Any]],
) -> bool:
    """Whether every edit did to every text what it should have; the cell fails where one did not."""
    try:
        maker.check(key, results)
    except EditError as error:
        maker.model.run.fail(stage, path, key, fingerprint, str(error))
        return False
    return True


def receipts_data(
    model: ModelRun, flat: forms.Flat, labels: Mapping[str, Sequence], results: Mapping[tuple, Mapping[str, Any]]
) -> Any:
    """Receipts over the dims that tell texts apart, entry and layer; NaN where an entry does not act."""
    entries = list(range(1 + max((entry for _, _, entry in flat), default=0)))
    dims = {**labels, "entry": entries, "layer": range(model.facts.n_layers)}
    values = np.full((*map(len, dims.values()), len(arrays.RECEIPT)), np.nan, np.float32)
    for names, result in results.items():
        at = tuple(list(known).index(name) for known, name in zip(labels.values(), names, strict=True))
        for i, (layer, _, entry) in enumerate(flat):
            values[(*at, entry, layer)] = arrays.receipt_values(result["receipts"][i])
    return arrays.dataset(dims, {name: (tuple(dims), values[..., i]) for i, name in enumerate(arrays.RECEIPT)})
