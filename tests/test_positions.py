"""Positions: what a plan's words mean over the tokens of a text, and that a program touches just those."""

from __future__ import annotations

import json

import numpy as np
import oracle
import pytest
import tinies
from oracle import Push
from test_check import GENERAL, PLAN, STEER, problems
from test_oracle import NEW, agrees, direction, greedy, parts, texts
from test_runner import finished
from test_runner import run as conduct

from nsteer.errors import ModelError
from nsteer.plan import check, editing, positions, reader
from nsteer.plan.prompts import Encoded, encode, located, norm_weights, token_ids
from nsteer.plan.schema import Editing, Plan, Schedule
from nsteer.program.form import Form, Row, assemble, halves
from nsteer.stages import forms
from nsteer.stages.job import Job


def parsed(value):
    """Positions as a plan has them."""
    edit = {"op": "add", "direction": "d", "positions": value}
    plan = {"name": "p", "models": ["zoo/llama"], "store": "p.zarr", "edits": {"e": [edit]}}
    return Plan.model_validate(plan).edits["e"][0].positions


# ---- prompts, by the definition ------------------------------------------------------------------------------------

BY_NUMBER = [
    ("all", 5, [0, 1, 2, 3, 4]),
    ("prompt", 5, [0, 1, 2, 3, 4]),
    ("last", 5, [4]),
    ("generated", 5, []),
    (0, 5, [0]),
    (-1, 5, [4]),
    ([0, -2], 5, [0, 3]),
    ({"index": [0, -2]}, 5, [0, 3]),
    ([7, -7], 5, []),
    ({"from": 2}, 5, [2, 3, 4]),
    ({"from": 2, "to": -1}, 5, [2, 3]),
    ({"from": -2}, 5, [3, 4]),
    ({"to": 2}, 5, [0, 1]),
    ({"from": 9}, 5, []),
    ({"from": -9, "to": 1}, 5, [0]),
    ({"index": 0, "from": 3}, 5, [0, 3, 4]),
    ({"except": 0}, 5, [1, 2, 3, 4]),
    ({"except": "last"}, 5, [0, 1, 2, 3]),
    ({"prompt": "all", "except": {"from": 1, "to": -1}}, 5, [0, 4]),
    ({"prompt": "all", "except": [0, 2]}, 5, [1, 3, 4]),
    ({"ids": 7}, 5, [1, 3]),
    ({"ids": [7, 5]}, 5, [1, 2, 3]),
    ({"ids": 7, "except": {"index": 3}}, 5, [1]),
]


@pytest.mark.parametrize("value, total, wanted", BY_NUMBER)
def test_positions_of_a_prompt(value, total, wanted):
    mask = Encoded("", (3, 7, 5, 7, 9)[:total], 0).mask(parsed(value))
    assert np.flatnonzero(mask).tolist() == wanted


@pytest.mark.parametrize(
    "value, wanted",
    [
        ("all", [0, 1, 2, 3]),
        ("prompt", []),
        ("last", []),
        ({"generated": "all"}, [0, 1, 2, 3]),
        ({"generated": {"from": 1, "to": 3}}, [1, 2]),
        ({"generated": {"to": 2}}, [0, 1]),
        ({"generated": {"index": [0, 3]}}, [0, 3]),
        ({"generated": {"index": 2}, "index": 0}, [2]),
        ({"generated": "all", "except": {"generated": {"to": 1}}}, [1, 2, 3]),
        ({"except": {"generated": {"from": 1}}}, [0]),
        ({"except": "generated"}, []),
        ({"role": "assistant"}, [0, 1, 2, 3]),
        ({"except": {"index": 0}}, [0, 1, 2, 3]),
    ],
)
def test_positions_of_generated_tokens(value, wanted):
    where = parsed(value)
    assert np.flatnonzero(positions.of_generated(where, 4)).tolist() == wanted
    if positions.bounded(where):
        assert positions.written(where)
    else:
        assert len(wanted) == 4 * positions.written(where)


# ---- texts and roles -----------------------------------------------------------------------------------------------


def words_of(tokenizer, text, where, chat="never"):
    """The pieces that are meant, and their places."""
    prompt = located(tokenizer, encode(tokenizer, text, chat), text, chat)
    mask = prompt.mask(parsed(where))
    return [tokenizer.decode([token]) for token, flag in zip(prompt.tokens, mask, strict=True) if flag]


