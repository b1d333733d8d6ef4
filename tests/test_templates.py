"""Chat templates without transformers: the text that transformers renders, by a clock that is given."""

from __future__ import annotations

from datetime import datetime

import pytest
from transformers import AutoTokenizer

from nsteer import zoo
from nsteer.errors import ModelError
from nsteer.models import templates
from nsteer.models.facts import facts
from nsteer.models.templates import Refusal, Template, dates, render, turns_of
from nsteer.plan.schema import Model

KINDS = {
    "loops": "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}{% if m.role == 'x' %}{% continue %}"
    "{% endif %}[{{ m['role'] | upper }}] {{ m['content'] | trim }}\n{% endfor %}{{ 'go' if add_generation_prompt }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "json": "{{ messages | tojson(indent=1) }} {{ tools is none }} {{ documents is none }} {{ bos_token + 'x' }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "blocks": "a\n  {% if true %}\n b\n{% endif %}\n {{ messages[-1].content }}",
}


@pytest.mark.parametrize("name", zoo.FAMILIES)
@pytest.mark.parametrize("system", [None, "be kind ."])
def test_a_toy_is_shown_what_transformers_would_show_it(name, system):
    tokenizer, turns = AutoTokenizer.from_pretrained(zoo.path(name)), turns_of("tom walked <b> é\n", system)
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    told = facts(Model(id=f"zoo/{name}")).template
    assert render(told, turns) == expected == render(templates.of_tokenizer(tokenizer), turns)


@pytest.mark.parametrize("source", KINDS.values(), ids=KINDS)
def test_what_templates_use_is_rendered_alike(source):
    tokenizer = AutoTokenizer.from_pretrained(zoo.path("llama"))
    tokenizer.chat_template = source
    turns = turns_of(' "quoted" & <tag> ü ', "be kind")
    expected = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert render(templates.of_tokenizer(tokenizer), turns) == expected


def test_the_clock_is_the_one_that_is_given():
    dated = Template("{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}")
    day, turns = datetime(2026, 7, 26), turns_of("hi")
    assert render(dated, turns, day) == "26 Jul 2026 hi"
    assert dates(dated, [turns], day) == {"%d %b %Y": "26 Jul 2026"}
    asked = Template("{% if messages[0].role == 'user' %}{{ strftime_now('%Y') }}{% endif %}")
    assert dates(asked, [turns_of("hi", "a system turn")], day) == {} != dates(asked, [turns], day)
    assert dates(Template("{{ messages[0].content }}"), [turns], day) == {} == dates(None, [turns], day)


def test_a_date_that_may_be_read_counts_where_nothing_can_be_rendered():
    unknown = Template("{{ eos_token + strftime_now('%Y') }}")  # only the tokenizer knows its EOS
    assert dates(unknown, [turns_of("hi")], datetime(2026, 7, 26)) == {"%Y-%m-%d": "2026-07-26"}


def test_a_template_refuses_in_its_own_words():
    strict = Template("{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}")
    with pytest.raises(Refusal, match="the chat template refuses the text 'hi': no system role"):
        render(strict, turns_of("hi", "be kind"))
    assert render(strict, turns_of("hi")) == ""


def test_what_is_wanting_is_no_refusal():
    with pytest.raises(ModelError) as error:
        render(Template("{{ bos_token + 'x' }}"), turns_of("hi"))
    assert not isinstance(error.value, Refusal)


@pytest.mark.parametrize("source", ["{{ ['a', 'b'] | random }}", "{% for m in messages %}"])
def test_what_is_drawn_at_random_or_is_no_template_is_refused(source):
    with pytest.raises(Refusal):
        render(Template(source), turns_of("hi"))
