"""Turns lines typed at a terminal into a model's words with a vector and without it, side by side.

A model with a chat template is spoken to, each side with its own history; one without continues every line again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from textwrap import fill
from typing import Any, TypeVar

from nsteer.errors import ArgumentsError, ModelError, NsteerError, SteerError, did_you_mean
from nsteer.executors import create
from nsteer.models import checkpoints, templates
from nsteer.models import facts as models
from nsteer.models.facts import Facts
from nsteer.plan import layers as naming
from nsteer.plan import prompts
from nsteer.plan.check.python import edit_of
from nsteer.plan.schema import Model
from nsteer.program.code import GREEDY
from nsteer.store.results import Results
from nsteer.store.results import open as open_store
from nsteer.vectors import hooks

T = TypeVar("T")

HELP = {
    "/strength NUMBER": "how strongly, in the unit of --scale; below 0 away from the vector",
    "/vector METHOD/EMOTION": "another vector of the store; STORE:METHOD/EMOTION of another one; alone: what there is",
    "/layers LAYERS": "where: 5, -1, 0.5, 2:6, 3-5, 1,4; all: every layer that the vector has",
    "/off": "no steering, one column; /strength steers again",
    "/system TEXT": "what the model is told first, and forget what was said; alone: nothing",
    "/temperature NUMBER": "sample, both sides by the same numbers; 0: greedily, the likeliest token each time",
    "/new": "forget what was said",
    "/help": "this",
    "/quit": "leave (so does Ctrl-D)",
}
"""Command -> what it does."""


class Quit(Exception):
    """The user has said enough."""


@dataclass(frozen=True)
class Reply:
    """What a model said to a line, and under the vector; `receipts` as `hooks.Steering` has them."""

    unsteered: str
    steered: str | None = None
    receipts: dict[int, dict[str, float]] = field(default_factory=dict)


@dataclass
class Chat:
    """A model, a vector, and what was said on either side."""

    executor: Any
    facts: Facts
    new_tokens: int = 60
    scale: str = "stream_norm"
    templated: bool = True
    store: str = ""
    name: str = ""
    strength: float | None = 0.1
    layers: Any = None
    vector: Any = None
    notes: list[str] = field(default_factory=list)
    system: str = ""
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    _said: dict[str, list[dict[str, str]]] = field(default_factory=lambda: {"unsteered": [], "steered": []})

    # ---- what is set ------------------------------------------------------------------------------------

    def use(self, text: str) -> None:
        """Takes the vector `STORE:method/emotion`, or `method/emotion` of the store in use. Raises NsteerError."""
        store, colon, name = text.rpartition(":")
        store = store if colon else self.store
        method, slash, emotion = name.partition("/")
        if not (store and slash and method and emotion):
            raise SteerError(f"{text!r}: expected STORE:METHOD/EMOTION")
        results = open_store(store)
        cell = (self.facts.label, method, emotion)
        results.sel("vectors", **dict(zip(("model", "method", results.axis), cell, strict=True)))  # labels not there
        path = results.product("vectors", self.facts.label)
        vector = results.whole(path, cell).vector if cell in results.store.committed(path) else None
        if vector is None or not vector.notnull().any():
            raise SteerError(f"{results.name} has no vector {name} of {self.facts.label}")
        self._try(vector=vector)
        self.store, self.name, self.vector = store, name, vector
        if note := self._other_weights(results):
            self.notes.append(note)

    def _other_weights(self, opened: Results) -> str:
        """A note when the store's vectors were made with other weights than those that are loaded."""
        if "models" not in opened or (self.facts.label,) not in opened.store.committed("models"):
            return ""
        theirs = opened["models"].identity.sel({"model": self.facts.label}).item()
        same = theirs == self.facts.identity
        return "" if same else f"the vectors are of other weights ({theirs}) than these ({self.facts.identity})"

    def known(self) -> dict[str, list[str]]:
        """Method -> emotions that the store in use has vectors of, for this model."""
        opened = open_store(self.store)
        path = opened.product("vectors", self.facts.label)
        emotions: dict[str, list[str]] = {}
        for model, method, emotion in opened.store.committed(path):
            if model == self.facts.label:
                emotions.setdefault(method, []).append(emotion)
        return emotions

    def _try(self, **changes: Any) -> None:
        """Raises SteerError when the model could not be steered so; it need not be loaded."""
        how = {"vector": self.vector, "layers": self.layers, "strength": self.strength or 1.0, **changes}
        if how["vector"] is not None:
            hooks.Steering(edit_of(scale=self.scale)).plan((self.facts.n_layers, self.facts.d_model), **how)

    def command(self, line: str) -> str:
        """What a line that begins with / does, in words. Raises Quit, NsteerError."""
        word, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if word == "/quit":
            raise Quit
        if word == "/help":
            return "\n".join(f"{name:<24}{meaning}" for name, meaning in HELP.items())
        if word == "/off":
            self.strength = None
        elif word == "/new":
            self._said = {"unsteered": [], "steered": []}
            return "forgotten"
        elif word == "/strength":
            self.strength = _number(word, rest)
        elif word == "/layers":
            self._layers(rest)
        elif word == "/system":
            self.instruct(rest)
        elif word == "/temperature":
            self.temperature = _temperature(rest)
        elif word == "/vector" and not rest:
            return "\n".join(fill(f"{method}: {', '.join(few)}", 79) for method, few in self.known().items())
        elif word == "/vector":
            self.use(rest)
        else:
            names = [name.split()[0] for name in HELP]
            raise SteerError(f"{word!r} is no command; {did_you_mean(word, names)}")
        return self.title()

    def instruct(self, text: str) -> None:
        """Puts a system turn before all others, which are forgotten. Raises SteerError where no template shows it."""
        if text and not self.templated:
            raise SteerError("a system prompt needs a chat template: this model continues what you write")
        if text:
            template = templates.of_tokenizer(self.executor.tokenizer)
            assert template is not None, "asked before"
            shown = templates.render(template, templates.turns_of("?", text))
            if text.strip() not in shown:
                raise SteerError("the model's chat template leaves the system prompt out")
        self.system = text
        self._said = {"unsteered": [], "steered": []}

    def _layers(self, text: str) -> None:
        spec = None if text == "all" else _spec(text)
        self._try(layers=spec)
        self.layers = spec

    def title(self) -> str:
        """The vector, its strength and where it acts, in a line."""
        if self.strength is None:
            return "unsteered"
        at = (
            "all its layers" if self.layers is None else f"layers {naming.label(self._resolved(), self.facts.n_layers)}"
        )
        return f"{self.name} × {self.strength:g} {self.scale} at {at}"

    def _resolved(self) -> tuple[int, ...]:
        return naming.resolve(self.layers, self.facts.n_layers)

    # ---- what is said -----------------------------------------------------------------------------------

    def reply(self, line: str) -> Reply:
        """What the model says to a line, without the vector and with it. Raises NsteerError."""
        unsteered = self._continue("unsteered", line)
        if self.strength is None or self.vector is None:
            return Reply(self._keep("unsteered", line, unsteered))
        how = {"layers": self.layers, "strength": self.strength, "scale": self.scale}
        with hooks.steer(self.executor.module, self.vector, **how) as steering:
            steered = self._continue("steered", line)
        return Reply(self._keep("unsteered", line, unsteered), self._keep("steered", line, steered), steering.receipts)

    def _keep(self, side: str, line: str, answer: str) -> str:
        """Both turns are kept once both sides have answered: what is broken off leaves no trace."""
        turns = [{"role": "user", "content": line}, {"role": "assistant", "content": answer.strip()}]
        self._said[side] += turns
        return answer

    def _continue(self, side: str, line: str) -> str:
        """What the model goes on with, greedily, by the settings of a plan's programs."""
        import torch

        executor = self.executor
        tokens = torch.tensor([self._tokens(side, line)], device=executor.device)
        ends = {"eos_token_id": list(executor.eos) or None, "pad_token_id": executor.pad}
        settings = {**GREEDY, **ends, "max_new_tokens": self.new_tokens}
        if self.temperature:
            settings |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
            torch.manual_seed(
                self.seed + len(self._said[side])
            )  # both sides draw alike: the difference is the vector's
        with torch.no_grad():
            ids = executor.module.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **settings)
        return executor.tokenizer.decode(ids[0, tokens.shape[1] :], skip_special_tokens=True)

    def _tokens(self, side: str, line: str) -> tuple[int, ...]:
        tokenizer = self.executor.tokenizer
        if not self.templated:
            return prompts.encode(tokenizer, line).tokens
        before = [{"role": "system", "content": self.system}] if self.system else []
        turns = [*before, *self._said[side], {"role": "user", "content": line}]
        template = templates.of_tokenizer(tokenizer)
        assert template is not None, "asked before"
        try:
            text = templates.render(template, turns)
        except ModelError as error:
            raise SteerError(f"{error}; /new, or --chat never") from error
        return prompts.again(tokenizer, text, chat=True).tokens


