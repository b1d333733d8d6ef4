"""Turns replies of a judge's server into pages of the store, and back: what was asked is not asked again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import xarray as xr

from nsteer.runner.runs import Run
from nsteer.stages import arrays
from nsteer.system.fingerprints import fingerprint

GROUP = "replies"


def label(body: Mapping[str, Any]) -> str:
    """What a request is known by: a hash of all that is sent, but the address."""
    said = json.dumps(body, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(said.encode("utf-8", "surrogatepass")).hexdigest()


class Replies:
    """The replies that a store has. A page is a cell: committed whole, or not at all."""

    def __init__(self, run: Run):
        self.run = run
        self.known: dict[str, dict[str, Any]] = {}
        if GROUP in run.store.groups():
            pages = run.store.read(GROUP).replies.values.tolist()
            for page in pages:
                self.known |= json.loads(page) if page else {}

    def put(self, replies: Mapping[str, dict[str, Any]]) -> None:
        """Commits some replies."""
        if not replies:
            return
        self.known |= replies
        text = json.dumps(dict(replies), ensure_ascii=False)
        page = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        self.run.store.prepare([arrays.replies_group(page)])
        data = xr.Dataset({"replies": ((), text)})
        self.run.store.commit(GROUP, (page,), data, fingerprint=fingerprint(page), run=self.run.number)
