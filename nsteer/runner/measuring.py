"""Stages `outcomes`, `lens` and `anisotropy`: what `measure:` asks of the model at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import xarray as xr

from nsteer.errors import ExecutionError
from nsteer.plan.layers import resolve
from nsteer.plan.prompts import Encoded, encode
from nsteer.plan.schema import Steer
from nsteer.program.form import Form, Program, ReadSite, Row
from nsteer.program.form import lens as lens_program
from nsteer.runner.rows import Results
from nsteer.runner.session import Clock, Session
from nsteer.runner.steering import Derived, encoded_prompts
from nsteer.stages import arrays, cells, forms
from nsteer.store import slug

CONTINUED = {"outcomes": "generations", "outcomes_unsteered": "unsteered"}


def measure(session: Session) -> None:
    """Fills the missing cells of everything that `measure:` names, for the model at hand."""
    plan = session.study.plan
    assert plan.measure is not None
    if plan.measure.perplexity and plan.steer:
        for path, made_from in CONTINUED.items():
            if made_from in session.store.groups():
                perplexity(session, path, made_from)
    if plan.measure.lens and plan.methods:
        lens(session)
    if plan.measure.anisotropy:
        anisotropy(session)


# ---- perplexity ---------------------------------------------------------------------------------------------


def perplexity(session: Session, path: str, made_from: str) -> None:
    """One teacher-forced forward of every continuation under the unsteered model, in batches over cells."""
    facts = session.facts
    assert facts is not None
    of = cells.steering if made_from == "generations" else cells.unsteered
    made = session.mine(path, session.wanted(of))
    there = set(made) - set(session.store.missing(made_from, made))
    todo = session.missing(path, path, {key: fp for key, fp in cells.outcomes(made).items() if key in there})
    if not todo:
        return
    blocks = {cells.op_label(block): block for block in session.study.plan.steer}
    prompts = {label: encoded_prompts(session, blocks[label]) for label in dict.fromkeys(key[1] for key in todo)}
    clock = Clock()
    for wave in session.waves(path, path, todo, lambda key: len(prompts[key[1]]) * len(blocks[key[1]].seeds)):
        texts: dict[tuple, xr.Dataset] = {}
        for key in wave:
            with session.guarded(path, path, key, todo[key]):
                texts |= session.inputs(made_from, {key: made[key]})
        rows = {key: list(scored(key, texts[key], prompts[key[1]], blocks[key[1]])) for key in texts}
        results = session.execute("outcomes", forms.score(), [row for one in rows.values() for row in one])
        share = clock.share(len(wave))
        for key in texts:
            if not session.came_back(path, path, key, todo[key], [row.key for row in rows[key]], results):
                continue
            data = outcome_data(results.found, key, texts[key], list(prompts[key[1]]), blocks[key[1]].seeds)
            session.commit(path, path, key, data, todo[key], share)
            session.finished(path, key)


def scored(key: tuple, texts: xr.Dataset, prompts: Mapping[str, Encoded], block: Steer) -> Iterator[Row]:
    """A cell's rows: prompt and continuation, of which the continuation counts. Empty continuations make none."""
    for label, prompt in prompts.items():
        for seed in block.seeds:
            one = texts.sel({"prompt": label, "seed": seed})
            new = tuple(int(t) for t in one.token_id.values[: int(one.n_tokens)])
            weights = np.r_[np.zeros(len(prompt.tokens)), np.ones(len(new))].astype(np.float32)
            if new:
                yield Row((key, label, seed), prompt.tokens + new, {"score": weights})


def outcome_data(found: Mapping, key: tuple, texts: xr.Dataset, prompts: list[str], seeds: Sequence[int]) -> xr.Dataset:
    """Log-probability (nats) and perplexity exp(-log P / n) of a cell's continuations; NaN for empty ones."""
    shape = (len(prompts), len(seeds))
    logp = [found.get((key, p, s), {}).get("score", np.nan) for p in prompts for s in seeds]
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


