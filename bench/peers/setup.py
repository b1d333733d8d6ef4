"""Builds a virtual environment for every peer: `python bench/peers/setup.py --into FOLDER [--peer repeng ...]`.

Versions are those of `requirements/`; torch is the build that pip finds (set pip's index for one with CUDA). One that
does not install leaves its reason in FOLDER/<peer>.failed.txt, and the table shows it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import click

REQUIREMENTS = Path(__file__).parent / "requirements"
KNOWN = sorted(file.stem for file in REQUIREMENTS.glob("*.txt"))


@click.command()
@click.option("--into", required=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--peer", "peers", multiple=True, type=click.Choice(KNOWN), help="Repeatable; all when left out.")
def main(into: Path, peers: tuple[str, ...]) -> None:
    into.mkdir(parents=True, exist_ok=True)
    broken = [name for name in peers or KNOWN if not built(into, name)]
    sys.exit(f"not installed: {', '.join(broken)}" if broken else 0)


def built(into: Path, name: str) -> bool:
    """Builds one environment again; whether it worked."""
    reason, venv = into / f"{name}.failed.txt", into / name
    reason.unlink(missing_ok=True)
    click.echo(f"{name} ...")
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(venv)],
        [str(venv / "bin" / "python"), "-m", "pip", "install", "-q", "-r", str(REQUIREMENTS / f"{name}.txt")],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            reason.write_text(" ".join(said or done.stderr.splitlines()[-1:]) + "\n")
            shutil.rmtree(venv, ignore_errors=True)
            click.echo(f"{name}: {reason.read_text()}")
            return False
    return True


if __name__ == "__main__":
    main()
