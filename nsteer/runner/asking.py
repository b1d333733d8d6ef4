"""Turns the questions of judges into what language models say of them: under models here, unsteered, and on servers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from nsteer.errors import ExecutionError, ModelError
from nsteer.executors.completions import Chats
from nsteer.models import facts as models
from nsteer.plan.prompts import Encoded, encode, ending, uses_chat
from nsteer.plan.schema import Generate, Llm, Model, Reader
from nsteer.program.form import Form, Row
from nsteer.runner.model import ModelRun
from nsteer.runner.replies import Replies, label
from nsteer.runner.runs import Run
from nsteer.stages import forms
from nsteer.stages.job import Job
from nsteer.system import hosts


class Asking:
    """Asks one model at a time: the current one stays loaded until another is asked for, or `close`. One that is
    borrowed
    stays loaded."""

    def __init__(self, run: Run):
        self.run = run
        self._held: tuple[str, str] | None = None
        self._model: ModelRun | None = None
        self._borrowed = False
        self.replies: Replies | None = None

    def likelihood(
        self,
        name: str,
        own: Reader | None,
        questions: Sequence[str],
        answers: Sequence[Sequence[str]],
        chat: str,
    ) -> np.ndarray:
        """log P (nats) of each answer after each question, [question, answer], over all its spellings.

        name : label of the plan's model that reads, unless the judge has its `own`. Raises ModelError for a model that
        can not be loaded, or that can not tell two answers apart, ExecutionError for a question that it can not read.
        """
        model = self._loaded(name, own)
        tokenizer, moment = model.executor.tokenizer, self.run.study.moment
        log_probabilities = np.full((len(questions), len(answers)), -np.inf)
        rows: list[Row] = []
        for q, text in enumerate(questions):
            asked = encode(tokenizer, text, chat, moment=moment)
            for a, endings in enumerate(_endings(tokenizer, asked, answers, uses_chat(tokenizer, chat))):
                for e, tokens in enumerate(endings):
                    weights = np.r_[np.zeros(len(asked.tokens)), np.ones(len(tokens))].astype(np.float32)
                    rows.append(Row((q, a, e), asked.tokens + tokens, {"score": weights}))
        results = model.execute("judged", forms.score(), rows)
        self.run.stop.check()
        for row in rows:
            if row.key in results.failed:
                raise results.failed[row.key]
            q, a, _ = row.key
            log_probabilities[q, a] = np.logaddexp(log_probabilities[q, a], float(results.readouts[row.key]["score"]))
        return log_probabilities

    def write(self, own: Reader, questions: Sequence[str], system: str | None, max_tokens: int, chat: str) -> list[str]:
        """What the judge's own model writes to each question, greedily.

        Raises ModelError for a model that can not be loaded, ExecutionError for a question that it can not read.
        """
        model = self._loaded("", own)
        tokenizer, moment = model.executor.tokenizer, self.run.study.moment
        how = forms.decoding(Generate(max_new_tokens=max_tokens), model.ends)
        rows = [
            Row(i, encode(tokenizer, text, chat, system=system, moment=moment).tokens, {})
            for i, text in enumerate(questions)
        ]
        results = model.execute("judged", Form(decoding=how), rows)
        self.run.stop.check()
        if results.failed:
            raise next(iter(results.failed.values()))
        return [tokenizer.decode(results.readouts[row.key]["tokens"], skip_special_tokens=True) for row in rows]

    def ask(self, spec: Llm, bodies: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The replies of a judge's server to requests: what the store has is not asked again.

        Raises ModelError for a server that does not answer, ExecutionError for a request that it refuses.
        """
        self.replies = self.replies or Replies(self.run)
        labels = [label(body) for body in bodies]
        todo = {label: body for label, body in zip(labels, bodies, strict=True) if label not in self.replies.known}
        refused: list[ExecutionError] = []
        fresh: dict[str, dict[str, Any]] = {}
        if todo:
            server = Chats(
                spec.endpoint or hosts.judge_own(), **spec.model_dump(include={"deadline", "retries", "workers"})
            )
            try:
                for asked, reply in server.ask(todo, self.run.stop.check):
                    if isinstance(reply, ExecutionError):
                        refused.append(reply)
                        continue
                    fresh[asked] = reply
                    if len(fresh) >= spec.workers:
                        fresh = self._kept(fresh)
            finally:
                server.close()
                self._kept(fresh)
        if refused:
            raise refused[0]
        return [self.replies.known[label] for label in labels]

    def _kept(self, fresh: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Nothing more to keep: what there was is in the store."""
        assert self.replies is not None
        self.replies.put(fresh)
        return {}

    def borrow(self, model: ModelRun) -> None:
        """Asks a model of the plan that is loaded, until another is asked for, or `close`."""
        self.close()
        self._held, self._model, self._borrowed = (model.label, ""), model, True

    def close(self) -> None:
        """Frees the model."""
        if self._model is not None and not self._borrowed:
            self._model.release()
        self._held = self._model = None
        self._borrowed = False

    def _loaded(self, name: str, own: Reader | None) -> ModelRun:
        """The model that reads, loaded. Raises ModelError."""
        wanted = (name, "") if own is None else ("", own.model_dump_json())
        if self._model is None or self._held != wanted:
            self.close()
            job = next(job for job in self.run.jobs if job.label == name) if own is None else _job(self.run, own)
            model = ModelRun(self.run, job)
            self.run.stop.check()
            loaded = model.try_to_load()
            if loaded.described is None:
                raise ModelError(loaded.reason)
            self._held, self._model = wanted, model
        return self._model


def _job(run: Run, own: Reader) -> Job:
    """A job of the judge's own model, of which the plan asks nothing."""
    spec = Model(**own.model_dump())
    nothing: dict[str, Any] = {
        **{"methods": {}, "steer": [], "directions": {}, "reads": {}, "edits": {}, "measure": None, "prompts": None},
        **{"generate": None, "models": [spec], "executor": "local"},
    }
    facts = models.facts(spec)
    study = replace(run.study, plan=run.study.plan.model_copy(update=nothing), facts=(facts,))
    return Job(study, facts)


def _endings(
    tokenizer: Any, asked: Encoded, answers: Sequence[Sequence[str]], chat: bool
) -> list[list[tuple[int, ...]]]:
    """The tokens of every spelling of each answer after a question: no two of them can be said at once.

    A spelling that goes on where another of the same answer ends is left out, since the other's probability holds its
    own. Raises ModelError for answers of which one begins like another, and for one of unknown tokens alone.
    """
    spellings = []
    for forms_of in answers:
        known = {tokens for form in forms_of if (tokens := ending(tokenizer, asked, form, chat))}
        known = {ids for ids in known if tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids}
        if not known:
            raise ModelError(f"the answer {forms_of[0]!r} is no token that the model knows: give another spelling")
        spellings.append([ids for ids in sorted(known) if not any(ids[: len(o)] == o for o in known - {ids})])
    for i, mine in enumerate(spellings):
        for j, others in enumerate(spellings):
            if i != j and any(ids[: len(other)] == other for ids in mine for other in others):
                raise ModelError(
                    f"the answer {answers[i][0]!r} begins with the tokens of the answer {answers[j][0]!r}: their "
                    "probabilities can not be distinguished; give answers that begin differently, such as letters"
                )
    return spellings
