"""Stages `unsteered` and `steering`: continuations with and without edits, and their receipts, into the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from nsteer.errors import EditError, ModelError
from nsteer.plan import positions
from nsteer.plan.check import also_rests_on, layer_sets, rests_on
from nsteer.plan.layers import resolve
from nsteer.plan.prompts import Encoded, encode, located, prompt_set, token_ids
from nsteer.plan.schema import Also, Calibrated, Edit, Steer
from nsteer.program.form import Row
from nsteer.program.ops import ACTING_AT_ZERO
from nsteer.runner.editing import RowMaker, further_name, numbers, usable
from nsteer.runner.session import Clock, LoadError, Session, check_receipt
from nsteer.runner.sources import there, vectors_of
from nsteer.runner.writing import decoding, one_bos
from nsteer.stages import arrays, cells, forms
from nsteer.store import slug

PLAIN, STEERED = "unsteered", "steering"
GROUPS = ("steering", "generations")
"""Where a cell of the grid is kept; it is done when it is in the last."""


def steer(session: Session) -> None:
    """Fills the missing cells of `unsteered`, `generations` and `steering` for the model at hand."""
    facts = session.facts
    assert facts is not None
    for index, block in enumerate(session.study.plan.steer):
        settings(session, index, block)
    derived = Derived(session)
    plain = session.wanted(cells.unsteered)
    todo = session.missing(PLAIN, PLAIN, plain) if plain else {}
    for block in session.study.plan.steer:
        mine = {key: fp for key, fp in todo.items() if key == (facts.label, cells.op_label(block))}
        if block.project:
            mine = derived.ready(PLAIN, PLAIN, mine, partial(projected_on, session, block))
        for wave in session.waves(PLAIN, PLAIN, mine):
            for key in wave:
                with session.guarded(PLAIN, PLAIN, key, mine[key]):
                    continue_plain(session, block, key, mine[key])
    todo = session.missing(STEERED, GROUPS, session.wanted(cells.steering))
    for block in session.study.plan.steer:
        for layer_set, layers in layer_sets(block.layers, facts.n_layers).items():
            mine = {k: fp for k, fp in todo.items() if k[1] == cells.op_label(block) and k[2] == layer_set}
            mine = derived.ready(STEERED, GROUPS[-1], mine, partial(needed, session, block))
            strengths = calibrated(session, block, mine)
            mine = {key: mine[key] for key in strengths}
            if mine:
                steer_cells(session, block, layers, mine, strengths)


def calibrated(session: Session, block: Steer, todo: Mapping[tuple, int]) -> dict[tuple, float]:
    """The strength of every cell: its label, or what was found for it. Cells for which there is none wait or fail."""
    if not isinstance(block.strengths, Calibrated) or not todo:
        return {key: key[5] for key in todo}
    wanted, path = session.wanted(cells.calibration), "calibration"
    gone, found = session.lacking(path, wanted), {}
    for key, number in todo.items():
        by = cells.calibrated_by(block, key)
        if by in gone:
            session.wait_for(STEERED, GROUPS[-1], key, number, path, by)
            continue
        with session.guarded(STEERED, GROUPS[-1], key, number):
            one = session.kept_input(path, by, wanted[by])
            if not np.isfinite(one.found):
                session.fail(STEERED, GROUPS[-1], key, number, f"no strength for {key[5]:g}: {one.reason.item()}")
            else:
                found[key] = float(one.found)
    return found


def projected_on(session: Session, block: Steer, key: tuple) -> list[tuple[str, str]]:
    """(method, emotion) of every vector that the streams of an unsteered cell are projected on."""
    return all_of(session, cells.steered_methods(session.study.plan, block))


def needed(session: Session, block: Steer, key: tuple) -> list[tuple[str, str]]:
    """(method, emotion) of every vector that a cell of the grid rests on."""
    gate = [(key[3], block.when.direction)] if block.when is not None and block.when.direction is not None else []
    own = rests_on(session.study.plan, block, key[3], key[4])
    further = also_rests_on(session.study.plan, block, key[3])
    every = dict.fromkeys(method for method, _ in own) if key[6] == "shuffled" else ()  # labels are dealt among all
    return [*own, *further, *gate, *all_of(session, list(every)), *(all_of(session, [key[3]]) if block.project else [])]


def all_of(session: Session, methods: Sequence[str]) -> list[tuple[str, str]]:
    return [(method, emotion) for method in methods for emotion in session.study.plan.emotion_labels()]


class Derived:
    """Which vectors of the model at hand are in the store as the plan wants them, and which can be used."""

    def __init__(self, session: Session):
        self.session, facts = session, session.facts
        assert facts is not None
        self.path = f"vectors/{slug(facts.label)}"
        wanted = {(facts.label, *key): fp for key, fp in session.wanted(cells.vectors).items()}
        self.gone = session.lacking(self.path, wanted)

    def ready(
        self, stage: str, path: str, todo: Mapping[tuple, int], rests_on: Callable[[tuple], list[tuple[str, str]]]
    ) -> dict[tuple, int]:
        """The cells whose vectors are all there; the others wait."""
        found = {}
        for key, fp in todo.items():
            absent = [one for one in ((key[0], *pair) for pair in rests_on(key)) if one in self.gone]
            if absent:
                self.session.wait_for(stage, path, key, fp, self.path, absent[0])
            else:
                found[key] = fp
        return found


def settings(session: Session, index: int, block: Steer) -> None:
    """What the block's label means, kept beside the cube that uses it."""
    from nsteer.system.fingerprints import fingerprint

    data = arrays.settings_data(session.study, index)
    key, wanted = (cells.op_label(block),), fingerprint([data.settings.item(), data.prompt_text.values.tolist()])
    if session.study.only is not None and key in session.store.committed("ops"):
        return  # a search walks through strengths of its own: what the label means stands there
    if session.store.missing("ops", {key: wanted}):
        session.store.commit("ops", key, data, fingerprint=wanted, run=session.run)


