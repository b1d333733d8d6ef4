"""Turns summaries, sizes, previews and stores into what a terminal shows; plain text when piped."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from nsteer.errors import printable
from nsteer.science.axis import word

if TYPE_CHECKING:
    from nsteer.plan.check import Study


class Out(Console):
    """A console to which every text is text: nothing in it is markup, or an order to the terminal."""

    def __init__(self, **settings: Any):
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render_str(self, text: str, **settings: Any) -> Text:
        """What all that is printed as a str passes through, the cells of tables too."""
        return super().render_str(printable(text), **settings)


class Told(TextColumn):
    """A column of a progress bar to which every text is text."""

    def render(self, task: Task) -> Text:
        return rich_text(self.text_format.format(task=task), self.style, lines=False)


def rich_text(value: object, style: Any = "", lines: bool = True) -> Text:
    """Text under a style, which holds no markup of its own."""
    return Text(printable(value, lines), style=style)


def console() -> Out:
    """A console as wide as the terminal; a pipe gets plain text that is never cut."""
    return Out(width=None if sys.stdout.isatty() else 400)


def table(*columns: str) -> Table:
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        grid.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    return grid


@contextlib.contextmanager
def counting(what: str, total: int | None = None) -> Iterator[Callable[[str, int], None]]:
    """A bar on stderr, on a terminal alone, gone when the work is done. What it yields takes where the work is now, and
    how many more things are done with; `total`: of how many, where that is known."""
    columns = (Told("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(), Told("{task.fields[at]}"))
    out = Out(file=sys.stderr)
    shown = sys.stderr.isatty()
    with Progress(*columns, TimeRemainingColumn(), console=out, transient=True, disable=not shown) as bar:
        task = bar.add_task(what, total=total, at="")
        yield lambda at, more: bar.update(task, advance=more, at=at)


def print_evaluated(evaluation: Any) -> None:
    """What tasks of lm-eval came to without a vector and with it."""
    out, rows = console(), table("task", "metric", "unsteered", "±", "steered", "±")
    for row in evaluation.rows:
        pairs = [(row[side], row[f"{side}_stderr"]) for side in ("unsteered", "steered")]
        numbers = [f"{number:.4g}" if isinstance(number, int | float) else "" for pair in pairs for number in pair]
        rows.add_row(row["task"], row["metric"], *numbers)
    out.print(rows)
    about = evaluation.about
    what = f"{about['method']}/{about['emotion']} × {about['strength']:g} {about['scale']} ({about['op']})"
    out.print(f"{about['model']}, steered by {what} at layers {', '.join(map(str, about['layers']))}")


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """A spinner on stderr while a model writes, on a terminal alone."""
    if not sys.stderr.isatty():
        yield
        return
    with Out(file=sys.stderr).status("writing"):
        yield


# ---- run ----------------------------------------------------------------------------------------------------


def summary_data(summary: Any) -> dict[str, Any]:
    """A summary as JSON data."""
    data = asdict(summary)
    for name in ("failures", "failed_before"):
        data[name] = [{**failure, "cell": list(failure["cell"])} for failure in data[name]]
    return data


def print_summary(study: Study, summary: Any) -> None:
    """What was done, what it says, and the line of Python that opens it."""
    out = console()
    grid = table("stage", "done", "already there", "failed")
    failed = [failure.stage for failure in summary.failures]
    for stage in dict.fromkeys((*summary.skipped, *summary.done, *failed)):
        counts = summary.done.get(stage, 0), summary.skipped.get(stage, 0), failed.count(stage)
        grid.add_row(stage, *map(str, counts))
    out.print(grid)
    out.print(f"{summary.tokens:,} tokens in {summary.seconds:.1f} s")
    if not summary.done:
        why = ": what was missing failed" if summary.failures or summary.failed_before else ""
        out.print(f"0 cells done{why}" if why or summary.left else "nothing was missing: 0 cells done")
    for text in unloaded(summary):
        out.print(printable(text, lines=False))
    if summary.left:
        said = ", ".join(f"{cells(count)} of {stage}" for stage, count in summary.left.items())
        out.print(f"left: {said}: they rest on cells that other shards have not done; run the same command again")
    for text in summary.warnings:
        out.print(printable(f"note: {text}", lines=False))
    print_failures(out, "failed", summary.failures)
    print_failures(out, "failed before", summary.failed_before)
    if summary.failed_before:
        count = len(summary.failed_before)
        again = "it is" if count == 1 else "they are"
        out.print(f"{cells(count)} failed before: {again} tried again only with --retry-failed")
    print_verified(out, summary.verified)
    outcome(study, out)
    out.print(f'\nimport nsteer; results = nsteer.open("{summary.store}")')


def unloaded(summary: Any) -> Iterator[str]:
    """A line a model that could not be loaded: what of it is still missing."""
    for label, left in summary.unloaded.items():
        said = ", ".join(f"{cells(count)} of {stage}" for stage, count in left.items())
        yield f"{label} could not be loaded; still missing: {said or 'nothing'}"


def cells(count: int) -> str:
    """So many cells, in words."""
    return f"{count:,} cell{'' if count == 1 else 's'}"


def print_failures(out: Console, what: str, failures: list[Any]) -> None:
    """A line a failure, the first twenty; those that wait for others last."""
    for failure in sorted(failures, key=lambda failure: failure.kind == "waiting")[:20]:
        out.print(
            printable(f"{what}: {failure.stage} {' / '.join(map(str, failure.cell))}: {failure.reason}", lines=False)
        )
    if len(failures) > 20:
        out.print(f"... and {len(failures) - 20} more; the store keeps them all in its group failures")


def print_verified(out: Console, verified: list[dict[str, Any]]) -> None:
    if not verified:
        return
    equal = sum(compared["tokens_equal"] for compared in verified)
    differences = [
        compared["relative_difference"]
        for compared in verified
        if compared["relative_difference"] == compared["relative_difference"]
    ]
    text = f"{len(verified)} rows run again one at a time: tokens equal in {equal}"
    if differences:
        text += f", pooled streams within {max(differences):.1e} (relative)"
    out.print(text)


def outcome(study: Study, out: Console) -> None:
    """The judges' verdicts as small tables: share of continuations that each calls the emotion steered to."""
    from nsteer.science import analysis
    from nsteer.store import results

    given = study.plan.all_judges()
    if not given or not study.plan.steer:
        return
    opened = results.open(study.plan.store)
    if "judged" not in opened:
        return
    for name, spec in given.items():
        score = opened["judged"].score
        if name not in score.judge.values.tolist():
            continue
        by = "" if list(given) == ["judge"] else f" by {name}"
        rates = analysis.draws_together(analysis.target_rate(score.sel({"judge": name}), spec.targets).load())
        strengths = rates.strength.values.tolist()
        if not int(rates.n.sum()):
            continue  # it has judged nothing
        grid = table("model / op / layers / method / control", *[f"{s:g}" for s in strengths], "n")
        rows = rates.stack(row=("model", "op", "layer_set", "method", "control")).transpose("row", "strength")
        for i, key in enumerate(rows.row.values):
            row = rows.isel(row=i)
            if int(row.n.sum()):
                shown = ["-" if not n else f"{rate:.0%}" for rate, n in zip(row.rate.values, row.n.values, strict=True)]
                grid.add_row(" / ".join(map(str, key)), *shown, str(int(row.n.max())))
        as_what = word("as the emotion steered to, by strength (n: continuations)")
        out.print(f"\njudged{by} {as_what}")
        out.print(grid)


