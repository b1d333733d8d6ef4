"""docs/house.md says where a new thing goes: one of each is built by its recipe and by nothing else, and is run.

Each recipe is a list of changes to the package's text, made in a copy of it. A change in a file that the row of the
page does not name fails, and so does a run that needs one more.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nsteer

PACKAGE = Path(nsteer.__file__).parent
PAGE = PACKAGE.parent / "docs" / "house.md"
FILES = {str(file.relative_to(PACKAGE)): file for file in PACKAGE.rglob("*.py")}

NEW = ""
"""In place of a pattern: the file is a new one."""

RECIPES: dict[str, list[tuple[str, str, str]]] = {
    # kind -> (file, pattern that stands there once, what it becomes; \\g<0> is what stood there)
    "op": [
        (
            "program/ops.py",
            r"OPS: dict.*",
            'def subtract(stream, vector, amount):\n    """The opposite of add."""\n'
            "    return (-amount[:, None] * vector)[:, None, :].expand_as(stream)\n\n\n"
            '\\g<0>\n    "subtract": subtract,',
        ),
        ("plan/schema/values.py", r"Op = Literal\[", r'\g<0>"subtract", '),
    ],
    "grid axis of steering": [
        ("stages/keys.py", r"(?s)class Condition\(.*?    control: str\n", "\\g<0>    gain: float\n"),
        ("stages/keys.py", r"(?s)class Judged\(.*?    control: str\n", "\\g<0>    gain: float\n"),
        ("runner/tuning.py", r"strength, control\)", "strength, control, 1.0)"),
        ("plan/schema/steering.py", r"    seeds: .*\n", r"\g<0>    gains: list[float] = [1.0]" + "\n"),
        (
            "stages/cells.py",
            r"            for control in controls\(entry\):\n                key = Condition\((.*)\)\n",
            "            for control, gain in ((c, g) for c in controls(entry) for g in entry.gains):\n"
            "                key = Condition(\\1, gain)\n",
        ),
        (
            "stages/cells.py",
            r'own = \{"vector": vector, "strength": strength\}',
            'own = {"vector": vector, "strength": strength, "gain": gain}',
        ),
        (
            "stages/arrays/steering.py",
            r'        "control": union\(.*\n',
            r'\g<0>        "gain": union([entry.gains for entry in plan.steer]),' + "\n",
        ),
        ("runner/editing.py", r"self\.strengths\.get\(key, key\.strength\)", r"key.gain * \g<0>"),
    ],
    "source of vectors": [
        ("plan/schema/__init__.py", r"    random: int \| None = .*\n", r"    level: float | None = None" + r"\n\g<0>"),
        ("plan/schema/__init__.py", r"DIRECTION_SOURCES = \(", r'\g<0>"level", '),
        (
            "runner/directing.py",
            r"    if spec\.random is not None:\n",
            "    if spec.level is not None:\n        vector = np.full((facts.n_layers, facts.d_model), spec.level)\n"
            "    elif spec.random is not None:\n",
        ),
    ],
    "stage": [
        (
            "stages/cells.py",
            r"def lens\(job",
            "def lengths(job: Job) -> Cells[Vector]:\n"
            '    """The fingerprints of the lengths of every vector."""\n'
            '    return {key: fingerprint({"length of": fp}) for key, fp in job.wanted(vectors).items()}\n\n\n\\g<0>',
        ),
        (
            "stages/table.py",
            r'    Stage\("calibration", ',
            '    Stage("lengths", cells.lengths, needs_model=False),\n\\g<0>',
        ),
        (
            "runner/lengths.py",
            NEW,
            '"""Stage `lengths`: the length of every vector."""\n'
            "import numpy as np\n\nfrom nsteer.stages import arrays, cells\n\n\n"
            "def lengths(model):\n"
            '    path, todo, wanted = model.path("lengths"), model.missing("lengths"), model.wanted(cells.vectors)\n'
            '    for wave in model.run.waves("lengths", path, todo):\n'
            "        for key in wave:\n"
            '            vector = model.kept_input(model.path("vectors"), key, wanted[key]).vector\n'
            '            values = {"length": (("layer",), np.linalg.norm(vector.values, axis=-1).astype(np.float32))}\n'
            "            data = arrays.dataset({'layer': vector.layer.values.tolist()}, values)\n"
            "            model.run.commit(path, key, data, todo[key], 0.0)\n"
            '            model.run.finished("lengths", key)\n',
        ),
        (
            "runner/stages.py",
            r'    "calibration": calibrate,\n',
            r'    "lengths": lengths,' + r"\n\g<0>",
        ),
        (
            "runner/stages.py",
            r"from nsteer\.runner\.judging import judge\n",
            r"\g<0>from nsteer.runner.lengths import lengths" + "\n",
        ),
    ],
    "group of the store": [
        ("stages/products.py", r'    "lens": _OF_MODEL,\n', r'\g<0>    "lengths": _OF_MODEL,' + "\n"),
        (
            "stages/arrays/__init__.py",
            r"            store_groups\.append\(vectors_group\(study, facts\)\)\n",
            r"\g<0>            store_groups.append(lengths_group(study, facts))" + "\n",
        ),
        (
            "stages/arrays/__init__.py",
            r"def vectors_group\(",
            "def lengths_group(study, facts):\n"
            "    layers, depth = depths(facts)\n"
            '    axes = {"model": [facts.label], **vector_axes(study.plan), "layer": layers}\n'
            '    own = {"length": number((*VECTOR, "layer"), "length of the vector")}\n'
            '    path = f"lengths/{slug(facts.label)}"\n'
            '    return Group(path, axes, own, VECTOR, {}, depth, attributes("lengths"))\n\n\n\\g<0>',
        ),
    ],
    "executor": [
        (
            "executors/second.py",
            NEW,
            '"""Programs run in this process, a second time round."""\n'
            "from nsteer.executors.local import Local\n\n\n"
            "class Second(Local):\n"
            '    """As Local, under a name of its own."""\n\n'
            "    def describe(self):\n"
            '        return {**super().describe(), "executor": "second"}\n',
        ),
        ("executors/__init__.py", r"EXECUTORS = \{\n", r'\g<0>    "second": "nsteer.executors.second:Second",' + "\n"),
        ("plan/schema/__init__.py", r"executor: Literal\[", r'\g<0>"second", '),
    ],
}

PLACES = {
    "op": 2,
    "grid axis of steering": 6,
    "source of vectors": 2,
    "stage": 4,
    "group of the store": 2,
    "executor": 3,
}
"""Files that a recipe may touch."""

PLAN = """
name: recipes
models: [zoo/llama]
texts: zoo
executor: second
directions: {flat: {level: 0.25}}
steer:
- {name: there, op: add, scale: raw, layers: [3, 1], strengths: [-1.0, 1.0], gains: [1.0, 2.0], controls: [],
   prompts: {a: tom walked to the, b: anna}, generate: {max_new_tokens: 3}}
