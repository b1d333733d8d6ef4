"""Texts from files and datasets: every kind of file, every place of a plan, and what they lack, where it stands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from planside import problems, study

import nsteer
from nsteer.plan.prompts import prompt_set
from nsteer.plan.schema.datasets import RESERVED
from nsteer.stages import arrays, cells
from nsteer.stages.job import jobs

HEAD = "name: s\nmodels: [zoo/llama]\nstore: s.zarr\n"
ROWS = [
    {"q": "tom walked", "yes": "he told the truth .", "no": "he told a lie, all of it .", "good": "1", "topic": "home"},
    {"q": 'anna "sat"', "yes": "she said so .", "no": "she hid it .", "good": "0", "topic": "work"},
    {"q": "paul\nran", "yes": "it was me .", "no": "it was not me .", "good": "1", "topic": "home"},
]


def separated(rows, separator=","):
    quoted = ['"{}"'.format(v.replace('"', '""')) for row in rows for v in row.values()]
    width = len(rows[0])
    lines = [separator.join(quoted[i : i + width]) for i in range(0, len(quoted), width)]
    return "\n".join([separator.join(rows[0]), *lines]) + "\n"


def written(folder: Path, name: str, rows=ROWS) -> Path:
    file = folder / name
    if name.endswith(".parquet"):
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.Table.from_pylist(rows), file)
    elif name.endswith(".jsonl"):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        file.write_text(separated(rows, "\t" if name.endswith(".tsv") else ","))
    return file


def texts_of(plan) -> dict:
    return prompt_set(plan.prompts, None)


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.parquet"])
def test_every_kind_of_file_gives_the_same_texts(tmp_path, name):
    written(tmp_path, name)
    plan_study = study(f"{HEAD}prompts: {{file: {name}, text: q, columns: [topic]}}\nreads: {{r: {{pooling: last}}}}\n")
    assert texts_of(plan_study.plan) == {"1": "tom walked", "2": 'anna "sat"', "3": "paul\nran"}
    assert plan_study.beside == {"topic": {"1": "home", "2": "work", "3": "home"}}


def test_a_text_a_line(tmp_path):
    Path("a.txt").write_text("tom walked\r\n\n  anna sat\n")
    plan_study = study(HEAD + "prompts: a.txt\nreads: {r: {pooling: last}}\n")
    assert texts_of(plan_study.plan) == {"1": "tom walked", "2": "  anna sat"}


def test_rows_are_chosen_and_named(tmp_path):
    written(tmp_path, "a.csv")
    source = "{file: a.csv, text: 'say: {q} ({topic})', id: good, where: {topic: [work, home]}, limit: 2}"
    plan_study = study(f"{HEAD}prompts: {source}\nreads: {{r: {{pooling: last}}}}\n")
    assert texts_of(plan_study.plan) == {"1": "say: tom walked (home)", "0": 'say: anna "sat" (work)'}


CONTRASTS = {
    "{file: a.csv, positive: yes, negative: 'no'}": ([0, 1, 2], "yes", [0, 1, 2], "no"),
    "{file: a.csv, text: q, label: good, positive: 1, negative: 0}": ([0, 2], "q", [1], "q"),
    "{positive: {file: a.csv, text: q, where: {good: 1}}, negative: {file: a.csv, text: 'no', where: {topic: work}}}": (
        *([0, 2], "q"),
        *([1], "no"),
    ),
}


@pytest.mark.parametrize("spec", CONTRASTS)
def test_a_contrast_of_columns_of_labels_and_of_files(tmp_path, spec):
    written(tmp_path, "a.csv")
    first, this, second, that = CONTRASTS[spec]
    given = study(f"{HEAD}directions: {{d: {{contrast: {spec}}}}}\n")
    sides = {
        "positive": [ROWS[i][this] for i in first],
        "negative": [ROWS[i][that] for i in second],
    }
    inline = study(f"{HEAD}directions: {{d: {{contrast: {json.dumps(sides)}}}}}\n")
    assert given.plan == inline.plan
    (file_job,), (inline_job,) = jobs(given), jobs(inline)
    assert cells.directions(file_job) == cells.directions(inline_job)  # a text is what it says, wherever it stands
    told = json.loads(json.dumps(given.as_json(given.plan)))["directions"]["d"]["contrast"]
    assert "he told the truth ." not in json.dumps(told) and "a.csv" in json.dumps(told)


def test_booleans_of_json_and_of_csv_are_the_true_of_a_plan(tmp_path):
    Path("a.jsonl").write_text('{"text": "one", "ok": true}\n{"text": "two", "ok": false}\n')
    Path("a.csv").write_text("text,ok\none,True\ntwo,False\n")
    for file in ("a.jsonl", "a.csv"):
        spec = f"{{file: {file}, label: ok, positive: true, negative: false}}"
        contrast = study(f"{HEAD}directions: {{d: {{contrast: {spec}}}}}\n").plan.directions["d"].contrast
        assert (contrast.positive, contrast.negative) == (["one"], ["two"])


def test_labelled_texts_are_a_text_set_whose_labels_are_the_emotions(tmp_path):
    rows = [{"text": f"a {label} text {i}", "mood": label, "by": f"w{i}"} for label in ("sad", "très gai", "neutral")
            for i in range(2)]  # fmt: skip
    written(tmp_path, "a.csv", rows)
    texts = "texts: {file: a.csv, label: mood, columns: [by]}\n"
    plan_study = study(f"{HEAD}{texts}methods: {{m: {{source: comprehension, samples: 2}}}}\n")
    assert plan_study.plan.emotions == ["sad", "très gai"]
    assert plan_study.texts.passages["très gai"] == ["a très gai text 0", "a très gai text 1"]
    assert plan_study.texts.neutral_passages == ["a neutral text 0", "a neutral text 1"]
    group = next(array_group for array_group in arrays.groups(plan_study) if array_group.path.startswith("samples/"))
    assert group.auxiliary["by"][1] == [["w0", "w1"]] * 3


def test_the_emotions_of_another_text_set_are_the_default(tmp_path):
    assert study(HEAD + "texts: zoo\nmethods: {m: {source: comprehension, samples: 2}}\n").plan.emotions[0] == "happy"


BAD_CSV = b'q,yes,no\na,b\n"c, d",,e\nf,\xff\xfe,g\nh,i,"j\nk"\nl,   ,m\n'
BAD_JSON = b'{"a": "x"}\n{"a": "x", "b": 2\n[1]\n{"b": 3}\n{"a": 5, "b": "z"}\n'


def said(plan: str) -> list[str]:
    return list(map(str, problems(HEAD + plan)))


def test_what_a_file_lacks_is_said_where_it_stands_all_at_once(tmp_path):
    Path("bad.csv").write_bytes(BAD_CSV)
    Path("bad.jsonl").write_bytes(BAD_JSON)
    messages = said(
        "prompts: {file: bad.jsonl, text: a}\nreads: {r: {pooling: last}}\n"
        "directions: {d: {contrast: {file: bad.csv, positive: yes, negative: 'no'}}}\n"
    )
    places = [line.partition(": ")[0] for line in messages]
    assert places == [
        "bad.csv:2:1",
        "bad.csv:3:1",
        "bad.csv:4:1",
        "bad.csv:7:1",
        *(f"bad.jsonl:{n}:1" for n in (2, 3, 4, 5)),
    ]
    words = ["2 fields", "yes: expected text, found an empty text", "byte 3 of the line, 0xff", "yes: expected text"]
    words += ["found expecting ',' delimiter", "found [1]", "a: expected a field 'a'", "a: expected text, found 5"]
    assert all(word in line for word, line in zip(words, messages, strict=True)), messages


WRONG = {
    "prompts: {file: a.csv, text: qq}": "a.csv:1:1: expected a column 'qq', found the columns 'q', 'yes', 'no', "
    "'good', 'topic' (did you mean 'q'?)",
    "prompts: {file: a.csv, text: q, where: {topic: hom}}": ":4:10: prompts: expected rows, found no row of a.csv that "
    "`where` lets through (topic: home, work)",
    "prompts: {file: a.csv, text: q, id: topic}": ":4:37: prompts.id: expected a name of its own for each row, found "
    "'home' 2 times in a.csv",
    "prompts: {file: nowhere.csv}": ":4:17: prompts.file: expected a file, from the plan's folder or where you stand, "
    "found 'nowhere.csv', which does not exist",
    "prompts: {file: a.csv, hub: a/b}": ":4:10: prompts: expected exactly one of `file` and `hub`, found both",
    "prompts: {file: a.csv, text: q, split: x}": ":4:40: prompts.split: expected it with `hub` only, found x",
    "prompts: {file: a.csv, text: q, columns: {layer: topic}}": ":4:42: prompts.columns: expected names of letters, "
    "digits and '_', found 'layer', which the store uses itself (columns: {name: column})",
    "texts: {file: a.csv, text: q}\nmethods: {m: {source: comprehension}}": ":4:8: texts: expected the column that "
    "says what each text shows, found no `label`",
    "directions: {d: {contrast: {file: a.csv, text: q, label: topic, positive: home, negative: 'no'}}}": "a.csv:3:1"
    ": topic: expected 'home' or 'no', found 'work' (where: {topic: [home, no]} leaves other rows out)",
    "directions: {d: {contrast: {positive: yes, negative: [a]}}}": ":4:39: directions.d.contrast.positive: expected a "
    "list of texts, or a file of them, found 'yes' (`file` says whose column it is)",
    "directions: {d: {contrast: {label: a, positive: [a], negative: [b]}}}": ":4:36: directions.d.contrast.label: "
    "expected `file` or `hub` beside it, found it without rows (label is of rows)",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_plan_asks_wrongly_of_a_file_is_said_in_a_line(tmp_path, wrong):
    written(tmp_path, "a.csv")
    messages = said(wrong + ("\nreads: {r: {pooling: last}}\n" if wrong.startswith("prompts") else "\n"))
    assert any(WRONG[wrong] in line for line in messages), messages


def test_a_separator_that_is_no_comma(tmp_path):
    Path("a.csv").write_text("q;yes\none;two\n")
    plan = "prompts: {file: a.csv, text: q}\nreads: {r: {pooling: last}}\n"
    assert "(separator: ';')" in said(plan)[0]
    plan_study = study(HEAD + plan.replace("text: q", "text: q, separator: ';'"))
    assert texts_of(plan_study.plan) == {"1": "one"}


def test_a_file_outside_is_refused_and_a_pipe_never_waited_for(tmp_path):
    import os

    os.mkdir("inner")
    os.chdir("inner")
    written(tmp_path, "out.csv")
    os.mkfifo("pipe.csv")
    for file, words in (("../out.csv", "outside"), ("pipe.csv", "does not exist")):
        plan = f"prompts: {{file: {file}, text: q}}\nreads: {{r: {{pooling: last}}}}\n"
        assert words in said(plan)[0]


def test_of_many_faults_twenty_are_said_and_the_number_of_the_rest(tmp_path):
    Path("a.csv").write_text("text,b\n" + ",x\n" * 500)
    messages = said("prompts: a.csv\nreads: {r: {pooling: last}}\n")
    assert len(messages) == 21 and "480 more of the same kind (empty)" in " ".join(messages)


def test_utf16_and_a_stray_quote(tmp_path):
    Path("a.csv").write_text("text,b\none,two\n", encoding="utf-16")
    Path("b.csv").write_text('text,b\n"one"x,two\n')
    Path("c.csv").write_bytes(b"\xef\xbb\xbftext,b\r\none,two\r\n")
    reads = "\nreads: {r: {pooling: last}}\n"
    assert "UTF-16" in said(f"prompts: a.csv{reads}")[0]
    assert said(f"prompts: b.csv{reads}")[0].startswith("b.csv:2:1")
    assert texts_of(study(f"{HEAD}prompts: c.csv{reads}").plan) == {"1": "one"}


@pytest.fixture
def saved(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": dataset, "test": dataset.select([1])}).save_to_disk(tmp_path / "kept")
    return tmp_path / "kept"


def test_a_dataset_in_a_folder(saved):
    reads = "\nreads: {r: {pooling: last}}\n"
    assert texts_of(study(f"{HEAD}prompts: {{hub: kept, text: q}}{reads}").plan)["1"] == "tom walked"
    assert len(texts_of(study(f"{HEAD}prompts: {{hub: kept, text: q, split: test}}{reads}").plan)) == 1
    assert "no split 'dev'; it has train, test" in said(f"prompts: {{hub: kept, text: q, split: dev}}{reads}")[0]
    assert "no_such" in said(f"prompts: {{hub: me/no_such, text: q}}{reads}")[0]


HUB = """
import json, sys
from planside import study
for revision in sys.argv[1:]:
    found = study("name: s\\nmodels: [zoo/llama]\\nstore: s.zarr\\nreads: {r: {pooling: last}}\\n"
                  "prompts: {hub: Me/rows, text: q, revision: " + revision + "}\\n")
    print(json.dumps(found.plan.prompts))
