"""Stages `responses` and `responses_judged`: what the model answers under each side's system prompts, and what is kept.

The answers are the texts of contrasts with `generate`: `directing` reads those that are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsteer.models.templates import shown
from nsteer.plan.prompts import Encoded, encode
from nsteer.plan.schema import Contrast, Filter, Responses
from nsteer.program.form import Form, Row
from nsteer.program.randomness import uniforms
from nsteer.runner.asking import Asking
from nsteer.runner.judging import Turn, loaded, remember, scores
from nsteer.runner.model import ModelRun
from nsteer.runner.runs import Clock
from nsteer.runner.writing import decoding, one_bos
from nsteer.science import outcomes
from nsteer.stages import arrays, cells, counting
from nsteer.stages.judges import BESIDE, Asked
from nsteer.stages.keys import ResponseChunk, ResponseRow

STAGE, JUDGED = "responses", "responses_judged"


def written_by(model: ModelRun, name: str) -> tuple[Contrast, Responses]:
    """A contrast of the plan that the model writes, and how."""
    spec = model.plan.directions[name].contrast
    assert spec is not None and spec.generate is not None
    return spec, spec.generate


def respond(model: ModelRun) -> None:
    """Fills the missing cells of `responses` for the current model."""
    path, todo = model.path(STAGE), model.missing(STAGE)
    for name in dict.fromkeys(key.direction for key in todo):
        mine = {key: number for key, number in todo.items() if key.direction == name}
        _, how = written_by(model, name)
        form, clock = Form(decoding=decoding(model, how)), Clock()
        for wave in model.run.waves(STAGE, path, mine, lambda key: counting.response_rows(model.job, key)):
            asked: dict[ResponseRow, Encoded] = {}
            for key in wave:
                with model.run.guarded(STAGE, path, key, mine[key]):
                    asked |= questions(model, key)
            results = model.execute(STAGE, form, [row(model, how, key, prompt) for key, prompt in asked.items()])
            share = clock.share(len(wave))
            for key in wave:
                rows = [row for row in asked if row.cell == key]
                if rows and model.run.came_back(STAGE, path, key, mine[key], rows, results):
                    data = cell_data(model, key, [(asked[row], results.readouts[row]) for row in rows])
                    model.run.commit(path, key, data, mine[key], share)
                    model.run.finished(STAGE, key)


def questions(model: ModelRun, key: ResponseChunk) -> dict[ResponseRow, Encoded]:
    """What the model is shown for each answer of a cell. Raises ModelError."""
    prompts = {}
    for number, question in counting.responses_of(model.job, key).items():
        how = (
            model.executor.tokenizer,
            question.text,
            "always",
            question.system,
            model.study.moment,
            model.plan.chat_arguments,
        )
        prompts[ResponseRow(key, number)] = prompt = encode(*how)
        one_bos(model, f"{key.direction}: a question", prompt)
    return prompts


def row(model: ModelRun, how: Responses, key: ResponseRow, prompt: Encoded) -> Row:
    """The row of one answer; its draws are its own, by the plan's seed and its labels."""
    if not how.sample:
        return Row(key, prompt.tokens)
    cell = key.cell
    labels = (model.plan.seed, "response", cell.direction, cell.side, key.response)
    return Row(key, prompt.tokens, uniform=uniforms(how.max_new_tokens, *labels))


def cell_data(model: ModelRun, key: ResponseChunk, rows: Sequence[tuple[Encoded, Mapping[str, Any]]]) -> xr.Dataset:
    """The dataset of one cell of `responses`."""
    asked = counting.responses_of(model.job, key)
    written = [readout["tokens"] for _, readout in rows]
    width, own = max(max(map(len, written)), 1), ("response",)
    tell = model.executor.tokenizer.decode
    return arrays.dataset(
        {"response": list(asked), "token": range(width)},
        {
            "system": (own, [question.system for question in asked.values()]),
            "question": (own, [shown(question.text) for question in asked.values()]),
            "prompt": (own, [prompt.text for prompt, _ in rows]),
            "text": (own, [tell(tokens, skip_special_tokens=True) for tokens in written]),
            "prompt_tokens": (own, [len(prompt.tokens) for prompt, _ in rows]),
            "generated_tokens": (own, [len(tokens) for tokens in written]),
            "token_id": ((*own, "token"), arrays.ragged(written, width)),
            "program": (own, [readout["program"] for _, readout in rows]),
        },
    )


# ---- what is kept ------------------------------------------------------------------------------------------------