def lens(session: Session) -> None:
    """The tokens that each vector promotes most: unembedding · vector, at every layer."""
    facts, plan = session.facts, session.study.plan
    assert facts is not None and plan.measure is not None
    path = f"lens/{slug(facts.label)}"
    wanted = {(facts.label, *key): fp for key, fp in session.wanted(cells.lens).items()}
    todo = session.missing("lens", path, wanted)
    if not todo:
        return
    todo = Derived(session).ready("lens", path, todo, lambda key: [(key[1], key[2])])
    layers, vectors = list(resolve(plan.layers, facts.n_layers)), session.wanted(cells.vectors)
    for wave in session.waves("lens", path, todo, lambda key: len(layers)):
        made: dict[tuple, np.ndarray] = {}
        for key in wave:
            with session.guarded("lens", path, key, todo[key]):
                one = session.kept_input(f"vectors/{slug(facts.label)}", key, vectors[key[1:]])
                made[key] = one.vector.sel({"layer": layers}).values
        if not made:
            continue
        results = promoted(session, lens_program(plan.measure.lens, np.concatenate(list(made.values()))))
        for i, key in enumerate(made):
            rows = range(i * len(layers), (i + 1) * len(layers))
            if not session.came_back("lens", path, key, todo[key], rows, results):
                continue
            logits, ids = (np.stack([results.found[row][name] for row in rows]) for name in PROMOTED)
            tokens = [[session.executor.tokenizer.decode([int(t)]) for t in row] for row in ids]
            dims = ("layer", "rank")
            data = arrays.dataset(
                {"layer": layers, "rank": range(plan.measure.lens)},
                {"token": (dims, tokens), "token_id": (dims, ids.astype(np.int32)), "logit": (dims, logits)},
            )
            session.commit("lens", path, key, data, todo[key], 0.0)
            session.finished("lens", key)


PROMOTED = ("promoted", "promoted_tokens")


def promoted(session: Session, program: Program) -> Results:
    """What came of a logit lens, by the places of its vectors."""
    results = Results()
    for part, found in session.put([program]):
        session.source("lens", session.executor.source(part))
        for i, place in enumerate(part.keys):
            if isinstance(found, ExecutionError):
                results.failed[place] = found
            else:
                results.found[place] = found.row(i)
    return results


# ---- anisotropy ---------------------------------------------------------------------------------------------


def anisotropy(session: Session) -> None:
    """Last-token streams of the neutral sentences at every layer, with the leading BOS and without it."""
    facts, texts = session.facts, session.study.texts
    assert facts is not None
    wanted = {(facts.label, *key): fp for key, fp in session.wanted(cells.anisotropy).items()}
    todo = session.missing("anisotropy", f"anisotropy/{slug(facts.label)}", wanted) if wanted else {}
    if not todo:
        return
    assert texts is not None
    form = Form(reads=tuple(ReadSite(layer) for layer in range(facts.n_layers)))
    sentences = [encode(session.executor.tokenizer, text) for text in texts.neutral_sentences]
    has_bos = session.executor.tokenizer.bos_token_id is not None
    if not has_bos:
        session.warn("its tokenizer has no BOS, so anisotropy with BOS is a hole")
    elif not any(sentence.bos for sentence in sentences):
        session.warn("its tokenizer adds no BOS, so anisotropy with BOS is taken by adding it")
    path = f"anisotropy/{slug(facts.label)}"
    for wave in session.waves("anisotropy", path, todo):
        for key in wave:
            rows = []
            for i, sentence in enumerate(sentences):
                tokens = with_bos(session, sentence) if key[1] == "with" else sentence.tokens[sentence.bos :]
                if tokens:
                    rows.append(Row(i, tokens, {"text": np.eye(len(tokens), dtype=np.float32)[-1]}))
            results = session.execute("anisotropy", form, rows) if rows else Results()
            if not session.came_back("anisotropy", path, key, todo[key], [row.key for row in rows], results):
                continue
            hole = np.full((facts.n_layers, facts.d_model), np.nan, np.float32)
            places = list(range(len(sentences)))
            pooled = np.stack([results.found[i]["pooled"] if i in results.found else hole for i in places])
            labels = {"sentence": places, "layer": range(facts.n_layers), "d_model": range(facts.d_model)}
            data = arrays.dataset(labels, {"pooled": (tuple(labels), pooled)})
            session.commit("anisotropy", path, key, data, todo[key], 0.0)
            session.finished("anisotropy", key)


def with_bos(session: Session, sentence: Encoded) -> tuple[int, ...]:
    """The sentence's ids behind BOS; () where the tokenizer has none."""
    if sentence.bos:
        return sentence.tokens
    bos = session.executor.tokenizer.bos_token_id
    return () if bos is None else (int(bos), *sentence.tokens)
