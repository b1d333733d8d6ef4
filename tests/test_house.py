"""The house: modules import downward only, the two sides never meet, what is promised to be light is light."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import nsteer
from nsteer.stages import keys

PACKAGE = Path(nsteer.__file__).parent
FILES = sorted(file for file in PACKAGE.rglob("*.py"))
TESTS = sorted(Path(__file__).parent.rglob("*.py"))
BENCH = PACKAGE.parent / "bench"

FLOORS = [
    {"errors", "zoo"},
    {"system", "science"},
    {"program", "store"},
    {"models"},
    {"executors", "plan"},
    {"report", "stages"},
    {"runner", "upkeep", "vectors"},
    {"cluster"},
    {"cli"},
    {"__main__"},
]
"""The rooms, bottom up. A room imports only from floors below its own, and is free within itself."""

MODELS = {
    *("program.anatomy", "program.sublayers", "program.kernel", "program.form", "program.code"),
    *("vectors.hooks", "stages.forms", "executors"),
}
LABELS = {
    *("stages.arrays", "store", "upkeep", "science.analysis", "science.separation", "science.outcomes"),
    *("report.claims", "report.figures", "report.page", "report.shown"),
}
"""The two sides, as rooms or as modules of rooms."""

BOTH = {"runner", "cluster", "vectors.exchange", "vectors.chat", "vectors.baking", "vectors.evals"}
"""The runner runs both sides and shows a plan without running it, and the cluster shares its stages out; exchange
names modules in files of vectors; the chat and the evals steer a model by a store, and baking writes its weights."""


def room(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return parts[0] if parts != ("__init__",) else "nsteer"


def name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


@cache
def imports(file: Path) -> frozenset[str]:
    """The modules of the package that a file imports, at its head or inside functions, without `nsteer.`."""
    names = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(path.removeprefix("nsteer.") for path in names if path.startswith("nsteer.") and ".__" not in path)


ROOMS = sorted({room(file) for file in FILES} - {"nsteer"})
FLOOR = {room_name: height for height, floor in enumerate(FLOORS) for room_name in floor}


def within(module: str, side: set[str]) -> bool:
    return any(f"{module}.".startswith(f"{prefix}.") for prefix in side)


def meets(file: Path, side: set[str]) -> set[str]:
    """What a file imports of a side."""
    return {module for module in imports(file) if within(module, side)}


def own(file: Path) -> str:
    return name(file).removeprefix("nsteer.")


def test_every_room_has_a_floor():
    assert set(ROOMS) <= set(FLOOR), f"put these on a floor: {sorted(set(ROOMS) - set(FLOOR))}"


def test_the_top_of_the_package_is_taken_in_at_a_look():
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert len(entries) < 20, sorted(entries)


@pytest.mark.parametrize("importer", ROOMS)
def test_rooms_import_downward_only(importer):
    needs = {module.split(".")[0] for file in FILES if room(file) == importer for module in imports(file)} - {importer}
    upward = {other for other in needs if FLOOR.get(other, 99) >= FLOOR.get(importer, 99)}
    assert not upward, f"{importer} (floor {FLOOR.get(importer)}) imports {sorted(upward)}"


def test_the_two_sides_never_import_each_other():
    assert not {own(file): meets(file, LABELS) for file in FILES if within(own(file), MODELS) and meets(file, LABELS)}
    assert not {own(file): meets(file, MODELS) for file in FILES if within(own(file), LABELS) and meets(file, MODELS)}


def test_few_see_both_sides():
    seeing = [file for file in FILES if meets(file, MODELS) and meets(file, LABELS) and own(file) != "nsteer"]
    assert all(within(own(file), BOTH) for file in seeing)


# ---- light imports ----------------------------------------------------------------------------------------------

HEAVY = ["torch", "nnsight", "transformers", "xarray", "zarr", "pandas", "scipy", "numpy", "pydantic", "ruamel", "rich"]
TORCH, LABELLED, EDGE = HEAVY[:3], HEAVY[3:7], HEAVY[7:]

DRAWN = ["matplotlib", "jinja2"]
"""What figures and pages alone need."""

LIGHT = {
    "nsteer cli errors system.hosts plan.reader plan.layers science.presets models.facts system.fingerprints "
    "plan.formulas zoo program.ops plan.positions": HEAVY,
    "plan.check plan.schema plan.texts cli.reference": [*TORCH, *LABELLED, "numpy"],
    "program.pooling science.directions program.randomness": [*TORCH, *LABELLED, "pydantic"],
    "plan.prompts stages.cells program.form stages.forms executors": [*TORCH, *LABELLED],
    "program.code program.anatomy program.sublayers program.kernel vectors.hooks": ["nnsight", *TORCH[2:], *LABELLED],
    "stages.arrays stages.sizing store store.results science.analysis science.separation science.outcomes": TORCH,
    "report.claims report.terminal runner runner.preview upkeep vectors.exchange": [*TORCH, *DRAWN],
    "report.shown report.display report.overview report.reporting report.raters cli.stores": [*TORCH, *DRAWN],
    "report.figures report.page": TORCH,
}


@pytest.mark.parametrize("names", LIGHT, ids=lambda names: names.split()[0])
def test_what_is_promised_to_be_light_is_light(names):
    script = "import sys, json, importlib\nfor one in sys.argv[1:]: importlib.import_module(one)\n"
    script += "print(json.dumps(sorted({one.split('.')[0] for one in sys.modules})))"
    modules = ["nsteer" if module == "nsteer" else f"nsteer.{module}" for module in names.split()]
    done = subprocess.run([sys.executable, "-c", script, *modules], capture_output=True, text=True, check=True)
    assert not set(json.loads(done.stdout)) & set(LIGHT[names])


# ---- names and words --------------------------------------------------------------------------------------------


def test_public_names_are_there_and_say_what_they_are():
    assert dir(nsteer) == sorted(nsteer.__all__)
    for public in nsteer.__all__:
        member = getattr(nsteer, public)
        assert public == "__version__" or (member.__doc__ or "").strip(), public
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        getattr(nsteer, "lode")  # noqa: B009


def test_type_checkers_see_the_public_names_where_they_are_loaded_from():
    typed = {}
    for node in ast.walk(next(node for node in tree(PACKAGE / "__init__.py").body if isinstance(node, ast.If))):
        if isinstance(node, ast.ImportFrom):
            typed |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    assert typed == {k: where.replace(":", ".") for k, where in nsteer._PUBLIC.items()}
    assert (PACKAGE / "py.typed").is_file()


def test_a_module_opens_with_a_sentence():
    for file in FILES:
        said = (ast.get_docstring(tree(file)) or "").split("\n\n")[0].strip()
        assert said, f"{file} does not say what it is"
        assert said[-1] in ".:?" or said.splitlines()[0][-1] in ".:?", said


def test_names_offered_are_there_and_documented():
    for file in FILES:
        listed = [
            ast.literal_eval(node.value)
            for node in tree(file).body
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
        ]
        if not listed or file == PACKAGE / "__init__.py":
            continue
        module = import_module(name(file))
        for public in listed[0]:
            member = getattr(module, public)
            assert not callable(member) or (member.__doc__ or "").strip(), f"{name(file)}.{public}"


# ---- one writer of traces, one trap ------------------------------------------------------------------------------


def test_two_modules_write_traces():
    """Only `code.py`, and `requests.py` beside it, may put `model.trace` or `model.generate` into text or code."""
    writers = set()
    for file in FILES:
        for node in ast.walk(tree(file)):
            text = ""
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                text = f"{ast.unparse(node.func)}("
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            if "model.trace(" in text or "model.generate(" in text:
                writers.add(name(file))
    assert writers == {"nsteer.program.code", "nsteer.program.requests"}  # the same, as requests of vLLM


KEYS = {"key", "cell", "condition"}
"""Names that hold the key of a cell."""


def test_nobody_takes_a_label_of_a_key_by_its_number():
    def numbered(node: ast.AST) -> bool:
        if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Name) or node.value.id not in KEYS:
            return False
        which = node.slice
        return isinstance(which, ast.Slice | ast.UnaryOp) or (
            isinstance(which, ast.Constant) and type(which.value) is int
        )

    assert not [(name(file), node.lineno) for file in FILES for node in ast.walk(tree(file)) if numbered(node)]


def swallowed(call: ast.Call) -> bool:
    """Whether a call is xarray's `.sel(method=...)`, which takes `method` for itself and selects nothing."""
    function = call.func
    if not isinstance(function, ast.Attribute) or function.attr != "sel":
        return False
    if not any(keyword.arg == "method" for keyword in call.keywords):
        return False
    return not ast.unparse(function.value).endswith((".nsteer", "results"))