@pytest.mark.parametrize("bos", [False, True])
def test_every_token_of_every_occurrence_of_a_text(bos):
    words = tinies.tokenizer(bos=bos)
    text = "the cat saw the unhappy cat, and catkin"
    assert "".join(words_of(words, text, {"text": "cat"})).replace(" ", "").startswith("catcat")
    prompt = located(words, encode(words, text), text, "never")
    mask = prompt.mask(parsed({"text": ["cat", "happy"]}))
    held = {at for (start, stop), flag in zip(prompt.spans, mask, strict=True) if flag for at in range(start, stop)}
    wanted = {
        at for w in ("cat", "happy") for i in range(len(text)) if text.startswith(w, i) for at in range(i, i + len(w))
    }
    assert wanted <= held
    for (start, stop), flag in zip(prompt.spans, mask, strict=True):
        assert flag == any(at in wanted for at in range(start, stop))
    assert len(wanted) == 14 and mask.sum() >= 6


def test_text_of_many_bytes_and_at_the_edges(words):
    text = "é tom 日本 wept"
    assert words.decode(words(text)["input_ids"]) == text
    prompt = located(words, encode(words, text), text, "never")
    for part in ("é", "日本", "wept"):
        mask = prompt.mask(parsed({"text": part}))
        held = sorted({at for span, flag in zip(prompt.spans, mask, strict=True) if flag for at in range(*span)})
        assert text[held[0] : held[-1] + 1].strip() == part


def test_a_text_is_sought_in_the_prompt_not_in_its_template():
    words = tinies.tokenizer(chat=True)
    text = "the user model sat"
    prompt = located(words, encode(words, text, "always"), text, "always")
    assert prompt.text[slice(*prompt.turns[0][1:])] == text
    user = prompt.mask(parsed({"role": "user"}))
    assert words.decode([t for t, flag in zip(prompt.tokens, user, strict=True) if flag]) == text
    assert user.sum() == len(prompt.tokens) - 3  # <s>, <user>, <model>
    sought = prompt.mask(parsed({"text": "user"}))
    assert 0 < sought.sum() < user.sum() and not (sought & ~user).any()
    template = prompt.mask(parsed({"prompt": "all", "except": {"role": "user"}}))
    assert (template == ~user).all()


def test_a_template_that_trims_or_hides_the_prompt():
    words = tinies.tokenizer(chat=True)
    words.chat_template = "<user>{{ messages[0]['content'] | trim }}</s><model>"
    text = "  rain fell "
    prompt = located(words, encode(words, text, "always"), text, "always")
    assert prompt.text[slice(*prompt.turns[0][1:])] == "rain fell"
    words.chat_template = "<user>{{ messages[0]['content'] | upper }}</s>"
    with pytest.raises(ModelError, match="does not show the prompt"):
        located(words, encode(words, "rain", "always"), "rain", "always")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "gemma", "qwen", "mistral")] + ["llama"]
)
def test_texts_in_the_embedded_models(zoo_model, name):
    words = zoo_model(name).tokenizer
    text = "dora walked to the garden and dora sang"
    for part, count in (("garden", 1), ("dora", 2)):
        pieces = words_of(words, text, {"text": part})
        assert "".join(pieces).replace("▁", "").replace(" ", "") == part * count


# ---- what a program touches ----------------------------------------------------------------------------------------

WINDOWS = (
    {"index": [0, -1], "generated": {"from": 1, "to": 3}},
    {"from": 2, "to": -1},
    {"ids": list(range(0, 320, 2)), "generated": {"index": [0, 4]}, "except": {"index": 1}},
    {"except": {"index": 0, "generated": {"from": 2}}},
)


class Touching(Push):
    """An edit of positions told one by one."""

    def touches(self, position, prompt, tokens=()):
        kept, steps = self.positions
        return kept[position] if position < prompt else steps[position - prompt]


def row_of(vector, where, tokens, schedule=None):
    """What the runner makes of positions."""
    edit = Editing(positions=where, schedule=schedule)
    return editing.row_edit(edit, editing.CompiledEdit(vector, 3.0), Encoded("", tokens, 0), NEW)


