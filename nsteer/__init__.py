"""nsteer: read and edit the residual streams of language models, from a plan to a labelled store.

    study = nsteer.load("plans/quickstart.yaml")     # a checked plan; raises PlanError with every problem
    nsteer.run(study)                                # fills the store; again: only what is missing
    results = nsteer.open("store/quickstart.zarr")   # labelled arrays, by name
    results.sel(model="zoo/llama", method="generation", emotion="happy", layer=3)

A plan may be a mapping too; the common studies are functions:

    honest = nsteer.contrast("zoo/llama", true_texts, false_texts, layers=[3, 1])
    found = nsteer.sweep("zoo/llama", honest, [0.05, 0.1], ["tom walked to the"], judge="zoo/judge")

A name is loaded at its first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers and completion: what `_PUBLIC` says, at no cost when nsteer is imported
    from nsteer import errors, zoo
    from nsteer.plan.check import load
    from nsteer.plan.check import load as plan
    from nsteer.report import figures
    from nsteer.runner import run
    from nsteer.runner.studies import capture, contrast, page, sweep
    from nsteer.store.results import open
    from nsteer.vectors.exchange import export
    from nsteer.vectors.hooks import steer

__version__ = "0.1.0"

_PUBLIC = {
    "load": "nsteer.plan.check:load",
    "plan": "nsteer.plan.check:load",
    "run": "nsteer.runner:run",
    "contrast": "nsteer.runner.studies:contrast",
    "sweep": "nsteer.runner.studies:sweep",
    "capture": "nsteer.runner.studies:capture",
    "page": "nsteer.runner.studies:page",
    "export": "nsteer.vectors.exchange:export",
    "open": "nsteer.store.results:open",
    "steer": "nsteer.vectors.hooks:steer",
    "errors": "nsteer.errors",
    "figures": "nsteer.report.figures",
    "zoo": "nsteer.zoo",
}
"""Public name -> where it lives. Imported at first use: `import nsteer` loads neither torch nor xarray."""

__all__ = [
    "__version__",
    "capture",
    "contrast",
    "errors",
    "export",
    "figures",
    "load",
    "open",
    "page",
    "plan",
    "run",
    "steer",
    "sweep",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'nsteer' has no attribute {name!r}")
    module, _, attribute = _PUBLIC[name].partition(":")
    public_module = import_module(module)
    return getattr(public_module, attribute) if attribute else public_module


def __dir__() -> list[str]:
    return sorted(__all__)
