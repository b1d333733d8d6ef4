"""Turns a store's texts into a blind table for raters, and a key that is kept apart.

    raters.write(reporting.evidence(nsteer.open("store/quickstart.zarr")), "ratings.csv", seed=1)

Each row is a text and a concept, steered and unsteered ones mixed in an order drawn by the seed; a rater fills in
`score`, from 0 (not at all) to 100 (entirely). `nsteer.plan.ratings` reads them back.
"""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nsteer.errors import StoreError, printable
from nsteer.plan.ratings import KEY, TABLE, digest, guarded
from nsteer.report import texts
from nsteer.report.claims.evidence import Evidence
from nsteer.system.files import aside


@dataclass(frozen=True)
class Asked:
    """A text and the concept that it is rated for; `labels` say where it stands, for the key alone."""

    concept: str
    prompt: str
    text: str
    labels: Mapping[str, str]


def write(
    evidence: Evidence, output: str | os.PathLike, *, seed: int = 0, raters: int = 1, max_texts: int | None = None
) -> list[Path]:
    """Writes a table for each rater and one key: `ratings.csv`, `ratings-2.csv`, `ratings.key.csv`; returns the files.

    Raters get the same rows, each in an order of their own. most : texts a concept at most, drawn by the seed, as many
    unsteered ones as their share. Raises StoreError where the store has no text to rate, or a file can not be written.
    """
    file, rng = Path(output), random.Random(seed)
    rows = _drawn(rating_rows(evidence), max_texts, rng)
    if not rows:
        raise StoreError(f"no steered text beside an unsteered one in this store: nothing to rate in {file}")
    rng.shuffle(rows)
    width = len(str(len(rows)))
    named = [(f"t{i:0{width}d}", row) for i, row in enumerate(rows, 1)]
    files = []
    for number in range(1, raters + 1):
        own = rng.sample(named, len(named))
        path = file if number == 1 else file.with_name(f"{file.stem}-{number}{file.suffix}")
        lines = [
            {"id": name, "concept": row.concept, "prompt": row.prompt, "text": row.text, "score": ""}
            for name, row in own
        ]
        files.append(_written(path, TABLE, lines))
    key = [{"id": name, "concept": row.concept, "text_sha256": digest(row.text), **row.labels} for name, row in named]
    return [*files, _written(file.with_name(f"{file.stem}.key{file.suffix}"), KEY, key)]


def rating_rows(evidence: Evidence) -> list[Asked]:
    """Every steered text with the concept that it was steered to, and every unsteered one with each of those concepts.

    Texts that are empty, and copies of a text for the same concept, are asked once or not at all.
    """
    corpus = texts.collect(evidence)
    rows: dict[tuple[str, str], Asked] = {}
    for i in range(corpus.rows):
        labels = {axis: corpus.axes[axis][corpus.codes[axis][i]] for axis in texts.FILTERS}
        place = int(corpus.codes["unsteered"][i])
        concept = labels.pop("emotion") or labels["op"]
        if place == texts.NONE:
            continue
        prompt = corpus.prompts.get(labels["prompt"], labels["prompt"])
        where = {"label": concept, "group": "generations" if labels["method"] else "edited", **labels}
        unsteered = {"group": "unsteered", **{axis: labels[axis] for axis in ("model", "op", "prompt", "seed")}}
        for text, own in ((corpus.text[i], where), (str(corpus.unsteered[place][0]), unsteered)):
            if text.strip():
                rows.setdefault((text, concept), Asked(concept, prompt, text, own))
    return list(rows.values())


def _drawn(rows: Sequence[Asked], max_texts: int | None, rng: random.Random) -> list[Asked]:
    """At most so many rows a concept, evenly of the groups they stand in (steered, controls, unsteered)."""
    if max_texts is None:
        return list(rows)
    kept: list[Asked] = []
    for concept in dict.fromkeys(row.concept for row in rows):
        kinds: dict[tuple[str, str], list[Asked]] = {}
        for row in rows:
            if row.concept == concept:
                kinds.setdefault((row.labels["group"], row.labels.get("control", "")), []).append(row)
        for own in kinds.values():
            rng.shuffle(own)
        turn = 0
        taken: list[Asked] = []
        while len(taken) < max_texts and any(kinds.values()):
            own = list(kinds.values())[turn % len(kinds)]
            if own:
                taken.append(own.pop())
            turn += 1
        kept += taken
    return kept


def _shown(text: str) -> str:
    """A text as a table shows it: control characters spelled, line ends kept."""
    return printable(text)


def _written(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> Path:
    try:
        with aside(path) as temporary, open(temporary, "w", encoding="utf-8-sig", newline="") as out:
            writer = csv.DictWriter(out, columns, extrasaction="ignore")
            writer.writeheader()
            for row in rows:
                writer.writerow({name: guarded(_shown(str(row.get(name, "")))) for name in columns})
    except OSError as error:
        raise StoreError(f"can not write {path}: {error.strerror or error}; name another file with -o") from error
    return path
