"""The fields of directions that are made of texts: two sides, given or written by the model, or one group."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from nsteer.plan.schema.datasets import Listed, Rows, Side, What
from nsteer.plan.schema.methods import Generate, Pooling
from nsteer.plan.schema.values import MAX_SAMPLES, Section, Text, shorthand
from nsteer.science.presets import CONTRASTS

SIDES = ("positive", "negative")
"""The sides of a contrast."""


class Responses(Generate):
    """What the model writes for a contrast: answers to the same questions under the system prompts of either side."""

    questions: Listed = Field(
        description="what is asked under every system prompt: a list of texts, or a Dataset; turns may go before"
    )
    samples: int = Field(
        1,
        ge=1,
        le=MAX_SAMPLES,
        description="answers to each question under each system prompt (more than one: sampling only)",
    )


class Filter(Section):
    """Which answers of a contrast are kept, by a judge of the plan. What it gives no score is not kept."""

    judge: Text = Field(description="label in `judges` (`judge` for that of `judge`); any kind but `scores`")
    class_: Text | None = Field(
        None,
        alias="class",
        description="the class whose score counts; when left out the direction's own name (by the judge's `map`), or "
        "the only class",
    )
    above: float | None = Field(
        None,
        description="positive answers are kept that score more; when left out those that are of the class, as the "
        "judge says it",
    )
    below: float | None = Field(
        None, description="negative answers are kept that score less; when left out those that are not of the class"
    )
    coherence: float | None = Field(
        None,
        ge=0,
        le=100,
        description="least coherence of an answer that is kept, of a judge that rates it (`llm` with `coherence`)",
    )
    min_answers: int = Field(
        1, ge=1, description="answers that must be kept on each side: with fewer there is no vector"
    )


class Contrast(Rows):
    """mean(positive) - mean(negative) of pooled residual streams (contrastive activation addition).

    The sides are lists of texts, or files of them; or with `file` or `hub` two columns of pairs, or the rows of two
    values of the column `label`, whose text is `text`. With `generate` they are system prompts, and what is averaged
    are the answers that the model writes under them, behind their prompts.
    """

    preset: str | None = Field(
        None, description=f"a protocol: {', '.join(CONTRASTS)}; fields given here override it (`null` takes one away)"
    )
    positive: Side = Field(
        description="texts, or a Dataset; with `file` or `hub` a column, a text with `{column}`, turns of such texts, "
        "or the value of `label`"
    )
    negative: Side = Field(description="the same of the other side")
    label: str | None = Field(None, min_length=1, description="column whose values tell the sides apart")
    text: What | None = Field(None, description="the text of a row, with `label`; as in Dataset, `text` when left out")
    generate: Responses | None = Field(
        None, description="the model writes the texts: answers to questions, under the system prompts of each side"
    )
    filter: Filter | None = Field(None, description="with `generate`: which answers are kept; all when left out")
    pooling: Annotated[Pooling, shorthand("kind")] = Pooling(kind="last")
    chat: Literal["auto", "always", "never"] = "never"


class Mean(Section):
    """The mean of pooled residual streams over texts."""

    texts: Listed = Field(description="a list of texts, or a Dataset")
    pooling: Annotated[Pooling, shorthand("kind")] = Pooling(kind="last")
    chat: Literal["auto", "always", "never"] = "never"
