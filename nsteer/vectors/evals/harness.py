"""Turns a model, a stored vector and tasks of lm-eval into their results, unsteered and steered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsteer.errors import ExchangeError, in_a_line
from nsteer.plan import editing
from nsteer.vectors.evals.steered import Held, Wanted, facts_of, hold, vector_of


@dataclass(frozen=True)
class Evaluated:
    """What came of it.

    rows : a row a task and metric: `task`, `metric`, `unsteered`, `steered`, and the standard errors of both
    about : the vector, its strength and receipts. results : of lm-eval, `unsteered` and `steered`
    """

    rows: list[dict[str, Any]]
    about: dict[str, Any]
    results: dict[str, Any]


def evaluate(
    model: str,
    tasks: Sequence[str],
    wanted: Wanted,
    *,
    revision: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    include_path: str | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
) -> Evaluated:
    """Runs tasks of lm-eval on a model, without the vector and with it.

    Under `stream_norm` texts that are scored go through the model one at a time: lm-eval pads them without a mask, and
    padding must not count in the norm. Raises ExchangeError where lm-eval is not there, or refuses; SteerError,
    ModelError, StoreError.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ExchangeError("this needs lm-eval: pip install 'nsteer[lm-eval]'") from error
    facts = facts_of(model, revision, wanted.label)
    vector_of(wanted.vector, wanted.label or facts.label)  # what is not there is told before anything is loaded
    manager = TaskManager(include_path=include_path)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ExchangeError(f"lm-eval has no task {unknown[0]!r}; more by --include-path, all by `lm-eval ls tasks`")

    class Careful(HFLM):
        """lm-eval's transformers model; scored texts one at a time where `alone`."""

        alone = False

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            whole, self.batch_size_per_gpu = self.batch_size_per_gpu, 1 if self.alone else self.batch_size_per_gpu  # type: ignore[has-type]
            try:
                return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            finally:
                self.batch_size_per_gpu = whole

    settings: dict[str, Any] = {"revision": facts.revision or "main", "dtype": dtype, "batch_size": batch_size}
    loaded = Careful(str(facts.name_or_path), device=device or _device(), **settings)

    def run() -> dict[str, Any]:
        asked = {"limit": limit, "num_fewshot": num_fewshot, "task_manager": manager, "bootstrap_iters": 1000}
        return dict(lm_eval.simple_evaluate(loaded, tasks=list(tasks), log_samples=False, **asked) or {})

    try:
        unsteered = run()
        held: Held = hold(loaded.model, facts, wanted)
        loaded.alone = editing.live(held.steering.edit)
        try:
            steered = run()
            about = {**held.about, "receipts": held.receipts()}
        finally:
            held.close()
    except (KeyError, ValueError, TypeError) as error:  # of a task: its data, its templates
        raise ExchangeError(f"lm-eval: {in_a_line(error)}") from error
    evaluations = {"unsteered": unsteered, "steered": steered}
    return Evaluated(_rows(evaluations), {"model": model, **about}, evaluations)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _rows(evaluations: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for task, unsteered in evaluations["unsteered"]["results"].items():
        steered = evaluations["steered"]["results"][task]
        for key, value in unsteered.items():
            name, _, rule = key.partition(",")
            if isinstance(value, int | float) and rule and not name.endswith("_stderr"):
                error = f"{name}_stderr,{rule}"
                rows.append(
                    {
                        "task": task,
                        "metric": name if rule == "none" else key,
                        "unsteered": value,
                        "steered": steered[key],
                        "unsteered_stderr": unsteered.get(error),
                        "steered_stderr": steered.get(error),
                    }
                )
    return rows


def save(path: str, evaluation: Evaluated) -> None:
    """Writes all of it as JSON. Raises ExchangeError."""
    kept = {
        name: {key: results[key] for key in ("results", "configs", "versions", "n-shot") if key in results}
        for name, results in evaluation.results.items()
    }
    data = {"nsteer": evaluation.about, "rows": evaluation.rows, "lm_eval": kept}
    try:
        Path(path).write_text(json.dumps(data, indent=1, default=str), encoding="utf-8")
    except OSError as error:
        raise ExchangeError(f"can not write {path}: {error.strerror or error}") from error
