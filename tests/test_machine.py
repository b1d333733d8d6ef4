"""Cores and memory that a process may use, under planted control groups of both versions."""

from __future__ import annotations

import os

import psutil
import pytest
import tinies
import torch

from nsteer.system import machine

GIB = 1 << 30


def planted(root, lines: str, files: dict[str, str]):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(lines)
    for name, text in files.items():
        (root / "sys/fs/cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / name).write_text(text)
    return root


@pytest.fixture(autouse=True)
def large(monkeypatch):
    """A machine of 64 cores and 100 GiB."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    memory = type("Memory", (), {"available": 100 * GIB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def test_without_groups_it_is_what_the_system_says(tmp_path):
    assert (machine.cores(tmp_path), machine.free_memory(tmp_path)) == (64, 100 * GIB)


def test_the_tightest_limit_above_counts(tmp_path):
    files = {
        "a/cpu.max": "400000 100000\n",
        "a/b/cpu.max": "max 100000\n",
        "a/memory.max": f"{8 * GIB}\n",
        "a/memory.current": f"{5 * GIB}\n",
        "a/memory.stat": f"anon 1\ninactive_file {GIB}\n",
        "a/b/memory.max": "max\n",
        "a/b/memory.current": "5\n",
    }
    root = planted(tmp_path, "0::/a/b\n", files)
    assert (machine.cores(root), machine.free_memory(root)) == (4, 4 * GIB)


def test_groups_of_version_1(tmp_path):
    files = {
        "cpu/x/cpu.cfs_quota_us": "150000\n",
        "cpu/x/cpu.cfs_period_us": "100000\n",
        "cpu/cpu.cfs_quota_us": "-1\n",
        "cpu/cpu.cfs_period_us": "100000\n",
        "memory/x/memory.limit_in_bytes": f"{2 * GIB}\n",
        "memory/x/memory.usage_in_bytes": f"{GIB}\n",
        "memory/memory.limit_in_bytes": "9223372036854771712\n",
        "memory/memory.usage_in_bytes": "7\n",
    }
    root = planted(tmp_path, "5:memory:/x\n4:cpu,cpuacct:/x\n", files)
    assert (machine.cores(root), machine.free_memory(root)) == (1, GIB)


def test_a_container_sees_its_own_group_as_the_mount(tmp_path):
    root = planted(tmp_path, "0::/host/path\n", {"cpu.max": "50000 100000"})
    assert machine.cores(root) == 1  # half a core: one thread


def test_threads_are_torchs_choice_unless_there_are_fewer_cores(monkeypatch):
    from nsteer.executors.local import Local

    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for cores, threads in ((2, None), (64, None), (2, 5)):
        monkeypatch.setattr(machine, "cores", lambda cores=cores: cores)
        Local(tinies.model("llama"), tokenizer=tinies.tokenizer(), threads=threads)
    assert asked == [2, 8, 5]
