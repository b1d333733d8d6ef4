"""Which decoder families of the installed transformers are read and steered exactly: tiny random models, plain hooks.

    python bench/families.py                       # all of them, and docs/families.md
    python bench/families.py qwen3 mamba           # only those; the page is left as it is
    python bench/families.py --out rows.jsonl      # a line a family; what is there is not done again (--again)

Each family is built tiny, with random weights, and put through programs in batches of texts of unequal length. The
truth beside it is made with nothing of nsteer: forward hooks of torch on one text at a time, without padding.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import families_page
import numpy as np
import tiny_models

NEW, LAYERS, STRENGTH = 6, (5, 2), 4.0
"""New tokens of a text; blocks that are read and edited; times a unit vector: enough that most texts change."""

TEXTS = ((11, 12, 13, 14), tuple(range(20, 43)), (40, 41))
"""Token ids of three texts; the long one reaches beyond the windows and convolutions of `tiny_models`."""

PARTS = {"resid_post": (True, True), "resid_pre": (False, True), "attn_out": (True, True), "mlp_out": (True, False)}
"""Sites, and whether the prompt and the generated tokens are edited there."""

Place = tuple[int, str]
"""A block and a site in it."""


def sites(anatomy: Any) -> list[str]:
    """The sites that nsteer says a model has."""
    inside = {"attn_out": anatomy.attention, "mlp_out": anatomy.mlp}
    return [site for site in PARTS if site not in inside or inside[site] is not None]


@contextmanager
def hooked(model: Any, anatomy: Any, places: Sequence[Place], act: Any) -> Iterator[None]:
    """Has `act(place, stream)` see what stands at each place; what it returns takes its place."""
    handles = []

    def after(place: Place) -> Any:
        def hook(module: Any, given: Any, out: Any) -> Any:
            return (act(place, out[0]), *out[1:]) if isinstance(out, (tuple, list)) else act(place, out)

        return hook

    def before(place: Place) -> Any:
        def hook(module: Any, args: tuple, named: dict[str, Any]) -> Any:
            if args:
                return (act(place, args[0]), *args[1:]), named
            first = next(iter(named))
            return args, named | {first: act(place, named[first])}

        return hook

    for place in places:
        layer, site = place
        block = model.get_submodule(f"{anatomy.blocks}.{layer}")
        if site == "resid_pre":
            handles.append(block.register_forward_pre_hook(before(place), with_kwargs=True))
        elif site == "resid_post":
            handles.append(block.register_forward_hook(after(place)))
        else:
            path, _ = (anatomy.attention if site == "attn_out" else anatomy.mlp).at(layer)
            handles.append(block.get_submodule(path).register_forward_hook(after(place)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run(executor: Any, form: Any, rows: list[Any]) -> dict[Any, dict[str, Any]]:
    """What comes back of each row, by key: in batches as this model bears them."""
    from nsteer.models import contexts
    from nsteer.program.form import programs

    context = contexts.context(executor.module.config.to_dict())
    rules = {"mates": executor.batching.mates, "turn": context.turn if context else 0}
    chosen = programs(form, rows, budget=10_000, max_rows=len(rows), overhead=10_000, **rules)
    results = [(program.keys, executor.run(program)) for program in chosen]
    return {key: readouts.row(i) for keys, readouts in results for i, key in enumerate(keys)}


def capture(executor: Any, layers: Sequence[int]) -> dict[str, float]:
    """By site, the largest relative difference of what is captured from what a hook sees, over texts and layers."""
    import torch

    from nsteer.program.form import Form, ReadSite, Row, place

    module, anatomy = executor.module, executor.anatomy
    reads = tuple(
        sorted((ReadSite(layer, what="tokens", site=site) for layer in layers for site in sites(anatomy)), key=place)
    )
    streams = run(executor, Form(reads=reads), [Row(i, text) for i, text in enumerate(TEXTS)])
    worst = dict.fromkeys(sites(anatomy), 0.0)
    for i, text in enumerate(TEXTS):
        seen: dict[Place, Any] = {}

        def keep(place: Place, stream: Any, seen: dict[Place, Any] = seen) -> Any:
            seen[place] = stream.clone()  # Falcon adds into what its MLP gave
            return stream

        with torch.no_grad(), hooked(module, anatomy, [(read.layer, read.site) for read in reads], keep):
            module(input_ids=torch.tensor([text]), use_cache=False)
        for read, mine in zip(reads, streams[i]["streams"], strict=True):
            truth = seen[read.layer, read.site][0].numpy()
            off = np.abs(mine - truth).max() / np.abs(truth).max() if mine.shape == truth.shape else np.inf
            worst[read.site] = max(worst[read.site], float(np.nan_to_num(off, nan=np.inf)))
    return worst


def steering(executor: Any, layers: Sequence[int]) -> dict[str, int]:
    """Greedy texts, steered at each site and not at all, beside those of hooks.

    of : texts; equal : token by token; ties : others, that part where the model's two best tokens are as good;
    moved : steered ones that are another text than without
    """
    import torch

    from nsteer.program.form import Decoding, EditSite, Form, Row, RowEdit

    module, anatomy = executor.module, executor.anatomy
    vectors = np.random.default_rng(7).standard_normal((len(TEXTS), anatomy.d_model))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    count = dict.fromkeys(("of", "equal", "ties", "moved"), 0)
    plain: list[tuple[int, ...]] = []
    for site in ("", *sites(anatomy)):
        prompt, generated = PARTS.get(site, (False, False))
        at = sorted(layers) if site else []
        form = Form(edits=tuple(EditSite(layer, "add", site=site) for layer in at), decoding=Decoding(NEW, (), 0))
        rows = []
        for i, (text, vector) in enumerate(zip(TEXTS, vectors, strict=True)):
            edit = RowEdit(vector, STRENGTH, np.full(len(text), prompt), generated, np.ones(len(text)))
            rows.append(Row(i, text, edits=(edit,) * len(at)))
        mine = run(executor, form, rows)
        for i, text in enumerate(TEXTS):
            push = Push(STRENGTH * torch.tensor(vectors[i]), prompt, generated)
            with hooked(module, anatomy, [(layer, site) for layer in at], push):
                truth, margins = greedy(module, text)
            plain += [] if site else [truth]
            got = tuple(mine[i]["tokens"])
            parted = next((k for k, (a, b) in enumerate(zip(got, truth, strict=False)) if a != b), None)
            count["of"] += 1
            count["equal"] += got == truth
            count["ties"] += got != truth and parted is not None and margins[parted] < 1e-4
            count["moved"] += truth != plain[i]
    return count


class Push:
    """Adds a vector at the prompt, at generated tokens or both: the first pass reads the prompt, later ones a token."""

    def __init__(self, vector: Any, prompt: bool, generated: bool):
        self.vector, self.prompt, self.generated = vector, prompt, generated
        self.read: set[Place] = set()

    def __call__(self, place: Place, stream: Any) -> Any:
        first = place not in self.read
        self.read.add(place)
        return stream + self.vector if (self.prompt if first else self.generated) else stream


def greedy(module: Any, text: Sequence[int]) -> tuple[tuple[int, ...], list[float]]:
    """The tokens that a model writes, and by how much of its largest logit each was better than the next."""
    import torch

    ids = torch.tensor([list(text)])
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW}
    with torch.no_grad():
        out = module.generate(ids, **given, output_scores=True, return_dict_in_generate=True)
    best = [score[0].float().topk(2).values for score in out.scores]
    margins = [float((two[0] - two[1]) / max(float(score.abs().max()), 1e-9)) for two, score in zip(best, out.scores)]
    return tuple(out.sequences[0, len(text) :].tolist()), margins


def look(kind: str) -> dict[str, Any]:
    """One family's row: how far capture is off, steered texts equal, sites; or what it was refused with."""
    from nsteer.errors import NsteerError, OutOfMemoryError
    from nsteer.executors.local import Local
    from nsteer.program import anatomy

    row: dict[str, Any] = {"family": kind}
    try:
        model = tiny_models.build(kind)
        row["class"] = type(model).__name__
    except Exception as error:  # sizes that do not fit are this table's fault, not nsteer's
        return row | {"not_built": _first(error)}
    try:
        executor = Local(model, tokenizer=tiny_models.tokenizer(), device="cpu", threads=1)
        model_anatomy = executor.anatomy
        layers = LAYERS if model_anatomy.n_layers > max(LAYERS) else (model_anatomy.n_layers - 1, 0)
        both = {"attn_out": model_anatomy.attention, "mlp_out": model_anatomy.mlp}
        row |= {"sites": {site: sorted(sublayer.paths) for site, sublayer in both.items() if sublayer}}
        row |= {
            "scaling": "returned" if model_anatomy.returned else model_anatomy.scaling,
            "factors": anatomy.factors(model_anatomy),
        }
        row |= {"batches": executor.batching.mates, "batches_because": executor.batching.because}
        row |= {"stays": executor.stays, "stepless": executor.batching.stepless}
        row["capture"] = capture(executor, layers)
        if not executor.batching.stepless:
            row |= steering(executor, layers)
    except (MemoryError, OutOfMemoryError) as error:  # the limit is this table's
        row["not_built"] = _first(error)
    except NsteerError as error:
        row["broken" if str(error).startswith("program ") else "refused"] = str(error)
    except Exception as error:
        row["broken"] = f"{type(error).__name__}: {error}"
    return row


