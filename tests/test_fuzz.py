"""Whatever stands in a plan, reading and checking it ends in a study or in a PlanError, and touches nothing; every
program of a study compiles to Python in which none of the plan's own words stand."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
EXAMPLES = int(os.environ.get("NSTEER_FUZZ_PLANS", "500"))
"""Plans that are tried. 20,000 are for a release: docs/house.md."""

# ---- plans ------------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    "all auto none same each sets add clamp project_out happy sad calm neutral made read zoo/llama zoo/judge zoo zoo/x "
    "scenarios-8 story_templates {emotion} ../x.yaml /etc/passwd ~/x plan.yaml x.zarr . .. 0:2 0.25:0.75 -1 1e400 [/] "
    "generation comprehension last mean mean_from jeong-20 jeong2026-generation null true "
    "https://u:p@h $HOME `id`".split()
    + [
        "",
        "\x00",
        "a\x00b",
        "a\x00b.zarr",
        "~nobody-of-that-name/x",
        "x" * 300 + ".zarr",
        "x" * 5000,
        "\x1b[31m",
        "'); import os #",
        "{",
        "a b",
        "\u202e",
        "\ud7ff",
        "x" * 300,
        "\n",
        "{{7*7}}",
    ]
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 9)
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | WORDS
    | st.text(max_size=8)
)


def fields() -> list[str]:
    """Every name that the schema knows, and some that it does not."""
    from pydantic import BaseModel

    from nsteer.plan import schema as plan

    parts = [member for member in vars(plan).values() if isinstance(member, type) and issubclass(member, BaseModel)]
    return sorted(
        {info.alias or name for part in parts for name, info in part.model_fields.items()}
        | {"bogus", "a.b", "a b", "1"}
    )


KEYS = st.sampled_from(fields()) | WORDS
DATA = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)

WHERE = {"index": [0, -1], "from": 1, "to": -1, "generated": {"from": 1}, "except": {"text": "q", "ids": 3}}
GOOD = {
    "name": "study",
    "models": ["zoo/llama", {"id": "zoo/gpt2", "label": "two"}],
    "texts": "zoo",
    "emotions": ["happy", "sad"],
    "methods": {
        "made": {"source": "generation", "samples": 3, "pooling": "mean", "baseline": "grand_mean"},
        "read": {"source": "comprehension", "samples": 2, "project_out": {"variance": 0.5}},
    },
    "layers": "all",
    "steer": [{"name": "push", "strengths": [0.1, 0.2], "prompts": {"a": "one"}, "layers": {"each": [1, 2]}}],
    "judge": {"classifier": "zoo/judge", "map": {"happy": "joy"}},
    "measure": {"lens": 3},
    "prompts": ["p", "q"],
    "reads": {"mean": {"layers": [1], "pooling": "mean"}, "inner": {"site": "attn_out"}},
    "directions": {"noise": {"random": 1}, "d": {"contrast": {"positive": ["a"], "negative": ["b"]}}},
    "edits": {
        "push": [
            {"op": "add", "direction": "noise", "layers": [1], "strength": 2.0, "site": "mlp_out", "positions": WHERE}
        ]
    },
    "generate": {"max_new_tokens": 4},
    "store": "study.zarr",
    "batch": {"rows": 4},
    "seed": 3,
}


def places(data, path=()) -> list[tuple]:
    """Every node of a plan."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def put(data, path, value):
    if not path:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[path[0]] = put(copy[path[0]], path[1:], value)
    return copy


@st.composite
def spoilt(draw):
    """A good plan with a few nodes replaced, added or removed."""
    data = GOOD
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from([place for place in places(data) if place] or [()]))
        value = draw(DATA)
        if path and draw(st.booleans()) and isinstance(value, dict | list):
            value = draw(SCALARS)
        data = put(data, path, value)
        if isinstance(data, dict) and draw(st.booleans()):
            data = {**data, draw(KEYS): draw(DATA)}
    return json.dumps(data, allow_nan=True)


@st.composite
def scrambled(draw):
    """Text that begins as a plan: cut, doubled, with characters of YAML put in."""
    text = draw(spoilt() | st.sampled_from([(ROOT / "plans" / "quickstart.yaml").read_text()]))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        marks = [
            "*a",
            "&a ",
            "!!python/object:os.system ",
            "? ",
            "- ",
            "%YAML 9.9\n",
            "---\n",
            "\t",
            "{",
            "]",
            ": ",
            "<<: ",
        ]
        marks += [
            "!!binary x",
            "\ufeff",
            "\x07",
            "'",
            '"',
            "|",
            "#",
            "!!int ",
            "!!float x",
            "0o99",
            "1_0",
            "...\n",
            "!!set {a}",
        ]
        text = text[:at] + draw(st.sampled_from(marks) | st.text(max_size=3)) + text[at + draw(st.integers(0, 2)) :]
    return text


