"""The journal of remote jobs, kept in the store: a client that was killed fetches what it had submitted."""

from __future__ import annotations

import json

import xarray as xr

from nsteer.stages import arrays
from nsteer.store import Store

FLYING, DONE = "in flight", "done"


class Jobs:
    """Job ids and the digests of their programs; see `nsteer.executors.ndif.Journal`."""

    def __init__(self, store: Store, run: int):
        self.store, self.run = store, run
        self.flying: dict[str, list[str]] = {}
        if "jobs" not in store.groups():
            return
        jobs = store.read("jobs")
        for job in jobs.job.values.tolist():
            known = jobs.sel({"job": job})
            if known.status.item() == FLYING:
                self.flying[job] = json.loads(known.digests.item())

    def record(self, job: str, digests: list[str]) -> None:
        """A job was submitted with these programs."""
        self.store.prepare([arrays.jobs_group([job])])
        self.flying[job] = digests
        self._write(job, digests, FLYING)

    def find(self, digest: str) -> tuple[str, int] | None:
        """The job that holds a program, and the program's place in it."""
        for job, digests in self.flying.items():
            if digest in digests:
                return job, digests.index(digest)
        return None

    def forget(self, job: str) -> None:
        """The job's results are committed, or the server does not know it."""
        if job in self.flying:
            self._write(job, self.flying.pop(job), DONE)

    def _write(self, job: str, digests: list[str], status: str) -> None:
        data = xr.Dataset({"digests": ((), json.dumps(digests)), "status": ((), status)})
        self.store.commit("jobs", (job,), data, fingerprint=0, run=self.run)
