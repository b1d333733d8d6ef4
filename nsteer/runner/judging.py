"""The stages whose names begin with `judged`: what each judge of a plan says of the continuations."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from nsteer import runner
from nsteer.errors import ExecutionError, InputError, ModelError
from nsteer.models.templates import shown
from nsteer.plan.check import Study, labels_of
from nsteer.plan.prompts import prompt_set
from nsteer.plan.schema import Continuing, Judge
from nsteer.runner.asking import Asking
from nsteer.runner.failing import not_loaded
from nsteer.runner.model import ModelRun
from nsteer.runner.runs import Clock, LoadError, Run
from nsteer.science.presets import NEUTRAL
from nsteer.science.targets import Target, targets_of
from nsteer.stages import arrays, cells, judges
from nsteer.stages.job import Job
from nsteer.stages.judges import Asked, Known, Reader, Tools
from nsteer.stages.table import BY_NAME, Stage
from nsteer.system.fingerprints import fingerprint

STAGES = ("judged_unsteered", "judged", "judged_prompted", "judged_edited")
"""What all else is compared with comes first: see `Scored`."""

CARDED = ("classifier", "rule", "python")
"""Kinds of judges that read the text set's passages too: no question of theirs goes to a language model."""


def judge(run: Run) -> None:
    """Fills the missing cells of all, for all models, one judge after another. One that fails leaves the others."""
    for name, spec in run.study.plan.all_judges().items():
        run.stop.check()
        left = [job for job in run.jobs if (name, job.label) not in run.judged]
        if left:
            with contextlib.suppress(LoadError), runner.attempted(run, "judged", (name,)):
                fill_of(run, name, spec, left)


def by_writer(run: Run) -> dict[str, Judge]:
    """The judges of the plan that read under the model which wrote, by label."""
    every = run.study.plan.all_judges()
    return {name: spec for name, spec in every.items() if spec.choices is not None and spec.choices.model is None}


def judge_by_writer(model: ModelRun) -> None:
    """What judges that read under the model which wrote say of its texts, in its own turn: it is loaded once."""
    run = model.run
    for name, spec in by_writer(run).items():
        run.stop.check()
        run.lent = run.lent or Asking(run)
        run.lent.borrow(model)
        run.judged.add((name, model.label))
        with contextlib.suppress(LoadError), runner.attempted(run, "judged", (name, model.label)):
            fill_of(run, name, spec, [model.job])


def fill_of(run: Run, name: str, spec: Judge, of: Sequence[Job]) -> None:
    """The cells of one judge of some models, which is loaded when a cell needs it. Raises ModelError."""
    about = judges.known(spec, run.study)
    remember(run, name, spec, about)
    todo = {stage: outstanding(run, BY_NAME[stage], name, of) for stage in STAGES}
    if not any(todo.values()):
        return
    try:
        turn = Turn(run, name, spec, about, loaded(run, name, spec, about))
        recall(turn, of)
        for stage, mine in todo.items():
            if mine:
                run.prepare([arrays.judged_group(stage, run.study, in_order(turn), name)])
                fill(turn, BY_NAME[stage], mine)
        read_passages(turn)
    finally:
        if run.lent is not None:
            run.lent.close()


def in_order(turn: Turn) -> dict[str, Known]:
    """What is known of the plan's judges, in its order, whichever reads first; of those that are there."""
    known_judges: dict[str, Known] = {}
    for name, spec in turn.run.study.plan.all_judges().items():
        if name == turn.name:
            known_judges[name] = replace(turn.about, classes=tuple(turn.reader.classes))
            continue
        with contextlib.suppress(ModelError):  # said when it is to be loaded
            known_judges[name] = judges.known(spec, turn.run.study)
    return known_judges