def _number(name: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise SteerError(f"{name} {text}: expected a finite number")
    return number


def _temperature(text: str) -> float:
    number = _number("temperature", text)
    if number < 0:
        raise SteerError(f"temperature {text}: expected 0, which is greedy, or more")
    return number


def start(
    model: str,
    *,
    vector: str,
    strength: float = 0.1,
    layers: Any = None,
    scale: str = "stream_norm",
    chat: str = "auto",
    new_tokens: int = 60,
    system: str = "",
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    label: str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "auto",
    gguf: str | None = None,
    peft: str | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Chat:
    """Loads a vector of a store and, once all that was asked for fits, the model.

    layers : a specification, or its text as it is typed
    tell : is told, in a line, that a GGUF file is being converted

    Raises ModelError, StoreError, SteerError; ArgumentsError where several arguments do not fit.
    """
    wrong: list[NsteerError] = []
    fits(wrong, _device, device)
    scaled = fits(wrong, partial(edit_of, scale=scale)) is not None
    finite = fits(wrong, _number, "strength", str(strength)) is not None
    fits(wrong, _temperature, str(temperature))
    spec = fits(wrong, _spec, layers)
    facts = fits(wrong, models.facts, Model(id=model, revision=revision, label=label, gguf=gguf, peft=peft))
    if facts is not None:
        fits(wrong, _whole, facts, tell)
        if spec is not None and fits(wrong, hooks.resolved, spec, facts.n_layers) is None:
            spec = None
        session = Chat(None, facts, new_tokens, layers=spec)  # the vector is looked for whatever else is wrong
        session.scale, session.strength = scale if scaled else session.scale, strength if finite else session.strength
        fits(wrong, session.use, vector)
    if wrong:
        raise wrong[0] if len(wrong) == 1 else ArgumentsError(wrong)
    assert facts is not None
    with models.unchanged(facts, tell):
        merged = {"peft": facts.adapter} if facts.adapter else {}
        session.executor = create(
            "local", facts.name_or_path, revision=facts.revision, dtype=dtype, device=device, **merged
        )
    session.templated = prompts.uses_chat(session.executor.tokenizer, chat)
    session.temperature, session.top_p, session.seed = temperature, top_p, seed
    session.instruct(system)
    return session


def fits(wrong: list[NsteerError], check: Callable[..., T], *given: Any) -> T | None:
    """What a check gives; None where it raises, which is put to what is wrong."""
    try:
        return check(*given)
    except NsteerError as error:
        wrong.append(error)
        return None


def _whole(facts: Facts, tell: Callable[[str], None]) -> None:
    """Raises ModelError for a model whose files, or whose adapter's, are not as a plan's must be."""
    for fault in (*checkpoints.of_model(facts), *checkpoints.of_adapter(facts)):
        said = fault.found + (f" ({fault.hint})" if fault.hint else "")
        if not fault.transient:
            raise ModelError(f"{said}: expected {fault.expected}")
        tell(said)


def _spec(layers: Any) -> Any:
    """A specification of layers, which may be as it is typed."""
    if not isinstance(layers, str) or layers == "all":
        return layers
    try:
        return naming.spoken(layers)
    except LookupError as error:
        raise SteerError(f"layers {error.args[0]}") from error


def _device(name: str) -> None:
    import torch

    try:
        torch.device("cpu" if name == "auto" else name)
    except RuntimeError as error:
        raise SteerError(f"device {name!r}: expected auto, cpu, cuda, cuda:1 or mps") from error


def talk(
    chat: Chat,
    ask: Callable[[], str],
    say: Callable[[str], None],
    show: Callable[[Chat, Reply], None],
    busy: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> None:
    """Lines from `ask` until EOF or /quit. Mistakes are said, and the talk goes on; Ctrl-C breaks an answer off.

    busy : is entered while the model writes
    """
    while True:
        try:
            line = ask().strip()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if line.startswith("/"):
                say(chat.command(line))
            elif line:
                with busy():
                    reply = chat.reply(line)
                show(chat, reply)
            for note in chat.notes:
                say(f"note: {note}")
            chat.notes.clear()
        except Quit:
            return
        except NsteerError as error:
            say(f"error: {error}")
        except KeyboardInterrupt:
            say("broken off")
