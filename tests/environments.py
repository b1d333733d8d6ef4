"""Turns a requirements file into an environment of its own for tests, built once and cached by a hash of its words.

Only the standard library is needed: its users are scripts too.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


class Unbuilt(Exception):
    """The environment is absent and can not be built; the message says at which step."""


def folder(name: str, words: str) -> Path:
    """Where an environment lives: $NSTEER_<NAME>, else ~/.cache/nsteer/<name>-<hash of the words>."""
    if named := os.environ.get(f"NSTEER_{name.upper()}"):
        return Path(named)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    words = f"{words}{sys.version_info[:2]}"
    return cache / "nsteer" / f"{name}-{hashlib.sha256(words.encode()).hexdigest()[:12]}"


def build(home: Path, steps: Callable[[Path], None]) -> Path:
    """An environment's folder; where it is not there yet, `steps` fill it, one process at a time. Raises Unbuilt."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "ready").exists():
            shutil.rmtree(home / "venv", ignore_errors=True)
            steps(home)
            (home / "ready").touch()
    return home


def python(home: Path) -> str:
    return str(home / "venv" / "bin" / "python")


def venv(where: Path) -> list[str]:
    """Makes a virtual environment; the words that install into it."""
    run([sys.executable, "-m", "venv", str(where)])
    return [str(where / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]


def run(command: list[str], **settings: object) -> None:
    """Raises Unbuilt where a command fails."""
    done = subprocess.run(command, capture_output=True, text=True, **settings)  # type: ignore[call-overload]
    if done.returncode:
        raise Unbuilt(f"{' '.join(command[:6])} … ended with {done.returncode}: {done.stderr[-400:]}")
