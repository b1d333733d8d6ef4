"""Commands that take a store: report, ls. Heavy imports happen inside commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from nsteer.cli.base import AS_JSON, command
from nsteer.errors import StoreError


@command
@click.argument("store", type=click.Path(file_okay=False))
@click.option(
    "-o",
    "--output",
    "outputs",
    multiple=True,
    type=click.Path(dir_okay=False),
    help="Also write FILE.html (a page with figures and texts) or FILE.csv (the table); repeatable.",
)
@AS_JSON
def report(store: str, outputs: tuple[str, ...], as_json: bool) -> None:
    """Set the claims of Jeong 2026 beside what STORE measured; keep the table in the store. Loads no model.

    \b
    Example:
      nsteer report store/jeong2026-zoo.zarr -o report.html -o claims.csv
    """
    kinds = {output: _kind(output) for output in outputs}
    from nsteer import results, terminal
    from nsteer.conductor import reporting

    opened = results.open(store)
    evidence = reporting.evidence(opened)
    found = reporting.report(opened, evidence)
    table = reporting.table(found)
    for output, kind in kinds.items():
        if kind == ".csv":
            _csv(table, output)
        else:
            from nsteer import page

            page.write(output, evidence, found, opened.path.name)
    click.echo(table.to_json(orient="records")) if as_json else terminal.print_claims(table, found)
    for output in outputs:
        click.echo(f"wrote {output}", err=True)


def _csv(table: Any, output: str) -> None:
    try:
        table.to_csv(output, index=False)
    except OSError as error:
        raise StoreError(f"can not write {output}: {error.strerror or error}; name another file with -o") from error


def _kind(output: str) -> str:
    """The ending of a file to write, before anything is computed for it."""
    kind = Path(output).suffix.lower()
    if kind not in (".csv", ".html"):
        raise click.BadParameter(f"{output}: expected a name that ends in .html or .csv", param_hint="-o")
    if not Path(output).parent.is_dir():
        raise StoreError(f"can not write {output}: no such folder; make it, or name another file with -o")
    return kind


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
