"""Turns a study into the size of its job: cells, rows, tokens and memory, and what the store already has.

Texts are counted with the models' own tokenizers where there is a `tokenizer.json`; chat templates are not
rendered, so token counts are a little low. Imports no torch.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsteer.models import checkpoints
from nsteer.models import facts as models
from nsteer.plan.check import Study, swept
from nsteer.plan.schema import Calibrated
from nsteer.program import budget
from nsteer.stages import cells
from nsteer.stages.job import Job, jobs
from nsteer.stages.table import STAGES, Stage
from nsteer.system import machine
from nsteer.system.files import is_url

if TYPE_CHECKING:
    from nsteer.store import Store


@dataclass
class StageSize:
    """One stage of one model: cells wanted and already done, rows and tokens still to put through the model.

    shared : cells beside those, that hold the same as one of them and are copied from it
    judge : whose cells they are, of a stage that judges texts: its rows are texts to judge
    """

    model: str
    stage: str
    cells: int
    done: int
    rows: int = 0
    tokens: int = 0
    forwards: int = 0
    shared: int = 0
    judge: str = ""


@dataclass
class Size:
    """The size of a job, by stage; by model its memory in bytes, and the most padded tokens in one batch.

    memory : the most that this process holds at once: itself, weights, and the largest of the plan's batches
    max_tokens_in_flight : where the plan says `auto`, what it would be on this machine's CPU now
    looked : whether what the store holds already is taken off
    seconds : of what is left, on a CPU; measured : whether all of it is by what the store has measured
    disk : bytes that are written at most; see `rates`
    """

    stages: list[StageSize] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    max_tokens_in_flight: dict[str, int] = field(default_factory=dict)
    looked: bool = True
    seconds: float = 0.0
    measured: bool = False
    disk: int = 0

    def data(self) -> dict[str, Any]:
        return asdict(self)

    def total(self, name: str) -> int:
        return sum(getattr(stage, name) for stage in self.stages)


def size(study: Study, fetch: bool = False) -> Size:
    """The size of a study's job, what is done in its store taken off.

    fetch : whether to ask object storage too; a plan that is checked may be a stranger's, and so is its URL
    """
    store = opened(study, fetch)
    there = set(store.groups()) if store is not None else set()
    study_size = Size(looked=fetch or not is_url(study.plan.store))
    for job in jobs(study, store):
        study_size.stages += model_stages(job, store, there) + judge_stages(job, store, there)
        study_size.memory[job.label] = memory(job)
        study_size.max_tokens_in_flight[job.label] = min(in_flight(job, need) for need in needs(job))
    return study_size


def opened(study: Study, fetch: bool = False) -> Store | None:
    """The store of a study where it has one: for a plan that never ran, nothing that reads stores is imported."""
    path = study.plan.store
    if (is_url(path) and not fetch) or (not is_url(path) and not os.path.lexists(path)):
        return None
    from nsteer.store import Store

    store = Store(path)
    return store if store.exists else None


def model_stages(job: Job, store: Store | None, there: set[str]) -> list[StageSize]:
    """The stages of one model that have cells to fill. `there`: the groups that the store has."""
    sizes = [_stage_size(job, stage, job.wanted(stage.cells), store, there) for stage in STAGES if stage.per_model]
    return [stage for stage in sizes if stage.cells]


def judge_stages(job: Job, store: Store | None, there: set[str]) -> list[StageSize]:
    """What each judge of the plan has to say of one model's texts. Raises ModelError for a judge that is none."""
    sizes = []
    for stage in (stage for stage in STAGES if not stage.per_model):
        every = job.wanted(stage.cells)
        for judge in job.plan.all_judges():
            own = {key: number for key, number in every.items() if key.judge == judge}
            sizes.append(replace(_stage_size(job, stage, own, store, there), judge=judge, forwards=0))
    return [stage for stage in sizes if stage.cells]


