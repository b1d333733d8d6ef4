"""Captures a large JSONL file: how memory grows with its rows, and what a kill in the middle leaves and costs.

    python bench/rows.py 50000                 rows; also: --plain, without the kill

Prints one line of JSON a size: the peak of resident memory (VmHWM) of a run over a tenth of the rows and over all, and
for the killed run how many cells stood, how many the next run did, and whether the two stores hold the same numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = "tom anna paul lena walked to the market and sat beside the old house . she smiled at him as rain fell".split()
PLAN = """
name: rows
models: [zoo/llama]
prompts: {{file: {file}, columns: [kind]}}
reads: {{mean: {{pooling: mean, layers: [4, 2]}}}}
store: {store}
threads: 1
"""
RUN = (
    "import sys, nsteer\nfrom pathlib import Path\nnsteer.run(nsteer.load(sys.argv[1], allow_outside=True))\n"
    "print(next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith('VmHWM')))\n"
)
GROUP = "reads/zoo--llama"


def write(file: Path, count: int) -> None:
    """Texts of 4 to 40 words, by a seed."""
    pick = random.Random(0)
    with file.open("w") as out:
        for i in range(count):
            text = " ".join(pick.choices(WORDS, k=pick.randint(4, 40)))
            out.write(json.dumps({"text": text, "kind": f"k{i % 7}"}) + "\n")


def begin(folder: Path, name: str, rows: Path) -> subprocess.Popen:
    plan = folder / f"{name}.yaml"
    plan.write_text(PLAN.format(file=rows, store=folder / f"{name}.zarr"))
    return subprocess.Popen([sys.executable, "-c", RUN, str(plan)], stdout=subprocess.PIPE, text=True)


def peak(process: subprocess.Popen) -> float:
    """MiB at most, as the process itself tells at its end."""
    said, _ = process.communicate()
    assert process.returncode == 0, process.returncode
    return int(re.search(r"VmHWM:\s*(\d+) kB", said)[1]) / 1024


def cells(store: Path) -> int:
    from nsteer.store import Store

    return len(Store(store).committed(GROUP)) if store.exists() and Store(store).exists else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=int)
    parser.add_argument("--plain", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for count in (given.rows // 10, given.rows):
            write(folder / f"{count}.jsonl", count)
            started = time.monotonic()
            high = peak(begin(folder, str(count), folder / f"{count}.jsonl"))
            seconds = round(time.monotonic() - started)
            print(json.dumps({"rows": count, "vmhwm_mib": round(high), "seconds": seconds}), flush=True)
        if given.plain:
            return
        store = folder / "killed.zarr"
        process = begin(folder, "killed", folder / f"{given.rows}.jsonl")
        every = cells(folder / f"{given.rows}.zarr")
        while process.poll() is None and cells(store) < every // 3:
            time.sleep(0.5)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        stood = cells(store)
        high = peak(begin(folder, "killed", folder / f"{given.rows}.jsonl"))
        print(json.dumps({"cells": every, "stood_after_kill": stood, "after": cells(store), "vmhwm_mib": round(high)}))
        done = [sys.executable, "-m", "nsteer", "diff", str(folder / f"{given.rows}.zarr"), str(store)]
        print(subprocess.run(done, capture_output=True, text=True).stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    main()
