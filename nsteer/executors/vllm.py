"""The vLLM executor: rows become requests of an engine, which batches them as they come and go.

The engine is vLLM's own, with nnsight's runner in its workers; its models are those of transformers, served by vLLM's
kernels (`model_impl: transformers`), so that one path holds for all families. Before an engine is trusted, it is held
against the same model in transformers, on this machine's CPU.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import nnsight
import numpy as np
import torch
import transformers

from nsteer.errors import AnatomyError, EngineError, ExecutionError, ModelError, NsteerError, OutOfMemoryError, SiteError
from nsteer.executors import batching, each, skeleton
from nsteer.executors.common import ends, quiet, readouts, tensors
from nsteer.executors.local import Local, failed
from nsteer.program import anatomy, budget, requests, source
from nsteer.program.form import (
    SITES, Batching, Decoding, EditSite, Form, Program, Readouts, ReadSite, Row, RowEdit, assemble, part,
)
from nsteer.system import machine

MOST = 4096
"""Positions that a text may have, where neither the plan nor the model says less."""

SEQUENCES = 256
"""Texts that the engine has in hand at once, for which there is a KV cache on a CPU."""

RESTARTS = 2
"""How often an engine that died is made anew, before the model is given up."""

CLOSE = 1e-4
"""Relative difference of a float32 stream from that of transformers, up to which it is rounding."""

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""Settings of vLLM that are not its arguments, where the user has none of their own."""


