"""Turns an open store into what the claims share: its plan, methods, separation and outcomes; and what a row is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from nsteer.errors import NsteerError
from nsteer.plan.layers import at_depth
from nsteer.plan.outlines import Outline, outline
from nsteer.program.ops import not_finite
from nsteer.report.claims.opened import NAN, ROW, UNSTEERED, ByHand, OpenedGroups
from nsteer.science import outcomes, separation, swapping
from nsteer.science.outcomes import Thresholds
from nsteer.science.presets import RATINGS
from nsteer.science.targets import Target, targets_of, unmapped
from nsteer.store import slug
from nsteer.store.results import Results

AGREES, DIFFERS, INCONCLUSIVE, OPEN = "agrees", "differs", "inconclusive", "cannot be compared"
MEANS = "mean_difference"
CONTROLS = {"random": "random rotation", "shuffled": "vector of shuffled labels"}
"""Label of the `control` axis -> what steered there, beside the vector itself."""
ACCURACY = ("accuracy", "chance", "n_emotions", "n_samples", "accuracy_chosen", "accuracy_chosen_n")
NO_UNSTEERED = "no unsteered text beside it: its steer entry has not the control zero, or none is finished"
"""The axes of a cell of the steering cubes, in the order of its labels."""
IN_MEMORY = 2**28
"""Bytes of pooled streams of a model that are read once and kept; larger ones are read as they are needed."""


@dataclass(frozen=True)
class Rules:
    """What the table supposes where the paper is silent. Every default is ours.

    methods : labels of the generation and the comprehension method; the first of each source when None
    depth : relative depth at which methods are compared
    middle : depths that count as "middle layers"
    baseline : what is subtracted before mean pairwise cosine is taken, whatever the plan's vectors had
    thresholds : of regimes and turning points
    trace : least mean share of letters in another script that counts as one
    shuffles : size of permutation nulls
    """

    methods: tuple[str, str] | None = None
    depth: float = 0.5
    middle: tuple[float, float] = (0.3, 0.7)
    baseline: str = "neutral_mean"
    thresholds: Thresholds = field(default_factory=Thresholds)
    trace: float = 0.005
    shuffles: int = 99
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One line of the table. `value`, `low`, `high` are in the unit that `what` names; `ours` says them in words.

    above, below : what the claim says of the value: that it lies between; both infinite where it says nothing that
    can be tested. `verdict` and `p_adjusted` follow by the rule of `nsteer.report.claims.verdicts`, and `n` counts
    independent units: texts, prompts, models
    inputs : (group of the store, {dim: label or labels}) of everything that the line came from
    """

    claim: str
    what: str
    scope: str
    paper: str
    ours: str = ""
    value: float = NAN
    n: int = 0
    low: float = NAN
    high: float = NAN
    p: float = NAN
    above: float = -math.inf
    below: float = math.inf
    p_adjusted: float = NAN
    control: str = ""
    verdict: str = ""
    why: str = ""
    assumed: str = ""
    inputs: tuple[tuple[str, Mapping[str, Any]], ...] = ()

    @property
    def tests(self) -> bool:
        """Whether the row says what it tests: what can not be compared does not."""
        return math.isfinite(self.above) or math.isfinite(self.below)


