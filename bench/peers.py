"""Case g: nsteer beside other packages, each in its own virtual environment, in processes that take turns.

python bench/peers/setup.py --into FOLDER     builds the environments
python bench/run.py --case g --peers FOLDER   measures
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent / "peers"

WHOLE, EARLY = "whole forward", "early stop"

PEERS = {
    "repeng": {"a": WHOLE, "b": WHOLE},
    "pyvene": {"a": WHOLE, "b": WHOLE},
    "transformer_lens": {"a": WHOLE, "b": EARLY},
    "nnterp": {"a": EARLY, "b": EARLY},
    "hooks": {"a": EARLY, "b": EARLY},
}
"""Every peer, and what its documented capture runs, by case. Its environment and its script are called after it."""

QUICK = {"--texts": 4, "--conditions": 3, "--loop": 1, "--new": 4}

CASES = {
    "a": ("a, same batches", "plain forward, same batches"),
    "b": ("b, same batches", "plain forward, same batches"),
    "c": ("c, a vector a row", "plain generate, a vector a row"),
}
"""Each case's side of nsteer, and the plain transformers that it is compared with in its own process."""

PAIRS = {
    "a": ("a, own batches", "plain forward, own batches"),
    "a, same batches": ("a, same batches", "plain forward, same batches"),
    "b": ("b, own batches", "plain forward, own batches"),
    "b, same batches": ("b, same batches", "plain forward, same batches"),
    "c, a vector a batch": ("c, a vector a batch", "plain generate, a vector a batch"),
    "c, a vector a row": ("c, a vector a row", "plain generate, a vector a row"),
}
"""Each comparison: the peer's side, and its floor."""

ABILITY = {"a": "capture", "b": "capture", "c, a vector a batch": "one_vector", "c, a vector a row": "row_vectors"}

Line = dict[str, Any]


def beside(
    folder: Path, venvs: Path, raw: Path, device: str, threads: int, rounds: int, quick: bool
) -> list[dict[str, Any]]:
    """One finding a peer. Every line of every process is appended to `raw` as soon as it is there."""
    options = {"--device": device, "--threads": threads, "--repeats": 1, **(QUICK if quick else {})}
    file = folder / "groups.json"
    file.write_text(json.dumps(nsteer_groups(QUICK["--texts"] if quick else 256)))
    pythons = {"nsteer": Path(sys.executable)} | {name: venvs / name / "bin" / "python" for name in PEERS}
    missing = {name: why(venvs, name) for name, python in pythons.items() if not python.is_file()}
    raw.write_text("")
    lines: dict[str, list[Line]] = {name: [] for name in pythons}
    failed: dict[str, str] = dict(missing)
    for round_ in range(rounds):
        order = list(pythons) if round_ % 2 == 0 else list(pythons)[::-1]
        for name in order:
            if name in failed:
                continue
            try:
                line = measured(pythons[name], name, {"--groups": file, **options}, threads)
            except RuntimeError as error:
                failed[name] = str(error)
                continue
            line = {"round": round_, "name": name, **line}
            lines[name].append(line)
            with raw.open("a") as out:  # at once: hours may lie before the end
                out.write(json.dumps(line) + "\n")
    return findings(lines, failed)


def findings(lines: Mapping[str, list[Line]], failed: Mapping[str, str]) -> list[dict[str, Any]]:
    if not lines["nsteer"]:
        raise RuntimeError(f"nsteer's own script failed: {failed.get('nsteer', 'it was never run')}")
    return [own(lines["nsteer"]), *(finding(name, lines, failed) for name in PEERS)]


def kept(raw: Path) -> dict[str, list[Line]]:
    """The lines of a raw file, by the peer that they are of."""
    lines: dict[str, list[Line]] = {name: [] for name in ("nsteer", *PEERS)}
    for line in map(json.loads, raw.read_text().splitlines()):
        lines[line["name"]].append(line)
    return lines


def nsteer_groups(count: int) -> list[list[int]]:
    """The batches that nsteer makes of the texts, as indices."""
    from forwards import capture_programs
    from subjects import texts

    from nsteer.stages import forms

    return [list(program.keys) for program in capture_programs(forms.capture([0]), texts(count))]


def why(venvs: Path, name: str) -> str:
    """Why an environment is not there: what setup.py kept of its failure."""
    kept = venvs / f"{name}.failed.txt"
    return kept.read_text().strip() if kept.is_file() else f"not installed: no {venvs / name}"


def measured(python: Path, name: str, options: Mapping[str, Any], threads: int) -> Line:
    """The line that a script prints. Raises RuntimeError with the last of what a broken one said."""
    given = [str(part) for pair in options.items() for part in pair]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if name == "nsteer":
        env["PYTHONPATH"] = str(SCRIPTS.parents[1])
    script = SCRIPTS / f"run_{name}.py"
    done = subprocess.run([str(python), str(script), *given], capture_output=True, text=True, env=env)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(said[-1][:300])
    line: Line = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{name}: {sum(sum(side['wall']) for side in line['sides'].values()):.0f} s measured", file=sys.stderr)
    return line


def own(lines: Sequence[Line]) -> dict[str, Any]:
    """What nsteer did of the work itself: its checks, and its ratios to plain transformers."""
    ratios = {
        f"{case} / plain, {clock}": spread(plain_ratio(lines, *CASES[case], clock)) for case, clock in both(CASES)
    }
    return {"peer": "nsteer", **about(lines), **ratios}