def test_the_trap_is_seen():
    calls = {"a.sel(method='x')": True, "a.nsteer.sel(method='x')": False, "results.sel('g', method='x')": False}
    calls |= {"a.sel({'method': 'x'})": False, "a.isel(method=0)": False, "f(a).sel(layer=1, method='x')": True}
    assert {text: swallowed(ast.parse(text, mode="eval").body) for text in calls} == calls


def test_nobody_selects_by_method_as_a_keyword():
    for file in [*FILES, *TESTS]:
        lines = file.read_text(encoding="utf-8").splitlines()
        calls = [node.lineno for node in ast.walk(tree(file)) if isinstance(node, ast.Call) and swallowed(node)]
        assert not [line for line in calls if "the trap" not in lines[line - 1]], name(file)


# ---- words ------------------------------------------------------------------------------------------------------

WORDS = {
    "twins?": "unsteered continuation",
    "anew": "again",
    "dealt|dealt out|all deals": "permuted",
    "crew|hired|sacked": "worker pool",
    "sack": "stop",
    "holes?": "missing value",
    "lasting failure": "permanent failure",
    "(?:in|at) hand": "current",
    "held against": "compared with",
    "(?:not|be) told from": "distinguished from",
    "can not be told": "can not be determined",
    "not told": "undetermined",
    "what is to be known": "what to measure",
    "most (?:new )?(?:tokens|rows|rounds|settings|workers)": "maximum number of",
    "(?:what|which|request) may pass": "transient",
    "bear it|bears it": "can do it",
    "(?:steer|steered|search(?:es)? a single) blocks?": "entry (of the list `steer`)",
    "(?:kept by|samples? by|block of) (?:block|prompts|samples)": "chunk",
    "parts? of (?:a|the|its) plan": "section of a plan",
    "source (?:text|code)s?|dataset sources?": "code, or dataset: a source is what a vector comes from",
    "plain (?:data|passages|questions|generate|arrays?|values?)": "JSON data, capability passages, unsteered",
}
"""Private word (a pattern) -> the field's own, in messages, docs and what stores and pages say."""

