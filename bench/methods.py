"""How well each estimator finds a planted direction: tables over noise, samples and confounds (docs/methods.md).

    python bench/methods.py                    # the tables, in Markdown
    python bench/methods.py --repeng           # agreement with repeng, where it is installed
    python bench/methods.py --steering-vectors # the same for steering-vectors

A world has one planted direction u. Lengths are in units of the gap between the two means, which is 1. Samples of both
sides carry noise of expected length `noise`, alike in every direction. They also stand somewhere along a second axis,
at right angles to u, that has nothing to do with the emotion: with standard deviation `spread` among samples, and with
means of the two sides that lie `confound` apart. `shared`: sample k of both sides stands at one place there, as texts
of one topic do. `varied`: standard deviation of the effect itself from pair to pair.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nsteer.science.directions.estimators import ESTIMATORS, Contrast

WIDTH, SEEDS = 128, 40
BASE: dict[str, Any] = {"noise": 1.0, "n": 16, "spread": 0.0, "confound": 0.0, "shared": False, "varied": 0.0}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "mean_difference": ("mean_difference", {}),
    "pca_difference": ("pca_difference", {"centre": False}),
    "pca_difference, centred": ("pca_difference", {"centre": True}),
    "ridge": ("ridge", {"penalty": 0.1}),
    "logistic": ("logistic", {"penalty": 0.1}),
    "lda": ("lda", {"shrinkage": None}),
    "lda, shrinkage 0.5": ("lda", {"shrinkage": 0.5}),
}
SWEEPS: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
    "noise": ("noise", [0.1, 0.5, 1.0, 2.0, 4.0, 8.0], {}),
    "samples a side, noise 2": ("n", [2, 4, 8, 16, 64, 256], {"noise": 2.0}),
    "spread along another axis, each text its own": ("spread", [0.0, 0.5, 1.0, 2.0, 4.0], {"noise": 0.5}),
    "the same, shared by the texts of one number": (
        "spread",
        [0.0, 0.5, 1.0, 2.0, 4.0],
        {"noise": 0.5, "shared": True},
    ),
    "effect that varies from pair to pair": ("varied", [0.0, 0.25, 0.5, 1.0, 2.0], {"noise": 0.5}),
    "confound, spread 1, 64 samples": ("confound", [0.0, 0.25, 0.5, 1.0, 2.0], {"noise": 0.5, "spread": 1.0, "n": 64}),
}


def world(
    seed: int, *, noise: float, n: int, spread: float, confound: float, shared: bool, varied: float
) -> tuple[np.ndarray, Contrast]:
    """The planted direction [d_model], and the samples of both sides."""
    draw = np.random.default_rng(seed)
    planted, other = np.linalg.qr(draw.normal(size=(WIDTH, 2)))[0].T
    places = draw.normal(size=(2, n)) * spread
    places = places[[0, 0]] if shared else places
    effect = 1 + draw.normal(size=n) * varied
    sides = []
    for sign, place in zip((0.5, -0.5), places, strict=True):
        rows = draw.normal(size=(n, WIDTH)) * noise / np.sqrt(WIDTH)
        sides.append(rows + sign * np.outer(effect, planted) + np.outer(place + sign * confound, other))
    here, there = sides
    return planted, Contrast(here.mean(0) - there.mean(0), here, [there])


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def tables() -> str:
    """Median cosine with the planted direction over SEEDS worlds, and in brackets its 10th percentile."""
    lines = []
    for title, (field, values, fixed) in SWEEPS.items():
        lines += [f"**{title}**\n", f"| estimator | {' | '.join(map(str, values))} |", "|---|" + "--:|" * len(values)]
        worlds = [[world(seed, **{**BASE, **fixed, field: value}) for seed in range(SEEDS)] for value in values]
        for label, (name, own) in WAYS.items():
            cells = []
            for drawn in worlds:
                cosines = [cosine(ESTIMATORS[name](contrast, **own), planted) for planted, contrast in drawn]
                cells.append(f"{np.median(cosines):.3f} ({np.percentile(cosines, 10):.2f})")
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def repeng(contrast: Contrast) -> Mapping[str, np.ndarray]:
    """What repeng's own `read_representations` makes of the same activations, as layer 0 of no model."""
    from types import SimpleNamespace

    from repeng import extract

    rows = np.stack([contrast.samples, contrast.against[0]], 1).reshape(-1, WIDTH)
    extract.batched_get_hiddens = lambda *_: {0: rows.copy()}
    extract.model_layer_list = lambda _: [None]
    entries = [extract.DatasetEntry("", "")] * len(contrast.samples)
    model = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=2))
    directions = {
        m: extract.read_representations(model, None, entries, [0], method=m)[0] for m in ("pca_diff", "pca_center")
    }
    return {"pca_difference, centred": directions["pca_diff"], "pca_difference": directions["pca_center"]}


def steering_vectors(contrast: Contrast) -> Mapping[str, np.ndarray]:
    """What steering-vectors' aggregators make of the same activations."""
    import torch
    from steering_vectors import aggregators

    sides = [torch.tensor(samples) for samples in (contrast.samples, contrast.against[0])]
    estimators = {"mean_difference": aggregators.mean_aggregator(), "pca_difference": aggregators.pca_aggregator()}
    return {label: aggregate(*sides).numpy() for label, aggregate in estimators.items()}


def agreement(peer: Callable[[Contrast], Mapping[str, np.ndarray]]) -> str:
    """The least |cosine| between a peer's direction and ours over SEEDS worlds, and how often the sign agrees."""
    cosines: dict[str, list[float]] = {}
    for seed in range(SEEDS):
        _, contrast = world(seed, **{**BASE, "noise": 2.0, "spread": 1.0})
        for label, theirs in peer(contrast).items():
            name, own = WAYS[label]
            cosines.setdefault(label, []).append(cosine(ESTIMATORS[name](contrast, **own), theirs))
    said = {label: (np.abs(values).min(), int(np.sum(np.array(values) > 0))) for label, values in cosines.items()}
    return "\n".join(f"{label}: |cosine| >= {least:.6f}, sign {same}/{SEEDS}" for label, (least, same) in said.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeng", action="store_true")
    parser.add_argument("--steering-vectors", action="store_true")
    asked = parser.parse_args()
    peers = [repeng] * asked.repeng + [steering_vectors] * asked.steering_vectors
    print("\n".join(map(agreement, peers)) if peers else tables())


if __name__ == "__main__":
    main()
