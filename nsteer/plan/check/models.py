"""Checks of `models`, and that they have every layer that a plan names."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

from nsteer.errors import ModelError
from nsteer.models import checkpoints, gguf
from nsteer.models import facts as models
from nsteer.plan import layers
from nsteer.plan.check.base import Checker
from nsteer.plan.reader import Path, kind
from nsteer.plan.schema import Plan
from nsteer.system import machine

QUANTIZING = ("bitsandbytes", "accelerate")
"""What loads int8 weights."""


DEVICE = re.compile(r"auto|(cpu|cuda|mps|xpu|hpu|npu)(:[0-9]+)?")
"""Devices of torch that a model can be loaded on."""

PLACE = re.compile(r"[0-9]+|cuda:[0-9]+|cpu|disk")
"""Where modules of a model may lie."""

SIZE = re.compile(r"[0-9]+(\.[0-9]+)? ?([KMGT]i?B)", re.IGNORECASE)
"""An amount of memory as accelerate reads it."""

MEANT = {"gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "amd": "cuda", "metal": "mps"}
"""What others call a device -> torch's name of it."""


def device(check: Checker, path: Path, name: str) -> None:
    """A device by torch's name; a note where this machine surely lacks it: another may run the plan."""
    if check.fails(*path):
        return
    if not DEVICE.fullmatch(name):
        kind, colon, index = name.strip().lower().partition(":")
        meant = f"{MEANT.get(kind, kind)}{colon}{index}" if kind else ""
        hint = f"did you mean {meant!r}?" if DEVICE.fullmatch(meant) else "auto takes a GPU where there is one"
        check.add(path, repr(name), "auto, cpu, cuda, cuda:N or mps", hint)
    elif why := machine.lacks(name):
        check.note(path, f"{name!r}: {why}", "a device of this machine", "device: auto")


def configs(check: Checker, plan: Plan) -> None:
    """Models with a config that can be read and labels of their own: what they are is in `check.facts`."""
    labels: list[str] = []
    for i, spec in enumerate(plan.models):
        label = models.label_of(spec)
        if label.lower().replace("/", "--") in labels and not check.fails("models", i, "label"):
            check.add(("models", i), f"{label!r} a second time", "each model once", "give one of them a `label`")
        labels.append(label.lower().replace("/", "--"))
        _quantization(check, plan, i, spec)
        _adapter(check, plan, i, spec)
        _spread(check, plan, i, spec)
        device(check, ("models", i, "device"), spec.device)
        if check.fails("models", i, "id") or check.fails("models", i, "revision"):
            continue  # a stand-in
        try:
            check.facts.append(models.facts(spec))
        except ModelError as error:
            path: Path = ("models", i, "id") if isinstance(check.node(("models", i)), dict) else ("models", i)
            check.add(path, str(error), "a hub id, a model directory, a GGUF file or zoo/NAME")
            continue
        files(check, plan, i)
        if not models.LABEL.fullmatch(label) or ".." in label:
            place: Path = ("models", i, "label") if spec.label else ("models", i)
            hint = "" if spec.label else "give it a `label`"
            check.add(place, kind(label), "a label of letters, digits, '.', '_', '-' and '/'", hint)
        if check.facts[-1].is_classifier:
            actual = f"{spec.id!r}, a classifier"
            check.add(("models", i), actual, "a causal language model", "a classifier judges: `judge`")
            check.facts.pop()


def files(check: Checker, plan: Plan, i: int) -> None:
    """A model directory, and an adapter, whose files are what they should be; notes of what may be on its way there."""
    facts, here = check.facts[-1], plan.executor != "ndif"
    own: Path = ("models", i, "id") if isinstance(check.node(("models", i)), dict) else ("models", i)
    for path, faults in (
        (own, checkpoints.of_model(facts, here)),
        (("models", i, "peft"), checkpoints.of_adapter(facts)),
    ):
        for fault in faults:
            tell = check.note if fault.transient else check.add
            tell(path, fault.found, fault.expected, fault.hint)


def _adapter(check: Checker, plan: Plan, i: int, spec: Any) -> None:
    """An adapter where it can be merged into the model."""
    path: Path = ("models", i, "peft")
    if spec.peft is None:
        return
    if plan.executor == "ndif":
        check.add(path, repr(spec.peft), "nothing", "a server's models are as the server loaded them")
    elif plan.executor == "vllm":
        check.add(
            path, repr(spec.peft), "nothing under executor: vllm", "merge it into the weights, or executor: local"
        )
    elif spec.quantization is not None:
        check.add(
            path, repr(spec.peft), "an adapter or `quantization`, not both", "what is merged would be rounded again"
        )
    elif importlib.util.find_spec("peft") is None:
        check.add(
            path, f"{spec.peft!r}, without the package peft", "what merges adapters", "pip install 'nsteer[peft]'"
        )


