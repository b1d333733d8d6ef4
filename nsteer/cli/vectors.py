"""Commands about vectors themselves: export, import, bake, chat. Heavy imports happen inside commands."""

from __future__ import annotations

import json
from typing import Any

import click

from nsteer.cli.base import AS_JSON, command, of_store, say
from nsteer.cli.stores import STORE
from nsteer.errors import ExchangeError

LAYERS_ARE = ("block-index", "hidden-states", "one-based")


@command
@STORE
@click.option("-o", "--output", required=True, metavar="FILE", help="FILE.safetensors, .npz, .gguf, .json or .pt.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["raters", "inspect"]),
    help="raters: a blind table to fill in, and its key. inspect: eval logs of the continuations, into a folder.",
)
@click.option("--seed", type=int, default=0, metavar="NUMBER", help="Of a blind table: seed of its order.  [0]")
@click.option("--raters", type=click.IntRange(1, 9), default=1, metavar="NUMBER", help="Number of blind tables.  [1]")
@click.option(
    "--rows",
    type=click.IntRange(1),
    metavar="NUMBER",
    help="Of a blind table: maximum number of rows for each concept.  [all]",
)
@click.option("--model", metavar="LABEL", help="Only this model; needed where the store has several.")
@click.option("--method", "methods", multiple=True, metavar="LABEL", help="Only this method; repeatable.  [all]")
@click.option(
    "--emotion",
    "--concept",
    "emotions",
    multiple=True,
    metavar="LABEL",
    help="Only this emotion, or concept; repeatable.  [all]",
)
@click.option("--layer", metavar="LAYERS", help="These layers: 5, -1, 0.5, 2:6, 1,3-5.  [all that are known]")
@click.option("--op", type=click.Choice(["add", "clamp"]), default="add", help="For lm-eval: the op.  [add]")
@click.option(
    "--scale", type=click.Choice(["raw", "unit", "reference_norm"]), default="raw", help="Unit of strength.  [raw]"
)
@click.option(
    "--strength", type=float, default=1.0, metavar="NUMBER", help="Strength that the vectors are multiplied by.  [1]"
)
@AS_JSON
@of_store
def export(store: str, output: str, kind: str | None, layer: str | None, as_json: bool, **choices: Any) -> None:
    """Write vectors of STORE for others: .safetensors, .npz, .gguf (llama.cpp), .json (EasySteer), .pt (lm-eval).

    {method} and {emotion} (or {concept}) in FILE give every vector a file of its own. With --format raters it is a CSV
    of steered and unsteered texts, mixed, with a column for scores from 0 to 100; what each row is lies apart, in
    FILE.key.csv. With --format inspect these are eval logs of what the steered model wrote, for `inspect view`: -o is
    then a folder.

    \b
    Example:
      nsteer export store/quickstart.zarr -o happy.gguf --method generation --emotion happy --strength 4
    """
    table = {name: choices.pop(name) for name in ("seed", "raters", "rows")}
    if kind == "raters":
        return _table(store, output, as_json, {**choices, "layer": layer}, table)
    from nsteer.vectors import exchange

    if kind is not None:
        return _logs(store, output, as_json, {**choices, "layer": layer})

    layers = _layers(layer) if layer is not None else None
    files, notes = exchange.export(store, output, layers=layers, **choices)
    _told({"files": list(map(str, files)), "notes": notes}, [f"wrote {file}" for file in files], notes, as_json)


def _table(store: str, output: str, as_json: bool, choices: dict[str, Any], table: dict[str, Any]) -> None:
    """A blind table for each rater, and its key."""
    from nsteer.report import raters, reporting
    from nsteer.store import results

    usual = {"layer": None, "op": "add", "scale": "raw", "strength": 1.0, "model": None, "methods": (), "emotions": ()}
    if given := [name for name, default in usual.items() if choices[name] != default]:
        raise click.UsageError(f"--{given[0].removesuffix('s')}: of vectors, not of a blind table")
    evidence = reporting.evidence(results.open(store))
    files = raters.write(evidence, output, seed=table["seed"], raters=table["raters"], max_texts=table["rows"])
    note = f"keep {files[-1]} from the raters: it says what each row is"
    _told({"files": list(map(str, files)), "notes": [note]}, [f"wrote {file}" for file in files], [note], as_json)