# ---- tune ---------------------------------------------------------------------------------------------------


def print_tuned(tuning: Any) -> None:
    """What is best for each vector, tuned and held out, beside its controls; then what was done."""
    out = console()
    columns = ("layers", "strength", "tried", "scored on", "score", "n", "random", "strength 0", "perplexity ratio")
    grid = table(word("model / method / emotion"), *columns)
    for line in tuning.lines:
        name = rich_text(" / ".join((line["model"], line["method"], line["emotion"])))
        if not line["layer_set"]:
            grid.add_row(name, "-", "-", str(line["tried"]), rich_text(line["reason"]))
        for split, arms in line["scores"].items():
            best = arms["vector"]
            shown = [_scored(arms[arm]) for arm in ("vector", "random", "zero")]
            setting = (line["layer_set"], f"{line['strength']:g}", str(line["tried"]))
            ratio = f"{best['ratio']:.2f}"
            grid.add_row(name, *map(rich_text, setting), split, shown[0], str(best["n"]), *shown[1:], ratio)
    out.print(grid)
    summary = tuning.summary
    done = sum(summary.done.values())
    out.print(f"{done} cells done, {summary.tokens:,} tokens in {summary.seconds:.1f} s")
    out.print("the score tuned is that of the best of many, and too high for it: the one held out is not")
    for text in summary.warnings:
        out.print(printable(f"note: {text}", lines=False))
    print_failures(out, "failed", summary.failures)
    print_failures(out, "failed before", summary.failed_before)


