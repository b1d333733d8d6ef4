"""Turns what the code says of itself into the reference pages: plans, their JSON Schema, ops, commands, the Python API.

`python -m nsteer.cli.reference` writes them into `docs/`. The commands and the API are looked up by name when their
page is made, and only then.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from nsteer.cli.reference import api, commands, methods, ops, plans
from nsteer.cli.reference.plans import ORDER, json_schema

__all__ = ["DOCUMENTS", "ORDER", "documents", "json_schema"]

DOCUMENTS: dict[str, Callable[[], str]] = {
    "plan.md": plans.page,
    "ops.md": ops.page,
    "nsteer.schema.json": lambda: json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n",
    "cli.md": commands.page,
    "api.md": api.page,
    "methods.md": methods.page,
}
"""File name in `docs/` -> makes its text."""


def documents() -> dict[str, str]:
    """File name in `docs/` -> what it holds."""
    return {name: make() for name, make in DOCUMENTS.items()}