class Scored:
    """What a judge said of texts: of one text, one thing.

    Read again in another batch a text would get scores that differ by rounding, and one that steering left as it was
    would rise or fall by that. Texts without any edit are kept, of others the last `MAX_TEXTS`.
    """

    MAX_TEXTS = 2**16

    def __init__(self) -> None:
        self._kept: dict[Asked, dict[str, np.ndarray]] = {}
        self._others: dict[Asked, dict[str, np.ndarray]] = {}
        self._classes: dict[Asked, tuple[str, ...]] = {}

    def keep(
        self, asked: Sequence[Asked], said: Mapping[str, np.ndarray], unsteered: bool = False
    ) -> dict[Asked, dict[str, np.ndarray]]:
        """Takes in what was said, [text, class] by name; the same by text, [class] by name."""
        if len(self._others) > self.MAX_TEXTS:
            self._others.clear()
        rows = {question: {what: values[i] for what, values in said.items()} for i, question in enumerate(asked)}
        (self._kept if unsteered else self._others).update(rows)
        if unsteered:
            self._classes |= {question._replace(classes=()): question.classes for question in asked}
        return rows

    def of(self, asked: Asked, classes: Sequence[str]) -> dict[str, np.ndarray] | None:
        """What was said of a text, [class] by name; None where it was not read.

        An unsteered text is asked about all that an entry steers to, a steered one about its own.
        """
        if (text_scores := self._kept.get(asked) or self._others.get(asked)) is not None or not asked.classes:
            return text_scores
        wider = self._classes.get(asked._replace(classes=()), ())
        if not set(asked.classes) <= set(wider):
            return None
        row = self._kept[asked._replace(classes=wider)]
        named = np.isin(classes, asked.classes)
        return {what: np.where(named, values, np.nan) for what, values in row.items()}


@dataclass(frozen=True)
class Turn:
    """A judge of a run, loaded."""

    run: Run
    name: str
    spec: Judge
    about: Known
    reader: Reader
    scored: Scored = field(default_factory=Scored)


def loaded(run: Run, name: str, spec: Judge, about: Known) -> Reader:
    """The judge, loaded once a run. Raises ModelError for whatever fails: a device that is not there, memory."""
    lent = run.lent = run.lent or Asking(run)
    if name not in run.judges:
        try:
            run.judges[name] = judges.load(
                spec, about, Tools(partial(tell, run, name), run.trust_judge, lent.likelihood, lent.write, lent.ask)
            )
        except Exception as error:
            reason, _ = not_loaded(error, str(spec.classifier or name), about.device or "cpu")
            raise ModelError(reason) from error
    return run.judges[name]


def tell(run: Run, name: str, text: str) -> None:
    """Something that a judge says to the user; the only one needs no name."""
    run.warn(text if len(run.study.plan.all_judges()) == 1 else f"judge {name}: {text}")


def unmatched(study: Study) -> list[str]:
    """What to say of emotions that a judge has no class for: they are judged, and count for no rate."""
    plan, messages = study.plan, []
    steered = [(e, entry) for entry in plan.steer for e in cells.steered_emotions(plan, entry)]
    for name, spec in plan.all_judges().items():
        try:
            classes = judges.known(spec, study).classes
        except ModelError:
            continue  # said when it is to be loaded
        given = spec.targets
        named = {e: given.get(e, Target((e,))) for e, entry in steered if e in given or e not in entry.vectors.formulas}
        gone = {e: [c for c in to.classes if c not in classes] for e, to in named.items() if to is not None}
        lost = [f"{e} ({', '.join(some)})" if some != [e] else e for e, some in gone.items() if some]
        if lost and classes:
            who = f"the judge {spec.classifier or name}"
            messages.append(
                f"{who} has no class for {', '.join(lost)}: a missing value in its rates (its classes: "
                f"{', '.join(classes)})"
            )
    return messages


def remember(run: Run, name: str, spec: Judge, about: Known) -> None:
    """Keeps who judges, and how emotions map to classes, beside what is judged."""
    settings = {
        **spec.model_dump(exclude={"device"}, exclude_none=True),
        **{"kind": spec.kind, "identity": about.identity, "unit": about.unit, "classes": list(about.classes)},
        **{"asks": about.asks, "threshold": None if math.isnan(about.threshold) else about.threshold, **about.said},
    }
    run.prepare([arrays.judges_group(list(run.study.plan.all_judges()))])
    key, wanted = (name,), fingerprint(settings)
    if run.store.missing("judges", {key: wanted}):
        data = xr.Dataset({"settings": ((), json.dumps(settings))})
        run.store.commit("judges", key, data, fingerprint=wanted, run=run.number)


def share_out(model: ModelRun) -> None:
    """Has those who hold the model do what `judge_by_writer` does, where a run's division gives it to others."""
    run = model.run
    for name in by_writer(run):
        run.judged.add((name, model.label))
        with contextlib.suppress(LoadError), runner.attempted(run, "judged", (name, model.label)):
            for stage in STAGES:
                outstanding(run, BY_NAME[stage], name, [model.job], model)


