"""Turns the answers that contrasts were made of into counts: how many a model wrote on each side, how many are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xarray as xr

from nsteer.store import slug


@dataclass(frozen=True)
class Kept:
    """Answers of a model on one side of a contrast.

    written : that the model wrote; kept : that the vector is a mean of; judge : who kept them, "" where none did
    """

    model: str
    direction: str
    side: str
    written: int
    kept: int
    judge: str = ""

    def data(self) -> dict[str, Any]:
        return asdict(self)


def counted(results: Any, models: list[str]) -> list[Kept]:
    """The answers of a store, by model, contrast and side: of those that its plan asks for now.

    results : an open store, or what holds one: groups by their paths
    """
    counts = []
    if "directions" not in results:
        return []
    settings = dict(
        zip(*(results["directions"][name].values.tolist() for name in ("direction", "settings")), strict=True)
    )
    for model in models:
        paths = [f"{group}/{slug(model)}" for group in ("responses", "responses_judged")]
        if paths[0] not in results:
            continue
        texts = results[paths[0]].sel({"model": model})
        judged = results[paths[1]].sel({"model": model}) if paths[1] in results else None
        for direction in texts.direction.values.tolist():
            asked = json.loads(settings.get(direction) or "{}").get("contrast") or {}
            for side in texts.side.values.tolist():
                labels = {"direction": direction, "side": side, "response": list(range(total(asked, side)))}
                counts += _of(model, labels, asked, texts, judged)
    return counts


def _of(model: str, labels: dict, asked: Mapping[str, Any], texts: xr.Dataset, judged: xr.Dataset | None) -> list[Kept]:
    labels["response"] = [k for k in labels["response"] if k in set(texts.response.values.tolist())]
    mine = texts[["prompt", "text"]].sel(labels).load()
    keeps = np.array([bool(text.strip()) for text in mine.text.values.tolist()], bool)
    by = (asked.get("filter") or {}).get("judge") or ""
    if by:
        keeps &= judged.kept.sel(labels).values.astype(bool) if judged is not None else False
    written = int((mine.prompt != "").sum())
    return [Kept(model, labels["direction"], labels["side"], written, int(keeps.sum()), by)] if written else []


def total(asked: Mapping[str, Any], side: str) -> int:
    """How many answers the settings of a contrast ask for on a side."""
    how = asked.get("generate") or {}
    systems = (asked.get("taken") or {}).get(side) or size(asked.get(side))
    return systems * size(how.get("questions")) * int(how.get("samples") or 1)


def size(texts: Any) -> int:
    """How many texts stand at a place of a plan: a list of them, or where they came from."""
    return int(texts.get("taken") or 0) if isinstance(texts, Mapping) else len(texts or ())
