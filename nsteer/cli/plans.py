"""Commands that take a plan: run, derive, check, show. Heavy imports happen inside commands."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from nsteer.cli.base import (
    AS_JSON,
    HOST,
    ON,
    OUTSIDE,
    PLAN,
    SET,
    TRUST,
    TRUST_JUDGE,
    command,
    located,
    of_store,
    ray_address,
    say,
    speak_of,
)
from nsteer.errors import in_a_line
from nsteer.plan import named, start
from nsteer.science import axis


@command
@PLAN
@SET
@OUTSIDE
@click.option("--threads", type=click.IntRange(1), metavar="N", help="CPU threads, whatever the plan says.")
@click.option("--verify-rows", default=0, metavar="N", help="Run N random rows of each model again, one at a time.")
@click.option("--remote", is_flag=True, help="On an NDIF server (the same as --set executor=ndif).")
@HOST
@click.option("--retry-failed", is_flag=True, help="Also try cells again that failed before for a permanent reason.")
@click.option("--on", metavar="ray[://…]", callback=ray_address, help=ON)
@click.option(
    "--workers", type=click.IntRange(1), metavar="N", help="With --on: maximum number of workers.  [as many as fit]"
)
@click.option("--shard", metavar="I/N", help="Do only the I-th of N shards of PLAN, as in a job array: 1/8 to 8/8.")
@click.option(
    "--wait",
    type=click.FloatRange(0),
    metavar="MINUTES",
    help="With --shard: how long to wait for cells of other shards.  [0]",
)
@TRUST
@TRUST_JUDGE
@click.option("--quiet", is_flag=True, help="Print no progress.")
@AS_JSON
def run(
    plan: str,
    settings: tuple[str, ...],
    allow_outside: bool,
    threads: int | None,
    verify_rows: int,
    remote: bool,
    host: str | None,
    retry_failed: bool,
    on: str | None,
    workers: int | None,
    shard: str | None,
    wait: float | None,
    trust_remote_code: bool,
    trust_judge: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compute what PLAN asks for and its store lacks. Ctrl-C stops after the current batch; pressed twice, at once.

    \b
    Example:
      nsteer run plans/quickstart.yaml --set 'steer.strengths=[0.1,0.2]' --verify-rows 8
    """
    from nsteer.plan import check

    if on is None and workers:
        raise click.UsageError("--workers: with --on ray")
    if on is not None and (remote or verify_rows):
        raise click.UsageError(f"{'--remote' if remote else '--verify-rows'} does not go with --on")
    if on is not None and shard:
        raise click.UsageError("--shard does not go with --on: its workers share the plan out themselves")
    if wait is not None and not shard:
        raise click.UsageError("--wait: with --shard I/N")
    told = (*settings, *["executor=ndif"] * remote, *([f"threads={threads}"] if threads else []))
    study = check.load(plan, told, allow_outside=allow_outside, host=host)  # before what is heavy
    speak_of(study.plan.axis)
    from nsteer import runner
    from nsteer.runner import progress, shards, stopping

    chosen = shards.Shard.parsed(shard) if shard else None
    with stopping.Stop().listen() as stop:
        if on is not None:
            from nsteer import cluster
            from nsteer.cluster import showing

            summary = cluster.run(
                study,
                address=on or None,
                workers=workers,
                display=showing.Display() if quiet or as_json else showing.choose(),
                retry_failed=retry_failed,
                trust_remote_code=trust_remote_code,
                trust_judge=trust_judge,
                stop=stop,
            )
            return _told(study, summary, as_json)
        shown = progress.Progress() if quiet or as_json else progress.choose()
        summary = runner.run(
            study,
            progress=shown,
            verify_rows=verify_rows,
            retry_failed=retry_failed,
            trust_remote_code=trust_remote_code,
            trust_judge=trust_judge,
            stop=stop,
            shard=chosen,
            wait=60 * (wait or 0.0),
        )
    _told(study, summary, as_json)


def _told(study: Any, summary: Any, as_json: bool) -> None:
    """Prints what a run did; exit code 1 when something failed."""
    from nsteer.report import terminal

    if as_json:
        say(json.dumps(terminal.summary_data(summary)))
    else:
        terminal.print_summary(study, summary)
        _next(study)
    if summary.failures or summary.failed_before:
        sys.exit(1)


