"""Writes a store of made-up continuations, judged and measured, without any model: for tests and benchmarks."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import xarray as xr

from nsteer.store import Group, Store, Variable, fingerprint

CONDITION = ("model", "op", "layer_set", "method", "emotion", "strength", "control")
ROW = ("prompt", "seed")
CLASSES = ["happy", "sad", "angry", "neutral"]
WORDS = "the rain fell on an old house while she walked home and thought of the letter in her hand".split()


def text(rng: random.Random, words: int) -> str:
    return " " + " ".join(rng.choices(WORDS, k=words)) + " ."


def string(dims: tuple[str, ...]) -> Variable:
    return Variable(dims, "string", "text")


def make(
    path: str | Path,
    *,
    models: int = 2,
    strengths: tuple[float, ...] = (0.05, 0.2),
    prompts: int = 4,
    words: int = 12,
    strange: dict[int, str] | None = None,
    without: tuple[str, ...] = (),
    prompt_label: str = "p{}",
    ops: dict[str, tuple[float, ...]] | None = None,
    plan: str = "name: made-up\nabout: Made-up texts.\n",
) -> Store:
    """A store with models x 3 emotions x strengths x 2 controls x prompts texts.

    strange : number of a cell -> the text of its first prompt. without : groups left out
    ops : steer entries, each with its own strengths; one of op `add` with `strengths` when None
    At the greatest strength steered texts are judged to be the emotion, have perplexity 90 over 3, and loop at prompt
    0; random ones are judged neutral.
    """
    rng, store, ops = random.Random(0), Store(path), ops or {"add": strengths}
    strengths = tuple(sorted({s for own in ops.values() for s in own}))
    axes: dict[str, list] = {"model": [f"made/m{k}" for k in range(models)], "op": list(ops), "layer_set": ["all"]}
    axes |= {"method": ["generation"], "emotion": CLASSES[:3], "strength": list(strengths)}
    axes |= {"control": ["none", "random"]}
    rows = {"prompt": [prompt_label.format(k) for k in range(prompts)], "seed": [0]}
    every = (*CONDITION, *ROW)
    plain = ("model", "op", *ROW)
    unsteered = {"model": axes["model"], "op": axes["op"], **rows}
    groups = [
        _texts("generations", {**axes, **rows}, every, words, CONDITION),
        _texts("unsteered", unsteered, plain, words, ("model", "op")),
        *_measured("", {**axes, **rows}, every, CONDITION),
        *_measured("_unsteered", unsteered, plain, ("model", "op")),
        Group(
            "ops",
            {"op": list(ops), "prompt": rows["prompt"]},
            {"settings": string(("op",)), "prompt_text": string(("op", "prompt"))},
            ("op",),
        ),
    ]
    store.prepare([group for group in groups if group.path not in without])
    told = xr.Dataset(
        {
            "settings": ((), json.dumps({"op": "add", "scale": "stream_norm"})),
            "prompt_text": ("prompt", ["once"] * prompts),
        },
        coords={"prompt": rows["prompt"]},
    )
    for op in ops:
        store.commit("ops", (op,), told, fingerprint=1)
    for number, cell in enumerate(itertools.product(*axes.values())):
        first = (strange or {}).get(number)
        emotion, strength, control = cell[4:]
        if strength not in ops[cell[1]]:
            continue
        strong = strength == max(ops[cell[1]]) and control == "none"
        _commit(
            store,
            "",
            cell,
            rows,
            rng,
            words,
            CLASSES.index(emotion) if strong else 3,
            90 if strong else 3,
            first,
            strong,
        )
    for cell in itertools.product(axes["model"], axes["op"]):
        _commit(store, "_unsteered", cell, rows, rng, words, 3, 3, None, False)
    run = store.add_run(
        plan=plan, environment={"python": "3.11"}, started="2026-01-01T00:00:00+00:00", argv=["plan.yaml"]
    )
    store.finish_run(run, "2026-01-01T00:01:00+00:00", "complete")
    return store


def _texts(path: str, coords: dict, dims: tuple, words: int, cell: tuple) -> Group:
    variables = {"text": string(dims), "program": string(dims), "n_tokens": Variable(dims, "int32", "tokens")}
    variables["token_id"] = Variable((*dims, "token"), "int32", "ids", compress=True)
    return Group(path, {**coords, "token": list(range(words))}, variables, cell)


def _measured(tail: str, coords: dict, dims: tuple, cell: tuple) -> list[Group]:
    judged = {"score": Variable((*dims, "class", "judge"), "float32", "P(class)")}
    return [
        Group(f"outcomes{tail}", coords, {"perplexity": Variable(dims, "float32", "perplexity")}, cell),
        Group(f"judged{tail}", {**coords, "class": CLASSES, "judge": ["j"]}, judged, (*cell, "judge")),
    ]


def _commit(store, tail, cell, rows, rng, words, winner, perplexity, first, loops) -> None:
    n = len(rows["prompt"])
    texts = [text(rng, words) for _ in range(n)]
    if first is not None:
        texts[0] = first
    ids = np.arange(n * words).reshape(n, 1, words) % 997
    if loops:
        ids[0] = 7
    p = np.full((n, 1, len(CLASSES)), 0.1, np.float32)
    p[..., winner] = 0.7
    mark = fingerprint([list(cell), tail])
    data = xr.Dataset(
        {
            "text": (ROW, np.array(texts, object)[:, None]),
            "program": (ROW, np.full((n, 1), "abc", object)),
            "n_tokens": (ROW, np.full((n, 1), words)),
            "token_id": ((*ROW, "token"), ids),
        },
        coords={**rows, "token": range(words)},
    )
    groups = {"generations" if not tail else "unsteered": data}
    numbers = xr.Dataset({"perplexity": (ROW, np.full((n, 1), perplexity, np.float32))}, coords=rows)
    groups[f"outcomes{tail}"] = numbers
    judged = xr.Dataset({"score": ((*ROW, "class"), p)}, coords={**rows, "class": CLASSES})
    groups[f"judged{tail}"] = judged
    for path, group in groups.items():
        if path in store.groups():
            store.commit(path, (*cell, *["j"] * path.startswith("judged")), group, fingerprint=mark)
