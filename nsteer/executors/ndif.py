"""The remote executor: programs become jobs on an NDIF server, several in flight; only reduced tensors return.

No weights are loaded here: the model is built on the meta device, for its module paths. What travels is the text
that `nsteer show` prints, its tensors, and the paths; see payload.py for the bytes and wire.py for the server.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import nnsight
import torch
import transformers

from nsteer.errors import (
    ExecutionError,
    OutOfMemoryError,
    RemoteAccessError,
    RemoteCancelError,
    RemoteDeadlineError,
    RemoteLostError,
    RemoteModelError,
    RemoteVersionError,
    SiteError,
)
from nsteer.executors import answers, skeleton
from nsteer.executors.common import ends, program_digest, readouts, tensors, with_pad
from nsteer.executors.journal import Journal, NoJournal
from nsteer.executors.payload import compress, pack
from nsteer.executors.wire import Status, Wire, failure
from nsteer.program import anatomy, budget, code, sublayers
from nsteer.program.form import SITES, Batching, Form, Program, Readouts, ReadSite, Row, assemble, place, size

POLL = (0.05, 2.0)
"""Seconds between two questions after a job: at first, and at most."""

ENDS_ALL = (
    RemoteAccessError,
    RemoteCancelError,
    RemoteDeadlineError,
    RemoteLostError,
    RemoteModelError,
    RemoteVersionError,
)
"""What every other job of this model would end in as well."""

UNKNOWN = 30.0
"""Seconds a server may not know a job it took, before we hold it to be lost and send it again."""


@dataclass(frozen=True)
class Packet:
    """Programs of one text that travel together. `job`: the one that holds them already, and their places in it."""

    text: str
    programs: tuple[Program, ...]
    digests: tuple[str, ...]
    job: str | None = None
    places: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        return sum(map(size, self.programs))


@dataclass
class Job:
    """A packet on the server. Times are of the monotonic clock."""

    packet: Packet
    until: float
    id: str = ""
    blob: bytes = b""  # kept, to send it again
    tries: int = 0
    known: float = 0.0  # when the server last knew it
    said: Status | None = None
    due: float = 0.0
    delay: float = field(default=POLL[0])


class Ndif:
    """One model on one NDIF server.

    host : the server's address; nnsight's own configuration (NDIF_HOST) where it is not given
    api_key : as a rule not given: NDIF_API_KEY, or nnsight's own configuration
    in_flight : how many jobs wait on the server at once
    together : how many programs may share a job, `tokens` of prompt and continuation in all
    deadline : seconds from a job's submission to its result, the queue included
    retries : how often to try again what may pass: a lost connection, 5xx, a replica that died, a lost job
    journal : keeps the ids of jobs in flight; a program found in it is fetched, not sent again (see `settle`)
    note : called with (job id, status, words) whenever there is news
    of_the_server : dtype, device, threads: the server's choice; taken, so that all executors are made alike

    Raises ModelError when the model's config or tokenizer can not be read, AnatomyError when its stream can not be
    found.
    """

    def __init__(
        self,
        model: str,
        *,
        revision: str | None = None,
        host: str | None = None,
        api_key: str | None = None,
        tokenizer: Any = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        in_flight: int = 4,
        together: int = 16,
        tokens: int = 16384,
        deadline: float = 1800.0,
        retries: int = 8,
        journal: Journal | None = None,
        note: Callable[[str, str, str], None] | None = None,
        **of_the_server: Any,
    ):
        self.wire = Wire(host, api_key, retries=retries)
        self.in_flight, self.together, self.tokens = in_flight, together, tokens
        self.deadline, self.retries = deadline, retries
        self.journal: Journal = NoJournal() if journal is None else journal
        self.note = note or (lambda job, status, words: None)
        self.model_name = model
        settings = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.model, self.tokenizer = skeleton.build(model, tokenizer, attn_implementation, settings)
        module = self.model._module
        self.anatomy = skeleton.outline(self.model)
        self.eos, self.pad = ends(module, self.tokenizer)
        with_pad(self.tokenizer, self.pad)
        self.overhead = budget.OVERHEADS["cuda"]
        self.batching = Batching()
        self.model_key = skeleton.model_key(self.model, model, revision)
        self.jobs = 0  # submitted so far
        self._handed: list[str] = []
        self._proved: set[int] = set()  # layers whose sublayers were seen to add up

    def __repr__(self) -> str:
        return f"Ndif({self.model_name!r}, host={self.wire.host!r})"

    def code(self, program: Program) -> str:
        return code.write(program.form, self.anatomy)

    def run(self, program: Program) -> Readouts:
        """The readouts of a program. Raises RemoteError."""
        [(_, answer)] = self.map([program])
        if isinstance(answer, ExecutionError):
            raise answer
        return answer

    def map(self, programs: Iterable[Program]) -> Iterator[tuple[Program, Readouts | ExecutionError]]:
        """Each program with its readouts, or the error it failed with, as jobs come back.

        Programs of a job that failed are sent again, each alone. Raises RemoteError for what would end every job
        alike: a server that is gone or refuses us. After that, or when the iterator is dropped, the other jobs go
        on; the journal knows them.
        """
        yield from self._sent(self._proving(programs))

    def _proving(self, programs: Iterable[Program]) -> Iterator[Program]:
        """The programs; before the first at a sublayer goes one that shows that all adds up there. Raises SiteError."""
        for program in programs:
            places = {*map(place, program.form.reads), *map(place, program.form.edits)}
            layers = {layer for layer, at in places if SITES[at] in ("attn_out", "mlp_out")} - self._proved
            if layers and not self.anatomy.proved and not anatomy.unknown(self.anatomy, program.form.sites):
                self._prove(sorted(layers))
                self._proved |= layers
            yield program

    def _prove(self, layers: list[int]) -> None:
        reads = tuple(ReadSite(layer, "none", "tokens", site) for layer in layers for site in SITES)
        tokens = tuple(range(min(4, self.anatomy.vocab)))
        [(_, answer)] = self._sent([assemble(Form(reads=reads), [Row("proof", tokens)])])
        if isinstance(answer, ExecutionError):
            raise answer
        assert answer.streams is not None
        streams = torch.from_numpy(answer.streams[0]).unflatten(0, (len(layers), len(SITES)))
        for layer, states in zip(layers, streams, strict=True):
            before, attention, mlp, after = states
            ratios = sublayers.factors(before, attention, mlp, anatomy.narrowed(after))
            if ratios is None:
                taken = [
                    sublayer.at(layer)[0]
                    for sublayer in (self.anatomy.attention, self.anatomy.mlp)
                    if sublayer is not None
                ]
                self.anatomy = replace(self.anatomy, attention=None, mlp=None)
                raise SiteError(
                    f"layer {layer}: what {' and '.join(map(repr, taken))} give, which are taken by name where there "
                    "are no weights, does not make the block's output with its input: attn_out and mlp_out are not "
                    "known. Take resid_pre or resid_post, or run where the weights are: there they are found by trial"
                )

    def _sent(self, programs: Iterable[Program]) -> Iterator[tuple[Program, Readouts | ExecutionError]]:
        packets = self._packets(programs)
        flying: deque[Job] = deque()
        more = True
        while more or flying:
            while more and len(flying) < self.in_flight:
                packet = next(packets, None)
                if packet is None:
                    more = False
                else:
                    flying.append(self._start(packet))
            if flying:
                job, results = self._next(flying)
                flying.remove(job)
                if isinstance(results, ExecutionError):
                    alone = [_alone(job.packet, i) for i in range(len(job.packet.programs))]
                    if len(alone) > 1:
                        packets, more = chain(alone, packets), True
                    else:
                        yield job.packet.programs[0], results
                    continue
                self._handed.append(job.id)
                for program, saved in zip(job.packet.programs, results, strict=True):
                    yield program, readouts(program, saved)

    def settle(self) -> None:
        """Forgets the jobs whose results were handed out: call it once those are committed."""
        for job in self._handed:
            self.journal.forget(job)
        self._handed.clear()

    def cancel(self) -> None:
        """Stops waiting, from any thread: `map` raises RemoteCancelError. The server has no way to stop a job."""
        self.wire.cancelled.set()

    def afford(self, form: Form, rows: int) -> int:
        """What a server with no memory to spare takes: it does not tell what it has."""
        return budget.CEILINGS["cpu"]

    def describe(self) -> dict[str, Any]:
        config = self.model._module.config
        return {
            "executor": "ndif",
            "host": self.wire.host,
            "model_key": self.model_key,
            "dtype": "",  # the server's own choice, and it does not tell
            "device": "remote",
            "attn_implementation": getattr(config, "_attn_implementation", None) or "",
            "parameters": sum(p.numel() for p in self.model._module.parameters()),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "nnsight": nnsight.__version__,
        }

    def close(self) -> None:
        self.wire.close()

    def _packets(self, programs: Iterable[Program]) -> Iterator[Packet]:
        """Programs in their order: those of one text, or one job in the journal, gathered while they are small."""
        held: Packet | None = None
        for program in programs:
            text = self.code(program)
            digest = program_digest(text, program, f"{self.wire.host} {self.model_key}")
            job, place = self.journal.find(digest) or (None, 0)
            packet = Packet(text, (program,), (digest,), job, (place,) if job else ())
            if held is not None and self._join(held, packet):
                held = _joined(held, packet)
                continue
            if held is not None:
                yield held
            held = packet
        if held is not None:
            yield held

    def _join(self, held: Packet, packet: Packet) -> bool:
        if held.text != packet.text or held.job != packet.job:
            return False
        if held.job:  # its results come in one piece anyway
            return True
        return len(held.programs) < self.together and held.size + packet.size <= self.tokens

    def _start(self, packet: Packet) -> Job:
        job = Job(packet, until=time.monotonic() + self.deadline)
        if packet.job:
            job.id, job.known = packet.job, time.monotonic()
            self.note(job.id, "RESUMED", f"{len(packet.programs)} programs were sent before: waiting for their job")
        else:
            self._send(job)
        return job

    def _send(self, job: Job) -> None:
        if not job.blob:
            batches = [tensors(program, self.anatomy) for program in job.packet.programs]
            job.blob = self._packed(job.packet.text, batches)
        envelope = {"model_key": self.model_key, "compress": True, "env": self.model._remoteable_get_env()}
        job.id = self.wire.submit(job.blob, envelope, job.until, lambda words: self.note("", "WAITING", words))
        job.known, job.said, job.delay = time.monotonic(), None, POLL[0]
        job.due = job.known + job.delay
        self.jobs += 1
        self.journal.record(job.id, list(job.packet.digests))
        self.note(job.id, "RECEIVED", f"{len(job.packet.programs)} programs, {len(job.blob)} bytes")

    def _packed(self, text: str, batches: list[dict[str, Any]]) -> bytes:
        try:
            return compress(pack(self.model, text, batches))
        except Exception as error:  # whatever nnsight, torch or pickle raise for what can not travel
            words = f"{type(error).__name__}: {error}"
            raise ExecutionError(f"program {code.digest(text)} can not be packed: {words}") from error

    def travels(self, program: Program) -> int:
        """Packs a program and loads it here as strictly as a server would, without running it or sending anything.

        Gives the size of what would travel, in bytes. Raises ExecutionError with what a server would refuse.
        """
        from nsteer.executors.rehearse import travels

        return travels(self.model, self.code(program), [tensors(program, self.anatomy)])

    def _next(self, flying: deque[Job]) -> tuple[Job, list[dict[str, Any]] | ExecutionError]:
        """The first job to end, and what its programs returned, or why it failed."""
        while True:
            job = min(flying, key=lambda packet: packet.due)
            self.wire.pause(job.due - time.monotonic())
            try:
                results = self._look(job)
            except ENDS_ALL:
                raise
            except ExecutionError as error:
                return job, error
            if results is not None:
                return job, results

    def _look(self, job: Job) -> list[dict[str, Any]] | None:
        """Asks after one job. Gives its results if it has completed. Raises RemoteError if it will not."""
        status = self.wire.status(job.id, job.until, lambda words: self.note(job.id, "WAITING", words))
        now = time.monotonic()
        if status is None:
            if now - job.known > UNKNOWN:
                self._resend(job, "the server does not know the job any more")
        else:
            job.known = now
            if status != job.said:
                self.note(job.id, status.name, status.description if status.name != "ERROR" else "")
                job.said, job.delay = status, POLL[0]
        if status is not None and status.name == "COMPLETED":
            limit = answers.max_bytes(job.packet.programs, self.anatomy.d_model)
            content = self.wire.fetch(
                status.result or "", limit, job.until, lambda words: self.note(job.id, "WAITING", words)
            )
            if content is not None:
                self.note(job.id, "FETCHED", f"{len(content)} bytes")
                return self._opened(content, job)
            self._resend(job, "the server keeps the result no longer")
        elif status is not None and status.name == "ERROR":
            self._failed(job, status)
        if time.monotonic() > job.until:
            self.journal.forget(job.id)
            said = f"its last word was {job.said.name}" if job.said else "it never said anything of it"
            raise RemoteDeadlineError(
                f"{self.wire.host} gave no result of job {job.id} within {self.deadline:g} s ({said}). It may be busy, "
                "or the block may hang. Run the plan again to go on: what was committed is kept."
            )
        job.delay = min(job.delay * 1.5, POLL[1])
        job.due = time.monotonic() + job.delay
        return None

    def _opened(self, content: bytes, job: Job) -> list[dict[str, Any]]:
        """The results of a job's own programs, in their order. Raises RemoteVersionError where they can not be that."""
        programs = job.packet.programs
        width, vocab = self.anatomy.d_model, self.anatomy.vocab
        try:
            results = answers.unpack(content, answers.max_bytes(programs, width)).get("results")
            places = job.packet.places or range(len(programs))
            if not isinstance(results, list) or len(results) <= max(places):
                raise ValueError(f"it holds no results of {max(places) + 1} programs")
            for program, at in zip(programs, places, strict=True):
                answers.check(results[at], program, width, vocab)
            return [results[at] for at in places]
        except ValueError as error:
            self.journal.forget(job.id)
            words = self.wire.clean(str(error))
            raise RemoteVersionError(
                f"{self.wire.host}: the result of job {job.id} is not what its programs return: {words}"
            ) from None

    def _failed(self, job: Job, status: Status) -> None:
        if status.transient:
            self._resend(job, status.description)
            return
        self.journal.forget(job.id)
        if "OutOfMemoryError" in status.description:
            last = status.description.strip().splitlines()[-1]
            raise OutOfMemoryError(
                f"{self.wire.host} ran out of memory: lower batch.max_tokens_in_flight or batch.rows ({last})"
            )
        raise failure(status, self.wire.host, self.model_name, code.digest(job.packet.text))

    def _resend(self, job: Job, reason: str) -> None:
        """Sends a job again that the server lost. Raises RemoteLostError when that was done often enough."""
        self.journal.forget(job.id)
        if job.tries == self.retries:
            raise RemoteLostError(f"{self.wire.host}: {reason}; sent {job.tries + 1} times")
        wait = min(0.5 * 2**job.tries, self.wire.patience)
        self.note(job.id, "LOST", f"{reason}; sent again in {wait:.1f} s")
        self.wire.pause(wait)
        job.tries += 1
        job.packet = replace(job.packet, job=None, places=())
        self._send(job)


def _alone(packet: Packet, i: int) -> Packet:
    """One program of a packet, to be sent by itself."""
    return Packet(packet.text, (packet.programs[i],), (packet.digests[i],))


def _joined(a: Packet, b: Packet) -> Packet:
    return replace(a, programs=a.programs + b.programs, digests=a.digests + b.digests, places=a.places + b.places)
