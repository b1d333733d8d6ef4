"""The chat: two sides of one line, what is changed on the way, and mistakes that do not end it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_exchange import make, planted

import nsteer
from nsteer import cli
from nsteer.errors import NsteerError, SteerError
from nsteer.vectors import chat, exchange

LINE = "tom walked to the old house and"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("chat") / "mine.zarr", "zoo/llama", "zoo/gpt2")


@pytest.fixture
def talk(store) -> chat.Chat:
    return chat.start("zoo/llama", vector=f"{store}:generation/happy", chat="never", strength=0.4, new_tokens=8)


def written(talk: chat.Chat, line: str, **how) -> str:
    """What the model writes within `nsteer.steer`, on its own."""
    import torch

    ids = torch.tensor([talk.executor.tokenizer(line)["input_ids"]])
    vector = planted("zoo/llama", "generation", "happy")
    with nsteer.steer(talk.executor.module, vector[how["layers"]], **how), torch.no_grad():
        new = talk.executor.module.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=talk.executor.pad)
    return talk.executor.tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)


def test_one_side_is_the_model_the_other_the_steered_model(talk):
    talk.command("/layers 2")
    for strength in (0.4, -0.6):
        talk.command(f"/strength {strength}")
        reply = talk.reply(LINE)
        assert reply.steered == written(talk, LINE, layers=2, strength=strength) != reply.unsteered
        assert set(reply.receipts) == {2} and reply.receipts[2]["relative_change"] > 0.1
    talk.command("/off")
    assert talk.reply(LINE) == chat.Reply(reply.unsteered)


def test_a_base_model_continues_every_line_anew(talk):
    first = talk.reply(LINE)
    talk.reply("the rain fell")
    assert talk.reply(LINE) == first


def test_commands_say_what_is_set(talk, store):
    assert talk.title() == "generation/happy × 0.4 stream_norm at all its layers"
    assert talk.command("/layers 1-3") == "generation/happy × 0.4 stream_norm at layers 1:4"
    assert talk.command("/strength -0.25").startswith("generation/happy × -0.25")
    assert talk.command("/vector reading/happy").startswith("reading/happy × -0.25")
    assert talk.command("/vector") == "generation: happy\nreading: happy, sad"
    assert talk.command("/off") == "unsteered"
    assert talk.command("/layers all") == "unsteered"
    assert set(chat.HELP) == {line.rpartition("  ")[0].strip() for line in talk.command("/help").splitlines()}
    with pytest.raises(chat.Quit):
        talk.command("/quit")


MISTAKES = {
    "/strenth 1": "'/strenth' is no command; did you mean '/strength'?",
    "/strength": "expected a finite number",
    "/strength nan": "expected a finite number",
    "/layers 9": "layer 9 of a model with 5 layers",
    "/layers x": "'x' is no layer",
    "/vector happy": "expected STORE:METHOD/EMOTION",
    "/vector generation/hapy": "did you mean 'happy'",
    "/vector generation/sad": "has no vector generation/sad of zoo/llama",
    "/vector none.zarr:a/b": "no store at none.zarr",
}


def test_a_mistake_changes_nothing(talk):
    title, reply = talk.title(), talk.reply(LINE)
    for line, words in MISTAKES.items():
        with pytest.raises(NsteerError) as error:
            talk.command(line)
        assert words in str(error.value), line
        assert talk.title() == title, line
    assert talk.reply(LINE) == reply


def test_a_hole_is_no_vector(talk):
    with pytest.raises(SteerError, match="missing value"):
        talk.command("/layers 2-3")
        talk.command("/vector reading/sad")


def test_with_a_chat_template_every_side_has_its_own_history(store, monkeypatch):
    talk = chat.start("zoo/llama", vector=f"{store}:generation/happy", strength=0.4, new_tokens=6)
    turns = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} . {% endfor %}"
    talk.executor.tokenizer.chat_template = turns + "{% if add_generation_prompt %}model{% endif %}"
    talk.templated = True
    seen = []
    monkeypatch.setattr(chat.prompts, "again", _kept(chat.prompts.again, seen))
    first = talk.reply("tom ran")
    talk.reply("why")
    unsteered, steered = seen[2:]
    assert unsteered == f"user tom ran . assistant {first.unsteered.strip()} . user why . model"
    assert steered == f"user tom ran . assistant {first.steered.strip()} . user why . model"
    talk.command("/new")
    talk.reply("why")
    assert seen[-1] == "user why . model"


def _kept(function, seen: list):
    def again(tokenizer, text, chat):
        seen.append(text)
        return function(tokenizer, text, chat)

    return again


def test_a_system_prompt_is_told_first_and_only_where_a_template_shows_it(talk, store, monkeypatch):
    with pytest.raises(SteerError, match="needs a chat template"):
        talk.command("/system be brief")
    seen: list[str] = []
    conversation = chat.start("zoo/llama", vector=f"{store}:generation/happy", new_tokens=4)
    conversation.executor.tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'assistant:' }}"
    )
    conversation.templated = True
    monkeypatch.setattr(chat.prompts, "again", _kept(chat.prompts.again, seen))
    conversation.command("/system be brief")
    conversation.reply("hello")
    conversation.reply("and now?")
    assert len(seen) == 4 and all(prompt.startswith("system: be brief\nuser: hello\n") for prompt in seen)
    conversation.command("/system")
    conversation.reply("hello")
    assert seen[-1].startswith("user: hello") and "be brief" not in seen[-1]
    conversation.executor.tokenizer.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(SteerError, match="leaves the system prompt out"):
        conversation.command("/system be brief")


def test_sampling_draws_alike_on_both_sides(talk):
    """Without a difference in the streams both sides say the same; another seed says something else."""
    talk.command("/strength 0.001")
    talk.temperature, talk.seed = 1.5, 1
    first = talk.reply(LINE)
    talk.command("/new")
    assert first.unsteered == first.steered == talk.reply(LINE).unsteered
    talk.command("/new")
    talk.seed = 2
    assert talk.reply(LINE).unsteered != first.unsteered
    for line, words in (("/temperature -1", "0, which is greedy"), ("/temperature warm", "expected a finite number")):
        with pytest.raises(SteerError, match=words):
            talk.command(line)
    talk.command("/temperature 0")
    assert talk.reply(LINE).unsteered == talk.reply(LINE).unsteered != first.unsteered


def test_other_weights_are_noted(store, tmp_path):
    import torch
    from test_exchange import numbers

    torch.save(numbers(), "v.pt")
    exchange.bring_in("v.pt", "o.zarr", model="zoo/gpt2", layers_are="block-index", method="m", emotion="e", label="x")
    talk = chat.start("zoo/gpt2", vector="o.zarr:m/e", label="x", new_tokens=4)
    assert talk.notes == [] and talk.facts.label == "x"


def invoke(store: Path, *lines: str, model: str = "zoo/llama", vector: str = "generation/happy", more=()):
    words = ["chat", model, "--vector", f"{store}:{vector}", "--max-new-tokens", "6", "--chat", "never", *more]
    return CliRunner().invoke(cli.main, words, input="".join(f"{line}\n" for line in lines), catch_exceptions=False)


def test_the_command(store):
    done = invoke(store, LINE, "/strength 9e9", "/stength 1", "", LINE, "/quit", "never said")
    assert done.exit_code == 0 and "never said" not in done.stdout
    said = done.stdout
    assert said.startswith(
        "zoo/llama continues what you write; generation/happy × 0.1 stream_norm at all its layers; /help"
    )
    assert said.count("unsteered") == 1 and "error: '/stength' is no command" in said
    assert "the edited stream is not finite" in said  # 9e9 times its length, at every layer
    assert "the stream moved by" in said and "Traceback" not in said


def test_the_command_ends_with_its_input(store):
    assert invoke(store).exit_code == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vector": "generation/hapy"}, "did you mean 'happy'"),
        ({"vector": "generaton/happy"}, "did you mean 'generation'"),
        ({"vector": "happy"}, "expected STORE:METHOD/EMOTION"),
        ({"layers": 9}, "layer 9 of a model with 5 layers"),
        ({"layers": "x"}, "layers 'x'"),
        ({"strength": float("nan")}, "strength nan: expected a finite number"),
        ({"scale": "stream"}, "found 'stream' (did you mean 'stream_norm'?)"),
        ({"device": "gpu"}, "device 'gpu': expected auto, cpu, cuda, cuda:1 or mps"),
        ({"label": "zoo/lama"}, "did you mean 'zoo/llama'"),
    ],
)
def test_what_does_not_fit_is_said_before_the_model_loads(store, monkeypatch, changes, words):
    def never(*args, **how):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(chat, "create", never)
    how = {"vector": "generation/happy", **changes}
    with pytest.raises(NsteerError) as error:
        chat.start("zoo/llama", **{**how, "vector": f"{store}:{how['vector']}"})
    assert words in str(error.value)


def test_several_arguments_that_do_not_fit_are_told_at_once(store):
    wrong = ["--strength", "nan", "--device", "gpu", "--layers", "9"]
    done = invoke(store, vector="generation/hapy", more=wrong)
    assert done.exit_code == 1
    told = done.stderr.removeprefix("error: ").splitlines()
    words = ["device 'gpu': expected auto", "strength nan: expected a finite", "layer 9 ", "did you mean 'happy'"]
    assert len(told) == 4 and all(word in line for word, line in zip(words, told, strict=True))


def test_what_is_wrong_is_told_once(store):
    with pytest.raises(NsteerError) as error:
        chat.start("zoo/llama", vector=f"{store}:generation/happy", layers="x", scale="stream", strength=math.inf)
    assert [line.split()[0].rstrip(":") for line in str(error.value).splitlines()] == ["scale", "strength", "layers"]


def test_a_stream_that_overflows_is_an_error_and_the_talk_goes_on(talk):
    before = talk.reply(LINE)
    talk.command("/strength 1e38")
    with pytest.raises(NsteerError, match="the edited stream is not finite"):
        talk.reply(LINE)
    talk.command("/strength 0.4")
    assert talk.reply(LINE) == before


def test_a_vector_that_is_not_there_is_one_line(store):
    done = invoke(store, vector="generation/hapy")
    assert done.exit_code == 1 and done.stderr.startswith("error: ") and "did you mean 'happy'" in done.stderr


def test_what_a_model_says_moves_no_cursor(capsys):
    from nsteer.report import terminal

    terminal.print_reply("[bold]t", chat.Reply("a\x1b[2Jb", "[red]c", {2: {"touched": 1.0, "relative_change": 0.5}}))
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\\x1b[2Jb" in said and "[red]c" in said and "[bold]t" in said
    assert "moved by 50.0% of its length, at 1 layer\n" in said