def _logs(store: str, folder: str, as_json: bool, choices: dict[str, Any]) -> None:
    from nsteer.vectors.evals import logs

    vectors = {"layer": None, "op": "add", "scale": "raw", "strength": 1.0}
    if given := [name for name, default in vectors.items() if choices[name] != default]:
        raise click.UsageError(f"--{given[0]}: of vectors, not of eval logs")
    models = [choices["model"]] if choices["model"] is not None else []
    files = logs.write(store, folder, models=models, methods=choices["methods"], emotions=choices["emotions"])
    _told({"files": list(map(str, files)), "notes": []}, [f"wrote {file}" for file in files], [], as_json)


def _layers(text: str) -> Any:
    from nsteer.plan.layers import spoken

    try:
        return spoken(text)
    except LookupError as error:
        raise ExchangeError(f"layers: {error.args[0]}") from error


def _told(data: dict[str, Any], lines: list[str], notes: list[str], as_json: bool) -> None:
    if as_json:
        return say(json.dumps(data))
    say("\n".join([*lines, *(f"note: {note}" for note in notes)]))


@command
@STORE
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--model", "models", multiple=True, metavar="LABEL", help="Only this model; repeatable.  [all]")
@click.option("--method", "methods", multiple=True, metavar="LABEL", help="Only this method; repeatable.  [all]")
@click.option(
    "--variant",
    "variants",
    multiple=True,
    default=("raw",),
    type=click.Choice(["raw", "unit", "reference_norm"]),
    help="Length of the vectors, each in a split of its own; repeatable.  [raw]",
)
@click.option("--revision", metavar="BRANCH", help="The branch; created if it does not exist.  [main]")
@click.option("--public", is_flag=True, help="A new repository is public; otherwise it is private.")
@click.option("--dry-run", "folder", metavar="FOLDER", help="Write the files to FOLDER, and send nothing.")
@AS_JSON
@of_store
def push(store: str, repo: str, as_json: bool, **choices: Any) -> None:
    """Put the vectors of STORE into a data set on the Hugging Face Hub, with a card that describes them.

    Logs in as the hub's own client does: `hf auth login`, or HF_TOKEN. The plan of the last run goes with them.

    \b
    Example:
      nsteer push store/quickstart.zarr me/happy-vectors --dry-run happy-vectors
    """
    from nsteer.vectors import exchange

    pushed = exchange.push(store, repo, **choices)
    lines = [f"wrote {pushed.folder}/{file}" for file in pushed.files] if pushed.folder else []
    lines += [f"pushed {len(pushed.files)} files to {pushed.url} (commit {pushed.commit[:12]})"] if pushed.url else []
    _told(
        {"files": pushed.files, "folder": pushed.folder, "url": pushed.url, "commit": pushed.commit}, lines, [], as_json
    )


@command
@click.argument("file", type=click.Path(dir_okay=False), metavar="FILE|hub:OWNER/NAME[@REVISION]")
@click.option("--into", "store", required=True, metavar="STORE", help="The store: a new one, or one that exists.")
@click.option(
    "--model",
    metavar="ID",
    help="The model that the vectors belong to: hub id, directory, zoo/NAME.  [of hub: what its card says]",
)
@click.option("--revision", metavar="COMMIT", help="Its revision on the hub.")
@click.option("--label", metavar="LABEL", help="Its label in the store; the id when left out.")
@click.option(
    "--layer",
    "--layers",
    "layers",
    metavar="NUMBERS",
    help="The layer of all vectors, or those of FILE's rows in order: 14, 3,7,11, 0-5.  [what FILE names]",
)
@click.option(
    "--layers-are",
    type=click.Choice(LAYERS_ARE),
    help="How layers count: 0 is the first block; hidden_states, 0 the embeddings; or 1 is the first block.  "
    "[block-index where --layer is given]",
)
@click.option(
    "--rows", type=click.Choice(["layers", "emotions", "concepts"]), help="What the rows of a matrix stand for."
)
@click.option("--names", metavar="LABELS", help="The emotions, or concepts, of its rows, in order: joy,fear.")
@click.option("--method", metavar="LABEL", help="Their label on the method axis; FILE's own when left out.")
@click.option("--emotion", metavar="LABEL", help="Their label on the emotion axis; of several, the one wanted.")
@click.option("--concept", metavar="LABEL", help="The same in a store that has the axis concept in its place.")
@AS_JSON
def import_(file: str, store: str, layers: str | None, names: str | None, as_json: bool, **choices: Any) -> None:
    """Put the vectors of FILE into a store: a file, or hub:OWNER/NAME, a repository that `nsteer push` made.

    Files: .safetensors, .gguf, .npz, .npy, .pt (tensors alone), EasySteer's .json. A plan takes
    them by `directions: {NAME: {store: {path, method, emotion}}}`. No layer is guessed: what FILE does not say is asked
    for. Files that could run code are refused.

    \b
    Example:
      nsteer import honesty.pt --into mine.zarr --model zoo/llama --layer 3 --method caa --concept honesty
    """
    from nsteer.vectors import exchange

    if file.startswith(exchange.PREFIX):
        imported = exchange.pull(file, store, **_of_hub({**choices, "layers": layers, "names": names}))
    elif choices["model"] is None:
        raise click.UsageError(f"--model: whose vectors {file} holds")
    else:
        choices["layers"] = exchange.numbers(layers) if layers is not None else ()
        choices["names"] = [name.strip() for name in names.split(",")] if names is not None else ()
        imported = exchange.bring_in(file, store, **choices)
    lines = [
        f"imported {emotion} by {by} at blocks {_ranges(at)} (block index) of {where} into {store}"
        for (where, by, emotion), at in imported.cells.items()
    ]
    cells = [{"model": m, "method": by, imported.axis: of, "blocks": at} for (m, by, of), at in imported.cells.items()]
    _told({"cells": cells, "notes": imported.notes}, lines, imported.notes, as_json)


