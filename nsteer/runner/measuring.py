"""Stages `outcomes`, `lens` and `anisotropy`: what `measure:` asks of the current model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from nsteer.errors import ExecutionError
from nsteer.plan.prompts import Encoded, encode
from nsteer.program.form import Program, Row
from nsteer.program.form import lens as lens_program
from nsteer.runner.model import ModelRun
from nsteer.runner.prompting import encoded
from nsteer.runner.rows import Results
from nsteer.runner.runs import Clock
from nsteer.runner.steering import Derived
from nsteer.stages import arrays, cells, counting, forms
from nsteer.stages.keys import Condition, Edited, Prompted, TextRow, Unsteered, Vector
from nsteer.stages.table import BY_NAME

# ---- perplexity ---------------------------------------------------------------------------------------------


def outcomes(model: ModelRun) -> None:
    """Perplexities of the steered continuations of the current model."""
    perplexity(model, "outcomes")


def outcomes_unsteered(model: ModelRun) -> None:
    """Perplexities of the unsteered ones."""
    perplexity(model, "outcomes_unsteered")


def outcomes_prompted(model: ModelRun) -> None:
    """Perplexities of those that were asked for in words, given the prompt without the words."""
    perplexity(model, "outcomes_prompted")


def outcomes_edited(model: ModelRun) -> None:
    """Perplexities of those under `edits`."""
    perplexity(model, "outcomes_edited")


def perplexity(model: ModelRun, stage: str) -> None:
    """One teacher-forced forward of every continuation under the unsteered model, in batches over cells."""
    of = BY_NAME[BY_NAME[stage].reads]
    *_, made_from = of.paths(model.job)
    if made_from not in model.run.store.groups():
        return
    continuations = model.run.own_cells(stage, model.wanted(of.cells))
    there = set(continuations) - set(model.run.store.missing(made_from, continuations))
    wanted = {key: fp for key, fp in model.wanted(BY_NAME[stage].cells).items() if key in there}
    todo = model.run.missing(stage, stage, wanted, model)
    if not todo:
        return
    clock = Clock()
    for wave in model.run.waves(stage, stage, todo, lambda key: counting.text_rows(model.job, key)):
        texts: dict[tuple, xr.Dataset] = {}
        for key in wave:
            with model.run.guarded(stage, stage, key, todo[key]):
                texts |= model.run.inputs(made_from, {key: continuations[key]})
        seeds = {key: model.job.texts_of(key).seeds for key in texts}
        prompts = {key: encoded(model, model.job.texts_of(key)) for key in texts}
        rows = {key: list(scored(key, texts[key], prompts[key], seeds[key])) for key in wave if key in texts}
        results = model.execute("outcomes", forms.score(), [row for mine in rows.values() for row in mine])
        share = clock.share(len(wave))
        for key, mine in rows.items():
            if not model.run.came_back(stage, stage, key, todo[key], [row.key for row in mine], results):
                continue
            data = outcome_data(results.readouts, key, texts[key], list(prompts[key]), seeds[key])
            model.run.commit(stage, key, data, todo[key], share)
            model.run.finished(stage, key)


Texts = Condition | Unsteered | Prompted | Edited
"""The key of a cell of continuations."""


def scored(key: Texts, texts: xr.Dataset, prompts: Mapping[str, Encoded], seeds: Sequence[int]) -> Iterator[Row]:
    """A cell's rows: prompt and continuation, of which the continuation counts. Empty continuations make none."""
    for label, prompt in prompts.items():
        for seed in seeds:
            text = texts.sel({"prompt": label, "seed": seed})
            new = tuple(int(t) for t in text.token_id.values[: int(text.n_tokens)])
            weights = np.r_[np.zeros(len(prompt.tokens)), np.ones(len(new))].astype(np.float32)
            if new:
                yield Row(TextRow(key, label, seed), prompt.tokens + new, {"score": weights})


def outcome_data(
    readouts: Mapping[TextRow, Mapping[str, Any]],
    key: Texts,
    texts: xr.Dataset,
    prompts: list[str],
    seeds: Sequence[int],
) -> xr.Dataset:
    """Log-probability (nats) and perplexity exp(-log P / n) of a cell's continuations; NaN for empty ones."""
    shape = (len(prompts), len(seeds))
    logp = [readouts.get(TextRow(key, p, s), {}).get("score", np.nan) for p in prompts for s in seeds]
    total = np.array(logp, np.float64).reshape(shape)
    n = texts.n_tokens.sel({"prompt": prompts, "seed": list(seeds)}).transpose("prompt", "seed").values
    dims = ("prompt", "seed")
    return arrays.dataset(
        {"prompt": prompts, "seed": seeds},
        {
            "log_probability": (dims, total.astype(np.float32)),
            "perplexity": (dims, np.exp(-total / np.maximum(n, 1)).astype(np.float32)),
        },
    )


