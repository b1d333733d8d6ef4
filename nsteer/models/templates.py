"""Turns the turns of a conversation into the text that a model reads, by the chat template of its tokenizer.

Templates are rendered as transformers renders them, but without it, so that a plan can be checked; and by a clock that
is given, so that a study writes one date into all its texts. Nothing is drawn at random: a template that does is
refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from nsteer.errors import ModelError

CLOCK = "strftime_now"
"""The function by which a template reads the clock."""

TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Special tokens that a template may name."""

Turns = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Template:
    """A chat template, as jinja text, and the special tokens that it may name: (name, text) each."""

    text: str
    tokens: tuple[tuple[str, str], ...] = ()

    @property
    def bos(self) -> str:
        """The text of the BOS token; '' where none is known."""
        return dict(self.tokens).get("bos_token", "")


class Refusal(ModelError):
    """A conversation that the template itself refuses, in its own words, or a template that is no jinja."""


def turns_of(text: str | Turns, system: str | None = None) -> list[dict[str, str]]:
    """The turns of a conversation; of a text a user's turn. A system turn before them, where there is one.

    Raises Refusal for a system turn before a conversation that has its own.
    """
    own = [{"role": "user", "content": text}] if isinstance(text, str) else [dict(turn) for turn in text]
    if not system:
        return own
    if own[0]["role"] == "system":
        raise Refusal("a conversation with a system turn of its own, behind a system prompt")
    return [{"role": "system", "content": system}, *own]


def shown(text: str | Turns) -> str:
    """A text as a person reads it: of a conversation each turn behind its role, a line each."""
    return text if isinstance(text, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in text)


MARK = "\ue001"
"""Stands at the end of a begun answer while it is rendered: what a template writes behind it is cut."""

OWN = ("messages", "tools", "documents", "add_generation_prompt", CLOCK)
"""What a template is given anyway: no argument has these names."""


def begun(turns: Turns) -> bool:
    """Whether a conversation ends with an answer that the model goes on with, or that is read up to its end."""
    return bool(turns) and turns[-1]["role"] == "assistant"


def of_folder(folder: Path) -> Template | None:
    """The template in a model's folder, with the tokens that its files name; None where it has none.

    Raises ModelError for files that can not be read.
    """
    config = {**_object(folder / "special_tokens_map.json"), **_object(folder / "tokenizer_config.json")}
    text = config.get("chat_template")
    if isinstance(text, list):  # several, by name
        text = {template.get("name"): template.get("template") for template in text if isinstance(template, dict)}
    if isinstance(text, dict):
        text = text.get("default")
    if (folder / "chat_template.jinja").is_file():
        text = _text(folder / "chat_template.jinja")
    if not isinstance(text, str) or not text:
        return None
    named = {name: config.get(name) for name in TOKENS}
    told = {name: token.get("content") if isinstance(token, dict) else token for name, token in named.items()}
    return Template(text, tuple((name, token) for name, token in told.items() if isinstance(token, str)))


def of_tokenizer(tokenizer: Any) -> Template | None:
    """The template of a transformers tokenizer; None where it has none. Raises ModelError where it has no default."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        text = tokenizer.get_chat_template()
    except ValueError as error:  # several, none of them the default
        raise ModelError(f"the tokenizer has no default chat template: {error}") from error
    return Template(text, tuple(sorted(tokenizer.special_tokens_map.items())))


def render(
    template: Template, turns: Turns, moment: datetime | None = None, arguments: Mapping[str, Any] | None = None
) -> str:
    """The text of a conversation, up to where the model goes on: behind a begun answer, nothing added.

    moment : the template's clock, by default now
    arguments : what else the template is told, such as `enable_thinking`

    Raises Refusal where the template refuses the turns or is none, ModelError where it fails.
    """
    return _rendered(template, turns, moment or datetime.now(), arguments)[0]


def dates(
    template: Template | None,
    conversations: Iterable[Turns],
    moment: datetime,
    arguments: Mapping[str, Any] | None = None,
) -> dict[str, str]:
    """What a template writes of the clock into conversations: format -> text; {} where it does not read it.

    Where it can not be rendered here, the date, in case it reads it.
    """
    if template is None or CLOCK not in template.text:
        return {}
    by_format: dict[str, str] = {}
    for turns in conversations:
        try:
            by_format |= _rendered(template, turns, moment, arguments)[1]
        except ModelError:
            by_format["%Y-%m-%d"] = f"{moment:%Y-%m-%d}"
    return by_format


def _rendered(
    template: Template, turns: Turns, moment: datetime, arguments: Mapping[str, Any] | None = None
) -> tuple[str, dict[str, str]]:
    """The text, and what was read of the clock: format -> text."""
    import jinja2

    read: dict[str, str] = {}

    def now(form: str) -> str:
        read[form] = moment.strftime(form)
        return read[form]

    messages = [dict(turn) for turn in turns]
    if begun(turns):
        messages[-1]["content"] += MARK
    try:
        jinja_template = _compiled(template.text)
        text = jinja_template.render(
            {
                **(arguments or {}),
                "messages": messages,
                "tools": None,
                "documents": None,
                "add_generation_prompt": not begun(turns),
                **dict(template.tokens),
                CLOCK: now,
            }
        )
    except Exception as error:
        words = str(error) or type(error).__name__
        shown = turns[-1]["content"][:40] if turns else ""
        own = type(error) is jinja2.TemplateError or isinstance(error, jinja2.TemplateSyntaxError)
        kind = Refusal if own else ModelError  # else it may be for want of a token that only the tokenizer knows
        raise kind(f"the chat template refuses the text {shown!r}: {words}") from error
    if begun(turns):
        answer, mark, _ = text.rpartition(MARK)
        if not mark:
            raise Refusal(f"the chat template does not show the begun answer {turns[-1]['content'][:40]!r} as it is")
        text = answer
    return text, read


@lru_cache(maxsize=64)
def _compiled(text: str) -> Any:
    """A jinja template in the environment that chat templates are written for, less what draws at random."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says, for training; here it says itself."""

        tags = {"generation"}  # noqa: RUF012 (so jinja wants it)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    del environment.filters["random"], environment.globals["lipsum"]
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    return environment.from_string(text)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"a {file.name} that can not be read: {error}") from error


def _object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; {} where there is no file."""
    if not file.is_file():
        return {}
    try:
        fields = json.loads(_text(file))
    except ValueError as error:
        raise ModelError(f"a {file.name} that can not be read: {error}") from error
    return fields if isinstance(fields, dict) else {}
