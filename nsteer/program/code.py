"""Turns a program's form into Python text: the only place that writes a `with model.trace`.

The text is flat and self-contained: it needs torch and an nnsight model, nothing of nsteer. What a plan
can put into it is checked identifiers, integers and floats, so a plan can not inject code. It is executed under
a file name that holds its hash: nnsight finds a trace's body through `linecache`, and caches it by that name.
"""

from __future__ import annotations

import hashlib
import inspect
import linecache
import math
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, cast

from nsteer.errors import ExecutionError, ProgramError, SiteError
from nsteer.program.anatomy import LOGIT_SCALING, Anatomy, unknown
from nsteer.program.form import SITES, EditSite, Form, ReadSite, place
from nsteer.program.ops import OPS, REFERENCED

PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*|\[\d+\])*")

GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 50,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": None,
    "sequence_bias": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "watermarking_config": None,
    "max_length": None,
    "min_length": 0,
    "min_new_tokens": None,
    "max_time": None,
    "stop_strings": None,
    "prompt_lookup_num_tokens": None,
    "return_dict_in_generate": False,
    "use_cache": True,
    "cache_implementation": None,
    "prefill_chunk_size": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "constraints": None,
    "force_words_ids": None,
    "assistant_early_exit": None,
    "token_healing": False,
}
"""Greedy decoding with a growing KV cache and nothing else, field by field: what is not said here a model's
generation_config decides on a server; here nothing of it is left (`executors.common.pin`)."""


def write(form: Form, anatomy: Anatomy) -> str:
    """The text of a program: a function `run(model, data, **where)`.

    `data` holds tensors by the names of `Program.arrays`, `inputs` among them; `where` goes to nnsight
    (nothing, or `remote=True`, `backend=...`). It returns a dict of what the form reads. Raises ProgramError
    for a layer the model does not have, sites that repeat, or a module path that is no path; SiteError for a site that
    the model does not have.
    """
    check(form, anatomy)
    if form.promote:
        return "\n\n\n".join(["import torch", *functions(form, anatomy), "\n".join(_lens(form, anatomy))]) + "\n"
    body = _generation(form, anatomy) if form.decoding else _forward(form, anatomy)
    return "\n\n\n".join(["import torch", *functions(form, anatomy), "\n".join(body)]) + "\n"


def digest(text: str) -> str:
    """The first 12 hex digits of the text's SHA-256: its name in the store and in tracebacks."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@lru_cache(maxsize=512)
def load(text: str, function: str = "run") -> Callable[..., Any]:
    """A function of a program's text: `run`, where none is named."""
    name = f"<nsteer:{digest(text)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    space: dict[str, Any] = {"__name__": name}  # of no module: pickling would look for its functions in all there are
    exec(compile(text, name, "exec"), space)
    return space[function]


def check(form: Form, anatomy: Anatomy) -> None:
    inside = [
        path for sublayer in (anatomy.attention, anatomy.mlp) if sublayer is not None for path in sorted(sublayer.paths)
    ]
    projection = [anatomy.projection] if anatomy.projection else []
    for path in (anatomy.blocks, anatomy.head, anatomy.embedding, *projection, *inside):
        if not PATH.fullmatch(path):
            raise ProgramError(f"the module path {path!r} is not a path")
    for site in _sites(form):
        if not 0 <= site.layer < anatomy.n_layers:
            raise ProgramError(f"layer {site.layer} of a model with {anatomy.n_layers} layers")
        if site.site not in SITES:
            raise ProgramError(f"the site {site.site!r}, which is none of {', '.join(SITES)}")
    for sites in cast(tuple[tuple[Any, ...], ...], (form.reads, form.edits)):
        if list(map(place, sites)) != sorted(map(place, sites)):
            raise ProgramError("sites must stand in forward order: what comes back is in their order")
    if why := unknown(anatomy, form.sites):
        raise SiteError(why)
    if form.promote and anatomy.lens:
        raise ExecutionError(f"no logit lens: {anatomy.lens}")
    if len(set(form.reads)) < len(form.reads):
        raise ProgramError("the same read twice in one program")
    if (form.score or form.against) and form.decoding:
        raise ProgramError("a program that generates scores no text: score it in a second forward")
    if form.against and not form.edits:
        raise ProgramError("a program without edits has nothing to set against the unsteered")
    if form.promote and (form.reads or form.edits or form.decoding or form.score):
        raise ProgramError("a logit lens is a program of its own")
    if not (form.reads or form.edits or form.decoding or form.score or form.promote):
        raise ProgramError("a program that reads, edits and generates nothing")
    if any((site.what == "decoded") != bool(form.decoding) for site in form.reads):
        raise ProgramError("a program that generates reads `decoded` streams, and only such a program does")
    if any(not site.weights.isidentifier() for site in form.reads):
        raise ProgramError("names of weights must be identifiers")