# ---- logit lens ---------------------------------------------------------------------------------------------


def lens(model: ModelRun) -> None:
    """The tokens that each vector promotes most: unembedding · vector, at every layer."""
    measure, path, todo = model.plan.measure, model.path("lens"), model.missing("lens")
    if not todo or measure is None:
        return
    todo = Derived(model).ready("lens", path, todo, lambda key: [(key.method, key.emotion)])
    layers, vectors = list(model.job.layers), model.wanted(cells.vectors)
    for wave in model.run.waves("lens", path, todo, lambda key: len(layers)):
        cell_vectors: dict[Vector, np.ndarray] = {}
        for key in wave:
            with model.run.guarded("lens", path, key, todo[key]):
                data = model.kept_input(model.path("vectors"), key, vectors[key])
                cell_vectors[key] = data.vector.sel({"layer": layers}).values
        if not cell_vectors:
            continue
        results = promoted(model, lens_program(measure.lens, np.concatenate(list(cell_vectors.values()))))
        for i, key in enumerate(cell_vectors):
            rows = range(i * len(layers), (i + 1) * len(layers))
            if not model.run.came_back("lens", path, key, todo[key], rows, results):
                continue
            logits, ids = (np.stack([results.readouts[row][name] for row in rows]) for name in PROMOTED)
            tokens = [[model.executor.tokenizer.decode([int(t)]) for t in row] for row in ids]
            dims = ("layer", "rank")
            data = arrays.dataset(
                {"layer": layers, "rank": range(measure.lens)},
                {"token": (dims, tokens), "token_id": (dims, ids.astype(np.int32)), "logit": (dims, logits)},
            )
            model.run.commit(path, key, data, todo[key], 0.0)
            model.run.finished("lens", key)


PROMOTED = ("promoted", "promoted_tokens")


def promoted(model: ModelRun, program: Program) -> Results:
    """What came of a logit lens, by the places of its vectors."""
    results = Results()
    for batch, readouts in model.put([program]):
        model.run.program_name("lens", model.executor.code(batch))
        for i, place in enumerate(batch.keys):
            if isinstance(readouts, ExecutionError):
                results.failed[place] = readouts
            else:
                results.readouts[place] = readouts.row(i)
    return results


# ---- anisotropy ---------------------------------------------------------------------------------------------


def anisotropy(model: ModelRun) -> None:
    """Last-token streams of the neutral sentences at every layer, with the leading BOS and without it."""
    facts, texts, todo = model.facts, model.study.texts, model.missing("anisotropy")
    if not todo or texts is None:
        return
    form = forms.sentences(facts.n_layers)
    sentences = [encode(model.executor.tokenizer, text) for text in texts.neutral_sentences]
    has_bos = model.executor.tokenizer.bos_token_id is not None
    if not has_bos:
        model.warn("its tokenizer has no BOS, so anisotropy with BOS is a missing value")
    elif not any(sentence.bos for sentence in sentences):
        model.warn("its tokenizer adds no BOS, so anisotropy with BOS is taken by adding it")
    path = model.path("anisotropy")
    for wave in model.run.waves("anisotropy", path, todo):
        for key in wave:
            rows = []
            for i, sentence in enumerate(sentences):
                tokens = with_bos(model, sentence) if key.bos == "with" else sentence.tokens[sentence.bos :]
                if tokens:
                    rows.append(Row(i, tokens, {"text": np.eye(len(tokens), dtype=np.float32)[-1]}))
            results = model.execute("anisotropy", form, rows) if rows else Results()
            if not model.run.came_back("anisotropy", path, key, todo[key], [row.key for row in rows], results):
                continue
            missing = np.full((facts.n_layers, facts.d_model), np.nan, np.float32)
            places = list(range(len(sentences)))
            pooled = np.stack([results.readouts[i]["pooled"] if i in results.readouts else missing for i in places])
            labels = {"sentence": places, "layer": range(facts.n_layers), "d_model": range(facts.d_model)}
            data = arrays.dataset(labels, {"pooled": (tuple(labels), pooled)})
            model.run.commit(path, key, data, todo[key], 0.0)
            model.run.finished("anisotropy", key)


def with_bos(model: ModelRun, sentence: Encoded) -> tuple[int, ...]:
    """The sentence's ids behind BOS; () where the tokenizer has none."""
    if sentence.bos:
        return sentence.tokens
    bos = model.executor.tokenizer.bos_token_id
    return () if bos is None else (int(bos), *sentence.tokens)