def _next(study: Any) -> None:
    """Ends with what was written under steering, and with what to try next."""
    if not (study.plan.steer or study.plan.edits):
        return
    from nsteer.report.overview import printing
    from nsteer.store import results

    try:
        printing.print_end(results.open(study.plan.store))
    except Exception as error:  # the run is done, and what can not be shown of its store is no failure of it
        say(f"note: what the store holds can not be shown here ({in_a_line(error)}); see nsteer report", err=True)


@command
@PLAN
@SET
@OUTSIDE
@HOST
@click.option("--retry-failed", is_flag=True, help="Also try cells again that failed before for a permanent reason.")
@TRUST
@TRUST_JUDGE
@click.option("--quiet", is_flag=True, help="Print no progress.")
@AS_JSON
def tune(
    plan: str,
    settings: tuple[str, ...],
    allow_outside: bool,
    host: str | None,
    retry_failed: bool,
    trust_remote_code: bool,
    trust_judge: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Search the best layer set and strength of each vector (`tune` in PLAN), and score them on held-out texts.

    \b
    Example:
      nsteer tune tune.yaml --set tune.cells=20
    """
    from nsteer.plan import check

    study = check.load(plan, settings, allow_outside=allow_outside, host=host)
    speak_of(study.plan.axis)
    from nsteer.report import terminal
    from nsteer.runner import progress, stopping, tuning

    with stopping.Stop().listen() as stop:
        tuned = tuning.tune(
            study,
            progress.Progress if quiet or as_json else progress.choose,
            retry_failed=retry_failed,
            trust_remote_code=trust_remote_code,
            trust_judge=trust_judge,
            stop=stop,
        )
    if as_json:
        data = {**terminal.summary_data(tuned.summary), "tuned": axis.renamed_records(tuned.lines)}
        say(json.dumps(tuning.without_nan(data)))
    else:
        terminal.print_tuned(tuned)
    if tuned.summary.failures or tuned.summary.failed_before:
        sys.exit(1)


@command
@PLAN
@SET
@OUTSIDE
@HOST
@click.option("--quiet", is_flag=True, help="Print no progress.")
def derive(plan: str, settings: tuple[str, ...], allow_outside: bool, host: str | None, quiet: bool) -> None:
    """Derive the vectors of PLAN again from the activations in its store. Loads no model.

    \b
    Example:
      nsteer derive plans/quickstart.yaml --set methods.generation.baseline=neutral_mean
    """
    from nsteer.plan import check

    study = check.load(plan, settings, allow_outside=allow_outside, host=host)
    from nsteer import runner
    from nsteer.runner import progress

    summary = runner.run(study, progress=progress.Progress() if quiet else progress.choose(), only="vectors")
    _told(study, summary, False)


@command
@PLAN
@SET
@OUTSIDE
@HOST
@click.option("--remote", is_flag=True, help="Also pack every program as for an NDIF server; needs no server.")
@click.option(
    "--on", metavar="ray", callback=ray_address, help="Also estimate time and cost on workers; needs no cluster."
)
@click.option("--workers", type=click.IntRange(1), default=1, metavar="N", help="With --on: how many workers.  [1]")
@click.option("--price", type=float, metavar="NUMBER", help="With --on: price of one worker for an hour.")
@TRUST
@AS_JSON
def check(
    plan: str,
    settings: tuple[str, ...],
    allow_outside: bool,
    host: str | None,
    remote: bool,
    on: str | None,
    workers: int,
    price: float | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """Find every problem of PLAN, and print the size of its job. Loads no model.

    \b
    Example:
      nsteer check plans/families.yaml
    """
    from nsteer.plan import check as checks

    study = checks.load(plan, settings, allow_outside=allow_outside, host=host)
    from nsteer.report import terminal
    from nsteer.stages import notes, rates, sizing

    size = rates.timed(study, sizing.size(study, fetch=on is not None))
    travelling = _rehearsal(study, trust_remote_code) if remote else {}
    told = _forecast(study, size, workers, price) if on is not None else None
    if as_json:
        fields = {
            **size.data(),
            "notes": list(map(str, study.notes)),
            **({"remote": travelling} if remote else {}),
            **({"ray": told[0]} if told else {}),
        }
        say(json.dumps(fields))
    else:
        terminal.print_size(study, size)
        for name, weight in travelling.items():
            say(f"program {name} travels: {weight:,} bytes")
        for line in told[1] if told else ():
            say(line)
        for text in (*notes.notes(study), *study.notes, *checks.code_of_models(study)):
            say(f"note: {text}")


def _rehearsal(study: Any, trusted: bool) -> dict[str, int]:
    """The size of every program as it would travel."""
    from nsteer.runner import preview

    return preview.rehearsal(study, trusted)


def _forecast(study: Any, size: Any, workers: int, price: float | None) -> tuple[dict[str, Any], list[str]]:
    """What workers would take, as data and as lines."""
    from dataclasses import asdict

    from nsteer.cluster import forecast

    costs = forecast.forecast(study, size, workers, price)
    rates = {f"{model} {stage}": rate for (model, stage), rate in costs.rates.items()}
    return {**asdict(costs), "rates": rates, "unknown": [list(cell) for cell in costs.unknown]}, forecast.words(costs)


@command
@click.argument("path", type=click.Path(), metavar="PLAN|STORE", callback=located)
@SET
@OUTSIDE
@HOST
@click.option("--source", is_flag=True, help="Print the compiled code of every program.")
@click.option("--texts", type=click.IntRange(0), metavar="N", help="Of a store: number of steered texts to print.  [3]")
@click.option("--model", metavar="LABEL", help="Of a store: only this model.")
@click.option("--emotion", "--concept", "emotion", metavar="LABEL", help="Of a store: only this emotion, or concept.")
@click.option("--strength", type=float, metavar="NUMBER", help="Of a store: only this strength.")
@TRUST
@AS_JSON
def show(
    path: str,
    settings: tuple[str, ...],
    allow_outside: bool,
    host: str | None,
    source: bool,
    trust_remote_code: bool,
    as_json: bool,
    texts: int | None,
    **filters: Any,
) -> None:
    """Show a PLAN as it will run, with every knob resolved and the programs it compiles to; or the results in a STORE.

    \b
    Example:
      nsteer show plans/quickstart.yaml --source
    """
    if "://" in path or Path(path).is_dir():
        if settings:
            raise click.UsageError("--set changes a plan; a store is as it is")
        return _show_store(path, source, as_json, 3 if texts is None else texts, filters)
    if given := [f"--{name}" for name, value in {"texts": texts, **filters}.items() if value is not None]:
        raise click.UsageError(f"{', '.join(given)}: for a store; {path} is no folder")
    from nsteer.plan import check as checks

    study = checks.load(path, settings, allow_outside=allow_outside, host=host)
    from nsteer.report import terminal
    from nsteer.runner import preview

    shown = preview.preview(study, programs=source, trust_remote_code=trust_remote_code)
    say(json.dumps(shown)) if as_json else terminal.print_preview(study, shown)


@of_store
def _show_store(path: str, source: bool, as_json: bool, texts: int, filters: dict[str, Any]) -> None:
    from nsteer.report import display, reporting, shown
    from nsteer.store import results

    opened = results.open(path)
    speak_of(opened.axis)
    data = shown.view(opened, reporting.rules(opened), texts, filters, source)
    if as_json:
        return say(
            json.dumps(
                {**data, "dose": axis.renamed_records(data["dose"]), "texts": axis.renamed_records(data["texts"])}
            )
        )
    display.print_view(data, source)


@command
@click.argument("name", required=False)
@AS_JSON
def plans(name: str | None, as_json: bool) -> None:
    """List the plans that come with nsteer, which run, check and show take by their names; or print the one NAMEd.

    \b
    Example:
      nsteer plans quickstart > mine.yaml
    """
    if name is not None:
        from nsteer.errors import PlanError, Problem

        if name not in named.shipped():
            raise PlanError([Problem("", repr(name), "a plan that comes with nsteer", named.hint(name))])
        text = named.shipped()[name].read_text(encoding="utf-8")
        return say(json.dumps({"name": name, "text": text}) if as_json else text.rstrip())
    purposes = named.purposes()
    if as_json:
        return say(json.dumps(purposes))
    for executor, said in purposes.items():
        say(f"{executor}: {said.split('. ')[0].rstrip('. ')}")


@command
@click.argument("folder", type=click.Path(file_okay=False), default=".")
@click.option("--kind", type=click.Choice(list(start.KINDS)), default="contrast", help="Kind of plan.  [contrast]")
def init(folder: str, kind: str) -> None:
    """Write a commented plan and a sample CSV into FOLDER (this one when left out), to be changed. Overwrites nothing.

    contrast: pairs of texts make a direction, which steers. emotion: texts of several labels make a vector each, which
    steer. capture: activations of texts.

    \b
    Example:
      nsteer init mine --kind contrast
    """
    plan, sample = start.begin(kind, folder)
    say(f"wrote {plan} and {sample}")
    say(f"nsteer run {shlex.quote(str(plan))}")
