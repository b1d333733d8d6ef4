"""Turns captured streams into how well each method tells concepts apart, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nsteer.report.claims.evidence import Evidence
from nsteer.report.overview.steered import UNDETERMINED, YES, Answer
from nsteer.science import statistics


@dataclass(frozen=True)
class Layers:
    """Held-out accuracy of one method of one model, over `layers`; NaN where nothing could be held out.

    best : the layer of the highest; chosen : the accuracy at a layer chosen inside the folds, with its interval, of n
    texts: the highest of many is too high for the layer that it chose
    """

    model: str
    method: str
    layers: tuple[int, ...]
    accuracy: tuple[float, ...]
    best: int | None
    depth: float
    chosen: float
    low: float
    high: float
    n: int
    chance: float
    concepts: int

    def answer(self, axis: str) -> Answer:
        """Whether the method tells its concepts apart, in words."""
        where = f"{self.model}, {self.method}"
        if self.best is None or not self.n:
            return Answer(
                where, UNDETERMINED, f"Nothing could be held out: no accuracy over {self.concepts} {axis}s.", ""
            )
        verdict = YES if self.low > self.chance else "not distinguished from chance"
        text = (
            f"{self.chosen:.2f} of held-out texts are given to their own of {self.concepts} {axis}s (95 % "
            f"{self.low:.2f} to {self.high:.2f}, n = {self.n}), best at layer {self.best} (depth {self.depth:.2f})."
        )
        return Answer(where, verdict, text, f"chance {self.chance:.2f}")


def layers(evidence: Evidence) -> tuple[Layers, ...]:
    """Every method of every model with activations."""
    rows = []
    for model in evidence.with_activations():
        told = evidence.told_apart(model)
        for method in told.method.values.tolist():
            cube = told.sel({"method": method})
            accuracy = cube.accuracy.values.astype(float)
            known = bool((~np.isnan(accuracy)).any())
            place = int(np.nanargmax(accuracy)) if known else -1
            n = int(cube.accuracy_chosen_n)
            edges = statistics.wilson(float(cube.accuracy_chosen) * n, n) if n else None
            listed = [int(k) for k in cube.layer.values.tolist()]
            deep = float(cube.depth.values[place]) if known and "depth" in cube.coords else float("nan")
            rows.append(
                Layers(
                    model,
                    str(method),
                    tuple(listed),
                    tuple(accuracy.tolist()),
                    listed[place] if known else None,
                    deep,
                    float(cube.accuracy_chosen),
                    edges.low if edges else float("nan"),
                    edges.high if edges else float("nan"),
                    n,
                    float(cube.chance.max()),
                    int(cube.n_emotions.max()),
                )
            )
    return tuple(rows)
