"""Studies and problems for the tests of the plan side: plans as text, models as folders of two small files."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

from nsteer.errors import PlanError, Problem
from nsteer.plan import check, reader

ROOT = Path(__file__).parent.parent

PLAN = """\
name: study
models: [zoo/llama]
texts: zoo
emotions: [happy, sad, calm]
methods:
  made: {source: generation, samples: 3, pooling: mean, baseline: grand_mean}
  read: {source: comprehension, samples: 2, pooling: last, baseline: neutral_mean}
store: study.zarr
"""
"""A plan without a fault, to be spoilt in one place."""

STEER = "steer: {strengths: [0.1], prompts: {a: one}}"


@cache
def _read(text: str) -> reader.Document:
    return reader.parse(text, "plan.yaml")


def document(text: str = PLAN) -> reader.Document:
    """A plan as it is read, in a copy: reading it takes longer than checking it."""
    return replace(_read(text), data=deepcopy(_read(text).data))


def study(text: str = PLAN, *settings: str) -> check.Study:
    return check.study(reader.override(document(text), settings))


def problems(text: str = PLAN, *settings: str) -> list[Problem]:
    """Every problem of a plan; an empty list for a good one."""
    try:
        study(text, *settings)
    except PlanError as error:
        return error.problems
    return []


def model_folder(folder: Path, layers: int = 4, chat: bool = False, **config) -> Path:
    """A folder that looks like a causal language model to whoever reads its JSON files."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"model_type": "llama", "num_hidden_layers": layers, "hidden_size": 8, "architectures": ["X"], **config}
    (folder / "config.json").write_text(json.dumps(facts))
    if chat:
        (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder
