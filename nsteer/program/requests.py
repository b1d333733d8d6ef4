"""Turns a program's form into Python text for vLLM, where every row is a request of its own and nothing is padded.

What happens at a site is the text of `code`, word for word: a row's data are those of a program of one row. What
differs is how a pass is had. Forms without edits are read by a block that stays on the engine while ordinary requests
pass, and finds each by its tokens; where rows have edits, or something happens while they are written, each request
carries its own block.
"""

from __future__ import annotations

from nsteer.program import code
from nsteer.program.anatomy import Anatomy
from nsteer.program.form import Form

REQUEST = {"temperature": 0.0, "ignore_eos": True, "detokenize": False}
"""Greedy decoding, ended by the program's own ids alone. What is drawn is drawn in the text, and taken greedily."""


def write(form: Form, anatomy: Anatomy) -> str:
    """The text of a program: a function `run(model, rows)`.

    `rows` has a dict a row: tensors by the names of `Program.arrays` of a program of that row alone; `tokens`, a list
    of ids; `program`, a number of its own for each program. It returns a dict of what the form reads, each a list of
    one value a row, or of one row the value. Raises what `code.write` raises.
    """
    code.check(form, anatomy)
    functions = code.functions(form, anatomy, leave=False)
    if form.promote:
        body = _lens(form, anatomy)
    elif form.decoding and not form.steps:
        body = _without_edits(form)
    else:
        body = _installed(form, anatomy) if installed(form) else _carried(form, anatomy)
    return "\n\n\n".join(["import torch", *functions, "\n".join(body)]) + "\n"


def installed(form: Form) -> bool:
    """Whether a form is read by a block on the engine, which knows its row by the row's tokens."""
    return not (form.edits or form.decoding or form.promote)


def _asked(form: Form) -> str:
    """The settings of a request, as a line of the text; a pass without decoding ends with the first token."""
    decoding = form.decoding
    settings: dict[str, object] = {**REQUEST, "max_tokens": int(decoding.max_new_tokens) if decoding else 1}
    if decoding and decoding.eos:
        settings["stop_token_ids"] = list(map(int, decoding.eos))
    return "asked = {" + ", ".join(f'"{name}": {value!r}' for name, value in settings.items()) + "}"


PROMPT = '{"prompt_token_ids": data["tokens"]}'


def _without_edits(form: Form) -> list[str]:
    """Requests that nothing happens to."""
    return [
        "def run(model, rows):",
        f"    {_asked(form)}",
        f"    found = model.generate([{PROMPT} for data in rows], **asked)",
        '    return {"tokens": [torch.tensor(one.outputs[0].token_ids) for one in found]}',
    ]


def _installed(form: Form, anatomy: Anatomy) -> list[str]:
    """A block on the engine, which reads every request that passes; it knows it by its tokens."""
    names = _kept(form)
    inner = [f"data = known[tuple(model.{anatomy.embedding}.input[0].tolist())]", *_pass(form, anatomy)]
    entries = [f'"{name}": [one.saves["{variable}"] for one in found]' for name, variable in names.items()]
    return [
        "def run(model, rows):",
        f"    {_asked(form)}",
        '    known = {tuple(data["tokens"]): data for data in rows}',
        "    with model.edit() as (tracer, installed):",
        *code.indent(inner, 2),
        "    try:",
        f"        found = model.generate([{PROMPT} for data in rows], **asked)",
        "    finally:",
        "        installed.clear()",
        "    return {" + ", ".join(entries) + "}",
    ]


def _carried(form: Form, anatomy: Anatomy) -> list[str]:
    """A block that every request carries, with its row's own vectors."""
    names = _kept(form)
    lines = ["def run(model, rows):", f"    {_asked(form)}"]
    if form.against:  # a row is compared with its text unedited, which has to pass before
        lines += [
            '    distinct = {tuple(data["tokens"]): data for data in rows}',
            "    with model.trace(**asked) as tracer:",
            "        for data in distinct.values():",
            f"            with tracer.invoke({PROMPT}):",
            *code.indent(_final(), 4),
            *code.indent(
                [
                    'unedited = vars(head).setdefault("unedited", {})',
                    'if unedited.get("program") != data["program"]:',
                    "    unedited.clear()",
                    'unedited |= {"program": data["program"], tuple(data["tokens"]): logits}',
                ],
                4,
            ),
        ]
    lines += [
        "    with model.trace(**asked) as tracer:",
        "        for data in rows:",
        f"            with tracer.invoke({PROMPT}):",
        *code.indent(_steps(form, anatomy) if form.decoding else _pass(form, anatomy), 4),
    ]
    return [*lines, "    return " + code.result(names)]


def _lens(form: Form, anatomy: Anatomy) -> list[str]:
    """One request, whose pass is not looked at: the unembedding's weight, whole on every rank."""
    inner = [
        "from vllm.distributed import tensor_model_parallel_all_gather as whole",
        f"weight = whole(model.{anatomy.head}._module.weight, 0)[:{int(anatomy.vocab)}]",
        f'best = promote(weight, data["vectors"], {int(form.promote)})',
        "logits = best.values.detach().cpu().save()",
        "tokens = best.indices.cpu().save()",
    ]
    return [
        "def run(model, rows):",
        f"    {_asked(form)}",
        "    with model.trace(**asked) as tracer:",
        "        for data in rows:",
        f"            with tracer.invoke({PROMPT}):",
        *code.indent(inner, 4),
        '    return {"promoted": logits, "promoted_tokens": tokens}',
    ]