class Evidence:
    """An open store with what the claims share: its plan, its methods, separation of each model, outcomes."""

    def __init__(self, results: Results | ByHand, rules: Rules, targets: Mapping[str, Mapping[str, Any]] | None):
        self.results, self.rules, self.given = OpenedGroups(results), rules, targets
        self._measured: dict[str, xr.Dataset] = {}
        self._swapped: dict[str, dict[str, xr.Dataset]] = {}
        self._pooled: dict[str, xr.DataArray] = {}
        self._promoted: dict[str, pd.DataFrame] = {}
        self._told_apart: dict[str, xr.Dataset] = {}
        self.geometry: dict[str, xr.Dataset] = {}  # model -> its RDMs, filled by `nsteer.report.claims.rsa`
        self.columns: Any = None  # its texts as columns, filled by `nsteer.report.texts`

    @property
    def axis(self) -> str:
        """What the store calls the axis of emotions."""
        return self.results.axis

    def has(self, path: str) -> bool:
        return path in self.results

    @cached_property
    def plan(self) -> dict[str, Any]:
        """The plan of the last run, as JSON data; empty when none is recorded."""
        from nsteer.plan import reader

        if not self.has("runs"):
            return {}
        kept = [json.loads(text) for text in self.results["runs"].environment.values.tolist() if text]
        resolved = [
            environment["resolved_plan"]
            for environment in kept
            if isinstance(environment, dict) and "resolved_plan" in environment
        ]
        if resolved:  # `extends:`, presets and --set worked in
            return resolved[-1]
        texts = [text for text in self.results["runs"].plan.values.tolist() if text]
        data = reader.parse(texts[-1], "plan").data if texts else {}
        return data if isinstance(data, dict) else {}

    @cached_property
    def outline(self) -> Outline:
        """Groups of emotions and targets of scenarios, of the plan's text set; empty where it is not there."""
        try:
            return outline(str(self.plan.get("texts", "nsteer")))
        except (LookupError, OSError, NsteerError):
            return Outline({}, {})

    @property
    def targets(self) -> Mapping[str, Mapping[str, Any]]:
        """Scenario kind -> {emotion, sign}."""
        if self.given is not None:
            return self.given
        return self.outline.scenario_targets

    @property
    def groups(self) -> Mapping[str, str]:
        """Emotion -> positive | negative | other."""
        return self.outline.emotions

    @property
    def ratings(self) -> tuple[Mapping[str, Mapping[str, float]], str]:
        """The plan's ratings, scale -> emotion -> value, and where they come from; empty when it names none."""
        given = self.plan.get("ratings")
        if isinstance(given, str) and given in RATINGS:
            return RATINGS[given].scales, f"{given}, {RATINGS[given].citation}"
        return (given, "given in the plan") if isinstance(given, dict) else ({}, "")

    @cached_property
    def models(self) -> list[str]:
        return self.results.models

    def fact(self, model: str, name: str) -> Any:
        """A fact of a model from the group `models`; None when it is not there."""
        if not self.has("models"):
            return None
        known = self.results["models"]
        if name not in known or model not in known.model.values.tolist():
            return None
        value = known[name].sel({"model": model}).values.item()
        return None if value in ("", -1) else value

    def family(self, model: str) -> str:
        return str(self.fact(model, "model_type") or "")

    def with_activations(self) -> list[str]:
        return [model for model in self.models if self.has(f"activations/{slug(model)}")]

    def sources(self, model: str) -> dict[str, str]:
        """Method -> generation | comprehension, as its protocol says; by its label where none is kept."""
        known = [str(m) for m in self.results[f"activations/{slug(model)}"].method.values.tolist()]
        return {m: str(self.protocols.get(m, {}).get("source", m.split("-")[0])) for m in known}

    @cached_property
    def protocols(self) -> dict[str, dict[str, Any]]:
        """Method -> its knobs, from the group `methods`."""
        if not self.has("methods"):
            return {}
        kept = self.results["methods"].protocol
        texts = zip(kept.method.values.tolist(), kept.values.tolist(), strict=True)
        return {str(name): json.loads(text) for name, text in texts if text}

    def pair(self, model: str) -> tuple[str | None, str | None]:
        """The labels of the generation and the comprehension method of a model; None where there is none."""
        sources = self.sources(model)
        if self.rules.methods is not None:
            first, second = (m if m in sources else None for m in self.rules.methods)
            return first, second
        labels = [next((m for m, s in sources.items() if s == want), None) for want in ("generation", "comprehension")]
        return labels[0], labels[1]

    def text(self, model: str) -> xr.DataArray | None:
        path = f"samples/{slug(model)}"
        return self.results[path].text.load() if self.has(path) else None

    def folds(self, model: str, methods: list[str]) -> xr.DataArray | None:
        """The fold of every sample: those of one instruction; None where no instruction is kept."""
        path = f"samples/{slug(model)}"
        if not self.has(path) or "instruction" not in self.results[path]:
            return None
        asked = self.results[path].instruction.sel({"model": [model], "method": methods}).load()
        return separation.folds_of(asked)

    def bags(self, model: str, methods: list[str]) -> xr.DataArray | None:
        """Bags of token embeddings of every sample; None where none are kept."""
        path = f"embeddings/{slug(model)}"
        if not self.has(path) or not set(methods) <= set(self.results[path].method.values.tolist()):
            return None
        return self.results[path].pooled.sel({"model": [model], "method": methods}).load()

    def units(self, model: str) -> dict[str, Any]:
        """What of a method is independent: passages, each by itself; texts written to templates, by their folds."""
        return {m: "samples" if s == "comprehension" else "folds" for m, s in self.sources(model).items()}

    def pooled(self, model: str) -> xr.DataArray:
        """Pooled streams of a model, of all its methods; in memory once where they are not large."""
        if model not in self._pooled:
            data = self.results[f"activations/{slug(model)}"].pooled.sel({"model": model})
            self._pooled[model] = data.load() if data.nbytes <= IN_MEMORY else data
        return self._pooled[model]

    def measured(self, model: str) -> xr.Dataset:
        """Separation of a model's methods, with the rules' baseline, computed once."""
        if model not in self._measured:
            rules = self.rules
            chosen = [m for m in self.pair(model) if m]
            data = self.pooled(model).expand_dims("model").sel({"method": chosen})
            text = self.text(model)
            if text is not None:
                text = text.sel({"model": [model], "method": chosen})
            self._measured[model] = separation.measure(
                data,
                baseline={method: self.baseline(method) for method in chosen},
                text=text,
                groups=self.groups,
                folds=self.folds(model, chosen),
                units=self.units(model),
                embeddings=self.bags(model, chosen),
                shuffles=rules.shuffles,
                seed=rules.seed,
            ).sel({"model": model})
        return self._measured[model]

    def swapped(self, model: str) -> dict[str, xr.Dataset]:
        """Method -> what its vectors follow, text or instruction, over layers; computed once."""
        path = f"swapped/{slug(model)}"
        if model not in self._swapped and self.has(path):
            swaps, text = self.results[path].sel({"model": model}), self.text(model)
            there = (swaps.asked != "").any(["emotion", "sample", "swap"])
            for method in [str(m) for m in swaps.method.values[there.values].tolist()] if text is not None else []:
                folds = self.folds(model, [method])
                assert text is not None and folds is not None
                where = {"model": model, "method": method}
                self._swapped.setdefault(model, {})[method] = swapping.measure(
                    swaps.sel({"method": method}).load(),
                    self.pooled(model).sel({"method": method}).load(),
                    text.sel(where),
                    folds.sel(where),
                    self.baseline(method),
                )
        return self._swapped.get(model, {})

    def promoted(self, model: str) -> pd.DataFrame | None:
        """What `outcomes.promoted` tells of a model's vectors, worked out once; None where nothing is kept."""
        path = f"lens/{slug(model)}"
        if model not in self._promoted and self.has(path):
            self._promoted[model] = outcomes.promoted(self.results[path].token.load())
        return self._promoted.get(model)

    def read_behind(self, method: str) -> str:
        """What the texts of a method were read behind, in words; '' for passages."""
        knobs = self.protocols.get(method, {})
        if knobs.get("source") != "generation":
            return ""
        alone = knobs.get("context") == "text"
        return f"{method}: texts read {'alone' if alone else 'behind the instruction they were written to'}"

    def told_apart(self, model: str) -> xr.Dataset:
        """Held-out accuracy of *all* methods of a model, each against the baseline that the plan gives it.

        `accuracy`, `chance`, `n_emotions` (method, layer); `accuracy_chosen`, `accuracy_chosen_n` (method), at a layer
        chosen inside the folds.
        """
        if model not in self._told_apart:
            knobs = {name: self.protocols.get(name, {}) for name in self.sources(model)}
            own = {name: str(method.get("baseline", self.baseline(name))) for name, method in knobs.items()}
            known = [m for m in self.pair(model) if m and own[m] == self.baseline(m) and not self._denoised(m)]
            rest = [name for name in own if name not in known]
            tables = [self.measured(model)[list(ACCURACY)].sel({"method": known})] if known else []
            if rest:
                text, data, folds = self.text(model), self.pooled(model), self.folds(model, rest)
                accuracies = separation.accuracies(
                    data.sel({"method": rest}),
                    baseline=own,
                    variance={name: self._denoised(name) for name in rest},
                    text=None if text is None else text.sel({"model": model, "method": rest}),
                    folds=None if folds is None else folds.sel({"model": model}),
                )
                tables.append(accuracies)
            bare = [table.drop_vars("model", errors="ignore") for table in tables]
            joined = xr.concat(bare, "method", coords="minimal", compat="override")
            self._told_apart[model] = joined.sel({"method": list(own)}).assign_coords(model=model)
        return self._told_apart[model]

    def _denoised(self, method: str) -> float | None:
        """Share of the neutral texts' variance that the plan projects out of a method's vectors."""
        return (self.protocols.get(method, {}).get("project_out") or {}).get("variance")

    def baseline(self, method: str) -> str:
        """What a method's samples are set against here: as the rules say, or their mean where none is neutral."""
        no_neutral = self.protocols.get(method, {}).get("neutral_samples") == 0
        return "grand_mean" if no_neutral and self.rules.baseline == "neutral_mean" else self.rules.baseline

    def missing(self, model: str, method: str) -> str:
        """What is thin or missing in the samples of a method, by name; '' when nothing is."""
        each = self.measured(model).n_each.sel({"method": method}).max("layer")
        few = [f"{e} {int(k)}" for e, k in zip(each.emotion.values.tolist(), each.values, strict=True) if k < 2]
        gaps = [f"fewer than two texts: {', '.join(few)}"] if few else []
        where, text = {"model": model, "method": method}, self.text(model)
        if self.unchatted(model, method):
            gaps.append("no chat template: instructions without one")
        if text is not None:
            pooled = self.pooled(model).sel({"method": method})
            lost = pooled.isnull().any("d_model").all("layer") & (text.sel(where) != "")
            gone = [
                f"{e} {int(k)}"
                for e, k in zip(lost.emotion.values.tolist(), lost.sum("sample").values, strict=True)
                if k
            ]
            gaps += [f"texts whose activations are NaN: {', '.join(gone)}"] if gone else []
        return "; ".join(gaps)

    def unchatted(self, model: str, method: str) -> bool:
        """Whether a method that uses a chat template where there is one found none in a model."""
        knobs, path = self.protocols.get(method, {}), f"samples/{slug(model)}"
        if knobs.get("source") != "generation" or knobs.get("chat") != "auto" or not self.has(path):
            return False
        written = self.results[path].sel({"model": model, "method": method})
        return bool((written.text != "").any()) and not bool(written.chat.any())

    def layer(self, model: str, depth: float) -> int:
        """The layer at a depth, or the nearest one captured."""
        known = self.measured(model).layer.values.tolist()
        wanted = at_depth(depth, int(self.fact(model, "n_layers") or len(known)))
        return min(known, key=lambda layer: abs(layer - wanted))

    # -- steering

    @cached_property
    def by_hand(self) -> Evidence:
        """What the conditions of `edits` came to, as of steered texts."""
        return Evidence(ByHand(self.results), self.rules, self.given)

    @cached_property
    def steered(self) -> xr.Dataset | None:
        """Repetition, perplexity ratio and regime of every continuation; None without generations."""
        if not self.has("generations"):
            return None
        return outcomes_of(self.results, self.rules.thresholds)

    @cached_property
    def judges(self) -> list[str]:
        """The labels of those who judged, in the plan's order as far as it tells one.

        Not one that has judged nothing, nor one whose name another judge had when the scores were made: none of its
        classes is among theirs.
        """
        there = [str(label) for label in self.results["judged"].judge.values.tolist()] if self.has("judged") else []
        there = [judge for judge in there if self.has_judged(judge) and self.scores("judged", judge).sizes["class"]]
        wanted = (["judge"] if self.plan.get("judge") else []) + list(self.plan.get("judges") or {})
        return [judge for judge in wanted if judge in there] + [judge for judge in there if judge not in wanted]

    def has_judged(self, judge: str) -> bool:
        """Whether a judge has a finished cell: the store may have its label before it reads."""
        judged = self.results["judged"]
        done = judged.cell.sel({"cell_field": "fingerprint"}) if "cell" in judged else judged.score
        return bool((done.sel({"judge": judge}) if "judge" in done.dims else done).notnull().any())

    @cached_property
    def judge(self) -> str:
        """The judge that claims, figures and texts are told by: the first."""
        return next(iter(self.judges), "")

    def judge_settings(self, judge: str) -> dict[str, Any]:
        """What the group `judges` says of a judge; empty where none is kept."""
        if not self.has("judges") or judge not in self.results["judges"].judge.values.tolist():
            return {}
        text = str(self.results["judges"].settings.sel({"judge": judge}).values.item())
        return json.loads(text) if text else {}

    def scores(self, path: str, judge: str | None = None) -> xr.DataArray:
        """The scores of one judge in `judged` or `judged_unsteered`, over its own classes; of the first when None.

        Coordinates `threshold` and `unit` say what they mean.
        """
        chosen = self.judge if judge is None else judge
        score = self.results[path].score
        if chosen not in score.judge.values.tolist():
            score = score.reindex({"judge": [chosen]})
        score = score.sel({"judge": chosen})
        own = self.judge_settings(chosen).get("classes")
        known = [label for label in score["class"].values.tolist() if not own or label in own]
        return score.sel({"class": known})

    @cached_property
    def judged(self) -> xr.Dataset | None:
        """Success of every judged continuation at its strength's own sign; None when something is missing."""
        return None if self.missing_judged() else self.judged_by(self.judge)

    def judged_by(self, judge: str) -> xr.Dataset:
        """The same by one judge, where the groups are there."""
        score, unsteered = self.scores("judged", judge), self.scores("judged_unsteered", judge)
        return outcomes.success(score, unsteered, self.classes_of(judge), signs_of(score))

    def setups(self) -> list[tuple[dict[str, str], xr.Dataset, xr.Dataset | None]]:
        """The setups of the steering cubes: their labels, (model, op, layer_set, method), outcomes and success.

        Success is None where nothing of a setup is judged; what a judge has no class for is missing in it, not filled.
        """
        if self.steered is None:
            return []
        judged = [] if self.judged is None else conditions(self.judged)
        return [
            (where, told, next((beside for other, beside in judged if other == where), None))
            for where, told in conditions(self.steered)
        ]

    @cached_property
    def not_finite(self) -> list[dict[str, Any]]:
        """The labels of steered cells of the vectors themselves that failed because something was not finite.

        Along model, op, layer_set, method, emotion and strength; those that were made good since are left out.
        """
        if not self.has("failures"):
            return []
        told = ("stage", "labels", "reason", "resolved")
        generations = self.results["generations"] if self.has("generations") else {}
        dims = [str(dim) for dim in generations["cell"].dims if dim != "cell_field"] if "cell" in generations else []
        columns = [self.results["failures"][name].values.tolist() for name in told]
        return [
            labels
            for stage, cell, reason, resolved in zip(*columns, strict=True)
            if dims and stage == "steering" and not resolved and not_finite(str(reason))
            for labels in [dict(zip(dims, json.loads(cell), strict=True))]
            if labels["control"] == "none"
        ]

    @cached_property
    def differs(self) -> xr.DataArray | None:
        """1 where a steered text is not its unsteered continuation, 0 where it is; NaN where one of them is not
        there."""
        if self.steered is None or not self.has(UNSTEERED):
            return None
        text, bare = (self.results[path] for path in ("generations", UNSTEERED))
        there = self.steered.repetition.notnull() & (bare.n_tokens.load() >= 0).reindex_like(text, fill_value=False)
        unsteered = bare.text.load().reindex({dim: text[dim] for dim in bare.text.dims}, fill_value="")
        return xr.where(there, (text.text.load() != unsteered).astype(float), NAN)

    @cached_property
    def prompted(self) -> xr.Dataset | None:
        """Success of every judged continuation that was asked for in words; None where there is none.

        Over (model, op, emotion, asked, prompt, seed); "away" counts as a strength below 0.
        """
        if not self.has("judged_prompted") or not self.has("judged_unsteered") or self.missing_judged():
            return None
        score, unsteered = self.scores("judged_prompted"), self.scores("judged_unsteered")
        return outcomes.success(score, unsteered, self.classes, xr.where(score.asked == "away", -1, 1))

    @cached_property
    def classes(self) -> dict[str, Target | None]:
        """Emotion -> its target under the first judge, by the plan's map where it has one."""
        return self.classes_of(self.judge)

    def classes_of(self, judge: str) -> dict[str, Target | None]:
        """Emotion -> the classes of a judge by which it is told; None where it has none."""
        score = self.scores("judged", judge)
        return targets_of(score.emotion.values.tolist(), score["class"].values.tolist(), self.map_of(judge))

    def own_class(self, emotion: str) -> str | None:
        """The one class of the first judge that stands for an emotion; None where none does, or several together."""
        target = self.classes.get(emotion)
        return None if target is None else target.own

    @cached_property
    def unmapped(self) -> list[str]:
        """A sentence for each emotion that has no target under the first judge."""
        score = self.scores("judged")
        emotions, classes = (score[dim].values.tolist() for dim in ("emotion", "class"))
        return unmapped(emotions, classes, self.map_of(self.judge))

    def map_of(self, judge: str) -> dict[str, Any]:
        """Emotion -> classes of a judge, as the plan says: what `targets.target_of` takes."""
        kept = self.judge_settings(judge)
        alone = self.plan.get("judge") if judge == "judge" else None
        given = kept or (alone if isinstance(alone, dict) else None) or (self.plan.get("judges") or {}).get(judge)
        return (given.get("map") if isinstance(given, dict) else None) or {}

    def settings(self, op: str) -> dict[str, Any]:
        """The knobs of a steer entry, from the group `ops`; empty where none is kept."""
        if not self.has("ops") or op not in self.results["ops"].op.values.tolist():
            return {}
        text = str(self.results["ops"].settings.sel({"op": op}).values.item())
        return json.loads(text) if text else {}

    def missing_judged(self) -> str:
        missing = [path for path in ("judged", "judged_unsteered") if not self.has(path)]
        return " and ".join(missing or ["judged"] * (not self.judges))