assert "torch" not in sys.modules
"""


@pytest.mark.slow
def test_a_dataset_of_the_hub_by_revision_and_again_without_a_network(tmp_path):
    """The hub serves two branches on loopback; once fetched, a dataset is there when the hub is gone."""
    import os
    import socket
    import time

    pytest.importorskip("datasets")
    here = Path(__file__).parent
    for branch, rows in (("main", ROWS), ("old", ROWS[:1])):
        (tmp_path / branch).mkdir()
        written(tmp_path / branch, "train.csv", rows)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(here / "ndif" / "hub.py"), str(port)]
    server = subprocess.Popen([*command, f"me/rows={tmp_path / 'main'}", f"me/rows@old={tmp_path / 'old'}"],
                              stdout=subprocess.DEVNULL)  # fmt: skip
    settings = {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}

    def prompts(*revisions):
        done = subprocess.run([sys.executable, "-c", HUB, *revisions], cwd=here, text=True, capture_output=True,
                              env={**os.environ, **settings})  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [list(json.loads(line).values()) for line in done.stdout.splitlines()[-len(revisions) :]]

    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        assert prompts("main", "old") == [[row["q"] for row in ROWS], [ROWS[0]["q"]]]
    finally:
        server.terminate()
        server.wait()
    assert prompts("old") == [[ROWS[0]["q"]]]


def test_fifty_thousand_rows_are_checked_without_pandas_or_torch(tmp_path):
    with Path("big.csv").open("w") as file:
        file.write("text,kind\n")
        file.writelines(f"text number {i} of many,k{i % 3}\n" for i in range(50_000))
    code = (
        "import sys\nfrom planside import study\n"
        f"found = study({HEAD!r} + 'prompts: {{file: big.csv, columns: [kind]}}\\n'"
        " 'reads: {r: {pooling: last}}\\n')\n"
        "assert len(found.plan.prompts) == 50_000\nassert not {'torch', 'pandas', 'pyarrow'} & set(sys.modules)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, env=env)
    assert done.returncode == 0, done.stderr


PLAN = """
name: s
models: [zoo/llama]
store: s.zarr
threads: 1
prompts: {file: a.csv, text: q, id: q, columns: {about: topic}}
reads: {end: {pooling: last, layers: [4, 2]}, whole: {layers: [2]}}
generate: {max_new_tokens: 2}
"""


def test_columns_and_texts_stand_beside_the_results_by_label(tmp_path):
    import xarray as xr

    written(tmp_path, "a.csv", [row for row in ROWS if "\n" not in row["q"]])
    Path("plan.yaml").write_text(PLAN.replace("id: q, ", ""))
    assert not nsteer.run(nsteer.load("plan.yaml")).failures
    for group in ("reads/zoo--llama", "streams/zoo--llama", "edited"):
        data = xr.open_zarr(f"s.zarr/{group}", chunks=None)
        assert data.about.sel(prompt="2").item() == "work"
        assert data.prompt_text.sel(prompt="1").item() == "tom walked"
        assert set(map(str, data.variables)) - {"about"} <= RESERVED, sorted(map(str, data.variables))
