"""The fields of judges: what reads continuations and gives each a score for each of its classes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from nsteer.plan.schema.values import Filled, Section, Text, shorthand
from nsteer.science.targets import Target, target_of

Many = Annotated[list[Text], Filled, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""Texts, of which one alone may stand without a list."""


class Reader(Section):
    """A causal language model that reads questions: a hub id, a local directory, or `zoo/NAME`."""

    id: str = Field(min_length=1, description="hub id, path of a local directory, or `zoo/NAME`")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="dtype of the weights in memory")
    device: str = Field("auto", description="`auto` or a torch device")


class Rule(Section):
    """Words or patterns for each class. No model."""

    words: dict[str, Many] = Field({}, description="class: words or phrases that stand for it")
    regex: dict[str, Many] = Field({}, description="class: regular expressions; a class may have words too")
    case: bool = Field(False, description="whether capitals count")
    whole_word: bool = Field(True, description="whether `words` are found as whole words only")
    score: Literal["hit", "count", "per_token"] = Field(
        "hit",
        description="`hit`: 1 where any is found, else 0; `count`: how often they are found; `per_token`: that over "
        "the words and marks of the text",
    )


def _answers(value: Any) -> Any:
    return (
        {word: [word] for word in value}
        if isinstance(value, list) and all(isinstance(word, str) for word in value)
        else value
    )


class Choices(Section):
    """A question with given answers: the probability of each under a language model, unsteered. Nothing is written."""

    question: str = Field(
        min_length=1,
        description="what is asked, up to where the answer begins: with `{text}`, and `{prompt}` or `{concept}` (also "
        "`{emotion}`), the class that stands for what is steered to. With `{concept}` classes are concepts, each asked "
        "about",
    )
    answers: Annotated[dict[str, Many], Filled, BeforeValidator(_answers)] = Field(
        description="the answers, or class: spellings of its answer. Each is tried with and without a space before it, "
        "and with a capital; what is not another's beginning counts",
    )
    target: str | None = Field(
        None, description="with `{concept}`: the answer that says yes; the first one when left out"
    )
    ask: Literal["own", "all"] = Field(
        "own", description="with `{concept}`: a steered text is asked about its `own` concept, or about `all`"
    )
    model: Annotated[Reader, shorthand("id")] | None = Field(
        None, description="the model that reads; the one that wrote the text when left out"
    )
    chat: Literal["auto", "always", "never"] = Field("auto", description="chat template for the question")


class Llm(Section):
    """A rubric that a language model answers with a number from 0 to 100: on a server, or on this machine (`local`)."""

    rubric: Annotated[str, Field(min_length=1)] | Annotated[dict[str, Text], Filled] = Field(
        description="what is asked: with `{text}`, `{prompt}`, `{concept}` (or `{emotion}`), and that a single number "
        "from 0 to 100 is to be answered; or class: rubric"
    )
    coherence: bool | str = Field(
        False, description="whether each text is rated for coherence too; text is the question, with `{text}`"
    )
    model: str | None = Field(None, min_length=1, description="name of the model on the server")
    endpoint: str | None = Field(
        None,
        description="address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1: of this machine, or one "
        "that OPENAI_BASE_URL names too; OPENAI_BASE_URL or OpenAI's own when left out. The key is OPENAI_API_KEY's",
    )
    local: Annotated[Reader, shorthand("id")] | None = Field(
        None, description="a model that is loaded here, in place of a server's"
    )
    chat: Literal["auto", "always", "never"] = Field("auto", description="of `local`: chat template for the rubric")
    system: str | None = Field(None, min_length=1, description="system turn before the rubric")
    ask: Literal["own", "all"] = Field(
        "own", description="with `{concept}`: a steered text is rated for its `own` concept, or for `all`"
    )
    logprobs: bool = Field(
        True, description="ask the server for log-probabilities: the score is then a mean over the numbers by them"
    )
    max_tokens: int = Field(
        8, ge=1, description="maximum number of tokens of an answer; a model that reasons before it answers needs more"
    )
    options: dict[str, Any] = Field(
        {}, description="further fields of the request, such as {seed: 0}; null removes one that is sent by default"
    )
    workers: int = Field(4, ge=1, le=64, description="requests sent at the same time")
    deadline: float = Field(60.0, gt=0, description="seconds for one request, from its first byte to the last one read")
    retries: int = Field(
        6, ge=0, description="how often a transient failure is tried again: lost connections, 429, 5xx"
    )


class Python(Section):
    """A function of your own. It runs only where whoever runs the plan says `--trust-judge`."""

    function: str = Field(
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$",
        description="`module:name`, of the plan's folder or of what Python finds: takes a list of texts, and returns a "
        "row of numbers for each, in the order of `classes` (a number alone for one class)",
    )
    classes: Annotated[list[Text], Filled] = Field(description="labels of the classes, in the order of the numbers")
    threshold: float | None = Field(
        None, description="a text is of a class whose score is above this; of the likeliest class when left out"
    )


class Scores(Section):
    """Scores that people gave: tables that `nsteer export --format raters` wrote, filled in; or any CSV of texts."""

    tables: Many = Field(
        description="CSV files, one a rater, beside the plan; the score is the mean of those who rated a text"
    )
    key: str | None = Field(
        None,
        description="the key file of the blind tables; without it a table has the columns `text`, `concept` and "
        "`score` "
        "(0 to 100)",
    )
    threshold: float = Field(0.5, description="a text is of a class whose score, in 0 to 1, is above this")


JUDGE_KINDS = ("classifier", "rule", "choices", "llm", "python", "scores")
"""What a judge may be, each under the field that has its settings."""


Side = Annotated[list[Text], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""Classes, of which one alone may stand without a list; none at all where the other side has some."""


class Signed(Section):
    """Classes of a judge by which it is told that a text moved to an emotion; text alone is the one that rises.

    Success is that the summed score of `rises` less that of `falls` is higher than of the unsteered continuation.
    """

    rises: Side = Field([], description="classes whose summed score is to rise")
    falls: Side = Field([], description="classes whose summed score is to fall")


class Judge(Section):
    """Who reads the continuations. Exactly one kind; text alone is a classifier."""

    classifier: str | None = Field(
        None, min_length=1, description="a text classifier of transformers: hub id, local directory or `zoo/judge`"
    )
    rule: Rule | None = Field(None, description="words or patterns for each class")
    choices: Choices | None = Field(None, description="a question with given answers, put to a language model")
    llm: Llm | None = Field(None, description="a rubric, answered by a language model with a number from 0 to 100")
    python: Python | None = Field(None, description="a function of your own")
    scores: Scores | None = Field(None, description="scores that raters gave")
    revision: str | None = Field(None, description="of a classifier: branch, tag or commit on the hub")
    device: str = Field("auto", description="of a classifier: `auto` or a torch device")
    map: dict[str, Annotated[Signed, shorthand("rises")] | None] | None = Field(
        None,
        description="emotion -> class of the judge, or null where it has none; an emotion left out is its own class. "
        "Where no class stands for it, others may tell it by rising or falling together: `calm: {falls: [anger, "
        "fear]}`",
    )
    over: Literal["continuation", "all"] = Field(
        "continuation", description="what it reads: the continuation alone, or the prompt and the continuation"
    )

    @property
    def kind(self) -> str:
        """Which kind it is; "" for none."""
        return next((name for name in JUDGE_KINDS if getattr(self, name) is not None), "")

    @property
    def targets(self) -> dict[str, Target | None]:
        """What the map says: emotion -> its target, None where it has none."""
        return {emotion: target_of(target and target.model_dump()) for emotion, target in (self.map or {}).items()}
