"""Stages `unsteered` and `steering`: continuations with and without edits, and their receipts, into the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import xarray as xr

from nsteer.errors import EditError, ModelError
from nsteer.plan import positions
from nsteer.plan.check import also_rests_on, labels_under, rests_on
from nsteer.plan.prompts import Encoded, asked_prompts, encode, located, prompt_set, token_ids
from nsteer.plan.schema import Also, Calibrated, Edit, Steer
from nsteer.program.form import Row
from nsteer.program.ops import ACTING_AT_ZERO
from nsteer.runner.editing import RowMaker, further_name, numbers, usable
from nsteer.runner.model import ModelRun, check_receipt
from nsteer.runner.runs import Clock, LoadError
from nsteer.runner.sources import there, vectors_of
from nsteer.runner.writing import decoding, one_bos
from nsteer.stages import arrays, cells, counting, forms
from nsteer.stages.keys import Condition, Prompted, TextRow, Unsteered, Vector

K = TypeVar("K", bound=tuple)

PLAIN, ASKED, STEERED = "unsteered", "prompted", "steering"
GROUPS = ("steering", "generations")
"""Where a cell of the grid is kept; it is done when it is in the last."""


def steer(model: ModelRun) -> None:
    """Fills the missing cells of `generations` and `steering` for the model at hand."""
    todo, derived = model.missing(STEERED), Derived(model)
    for block in model.plan.steer:
        for layer_set, layers in model.job.layer_sets(block).items():
            mine = {k: fp for k, fp in todo.items() if (k.op, k.layer_set) == (cells.op_label(block), layer_set)}
            mine = derived.ready(STEERED, GROUPS[-1], mine, partial(needed, model, block))
            strengths = calibrated(model, block, mine)
            mine = {key: mine[key] for key in strengths}
            if mine:
                steer_cells(model, block, layers, mine, strengths)


def leave(model: ModelRun) -> None:
    """Fills the missing cells of `unsteered` for the model at hand."""
    todo, derived = model.missing(PLAIN), Derived(model)
    for block in model.plan.steer:
        mine = {key: fp for key, fp in todo.items() if key.op == cells.op_label(block)}
        if block.project:
            mine = derived.ready(PLAIN, PLAIN, mine, partial(projected_on, model, block))
        for wave in model.run.waves(PLAIN, PLAIN, mine):
            for key in wave:
                with model.run.guarded(PLAIN, PLAIN, key, mine[key]):
                    continue_plain(model, block, PLAIN, key, encoded_prompts(model, block), mine[key])


def calibrated(model: ModelRun, block: Steer, todo: Mapping[Condition, int]) -> dict[Condition, float]:
    """The strength of every cell: its label, or what was found for it. Cells for which there is none wait or fail."""
    if not isinstance(block.strengths, Calibrated) or not todo:
        return {key: key.strength for key in todo}
    wanted, path = model.wanted(cells.calibration), "calibration"
    gone, found = model.run.lacking(path, wanted), {}
    for key, number in todo.items():
        by = cells.calibrated_by(block, key)
        if by in gone:
            model.run.wait_for(STEERED, GROUPS[-1], key, number, path, by)
            continue
        with model.run.guarded(STEERED, GROUPS[-1], key, number):
            one = model.kept_input(path, by, wanted[by])
            if not np.isfinite(one.found):
                model.run.fail(
                    STEERED, GROUPS[-1], key, number, f"no strength for {key.strength:g}: {one.reason.item()}"
                )
            else:
                found[key] = float(one.found)
    return found


def projected_on(model: ModelRun, block: Steer, key: Unsteered) -> list[tuple[str, str]]:
    """(method, emotion) of every vector that the streams of an unsteered cell are projected on."""
    return all_of(model, cells.steered_methods(model.plan, block))


def needed(model: ModelRun, block: Steer, key: Condition) -> list[tuple[str, str]]:
    """(method, emotion) of every vector that a cell of the grid rests on."""
    method = key.method
    gate = [(method, block.when.direction)] if block.when is not None and block.when.direction is not None else []
    own = rests_on(model.plan, block, method, key.emotion)
    further = also_rests_on(model.plan, block, method)
    every = (
        dict.fromkeys(made_by for made_by, _ in own) if key.control == "shuffled" else ()
    )  # labels are permuted among all
    return [*own, *further, *gate, *all_of(model, list(every)), *(all_of(model, [method]) if block.project else [])]


def all_of(model: ModelRun, methods: Sequence[str]) -> list[tuple[str, str]]:
    return [(method, label) for method in methods for label in labels_under(model.plan, method)]


class Derived:
    """Which vectors of the model at hand are in the store as the plan wants them, and which can be used."""

    def __init__(self, model: ModelRun):
        self.model = model
        self.path = model.path("vectors")
        self.gone = model.run.lacking(self.path, model.wanted(cells.vectors))

    def ready(
        self, stage: str, path: str, todo: Mapping[K, int], rests_on: Callable[[K], list[tuple[str, str]]]
    ) -> dict[K, int]:
        """The cells whose vectors are all there; the others wait."""
        found = {}
        for key, fp in todo.items():
            absent = [one for one in (Vector(self.model.label, *pair) for pair in rests_on(key)) if one in self.gone]
            if absent:
                self.model.run.wait_for(stage, path, key, fp, self.path, absent[0])
            else:
                found[key] = fp
        return found


def encoded_prompts(model: ModelRun, block: Steer) -> dict[str, Encoded]:
    return encode_all(model, block.prompts, block.chat, [edit.positions for edit in edits_of(block)])


def prompts_of(
    model: ModelRun, block: Steer, stage: str, path: str, todo: Mapping[K, int]
) -> dict[str, Encoded] | None:
    """The block's prompts by label; None where they or its words are refused, which fails all its cells."""
    try:
        prompts = encoded_prompts(model, block)
        check_words(model, block)
    except LoadError:
        raise
    except ModelError as error:  # a prompt without a token, a template or a word that is refused
        for key, number in todo.items():
            model.run.fail(stage, path, key, number, str(error))
        return None
    return prompts


