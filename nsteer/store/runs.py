"""Turns a run of a plan into one labelled record of the group `runs`: what was run, where, when, how it ended."""

from __future__ import annotations

import hashlib
import json
import secrets
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import xarray as xr

from nsteer.errors import masked
from nsteer.store.group import Group, Variable

PATH = "runs"
VARIABLES = {
    "plan": "the plan, as YAML",
    "plan_sha256": "sha256 of the plan",
    "argv": "command line",
    "environment": "packages, devices and host, as JSON",
    "started": "start, ISO 8601",
    "finished": "end, ISO 8601; empty while it runs or when it was killed",
    "status": "how it ended; 'running' while it runs or when it was killed",
}


def label(started: str) -> str:
    """A unique label: the time and a random suffix."""
    return f"{started}-{secrets.token_hex(4)}"


def group(run: str) -> Group:
    """The group `runs` with one more run."""
    variables = {name: Variable(("run",), "string", text, "") for name, text in VARIABLES.items()}
    attrs = {"long_name": "runs of plans", "product": PATH, "product_version": 1}
    return Group(PATH, {"run": [run]}, variables, cell=("run",), attrs=attrs)


def record(plan: str, environment: Mapping[str, Any], started: str, argv: Sequence[str] | str) -> xr.Dataset:
    """The record of a run that begins. Credentials in addresses are masked."""
    plan = masked(plan)
    values = {
        "plan": plan,
        "plan_sha256": hashlib.sha256(plan.encode()).hexdigest(),
        "argv": masked(argv if isinstance(argv, str) else shlex.join(argv)),
        "environment": masked(json.dumps(environment, sort_keys=True, ensure_ascii=False, default=str)),
        "started": started,
        "finished": "",
        "status": "running",
    }
    return xr.Dataset({name: ((), value) for name, value in values.items()})
