"""How texts are generated and read, and become vectors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from nsteer.plan.schema.datasets import What
from nsteer.plan.schema.values import MAX_SAMPLES, Filled, Fraction, Section, shorthand
from nsteer.science.presets import PRESETS


class Generate(Section):
    """How text is generated. Greedy unless `sample`; a row's draw depends on its own seed, never on its batch."""

    max_new_tokens: int = Field(50, ge=1, description="maximum number of tokens to generate")
    sample: bool = Field(False, description="sample instead of greedy decoding")
    temperature: float = Field(1.0, gt=0, description="softmax temperature (sampling only)")
    top_p: Fraction = Field(
        1.0,
        description="nucleus sampling: the likeliest tokens that together have this probability are kept (sampling "
        "only)",
    )
    top_k: int = Field(0, ge=0, description="number of likeliest tokens kept, 0 for all (sampling only)")


class Span(Section):
    """A part of a text, in which positions are counted: tokens that hold a character of it. Exactly one field."""

    text: str | None = Field(None, min_length=1, description="any occurrence of this text within the turns")
    turn: int | Literal["system", "user", "assistant"] | None = Field(
        None, description="a turn of a conversation by its number, from 0 or below 0 from the end, or all of a role"
    )


class Pooling(Section):
    """Which positions stand for a text, and how they become one vector per layer."""

    kind: Literal["last", "mean", "mean_from", "mean_last", "mid_generation"] = Field(
        description="`last` token; `mean` over positions; `mean_from` position k on; `mean_last` k positions; "
        "`mid_generation`: the one token at `prompt_len + gen_len // 2`, or the last prompt token when at most 10 "
        "tokens were generated (Jeong 2026)"
    )
    k: int | None = Field(
        None, ge=0, description="first position that counts, 0-based (`mean_from`), or how many (`mean_last`)"
    )
    over: Annotated[
        Annotated[Literal["auto", "all", "generated", "answer"], Tag("a word")] | Annotated[Span, Tag("a mapping")],
        Discriminator(lambda value: "a word" if isinstance(value, str) else "a mapping"),
    ] = Field(
        "auto",
        description="where positions are counted: the whole text or its generated part; `auto`: the generated "
        "part if the model wrote it, else the whole text; `answer`: the begun answer that a conversation ends with, "
        "and what is generated; or a Span",
    )
    bos: bool = Field(False, description="count a leading BOS token in means (its stream norm is 10-100 x others')")

    @property
    def sought(self) -> bool:
        """Whether it rests on where the characters of a text stand."""
        return self.over == "answer" or isinstance(self.over, Span)


class ProjectOut(Section):
    """Denoising: principal components of the neutral samples are projected out of every vector."""

    variance: Fraction = Field(0.5, description="minimum share of the neutral samples' variance to remove")


class Estimator(Section):
    """How an emotion's samples and what they are set against become a direction (docs/methods.md)."""

    kind: Literal["mean_difference", "pca_difference", "ridge", "logistic", "lda"] = Field(
        "mean_difference",
        description="`mean_difference`; `pca_difference`: first principal component of paired differences, its sign "
        "towards the mean difference; `ridge`, `logistic`: weights of a linear probe; `lda`: the mean difference "
        "whitened. All but the first need baseline neutral_mean or rest",
    )
    centre: bool = Field(False, description="take the differences' mean away first (`pca_difference` only)")
    penalty: float = Field(
        0.1, gt=0, description="weight of the L2 penalty, at total variance 1 (`ridge`, `logistic` only)"
    )
    shrinkage: float | None = Field(
        None, gt=0, le=1, description="of the covariance, 1 for no whitening; Ledoit-Wolf's when left out (`lda` only)"
    )

    def parameters(self) -> dict[str, Any]:
        """The fields that the estimator of this kind has."""
        return {name: getattr(self, name) for name in PARAMETERS.get(self.kind, ())}


PARAMETERS = {
    "pca_difference": ("centre",),
    "ridge": ("penalty",),
    "logistic": ("penalty",),
    "lda": ("shrinkage",),
}
"""Estimator -> its own fields."""


class Method(Section):
    """How texts become one vector per emotion and layer."""

    preset: str | None = Field(None, description=f"a protocol: {', '.join(PRESETS)}; fields given here override it")
    source: Literal["generation", "comprehension"] = Field(
        description="`generation`: the model writes a text and is then read; `comprehension`: it reads a given passage"
    )
    samples: Literal["all"] | Annotated[int, Field(ge=1, le=MAX_SAMPLES)] = Field(
        10, description="texts per emotion; `all`: every passage that there is, however many of each (comprehension)"
    )
    neutral_samples: int | None = Field(
        None, ge=0, le=MAX_SAMPLES, description="neutral texts; as many as `samples` when left out"
    )
    templates: str | Annotated[list[What], Filled] = Field(
        "story_templates",
        description="instructions: a field of the text set, or a list with {emotion}, of texts or conversations "
        "(generation)",
    )
    chat: Literal["auto", "always", "never"] = Field(
        "auto", description="chat template: `auto` uses it where the model has one, `always` requires it"
    )
    system_prompt: str | None = Field(None, description="system turn before the instruction (chat only)")
    generate: Generate = Field(Generate(max_new_tokens=256), description="decoding of the texts (generation only)")
    draws_of: str | None = Field(
        None,
        description="a method whose random draws it uses: where all else is equal their texts are the same, and "
        "written once (sampling only; greedy texts are shared anyway)",
    )
    context: Literal["with_prompt", "text"] = Field(
        "with_prompt",
        description="what a generated text is read behind: `with_prompt`, the instruction it was written to; `text`, "
        "nothing: it is read as a passage is (generation only)",
    )
    pooling: Annotated[Pooling, shorthand("kind")] = Field(Pooling(kind="last"), description="positions read")
    baseline: Literal["neutral_mean", "grand_mean", "rest", "none"] = Field(
        "neutral_mean",
        description="what an emotion is set against: the neutral mean, the mean over the emotions, the mean over the "
        "other emotions, or nothing",
    )
    estimator: Annotated[Estimator, shorthand("kind")] = Field(
        Estimator(), description="how an emotion and what it is set against become a direction"
    )
    labels: Literal["given", "shuffled"] = Field(
        "given",
        description="`shuffled`: a control; labels change places among the samples of one number before vectors are "
        "derived, by the plan's seed (the neutral ones too, where the baseline is their mean)",
    )
    project_out: ProjectOut | None = Field(None, description="remove neutral principal components from the vectors")
    unit_norm: bool = Field(True, description="scale every vector to length 1 (its raw length is kept as `norm`)")