def signs_of(data: xr.DataArray) -> xr.DataArray:
    """1 where a strength pushes towards the emotion, -1 where it pushes away."""
    return xr.where(data.strength < 0, -1, 1)


def outcomes_of(results: Mapping[str, xr.Dataset], thresholds: Thresholds = outcomes.DEFAULTS) -> xr.Dataset:
    """What is known of every continuation from the store: `repetition`, `perplexity_ratio`, `regime`, `empty`.

    Over (model, op, layer_set, method, emotion, strength, control, prompt, seed). `repetition` is read from `outcomes`
    if it is there, else computed from the token ids; without perplexities the ratio is NaN and only the repetitive
    regime can be determined. `repetition_unsteered` is that of the unsteered ones (NaN where there are none). `empty`:
    whether the model ended without a word; such a continuation is in no regime.
    """
    generations = results["generations"]
    score = outcomes.repetition(generations.token_id.load(), thresholds.ngram)
    beside = {d: 0 for d in score.dims if d not in ("model", "op", *ROW)}
    unsteered = xr.full_like(score.isel(beside, drop=True), np.nan)
    if "unsteered" in results:
        unsteered = outcomes.repetition(results["unsteered"].token_id.load(), thresholds.ngram)
    ratio = xr.full_like(score, np.nan).rename("perplexity_ratio")
    if not missing_perplexity(results):
        above, below = results["outcomes"].perplexity.load(), results["outcomes_unsteered"].perplexity.load()
        ratio = outcomes.perplexity_ratio(above, below).reindex_like(score).transpose(*score.dims)
    measures = xr.Dataset(
        {"repetition": score, "perplexity_ratio": ratio, "repetition_unsteered": unsteered.reset_coords(drop=True)}
    )
    empty = ((generations.text.load() == "") & score.notnull()).reset_coords(drop=True)
    told = outcomes.regime(score, ratio, thresholds)
    return measures.assign(regime=told.copy(data=np.where(empty.values, "", told.values)), empty=empty)


