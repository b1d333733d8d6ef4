"""The judge that is asked in words: a rubric, answered by a language model with a number from 0 to 100.

On an OpenAI-compatible server the score is the mean of the numbers by their probability, where the server tells it and
a number is one token; else the number that was written. A model of this machine writes its number. A text to which no
single number came back is a missing value; a server that does not answer is not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nsteer.errors import ExecutionError, printable
from nsteer.models import facts as models
from nsteer.plan.check import Study
from nsteer.plan.schema import Judge, Llm, Model
from nsteer.stages.judges.base import Asked, Known, Reader, Tools, blank, concepts, filled, names_a_class

UNIT = "0 to 100"
HALF = 50.0
"""A text is of a class whose score is above this."""

ALONE = "score"
"""The class of a rubric that names none."""

WEIGHED = 0.5
"""The least probability on numbers by which a mean over them is the judge's score."""

TOP = 20
"""Likeliest tokens that a server is asked for."""

COHERENCE = (
    "Rate from 0 to 100 how coherent the text below is: 100 is fluent, grammatical and makes sense, 0 is gibberish or "
    "the same words again and again. Its content and mood do not matter. Answer with a single number.\n\nText: {text}"
)


def rubrics(spec: Llm) -> dict[str, str]:
    """Class -> rubric; of one that is asked about each class, under ""."""
    if isinstance(spec.rubric, str):
        return {"" if names_a_class(spec.rubric) else ALONE: spec.rubric}
    return dict(spec.rubric)


def coherence(spec: Llm) -> str:
    """The question about coherence; "" where none is asked."""
    return COHERENCE if spec.coherence is True else spec.coherence or ""


def known(spec: Judge, study: Study) -> Known:
    """The rubrics, the model by its name on the server or by its files, and what decides its words."""
    asked = spec.llm
    assert asked is not None
    own = asked.local
    model_facts = None if own is None else models.facts(Model(**own.model_dump(exclude={"device"})))
    identity: dict[str, Any] = asked.model_dump(include={"system", "model", "options", "max_tokens", "logprobs"})
    identity |= {"rubric": asked.rubric, "coherence": coherence(asked)}
    more: dict[str, Any] = {"beside": ("mass", "coherence") if coherence(asked) else ("mass",)}
    if own is not None and model_facts is not None:
        identity |= {"local": {"identity": model_facts.judging, "dtype": own.dtype}, "chat": asked.chat}
        more |= {"bytes": model_facts.bytes, "device": own.device}
    given = rubrics(asked)
    if "" not in given:
        return Known({"llm": identity}, tuple(given), UNIT, HALF, **more)
    classes = tuple(dict.fromkeys(name for few in concepts(spec, study).values() for name in few))
    return Known({"llm": identity}, classes, UNIT, HALF, asks=asked.ask, **more)


class Loaded:
    """The rubrics, with a way to ask."""

    def __init__(self, spec: Judge, about: Known, tools: Tools):
        assert spec.llm is not None
        self.spec, self.classes, self.asks, self.tools = spec.llm, about.classes, about.asks, tools
        self.rubrics, self.coherence = rubrics(spec.llm), coherence(spec.llm)

    def read(self, asked: Sequence[Asked]) -> dict[str, np.ndarray]:
        """Scores of the texts, what lay on numbers where it was told, and coherence where it is asked.

        Raises ModelError for a server that does not answer, ExecutionError for a text that it refuses, and where no
        text came back with a number.
        """
        wanted: dict[tuple[int, int], str] = {}
        for i, question in enumerate(asked):
            if question.text.strip():
                for j, name in enumerate(self.classes):
                    if not self.asks or name in question.classes:
                        wanted[i, j] = filled(self.rubrics.get(name) or self.rubrics[""], question, name)
        more = {(i, -1): filled(self.coherence, asked[i]) for i in dict.fromkeys(i for i, _ in wanted)}
        questions = {**wanted, **(more if self.coherence else {})}
        replies = self._ask(list(questions.values())) if questions else []
        ratings = {where: rated(reply) for where, reply in zip(questions, replies, strict=True)}
        nothing = sum(math.isnan(value) for value, _ in ratings.values())
        if nothing and nothing == len(ratings):
            said = printable(str(replies[0].get("text", ""))[:80], lines=False)
            raise ExecutionError(f"none of {nothing} answers is a single number from 0 to 100; the first is {said!r}")
        if nothing:
            self.tools.say("some answers are no single number from 0 to 100: missing values")
        out = {"score": blank(asked, self.classes), "mass": blank(asked, self.classes)}
        for (i, j), (value, mass) in ratings.items():
            if j >= 0:
                out["score"][i, j], out["mass"][i, j] = value, mass
        if self.coherence:
            out["coherence"] = blank(asked, self.classes)
            for i, j in wanted:
                out["coherence"][i, j] = ratings[i, -1][0]
        return out

    def _ask(self, questions: list[str]) -> list[Mapping[str, Any]]:
        """The replies to questions: `text`, and where it is told `top`, the likeliest first tokens."""
        spec = self.spec
        if spec.local is not None:
            told = self.tools.write(spec.local, questions, spec.system, spec.max_tokens, spec.chat)
            return [{"text": text} for text in told]
        return self.tools.ask(spec, [body(spec, question) for question in questions])


def body(spec: Llm, question: str) -> dict[str, Any]:
    """What is sent to a server for one question."""
    turns = [{"role": "system", "content": spec.system}] if spec.system else []
    request: dict[str, Any] = {
        "model": spec.model,
        "messages": [*turns, {"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": spec.max_tokens,
    }
    request |= {"logprobs": True, "top_logprobs": TOP} if spec.logprobs else {}
    return {name: value for name, value in {**request, **spec.options}.items() if value is not None}


_NUMBER = re.compile(r"-?\d+(?:[.,]\d+)?")
_THOUGHT = re.compile(r"^.*</think>", re.DOTALL)
_OF = re.compile(r"(?:/|\s+out of\s+)\s*100\b(?!\.\d)|%", re.IGNORECASE)


def parsed(text: str) -> float:
    """The number from 0 to 100 in an answer; NaN where there is none, another, or more than one."""
    numbers = _NUMBER.findall(_OF.sub(" ", _THOUGHT.sub("", text)))
    if len(numbers) != 1:
        return math.nan
    value = float(numbers[0].replace(",", "."))
    return value if 0 <= value <= 100 else math.nan


def rated(reply: Mapping[str, Any]) -> tuple[float, float]:
    """The score of a reply, and the probability that lay on numbers; NaN where it is the number that was written.

    A mean over first tokens is that of the numbers only where a number is one token: not where digits are, so that the
    number written must be the first token, and some number of two digits among the likeliest.
    """
    written = parsed(str(reply.get("text", "")))
    top = reply.get("top") or []
    numbers: dict[int, float] = {}
    for token, logp in top:
        if (digits := token.strip()).isascii() and digits.isdigit() and int(digits) <= 100:
            numbers[int(digits)] = numbers.get(int(digits), 0.0) + math.exp(min(logp, 0.0))
    mass = sum(numbers.values())
    first = str(reply.get("first", "")).strip()
    whole = any(number > 9 for number in numbers) and not math.isnan(written) and first == f"{written:g}"
    if not whole or mass < WEIGHED:
        return written, math.nan
    return sum(number * p for number, p in numbers.items()) / mass, mass


def load(spec: Judge, about: Known, tools: Tools) -> Reader:
    """The rubrics. Nothing is asked before texts are read."""
    return Loaded(spec, about, tools)
