"""Every benchmark, one command: against plain HF in one run, interleaved, as JSON and as a Markdown table.

    python bench/run.py [--case a --case c ...] [--device cpu|cuda] [--threads 1] [--repeats 5] [--quick]

Cases: a capture of all layers; b capture at half depth; c steered generation; d a whole run; e the store; f planning.
`--quick` does every case on less work: it shows that the benchmarks run, its figures say nothing.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

TARGETS = {
    "a": [("nsteer / plain forward, CPU", "<=", 0.80)],
    "b": [("nsteer / plain forward, CPU", "<=", 0.50)],
    "c": [("nsteer / plain generate, CPU", "<=", 1.08), ("loop over conditions / nsteer, CPU, by the row", ">=", 5.0)],
    "d": [("share_outside_programs", "<=", 0.10), ("share_of_commits", "<=", 0.02)],
    "e": [("open_and_select_s", "<=", 1.0), ("write / np.save", "<=", 5.0), ("read / np.load", "<=", 5.0)],
    "f": [("s", "<=", 3.0), ("peak_mb", "<=", 500.0)],
}
"""What each case must show: the key of its figure, the side on which it must lie."""


@click.command()
@click.option("--case", "cases", multiple=True, type=click.Choice(list(TARGETS)), help="Repeatable; all when left out.")
@click.option("--device", default="cpu")
@click.option("--threads", default=1, help="CPU threads of torch.")
@click.option("--repeats", default=5)
@click.option("--quick", is_flag=True)
@click.option("-o", "--output", default=str(HERE / "results.json"), type=click.Path(dir_okay=False))
def main(cases: tuple[str, ...], device: str, threads: int, repeats: int, quick: bool, output: str) -> None:
    import torch

    torch.set_num_threads(threads)
    file = Path(output)
    kept: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        for case in cases or tuple(TARGETS):
            began = time.perf_counter()
            found = CASES[case](Path(folder), device, threads, 2 if quick else repeats, quick)
            kept[case] = {
                "where": where(device, threads),
                "took_s": round(time.perf_counter() - began, 1),
                "found": found,
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


def capture_all(folder: Path, device: str, threads: int, repeats: int, quick: bool) -> list[Any]:
    from forwards import capture

    return [capture(name, device, repeats, 1, *QUICK[quick]) for name in (["gpt2"] if quick else ["gpt2", "wide"])]


def capture_half(folder: Path, device: str, threads: int, repeats: int, quick: bool) -> list[Any]:
    from forwards import capture

    return [capture(name, device, repeats, 0.5, 8192, 128) for name in (["gpt2"] if quick else ["gpt2", "wide"])]


def generation(folder: Path, device: str, threads: int, repeats: int, quick: bool) -> list[Any]:
    from forwards import steered

    return [steered(device, repeats, 160, 2 if quick else 20, 2 if quick else 6)]


def whole(folder: Path, device: str, threads: int, repeats: int, quick: bool) -> list[Any]:
    from runs import end_to_end

    return [end_to_end(folder, threads)]


def store(folder: Path, device: str, threads: int, repeats: int, quick: bool) -> list[Any]:
    from stores import commits, gigabytes, opening

    sizes = [10, 100] if quick else [10, 100, 1000]
    return [
        commits(folder, 1000 if quick else 10_000),
        *(opening(folder, n) for n in sizes),
        gigabytes(folder, 0.1 if quick else 5.0, 1 if quick else 3),
    ]


def plan(folder: Path, device: str, threads: int, repeats: int, quick: bool) -> list[Any]:
    from runs import planning

    return [planning(folder)]


CASES = {"a": capture_all, "b": capture_half, "c": generation, "d": whole, "e": store, "f": plan}


def table(kept: dict[str, Any]) -> str:
    """What was asked and what was found, a line a figure."""
    lines = ["| case | subject | figure | asked | found | met |", "|---|---|---|---|---|---|"]
    for case, one in sorted(kept.items()):
        for found in one["found"]:
            subject = ", ".join(
                f"{k} {found[k]}" for k in ("model", "groups", "gigabytes", "cells", "rows") if k in found
            )
            for key, side, limit in TARGETS[case]:
                if key not in found:
                    continue
                value = found[key]["median"] if isinstance(found[key], dict) else found[key]
                met = value <= limit if side == "<=" else value >= limit
                lines.append(
                    f"| {case} | {subject} | {key} | {side} {limit:g} | {value:g} | {'yes' if met else 'no'} |"
                )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
