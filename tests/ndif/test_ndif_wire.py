"""What travels: how many bytes, what it is made of, and that only one job's worth of it is ever in memory."""

from __future__ import annotations

import pickletools

import numpy as np
from kit import rows

from nsteer.executors.common import program_digest, tensors
from nsteer.executors.payload import pack
from nsteer.program.form import Decoding, EditSite, Form, ReadSite, assemble, programs


def test_bytes_of_a_capture_are_the_reduced_result_and_the_inputs(open_remote, tinies, server):
    import servers

    line = servers.Line(server.port)
    there = open_remote(tinies["llama"], host=line.url)
    reads = tuple(ReadSite(layer) for layer in range(there.anatomy.n_layers))
    [program] = programs(
        Form(reads=reads), rows(there, 64, edits=0, longest=60), budget=100_000, max_rows=64, overhead=100_000
    )
    readouts = there.run(program)
    line.close()
    useful = readouts.pooled.nbytes + sum(array.nbytes for array in program.arrays.values())
    carried = line.carried + there.wire.received  # requests, status and all; the result comes from the store
    print(f"{carried} bytes over the wire for {useful} useful ones: {carried / useful:.3f}")
    assert carried <= 1.2 * useful
    every_token = program.arrays["input_ids"].size * len(reads) * there.anatomy.d_model * 4
    assert there.wire.received < every_token / 10


def test_nothing_travels_but_text_tensors_and_module_paths(open_remote, tinies):
    there = open_remote(tinies["gpt2"])
    form = Form(edits=(EditSite(1, "add", live=True),), decoding=Decoding(8, there.eos, there.pad, sample=True), top=3)
    program = assemble(form, rows(there, 3))
    blob = pack(there.model, there.code(program), [tensors(program, there.anatomy)])
    roots, strings = set(), []
    for code, argument, _ in pickletools.genops(blob):
        if isinstance(argument, str):
            strings.append(argument)
        if code.name == "GLOBAL":
            roots.add(argument.split(".")[0])
        if code.name == "STACK_GLOBAL":
            roots.add(next(s for s in reversed(strings[:-1]) if "." in s or s.isidentifier()).split(".")[0])
    assert not any("nsteer" in root for root in roots), roots
    assert not any(s in ("CodeType", "_make_function", "_make_skeleton_class") for s in strings)
    assert sum("def run(model, data, **where)" in s for s in strings) == 1


def test_digests_tell_programs_apart(open_remote, tinies):
    there = open_remote(tinies["gpt2"])
    form = Form(reads=(ReadSite(1),))
    a, b = (assemble(form, rows(there, 3, edits=0, seed=seed)) for seed in (0, 1))
    text = there.code(a)
    assert program_digest(text, a) == program_digest(text, assemble(form, rows(there, 3, edits=0)))
    assert len({program_digest(text, a), program_digest(text, b), program_digest(text, a, "other model")}) == 3
    c = assemble(form, rows(there, 3, edits=0))
    c.arrays["weights.text"] = np.nextafter(c.arrays["weights.text"], 1)
    assert program_digest(text, c) != program_digest(text, a)


def test_programs_are_drawn_no_further_than_in_flight(open_remote, tinies):
    there = open_remote(tinies["gpt2"], in_flight=2, together=1)
    drawn = []

    def one_by_one():
        for program in programs(Form(reads=(ReadSite(1),)), rows(there, 12, edits=0), budget=10_000, max_rows=1):
            drawn.append(program)
            yield program

    for done, _ in enumerate(there.map(one_by_one())):
        assert len(drawn) - done <= 2 + 1 + 1  # in flight, the one just yielded, the one held to be joined
