"""One way out for text: nothing of a label, a text, a server or another library steers a terminal or a spreadsheet."""

from __future__ import annotations

import ast
import csv
import errno
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import prefork
import pytest
import xarray as xr
from click.testing import CliRunner

import nsteer
from nsteer import cli
from nsteer.errors import Problem, printable
from nsteer.report import figures
from nsteer.report.terminal import Out, rich_text, table
from nsteer.runner.progress import Bars, Lines
from nsteer.system import files

PACKAGE = Path(nsteer.__file__).parent
ESCAPE, TURN = "\x1b]0;PWNED\x07\x1b[2J", "\u202e"
AWE, DREAD, FORMULA, LINK = f"a{ESCAPE}awe", f"d{TURN}dread", "=1+1|cmd", "[link=http://x]y[/link]"


def steers(text: str) -> list[str]:
    """What of a text a terminal would obey, or would turn round."""
    return [c for c in text if not c.isprintable() and c not in "\n\u200c\u200d"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, naïve, 恐れ, 🙂", "plain, naïve, 恐れ, 🙂"),
        ("a\u3000b\u00a0c", "a\u3000b\u00a0c"),  # spaces of a width
        ("\u0645\u06cc\u200c\u0634\u0648\u062f", "\u0645\u06cc\u200c\u0634\u0648\u062f"),  # a joiner between letters
        ("\x1b[2J\x07\x9b", "\\x1b[2J\\x07\\x9b"),
        ("\u202eevil\u2066\u200b\ufeff", "\\u202eevil\\u2066\\u200b\\ufeff"),
        ("\u2028\ud800\r\t", "\\u2028\\ud800\\r\\t"),
        ("two\nlines", "two\nlines"),
    ],
)
def test_what_does_not_print_is_spelled(text, shown):
    assert printable(text) == shown
    assert printable(text, lines=False) == shown.replace("\n", "\\n")


def test_no_console_reads_markup():
    stream = io.StringIO()
    out, grid = Out(file=stream, width=200, force_terminal=True, color_system=None), table("[red]head[/]")
    grid.add_row(f"[/bold]{LINK} :smile: {ESCAPE}")
    out.print(grid)
    out.print(f"{LINK} {ESCAPE}")
    out.print(rich_text(f"[/x] {ESCAPE}", "dim"))
    said = stream.getvalue()
    for whole in ("[red]head[/]", f"[/bold]{LINK} :smile: \\x1b]0;PWNED", f"{LINK} \\x1b]0", "[/x] \\x1b]0"):
        assert whole in said
    assert "\x07" not in said and "\x1b]" not in said and "\x1b[2J" not in said


def test_progress_shows_a_server_s_words_as_words():
    stream = io.StringIO()
    bars = Bars(stream)
    for progress in (bars, Lines(stream=stream)):
        progress.model(f"m{ESCAPE}", 1, 1)
        progress.stage("steering", 3, 0)
        progress.job("abcdefgh", "ERROR", f"[/bold] {ESCAPE} {LINK}")
        bars._rich.refresh()
        progress.note(f"[/b]{ESCAPE}\nerror: forged")
        progress.close()
    assert "[/bold]" in stream.getvalue() and not steers(stream.getvalue())
    assert "\nerror: forged" not in stream.getvalue()


def test_messages_are_one_line():
    assert "\n" not in str(Problem("a\nb", "x\ny", f"z{ESCAPE}")) and not steers(str(Problem(ESCAPE, TURN, "")))
    words = ["import", f"no\nerror: forged{ESCAPE}.pt", "--into", "s.zarr", "--model", "zoo/gpt2"]
    done = CliRunner().invoke(cli.main, words)
    assert done.exit_code == 1 and done.stderr.count("\n") == 1 and not steers(done.stderr)


OTHERS = """
import logging, warnings
from nsteer import cli
@cli.main.command("loud")
def loud():
    warnings.warn("warned \\x1b[2J")
    logging.getLogger("other").warning("logged %s", "\\x1b[2J")
    raise RuntimeError("raised \\x1b[2J")
cli.main(["loud"])
"""


def test_warnings_logs_and_tracebacks_of_others_are_text():
    done = subprocess.run([sys.executable, "-c", OTHERS], capture_output=True, text=True)
    for word in ("warned", "logged", "raised"):
        assert f"{word} \\x1b[2J" in done.stderr
    assert not steers(done.stderr)


# ---- a whole study of hostile labels ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A folder with a small study whose every label and text tries, and what its run printed."""
    folder = tmp_path_factory.mktemp("hostile")
    texts = {
        "name": f"t{ESCAPE}",
        "emotions": {AWE: "positive", DREAD: "negative"},
        "passages": {AWE: [f"She stood {ESCAPE} on the ridge."], DREAD: ["The telephone rang again."]},
        "neutral_passages": [f"The bus {ESCAPE} stops.", "Again it comes"],
        "prompts": {},
    }
    (folder / "texts.yaml").write_text(json.dumps(texts))
    plan = {
        "name": "esc",
        "about": f"=cmd|' /C calc'!A0 {ESCAPE}",
        "models": [{"id": "zoo/llama", "label": "mx"}],
        "texts": "texts.yaml",
        "emotions": [AWE, DREAD],
        "methods": {"rm": {"source": "comprehension", "samples": 1, "system_prompt": None}},
        "steer": {
            "strengths": [0.1, 1.0e-30],
            "prompts": {f"{FORMULA}{ESCAPE}": f"tom {ESCAPE} walked", LINK: "tom went"},
            "generate": {"max_new_tokens": 4},
        },
        "store": f"st{TURN}esc.zarr",
    }
    (folder / "esc.yaml").write_text(json.dumps(plan))
    before = os.getcwd()
    os.chdir(folder)
    done = CliRunner().invoke(cli.main, ["run", "esc.yaml"], catch_exceptions=False)
    os.chdir(before)
    return folder, plan["store"], done