- {name: back, op: subtract, scale: raw, layers: [3, 1], strengths: [1.0], controls: [],
   prompts: {a: tom walked to the, b: anna}, generate: {max_new_tokens: 3}}
store: recipes.zarr
threads: 1
"""

PROGRAM = """
import json, sys
import nsteer

assert nsteer.__file__.startswith(sys.argv[1]), nsteer.__file__
done = nsteer.run(nsteer.load("plan.yaml"))
found = nsteer.open("recipes.zarr")
cube = found["steering"].injected.nsteer.sel(model="zoo/llama", method="level", concept="flat", control="none", seed=0)
text = found["generations"].text.nsteer.sel(model="zoo/llama", method="level", concept="flat", control="none", seed=0)
def of(data, **labels):
    return data.nsteer.sel(layer_set="1,3", **labels).values.tolist()
print(json.dumps({
    "failures": [str(one) for one in done.failures],
    "dims": list(found["steering"].dims),
    "added": of(cube, op="there", strength=1.0, gain=1.0, layer=[1, 3]),
    "twice": of(cube, op="there", strength=1.0, gain=2.0, layer=[1, 3]),
    "away": of(text, op="there", strength=-1.0, gain=1.0),
    "subtracted": of(text, op="back", strength=1.0, gain=1.0),
    "vector": found["vectors", "zoo/llama"].vector.nsteer.sel(method="level").values.ravel().tolist(),
    "length": found["lengths", "zoo/llama"].length.values.ravel().tolist(),
    "executor": found["models"].executor.values.tolist(),
    "again": sum(nsteer.run(nsteer.load("plan.yaml")).done.values()),
}))
"""


def rows() -> dict[str, str]:
    """Kind of thing -> what its row of the page says."""
    cells = (line.strip("| \n").split(" | ", 1) for line in PAGE.read_text().splitlines() if line.startswith("| "))
    return {cell[0]: cell[1] for cell in cells if len(cell) == 2}


def named_in(row: str) -> set[str]:
    """The files, and folders of new files, that a row of the page names: `runner/editing.py`, `keys.Condition`."""
    paths: set[str] = set()
    for token in re.findall(r"`([^`]+)`", row):
        parts = token.replace("/", ".").removeprefix("nsteer.").removesuffix(".py").strip(".").split(".")
        for end in range(len(parts), 0, -1):
            if places := _places(parts[:end], parts[end:]):
                paths |= places
                break
    return paths


def _places(head: list[str], rest: list[str]) -> set[str]:
    """Modules that a dotted name ends, or the modules of a package that define what is named in it."""
    name = "/".join(head)
    modules = {file for file in FILES if f"/{file}".endswith((f"/{name}.py", f"/{name}/__init__.py"))}
    folders = {file.removesuffix("__init__.py") for file in modules if file.endswith("__init__.py")}
    if not folders:
        return modules
    if not rest:
        return modules | folders
    says = re.compile(rf"^(class|def) {rest[0]}\b|^{rest[0]}\b[^=\n]*=", re.MULTILINE)
    return {f for f in FILES if f.startswith(tuple(folders)) and says.search(FILES[f].read_text())}


@pytest.mark.parametrize("kind", RECIPES)
def test_the_page_names_every_file_that_a_recipe_touches(kind):
    named, touched = named_in(rows()[kind]), {file for file, _, _ in RECIPES[kind]}
    folders = tuple(path for path in named if path.endswith("/"))
    new = {file for file, pattern, _ in RECIPES[kind] if pattern == NEW}
    lacking = {file for file in touched - named if not (file in new and file.startswith(folders))}
    assert not lacking, f"docs/house.md, {kind}: {sorted(lacking)} is to be touched and not named; it names {named}"
    assert len(touched) <= PLACES[kind]


@pytest.fixture(scope="module")
def used(tmp_path_factory):
    """What came of a plan that uses one new thing of each kind, in a copy of the package with all of them."""
    place = tmp_path_factory.mktemp("recipes")
    # with its bytecode, which holds for files that are not changed
    shutil.copytree(PACKAGE, place / "nsteer", ignore=shutil.ignore_patterns("*.pyc.*"))
    for kind, changes in RECIPES.items():
        for file, pattern, becomes in changes:
            target = place / "nsteer" / file
            if pattern == NEW:
                target.write_text(becomes)
                continue
            text, count = re.subn(pattern, becomes, target.read_text())
            assert count == 1, f"{kind}: {pattern!r} stands {count} times in {file}: the recipe is out of date"
            target.write_text(text)
    (place / "plan.yaml").write_text(PLAN)
    setting = {**os.environ, "PYTHONPATH": str(place)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(place)], cwd=place, env=setting, capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_everything_that_the_recipes_make_is_used_in_a_run(used):
    assert used["failures"] == [] and used["again"] == 0


def test_the_new_op_is_applied(used):
    assert used["subtracted"] == used["away"]


def test_the_new_axis_is_a_dim_of_the_cubes(used):
    assert "gain" in used["dims"]
    np.testing.assert_allclose(used["twice"], 2 * np.array(used["added"]), rtol=1e-5)


def test_the_new_source_and_the_new_stage_are_stored(used):
    assert set(used["vector"]) == {0.25}
    width = len(used["vector"]) // len(used["length"])
    assert used["length"] == pytest.approx([0.25 * width**0.5] * len(used["length"]))


def test_the_new_executor_ran(used):
    assert used["executor"] == ["second"]
