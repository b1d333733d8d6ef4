"""Padding in the programs of a real plan: the quickstart, its own texts and tokenizer, run by the fake executor."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import AutoTokenizer

from nsteer import check, conductor
from nsteer.conductor.session import Session
from nsteer.executors.fake import Fake
from nsteer.models import local_folder
from nsteer.program import padding_share, size

PLANS = Path(__file__).parent.parent / "plans"


def test_less_than_a_tenth_of_what_the_quickstart_runs_is_padding(tmp_path, monkeypatch):
    shutil.copy(PLANS / "quickstart.yaml", tmp_path / "plan.yaml")
    study = check.load(tmp_path / "plan.yaml", ["judge=null", f"store={tmp_path}/plan.zarr"])
    tokenizer = AutoTokenizer.from_pretrained(str(local_folder("zoo/llama")))
    seen = []

    class Watched(Fake):
        def run(self, program):
            seen.append(program)
            return super().run(program)

    def load(session, facts):
        return Watched(n_layers=facts.n_layers, d_model=facts.d_model, vocab=len(tokenizer), tokenizer=tokenizer)

    monkeypatch.setattr(Session, "load", load)
    summary = conductor.run(study)
    assert not summary.failures and summary.done["steering"] == 30
    assert sum(map(padding_share, seen)) and len(seen) < 20  # there is padding, and not a batch for every length
    positions = sum(map(size, seen))
    assert sum(padding_share(program) * size(program) for program in seen) < 0.1 * positions
    print({"programs": len(seen), "padding": sum(padding_share(p) * size(p) for p in seen) / positions})
    captured = [program for program in seen if not program.form.decoding]
    assert sum(padding_share(p) * size(p) for p in captured) < 0.1 * sum(map(size, captured))