UNSAID = re.compile(rf"(?<![\w./\"'`-])({'|'.join(WORDS)})(?![\w./\"'`=(\[-])", re.IGNORECASE)
"""One of them as a word of a sentence: not a name of a variable, a field or a file."""


def texts_of(file: Path) -> list[tuple[int, str]]:
    """What a file says to its reader: sentences in strings that are no docstrings; lines of a page or a document."""
    if file.suffix != ".py":
        lines = file.read_text(encoding="utf-8").splitlines()
        return [(i, re.sub(r"{[{%].*?[%}]}", "", line)) for i, line in enumerate(lines, 1)]
    bodies = (node.body for node in ast.walk(tree(file)) if isinstance(getattr(node, "body", None), list))
    said = {id(statement.value) for body in bodies for statement in body if isinstance(statement, ast.Expr)}
    strings = (n for n in ast.walk(tree(file)) if isinstance(n, ast.Constant) and isinstance(n.value, str))
    return [(n.lineno, n.value) for n in strings if id(n) not in said and " " in n.value.strip()]


def better(said: str) -> str:
    """What to say in place of a private word."""
    return next(field for private, field in WORDS.items() if re.fullmatch(private, said, re.IGNORECASE))


NAMELESS = {"found", "one", "made", "mine", "of", "told", "asked", "there", "held", "whole", "own", "same", "chosen"}
"""What is no name of a function of a module: it does not say what is returned."""


def test_functions_are_named_for_what_they_return():
    functions = [
        (name(file), node.name) for file in FILES for node in tree(file).body if isinstance(node, ast.FunctionDef)
    ]
    assert not [(module, function) for module, function in functions if function in NAMELESS]


UNNAMED = {"found", "one", "made", "hole", "holes", "twin", "twins", "most", "lasting", "passing", "hands", "anew"}
"""What says nothing of a thing, and words that only the house knew: `missing`, `unsteered`, `max_rows`, `permanent`."""

PROBLEMS = {"nsteer.errors", "nsteer.models.checkpoints", "nsteer.plan.formulas"}
"""Where `found` is a field of a problem, beside `expected`."""


def bound(file: Path) -> set[str]:
    """Every name that a file gives to something of its own: variables, parameters, functions."""
    names = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.ExceptHandler) and node.name:
            names.add(node.name)
    return names


def test_things_are_named_for_what_they_are():
    names = {name(file): UNNAMED & bound(file) for file in [*FILES, *TESTS, *BENCH.rglob("*.py")]}
    allowed = {module: {"found"} for module in PROBLEMS}
    assert not {module: own for module, own in names.items() if own - allowed.get(module, set())}


def test_words_that_only_we_know_are_not_said():
    root = PACKAGE.parent
    pages = [*root.glob("*.md"), *root.glob("docs/*.md"), *root.glob("docs/howto/*.md"), *PACKAGE.rglob("*.html")]
    corrections = {
        f"{file.relative_to(root)}:{line}: {text.strip()[:90]}": better(word.group(1))
        for file in [*FILES, *(page for page in pages if page.name != "api.md")]
        for line, text in texts_of(file)
        if file.parent.name != "program" and (word := UNSAID.search(text))
    }
    assert not corrections, "\n".join(f"{where}\n    say: {field}" for where, field in corrections.items())


def test_the_key_of_what_a_judge_says_is_that_of_what_it_reads_and_the_judge():
    pairs = {keys.Judged: keys.Condition, keys.JudgedUnsteered: keys.Unsteered, keys.JudgedPrompted: keys.Prompted}
    for judged, read in {**pairs, keys.JudgedEdited: keys.Edited}.items():
        assert judged._fields == (*read._fields, "judge")
        assert judged(*judged._fields).of == read(*read._fields)
