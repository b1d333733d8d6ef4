"""Commands that take stores: report, ls, verify, migrate, merge, gc, diff. Heavy imports happen inside commands."""

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


@command
@STORE
@click.argument("plans", nargs=-1, required=True, type=click.Path(dir_okay=False))
@click.option("--delete", is_flag=True, help="Do it; otherwise it is only told.")
@click.option("--older-than", default=60.0, metavar="MINUTES", help="Age from which leftover files may go.  [60]")
@AS_JSON
def gc(store: str, plans: tuple[str, ...], delete: bool, older_than: float, as_json: bool) -> None:
    """Tell what of STORE no PLAN needs any more, and how large it is. Deletes nothing unless told to.

    \b
    Example:
      nsteer gc store/study.zarr plans/study.yaml plans/follow-up.yaml --delete
    """
    from nsteer import check

    studies = [check.load(plan) for plan in plans]
    from nsteer.store import Store
    from nsteer.upkeep import gc as collecting
    from nsteer.upkeep import printing

    opened = Store(store)
    found = collecting.plan(opened, studies, older_than * 60)
    if delete:
        collecting.collect(opened, found)
    click.echo(json.dumps(printing.gc_data(found))) if as_json else printing.print_gc(store, found)


@command
@click.argument("a")
@click.argument("b", required=False)
@click.option("--runs", nargs=2, type=int, metavar="M N", help="Compare two runs of one store, by their numbers.")
@AS_JSON
def diff(a: str, b: str | None, runs: tuple[int, int] | None, as_json: bool) -> None:
    """Compare store A with store B, cell by cell under the same labels. Exit code 0: equal, 1: they differ, 2: trouble.

    \b
    Example:
      nsteer diff here.zarr there.zarr
    """
    from nsteer.errors import StoreError
    from nsteer.store import Store
    from nsteer.upkeep import diff as comparing
    from nsteer.upkeep import printing

    if (b is None) == (runs is None):
        raise click.UsageError("give two stores, or one store and --runs M N")
    try:
        found = comparing.stores(Store(a), Store(b)) if b else comparing.runs(Store(a), *runs or (0, 0))
    except StoreError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
    click.echo(json.dumps(printing.diff_data(found))) if as_json else printing.print_diff(found)
    if not found.equal:
        sys.exit(1)