def functions(form: Form, anatomy: Anatomy, leave: bool = True) -> list[str]:
    """The code of every function that the body calls, each once. `leave`: whether rows may leave their batch."""
    from nsteer.program import kernel

    used: list[Callable] = []
    kinds = {site.what for site in form.reads}
    used += [kernel.pool] if "pooled" in kinds else []
    live = any(site.live for site in form.edits)
    used += [kernel.mean_norm] if "norm" in kinds or live else []
    used += [kernel.live_norm] if form.against and live else []
    used += [OPS[name] for name in sorted({site.op for site in form.edits})]
    used += [kernel.edit] if form.edits else []
    used += [kernel.edit_each, kernel.against] if form.against else []
    used += [kernel.gate] if any(site.gate for site in form.edits) else []
    used += [kernel.of_rows] if form.steps and leave else []
    used += [kernel.among] if form.decoding and any(site.after for site in form.edits) else []
    decoding = form.decoding
    if (
        anatomy.scaling
        and not anatomy.returned
        and (form.score or form.against or (decoding and (decoding.sample or form.top)))
    ):
        used.append(LOGIT_SCALING[anatomy.scaling[0]])
    used += [kernel.score] if form.score else []
    used += [kernel.promote] if form.promote else []
    if decoding and decoding.sample:
        used += [kernel.draw, kernel.force]
    return [_source(function) for function in used]


@lru_cache
def _source(function: Callable) -> str:
    """A function's text, read once: a file that is edited while a study runs must not change its programs."""
    return inspect.getsource(function).rstrip()


def _forward(form: Form, anatomy: Anatomy) -> list[str]:
    """One forward pass: edits, then reads, in forward order; nothing runs after the deepest one."""
    lines = ["def run(model, data, **where):", "    with torch.no_grad():"]
    lines.append('        with model.trace(data["inputs"], use_cache=False, **where) as tracer:')
    names = [name for what, name in KEPT.items() if any(site.what == what for site in form.reads)]
    inner = [f"{name} = []" for name in names]
    inner += ["receipts = []"] if form.edits else []
    for spot in places(form):
        inner += site_lines(form, anatomy, *spot, step=None)
    inner += [f"{name} = torch.stack({name}).detach().cpu().save()" for name in names]
    inner += ["receipts = torch.stack(receipts).detach().cpu().save()"] if form.edits else []
    if form.score:
        given = 'data["inputs"]["input_ids"], data["weights.score"]'
        inner.append(f"scores = score({_logits(anatomy, _at_head(anatomy))}, {given}).detach().cpu().save()")
    if form.against:
        given = 'data["inputs"]["input_ids"], data["weights.score"], data["unedited"]'
        inner.append(f"changed = against({_logits(anatomy, _at_head(anatomy))}, {given}).detach().cpu().save()")
    inner.append("tracer.stop()")
    lines += indent(inner, 3)
    kept = {name: name for name in names + ["receipts"] * bool(form.edits)} | (
        {"score": "scores"} if form.score else {}
    )
    kept |= {"against": "changed"} if form.against else {}
    return [*lines, "    return " + result(kept)]


def _lens(form: Form, anatomy: Anatomy) -> list[str]:
    """No forward: the unembedding's weight alone. NDIF's sandbox has no weights: there the head itself does it."""
    head, first = f"model.{anatomy.head}", f"model.{anatomy.projection or anatomy.head}"
    vocab = int(anatomy.vocab)
    weight = f"{head}.weight[:{vocab}]"
    if anatomy.projection:
        weight += f".float() @ {first}.weight.float()"
    return [
        "def run(model, data, **where):",
        "    with torch.no_grad():",
        '        with model.trace(data["inputs"], use_cache=False, **where) as tracer:',
        f"            if {head}.weight.is_meta:",
        f"                h = {first}.input",
        '                rows = torch.cat([data["vectors"], torch.zeros_like(data["vectors"][:1])])',
        f"                {first}.input = rows.to(h.device, h.dtype)[None]",
        f"                rows = {head}.output[0, :, :{vocab}].float()",
        f"                best = (rows[:-1] - rows[-1:]).topk({int(form.promote)})  # the last row is the bias",
        "            else:",
        f'                best = promote({weight}, data["vectors"], {int(form.promote)})',
        "            logits = best.values.detach().cpu().save()",
        "            tokens = best.indices.cpu().save()",
        "            tracer.stop()",
        '    return {"promoted": logits, "promoted_tokens": tokens}',
    ]


