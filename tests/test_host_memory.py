"""Peak host memory of a capture: near what `check` states, which knows the batch and not the number of texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tinies

from nsteer.models import checkpoints
from nsteer.plan import check
from nsteer.stages import sizing

PLAN = """
name: memory
models: [{model}]
texts: zoo
emotions: jeong-20
methods: {{read: {{source: comprehension, samples: {samples}, neutral_samples: 1, pooling: mean, baseline: none}}}}
batch: {{max_tokens_in_flight: {tokens}, rows: {rows}}}
threads: 1
store: {store}
"""

RUN = """
import json, sys
from nsteer import runner
from nsteer.plan import check
summary = runner.run(check.load(sys.argv[1]))
status = open("/proc/self/status").read()
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"peak": peak, "done": summary.done["activations"], "failed": len(summary.failures)}))
"""


def plan(folder: Path, model: Path, samples: int, tokens: int = 1024, rows: int = 64) -> Path:
    file = folder / f"{samples}-{tokens}-{rows}.yaml"
    store = folder / f"{file.stem}.zarr"
    file.write_text(PLAN.format(model=model, samples=samples, store=store, tokens=tokens, rows=rows))
    return file


def stated(file: Path) -> int:
    return next(iter(sizing.size(check.load(file)).memory.values()))


def peak(file: Path, **environment: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(file)], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.strip().splitlines()[-1])
    assert report["done"] and not report["failed"]
    return report["peak"]


def saved(folder: Path, **shape: int) -> Path:
    """GPT-2 of 12 blocks of 768, random weights, with the zoo's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

    from nsteer.models.facts import local_folder

    torch.manual_seed(0)
    config = GPT2Config(bos_token_id=0, eos_token_id=0, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(local_folder("zoo/gpt2"))).save_pretrained(folder)
    return folder


def test_the_statement_counts_weights_and_grows_with_the_batch_alone(tmp_path, folder):
    model = folder("gpt2")
    numbers = sum(p.numel() for p in tinies.model("gpt2").parameters())
    assert checkpoints.parameters(model) == numbers  # tied weights once, as they lie in the file
    few, many = (stated(plan(tmp_path, model, samples)) for samples in (1, 3))
    assert few == many >= sizing.BASELINE + 4 * numbers
    assert stated(plan(tmp_path, model, 1, tokens=4096)) > few
    assert stated(plan(tmp_path, model, 1, rows=256)) > few


ONLY_LINUX = pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak from Linux")


@pytest.mark.slow
@ONLY_LINUX
def test_the_peak_of_a_capture_is_near_the_stated_one(tmp_path):
    """124M parameters, all layers."""
    file = plan(tmp_path, saved(tmp_path / "gpt2-124m"), 4, 512)
    peak_bytes, said = peak(file), stated(file)
    assert said / 1.3 <= peak_bytes <= 1.3 * said, (peak_bytes, said)


@pytest.mark.slow
@ONLY_LINUX
def test_four_times_the_texts_take_no_more_memory(tmp_path):
    """All streams of the 60 texts more would be 64 MB. The allocator is told to give back what is freed: left to
    itself, glibc keeps 45 to 70 MB of pieces of a dozen batches of different shapes, and no more after those."""
    model = saved(tmp_path / "thin", n_inner=64, vocab_size=2048)
    few, many = (peak(plan(tmp_path, model, samples, 512), MALLOC_MMAP_THRESHOLD_="131072") for samples in (1, 4))
    assert many <= 1.06 * few, (few, many)
