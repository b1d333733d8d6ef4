"""Stage `samples`: what each sample shows, and what the model wrote for it, into the store."""

from __future__ import annotations

from typing import Any

from nsteer.plan.prompts import Encoded, encode, sample_text, system_text, uses_chat
from nsteer.plan.schema import Generate, Method
from nsteer.program.form import Decoding, Form, Row
from nsteer.program.randomness import uniforms
from nsteer.runner import sharing
from nsteer.runner.rows import Results
from nsteer.runner.session import Clock, Session
from nsteer.runner.sharing import numbers
from nsteer.stages import arrays, cells, forms
from nsteer.store import slug

STAGE = "samples"


def write(session: Session) -> None:
    """Fills the missing cells of `samples` for the model at hand."""
    facts = session.facts
    assert facts is not None
    path = f"samples/{slug(facts.label)}"
    wanted = {(facts.label, *key): fp for key, fp in session.wanted(cells.samples).items()}
    every = session.missing(STAGE, path, wanted)
    todo, copies = sharing.parted(session, path, every)
    for name, method in session.study.plan.methods.items():
        mine = {key: fp for key, fp in todo.items() if key[1] == name}
        if mine and method.source == "generation" and method.chat == "auto":
            plain_text(session, name)
        clock = Clock()
        for wave in session.waves(STAGE, path, mine, lambda key: len(numbers(session, key))):
            prompts: dict[tuple, tuple[str, Encoded]] = {}
            for key in wave:
                with session.guarded(STAGE, path, key, mine[key]):
                    prompts |= {(key, k): shown(session, method, key, k) for k in numbers(session, key)}
            texts = generated(session, name, method, prompts) if method.source == "generation" else None
            share = clock.share(len(wave))
            for key in wave:
                rows = [(key, k) for k in numbers(session, key)]
                if not all(row in prompts for row in rows):
                    continue  # said above
                if texts is None or session.came_back(STAGE, path, key, mine[key], rows, texts):
                    data = cell_data(session, method, key, prompts, texts.found if texts else {})
                    session.commit(STAGE, path, key, data, mine[key], share)
                    session.finished(STAGE, key)
                    empty(session, key, data)
    sharing.copy(session, STAGE, path, every, copies)


def plain_text(session: Session, name: str) -> None:
    """Says so when a method that would use a chat template finds none."""
    if not uses_chat(session.executor.tokenizer, "auto"):
        session.warn(f"{name}: its tokenizer has no chat template, so instructions go in as plain text")


def empty(session: Session, key: tuple, data: Any) -> None:
    """Says which texts are empty: the model ended at once, and there is little to read."""
    bare = [k for k, text in zip(data["sample"].values.tolist(), data["text"].values, strict=True) if not text.strip()]
    if bare:
        session.warn(f"{key[1]}, {key[2]}: the text of sample {', '.join(map(str, bare))} is empty")


def shown(session: Session, method: Method, key: tuple, sample: int) -> tuple[str, Encoded]:
    """A sample's instruction or passage, and its encoding."""
    texts = session.study.texts
    assert texts is not None
    text, system = sample_text(method, texts, key[2], sample), system_text(method, texts, key[2], sample)
    made = encode(session.executor.tokenizer, text, method.chat, system, session.study.moment)
    one_bos(session, f"{key[1]}: a text", made)
    return text, made


def one_bos(session: Session, what: str, text: Encoded) -> None:
    """Says so when a text writes the BOS that the tokenizer, or the chat template, adds."""
    if text.doubled:
        session.warn(f"{what} begins with BOS, which is added anyway: the model gets one")


def decoding(session: Session, generate: Generate) -> Decoding:
    """A plan's decoding with the ids of the model at hand."""
    return forms.decoding(generate, session.executor.eos, session.executor.pad)


def generated(session: Session, name: str, method: Method, prompts: dict) -> Results:
    """What the model writes for every prompt. Greedy rows that are alike are run once."""
    form = Form(decoding=decoding(session, method.generate))
    same: dict[Any, list[tuple]] = {}
    rows = []
    for target, (_, prompt) in prompts.items():
        (_, _, emotion, _), sample = target
        drawn = None
        if method.generate.sample:
            drawn = uniforms(
                method.generate.max_new_tokens, session.study.plan.seed, cells.drawn_as(name, method), emotion, sample
            )
        key = (prompt.tokens, None if drawn is None else (emotion, sample))
        if key not in same:
            rows.append(Row(key, prompt.tokens, uniform=drawn))
        same.setdefault(key, []).append(target)
    results = session.execute(STAGE, form, rows)
    found = {target: what for key, what in results.found.items() for target in same[key]}
    failed = {target: why for key, why in results.failed.items() for target in same[key]}
    return Results(found, failed)


def cell_data(session: Session, method: Method, key: tuple, prompts: dict, texts: dict) -> Any:
    """The dataset of one cell of `samples`."""
    tokenizer = session.executor.tokenizer
    block = numbers(session, key)
    pairs = [prompts[key, k] for k in block]
    written = [texts[key, k]["tokens"] if texts else () for k in block]
    plain = [
        tokenizer.decode(w, skip_special_tokens=True) if texts else p[0] for w, p in zip(written, pairs, strict=True)
    ]
    width = max(max(map(len, written)), 1)
    own = ("sample",)
    chat = uses_chat(tokenizer, method.chat)
    return arrays.dataset(
        {"sample": block, "token": range(width)},
        {
            "instruction": (own, [text for text, _ in pairs]),
            "prompt": (own, [encoded.text for _, encoded in pairs]),
            "text": (own, plain),
            "chat": (own, [chat] * len(block)),
            "prompt_tokens": (own, [len(encoded.tokens) for _, encoded in pairs]),
            "generated_tokens": (own, [len(tokens) for tokens in written]),
            "token_id": (("sample", "token"), arrays.ragged(written, width)),
        },
    )
