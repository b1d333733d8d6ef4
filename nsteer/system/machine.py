"""Tells what of this machine a process may use: cores, memory, devices; the limits of its control groups included."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

import psutil

UNLIMITED = 1 << 60
"""A limit of so many bytes is none: version 1 of control groups writes the largest multiple of a page."""

SHORTAGES = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch says of a lack of memory: on a CPU, in oneDNN, on CUDA and MPS, in cuBLAS."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: torch has a type for it on CUDA alone, elsewhere only words."""
    if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SHORTAGES)


def lacks(device: str) -> str:
    """Why this machine surely does not have a torch device (`cuda:1`, `mps`), in words; "" where it may.

    Told without torch: by the system, by the build of torch that is installed, and by whether there is a driver.
    """
    kind = device.partition(":")[0]
    if kind == "mps":
        return "" if sys.platform == "darwin" else "there is no Metal on this system"
    return _without_cuda() if kind == "cuda" else ""


@cache
def _without_cuda() -> str:
    if sys.platform == "darwin":
        return "there is no CUDA on this system"
    try:
        if metadata.version("torch").endswith("+cpu"):
            return "the torch that is installed is built without CUDA"
    except metadata.PackageNotFoundError:
        return ""
    if not sys.platform.startswith("linux") or os.path.exists("/dev/kfd"):  # AMD's GPUs are `cuda` to torch
        return ""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no CUDA driver on this machine"
    return ""


def cores(root: Path = Path("/")) -> int:
    """CPU cores that this process may use: those it is bound to, no more than its control groups' quota; 1 at least."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([bound, *map(int, quotas(root))]))


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: what the system has available, no more than its control groups leave."""
    return max(0, min([psutil.virtual_memory().available, *memory_limits(root)]))


def quotas(root: Path) -> Iterator[float]:
    """Cores of every CPU quota above this process."""
    for folder in groups(root, "cpu"):
        quota = words(folder / "cpu.max") or words(folder / "cpu.cfs_quota_us") + words(folder / "cpu.cfs_period_us")
        if len(quota) == 2 and quota[0] not in ("max", "-1"):
            yield int(quota[0]) / int(quota[1])


def memory_limits(root: Path) -> Iterator[int]:
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
