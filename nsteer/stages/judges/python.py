"""The judge that is a function of the user's own: `module:name`. Reading a plan never imports its module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nsteer.errors import ExecutionError, ModelError, in_a_line
from nsteer.plan import functions
from nsteer.plan.check import Study
from nsteer.plan.schema import Judge
from nsteer.stages.judges.base import LIKELIEST, Asked, Known, Reader, Tools, blank

UNIT = "what the function returns"


def known(spec: Judge, study: Study) -> Known:
    """The code of its module: a change there, and not in what that imports, judges again. Raises ModelError."""
    assert spec.python is not None
    file = functions.file_of(spec.python.function, Path(study.document.file).parent)
    identity = {"function": spec.python.function, "code": functions.digest(file), "classes": spec.python.classes}
    threshold = LIKELIEST if spec.python.threshold is None else spec.python.threshold
    return Known({"python": identity}, tuple(spec.python.classes), UNIT, threshold, private=file)


class Loaded:
    """The function."""

    def __init__(self, function: Callable[[list[str]], Any], classes: tuple[str, ...]):
        self.function, self.classes = function, classes

    def read(self, asked: Sequence[Asked]) -> dict[str, np.ndarray]:
        """Scores of the texts. Raises ExecutionError where the function raises, or returns something else."""
        out = blank(asked, self.classes)
        there = [i for i, question in enumerate(asked) if question.text.strip()]
        if not there:
            return {"score": out}
        try:
            scores = np.asarray(self.function([asked[i].text for i in there]), np.float64)
        except Exception as error:  # somebody's code
            raise ExecutionError(f"the judge's function failed: {in_a_line(error)}") from error
        shape = (len(there), len(self.classes))
        if scores.size != shape[0] * shape[1] or scores.shape not in (shape, shape[:1]):
            raise ExecutionError(
                f"the judge's function returned numbers of shape {list(scores.shape)}: expected {list(shape)}, a row "
                "for each text"
            )
        out[there] = scores.reshape(shape)
        return {"score": out}


def load(spec: Judge, about: Known, tools: Tools) -> Reader:
    """The function, of the very file that `about` is of. Raises ModelError where nobody trusts it, and for its own."""
    assert spec.python is not None
    if not tools.trusted:
        raise ModelError(f"the function {spec.python.function!r} runs only with --trust-judge")
    try:
        function = functions.load(spec.python.function, about.private, about.identity["python"]["code"])
    except ModelError:
        raise
    except Exception as error:  # somebody's code
        raise ModelError(f"the function {spec.python.function!r} can not be loaded: {in_a_line(error)}") from error
    return Loaded(function, about.classes)