@pytest.mark.parametrize("schedule", [None, Schedule(first=2)])
@pytest.mark.parametrize("family", ["llama", "gpt2", pytest.param("gemma", marks=pytest.mark.slow)])
def test_just_these_are_edited_in_cached_decoding(tiny, family, schedule):
    executor = tiny(family)
    module, blocks = parts(executor)
    prompts, d = texts(executor), executor.anatomy.d_model
    rows, truths = [], []
    for i, tokens in enumerate(prompts):
        where = parsed(WINDOWS[i])
        vectors = {layer: direction(d, 10 * i + layer) for layer in (1, 3)}
        rows.append(Row(i, tokens, edits=tuple(row_of(v, where, tokens, schedule) for v in vectors.values())))
        steps = positions.of_generated(where, NEW) & (np.arange(NEW) < (2 if schedule else NEW))
        kept = Encoded("", tokens, 0).mask(where).tolist()
        touched = (kept, steps.tolist())
        truths.append([Touching(layer, "add", v, 3.0, positions=touched) for layer, v in vectors.items()])
    sites = tuple(forms.EditSite(layer, "add", paced=True) for layer in (1, 3))
    form = Form(edits=sites, decoding=greedy(executor), top=executor.anatomy.vocab)
    whole = assemble(form, rows)
    for program in (whole, *halves(whole)):
        readouts = executor.run(program)
        for place, i in enumerate(program.keys):
            agrees(readouts.row(place), oracle.generate(module, blocks, prompts[i], truths[i], new=NEW))
    assert norm_weights(3, 0).sum() == pytest.approx(1)


# ---- from a plan to a store ----------------------------------------------------------------------------------------

RUN = {
    "name": "where",
    "texts": "zoo",
    "emotions": ["happy", "sad"],
    "methods": {"read": {"source": "comprehension", "samples": 2, "neutral_samples": 1, "pooling": "mean"}},
    "steer": {
        "scale": "unit",
        "strengths": [3.0],
        "layers": [3, 1],
        "positions": {"text": "the", "generated": {"from": 1, "to": 3}},
        "prompts": {"long": "the cat sat on the warm mat and", "short": "rain fell", "third": "a girl sang in the sun"},
        "generate": {"max_new_tokens": 5},
        "controls": ["zero"],
    },
    "prompts": {"long": "the cat sat on the warm mat and", "short": "rain fell"},
    "reads": {"kept": {"layers": [3, 1], "positions": {"text": "cat", "index": -1}}},
    "directions": {"d": {"random": 4}},
    "edits": {"push": [{"op": "add", "direction": "d", "layers": [1], "strength": 2.0, "positions": {"text": "cat"}}]},
    "threads": 1,
}


@pytest.fixture(scope="module")
def stored(folder, tmp_path_factory):
    return finished(tmp_path_factory.mktemp("where"), RUN, folder("llama"))


def test_receipts_tell_how_many_were_touched(stored, words):
    store, _ = stored
    touched = store.read("steering").touched.sel({"control": "none", "emotion": "happy"}).squeeze()
    counts = store.read("generations").n_tokens.sel({"control": "none", "emotion": "happy"}).squeeze()
    for label, text in RUN["steer"]["prompts"].items():
        prompt = located(words, encode(words, text), text, "never")
        occurrences = int(prompt.mask(parsed({"text": "the"})).sum())
        fed = int(counts.sel({"prompt": label})) - 1
        expected = occurrences + min(max(fed - 1, 0), 2)
        for layer in (3, 1):
            assert touched.sel({"prompt": label, "layer": layer}).item() == expected
    assert RUN["steer"]["prompts"]["short"] == "rain fell"
    edits = store.read("stream_receipts/llama").touched.sel({"edit": "push", "strength": 2.0, "layer": 1}).squeeze()
    assert edits.sel({"prompt": "long"}) > 0 and edits.sel({"prompt": "short"}) == 0


def test_reads_keep_just_their_positions(stored, words):
    stream = (
        stored[0]
        .read("streams/llama")
        .stream.sel({"edit": "none", "strength": 0, "read": "kept", "layer": 3})
        .squeeze()
    )
    bos = tinies.tokenizer(bos=tinies.BOS["llama"])
    for label, text in RUN["prompts"].items():
        prompt = located(bos, encode(bos, text), text, "never")
        mask = prompt.mask(parsed({"text": "cat", "index": -1}))
        there = np.isfinite(stream.sel({"prompt": label}).values).all(-1)
        assert there[: len(mask)].tolist() == mask.tolist() and not there[len(mask) :].any()