def edits_of(block: Steer) -> list[Steer | Also]:
    return [block, *block.also]


def check_words(model: ModelRun, block: Steer) -> None:
    """Raises ModelError where a token that an edit of the block names is none of the model's."""
    for edit in edits_of(block):
        named = [one for _, part in positions.parts(edit.positions) for one in positions.many(part.get("ids", []))]
        token_ids(model.executor.tokenizer, [*((edit.when.after if edit.when else None) or ()), *named])


def encode_all(model: ModelRun, prompts: Any, chat: str, where: Sequence[Any]) -> dict[str, Encoded]:
    """Prompts by label; with the characters of their tokens where some of the positions `where` rest on them."""
    texts, tokenizer = prompt_set(prompts, model.study.texts), model.executor.tokenizer
    moment = model.study.moment
    found = {label: encode(tokenizer, text, chat, moment=moment) for label, text in texts.items()}
    for label, one in found.items():
        one_bos(model, f"the prompt {label[:40]!r}", one)
    if not any(map(positions.sought, where)):
        return found
    return {label: located(tokenizer, one, texts[label], chat, moment) for label, one in found.items()}


def ask(model: ModelRun) -> None:
    """Fills the missing cells of `prompted` for the model at hand: no edit, the emotion asked for in words."""
    todo, blocks = model.missing(ASKED), model.wanted(counting.blocks)
    for label, block in blocks.items():
        mine = {key: fp for key, fp in todo.items() if key.op == label}
        for wave in model.run.waves(ASKED, ASKED, mine, lambda key: counting.prompt_rows(model.job, key)):
            for key in wave:
                with model.run.guarded(ASKED, ASKED, key, mine[key]):
                    shown = asked_prompts(block, model.study.texts, key.emotion, key.asked)
                    prompts = encode_all(model, shown, block.chat, [])
                    bare = block.model_copy(update={"project": False})
                    continue_plain(model, bare, ASKED, key, prompts, mine[key])