def _stage_size(job: Job, stage: Stage, every: cells.Cells[Any], store: Store | None, there: set[str]) -> StageSize:
    path = stage.paths(job)[-1]
    wanted = {key: number for number, key in cells.leaders(every).items()} if stage.copied else every
    todo = list(wanted)
    if store is not None and path in there:
        todo = store.missing(path, wanted)
    if store is not None and stage.copied and path in there:  # whichever of its fingerprint is there is copied
        known = {record.fingerprint for record in store.committed(path).values()}
        todo = [key for key, number in wanted.items() if number not in known]
    rows = sum(stage.rows(job, key) for key in todo)
    return StageSize(
        job.label,
        stage.name,
        cells=len(wanted),
        done=len(wanted) - len(todo),
        rows=rows,
        tokens=sum(stage.tokens(job, key) for key in todo),
        forwards=-(-rows // job.plan.batch.rows),
        shared=len(every) - len(wanted),
    )


BASELINE = 448 * 2**20
"""Bytes of the process itself, measured: Python with torch, transformers, nnsight, xarray and zarr imported, no GPU."""

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a number."""


def memory(job: Job) -> int:
    """Bytes of host memory on a CPU: the process, the weights, and the largest of the plan's batches when full; a judge
    that filters what the model writes is loaded beside it.

    Not counted: pooled rows of the current wave, and what the allocator keeps (glibc: 45 to 70 MB of 12 blocks of 768,
    measured). The number of texts does not enter.
    """
    shape, rows, width = job.facts.shape, job.plan.batch.rows, WIDTHS[job.model.dtype]
    assert shape is not None
    batch = max(budget.batch_bytes(shape, need, width, rows, in_flight(job, need)) for need in needs(job))
    beside = [
        cells.filtered_by(job, name)[2].bytes for name, contrast in cells.written(job.plan).items() if contrast.filter
    ]
    return BASELINE + weights(job.facts, width) + batch + max(beside, default=0)


def in_flight(job: Job, need: budget.Need) -> int:
    """The most padded tokens in one batch; `auto` as it would be on this machine's CPU now."""
    asked, shape = job.plan.batch.max_tokens_in_flight, job.facts.shape
    if asked != "auto":
        return asked
    assert shape is not None
    width = WIDTHS[job.model.dtype]
    free = max(0, machine.free_memory() - BASELINE - weights(job.facts, width))
    eager = job.model.attn_implementation == "eager"
    return budget.tokens(free, shape, need, width, job.plan.batch.rows, budget.CEILINGS["cpu"], eager)


def needs(job: Job) -> list[budget.Need]:
    """What the programs of a plan keep, one Need a kind of program."""
    plan, layers = job.plan, len(job.layers)
    program_needs = [budget.Need()]
    if plan.methods:
        program_needs.append(budget.Need(pooled=2 * layers))
        program_needs += [
            budget.Need(new=m.generate.max_new_tokens) for m in plan.methods.values() if m.source == "generation"
        ]
    for contrast in cells.written(plan).values():
        program_needs += [budget.Need(new=contrast.generate.max_new_tokens)] if contrast.generate else []
    for block in plan.steer:
        program_needs.append(budget.Need(block.generate.max_new_tokens, 2 * layers * block.project, edits=True))
        program_needs += [budget.Need(edits=True, logits=True)] * (
            isinstance(block.strengths, Calibrated) or cells.weighs(plan)
        )
    if plan.measure is not None and plan.measure.perplexity and (plan.steer or plan.generate):
        program_needs.append(budget.Need(logits=True))
    for read in plan.reads.values():
        count = len(job.resolve(read.layers))
        whole = read.pooling is None
        program_needs.append(budget.Need(pooled=0 if whole else count, streams=count * whole, edits=bool(plan.edits)))
    if any(isinstance(swept(edits), Calibrated) or cells.weighs(plan) for edits in plan.edits.values()):
        program_needs.append(budget.Need(edits=True, logits=True))
    if plan.generate is not None:
        program_needs.append(
            budget.Need(plan.generate.max_new_tokens, 2 * layers * plan.project, edits=bool(plan.edits))
        )
    return program_needs


def weights(facts: models.Facts, width: int) -> int:
    """Bytes of a model's weights in memory, at `width` bytes a number."""
    assert facts.shape is not None
    count = checkpoints.parameters(Path(facts.name_or_path))
    if not count:  # no file of weights: attention, an MLP of two or three matrices, an embedding
        shape = facts.shape
        block = 2 * shape.d_model * (shape.d_model + shape.kv) + 3 * shape.d_model * shape.mlp
        count = shape.n_layers * block + shape.vocab * shape.d_model
    return count * width
