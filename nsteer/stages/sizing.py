"""Turns a study into the size of its job: cells, rows, tokens and memory, and what the store already has.

Texts are counted with the models' own tokenizers where their `tokenizer.json` is at hand; chat templates are not
rendered, so token counts are a little low. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nsteer.models import checkpoints
from nsteer.models import facts as models
from nsteer.plan.check import Study
from nsteer.plan.layers import resolve
from nsteer.plan.prompts import prompt_set, sample_text
from nsteer.plan.schema import Calibrated, Steer
from nsteer.program import budget
from nsteer.science import calibration
from nsteer.stages import cells
from nsteer.store import Store, slug
from nsteer.store.places import is_url
from nsteer.system import machine

WORDS_TO_TOKENS = 1.35
"""Tokens a word where no tokenizer file is at hand."""


@dataclass
class Stage:
    """One stage of one model: cells wanted and already done, rows and tokens still to put through the model.

    shared : cells beside those, that hold the same as one of them and are copied from it
    """

    model: str
    stage: str
    cells: int
    done: int
    rows: int = 0
    tokens: int = 0
    forwards: int = 0
    shared: int = 0


@dataclass
class Size:
    """The size of a job, by stage; by model its memory in bytes, and the most padded tokens in one batch.

    memory : the most that this process holds at once: itself, weights, and the largest of the plan's batches
    max_tokens_in_flight : where the plan says `auto`, what it would be on this machine's CPU now
    looked : whether what the store holds already is taken off
    """

    stages: list[Stage] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    max_tokens_in_flight: dict[str, int] = field(default_factory=dict)
    looked: bool = True

    def data(self) -> dict[str, Any]:
        return asdict(self)

    def total(self, name: str) -> int:
        return sum(getattr(stage, name) for stage in self.stages)


def size(study: Study, fetch: bool = False) -> Size:
    """The size of a study's job, what is done in its store taken off.

    fetch : whether to ask object storage too; a plan that is checked may be a stranger's, and so is its URL
    """
    store, looks = Store(study.plan.store), fetch or not is_url(study.plan.store)
    there = set(store.groups()) if looks and store.exists else set()
    found = Size(looked=looks)
    for facts in study.facts:
        found.stages += model_stages(study, facts, store, there)
        found.memory[facts.label] = memory(study, facts)
        found.max_tokens_in_flight[facts.label] = min(in_flight(study, facts, need) for need in needs(study, facts))
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
            every = {(facts.label, *key): fp for key, fp in of(study, facts).items()}
            path, wanted = f"{name}/{slug(facts.label)}", {key: fp for fp, key in cells.leaders(every).items()}
            there_already = {one.fingerprint for one in store.committed(path).values()} if path in there else set()
            todo = [key for key, fp in wanted.items() if fp not in there_already]
            done = len(wanted) - len(todo)
            stage = Stage(facts.label, name, len(wanted), done, shared=len(every) - len(wanted))
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
        if isinstance(block.strengths, Calibrated):
            found.append(_calibration(study, facts, block, left, length))
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


def _calibration(
    study: Study, facts: models.Facts, block: Steer, left: Callable[..., Any], length: Callable[[str], int]
) -> Stage:
    """The searches of a block's strengths, each taken to end after its first two rounds."""
    spec = block.strengths
    assert isinstance(spec, Calibrated)
    mine = {k: fp for k, fp in cells.calibration(study, facts).items() if k[1] == cells.op_label(block)}
    stage, todo = left("calibration", "calibration", mine)
    prompts = prompt_set(spec.prompts or block.prompts, study.texts)
    tries = calibration.SCAN + calibration.FAN
    stage.rows = len(todo) * len(prompts) * tries
    stage.tokens = len(todo) * tries * sum(length(text) + spec.tokens for text in prompts.values())
    return _forwards(study, stage, todo)


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


BASELINE = 448 * 2**20
"""Bytes of the process itself, measured: Python with torch, transformers, nnsight, xarray and zarr imported, no GPU."""

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""


def memory(study: Study, facts: models.Facts) -> int:
    """Bytes of host memory on a CPU: the process, the weights, and the largest of the plan's batches when full.

    Not counted: pooled rows of the wave in hand, and what the allocator keeps (glibc: 45 to 70 MB of 12 blocks of 768,
    measured). The number of texts does not enter.
    """
    assert facts.shape is not None
    spec, rows = cells.model_of(study, facts), study.plan.batch.rows
    width = WIDTHS[spec.dtype]
    batch = max(
        budget.batch_bytes(facts.shape, need, width, rows, in_flight(study, facts, need))
        for need in needs(study, facts)
    )
    return BASELINE + weights(facts, width) + batch


def in_flight(study: Study, facts: models.Facts, need: budget.Need) -> int:
    """The most padded tokens in one batch; `auto` as it would be on this machine's CPU now."""
    asked = study.plan.batch.max_tokens_in_flight
    if asked != "auto":
        return asked
    assert facts.shape is not None
    spec = cells.model_of(study, facts)
    width = WIDTHS[spec.dtype]
    free = max(0, machine.free_memory() - BASELINE - weights(facts, width))
    eager = spec.attn_implementation == "eager"
    return budget.tokens(free, facts.shape, need, width, study.plan.batch.rows, budget.CEILINGS["cpu"], eager)


def needs(study: Study, facts: models.Facts) -> list[budget.Need]:
    """What the programs of a plan keep, one Need a kind of program."""
    plan = study.plan
    layers = len(resolve(plan.layers, facts.n_layers))
    found = [budget.Need()]
    if plan.methods:
        found.append(budget.Need(pooled=2 * layers))
        found += [budget.Need(new=m.generate.max_new_tokens) for m in plan.methods.values() if m.source == "generation"]
    for block in plan.steer:
        found.append(budget.Need(block.generate.max_new_tokens, 2 * layers * block.project, edits=True))
        found += [budget.Need(edits=True, logits=True)] * isinstance(block.strengths, Calibrated)
    if plan.measure is not None and plan.measure.perplexity and plan.steer:
        found.append(budget.Need(logits=True))
    for read in plan.reads.values():
        count = len(resolve(read.layers, facts.n_layers))
        whole = read.pooling is None
        found.append(budget.Need(pooled=0 if whole else count, streams=count * whole, edits=bool(plan.edits)))
    if plan.generate is not None:
        found.append(budget.Need(plan.generate.max_new_tokens, edits=bool(plan.edits)))
    return found


def weights(facts: models.Facts, width: int) -> int:
    """Bytes of a model's weights in memory, at `width` bytes a number."""
    assert facts.shape is not None
    count = checkpoints.parameters(Path(facts.source))
    if not count:  # not at hand: attention, an MLP of two or three matrices, an embedding
        shape = facts.shape
        block = 2 * shape.d_model * (shape.d_model + shape.kv) + 3 * shape.d_model * shape.mlp
        count = shape.n_layers * block + shape.vocab * shape.d_model
    return count * width


def counter(facts: models.Facts) -> Callable[[str], int]:
    """How many tokens a text has, as well as can be told without loading the model."""
    found = checkpoints.counter(facts.source, facts.revision)
    return found or (lambda text: round(len(text.split()) * WORDS_TO_TOKENS))
