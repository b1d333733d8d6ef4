"""Turns a document into a plan that can run, or into every problem it has, each located.

Problems of form (pydantic) and of meaning (this module) come together: what fails by form is left out, and
the rest is still checked for meaning. Imports neither torch nor xarray.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from pydantic import BaseModel, ValidationError

from nsteer import formulas, layers, models, reader, texts
from nsteer.errors import ModelError, PlanError, Problem, did_you_mean
from nsteer.ops import REFERENCED, UNSCALED
from nsteer.plan import PARAMETERS, Edit, Method, Plan, Steer
from nsteer.presets import EMOTION_SETS, NEUTRAL, PRESETS, RATINGS
from nsteer.reader import Document, Path, kind

QUANTIZING = ("bitsandbytes", "accelerate")
"""What loads int8 weights."""

LONGEST_NAME = 255
"""Bytes that a file system takes for the name of a file."""

SOURCES = ("random", "contrast", "mean", "store", "formula")
"""Where a direction of `edits:` may come from."""

PARAMETER_OF = {
    field: [kind for kind, own in PARAMETERS.items() if field in own]
    for field in sorted(set().union(*PARAMETERS.values()))
}
"""Field of an estimator -> the kinds that have it."""

LEAST = {"pca_difference": 2, "lda": 2}
"""Estimator -> fewest samples on a side that make it more than the mean difference."""


@dataclass(frozen=True)
class Study:
    """A plan that passed every check, with what the checks found out on the way."""

    plan: Plan
    document: Document
    texts: texts.TextSet | None
    facts: tuple[models.Facts, ...]

    def layers(self, spec: Any, facts: models.Facts) -> tuple[int, ...]:
        """The block indices of a layer specification in one of the study's models."""
        return layers.resolve(spec, facts.n_layers)


def load(file: str | FilePath, settings: Iterable[str] = (), *, allow_outside: bool = False) -> Study:
    """The study in a plan file, with `--set` overrides. Raises PlanError with every problem found.

    allow_outside : whether the plan may name texts, vectors and plans outside its folder and the one where one stands
    """
    return study(reader.override(reader.read(file, allow_outside), settings))


def study(document: Document) -> Study:
    """The study that a document describes. Raises PlanError with every problem found."""
    if not isinstance(document.data, dict):
        raise PlanError([document.problem((), kind(document.data), "a mapping of plan fields")])
    checker = _Checker(document)
    plan = checker.form()
    if plan is not None:
        checker.meaning(plan)
    if checker.problems:
        raise PlanError(checker.problems)
    assert plan is not None
    return Study(plan, document, checker.texts, tuple(checker.facts))


def expand_presets(data: Any) -> Any:
    """The data of a plan with every known `preset` spelled out beneath the fields that override it."""
    methods = data.get("methods") if isinstance(data, dict) else None
    if not isinstance(methods, dict):
        return data
    return {**data, "methods": {name: _expand(method) for name, method in methods.items()}}


def _expand(method: Any) -> Any:
    method = {"preset": method} if isinstance(method, str) else method
    preset = method.get("preset") if isinstance(method, dict) else None
    if not isinstance(preset, str) or preset not in PRESETS:
        return method
    fields = PRESETS[preset].fields
    nested = {k: {**v, **method[k]} for k, v in fields.items() if isinstance(v, dict) and _overrides(v, method.get(k))}
    return {**fields, **method, **nested}


def _overrides(preset: dict, own: Any) -> bool:
    """Whether `own` refines a preset's mapping; a pooling of another kind replaces it instead."""
    return isinstance(own, dict) and own.get("kind", preset.get("kind")) == preset.get("kind")


