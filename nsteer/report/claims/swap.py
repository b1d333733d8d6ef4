"""Do the vectors of a generation method follow the text, or the instruction it was written to? Not in the paper."""

from __future__ import annotations

import xarray as xr

from nsteer.plan.layers import at_depth
from nsteer.report.claims.evidence import Evidence, Row, stated, unknown
from nsteer.report.claims.verdicts import claimed
from nsteer.science.statistics import Interval
from nsteer.store import slug

FOLLOWS = (
    "vectors follow the text, not its instruction (of swapped texts nearest to either, share nearest to their own)"
)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def swap(evidence: Evidence) -> list[Row]:
    """A row a model and method whose texts were read behind other instructions; the layer is that of claim 1."""
    rows = []
    for model in evidence.models:
        for method, measures in evidence.swapped(model).items():
            layer = _near(measures, evidence.rules.depth, evidence, model)
            here, labels = measures.sel({"layer": layer}), {"model": model, "method": method}
            used = tuple((f"{group}/{slug(model)}", labels) for group in ("swapped", "activations", "samples"))
            what = ("swap", FOLLOWS, f"{model}, {method}, layer {layer}", "not tested")
            n, either = int(here.n), int(here.n_either)
            if not either:
                rows.append(unknown(*what, "no swapped text is nearest to its own emotion or the instruction's", n=n))
                continue
            edges = Interval(float(here.follows), float(here.follows_low), float(here.follows_high), either)
            shown = dict.fromkeys(_near(measures, depth, evidence, model) for depth in DEPTHS)
            rows.append(
                stated(
                    *what,
                    ours=f"{_said(here, 'text')} nearest to their own emotion, {_said(here, 'instruction')} to the "
                    f"instruction's, of {n} texts",
                    **claimed(edges, above=0.5, p=float(here.p)),
                    control="by layer, own / instruction's: "
                    + "; ".join(f"{layer}: {_both(measures.sel({'layer': layer}))}" for layer in shown)
                    + f"; chance {float(here.chance):.2f}",
                    assumed=f"baseline {measures.attrs['baseline']}; vectors without the folds of text and instruction",
                    inputs=used,
                )
            )
    return rows


def _near(measures: xr.Dataset, depth: float, evidence: Evidence, model: str) -> int:
    known = measures.layer.values[(measures.n > 0).values].tolist() or measures.layer.values.tolist()
    n_layers = int(evidence.fact(model, "n_layers") or len(known))
    wanted = at_depth(depth, n_layers) if depth < 1 else n_layers - 1
    return min(known, key=lambda layer: abs(layer - wanted))


def _said(here: xr.Dataset, name: str) -> str:
    return f"{float(here[name]):.2f} ({float(here[f'{name}_low']):.2f} to {float(here[f'{name}_high']):.2f})"


def _both(here: xr.Dataset) -> str:
    return f"{float(here.text):.2f} / {float(here.instruction):.2f}"