PLANS = spoilt() | scrambled() | st.text(max_size=60)
SETTINGS = st.lists(
    st.tuples(KEYS | st.text(max_size=6), WORDS | st.text(max_size=6)).map(lambda pair: f"{pair[0]}={pair[1]}"),
    max_size=2,
)


# ---- one example ------------------------------------------------------------------------------------------------


def study_of(text: str, overrides: list[str]):
    """Reads and checks a plan; its study, or None where it was refused. Anything but a PlanError gets out."""
    from nsteer.errors import PlanError
    from nsteer.plan import check, reader

    try:
        study = check.study(reader.override(reader.parse(text, "plan.yaml"), overrides))
    except PlanError as error:
        said = str(error)
        assert error.problems and said and "\x1b" not in said and "\x00" not in said
        return None
    return study


KNOWN = set(
    "mean add clamp last none project_out push read made same generation happy sad noise sets each auto true null name "
    "edits model layers generate scale norm".split()
)
"""Words of ours that plans use as labels, too."""


def compiled(study) -> int:
    """Compiles every program of a study; how many. None of the plan's own words may stand in them."""
    from nsteer.errors import ProgramError
    from nsteer.plan.prompts import prompt_set
    from nsteer.program import code
    from nsteer.program.anatomy import Anatomy, Sublayer
    from nsteer.stages import cells, forms, table
    from nsteer.stages.job import Job

    plan, count = study.plan, 0
    for facts in study.facts:
        cells.steering(Job(study, facts))
        sizes, inside = (facts.n_layers, facts.d_model, 64), (Sublayer("self_attn", True), Sublayer("mlp"))
        paths = ("model.layers", "lm_head", "model.embed_tokens")
        anatomy = Anatomy(*paths, *sizes, attention=inside[0], mlp=inside[1], proved=True)
        for _, form in table.forms_of(Job(study, facts), forms.Ends((2,), 0)):
            try:
                program = code.write(form, anatomy)
            except ProgramError:
                continue
            ast.parse(program)
            labels = {*plan.methods, *plan.reads, *plan.edits, *plan.directions, facts.label, plan.name, plan.store}
            labels |= set(prompt_set(plan.prompts, study.texts).values()) if plan.prompts else set()
            for label in labels - KNOWN:
                assert len(label) < 4 or label not in program, label
            count += 1
    return count


def in_a_process(examples: int) -> None:
    """Everything that a plan can do here, watched: no torch, no file written, no process, no connection."""
    refused = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "os.remove", "os.rename")
    here = os.getcwd()
    watching, good = [False], []

    def watch(event: str, given: tuple) -> None:
        if not watching[0]:
            return
        if event in refused:
            raise AssertionError(f"{event} {given}")
        writes = event == "open" and isinstance(given[2], int) and given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes and not str(given[0]).startswith((here, "/dev/null")):
            raise AssertionError(f"{given[0]} opened to be written")
        if event == "open" and str(given[0]) == "/etc/passwd":
            raise AssertionError("a file outside was opened")

    sys.addaudithook(watch)
    study_of(json.dumps(GOOD), [])  # what is imported late is imported now

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(PLANS, SETTINGS)
    def check_all(text, overrides):
        watching[0] = True
        try:
            if study := study_of(text, overrides):
                good.append(study)
        finally:
            watching[0] = False

    check_all()
    heavy = {"torch", "transformers", "nnsight", "xarray"} & set(sys.modules)
    assert not heavy, heavy
    compiled(study_of(json.dumps(GOOD), []))  # torch is imported: what programs are made of needs it
    watching[0] = True
    programs = sum(map(compiled, good))
    watching[0] = False
    few = min(len(good), programs) < examples // 300  # about 3 in 100 are, in clusters
    assert not few, f"{len(good)} of {examples} plans were good, with {programs} programs: the fuzz says little"
    assert os.listdir(here) == [], os.listdir(here)


@pytest.mark.timeout(7200)
def test_any_plan_is_compiled_or_a_plan_error(tmp_path):
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_fuzz; "
    script += f"test_fuzz.in_a_process({EXAMPLES})"
    (tmp_path / "here").mkdir()
    (tmp_path / "home").mkdir()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment["HYPOTHESIS_STORAGE_DIRECTORY"] = str(tmp_path / "home")
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path / "here", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
