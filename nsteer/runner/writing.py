"""Stage `samples`: what each sample shows, and what the model wrote for it, into the store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nsteer.models import templates
from nsteer.plan.prompts import Encoded, encode, sample_text, system_text, uses_chat
from nsteer.plan.schema import Generate, Method
from nsteer.program.form import Decoding, Form, Row
from nsteer.program.randomness import uniforms
from nsteer.runner import sharing
from nsteer.runner.model import ModelRun
from nsteer.runner.rows import Results
from nsteer.runner.runs import Clock
from nsteer.stages import arrays, cells, forms
from nsteer.stages.counting import samples_of
from nsteer.stages.keys import SampleChunk, SampleRow

STAGE = "samples"


def write(model: ModelRun) -> None:
    """Fills the missing cells of `samples` for the current model."""
    path, every = model.path(STAGE), model.missing(STAGE)
    todo, copies = sharing.parted(model, path, every)
    for name, method in model.plan.methods.items():
        mine = {key: fp for key, fp in todo.items() if key.method == name}
        if mine and method.source == "generation" and method.chat == "auto":
            warn_without_template(model, name)
        clock = Clock()
        for wave in model.run.waves(STAGE, path, mine, lambda key: len(samples_of(model.job, key))):
            prompts: dict[SampleRow, tuple[str, Encoded]] = {}
            for key in wave:
                with model.run.guarded(STAGE, path, key, mine[key]):
                    prompts |= {row: shown(model, method, row) for row in rows_of(model, key)}
            texts = generated(model, name, method, prompts) if method.source == "generation" else None
            share = clock.share(len(wave))
            for key in wave:
                rows = rows_of(model, key)
                if not all(row in prompts for row in rows):
                    continue  # said above
                if texts is None or model.run.came_back(STAGE, path, key, mine[key], rows, texts):
                    data = cell_data(model, method, key, prompts, texts.readouts if texts else {})
                    model.run.commit(path, key, data, mine[key], share)
                    model.run.finished(STAGE, key)
                    empty(model, key, data)
    sharing.copy(model, STAGE, path, every, copies)


def warn_without_template(model: ModelRun, name: str) -> None:
    """Says so when a method that would use a chat template finds none."""
    if not uses_chat(model.executor.tokenizer, "auto"):
        model.warn(f"{name}: its tokenizer has no chat template, so instructions go in without one")


def rows_of(model: ModelRun, key: SampleChunk) -> list[SampleRow]:
    """The rows of a cell."""
    return [SampleRow(key, sample) for sample in samples_of(model.job, key)]


def empty(model: ModelRun, key: SampleChunk, data: Any) -> None:
    """Says which texts are empty: the model ended at once, and there is little to read."""
    bare = [k for k, text in zip(data["sample"].values.tolist(), data["text"].values, strict=True) if not text.strip()]
    if bare:
        model.warn(f"{key.method}, {key.emotion}: the text of sample {', '.join(map(str, bare))} is empty")


def shown(model: ModelRun, method: Method, row: SampleRow) -> tuple[str, Encoded]:
    """A sample's instruction or passage, and its encoding."""
    texts = model.study.texts
    assert texts is not None
    which = (method, texts, row.cell.emotion, row.sample)
    text, system = sample_text(*which), system_text(*which)
    told = model.plan.chat_arguments
    encoding = encode(model.executor.tokenizer, text, method.chat, system, model.study.moment, told)
    one_bos(model, f"{row.cell.method}: a text", encoding)
    return templates.shown(text), encoding


def one_bos(model: ModelRun, what: str, text: Encoded) -> None:
    """Says so when a text writes the BOS that the tokenizer, or the chat template, adds."""
    if text.doubled:
        model.warn(f"{what} begins with BOS, which is added anyway: the model gets one")


def decoding(model: ModelRun, generate: Generate) -> Decoding:
    """A plan's decoding with the ids of the current model."""
    return forms.decoding(generate, model.ends)


def generated(model: ModelRun, name: str, method: Method, prompts: Mapping[SampleRow, tuple[str, Encoded]]) -> Results:
    """What the model writes for every prompt. Greedy rows that are alike are run once."""
    form = Form(decoding=decoding(model, method.generate))
    same: dict[Any, list[SampleRow]] = {}
    rows = []
    for target, (_, prompt) in prompts.items():
        emotion, sample = target.cell.emotion, target.sample
        drawn = None
        if method.generate.sample:
            drawn = uniforms(
                method.generate.max_new_tokens, model.plan.seed, cells.drawn_as(name, method), emotion, sample
            )
        key = (prompt.tokens, None if drawn is None else (emotion, sample))
        if key not in same:
            rows.append(Row(key, prompt.tokens, uniform=drawn))
        same.setdefault(key, []).append(target)
    results = model.execute(STAGE, form, rows)
    readouts = {target: what for key, what in results.readouts.items() for target in same[key]}
    failed = {target: why for key, why in results.failed.items() for target in same[key]}
    return Results(readouts, failed)


def cell_data(
    model: ModelRun,
    method: Method,
    key: SampleChunk,
    prompts: Mapping[SampleRow, tuple[str, Encoded]],
    texts: Mapping[SampleRow, Mapping[str, Any]],
) -> Any:
    """The dataset of one cell of `samples`."""
    tokenizer = model.executor.tokenizer
    rows = rows_of(model, key)
    samples = [row.sample for row in rows]
    pairs = [prompts[row] for row in rows]
    written = [texts[row]["tokens"] if texts else () for row in rows]
    shown_texts = [
        tokenizer.decode(w, skip_special_tokens=True) if texts else p[0] for w, p in zip(written, pairs, strict=True)
    ]
    width = max(max(map(len, written)), 1)
    own = ("sample",)
    chat = uses_chat(tokenizer, method.chat)
    return arrays.dataset(
        {"sample": samples, "token": range(width)},
        {
            "instruction": (own, [text for text, _ in pairs]),
            "prompt": (own, [encoded.text for _, encoded in pairs]),
            "text": (own, shown_texts),
            "chat": (own, [chat] * len(samples)),
            "prompt_tokens": (own, [len(encoded.tokens) for _, encoded in pairs]),
            "generated_tokens": (own, [len(tokens) for tokens in written]),
            "token_id": (("sample", "token"), arrays.ragged(written, width)),
        },
    )
