"""Turns a plan with `tune` into the best layer set and strength of every vector: runs of further cells, round by round.

Every round is a run of the same study over the settings to try, so what is in the store is not done again, and a search
that was stopped goes on where it was. A model is loaded in rounds that miss cells of its, and only in those.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xarray as xr

from nsteer import runner
from nsteer.errors import PlanError
from nsteer.models.facts import Facts
from nsteer.plan.check import HELD, Study, budget, layer_sets, steering_vectors, tuned
from nsteer.plan.prompts import prompt_set
from nsteer.plan.schema import Calibrated, Measure, Steer
from nsteer.program.ops import MAX_STRENGTH
from nsteer.runner.progress import Progress
from nsteer.science import axis, outcomes
from nsteer.science.axis import word
from nsteer.science.targets import Target, targets_of
from nsteer.science.tuning import Score, Setting, best, interval, propose, score
from nsteer.stages import arrays, cells, judges
from nsteer.stages.job import jobs
from nsteer.stages.keys import Condition, Judged, JudgedUnsteered, Unsteered, Vector
from nsteer.store import Store
from nsteer.store.inputs import read_whole
from nsteer.system.fingerprints import fingerprint

STEERED = ("generations", "judged", "outcomes")
UNSTEERED = ("unsteered", "judged_unsteered", "outcomes_unsteered")


@dataclass
class Found:
    """What a search did: its runs as one summary, and a line a vector of what is best.

    lines : model, method, emotion, layer_set, strength, tried, reason, and scores[split][arm] with value, low, high, n,
    ratio; layer_set "" and a reason where nothing is best
    """

    summary: runner.Summary
    lines: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Search:
    """A study with `tune`, the entry that it tunes, and what its settings scored so far.

    there : group -> its cells that can be scored, or that others are scored against -> their fingerprints
    unsteered_cells : (group, *cell) -> its values, of unsteered cells: many settings are compared with each
    """

    study: Study
    entry: Steer
    scores: dict[Vector, dict[Setting, Score]] = field(default_factory=dict)
    there: dict[str, dict[tuple, int]] = field(default_factory=dict)
    unsteered_cells: dict[tuple, xr.Dataset] = field(default_factory=dict)

    def __post_init__(self) -> None:
        plan = self.study.plan
        assert plan.tune is not None
        self.store = Store(plan.store)  # one for the whole search: it keeps the labels that it has read
        self.tune, self.label = plan.tune, self.entry.label
        held = self.tune.held_out
        strengths = self.entry.strengths
        if isinstance(strengths, Calibrated):  # held-out prompts score the strength found, they do not find another
            strengths = strengths.model_copy(update={"prompts": strengths.prompts or self.entry.prompts})
        self.held = self.entry.model_copy(
            update={
                "name": f"{self.label}{HELD}",
                "prompts": held.prompts or self.entry.prompts,
                "seeds": held.seeds or self.entry.seeds,
                "strengths": strengths,
            }
        )
        self.judge = plan.tune.judge or next(iter(plan.all_judges()))
        spec = plan.all_judges()[self.judge]
        labels = cells.steered_emotions(plan, self.entry)
        about = judges.known(spec, self.study)
        self.targets, self.threshold = targets_of(labels, about.classes, spec.targets), about.threshold

    def vectors(self, facts: Facts) -> list[Vector]:
        plan = self.study.plan
        return [Vector(facts.label, *labels) for labels in steering_vectors(plan, self.entry)]

    def coarse(self, facts: Facts) -> list[Setting]:
        """The entry's own grid."""
        sets = layer_sets(self.entry.layers, facts.n_layers)
        return [(layer_set, label) for layer_set in sets for label in self.entry.labels()]

    def room(self, vector: Vector) -> int:
        """How many settings more the budget allows."""
        continuations = len(prompt_set(self.entry.prompts, self.study.texts)) * len(self.entry.seeds)
        limit = budget(self.study.plan, self.entry, continuations)
        return 10**9 if limit is None else limit - len(self.scores.get(vector, {}))

    def next(self, vector: Vector) -> list[Setting]:
        if self.targets.get(vector.emotion) is None:
            return []
        spec = self.entry.strengths
        max_strength = float("inf") if isinstance(spec, Calibrated) else MAX_STRENGTH.get(self.entry.op, float("inf"))
        rest = 1.0 if isinstance(spec, Calibrated) and spec.measure == "perplexity_ratio" else 0.0
        return propose(self.scores[vector], self.room(vector), max_strength, rest)

    def derived(self, wanted: set[Condition]) -> Study:
        """The study over these cells alone, whichever of the entry's prompts they are of."""
        labels = {key.strength for key in wanted}
        entries = [
            with_labels(entry, labels).model_copy(update={"controls": ["zero", "random"]})
            for entry in (self.entry, self.held)
            if any(key.op == entry.label for key in wanted)
        ]
        told: dict[str, Any] = {"steer": entries, "reads": {}, "edits": {}, "prompts": None, "generate": None}
        assert self.study.plan.measure is not None
        thresholds = self.study.plan.measure.thresholds
        measure = Measure(perplexity=True, lens=0, anisotropy=False, thresholds=thresholds)
        return replace(
            self.study,
            plan=self.study.plan.model_copy(update={**told, "measure": measure}),
            only=frozenset(wanted),
        )

    def key(self, vector: Vector, setting: Setting, control: str = "none", held: bool = False) -> Condition:
        """The cell of a setting."""
        layer_set, strength = setting
        label = self.held.label if held else self.label
        return Condition(vector.model, label, layer_set, vector.method, vector.emotion, strength, control)


