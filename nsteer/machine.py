"""Tells what of this machine a process may use: cores and memory, the limits of its control groups included."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

UNLIMITED = 1 << 60
"""A limit of so many bytes is none: version 1 of control groups writes the largest multiple of a page."""


def cores(root: Path = Path("/")) -> int:
    """CPU cores that this process may use: those it is bound to, no more than its control groups' quota; 1 at least."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([bound, *map(int, quotas(root))]))


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: what the system has available, no more than its control groups leave."""
    return max(0, min([psutil.virtual_memory().available, *left(root)]))


def quotas(root: Path) -> Iterator[float]:
    """Cores of every CPU quota above this process."""
    for folder in groups(root, "cpu"):
        found = words(folder / "cpu.max") or words(folder / "cpu.cfs_quota_us") + words(folder / "cpu.cfs_period_us")
        if len(found) == 2 and found[0] not in ("max", "-1"):
            yield int(found[0]) / int(found[1])


def left(root: Path) -> Iterator[int]:
    """Bytes left under every memory limit above this process; what the system can drop counts as left."""
    names = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
    for folder in groups(root, "memory"):
        for limit, used in ((words(folder / a), words(folder / b)) for a, b in names):
            if limit and used and limit[0] != "max" and int(limit[0]) < UNLIMITED:
                stat = words(folder / "memory.stat")
                held = dict(zip(stat[::2], stat[1::2], strict=False))
                cache = int(held.get("total_inactive_file", held.get("inactive_file", 0)))
                yield int(limit[0]) - int(used[0]) + cache


def groups(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control group and of those above it, of version 2 and of version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, names, path = line.split(":", 2)
        if names and controller not in names.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if names else "")
        inner = base / path.lstrip("/")
        # inside a container the path may be the host's, which is not there: its own group is then the mount itself
        yield from dict.fromkeys([inner, *(p for p in inner.parents if p.is_relative_to(base)), base])


def words(file: Path) -> list[str]:
    """A small file's words; none where it is not there."""
    try:
        return file.read_text(encoding="utf-8").split()
    except OSError:
        return []