def missing_perplexity(results: Mapping[str, xr.Dataset]) -> str:
    """The groups that a perplexity ratio lacks, '' when it has all."""
    return " and ".join(
        path for path in ("outcomes", "outcomes_unsteered") if path not in results or "perplexity" not in results[path]
    )


def control_label(shown: Mapping[str, str]) -> str:
    """What the controls show, by name; says so where there is no random direction."""
    named = [f"{name} {shown[control]}" for control, name in CONTROLS.items() if control in shown]
    return "; ".join(named if "random" in shown else ["random rotation not in the store", *named])


def by_bags(measured: xr.Dataset) -> str:
    """What words, and token embeddings, tell apart without any block of a model: of the dataset of `measured`."""
    named = {"lexical": "bag of words", "embedding": "bag of embeddings"}
    return "".join(f", {said} {float(measured[name]):.2f}" for name, said in named.items() if name in measured)


def stated(claim: str, what: str, scope: str, paper: str, /, **more: Any) -> Row:
    """A row whose claim says something of its value."""
    return Row(claim, what, scope, paper, **more)


def unknown(claim: str, what: str, scope: str, paper: str, why: str, **more: Any) -> Row:
    """A row that can not be compared, and why."""
    return Row(claim, what, scope, paper, why=why, **more)