def outstanding(run: Run, stage: Stage, name: str, of: Sequence[Job], model: ModelRun | None = None) -> dict[Any, int]:
    """Cells of some models whose continuations are in the store and that this judge has not read yet.

    model : in whose turn they are judged, if in one
    """
    path = texts_path(stage)
    if path not in run.store.groups():
        return {}
    every = {key: fp for job in of for key, fp in cells.judged_by(job, stage.name, name).items()}
    wanted = run.own_cells(stage.name, every)
    continuations = continued(run, stage, wanted)
    there = set(continuations) - set(run.store.missing(path, continuations))
    return run.missing(stage.name, stage.name, {key: fp for key, fp in wanted.items() if key.of in there}, model)


def texts_path(stage: Stage) -> str:
    """The group of the continuations that a stage judges."""
    return BY_NAME[stage.reads].products[-1]


def continued(run: Run, stage: Stage, wanted: Iterable[Any]) -> dict[Any, int]:
    """The continuations that cells are about, by their fingerprints."""
    of = BY_NAME[stage.reads].cells
    fingerprints = {key: number for job in run.jobs for key, number in job.wanted(of).items()}
    return {key.of: fingerprints[key.of] for key in wanted}


def fill(turn: Turn, stage: Stage, todo: Mapping[Any, int]) -> None:
    """Judges the missing cells of a stage, a wave of texts at a time."""
    run, name = turn.run, stage.name
    path, continuations = texts_path(stage), continued(run, stage, todo)
    of = {job.label: job for job in run.jobs}
    clock, empty = Clock(), 0
    for wave in run.waves(name, name, todo, lambda key: stage.rows(of[key.model], key)):
        texts: dict[Any, xr.DataArray] = {}
        asked: dict[Any, list[Asked]] = {}
        for key in wave:
            job = of[key.model]
            with run.guarded(name, name, key, todo[key]):
                texts[key] = cell_texts(run, path, key.of, continuations[key.of], job.texts_of(key.of))
                asked[key] = questions(turn, job, key, texts[key])
        if not asked:
            continue
        scores_by_cell = scores(turn, name, name, asked, todo)
        share = clock.share(len(wave))
        for key, values in scores_by_cell.items():
            empty += sum(not question.text.strip() for question in asked[key])
            dims: dict[str, Any] = {d: texts[key][d].values for d in ("prompt", "seed")}
            dims["class"] = turn.reader.classes
            shape = [len(labels) for labels in dims.values()]
            data = arrays.dataset(
                dims, {what: (tuple(dims), array.reshape(shape).astype(np.float32)) for what, array in values.items()}
            )
            run.commit(name, key, data, todo[key], share)
            run.finished(name, key)
    if empty:
        run.warn(f"{name}: {empty} empty continuations are not judged: missing values")


def recall(turn: Turn, of: Sequence[Job]) -> None:
    """Takes in what the judge said of unsteered continuations before, so that it says the same of the same texts."""
    run = turn.run
    for stage in (BY_NAME["judged_unsteered"], BY_NAME["judged_edited"]):
        if stage.name not in run.store.groups():
            continue
        for job in of:
            every = cells.judged_by(job, stage.name, turn.name)
            unsteered = {key: number for key, number in every.items() if getattr(key, "edit", "none") == "none"}
            missing = set(run.store.missing(stage.name, unsteered))
            continuations = continued(run, stage, unsteered)
            for key in unsteered.keys() - missing:
                with contextlib.suppress(InputError):  # then it is read again, and so is what rests on it
                    texts = cell_texts(run, texts_path(stage), key.of, continuations[key.of], job.texts_of(key.of))
                    said = run.inputs(stage.name, {key: unsteered[key]})[key].sel(prompt=texts.prompt, seed=texts.seed)
                    rows = {
                        what: said[what].transpose("prompt", "seed", "class").values.reshape(texts.size, -1)
                        for what in ("score", *turn.about.beside)
                        if what in said
                    }
                    turn.scored.keep(questions(turn, job, key, texts), rows, unsteered=True)


