"""Turns the groups of `edits:` into one cube of texts beside the unedited ones, with what was measured of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from nsteer.report.claims.evidence import Evidence
from nsteer.science import outcomes

CUBE = ("model", "edit", "strength", "prompt", "seed")
PLAIN = "none"
"""The condition without any edit."""


@dataclass(frozen=True)
class Edited:
    """Continuations under conditions written by hand, over (model, edit, strength, prompt, seed).

    there : which were made; unedited, unedited_there : those without any edit, over (model, prompt, seed), all of them
    prompts : label -> text; ratio : of perplexities, NaN where none were measured
    """

    text: xr.DataArray
    there: xr.DataArray
    repetition: xr.DataArray
    ratio: xr.DataArray
    unedited: xr.DataArray
    unedited_there: xr.DataArray
    prompts: dict[str, str]


def cube(evidence: Evidence) -> Edited | None:
    """The texts of `edits:`; None where the store has none but the unedited."""
    if not evidence.has("edited"):
        return None
    made = evidence.results["edited"]
    names = [str(e) for e in made.edit.values.tolist() if e != PLAIN]
    if not names:
        return None
    there, text = made.n_tokens.load() >= 0, made.text.load()
    score = outcomes.repetition(made.token_id.load())
    ratio = xr.full_like(score, np.nan)
    if evidence.has("outcomes_edited"):
        perplexity = evidence.results["outcomes_edited"].perplexity.load().reindex_like(score)
        if PLAIN in perplexity.edit.values:
            ratio = (perplexity / perplexity.sel({"edit": PLAIN}).max("strength")).transpose(*score.dims)
    plain, plain_there = _unedited(text, there)
    at = {"edit": names}
    text, there, score, ratio = (one.sel(at).transpose(*CUBE) for one in (text, there, score, ratio))
    return Edited(text, there, score, ratio, plain, plain_there, _prompts(evidence))


def _unedited(text: xr.DataArray, there: xr.DataArray) -> tuple[xr.DataArray, xr.DataArray]:
    """The texts of the condition without edits, at whichever strength it was filed, and which are there."""
    if PLAIN not in text.edit.values:
        blank = text.isel({"edit": 0, "strength": 0}, drop=True)
        return blank, xr.zeros_like(blank, bool)
    own, known = text.sel({"edit": PLAIN}, drop=True), there.sel({"edit": PLAIN}, drop=True)
    at = known.argmax("strength")
    dims = [dim for dim in CUBE if dim in own.dims and dim != "strength"]
    plain = own.isel({"strength": at}).drop_vars("strength", errors="ignore").transpose(*dims)
    return plain, known.any("strength").transpose(*dims)


def _prompts(evidence: Evidence) -> dict[str, str]:
    """Label -> text of the prompts, from the group `edits`, or from the plan."""
    if evidence.has("edits"):
        shown = evidence.results["edits"].prompt_text.load().transpose("edit", "prompt")
        rows = (zip(shown.prompt.values.tolist(), row, strict=True) for row in shown.values.tolist())
        return {str(label): text for row in rows for label, text in row if text}
    given = evidence.plan.get("prompts")
    return {str(k): v for k, v in given.items() if isinstance(v, str)} if isinstance(given, dict) else {}
