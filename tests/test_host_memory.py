"""Peak host memory of a capture: near what `check` states, which knows the batch and not the number of texts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tinies

from nsteer import check, sizing

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
from nsteer import check, conductor
summary = conductor.run(check.load(sys.argv[1]))
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


def peak(file: Path) -> int:
    done = subprocess.run([sys.executable, "-c", RUN, str(file)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["done"] and not found["failed"]
    return found["peak"]


def test_the_statement_counts_weights_and_grows_with_the_batch_alone(tmp_path, folder):
    model = folder("gpt2")
    numbers = sum(p.numel() for p in tinies.model("gpt2").parameters())
    assert sizing.parameters(model) == numbers  # tied weights once, as they lie in the file
    few, many = (stated(plan(tmp_path, model, samples)) for samples in (1, 3))
    assert few == many >= sizing.BASELINE + 4 * numbers
    assert stated(plan(tmp_path, model, 1, tokens=4096)) > few
    assert stated(plan(tmp_path, model, 1, rows=256)) > few


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak from Linux")
def test_the_peak_of_a_capture_is_near_the_stated_one_which_does_not_know_the_number_of_texts(tmp_path):
    """GPT-2 at 124M parameters, random weights, all layers; texts in the ratio 1 : 4.

    The peak grew by 8 and 14 % with four times the texts when it was measured, which is not explained: this test does
    not say that it is constant.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

    from nsteer.models import local_folder

    model = tmp_path / "gpt2-124m"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(GPT2Config()).save_pretrained(model)
    AutoTokenizer.from_pretrained(str(local_folder("zoo/gpt2"))).save_pretrained(model)
    few, many = plan(tmp_path, model, 3, 512), plan(tmp_path, model, 12, 512)
    small, large = peak(few), peak(many)
    print(json.dumps({"stated": stated(few), "few": small, "many": large}))
    assert stated(few) == stated(many)
    for found in (small, large):
        assert stated(few) / 1.3 <= found <= 1.3 * stated(few), (found, stated(few))