def read(turn: Turn, asked: Sequence[Asked], unsteered: bool = False) -> dict[str, np.ndarray]:
    """What the judge says of texts, [text, class]; each is read once. Raises ExecutionError."""
    if not asked:
        return turn.reader.read(asked)
    classes = turn.reader.classes
    said = {question: row for question in asked if (row := turn.scored.of(question, classes)) is not None}
    if fresh := [question for question in dict.fromkeys(asked) if question not in said]:
        said |= turn.scored.keep(fresh, turn.reader.read(fresh), unsteered)
    rows = [said[question] for question in asked]
    return {what: np.stack([row[what] for row in rows]) for what in rows[0]}


def read_passages(turn: Turn) -> None:
    """Has a judge that is loaded anyway read the text set's passages of the plan's emotions, for its card.

    Of judges to whom a text more costs next to nothing; left out where none of their classes stands for any emotion.
    """
    run, classes = turn.run, turn.reader.classes
    passages = known_passages(run.study)
    targets = targets_of(passages, classes, turn.spec.targets)
    if (
        turn.spec.kind not in CARDED
        or turn.about.asks
        or not any(target and target.rises for target in targets.values())
    ):
        return
    made_of = {"judge": turn.about.identity, "classes": list(classes)}
    wanted = {(turn.name, label): fingerprint({**made_of, "of": texts}) for label, texts in passages.items()}
    longest = max(map(len, passages.values()))
    run.prepare([arrays.judge_passages_group(turn.name, list(passages), longest, classes)])
    missing = set(run.store.missing("judge_passages", wanted))
    for key in wanted:
        if key not in missing:
            continue
        _, label = key
        try:
            score = turn.reader.read([Asked(text) for text in passages[label]])["score"]
        except ExecutionError as error:
            run.warn(f"judge {turn.name}: no card of it: {error}")
            return
        dims: dict[str, Any] = {"sample": list(range(len(score))), "class": list(classes)}
        data = arrays.dataset(dims, {"score": (tuple(dims), np.asarray(score, np.float32))})
        run.store.commit("judge_passages", key, data, fingerprint=wanted[key], run=run.number)


def known_passages(study: Study) -> dict[str, list[str]]:
    """Emotion of the plan -> the text set's passages of it; those of `neutral` last."""
    if study.texts is None:
        return {}
    named = {e: list(study.texts.passages[e]) for e in labels_of(study.plan) if e in study.texts.passages}
    passages = {**named, NEUTRAL: list(study.texts.neutral_passages)}
    return {e: texts for e, texts in passages.items() if texts} if named else {}


def scores(
    turn: Turn, stage: str, path: str, asked: Mapping[Any, list[Asked]], todo: Mapping[Any, int]
) -> dict[Any, dict[str, np.ndarray]]:
    """What the judge says of cells of a group, [text, class] each; together, or where that fails one cell at a time."""
    try:
        whole = read(turn, [question for few in asked.values() for question in few], stage == "judged_unsteered")
        ends = np.cumsum([len(few) for few in asked.values()])[:-1]
        each = {what: np.split(values, ends) for what, values in whole.items()}
        return {key: {what: values[i] for what, values in each.items()} for i, key in enumerate(asked)}
    except ExecutionError:
        by_cell = {}
        for key, few in asked.items():
            with turn.run.guarded(stage, path, key, todo[key]):
                by_cell[key] = read(turn, few, stage == "judged_unsteered")
        return by_cell


def questions(turn: Turn, job: Job, key: Any, texts: xr.DataArray) -> list[Asked]:
    """The texts of a cell as the judge gets them, in the order of `texts` [prompt, seed]."""
    prompts = prompt_set(job.texts_of(key.of).prompts, turn.run.study.texts)
    read = {label: shown(prompt) for label, prompt in prompts.items()}
    about = cells.asked_about(job, turn.spec, turn.about, key)
    return [
        Asked(read[prompt] + text if turn.spec.over == "all" else text, read[prompt], key.model, about)
        if text.strip() or turn.spec.over == "all"
        else Asked("")
        for prompt, row in zip(texts.prompt.values.tolist(), texts.values.tolist(), strict=True)
        for text in row
    ]


def cell_texts(run: Run, made_from: str, key: Any, number: int, continuing: Continuing) -> xr.DataArray:
    """The continuations of one cell, over (prompt, seed). Raises InputError."""
    prompts = prompt_set(continuing.prompts, run.study.texts)
    texts = run.inputs(made_from, {key: number})[key].text.sel({"prompt": list(prompts), "seed": continuing.seeds})
    return texts.transpose("prompt", "seed")