class Vllm:
    """One model in one vLLM engine.

    tensor_parallel : GPUs over which its weights are spread
    memory : share of the device's memory that the engine may take
    max_length : positions of the longest text; the model's own, but at most MOST, when left out
    reference : whether the engine is held against transformers before it is used
    attn_implementation, quantization : vLLM has its own; taken, so that all executors are made alike

    Raises ModelError when vLLM is absent or can not serve the model, AnatomyError where its streams are not those of
    transformers.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        device: str = "auto",
        trust_remote_code: bool = False,
        threads: int | None = None,
        tensor_parallel: int = 1,
        memory: float = 0.9,
        max_length: int | None = None,
        reference: bool = True,
        **of_the_engine: Any,
    ):
        torch.set_num_threads(threads or min(torch.get_num_threads(), machine.cores()))
        self.name, self.dtype, self.reference = model, dtype, reference
        settings = {"revision": revision, "trust_remote_code": trust_remote_code}
        with _settings():
            self.platform = _platform(model, device)
        # transformers first: vLLM changes what a later load of it finds
        local = Local(model, dtype=dtype, device="cpu", threads=threads, **settings) if reference else None
        if local is not None:
            known, self.tokenizer, config = local.anatomy, local.tokenizer, local.module.config
            self.eos, self.pad, self.parameters = local.eos, local.pad, local.describe()["parameters"]
        else:
            bare, self.tokenizer = skeleton.build(model, None, None, settings)
            known, config = skeleton.outline(bare), bare._module.config
            self.eos, self.pad = ends(bare._module, self.tokenizer)
            self.parameters = sum(p.numel() for p in bare._module.parameters())
        proof = _proof(known, self.pad)
        expected = [local.run(one) for one in proof] if local is not None else None
        prefix = type(local.module if local is not None else bare._module).base_model_prefix
        if local is not None:
            local.close()
        local = bare = None
        gc.collect()
        self.anatomy = _served(known, prefix)
        self.shape = budget.shape(config.to_dict(), known.n_layers, known.d_model)
        own = getattr(config.get_text_config(), "max_position_embeddings", None) or MOST
        self.max_length = min(max_length or min(own, MOST), own)
        self.overhead = budget.CEILINGS["cuda"]  # nothing is padded here: a larger batch is always better
        self.batching = Batching()
        self._ran = 0
        self._restarts = 0
        self._model: Any = None
        self._asked = {
            "dtype": dtype,
            "model_impl": "transformers",
            "tensor_parallel_size": tensor_parallel,
            "gpu_memory_utilization": memory,
            "max_model_len": self.max_length,
            "generation_config": "vllm",  # nothing of the model's own settings
            "trust_remote_code": trust_remote_code,
            **({"revision": revision, "tokenizer_revision": revision} if revision else {}),
            **({"kv_cache_memory_bytes": self._cache(memory)} if self.platform == "cpu" else {}),
        }
        try:
            self._check(proof, expected)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Vllm({self.name!r}, {self.platform})"

    def source(self, program: Program) -> str:
        return requests.write(program.form, self.anatomy)

    def run(self, program: Program) -> Readouts:
        """The readouts of a program. Raises ExecutionError with what failed in it, OutOfMemoryError where it does not
        fit, EngineError where the engine is gone for good."""
        text = self.source(program)
        self._fits(program)
        model = self._engine()
        with quiet(), _settings():
            try:
                return gathered(program, self._found(model, text, program), self.anatomy)
            except Exception as error:
                failure = failed(program, source.digest(text), error)
                if self._broken(error):
                    failure = self._lost(error)
        raise failure  # here, where the traceback with the program's tensors is gone

    def _found(self, model: Any, text: str, program: Program) -> dict[str, list[Any]]:
        """What the text returns, a list of one value a row by name. Rows of equal tokens are told apart by turns."""
        self._ran += 1
        run = source.load(text)
        rows = [request(program, i, self.anatomy, self._ran) for i in range(count(program))]
        turns = by_turn([tuple(row["tokens"]) for row in rows]) if _reads(program.form) else [list(range(len(rows)))]
        found: dict[str, list[Any]] = {}
        for places in turns:
            for name, values in run(model, [rows[i] for i in places]).items():
                values = values if isinstance(values, list) else [values]
                kept = found.setdefault(name, [None] * len(rows))
                for i, value in zip(places, values, strict=True):
                    kept[i] = value
        return found

    def map(self, programs: Iterable[Program]) -> Iterator[tuple[Program, Readouts | ExecutionError]]:
        return each(self.run, programs)

    def settle(self) -> None:
        """Nothing to forget: no request outlives a call."""

    def afford(self, form: Form, rows: int) -> int:
        """As many as there may be: the engine takes in what fits its memory, and lets the others wait."""
        return max(budget.CEILINGS["cuda"], rows * self.max_length)

    def describe(self) -> dict[str, Any]:
        import vllm

        return {
            "executor": "vllm",
            "dtype": self.dtype,
            "device": self.platform,
            "attn_implementation": "vllm",
            "parameters": self.parameters,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "nnsight": nnsight.__version__,
            "settings": {
                "vllm": vllm.__version__,
                **{name: value for name, value in self._asked.items() if name not in ("dtype", "trust_remote_code")},
                "held_against_transformers": self.difference,
                "sampled_by": "the plan's numbers",
                "site_factors": anatomy.factors(self.anatomy),
            },
        }

    def close(self) -> None:
        """Ends the engine, and gives back what vLLM changed in this process."""
        if self._model is not None:
            with suppress(Exception), _settings():
                self._model.vllm_entrypoint.llm_engine.engine_core.shutdown()
            with suppress(Exception):
                type(self._model)._cleanup_distributed()
            self._model = None
        gc.collect()

    # ---- the engine -------------------------------------------------------------------------------------

    def _engine(self) -> Any:
        """The engine, made anew where it died. Raises EngineError where it died too often, ModelError."""
        if self._model is None:
            if self._restarts > RESTARTS:
                raise EngineError(f"{self.name!r}: vLLM's engine died {self._restarts} times: {self._why}")
            self._model = built(self.name, self.platform, self._asked)
        return self._model

    def _broken(self, error: Exception) -> bool:
        """Whether an error ended the engine, not one request's block: it is dead, or still holds requests."""
        try:
            return "EngineDead" in type(error).__name__ or self._model.vllm_entrypoint.llm_engine.has_unfinished_requests()
        except Exception:  # it is as dead as can be
            return True

    def _lost(self, error: Exception) -> ExecutionError:
        """Lets go of an engine that is of no more use. What to say of the program that it was lost with."""
        self.close()
        words = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
        if machine.out_of_memory(error):
            return OutOfMemoryError(f"vLLM's engine ran out of memory ({words}): lower vllm.max_length or vllm.memory")
        self._restarts, self._why = self._restarts + 1, words
        return EngineError(f"{self.name!r}: vLLM's engine died ({words}); what was committed is kept")

    def _cache(self, memory: float) -> int:
        """Bytes of the KV cache on a CPU: what SEQUENCES of the longest texts need, but no more than may be had."""
        heads = 2  # heads may be widened to the next size that the kernel has
        width = getattr(torch, self.dtype).itemsize
        wanted = SEQUENCES * self.max_length * 2 * self.shape.n_layers * self.shape.kv * heads * width
        return int(min(machine.free_memory() * memory / 2, wanted))

    def _fits(self, program: Program) -> None:
        new = program.form.decoding.max_new_tokens if program.form.decoding else 1  # the engine writes one at least
        longest = int(program.arrays["attention_mask"].sum(1).max())
        if longest + new > self.max_length:
            raise ExecutionError(
                f"a text of {longest} tokens and {new} new ones: the engine was made for {self.max_length}: "
                "set vllm.max_length"
            )

    def _check(self, proof: list[Program], expected: list[Readouts] | None) -> None:
        """Holds the engine against transformers. Raises AnatomyError where they differ by more than rounding."""
        self.difference = -1.0
        found = [self.run(program) for program in proof]
        if expected is None:
            sites = ("resid_pre", "resid_post")
            continued(found[0].streams, self.anatomy.n_layers, sites)
            self.anatomy = replace(self.anatomy, attention=None, mlp=None)
            return
        allowed = batching.ROUNDING.get(getattr(torch, self.dtype), CLOSE)
        apart = {what: far for mine, its in zip(found, expected, strict=True) for what, far in differences(mine, its)}
        worst = max(apart, key=lambda what: apart[what])
        self.difference = float(f"{apart[worst]:.2g}")
        if not apart[worst] <= allowed:
            raise AnatomyError(
                f"{self.name!r}: {worst} under vLLM differs from transformers by {apart[worst]:.2g} of its size, which "
                f"rounding ({allowed:g}) does not explain: run it with executor: local"
            )