def _generation(form: Form, anatomy: Anatomy) -> list[str]:
    """Generation: the same edits at every step, each row until its own end of text."""
    decoding = form.decoding
    assert decoding is not None
    eos = list(map(int, decoding.eos))
    ends = f"eos_token_id={eos or None}, pad_token_id={int(decoding.pad)}"
    settings = f"**greedy, max_new_tokens={int(decoding.max_new_tokens)}, {ends}"
    lines = ["def run(model, data, **where):", *indent(_greedy(), 1), "    with torch.no_grad():"]
    lines.append(f"        with model.generate({settings}, **where) as tracer:")
    lines.append('            with tracer.invoke(data["inputs"]):')
    inner = []
    if form.steps:
        inner += [
            'rows = torch.arange(len(data["inputs"]["input_ids"]))  # those in the batch',
            "alive = torch.ones(len(rows), 1, dtype=torch.bool)",
        ]
    if form.edits:
        inner.append(f"receipts = torch.zeros({len(form.edits)}, len(rows), 4).save()")
    if form.reads:
        inner += [
            f"ends = torch.zeros({len(form.reads)}, len(rows), {anatomy.d_model}).save()",
            f"written = torch.zeros({len(form.reads)}, len(rows), {anatomy.d_model}).save()",
            "counted = torch.zeros(len(rows), 1).save()",
        ]
    if form.top:
        shape = f"(len(rows), {int(decoding.max_new_tokens)}, {int(form.top)})"
        inner += [
            f"logprobs = torch.full({shape}, torch.nan).save()",
            f"candidates = torch.full({shape}, -1).save()",
        ]
    if form.steps:
        inner.append("for step in tracer.iter[:]:")
        inner += indent(_step(form, anatomy, eos), 1)
    lines += indent(inner or ["pass"], 4)
    lines += indent(["with tracer.invoke():", "    tokens = tracer.result.detach().cpu().save()"], 3)
    kept = ["tokens"] + ["receipts"] * bool(form.edits) + ["logprobs", "candidates"] * bool(form.top)
    kept += ["ends", "written", "counted"] * bool(form.reads)
    return [*lines, "    return " + result(dict(zip(kept, kept, strict=True)))]


def _greedy() -> list[str]:
    """GREEDY as a mapping in the text, a few settings a line."""
    pairs = [f"{name!r}: {value!r}".replace("'", '"') for name, value in GREEDY.items()]
    return ["greedy = {", *(f"    {', '.join(pairs[i : i + 3])}," for i in range(0, len(pairs), 3)), "}"]


def _step(form: Form, anatomy: Anatomy, eos: list[int]) -> list[str]:
    follows = any(site.after for site in form.edits)
    lines = [
        f"inputs = model.{anatomy.embedding}.input",
        "if len(inputs) < len(alive):  # rows whose end was read have left the batch",
        "    stay = alive[:, 0].cpu()",
        "    rows, alive, data = rows[stay], alive[stay], of_rows(data, stay)",
        *["    previous = previous[stay]"] * follows,
        'width = 1 if step > 0 else data["inputs"]["input_ids"].shape[1]',
        'assert inputs.shape[1] == width, f"step {step} reads {inputs.shape[1]} positions, not {width}: no KV cache?"',
        "alive = alive.to(inputs.device)",
        "if step > 0:",
        f"    alive = alive & ~torch.isin(inputs[:, -1:], torch.tensor({eos}, device=inputs.device))",
    ]
    if form.edits or form.reads:
        lines += ["changes = []"] * bool(form.edits) + ["here = []"] * bool(form.reads)
        for spot in places(form):
            lines += site_lines(form, anatomy, *spot, step="step")
        lines += ["receipts[:, rows] += torch.stack(changes).detach().cpu()"] * bool(form.edits)
        lines += ["previous = inputs[:, -1:].clone()"] * follows
    if form.reads:
        lines += [
            "here = torch.stack(here)",
            "if step == 0:",
            "    ends += here.cpu()",
            "else:",
            "    written[:, rows] += (here * alive).cpu()",
            "    counted[rows] += alive.float().cpu()",
        ]
    if form.top or (form.decoding and form.decoding.sample):
        lines += [f"head = {_at_head(anatomy)}", f"logits = {_logits(anatomy, 'head[:, -1].float()')}"]
    if form.top:
        lines += [
            f"best = logits.log_softmax(-1).topk({int(form.top)})",
            "logprobs[rows, step] = best.values.detach().cpu().where(alive.cpu(), torch.nan)",
            "candidates[rows, step] = best.indices.cpu().where(alive.cpu(), -1)",
        ]
    if form.decoding and form.decoding.sample:
        knobs = f"{number(form.decoding.temperature)}, {int(form.decoding.top_k)}, {number(form.decoding.top_p)}"
        lines.append(f'force(head, draw(logits, data["uniform"][:, step], {knobs}))')
    return lines


