"""How much each cell of a stage puts through a model: rows, and tokens as a tokenizer counts them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from nsteer.models import checkpoints
from nsteer.models.templates import shown, turns_of
from nsteer.plan.capability import shipped
from nsteer.plan.check import swept
from nsteer.plan.prompts import Question, prompt_set, questions, sample_text
from nsteer.plan.schema import SIDES, Calibrated, Continuing, Direction
from nsteer.science import calibration
from nsteer.stages import cells
from nsteer.stages.job import Job
from nsteer.stages.keys import (
    Condition,
    Edited,
    EditSearch,
    JudgedEdited,
    Prompted,
    Read,
    ResponseChunk,
    SampleChunk,
    Sentences,
    Unsteered,
    Vector,
)

WORDS_TO_TOKENS = 1.35
"""Tokens a word where there is no tokenizer file."""


def length(job: Job) -> Callable[[str], int]:
    """How many tokens a text has, as well as can be told without loading the model."""
    counter = checkpoints.counter(job.facts.name_or_path, job.facts.revision)
    return counter or (lambda text: round(len(text.split()) * WORDS_TO_TOKENS))


def _tokens(job: Job, texts: Iterable[Any], new: int) -> int:
    """Tokens of texts, each with `new` that are generated."""
    count = job.wanted(length)
    return sum(count(shown(text)) + new for text in texts)


MAX_COUNTED = 4096
"""Prompts of a plan whose tokens are counted; of more, every so many, evenly."""


def samples_of(job: Job, key: SampleChunk) -> range:
    """The sample numbers of a cell of samples or activations."""
    method = job.plan.methods[key.method]
    return cells.chunks(cells.counts(job.study, method)[key.emotion])[key.sample_chunk]


def sample_rows(job: Job, key: SampleChunk) -> int:
    return len(samples_of(job, key))


def sample_tokens(job: Job, key: SampleChunk) -> int:
    method, texts = job.plan.methods[key.method], job.study.texts
    assert texts is not None
    new = method.generate.max_new_tokens if _writes(job, key) else 0
    return _tokens(job, (sample_text(method, texts, key.emotion, sample) for sample in samples_of(job, key)), new)


def _writes(job: Job, key: SampleChunk) -> bool:
    """Whether the model writes the texts of a cell: those that are given pass through it in the next stage alone."""
    return job.plan.methods[key.method].source == "generation"


def written_rows(job: Job, key: SampleChunk) -> int:
    return sample_rows(job, key) if _writes(job, key) else 0


def written_tokens(job: Job, key: SampleChunk) -> int:
    return sample_tokens(job, key) if _writes(job, key) else 0


def swapped_rows(job: Job, key: SampleChunk) -> int:
    return sample_rows(job, key) * (job.plan.measure.swap if job.plan.measure else 0)


def swapped_tokens(job: Job, key: SampleChunk) -> int:
    return sample_tokens(job, key) * (job.plan.measure.swap if job.plan.measure else 0)


def _continued(job: Job, texts: Continuing) -> tuple[int, int]:
    """Rows and tokens of a cell that continues prompts."""
    prompts = prompt_set(texts.prompts, job.study.texts)
    tokens = len(texts.seeds) * _tokens(job, prompts.values(), texts.generate.max_new_tokens)
    return len(prompts) * len(texts.seeds), tokens


def _by_entry(job: Job) -> dict[str, tuple[int, int]]:
    """Rows and tokens of a cell of each entry of `steer`: they do not differ within one."""
    return {label: _continued(job, entry) for label, entry in job.steer_entries.items()}


def _by_prompts(job: Job) -> dict[tuple[str, int], tuple[int, int]]:
    """Prompts and their tokens in a cell of each kind of group that is kept in chunks, and chunk."""
    plan, prompt_counts = job.plan, dict[tuple[str, int], tuple[int, int]]()
    for product in dict.fromkeys([*map(job.kept_in, plan.reads), *["edited"] * (plan.generate is not None)]):
        chunks = job.prompt_chunks(product)
        step = -(-sum(map(len, chunks.values())) // MAX_COUNTED)
        for number, prompts in chunks.items():
            some = list(prompts.values())[::step]
            prompt_counts[product, number] = len(prompts), round(_tokens(job, some, 0) * len(prompts) / len(some))
    return prompt_counts


def _of_texts(job: Job, key: Condition | Unsteered | Prompted | Edited) -> tuple[int, int]:
    if not isinstance(key, Edited | JudgedEdited):
        return job.wanted(_by_entry)[key.op]
    prompts, tokens = job.wanted(_by_prompts)["edited", key.prompt_chunk]
    texts = job.continuing
    return prompts * len(texts.seeds), (tokens + prompts * texts.generate.max_new_tokens) * len(texts.seeds)


def text_rows(job: Job, key: Condition | Unsteered | Prompted | Edited) -> int:
    rows, _ = _of_texts(job, key)
    return rows


def text_tokens(job: Job, key: Condition | Unsteered | Prompted | Edited) -> int:
    _, tokens = _of_texts(job, key)
    return tokens


TRIES = calibration.SCAN + calibration.FAN
"""Strengths that a search is taken to try: those of its first two rounds."""


def _of_search(job: Job, key: Condition | EditSearch) -> tuple[int, int]:
    """Rows and tokens of a search for a strength."""
    spec = swept(job.plan.edits[key.edit]) if isinstance(key, EditSearch) else job.steer_entries[key.op].strengths
    assert isinstance(spec, Calibrated)
    prompts = prompt_set(spec.prompts or job.texts_of(key).prompts, job.study.texts)
    return TRIES * len(prompts), TRIES * _tokens(job, prompts.values(), spec.tokens)


def search_rows(job: Job, key: Condition | EditSearch) -> int:
    rows, _ = _of_search(job, key)
    return rows


def search_tokens(job: Job, key: Condition | EditSearch) -> int:
    _, tokens = _of_search(job, key)
    return tokens


def responses_of(job: Job, key: ResponseChunk) -> dict[int, Question]:
    """What is asked for the answers of a cell of `responses`, by their numbers."""
    spec = job.plan.directions[key.direction].contrast
    assert spec is not None
    asked = questions(spec, key.side)
    return {k: asked[k] for k in cells.chunks(len(asked))[key.response_chunk]}


def response_rows(job: Job, key: ResponseChunk) -> int:
    return len(responses_of(job, key))


def response_tokens(job: Job, key: ResponseChunk) -> int:
    spec = job.plan.directions[key.direction].contrast
    assert spec is not None and spec.generate is not None
    asked = responses_of(job, key).values()
    return _tokens(job, (turns_of(question.text, question.system) for question in asked), spec.generate.max_new_tokens)


def direction_texts(spec: Direction) -> list[Any]:
    """The texts that a direction is made of; of one whose texts the model writes, what each is an answer to."""
    groups = spec.contrast or spec.mean
    if spec.contrast is not None and spec.contrast.generate is not None:
        asked = [question for side in SIDES for question in questions(spec.contrast, side)]
        return [turns_of(question.text, question.system) for question in asked]
    sides = (getattr(groups, side, None) or () for side in ("positive", "negative", "texts"))
    return [text for side in sides for text in side]


def direction_rows(job: Job, key: Vector) -> int:
    return len(direction_texts(job.plan.directions[key.emotion]))


def direction_tokens(job: Job, key: Vector) -> int:
    spec = job.plan.directions[key.emotion]
    how = spec.contrast.generate if spec.contrast else None
    return _tokens(job, direction_texts(spec), how.max_new_tokens if how else 0)


def lens_rows(job: Job, key: Vector) -> int:
    return len(job.layers)


def sentence_rows(job: Job, key: Sentences) -> int:
    return len(job.study.texts.neutral_sentences) if job.study.texts else 0


def read_rows(job: Job, key: Read) -> int:
    rows, _ = job.wanted(_by_prompts)[job.kept_in(key.read), key.prompt_chunk]
    return rows


def read_tokens(job: Job, key: Read) -> int:
    _, tokens = job.wanted(_by_prompts)[job.kept_in(key.read), key.prompt_chunk]
    return tokens


def weighed_rows(job: Job, key: tuple) -> int:
    return len(shipped().scored())


def weighed_tokens(job: Job, key: tuple) -> int:
    return job.wanted(_weighed)


def _weighed(job: Job) -> int:
    return _tokens(job, (before + text for before, text in shipped().scored().values()), 0)


def none(job: Job, key: tuple) -> int:
    """Nothing goes through the model's blocks."""
    return 0
