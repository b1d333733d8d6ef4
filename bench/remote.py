"""Turns a server on loopback into milliseconds: what the remote path costs a program, alone and in a session.

    python bench/remote.py [--host ADDRESS] [--model zoo/gpt2] [--count 32]

Without --host it starts the light form of NDIF (tests/ndif), whose environment must be built. Overhead is the wall
time of a program minus the local executor's for the same program, one thread on either side; the least and the
median are printed, for a busy machine spoils the mean.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "ndif")]


def some_programs(executor, count):
    """Captures of one short text at every layer: as little work as a program can hold."""
    import numpy as np

    from nsteer.program.form import Form, ReadSite, Row, assemble

    form = Form(reads=tuple(ReadSite(layer) for layer in range(executor.anatomy.n_layers)))
    random = np.random.default_rng(0)
    for i in range(count):
        tokens = tuple(int(t) for t in random.integers(1, executor.anatomy.vocab, 16))
        yield assemble(form, [Row(i, tokens, {"text": np.full(16, 1 / 16)})])


def milliseconds(executor, groups):
    """Milliseconds a program, for each group of programs that is given to `map` at once."""
    took = []
    for group in groups:
        began = time.perf_counter()
        pairs = list(executor.map(group))
        took.append((time.perf_counter() - began) * 1000 / len(pairs))
    return took


def told(name, took, base=0.0):
    print(
        json.dumps(
            {
                "what": name,
                "n": len(took),
                "least_ms": round(min(took) - base, 2),
                "median_ms": round(statistics.median(took) - base, 2),
            }
        ),
        flush=True,
    )


def measure(host, model, count):
    import torch

    from nsteer import zoo
    from nsteer.executors.local import Local
    from nsteer.executors.ndif import Ndif

    torch.set_num_threads(1)
    folder = str(zoo.path(model.removeprefix("zoo/"))) if model.startswith("zoo/") else model
    local = Local(folder, device="cpu", threads=1)
    alone = Ndif(folder, host=host, in_flight=1, together=1)
    ahead = Ndif(folder, host=host, in_flight=4, together=1)
    session = Ndif(folder, host=host, in_flight=1, together=count, tokens=1 << 20)
    programs = list(some_programs(local, count))
    for executor in (local, alone, session):
        list(executor.map(programs[:3]))
    here = milliseconds(local, [[program] for program in programs])
    base = statistics.median(here)
    told("local, a program", here)
    told("remote, one at a time, overhead a program", milliseconds(alone, [[p] for p in programs]), base)
    told("remote, four jobs in flight, overhead a program", milliseconds(ahead, [programs] * 5), base)
    told(f"remote, {count} in one session, overhead a program", milliseconds(session, [programs] * 10), base)
    for executor in (local, alone, ahead, session):
        executor.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--host")
    parser.add_argument("--model", default="zoo/gpt2")
    parser.add_argument("--count", type=int, default=32)
    asked = parser.parse_args()
    if asked.host:
        measure(asked.host, asked.model, asked.count)
        return
    import servers

    with tempfile.TemporaryDirectory() as logs, servers.Light(Path(logs)) as server:
        measure(server.url, asked.model, asked.count)


if __name__ == "__main__":
    main()