def encoded_prompts(session: Session, block: Steer) -> dict[str, Encoded]:
    return encode_all(session, block.prompts, block.chat, [edit.positions for edit in edits_of(block)])


def prompts_of(
    session: Session, block: Steer, stage: str, path: str, todo: Mapping[tuple, int]
) -> dict[str, Encoded] | None:
    """The block's prompts by label; None where they or its words are refused, which fails all its cells."""
    try:
        prompts = encoded_prompts(session, block)
        check_words(session, block)
    except LoadError:
        raise
    except ModelError as error:  # a prompt without a token, a template or a word that is refused
        for key, number in todo.items():
            session.fail(stage, path, key, number, str(error))
        return None
    return prompts


def edits_of(block: Steer) -> list[Steer | Also]:
    return [block, *block.also]


def check_words(session: Session, block: Steer) -> None:
    """Raises ModelError where a token that an edit of the block names is none of the model's."""
    for edit in edits_of(block):
        named = [one for _, part in positions.parts(edit.positions) for one in positions.many(part.get("ids", []))]
        token_ids(session.executor.tokenizer, [*((edit.when.after if edit.when else None) or ()), *named])


def encode_all(session: Session, prompts: Any, chat: str, where: Sequence[Any]) -> dict[str, Encoded]:
    """Prompts by label; with the characters of their tokens where some of the positions `where` rest on them."""
    texts, tokenizer = prompt_set(prompts, session.study.texts), session.executor.tokenizer
    moment = session.study.moment
    found = {label: encode(tokenizer, text, chat, moment=moment) for label, text in texts.items()}
    for label, one in found.items():
        one_bos(session, f"the prompt {label[:40]!r}", one)
    if not any(map(positions.sought, where)):
        return found
    return {label: located(tokenizer, one, texts[label], chat, moment) for label, one in found.items()}


def continue_plain(session: Session, block: Steer, key: tuple, fingerprint: int) -> None:
    """One cell of `unsteered`: every prompt and seed, no edit."""
    prompts, clock = encoded_prompts(session, block), Clock()
    form = forms.plain(block, projected(session), decoding(session, block.generate))
    rows = [
        Row((label, seed), prompt.tokens, uniform=numbers(session, block, label, seed))
        for label, prompt in prompts.items()
        for seed in block.seeds
    ]
    results = session.execute(PLAIN, form, rows)
    if not session.came_back(PLAIN, PLAIN, key, fingerprint, [row.key for row in rows], results):
        return
    found = {row: with_text(session, result) for row, result in results.found.items()}
    data = arrays.texts_data(list(prompts), block.seeds, found)
    if block.project:
        plain_projections(session, block, key, found, fingerprint)
    session.commit(PLAIN, PLAIN, key, data, fingerprint, clock.share(1))
    session.finished(PLAIN, key)


def projected(session: Session) -> tuple[int, ...]:
    """The layers whose streams are projected: those with vectors."""
    assert session.facts is not None
    return resolve(session.study.plan.layers, session.facts.n_layers)


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


