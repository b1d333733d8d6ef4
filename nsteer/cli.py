"""The command line: thin commands over the library. Heavy imports happen inside commands."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from nsteer import __version__
from nsteer.errors import NsteerError, PlanError

PLAN = click.argument("plan", type=click.Path(dir_okay=False))
SET = click.option("--set", "settings", multiple=True, metavar="PATH=VALUE", help="Override a plan field; repeatable.")
AS_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nsteer")
def main() -> None:
    """Read and edit the residual streams of language models: plans in, labelled arrays out."""


def command(function: Callable) -> Callable:
    """Turns errors raised on purpose into messages and exit codes: 2 for a bad plan, 1 for the rest."""

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except PlanError as error:
            count = len(error.problems)
            click.echo(f"{error}\n{count} problem{'s' if count > 1 else ''}; no model was loaded", err=True)
            sys.exit(2)
        except NsteerError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(1)
        except KeyboardInterrupt:
            click.echo("interrupted; what was committed is kept: the same command goes on from there", err=True)
            sys.exit(130)

    return main.command()(guarded)


@command
@PLAN
@SET
@click.option("--verify-rows", default=0, metavar="N", help="Run N random rows of each model again, one at a time.")
@click.option("--remote", is_flag=True, help="On an NDIF server (the same as --set executor=ndif).")
@click.option("--host", metavar="URL", help="The NDIF server, with --remote.")
@click.option("--quiet", is_flag=True, help="No progress.")
@AS_JSON
def run(
    plan: str, settings: tuple[str, ...], verify_rows: int, remote: bool, host: str | None, quiet: bool, as_json: bool
) -> None:
    """Do what PLAN says and is not in its store yet.

    \b
    Example:
      nsteer run plans/quickstart.yaml --set steer.strengths=[0.1,0.2] --verify-rows 8
    """
    from nsteer import check

    study = check.load(plan, (*settings, *_remotely(remote, host)))  # before what is heavy: a bad plan is told at once
    from nsteer import conductor, terminal
    from nsteer.conductor import progress

    shown = progress.Progress() if quiet or as_json else progress.choose()
    summary = conductor.run(study, progress=shown, verify_rows=verify_rows)
    if as_json:
        click.echo(json.dumps(terminal.summary_data(summary)))
    else:
        terminal.print_summary(study, summary)
    if summary.failures:
        sys.exit(1)


def _remotely(remote: bool, host: str | None) -> list[str]:
    """`--remote` and `--host` as overrides of the plan."""
    return ["executor=ndif"] * remote + ([f"remote.host={host}"] if host else [])


@command
@PLAN
@SET
@click.option("--quiet", is_flag=True, help="No progress.")
def derive(plan: str, settings: tuple[str, ...], quiet: bool) -> None:
    """Derive the vectors of PLAN again from the activations in its store. Loads no model.

    \b
    Example:
      nsteer derive plans/quickstart.yaml --set methods.generation.baseline=neutral_mean
    """
    from nsteer import check

    study = check.load(plan, settings)
    from nsteer import conductor, terminal
    from nsteer.conductor import progress

    summary = conductor.run(study, progress=progress.Progress() if quiet else progress.choose(), only="vectors")
    terminal.print_summary(study, summary)
    if summary.failures:
        sys.exit(1)


@command
@PLAN
@SET
@click.option("--remote", is_flag=True, help="Also pack every program as for an NDIF server; needs no server.")
@AS_JSON
def check(plan: str, settings: tuple[str, ...], remote: bool, as_json: bool) -> None:
    """Find every problem of PLAN, and tell the size of its job. Loads no model.

    \b
    Example:
      nsteer check plans/families.yaml
    """
    from nsteer import check as checks

    study = checks.load(plan, settings)
    from nsteer import preview, sizing, terminal

    size = sizing.size(study)
    travelling = preview.rehearsal(study) if remote else {}
    if as_json:
        click.echo(json.dumps({**size.data(), "remote": travelling} if remote else size.data()))
    else:
        terminal.print_size(study, size)
        for name, weight in travelling.items():
            click.echo(f"program {name} travels: {weight:,} bytes")


@command
@PLAN
@SET
@click.option("--source", is_flag=True, help="Print the compiled source text of every program.")
@AS_JSON
def show(plan: str, settings: tuple[str, ...], source: bool, as_json: bool) -> None:
    """Show PLAN as it will run: every knob resolved, layers as indices, and the programs it compiles to.

    \b
    Example:
      nsteer show plans/quickstart.yaml --source
    """
    from nsteer import check as checks

    study = checks.load(plan, settings)
    from nsteer import preview, terminal

    shown = preview.preview(study, source=source)
    click.echo(json.dumps(shown)) if as_json else terminal.print_preview(study, shown)


@command
@click.argument("store", type=click.Path(file_okay=False))
@click.option("-o", "--output", type=click.Path(dir_okay=False), help="Also write the table as CSV.")
@AS_JSON
def report(store: str, output: str | None, as_json: bool) -> None:
    """Set the claims of Jeong 2026 beside what STORE measured; keep the table in the store. Loads no model.

    \b
    Example:
      nsteer report store/jeong2026-zoo.zarr -o claims.csv
    """
    from nsteer import results, terminal
    from nsteer.conductor import reporting

    found = reporting.report(results.open(store))
    table = reporting.table(found)
    if output:
        table.to_csv(output, index=False)
    click.echo(table.to_json(orient="records")) if as_json else terminal.print_claims(table, found)


@command
@click.argument("store", type=click.Path(file_okay=False))
@AS_JSON
def ls(store: str, as_json: bool) -> None:
    """List what is in STORE: groups, dims, cells done.

    \b
    Example:
      nsteer ls store/quickstart.zarr
    """
    from nsteer import results, terminal

    opened = results.open(store)
    click.echo(json.dumps(terminal.store_data(opened))) if as_json else terminal.print_store(opened)


@command
def schema() -> None:
    """Print the JSON Schema of plans, for editors.

    \b
    Example:
      nsteer schema > nsteer.schema.json
    """
    from nsteer.reference import json_schema

    click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@command
@click.option("--remote", is_flag=True, help="Also ask the NDIF server: reachable, key accepted, models running.")
@click.option("--host", metavar="URL", help="The NDIF server, with --remote.")
@AS_JSON
def doctor(remote: bool, host: str | None, as_json: bool) -> None:
    """Look over this installation: versions, combinations known to fail, devices, memory, caches.

    \b
    Example:
      nsteer doctor --remote
    """
    from dataclasses import asdict

    from nsteer import doctor as surgery
    from nsteer import terminal

    findings = surgery.report(remote, host)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings]))
    else:
        terminal.print_findings(findings)
    if surgery.worst(findings) == surgery.BAD:
        sys.exit(1)