def _scored(scores: dict[str, Any]) -> str:
    return f"{scores['value']:.2f} ({scores['low']:.2f} to {scores['high']:.2f})"


# ---- check --------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """A time to wait, roughly: `40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_size(study: Study, size: Any) -> None:
    """The size of a job."""
    out = console()
    grid = table("model", "stage", "cells", "in store", "rows to do", "batches", "tokens (about)")
    for stage in size.stages:
        own = f"{stage.cells} (+{stage.shared} shared)" if stage.shared else stage.cells
        name = f"{stage.stage} by {stage.judge}" if stage.judge else stage.stage
        values = (printable(name), own, stage.done, stage.rows, stage.forwards, f"{stage.tokens:,}")
        grid.add_row(rich_text(stage.model), *map(str, values))
    out.print(grid)
    left = size.total("cells") - size.total("done")
    done = f"{size.total('done')} in" if size.looked else "without a look into"  # no URL is fetched here
    out.print(f"{size.total('cells')} cells, {done} {study.plan.store}, {left} to do")
    memory = max(size.memory.values(), default=0)
    out.print(
        f"about {size.total('tokens'):,} tokens; about {memory / 2**20:,.0f} MiB for the largest model and a full batch"
    )
    if size.seconds:
        by = (
            "by tokens/s that this store has measured"
            if size.measured
            else "an estimate: not measured in this store yet"
        )
        out.print(f"about {duration(size.seconds)} on this CPU ({by}); about {size.disk / 2**20:,.0f} MiB of disk")
    if study.plan.batch.max_tokens_in_flight == "auto" and size.max_tokens_in_flight:
        shown = min(size.max_tokens_in_flight.values())
        out.print(f"batches of up to {shown:,} padded tokens on this CPU; on a GPU by what is free there")
    out.print(f"{study.document.file}: no problems")


# ---- show ---------------------------------------------------------------------------------------------------


def print_preview(study: Study, shown: dict[str, Any]) -> None:
    """The resolved plan, then the programs' code."""
    from io import StringIO

    from ruamel.yaml import YAML

    text = StringIO()
    yaml = YAML()
    yaml.width = 110
    yaml.dump({"plan": shown["plan"], "models": json.loads(json.dumps(shown["models"]))}, text)
    out = console()
    out.print(text.getvalue(), end="", soft_wrap=True)
    for name, protocol in shown["protocols"].items():
        if protocol["assumed"]:
            said = f"# {name}: {', '.join(protocol['assumed'])} assumed, not stated by {protocol['from']}"
            out.print(printable(said, lines=False), soft_wrap=True)
    for digest, program in shown["programs"].items():
        head = printable(f"# ---- program {digest}: {program['stage']} of {program['model']} ----", lines=False)
        out.print(f"\n{head}\n\n{program['source']}", end="", soft_wrap=True)


# ---- ls -----------------------------------------------------------------------------------------------------


def store_data(opened: Any) -> dict[str, Any]:
    """What is in a store, as JSON data."""
    groups, failed = {}, failed_cells(opened)
    for path in opened:
        group = opened[path]
        done = int(group.cell.sel({"cell_field": "fingerprint"}).notnull().sum()) if "cell" in group else 0
        total = int(group.cell.sel({"cell_field": "fingerprint"}).size) if "cell" in group else 0
        dims = {str(dim): int(n) for dim, n in group.sizes.items() if dim != "cell_field"}
        variables = [str(name) for name in group.data_vars if name != "cell"]
        groups[path] = {
            "dims": dims,
            "variables": variables,
            "cells": total,
            "done": done,
            "failed": failed.get(path, 0),
            "misplaced": opened.misplaced[path],
        }
    return groups


def failed_cells(opened: Any) -> dict[str, int]:
    """How many cells of each group failed and were not made good."""
    if "failures" not in opened:
        return {}
    records = opened["failures"]
    broken = records.group.values[~records.resolved.values.astype(bool)].tolist()
    return {path: broken.count(path) for path in dict.fromkeys(broken) if path}