def _of_hub(choices: dict[str, Any]) -> dict[str, Any]:
    """The choices that a repository leaves open: its files say which layers and rows they hold."""
    said = {name: choices.pop(name) for name in ("layers", "layers_are", "rows", "names")}
    if given := [name for name, value in said.items() if value is not None]:
        raise click.UsageError(f"--{given[0].replace('_', '-')}: the files of a repository say it themselves")
    return choices


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in ranges)


@command
@STORE
@click.option("-o", "--output", required=True, metavar="FOLDER", help="The folder to write; it must not exist yet.")
@click.option("--model", metavar="LABEL", help="Only this model; needed where the store has several.")
@click.option("--method", required=True, metavar="LABEL", help="The vector's label on the method axis.")
@click.option(
    "--emotion",
    "--concept",
    "emotion",
    required=True,
    metavar="LABEL",
    help="Its label on the emotion, or concept, axis.",
)
@click.option("--op", type=click.Choice(["project_out", "add"]), default="project_out", help="The edit.  [project_out]")
@click.option(
    "--layer",
    metavar="LAYERS",
    help="project_out: the layer whose vector is taken out everywhere; add: the steered layers.  [the only one]",
)
@click.option("--strength", type=float, default=1.0, metavar="NUMBER", help="The fraction taken out; or the unit.  [1]")
@click.option("--scale", type=click.Choice(["raw", "unit"]), default="raw", help="Unit of strength of add.  [raw]")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
    help="Dtype of the saved weights; float32 rounds nothing.  [float32]",
)
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda:1, mps.  [auto]")
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="A text on which the folder is compared with the steered model; repeatable.  [three]",
)
@AS_JSON
@of_store
def bake(store: str, output: str, layer: str | None, prompts: tuple[str, ...], as_json: bool, **choices: Any) -> None:
    """Write the model of STORE with an edit in its weights, where these can hold it exactly.

    What is written is steered in any program.

    project_out takes a direction out of all that is written into the stream: embeddings, attention and MLP of every
    block. The folder gets its name once its logits were seen to be those of the steered model.

    \b
    Example:
      nsteer bake store/honesty.zarr -o honest-less --method contrast --concept honest --layer 3
    """
    from nsteer.vectors import baking

    layers = _layers(layer) if layer is not None else None
    baked = baking.bake(store, output, layers=layers, prompts=prompts or baking.PROMPTS, **choices)
    lines = [
        f"wrote {baked.folder}",
        f"its logits are those of the steered model to {baked.error:.1g} of their length; the edit moves them by "
        f"{baked.effect:.1g}",
    ]
    data = {"folder": str(baked.folder), "error": baked.error, "effect": baked.effect, "notes": baked.notes}
    _told(data, lines, baked.notes, as_json)


