"""Every benchmark, one command: against plain HF in one run, interleaved, as JSON and as a Markdown table.

    python bench/run.py [--case a --case c ...] [--device cpu|cuda] [--threads 1] [--repeats 5] [--quick]

Cases: a capture of all layers; b capture at half depth; c steered generation; d a whole run; e the store; f planning;
g other packages, in environments that `bench/peers/setup.py` builds (`--peers FOLDER`); h a real model (`README.md`).
`--quick` does every case on less work: it shows that the benchmarks run, its figures say nothing.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

TARGETS = {
    "a": [("nsteer / plain forward, CPU", "<=", 0.80)],
    "b": [("nsteer / plain forward, CPU", "<=", 0.50)],
    "c": [("nsteer / plain generate, CPU", "<=", 1.08), ("loop over conditions / nsteer, CPU, by the row", ">=", 5.0)],
    "d": [("share_outside_forwards", "<=", 0.10), ("share_of_commits", "<=", 0.02)],
    "e": [("open_and_select_s", "<=", 1.0), ("write / np.save", "<=", 5.0), ("read / np.load", "<=", 5.0)],
    "f": [("s", "<=", 3.0), ("peak_mb", "<=", 500.0)],
    "g": [
        ("a: nsteer / whole forward, CPU", ">=", 1.5),
        ("a: nsteer / early stop, CPU", ">=", 1.1),
        ("b: nsteer / whole forward, CPU", ">=", 1.5),
        ("b: nsteer / early stop, CPU", ">=", 1.1),
        ("c, a vector a batch: nsteer / peer, CPU", ">=", 2.0),
        ("c, a vector a row: nsteer / peer, CPU", ">=", 1.0),
    ],
    "h": [
        ("nsteer / plain forward, CPU", "<=", 0.90),
        ("hook script / nsteer, CPU", ">=", 1.0),
        ("nsteer / plain generate, CPU", "<=", 1.08),
        ("hook script / nsteer, CPU, by the row", ">=", 1.0),
    ],
}
"""What each case must show: the key of its figure, the side on which it must lie."""

SUBJECT = ("model", "peer", "groups", "gigabytes", "cells", "rows")


@dataclass(frozen=True)
class Settings:
    """What a case is run with. `folder`: for what it writes; `venvs`: where the peers are; `raw`: their own lines."""

    folder: Path
    device: str
    threads: int
    repeats: int
    quick: bool
    venvs: Path
    raw: Path


@click.command()
@click.option("--case", "cases", multiple=True, type=click.Choice(list(TARGETS)), help="Repeatable; all when left out.")
@click.option("--device", default="cpu")
@click.option("--threads", default=1, help="CPU threads of torch.")
@click.option("--repeats", default=5, help="Of each side; of case g: rounds of processes.")
@click.option("--quick", is_flag=True)
@click.option("--peers", default=str(HERE.parents[1] / "peers-venvs"), help="The folder that peers/setup.py built.")
@click.option("-o", "--output", default=str(HERE / "results.json"), type=click.Path(dir_okay=False))
def main(cases: tuple[str, ...], device: str, threads: int, repeats: int, quick: bool, peers: str, output: str) -> None:
    import torch

    torch.set_num_threads(threads)
    file = Path(output)
    raw, repeats = file.with_name(f"{file.stem}.peers.jsonl"), 2 if quick else repeats
    kept: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        given = Settings(Path(folder), device, threads, repeats, quick, Path(peers), raw)
        for case in cases or tuple(TARGETS):
            began = time.perf_counter()
            findings = CASES[case](given)
            kept[case] = {
                "where": where(device, threads),
                "took_s": round(time.perf_counter() - began, 1),
                "quick": quick,
                "found": findings,
            }
            click.echo(json.dumps({case: kept[case]}, indent=1))
            file.write_text(json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
            file.with_suffix(".md").write_text(table(kept))


def where(device: str, threads: int) -> dict[str, Any]:
    """The machine, in cores and versions; how busy it was."""
    from importlib import metadata

    import torch

    named = torch.cuda.get_device_name(0) if device == "cuda" else platform.machine()
    load = round(os.getloadavg()[0], 2)
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "nnsight", "zarr", "xarray")}
    return {"device": named, "cores": os.cpu_count(), "threads": threads, "load_1min": load, **versions}


def capture_all(given: Settings) -> list[Any]:
    return captures(given, 1)


def capture_half(given: Settings) -> list[Any]:
    return captures(given, 0.5)


def captures(given: Settings, depth: float) -> list[Any]:
    from forwards import capture

    models, count = (["gpt2"], 8) if given.quick else (["gpt2", "wide"], 256)
    return [capture(name, given.device, given.repeats, depth, count) for name in models]


def generation(given: Settings) -> list[Any]:
    from forwards import steered

    return [steered(given.device, given.repeats, 160, *((2, 2, 4) if given.quick else (20, 6, 32)))]


def real(given: Settings) -> list[Any]:
    """Cases a and c on real weights, also against a script of plain hooks."""
    from forwards import capture, steered

    texts, work = (8, (2, 2, 4)) if given.quick else (64, (5, 3, 32))
    return [
        capture("smollm2", given.device, given.repeats, 1, texts, script=True),
        steered(given.device, given.repeats, 60, *work, name="smollm2", script=True),
    ]


def whole(given: Settings) -> list[Any]:
    from runs import end_to_end

    return [end_to_end(given.folder, given.threads, given.quick)]


def store(given: Settings) -> list[Any]:
    from stores import commits, gigabytes, opening

    folder, quick = given.folder, given.quick
    return [
        commits(folder, 1000 if quick else 10_000),
        *(opening(folder, n) for n in ([10, 100] if quick else [10, 100, 1000])),
        gigabytes(folder, 0.1 if quick else 5.0, 1 if quick else 3),
    ]


def plan(given: Settings) -> list[Any]:
    from runs import planning

    return [planning(given.folder, given.repeats)]


def others(given: Settings) -> list[Any]:
    from peers import beside

    rounds = 1 if given.quick else given.repeats
    return beside(given.folder, given.venvs, given.raw, given.device, given.threads, rounds, given.quick)


CASES = {
    "a": capture_all,
    "b": capture_half,
    "c": generation,
    "d": whole,
    "e": store,
    "f": plan,
    "g": others,
    "h": real,
}


def table(kept: dict[str, Any]) -> str:
    """What was asked and what was found, a line a figure; wall time on a device, whose work CPU time misses."""
    lines = ["| case | subject | figure | asked | found | met |", "|---|---|---|---|---|---|"]
    for case, entry in sorted(kept.items()):
        quick = " (quick)" if entry.get("quick") else ""
        clock = "CPU" if entry["where"]["device"] == platform.machine() else "wall"
        for finding in entry["found"]:
            subject = ", ".join(f"{k} {finding[k]}" for k in SUBJECT if k in finding)
            if "failed" in finding and "peer" in finding:
                lines.append(
                    f"| {case}{quick} | {subject} | {finding['failed'].replace('|', '/')} | - | - | not measured |"
                )
            for asked, side, limit in TARGETS[case]:
                key = asked.replace(", CPU", f", {clock}")
                if key not in finding:
                    continue
                value = finding[key]["median"] if isinstance(finding[key], dict) else finding[key]
                met = value <= limit if side == "<=" else value >= limit
                lines.append(
                    f"| {case}{quick} | {subject} | {key} | {side} {limit:g} | {value:g} | {'yes' if met else 'no'} |"
                )
    if "g" in kept:
        from peers import table as beside

        clock = "CPU" if kept["g"]["where"]["device"] == platform.machine() else "wall"
        lines += ["", beside(kept["g"]["found"], clock).rstrip()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