def plain_projections(session: Session, block: Steer, key: tuple, rows: Mapping[tuple, Any], fingerprint: int) -> None:
    assert session.facts is not None
    emotions = session.study.plan.emotion_labels()
    methods = cells.steered_methods(session.study.plan, block)
    made = [there(session, method, vectors_of(session, method), emotions) for method in methods]
    vectors = xr.concat([one.sel({"emotion": emotions}) for one in made], xr.Variable("method", methods))
    data = projections(vectors, projected(session), rows, block)
    session.commit(PLAIN, "projections_unsteered", key, data, fingerprint, 0.0)


def steered_projections(
    session: Session, block: Steer, key: tuple, vectors: xr.DataArray, rows: Mapping[tuple, Any], fingerprint: int
) -> None:
    data = projections(vectors, projected(session), rows, block)
    session.commit(STEERED, "projections", key, data, fingerprint, 0.0)


def with_text(session: Session, result: Mapping[str, Any]) -> dict[str, Any]:
    return {**result, "text": session.executor.tokenizer.decode(result["tokens"], skip_special_tokens=True)}


def steer_cells(
    session: Session,
    block: Steer,
    layers: Sequence[int],
    todo: Mapping[tuple, int],
    strengths: Mapping[tuple, float],
) -> None:
    """The missing cells of one block and layer set. All their rows share one form, so they travel together."""
    assert session.facts is not None
    form = forms.steer(block, layers, projected(session), decoding(session, block.generate), session.facts.n_layers)
    prompts = prompts_of(session, block, STEERED, GROUPS[-1], todo)
    if prompts is None:
        return
    facts, methods = session.facts, {key[3] for key in todo}
    makers = {method: RowMaker(session, facts, block, layers, method, strengths) for method in methods}
    clock = Clock()
    for wave in session.waves(STEERED, GROUPS, todo, lambda key: len(prompts) * len(block.seeds)):
        good = [key for key in wave if usable(makers[key[3]], STEERED, GROUPS[-1], key, todo[key])]
        results = session.execute(STEERED, form, [row for key in good for row in makers[key[3]].rows(key, prompts)])
        share = clock.share(len(wave))
        for key in good:
            names = [(key, label, seed) for label in prompts for seed in block.seeds]
            if not session.came_back(STEERED, GROUPS[-1], key, todo[key], names, results):
                continue
            mine = {name[1:]: with_text(session, results.found[name]) for name in names}
            keep(session, block, layers, key, mine, list(prompts), todo[key], share, makers[key[3]].vectors)


def keep(
    session: Session,
    block: Steer,
    layers: Sequence[int],
    key: tuple,
    rows: Mapping[tuple, Mapping[str, Any]],
    prompts: list[str],
    fingerprint: int,
    seconds: float,
    vectors: xr.DataArray,
) -> None:
    """Commits one cell: its receipts and its texts. An edit that did nothing is a failure, not a result."""
    assert session.facts is not None
    number = [one for _, _, one in forms.together(block, layers, session.facts.n_layers)]
    own = [i for i, one in enumerate(number) if one == forms.OWN]
    try:
        check_cell(rows, own, block, key[5])
        for place, one in enumerate(block.also):
            try:
                check_cell(rows, [i for i, other in enumerate(number) if other == place], one, one.strength)
            except EditError as error:
                raise EditError(f"{further_name(block, place)}: {error}") from None
    except EditError as error:
        session.fail(STEERED, GROUPS[-1], key, fingerprint, str(error))
        return
    if block.project:
        steered_projections(session, block, key, vectors, rows, fingerprint)
    receipts = np.array([[rows[label, seed]["receipts"] for seed in block.seeds] for label in prompts])
    if block.also:
        further = arrays.further_data(receipts, number, prompts, block.seeds)
        session.commit(STEERED, "steering_also", key, further, fingerprint, 0.0)
    values = arrays.receipt_values(receipts[:, :, own])
    dims = ("prompt", "seed", "layer")
    numbers = arrays.dataset(
        {"prompt": prompts, "seed": block.seeds, "layer": layers},
        {name: (dims, values[..., i].astype(np.float32)) for i, name in enumerate(arrays.RECEIPT)},
    )
    session.commit(STEERED, STEERED, key, numbers, fingerprint, seconds)
    session.commit(STEERED, "generations", key, arrays.texts_data(prompts, block.seeds, rows), fingerprint, seconds)
    session.finished(STEERED, key)


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
