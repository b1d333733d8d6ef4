"""Turns files of vectors into finished cells of a store's `vectors`, with where they come from in `imports`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsteer import __version__
from nsteer.errors import ExchangeError
from nsteer.models import facts as models
from nsteer.models.facts import Facts
from nsteer.plan.schema import Model
from nsteer.science import axis
from nsteer.stages import imported
from nsteer.store import Store
from nsteer.vectors.exchange import bounded, easysteer, llama, tensors, torches
from nsteer.vectors.exchange.assigning import Said, assign
from nsteer.vectors.exchange.contents import Contents, Layers, axis_of, blocks, no_label

READERS: dict[str, Callable[[Path, bytes], Contents]] = {
    ".safetensors": tensors.read,
    ".npz": tensors.read_npz,
    ".npy": tensors.read_npy,
    ".gguf": llama.read,
    ".json": easysteer.read,
    ".pt": torches.read,
    ".pth": torches.read,
}
"""Ending of a file -> who reads its bytes."""


def read(path: str | os.PathLike) -> Contents:
    """A file of vectors. Raises ExchangeError, of one line, for one of another kind, damaged, or able to run code."""
    return _read(Path(path))[0]


def _read(path: Path) -> tuple[Contents, str]:
    """A file, and the SHA-256 of the bytes that were read."""
    if path.suffix.lower() not in READERS:
        hint = (
            " (a pickle can run code: save tensors, or use export_gguf)" if path.suffix in (".pkl", ".pickle") else ""
        )
        raise ExchangeError(f"{path}: expected a name that ends in one of {', '.join(READERS)}{hint}")
    data = bounded.load(path)
    return READERS[path.suffix.lower()](path, data), hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Imported:
    """What was put into a store.

    cells : (model, method, emotion) -> the block indices at which it has a vector. notes : what to know of them
    axis : what the store calls the axis of emotions
    """

    cells: Mapping[tuple[str, str, str], list[int]]
    notes: list[str]
    axis: str = axis.EMOTION


def bring_in(
    file: str | os.PathLike,
    store: str | os.PathLike,
    *,
    model: str,
    revision: str | None = None,
    label: str | None = None,
    layers: Sequence[int] = (),
    layers_are: str | None = None,
    rows: str | None = None,
    names: Sequence[str] = (),
    method: str | None = None,
    emotion: str | None = None,
    concept: str | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Imported:
    """Puts the vectors of a file into a store.

    layers : the layers of the file's rows, or the one layer of all that it holds; needed unless the file names them
    layers_are : how layers count (CONVENTIONS); needed unless the file itself says so; `layers` are block indices else
    rows : what the rows of a matrix are, `layers` or `emotions` (`concepts`). names : the emotions of its rows
    method, emotion : labels; needed unless the file names them. `concept` in place of `emotion`: the store's axis is
    called so, as it is in a new store where the file says so. A vector that this store's own samples made is never
    replaced. origin : what else `imports` keeps of where the file is from.
    Raises ExchangeError for a file that does not fit the model, ModelError, StoreError.
    """
    if emotion is not None and concept is not None:
        raise ExchangeError("--emotion and --concept: a vector has one label, on the axis that its store has")
    facts = models.facts(Model(id=model, revision=revision, label=label))
    contents, digest = _read(Path(file))
    into = _store(store, contents, emotion, concept)
    said = Said(
        tuple(layers),
        layers_are,
        "emotions" if rows == "concepts" else rows,
        tuple(names),
        method,
        emotion if concept is None else concept,
    )
    with axis.named(into.axis):
        return _brought(into, Path(file), contents, digest, said, facts, origin or {})


def _store(path: str | os.PathLike, contents: Contents, emotion: str | None, concept: str | None) -> Store:
    """The store, with the axis that it has, or as a new one is to have: as it is asked for, else as the file says."""
    there = Store(path).published_axis()
    asked = axis.CONCEPT if concept is not None else axis.EMOTION if emotion is not None else ""
    if there and asked not in ("", there):
        raise ExchangeError(f"{path} has the axis {there!r}: say --{there}, not --{asked}")
    return Store(path, axis=asked or there or axis_of(contents.about) or axis.EMOTION)


def _brought(
    into: Store, file: Path, contents: Contents, digest: str, said: Said, facts: Facts, origin: Mapping[str, Any]
) -> Imported:
    vectors, convention, notes = assign(file, contents, said, facts.n_layers, facts.d_model)
    by_labels = {}
    for labels, own in _named(vectors, said.method, said.emotion, file).items():
        width = next(iter(own.values())).size
        if width != facts.d_model:
            raise ExchangeError(f"{file}: vectors of width {width}; {facts.label} has d_model {facts.d_model}")
        by_labels[labels], new_notes = blocks(own, convention, facts.n_layers)
        notes += [note for note in new_notes if note not in notes]
    told = contents.about.get("nsteer") if isinstance(contents.about.get("nsteer"), Mapping) else None
    notes += _other_model(contents, told, facts)
    whence = {
        **origin,
        "file": file.name,
        "sha256": digest,
        "kind": contents.kind,
        "layers_are": convention,
        "about": contents.about,
        "notes": notes,
        "nsteer": __version__,
    }
    with into.adding():
        cells = imported.commit(into, facts, by_labels, whence)
    return Imported({cell: sorted(by_labels[cell.method, cell.emotion]) for cell in cells}, notes, into.axis)


def _named(
    vectors: Mapping[tuple[str, str], Layers], method: str | None, emotion: str | None, file: Any
) -> dict[tuple[str, str], Layers]:
    """The vectors that are wanted, under their labels."""
    by_labels: dict[tuple[str, str], Layers] = {}
    for (own_method, own_emotion), layers in vectors.items():
        if len(vectors) > 1 and emotion not in (None, own_emotion):
            continue
        labels = method or own_method, emotion or own_emotion
        for dim, text in zip(("method", axis.current()), labels, strict=True):
            if why := no_label(dim, text):
                named = f"{text!r} is no label on the {dim} axis" if text else f"it names no {dim}"
                raise ExchangeError(f"{file}: {named}: give one by --{dim} ({why})")
        if labels in by_labels:
            raise ExchangeError(
                f"{file} holds several vectors that would be {labels[0]} / {labels[1]}: leave out --method"
            )
        by_labels[labels] = layers
    if not by_labels:
        known = ", ".join(sorted({emotion for _, emotion in vectors})[:24])
        raise ExchangeError(f"{file} holds no vector of {emotion!r}; known: {known}")
    return by_labels


def _other_model(contents: Contents, said: Mapping[str, Any] | None, facts: Facts) -> list[str]:
    """What a file says of its model that does not fit the one it is imported for."""
    hint = contents.about.get("model_hint")
    if hint and hint != facts.model_type:
        return [f"the file was made for the architecture {str(hint)[:80]}, {facts.label} is {facts.model_type}"]
    vectors = contents.about.get("vectors")
    theirs = [said] if said else list(vectors.values()) if isinstance(vectors, Mapping) else []
    made_for = [entry.get("model") for entry in theirs if isinstance(entry, Mapping)]
    known = {str(entry["identity"])[:80] for entry in made_for if isinstance(entry, Mapping) and entry.get("identity")}
    if known and facts.identity not in known:
        return [f"the file was made with other weights ({', '.join(sorted(known))}) than those of {facts.label}"]
    return []