class _Checker:
    def __init__(self, document: Document):
        self.document = document
        self.data = expand_presets(document.data)
        self.problems: list[Problem] = []
        self.failed: set[Path] = set()  # what failed by form, as paths of the document
        self.left_out: dict[Path, set[int]] = {}  # list -> the places in it that failed
        self.texts: texts.TextSet | None = None
        self.facts: list[models.Facts] = []

    # ---- form ------------------------------------------------------------------------------------------

    def form(self) -> Plan | None:
        """The plan, or what can be made of it without the parts that fail; None when too little is left."""
        data, bad, missing = self.data, set[Path](), set[Path]()
        for _ in range(8):
            try:
                return Plan.model_validate(data)
            except ValidationError as error:
                found = [(self.original(_real(one, data)), one) for one in error.errors() if not _other_branch(one)]
                if data is self.data:
                    self.problems += [self.of_form(path, one) for path, one in found if not self.has_preset(path)]
                missing |= {path for path, one in found if one["type"] == "missing"}
                bad |= {path for path, one in found if one["type"] != "missing"}
                self.failed = bad | missing
                self.left_out = _places(bad)
                data = _fill_missing(_without(self.data, list(bad)), [self.reduced(path) for path in missing])
        return None

    def has_preset(self, path: Path) -> bool:
        """Whether `path` is the `source` that a preset would bring, were the preset a known one."""
        if len(path) != 3 or path[0] != "methods" or path[2] != "source":
            return False
        method = self.node(path[:2])
        return isinstance(method, str) or (isinstance(method, dict) and "preset" in method and "source" not in method)

    def original(self, path: Path) -> Path:
        """A path of the checked plan as a path of the document: list entries that failed are not in the plan."""
        found: Path = ()
        for part in path:
            if isinstance(part, int):
                for gone in sorted(self.left_out.get(found, ())):
                    part += gone <= part
            found = (*found, part)
        return found

    def reduced(self, path: Path) -> Path:
        """A path of the document as a path of the checked plan."""
        parts = [
            part - sum(gone < part for gone in self.left_out.get(path[:i], ())) if isinstance(part, int) else part
            for i, part in enumerate(path)
        ]
        return tuple(parts)

    def fails(self, *path: str | int) -> bool:
        """Whether what the plan says there failed by form, so that a default or stand-in is in its place."""
        place = self.original(path)
        return any(place[: len(bad)] == bad for bad in self.failed)

    def given(self, plan: Plan, *fields: str) -> bool:
        """Whether the document says anything under one of these fields, in any form: what failed is not absent."""
        return any(bool(getattr(plan, name)) or self.fails(name) or bool(self.node((name,))) for name in fields)

    def names(self, name: str) -> list[str]:
        """The labels in a mapping of the document, those of entries that fail by form too."""
        found = self.node((name,))
        return list(found) if isinstance(found, dict) else []

    def of_form(self, path: Path, error: Any) -> Problem:
        context = error.get("ctx", {})
        if error["type"] == "nsteer":
            return self.document.problem(path, context["found"], context["expected"], context["hint"])
        if error["type"] == "extra_forbidden":
            known = _fields_at(path[:-1])
            found = f"the unknown key {path[-1]!r}"
            return self.document.problem(path, found, "a field of the plan", did_you_mean(path[-1], known), key=True)
        if error["type"] == "missing":
            return self.document.problem(path, "nothing", EXPECTED_FIELD.get(path[-1], "a value"), "it is required")
        if error["loc"][-1] == "[key]":
            expected = _EXPECTED.get(error["type"], lambda _: error["msg"].lower())(context)
            return self.document.problem(path, kind(error["input"]), expected, key=True)
        if error["loc"][-1] == "str" and error["type"] == "string_type":
            return self.document.problem(path, kind(error["input"]), "text or a list")
        expected = _EXPECTED.get(error["type"], lambda _: error["msg"].lower())(context)
        hint = ""
        if error["type"] == "literal_error" and isinstance(error["input"], str):
            hint = did_you_mean(
                error["input"], [w.strip(" '") for w in context["expected"].replace(" or ", ",").split(",")]
            )
            hint = hint if hint.startswith("did") else ""
        return self.document.problem(path, kind(error["input"]), expected, hint)

    # ---- meaning ---------------------------------------------------------------------------------------

    def meaning(self, plan: Plan) -> None:
        """Checks that need more than one field, a file, or a model's config."""
        self.text_set(plan)
        emotions = self.emotions(plan)
        self.ratings(plan, emotions)
        self.models(plan)
        self.all_layers(plan)
        for name, method in plan.methods.items():
            self.method(plan, name, method, emotions)
        for i, block in enumerate(plan.steer):
            self.steer(plan, self.steer_path(i), block, emotions)
        self.steer_labels(plan)
        self.general(plan)
        self.judge(plan)
        self.store(plan)

    def add(self, path: Path, found: str, expected: str, hint: str = "", key: bool = False) -> None:
        """One more problem, unless its place has already failed by form."""
        if not self.fails(*path):
            self.problems.append(self.document.problem(self.original(path), found, expected, hint, key))

    def known(self, path: Path, word: str, known: Iterable[str], what: str) -> bool:
        known = list(known)
        if word in known:
            return True
        self.add(path, repr(word), what, did_you_mean(word, known))
        return False

    def text_set(self, plan: Plan) -> None:
        if self.fails("texts"):
            return
        try:
            file = texts.find(plan.texts, FilePath(self.document.file).parent)
            if plan.texts not in texts.shipped() and not self.document.may_read(file):
                self.add(("texts",), f"{plan.texts!r}, outside", reader.WITHIN, reader.OUTSIDE)
                return
            self.texts = texts.load(file)
        except LookupError as error:
            self.add(("texts",), repr(plan.texts), "a shipped text set or a file", error.args[0])
        except PlanError as error:
            self.problems += error.problems

    def emotions(self, plan: Plan) -> list[str] | None:
        """The emotions that a steer block may name; None where the plan's own are in doubt."""
        if self.fails("emotions"):
            return None
        if isinstance(plan.emotions, str):
            if not self.known(("emotions",), plan.emotions, EMOTION_SETS, "a named set of emotions, or a list"):
                return None
            emotions = list(EMOTION_SETS[plan.emotions])
        else:
            emotions = plan.emotions
            self.distinct(("emotions",), emotions)
        if not plan.methods or self.texts is None:
            return emotions
        known = self.texts.emotions
        for i, emotion in enumerate(emotions):
            path: Path = ("emotions",) if isinstance(plan.emotions, str) else ("emotions", i)
            if emotion == NEUTRAL:
                self.add(path, repr(emotion), "an emotion", f"{NEUTRAL!r} is the label of the baseline")
            else:
                self.known(path, emotion, known, f"an emotion of the text set {self.texts.name!r}")
        meant = [near for one in emotions if one not in known for near in difflib.get_close_matches(one, known)]
        return [*emotions, *meant]  # one slip is said once, not wherever the right word stands

    def ratings(self, plan: Plan, emotions: list[str] | None) -> None:
        if isinstance(plan.ratings, str):
            self.known(("ratings",), plan.ratings, RATINGS, "a table of ratings, or scale: {emotion: number}")
        elif plan.ratings is not None and emotions is not None:
            for scale, table in plan.ratings.items():
                for emotion in table:
                    self.known(("ratings", scale, emotion), emotion, emotions, "an emotion of this plan")

    def distinct(self, path: Path, labels: list) -> None:
        for i, label in enumerate(labels):
            if label in labels[:i]:
                self.add((*path, i), f"{label!r} a second time", "each label once")

    def models(self, plan: Plan) -> None:
        labels: list[str] = []
        for i, spec in enumerate(plan.models):
            label = models.label_of(spec)
            if label.lower().replace("/", "--") in labels and not self.fails("models", i, "label"):
                self.add(("models", i), f"{label!r} a second time", "each model once", "give one of them a `label`")
            labels.append(label.lower().replace("/", "--"))
            self.quantization(plan, i, spec)
            if self.fails("models", i, "id") or self.fails("models", i, "revision"):
                continue  # a stand-in
            try:
                self.facts.append(models.facts(spec))
            except ModelError as error:
                path: Path = ("models", i, "id") if isinstance(self.node(("models", i)), dict) else ("models", i)
                self.add(path, str(error), "a hub id, a model directory or zoo/NAME")
                continue
            if not models.LABEL.fullmatch(label) or ".." in label:
                place: Path = ("models", i, "label") if spec.label else ("models", i)
                hint = "" if spec.label else "give it a `label`"
                self.add(place, kind(label), "a label of letters, digits, '.', '_', '-' and '/'", hint)
            if self.facts[-1].is_classifier:
                found = f"{spec.id!r}, a classifier"
                self.add(("models", i), found, "a causal language model", "a classifier judges: `judge`")
                self.facts.pop()

    def quantization(self, plan: Plan, i: int, spec: Any) -> None:
        path: Path = ("models", i, "quantization")
        if spec.quantization is None:
            return
        if plan.executor == "ndif":
            self.add(path, repr(spec.quantization), "nothing", "a server's models are as the server loaded them")
        elif not all(map(importlib.util.find_spec, QUANTIZING)):
            found = f"{spec.quantization!r}, without {' and '.join(QUANTIZING)}"
            self.add(path, found, "a precision that this installation can load", "pip install 'nsteer[int8]'")

    def node(self, path: Path) -> Any:
        """What the document holds at a path of the checked plan; None where it holds nothing."""
        data = self.document.data
        for part in self.original(path):
            try:
                data = data[part]
            except (LookupError, TypeError):
                return None
        return data

    def all_layers(self, plan: Plan) -> None:
        self.layers(("layers",), plan.layers)
        for i, block in enumerate(plan.steer):
            path = self.steer_path(i)
            self.layer_sets((*path, "layers"), block.layers)
            if block.vectors.layer != "same":
                self.layers((*path, "vectors", "layer"), block.vectors.layer)
        for name, read in plan.reads.items():
            self.layers(("reads", name, "layers"), read.layers)
        for name, edits in plan.edits.items():
            for i, edit in enumerate(edits):
                self.layers(("edits", name, i, "layers"), edit.layers)
                if edit.vector_layer != "same":
                    self.layers(("edits", name, i, "vector_layer"), edit.vector_layer)

    def layer_sets(self, path: Path, spec: Any) -> None:
        if isinstance(spec, dict):
            for key, value in (spec.get("sets") or {"each": spec["each"]}).items():
                self.layers((*path, "sets", key) if "sets" in spec else (*path, key), value)
        else:
            self.layers(path, spec)

    def layers(self, path: Path, spec: Any) -> None:
        for facts in self.facts:
            try:
                layers.resolve(spec, facts.n_layers)
            except LookupError as error:
                self.add(
                    path, str(error.args[0]), f"layers that {facts.label} has", "negative indices count from the end"
                )
                return

    def method(self, plan: Plan, name: str, method: Method, emotions: list[str] | None) -> None:
        path: Path = ("methods", name)
        if method.preset is not None:
            here = (*path, "preset") if isinstance(self.node(path), dict) else path
            self.known(here, method.preset, PRESETS, "a preset")
        pooling = method.pooling
        self.pooling((*path, "pooling"), pooling)
        neutral = method.samples if method.neutral_samples is None else method.neutral_samples
        if method.baseline == "neutral_mean" and neutral == 0 and not self.fails(*path, "baseline"):
            self.add((*path, "neutral_samples"), "0", "at least 1", "baseline neutral_mean needs neutral texts")
        if method.project_out and neutral < 2:
            self.add((*path, "neutral_samples"), str(neutral), "at least 2", "project_out needs neutral texts")
        self.estimator(path, method, neutral, emotions)
        self.decoding((*path, "generate"), method.generate)
        if self.fails(*path, "source"):
            pass  # which of the two is not known
        elif method.source == "comprehension":
            if pooling.kind == "mid_generation" or pooling.over == "generated":
                found = f"{pooling.kind} over {pooling.over}"
                self.add(
                    (*path, "pooling"), found, "a pooling of a text that is read", "comprehension generates nothing"
                )
            self.passages(path, method, neutral, emotions or [])
        else:
            self.templates((*path, "templates"), method)
        self.chat((*path, "chat"), method.chat)

    def estimator(self, path: Path, method: Method, neutral: int, emotions: list[str] | None) -> None:
        """What an estimator is given and has no use for, and what it needs and is not given."""
        kind, given = method.estimator.kind, self.node((*path, "estimator"))
        alone, against_neutral = emotions is not None and len(emotions) < 2, method.baseline == "neutral_mean"
        if method.baseline == "rest" and alone:
            self.add((*path, "baseline"), "rest, with one emotion", "a baseline that exists", "name more `emotions`")
        if method.labels == "shuffled" and alone and not against_neutral:
            self.add((*path, "labels"), "shuffled, with one label", "at least two labels", "baseline: neutral_mean")
        if self.fails(*path, "estimator", "kind") or self.fails(*path, "baseline"):
            return
        for field in given if isinstance(given, dict) else ():
            if field != "kind" and field in PARAMETER_OF and kind not in PARAMETER_OF[field]:
                owners = PARAMETER_OF[field]
                only = f"only {' and '.join(owners)} {'have' if len(owners) > 1 else 'has'} it"
                self.add((*path, "estimator", field), str(given[field]), f"no `{field}` with {kind}", only)
        if kind == "mean_difference":
            return
        if method.baseline in ("grand_mean", "none"):
            place = "estimator" if self.node((*path, "baseline")) is None else "baseline"
            hint = "rest has the direction of grand_mean" if method.baseline == "grand_mean" else ""
            found = f"{kind} with baseline {method.baseline}"
            self.add((*path, place), found, "baseline neutral_mean or rest: samples to set against", hint)
        least = LEAST.get(kind, 1) + method.estimator.centre
        if method.samples < least:
            self.add((*path, "samples"), str(method.samples), f"at least {least}", f"{kind} needs them")
        if against_neutral and kind == "pca_difference" and neutral != method.samples:
            found = f"{neutral} beside {method.samples} samples"
            self.add((*path, "neutral_samples"), found, "as many as `samples`", f"{kind} pairs them by number")
        elif against_neutral and method.neutral_samples is not None and 0 < neutral < least:
            self.add((*path, "neutral_samples"), str(neutral), f"at least {least}", f"{kind} needs them")

    def chat(self, path: Path, chat: str) -> None:
        for facts in self.facts:
            if chat == "always" and not facts.has_chat_template:
                self.add(path, f"{facts.label}, which has no chat template", "models with one", "chat: auto")

    def pooling(self, path: Path, pooling: Any) -> None:
        if self.fails(*path, "kind"):
            return
        if pooling.kind == "mean_from" and pooling.k is None:
            self.add((*path, "k"), "nothing", "the first position that counts", "mean_from needs `k`")
        if pooling.kind != "mean_from" and pooling.k is not None:
            self.add((*path, "k"), str(pooling.k), f"no `k` with {pooling.kind}", "only mean_from has it")

    def decoding(self, path: Path, generate: Any) -> None:
        if generate.sample or self.fails(*path, "sample"):
            return
        for field in ("temperature", "top_p", "top_k"):
            if self.node((*path, field)) is not None:  # said here, not by a preset
                value = getattr(generate, field)
                self.add((*path, field), f"{value} in greedy decoding", "it only with `sample: true`")

    def passages(self, path: Path, method: Method, neutral: int, emotions: list[str]) -> None:
        if self.texts is None:
            return
        groups = {e: self.texts.passages.get(e, []) for e in emotions if e in self.texts.emotions}
        short = [f"{label} ({len(group)})" for label, group in groups.items() if len(group) < method.samples]
        if short:
            found = f"{method.samples} samples, more than the passages of {', '.join(short[:4])}"
            self.add((*path, "samples"), found, f"at most what text set {self.texts.name!r} holds")
        if len(self.texts.neutral_passages) < neutral and not self.fails(*path, "samples"):
            have = len(self.texts.neutral_passages)
            self.add(
                (*path, "neutral_samples"), str(neutral), f"at most the {have} neutral passages of {self.texts.name!r}"
            )

    def templates(self, path: Path, method: Method) -> None:
        texts = self.texts
        if isinstance(method.templates, list):
            templates = method.templates
            for i, template in enumerate(templates):
                if "{emotion}" not in template:
                    self.add((*path, i), repr(template), "a template that holds {emotion}")
        else:
            fields = ("story_templates", "topic_templates")
            if not self.known(path, method.templates, fields, "a list of templates, or a field of the text set"):
                return
            templates = getattr(texts, method.templates) if texts else []
            if texts and not templates:
                self.add(path, f"no {method.templates} in text set {texts.name!r}", "templates")
        if texts is None:
            return
        if any("{topic}" in template for template in templates) and not texts.topics:
            self.add(path, f"no topics in text set {texts.name!r}", "topics for the templates")
        if neutral_count(method) and not texts.neutral_story_templates:
            found = f"no neutral_story_templates in text set {texts.name!r}"
            self.add(path, found, "templates of the neutral baseline", "or neutral_samples: 0")

    def steer_path(self, i: int) -> Path:
        return ("steer", i) if isinstance(self.node(("steer",)), list) else ("steer",)

    def steer(self, plan: Plan, path: Path, block: Steer, emotions: list[str] | None) -> None:
        if not self.given(plan, "methods"):
            self.add(path, "no `methods`", "at least one method, whose vectors steer")
        for i, name in enumerate(block.vectors.methods or []):
            if self.given(plan, "methods") and not self.fails("methods"):
                self.known((*path, "vectors", "methods", i), name, self.names("methods"), "a method of this plan")
        for i, emotion in enumerate(block.vectors.emotions or []):
            if emotions is not None:
                self.known((*path, "vectors", "emotions", i), emotion, emotions, "an emotion of this plan")
        self.distinct((*path, "vectors", "methods"), block.vectors.methods or [])
        self.distinct((*path, "vectors", "emotions"), block.vectors.emotions or [])
        self.distinct((*path, "strengths"), block.strengths)
        self.distinct((*path, "seeds"), block.seeds)
        self.distinct((*path, "controls"), block.controls)
        self.decoding((*path, "generate"), block.generate)
        if len(block.seeds) > 1 and not block.generate.sample and not self.fails(*path, "generate", "sample"):
            self.add(
                (*path, "seeds"), f"{len(block.seeds)} seeds in greedy decoding", "one", "or generate: {sample: true}"
            )
        if block.op in UNSCALED and "scale" in block.model_fields_set:
            self.unscaled((*path, "scale"), block)
        self.neutral_reference(plan, path, block)
        self.when(path, block)
        if block.when is not None and block.when.direction is not None and emotions is not None:
            self.known((*path, "when", "direction"), block.when.direction, emotions, "an emotion of this plan")
        self.schedule(path, block, True)
        if block.norm_skip and block.scale != "stream_norm":
            self.add((*path, "norm_skip"), str(block.norm_skip), "it only with `scale: stream_norm`")
        if block.positions == "generated" and block.generate.max_new_tokens == 1:
            self.add(
                (*path, "positions"),
                "generated, with max_new_tokens 1",
                "a position that exists",
                "the first new token comes from the prompt's last position",
            )
        self.prompt_set((*path, "prompts"), block.prompts)
        self.chat((*path, "chat"), block.chat)
        if not self.fails(*path, "vectors", "layer"):
            self.within_captured(plan, path, block)

    def unscaled(self, path: Path, edit: Any) -> None:
        self.add(path, edit.scale, f"no scale with {edit.op}", f"its strength is {UNSCALED[edit.op]}")

    def neutral_reference(self, plan: Plan, path: Path, block: Steer) -> None:
        """What is measured against neutral samples needs some."""
        if block.op not in REFERENCED or self.fails("methods"):
            return
        for name in block.vectors.methods or plan.methods:
            if name in plan.methods and neutral_count(plan.methods[name]) == 0:
                found = f"{block.op} with method {name!r}, which has no neutral samples"
                self.add((*path, "op"), found, "a reference mean", "neutral_samples: 1 or more")

    def within_captured(self, plan: Plan, path: Path, block: Steer) -> None:
        """Every layer whose vector steers must be among the layers whose vectors are derived."""
        for facts in self.facts:
            try:
                have = set(layers.resolve(plan.layers, facts.n_layers))
                sets = layer_sets(block.layers, facts.n_layers)
                steered = {layer for one in sets.values() for layer in one}
                same = block.vectors.layer == "same"
                need = steered if same else set(layers.resolve(block.vectors.layer, facts.n_layers))
            except LookupError:
                continue  # said elsewhere
            if not same and block.op in REFERENCED and steered - have:
                found = f"layer {min(steered - have)} of {facts.label}, whose reference mean is not captured"
                self.add((*path, "layers"), found, "layers among the plan's `layers`", "layers: all")
                return
            if need - have:
                found = f"layer {min(need - have)} of {facts.label}, whose vector is not derived"
                where = ("layers",) if block.vectors.layer == "same" else ("vectors", "layer")
                self.add((*path, *where), found, "layers among the plan's `layers`", "layers: all")
                return

    def steer_labels(self, plan: Plan) -> None:
        labels: list[str | int] = [
            i if self.fails("steer", i, "name") or self.fails("steer", i, "op") else block.name or block.op
            for i, block in enumerate(plan.steer)
        ]  # what failed has a label of its own
        for i, label in enumerate(labels):
            if label in labels[:i]:
                self.add(
                    ("steer", i), f"a second steer block labelled {label!r}", "distinct labels", "give it a `name`"
                )

    def prompt_set(self, path: Path, prompts: Any) -> None:
        if isinstance(prompts, str) and self.texts is not None:
            what = f"a prompt set of the text set {self.texts.name!r}, a list, or label: prompt"
            self.known(path, prompts, self.texts.prompts, what)

    def general(self, plan: Plan) -> None:
        """The `reads:` and `edits:` form."""
        if not self.given(plan, "methods", "reads", "generate"):
            found = "no `methods`, no `reads` and no `generate`"
            self.add((), found, "something to do", "name methods, or reads and edits over prompts")
        if (plan.reads or plan.generate or plan.edits) and not self.given(plan, "prompts"):
            self.add((), "no `prompts`", "prompts for `reads`, `edits` and `generate`")
        if plan.edits and not self.given(plan, "reads", "generate"):
            self.add(("edits",), "edits that nothing looks at", "`reads` or `generate` beside them", key=True)
        if plan.remote.host and "@" in plan.remote.host:
            self.add(("remote", "host"), "a user or a password", "an address alone", "keys come from NDIF_API_KEY")
        if plan.prompts is not None:
            self.prompt_set(("prompts",), plan.prompts)
            self.chat(("chat",), plan.chat)
        if plan.generate is not None:
            self.decoding(("generate",), plan.generate)
        for name, read in plan.reads.items():
            if read.pooling is not None:
                self.pooling_of_prompt(("reads", name, "pooling"), read.pooling, "reads generate nothing")
        for name in plan.directions:
            self.direction(plan, name)
        sound = {name for name in plan.directions if self.formula(plan, name)}
        if "none" in plan.edits:
            self.add(
                ("edits", "none"), "a condition called 'none'", "another name", "none is the unedited condition", True
            )
        for name, edits in plan.edits.items():
            for i, edit in enumerate(edits):
                path = ("edits", name, i)
                if not self.fails("directions"):
                    known = self.names("directions")
                    self.known((*path, "direction"), edit.direction, known, "a name in `directions`")
                if set(directions_of(edit)) <= sound:
                    self.within_derived(plan, path, edit)
                if edit.op in UNSCALED and "scale" in edit.model_fields_set:
                    self.unscaled((*path, "scale"), edit)
                self.reference(plan, path, edit)
                self.when(path, edit)
                if edit.when is not None and edit.when.direction is not None and not self.fails("directions"):
                    known = self.names("directions")
                    self.known((*path, "when", "direction"), edit.when.direction, known, "a name in `directions`")
                self.schedule(path, edit, self.given(plan, "generate"))
                if edit.norm_skip and edit.scale != "stream_norm" and not self.fails(*path, "scale"):
                    self.add((*path, "norm_skip"), str(edit.norm_skip), "it only with `scale: stream_norm`")
                if edit.positions == "generated" and not self.given(plan, "generate"):
                    self.add((*path, "positions"), "generated", "positions of the prompt", "the plan generates nothing")

    def when(self, path: Path, edit: Steer | Edit) -> None:
        when, place = edit.when, (*path, "when")
        if when is None or any(self.fails(*place, name) for name in ("above", "below", "after")):
            return
        gated = when.above is not None or when.below is not None
        if not gated and when.after is None:
            self.add(place, "no `above`, no `below` and no `after`", "a condition", "when: {above: 0.0}")
        elif not gated:
            for name in sorted({"direction", "of"} & when.model_fields_set):
                self.add((*place, name), str(getattr(when, name)), "it only with `above` or `below`")
        elif when.above is not None and when.below is not None and when.above > when.below:
            self.add(place, f"above {when.above} and below {when.below}", "a range that holds something")

    def schedule(self, path: Path, edit: Steer | Edit, generates: bool) -> None:
        schedule, place = edit.schedule, (*path, "schedule")
        if schedule is None or any(self.fails(*place, name) for name in ("first", "linear", "half_life")):
            return
        given = [name for name in ("first", "linear", "half_life") if getattr(schedule, name) is not None]
        if not given:
            self.add(place, "an empty mapping", "first, linear or half_life")
        elif {"linear", "half_life"} <= set(given):
            self.add(place, "linear and half_life", "one of them")
        elif not generates:
            self.add(place, "a schedule", "`generate`", "it counts the tokens that the model writes")
        elif edit.positions in ("prompt", "last") and not self.fails(*path, "positions"):
            self.add(place, f"a schedule with positions {edit.positions}", "positions: all or generated")

    def reference(self, plan: Plan, path: Path, edit: Edit) -> None:
        """The reference mean of an edit: there where its op needs one, and nowhere else."""
        place = (*path, "reference")
        if edit.op not in REFERENCED:
            if edit.reference is not None and not self.fails(*path, "op"):
                self.add(
                    place, repr(edit.reference), f"no reference with {edit.op}", f"{', '.join(REFERENCED)} have one"
                )
        elif edit.reference is None:
            hint = "directions: {usual: {mean: {texts: [...]}}}, and reference: usual"
            self.add(path, f"{edit.op} without a `reference`", "a name in `directions`", hint)
        elif not self.fails("directions"):
            named = self.known(place, edit.reference, self.names("directions"), "a name in `directions`")
            if named and edit.reference in plan.directions and plan.directions[edit.reference].mean is None:
                self.add(place, f"{edit.reference!r}, which is no mean", "a direction with `mean`")

    def within_derived(self, plan: Plan, path: Path, edit: Any) -> None:
        """Where a formula rests on emotion vectors, they must be derived at the layers that an edit uses."""
        if not any(derived_for(plan, name) for name in directions_of(edit)):
            return
        spec = edit.layers if edit.vector_layer == "same" else edit.vector_layer
        where = "layers" if edit.vector_layer == "same" else "vector_layer"
        for facts in self.facts:
            try:
                lost = set(layers.resolve(spec, facts.n_layers)) - set(layers.resolve(plan.layers, facts.n_layers))
            except LookupError:
                continue  # said elsewhere
            if lost:
                found = f"layer {min(lost)} of {facts.label}, whose vector is not derived"
                self.add((*path, where), found, "layers among the plan's `layers`", "layers: all")
                return

    def pooling_of_prompt(self, path: Path, pooling: Any, hint: str) -> None:
        self.pooling(path, pooling)
        if pooling.kind == "mid_generation" or pooling.over == "generated":
            self.add(path, f"{pooling.kind} over {pooling.over}", "a pooling of a prompt", hint)

    def direction(self, plan: Plan, name: str) -> None:
        one = plan.directions[name]
        given = [field for field in SOURCES if getattr(one, field) is not None]
        path: Path = ("directions", name)
        if len(given) != 1 and not any(bad[: len(path)] == path for bad in self.failed):
            self.add(path, " and ".join(given) or "none of them", f"exactly one of {', '.join(SOURCES)}")
        if one.contrast is not None:
            where: Path = (*path, "contrast", "pooling")
            self.pooling_of_prompt(where, one.contrast.pooling, "a contrast generates nothing")
            self.chat((*path, "contrast", "chat"), one.contrast.chat)
        if one.mean is not None:
            self.pooling_of_prompt((*path, "mean", "pooling"), one.mean.pooling, "a mean generates nothing")
            self.chat((*path, "mean", "chat"), one.mean.chat)
        if one.store is not None and not os.path.isdir(one.store.path):
            self.add((*path, "store", "path"), f"{one.store.path!r}, which does not exist", "the path of a store")
        elif one.store is not None and not self.document.may_read(FilePath(one.store.path)):
            self.add((*path, "store", "path"), f"{one.store.path!r}, outside", reader.WITHIN, reader.OUTSIDE)

    def formula(self, plan: Plan, name: str, above: tuple[str, ...] = ()) -> bool:
        """Whether a direction's formula can be worked out; says why not of the one that `above` starts with."""
        text = plan.directions[name].formula
        path: Path = ("directions", name)
        path = (*path, "formula") if isinstance(self.node(path), dict) else path
        if text is None or self.fails(*path):
            return True
        known = {"directions": self.names("directions"), "methods": self.names("methods")}
        emotions = plan.emotion_labels() if isinstance(plan.emotions, list) or plan.emotions in EMOTION_SETS else []
        scales = plan.scales() if not isinstance(plan.ratings, str) or plan.ratings in RATINGS else {}
        try:
            found = [
                formulas.meaning(parts, **known, emotions=emotions, scales=scales)
                for parts in formulas.names(formulas.parse(text))
            ]
        except formulas.FormulaError as error:
            if not above:
                self.add(path, error.found, error.expected, error.hint)
            return False
        for sort, *where in found:
            if sort == "axis" and not self.determined(emotions, scales):
                have = sum(all(e in one for one in scales.values()) for e in emotions)
                expected = f"at least {len(scales) + 1}, whose ratings tell the {len(scales)} scales apart"
                self.add(path, f"{where[1]!r}, with {have} rated emotions in the plan", expected)
                return False
            if sort == "direction" and where[0] in (*above, name):
                if above[:1] in ((), (where[0],)):
                    self.add(path, f"{where[0]!r} again", "formulas that end", "give the direction a name of its own")
                return False
            if sort == "direction" and where[0] not in plan.directions:
                return False  # failed by form
            if sort == "direction" and not self.formula(plan, where[0], (*above, name)):
                return False
        return True

    def determined(self, emotions: list[str], scales: dict[str, dict[str, float]]) -> bool:
        """Whether the plan's emotions give every scale of the ratings an axis."""
        import numpy as np  # here: few plans rate

        from nsteer.directions import rated, tells_apart

        table = [[scale[emotion] for scale in scales.values()] for emotion in rated(emotions, scales)]
        return bool(tells_apart(np.array(table, float).reshape(len(table), len(scales))))

    def judge(self, plan: Plan) -> None:
        if plan.judge is None:
            return
        path: Path = ("judge", "classifier") if isinstance(self.node(("judge",)), dict) else ("judge",)
        for emotion in plan.judge.map or {}:
            what = f"an emotion of the text set {self.texts.name!r}" if self.texts else "an emotion"
            self.known(("judge", "map", emotion), emotion, self.texts.emotions if self.texts else [emotion], what)
        if not self.given(plan, "steer"):
            self.add(path, "a judge", "a judge only beside `steer`", "it judges continuations")
        expected = "a classifier: hub id, directory or zoo/judge"
        if self.fails(*path):
            return
        try:
            folder = models.local_folder(plan.judge.classifier)
            if folder is not None and not models.is_classifier(folder):
                self.add(path, f"{plan.judge.classifier!r}, which does not classify text", expected)
        except ModelError as error:
            self.add(path, str(error), expected)

    def store(self, plan: Plan) -> None:
        path, expected = FilePath(plan.store), "a directory ending in .zarr"
        if "://" in plan.store:
            return self.store_url(plan.store)
        file = next((one for one in (path, *path.parents) if os.path.isfile(one)), None)
        if "\0" in plan.store or any(len(part.encode(errors="replace")) > LONGEST_NAME for part in path.parts):
            self.add(
                ("store",), "a name that no file system takes", f"names of at most {LONGEST_NAME} bytes, without NUL"
            )
        elif path.suffix != ".zarr":
            self.add(("store",), repr(plan.store), expected, f"{path.with_suffix('.zarr')}" if path.name else "")
        elif file is not None:
            self.add(("store",), f"{str(file)!r}, a file", expected)

    def store_url(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        if "@" in rest or "?" in rest:  # not repeated: the message may be read by others
            found = f"a {scheme}:// URL that holds credentials"
            self.add(("store",), found, "a URL without them", "set them in the environment, as the client reads them")
        elif not rest.rstrip("/").endswith(".zarr"):
            self.add(("store",), repr(url), "a URL ending in .zarr", "s3://bucket/study.zarr")


def code_of_models(study: Study) -> list[Problem]:
    """A problem for every model that may bring Python code of its own: whoever runs the plan must say so too."""
    hint = "read the code, then run with --trust-remote-code"
    return [
        study.document.problem(("models", i, "trust_remote_code"), "true", "it confirmed by who runs the plan", hint)
        for i, spec in enumerate(study.plan.models)
        if spec.trust_remote_code
    ]


def layer_sets(spec: Any, n_layers: int) -> dict[str, tuple[int, ...]]:
    """The layer sets of a steer block by label. Raises LookupError for a layer out of range."""
    if not isinstance(spec, dict):
        found = layers.resolve(spec, n_layers)
        return {_set_label(spec, found, n_layers): found}
    if "each" in spec:
        return {str(layer): (layer,) for layer in layers.resolve(spec["each"], n_layers)}
    return {label: layers.resolve(one, n_layers) for label, one in spec["sets"].items()}


def _set_label(spec: Any, found: tuple[int, ...], n_layers: int) -> str:
    """What the plan says where it means the same in every model (`0.5`, `0.25:0.75`), else block indices."""
    relative = isinstance(spec, float) or (isinstance(spec, str) and "." in spec)
    return str(spec) if relative else layers.label(found, n_layers)


def stands_for(plan: Plan, parts: tuple[str, ...]) -> tuple[str, ...]:
    """What a name in a formula of this plan stands for (see formulas.meaning)."""
    emotions, scales = plan.emotion_labels(), plan.scales()
    return formulas.meaning(parts, directions=plan.directions, methods=plan.methods, emotions=emotions, scales=scales)


def rated_emotions(plan: Plan, kind: str, label: str) -> list[str]:
    """The emotions whose vectors a name rests on: one, or all that are rated."""
    scales = plan.scales().values()
    return [label] if kind == "vector" else [e for e in plan.emotion_labels() if all(e in one for one in scales)]


def directions_of(edit: Edit) -> list[str]:
    """The names of the directions that an edit rests on: its own, its reference, its gate's."""
    gate = edit.when.direction if edit.when else None
    return [name for name in (edit.direction, edit.reference, gate) if name is not None]


def derived_for(plan: Plan, name: str) -> list[tuple[str, str]]:
    """The (method, emotion) of every vector that a direction of the plan rests on."""
    spec, found = plan.directions[name], dict[tuple[str, str], None]()
    for parts in formulas.names(formulas.parse(spec.formula)) if spec.formula else ():
        kind, *where = stands_for(plan, parts)
        more = derived_for(plan, where[0]) if kind == "direction" else None
        found |= dict.fromkeys(more or [(where[0], e) for e in rated_emotions(plan, kind, where[-1]) if more is None])
    return list(found)


def neutral_count(method: Method) -> int:
    """How many neutral texts a method reads."""
    return method.samples if method.neutral_samples is None else method.neutral_samples


def labels_of(plan: Plan) -> list[str]:
    """The labels of the `emotion` axis of samples and activations: the emotions, then the neutral baseline."""
    return [*plan.emotion_labels(), NEUTRAL]


def _number(context: dict) -> str:
    return "a number"


_EXPECTED: dict[str, Callable[[dict], str]] = {
    "float_type": _number,
    "int_type": lambda _: "a whole number",
    "int_from_float": lambda _: "a whole number",
    "string_type": lambda _: "text",
    "bool_type": lambda _: "true or false",
    "list_type": lambda _: "a list",
    "dict_type": lambda _: "a mapping",
    "model_type": lambda _: "a mapping",
    "model_attributes_type": lambda _: "a mapping",
    "literal_error": lambda context: f"one of {context['expected'].replace(' or ', ', ')}",
    "greater_than": lambda context: f"a number above {context['gt']}",
    "greater_than_equal": lambda context: f"at least {context['ge']}",
    "less_than_equal": lambda context: f"at most {context['le']}",
    "string_pattern_mismatch": lambda _: "letters, digits, '.', '_' and '-', a letter or digit first",
    "string_too_long": lambda context: f"text of at most {context['max_length']} characters",
    "finite_number": _number,
    "string_too_short": lambda _: "text that is not empty",
}

EXPECTED_FIELD: dict[Any, str] = {
    "name": "a name for the study",
    "models": "a list of models",
    "store": "where results go, e.g. store/study.zarr",
    "strengths": "a list of strengths",
    "prompts": "prompts",
    "source": "generation or comprehension, or a `preset`",
    "op": "add, project_out, clamp, set_mean, affine or rotate",
    "direction": "a name in `directions`",
    "id": "a hub id, a model directory or zoo/NAME",
    "classifier": "a classifier: hub id, directory or zoo/judge",
    "kind": "last, mean, mean_from or mid_generation",
    "positive": "a list of texts",
    "negative": "a list of texts",
    "texts": "a list of texts",
}

STAND_IN = {
    "name": "unnamed",
    "store": "unnamed.zarr",
    "models": ["zoo/llama"],
    "id": "zoo/llama",
    "strengths": [1.0],
    "prompts": ["-"],
    "source": "generation",
    "op": "add",
    "direction": "-",
    "classifier": "zoo/judge",
    "kind": "last",
    "positive": ["-"],
    "negative": ["-"],
    "texts": ["-"],
    "path": "-",
    "method": "-",
    "emotion": "-",
}
"""A value of the right form for every required field: what is missing must not hide what else is wrong."""


def _real(error: Any, data: Any) -> Path:
    """pydantic's location without the parts that only pydantic knows (shorthands, union tags)."""
    path: list[str | int] = []
    for part in error["loc"]:
        if (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        ):
            path.append(part)
            data = data[part]
    return (*path, error["loc"][-1]) if error["type"] == "missing" else tuple(path)


def _other_branch(error: Any) -> bool:
    """Whether an error of a union (text or a list) belongs to the branch that the plan did not mean."""
    tag, is_list = error["loc"][-1], isinstance(error["input"], list)
    if tag == "str":
        return is_list and error["type"] == "string_type"
    return isinstance(tag, str) and tag.startswith(("list[", "function-before[")) and not is_list


def _places(paths: Iterable[Path]) -> dict[Path, set[int]]:
    """The places in lists that `paths` name, by list."""
    found: dict[Path, set[int]] = {}
    for path in paths:
        if path and isinstance(path[-1], int):
            found.setdefault(path[:-1], set()).add(path[-1])
    return found


def _without(data: Any, paths: list[Path]) -> Any:
    """`data` without the nodes at `paths`; an emptied list entry goes with its list's other entries kept."""
    if not paths:
        return data
    if () in paths or not isinstance(data, (dict, list)):
        return {} if isinstance(data, dict) else None
    gone = {path[0] for path in paths if len(path) == 1}
    deeper = {key: [p[1:] for p in paths if len(p) > 1 and p[0] == key] for key in {p[0] for p in paths if len(p) > 1}}
    items: Iterator = iter(data.items()) if isinstance(data, dict) else enumerate(data)
    kept = [(key, _without(value, deeper.get(key, []))) for key, value in items if key not in gone]
    return dict(kept) if isinstance(data, dict) else [value for _, value in kept]


def _fill_missing(data: Any, paths: list[Path]) -> Any:
    """`data` with a stand-in for each missing field, so that the rest can still be checked."""
    for path in paths:
        try:
            data = reader._put(data, path, STAND_IN.get(str(path[-1]), "-"))
        except (LookupError, TypeError):
            continue
    return data


def _fields_at(path: Path) -> list[str]:
    """The field names that the schema knows at `path`."""
    part: Any = Plan
    for step in path:
        part = _peel(part)
        if typing.get_origin(part) in (list, dict):
            part = typing.get_args(part)[-1]  # an index or a label
        elif isinstance(part, type) and issubclass(part, BaseModel) and step in part.model_fields:
            part = part.model_fields[str(step)].annotation
        else:
            return []
    part = _peel(part)
    if typing.get_origin(part) is list:  # one mapping where a list may stand
        part = _peel(typing.get_args(part)[-1])
    return list(part.model_fields) if isinstance(part, type) and issubclass(part, BaseModel) else []


def _peel(annotation: Any) -> Any:
    """What stands inside `Annotated` and `Optional`."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _peel(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return _peel(next(arg for arg in typing.get_args(annotation) if arg is not type(None)))
    return annotation
