"""Turns files of vectors into finished cells of a store's `vectors`, with where they come from in `imports`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from nsteer import __version__, arrays, models
from nsteer.errors import ExchangeError
from nsteer.exchange import easysteer, llama, tensors, torches
from nsteer.exchange.contents import LABEL, Contents, Layers, blocks
from nsteer.fingerprints import fingerprint
from nsteer.models import Facts
from nsteer.plan import Model
from nsteer.store import Store

READERS: dict[str, Callable[[Path], Contents]] = {
    ".safetensors": tensors.read,
    ".npz": tensors.read_npz,
    ".gguf": llama.read,
    ".json": easysteer.read,
    ".pt": torches.read,
    ".pth": torches.read,
}
"""Ending of a file -> who reads it."""


def read(path: str | os.PathLike) -> Contents:
    """A file of vectors. Raises ExchangeError for one of another kind, or one that can run code."""
    found = Path(path)
    if not found.is_file():
        raise ExchangeError(f"{path}: no such file")
    if found.suffix.lower() not in READERS:
        hint = (
            " (a pickle can run code: save tensors, or use export_gguf)" if found.suffix in (".pkl", ".pickle") else ""
        )
        raise ExchangeError(f"{path}: expected a name that ends in one of {', '.join(READERS)}{hint}")
    return READERS[found.suffix.lower()](found)


def bring_in(
    file: str | os.PathLike,
    store: str | os.PathLike,
    *,
    model: str,
    revision: str | None = None,
    label: str | None = None,
    layers_are: str | None = None,
    method: str | None = None,
    emotion: str | None = None,
) -> tuple[list[tuple[str, str, str]], list[str]]:
    """Puts the vectors of a file into a store. Returns their cells (model, method, emotion), and notes.

    layers_are : how the file counts layers (CONVENTIONS); needed unless the file itself says so
    method, emotion : labels; needed unless the file names them. A vector that this store's own samples made is never
    replaced. Raises ExchangeError for a file that does not fit the model, ModelError, StoreError.
    """
    facts = models.facts(Model(id=model, revision=revision, label=label))
    contents = read(file)
    convention = _convention(contents, layers_are, file)
    named = _named(contents, method, emotion, file)
    made, notes = {}, []
    for labels, layers in named.items():
        width = next(iter(layers.values())).size
        if width != facts.d_model:
            raise ExchangeError(f"{file}: vectors of width {width}; {facts.label} has d_model {facts.d_model}")
        made[labels], found = blocks(layers, convention, facts.n_layers)
        notes += [note for note in found if note not in notes]
    said = contents.about.get("nsteer") if isinstance(contents.about.get("nsteer"), Mapping) else None
    notes += _other_model(contents, said, facts)
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    origin = {
        "file": Path(file).name,
        "sha256": digest,
        "kind": contents.kind,
        "layers_are": convention,
        "about": contents.about,
        "notes": notes,
        "nsteer": __version__,
    }
    return _commit(Store(store), facts, made, origin), notes


def _convention(contents: Contents, declared: str | None, file: Any) -> str:
    if declared is None and not contents.layers_are:
        raise ExchangeError(f"{file} does not say how it counts layers: name it with --layers-are")
    if contents.layers_are and declared not in (None, contents.layers_are):
        raise ExchangeError(f"{file} says that its layers are {contents.layers_are}, --layers-are {declared}")
    return declared or contents.layers_are


def _named(contents: Contents, method: str | None, emotion: str | None, file: Any) -> dict[tuple[str, str], Layers]:
    """The vectors that are wanted, under their labels."""
    found: dict[tuple[str, str], Layers] = {}
    for (own_method, own_emotion), layers in contents.vectors.items():
        if len(contents.vectors) > 1 and emotion not in (None, own_emotion):
            continue
        labels = method or own_method, emotion or own_emotion
        for name, text in zip(("--method", "--emotion"), labels, strict=True):
            if not LABEL.fullmatch(text):
                raise ExchangeError(
                    f"{file}: {text!r} is no label: give one of letters, digits, '.', '_', '-' by {name}"
                )
        if labels in found:
            raise ExchangeError(
                f"{file} holds several vectors that would be {labels[0]} / {labels[1]}: leave out --method"
            )
        found[labels] = layers
    if not found:
        known = ", ".join(sorted({one for _, one in contents.vectors}))
        raise ExchangeError(f"{file} holds no vector of {emotion!r}; known: {known}")
    return found


def _other_model(contents: Contents, said: Mapping[str, Any] | None, facts: Facts) -> list[str]:
    """What a file says of its model that does not fit the one it is imported for."""
    hint = contents.about.get("model_hint")
    if hint and hint != facts.model_type:
        return [f"the file was made for the architecture {hint}, {facts.label} is {facts.model_type}"]
    theirs = [said] if said else list(contents.about.get("vectors", {}).values())
    known = {one["model"].get("identity") for one in theirs if isinstance(one.get("model"), Mapping)} - {None, ""}
    if known and facts.identity not in known:
        return [f"the file was made with other weights ({', '.join(sorted(known))}) than those of {facts.label}"]
    return []


def _commit(
    store: Store, facts: Facts, made: Mapping[tuple[str, str], Layers], origin: Mapping[str, Any]
) -> list[tuple[str, str, str]]:
    methods, emotions = (list(dict.fromkeys(pair[i] for pair in made)) for i in (0, 1))
    group = arrays.vectors_of(facts, methods, emotions)
    kept = arrays.imports_group([facts.label], methods, emotions)
    if store.exists:
        done = store.committed(group.path)
        before = {cell: record.fingerprint for cell, record in store.committed("imports").items()}
        for pair in made:
            cell = (facts.label, *pair)
            if cell in done and before.get(cell) != done[cell].fingerprint:
                raise ExchangeError(
                    f"{store.path} has a vector {' / '.join(pair)} of {facts.label} that was not imported: "
                    "name another --method"
                )
    store.prepare([group, kept])
    for pair, layers in made.items():
        cell, data = (facts.label, *pair), _data(facts, layers)
        number = fingerprint({"imported": hashlib.sha256(data["vector"][1].tobytes()).hexdigest()})
        said = {**origin, "layers": sorted(layers), "imported": datetime.now(UTC).isoformat(timespec="seconds")}
        dims = {"layer": range(facts.n_layers), "d_model": range(facts.d_model)}
        store.commit("imports", cell, arrays.dataset({}, {"provenance": ((), json.dumps(said))}), fingerprint=number)
        store.commit(group.path, cell, arrays.dataset(dims, data), fingerprint=number)
    return [(facts.label, *pair) for pair in made]


def _data(facts: Facts, layers: Layers) -> dict[str, Any]:
    """The variables of a cell of `vectors`; NaN at layers that the file has not, counts unknown."""
    values = np.full((facts.n_layers, facts.d_model), np.nan, np.float32)
    for layer, vector in layers.items():
        values[layer] = vector
    return {
        "vector": (("layer", "d_model"), values),
        "norm": (("layer",), np.linalg.norm(values, axis=-1)),
        "n_samples": ((), np.int32(-1)),
        "n_distinct": ((), np.int32(-1)),
    }
