"""Turns a Ray cluster into findings: does it answer, what have its nodes, do they fit together and see this folder."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nsteer.errors import ClusterError
from nsteer.executors.doctor import BAD, OK, PACKAGES, WARN, Finding, gib, installed
from nsteer.system import machine

SECONDS = 120
"""How long a node may take to answer: it starts a process and imports nsteer."""


def findings(address: str = "") -> Iterator[Finding]:
    """What can be seen of the cluster at `address` (or RAY_ADDRESS, else of one started on this machine)."""
    from nsteer.cluster import ray as workers

    try:
        there = workers.module()
        yield Finding("ray", there.__version__)
        with workers.connected(address or None, machine.cores()) as ray:
            yield from _nodes(ray, workers.rooms(ray))
    except ClusterError as error:
        yield Finding("Ray cluster", "none", BAD, str(error))


def _nodes(ray: Any, rooms: dict[str, Any]) -> Iterator[Finding]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here, mark = installed(), Path(f".nsteer-{secrets.token_hex(8)}")
    mark.write_bytes(b"")
    try:
        asked = {}
        for name in rooms:
            where = NodeAffinitySchedulingStrategy(name, soft=False)
            look = ray.remote(node_report).options(num_cpus=0, max_retries=0, scheduling_strategy=where)
            asked[name] = look.remote(os.getcwd(), mark.name)
        for number, (name, room) in enumerate(rooms.items(), 1):
            yield Finding(f"node {number}", f"{room.cpus:g} CPU, {room.gpus:g} GPU, {gib(room.memory)} for workers")
            try:
                versions, shared = ray.get(asked[name], timeout=SECONDS)
            except Exception as error:  # whatever Ray says: that the node does not answer is the finding
                kind = type(error).__name__
                yield Finding(f"node {number}'s nsteer", f"no answer ({kind})", BAD, "is nsteer installed there?")
                continue
            yield _fitting(number, here, versions)
            yield _folder(number, shared)
    finally:
        mark.unlink(missing_ok=True)


def node_report(folder: str, mark: str) -> tuple[dict[str, str], bool]:
    """What a node says: its versions, and whether it sees a file of the driver's folder."""
    return installed(), (Path(folder) / mark).exists()


def _fitting(number: int, here: dict[str, str], there: dict[str, str]) -> Finding:
    names = [name for name in (*PACKAGES, "python") if here.get(name) != there.get(name)]
    other = ", ".join(f"{name} {there.get(name, 'absent')}, here {here.get(name, 'absent')}" for name in names)
    hint = "workers would give other numbers, or none: install the same everywhere" if other else ""
    absent = any(name not in there for name in names)
    return Finding(f"node {number}'s versions", other or "as here", BAD if absent else WARN if other else OK, hint)


def _folder(number: int, shared: bool) -> Finding:
    if shared:
        return Finding(f"node {number}'s folder", "sees this one")
    hint = "start runs in a folder that all nodes share, with plan, local models and store below it"
    return Finding(f"node {number}'s folder", "does not see this one", BAD, hint)
