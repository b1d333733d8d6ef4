"""Turns a study into the size of its job: cells, rows, tokens and memory, and what the store already has.

Texts are counted with the models' own tokenizers where their `tokenizer.json` is at hand; chat templates are not
rendered, so token counts are a little low. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from nsteer import cells, models
from nsteer.check import Study
from nsteer.layers import resolve
from nsteer.prompts import prompt_set, sample_text
from nsteer.store import Store, slug

WORDS_TO_TOKENS = 1.35
"""Tokens a word where no tokenizer file is at hand."""


@dataclass
class Stage:
    """One stage of one model: cells wanted and already done, rows and tokens still to put through the model."""

    model: str
    stage: str
    cells: int
    done: int
    rows: int = 0
    tokens: int = 0
    forwards: int = 0


@dataclass
class Size:
    """The size of a job. `memory` is the estimate for the largest model: weights and one full batch, in bytes."""

    stages: list[Stage] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)

    def data(self) -> dict[str, Any]:
        return asdict(self)

    def total(self, name: str) -> int:
        return sum(getattr(stage, name) for stage in self.stages)


def size(study: Study) -> Size:
    """The size of a study's job, what is done in its store taken off."""
    store = Store(study.plan.store)
    there = set(store.groups()) if store.exists else set()
    found = Size()
    for facts in study.facts:
        found.stages += model_stages(study, facts, store, there)
        found.memory[facts.label] = memory(study, facts)
    return found


def model_stages(study: Study, facts: models.Facts, store: Store, there: set[str]) -> list[Stage]:
    """The stages of one model."""
    plan, length = study.plan, counter(facts)

    def left(stage: str, path: str, wanted: dict[tuple, int]) -> tuple[Stage, list[tuple]]:
        todo = store.missing(path, wanted) if path in there else list(wanted)
        return Stage(facts.label, stage, len(wanted), len(wanted) - len(todo)), todo

    found: list[Stage] = []
    if plan.methods:
        stages = (("samples", cells.samples), ("activations", cells.activations))
        for name, of in stages:
            wanted = {(facts.label, *key): fp for key, fp in of(study, facts).items()}
            stage, todo = left(name, f"{name}/{slug(facts.label)}", wanted)
            for key in todo:
                _count_samples(study, stage, key, length)
            found.append(_forwards(study, stage, todo))
        wanted = {(facts.label, *key): fp for key, fp in cells.vectors(study, facts).items()}
        found.append(left("vectors", f"vectors/{slug(facts.label)}", wanted)[0])
    for block in plan.steer:
        label = cells.op_label(block)
        prompts = prompt_set(block.prompts, study.texts)
        rows = len(prompts) * len(block.seeds)
        tokens = sum(map(length, prompts.values())) * len(block.seeds) + rows * block.generate.max_new_tokens
        for name, path, every in (
            ("unsteered", "unsteered", cells.unsteered(study, facts)),
            ("steering", "generations", cells.steering(study, facts)),
        ):
            stage, todo = left(name, path, {key: fp for key, fp in every.items() if key[1] == label})
            stage.rows, stage.tokens = len(todo) * rows, len(todo) * tokens
            found.append(_forwards(study, stage, todo))
        if plan.measure is not None and plan.measure.perplexity:
            every = cells.outcomes(cells.steering(study, facts))
            stage, todo = left("outcomes", "outcomes", {key: fp for key, fp in every.items() if key[1] == label})
            stage.rows, stage.tokens = len(todo) * rows, len(todo) * tokens
            found.append(_forwards(study, stage, todo))
    if plan.prompts is not None:
        prompts = prompt_set(plan.prompts, study.texts)
        tokens = sum(map(length, prompts.values()))
        wanted = {(facts.label, *key): fp for key, fp in cells.edited(study, facts).items()}
        if plan.generate is not None:
            stage, todo = left("edited", "edited", wanted)
            stage.rows = len(todo) * len(prompts)
            stage.tokens = len(todo) * (tokens + len(prompts) * plan.generate.max_new_tokens)
            found.append(_forwards(study, stage, todo))
        if plan.reads:
            pooled = {k: v for k, v in cells.reads(study, facts).items() if plan.reads[k[0]].pooling is not None}
            whole = {k: v for k, v in cells.reads(study, facts).items() if k not in pooled}
            for name, part in (("reads", pooled), ("streams", whole)):
                if part:
                    full = {(facts.label, *key): fp for key, fp in part.items()}
                    stage, todo = left(name, f"{name}/{slug(facts.label)}", full)
                    stage.rows, stage.tokens = len(todo) * len(prompts), len(todo) * tokens
                    found.append(_forwards(study, stage, todo))
    return [stage for stage in found if stage.cells]


def _forwards(study: Study, stage: Stage, todo: list[tuple]) -> Stage:
    """Batches, at least: rows over the largest batch."""
    stage.forwards = -(-stage.rows // study.plan.batch.rows) if todo else 0
    return stage


def _count_samples(study: Study, stage: Stage, key: tuple, length: Callable[[str], int]) -> None:
    _, name, emotion, block = key
    method = study.plan.methods[name]
    assert study.texts is not None
    for sample in cells.blocks(cells.counts(study, method)[emotion])[block]:
        stage.rows += 1
        stage.tokens += length(sample_text(method, study.texts, emotion, sample))
        stage.tokens += method.generate.max_new_tokens if method.source == "generation" else 0


def memory(study: Study, facts: models.Facts) -> int:
    """Bytes: weights, and the reads or logits of one full batch. Rough on purpose; it says what order to expect."""
    spec = cells.model_of(study, facts)
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[spec.dtype]
    weights = facts.bytes * (2 if spec.dtype == "float32" else 1) or 12 * facts.n_layers * facts.d_model**2 * width
    layers = len(resolve(study.plan.layers, facts.n_layers))
    return (
        weights
        + study.plan.batch.tokens * facts.d_model * width * 8
        + study.plan.batch.rows * layers * facts.d_model * 4
    )


def counter(facts: models.Facts) -> Callable[[str], int]:
    """How many tokens a text has, as well as can be told without loading the model."""
    file = Path(facts.source) / "tokenizer.json"
    if not file.is_file():
        return lambda text: round(len(text.split()) * WORDS_TO_TOKENS)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))

    @lru_cache(maxsize=65536)
    def length(text: str) -> int:
        return len(tokenizer.encode(text).ids)

    return length