def sift(model: ModelRun) -> None:
    """Fills the missing cells of `responses_judged` for the current model: scores, and which answers are kept."""
    path, todo = model.path(JUDGED), model.missing(JUDGED)
    responses, written = model.wanted(cells.responses), model.path(STAGE)
    gone = model.run.lacking(written, {key: responses[key] for key in todo})
    for key in gone:
        model.run.wait_for(JUDGED, path, key, todo[key], written, key)
    try:
        for name in dict.fromkeys(key.direction for key in todo):
            mine = {key: fp for key, fp in todo.items() if key.direction == name and key not in gone}
            if mine:
                sift_of(model, name, mine)
    finally:
        if model.run.lent is not None:
            model.run.lent.close()


def sift_of(model: ModelRun, name: str, todo: Mapping[ResponseChunk, int]) -> None:
    """The cells of one contrast. Raises ModelError for a judge that can not be loaded."""
    run, path, responses = model.run, model.path(JUDGED), model.wanted(cells.responses)
    by, spec, about, target = cells.filtered_by(model.job, name)
    remember(run, by.judge, spec, about)
    run.lent = run.lent or Asking(run)
    run.lent.borrow(model)
    turn, clock = Turn(run, by.judge, spec, about, loaded(run, by.judge, spec, about)), Clock()
    place = list(turn.reader.classes).index(target)
    for wave in run.waves(JUDGED, path, todo, lambda key: counting.response_rows(model.job, key)):
        asked: dict[ResponseChunk, list[Asked]] = {}
        for key in wave:
            with run.guarded(JUDGED, path, key, todo[key]):
                texts = run.inputs(model.path(STAGE), {key: responses[key]})[key]
                mine = texts.sel({"response": list(counting.responses_of(model.job, key))})
                asked[key] = as_asked(mine, turn, key.model, target)
        scores_by_cell = scores(turn, JUDGED, path, asked, todo)
        share = clock.share(len(wave))
        for key, said in scores_by_cell.items():
            data = judged_data(said, place, kept(said, place, about.threshold, by, key.side))
            numbers = list(counting.responses_of(model.job, key))
            run.commit(path, key, data.assign_coords(response=numbers), todo[key], share)
            run.finished(JUDGED, key)


def as_asked(texts: xr.Dataset, turn: Turn, writer: str, target: str) -> list[Asked]:
    """The answers of a cell as the judge gets them; writer : the model; target : the class whose score counts."""
    whole, about = turn.spec.over == "all", (target,) if turn.about.asks else ()
    return [
        Asked(question + text if whole else text, question, writer, about) if text.strip() else Asked("")
        for question, text in zip(texts.question.values.tolist(), texts.text.values.tolist(), strict=True)
    ]


def judged_data(said: Mapping[str, np.ndarray], place: int, keeps: np.ndarray) -> xr.Dataset:
    """The dataset of one cell of `responses_judged`, of scores [response, class] whose class at a place counts."""
    own, nothing = ("response",), np.full(len(keeps), np.nan, np.float32)
    values = {name: (own, said[name][:, place].astype(np.float32) if name in said else nothing) for name in BESIDE}
    values |= {"score": (own, said["score"][:, place].astype(np.float32)), "kept": (own, keeps)}
    return arrays.dataset({"response": range(len(keeps))}, values)


def kept(said: Mapping[str, np.ndarray], place: int, threshold: float, by: Filter, side: str) -> np.ndarray:
    """Which answers of a side are kept, [response] bool: those on their side of the filter, and coherent enough.

    said : what the judge gave, [response, class]; place : of the class that counts; threshold : see `Known`
    """
    score = said["score"][:, place]
    named = outcomes.says(
        xr.DataArray(said["score"], dims=("response", "class"), coords={"threshold": threshold})
    ).values
    if side == "positive":
        mask = named[:, place] if by.above is None else score > by.above
    else:
        mask = ~named[:, place] if by.below is None else score < by.below
    mask = mask & ~np.isnan(score)
    return mask if by.coherence is None else mask & (said["coherence"][:, place] >= by.coherence)


def kept_of(model: ModelRun, name: str, side: str) -> Iterator[xr.Dataset]:
    """The answers of one side that are kept, a cell at a time; those without a text never are. Raises InputError."""
    spec, _ = written_by(model, name)
    judged = model.wanted(cells.responses_judged)
    for key, number in model.wanted(cells.responses).items():
        if (key.direction, key.side) != (name, side):
            continue
        numbers = list(counting.responses_of(model.job, key))
        texts = model.run.inputs(model.path(STAGE), {key: number})[key].sel({"response": numbers})
        keeps = np.array([bool(text.strip()) for text in texts.text.values.tolist()])
        if spec.filter is not None:
            judgements = model.run.inputs(model.path(JUDGED), {key: judged[key]})[key].sel({"response": numbers})
            keeps &= judgements.kept.values.astype(bool)
        yield texts.isel({"response": np.flatnonzero(keeps)})
