"""Compiled text: what it says, what it can not be made to say, and that it is the text that runs.

`NSTEER_GOLDEN=write pytest tests/test_code.py` writes the golden texts again; look at the difference.
"""

from __future__ import annotations

import ast
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tinies
import torch

from nsteer.errors import ProgramError
from nsteer.program import code
from nsteer.program.anatomy import Anatomy, find, prove
from nsteer.program.form import Decoding, EditSite, Form, ReadSite

GOLDEN = Path(__file__).parent / "golden"
PLAIN = Anatomy("model.layers", "lm_head", "model.embed_tokens", 4, 32, 320)
FORMS = {
    "capture": Form(reads=tuple(ReadSite(layer, *what) for layer in (1, 3) for what in (("text",), ("norm", "norm")))),
    "steering": Form(
        edits=(EditSite(1, "add", live=True), EditSite(1, "clamp"), EditSite(3, "project_out")),
        decoding=Decoding(24, (2, 5), 0, sample=True, temperature=0.7, top_k=40, top_p=0.9),
        top=5,
    ),
    "conditional": Form(
        edits=(
            EditSite(1, "affine", live=True, paced=True, gate="cosine", after=True),
            EditSite(3, "rotate", gate="projection"),
        ),
        decoding=Decoding(24, (2, 5), 0),
    ),
}
GREEDY = Form(decoding=Decoding(4, (2,), 0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", tinies.FAMILIES)
def test_the_text_of_every_family_is_the_golden_one(family, form):
    text = code.write(FORMS[form], prove(tinies.model(family)))
    file = GOLDEN / f"{form}-{family}.py.txt"
    if os.environ.get("NSTEER_GOLDEN") == "write":
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def test_no_golden_text_is_left_over():
    expected = {f"{form}-{family}.py.txt" for form in FORMS for family in tinies.FAMILIES}
    assert {file.name for file in GOLDEN.iterdir() if file.is_file()} == expected


@pytest.mark.parametrize("name", [f"{form}-{family}" for form in FORMS for family in tinies.FAMILIES])
def test_a_text_stands_alone(name):
    """It imports torch and nothing else, calls what it defines, and uses no name that it does not have."""
    text = (GOLDEN / f"{name}.py.txt").read_text(encoding="utf-8")
    tree = ast.parse(text)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [ast.unparse(node) for node in imports] == ["import torch"]
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for function in tree.body:
        if not isinstance(function, ast.FunctionDef):
            continue
        own = {arg.arg for arg in ast.walk(function) if isinstance(arg, ast.arg)}
        own |= {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        used = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        builtin = {"len", "range", "zip", "enumerate"}
        assert used <= own | defined | {"torch"} | builtin, used - own - defined
    assert max(map(len, text.splitlines())) <= 160


def test_a_text_runs_where_nsteer_is_not(tmp_path):
    """The captured text of a program, run in a process that can not import nsteer."""
    program = tmp_path / "program.txt"
    program.write_text(code.write(FORMS["steering"], find(tinies.model("llama"))), encoding="utf-8")
    script = f"""
import sys, linecache
sys.path.insert(0, {str(Path(__file__).parent)!r})
class Block:
    def find_spec(self, name, *rest):
        if name.split(".")[0] == "nsteer":
            raise ImportError("no nsteer here")
sys.meta_path.insert(0, Block())
import tinies, torch
from nnsight import TransformersModel
text = open({str(program)!r}).read()
linecache.cache["<x>"] = (len(text), None, text.splitlines(True), "<x>")
space = {{}}
exec(compile(text, "<x>", "exec"), space)
words = tinies.tokenizer()
words.padding_side = "left"
model = TransformersModel(tinies.model("llama"), tokenizer=words, task="text-generation")
ids = torch.tensor([[8, 9, 10], [0, 11, 12]])
mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
data = dict(inputs=dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)))
data |= dict(vectors=torch.eye(32)[:1], which=torch.zeros(3, 2, dtype=torch.long), amount=torch.ones(3, 2))
data |= dict(prompt=mask.bool()[None].expand(3, 2, 3), generated=torch.ones(3, 2, dtype=torch.bool))
data |= dict(norm=(mask / mask.sum(1, keepdim=True))[None].expand(3, 2, 3), uniform=torch.rand(2, 24).double())
import warnings; warnings.simplefilter("ignore")
found = space["run"](model, data)
assert found["receipts"].shape == (3, 2, 4) and (found["receipts"][:, :, 0] > 1).all(), found["receipts"]
assert "nsteer" not in sys.modules
print("ran", len(found["logprobs"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("ran")


# ---- what can not be written -----------------------------------------------------------------------------

EVIL = [
    "model.layers; import os",
    "model.layers()",
    "a b",
    "model..layers",
    "__import__('os').x",
    "model.layers\n",
    "",
    "x[i]",
]


@pytest.mark.parametrize("path", EVIL)
@pytest.mark.parametrize("where", ["blocks", "head", "embedding"])
def test_a_module_path_that_is_no_path_is_refused(path, where):
    with pytest.raises(ProgramError, match="is not a path"):
        code.write(GREEDY, dataclasses.replace(PLAIN, **{where: path}))


def test_indexed_paths_are_paths():
    text = code.write(FORMS["capture"], dataclasses.replace(PLAIN, blocks="model.parts[0].layers"))
    assert "model.model.parts[0].layers[1].output" in text


@pytest.mark.parametrize(
    "form, words",
    [
        (Form(reads=(ReadSite(4),)), "layer 4 of a model with 4 layers"),
        (Form(reads=(ReadSite(-1),)), "layer -1 of a model with 4 layers"),
        (Form(reads=(ReadSite(3), ReadSite(1))), "forward order"),
        (Form(edits=(EditSite(3, "add"), EditSite(1, "add"))), "forward order"),
        (Form(reads=(ReadSite(1), ReadSite(1))), "same read twice"),
        (Form(), "reads, edits and generates nothing"),
        (Form(reads=(ReadSite(1, "text']; import os; ['"),)), "must be identifiers"),
    ],
)
def test_a_form_that_means_nothing_is_refused(form, words):
    with pytest.raises(ProgramError, match=words):
        code.write(form, PLAIN)


NUMBERS = {"temperature": "0.7); import os", "top_k": "1); import os", "top_p": "__import__('os')"}
NUMBERS |= {"max_new_tokens": "3, **evil", "pad": "0, x=1"}


@pytest.mark.parametrize("field", NUMBERS)
def test_text_where_a_number_belongs_never_reaches_the_program(field):
    how = dataclasses.replace(Decoding(4, (2,), 0, sample=True), **{field: NUMBERS[field]})
    with pytest.raises((ProgramError, ValueError, TypeError)):
        code.write(Form(decoding=how), PLAIN)


@pytest.mark.parametrize(
    "form",
    [
        Form(edits=(EditSite("1].output; evil(); x[0", "add"),), decoding=GREEDY.decoding),
        Form(edits=(EditSite(1, "add; evil()"),), decoding=GREEDY.decoding),
        Form(reads=(ReadSite(1, "text", "evil()"),)),
        Form(decoding=dataclasses.replace(GREEDY.decoding, eos=("2]); evil()",))),
        dataclasses.replace(GREEDY, top="3); evil()"),
    ],
)
def test_nor_does_text_where_a_layer_an_op_or_an_id_belongs(form):
    with pytest.raises((ProgramError, ValueError, TypeError, KeyError)):
        text = code.write(form, PLAIN)
        assert "evil" not in text, text
        raise KeyError("written without it")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused(value):
    with pytest.raises(ProgramError, match="not a number"):
        code.write(Form(decoding=Decoding(4, (2,), 0, sample=True, temperature=value)), PLAIN)


def test_a_scaling_that_is_not_known_is_refused():
    with pytest.raises((ProgramError, KeyError)):
        code.write(dataclasses.replace(GREEDY, top=3), dataclasses.replace(PLAIN, scaling=("evil", 2.0)))


# ---- what is run -----------------------------------------------------------------------------------------


def test_a_new_text_never_runs_an_old_body(tiny):
    """nnsight caches a trace's body by file name and line: the name must change with the text."""
    executor = tiny("llama")
    template = """import torch


def run(model, data, **where):
    with torch.no_grad():
        with model.trace(data["inputs"], **where) as tracer:
            h = model.model.layers[LAYER].output.detach().save()
            tracer.stop()
    return h
"""
    ids = torch.tensor([[8, 9, 10]])
    data = {"inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(3)[None]}}
    hooked = {}
    blocks = tinies.blocks("llama", executor.module)
    handles = [b.register_forward_hook(lambda m, a, out, i=i: hooked.__setitem__(i, out)) for i, b in enumerate(blocks)]
    with torch.no_grad():
        executor.module(ids)
    for handle in handles:
        handle.remove()
    for layer in (0, 2, 1, 0):
        text = template.replace("LAYER", str(layer))
        assert torch.equal(code.load(text)(executor.model, data), hooked[layer])


def test_a_text_is_known_by_its_digest_and_tracebacks_show_its_lines():
    import linecache

    text = "import torch\n\n\ndef run(model, data, **where):\n    raise ValueError('here')\n"
    name = f"<nsteer:{code.digest(text)}>"
    function = code.load(text)
    assert function.__code__.co_filename == name and len(code.digest(text)) == 12
    assert linecache.getline(name, 5).strip() == "raise ValueError('here')"
    assert code.load(text) is function
    assert code.digest(text) != code.digest(text + "\n")


def test_equal_forms_give_equal_texts_and_a_changed_one_another():
    base = code.write(FORMS["steering"], PLAIN)
    assert code.write(FORMS["steering"], PLAIN) == base
    decoding = FORMS["steering"].decoding
    for changed in (
        dataclasses.replace(FORMS["steering"], top=6),
        dataclasses.replace(FORMS["steering"], decoding=dataclasses.replace(decoding, temperature=0.71)),
        dataclasses.replace(FORMS["steering"], edits=FORMS["steering"].edits[:2]),
    ):
        assert code.write(changed, PLAIN) != base