@command
@click.argument("model", metavar="MODEL")
@click.option("--vector", required=True, metavar="STORE:METHOD/EMOTION", help="The vector that steers.")
@click.option("--tasks", required=True, metavar="NAMES", help="Tasks of lm-eval: lambada_openai,piqa.")
@click.option("--strength", type=float, default=0.1, metavar="NUMBER", help="Strength.  [0.1]")
@click.option(
    "--layers", metavar="LAYERS", help="Steered layers: 5, -1, 0.5, 2:6, 3-5.  [every layer that the vector has]"
)
@click.option("--op", default="add", metavar="OP", help="The op.  [add]")
@click.option("--scale", type=click.Choice(["raw", "unit", "stream_norm"]), help="Unit of strength.  [stream_norm]")
@click.option("--label", metavar="LABEL", help="The model's label in the store; MODEL when left out.")
@click.option("--revision", metavar="COMMIT", help="Its revision on the hub.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", help="[float32]")
@click.option("--device", metavar="NAME", help="cpu, cuda:1.  [cuda where there is one]")
@click.option("--include-path", metavar="FOLDER", help="Tasks of your own, as YAML files.")
@click.option("--limit", type=float, metavar="N", help="Only N documents of each task, or a share below 1.")
@click.option(
    "--num-fewshot", type=click.IntRange(0), metavar="N", help="Examples before each document.  [what the task says]"
)
@click.option("--batch-size", type=click.IntRange(1), default=8, metavar="N", help="Texts in one batch.  [8]")
@click.option("-o", "--output", metavar="FILE", help="Also write the table, with lm-eval's own results, as JSON.")
@AS_JSON
def eval_(model: str, tasks: str, output: str | None, as_json: bool, **choices: Any) -> None:
    """Run tasks of lm-eval on MODEL without a vector and with it, side by side.

    \b
    Example:
      nsteer eval zoo/llama --vector store/quickstart.zarr:generation/happy --tasks lambada_openai --limit 100
    """
    from nsteer.vectors.evals import harness
    from nsteer.vectors.evals.steered import Wanted

    mine = {name: choices.pop(name) for name in ("vector", "strength", "layers", "op", "scale", "label")}
    evaluated = harness.evaluate(model, [task.strip() for task in tasks.split(",")], Wanted(**mine), **choices)
    if output is not None:
        harness.save(output, evaluated)
    if as_json:
        return say(json.dumps({"nsteer": evaluated.about, "rows": evaluated.rows}))
    from nsteer.report import terminal

    terminal.print_evaluated(evaluated)


@command
@click.argument("model", metavar="MODEL")
@click.option("--vector", required=True, metavar="STORE:METHOD/EMOTION", help="The vector at the start.")
@click.option("--strength", type=float, default=0.1, metavar="NUMBER", help="Strength.  [0.1]")
@click.option(
    "--layers", metavar="LAYERS", help="Steered layers: 5, -1, 0.5, 2:6, 3-5.  [every layer that the vector has]"
)
@click.option(
    "--scale",
    type=click.Choice(["raw", "unit", "stream_norm"]),
    default="stream_norm",
    help="Unit of strength.  [stream_norm]",
)
@click.option(
    "--chat", type=click.Choice(["auto", "never"]), default="auto", help="never: continue every line.  [auto]"
)
@click.option("--system", default="", metavar="TEXT", help="System prompt, for a model with a chat template.")
@click.option(
    "--temperature", type=float, default=0.0, metavar="NUMBER", help="Temperature of sampling; 0 is greedy.  [0]"
)
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, metavar="SHARE", help="Nucleus sampling.  [1]"
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, metavar="N", help="Seed of sampling; the same on both sides.  [0]"
)
@click.option(
    "--max-new-tokens",
    "new_tokens",
    type=click.IntRange(1),
    default=60,
    help="Maximum number of tokens for each line.  [60]",
)
@click.option("--label", metavar="LABEL", help="The model's label in the store; MODEL when left out.")
@click.option("--revision", metavar="COMMIT", help="Its revision on the hub.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), default="float32", help="[float32]")
@click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda:1, mps.  [auto]")
@click.option("--gguf", metavar="FILE", help="The GGUF file, of a repository or a directory that has several.")
@click.option("--peft", metavar="DIRECTORY", help="An adapter that is merged into the model.")
def chat(model: str, layers: str | None, **choices: Any) -> None:
    """Talk with MODEL, steered and unsteered side by side. /help lists what can be changed in between.

    \b
    Example:
      nsteer chat zoo/llama --vector store/quickstart.zarr:generation/happy --strength 0.2 --layers 1-3
    """
    from nsteer.report import terminal
    from nsteer.vectors import chat as chatting

    talk = chatting.start(model, layers=layers, tell=say, **choices)
    kind = "has a chat template" if talk.templated else "continues what you write"
    say(f"{talk.facts.label} {kind}; {talk.title()}; /help")
    terminal.line_editing()
    chatting.talk(
        talk, lambda: input("> "), say, lambda name, reply: terminal.print_reply(name.title(), reply), terminal.writing
    )
