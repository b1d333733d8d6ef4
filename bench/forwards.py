"""Cases a, b and c: capture and steered generation against plain HF on the same rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from subjects import END, TEXTS, Ends, model, padded, texts
from timing import interleaved, ratios

PROMPTS, STRENGTHS, PER_PROMPT = 8, (0.02, 0.05, 0.1), 16
PER_BATCH = 16  # texts of the hook script
CLOCKS = ("CPU", "wall")
BUDGET, MAX_ROWS = 8192, 128  # padded tokens and texts of a capture's batch


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

    return programs(form, capture_rows(asked), budget=BUDGET, max_rows=MAX_ROWS)


def capture(
    name: str, device: str, repeats: int, depth: float, count: int = TEXTS, script: bool = False
) -> dict[str, Any]:
    """`count` texts of 16 to 96 tokens, mean-pooled, at every layer up to `depth`, against plain forwards of them.

    script: also against what a researcher writes by hand: hooks on the blocks, 16 texts a batch as they come.
    """
    import torch

    from nsteer.stages import forms

    ours = executor(name, device)
    layers = range(ours.anatomy.n_layers) if depth == 1 else [int(depth * ours.anatomy.n_layers)]
    asked = texts(count)
    batches = list(capture_programs(forms.capture(layers), asked))
    same = [
        {k: torch.as_tensor(p.arrays[k]).to(device) for k in ("input_ids", "attention_mask", "position_ids")}
        for p in batches
    ]

    def nsteer() -> None:
        for program in capture_programs(forms.capture(layers), asked):
            ours.run(program)

    def plain() -> None:
        with torch.no_grad():
            for batch in same:
                ours.module(**batch, use_cache=False)

    sides: dict[str, Callable[[], Any]] = {"nsteer": nsteer, "plain forward": plain}
    if script:
        sides["hook script"] = lambda: hooked_capture(ours.module, blocks(ours), asked, device)
    timings = interleaved(sides, repeats)
    real = sum(map(len, asked))
    places = sum(p.arrays["attention_mask"].size for p in batches)
    return {
        "model": name,
        "layers": len(list(layers)) if depth == 1 else f"one, at depth {depth}",
        "batches": len(batches),
        "padding": round(1 - real / places, 4),
        "worst_batch_padding": round(max(1 - float(p.arrays["attention_mask"].mean()) for p in batches), 4),
        "sides": {side: taken.data(len(asked)) for side, taken in timings.items()},
        "nsteer / plain forward, CPU": ratios(timings, "nsteer", "plain forward"),
        "nsteer / plain forward, wall": ratios(timings, "nsteer", "plain forward", "wall"),
        **{f"hook script / nsteer, {c}": ratios(timings, "hook script", "nsteer", c.lower()) for c in CLOCKS if script},
    }


def blocks(ours: Any) -> list[Any]:
    return list(ours.module.get_submodule(ours.anatomy.blocks))


def hooked_capture(module: Any, layers: Sequence[Any], asked: Sequence[Sequence[int]], device: str) -> Any:
    """The mean stream of every text after every block, by forward hooks."""
    import torch

    kept: list[Any] = []

    def keep(_: Any, __: Any, out: Any) -> None:
        kept.append(out[0] if isinstance(out, tuple) else out)

    handles, means = [block.register_forward_hook(keep) for block in layers], []
    try:
        for first in range(0, len(asked), PER_BATCH):
            batch = padded(asked[first : first + PER_BATCH], device)
            kept.clear()
            with torch.no_grad():
                module(**batch, use_cache=False)
            mask = batch["attention_mask"][:, :, None].float()
            means.append(torch.stack([(stream.float() * mask).sum(1) / mask.sum(1) for stream in kept], 1).cpu())
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(means)


def steered(
    device: str,
    repeats: int,
    max_rows: int,
    vectors: int,
    loops: int,
    new: int,
    name: str = "gpt2",
    script: bool = False,
) -> dict[str, Any]:
    """8 prompts x vectors x 3 strengths, `new` tokens: a vector and a strength a row, against plain generate.

    The loop over conditions is measured on `loops` of them in each round, and compared by the row; so is, with
    `script`, what a researcher writes by hand: a hook that adds the vector, a `generate` for each condition.
    """
    import torch

    from nsteer.program.form import Decoding, EditSite, Form, Row, RowEdit, programs

    ours = executor(name, device)
    width, layer = ours.anatomy.d_model, ours.anatomy.n_layers // 2
    prompts = texts(PROMPTS, PER_PROMPT, PER_PROMPT)
    random = np.random.default_rng(0)
    directions = random.normal(size=(vectors, width)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    form = Form(edits=(EditSite(layer, "add", live=True),), decoding=Decoding(new, (), END))
    touched, even = np.ones(PER_PROMPT, bool), np.full(PER_PROMPT, 1 / PER_PROMPT)
    conditions = [(v, s) for v in range(vectors) for s in STRENGTHS]

    def rows_of(chosen: list[tuple[int, float]]) -> list[Row]:
        return [
            Row((v, s, p), tuple(ids), {}, (RowEdit(directions[v], s, touched, True, even),))
            for v, s in chosen
            for p, ids in enumerate(prompts)
        ]

    def run(chosen: list[tuple[int, float]], rows: int) -> list[Any]:
        return [ours.run(program).tokens for program in programs(form, rows_of(chosen), budget=10**9, max_rows=rows)]

    plain = plain_generate(ours.module, device, new)
    every = [padded(prompts, device) for _ in conditions]
    joined = [
        {k: torch.cat([batch[k] for batch in every])[i : i + max_rows] for k in every[0]}
        for i in range(0, len(conditions) * PROMPTS, max_rows)
    ]
    sides: dict[str, Callable[[], Any]] = {
        "nsteer": lambda: run(conditions, max_rows),
        "plain generate": lambda: [plain(batch) for batch in joined],
        "loop over conditions": lambda: [run([condition], PROMPTS) for condition in conditions[:loops]],
    }
    block, batch = blocks(ours)[layer], padded(prompts, device)
    if script:
        sides["hook script"] = lambda: [
            hooked(block, torch.as_tensor(directions[v], device=device), s, lambda: plain(batch))
            for v, s in conditions[:loops]
        ]
    timings = interleaved(sides, repeats)
    rows = len(conditions) * PROMPTS
    few = [side for side in sides if side in ("loop over conditions", "hook script")]
    work = {"nsteer": rows, "plain generate": rows} | dict.fromkeys(few, loops * PROMPTS)
    scale = rows / (loops * PROMPTS)
    return {
        "model": name,
        "rows": rows,
        "batch": max_rows,
        "loop_measured_on": f"{loops} of {len(conditions)} conditions in each round",
        "sides": {side: taken.data(work[side] * new) for side, taken in timings.items()},
        "nsteer / plain generate, CPU": ratios(timings, "nsteer", "plain generate"),
        "nsteer / plain generate, wall": ratios(timings, "nsteer", "plain generate", "wall"),
        **{
            f"{side} / nsteer, {clock}, by the row": scaled(ratios(timings, side, "nsteer", clock.lower()), scale)
            for side in few
            for clock in CLOCKS
        },
    }


def hooked(block: Any, vector: Any, strength: float, call: Callable[[], Any]) -> Any:
    """A call under a hook that adds a vector, in mean norms of the stream, to what a block gives."""

    def push(_: Any, __: Any, out: Any) -> Any:
        stream = out[0] if isinstance(out, tuple) else out
        moved = stream + strength * stream.norm(dim=-1).mean() * vector
        return (moved, *out[1:]) if isinstance(out, tuple) else moved

    handle = block.register_forward_hook(push)
    try:
        return call()
    finally:
        handle.remove()


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
