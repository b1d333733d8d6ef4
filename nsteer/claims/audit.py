"""The audit of 2604.11050: do two methods find one geometry?"""

from __future__ import annotations

from nsteer import separation
from nsteer.claims.evidence import (
    OPEN,
    Evidence,
    Row,
    compared_at,
    read_from,
    unknown,
)
from nsteer.store import slug


def audit(evidence: Evidence) -> list[Row]:
    """Do the two methods find one geometry? RDM correlation beside its noise ceiling (after 2604.11050)."""
    what, paper = (
        "RDM correlation of generation and comprehension",
        "0.09 and 0.36 (2604.11050: Mistral-7B, Llama-3.1-8B)",
    )
    rows = []
    for model in evidence.with_activations():
        methods = [m for m in evidence.pair(model) if m]
        if len(methods) < 2:
            continue
        layer, rules = evidence.layer(model, evidence.rules.depth), evidence.rules
        pick = {"model": model, "method": methods, "layer": layer}
        data, text = evidence.results[f"activations/{slug(model)}"].pooled.sel(pick), evidence.text(model)
        text = None if text is None else text.sel({"model": model, "method": methods})
        matrices = separation.rdms(data, baseline=rules.baseline, text=text, seed=rules.seed)
        found = separation.rsa(matrices, "method", shuffles=999, seed=rules.seed).isel({"method": 0, "method_2": 1})
        ceiling, value = float(found.ceiling), float(found.correlation)
        why = f"noise ceiling {ceiling:.2f}" + (": too noisy to tell" if not ceiling > 0.3 else ", other models")
        rows.append(
            Row(
                "audit",
                what,
                f"{model}, layer {layer}",
                paper,
                ours=f"{value:.2f}",
                value=value,
                n=int(found.n_emotions),
                p=float(found.p),
                control=f"noise ceiling {ceiling:.2f} (split halves over samples)",
                verdict=OPEN,
                why=why,
                assumed=compared_at(evidence),
                inputs=read_from(evidence, model, methods, layer),
            )
        )
    return rows or [unknown("audit", what, "all models", paper, "no model has both methods")]