def continue_plain(
    model: ModelRun,
    block: Steer,
    stage: str,
    key: Unsteered | Prompted,
    prompts: Mapping[str, Encoded],
    fingerprint: int,
) -> None:
    """One cell of `unsteered` or `prompted`: every prompt and seed, no edit."""
    clock, form = Clock(), forms.plain(block, model.job.layers, decoding(model, block.generate))
    rows = [
        Row(TextRow(key, label, seed), prompt.tokens, uniform=numbers(model, block, label, seed))
        for label, prompt in prompts.items()
        for seed in block.seeds
    ]
    results = model.execute(stage, form, rows)
    if not model.run.came_back(stage, stage, key, fingerprint, [row.key for row in rows], results):
        return
    found = {(row.prompt, row.seed): with_text(model, result) for row, result in results.found.items()}
    data = arrays.texts_data(list(prompts), block.seeds, found)
    if block.project and isinstance(key, Unsteered):
        plain_projections(model, block, key, found, fingerprint)
    model.run.commit(stage, key, data, fingerprint, clock.share(1))
    model.run.finished(stage, key)


def projections(
    vectors: xr.DataArray, layers: Sequence[int], rows: Mapping[tuple, Mapping[str, Any]], block: Steer
) -> Any:
    """Projections of rows' streams on every target's unit vector: DataArray (prompt, seed, where, layer, target)."""
    prompts = list(dict.fromkeys(label for label, _ in rows))
    dims = ("prompt", "seed", "where", "layer", "d_model")
    streams = np.array(
        [[[rows[label, seed][name] for name in arrays.WHERE] for seed in block.seeds] for label in prompts]
    )
    labels = {"prompt": prompts, "seed": block.seeds, "where": list(arrays.WHERE), "layer": list(layers)}
    stream = xr.DataArray(streams, dims=dims, coords=labels)
    vector = vectors.sel({"layer": list(layers)}).drop_vars(["d_model", "depth"], errors="ignore").astype(np.float64)
    unit = vector / np.sqrt((vector**2).sum("d_model"))
    found = xr.dot(stream, unit.rename(emotion="target"), dim="d_model").astype(np.float32)
    keep = [dim for dim in ("method", *dims[:-1], "target") if dim in found.dims]
    return found.transpose(*keep).reset_coords(drop=True).to_dataset(name="projection")


def plain_projections(
    model: ModelRun, block: Steer, key: Unsteered, rows: Mapping[tuple, Any], fingerprint: int
) -> None:
    labels = {method: labels_under(model.plan, method) for method in cells.steered_methods(model.plan, block)}
    made = [
        there(model, method, vectors_of(model, method), mine).sel({"emotion": mine}) for method, mine in labels.items()
    ]
    vectors = xr.concat(made, xr.Variable("method", list(labels)), join="outer")
    data = projections(vectors, model.job.layers, rows, block)
    model.run.commit("projections_unsteered", key, data, fingerprint, 0.0)


def steered_projections(
    model: ModelRun, block: Steer, key: Condition, vectors: xr.DataArray, rows: Mapping[tuple, Any], fingerprint: int
) -> None:
    data = projections(vectors, model.job.layers, rows, block)
    model.run.commit("projections", key, data, fingerprint, 0.0)


def with_text(model: ModelRun, result: Mapping[str, Any]) -> dict[str, Any]:
    return {**result, "text": model.executor.tokenizer.decode(result["tokens"], skip_special_tokens=True)}


