"""Tells whether the hub of models can be reached, before its client tries six times for half a minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

WAIT = 1.5
"""Seconds in which the hub must answer; a name server that does not is given up as well."""

AGAIN = 60.0
"""Seconds after which one looks again: a notebook may have found a network."""

_looked: dict[str, tuple[float, bool]] = {}


def reachable() -> bool:
    """Whether the hub (`HF_ENDPOINT`) answers at all, proxies respected; False at once under `HF_HUB_OFFLINE`."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    when, online = _looked.get(constants.ENDPOINT, (-AGAIN, False))
    if time.monotonic() - when >= AGAIN:
        online = _answers(constants.ENDPOINT)
        _looked[constants.ENDPOINT] = time.monotonic(), online
    return online


@contextmanager
def offline(*others: Any) -> Iterator[None]:
    """Has the hub's client, and `others` that hold the same flag, look at what was fetched before alone."""
    from huggingface_hub import constants

    before = [(module, module.HF_HUB_OFFLINE) for module in (constants, *others)]
    try:
        for module, _ in before:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, was in before:
            module.HF_HUB_OFFLINE = was


def _answers(address: str) -> bool:
    """Whether anything answers there in time: a thread, since looking a name up has no limit of its own."""
    heard: list[bool] = []

    def ask() -> None:
        from huggingface_hub import get_session

        try:
            get_session().head(address, timeout=WAIT)
            heard.append(True)
        except Exception:  # no network, no name, no route, a broken proxy: each has a kind of its own
            heard.append(False)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(WAIT)
    return heard == [True]