def finding(name: str, lines: Mapping[str, list[Line]], failed: Mapping[str, str]) -> dict[str, Any]:
    """nsteer's throughput over a peer's, case by case: directly, and through each one's own plain transformers."""
    theirs, ours = together(lines[name], lines["nsteer"])
    if not theirs:
        return {"peer": name, "failed": failed.get(name, "it was never run")}
    if theirs[0]["weights"] != ours[0]["weights"]:
        return {"peer": name, "failed": "its model is another one: the weights differ"}
    ratios: dict[str, Any] = {}
    for pair, clock in both(PAIRS):
        side, floor = PAIRS[pair]
        if side not in theirs[0]["sides"]:
            continue
        mine, my_floor = CASES[pair[0]]
        title = f"{pair}: nsteer / {PEERS[name][pair]}" if pair in PEERS[name] else f"{pair}: nsteer / peer"
        ratios[f"{title}, {clock}"] = spread(direct(ours, mine, theirs, side, clock))
        through = zip(plain_ratio(theirs, side, floor, clock), plain_ratio(ours, mine, my_floor, clock))
        ratios[f"{title}, through plain, {clock}"] = spread([their / our for their, our in through])
        ratios[f"{pair}: peer / plain, {clock}"] = spread(plain_ratio(theirs, side, floor, clock))
    broke = {"broke": failed[name]} if name in failed else {}
    return {"peer": name, **about(theirs), **broke, **ratios}


def together(theirs: Sequence[Line], ours: Sequence[Line]) -> tuple[list[Line], list[Line]]:
    """The lines of the rounds that both have, in their order: a run may have been cut."""
    mine, other = ({line["round"]: line for line in lines} for lines in (ours, theirs))
    rounds = sorted(mine.keys() & other.keys())
    return [other[number] for number in rounds], [mine[number] for number in rounds]


def about(lines: Sequence[Line]) -> dict[str, Any]:
    """What ran, whether it was right, and how fast: the medians of its sides."""
    first = lines[0]
    sides = {
        name: {
            "per_cpu_s": round(side["work"] / statistics.median(each(lines, name, "cpu")), 2),
            "per_wall_s": round(side["work"] / statistics.median(each(lines, name, "wall")), 2),
            "peak_mb": round(max(line["sides"][name]["peak_mb"] for line in lines), 1),
            "n": len(each(lines, name, "cpu")),
        }
        for name, side in first["sides"].items()
    }
    said = {key: first[key] for key in ("version", "torch", "transformers", "checks", "notes")}
    return {**said, "rounds": len(lines), "sides": sides}


def both(cases: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    return ((case, clock) for case in cases for clock in ("CPU", "wall"))


def each(lines: Sequence[Line], side: str, clock: str) -> list[float]:
    """Seconds of a side, over all rounds."""
    return [second for line in lines for second in line["sides"][side][clock.lower()]]


def plain_ratio(lines: Sequence[Line], side: str, floor: str, clock: str) -> list[float]:
    """A side over plain transformers of the same rows, in the same process, round by round."""
    return [a / b for a, b in zip(each(lines, side, clock), each(lines, floor, clock), strict=True)]


def direct(ours: Sequence[Line], mine: str, theirs: Sequence[Line], side: str, clock: str) -> list[float]:
    """nsteer's throughput over theirs, round by round: their seconds a text or row over ours."""
    work, my_work = theirs[0]["sides"][side]["work"], ours[0]["sides"][mine]["work"]
    pairs = zip(each(theirs, side, clock), each(ours, mine, clock))
    return [(their / work) / (our / my_work) for their, our in pairs]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def table(peers: Sequence[Mapping[str, Any]], clock: str = "CPU") -> str:
    """A line a peer: nsteer's throughput over its, and in brackets the peer over plain transformers."""
    lines = [
        f"Case g, {clock} time: nsteer's throughput over each peer's, and in brackets the peer's time over plain "
        "transformers of the same rows. `*`: its numbers are not the reference's.",
        "",
        "| peer | " + " | ".join(PAIRS) + " |",
        "|---|" + "---|" * len(PAIRS),
    ]
    for peer in peers[1:]:
        if "failed" in peer:
            lines.append(f"| {peer['peer']} | not measured: {peer['failed'].replace('|', '/')} |" + " |" * 5)
            continue
        cells = [cell(peer, pair, clock) for pair in PAIRS]
        broke = f" (broke after {peer['rounds']} rounds)" if "broke" in peer else ""
        lines.append(f"| {peer['peer']} {peer['version']}{broke} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cell(peer: Mapping[str, Any], pair: str, clock: str) -> str:
    check = peer["checks"][ABILITY[pair.removesuffix(", same batches")]]
    keys = [k for k in peer if k.startswith(f"{pair}: nsteer / ") and k.endswith(f", {clock}") and "through" not in k]
    if not keys:
        return f"- ({check.get('why', '')})".replace("|", "/")
    over = peer[f"{pair}: peer / plain, {clock}"]["median"]
    return f"{peer[keys[0]]['median']:g} ({over:g}){'' if check['right'] else ' *'}"


if __name__ == "__main__":
    print(table(findings(kept(Path(sys.argv[1])), {})))
