"""Fixtures of the vLLM executor. These tests run in an environment with vLLM, which tests/test_vllm.py finds or builds.

A model is held by an engine that changes this process; so what is local comes first, or from a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("vllm") is None:
    collect_ignore_glob = ["test_*"]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """Folders of the zoo's models by name; of Gemma without the cap on attention's logits, which vLLM's kernel for CPUs
    rounds: streams differ by 7e-4."""
    from nsteer import zoo

    folder = tmp_path_factory.mktemp("toys") / "gemma"
    shutil.copytree(zoo.path("gemma"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_logit_softcapping": None}))
    folders = {name: zoo.path(name) for name in ("llama", "qwen", "mistral", "gpt2")} | {"gemma": folder}
    return folders | ({"smollm2": Path(named)} if (named := os.environ.get("NSTEER_SMOLLM2")) else {})


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """Runs nsteer in a folder, in a process of its own: what it printed, both ways, and how it ended."""

    def call(folder: Path, *words: str, **settings):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **settings}
        line = [sys.executable, "-m", "nsteer", *words]
        return subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)

    return call
