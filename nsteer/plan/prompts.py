"""Turns emotions, templates and chat templates into texts, and texts into token ids and pooling weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np

from nsteer.errors import ModelError
from nsteer.models import templates
from nsteer.models.templates import shown
from nsteer.plan import placeholders, positions
from nsteer.plan.schema import Contrast, Method, Pooling, Span, Steer
from nsteer.plan.texts import TextSet
from nsteer.program import pooling
from nsteer.science.axis import AXES
from nsteer.science.presets import NEUTRAL


@dataclass(frozen=True)
class Encoded:
    """A text as a model gets it: the rendered text, its token ids, and how many leading ones are BOS (0 or 1).

    doubled : whether there would have been more than one BOS, so that all but one were left out
    spans : the characters [start, stop) that each token holds; turns: role, start and stop of each turn of the prompt,
        of a text one. `located` finds them, where they are needed.
    """

    text: str
    tokens: tuple[int, ...]
    bos: int
    spans: tuple[tuple[int, int], ...] = ()
    turns: tuple[tuple[str, int, int], ...] = ()
    doubled: bool = False

    def mask(self, where: Any) -> np.ndarray:
        """Which of its tokens the `positions` of a plan name: [token] bool."""
        return positions.of_prompt(where, self.tokens, self.spans, self.text, self.turns)


def sample_text(method: Method, texts: TextSet, emotion: str, sample: int) -> Any:
    """What sample number `sample` of an emotion shows to the model: an instruction, or a passage (or conversation).

    Templates turn fastest, then topics; both start again when they run out (greedy decoding then repeats itself,
    which the store's `n_distinct` tells).
    """
    if method.source == "comprehension":
        return (texts.neutral_passages if emotion == NEUTRAL else texts.passages[emotion])[sample]
    given = _templates(method, texts, emotion)
    return placeholders.filled(given[sample % len(given)], _values(method, texts, emotion, sample))


def system_text(method: Method, texts: TextSet, emotion: str, sample: int) -> str | None:
    """The system turn before sample number `sample` of an emotion, filled in as its template is; None without one."""
    prompt = method.system_prompt
    return None if prompt is None else placeholders.filled(prompt, _values(method, texts, emotion, sample))


class Question(NamedTuple):
    """What is asked for one answer of a contrast: the system turn, the question, and the answer's number among those
    to the same."""

    system: str
    text: Any
    sample: int


def questions(contrast: Contrast, side: str) -> list[Question]:
    """What is asked for each answer of a side, of a contrast that the model writes. More samples come at the end."""
    how = contrast.generate
    assert how is not None
    systems = getattr(contrast, side)
    return [Question(system, text, k) for k in range(how.samples) for system in systems for text in how.questions]


def _values(method: Method, texts: TextSet, emotion: str, sample: int) -> dict[str, str]:
    """What stands for each placeholder in sample number `sample` of an emotion; the baseline's emotion is "neutral"."""
    if method.source == "comprehension" or not texts.topics:
        return dict.fromkeys(AXES, emotion)
    turn = sample // len(_templates(method, texts, emotion))
    return {**dict.fromkeys(AXES, emotion), "topic": texts.topics[turn % len(texts.topics)]}


def _templates(method: Method, texts: TextSet, emotion: str) -> list[Any]:
    return texts.neutral_story_templates if emotion == NEUTRAL else templates_of(method, texts)


def templates_of(method: Method, texts: TextSet) -> list[Any]:
    """The instruction templates of a generation method: texts, or conversations."""
    return method.templates if isinstance(method.templates, list) else getattr(texts, method.templates)


def prompt_set(prompts: Any, texts: TextSet | None) -> dict[str, Any]:
    """Prompts by label, each a text or a conversation. In a list a prompt is its own label."""
    if isinstance(prompts, str):
        assert texts is not None, "checked before"
        return dict(texts.prompts[prompts])
    return dict(prompts) if isinstance(prompts, dict) else {shown(text): text for text in prompts}


def asked_prompts(entry: Steer, texts: TextSet | None, emotion: str, asked: str) -> dict[str, Any]:
    """An entry's prompts by label, each behind the instruction that asks for an emotion, `towards` it or `away`.

    Of a conversation the first turn of the user begins with it.
    """
    instruction = placeholders.filled(getattr(entry.prompted, asked), dict.fromkeys(AXES, emotion.replace("_", " ")))

    def behind(prompt: Any) -> Any:
        if isinstance(prompt, str):
            return f"{instruction}\n\n{prompt}"
        first = next(i for i, turn in enumerate(prompt) if turn["role"] == "user")
        return [
            {**turn, "content": f"{instruction}\n\n{turn['content']}"} if i == first else turn
            for i, turn in enumerate(prompt)
        ]

    return {label: behind(prompt) for label, prompt in prompt_set(entry.prompts, texts).items()}


def encode(
    tokenizer: Any,
    text: Any,
    chat: str = "never",
    system: str | None = None,
    moment: datetime | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> Encoded:
    """The token ids of a text or a conversation, through the chat template ("always", or "auto" where there is one).

    moment : the clock of the template, now when left out; arguments: what else it is told
    Raises ModelError for a missing template under "always" or for a conversation, and for a text without a token.
    """
    template = templates.of_tokenizer(tokenizer) if chat != "never" else None
    if chat == "always" and template is None:
        raise ModelError("the tokenizer has no chat template, and the plan says chat: always")
    if template is not None:
        text = templates.render(template, templates.turns_of(text, system), moment, arguments)
    elif not isinstance(text, str):
        raise ModelError("a conversation needs a chat template, which the tokenizer lacks or the plan does not use")
    return again(tokenizer, text, template is not None)


OTHER = "\ue000"
"""A prompt that begins and ends unlike any other: what it changes in a rendered text is the prompt."""


def located(
    tokenizer: Any,
    encoding: Encoded,
    prompt: Any,
    chat: str,
    moment: datetime | None = None,
    arguments: Mapping[str, Any] | None = None,
    system: str | None = None,
) -> Encoded:
    """An encoded prompt with the characters of each token, and of each of its turns within the chat template.

    moment, arguments, system : those with which it was encoded
    Raises ModelError for a tokenizer that tells no characters, and for a template that does not show the prompt.
    """
    template = templates.of_tokenizer(tokenizer) if chat != "never" else None
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError("positions by `text`, `role` or turn need a fast tokenizer: this model's tells no characters")
    again = tokenizer(encoding.text, add_special_tokens=template is None, return_offsets_mapping=True)
    tokens, spans = again["input_ids"], again["offset_mapping"]
    more = _more_bos(tokenizer, tokens)
    if tuple(tokens[more:]) != encoding.tokens:
        raise ModelError(f"the text {encoding.text[:40]!r} has other tokens when it is encoded again")
    turns: list[tuple[str, int, int]] = [("user", 0, len(encoding.text))]
    if template is not None:
        said = templates.turns_of(prompt, system)
        turns = [
            (turn["role"], *_turn(template, encoding.text, said, i, moment, arguments)) for i, turn in enumerate(said)
        ]
    return replace(encoding, spans=tuple(map(tuple, spans[more:])), turns=tuple(turns))


def _turn(
    template: templates.Template, text: str, said: list[dict[str, str]], place: int, moment: Any, arguments: Any
) -> tuple[int, int]:
    """The characters [start, stop) of one turn in a rendered conversation: what changes when it says something else."""
    others = [{**turn, "content": OTHER} if i == place else turn for i, turn in enumerate(said)]
    other = templates.render(template, others, moment, arguments)
    start = _common(text, other)
    stop = len(text) - min(_common(text[::-1], other[::-1]), len(text) - start)
    content = said[place]["content"]
    if text[start:stop].strip() != content.strip():
        raise ModelError(f"the chat template does not show the prompt {content[:40]!r} as it is")
    return start, stop


def _common(text: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    same = (i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b)
    return next(same, min(len(text), len(other)))


def again(tokenizer: Any, rendered: str, chat: bool) -> Encoded:
    """A text rendered before (as the store keeps it), encoded once more: chat text brings its special tokens."""
    return encoded(tokenizer, rendered, tokenizer(rendered, add_special_tokens=not chat)["input_ids"])


def encoded(tokenizer: Any, text: str, tokens: Any) -> Encoded:
    """A text's tokens as a model gets them: with one BOS, also where a text writes it and the tokenizer adds it."""
    if not len(tokens):
        raise ModelError(f"the text {text[:40]!r} has no tokens")
    more = _more_bos(tokenizer, tokens)
    bos = tokenizer.bos_token_id
    leads = bos is not None and tokens[0] == bos
    return Encoded(text, tuple(int(t) for t in tokens[more:]), int(leads), doubled=more > 0)


def ending(tokenizer: Any, asked: Encoded, answer: str, chat: bool = False) -> tuple[int, ...]:
    """The tokens of an answer after a question: as they are read together, unless that changes the question's."""
    both = again(tokenizer, asked.text + answer, chat).tokens
    if both[: len(asked.tokens)] == asked.tokens:
        return both[len(asked.tokens) :]
    return tuple(int(t) for t in tokenizer(answer, add_special_tokens=False)["input_ids"])


def _more_bos(tokenizer: Any, tokens: Sequence[int]) -> int:
    """How many BOS tokens stand before the last of those that lead."""
    bos = tokenizer.bos_token_id
    leading = next((i for i, token in enumerate(tokens) if bos is None or token != bos), len(tokens))
    return max(leading - 1, 0)


def token_ids(tokenizer: Any, words: Sequence[int | str]) -> tuple[int, ...]:
    """The ids of tokens given by id or by text. Raises ModelError for a text that is not one token, an id too large."""
    all_ids = []
    for word in words:
        ids = [word] if isinstance(word, int) else tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            pieces = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(ids)))
            raise ModelError(
                f"{word!r} is {len(ids)} tokens of this model ({pieces}), not one: give ids, or other texts"
            )
        if not 0 <= ids[0] < len(tokenizer):
            raise ModelError(f"{ids[0]} is no token id of this model: it has {len(tokenizer)}")
        all_ids.append(int(ids[0]))
    return tuple(all_ids)


def uses_chat(tokenizer: Any, chat: str) -> bool:
    """Whether `encode` puts texts through the chat template."""
    return chat != "never" and bool(getattr(tokenizer, "chat_template", None))


def weights(spec: Pooling, prompt: Encoded, total: int) -> np.ndarray:
    """Pooling weights [total] over a prompt and what was generated after it."""
    bos, within = 0 if spec.bos else prompt.bos, counted(spec, prompt, total) if spec.sought else None
    over = spec.over if isinstance(spec.over, str) else "all"
    return pooling.weights(spec.kind, len(prompt.tokens), total, k=spec.k, over=over, bos=bos, within=within)


def counted(spec: Pooling, prompt: Encoded, total: int) -> np.ndarray:
    """The positions that a pooling counts, of a prompt and what was generated after it: [total] bool.

    Raises ModelError for a prompt that is not `located`.
    """
    if len(prompt.spans) != len(prompt.tokens):
        raise ModelError("positions of a part of a text, where the characters of its tokens are not known")
    given = np.zeros(total, bool)
    if spec.over == "answer":
        given[len(prompt.tokens) :] = True
        ranges = [(start, stop) for role, start, stop in prompt.turns[-1:] if role == "assistant"]
    elif isinstance(spec.over, Span) and spec.over.text is not None:
        ranges = positions.occurrences(prompt.text, [spec.over.text], prompt.turns)
    else:
        which = spec.over.turn if isinstance(spec.over, Span) else None
        numbered = dict(enumerate(prompt.turns)) | {i - len(prompt.turns): turn for i, turn in enumerate(prompt.turns)}
        chosen = [turn for turn in prompt.turns if turn[0] == which] if isinstance(which, str) else []
        chosen += [numbered[which]] if isinstance(which, int) and which in numbered else []
        ranges = [(start, stop) for _, start, stop in chosen]
    given[: len(prompt.tokens)] |= positions.holding(prompt.spans, ranges)
    return given


def norm_weights(total: int, skip: int) -> np.ndarray:
    """Weights [total] of a mean over positions that leaves out the first `skip` (never all of them)."""
    skip = min(skip, total - 1)
    return (np.arange(total) >= skip).astype(np.float32) / (total - skip)
