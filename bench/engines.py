"""Capture and a grid of 480 rows, in one run: a vLLM engine with nsteer's programs and without, the local executor,
plain transformers. Run it in an environment that has vLLM (docs/vllm.md).

    python bench/engines.py [--threads 1] [--repeats 3] [--quick] [-o bench/engines.json]

The model is Llama-shaped with random weights; `bench/gpu.py` is the same for a GPU, with a larger one.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

PROMPTS, PROMPT, STRENGTHS = 8, 24, (0.05, 0.1, 0.15)


@dataclass(frozen=True)
class Subject:
    """A Llama-shaped model, and how much is asked of it."""

    layers: int
    width: int
    heads: int
    vocab: int
    dtype: str = "float32"
    device: str = "cpu"
    texts: int = 256
    vectors: int = 20
    new: int = 32
    rows: int = 128  # in a batch of transformers and of the local executor


CPU = Subject(layers=8, width=512, heads=8, vocab=8192, new=16)
QUICK = Subject(layers=2, width=128, heads=2, vocab=2048, texts=32, vectors=2, new=4)


def saved(subject: Subject, folder: Path) -> str:
    """The model as a folder, with a tokenizer that nothing here asks for a text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from nsteer import zoo

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=subject.vocab,
        hidden_size=subject.width,
        intermediate_size=subject.width * 11 // 4,
        num_hidden_layers=subject.layers,
        num_attention_heads=subject.heads,
        num_key_value_heads=subject.heads // 2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, subject.dtype))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(zoo.path("llama"))).save_pretrained(folder)
    return str(folder)


def captures(subject: Subject, here: Any, there: Any) -> dict[str, Callable[[], Any]]:
    """All layers of texts of 16 to 96 tokens, mean-pooled."""
    import torch
    from subjects import padded, texts

    from nsteer.program.form import Form, ReadSite, Row, programs

    form = Form(reads=tuple(ReadSite(layer) for layer in range(subject.layers)))
    rows = [
        Row(i, tuple(ids), {"text": np.full(len(ids), 1 / len(ids), np.float32)})
        for i, ids in enumerate(texts(subject.texts, vocab=subject.vocab))
    ]
    cut = list(programs(form, rows, budget=8192, max_rows=subject.rows))
    whole = list(programs(form, rows, budget=10**9, max_rows=len(rows), overhead=10**9))
    batches = [padded([rows[key].tokens for key in program.keys], subject.device) for program in cut]
    asked = [{"prompt_token_ids": list(row.tokens)} for row in rows]

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                here.module(**batch, use_cache=False)

    return {
        "plain forward": plain,
        "local executor": lambda: [here.run(program) for program in cut],
        "plain vLLM": lambda: there._model.generate(asked, temperature=0.0, max_tokens=1, detokenize=False),
        "vLLM executor": lambda: [there.run(program) for program in whole],
    }


def grids(subject: Subject, here: Any, there: Any) -> dict[str, Callable[[], Any]]:
    """Prompts x vectors x strengths, a vector and a strength a row; every row writes all of its tokens."""
    import torch
    from subjects import padded, texts

    from nsteer.program.code import GREEDY
    from nsteer.program.form import Decoding, EditSite, Form, Row, RowEdit, programs

    random = np.random.default_rng(0)
    vectors = random.standard_normal((subject.vectors, subject.width)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    form = Form(edits=(EditSite(subject.layers // 2, "add", live=True),), decoding=Decoding(subject.new, (), 0))
    touched, even = np.ones(PROMPT, bool), np.full(PROMPT, 1 / PROMPT)
    rows = [
        Row((v, s, p), tuple(ids), {}, (RowEdit(vectors[v], s, touched, True, even),))
        for v in range(subject.vectors)
        for s in STRENGTHS
        for p, ids in enumerate(texts(PROMPTS, PROMPT, PROMPT, vocab=subject.vocab))
    ]
    cut = list(programs(form, rows, budget=10**9, max_rows=subject.rows))
    whole = list(programs(form, rows, budget=10**9, max_rows=len(rows), overhead=10**9))
    batches = [padded([rows[0].tokens] * program.rows, subject.device) for program in cut]
    asked = [{"prompt_token_ids": list(row.tokens)} for row in rows]
    settings = {"temperature": 0.0, "max_tokens": subject.new, "ignore_eos": True, "detokenize": False}

    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                ends = {"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": subject.new}
                here.module.generate(**batch, **GREEDY, **ends)

    return {
        "plain generate": plain,
        "local executor": lambda: [here.run(program) for program in cut],
        "plain vLLM": lambda: there._model.generate(asked, **settings),
        "vLLM executor": lambda: [there.run(program) for program in whole],
    }


def measured(subject: Subject, threads: int, repeats: int, seconds: float = 1e9) -> dict[str, Any]:
    """Both cases, their sides in turns. After `seconds` no further case is begun, and rounds are as many as fit."""
    from timing import interleaved, ratios

    from nsteer.executors.local import Local
    from nsteer.executors.vllm import Vllm

    began, measures = time.monotonic(), {"subject": vars(subject), "load_1min": round(os.getloadavg()[0], 1)}
    clock = "cpu" if subject.device == "cpu" else "wall"
    with tempfile.TemporaryDirectory() as folder:
        path = saved(subject, Path(folder) / "llama")
        here = Local(path, dtype=subject.dtype, device=subject.device, threads=threads)
        there = Vllm(path, dtype=subject.dtype, threads=threads, max_length=256, memory=0.5)
        measures |= {"engine": there.describe()["settings"], "loaded_s": round(time.monotonic() - began, 1)}
        for name, sides in (("capture", captures), ("grid", grids)):
            left = seconds - (time.monotonic() - began)
            if left < seconds / 4:
                measures[name] = "not begun: out of time"
                continue
            calls = sides(subject, here, there)
            first = time.monotonic()
            interleaved(calls, 1, warm=0)
            rounds = max(1, min(repeats, int(left / 2 / (time.monotonic() - first))))
            taken = interleaved(calls, rounds, warm=0)
            plain = next(iter(calls))
            measures[name] = {
                "rows": subject.texts if name == "capture" else PROMPTS * subject.vectors * len(STRENGTHS),
                "rounds": rounds,
                "clock": clock,
                **{side: timings.data() for side, timings in taken.items()},
                **{
                    f"{of} / {over}": ratios(taken, of, over, clock)
                    for of, over in (
                        ("local executor", plain),
                        ("vLLM executor", plain),
                        ("vLLM executor", "local executor"),
                        ("vLLM executor", "plain vLLM"),
                    )
                },
            }
        there.close()
        here.close()
    return measures


def report(measures: dict[str, Any], output: Path) -> None:
    """Keeps what was found, and prints it."""
    text = json.dumps(measures, indent=1)
    output.write_text(text + "\n", encoding="utf-8")
    print(text)


@click.command()
@click.option("--threads", default=1, show_default=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--quick", is_flag=True, help="Shows that it runs; its figures say nothing.")
@click.option("-o", "output", type=Path, default=HERE / "engines.json", show_default=False)
def main(threads: int, repeats: int, quick: bool, output: Path) -> None:
    """Measures on a CPU."""
    report(measured(QUICK if quick else CPU, threads, repeats), output)


if __name__ == "__main__":
    main()