def built(name: str, platform: str, asked: dict[str, Any]) -> Any:
    """An engine with nnsight's runner. Raises ModelError, OutOfMemoryError where it does not fit."""
    threads = torch.set_num_threads
    try:
        with quiet(), _settings():
            made = _class(platform)(name, dispatch=True, **asked)
    except Exception as error:  # vLLM raises a dozen kinds for what it can not serve; their words say why
        words = " ".join(str(error).split())[:400]
        if machine.out_of_memory(error) or "KV cache" in words or "memory" in words.lower():
            raise OutOfMemoryError(f"vLLM has no room for {name!r}: {words}: lower vllm.max_length, vllm.memory") from None
        raise ModelError(f"vLLM can not serve {name!r}: {type(error).__name__}: {words}") from None
    finally:
        torch.set_num_threads = threads  # the CPU's worker puts in its place what does nothing
    entry = made.vllm_entrypoint
    generate = entry.generate
    entry.generate = lambda *given, **named: generate(*given, **named, use_tqdm=False)
    return made


def _class(platform: str) -> Any:
    from nnsight.modeling.vllm import VLLM

    if platform != "cpu":
        return VLLM
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    from nsteer.executors import vllm_worker

    _set_torch_accelerator_to_noop()
    return type("OnCPU", (VLLM,), {"_WORKER_CLS": f"{vllm_worker.__name__}.Worker"})


def _platform(name: str, device: str) -> str:
    """The device that the installed vLLM is built for: `cuda`, `cpu`. Raises ModelError."""
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ModelError(f"{name!r} can not be loaded: vLLM is not here ({error}): pip install 'nsteer[vllm]'") from None
    found = str(current_platform.device_type)
    if device not in ("auto", found):
        raise ModelError(
            f"{name!r}: device {device!r}, and the vLLM that is installed runs on {found}: device: auto "
            "(CUDA_VISIBLE_DEVICES chooses among GPUs)"
        )
    if found == "cpu":
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process
    return found


@contextmanager
def _settings() -> Iterator[None]:
    """What vLLM is to find while it works: its environment, and on a CPU no compiler, which takes 25 s at first."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch._dynamo

    with torch._dynamo.config.patch(disable=not torch.cuda.is_available()):
        yield


def _served(found: anatomy.Anatomy, prefix: str) -> anatomy.Anatomy:
    """An anatomy with vLLM's paths: what transformers calls by its base model's name is `model` there; the logits are
    those that the engine gives, whatever becomes of the head's output on the way."""

    def path(own: str) -> str:
        return f"model.{own.removeprefix(f'{prefix}.')}"

    lens = found.lens or (f"under vLLM what {found.projection!r} makes of the stream is not known" * bool(found.projection))
    places = {"blocks": path(found.blocks), "embedding": path(found.embedding), "head": "lm_head"}
    return replace(found, **places, scaling=None, returned=False, projection="", lens=lens)


# ---- programs -------------------------------------------------------------------------------------------