def site_lines(form: Form, anatomy: Anatomy, layer: int, at: str, step: str | None) -> list[str]:
    """Everything that happens at one site: its edits in their declared order, then its reads."""
    lines = [f"h = model.{anatomy.blocks}[{layer}]{_value(anatomy, layer, at)}"]
    for i, site in enumerate(form.edits):
        if (site.layer, site.site) == (layer, at):
            lines += _edit(i, site, step, form.against)
    return lines + [_read(site) for site in form.reads if (site.layer, site.site) == (layer, at)]


def _value(anatomy: Anatomy, layer: int, site: str) -> str:
    """What stands at a site, as nnsight names it, from its block on."""
    if site == "resid_pre":
        return ".input"
    if site == "resid_post":
        return f".output{'[0]' if anatomy.tuple_output else ''}"
    sublayer = {"attn_out": anatomy.attention, "mlp_out": anatomy.mlp}[site]
    assert sublayer is not None, "checked before"
    path, many = sublayer.at(layer)
    return f".{path}.output{'[0]' if many else ''}"


def _edit(i: int, site: EditSite, step: str | None, against: bool = False) -> list[str]:
    mask, norm = f'data["prompt"][{i}]', f'data["norm"][{i}]'
    if step:
        later = f'data["steps"][{i}][:, step - 1, None]' if site.paced else f'data["generated"][{i}][:, None]'
        mask = f"{mask} if step == 0 else {later}.to(h.device) & alive"
        norm = f"{norm} if step == 0 else torch.ones_like(alive).float()"
    lines = [f"mask = {mask}"]
    if step and site.after:
        lines += ["if step > 0:", f'    mask = mask & among(previous, data["after"][{i}]).to(h.device)']
    if site.gate:
        edges = f'data["vectors"][data["gate"][{i}]], data["low"][{i}], data["high"][{i}], {site.gate == "cosine"}'
        lines.append(f"mask = mask.to(h.device).bool() & gate(h, {edges})")
    amount = f'data["amount"][{i}]'
    vector = f'data["vectors"][data["which"][{i}]]'
    reference = f', data["reference"][{i}]' if site.op in REFERENCED else ""
    if against:  # positions of prompt and continuation in one forward: an amount for each
        amount = f'{amount}.to(h.device)[:, None] * data["pace"][{i}].to(h.device)'
        if site.live:
            lines.append(f'norm = live_norm(h, {norm}, data["weights.later"])')
            amount += " * norm"
        return [*lines, f"receipts.append(edit_each(h, {site.op}, {vector}, {amount}, mask{reference}))"]
    if site.live:
        lines.append(f"norm = mean_norm(h, {norm})")
        amount = f"{amount}.to(h.device) * norm"
    if step and site.paced:
        lines.append(f'pace = 1.0 if step == 0 else data["factor"][{i}][:, step - 1].to(h.device)')
        amount = f"{amount} * pace" if site.live else f"{amount}.to(h.device) * pace"
    kept = "changes" if step else "receipts"
    return [*lines, f"{kept}.append(edit(h, {site.op}, {vector}, {amount}, mask{reference}))"]


KEPT = {"pooled": "pooled", "norm": "norms", "tokens": "streams"}


def _read(site: ReadSite) -> str:
    if site.what == "decoded":
        return "here.append(h[:, -1].detach().float().clone())"
    if site.what == "tokens":
        return "streams.append(h.detach().float().clone())"
    function = "pool" if site.what == "pooled" else "mean_norm"
    return f'{KEPT[site.what]}.append({function}(h, data["weights.{site.weights}"]))'


def _at_head(anatomy: Anatomy) -> str:
    """What logits are made of: as a rule of the head's output. A server copies all that is read, and the model's own
    output holds the KV cache."""
    return "model.output.logits" if anatomy.returned else f"model.{anatomy.head}.output"


def _logits(anatomy: Anatomy, raw: str) -> str:
    if anatomy.scaling is None or anatomy.returned:
        return raw
    name, value = anatomy.scaling
    return f"{LOGIT_SCALING[name].__name__}({raw}, {number(value)})"


def places(form: Form) -> list[tuple[int, str]]:
    """Sites in forward order: nnsight takes a read out of order for one of the next step, silently."""
    return [(layer, SITES[at]) for layer, at in sorted(set(map(place, _sites(form))))]


def _sites(form: Form) -> list[ReadSite | EditSite]:
    return [*form.reads, *form.edits]


def number(value: float) -> str:
    if not math.isfinite(value):
        raise ProgramError(f"{value} is not a number a program can hold")
    return repr(float(value))


def result(names: dict[str, str]) -> str:
    return "{" + ", ".join(f'"{name}": {variable}' for name, variable in names.items()) + "}"


def indent(lines: list[str], levels: int) -> list[str]:
    return ["    " * levels + line for line in lines]
