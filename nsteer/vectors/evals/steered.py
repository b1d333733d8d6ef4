"""Turns the name of a stored vector into a model of transformers that stays steered, for tools that load models."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from nsteer.errors import SteerError
from nsteer.models import facts as models
from nsteer.models.facts import Facts
from nsteer.plan import layers as naming
from nsteer.plan.check.python import edit_of
from nsteer.plan.schema import Model
from nsteer.store import results
from nsteer.vectors import hooks


@dataclass(frozen=True)
class Wanted:
    """A vector and how it steers, as `nsteer.steer` takes it.

    vector : STORE:METHOD/EMOTION. label : of the model in the store; its id when left out. layers : a specification, or
    as it is typed; all that the vector has when left out
    """

    vector: str
    strength: float = 0.1
    layers: Any = None
    op: str = "add"
    scale: str | None = None
    positions: Any = "all"
    label: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.strength, bool) or not isinstance(self.strength, int | float):
            raise SteerError(f"strength {self.strength!r}: expected a number")
        edit_of(op=self.op, scale=self.scale, positions=self.positions)  # raises for what is none of these


@dataclass
class Held:
    """A model that is steered until `close`. about : the vector and its cell, as JSON data."""

    steering: hooks.Steering
    about: dict[str, Any]
    _hooks: ExitStack = field(repr=False)

    def receipts(self) -> dict[str, dict[str, float]]:
        """What was done so far, by layer. Raises EditError where the model ran and an edit did nothing."""
        self.steering.check()
        return {str(layer): receipt for layer, receipt in self.steering.receipts.items()}

    def close(self) -> None:
        """Takes the hooks off. Raises EditError where the model ran and an edit did nothing."""
        self._hooks.close()


def facts_of(model: str, revision: str | None = None, label: str | None = None) -> Facts:
    """What is known of a model before it is loaded: `name_or_path` is what transformers loads. Raises ModelError."""
    return models.facts(Model(id=model, revision=revision, label=label))


def vector_of(name: str, label: str) -> tuple[Any, dict[str, Any]]:
    """The stored vector STORE:METHOD/EMOTION of a model (layer, d_model), and where it is from. Raises SteerError,
    LabelError, StoreError, InputError."""
    store, colon, rest = name.rpartition(":")
    method, slash, emotion = rest.partition("/")
    if not (colon and store and slash and method and emotion):
        raise SteerError(f"{name!r}: expected STORE:METHOD/EMOTION")
    opened = results.open(store)
    cell = (label, method, emotion)
    opened.sel("vectors", **dict(zip(("model", "method", opened.axis), cell, strict=True)))  # a label that is not there
    path = opened.product("vectors", label)
    record = opened.store.committed(path).get(cell)
    vector = None if record is None else opened.whole(path, cell).vector
    if record is None or vector is None or not vector.notnull().any():
        raise SteerError(f"{opened.name} has no vector {rest} of {label}")
    numbers = {"fingerprint": f"{record.fingerprint:013x}", "content": f"{record.content:013x}"}
    about = {"store": opened.name, "model": label, "method": method, "emotion": emotion, **numbers}
    if "models" in opened and (label,) in opened.store.committed("models"):
        about["identity"] = str(opened["models"].identity.sel({"model": label}).item())
    return vector, about


def hold(model: Any, facts: Facts, wanted: Wanted) -> Held:
    """Steers a loaded model of transformers from now on.

    Raises what `vector_of` and `nsteer.steer` raise, and SteerError for a vector of other weights.
    """
    vector, about = vector_of(wanted.vector, wanted.label or facts.label)
    if about.get("identity", facts.identity) != facts.identity:
        raise SteerError(f"{wanted.vector} is of other weights ({about['identity']}) than these ({facts.identity})")
    layers = wanted.layers
    if isinstance(layers, list):  # `3,1` on the command line of Inspect comes as ["3", "1"]
        layers = ",".join(map(str, layers))
    try:
        layers = naming.spoken(layers) if isinstance(layers, str) else layers
    except LookupError as error:
        raise SteerError(f"layers {error.args[0]}") from error
    stack = ExitStack()
    how: dict[str, Any] = {
        "strength": wanted.strength,
        "op": wanted.op,
        "scale": wanted.scale,
        "positions": wanted.positions,
    }
    steering = stack.enter_context(hooks.steer(model, vector, layers, **how))
    settings = {name: value for name, value in asdict(wanted).items() if name not in ("vector", "label", "layers")}
    return Held(steering, {**about, **settings, "scale": steering.edit.scale, "layers": sorted(steering.edits)}, stack)
