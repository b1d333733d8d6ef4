"""Turns what other libraries say while a model loads into silence, or into an error where it matters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from logging import ERROR, getLogger
from typing import Any, NoReturn

from transformers.utils import logging

from nsteer.errors import ModelError


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and log lines of transformers and accelerate meanwhile: who runs nsteer has a display already."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    spreading = getLogger("accelerate")  # says of every module that is not in memory that it is not
    before = spreading.level
    spreading.setLevel(ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        spreading.setLevel(before)
        if bars:
            logging.enable_progress_bar()


def has_all_weights(name: str, told: Mapping[str, Any]) -> None:
    """Raises ModelError for a checkpoint without some of its model's weights, in whose place random ones are drawn.

    told : what `from_pretrained` gives by `output_loading_info`, under `ignore_mismatched_sizes`, whose own error names
        no weight
    """
    for weight, held, wanted in sorted(told.get("mismatched_keys", ()))[:1]:
        other_shape(name, weight, held, wanted)
    missing = sorted(told.get("missing_keys", ()))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(
            f"{name!r} lacks weights, in whose place random ones would be drawn: {missing[0]}{more}. "
            "Another checkpoint, or one of another kind of model?"
        )


def other_shape(name: str, weight: str, held: Iterable[int], wanted: Iterable[int]) -> NoReturn:
    """Raises ModelError for a weight that has another shape than the model's config asks for."""
    raise ModelError(
        f"{name!r}: the weight {weight} has the shape {list(held)}, and {list(wanted)} by the config: is the config "
        "another model's?"
    )
