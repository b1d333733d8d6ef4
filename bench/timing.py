"""Measures callables against each other in one process: interleaved, CPU and wall time, peak memory, ratios."""

from __future__ import annotations

import gc
import os
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Taken:
    """What one side of a comparison took: seconds of CPU and of wall, and peak bytes above the start, each call."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)

    def data(self, work: int | None = None) -> dict[str, Any]:
        summary = {
            "n": len(self.cpu),
            "cpu_s": round(statistics.median(self.cpu), 4),
            "wall_s": round(statistics.median(self.wall), 4),
            "peak_mb": round(max(self.peak) / 2**20, 1),
        }
        return summary if work is None else summary | {"per_cpu_s": round(work / statistics.median(self.cpu), 2)}


def resident() -> int:
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak:
    """The most memory in use while it is open: of the device where there is one, else of this process, sampled."""

    def __enter__(self) -> Peak:
        import torch

        self.cuda = torch.cuda.is_available()
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return self
        self.start = self.most = resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.005):
            self.most = max(self.most, resident())

    def __exit__(self, *_: object) -> None:
        import torch

        if self.cuda:
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - self.start
            return
        self.done.set()
        self.thread.join()
        self.bytes = max(self.most, resident()) - self.start


def once(call: Callable[[], Any], taken: Taken) -> Any:
    """One call, measured. On a device the clock stops when its work is done."""
    with Peak() as peak:
        wall, cpu = time.perf_counter(), time.process_time()
        answer = call()
        if peak.cuda:
            import torch

            torch.cuda.synchronize()
        taken.cpu.append(time.process_time() - cpu)
        taken.wall.append(time.perf_counter() - wall)
    taken.peak.append(peak.bytes)
    return answer


def interleaved(sides: Mapping[str, Callable[[], Any]], repeats: int, warm: int = 1) -> dict[str, Taken]:
    """Every side in turn, `repeats` times, after `warm` unmeasured rounds; the order is reversed every other round."""
    for _ in range(warm):
        for call in sides.values():
            call()
    timings = {name: Taken() for name in sides}
    for round_ in range(repeats):
        names = list(sides) if round_ % 2 == 0 else list(sides)[::-1]
        for name in names:
            once(sides[name], timings[name])
    return timings


def ratios(timings: Mapping[str, Taken], of: str, over: str, clock: str = "cpu") -> dict[str, Any]:
    """`of` over `over`, round by round: the median and the range."""
    pairs = list(zip(getattr(timings[of], clock), getattr(timings[over], clock), strict=True))
    each = sorted(a / b for a, b in pairs)
    return {"median": round(statistics.median(each), 3), "least": round(each[0], 3), "most": round(each[-1], 3)}