def run(search: Search, wanted: set[Condition], progress: Callable[[], Progress], how: Mapping[str, Any]) -> Any:
    """Fills these cells, and notes which of them can be scored."""
    study = search.derived(wanted)
    summary = runner.run(study, progress=progress(), **how)
    for of, paths in ((cells.steering, STEERED), (cells.unsteered, UNSTEERED)):
        written = {key: fp for job in jobs(study) for key, fp in of(job).items()}
        judged = {k: fp for job in jobs(study) for k, fp in cells.judged_by(job, paths[1], search.judge).items()}
        needed = dict(zip(paths, (written, judged, cells.outcomes(written)), strict=True))
        gone = {
            scored_of(key)
            for path, keys in needed.items()
            for key in (search.store.missing(path, keys) if path in search.store.groups() else keys)
        }
        for path, keys in needed.items():
            search.there.setdefault(path, {}).update({k: fp for k, fp in keys.items() if scored_of(k) not in gone})
    return summary


def scored_of(key: Any) -> tuple:
    """The cell of continuations that a cell is about: what is scored."""
    return key.of if isinstance(key, Judged | JudgedUnsteered) else key


def tune(study: Study, progress: Callable[[], Progress] = Progress, **how: Any) -> Found:
    """Searches until the budget is spent or nothing is left to try, then scores what is best on what is held out.

    progress : makes the progress of each round
    how : the rest, as `runner.run` takes it
    Raises PlanError for a plan without `tune`, InputError for a cell that another run replaced or whose file is lost,
    and what `runner.run` raises.
    """
    entry = tuned(study.plan)
    if study.plan.tune is None or entry is None:
        raise PlanError([study.document.problem((), "no `tune`", "a search", "see docs/howto/tune.md")])
    search = Search(study, entry)
    coarse = {vector: search.coarse(facts) for facts in study.facts for vector in search.vectors(facts)}
    wanted = {vector: settings for vector, settings in coarse.items() if search.targets.get(vector.emotion) is not None}
    summaries = []
    for _ in range(study.plan.tune.rounds + 1):
        keys = {search.key(v, setting) for v, settings in wanted.items() for setting in settings}
        summaries.append(run(search, keys, progress, how))
        for vector, settings in wanted.items():
            round_scores = {
                setting: score(*read(search, vector, setting)[:2], search.tune.perplexity_ratio) for setting in settings
            }
            search.scores[vector] = search.scores.get(vector, {}) | round_scores
        wanted = {vector: more for vector in search.scores if (more := search.next(vector))}
        if not wanted:
            break
    chosen = {vector: top for vector, scores in search.scores.items() if (top := best(scores))}
    if chosen:
        arms = [("random", False), ("none", True), ("random", True)]
        last = {search.key(v, setting, control, held) for v, setting in chosen.items() for control, held in arms}
        last |= {search.key(v, setting) for v, setting in chosen.items()}
        summaries.append(run(search, last, progress, how))
    with axis.named(study.plan.axis):
        lines = [line(search, vector, chosen.get(vector)) for vector in coarse]
    keep(search, lines)
    return Found(together(summaries), lines)


