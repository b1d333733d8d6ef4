"""Commands that take a store: report, ls. Heavy imports happen inside commands."""

from __future__ import annotations

import json

import click

from nsteer.cli.base import AS_JSON, command


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
