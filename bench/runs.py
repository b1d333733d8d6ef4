"""Cases d and f: a whole run on the 124M model and where its time goes; checking a plan of 100,000 cells."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from subjects import model
from timing import Peak

ROOT = Path(__file__).parents[1]

MID = """
name: bench
models: [{folder}]
texts: zoo
emotions: [{emotions}]
methods:
  generation:
    preset: jeong2026-generation
    samples: {samples}
    neutral_samples: {samples}
    generate: {{max_new_tokens: {new}}}
  comprehension: {{preset: jeong2026-comprehension, samples: {half}, neutral_samples: {half}}}
steer: {{strengths: [0.05, 0.1, 0.15], prompts: scenarios-8, project: true, generate: {{max_new_tokens: {steered}}}}}
measure: {{}}
threads: {threads}
store: {store}
"""

GRID = """
name: grid
models: [{models}]
texts: zoo
methods: {{generation: jeong2026-generation, comprehension: jeong2026-comprehension}}
steer: {{strengths: [{strengths}], prompts: scenarios-8, layers: {{each: all}}}}
store: {store}
"""

CHECK = """
import json, sys, time
began = time.perf_counter()
from nsteer import check, sizing
study = check.load(sys.argv[1])
size = sizing.size(study)
took = time.perf_counter() - began
status = open("/proc/self/status").read()  # ru_maxrss would count the parent that was forked
peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
print(json.dumps({"cells": size.total("cells"), "s": took, "cpu_s": time.process_time(), "mb": peak}))
"""


def saved_model(folder: Path) -> Path:
    """GPT-2 124M of random weights, saved with the zoo's tokenizer: what a hub model is to a plan."""
    from transformers import AutoTokenizer

    from nsteer.models.facts import local_folder

    path = folder / "gpt2-124m"
    model("gpt2", "cpu").save_pretrained(path)
    AutoTokenizer.from_pretrained(str(local_folder("zoo/gpt2"))).save_pretrained(path)
    return path


EIGHT = "happy, sad, calm, angry, hostile, loving, afraid, proud"
FULL = {"emotions": EIGHT, "samples": 8, "half": 4, "new": 48, "steered": 32}
LITTLE = {"emotions": "happy, sad", "samples": 2, "half": 2, "new": 4, "steered": 4}
"""The mid-sized plan, and one that only shows that the benchmark runs."""


def end_to_end(folder: Path, threads: int, quick: bool) -> dict[str, Any]:
    """`nsteer run` of a mid-sized plan: wall time in the model's programs, in its forwards alone, and outside."""
    import torch

    from nsteer import runner
    from nsteer.executors import local
    from nsteer.plan import check
    from nsteer.store import Store

    store = folder / "mid.zarr"
    plan = folder / "mid.yaml"
    size = LITTLE if quick else FULL
    plan.write_text(MID.format(folder=saved_model(folder), store=store, threads=threads, **size))
    spent = {"programs": 0.0, "forwards": 0.0, "commits": 0.0}
    began = [0.0]

    def timed(name: str, call: Any) -> Any:
        def timing(*given: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*given, **named)
            finally:
                spent[name] += time.perf_counter() - start

        return timing

    def before(module: Any, given: Any) -> None:
        if getattr(module, "config", None) is not None and not began[0]:
            began[0], began[1:] = time.perf_counter(), [id(module)]

    def after(module: Any, given: Any, states: Any) -> None:
        if began[0] and began[1:] == [id(module)]:
            spent["forwards"] += time.perf_counter() - began[0]
            began[0] = 0.0

    handles = [
        torch.nn.modules.module.register_module_forward_pre_hook(before),
        torch.nn.modules.module.register_module_forward_hook(after, always_call=True),
    ]
    run, commit = local.Local.run, Store.commit
    local.Local.run = timed("programs", run)  # type: ignore[method-assign]
    Store.commit = timed("commits", commit)  # type: ignore[method-assign]
    study = check.load(str(plan))
    start = time.perf_counter()
    try:
        with Peak() as peak:
            summary = runner.run(study)
    finally:
        local.Local.run, Store.commit = run, commit  # type: ignore[method-assign]
        for handle in handles:
            handle.remove()
    wall = time.perf_counter() - start
    return {
        "cells": sum(summary.done.values()),
        "failed": len(summary.failures),
        "tokens": summary.tokens,
        "wall_s": round(wall, 2),
        "peak_mb": round(peak.bytes / 2**20, 1),
        "in_programs_s": round(spent["programs"], 2),
        "in_forwards_s": round(spent["forwards"], 2),
        "share_outside_programs": round(1 - spent["programs"] / wall, 4),
        "share_outside_forwards": round(1 - spent["forwards"] / wall, 4),
        "share_of_commits": round(spent["commits"] / wall, 4),
    }


def planning(folder: Path, repeats: int, cells: int = 100_000) -> dict[str, Any]:
    """`check` of a plan with at least so many cells, in a process of its own."""
    per_strength = 2 * 20 * 2 * (5 + 5 + 7 + 6 + 8)  # methods x emotions x controls x layers of the five
    strengths = ", ".join(str(round(0.001 * (i + 1), 4)) for i in range(-(-cells // per_strength)))
    plan = folder / "grid.yaml"
    names = "zoo/gpt2, zoo/gemma, zoo/qwen, zoo/llama, zoo/mistral"
    plan.write_text(GRID.format(models=names, strengths=strengths, store=folder / "grid.zarr"))
    measures = []
    for _ in range(repeats):
        done = subprocess.run([sys.executable, "-c", CHECK, str(plan)], capture_output=True, text=True, check=True)
        measures.append(json.loads(done.stdout))
    middle = sorted(measures, key=lambda measure: measure["s"])[repeats // 2]
    return {
        "cells": middle["cells"],
        "s": round(middle["s"], 2),
        "process_cpu_s": round(middle["cpu_s"], 2),
        "peak_mb": round(max(measure["mb"] for measure in measures)),
    }
