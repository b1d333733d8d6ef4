"""How much each cell of a stage puts through a model: rows, and tokens as a tokenizer counts them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from nsteer.models import checkpoints
from nsteer.plan.prompts import prompt_set, sample_text
from nsteer.plan.schema import Calibrated, Direction, Steer
from nsteer.science import calibration
from nsteer.stages import cells
from nsteer.stages.job import Job
from nsteer.stages.keys import Condition, Edited, Prompted, Read, SampleBlock, Sentences, Unsteered, Vector

WORDS_TO_TOKENS = 1.35
"""Tokens a word where no tokenizer file is at hand."""


def length(job: Job) -> Callable[[str], int]:
    """How many tokens a text has, as well as can be told without loading the model."""
    found = checkpoints.counter(job.facts.source, job.facts.revision)
    return found or (lambda text: round(len(text.split()) * WORDS_TO_TOKENS))


def _tokens(job: Job, texts: Iterable[str], new: int) -> int:
    """Tokens of texts, each with `new` that are generated."""
    count = job.wanted(length)
    return sum(count(text) + new for text in texts)


def samples_of(job: Job, key: SampleBlock) -> range:
    """The sample numbers of a cell of samples or activations."""
    method = job.plan.methods[key.method]
    return cells.blocks(cells.counts(job.study, method)[key.emotion])[key.sample_block]


def sample_rows(job: Job, key: SampleBlock) -> int:
    return len(samples_of(job, key))


def sample_tokens(job: Job, key: SampleBlock) -> int:
    method, texts = job.plan.methods[key.method], job.study.texts
    assert texts is not None
    new = method.generate.max_new_tokens if method.source == "generation" else 0
    return _tokens(job, (sample_text(method, texts, key.emotion, one) for one in samples_of(job, key)), new)


def swapped_rows(job: Job, key: SampleBlock) -> int:
    return sample_rows(job, key) * (job.plan.measure.swap if job.plan.measure else 0)


def swapped_tokens(job: Job, key: SampleBlock) -> int:
    return sample_tokens(job, key) * (job.plan.measure.swap if job.plan.measure else 0)


def blocks(job: Job) -> dict[str, Steer]:
    """The plan's steer blocks, by their label on the axis `op`."""
    return {cells.op_label(block): block for block in job.plan.steer}


def _by_block(job: Job) -> dict[str, tuple[int, int]]:
    """Rows and tokens of a cell of each block: they do not differ within one."""
    found = {}
    for label, block in job.wanted(blocks).items():
        prompts = prompt_set(block.prompts, job.study.texts)
        tokens = len(block.seeds) * _tokens(job, prompts.values(), block.generate.max_new_tokens)
        found[label] = (len(prompts) * len(block.seeds), tokens)
    return found


def prompt_rows(job: Job, key: Condition | Unsteered | Prompted) -> int:
    rows, _ = job.wanted(_by_block)[key.op]
    return rows


def prompt_tokens(job: Job, key: Condition | Unsteered | Prompted) -> int:
    _, tokens = job.wanted(_by_block)[key.op]
    return tokens


TRIES = calibration.SCAN + calibration.FAN
"""Strengths that a search is taken to try: those of its first two rounds."""


def _by_search(job: Job) -> dict[str, tuple[int, int]]:
    """Rows and tokens of a search of each block whose strengths are to be found."""
    found = {}
    for label, block in job.wanted(blocks).items():
        if isinstance(spec := block.strengths, Calibrated):
            prompts = prompt_set(spec.prompts or block.prompts, job.study.texts)
            found[label] = (TRIES * len(prompts), TRIES * _tokens(job, prompts.values(), spec.tokens))
    return found


def search_rows(job: Job, key: Condition) -> int:
    rows, _ = job.wanted(_by_search)[key.op]
    return rows


def search_tokens(job: Job, key: Condition) -> int:
    _, tokens = job.wanted(_by_search)[key.op]
    return tokens


def direction_texts(spec: Direction) -> list[str]:
    """The texts that a direction is made of."""
    groups = spec.contrast or spec.mean
    sides = (getattr(groups, side, None) or () for side in ("positive", "negative", "texts"))
    return [text for side in sides for text in side]


def direction_rows(job: Job, key: Vector) -> int:
    return len(direction_texts(job.plan.directions[key.emotion]))


def direction_tokens(job: Job, key: Vector) -> int:
    return _tokens(job, direction_texts(job.plan.directions[key.emotion]), 0)


def lens_rows(job: Job, key: Vector) -> int:
    return len(job.layers)


def sentence_rows(job: Job, key: Sentences) -> int:
    return len(job.study.texts.neutral_sentences) if job.study.texts else 0


def plan_prompt_rows(job: Job, key: Read | Edited) -> int:
    return len(prompt_set(job.plan.prompts, job.study.texts))


def read_tokens(job: Job, key: Read) -> int:
    return _tokens(job, prompt_set(job.plan.prompts, job.study.texts).values(), 0)


def edited_tokens(job: Job, key: Edited) -> int:
    new = job.plan.generate.max_new_tokens if job.plan.generate else 0
    return _tokens(job, prompt_set(job.plan.prompts, job.study.texts).values(), new)


def none(job: Job, key: tuple) -> int:
    """Nothing goes through the model's blocks."""
    return 0
