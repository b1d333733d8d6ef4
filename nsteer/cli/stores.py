"""Commands that take a store: report, ls, verify. Heavy imports happen inside commands."""

from __future__ import annotations

import json
import sys
from typing import Literal

import click

from nsteer.cli.base import AS_JSON, command

STORE = click.argument("store")  # a directory or a URL: the store itself tells what it is not


@command
@STORE
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
@STORE
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
@STORE
@click.option(
    "--repair", is_flag=True, help="Drop the records of broken cells, so that the next run computes them again."
)
@AS_JSON
def verify(store: str, repair: bool, as_json: bool) -> None:
    """Read every file of STORE and name what is missing, damaged or contradictory. Exit code 1 if anything is.

    \b
    Example:
      nsteer verify store/quickstart.zarr --repair
    """
    from nsteer.store import Store
    from nsteer.upkeep import printing
    from nsteer.upkeep.repair import repair as mend
    from nsteer.upkeep.verify import verify as look

    report = mend(Store(store)) if repair else look(Store(store))
    click.echo(json.dumps(printing.report_data(report))) if as_json else printing.print_report(report)
    if not report.clean:
        sys.exit(1)


@command
@STORE
def migrate(store: str) -> None:
    """Bring STORE, of an older layout, up to the layout of this nsteer. Copy it first if it is dear to you.

    \b
    Example:
      nsteer migrate store/quickstart.zarr
    """
    from nsteer.store import Store
    from nsteer.upkeep.migrate import migrate as bring_up

    done = bring_up(Store(store))
    click.echo("\n".join(f"{store}: {line}" for line in done) or f"{store}: nothing to do")


@command
@click.argument("stores", nargs=-1, required=True)
@click.option(
    "-o", "--output", required=True, metavar="OUT", help="The store they go into: a new one, or one that is there."
)
@click.option("--prefer", type=click.Choice(["first", "last"]), help="Whose word counts where cells differ.")
@AS_JSON
def merge(stores: tuple[str, ...], output: str, prefer: Literal["first", "last"] | None, as_json: bool) -> None:
    """Merge STORES, from several machines, into one. Cells on which they differ are left out and named (exit code 1).

    \b
    Example:
      nsteer merge a.zarr b.zarr -o store/all.zarr
    """
    from nsteer.store import Store
    from nsteer.upkeep import printing
    from nsteer.upkeep.merge import merge as bring_together

    merged = bring_together([Store(one) for one in stores], Store(output), prefer)
    click.echo(json.dumps(printing.merged_data(merged))) if as_json else printing.print_merged(merged, output)
    if merged.conflicts:
        sys.exit(1)