def with_labels(entry: Steer, labels: set[float]) -> Steer:
    """The entry with these strengths: its own as the plan writes them, then the others."""
    spec = entry.strengths
    if isinstance(spec, Calibrated):
        known: list[float] = spec.targets
        mine = [label for label in known if label in labels] + sorted(labels - set(known))
        return entry.model_copy(update={"strengths": spec.model_copy(update={spec.measure: mine})})
    mine = [label for label in spec if float(label) in labels] + sorted(labels - set(map(float, spec)))
    return entry.model_copy(update={"strengths": mine})


# ---- scores --------------------------------------------------------------------------------------------------------


def read(
    search: Search, vector: Vector, setting: Setting, control: str = "none", held: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The objective of a setting's continuations, their perplexity ratios, and the objective of the unsteered ones.

    All [continuation]; empty where the cell is not there. An empty continuation has objective 0 and no ratio.
    Raises InputError for a cell that another run replaced since this one filled it, and for a damaged one.
    """
    entry = search.held if held else search.entry
    key = search.key(vector, setting, control, held)
    unsteered = Unsteered(key.model, key.op)
    if key not in search.there["generations"] or unsteered not in search.there["unsteered"]:
        return (np.array([]),) * 3
    where = {"prompt": list(prompt_set(entry.prompts, search.study.texts)), "seed": entry.seeds}
    target = search.targets[vector.emotion]
    assert target is not None, "a vector without a target is given no settings"
    mine: dict[str, tuple] = {"judged": Judged(*key, search.judge), "outcomes": key}
    others: dict[str, tuple] = {
        "judged_unsteered": JudgedUnsteered(*unsteered, search.judge),
        "outcomes_unsteered": unsteered,
    }
    judged, outcome = (
        read_whole(search.store, path, {key: search.there[path][key]})[key].sel(where) for path, key in mine.items()
    )
    for path, other in others.items():
        if (path, *other) not in search.unsteered_cells:
            [cell] = read_whole(search.store, path, {other: search.there[path][other]}).values()
            search.unsteered_cells[path, *other] = cell
    against, outcome_unsteered = (search.unsteered_cells[path, *other].sel(where) for path, other in others.items())
    ratio = outcome.perplexity / outcome_unsteered.perplexity
    scores, references = (data.score.assign_coords(threshold=search.threshold) for data in (judged, against))
    own, base = (objective(search.tune.objective, values, references, target) for values in (scores, references))
    return own, ratio.values.ravel().astype(float), base


def objective(name: str, score: xr.DataArray, unsteered: xr.DataArray, target: Target) -> np.ndarray:
    """The objective of continuations (…, class) beside the unsteered ones, [continuation]; the least for empty ones.

    That is 0; where classes are to fall, so that scores lie below 0, that of the worst text of both.
    """
    mine, other = (outcomes.score_of(values, target).values.ravel().astype(float) for values in (score, unsteered))
    least = 0.0
    if name == "success":
        objectives = (mine > other).astype(float)
    elif name == "named":
        objectives = outcomes.is_of(score, target).values.ravel().astype(float)
    else:
        objectives = mine
        known = np.concatenate([values[~np.isnan(values)] for values in (mine, other)])
        least = min(0.0, *known) if target.falls and len(known) else 0.0
    return np.where(np.isnan(mine), least, objectives)


def line(search: Search, vector: Vector, setting: Setting | None) -> dict[str, Any]:
    """What is best for a vector, with its scores, or why nothing is."""
    scores = search.scores.get(vector, {})
    row: dict[str, Any] = vector._asdict()
    row |= {"layer_set": "", "strength": float("nan"), "tried": len(scores), "reason": "", "scores": {}}
    if setting is None:
        return {**row, "reason": reason(search, vector, scores)}
    row |= dict(zip(("layer_set", "strength"), setting, strict=True))
    shares, limit = search.tune.objective != "score", search.tune.perplexity_ratio
    for split, held in zip(arrays.SPLITS, (False, True), strict=True):
        own = read(search, vector, setting, "none", held)
        drawn = read(search, vector, setting, "random", held)
        arms = {"vector": own[:2], "random": drawn[:2], "zero": (own[2], np.ones(len(own[2])))}
        row["scores"][split] = {
            arm: {
                **{name: getattr(between, name) for name in ("low", "high", "n")},
                "value": between.estimate,
                "ratio": score(values, ratios, limit).ratio if len(values) else float("nan"),
            }
            for arm, (values, ratios) in arms.items()
            for between in [interval(values, shares, search.study.plan.seed)]
        }
    return row


def reason(search: Search, vector: Vector, scores: Mapping[Setting, Score]) -> str:
    """Why no setting is best."""
    if search.targets.get(vector.emotion) is None:
        return word("the judge has no class for this emotion")
    known = [score.ratio for score in scores.values() if score.known]
    if not known:
        return "none of its settings could be scored: see the failures"
    limit = search.tune.perplexity_ratio
    return f"no setting has a perplexity ratio of at most {limit:g}: the lowest is {min(known):.3g}"


# ---- the store -----------------------------------------------------------------------------------------------------


def keep(search: Search, lines: list[dict[str, Any]]) -> None:
    """Commits what is best, a cell a vector; the same again changes nothing."""
    store = search.store
    store.prepare([arrays.tuned_group(search.study)])
    for line in lines:
        key = (line["model"], search.label, line["method"], line["emotion"])
        number = fingerprint({"tune": search.tune.model_dump(), "line": without_nan(line)})
        if not store.missing("tuned", {key: number}):
            continue
        scalars = {
            "layer_set": line["layer_set"],
            "best": np.float32(line["strength"]),
            "reason": line["reason"],
            "tried": np.int32(line["tried"]),
            "settings": search.tune.model_dump_json(),
        }
        values: dict[str, Any] = {name: ((), value) for name, value in scalars.items()}
        for name, stored in (("value", "score"), ("low", "low"), ("high", "high"), ("ratio", "ratio"), ("n", "n")):
            missing = -1 if name == "n" else np.nan
            grid = [
                [line["scores"].get(split, {}).get(arm, {}).get(name, missing) for arm in arrays.ARMS]
                for split in arrays.SPLITS
            ]
            values[stored] = (("split", "arm"), np.array(grid, np.int32 if name == "n" else np.float32))
        data = arrays.dataset({"split": list(arrays.SPLITS), "arm": list(arrays.ARMS)}, values)
        store.commit("tuned", key, data, fingerprint=number)


def without_nan(value: Any) -> Any:
    """A value without NaN, which no fingerprint takes."""
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value


def together(summaries: list[runner.Summary]) -> runner.Summary:
    """Several runs as one. What was there already is counted where it was found first."""
    first = summaries[0]
    total = replace(first, done=dict(first.done))
    for summary in summaries[1:]:
        for stage, n in summary.done.items():
            total.done[stage] = total.done.get(stage, 0) + n
        total = replace(
            total,
            failures=total.failures + [f for f in summary.failures if f not in total.failures],
            failed_before=total.failed_before + [f for f in summary.failed_before if f not in total.failed_before],
            warnings=list(dict.fromkeys(total.warnings + summary.warnings)),
            verified=total.verified + summary.verified,
            seconds=total.seconds + summary.seconds,
            tokens=total.tokens + summary.tokens,
        )
    return total