def _spread(check: Checker, plan: Plan, i: int, spec: Any) -> None:
    """A model over several devices: what accelerate takes, where it loads the model at all."""
    path: Path = ("models", i, "device_map")
    if spec.max_memory is not None and spec.device_map is None:
        check.add(("models", i, "max_memory"), "limits without a `device_map`", "both or neither", "device_map: auto")
    for name, size in (spec.max_memory or {}).items():
        if not (name == "cpu" or name.isdigit()) or not SIZE.fullmatch(size):
            actual = f"{name}: {size}"
            check.add(
                ("models", i, "max_memory"), actual, "a GPU's number or `cpu`, and a size", "{0: 20GiB, cpu: 60GiB}"
            )
    if spec.device_map is None:
        return
    if plan.executor != "local":
        check.add(path, "a device_map", f"nothing under executor: {plan.executor}", "executor: local spreads a model")
    if spec.device != "auto":
        check.add(("models", i, "device"), repr(spec.device), "auto, beside a `device_map`", "the map says where")
    if spec.peft is not None:
        check.add(path, "a device_map", "an adapter or a `device_map`, not both", "merge it into the weights first")
    placed = spec.device_map if isinstance(spec.device_map, dict) else {}
    if placed and set(map(str, placed.values())) == {"disk"}:
        check.add(path, "a map of disk alone", "a device that blocks run on", "leave some of it on cpu or a GPU")
    for module, where in placed.items():
        place = (*path, module) if module else path
        if not PLACE.fullmatch(str(where)):
            check.add(place, repr(where), "a GPU's number, cuda:N, cpu or disk", "'': cpu is the whole model")
        elif str(where) not in ("cpu", "disk") and (why := machine.lacks("cuda")):
            check.note(place, f"{where!r}: {why}", "a device of this machine", "cpu, disk, or device_map: auto")
    if importlib.util.find_spec("accelerate") is None:
        actual = "a device_map, without the package accelerate"
        check.add(path, actual, "what spreads a model", "pip install 'nsteer[large]'")


def _quantization(check: Checker, plan: Plan, i: int, spec: Any) -> None:
    path: Path = ("models", i, "quantization")
    if plan.executor == "ndif" and (spec.gguf or spec.id.endswith(gguf.SUFFIX)):
        actual = f"{spec.gguf or spec.id!r}, a GGUF file"
        check.add(("models", i), actual, "a model that a server loads", "name the repository of its safetensors")
    if spec.quantization is None:
        return
    if plan.executor == "ndif":
        check.add(path, repr(spec.quantization), "nothing", "a server's models are as the server loaded them")
    elif plan.executor == "vllm":
        check.add(path, repr(spec.quantization), "nothing under executor: vllm", "executor: local loads int8 weights")
    elif not all(map(importlib.util.find_spec, QUANTIZING)):
        actual = f"{spec.quantization!r}, without {' and '.join(QUANTIZING)}"
        check.add(path, actual, "a precision that this installation can load", "pip install 'nsteer[int8]'")


def all_layers(check: Checker, plan: Plan) -> None:
    """Every layer that the plan names, anywhere, is one of every model."""
    _layers(check, ("layers",), plan.layers)
    for i, entry in enumerate(plan.steer):
        path = check.steer_path(i)
        _layer_sets(check, (*path, "layers"), entry.layers)
        for j, further in enumerate(entry.also):
            _layers(check, (*path, "also", j, "layers"), further.layers)
        if entry.vectors.layer != "same":
            _layers(check, (*path, "vectors", "layer"), entry.vectors.layer)
    for name, read in plan.reads.items():
        _layers(check, ("reads", name, "layers"), read.layers)
    for name, edits in plan.edits.items():
        for i, edit in enumerate(edits):
            _layers(check, ("edits", name, i, "layers"), edit.layers)
            if edit.vector_layer != "same":
                _layers(check, ("edits", name, i, "vector_layer"), edit.vector_layer)


def _layer_sets(check: Checker, path: Path, spec: Any) -> None:
    if isinstance(spec, dict):
        for key, value in (spec.get("sets") or {"each": spec["each"]}).items():
            _layers(check, (*path, "sets", key) if "sets" in spec else (*path, key), value)
    else:
        _layers(check, path, spec)


def _layers(check: Checker, path: Path, spec: Any) -> None:
    for facts in check.facts:
        try:
            layers.resolve(spec, facts.n_layers)
        except LookupError as error:
            check.add(path, str(error.args[0]), f"layers that {facts.label} has", "negative indices count from the end")
            return
