"""Turns the registries of methods into their reference page: name, formula, citation, from the docstrings."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module

HEAD = """# Methods: how samples become vectors

Generated from the docstrings (`python -m nsteer.cli.reference`); a test holds it true. `x[e, k]` is the pooled
activation of sample k of emotion e at one layer; `m_e = mean_k x[e, k]`; every layer for itself. NaN never count.

```yaml skip="the section of a plan that methods are in"
emotions: [happy, sad, calm]
ratings: nsteer-20
methods:
  read: {source: comprehension, samples: 3, baseline: rest}
  probe: {source: comprehension, samples: 3, estimator: {kind: ridge, penalty: 0.5}}
  control: {source: comprehension, samples: 3, labels: shuffled}
directions:
  mixed: 0.5*read.happy - read.sad
  clean: read.happy ⟂ read.sad
  up: read.valence
steer:
  vectors:
    methods: [read]
    emotions: [happy]   # left out: every emotion; []: the formulas alone
    formulas: {joy_not_gloom: 0.5*happy - sad, up: valence}
  controls: [zero, random, shuffled]
  strengths: [0.05]
  prompts: [the old house was]
```
"""

SHARED = """## Methods that share their texts

Methods that differ only in estimator, baseline, `labels`, `project_out` or `unit_norm` have the same samples and
activations: cells whose fingerprints are equal hold the same, so one of them is computed and the others are copied from
it in the store (`nsteer check` counts those). Another pooling shares the texts. Greedy texts are shared as they
are; sampled ones go by the name of their method, so that each draws its own, unless `draws_of: read` has one use
the draws of another.
"""

CONTROLS = """## Controls

- `labels: shuffled` of a method: {shuffled}
- The same as what steers, beside the vectors themselves: `steer.controls: [shuffled]` adds, at the length of the vector
  that it stands for, what the same method makes of samples with shuffled labels; of a formula, the formula over those;
  of a contrast (`directions`), what it makes of its texts when sides are shuffled: the i-th positive and negative text
  change places or not, where there are as many of both, else any. Its texts are read once more for it.
  `{{shuffled: 20}}`: shuffled so often, labelled `shuffled`, `shuffled-2` and so on.
- A random direction of equal length: `steer.controls: [random]`, or `directions: {{noise: {{random: 0}}}}` for `edits`.
  `{{random: 20}}`: so many, labelled `random`, `random-2` and so on.
- Of K draws p is 1 / (K + 1) at least ([science.md](science.md#effects-of-steering-rows-effects-ours)).
"""

ARITHMETIC = """## Arithmetic and axes

In `directions`, text is a formula. A name is another direction of the plan, or an emotion (`happy`, of several methods
`read.happy`), or a scale of `ratings` (`valence`); labels that are no identifiers stand in quotes (`'my-direction'`).
In `steer.vectors.formulas` a name is an emotion or a scale, of the method that steers unless `read.happy` names
another; the formula's label stands on the `emotion` axis beside the emotions; `judge.map` gives it a class, or none.
`⟂` binds as `*` does. Vectors are taken as the method left them: at length 1 unless `unit_norm: false`.
"""


MORE = """How each degrades with noise, few samples and confounds, and how they agree with other packages:
[recovery.md](recovery.md). Separation, layers and the claims table are measured on mean differences of the activations,
whatever the estimator of the stored vectors ([science.md](science.md)).
"""


def page() -> str:
    """The page of all methods, in Markdown."""
    directions = import_module("nsteer.science.directions")
    arithmetic = {"formula (⟂, orthogonal, unit)": directions.combine, "scale of `ratings`": directions.axes}
    lines = [
        HEAD,
        *_registry("Estimators", "`methods.<name>.estimator`", directions.ESTIMATORS),
        *_registry("Baselines", "`methods.<name>.baseline`", directions.BASELINES),
        SHARED,
        CONTROLS.format(shuffled=_sentences(directions.permutation)[-1]),
        ARITHMETIC,
        *_table(arithmetic),
        MORE,
    ]
    return "\n".join(lines).rstrip() + "\n"


def _registry(title: str, field: str, rows: dict[str, Callable]) -> Iterator[str]:
    yield f"## {title}\n\n{field}:\n"
    yield from _table({f"`{name}`": function for name, function in rows.items()})
    for name, function in rows.items():
        yield f"**`{name}`**. {' '.join(_sentences(function))}\n"


def _table(rows: dict[str, Callable]) -> Iterator[str]:
    yield "| name | formula | citation |\n|---|---|---|"
    for name, function in rows.items():
        yield f"| {name} | {_field(function, 'formula')} | {_field(function, 'citation')} |"
    yield ""


def _field(function: Callable, name: str) -> str:
    """What stands behind `name :` in a docstring, fit for a cell of a table."""
    said = inspect.getdoc(function) or ""
    match = re.search(rf"^{name} : (.+(?:\n +.+)*)", said, re.MULTILINE)
    assert match, f"{function.__name__} states no {name}"
    return " ".join(match[1].split()).replace("|", "\\|")


def _sentences(function: Callable) -> list[str]:
    """The paragraphs of a docstring before its fields."""
    said = re.split(r"\n\n(?=\w+(?:, \w+)* : )", inspect.getdoc(function) or "")[0]
    return [" ".join(paragraph.split()) for paragraph in said.split("\n\n")]
