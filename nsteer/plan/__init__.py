"""From YAML or Python to a checked study: reader, mappings, schema, check, texts, prompts, layers, positions, formulas.

Python binds the name of a room to the room: that `nsteer.plan({...})` can be called, the room itself is callable.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """`nsteer.plan`, which is `nsteer.load` when it is called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from nsteer.plan.check import load

        return load(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