def test_positions_that_no_row_has_are_a_failure(folder, tmp_path):
    steer = {**RUN["steer"], "positions": {"ids": [3]}}  # <user>, in no prompt
    plan = {key: RUN[key] for key in ("name", "texts", "emotions", "methods", "threads")}
    (tmp_path / "x.yaml").write_text(
        json.dumps({**plan, "steer": steer, "models": [str(folder("llama"))], "store": "x.zarr"})
    )
    summary = conduct(tmp_path / "x.yaml")
    assert {failure.reason for failure in summary.failures} == {
        "no prompt has any of the positions: nothing was touched"
    }
    with pytest.raises(ModelError, match="no token id"):
        token_ids(tinies.tokenizer(), [10**6])


def test_the_old_words_keep_their_cells_and_new_forms_have_others(stored):
    from nsteer.stages import cells

    def grid(where):
        plan = json.loads(stored[1].read_text())
        plan["steer"]["positions"] = where
        study = check.study(reader.parse(json.dumps(plan), "p.yaml"))
        return frozenset(cells.steering(Job(study, study.facts[0])).values())

    forms_ = ["all", "last", {"index": -1}, {"from": 1}, {"from": 1, "to": -1}, {"text": "the"}, {"except": 0}]
    assert len({grid(form) for form in forms_}) == len(forms_)


# ---- mistakes ------------------------------------------------------------------------------------------------------

MISTAKES = {
    "steer.positions=lats": ("steer.positions", "'lats'", "did you mean 'last'?"),
    "steer.positions={}": ("steer.positions", "an empty mapping", "positions: {index: -1}"),
    "steer.positions=[]": ("steer.positions", "an empty list", ""),
    "steer.positions={index: []}": ("steer.positions.index", "an empty list", ""),
    "steer.positions={form: 1}": ("steer.positions.form", "the unknown key 'form'", "did you mean 'from'?"),
    "steer.positions={from: 3, to: 2}": ("steer.positions", "from 3 to 2", "`to` itself is left out"),
    "steer.positions={from: x}": ("steer.positions.from", "'x'", ""),
    "steer.positions={text: zzz}": ("steer.positions.text", "'zzz', which no prompt has", ""),
    "steer.positions={except: {text: [zzz]}}": ("steer.positions.except.text[0]", "'zzz', which no prompt has", ""),
    "steer.positions={role: user}": ("steer.positions.role", "user, with chat: never", "chat: always"),
    "steer.positions={generated: {from: -1}}": ("steer.positions.generated.from", "-1", ""),
    "steer.positions={generated: {}}": ("steer.positions.generated", "an empty mapping", ""),
    "steer.positions={generated: {from: 400}}": (
        "steer.positions.generated",
        "token 400, with max_new_tokens 50",
        "the last token that is written is never read again",
    ),
}


@pytest.mark.parametrize("setting", MISTAKES)
def test_a_mistake_in_positions_is_one_problem(setting):
    (problem,) = problems(f"{PLAN}{STEER}\n", setting)
    assert (problem.path, problem.found, problem.hint) == MISTAKES[setting]


@pytest.mark.parametrize(
    "setting, path, actual",
    [
        ("reads.r.positions=last", "reads.r.positions", "positions beside a `pooling`"),
        ("reads.r={positions: {generated: all}}", "reads.r.positions", "generated"),
        ("reads.r={positions: {text: zzz}}", "reads.r.positions.text", "'zzz', which no prompt has"),
        ("edits.e[0].positions={text: three}", "edits.e[0].positions.text", "'three', which no prompt has"),
        ("edits.e[0].positions={role: assistant}", "edits.e[0].positions.role", "assistant, with chat: never"),
    ],
)
def test_a_mistake_in_positions_of_reads_and_edits(setting, path, actual):
    (problem,) = problems(GENERAL, setting)
    assert (problem.path, problem.found) == (path, actual)


def test_what_is_right_is_no_problem():
    for where in ("0", "[0, -1]", "{from: 1, generated: all}", "{text: one}", "{ids: 3, except: {ids: [4]}}"):
        assert problems(GENERAL, f"edits.e[0].positions={where}") == []
