"""The vLLM executor: rows become requests of an engine, which batches them as they come and go.

The engine is vLLM's own, with nnsight's runner in its workers. Its models are those of transformers over vLLM's kernels
(`model_impl: transformers`), so that one path holds for all families. Before an engine is trusted, it is compared with
the same model in transformers, on this machine's CPU.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import nnsight
import torch
import transformers

from nsteer.errors import EngineError, ExecutionError, ModelError, OutOfMemoryError
from nsteer.executors import each, health
from nsteer.executors.common import quiet
from nsteer.executors.local import failed
from nsteer.executors.vllm import engine, proof, rows
from nsteer.program import anatomy, budget, code, requests
from nsteer.program.form import Batching, Form, Program, Readouts
from nsteer.system import machine

MAX_POSITIONS = 4096
"""Positions that a text may have, where neither the plan nor the model says less."""

SEQUENCES = 256
"""Texts that the engine computes at once, for all of which there is a KV cache on a CPU.

Where there is none the engine preempts a text, and reads it again at once later on, edits and all left out: the text of
a program sees that, and fails; with fewer rows at once it goes through.
"""

RESTARTS = 2
"""How often an engine that died is made again, before the model is given up."""


UNSAID = ("dtype", "trust_remote_code", "use_tqdm_on_load", "revision", "tokenizer_revision")
"""Settings of the engine that say nothing of how it computes, or are said elsewhere."""


class Vllm:
    """One model in one vLLM engine.

    tensor_parallel : GPUs over which its weights are spread
    memory : share of the device's memory that the engine may take
    max_length : positions of the longest text; the model's own, but at most MAX_POSITIONS, when left out
    reference : whether the engine is compared with transformers before it is used; else sites in blocks are not known
    attn_implementation : what transformers is compared with with; the engine has its own
    of_the_engine : what other executors take besides (quantization, an adapter): refused where it is not empty

    Raises ModelError when vLLM is absent, can not serve the model, or gives other numbers than transformers;
    AnatomyError where its stream can not be found, OutOfMemoryError where it does not fit.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        device: str = "auto",
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        threads: int | None = None,
        tensor_parallel: int = 1,
        memory: float = 0.9,
        max_length: int | None = None,
        reference: bool = True,
        **of_the_engine: Any,
    ):
        if asked := [name for name, value in of_the_engine.items() if value]:
            raise ModelError(f"{model!r}: {', '.join(asked)}: not under vLLM; executor: local has it")
        torch.set_num_threads(threads or min(torch.get_num_threads(), machine.cores()))
        self.name, self.dtype = model, dtype
        self.platform = engine.platform(model, device)
        settings = {"revision": revision, "trust_remote_code": trust_remote_code}
        # transformers first: vLLM changes what a later load finds
        how = proof.known if reference else proof.outlined
        known = how(model, dtype, attn_implementation, settings)
        gc.collect()
        self.tokenizer, self.eos, self.pad, self.parameters = known.tokenizer, known.eos, known.pad, known.parameters
        self.batching = Batching()
        self.health = known.health and {**known.health, **health.of_batches(self.batching)}
        self.anatomy = engine.served(known.anatomy, known.prefix)
        own = getattr(known.config.get_text_config(), "max_position_embeddings", None) or MAX_POSITIONS
        self.max_length = min(max_length or min(own, MAX_POSITIONS), own)
        self.overhead = budget.CEILINGS["cuda"]  # nothing is padded here: a larger batch is always better
        self.difference: dict[str, float] = {}
        self._ran = self._died = 0
        self._why = ""
        self._model: Any = None
        shape = budget.shape(known.config.to_dict(), known.anatomy.n_layers, known.anatomy.d_model)
        self._asked = {
            "dtype": dtype,
            "model_impl": "transformers",
            "tensor_parallel_size": tensor_parallel,
            "gpu_memory_utilization": memory,
            "max_model_len": self.max_length,
            "max_num_seqs": SEQUENCES,
            "generation_config": "vllm",  # nothing of the model's own settings
            "trust_remote_code": trust_remote_code,
            "use_tqdm_on_load": False,
            **({"revision": revision, "tokenizer_revision": revision} if revision else {}),
            **({"kv_cache_memory_bytes": self._cache(shape, memory)} if self.platform == "cpu" else {}),
        }
        try:
            self._prove(known)
        except BaseException:
            self.close()
            raise

    def __repr__(self) -> str:
        return f"Vllm({self.name!r}, {self.platform})"

    def code(self, program: Program) -> str:
        return requests.write(program.form, self.anatomy)

    def run(self, program: Program) -> Readouts:
        """The readouts of a program. Raises EngineError with what failed in it, or where the engine died or is too
        small; OutOfMemoryError where memory ran out."""
        text = self.code(program)
        self._fits(program)
        model = self._engine()
        with quiet(), engine.settings(self.platform):
            try:
                return rows.gathered(program, self._saved(model, text, program), self.anatomy.d_model)
            except Exception as error:
                failure = failed(program, code.digest(text), error, "failed under vLLM")
                if engine.broken(model, error):
                    failure = self._lost(error)
                elif not isinstance(failure, OutOfMemoryError):
                    failure = EngineError(str(failure))
        raise failure  # here, where the traceback with the program's tensors is gone

    def _saved(self, model: Any, text: str, program: Program) -> dict[str, list[Any]]:
        """What the text returns, a list of one value a row by name. Rows of equal tokens take turns where a block
        knows its row by its tokens."""
        self._ran += 1
        run = code.load(text)
        row_inputs = rows.rows_of_program(program, self.anatomy, self._ran)
        by_name: dict[str, list[Any]] = {}
        for places in rows.turns(row_inputs, apart=requests.installed(program.form)):
            for name, values in run(model, [row_inputs[i] for i in places]).items():
                kept = by_name.setdefault(name, [None] * len(row_inputs))
                for i, value in zip(places, values if isinstance(values, list) else [values], strict=True):
                    kept[i] = value
        return by_name

    def map(self, programs: Iterable[Program]) -> Iterator[tuple[Program, Readouts | ExecutionError]]:
        return each(self.run, programs)

    def settle(self) -> None:
        """Nothing to forget: no request outlives a call."""

    def afford(self, form: Form, rows: int) -> int:
        """As many as there may be: the engine takes in what fits its memory, and lets the others wait."""
        return max(budget.CEILINGS["cuda"], rows * self.max_length)

    def describe(self) -> dict[str, Any]:
        told = {name: value for name, value in self._asked.items() if name not in UNSAID}
        return {
            "executor": "vllm",
            "dtype": self.dtype,
            "device": self.platform,
            "attn_implementation": "vllm",
            "parameters": self.parameters,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "nnsight": nnsight.__version__,
            "health": self.health,
            "warnings": health.warnings(self.health, self.dtype) if self.health else [],
            "settings": {
                "vllm": engine.version(),
                **told,
                "difference_from_transformers": self.difference or "not measured: reference: false",
                "site_factors": anatomy.factors(self.anatomy),
            },
        }

    def close(self) -> None:
        """Ends the engine."""
        if self._model is not None:
            engine.end(self._model)
            self._model = None
        gc.collect()

    # ---- the engine -------------------------------------------------------------------------------------

    def _engine(self) -> Any:
        """The engine, made again where it died. Raises EngineError where it died too often, and what `built` raises."""
        if self._model is None:
            if self._died > RESTARTS:
                raise EngineError(f"{self.name!r}: vLLM's engine died {self._died} times, the last time of {self._why}")
            self._model = engine.built(self.name, self.platform, self._asked)
        return self._model

    def _lost(self, error: Exception) -> ExecutionError:
        """Lets go of an engine that is of no more use. What to say of the program that it was lost with."""
        self.close()
        self._why = engine.words(error)
        if machine.out_of_memory(error):
            return OutOfMemoryError(f"{self.name!r}: vLLM's engine ran out of memory: {self._why}")
        self._died += 1
        return EngineError(f"{self.name!r}: vLLM's engine died: {self._why}. What was committed is kept")

    def _cache(self, shape: budget.Shape, memory: float) -> int:
        """Bytes of the KV cache on a CPU: what SEQUENCES of the longest texts need, but no more than may be had."""
        heads = 2  # may be widened by as much to a size that the kernel has
        width = getattr(torch, self.dtype).itemsize
        wanted = SEQUENCES * self.max_length * 2 * shape.n_layers * shape.kv * heads * width
        return int(min(machine.free_memory() * memory / 2, wanted))

    def _fits(self, program: Program) -> None:
        new = program.form.decoding.max_new_tokens if program.form.decoding else 1  # the engine writes one at least
        longest = int(program.arrays["attention_mask"].sum(1).max())
        if longest + new > self.max_length:
            raise EngineError(
                f"a text of {longest} tokens and {new} new ones: the engine was made for {self.max_length} positions: "
                "set vllm.max_length"
            )

    def _prove(self, known: proof.Known) -> None:
        """Holds the engine against transformers. Raises ModelError where they differ by more than rounding."""
        readouts = [self.run(program) for program in known.programs]
        if not known.readouts:
            proof.continued(readouts[0], self.anatomy.n_layers)
            self.anatomy = replace(self.anatomy, attention=None, mlp=None)
            return
        self.difference = proof.differences(readouts, known.readouts)
        worst, far = max(self.difference.items(), key=lambda item: item[1])
        if not far <= proof.allowed(self.dtype):
            raise ModelError(  # no AnatomyError: those last, and another executor reads the same model rightly
                f"{self.name!r}: {worst} under vLLM differs by {far:.2g} of its size from that of transformers; "
                f"rounding would be {proof.allowed(self.dtype):g} at most. Take executor: local for this model"
            )