def _first(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def _child(kind: str, gigabytes: float, send: Any) -> None:
    import logging

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), number)
    limit = int(gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    send.send(look(kind))


def apart(kind: str, seconds: float, gigabytes: float) -> dict[str, Any]:
    """`look` in a process of its own, ended after so many seconds; beyond so much address space it gets no memory."""
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(kind, gigabytes, send))
    began = time.monotonic()
    process.start()
    send.close()
    try:
        row = receive.recv() if receive.poll(seconds) else {"family": kind, "not_built": f"takes over {seconds:.0f} s"}
    except EOFError:
        row = {"family": kind, "broken": "its process died"}
    finally:
        process.kill()
        process.join()
    return row | {"seconds": round(time.monotonic() - began, 1), "versions": versions()}


def versions() -> dict[str, str]:
    """What the rows were measured with."""
    from importlib.metadata import version

    return {package: version(package) for package in ("transformers", "torch", "nnsight")}


def kept(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of a file, by family, that were measured with these versions; the last of each."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [row for row in map(json.loads, lines) if row["versions"] == versions()]
    return {row["family"]: row for row in rows}


def rows_of(
    kinds: Sequence[str], done: Mapping[str, dict[str, Any]], path: Path, seconds: float, gigabytes: float
) -> Iterator[dict[str, Any]]:
    """The row of each family: from `done`, or measured and added to the file."""
    for kind in kinds:
        row = done.get(kind) or apart(kind, seconds, gigabytes)
        if kind not in done:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="model types, as in transformers' configs; all where none is named")
    parser.add_argument("--out", type=Path, default=Path("bench/families.jsonl"), help="rows, kept as they come")
    parser.add_argument("--page", type=Path, default=Path("docs/families.md"), help="written where all are asked for")
    parser.add_argument("--again", action="store_true", help="measure what is there too")
    parser.add_argument("--seconds", type=float, default=150.0, help="for one family")
    parser.add_argument("--gigabytes", type=float, default=10.0, help="of address space for one family")
    args = parser.parse_args()
    # before the forks, so that what is long to import is imported once
    import transformers.models.llama.modeling_llama  # noqa: F401

    import nsteer.executors.local  # noqa: F401

    done = {} if args.again else kept(args.out)
    rows = []
    print(families_page.HEAD)
    for row in rows_of(args.families or tiny_models.names(), done, args.out, args.seconds, args.gigabytes):
        rows.append(row)
        print(families_page.line(row), flush=True)
    print(families_page.counts(rows))
    if not args.families:
        args.page.write_text(families_page.page(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
