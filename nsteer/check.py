"""Turns a document into a plan that can run, or into every problem it has, each located.

Problems of form (pydantic) and of meaning (this module) come together: what fails by form is left out, and
the rest is still checked for meaning. Imports neither torch nor xarray.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from pydantic import BaseModel, ValidationError

from nsteer import layers, models, reader, texts
from nsteer.errors import ModelError, PlanError, Problem, did_you_mean
from nsteer.plan import Method, Plan, Steer
from nsteer.presets import EMOTION_SETS, NEUTRAL, PRESETS
from nsteer.reader import Document, Path, kind


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


def load(file: str | FilePath, settings: Iterable[str] = ()) -> Study:
    """The study in a plan file, with `--set` overrides. Raises PlanError with every problem found."""
    return study(reader.override(reader.read(file), settings))


def study(document: Document) -> Study:
    """The study that a document describes. Raises PlanError with every problem found."""
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
    if not isinstance(method, dict) or method.get("preset") not in PRESETS:
        return method
    fields = PRESETS[method["preset"]].fields
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
        self.failed: set[Path] = set()
        self.texts: texts.TextSet | None = None
        self.facts: list[models.Facts] = []

    # ---- form ------------------------------------------------------------------------------------------

    def form(self) -> Plan | None:
        """The plan, or what can be made of it without the parts that fail; None when too little is left."""
        data = self.data
        for _ in range(4):
            try:
                return Plan.model_validate(data)
            except ValidationError as error:
                found = [(self.real(one["loc"], data), one) for one in error.errors()]
                if data is self.data:
                    self.problems += [self.of_form(path, one) for path, one in found]
                self.failed |= {path for path, _ in found}
                bad = [path for path, one in found if one["type"] != "missing"]
                data = _keep_places(data, bad)
                data = _without(data, [path for path in bad if path[:1] != ("models",) or len(path) != 2])
                data = _fill_missing(data, [path for path, one in found if one["type"] == "missing"])
        return None

    def real(self, location: tuple, data: Any) -> Path:
        """pydantic's location without the parts that only pydantic knows (shorthands, union tags)."""
        path: list[str | int] = []
        for i, part in enumerate(location):
            if (isinstance(data, dict) and part in data) or (
                isinstance(data, list) and isinstance(part, int) and part < len(data)
            ):
                path.append(part)
                data = data[part]
            elif i == len(location) - 1 and isinstance(data, dict) and isinstance(part, str):
                path.append(part)
        return tuple(path)

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
        if not any(path[: len(bad)] == bad for bad in self.failed):
            self.problems.append(self.document.problem(path, found, expected, hint, key))

    def known(self, path: Path, word: str, known: Iterable[str], what: str) -> bool:
        known = list(known)
        if word in known:
            return True
        self.add(path, repr(word), what, did_you_mean(word, known))
        return False

    def text_set(self, plan: Plan) -> None:
        try:
            self.texts = texts.load(texts.find(plan.texts, FilePath(self.document.file).parent))
        except LookupError as error:
            self.add(("texts",), repr(plan.texts), "a shipped text set or a file", error.args[0])
        except PlanError as error:
            self.problems += error.problems

    def emotions(self, plan: Plan) -> list[str]:
        if isinstance(plan.emotions, str):
            if not self.known(("emotions",), plan.emotions, EMOTION_SETS, "a named set of emotions, or a list"):
                return []
            emotions = list(EMOTION_SETS[plan.emotions])
        else:
            emotions = plan.emotions
            self.distinct(("emotions",), emotions)
        if not plan.methods or self.texts is None:
            return emotions
        known = self.texts.emotions
        for i, emotion in enumerate(emotions):
            path: Path = ("emotions",) if isinstance(plan.emotions, str) else ("emotions", i)
            self.known(path, emotion, known, f"an emotion of the text set {self.texts.name!r}")
        return [emotion for emotion in emotions if emotion in known]

    def distinct(self, path: Path, labels: list) -> None:
        for i, label in enumerate(labels):
            if label in labels[:i]:
                self.add((*path, i), f"{label!r} a second time", "each label once")

    def models(self, plan: Plan) -> None:
        labels: list[str] = []
        for i, spec in enumerate(plan.models):
            label = spec.label or spec.id
            if label.lower().replace("/", "--") in labels:
                self.add(("models", i), f"{label!r} a second time", "each model once", "give one of them a `label`")
            labels.append(label.lower().replace("/", "--"))
            if ("models", i) in self.failed:
                continue  # a stand-in
            try:
                self.facts.append(models.facts(spec))
            except ModelError as error:
                path: Path = ("models", i, "id") if isinstance(self.node(("models", i)), dict) else ("models", i)
                self.add(path, str(error), "a hub id, a model directory or zoo/NAME")

    def node(self, path: Path) -> Any:
        data = self.document.data
        for part in path:
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

    def method(self, plan: Plan, name: str, method: Method, emotions: list[str]) -> None:
        path: Path = ("methods", name)
        if method.preset is not None:
            here = (*path, "preset") if isinstance(self.node(path), dict) else path
            self.known(here, method.preset, PRESETS, "a preset")
        pooling = method.pooling
        self.pooling((*path, "pooling"), pooling)
        neutral = method.samples if method.neutral_samples is None else method.neutral_samples
        if method.baseline == "neutral_mean" and neutral == 0:
            self.add((*path, "neutral_samples"), "0", "at least 1", "baseline neutral_mean needs neutral texts")
        if method.project_out and neutral < 2:
            self.add((*path, "neutral_samples"), str(neutral), "at least 2", "project_out needs neutral texts")
        self.decoding((*path, "generate"), method.generate)
        if method.source == "comprehension":
            if pooling.kind == "mid_generation" or pooling.over == "generated":
                found = f"{pooling.kind} over {pooling.over}"
                self.add(
                    (*path, "pooling"), found, "a pooling of a text that is read", "comprehension generates nothing"
                )
            self.passages(path, method, neutral, emotions)
        else:
            self.templates((*path, "templates"), method)
        if method.chat == "always":
            for facts in self.facts:
                if not facts.has_chat_template:
                    self.add(
                        (*path, "chat"), f"{facts.label}, which has no chat template", "models with one", "chat: auto"
                    )

    def pooling(self, path: Path, pooling: Any) -> None:
        if pooling.kind == "mean_from" and pooling.k is None:
            self.add((*path, "k"), "nothing", "the first position that counts", "mean_from needs `k`")
        if pooling.kind != "mean_from" and pooling.k is not None:
            self.add((*path, "k"), str(pooling.k), f"no `k` with {pooling.kind}", "only mean_from has it")

    def decoding(self, path: Path, generate: Any) -> None:
        if generate.sample:
            return
        for field in ("temperature", "top_p", "top_k"):
            if field in generate.model_fields_set:
                value = getattr(generate, field)
                self.add((*path, field), f"{value} in greedy decoding", "it only with `sample: true`")

    def passages(self, path: Path, method: Method, neutral: int, emotions: list[str]) -> None:
        if self.texts is None:
            return
        groups = {emotion: self.texts.passages.get(emotion, []) for emotion in emotions}
        short = [f"{label} ({len(group)})" for label, group in groups.items() if len(group) < method.samples]
        if short:
            found = f"{method.samples} samples, more than the passages of {', '.join(short[:4])}"
            self.add((*path, "samples"), found, f"at most what text set {self.texts.name!r} holds")
        if len(self.texts.neutral_passages) < neutral:
            have = len(self.texts.neutral_passages)
            self.add(
                (*path, "neutral_samples"), str(neutral), f"at most the {have} neutral passages of {self.texts.name!r}"
            )

    def templates(self, path: Path, method: Method) -> None:
        if isinstance(method.templates, list):
            for i, template in enumerate(method.templates):
                if "{emotion}" not in template:
                    self.add((*path, i), repr(template), "a template that holds {emotion}")
            return
        fields = ("story_templates", "topic_templates")
        if self.known(path, method.templates, fields, "a list of templates, or a field of the text set") and self.texts:
            if not getattr(self.texts, method.templates):
                self.add(path, f"no {method.templates} in text set {self.texts.name!r}", "templates")
            if method.templates == "topic_templates" and not self.texts.topics:
                self.add(path, f"no topics in text set {self.texts.name!r}", "topics for the templates")

    def steer_path(self, i: int) -> Path:
        return ("steer", i) if isinstance(self.node(("steer",)), list) else ("steer",)

    def steer(self, plan: Plan, path: Path, block: Steer, emotions: list[str]) -> None:
        if not plan.methods:
            self.add(path, "no `methods`", "at least one method, whose vectors steer")
        for i, name in enumerate(block.vectors.methods or []):
            self.known((*path, "vectors", "methods", i), name, plan.methods, "a method of this plan")
        for i, emotion in enumerate(block.vectors.emotions or []):
            self.known((*path, "vectors", "emotions", i), emotion, emotions, "an emotion of this plan")
        self.distinct((*path, "strengths"), block.strengths)
        self.distinct((*path, "seeds"), block.seeds)
        self.distinct((*path, "controls"), block.controls)
        self.decoding((*path, "generate"), block.generate)
        if len(block.seeds) > 1 and not block.generate.sample:
            self.add(
                (*path, "seeds"), f"{len(block.seeds)} seeds in greedy decoding", "one", "or generate: {sample: true}"
            )
        if block.op == "project_out" and "scale" in block.model_fields_set:
            self.add((*path, "scale"), block.scale, "no scale with project_out", "its strength is the fraction removed")
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
        self.within_captured(plan, path, block)

    def within_captured(self, plan: Plan, path: Path, block: Steer) -> None:
        """Every layer whose vector steers must be among the layers whose vectors are derived."""
        for facts in self.facts:
            try:
                have = set(layers.resolve(plan.layers, facts.n_layers))
                if block.vectors.layer == "same":
                    sets = layer_sets(block.layers, facts.n_layers)
                    need = {layer for one in sets.values() for layer in one}
                else:
                    need = set(layers.resolve(block.vectors.layer, facts.n_layers))
            except LookupError:
                continue  # said elsewhere
            if need - have:
                found = f"layer {min(need - have)} of {facts.label}, whose vector is not derived"
                self.add((*path, "layers"), found, "layers among the plan's `layers`", "layers: all")
                return

    def steer_labels(self, plan: Plan) -> None:
        labels = [block.name or block.op for block in plan.steer]
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
        if not plan.methods and not plan.reads and not plan.generate:
            found = "no `methods`, no `reads` and no `generate`"
            self.add((), found, "something to do", "name methods, or reads and edits over prompts")
        if (plan.reads or plan.generate or plan.edits) and plan.prompts is None:
            self.add((), "no `prompts`", "prompts for `reads`, `edits` and `generate`")
        if plan.edits and not (plan.reads or plan.generate):
            self.add(("edits",), "edits that nothing looks at", "`reads` or `generate` beside them", key=True)
        if plan.prompts is not None:
            self.prompt_set(("prompts",), plan.prompts)
        if plan.generate is not None:
            self.decoding(("generate",), plan.generate)
        for name, read in plan.reads.items():
            if read.pooling is not None:
                self.pooling(("reads", name, "pooling"), read.pooling)
                if read.pooling.kind == "mid_generation" or read.pooling.over == "generated":
                    found = f"{read.pooling.kind} over {read.pooling.over}"
                    self.add(("reads", name, "pooling"), found, "a pooling of a prompt", "reads generate nothing")
        for name in plan.directions:
            self.direction(plan, name)
        if "none" in plan.edits:
            self.add(
                ("edits", "none"), "a condition called 'none'", "another name", "none is the unedited condition", True
            )
        for name, edits in plan.edits.items():
            for i, edit in enumerate(edits):
                path = ("edits", name, i)
                self.known((*path, "direction"), edit.direction, plan.directions, "a name in `directions`")
                if edit.op == "project_out" and "scale" in edit.model_fields_set:
                    self.add((*path, "scale"), edit.scale, "no scale with project_out")
                if edit.positions == "generated" and not plan.generate:
                    self.add((*path, "positions"), "generated", "positions of the prompt", "the plan generates nothing")

    def direction(self, plan: Plan, name: str) -> None:
        one = plan.directions[name]
        given = [field for field in ("random", "contrast", "store") if getattr(one, field) is not None]
        path: Path = ("directions", name)
        if len(given) != 1:
            self.add(path, " and ".join(given) or "none of them", "exactly one of random, contrast, store")
        if one.contrast is not None:
            self.pooling((*path, "contrast", "pooling"), one.contrast.pooling)
        if one.store is not None and not FilePath(one.store.path).is_dir():
            self.add((*path, "store", "path"), f"{one.store.path!r}, which does not exist", "the path of a store")

    def judge(self, plan: Plan) -> None:
        if plan.judge is None:
            return
        path: Path = ("judge", "classifier") if isinstance(self.node(("judge",)), dict) else ("judge",)
        for emotion in plan.judge.map:
            what = f"an emotion of the text set {self.texts.name!r}" if self.texts else "an emotion"
            self.known(("judge", "map", emotion), emotion, self.texts.emotions if self.texts else [emotion], what)
        if not plan.steer:
            self.add(path, "a judge", "a judge only beside `steer`", "it judges continuations")
        try:
            models.local_folder(plan.judge.classifier)
        except ModelError as error:
            self.add(path, str(error), "a classifier: hub id, directory or zoo/judge")

    def store(self, plan: Plan) -> None:
        path = FilePath(plan.store)
        if path.suffix != ".zarr":
            self.add(("store",), repr(plan.store), "a directory ending in .zarr", f"{path.with_suffix('.zarr')}")
        elif path.is_file():
            self.add(("store",), f"{plan.store!r}, a file", "a directory ending in .zarr")


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
    "string_pattern_mismatch": lambda _: "letters, digits, '.', '_' and '-' only",
    "string_too_short": lambda _: "text that is not empty",
}

EXPECTED_FIELD: dict[Any, str] = {
    "name": "a name for the study",
    "models": "a list of models",
    "store": "where results go, e.g. store/study.zarr",
    "strengths": "a list of strengths",
    "prompts": "prompts",
    "source": "generation or comprehension, or a `preset`",
}

STAND_IN = {
    "name": "unnamed",
    "store": "unnamed.zarr",
    "models": ["zoo/llama"],
    "strengths": [1.0],
    "prompts": ["-"],
    "source": "generation",
}


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


def _keep_places(data: Any, paths: list[Path]) -> Any:
    """`data` with failed models replaced, not removed: the ones after them must keep their index."""
    models_failed = {path[1] for path in paths if len(path) == 2 and path[0] == "models"}
    if not models_failed or not isinstance(data.get("models"), list):
        return data
    stand_in = [
        {"id": "zoo/llama", "label": f"stand-in-{i}"} if i in models_failed else model
        for i, model in enumerate(data["models"])
    ]
    return {**data, "models": stand_in}


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