def read_from(
    evidence: Evidence, model: str, methods: Iterable[str], layers: Any = None
) -> tuple[tuple[str, dict], ...]:
    labels: dict[str, Any] = {"model": model, "method": list(methods)}
    inputs = [(f"activations/{slug(model)}", labels if layers is None else {**labels, "layer": layers})]
    if evidence.has(f"samples/{slug(model)}"):
        inputs.append((f"samples/{slug(model)}", labels))
    return tuple(inputs)


def compared_at(evidence: Evidence) -> str:
    rules = evidence.rules
    return f"compared at depth {rules.depth:g} of both; {measured_as(evidence)}; copies of a text left out"


def measured_as(evidence: Evidence) -> str:
    """What vectors are in rows computed from activations; names the methods whose own vectors are something else."""
    other = [
        f"{name} {kind}"
        for name, knobs in evidence.protocols.items()
        if (kind := (knobs.get("estimator") or {}).get("kind", MEANS)) != MEANS
    ]
    more = f" (not the plan's estimators: {', '.join(other)})" if other else ""
    rest = [name for name in evidence.protocols if evidence.baseline(name) != evidence.rules.baseline]
    apart = f" (grand_mean for {', '.join(rest)}, without neutral texts)" if rest else ""
    return f"mean differences{more}; baseline {evidence.rules.baseline}{apart}"


