"""`nsteer show STORE`: figures and texts of a store on a terminal, plain when piped, as JSON for scripts."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
import textstore
from click.testing import CliRunner
from rich.console import Console
from test_claims import derived

import nsteer
from nsteer import cli
from nsteer.errors import LabelError
from nsteer.report import claims, display, shown
from nsteer.store import Store

AXES = ("model", "op", "layer_set", "method", "emotion", "strength", "control", "prompt")
ESCAPE = "\x1b[31mred\x1b]0;title\x07 \u202eback"


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two made-up models that were steered, and one whose activations are there."""
    path = tmp_path_factory.mktemp("show") / "s.zarr"
    textstore.make(path, strange={0: ESCAPE})
    derived(Store(path), "zoo/llama", np.random.default_rng(0))
    return path


def run(*arguments):
    return CliRunner().invoke(cli.main, ["show", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def data(store):
    return json.loads(run(store, "--json", "--texts", "5").stdout)


# ---- data -----------------------------------------------------------------------------------------------------


def test_separation_is_that_of_the_samples(data, store):
    from nsteer.science import separation

    opened = nsteer.open(store)
    pooled = opened.sel("activations", model="zoo/llama").load()
    wanted = separation.measure(
        pooled, text=opened["samples", "zoo/llama"].text.load().sel({"model": "zoo/llama"}), shuffles=0
    )
    [generation, read] = data["separation"]
    assert (generation["model"], generation["method"], read["method"]) == ("zoo/llama", "generation", "comprehension")
    curves = wanted.sel({"method": "generation"})
    np.testing.assert_allclose(generation["mean_pairwise_cosine"], curves.mean_pairwise_cosine, atol=1e-5)
    np.testing.assert_allclose(generation["accuracy"], curves.accuracy, atol=1e-5)
    assert generation["best"]["mean_pairwise_cosine"]["layer"] == int(curves.mean_pairwise_cosine.argmin("layer"))
    assert generation["layers"] == list(range(8)) and generation["chance"] == pytest.approx(1 / 6, abs=1e-5)


def test_dose_counts_what_moved_and_the_regimes(data):
    rows = {(r["model"], r["emotion"], r["control"], r["strength"]): r for r in data["dose"]}
    assert len(rows) == len(data["dose"]) == 2 * 3 * 2 * 2
    strong, weak = (rows["made/m1", "sad", c, 0.2] for c in ("none", "random"))
    assert (strong["n"], strong["judged"], strong["moved"], strong["named"]) == (4, 4, 4, 4)
    assert (strong["repetitive"], strong["explosive"], strong["surgical"], strong["undetermined"]) == (1, 3, 0, 0)
    assert strong["perplexity_ratio"] == 30 and (weak["moved"], weak["named"], weak["surgical"]) == (0, 0, 4)


def test_texts_are_spread_and_stand_beside_the_unsteered_ones(data, store):
    opened = nsteer.open(store)
    assert len(data["texts"]) == 5 and all(text["control"] == "none" for text in data["texts"])
    assert {text["model"] for text in data["texts"]} == {"made/m0", "made/m1"}
    for text in data["texts"]:
        labels = {
            dim: text[dim] for dim in ("model", "op", "layer_set", "method", "emotion", "strength", "control", "prompt")
        }
        assert text["text"] == opened.sel("generations", "text", **labels, seed=0).values.item()
        plain = {dim: text[dim] for dim in ("model", "op", "prompt")}
        assert text["unsteered"] == opened.sel("unsteered", "text", **plain, seed=0).values.item()
        assert text["prompt_text"] == "once" and text["unsteered_named"] == "neutral"


def test_filters_hold_for_figures_and_texts(store):
    data = json.loads(run(store, "--json", "--model", "made/m1", "--emotion", "sad", "--strength", "0.2").stdout)
    assert data["separation"] == [] and {r["model"] for r in data["dose"]} == {"made/m1"}
    assert {(r["emotion"], r["strength"]) for r in [*data["dose"], *data["texts"]]} == {("sad", 0.2)}
    assert json.loads(run(store, "--json", "--texts", "0").stdout)["texts"] == []


@pytest.mark.parametrize(
    "option, label, hint",
    [("--model", "made/m2", "made/m1"), ("--emotion", "sat", "did you mean 'sad'"), ("--strength", "9", "0.05")],
)
def test_a_label_that_is_not_there_is_one_clear_error(store, option, label, hint):
    command = run(store, option, label)
    assert command.exit_code == 1 and command.stderr.startswith(f"error: {option[2:]} {label!r} is not there; ")
    assert hint in command.stderr and "Traceback" not in command.output


def test_options_of_the_other_kind_are_refused(store, tmp_path):
    (tmp_path / "plan.yaml").write_text("name: x\n")
    command = run("plan.yaml", "--texts", "3", "--model", "m")
    assert command.exit_code == 2 and "--texts, --model: for a store" in command.stderr
    command = run(store, "--set", "layers=1")
    assert command.exit_code == 2 and "--set changes a plan" in command.stderr


def test_a_folder_that_is_no_store_is_one_clear_error(tmp_path):
    (tmp_path / "folder").mkdir()
    command = run("folder")
    assert command.exit_code == 1 and command.stderr.startswith("error: ") and "folder" in command.stderr


def test_label_errors_are_raised_for_the_library_too(store):
    with pytest.raises(LabelError, match="did you mean 'sad'"):
        shown.view(nsteer.open(store), claims.Rules(), filters={"emotion": "sat"})


# ---- terminal -------------------------------------------------------------------------------------------------


def test_piped_it_is_plain_and_whole(store):
    text = run(store, "--texts", "3").stdout
    assert "\x1b" not in text and "\u202e" not in text and "\\x1b[31mred" in text and "\\u202eback" in text
    assert text.isascii(), "no box drawing, no block elements"
    assert "zoo/llama  generation" in text and "made/m1 / add / all / generation: moved to the target" in text
    assert re.search(r"sad +0/4 \[0/4\] +4/4 \[0/4\] 1r 3e", text)
    assert "[-" in text and "{+" in text


def test_on_a_terminal_it_has_colour_and_bars(data, monkeypatch):
    out = Console(width=100, force_terminal=True, color_system="truecolor", record=True, file=io.StringIO())
    monkeypatch.setattr(display, "console", lambda: out)
    display.print_view(data)
    text = out.export_text(styles=True)
    assert "\x1b[" in text and "▁" in text and "{+" not in text
    assert "\x1b[31mred" not in text, "a text's own escapes are shown, not obeyed"
    assert "\x1b[9;31m" in text and "\x1b[1;32m" in text, "gone struck out in red, come in bold green"


def test_a_store_with_nothing_to_show_says_so(tmp_path):
    from nsteer.store import Group, Variable

    Store(tmp_path / "e.zarr").prepare(
        [Group("x", {"model": ["m"]}, {"y": Variable(("model",), "float32", "y")}, ("model",))]
    )
    assert "no activations and no steered texts" in run("e.zarr").stdout


def test_the_programs_of_a_store(quickstart_like):
    command = run(quickstart_like, "--source")
    assert command.stdout == "# ---- program abc: steering ----\n\nwith model.trace():\n    pass  # ‖h‖\n"
    assert json.loads(run(quickstart_like, "--json").stdout)["programs"] == [{"program": "abc", "stage": "steering"}]


@pytest.fixture
def quickstart_like(tmp_path):
    import xarray as xr

    from nsteer.stages import arrays

    store = Store(tmp_path / "p.zarr")
    store.prepare([arrays.programs_group(["abc"])])
    source = "with model.trace():\n    pass  # ‖h‖"
    store.commit("programs", ("abc",), xr.Dataset({"source": ((), source), "stage": ((), "steering")}), fingerprint=0)
    return tmp_path / "p.zarr"


# ---- parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plain, text, diff",
    [
        ("a b c", "a x c", [(" ", "a"), ("-", " b"), ("+", " x"), (" ", " c")]),
        ("", "new text", [("+", "new text")]),
        ("gone", "", [("-", "gone")]),
        ("same it is", "same it is", [(" ", "same it is")]),
        ("a  b", "a\nb", [(" ", "a\nb")]),
        ("the the", "the the the", [(" ", "the the"), ("+", " the")]),
    ],
)
def test_word_diff(plain, text, diff):
    assert shown.word_diff(plain, text) == diff


def test_word_diff_rebuilds_both(data):
    for text in data["texts"]:
        parts = shown.word_diff(text["unsteered"], text["text"])
        assert "".join(words for kind, words in parts if kind != "-") == text["text"].rstrip()
        assert "".join(words for kind, words in parts if kind != "+").split() == text["unsteered"].split()


def test_sparkline():
    assert display.sparkline([0.0, None, 0.5, 1.0], ascii_only=False) == "▁ ▅█"
    assert (
        display.sparkline([2.0, 1.0], ascii_only=True) == "#_"
        and display.sparkline([1.0, 1.0], ascii_only=True) == "__"
    )
    assert display.sparkline([None], ascii_only=True) == ""