def print_store(opened: Any) -> None:
    """What is in a store: a line a group."""
    out = console()
    grid = table("group", "cells done", "variables", "dims")
    grid.columns[2].justify = grid.columns[3].justify = "left"
    for path, group in store_data(opened).items():
        dims = ", ".join(f"{dim} {n}" for dim, n in group["dims"].items())
        done = f"{group['done']}/{group['cells']}" + (f", {group['failed']} failed" if group["failed"] else "")
        done += f", {group['misplaced']} of other labels" if group["misplaced"] else ""
        grid.add_row(path, done, ", ".join(group["variables"]), dims)
    out.print(grid)


# ---- report -------------------------------------------------------------------------------------------------


VERDICTS = ("agrees", "differs", "inconclusive", "cannot be compared")


def print_claims(claims: Any, report: Any, whole: bool = False) -> None:
    """Totals by verdict, and a line a row in four columns; rows that can not be compared are counted unless `whole`."""
    out = console()
    counts = claims.verdict.value_counts()
    totals = ", ".join(f"{int(counts.get(name, 0))} {name}" for name in VERDICTS)
    out.print(rich_text(f"{len(claims)} rows: {totals}", "bold"))
    shown = claims if whole else claims[claims.verdict != VERDICTS[-1]]
    for what, group in shown.groupby(["claim", "what"], sort=False):
        claim, text = what
        out.print(rich_text(f"\n{claim}. {text}; paper: {group.paper.iloc[0]}", "bold"))
        grid = table("of", "ours", "n", "verdict")
        for column in grid.columns:
            column.justify = "left"
        for row in group.itertuples():
            told = row.verdict + (f": {row.why}" if row.why else "")
            ours = row.ours + (f" [{row.low:.3g}, {row.high:.3g}]" if row.low == row.low else "")
            against = f"\nbeside: {row.control}" if row.control and whole else ""
            grid.add_row(*[rich_text(text) for text in (row.scope, ours + against, str(row.n or ""), told)])
        out.print(grid)
    left = len(claims) - len(shown)
    if left:
        hint = "`--verdict cannot` shows why, `--claim 4` all of a claim with its controls"
        out.print(rich_text(f"\n{left} rows can not be compared: {hint}"))
    out.print(rich_text(str(report.attrs.get("multiplicity", "")).split(":")[0] + " of the table, counted together"))


# ---- chat -----------------------------------------------------------------------------------------------------


def line_editing() -> None:
    """Arrows and history for what is typed, where the system has them."""
    try:
        import readline  # noqa: F401
    except ImportError:  # Windows
        return


def print_reply(title: str, reply: Any) -> None:
    """What a model said without a vector and with it, in two columns, and how far the vector moved the stream."""
    out = console()
    if reply.steered is None:
        out.print(rich_text(reply.unsteered.strip()))
        return
    grid = Table(box=None, pad_edge=False, header_style="bold", expand=sys.stdout.isatty(), padding=(0, 2, 0, 0))
    for name in ("unsteered", title):
        grid.add_column(rich_text(name), ratio=1, overflow="fold")
    grid.add_row(*(rich_text(text.strip()) for text in (reply.unsteered, reply.steered)))
    out.print(grid)
    touched = sum(receipt["touched"] for receipt in reply.receipts.values())
    moved = sum(
        receipt["touched"] * receipt["relative_change"] for receipt in reply.receipts.values() if receipt["touched"]
    )
    if touched:
        at = f"{len(reply.receipts)} layer{'s' * (len(reply.receipts) > 1)}"
        out.print(rich_text(f"the stream moved by {moved / touched:.1%} of its length, at {at}", "dim"))


# ---- doctor -------------------------------------------------------------------------------------------------

STATE_STYLES = {"ok": "green", "warn": "yellow", "bad": "bold red"}


def print_findings(findings: list[Any]) -> None:
    """What the doctor found, the state of each first."""
    out = console()
    grid = table("", "what", "found", "what to do")
    for finding in findings:
        style = STATE_STYLES.get(finding.state, "")
        grid.add_row(rich_text(finding.state, style), finding.name, finding.value, finding.hint)
    for column in grid.columns[1:]:
        column.justify = "left"
    out.print(grid)