def _reads(form: Form) -> bool:
    """Whether a block on the engine reads requests by their tokens: see `requests`."""
    return not (form.edits or form.decoding or form.promote)


def count(program: Program) -> int:
    """How many requests a program is. A logit lens is one, whose vectors are all rows."""
    return 1 if program.form.promote else program.rows


def request(program: Program, i: int, found: anatomy.Anatomy, number: int) -> dict[str, Any]:
    """What the text of a program expects of its row `i`. A row's unedited twin is another request."""
    one = program
    if not program.form.promote:
        arrays = {name: array for name, array in program.arrays.items() if name != "twin"}
        one = part(Program(replace(program.form, against=False), program.keys, arrays), slice(i, i + 1))
    ids = one.arrays["input_ids"][0].tolist()
    return {**tensors(one, found), "tokens": ids, "program": number}


def by_turn(texts: list[tuple[int, ...]]) -> list[list[int]]:
    """The places of texts, so that no two in a turn are equal."""
    seen: dict[tuple[int, ...], int] = {}
    turns: list[list[int]] = []
    for i, text in enumerate(texts):
        turn = seen[text] = seen.get(text, -1) + 1
        turns += [[]] * (turn == len(turns)) and [[]]
        turns[turn].append(i)
    return turns


ROW_SECOND = ("pooled", "norms", "receipts", "ends", "written")
"""What has its row as the second axis, as texts give it."""


def gathered(program: Program, found: dict[str, list[Any]], known: anatomy.Anatomy) -> Readouts:
    """What requests gave, as readouts. Raises ExecutionError for a text that ended before its end."""
    mask = torch.from_numpy(program.arrays["attention_mask"].astype(bool))
    made: dict[str, Any] = {}
    for name, values in found.items():
        if name == "streams":
            made[name] = torch.full((len(values[0]), *mask.shape, known.d_model), torch.nan)
            for i, value in enumerate(values):
                made[name][:, i, mask[i]] = value[:, 0].float()
        elif name == "tokens":
            new = torch.nn.utils.rnn.pad_sequence([value.flatten() for value in values], True, -1)
            made[name] = torch.cat([torch.from_numpy(program.arrays["input_ids"]), new], 1)
        else:
            made[name] = torch.cat(values, 1 if name in ROW_SECOND else 0)
    back = readouts(program, made)
    if back.tokens is not None and any(-1 in row for row in back.tokens):
        raise ExecutionError("a row ended that had neither its end of text nor all its tokens")
    return back


# ---- the proof ------------------------------------------------------------------------------------------

TEXT = 7
"""Tokens of the text by which an engine is proved."""


def _proof(known: anatomy.Anatomy, pad: int) -> list[Program]:
    """Programs that say whether two executors agree: every stream of a text and its probability; a strong edit."""
    ids = tuple(token for token in range(known.vocab // 2, known.vocab) if token != pad)[:TEXT]
    even = np.full(len(ids), 1 / len(ids), np.float32)
    sites = [site for site in SITES if not anatomy.unknown(known, (site,))]
    reads = tuple(ReadSite(layer, "text", "tokens", site) for layer in range(known.n_layers) for site in sites)
    vector = np.random.default_rng(0).standard_normal(known.d_model).astype(np.float32)
    edit = RowEdit(vector / np.linalg.norm(vector), 1.0, np.ones(len(ids), bool), True, even)
    steer = Form(edits=(EditSite(known.n_layers // 2, "add", live=True),), decoding=Decoding(2, (), pad), top=1)
    return [
        assemble(Form(reads=reads, score=True), [Row("text", ids, {"text": even, "score": even})]),
        assemble(steer, [Row("edit", ids, {}, (edit,))]),
    ]


def differences(mine: Readouts, its: Readouts) -> Iterator[tuple[str, float]]:
    """What two readouts of a proof have in common, and by how much of its size it differs."""
    if its.streams is not None and mine.streams is not None:
        for read, (a, b) in enumerate(zip(mine.streams[0], its.streams[0], strict=True)):
            yield f"stream {read}", float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-12))
    for name in ("score", "receipts", "top_logprobs"):
        a, b = getattr(mine, name), getattr(its, name)
        if b is not None:
            yield name, float(np.abs(a - b).max() / max(np.abs(b).max(), 1.0))


def continued(streams: list[np.ndarray] | None, n_layers: int, sites: tuple[str, ...]) -> None:
    """Raises AnatomyError where the output of a block is not what the next one reads, or is no number."""
