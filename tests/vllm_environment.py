#!/usr/bin/env python3
"""Turns on_vllm/requirements.txt into an environment with vLLM's build for CPUs, cached by its hash: 3.9 GB, 4 minutes.

    python tests/vllm_environment.py          builds it where it is absent, and prints its folder

The folder is $NSTEER_VLLM, else ~/.cache/nsteer/vllm-<hash>. Only the standard library is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import environments
from environments import Unbuilt, python, run

__all__ = ["Unbuilt", "build", "folder", "python", "there"]

REQUIREMENTS = Path(__file__).parent / "on_vllm" / "requirements.txt"
FOREIGN = ("torchvision", "torchaudio", "torchcodec")
"""What comes along built against another torch, and fails when transformers imports it."""


def folder() -> Path:
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    return environments.folder("vllm", "\n".join(line for line in lines if not line.startswith("#")))


def there() -> bool:
    """Whether it is built."""
    return (folder() / "ready").exists()


def build() -> Path:
    """The environment's folder, built if it is not there yet. Raises Unbuilt."""
    return environments.build(folder(), _steps)


def _steps(home: Path) -> None:
    pip = environments.venv(home / "venv")
    run([*pip, "-r", str(REQUIREMENTS)])
    run([pip[0], "-m", "pip", "uninstall", "-q", "-y", *FOREIGN])


if __name__ == "__main__":
    try:
        print(build())
    except (Unbuilt, OSError) as error:
        sys.exit(f"the vLLM environment can not be built: {error}")
