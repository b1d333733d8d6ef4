"""The house: modules import downward only, the two sides never meet, what is promised to be light is light."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

import nsteer

PACKAGE = Path(nsteer.__file__).parent
FILES = sorted(file for file in PACKAGE.rglob("*.py"))
TESTS = sorted(Path(__file__).parent.rglob("*.py"))

FLOORS = [
    {
        "errors",
        "files",
        "ops",
        "kernel",
        "pooling",
        "positions",
        "directions",
        "metrics",
        "statistics",
        "randomness",
        "budget",
        "contexts",
        "checkpoints",
        "hub",
        "machine",
        "calibration",
    },
    {
        "fingerprints",
        "formulas",
        "hosts",
        "layers",
        "presets",
        "zoo",
        "program",
        "sublayers",
        "templates",
        "placeholders",
        "folders",
    },
    {"reader", "anatomy", "models", "separation", "outcomes", "store"},
    {"texts", "plan", "source", "analysis", "results", "hooks", "tuning"},
    {"claims", "reference", "check", "prompts", "executors"},
    {"cells", "forms", "classifier", "doctor", "figures"},
    {"arrays", "sizing", "terminal", "page", "notes"},
    {"preview", "conductor", "shown", "upkeep", "exchange", "chat"},
    {"display", "cluster"},
    {"cli"},
    {"__main__"},
]
"""Bottom up. A module imports only from floors below its own; a folder is one module, free within itself."""

MODELS = {"anatomy", "sublayers", "kernel", "program", "source", "hooks", "forms", "executors", "classifier"}
LABELS = {
    "arrays",
    "store",
    "results",
    "analysis",
    "separation",
    "outcomes",
    "claims",
    "figures",
    "page",
    "shown",
    "upkeep",
}
BOTH = {"conductor", "preview", "exchange", "chat", "cluster"}
"""The conductor runs both sides, and the cluster shares its stages out; the preview shows what it would run; exchange
names modules in files of vectors; the chat steers a model by a store."""


def unit(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return parts[0] if parts != ("__init__",) else "nsteer"


def name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imports(file: Path) -> set[str]:
    """The units of the package that a file imports, at its head or inside functions."""
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("nsteer.")}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            if node.module == "nsteer":
                found |= {alias.name for alias in node.names if not alias.name.startswith("_")}
            elif (node.module or "").startswith("nsteer."):
                found.add(node.module.split(".")[1])
    return found - {unit(file)}


UNITS = sorted({unit(file) for file in FILES} - {"nsteer"})
FLOOR = {one: height for height, floor in enumerate(FLOORS) for one in floor}


@cache
def needs(one: str) -> frozenset[str]:
    return frozenset().union(*(imports(file) for file in FILES if unit(file) == one))


def test_every_module_has_a_floor():
    assert set(UNITS) <= set(FLOOR), f"put these on a floor: {sorted(set(UNITS) - set(FLOOR))}"


@pytest.mark.parametrize("one", UNITS)
def test_modules_import_downward_only(one):
    upward = {other for other in needs(one) if FLOOR.get(other, 99) >= FLOOR.get(one, 99)}
    assert not upward, f"{one} (floor {FLOOR.get(one)}) imports {sorted(upward)}"


def test_the_two_sides_never_import_each_other():
    assert not {one: needs(one) & LABELS for one in MODELS if needs(one) & LABELS}
    assert not {one: needs(one) & MODELS for one in LABELS if needs(one) & MODELS}


def test_few_see_both_sides():
    assert {one for one in UNITS if needs(one) & MODELS and needs(one) & LABELS} <= BOTH


# ---- light imports ----------------------------------------------------------------------------------------------

HEAVY = ["torch", "nnsight", "transformers", "xarray", "zarr", "pandas", "scipy", "numpy", "pydantic", "ruamel", "rich"]
TORCH, LABELLED, EDGE = HEAVY[:3], HEAVY[3:7], HEAVY[7:]

LIGHT = {
    "nsteer cli errors hosts reader layers presets models fingerprints formulas zoo ops positions": HEAVY,
    "check plan texts reference": [*TORCH, *LABELLED, "numpy"],
    "pooling directions randomness": [*TORCH, *LABELLED, "pydantic"],
    "prompts cells program forms executors": [*TORCH, *LABELLED],
    "source anatomy sublayers kernel hooks": ["nnsight", "transformers", *LABELLED],
    "arrays store results analysis separation outcomes claims sizing terminal preview conductor upkeep exchange": TORCH,
    "figures page shown display": TORCH,
}


@pytest.mark.parametrize("names", LIGHT, ids=lambda names: names.split()[0])
def test_what_is_promised_to_be_light_is_light(names):
    code = "import sys, json, importlib\nfor one in sys.argv[1:]: importlib.import_module(one)\n"
    code += "print(json.dumps(sorted({one.split('.')[0] for one in sys.modules})))"
    modules = ["nsteer" if one == "nsteer" else f"nsteer.{one}" for one in names.split()]
    done = subprocess.run([sys.executable, "-c", code, *modules], capture_output=True, text=True, check=True)
    assert not set(json.loads(done.stdout)) & set(LIGHT[names])


# ---- names and words --------------------------------------------------------------------------------------------


def test_public_names_are_there_and_say_what_they_are():
    assert dir(nsteer) == sorted(nsteer.__all__)
    for public in nsteer.__all__:
        found = getattr(nsteer, public)
        assert public == "__version__" or (found.__doc__ or "").strip(), public
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        getattr(nsteer, "lode")  # noqa: B009


def test_type_checkers_see_the_public_names_where_they_are_loaded_from():
    typed = {}
    for node in ast.walk(next(node for node in tree(PACKAGE / "__init__.py").body if isinstance(node, ast.If))):
        if isinstance(node, ast.ImportFrom):
            typed |= {a.name: node.module if node.module == "nsteer" else f"{node.module}:{a.name}" for a in node.names}
    assert typed == {k: "nsteer" if ":" not in where else where for k, where in nsteer._PUBLIC.items()}
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_module_opens_with_a_sentence(file):
    said = (ast.get_docstring(tree(file)) or "").split("\n\n")[0].strip()
    assert said, f"{file} does not say what it is"
    assert said[-1] in ".:?" or said.splitlines()[0][-1] in ".:?", said


@pytest.mark.parametrize("file", [file for file in FILES if file.parent.name != "zoo"], ids=name)
def test_names_offered_are_there_and_documented(file):
    listed = [
        ast.literal_eval(node.value)
        for node in tree(file).body
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
    ]
    if not listed or file == PACKAGE / "__init__.py":
        return
    module = import_module(name(file))
    for public in listed[0]:
        found = getattr(module, public)
        assert not callable(found) or (found.__doc__ or "").strip(), public


# ---- one writer of traces, one trap ------------------------------------------------------------------------------


def test_one_module_writes_traces():
    """Only `source.py` may put `model.trace` or `model.generate` into text or code."""
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
    assert writers == {"nsteer.source"}


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


@pytest.mark.parametrize("file", [*FILES, *TESTS], ids=lambda file: str(file.relative_to(PACKAGE.parent)))
def test_nobody_selects_by_method_as_a_keyword(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    found = [node.lineno for node in ast.walk(tree(file)) if isinstance(node, ast.Call) and swallowed(node)]
    assert not [line for line in found if "the trap" not in lines[line - 1]]
