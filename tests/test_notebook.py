"""The notebook runs from its first cell to its last, and shows tables and a bar, not reprs."""

from __future__ import annotations

import shutil

import nbformat
import pytest
from nbclient import NotebookClient
from planside import ROOT

EXAMPLES = ROOT / "docs/examples"


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """Every code cell as it ran: its source -> its outputs, as one text of their HTML, else their plain text."""
    folder = tmp_path_factory.mktemp("notebook")
    shutil.copy(EXAMPLES / "honesty.csv", folder)
    book = nbformat.read(EXAMPLES / "honesty.ipynb", as_version=4)
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in book.cells)  # it is kept bare
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return {cell.source: "\n".join(map(shown, cell.outputs)) for cell in book.cells if cell.cell_type == "code"}


def shown(output) -> str:
    data = output.get("data", {})
    return data.get("text/html") or data.get("text/plain") or output.get("text", "")


def of(cells: dict[str, str], words: str) -> str:
    """What the cell printed in whose source these words stand."""
    (text,) = [out for source, out in cells.items() if words in source]
    return text


def test_every_cell_shows_what_it_made(cells):
    assert "identity" in of(cells, "nsteer.contrast(") and "<" in of(cells, "nsteer.contrast(")
    assert "<progress max='1' value='1.000'>" in of(cells, "nsteer.sweep(")
    assert "<table>" in of(cells, "nsteer.sweep(") and "nsteer store" in of(cells, "nsteer.sweep(")
    assert "0.5" in of(cells, "pivot_table")
    assert "add in stream_norm at all positions of layers 2, 3" in of(cells, "nsteer.steer(")
    assert "nsteer study honesty" in of(cells, "nsteer.plan(")
    assert "already there" in of(cells, "nsteer.run(study)") and "<progress" in of(cells, "nsteer.run(study)")
    assert "Traceback" not in "".join(cells.values())
