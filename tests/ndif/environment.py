#!/usr/bin/env python3
"""Turns requirements.txt into the environment of a real NDIF: a venv and a redis, cached by their hash.

    python tests/ndif/environment.py          builds it where it is absent, and prints its folder

The folder is $NSTEER_NDIF, else ~/.cache/nsteer/ndif-<hash>. Only the standard library is needed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))

import environments  # noqa: E402
from environments import Unbuilt, python, run  # noqa: E402

__all__ = ["Unbuilt", "build", "folder", "python", "redis"]

NDIF = "ndif==0.1.2"
DEBS = ("redis-server", "redis-tools", "libjemalloc2", "liblzf1")


def folder() -> Path:
    """Where the environment lives: another set of requirements, another folder."""
    return environments.folder("ndif", f"{(HERE / 'requirements.txt').read_text()}{NDIF}")


def build() -> Path:
    """The environment's folder, built if it is not there yet. Raises Unbuilt."""
    return environments.build(folder(), _steps)


def redis(home: Path) -> tuple[str, dict[str, str]]:
    """The redis server's binary, and what its environment needs."""
    if binary := shutil.which("redis-server"):
        return binary, {}
    library = next((home / "redis" / "usr" / "lib").glob("*-linux-gnu"))
    return str(home / "redis" / "usr" / "bin" / "redis-server"), {"LD_LIBRARY_PATH": str(library)}


def _steps(home: Path) -> None:
    pip = environments.venv(home / "venv")
    run([*pip, "-r", str(HERE / "requirements.txt")])
    # Its metadata asks for Python 3.12; nothing in it needs more than 3.11, which the client has.
    run([*pip, "--no-deps", "--ignore-requires-python", NDIF])
    _redis(home)


def _redis(home: Path) -> None:
    """Debian's redis, unpacked beside the venv: nothing is installed on the machine."""
    if shutil.which("redis-server"):
        return
    debs = home / "debs"
    debs.mkdir(exist_ok=True)
    if subprocess.run(["apt-get", "download", "-q", *DEBS], cwd=debs, capture_output=True).returncode:
        run(["apt-get", "update", "-q"])
        run(["apt-get", "download", "-q", *DEBS], cwd=debs)
    for deb in debs.glob("*.deb"):
        run(["dpkg", "-x", str(deb), str(home / "redis")])


if __name__ == "__main__":
    try:
        print(build())
    except (Unbuilt, OSError) as error:
        sys.exit(f"the NDIF environment can not be built: {error}")