def _kept(form: Form) -> dict[str, str]:
    """What a program gives, by name, and the variable that holds it."""
    if form.decoding:
        names = ["tokens"] + ["receipts"] * bool(form.edits) + ["logprobs", "candidates"] * bool(form.top)
        names += ["ends", "written", "counted"] * bool(form.reads)
        return dict(zip(names, names, strict=True))
    names = [name for what, name in code.KEPT.items() if any(site.what == what for site in form.reads)]
    kept = {name: name for name in names + ["receipts"] * bool(form.edits)}
    return kept | ({"score": "scores"} if form.score else {}) | ({"against": "changed"} if form.against else {})


def _pass(form: Form, anatomy: Anatomy) -> list[str]:
    """What happens while a text is read: edits, then reads, in forward order."""
    names = [name for what, name in code.KEPT.items() if any(site.what == what for site in form.reads)]
    lines = [f"{name} = []" for name in names] + ["receipts = []"] * bool(form.edits)
    for spot in code.places(form):
        lines += code.site_lines(form, anatomy, *spot, step=None)
    lines += [f"{name} = torch.stack({name}).detach().cpu().save()" for name in names]
    lines += ["receipts = torch.stack(receipts).detach().cpu().save()"] * bool(form.edits)
    given = 'data["inputs"]["input_ids"], data["weights.score"]'
    if form.score or form.against:
        lines += _final()
    if form.score:
        lines.append(f"scores = score(logits, {given}).detach().cpu().save()")
    if form.against:
        lines += [
            'both = torch.cat([logits, vars(head)["unedited"][tuple(data["tokens"])]])',
            "ids, weights = (one.expand(2, -1) for one in (" + given + "))",
            "changed = against(both, ids, weights, torch.tensor([1, 1]))[:1].detach().cpu().save()",
        ]
    return lines


def _final() -> list[str]:
    """The logits of every position [1, position, vocab]: the engine itself makes only the last position's."""
    return [
        "final = model.model.output[0]",
        "head = model.lm_head._module",
        "logits = model.logits_processor(head, final[0], head.bias)[None]",
    ]


def _steps(form: Form, anatomy: Anatomy) -> list[str]:
    """What happens while a row is written. A row that has ended is no longer there."""
    decoding = form.decoding
    assert decoding is not None
    new, eos = int(decoding.max_new_tokens), list(map(int, decoding.eos))
    lines = ["alive = torch.ones(1, 1, dtype=torch.bool)", f"tokens = torch.full((1, {new}), -1).save()"]
    if form.edits:
        lines.append(f"receipts = torch.zeros({len(form.edits)}, 1, 4).save()")
    if form.reads:
        lines += [
            f"ends = torch.zeros({len(form.reads)}, 1, {anatomy.d_model}).save()",
            f"written = torch.zeros({len(form.reads)}, 1, {anatomy.d_model}).save()",
            "counted = torch.zeros(1, 1).save()",
        ]
    if form.top:
        lines += [
            f"logprobs = torch.full((1, {new}, {int(form.top)}), torch.nan).save()",
            f"candidates = torch.full((1, {new}, {int(form.top)}), -1).save()",
        ]
    return [*lines, f"for step in tracer.iter[:{new}]:", *code.indent(_step(form, anatomy, eos), 1)]


def _step(form: Form, anatomy: Anatomy, eos: list[int]) -> list[str]:
    decoding = form.decoding
    assert decoding is not None
    follows = any(site.after for site in form.edits)
    lines = [
        f"inputs = model.{anatomy.embedding}.input",
        'width = 1 if step > 0 else len(data["tokens"])',
        'assert inputs.shape[1] == width, f"step {step} reads {inputs.shape[1]} positions, not {width}: preempted?"',
        "alive = alive.to(inputs.device)",
    ]
    lines += ["changes = []"] * bool(form.edits) + ["here = []"] * bool(form.reads)
    for spot in code.places(form):
        lines += code.site_lines(form, anatomy, *spot, step="step")
    lines += ["receipts += torch.stack(changes).detach().cpu()"] * bool(form.edits)
    lines += ["previous = inputs[:, -1:].clone()"] * follows
    if form.reads:
        lines += [
            "if step == 0:",
            "    ends += torch.stack(here).cpu()",
            "else:",
            "    written += torch.stack(here).cpu()",
            "    counted += 1",
        ]
    if form.top or decoding.sample:
        lines += ["head = model.logits", "logits = head.float()"]
    if form.top:
        lines += [
            f"best = logits.log_softmax(-1).topk({int(form.top)})",
            "logprobs[:, step] = best.values.detach().cpu()",
            "candidates[:, step] = best.indices.cpu()",
        ]
    if decoding.sample:
        knobs = f"{code.number(decoding.temperature)}, {int(decoding.top_k)}, {code.number(decoding.top_p)}"
        lines.append(f'force(head[:, None], draw(logits, data["uniform"][:, step], {knobs}))')
    lines += ["token = int(model.samples)", "tokens[:, step] = token"]
    return lines + ([f"if token in {eos}:", "    break"] if eos else [])
