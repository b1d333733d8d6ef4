"""The report page: its texts are the store's, nothing of them is markup, and its policy lets only its own code run."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import textstore
from click.testing import CliRunner

import nsteer
from nsteer import cli
from nsteer.report import overview, reporting, texts
from nsteer.report.page import packing, provenance

STRANGE = "</script><script>window.hacked=1</script><!-- <b>bold</b> & \u2028 \"'"
SCRIPTED = "<script>window.hacked=1</script>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A store whose texts, prompt labels, plan and programs are hostile, and its report."""
    path = tmp_path_factory.mktemp("page")
    textstore.make(
        path / "s.zarr",
        strange={0: STRANGE, 1: ""},
        prompt_label=SCRIPTED + "{}",
        plan=f"name: made-up\nabout: '{SCRIPTED}'\n# </script> <!--\n",
    )
    done = CliRunner().invoke(
        cli.main,
        ["report", str(path / "s.zarr"), "-o", str(path / "r.html"), "-o", str(path / "r.csv")],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A store of one model and two prompts."""
    return textstore.make(tmp_path_factory.mktemp("small") / "s.zarr", models=1, prompts=2).path


@pytest.fixture(scope="module")
def evidence(folder):
    return reporting.evidence(nsteer.open(folder / "s.zarr"))


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "r.html").read_text(encoding="utf-8")


class Elements(HTMLParser):
    """Tags with their attributes, and the text of scripts and styles, as a browser's parser cuts them."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.raw: list[tuple[dict, str]] = []
        self.inside: dict | None = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = {"tag": tag, **dict(attrs)} if tag in ("script", "style") else None

    def handle_data(self, data):
        if self.inside is not None:
            self.raw.append((self.inside, data))

    def handle_endtag(self, tag):
        self.inside = None


def unpacked(page: str) -> tuple[dict, dict[str, bytes]]:
    """The head and the chunks of a page, read back from its text."""
    raw = Elements(page).raw
    head = next(json.loads(text) for attrs, text in raw if attrs.get("id") == "head")
    packed = {
        a["id"].removeprefix("chunk-"): gzip.decompress(base64.b64decode(t))
        for a, t in raw
        if "chunk-" in a.get("id", "")
    }
    return head, packed


# ---- texts ----------------------------------------------------------------------------------------------------


def test_every_text_is_there_with_its_labels_and_its_twin(page, folder):
    head, packed = unpacked(page)
    assert head["rows"] == 2 * 3 * 2 * 2 * 4 == 96
    columns = np.frombuffer(packed["columns"], "<u4").reshape(-1, head["rows"])
    numbers = columns[len(head["codes"]) :].view("<f4")
    code = dict(zip(head["codes"], columns, strict=False))
    number = dict(zip(head["numbers"], numbers, strict=True))
    shown, unsteered = json.loads(packed["texts-0"]), json.loads(packed["unsteered-0"])
    opened = nsteer.open(folder / "s.zarr")
    generations, plain = opened["generations"].text.load(), opened["unsteered"].text.load()
    assert shown[0] == STRANGE and shown[4] == "", "an empty text is a text"
    for i in (0, 5, 50, 95):
        labels = {dim: generations[dim].values.tolist()[code[dim][i]] for dim in generations.dims}
        assert head["axes"]["strength"][code["strength"][i]] == f"{labels['strength']:g}"
        assert shown[i] == generations.sel(labels).values.item()
        other = plain.sel({dim: labels[dim] for dim in plain.dims}).values.item()
        assert unsteered[code["unsteered"][i]] == [other, head["classes"].index("neutral"), 0.7]
    strong = (code["strength"] == 1) & (code["control"] == 0)
    assert np.allclose(number["perplexity_ratio"][strong], 30) and np.allclose(number["perplexity_ratio"][~strong], 1)
    np.testing.assert_allclose(number["target"][strong], 0.7)
    np.testing.assert_allclose(number["before"], 0.1, rtol=1e-5)
    np.testing.assert_allclose(number["change"], np.where(strong, 0.6, 0.0), atol=1e-6)
    named = [head["classes"][k] for k in code["named"][strong]]
    assert named == [head["axes"]["emotion"][k] for k in code["emotion"][strong]]
    regimes = [head["regimes"][k] for k in code["regime"] if k != texts.NONE]
    assert regimes.count("repetitive") == 6 and regimes.count("explosive") == 18
    assert len(regimes) == 96 - list(shown).count(""), "a text that is empty is in none"


def test_holes_have_no_twin_no_judge_and_no_regime(tmp_path):
    textstore.make(tmp_path / "s.zarr", models=1, without=("unsteered", "judged", "outcomes"))
    evidence = reporting.evidence(nsteer.open(tmp_path / "s.zarr"))
    collection = texts.collect(evidence)
    assert (collection.codes["unsteered"] == texts.NONE).all() and (collection.codes["named"] == texts.NONE).all()
    assert collection.unsteered == [] and np.isnan(collection.numbers["perplexity_ratio"]).all()
    said = " / ".join(provenance.missing(evidence))
    assert "no group judged" in said and "only loops can be determined" in said and "no unsteered continuations" in said


def test_cells_that_are_not_done_are_no_rows(tmp_path):
    store = textstore.make(tmp_path / "s.zarr", models=1)
    cell = ("made/m0", "add", "all", "generation", "sad", 0.05, "none")
    store.drop("generations", cell)
    evidence = reporting.evidence(nsteer.open(tmp_path / "s.zarr"))
    collection = texts.collect(evidence)
    assert collection.rows == 48 - 4
    lost = (collection.codes["emotion"] == 1) & (collection.codes["strength"] == 0) & (collection.codes["control"] == 0)
    assert not lost.any()
    assert "generations: 1 of 12 cells" in " / ".join(provenance.missing(evidence))


def test_chunks_are_cut_and_joined_again():
    n = 1203
    collection = texts.Texts(
        {axis: ["a"] for axis in texts.FILTERS},
        {name: np.zeros(n, np.uint32) for name in packing.CODES},
        {name: np.zeros(n, np.float32) for name in texts.NUMBERS},
        [f"text {i}" for i in range(n)],
        [],
    )
    head, packed = packing.pack(collection)
    round_trip = [
        t for name, b in packed if name.startswith("texts-") for t in json.loads(gzip.decompress(base64.b64decode(b)))
    ]
    assert head["texts"] == 3 and head["unsteered"] == 0 and round_trip == collection.text


# ---- nothing is markup ----------------------------------------------------------------------------------------


def test_no_text_label_plan_or_source_is_markup(page):
    elements = Elements(page)
    scripts = [attrs for tag, attrs in elements.tags if tag == "script"]
    code = [attrs for attrs in scripts if "type" not in attrs]
    assert len(code) == 2, "its own two scripts"
    assert {attrs["type"] for attrs in scripts if "type" in attrs} == {"application/json", "text/plain"}
    assert SCRIPTED not in page and "&lt;script&gt;window.hacked" in page
    assert not [tag for tag, _ in elements.tags if tag == "b"]


def test_json_in_a_script_can_not_end_it():
    text = packing.embedded({"a": [STRANGE, "é"]})
    assert not set("<>&\u2028") & set(text) and json.loads(text) == {"a": [STRANGE, "é"]}
    with pytest.raises(ValueError):
        packing.embedded({"a": float("nan")})


def test_the_policy_names_these_scripts_and_nothing_else(page):
    elements = Elements(page)
    policy = next(
        a["content"] for t, a in elements.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    own = [text for attrs, text in elements.raw if attrs["tag"] == "style" or "type" not in attrs]
    assert len(own) == 3
    for text in own:
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy
    assert not [attrs for _, attrs in elements.tags if "style" in attrs or any(k.startswith("on") for k in attrs)]


def test_nothing_is_fetched(page):
    for tag, attrs in Elements(page).tags:
        for name in ("src", "href", "action", "xlink:href"):
            assert re.match(r"#|data:image/png|$", attrs.get(name) or ""), (tag, attrs)


# ---- structure ------------------------------------------------------------------------------------------------


def test_what_a_screen_reader_needs_is_there(page):
    tags = Elements(page).tags
    named = [tag for tag, _ in tags]
    assert {"header", "main", "nav", "footer"} <= set(named) and ("html", {"lang": "en"}) in tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    labelled = {attrs["for"] for tag, attrs in tags if tag == "label"}
    controls = {attrs["id"] for tag, attrs in tags if tag in ("select", "input")}
    assert controls == labelled
    assert all(attrs.get("scope") for tag, attrs in tags if tag == "th")
    assert all(attrs.get("role") == "img" and attrs.get("aria-labelledby") for tag, attrs in tags if tag == "svg")
    pointed = {i for _, a in tags for k in ("aria-labelledby", "aria-controls") for i in (a.get(k) or "").split()}
    assert pointed <= set(ids)
    assert any(attrs.get("aria-live") == "polite" for _, attrs in tags)
    assert named.count("figure") == named.count("figcaption") == named.count("svg") > 3
    assert named.count("h1") == 1


def test_claims_plan_and_provenance_are_on_the_page(page, folder):
    table = nsteer.open(folder / "s.zarr").claims
    assert page.count('<tbody data-at="') == table.sizes["row"]
    assert "# &lt;/script&gt; &lt;!--" in page, "the plan as it was written"
    assert "thresholds" in page and "3.11" in page and "status" not in re.findall(r"<h2[^>]*>(.*?)</h2>", page)


def test_the_same_store_gives_the_same_bytes(small, monkeypatch):
    from nsteer.report import claims, figures
    from nsteer.report import page as pages

    monkeypatch.setattr(figures, "pictures", lambda **named: [])  # theirs is tested with the figures
    documents = []
    for _ in range(2):
        evidence = reporting.evidence(nsteer.open(small))
        documents.append(pages.html(evidence, claims.table_of(evidence), overview.overview_of(evidence, "s.zarr")))
    assert documents[0] == documents[1]


def test_a_store_without_steering_has_a_page(tmp_path):
    from test_claims import derived

    from nsteer.store import Store

    derived(Store(tmp_path / "s.zarr"), "zoo/llama", np.random.default_rng(0))
    done = CliRunner().invoke(cli.main, ["report", "s.zarr", "-o", "r.html"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    html = (tmp_path / "r.html").read_text()
    assert "This store holds no steered text." in html and "curves-accuracy" in html


def test_edits_without_emotions_stand_beside_the_unedited(tmp_path):
    from nsteer.store import Group, Store, Variable

    string = lambda *dims: Variable(dims, "string", "t")  # noqa: E731
    store, dims = Store(tmp_path / "s.zarr"), ("model", "edit", "strength", "prompt", "seed")
    variables = {"text": string(*dims), "n_tokens": Variable(dims, "int32", "n")}
    variables["token_id"] = Variable((*dims, "token"), "int32", "ids")
    coords = {"model": ["m/a"], "edit": ["none", "ablate"], "strength": [0.0, 1.0], "prompt": ["p", "q"], "seed": [0]}
    store.prepare([Group("edited", {**coords, "token": range(12)}, variables, ("model", "edit", "strength"))])
    import xarray as xr

    for edit, strength, ids in (("none", 0.0, range(12)), ("ablate", 1.0, [7] * 12)):
        row = ("prompt", "seed")
        data = {"text": (row, [[f"{edit} p"], [f"{edit} q"]]), "n_tokens": (row, [[12], [12]])}
        data["token_id"] = ((*row, "token"), np.array([[list(ids)]] * 2))
        own = xr.Dataset(data, coords={"prompt": ["p", "q"], "seed": [0], "token": range(12)})
        store.commit("edited", ("m/a", edit, strength), own, fingerprint=1)
    collection = texts.collect(reporting.evidence(nsteer.open(tmp_path / "s.zarr")))
    assert collection.text == ["ablate p", "ablate q"]
    assert [collection.unsteered[k][0] for k in collection.codes["unsteered"]] == ["none p", "none q"]
    assert [collection.axes["op"][k] for k in collection.codes["op"]] == ["ablate", "ablate"]
    assert collection.codes["regime"].tolist() == [1, 1]


# ---- the command ----------------------------------------------------------------------------------------------


def test_both_files_are_written_and_csv_is_the_table(folder):
    import pandas as pd

    table = pd.read_csv(folder / "r.csv")
    assert table.verdict.tolist() == nsteer.open(folder / "s.zarr").claims.verdict.values.tolist()


def test_another_ending_is_refused_before_anything_is_computed(folder):
    done = CliRunner().invoke(cli.main, ["report", str(folder / "s.zarr"), "-o", "r.pdf"])
    assert done.exit_code == 2 and "ends in .html or .csv" in done.stderr


@pytest.mark.parametrize("name", ["r.html", "r.csv"])
def test_a_folder_that_is_not_there_is_said_before_anything_is_computed(folder, name, monkeypatch):
    monkeypatch.setattr("nsteer.report.reporting.report", None)
    done = CliRunner().invoke(cli.main, ["report", str(folder / "s.zarr"), "-o", str(folder / "none" / name)])
    assert done.exit_code == 1 and done.stderr.startswith("error: can not write"), done.output
    assert "no such folder" in done.stderr


@pytest.mark.parametrize("name", ["r.html", "r.csv"])
def test_a_file_that_can_not_be_written_is_one_clear_error(small, name, monkeypatch, tmp_path):
    monkeypatch.setattr("nsteer.report.figures.pictures", lambda **named: [])
    (tmp_path / name).mkdir()
    done = CliRunner().invoke(cli.main, ["report", str(small), "-o", str(tmp_path / name)])
    assert done.exit_code == 2 and "is a directory" in done.stderr
    (tmp_path / name).rmdir()
    (tmp_path / name).symlink_to(tmp_path / "none" / name)
    done = CliRunner().invoke(cli.main, ["report", str(small), "-o", str(tmp_path / name)])
    assert done.exit_code == 1 and done.stderr.startswith("error: can not write"), done.output