def test_no_command_prints_what_steers(hostile, monkeypatch):
    folder, store, ran = hostile
    monkeypatch.chdir(folder)
    assert ran.exit_code == 1 and "failed: steering" in ran.stdout  # at 1e-30
    assert not steers(ran.output) and "\\x1b]0;PWNED" in ran.output
    rows = [["check", "esc.yaml"], ["show", "esc.yaml", "--source"], ["ls", store], ["show", store], ["verify", store]]
    rows += [["show", store, "--source"], ["diff", store, store], ["gc", store, "esc.yaml"]]
    rows += [["report", store, "-o", "r.html", "-o", "c.csv"], [*rows[3], "--json"]]
    for words in rows:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a font that lacks a control character
            done = CliRunner().invoke(cli.main, words, catch_exceptions=False)
        assert done.exit_code == 0 and not steers(done.output), words
    for name in ("r.html", "c.csv"):
        assert not steers(Path(name).read_text(encoding="utf-8")), name


def test_no_cell_of_a_table_is_a_formula(tmp_path):  # whoever asks for it stands in it
    import pandas as pd

    from nsteer.cli import stores

    attacks = ["=1+1", "+1+cmd|' /C calc'!A0", "-1 +cmd|'/C'!A0", "@SUM(A1)", "\t=1", " =1", "＝1", f"={ESCAPE}"]
    plain = ["-0.52", "+3", "1.2e-3", "-12%", "a=b", "", "0.20 (layer 1 of 5)"]
    stores._csv(pd.DataFrame({"text": attacks + plain, "number": np.arange(15) - 7.5}), "t.csv")
    with open("t.csv", newline="") as file:
        kept = list(csv.DictReader(file))
    assert all(row["text"].startswith("'") or row["text"].startswith("\\t") for row in kept[: len(attacks)])
    assert [row["text"] for row in kept[len(attacks) :]] == plain
    assert [float(row["number"]) for row in kept] == (np.arange(15) - 7.5).tolist()


def test_figures_bear_every_label():
    names = [f"a{ESCAPE}", "$\\frac{$", f"{TURN}<b>"]
    rng = np.random.default_rng(0)
    vectors = xr.DataArray(
        rng.normal(size=(3, 2, 8)),
        dims=("emotion", "layer", "d_model"),
        coords={"method": f"m{ESCAPE}$", "emotion": names, "layer": [2, 5]},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shown = figures.svg(figures.similarity(vectors.sel({"layer": 5})), ESCAPE, TURN, "f")
    assert not steers(shown) and "a\\x1b]0;PWNED" in shown and "$\\frac{$" in shown


# ---- what is written is whole, or not there ----------------------------------------------------------------------


def test_a_file_that_can_not_be_written_leaves_the_old_one(hostile, monkeypatch, tmp_path):
    folder, store, _ = hostile
    for name in ("r.html", "c.csv"):
        (tmp_path / name).write_text("old")
    limited = (
        "import resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from nsteer import cli\nfrom nsteer.report import page\n"
        "from nsteer.report import reporting\n"
        "reporting.keep = lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900))\n"
        "cli.main(sys.argv[1:])\n"
    )
    for name in ("r.html", "c.csv"):
        words = ["report", str(folder / store), "--claims", "-o", str(tmp_path / name)]
        done = subprocess.run(prefork.python(limited, *words), capture_output=True, text=True)
        assert done.returncode == 1 and f"{name}: File too large" in done.stderr and "Traceback" not in done.stderr
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"r.html": "old", "c.csv": "old"}


def test_a_file_is_replaced_whole_through_links_and_keeps_its_permissions(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(RuntimeError), files.aside(tmp_path / "link") as part:
        part.write_text("half")
        raise RuntimeError
    assert (tmp_path / "real").read_text() == "old"
    with files.aside(tmp_path / "link") as part:
        part.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    assert {file.name for file in tmp_path.iterdir()} == {"real", "link"}


def test_a_store_that_can_not_be_written_is_reported(hostile, monkeypatch):
    from nsteer.store import Store

    def refuse(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    folder, store, _ = hostile
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Store, "prepare", refuse)
    done = CliRunner().invoke(cli.main, ["report", store, "--claims"], catch_exceptions=False)
    assert done.exit_code == 0 and "claim" in done.stdout
    assert done.stderr == "note: the table is not kept in the store: Read-only file system\n"


# ---- the house ---------------------------------------------------------------------------------------------------

DOORS = {
    "click.echo": {"cli/base.py"},
    "Console": set(),
    "Out": {"report/terminal.py", "runner/progress.py"},
    "Text": {"report/terminal.py"},
    "TextColumn": set(),
    "Text.from_markup": set(),
    "sys.stdout.write": set(),
    "sys.stderr.write": set(),
}
"""Call that brings text to a terminal -> the modules that may make it."""

PRINTING = {"runner/progress.py", "cluster/showing.py"}
"""Modules that print to a stream: what they print goes through `printable`."""


def test_no_text_leaves_but_through_the_doors():
    for file in PACKAGE.rglob("*.py"):
        place = file.relative_to(PACKAGE).as_posix()
        if place.startswith("report/figures/"):
            continue  # matplotlib's Text
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            assert place in DOORS.get(name, {place}), f"{place}:{node.lineno}: {name}(...)"
            if name == "print":
                assert place in PRINTING, f"{place}:{node.lineno}"
            if name == "click.echo" or (name == "print" and place in PRINTING):
                assert ast.unparse(node.args[0]).startswith("printable("), f"{place}:{node.lineno}"