def steer_cells(
    model: ModelRun,
    block: Steer,
    layers: Sequence[int],
    todo: Mapping[Condition, int],
    strengths: Mapping[Condition, float],
) -> None:
    """The missing cells of one block and layer set. All their rows share one form, so they travel together."""
    form = forms.steer(block, layers, model.job.layers, decoding(model, block.generate), model.facts.n_layers)
    prompts = prompts_of(model, block, STEERED, GROUPS[-1], todo)
    if prompts is None:
        return
    methods = {key.method for key in todo}
    makers = {method: RowMaker(model, block, layers, method, strengths) for method in methods}
    clock = Clock()
    for wave in model.run.waves(STEERED, GROUPS, todo, lambda key: len(prompts) * len(block.seeds)):
        good = [key for key in wave if usable(makers[key.method], STEERED, GROUPS[-1], key, todo[key])]
        results = model.execute(STEERED, form, [row for key in good for row in makers[key.method].rows(key, prompts)])
        share = clock.share(len(wave))
        for key in good:
            names = [TextRow(key, label, seed) for label in prompts for seed in block.seeds]
            if not model.run.came_back(STEERED, GROUPS[-1], key, todo[key], names, results):
                continue
            mine = {(name.prompt, name.seed): with_text(model, results.found[name]) for name in names}
            keep(model, block, layers, key, mine, list(prompts), todo[key], share, makers[key.method].vectors)


def keep(
    model: ModelRun,
    block: Steer,
    layers: Sequence[int],
    key: Condition,
    rows: Mapping[tuple, Mapping[str, Any]],
    prompts: list[str],
    fingerprint: int,
    seconds: float,
    vectors: xr.DataArray,
) -> None:
    """Commits one cell: its receipts and its texts. An edit that did nothing is a failure, not a result."""
    number = [one for _, _, one in forms.together(block, layers, model.facts.n_layers)]
    own = [i for i, one in enumerate(number) if one == forms.OWN]
    try:
        check_cell(rows, own, block, key.strength)
        for place, one in enumerate(block.also):
            try:
                check_cell(rows, [i for i, other in enumerate(number) if other == place], one, one.strength)
            except EditError as error:
                raise EditError(f"{further_name(block, place)}: {error}") from None
    except EditError as error:
        model.run.fail(STEERED, GROUPS[-1], key, fingerprint, str(error))
        return
    if block.project:
        steered_projections(model, block, key, vectors, rows, fingerprint)
    receipts = np.array([[rows[label, seed]["receipts"] for seed in block.seeds] for label in prompts])
    if block.also:
        further = arrays.further_data(receipts, number, prompts, block.seeds)
        model.run.commit("steering_also", key, further, fingerprint, 0.0)
    values = arrays.receipt_values(receipts[:, :, own])
    dims = ("prompt", "seed", "layer")
    numbers = arrays.dataset(
        {"prompt": prompts, "seed": block.seeds, "layer": layers},
        {name: (dims, values[..., i].astype(np.float32)) for i, name in enumerate(arrays.RECEIPT)},
    )
    model.run.commit(STEERED, key, numbers, fingerprint, seconds)
    model.run.commit("generations", key, arrays.texts_data(prompts, block.seeds, rows), fingerprint, seconds)
    model.run.finished(STEERED, key)


def check_cell(rows: Mapping[tuple, Mapping[str, Any]], places: list[int], edit: Steer | Also, strength: float) -> None:
    """Raises EditError where an edit of a cell, at these places of the receipts, did not do what it should have."""
    if strength != 0 or edit.op in ACTING_AT_ZERO:
        missing = bool(edit.when) or positions.may_miss(edit.positions)
        for result in rows.values():
            check_receipt(result["receipts"][places], result["tokens"], positions.prompted(edit.positions), missing)
    check_reached([result["receipts"][places] for result in rows.values()], edit)


def check_reached(receipts: Sequence[np.ndarray], edit: Steer | Edit | Also) -> None:
    """Raises EditError where an edit's positions are in none of the texts: receipts [edit, 4], one a text."""
    if edit.when is None and positions.may_miss(edit.positions) and not np.array(receipts)[..., 0].any():
        raise EditError("no prompt has any of the positions: nothing was touched")
