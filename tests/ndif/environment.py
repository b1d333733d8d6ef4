#!/usr/bin/env python3
"""Turns requirements.txt into the environment of a real NDIF: a venv and a redis, cached by their hash.

    python tests/ndif/environment.py          builds it where it is absent, and prints its folder

The folder is $NSTEER_NDIF, else ~/.cache/nsteer/ndif-<hash>. Only the standard library is needed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
NDIF = "ndif==0.1.2"
DEBS = ("redis-server", "redis-tools", "libjemalloc2", "liblzf1")


class Unbuilt(Exception):
    """The environment is absent and can not be built; the message says at which step."""


def folder() -> Path:
    """Where the environment lives: another set of requirements, another folder."""
    if named := os.environ.get("NSTEER_NDIF"):
        return Path(named)
    words = f"{(HERE / 'requirements.txt').read_text()}{NDIF}{sys.version_info[:2]}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "nsteer" / f"ndif-{hashlib.sha256(words.encode()).hexdigest()[:12]}"


def build() -> Path:
    """The environment's folder, built if it is not there yet. Raises Unbuilt."""
    home = folder()
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (home / "ready").exists():
            shutil.rmtree(home / "venv", ignore_errors=True)
            _venv(home / "venv")
            _redis(home)
            (home / "ready").touch()
    return home


def python(home: Path) -> str:
    return str(home / "venv" / "bin" / "python")


def redis(home: Path) -> tuple[str, dict[str, str]]:
    """The redis server's binary, and what its environment needs."""
    if found := shutil.which("redis-server"):
        return found, {}
    library = next((home / "redis" / "usr" / "lib").glob("*-linux-gnu"))
    return str(home / "redis" / "usr" / "bin" / "redis-server"), {"LD_LIBRARY_PATH": str(library)}


def _venv(where: Path) -> None:
    pip = [str(where / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    _run([sys.executable, "-m", "venv", str(where)])
    _run([*pip, "-r", str(HERE / "requirements.txt")])
    # Its metadata asks for Python 3.12; nothing in it needs more than 3.11, which the client has.
    _run([*pip, "--no-deps", "--ignore-requires-python", NDIF])


def _redis(home: Path) -> None:
    """Debian's redis, unpacked beside the venv: nothing is installed on the machine."""
    if shutil.which("redis-server"):
        return
    debs = home / "debs"
    debs.mkdir(exist_ok=True)
    if subprocess.run(["apt-get", "download", "-q", *DEBS], cwd=debs, capture_output=True).returncode:
        _run(["apt-get", "update", "-q"])
        _run(["apt-get", "download", "-q", *DEBS], cwd=debs)
    for deb in debs.glob("*.deb"):
        _run(["dpkg", "-x", str(deb), str(home / "redis")])


def _run(command: list[str], **settings: object) -> None:
    done = subprocess.run(command, capture_output=True, text=True, **settings)  # type: ignore[call-overload]
    if done.returncode:
        raise Unbuilt(f"{' '.join(command[:6])} … ended with {done.returncode}: {done.stderr[-400:]}")


if __name__ == "__main__":
    try:
        print(build())
    except (Unbuilt, OSError) as error:
        sys.exit(f"the NDIF environment can not be built: {error}")
