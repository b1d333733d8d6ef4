"""Cases a, b and c: capture and steered generation against plain HF on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from subjects import END, TEXTS, Ends, model, padded, texts
from timing import interleaved, ratios

PROMPTS, STRENGTHS, PER_PROMPT = 8, (0.02, 0.05, 0.1), 16
BUDGET, MOST = 8192, 128  # padded tokens and texts of a capture's batch


def executor(name: str, device: str) -> Any:
    """nsteer's own executor over a model that is already in memory."""
    from nsteer.executors.local import Local

    return Local(model(name, device), device=device, tokenizer=Ends())


def capture_rows(asked: Sequence[Sequence[int]]) -> list[Any]:
    """Mean pooling: the weights that `pooling: mean` makes."""
    from nsteer.program.form import Row

    return [
        Row(i, tuple(ids), {"text": np.full(len(ids), 1 / len(ids)), "norm": np.full(len(ids), 1 / len(ids))})
        for i, ids in enumerate(asked)
    ]


def capture_programs(form: Any, asked: Sequence[Sequence[int]]) -> Iterator[Any]:
    """The programs of a capture, in the batches that the benchmarks use."""
    from nsteer.program.form import programs

    return programs(form, capture_rows(asked), budget=BUDGET, most=MOST)


def capture(name: str, device: str, repeats: int, depth: float, count: int = TEXTS) -> dict[str, Any]:
    """`count` texts of 16 to 96 tokens, mean-pooled, at every layer up to `depth`, against plain forwards of them."""
    import torch

    from nsteer.program.form import padding_share
    from nsteer.stages import forms

    ours = executor(name, device)
    layers = range(ours.anatomy.n_layers) if depth == 1 else [int(depth * ours.anatomy.n_layers)]
    asked = texts(count)
    made = list(capture_programs(forms.capture(layers), asked))
    same = [
        {k: torch.as_tensor(p.arrays[k]).to(device) for k in ("input_ids", "attention_mask", "position_ids")}
        for p in made
    ]

    def nsteer() -> None:
        for program in capture_programs(forms.capture(layers), asked):
            ours.run(program)

    def plain() -> None:
        with torch.no_grad():
            for batch in same:
                ours.module(**batch, use_cache=False)

    found = interleaved({"nsteer": nsteer, "plain forward": plain}, repeats)
    real = sum(map(len, asked))
    places = sum(p.arrays["attention_mask"].size for p in made)
    return {
        "model": name,
        "layers": len(list(layers)) if depth == 1 else f"one, at depth {depth}",
        "batches": len(made),
        "padding": round(1 - real / places, 4),
        "worst_batch_padding": round(max(map(padding_share, made)), 4),
        "sides": {side: taken.data(len(asked)) for side, taken in found.items()},
        "nsteer / plain forward, CPU": ratios(found, "nsteer", "plain forward"),
        "nsteer / plain forward, wall": ratios(found, "nsteer", "plain forward", "wall"),
    }


def steered(device: str, repeats: int, most: int, vectors: int, loops: int, new: int) -> dict[str, Any]:
    """8 prompts x vectors x 3 strengths, `new` tokens: a vector and a strength a row, against plain generate.

    The loop over conditions is measured on `loops` of them in each round, and compared by the row.
    """
    import torch

    from nsteer.program.form import Decoding, EditSite, Form, Row, RowEdit, programs

    ours = executor("gpt2", device)
    width, layer = ours.anatomy.d_model, ours.anatomy.n_layers // 2
    prompts = texts(PROMPTS, PER_PROMPT, PER_PROMPT)
    random = np.random.default_rng(0)
    directions = random.normal(size=(vectors, width)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    form = Form(edits=(EditSite(layer, "add", live=True),), decoding=Decoding(new, (), END))
    touched, even = np.ones(PER_PROMPT, bool), np.full(PER_PROMPT, 1 / PER_PROMPT)
    conditions = [(v, s) for v in range(vectors) for s in STRENGTHS]

    def made(chosen: list[tuple[int, float]]) -> list[Row]:
        return [
            Row((v, s, p), tuple(ids), {}, (RowEdit(directions[v], s, touched, True, even),))
            for v, s in chosen
            for p, ids in enumerate(prompts)
        ]

    def run(chosen: list[tuple[int, float]], rows: int) -> list[Any]:
        return [ours.run(one).tokens for one in programs(form, made(chosen), budget=10**9, most=rows)]

    plain = plain_generate(ours.module, device, new)
    every = [padded(prompts, device) for _ in conditions]
    joined = [
        {k: torch.cat([one[k] for one in every])[i : i + most] for k in every[0]}
        for i in range(0, len(conditions) * PROMPTS, most)
    ]
    sides: dict[str, Callable[[], Any]] = {
        "nsteer": lambda: run(conditions, most),
        "plain generate": lambda: [plain(batch) for batch in joined],
        "loop over conditions": lambda: [run([one], PROMPTS) for one in conditions[:loops]],
    }
    found = interleaved(sides, repeats)
    rows = len(conditions) * PROMPTS
    work = {"nsteer": rows, "plain generate": rows, "loop over conditions": loops * PROMPTS}
    scale = rows / work["loop over conditions"]
    return {
        "model": "gpt2",
        "rows": rows,
        "batch": most,
        "loop_measured_on": f"{loops} of {len(conditions)} conditions in each round",
        "sides": {side: taken.data(work[side] * new) for side, taken in found.items()},
        "nsteer / plain generate, CPU": ratios(found, "nsteer", "plain generate"),
        "nsteer / plain generate, wall": ratios(found, "nsteer", "plain generate", "wall"),
        **{
            f"loop over conditions / nsteer, {clock}, by the row": scaled(
                ratios(found, "loop over conditions", "nsteer", clock.lower()), scale
            )
            for clock in ("CPU", "wall")
        },
    }


def scaled(spread: dict[str, float], by: float) -> dict[str, float]:
    return {name: round(value * by, 3) for name, value in spread.items()}


def plain_generate(module: Any, device: str, new: int) -> Callable[[Any], Any]:
    """Greedy HF generate of `new` tokens."""
    import torch

    def call(batch: Any) -> Any:
        given = {k: v for k, v in batch.items() if k != "position_ids"}
        with torch.no_grad():
            return module.generate(**given, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=END)

    return call