def conditions(data: xr.Dataset) -> list[tuple[dict[str, str], xr.Dataset]]:
    """What of a steering cube holds anything, by (model, op, layer_set, method), each under its own labels.

    A group of a store has the strengths, emotions, controls and prompts of all steer entries;
    each of these those that it has.
    """
    dims = [dim for dim in ("model", "op", "layer_set", "method") if dim in data.dims]
    cubes = []
    first = next(iter(data.data_vars.values()))
    there = (first != "") if first.dtype == object else first.notnull()
    some = there.any([dim for dim in first.dims if dim not in dims]).transpose(*dims)
    for at in np.argwhere(some.values):
        labels = {dim: data[dim].values.tolist()[i] for dim, i in zip(dims, at, strict=True)}
        cubes.append((labels, data.sel(labels).sel(own_labels(there.sel(labels)))))
    return cubes


def own_labels(there: xr.DataArray) -> dict[str, list]:
    """The labels along each dim at which anything is there."""
    some = {str(dim): there.any([d for d in there.dims if d != dim]).values for dim in there.dims}
    return {
        dim: [x for x, known in zip(there[dim].values.tolist(), flags, strict=True) if known]
        for dim, flags in some.items()
    }


def greatest(strengths: Iterable[float]) -> float:
    """The strength that pushes most; of two that push as far, the one towards the emotion."""
    return max(strengths, key=lambda strength: (abs(strength), strength))


def ours_of(thresholds: Thresholds) -> str:
    return "thresholds are ours: " + ", ".join(f"{name} {value:g}" for name, value in vars(thresholds).items())
