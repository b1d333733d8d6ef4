"""Writes the reference pages into `docs/` of the folder one stands in: `python -m nsteer.cli.reference`."""

from pathlib import Path

from nsteer.cli.reference import documents

if __name__ == "__main__":
    for name, text in documents().items():
        (Path("docs") / name).write_text(text, encoding="utf-8")
