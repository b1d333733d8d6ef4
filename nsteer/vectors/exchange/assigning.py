"""Decides which block and which emotion each array of a file is, by what the file and its user say; guesses nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nsteer.errors import ExchangeError
from nsteer.science.axis import word
from nsteer.vectors.exchange.bounded import MAX_ARRAYS, floats
from nsteer.vectors.exchange.contents import OFFSETS, Contents

ROWS = ("layers", "emotions")
"""What the rows of a matrix can be."""

STATED = re.compile(r"(?:model\.|transformer\.)?(?:layers?|blocks?|h|direction|resid_post)[._-]?([0-9]{1,6})", re.I)
"""A name that is the name of a layer (`layer_12`, `model.layers.12`, `direction.12`), and nothing else besides."""

NUMBER = re.compile(r"[0-9]{1,6}")

GENERIC = {"", "arr_0", "array", "data", "direction", "directions", "steering_vector", "steering_vectors", "tensor"}
GENERIC |= {"tensors", "vector", "vectors"}
"""Names that name no emotion."""

LAYER_LABELS = {"layer", "layers"}
NAME_LABELS = {"emotion", "emotions", "name", "names", "label", "labels", "trait", "traits", "concept", "concepts"}
"""Names of arrays that label the rows of others: whole numbers, texts."""

Vectors = dict[tuple[str, str], dict[int, np.ndarray]]


@dataclass(frozen=True)
class Said:
    """What the user says of a file.

    layers : the numbers of its layers, in its order. layers_are : how they count (CONVENTIONS), block indices where
    `layers` are given. rows : ROWS. names : the emotions of its rows. method, emotion : labels
    """

    layers: tuple[int, ...] = ()
    layers_are: str | None = None
    rows: str | None = None
    names: tuple[str, ...] = ()
    method: str | None = None
    emotion: str | None = None


def numbers(text: str) -> tuple[int, ...]:
    """`3,7,11` or `0-5` as numbers, in that order. Raises ExchangeError for anything else."""
    layers: list[int] = []
    for item in text.split(","):
        first, dash, last = item.strip().partition("-")
        ends = [first, last] if dash else [first, first]
        if not all(NUMBER.fullmatch(end) for end in ends):
            raise ExchangeError(f"--layers {text!r}: expected numbers such as 14 or 3,7,11 or 0-5")
        layers += range(int(ends[0]), min(int(ends[1]), int(ends[0]) + MAX_ARRAYS) + 1)
    if len(set(layers)) != len(layers) or not layers:
        raise ExchangeError(f"--layers {text!r}: expected each layer once, in ascending ranges")
    return tuple(layers)


def assign(file: Any, contents: Contents, said: Said, n_layers: int, d_model: int) -> tuple[Vectors, str, list[str]]:
    """(method, emotion) -> layer's number -> vector of a file; how the numbers count; what is to be noted.

    Raises ExchangeError, of one line that says what was found and which flags would settle it.
    """
    if said.layers_are is not None and said.layers_are not in OFFSETS:
        raise ExchangeError(f"layers that are {said.layers_are!r}: expected one of {', '.join(OFFSETS)}")
    if said.rows not in (None, *ROWS):
        raise ExchangeError(f"rows that are {said.rows!r}: expected one of {', '.join(ROWS)}")
    if contents.vectors:
        return _stated(file, contents, said)
    return _Reading(file, contents, said, n_layers, d_model).all()


def _stated(file: Any, contents: Contents, said: Said) -> tuple[Vectors, str, list[str]]:
    """Of a format that defines its layers."""
    for flag, value in (("--layer", said.layers), ("--rows", said.rows), ("--names", said.names)):
        if value:
            raise ExchangeError(f"{file}: a {contents.kind} says itself which layers it holds: leave out {flag}")
    if contents.layers_are and said.layers_are not in (None, contents.layers_are):
        raise ExchangeError(f"{file} says that its layers are {contents.layers_are}, --layers-are {said.layers_are}")
    convention = contents.layers_are or said.layers_are
    if convention is None:
        raise ExchangeError(
            f"{file} does not say how it counts layers: name it with --layers-are ({', '.join(OFFSETS)})"
        )
    return {pair: dict(layers) for pair, layers in contents.vectors.items()}, convention, []


class _Reading:
    """The arrays of a file of which only names and shapes are known."""

    def __init__(self, file: Any, contents: Contents, said: Said, n_layers: int, d_model: int):
        self.file, self.said, self.n_layers = file, said, n_layers
        self.notes: list[str] = []
        self.layers: tuple[int, ...] | None = said.layers or None
        self.names: tuple[str, ...] | None = said.names or None
        self.convention = said.layers_are or ("block-index" if said.layers else "")
        self.summary = ", ".join(shown(path, array) for path, array in list(contents.arrays.items())[:6])
        self.summary += f" and {len(contents.arrays) - 6} more" if len(contents.arrays) > 6 else ""
        vectors = {}
        for path, array in contents.arrays.items():
            if not self.labels(path, array) and array.ndim and array.dtype.kind in "fiu":
                vectors[path] = array
        self.vectors = {path: array for path, array in vectors.items() if array.shape[-1:] == (d_model,)}
        if not self.vectors:
            raise self.refused(f"none is of width {d_model}, the d_model of the model")
        other = [shown(path, array) for path, array in vectors.items() if path not in self.vectors]
        if other:
            self.notes.append(f"left out, being of another width than d_model: {', '.join(other[:6])}")

    def refused(self, why: str) -> ExchangeError:
        return ExchangeError(f"{self.file} holds {self.summary or 'no array'}: {why}")

    def labels(self, path: tuple[str, ...], array: np.ndarray) -> bool:
        """Whether an array labels others; what it says is kept."""
        name = path[-1].lower()
        if array.ndim > 1:
            return False
        if array.dtype.kind in "iu" and name in LAYER_LABELS:
            if self.said.layers:
                raise self.refused(f"{name!r} says the layers: leave out --layer")
            self.layers = self.once(self.layers, tuple(map(int, array.reshape(-1)[:MAX_ARRAYS])), name)
            return True
        if array.dtype.kind in "US":
            texts = tuple(
                t.decode("utf-8") if isinstance(t, bytes) else t for t in array.reshape(-1)[:MAX_ARRAYS].tolist()
            )
            if name == "layers_are" and len(texts) == 1:
                if self.said.layers_are not in (None, texts[0]) or texts[0] not in OFFSETS:
                    raise self.refused(f"it says that its layers are {texts[0]!r}")
                self.convention = texts[0]
            elif name in NAME_LABELS:
                if self.said.names:
                    raise self.refused(f"{name!r} names {word('the emotions')}: leave out --names")
                self.names = self.once(self.names, texts, name)
            return True
        return False

    def once(self, before: Any, labels: Any, name: str) -> Any:
        if before is not None and before != labels:
            raise self.refused(f"{name!r} and another array label its rows differently: import a file of one")
        return labels

    def all(self) -> tuple[Vectors, str, list[str]]:
        by_emotion: dict[str, dict[int, np.ndarray]] = {}
        for path, array in self.vectors.items():
            trait, layer = self.name_of(path)
            for emotion, number, vector in self.rows(path, trait, layer, array):
                if number in by_emotion.setdefault(emotion, {}):
                    raise self.refused(f"two vectors would be {emotion or 'the same'!r} at layer {number}")
                by_emotion[emotion][number] = vector
        if not self.convention:
            raise self.refused(
                "the numbers of its layers may count from 0 or 1, or as hidden_states: "
                f"say which with --layers-are ({', '.join(OFFSETS)})"
            )
        vectors = {("", emotion): floats(self.file, layers) for emotion, layers in by_emotion.items()}
        return vectors, self.convention, self.notes

    def name_of(self, path: tuple[str, ...]) -> tuple[str, int | None]:
        """What a name says: an emotion, "" for none, and a layer where a part of it is the name of one."""
        stated = [
            component
            for component in path
            if STATED.fullmatch(component) or (NUMBER.fullmatch(component) and not self.said.layers)
        ]
        if stated and self.said.layers:
            raise self.refused("its names say the layers: leave out --layer")
        if len(stated) > 1:
            raise self.refused(f"{'/'.join(path)!r} names two layers")
        rest = [component for component in path if component not in stated and component.lower() not in GENERIC]
        number = re.search(r"[0-9]+$", stated[0]) if stated else None
        return "/".join(rest), int(number[0]) if number else None

    def rows(
        self, path: tuple[str, ...], trait: str, layer: int | None, array: np.ndarray
    ) -> list[tuple[str, int, np.ndarray]]:
        """[(emotion, layer, vector)] of one array [..., d_model]."""
        name = shown(path, array)
        if array.size == array.shape[-1]:
            emotion = self.names[0] if self.names is not None and len(self.names) == 1 else trait
            return [(emotion, self.single_layer(name, layer), array.reshape(-1))]
        if array.ndim > 2:
            return self.cube(name, trait, array)
        if self.rows_are(name, layer, len(array)) == "emotions":
            names, number = self.named(name, len(array)), self.single_layer(name, layer)
            return [(emotion, number, vector) for emotion, vector in zip(names, array, strict=True)]
        return [(trait, number, vector) for number, vector in zip(self.numbered(name, len(array)), array, strict=True)]

    def single_layer(self, name: str, layer: int | None) -> int:
        """The one layer that an array is of."""
        if layer is not None:
            return layer
        if self.layers is None or len(self.layers) != 1:
            given = f", --layer gives {len(self.layers)}" if self.layers else ""
            raise self.refused(
                f"nothing says which layer {name} is of{given}: name the block with --layer N "
                "(with --layers-are hidden-states or one-based where N counts so)"
            )
        return self.layers[0]

    def rows_are(self, name: str, layer: int | None, count: int) -> str:
        """Whether the rows of a matrix are layers or emotions."""
        by_names = self.names is not None and len(self.names) == count
        by_layers = self.layers is not None and len(self.layers) == count
        if self.said.rows:
            return self.said.rows
        if by_names != by_layers:
            return "emotions" if by_names else "layers"
        if layer is None and self.layers is None and self.names is None and self.convention and self.whole(count):
            self.notes.append(f"the {count} rows of {name} are taken as all layers of the model, first to last")
            return "layers"
        given = f" (--layers names {len(self.layers)})" if self.layers else ""
        whole = count in (self.n_layers, self.n_layers + 1) and not self.layers
        raise self.refused(
            f"the {count} rows of {name} may be layers or {word('emotions')}{given}: say --layers {_blanks(count)}, "
            f"or --rows {word('emotions')} --names {_blanks(count)} --layer N"
            + (f", or --layers-are ({', '.join(OFFSETS)}) where they are all layers" if whole else "")
        )

    def whole(self, count: int) -> bool:
        """Whether as many rows as this are every layer that the convention counts, no more and no less."""
        return count == self.n_layers + (self.convention == "hidden-states")

    def numbered(self, name: str, count: int) -> Sequence[int]:
        if self.layers is not None and len(self.layers) == count:
            return self.layers
        if self.layers is None and self.convention and self.whole(count):
            return range(1, count + 1) if self.convention == "one-based" else range(count)
        given = f"{len(self.layers)} were named" if self.layers else "none was named"
        raise self.refused(f"{name} has {count} layers, {given}: say --layers {_blanks(count)}")

    def named(self, name: str, count: int) -> Sequence[str]:
        if self.names is None or len(self.names) != count:
            given = f"{len(self.names)} names were given" if self.names else "nothing names them"
            raise self.refused(f"{name} has {count} {word('emotions')}, {given}: say --names {_blanks(count)}")
        return self.names

    def cube(self, name: str, trait: str, array: np.ndarray) -> list[tuple[str, int, np.ndarray]]:
        """[emotion, layer, d_model] or [layer, emotion, d_model], told by labels of different lengths."""
        emotions, layers = self.names or (), self.layers or ()
        sizes = array.shape[:-1]
        if (
            array.ndim != 3
            or len(emotions) == len(layers)
            or sizes
            not in (
                (len(emotions), len(layers)),
                (len(layers), len(emotions)),
            )
        ):
            raise self.refused(
                f"{name} needs a label for every row of both dims, different in number: --layers N,N,... "
                "and --names A,B,..., or arrays `layers` and `names` in the file"
            )
        by_emotion = array if sizes[0] == len(emotions) else array.swapaxes(0, 1)
        return [(e, n, by_emotion[i, j]) for i, e in enumerate(emotions) for j, n in enumerate(layers)]


def _blanks(count: int) -> str:
    return ",".join(["_"] * count) if count <= 6 else f"_,_,... ({count} of them)"


def shown(path: Sequence[str], array: np.ndarray) -> str:
    """Name and shape of an array."""
    name = "/".join(path)
    return f"{name[:80]!r} {list(array.shape)}" if name else f"an array {list(array.shape)}"
